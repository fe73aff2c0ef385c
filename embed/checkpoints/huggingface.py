"""Checkpoints in the layout of the Hugging Face hub: Qwen3 and pplx-embed, in and out (arXiv 2602.11151).

    checkpoint = huggingface.open_checkpoint(huggingface.resolve("Qwen/Qwen3-0.6B-Base"))
    params = checkpoint.params(shardings)

A folder holds config.json, *.safetensors and a tokenizer. Three kinds are read: `qwen3`, a causal language model;
`qwen3` with `"is_causal": false`, an encoder; `bidirectional_pplx_qwen3`, an encoder, dense or contextual. Nothing but
safetensors is read and no code of a checkpoint is run.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, for safetensors
import numpy as np
import safetensors
import safetensors.numpy

from embed import tokenizers
from embed.checkpoints import export
from embed.models.transformer import TransformerConfig, abstract_params, encoder_only

# A parameter of ours -> a tensor of theirs; {} is the layer. Causal models have "model." before all but the head.
NAMES = {
    "embedding": "embed_tokens.weight",
    "layers.attention_norm": "layers.{}.input_layernorm.weight",
    "layers.query": "layers.{}.self_attn.q_proj.weight",
    "layers.key": "layers.{}.self_attn.k_proj.weight",
    "layers.value": "layers.{}.self_attn.v_proj.weight",
    "layers.query_norm": "layers.{}.self_attn.q_norm.weight",
    "layers.key_norm": "layers.{}.self_attn.k_norm.weight",
    "layers.output": "layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "layers.gate": "layers.{}.mlp.gate_proj.weight",
    "layers.up": "layers.{}.mlp.up_proj.weight",
    "layers.down": "layers.{}.mlp.down_proj.weight",
    "norm": "norm.weight",
    "head": "lm_head.weight",
}
# How many leading dimensions of a weight of ours are its input. Theirs is the matrix [output, input], transposed.
INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
# A field of ours -> a field of their config.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
PPLX = "bidirectional_pplx_qwen3"
# What our encoder computes; a checkpoint that says otherwise is another architecture.
FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
# Modules of sentence-transformers that change nothing of a vector but its length or its precision.
MODULES = ("Transformer", "Pooling", "Normalize", "FlexibleQuantizer")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file that is written
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", *tokenizers.SENTENCEPIECE_FILES]
# Of a repository: no code, no pickle, no other format, no weights but those at its root.
FILES = ["*.json", "*.safetensors", *tokenizers.SENTENCEPIECE_FILES]
OTHER_FILES = ["*/*.safetensors"]
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def resolve(source, revision: str | None = None, files=FILES) -> Path:
    """The folder of a checkpoint: `source` itself, or the snapshot of a hub id "owner/name" in the local cache.

    A hub id is downloaded by huggingface_hub unless it is in the cache; HF_HUB_OFFLINE=1 downloads nothing.
    `revision` is a branch, tag or commit of a hub id. FileNotFoundError says why there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a hub id, {source} is a folder")
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"there is no folder {source}: expected an exported model, or a hub id in the form owner/name"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source), revision=revision, allow_patterns=files, ignore_patterns=OTHER_FILES
            )
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"there is no folder {source}, and {source}{at} cannot be had from the hub: {str(error).splitlines()[0]}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked folder: every tensor is there, has its shape and can be read."""

    folder: Path
    config: TransformerConfig
    causal: bool
    embedding: dict  # separator, max_length, matryoshka, as `export` has them
    provenance: dict  # what an export of ours says of its run
    tensors: Mapping[str, Path]  # their name -> file
    prefix: str  # before their names, all but the head

    def params(self, shardings=None, dtype=np.float32) -> dict:
        """The parameter tree, float32 or bfloat16, one array after the other straight into its shards.

        `shardings` is a tree like the parameters', None for this process's first device. Beside the arrays themselves
        no more is held than the blocks of one array that go to this process's devices.
        """
        abstract = export.flatten(abstract_params(self.config))
        if shardings is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = export.unflatten(dict.fromkeys(abstract, device))
        shardings = export.flatten(shardings)
        arrays = {}
        for name, leaf in abstract.items():

            def read(index, name=name, shape=leaf.shape):
                return self._block(name, shape, index, dtype)

            arrays[name] = jax.make_array_from_callback(leaf.shape, shardings[name], read)
        return export.unflatten(arrays)

    @property
    def digest(self) -> str:
        """sha256 over config.json and the files with weights."""
        total = hashlib.sha256()
        for path in [self.folder / export.CONFIG, *sorted(set(self.tensors.values()))]:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def _block(self, name: str, shape: tuple, index: tuple, dtype) -> np.ndarray:
        """The part `index` of our array `name`."""
        ranges = [range(n)[part] for n, part in zip(shape, index)]
        out = np.empty([len(r) for r in ranges], dtype)
        if not name.startswith("layers."):
            out[...] = self._read(NAMES[name], tuple(slice(r.start, r.stop) for r in ranges))
            return out
        layers, *ranges = ranges
        split = INPUTS.get(name.removeprefix("layers."), 0)
        parts = [_merge(shape[1:][a:b], ranges[a:b]) for a, b in ((split, None), (0, split)) if ranges[a:b]]
        for i, layer in enumerate(layers):
            out[i] = self._read(NAMES[name].format(layer), tuple(parts)).T.reshape(out.shape[1:])
        return out

    def _read(self, name: str, part: tuple) -> np.ndarray:
        name = name if name == NAMES["head"] else self.prefix + name
        # Opened anew for each tensor: pages of a mapped file count as this process's memory until it is closed.
        with safetensors.safe_open(self.tensors[name], framework="numpy") as file:
            return file.get_slice(name)[part]


def _merge(shape: tuple, ranges: list[range]) -> slice:
    """The slice of dimensions that are one dimension in their matrix: only the first may be a part of its whole."""
    inner = int(np.prod(shape[1:], dtype=int))
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:])):
        raise ValueError(f"cannot read the part {ranges} of {shape}: only its first dimension may be split")
    return slice(ranges[0].start * inner, ranges[0].stop * inner)


def open_checkpoint(folder) -> Checkpoint:
    """Check a folder and read its config, but no tensor yet. Everything that is wrong is listed in one ValueError."""
    folder = Path(folder)
    path = folder / export.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {export.CONFIG}")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    config, problems = _read_config(fields)
    embedding, how_problems = _read_embedding(fields if isinstance(fields, dict) else {}, folder, config)
    causal = bool(config) and fields["model_type"] != PPLX and fields.get("is_causal", True) is not False
    problems += [] if causal else how_problems  # how a causal model's texts become vectors is not taken over
    files, file_problems = _tensor_files(folder)
    problems += file_problems
    tensors, shapes, types = {}, {}, {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    if name in tensors:
                        problems.append(f"tensor {name} is in {tensors[name].name} and in {file.name}")
                    if part.get_dtype() not in DTYPES:
                        problems.append(f"tensor {name} is {part.get_dtype()}, expected {', '.join(DTYPES)}")
                    tensors[name], shapes[name], types[name] = file, tuple(part.get_shape()), part.get_dtype()
        except safetensors.SafetensorError as error:
            problems.append(f"{file.name} is truncated or damaged ({error})")
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    headless = fields.get("architectures") == ["Qwen3Model"] if config else False
    if (
        config and (headless or not causal) and NAMES["head"] not in tensors
    ):  # none is meant, whatever tie_word_embeddings says
        config = dataclasses.replace(config, tied=True)
    if config:
        # A tied model may carry its head all the same: it must be the embedding table itself.
        copy = NAMES["head"] if config.tied and NAMES["head"] in tensors else None
        if not file_problems:
            problems += _tensor_problems({n: s for n, s in shapes.items() if n != copy}, config, prefix)
        table = prefix + NAMES["embedding"]
        known = {name for name in (copy, table) if types.get(name) in DTYPES}
        if known == {copy, table} and not _equal(tensors[copy], copy, tensors[table], table):
            problems.append(f"tie_word_embeddings is true, but {copy} differs from {table}")
    if problems:
        raise ValueError(f"{folder} is not a checkpoint that can be read: " + "; ".join(problems))
    ours = fields.get(export.FORMAT) or {}
    return Checkpoint(folder, config, causal, embedding, ours.get("provenance") or {}, tensors, prefix)


def _read_config(fields) -> tuple[TransformerConfig | None, list[str]]:
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


def _read_embedding(fields: dict, folder: Path, config: TransformerConfig | None) -> tuple[dict, list[str]]:
    """How texts become vectors, and what of it is not done here.

    An export of ours says it. Otherwise: the separator of the released contextual models (arXiv 2602.11151), and the
    files of sentence-transformers, where they are, must say mean pooling and nothing beyond.
    """
    if export.FORMAT in fields:
        ours = fields[export.FORMAT]
        if not isinstance(ours, dict):
            return {}, [f"config.json has {export.FORMAT}={ours!r}, expected an object"]
        embedding = {name: ours[name] for name in export.EMBEDDING if name in ours}
        return embedding, export.embedding_problems(embedding, config) if config else []
    model = fields.get("auto_map")
    model = model.get("AutoModel") if isinstance(model, dict) else ""
    tokenizer = _json(folder / "tokenizer_config.json") or {}
    limits = [fields.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    limits += [(_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")]
    limits = [n for n in limits if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 10**9]
    embedding = {"matryoshka": [], "separator": "Contextual" in str(model), "max_length": min(limits, default=None)}
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


def _tensor_files(folder: Path) -> tuple[list[Path], list[str]]:
    if (index := folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [], [f"{INDEX} has no weight_map"]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    outside = [
        str(name) for name in names if not isinstance(name, str) or name != os.path.basename(name) or ".." in name
    ]
    if outside:
        return [], [f"{INDEX} names {name!r}, which is not a file of this folder" for name in outside]
    missing = [name for name in names if not (folder / name).is_file()]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not a safetensors file" for name in names if not name.endswith(".safetensors")]
    if not names:
        pickles = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        )
        found = f"; {', '.join(pickles)} is a pickle, which may run code when read" if pickles else ""
        problems.append(f"there is no .safetensors file{found}")
    return [] if problems else [folder / name for name in names], problems


def _tensor_problems(shapes: Mapping[str, tuple], config: TransformerConfig, prefix: str) -> list[str]:
    expected = dict(_their_shapes(config, prefix))
    problems = [f"tensor {name} is missing" for name in expected if name not in shapes]
    problems += [f"tensor {name} is not part of this architecture" for name in sorted(shapes.keys() - expected.keys())]
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            problems.append(f"tensor {name} has shape {list(shapes[name])}, expected {list(expected[name])}")
    return problems


def _their_shapes(config: TransformerConfig, prefix: str) -> Iterator[tuple[str, tuple]]:
    for name, leaf in export.flatten(abstract_params(config)).items():
        if not name.startswith("layers."):
            yield ("" if name == "head" else prefix) + NAMES[name], leaf.shape
            continue
        split, shape = INPUTS.get(name.removeprefix("layers.")), leaf.shape[1:]
        if split:
            shape = int(np.prod(shape[split:])), int(np.prod(shape[:split]))
        for layer in range(config.num_layers):
            yield prefix + NAMES[name].format(layer), shape


def _equal(a: Path, a_name: str, b: Path, b_name: str, rows: int = 4096) -> bool:
    with safetensors.safe_open(a, framework="numpy") as left, safetensors.safe_open(b, framework="numpy") as right:
        left, right = left.get_slice(a_name), right.get_slice(b_name)
        if left.get_shape() != right.get_shape():
            return False
        total = left.get_shape()[0]
        parts = [slice(i, min(i + rows, total)) for i in range(0, total, rows)]
        return all(np.array_equal(left[part], right[part]) for part in parts)


def tensors(params: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Their (name, tensor) of a parameter tree, one at a time, in the order of the layers."""
    flat = export.flatten(params)
    yield prefix + NAMES["embedding"], np.asarray(flat["embedding"])
    for layer in range(flat["layers.gate"].shape[0]):
        for name, stacked in flat.items():
            if name.startswith("layers."):
                array, split = np.asarray(stacked[layer]), INPUTS.get(name.removeprefix("layers."))
                if split:
                    array = np.ascontiguousarray(array.reshape(int(np.prod(array.shape[:split])), -1).T)
                yield prefix + NAMES[name].format(layer), array
    yield prefix + NAMES["norm"], np.asarray(flat["norm"])
    if "head" in flat:
        yield NAMES["head"], np.asarray(flat["head"])


def is_checkpoint(folder) -> bool:
    """Whether the folder's config.json names a kind of model, as all of the hub do and `embed.checkpoints.export` not."""
    try:
        return "model_type" in json.loads((Path(folder) / export.CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


LAYOUTS = ("sentence-transformers", "pplx")
# Where sentence-transformers finds its Transformer module. The same class is at home in base.modules, but that path exists in 5.4
# to 5.6 as well, which allow a transformers that ignores is_causal. This one exists from 6.0: older releases fail.
TRANSFORMER = "sentence_transformers.multi_vector_encoder.model.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
MARKER = ".embed-export"  # sha256 of the config.json that was written: a folder that others changed is not ours


def write(
    folder,
    params,
    config: TransformerConfig,
    tokenizer,
    *,
    layout: str,
    embedding: Mapping,
    provenance: Mapping,
    card: str,
) -> Path:
    """Write an encoder for other programs; the folder appears whole or not at all.

    `sentence-transformers`: a Qwen3 checkpoint that says `"is_causal": false`, with mean pooling. transformers honours that
    from 5.2; see `TRANSFORMER` for what keeps older sentence-transformers from running it causally. `pplx`: the layout of
    the released models, for the programs that know them; their code (configuration.py, modeling.py, st_quantize.py) is not
    written.
    `card` is the README.md.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} must be one of {', '.join(LAYOUTS)}")
    config, params = encoder_only(config, params)
    export.check(folder, params, config, tokenizer, embedding)
    with export.replace_folder(folder, is_ours=is_export) as partial:
        _write_tensors(partial, params)
        tokenizer.save_for_transformers(partial, embedding["max_length"])
        for name, document in _documents(config, layout, embedding, tokenizer.separator_id, provenance).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(json.dumps(document, indent=2) + "\n")
        (partial / "README.md").write_text(card, encoding="utf-8")
        mark(partial)
    return Path(folder)


def is_export(folder) -> bool:
    """Whether the folder stands as `write` left it."""
    try:
        config = (Path(folder) / export.CONFIG).read_bytes()
        return (Path(folder) / MARKER).read_text() == hashlib.sha256(config).hexdigest()
    except OSError:
        return False


def mark(folder: Path) -> None:
    """Make `is_export` true of a folder that is complete."""
    (folder / MARKER).write_text(hashlib.sha256((folder / export.CONFIG).read_bytes()).hexdigest())


def model_config(config: TransformerConfig, layout: str, embedding: Mapping, end_id: int, provenance: Mapping) -> dict:
    """config.json of an encoder in a layout."""
    longest = embedding["max_length"] or 32768
    model = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    model |= FIXED | {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "is_causal": False,
        "use_bidirectional_attention": True,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_position_embeddings": longest,
        "tie_word_embeddings": True,
        "use_cache": False,
        "dtype": "float32",
        "eos_token_id": end_id,  # some programs insist on one
        "pad_token_id": end_id,
        export.FORMAT: {name: embedding[name] for name in export.EMBEDDING} | {"provenance": dict(provenance)},
    }
    if layout == "pplx":
        kind = "PPLXQwen3ContextualModel" if embedding["separator"] else "PPLXQwen3Model"
        model |= {
            "architectures": ["PPLXQwen3Model"],
            "model_type": PPLX,
            "auto_map": {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{kind}"},
        }
        del model["is_causal"]
    return model


def _documents(config: TransformerConfig, layout: str, embedding: Mapping, end_id: int, provenance: Mapping) -> dict:
    """The JSON files of a layout, {path: content}."""
    modules = [(TRANSFORMER, ""), (POOLING, "1_Pooling")]
    if layout == "pplx":
        modules.append(("st_quantize.FlexibleQuantizer", "2_FlexibleQuantizer"))
    return {
        export.CONFIG: model_config(config, layout, embedding, end_id, provenance),
        "modules.json": [dict(idx=i, name=str(i), path=p, type=t) for i, (t, p) in enumerate(modules)],
        "1_Pooling/config.json": {
            "embedding_dimension": config.hidden_size, "pooling_mode": "mean", "include_prompt": True,
            # As older programs ask for it.
            "word_embedding_dimension": config.hidden_size, "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False, "pooling_mode_lasttoken": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""},
            "default_prompt_name": None, "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    }  # fmt: skip


def _write_tensors(folder: Path, params: Mapping) -> None:
    """model.safetensors, or several files of at most SHARD_BYTES and their index."""
    shards, size = [{}], 0
    for name, tensor in tensors(params):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], folder / export.WEIGHTS, metadata={"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
