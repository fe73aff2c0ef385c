"""index.json: what it says, and the files that belong to an index."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from embed import paths
from embed.inference import candidates
from embed.inference.precision import PRECISIONS, is_int

FORMAT = "embed-index"
FORMAT_VERSION = 3
INFO = "index.json"
SEGMENT_FILES = (
    r"vectors\.npy|rows\.jsonl|(offsets|ids|documents)\.npy|field\d+\.(npy|json)|codes\.npy|list_(codes|rows)\.npy|"
    r"lists\.safetensors|bm25/(words\.json|(starts|rows|scores)\.npy)"
)
NAMES = re.compile(rf"\d+/({SEGMENT_FILES})|\d+\.hidden-\d+\.npy")
MAX_COUNT = 1 << 48


class Provenance(NamedTuple):
    """How the vectors of an index were made: what a query and further vectors must have in common with them."""

    precision: str
    truncate_dim: int | None = None
    model: Mapping = {}  # {"path", "digest"}
    max_length: int | None = None  # in tokens
    cut: int = 0  # texts that were cut to it


def read(folder) -> dict:
    """The content of index.json. ValueError if it is damaged, or says anything that no index can have.

    FileNotFoundError if there is none.
    """
    file = paths.path(folder) / INFO
    if not file.is_file():
        raise FileNotFoundError(f"no index at {folder}: expected a folder with {INFO}")
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is damaged, not JSON: make the index again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe an index: its format is not {FORMAT!r}")
    if info.get("format_version") != FORMAT_VERSION:
        version = f"{info.get('format_version')!r:.40}"
        raise ValueError(f"{file} has format version {version}, expected {FORMAT_VERSION}: make the index again")
    if info.pop("sha256", None) != _digest(info):
        raise ValueError(f"{file} was changed after it was written: make the index again")
    for name, (allowed, expected) in FIELDS.items():
        if name not in info or not allowed(info[name]):
            value = f"is {info[name]!r:.60}" if name in info else "is missing"
            raise ValueError(f"{file}: {name} {value}, expected {expected}: make the index again")
    return info


def content(provenance: Provenance, segments: Mapping) -> bytes:
    """The bytes of index.json."""
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance._asdict(), "segments": segments}
    return (json.dumps(info | {"sha256": _digest(info)}, indent=1) + "\n").encode()


def files(info: Mapping) -> dict[str, tuple[int, str]]:
    """{file, relative to the index: (size in bytes, sha256)} of all files but index.json."""
    result = {}
    for name, each in info["segments"].items():
        result |= {f"{name}/{file}": tuple(about) for file, about in each["files"].items()}
        result[each["hidden"]] = tuple(each["hidden_file"])
    return result


def is_index(folder) -> bool:
    """Whether a folder is an index, perhaps a damaged one. ValueError if it holds other files too."""
    if not paths.has_format(paths.path(folder) / INFO, FORMAT):
        return False
    for name in paths.files(folder).keys() - {INFO}:
        if not NAMES.fullmatch(name):
            raise ValueError(
                f"{folder} holds {name}, which is not part of an index: move it away or choose another folder"
            )
    return True


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_count(value) -> bool:
    return is_int(value) and 0 <= value < MAX_COUNT


def _is_file(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_text(value[1])


def _has(value, allowed: Mapping[str, Callable]) -> bool:
    """Whether a value is an object with these fields, and each of them is allowed."""
    if not isinstance(value, dict) or value.keys() != allowed.keys():
        return False
    return all(is_allowed(value[name]) for name, is_allowed in allowed.items())


def _is_parameters(value) -> bool:
    at_least_one = lambda x: _is_count(x) and x > 0  # noqa: E731
    return _has(value, {"candidates": at_least_one, "nprobe": at_least_one, "recall": _is_share})


def _is_share(value) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1


def _is_settings(value) -> bool:
    optional = lambda x: x is None or _is_text(x)  # noqa: E731
    return _has(value, {"kind": optional, "recall": _is_share, "bm25": optional})


def _is_segment(name: str, each) -> bool:
    """Whether index.json describes a segment whose files are all inside the index."""
    allowed: dict[str, Callable] = {
        "rows": _is_count,
        "width": _is_count,
        "fields": lambda x: isinstance(x, list) and all(map(_is_text, x)),
        "unfiltered": lambda x: isinstance(x, dict) and all(map(_is_text, x.values())),
        "kind": lambda x: _is_text(x) and x in candidates.KINDS,
        "settings": _is_settings,
        "parameters": lambda x: x is None if each["kind"] == "exact" else _is_parameters(x),
        "bm25": lambda x: x is None or _has(x, {"language": _is_text, "words": _is_count, "postings": _is_count}),
        "files": lambda x: isinstance(x, dict) and all(_is_file(x[f]) and NAMES.fullmatch(f"{name}/{f}") for f in x),
        "hidden": lambda x: _is_text(x) and re.fullmatch(rf"{name}\.hidden-\d+\.npy", x),
        "num_hidden": _is_count,
        "hidden_file": _is_file,
    }
    return bool(re.fullmatch(r"\d{1,18}", name)) and _has(each, allowed)


# The fields of index.json: {name: (whether a value is allowed, the allowed values in words)}.
FIELDS: dict[str, tuple[Callable, str]] = {
    "precision": (lambda x: _is_text(x) and x in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "truncate_dim": (lambda x: x is None or is_int(x), "a number of dimensions or null"),
    "max_length": (lambda x: x is None or is_int(x), "a number of tokens or null"),
    "cut": (is_int, "a number of texts"),
    "model": (lambda x: isinstance(x, dict) and _is_text(x.get("digest") or ""), "an object with a path and a digest"),
    "segments": (
        lambda x: isinstance(x, dict) and bool(x) and all(_is_segment(*item) for item in x.items()),
        "segments with their files",
    ),
}


def _digest(info: Mapping) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
