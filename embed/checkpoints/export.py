"""The exported model: a folder that `embed.inference` loads and that holds no code and no pickle.

model.safetensors         float32; a tensor's name is its path in the parameter tree, joined with "."
config.json               format and version, architecture, embedding settings, provenance
sentencepiece.model       or tokenizer.json: whatever the tokenizer saves
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from embed.models.transformer import TransformerConfig, abstract_params, encoder_only

FORMAT = "embed"
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# How to compute is the reader's choice and an encoder has no output layer; everything else of the config is the model.
LEFT_OUT = {"attention", "dtype", "remat", "unroll", "dense_barrier", "tied"}
ARCHITECTURE = {f.name: f.type for f in dataclasses.fields(TransformerConfig) if f.name not in LEFT_OUT}
EMBEDDING = ("matryoshka", "separator", "max_length")


def export(
    folder, params, config: TransformerConfig, tokenizer, *, embedding: Mapping, provenance: Mapping, card: str = ""
) -> Path:
    """Write a model for inference; the folder appears whole or not at all.

    `embedding` has matryoshka (prefixes trained, list of int), separator (whether one stands between the chunks of
    a document) and max_length (tokens of a text, None = no limit); `provenance` is any JSON object (stages, commit,
    versions); `card` is the README.md, if any. An export that stands at `folder` is replaced, anything else there is an error.
    """
    config, params = encoder_only(config, params)
    check(folder, params, config, tokenizer, embedding)
    tensors = {name: np.asarray(value, np.float32) for name, value in flatten(params).items()}
    with replace_folder(folder, is_ours=is_export) as partial:
        tokenizer.save(partial)
        safetensors.numpy.save_file(tensors, partial / WEIGHTS, metadata={"format": FORMAT})
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "architecture": {name: getattr(config, name) for name in ARCHITECTURE},
            "embedding": {"dimensions": config.hidden_size, **{name: embedding[name] for name in EMBEDDING}},
            "tokenizer_digest": tokenizer.digest,
            "weights_digest": _digest(partial / WEIGHTS),
            "provenance": dict(provenance),
        }
        (partial / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def check(folder, params, config: TransformerConfig, tokenizer, embedding: Mapping) -> None:
    """Raise a ValueError that lists everything that is wrong with a model that is to be written to `folder`."""
    tensors = flatten(params)
    problems = [f"tensor {name} is not finite" for name, value in tensors.items() if not np.isfinite(value).all()]
    problems += _tensor_problems({name: value.shape for name, value in tensors.items()}, config)
    problems += embedding_problems(embedding, config)
    if tokenizer.vocab_size > config.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
    if problems:
        raise ValueError(f"cannot export to {folder}: " + "; ".join(problems))


def read(folder) -> tuple[dict, TransformerConfig, dict]:
    """Parameters (float32 NumPy), architecture, and config.json's other sections: embedding, provenance, digests.

    A folder that is not there, or lacks a file: FileNotFoundError. Whatever is wrong inside: one ValueError that
    lists every problem.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        state = f"{folder} lacks {' and '.join(missing)}" if folder.is_dir() else f"there is no folder {folder}"
        raise FileNotFoundError(
            f"{state}: expected an exported model, a folder with {CONFIG}, {WEIGHTS} and a tokenizer"
        )
    config, settings, problems = _read_config(folder / CONFIG)
    tensors, tensor_problems = _read_tensors(folder / WEIGHTS, config)
    problems += tensor_problems
    if problems:
        raise ValueError(f"{folder} is not a usable export: " + "; ".join(problems))
    return unflatten(tensors), config, settings


def is_export(folder) -> bool:
    """Whether the folder's config.json says that this module wrote it."""
    try:
        return json.loads((Path(folder) / CONFIG).read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def flatten(params: Mapping) -> dict:
    """{path joined with ".": leaf} of a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(tensors: Mapping) -> dict:
    """The nested dict of which `flatten` gave `tensors`."""
    params: dict = {}
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params


def check_replaceable(folder, *, is_ours) -> None:
    """Refuse a folder that `replace_folder` would refuse: for before the work, not behind it."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and (is_ours(folder) or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and was not written by this command; remove it or choose another path")


@contextlib.contextmanager
def replace_folder(folder, *, is_ours) -> Iterator[Path]:
    """A new sibling to write into that takes the name `folder` when the block ends without an error.

    What stands there already is replaced only if it is an empty folder or `is_ours(folder)` holds. A block that is
    interrupted leaves the old folder as it was.
    """
    check_replaceable(folder, is_ours=is_ours)
    folder = Path(os.path.abspath(folder))
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        os.rename(old, folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _read_config(path: Path) -> tuple[TransformerConfig | None, dict, list[str]]:
    """config.json as (architecture or None, settings, problems)."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        return None, {}, [f"{CONFIG} is not JSON ({error})"]
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        return None, {}, [f'{CONFIG} has format {found!r}, expected "{FORMAT}"']
    if document.get("format_version") != FORMAT_VERSION:
        version = document.get("format_version")
        return None, {}, [f"format version {version!r} is unknown, this program reads {FORMAT_VERSION}"]
    architecture, settings = document.get("architecture"), dict(document)
    problems, config = [], None
    if not isinstance(architecture, dict):
        problems.append(f"{CONFIG} has no architecture")
    else:
        unknown, missing = architecture.keys() - ARCHITECTURE.keys(), ARCHITECTURE.keys() - architecture.keys()
        problems += [f"architecture has the unknown field {name}" for name in sorted(unknown)]
        problems += [f"architecture lacks {name}" for name in sorted(missing)]
        for name in sorted(ARCHITECTURE.keys() & architecture.keys()):
            value, kind = architecture[name], ARCHITECTURE[name]
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not number or value <= 0:
                problems.append(f"architecture has {name}={value!r}, expected a positive {kind.__name__}")
        if not problems:
            try:
                config = TransformerConfig(**architecture)
            except ValueError as error:
                problems.append(str(error))
    embedding = settings.get("embedding")
    if not isinstance(embedding, dict):
        problems.append(f"{CONFIG} has no embedding section")
    elif config:
        problems += embedding_problems({k: v for k, v in embedding.items() if k != "dimensions"}, config)
    return config, settings, problems


def _read_tensors(path: Path, config: TransformerConfig | None) -> tuple[dict, list[str]]:
    """The tensors and what is wrong with them; without a config only whether the file can be read."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            types = {name: slice_.get_dtype() for name, slice_ in slices.items()}
            problems = [f"tensor {name} is {t}, expected F32" for name, t in types.items() if t != "F32"]
            if config:
                problems += _tensor_problems({name: tuple(s.get_shape()) for name, s in slices.items()}, config)
            return ({} if problems or config is None else {name: file.get_tensor(name) for name in slices}), problems
    except safetensors.SafetensorError as error:
        return {}, [f"{path.name} is truncated or damaged ({error})"]


def _tensor_problems(shapes: Mapping[str, tuple], config: TransformerConfig) -> list[str]:
    expected = {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"tensor {name} is not part of this architecture" for name in sorted(shapes.keys() - expected.keys())]
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name]:
            problems.append(f"tensor {name} has shape {list(shapes[name])}, expected {list(expected[name])}")
    return problems


def embedding_problems(embedding: Mapping, config: TransformerConfig) -> list[str]:
    """What is wrong with an embedding section (separator, max_length, matryoshka), as sentences; [] if nothing."""
    problems = [f"the embedding section lacks {name}" for name in EMBEDDING if name not in embedding]
    problems += [f"the embedding section has the unknown field {n}" for n in embedding if n not in EMBEDDING]
    if problems:
        return problems
    prefixes, separator, max_length = (embedding[name] for name in EMBEDDING)
    if not isinstance(prefixes, (list, tuple)) or not all(_is_count(p) and p <= config.hidden_size for p in prefixes):
        problems.append(f"matryoshka is {prefixes!r}, expected a list of prefixes in 1..{config.hidden_size}")
    if not isinstance(separator, bool):
        problems.append(f"separator is {separator!r}, expected true or false")
    if max_length is not None and not _is_count(max_length):
        problems.append(f"max_length is {max_length!r}, expected a positive number of tokens or null")
    return problems


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
