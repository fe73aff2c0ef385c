"""Indexes: vectors and rows on a disk, searched by vectors and by words (docs/search.md).

    INDEX/index.json    what made the vectors, the segments with size and sha256 of each file; replaced as a whole
    INDEX/NAME/         a segment (segments.py), written once
    INDEX/NAME.hidden-K.npy    int64, the rows of a segment that are never found, empty or deleted

A change writes new files, then index.json, and then removes what it no longer names. So an interrupted change leaves
the index as it was.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.inference import candidates, lexical, segments
from embed.inference.encoder import PRECISIONS, Encoder, check_count, is_int
from embed.inference.ranking import check_vectors
from embed.inference.segments import Block, Segment
from embed.inference.stored_rows import document, load_array

FORMAT = "embed-index"
FORMAT_VERSION = 3
INFO = "index.json"
CHECKED_BYTES = 1 << 30  # larger indexes are checked by the sizes of their files, unless asked otherwise
WRITTEN_ROWS = 1 << 15  # rows that are copied at once


class Made(NamedTuple):
    """How the vectors of an index were made: what a query and further vectors must have in common with them."""

    precision: str
    truncate_dim: int | None = None
    model: Mapping = {}  # {"path", "digest"}
    max_length: int | None = None  # in tokens
    cut: int = 0  # texts that were cut to it


class Hit(NamedTuple):
    """A row that was found."""

    row: int
    score: float
    content: dict  # what is stored of it, see `Index.content`
    shares: tuple[float, float] | None = None  # what vectors and words add to the score, see `Index.search_both`

    @property
    def id(self) -> str:
        """The id of the text or chunk."""
        return self.content["_id"]

    @property
    def document(self) -> str:
        """The id of the document that it is a chunk of, or its own."""
        return document(self.content)


class Index:
    """The vectors and rows of a folder: cosine for float32 and int8, negative Hamming distance for packed bits."""

    def __init__(self, folder: Path, info: Mapping):
        self.folder, self.info = folder, info
        self.made = Made(**{name: info[name] for name in Made._fields})
        self.segments = []
        for name, each in info["segments"].items():
            hidden = load_array(folder / each["hidden"], np.int64, (each["num_hidden"],))
            if len(hidden) and not 0 <= hidden.min() <= hidden.max() < each["rows"]:
                raise ValueError(f"{folder / each['hidden']} has numbers of rows outside 0..{each['rows'] - 1}")
            self.segments.append(Segment(folder / name, each, self.made.precision, hidden))
        self._first = np.cumsum([0, *map(len, self.segments)])

    @property
    def precision(self) -> str:
        """Precision of the vectors."""
        return self.made.precision

    @property
    def truncate_dim(self) -> int | None:
        """Dimensions that were kept, None for all."""
        return self.made.truncate_dim

    def __len__(self) -> int:
        """The number of rows that can be found."""
        return sum(int(segment.kept.sum()) for segment in self.segments)

    @classmethod
    def load(cls, folder, *, check: bool | None = None) -> "Index":
        """Open an index. ValueError names a file that was damaged or replaced.

        `check` compares the sha256 of every file; by default that is done up to 1 GiB. The sizes of files and whatever
        could make a search read outside of them are always checked. An index in a bucket is copied first.
        """
        name, folder = folder, paths.path(folder)
        if not (folder / INFO).is_file():
            raise FileNotFoundError(f"no index at {name}: expected a folder with {INFO}")
        info = _read_info(folder / INFO)
        copy = None
        if paths.is_bucket(folder):
            copy = tempfile.TemporaryDirectory(prefix="embed-")
            for file in _files(info):
                paths.copy_file(folder / file, Path(copy.name, file))
            (Path(copy.name) / INFO).write_bytes((folder / INFO).read_bytes())
        local = Path(copy.name if copy else folder)
        total = sum(size for size, _ in _files(info).values())
        for file, (size, digest) in _files(info).items():
            if not (local / file).is_file():
                raise ValueError(f"{folder / file} is missing, although {INFO} names it: make the index again")
            same = (local / file).stat().st_size == size
            if same and (total <= CHECKED_BYTES if check is None else check):
                same = paths.file_digest(local / file) == digest
            if not same:
                raise ValueError(f"{folder / file} is not the file that {INFO} was written with: make the index again")
        try:
            index = cls(local, info)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{folder / INFO} does not describe its segments ({error}): make the index again"
            ) from None
        index._copy = copy  # which lives as long as the index
        return index

    def search(
        self, queries: np.ndarray, k: int, *, filters: Mapping[str, Sequence] | None = None, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, best first: scores [Q, k] and numbers of rows int64 [Q, k].

        `queries` are what `Encoder.encode` returns in the index's precision. Scores are float32 cosines, or minus the
        number of differing bits (int32). With fewer than k results, the last ranks have the row -1. `filters` has the
        allowed values of fields, such as {"lang": ["en", "de"]}. `exact` compares with every vector, also where the
        index has a faster way.
        """
        queries = check_vectors(queries, self.precision, "queries")
        if queries.shape[1] != self.segments[0].vectors.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} numbers each, stored vectors {self.segments[0].vectors.shape[1]}"
            )
        check_count("k", k)
        found = [
            segment.search(queries, k, allowed, exact)
            for segment, allowed in zip(self.segments, self._allowed(filters))
        ]
        return self._merge(found, k)

    def search_words(
        self, queries: Sequence[str], k: int, *, filters: Mapping[str, Sequence] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by BM25: scores float32 [Q, k]. Rows that share no word with the query are not found.

        Each segment counts its own words, so the scores of a small segment beside a large one are a little off.
        """
        check_count("k", k)
        self.check_words()
        allowed = self._allowed(filters)
        return self._merge([s.search_words(queries, k, some) for s, some in zip(self.segments, allowed)], k)

    def search_both(
        self,
        queries: np.ndarray,
        texts: Sequence[str],
        k: int,
        *,
        depth: int = 100,
        filters: Mapping[str, Sequence] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fusion (`lexical.reciprocal_rank_fusion`) of the first `depth` rows by vectors and by words.

        Returns scores float32 [Q, k], rows int64 [Q, k], and what vectors and words add to a score, [Q, k, 2].
        """
        depth = max(depth, k)
        rankings = self.search(queries, depth, filters=filters)[1], self.search_words(texts, depth, filters=filters)[1]
        rows, shares = lexical.reciprocal_rank_fusion(*rankings, depth=k)
        return shares.sum(-1), rows.astype(np.int64), shares

    def content(self, row: int) -> dict:
        """What is stored of a row: "_id", and where there are any "document", "text", "start", "end", "fields"."""
        segment = int(np.searchsorted(self._first, row, "right")) - 1
        return self.segments[segment].rows[int(row - self._first[segment])]

    def hits(self, scores: np.ndarray, rows: np.ndarray, shares: np.ndarray | None = None) -> list[Hit]:
        """The results of one query with their content: scores [k], rows [k], and shares [k, 2] of `search_both`."""
        parts = [None] * len(rows) if shares is None else map(tuple, shares.tolist())
        found = zip(rows.tolist(), scores.tolist(), parts)
        return [Hit(row, score, self.content(row), share) for row, score, share in found if row >= 0]

    def check_words(self) -> None:
        """ValueError unless the index can be searched by words."""
        if any(segment.language is None for segment in self.segments):
            raise ValueError(f"the index {self.folder} has no word statistics: make it with --words")

    def blocks(self) -> Iterator[Block]:
        """All rows that can be found, with their vectors, in order."""
        for segment in self.segments:
            rows = iter(segment.rows)
            for start in range(0, len(segment), WRITTEN_ROWS):
                kept = segment.kept[start : start + WRITTEN_ROWS]
                content = list(itertools.islice(rows, len(kept)))
                if kept.any():
                    few = [row for row, keep in zip(content, kept) if keep]
                    yield Block(segment.vectors[start : start + len(kept)][kept], few)

    def check_model(self, encoder: Encoder) -> None:
        """ValueError unless the vectors come from the encoder's model: same weights, tokenizer and settings."""
        made_by = self.made.model.get("digest")
        if not made_by or not encoder.digest:
            missing = "the index does not say which model made it" if not made_by else "the model has no digest"
            raise ValueError(f"{missing}: the index cannot be checked against the model at {encoder.path}")
        if made_by != encoder.digest:
            raise ValueError(
                f"the index was made with the model at {self.made.model.get('path')} (digest {made_by:.12}), "
                f"not with the one at {encoder.path} (digest {encoder.digest:.12})"
            )

    def _allowed(self, filters: Mapping[str, Sequence] | None) -> list[np.ndarray | None]:
        """Which rows of each segment have the values of `filters`."""
        if not filters:
            return [None] * len(self.segments)
        known = sorted({name for segment in self.segments for name in segment.rows.fields})
        for name, values in filters.items():
            if name not in known:
                raise ValueError(
                    f"no row has a field {name!r} to filter by; the fields are: {', '.join(known) or 'none'}"
                )
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ValueError(f"the values of the filter {name!r} are {values!r:.60}, expected a list")
        return [segment.rows.matching(filters) for segment in self.segments]

    def _merge(self, found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the results of all segments, on ties those of the first one, with numbers of the index's."""
        scores = np.concatenate([scores for scores, _ in found], 1)
        rows = np.concatenate([np.where(r >= 0, r + first, -1) for (_, r), first in zip(found, self._first)], 1)
        order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1).astype(np.int64)


def create(folder, blocks: Iterable[Block], made: Made, *, overwrite: bool = False, **how) -> Index:
    """Write a new index of `blocks`; the folder appears whole or not at all. `how` is as in `segments.write`.

    An existing index is replaced only with `overwrite`; a folder with other files is never replaced.
    """
    with paths.replace_folder(folder, is_ours=is_index, marker=INFO, overwrite=overwrite) as partial:
        described = {"0": _write_segment(partial, "0", blocks, made, how)}
        (partial / INFO).write_bytes(_info(made, described))
    return Index.load(folder, check=False)


def add(folder, blocks: Iterable[Block], made: Made, **how) -> tuple[int, int]:
    """Add rows to an index, which hides the rows of the same documents: (rows that were added, that were hidden).

    ValueError if the vectors were made in another way. The caller holds the lock of the folder.
    """
    with _changing(folder) as (index, local, described):
        check_made(index.made, made, folder)
        if (language := index.segments[0].language) is not None:
            how |= {"words": True, "language": language}
        name = str(1 + max(map(int, described)))
        new = _write_segment(local, name, blocks, made, how)
        rows = segments.StoredRows(local / name, new["rows"], new["fields"])
        hidden = _hide(index, local, described, {document(row) for row in rows})
        described[name] = new
        made = made._replace(cut=index.made.cut + made.cut)
        _finish(folder, local, made, described)
    return new["rows"], hidden


def delete(folder, documents: Iterable[str]) -> int:
    """Delete documents (rows of a corpus, by their id): the number of rows that are no longer found.

    ValueError names documents that the index does not have; then nothing is deleted. The caller holds the lock.
    """
    documents = set(documents)
    with _changing(folder) as (index, local, described):
        known: set[str] = set()
        for segment in index.segments:
            found = segment.rows.of_documents(documents)
            known |= {name for name, rows in found.items() if segment.kept[rows].any()}
        if missing := sorted(documents - known):
            raise ValueError(f"{folder} has no document {missing[0]!r}; {len(missing)} of {len(documents)} are missing")
        hidden = _hide(index, local, described, documents)
        _finish(folder, local, index.made, described)
    return hidden


def compact(folder, **how) -> Index:
    """Write an index again as one segment, without the rows that are never found. `how` is as in `segments.write`."""
    index = Index.load(folder)
    if "words" not in how and index.segments[0].language is not None:
        how |= {"words": True, "language": index.segments[0].language}
    return create(folder, index.blocks(), index.made, overwrite=True, **how)


def check_made(first: Made, other: Made, folder) -> None:
    """ValueError unless further vectors were made as those of an index."""
    for name, a, b in (
        ("model", first.model.get("digest"), other.model.get("digest")),
        ("precision", first.precision, other.precision),
        ("truncate_dim", first.truncate_dim, other.truncate_dim),
        ("max_length", first.max_length, other.max_length),
    ):
        if a != b or (name == "model" and not a):
            raise ValueError(f"{folder} has vectors with {name} {a!r:.40}, not {b!r:.40}: they cannot be compared")


@contextlib.contextmanager
def _changing(folder) -> Iterator[tuple[Index, Path, dict]]:
    """(the index, a local folder for new files, its description), for a change to an index."""
    index, target = Index.load(folder), paths.resolve(folder)
    inside = None if paths.is_bucket(target) else Path(target)
    for left in inside.glob(".embed-*.partial") if inside else ():  # by a change that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".embed-", suffix=".partial", dir=inside) as aside:
        yield index, Path(aside), {name: dict(each) for name, each in index.info["segments"].items()}


def _finish(folder, local: Path, made: Made, described: dict) -> None:
    """Move new files into the index, replace index.json, and remove what it does not name."""
    target = paths.resolve(folder)
    for entry in local.iterdir():
        if paths.is_bucket(target):
            for name, file in ({"": entry} if entry.is_file() else paths.files(entry)).items():
                paths.copy_file(file, target / entry.name / name if name else target / entry.name)
        else:
            kept = Path(target, entry.name)
            if kept.is_dir():  # of an interrupted change
                shutil.rmtree(kept)
            entry.rename(kept)
    content = _info(made, described)
    paths.write(target / INFO, content)
    needed = {INFO, *_files(json.loads(content))}
    for name, file in paths.files(target).items():
        if name not in needed and _NAMES.fullmatch(name):
            file.unlink()


def _hide(index: Index, local: Path, described: dict, documents: set[str]) -> int:
    """Write the hidden rows of all segments with those of some documents: the number of rows that become hidden."""
    count = 0
    for (name, each), segment in zip(described.items(), index.segments):
        found = segment.rows.of_documents(documents)
        new = [row for rows in found.values() for row in rows if segment.kept[row]]
        if new:
            hidden = np.union1d(np.flatnonzero(~segment.kept), new).astype(np.int64)
            each |= _write_hidden(local, name, hidden, 1 + int(re.findall(r"\d+", each["hidden"])[-1]))
            count += len(new)
    return count


def _write_hidden(local: Path, name: str, hidden: np.ndarray, number: int) -> dict:
    file = f"{name}.hidden-{number}.npy"
    np.save(local / file, hidden)
    return {"hidden": file, "num_hidden": len(hidden), "hidden_file": _file(local / file)}


def _write_segment(local: Path, name: str, blocks: Iterable[Block], made: Made, how: Mapping) -> dict:
    folder = local / name
    folder.mkdir()
    described, empty = segments.write(folder, blocks, made.precision, **how)
    dimensions = described["numbers"] * (8 if made.precision in ("binary", "ubinary") else 1)
    if made.truncate_dim not in (None, dimensions):
        raise ValueError(f"truncate_dim={made.truncate_dim!r}, but the vectors have {dimensions} dimensions")
    files = {file: _file(path) for file, path in paths.files(folder).items()}
    return described | {"files": files} | _write_hidden(local, name, empty, 0)


def _file(file) -> list:
    return [file.stat().st_size if isinstance(file, Path) else file.stat().length, paths.file_digest(file)]


def _files(info: Mapping) -> dict[str, tuple[int, str]]:
    """{file, relative to the index: (size in bytes, sha256)} of all files but index.json."""
    result = {}
    for name, each in info["segments"].items():
        result |= {f"{name}/{file}": tuple(about) for file, about in each["files"].items()}
        result[each["hidden"]] = tuple(each["hidden_file"])
    return result


def _info(made: Made, described: Mapping) -> bytes:
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, **made._asdict(), "segments": described}
    return (json.dumps(info | {"sha256": _digest(info)}, indent=1) + "\n").encode()


def _read_info(file) -> dict:
    """The content of index.json; ValueError if it is damaged or its digest differs."""
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


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_count(value) -> bool:
    return is_int(value) and value >= 0


def _is_file(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_text(value[1])


def _is_effort(value) -> bool:
    if not isinstance(value, dict) or value.keys() != {"depth", "probes", "recall"}:
        return False
    return all(_is_count(value[name]) and value[name] > 0 for name in ("depth", "probes")) and isinstance(
        value["recall"], float
    )


def _is_segment(name: str, each) -> bool:
    """Whether index.json describes a segment whose files are all inside the index."""
    allowed: dict[str, Callable] = {
        "rows": _is_count,
        "numbers": _is_count,
        "fields": lambda x: isinstance(x, list) and all(map(_is_text, x)),
        "kind": lambda x: _is_text(x) and x in candidates.KINDS,
        "effort": lambda x: x is None if each["kind"] == "exact" else _is_effort(x),
        "words": lambda x: x is None or (isinstance(x, dict) and _is_text(x.get("language"))),
        "files": lambda x: isinstance(x, dict) and all(_is_file(x[f]) and _NAMES.fullmatch(f"{name}/{f}") for f in x),
        "hidden": lambda x: _is_text(x) and re.fullmatch(rf"{name}\.hidden-\d+\.npy", x),
        "num_hidden": _is_count,
        "hidden_file": _is_file,
    }
    if not (re.fullmatch(r"\d+", name) and isinstance(each, dict) and each.keys() == allowed.keys()):
        return False
    return all(is_allowed(each[field]) for field, is_allowed in allowed.items())


_NAMES = re.compile(r"\d+/[a-z]\w*(\.\w+)+|\d+/bm25/[a-z]\w*(\.\w+)+|\d+\.hidden-\d+\.npy")
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


def is_index(folder) -> bool:
    """Whether `create` wrote the folder. ValueError if it holds other files too."""
    try:
        if paths.read_json(paths.path(folder) / INFO)["format"] != FORMAT:
            return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    for name in paths.files(folder).keys() - {INFO}:
        if not _NAMES.fullmatch(name):
            raise ValueError(
                f"{folder} holds {name}, which is not part of an index: move it away or choose another folder"
            )
    return True
