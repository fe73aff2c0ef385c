"""config.json of a model folder, read and written, and the files of sentence-transformers, written."""

from collections.abc import Mapping

from embed.checkpoints.names import CONFIG, FIELDS, FIXED, PPLX
from embed.models.transformer import TransformerConfig

# The path of sentence-transformers' Transformer module. The class is defined in base.modules, but that path exists also
# in 5.4 to 5.6, which allow a transformers that ignores is_causal. This path exists since 6.0: older releases fail.
TRANSFORMER = "sentence_transformers.multi_vector_encoder.model.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE, TANH = "sentence_transformers.base.modules.dense.Dense", "torch.nn.modules.activation.Tanh"
IDENTITY, NORMALIZE = "torch.nn.modules.linear.Identity", "sentence_transformers.base.modules.normalize.Normalize"
MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
QUANTIZER = "st_quantize.FlexibleQuantizer"

# The allowed values of fields that change what an encoder computes. The first one is the default of a missing field.
ALLOWED = {name: (value,) for name, value in FIXED.items()} | {
    "is_causal": (True, False),
    "use_bidirectional_attention": (None, True, False),
    "tie_word_embeddings": (False, True),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "compression_config": (None,),
    "quantization": (None,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),  # another file of weights
}
TOKENS = "token_dimensions"  # our field of config.json, which transformers ignores: of late interaction


def read(fields) -> tuple[TransformerConfig | None, list[str]]:
    """(the architecture of a config.json, or None if there are problems; the problems as sentences)."""
    kind = fields.get("model_type") if isinstance(fields, dict) else fields
    if kind not in ("qwen3", PPLX):
        return None, [f"config.json has model_type {kind!r}, expected qwen3 or {PPLX}"]
    problems, values = [], {}
    rope, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")
    if rope and scaling and rope != scaling:  # transformers reads only rope_scaling, older versions rope_parameters
        problems.append(f"config.json has rope_scaling={scaling!r} and other rope_parameters={rope!r}, expected one")
    rope = scaling or rope or {}
    if not isinstance(rope, dict):
        problems.append(f"config.json has rope parameters {rope!r}, expected an object")
        rope = {}
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    if any(kind != "default" for kind in kinds) or rope.keys() - {"rope_type", "type", "rope_theta"}:
        problems.append(f"config.json has rope parameters {rope!r}, expected rope_type 'default'")
    thetas = [x for x in (fields.get("rope_theta"), rope.get("rope_theta")) if x is not None]
    if any(theta != thetas[0] for theta in thetas):
        problems.append(f"config.json has two values of rope_theta, {thetas}")
    named = {ours: (theirs, fields.get(theirs)) for ours, theirs in FIELDS.items()}
    named["rope_theta"] = "rope_theta", next(iter(thetas), None)
    for ours, (theirs, value) in named.items():
        whole = ours not in ("norm_eps", "rope_theta")
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < (2**31 if whole else float("inf")):
            problems.append(f"config.json has {theirs}={value!r}, expected a positive {'whole ' * whole}number")
        values[ours] = value
    values[TOKENS] = fields.get(TOKENS, 0)
    if type(values[TOKENS]) is not int or not 0 <= values[TOKENS] < 2**31:
        problems.append(f"config.json has {TOKENS}={values[TOKENS]!r:.80}, expected a whole number")
    for name, allowed in ALLOWED.items():
        value = fields.get(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            problems.append(f"config.json has {name}={value!r:.80}, expected {' or '.join(repr(x) for x in allowed)}")
    layers = fields.get("layer_types")
    full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
    if layers is not None and not (full and len(layers) == values["num_layers"]):
        problems.append(f"config.json has layer_types {layers!r:.80}, expected full_attention once per layer")
    problems += _causal_problems(fields)
    if problems:
        return None, problems
    try:
        return TransformerConfig(**values, tied=fields.get("tie_word_embeddings", False) is True), []
    except ValueError as error:
        return None, [f"config.json: {error}"]


def is_causal(fields: Mapping) -> bool:
    """Whether a config.json describes a causal language model."""
    return fields["model_type"] != PPLX and fields.get("is_causal", True)


def _causal_problems(fields: Mapping) -> list[str]:
    causal, both = is_causal(fields), fields.get("use_bidirectional_attention")
    if both is not None and both is causal:
        kind = "a causal model" if causal else "an encoder"
        return [f"config.json has use_bidirectional_attention={both!r}, but model_type and is_causal say {kind}"]
    if fields["model_type"] == PPLX and fields.get("is_causal", False):
        return [f"config.json has is_causal=True, but {PPLX} is an encoder"]
    return []


def documents(config: TransformerConfig, format: str, embedding: Mapping, end_id: int) -> dict[str, object]:
    """{name: content} of the JSON files of a format ("" for ours, "pplx", "onnx"), except the tokenizer's."""
    if format == "onnx":
        return {CONFIG: _config(config, format, embedding, end_id)}
    if config.token_dimensions:
        return _late_interaction(config, embedding, end_id)
    modules = [(TRANSFORMER, ""), (POOLING, "1_Pooling")]
    if format == "pplx":
        modules.append((QUANTIZER, "2_FlexibleQuantizer"))
    D, files = config.hidden_size, {}
    if embedding["tanh"]:
        modules.append((DENSE, "2_Dense"))
        files["2_Dense/config.json"] = _dense(D, D, TANH, "sentence_embedding")
    return files | {
        **_transformer(config, format, embedding, end_id, modules, "SentenceTransformer", "cosine"),
        "1_Pooling/config.json": {
            "embedding_dimension": D,
            "pooling_mode": "mean",
            "include_prompt": True,
            # The names that older programs read.
            "word_embedding_dimension": D,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_lasttoken": False,
        },
    }


def _late_interaction(config: TransformerConfig, embedding: Mapping, end_id: int) -> dict[str, object]:
    """The files of a MultiVectorEncoder: no prompts, no lengths of its own, no expansion of queries, no skipped words.

    The order of the modules is its own. The mask, which with these settings masks only padding, also undoes unpadding.
    """
    modules = [(TRANSFORMER, ""), (DENSE, "1_Dense"), (MASK, "2_MultiVectorMask"), (NORMALIZE, "3_Normalize")]
    of_tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    return {
        **_transformer(config, "", embedding, end_id, modules, "MultiVectorEncoder", "maxsim"),
        "1_Dense/config.json": _dense(config.hidden_size, config.token_dimensions, IDENTITY, "token_embeddings"),
        "2_MultiVectorMask/config.json": {
            "skiplist_words": [],
            "skiplist_tasks": ["document"],
            "keep_only_token_ids": None,
        },
        "3_Normalize/config.json": of_tokens,
    }


def _dense(inputs: int, outputs: int, activation: str, feature: str) -> dict:
    return {
        "in_features": inputs,
        "out_features": outputs,
        "bias": False,
        "activation_function": activation,
        "module_input_name": feature,
        "module_output_name": feature,
    }


def _transformer(
    config: TransformerConfig, format: str, embedding: Mapping, end_id: int, modules, kind: str, similarity: str
) -> dict[str, object]:
    """The files of transformers, and those that say how sentence-transformers uses its `modules` [(type, path), …]."""
    return {
        CONFIG: _config(config, format, embedding, end_id),
        "modules.json": [dict(idx=i, name=str(i), path=p, type=t) for i, (t, p) in enumerate(modules)],
        "config_sentence_transformers.json": {
            "model_type": kind,
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": similarity,
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    }


def _config(config: TransformerConfig, format: str, embedding: Mapping, end_id: int) -> dict:
    model = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    model |= FIXED | {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "is_causal": False,
        "use_bidirectional_attention": True,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_position_embeddings": embedding["max_length"] or 32768,
        "tie_word_embeddings": True,
        "use_cache": False,
        "dtype": "float32",
        "eos_token_id": end_id,  # some programs require one
        "pad_token_id": end_id,
    }
    if config.token_dimensions:
        model[TOKENS] = config.token_dimensions
    if format == "pplx":
        kind = "PPLXQwen3ContextualModel" if embedding["contextual"] else "PPLXQwen3Model"
        model |= {
            "architectures": [kind],
            "model_type": PPLX,
            "auto_map": {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{kind}"},
        }
        del model["is_causal"]
    return model
