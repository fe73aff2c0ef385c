"""Reads model folders in the layout of the Hugging Face hub: Qwen3, ours and pplx-embed (arXiv 2602.11151).

    model = model_folder.open_model("Qwen/Qwen3-0.6B-Base")
    params = model.params(shardings)

A folder contains config.json, *.safetensors and a tokenizer. Three kinds are read: `qwen3`, a causal language model;
`qwen3` with `"is_causal": false`, an encoder as `embed.checkpoints.export` writes it; `bidirectional_pplx_qwen3`, an
encoder, dense or contextual. Weights are read only from safetensors, and no code of a folder is run.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, for safetensors
import numpy as np
import safetensors

from embed import paths, tokenizers
from embed.checkpoints import foreign, model_config, names, settings
from embed.checkpoints.names import CONFIG, INDEX, INPUTS, NAMES, WEIGHTS
from embed.config import brief
from embed.models.transformer import TransformerConfig, abstract_params

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The files of a repository to download: no code, no pickle, and weights only from its root, of a projection or a tanh.
FILES = ["*.json", "model*.safetensors", "[12]_Dense/*.safetensors", *tokenizers.SENTENCEPIECE_FILES]
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def resolve(source, revision: str | None = None, files=FILES) -> Path:
    """The local folder of a model: `source` itself, or the snapshot of a hub id "owner/name" in the local cache.

    A hub id is downloaded by huggingface_hub unless it is in the cache; HF_HUB_OFFLINE=1 downloads nothing.
    `revision` is a branch, tag or commit of a hub id. FileNotFoundError says why there is no folder.
    """
    folder = Path(paths.path(source))
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a hub id, {source} is a folder")
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"there is no folder {source}: expected a model folder, or a hub id in the form owner/name"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=files))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"there is no folder {source}, and {source}{at} cannot be downloaded from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from None


def is_model(path) -> bool:
    """Whether a folder, on a disk or in a bucket, has a config.json with a model_type."""
    try:
        return "model_type" in paths.read_json(paths.path(path) / CONFIG)
    except (OSError, ValueError, TypeError):
        return False


def read_architecture(source) -> TransformerConfig:
    """The sizes of a model from its config.json. No weights are downloaded or read."""
    folder = paths.path(source) if paths.is_bucket(source) else resolve(source, files=[CONFIG])
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{source} has no {CONFIG}")
    config, problems = model_config.read(paths.read_json(folder / CONFIG))
    if problems:
        raise ValueError(f"{source} is not a model that can be read: {brief(problems)}")
    return config


def is_encoder(source, revision: str | None = None) -> bool:
    """Whether a model is one that we encode with, a bidirectional Qwen3, by its config.json. FileNotFoundError if none.

    Other programs may read the rest: other architectures, and causal models with pooling of the last token.
    """
    folder = paths.path(source) if paths.is_bucket(source) else resolve(source, revision, files=[CONFIG])
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{source} has no {CONFIG}")
    fields = paths.read_json(folder / CONFIG)
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    return kind in ("qwen3", names.PPLX) and not model_config.is_causal(fields)


def open_model(source, revision: str | None = None) -> "ModelFolder":
    """Check a model and read its config, but no tensor yet.

    `source` is a folder or the id of a repository on the hub, owner/name, at its `revision`. A folder in a bucket
    (gs://) is copied to this machine for the lifetime of the returned object. A folder with embed.json must be
    unchanged since its export.

    FileNotFoundError if there is no model. One ValueError lists all its problems.
    """
    with contextlib.ExitStack() as stack:
        if paths.is_bucket(source):
            if revision is not None:
                raise ValueError(f"revision={revision!r} is for a hub id, {source} is a folder")
            if paths.is_partial(source):
                raise ValueError(f"{source} is half an export, which was interrupted: export it again")
            if not paths.path(source).is_dir():
                raise FileNotFoundError(f"there is no folder {source}: expected a model folder")
            patterns = [*FILES, settings.FILE, settings.CARD]
            folder = stack.enter_context(
                paths.local(source, lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
            )
        else:
            folder = resolve(source, revision)
        model = _open(str(source), folder)
        weakref.finalize(model, stack.pop_all().close)
    return model


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A checked folder: every tensor exists, has the right shape and can be read."""

    source: str  # as given to `open_model`
    folder: Path
    config: TransformerConfig
    causal: bool
    embedding: dict  # settings.EMBEDDING: matryoshka, separator, contextual, tanh, max_length, context_length
    provenance: dict  # what an export says about its run; {} for third-party folders
    tensors: Mapping[str, Path]  # their name -> file
    prefix: str  # of their names, except head and projection
    exported: Mapping[str, str] | None  # {name: sha256} of embed.json, verified
    not_exported: tuple[str, ...]  # settings of a third-party folder that an export leaves out

    def params(self, shardings=None, dtype=np.float32) -> dict:
        """The parameter tree, float32 or bfloat16, read array by array directly into its shards.

        `shardings` is a tree like the parameters; None means this process's first device. Besides the arrays, memory
        holds only the blocks of one array for this process's devices. ValueError names tensors that are not finite in
        that dtype. All processes of a mesh call this, and the error is raised in all of them.
        """
        abstract = names.flatten(abstract_params(self.config))
        if shardings is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = names.unflatten(dict.fromkeys(abstract, device))
        shardings = names.flatten(shardings)
        arrays = {}
        for name, leaf in abstract.items():

            def read(index, name=name, shape=leaf.shape):
                return self._block(name, shape, index, dtype)

            arrays[name] = jax.make_array_from_callback(leaf.shape, shardings[name], read)
        params = names.unflatten(arrays)
        names.check_finite(params, self.source, self.prefix)
        return params

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The folder's tokenizer. ValueError if an encoder's tokenizer adds tokens to each text."""
        tokenizer = tokenizers.load(self.folder)
        if not self.causal and getattr(tokenizer, "adds_tokens", False):
            raise ValueError(f"{self.source}: tokenizer.json adds tokens to each text, which is not supported")
        return tokenizer

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) over weights, tokenizer and settings: everything that changes a vector."""
        files = self.exported
        if files is None:
            pooling = [str(path.relative_to(self.folder)) for path in self.folder.glob("*/config.json")]
            existing = [name for name in settings.READ if (self.folder / name).is_file()]
            files = settings.digests(self.folder, {*existing, *pooling, *(f.name for f in self.tensors.values())})
        embedding = {name: value for name, value in self.embedding.items() if name != "matryoshka"}
        return hashlib.sha256(json.dumps([dict(files), embedding], sort_keys=True).encode()).hexdigest()

    def _block(self, name: str, shape: tuple, index: tuple, dtype) -> np.ndarray:
        """The block `index` of our array `name`."""
        ranges = [range(n)[part] for n, part in zip(shape, index)]
        out = np.empty([len(r) for r in ranges], dtype)
        if not name.startswith("layers."):
            parts = tuple(slice(r.start, r.stop) for r in ranges)
            # Of a matrix that is transposed, the block of the other order.
            out[...] = self._read(NAMES[name], parts[::-1]).T if name in INPUTS else self._read(NAMES[name], parts)
            return out
        layers, *ranges = ranges
        split = INPUTS.get(name, 0)
        parts = [_merge(shape[1:][a:b], ranges[a:b]) for a, b in ((split, None), (0, split)) if ranges[a:b]]
        for i, layer in enumerate(layers):
            out[i] = self._read(NAMES[name].format(layer), tuple(parts)).T.reshape(out.shape[1:])
        return out

    def _read(self, name: str, part: tuple) -> np.ndarray:
        name = name if name in names.UNPREFIXED else self.prefix + name
        # Opened again for each tensor: pages of a mapped file count as this process's memory until it is closed.
        with safetensors.safe_open(self.tensors[name], framework="numpy") as file:
            return file.get_slice(name)[part]


def _merge(shape: tuple, ranges: list[range]) -> slice:
    """The slice of several dimensions that are one dimension of their matrix. Only the first one may be split."""
    inner = int(np.prod(shape[1:], dtype=int))
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:])):
        raise ValueError(f"cannot read the part {ranges} of {shape}: only its first dimension may be split")
    return slice(ranges[0].start * inner, ranges[0].stop * inner)


def _open(source: str, folder: Path) -> ModelFolder:
    """Read a folder and check it against its embed.json, if it has one."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    document = settings.read(folder)
    if document is None:
        return _read_folder(source, folder, None)
    if changes := settings.differences(folder, document["files"]):
        advice = "export it again"
        with contextlib.suppress(ValueError):
            other = _read_folder(source, folder, None).embedding
            advice += f", or delete {settings.FILE} to read it as a third-party folder"
            if lost := settings.changes(document.get("embedding"), other):
                advice += f", which changes its settings: {'; '.join(lost)}"
        raise ValueError(f"{source} was changed after its export: {brief(changes)}; {advice}")
    return _read_folder(source, folder, document)


def _read_folder(source: str, folder: Path, document: dict | None) -> ModelFolder:
    """Read a folder with `document`, its embed.json, or without one as a third-party folder."""
    fields = paths.read_json(folder / CONFIG)
    config, problems = model_config.read(fields)
    causal = bool(config) and model_config.is_causal(fields)
    for name, (what, advice) in foreign.UNSUPPORTED.items():
        if (folder / name).is_file():
            problems.append(f"{name} is {what}, which is not supported: {advice}")
    not_exported: list[str] = []
    if document is not None:
        embedding = document.get("embedding")
        problems += [f"{settings.FILE}: {p}" for p in settings.problems(embedding, config)] if config else []
    else:
        embedding, embedding_problems, not_exported = foreign.read_embedding(
            fields if isinstance(fields, dict) else {}, folder, config and config.hidden_size
        )
        problems += [] if causal else embedding_problems  # a causal model's way to compute vectors is not used
    files, file_problems = _tensor_files(folder)
    if config and config.token_dimensions and (folder / names.PROJECTION).is_file():
        files.append(folder / names.PROJECTION)
    problems += file_problems
    tensors, shapes, types = {}, {}, {}
    twice, untyped = [], []
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    if name in tensors:
                        twice.append(f"tensor {name} is in {tensors[name].name} and in {file.name}")
                    if part.get_dtype() not in DTYPES:
                        untyped.append(f"tensor {name} is {part.get_dtype()}, expected {', '.join(DTYPES)}")
                    tensors[name], shapes[name], types[name] = file, tuple(part.get_shape()), part.get_dtype()
        except safetensors.SafetensorError as error:
            problems.append(f"{file.name} is truncated or damaged ({error})")
    problems += [brief(listed, 3) for listed in (twice, untyped) if listed]
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    headless = fields.get("architectures") == ["Qwen3Model"] if config else False
    # A model that is used without a head counts as tied if it has none, whatever tie_word_embeddings says.
    if config and (headless or not causal) and NAMES["head"] not in tensors:
        config = dataclasses.replace(config, tied=True)
    if config:
        # A tied model may still contain a head, if it equals the embedding table.
        copy = NAMES["head"] if config.tied and NAMES["head"] in tensors else None
        if not file_problems:
            problems += _tensor_problems({n: s for n, s in shapes.items() if n != copy}, config, prefix)
        table = prefix + NAMES["embedding"]
        known = {name for name in (copy, table) if types.get(name) in DTYPES}
        if known == {copy, table} and not _equal(tensors[copy], copy, tensors[table], table):
            problems.append(f"tie_word_embeddings is true, but {copy} differs from {table}")
    if problems:
        raise ValueError(f"{folder} is not a model that can be read: {brief(problems)}")
    document = document or {}
    return ModelFolder(
        source,
        folder,
        config,
        causal,
        dict(embedding),
        document.get("provenance") or {},
        tensors,
        prefix,
        document.get("files"),
        tuple(not_exported),
    )


def _tensor_files(folder: Path) -> tuple[list[Path], list[str]]:
    if (index := folder / INDEX).is_file():
        try:
            files = sorted(set(paths.read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [], [f"{INDEX} has no weight_map"]
        if WEIGHTS not in files and (folder / WEIGHTS).is_file():  # transformers would read this file
            return [], [f"{INDEX} does not name {WEIGHTS}, which exists too: remove one of them"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    outside = [
        str(name) for name in files if not isinstance(name, str) or name != os.path.basename(name) or ".." in name
    ]
    if outside:
        return [], [f"{INDEX} names {name!r}, which is not a file of this folder" for name in outside]
    missing = [name for name in files if not (folder / name).is_file()]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not a safetensors file" for name in files if not name.endswith(".safetensors")]
    if not files:
        pickles = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        )
        hint = f"; {', '.join(pickles)} is a pickle, which may run code when read" if pickles else ""
        problems.append(f"there is no .safetensors file{hint}")
    return [] if problems else [folder / name for name in files], problems


def _tensor_problems(shapes: Mapping[str, tuple], config: TransformerConfig, prefix: str) -> list[str]:
    if config.num_layers > len(shapes):  # before the tensors of that many layers are listed
        return [f"config.json has num_hidden_layers={config.num_layers}, but there are {len(shapes)} tensors"]
    expected = names.shapes(config, prefix)
    missing = [name for name in expected if name not in shapes]
    unknown = sorted(shapes.keys() - expected.keys())
    wrong = [
        f"tensor {name} has shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [_about(missing, "missing"), _about(unknown, "not part of this architecture"), brief(wrong, 3)]
    return [problem for problem in problems if problem]


def _about(tensors: list[str], what: str) -> str:
    """The sentence that tensors are `what`; empty without tensors."""
    plural = len(tensors) > 1
    if not tensors:
        return ""
    return f"tensor{'s' * plural} {brief(tensors, 3, ', ')} {'are' if plural else 'is'} {what}"


def _equal(a: Path, a_name: str, b: Path, b_name: str, rows: int = 4096) -> bool:
    with safetensors.safe_open(a, framework="numpy") as left, safetensors.safe_open(b, framework="numpy") as right:
        left, right = left.get_slice(a_name), right.get_slice(b_name)
        if left.get_shape() != right.get_shape():
            return False
        total = left.get_shape()[0]
        parts = [slice(i, min(i + rows, total)) for i in range(0, total, rows)]
        return all(np.array_equal(left[part], right[part]) for part in parts)
