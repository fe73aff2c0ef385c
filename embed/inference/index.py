"""Exact search over stored vectors, in every precision, and the corpus files that fill an index (docs/search.md).

A corpus is a JSONL file; a row is one text, or a document whose chunks are embedded in its context:

    {"_id": "a", "text": "…"}
    {"_id": "b", "chunks": ["…", "…"]}          its chunks are found as "b#0", "b#1"

Either may have a "title", which is put in front.
"""

import codecs
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from embed import paths
from embed.inference.encoder import PRECISIONS, Encoder

FORMAT = "embed-index"
FORMAT_VERSION = 2
VECTORS, INFO = "vectors.safetensors", "index.json"
DTYPES = {"float32": np.float32, "int8": np.int8, "binary": np.int8, "ubinary": np.uint8}
BLOCK_QUERIES, BLOCK_VECTORS = 256, 16384  # scores held at once
EXACT_DIMENSIONS = 1024  # float32 adds up 1024 products of two int8 without rounding: 1024 · 128² = 2^24
GZIP = b"\x1f\x8b"
NOT_TEXT = {  # how a file begins that is no text in UTF-8
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}


class Index:
    """N stored vectors: cosine for float32 and int8, negative Hamming distance for packed bits."""

    def __init__(
        self,
        vectors: np.ndarray,
        precision: str,
        *,
        ids: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        truncate_dim: int | None = None,
        model: dict | None = None,
        empty: Sequence[int] | None = None,
        max_length: int | None = None,
        cut: int = 0,
    ):
        """`vectors` as `Encoder.encode` gives them in `precision`. The rest is kept for whoever shows results.

        `ids` (default "0", "1", …) and `texts` are one a vector. `empty` are the indices of the vectors that stand
        for no text and are never found; by default those that are zero, and of packed bits, which do not show it,
        none. `truncate_dim`, `model` ({"path", "digest"}), the longest text that was taken whole (`max_length`) and
        how many were `cut` say how the vectors were made.
        """
        self.vectors = _checked(vectors, precision, "stored vectors")
        if not len(self.vectors):
            raise ValueError("cannot search an empty corpus: the index has no vectors")
        self.precision, self.truncate_dim, self.model = precision, truncate_dim, dict(model or {})
        self.max_length, self.cut = max_length, cut
        self.ids = [str(i) for i in range(len(self.vectors))] if ids is None else list(ids)
        self.texts = None if texts is None else list(texts)
        for name, values in (("ids", self.ids), ("texts", self.texts)):
            if values is not None and len(values) != len(self.vectors):
                raise ValueError(f"{len(values)} {name} for {len(self.vectors)} vectors")
        if empty is None:
            empty = [] if precision in ("binary", "ubinary") else np.flatnonzero(~self.vectors.any(1))
        self.empty = np.array(sorted(empty), np.int32)
        self._kept = np.setdiff1d(np.arange(len(self.vectors), dtype=np.int32), self.empty)
        if not len(self._kept):
            raise ValueError(
                f"cannot search an empty corpus: none of its {len(self.vectors)} vectors stands for a text"
            )
        self._searched = self.vectors[self._kept] if len(self.empty) else self.vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best vectors of each query, best first: scores [Q, k] and their indices int32 [Q, k].

        `queries` [Q, D] in the index's precision. Scores are float32 cosines, or minus the number of differing bits
        (int32). Of equal scores the lower index comes first. An empty vector is never found: k larger than what can
        be found gives all of that. All devices of the process search, a block of queries each.
        """
        queries = _checked(queries, self.precision, "queries")
        if queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} numbers each, stored vectors {self.vectors.shape[1]}")
        if k < 1:
            raise ValueError(f"k={k} must be positive")
        vectors = self._searched
        k = min(k, len(vectors))
        bits = self.precision in ("binary", "ubinary")
        similarity = _negative_hamming if bits else functools.partial(_cosine, exact=self.precision == "int8")
        scores = np.empty((len(queries), k), np.int32 if bits else np.float32)
        indices = np.empty((len(queries), k), np.int32)
        devices, blocks = jax.local_devices(), list(_blocks(len(queries), BLOCK_QUERIES))
        for group in (blocks[i : i + len(devices)] for i in range(0, len(blocks), len(devices))):
            # A block a device, each by the program of one device: their number changes no bit.
            placed = [jax.device_put(queries[rows], device) for rows, device in zip(group, devices)]
            best = [None] * len(group)
            for columns in _blocks(len(vectors), BLOCK_VECTORS):
                new = [similarity(block, vectors[columns]) for block in placed]
                found = [np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), n.shape) for n in new]
                if columns.start:  # earlier indices stand first, so that top_k keeps them on ties
                    new = [jnp.concatenate([top, n], 1) for (top, _), n in zip(best, new)]
                    found = [np.concatenate([i, f], 1) for (_, i), f in zip(best, found)]
                tops = [jax.lax.top_k(n, min(k, n.shape[1])) for n in new]
                best = [(top, np.take_along_axis(f, np.asarray(i), 1)) for (top, i), f in zip(tops, found)]
            for rows, (top, found) in zip(group, best):
                scores[rows], indices[rows] = top, found
        return scores, self._kept[indices]

    def check_model(self, encoder: Encoder) -> None:
        """ValueError unless the vectors are known to come from the encoder's model: weights, tokenizer, settings."""
        made_by = self.model.get("digest")
        if not made_by or not encoder.digest:
            which = "the index does not say which model made it" if not made_by else "the model has no digest"
            raise ValueError(f"{which}: whether it is the one at {encoder.path} cannot be checked")
        if made_by != encoder.digest:
            raise ValueError(
                f"the index was made with the model at {self.model.get('path')} (digest {made_by:.12}), "
                f"not with the one at {encoder.path} (digest {encoder.digest:.12})"
            )

    def save(self, folder, *, overwrite: bool = False) -> None:
        """Write vectors.safetensors and index.json; the folder appears whole or not at all.

        An index that is there is replaced only with `overwrite`, and a folder with other files in it never.
        """
        with paths.replace_folder(folder, is_ours=is_index, marker=INFO, overwrite=overwrite) as partial:
            safetensors.numpy.save_file({"vectors": self.vectors}, partial / VECTORS)
            info = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "precision": self.precision,
                "truncate_dim": self.truncate_dim,
                "max_length": self.max_length,
                "cut": self.cut,
                "model": self.model,
                "empty": self.empty.tolist(),
                "vectors": {"shape": list(self.vectors.shape), "sha256": _file_digest(partial / VECTORS)},
                "ids": self.ids,
                "texts": self.texts,
            }
            (partial / INFO).write_text(json.dumps(info | {"sha256": _digest(info)}) + "\n")

    @classmethod
    def load(cls, folder) -> "Index":
        """The index that `save` wrote, both files as they were; ValueError names one that was damaged or replaced."""
        name, folder = folder, paths.path(folder)
        if not (folder / INFO).is_file() or not (folder / VECTORS).is_file():
            raise FileNotFoundError(f"no index at {name}: expected a folder with {INFO} and {VECTORS}")
        info = _read_info(folder / INFO)
        with paths.local(folder, lambda name: name == VECTORS) as copy:
            if _file_digest(copy / VECTORS) != info["vectors"]["sha256"]:
                raise ValueError(
                    f"{folder / VECTORS} is not the file that {INFO} was written with: make the index again"
                )
            vectors = safetensors.numpy.load_file(copy / VECTORS)["vectors"]
        names = ("ids", "texts", "truncate_dim", "model", "empty", "max_length", "cut")
        return cls(vectors, info["precision"], **{name: info[name] for name in names})


def _read_info(file) -> dict:
    """index.json, if it is whole and its own digest holds."""
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is damaged, it is not JSON: make the index again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} is not that of an index: it has no format {FORMAT!r}")
    if info.get("format_version") != FORMAT_VERSION:
        version = f"{info.get('format_version')!r:.40}"
        raise ValueError(
            f"{file} has format version {version}, this program reads {FORMAT_VERSION}: make the index again"
        )
    if info.pop("sha256", None) != _digest(info):
        raise ValueError(f"{file} was changed after it was written: make the index again")
    return info


def _digest(info: Mapping) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _file_digest(file) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_index(folder) -> bool:
    """Whether `Index.save` wrote the folder. ValueError if there are other files beside the index."""
    try:
        if paths.read_json(paths.path(folder) / INFO)["format"] != FORMAT:
            return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    for name in paths.files(folder).keys() - {INFO, VECTORS}:
        raise ValueError(f"{folder} holds {name}, which is not part of an index: move it away or choose another folder")
    return True


class Row(NamedTuple):
    """A row of a corpus or of queries."""

    where: str  # file, line and id, for errors
    id: str
    chunks: list[str]  # of a row with a text, that one
    fields: dict

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but white space."""
        return not any(map(str.strip, self.chunks))


class Corpus(NamedTuple):
    """What a corpus file holds: documents of one or more chunks, and an id a chunk."""

    documents: list[list[str]]
    ids: list[str]
    names: list[str]  # what errors call each document

    @property
    def texts(self) -> list[str]:
        """All chunks in order, one an id."""
        return [chunk for document in self.documents for chunk in document]


def read_jsonl(path) -> list[tuple[str, dict]]:
    """(where, row) of each line of a JSONL file in UTF-8, plain or in gzip.

    Blank lines are skipped, an invalid one is an error. `where` names the file and the line, for further errors.
    """
    file = paths.path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of JSON lines")
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: expected JSON lines")
    rows = []
    with file.open("rb") as opened:
        piped = hasattr(opened, "peek") and not opened.seekable()
        start = opened.peek(8)[:8] if piped else opened.read(8)
        for magic, what in NOT_TEXT.items():
            if start.startswith(magic):
                raise ValueError(f"{path} is {what}, expected JSON lines in UTF-8, plain or in gzip")
        if not piped:
            opened.seek(0)
        for number, line in enumerate(_unpacked(path, opened) if start.startswith(GZIP) else opened, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                where = f"{path}, line {number}"
                rows.append((where, _parse(where, line)))
    return rows


def _unpacked(path, opened) -> Iterator[bytes]:
    """The lines of a file in gzip."""
    number = 0
    try:
        with gzip.open(opened) as lines:
            for line in lines:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short in its gzip data, after line {number} ({error})") from None


def _parse(where: str, line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {error.start} (0x{line[error.start]:02x}): convert the file"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, one a line, got {line.strip().decode()!r:.60}")
    return row


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there more than once")
    return found


def _no_number(name: str):
    raise ValueError(f"{name} is not a number")


def read_rows(path, *, queries: bool = False) -> list[Row]:
    """The rows of a corpus file, or of one of `queries`; an id or text that is missing, wrong or repeated is an error.

    The text of a row is (title + " " + text).strip(), as in MTEB, and without a title text.strip(). A title of a
    document with "chunks" is put in front of the first chunk by the same rule. A query is its text as it is.
    """
    rows, seen, expected = [], {}, '"text"' if queries else '"text" or a list "chunks"'
    for where, fields in read_jsonl(path):
        name = check_id(where, fields, "_id")
        if name in seen:
            raise ValueError(f"{where}: the id {name!r} stands for more than one text, also in {seen[name]}")
        seen[name] = where.removeprefix(f"{path}, ")
        where = f"{where} (_id {name!r:.80})"
        if "text" in fields and "chunks" in fields:
            raise ValueError(f'{where} has "text" and "chunks": expected one of them')
        parts = fields.get("chunks", [fields["text"]] if "text" in fields else None)
        if not isinstance(parts, list) or (queries and "chunks" in fields):
            raise ValueError(f"{where} has no text: expected {expected}")
        title = fields.get("title")
        for part in [*parts, *([] if title is None else [title])]:
            if not isinstance(part, str):
                raise ValueError(f"{where}: a text, chunk or title is {part!r:.80}, expected a string")
            check_characters(f"{where}: a text, chunk or title", part)
        if not queries:
            if title and parts:
                parts = [f"{title} {parts[0]}".strip(), *parts[1:]]
            elif "text" in fields:
                parts = [parts[0].strip()]
        rows.append(Row(where, name, parts, fields))
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row")
    return rows


def check_characters(what: str, text: str) -> None:
    """ValueError for half a surrogate pair, as "\\ud800" in JSON or a byte of the command line that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair at character {error.start}: it is not text") from None


def check_id(where: str, fields: Mapping, name: str) -> str:
    """The id in a field of a row; ValueError unless it is a string with something in it."""
    value = fields.get(name)
    if isinstance(value, str) and value:
        check_characters(f'{where}: "{name}"', value)
        return value
    hint = ""
    if isinstance(value, int) and not isinstance(value, bool):
        hint = f': write "{value}"'
    elif value is None and (near := name.lstrip("_")) != name and near in fields:
        hint = f', and there is "{near}": rename it'
    raise ValueError(f'{where}: "{name}" is {value!r:.80}, expected a string{hint}')


def refuse_empty(rows: Sequence[Row], path) -> None:
    """ValueError where rows have no text."""
    if without := [row.where for row in rows if row.is_empty]:
        raise ValueError(f"{without[0]} has no text, and so have {len(without):,} of the {len(rows):,} rows of {path}")


def read_corpus(path) -> Corpus:
    """Read a corpus file (`read_rows`); a row in which there is nothing but white space is an error as well."""
    rows = read_rows(path)
    refuse_empty(rows, path)
    ids: dict[str, str] = {}
    for row in rows:
        for name in [f"{row.id}#{k}" for k in range(len(row.chunks))] if "chunks" in row.fields else [row.id]:
            if name in ids:
                raise ValueError(f"{row.where}: the id {name!r} stands for more than one text, also in {ids[name]}")
            ids[name] = row.where
    return Corpus([row.chunks for row in rows], list(ids), [row.where for row in rows])


def build(
    encoder: Encoder,
    corpus: Corpus,
    *,
    precision: str = "float32",
    truncate_dim: int | None = None,
    truncate: bool = False,
    **keywords,
) -> Index:
    """Encode a corpus into an index; `truncate` as in `encode_documents`, other `keywords` go to `encode_segments`."""
    segments, cut = encoder.fit_documents(corpus.documents, truncate=truncate, names=corpus.names)
    vectors = encoder.encode_segments(
        segments, precision=precision, truncate_dim=truncate_dim, names=corpus.names, **keywords
    )
    full = np.concatenate([np.isin(np.arange(1, s.num_spans + 1), s.spans) for s in segments])
    return Index(
        vectors,
        precision,
        ids=corpus.ids,
        texts=corpus.texts,
        truncate_dim=truncate_dim,
        model={"path": str(encoder.path), "digest": encoder.digest},
        empty=np.flatnonzero(~full),
        max_length=encoder.max_length,
        cut=cut,
    )


def _checked(vectors, precision: str, noun: str) -> np.ndarray:
    """`vectors` if they are what `precision` stores."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    vectors = np.ascontiguousarray(vectors)
    if vectors.ndim != 2 or vectors.dtype != DTYPES[precision]:
        raise ValueError(
            f"{noun} are {vectors.dtype}{list(vectors.shape)}, {precision} has {np.dtype(DTYPES[precision])}[N, D]"
        )
    if precision == "float32" and not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        raise ValueError(f"{noun}: {len(bad)} of {len(vectors)} are not finite, the first is {bad[0]}")
    return vectors


def _blocks(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


@functools.partial(jax.jit, static_argnames="exact")
def _cosine(queries, vectors, *, exact):
    """Cosine [Q, N]; `exact` adds the products of int8 up as integers. A zero vector has cosine 0."""

    def products(a, b):
        dot = functools.partial(jnp.dot, precision="highest")
        if not exact:
            return dot(a, b.T)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        parts = [
            dot(a[:, d : d + EXACT_DIMENSIONS], b[:, d : d + EXACT_DIMENSIONS].T).astype(jnp.int32)
            for d in range(0, a.shape[1], EXACT_DIMENSIONS)
        ]
        return sum(parts).astype(jnp.float32)

    def inverse_norms(x):
        norms = jnp.linalg.norm(x.astype(jnp.float32), axis=1)
        return jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)

    return products(queries, vectors) * inverse_norms(queries)[:, None] * inverse_norms(vectors)


@jax.jit
def _negative_hamming(queries, vectors):
    """Minus the number of differing bits, float32 [Q, N], exact: with bits as ±1, (dot - D) / 2.

    A matrix product and a float top_k are several times faster on CPU than counting the bits of [Q, N] words.
    """

    def signs(packed):
        packed = jax.lax.bitcast_convert_type(packed, jnp.uint8)
        return 2 * jnp.unpackbits(packed, axis=1).astype(jnp.float32) - 1

    a, b = signs(queries), signs(vectors)
    return (jnp.dot(a, b.T, precision="highest") - a.shape[1]) / 2
