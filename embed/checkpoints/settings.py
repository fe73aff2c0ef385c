"""embed.json of a model folder: settings that its other files cannot say, digests, and the origin of the model.

{"embedding": {"matryoshka": [128, 1024],   prefixes trained
               "separator": true,           a separator token stands between the chunks of a document
               "contextual": false,         the model is made for chunks in their document
               "tanh": false,               float32 vectors are tanh(v)
               "pooling": "mean",           of a text's hidden states, or last
               "max_length": null,          tokens of the longest text; null means no limit
               "context_length": null},     tokens of the longest document in training; a longer one is encoded in
                                            windows; null means no windows
 "files": {name: sha256},                   every file that changes a vector
 "provenance": {...}}
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embed import paths
from embed.checkpoints import foreign
from embed.checkpoints.names import CONFIG, INDEX, TOKENIZER_FILES
from embed.models.pooling import POOLINGS
from embed.models.transformer import TransformerConfig

FILE, CARD = "embed.json", "README.md"
EMBEDDING = ("matryoshka", "separator", "contextual", "tanh", "pooling", "max_length", "context_length")
# The files that are read, besides weights and the folders of modules.
READ = (CONFIG, INDEX, *TOKENIZER_FILES, *foreign.FILES)


def problems(embedding, config: TransformerConfig) -> list[str]:
    """The problems of embedding settings, as sentences."""
    if not isinstance(embedding, Mapping):
        return [f"embedding is {embedding!r:.80}, expected an object"]
    messages = [f"embedding lacks {name}" for name in EMBEDDING if name not in embedding]
    messages += [f"embedding has the unknown field {name}" for name in embedding if name not in EMBEDDING]
    if messages:
        return messages
    prefixes = embedding["matryoshka"]
    if not isinstance(prefixes, (list, tuple)) or not all(_is_count(p) and p <= config.hidden_size for p in prefixes):
        messages.append(f"matryoshka is {prefixes!r}, expected a list of prefixes in 1..{config.hidden_size}")
    for name in ("separator", "contextual", "tanh"):
        if not isinstance(embedding[name], bool):
            messages.append(f"{name} is {embedding[name]!r}, expected true or false")
    if embedding["pooling"] not in POOLINGS:
        messages.append(f"pooling is {embedding['pooling']!r}, expected {' or '.join(POOLINGS)}")
    for name in ("max_length", "context_length"):
        if embedding[name] is not None and not _is_count(embedding[name]):
            messages.append(f"{name} is {embedding[name]!r}, expected a positive number of tokens or null")
    return messages


def changes(embedding, other: Mapping) -> list[str]:
    """How settings of an embed.json, which may be malformed, differ from other ones, as sentences."""
    embedding = embedding if isinstance(embedding, Mapping) else {}
    pairs = {name: (embedding.get(name), other[name]) for name in EMBEDDING}
    return [f"{name} is {json.dumps(a):.80}, then {json.dumps(b)}" for name, (a, b) in pairs.items() if a != b]


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sha256} of files in a folder."""
    names = sorted(names)
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: paths.file_digest(folder / name), names)))


def write(folder: Path, embedding: Mapping, provenance: Mapping) -> None:
    """Write embed.json, the last file of a folder, with the digests of all others except the card."""
    files = digests(folder, paths.files(folder).keys() - {CARD, FILE})
    settings = {name: embedding[name] for name in EMBEDDING}
    paths.write_json(folder / FILE, {"embedding": settings, "files": files, "provenance": dict(provenance)})


def read(folder) -> dict | None:
    """embed.json of a folder, None if there is none. ValueError if it is malformed."""
    file = paths.path(folder) / FILE
    if not file.exists():
        return None
    document = paths.read_json(file)
    for name in ("files", "provenance"):
        if not isinstance(document, dict) or not isinstance(document.get(name), dict):
            raise ValueError(f"{file} is not what `embed export` writes: it has no {name}")
    return document


def differences(folder: Path, files: Mapping[str, str]) -> list[str]:
    """How a folder differs from the files in its embed.json, as sentences."""
    existing = {name for name in files if (folder / name).is_file()}
    changes = [f"{name} is missing" for name in sorted(files.keys() - existing)]
    changes += [f"{name} was changed" for name, digest in digests(folder, existing).items() if digest != files[name]]
    others = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return changes + [f"{name} was added" for name in others if name in READ or name.endswith(".safetensors")]


def check_output(folder, overwrite: bool = True) -> None:
    """ValueError unless `folder` does not exist or, with `overwrite`, is an export."""
    paths.check_output(folder, is_ours=is_export, overwrite=overwrite)


def is_export(folder) -> bool:
    """Whether the folder is an export. ValueError if it contains other files too, or a changed JSON file."""
    folder = paths.path(folder)
    if not folder.is_dir() or (document := read(folder)) is None:
        return False
    existing, advice = paths.files(folder), "move it away or choose another folder"
    for name in sorted(existing.keys() - document["files"].keys() - {FILE, CARD}):
        raise ValueError(f"{folder} holds {name}, which no export wrote: {advice}")
    for name, digest in document["files"].items():
        # A program that saves a model here rewrites its config.
        if name.endswith(".json") and name in existing:
            if paths.file_digest(existing[name]) != digest:
                raise ValueError(f"{folder} holds a {name} that differs from the export's: {advice}")
    return True
