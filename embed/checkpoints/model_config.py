"""How a model folder says what its model is: config.json and the files of sentence-transformers, read and written."""

import json
from collections.abc import Mapping
from pathlib import Path

from embed.checkpoints.names import CONFIG, FIELDS, FIXED, PPLX
from embed.models.transformer import TransformerConfig

# Modules of sentence-transformers that change nothing of a vector but its length or its precision.
MODULES = ("Transformer", "Pooling", "Normalize", "FlexibleQuantizer")
# Where sentence-transformers finds its Transformer module. The same class is at home in base.modules, but that path exists in 5.4
# to 5.6 as well, which allow a transformers that ignores is_causal. This one exists from 6.0: older releases fail.
TRANSFORMER = "sentence_transformers.multi_vector_encoder.model.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE, TANH = "sentence_transformers.base.modules.dense.Dense", "torch.nn.modules.activation.Tanh"
QUANTIZER = "st_quantize.FlexibleQuantizer"


def read(fields) -> tuple[TransformerConfig | None, list[str]]:
    """The architecture that a config.json tells of, None if there are problems, and these as sentences."""
    kind = fields.get("model_type") if isinstance(fields, dict) else fields
    if kind not in ("qwen3", PPLX):
        return None, [f"config.json has model_type {kind!r}, expected qwen3 or {PPLX}"]
    problems, values = [], {}
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"config.json has rope parameters {rope!r}, expected an object")
        rope = {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
        problems.append(f"config.json has rope parameters {rope!r}, expected rope_type 'default'")
    thetas = {x for x in (fields.get("rope_theta"), rope.get("rope_theta")) if x is not None}
    if len(thetas) > 1:
        problems.append(f"config.json has two values of rope_theta, {sorted(thetas, key=str)}")
    named = {ours: (theirs, fields.get(theirs)) for ours, theirs in FIELDS.items()}
    named["rope_theta"] = "rope_theta", next(iter(thetas), None)
    for ours, (theirs, value) in named.items():
        whole = ours not in ("norm_eps", "rope_theta")
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            problems.append(f"config.json has {theirs}={value!r}, expected a positive {'whole ' * whole}number")
        values[ours] = value
    for name, expected in FIXED.items():
        if (value := fields.get(name, expected)) != expected:
            problems.append(f"config.json has {name}={value!r}, expected {expected!r}")
    layers = fields.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        problems.append(f"config.json has layer_types {layers!r:.80}, expected full_attention alone")
    if problems:
        return None, problems
    try:
        return TransformerConfig(**values, tied=fields.get("tie_word_embeddings", False) is True), []
    except ValueError as error:
        return None, [f"config.json: {error}"]


def read_embedding(fields: dict, folder: Path) -> tuple[dict, list[str]]:
    """How texts become vectors in a folder of others, and what of it is not done here.

    The separator is that of the released contextual models (arXiv 2602.11151); the files of sentence-transformers, where they
    are, must say mean pooling and nothing beyond.
    """
    model = fields.get("auto_map")
    model = model.get("AutoModel") if isinstance(model, dict) else ""
    tokenizer = _json(folder / "tokenizer_config.json") or {}
    limits = [fields.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    limits += [(_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")]
    limits = [n for n in limits if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 10**9]
    contextual = "Contextual" in str(model)
    embedding = {"matryoshka": [], "separator": contextual, "contextual": contextual, "tanh": False}
    embedding["max_length"] = min(limits, default=None)
    problems = []
    modules = _json(folder / "modules.json")
    for module in [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []:
        if str(module.get("type")).rpartition(".")[2] not in MODULES:
            problems.append(f"modules.json has {module.get('type')}, expected no other than {', '.join(MODULES)}")
        if "Pooling" in str(module.get("type")):
            pooling = _json(folder / str(module.get("path")) / "config.json") or {}
            modes = {
                k.removeprefix("pooling_mode_") for k, on in pooling.items() if k.startswith("pooling_mode_") and on
            }
            modes |= {pooling["pooling_mode"]} if "pooling_mode" in pooling else set()
            if not modes <= {"mean", "mean_tokens"}:
                problems.append(f"{module.get('path')}/config.json pools by {sorted(modes)}, expected the mean")
    prompts = _json(folder / "config_sentence_transformers.json") or {}
    if prompt := (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")):
        problems.append(
            f"config_sentence_transformers.json puts the prompt {prompt!r} before texts, which is not done here"
        )
    return embedding, problems


def _json(path: Path):
    """A JSON file's content, None where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def documents(config: TransformerConfig, format: str, embedding: Mapping, end_id: int) -> dict[str, object]:
    """{name: content} of the JSON files of a format: "" for ours, "pplx", "onnx". The tokenizer's are its own."""
    if format == "onnx":
        return {CONFIG: _config(config, format, embedding, end_id)}
    modules = [(TRANSFORMER, ""), (POOLING, "1_Pooling")]
    if format == "pplx":
        modules.append((QUANTIZER, "2_FlexibleQuantizer"))
    D, found = config.hidden_size, {}
    if embedding["tanh"]:
        modules.append((DENSE, "2_Dense"))
        found["2_Dense/config.json"] = {
            "in_features": D,
            "out_features": D,
            "bias": False,
            "activation_function": TANH,
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
    return found | {
        CONFIG: _config(config, format, embedding, end_id),
        "modules.json": [dict(idx=i, name=str(i), path=p, type=t) for i, (t, p) in enumerate(modules)],
        "1_Pooling/config.json": {
            "embedding_dimension": D,
            "pooling_mode": "mean",
            "include_prompt": True,
            # As older programs ask for it.
            "word_embedding_dimension": D,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_lasttoken": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
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
        "eos_token_id": end_id,  # some programs insist on one
        "pad_token_id": end_id,
    }
    if format == "pplx":
        kind = "PPLXQwen3ContextualModel" if embedding["contextual"] else "PPLXQwen3Model"
        model |= {
            "architectures": [kind],
            "model_type": PPLX,
            "auto_map": {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{kind}"},
        }
        del model["is_causal"]
    return model
