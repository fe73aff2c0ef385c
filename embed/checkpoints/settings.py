"""embed.json of a model folder: what its other files cannot say, their digests, and where the model comes from.

{"embedding": {"matryoshka": [128, 1024],   prefixes trained
               "separator": true,           a separator token stands between the chunks of a document
               "contextual": false,         the model is made for chunks in their document
               "tanh": false,               float32 vectors are tanh(v)
               "max_length": null},         tokens of the longest text, null for no limit
 "files": {name: sha256},                   every file that changes a vector
 "provenance": {...}}
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embed import paths
from embed.checkpoints import foreign
from embed.checkpoints.names import CONFIG, INDEX, TOKENIZER_FILES
from embed.models.transformer import TransformerConfig

FILE, CARD = "embed.json", "README.md"
EMBEDDING = ("matryoshka", "separator", "contextual", "tanh", "max_length")
# What is read of a folder beside its weights and what lies in the folders of modules.
READ = (CONFIG, INDEX, *TOKENIZER_FILES, *foreign.FILES)


def problems(embedding, config: TransformerConfig) -> list[str]:
    """What is wrong with embedding settings, as sentences; [] if nothing."""
    if not isinstance(embedding, Mapping):
        return [f"embedding is {embedding!r:.80}, expected an object"]
    found = [f"embedding lacks {name}" for name in EMBEDDING if name not in embedding]
    found += [f"embedding has the unknown field {name}" for name in embedding if name not in EMBEDDING]
    if found:
        return found
    prefixes, longest = embedding["matryoshka"], embedding["max_length"]
    if not isinstance(prefixes, (list, tuple)) or not all(_is_count(p) and p <= config.hidden_size for p in prefixes):
        found.append(f"matryoshka is {prefixes!r}, expected a list of prefixes in 1..{config.hidden_size}")
    for name in ("separator", "contextual", "tanh"):
        if not isinstance(embedding[name], bool):
            found.append(f"{name} is {embedding[name]!r}, expected true or false")
    if longest is not None and not _is_count(longest):
        found.append(f"max_length is {longest!r}, expected a positive number of tokens or null")
    return found


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sha256} of files of a folder."""

    def digest(name):
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(names)
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(digest, names)))


def write(folder: Path, embedding: Mapping, provenance: Mapping) -> None:
    """Write embed.json, the last file of a folder, over all that stand there but the card."""
    files = digests(folder, paths.files(folder).keys() - {CARD, FILE})
    settings = {name: embedding[name] for name in EMBEDDING}
    paths.write_json(folder / FILE, {"embedding": settings, "files": files, "provenance": dict(provenance)})


def read(folder) -> dict | None:
    """embed.json of a folder, None where there is none. ValueError if it is not one."""
    file = paths.path(folder) / FILE
    if not file.exists():
        return None
    document = paths.read_json(file)
    for name in ("files", "provenance"):
        if not isinstance(document, dict) or not isinstance(document.get(name), dict):
            raise ValueError(f"{file} is not what `embed export` writes: it has no {name}")
    return document


def differences(folder: Path, files: Mapping[str, str]) -> list[str]:
    """How a folder differs from the files that its embed.json tells of, as sentences."""
    there = {name for name in files if (folder / name).is_file()}
    found = [f"{name} is missing" for name in sorted(files.keys() - there)]
    found += [f"{name} was changed" for name, digest in digests(folder, there).items() if digest != files[name]]
    others = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return found + [f"{name} was added" for name in others if name in READ or name.endswith(".safetensors")]


def check_output(folder, overwrite: bool = True) -> None:
    """ValueError unless an export may be written to `folder`: nothing is there or, with `overwrite`, an export."""
    paths.check_output(folder, is_ours=is_export, overwrite=overwrite)


def is_export(folder) -> bool:
    """Whether an export stands in the folder. ValueError if something else does beside it, or somebody changed it."""
    folder = paths.path(folder)
    if not folder.is_dir() or (document := read(folder)) is None:
        return False
    found, advice = paths.files(folder), "move it away or choose another folder"
    for name in sorted(found.keys() - document["files"].keys() - {FILE, CARD}):
        raise ValueError(f"{folder} holds {name}, which no export wrote: {advice}")
    for name, digest in document["files"].items():  # a program that saves a model here writes its config anew
        if name.endswith(".json") and name in found and hashlib.sha256(found[name].read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder} holds another {name} than the export wrote: {advice}")
    return True
