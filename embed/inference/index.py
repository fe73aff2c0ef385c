"""Exact search over stored vectors, in every precision, and the corpus files that fill an index.

A corpus is a JSONL file; a row is one text, or a document whose chunks are embedded in its context:

    {"_id": "a", "text": "…"}
    {"_id": "b", "chunks": ["…", "…"]}          its chunks are found as "b#0", "b#1"
"""

import collections
import functools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from embed import paths
from embed.inference.encoder import PRECISIONS, Encoder

FORMAT = "embed-index"
FORMAT_VERSION = 1
VECTORS, INFO = "vectors.safetensors", "index.json"
DTYPES = {"float32": np.float32, "int8": np.int8, "binary": np.int8, "ubinary": np.uint8}
BLOCK_QUERIES, BLOCK_VECTORS = 256, 16384  # scores held at once
EXACT_DIMENSIONS = 1024  # float32 adds up 1024 products of two int8 without rounding: 1024 · 128² = 2^24


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
    ):
        """`vectors` as `Encoder.encode` gives them in `precision`. The rest is kept for whoever shows results.

        `ids` (default "0", "1", …) and `texts` are one a vector; `truncate_dim` and `model` ({"path", "digest"})
        say how the vectors were made.
        """
        self.vectors = _checked(vectors, precision, "stored vectors")
        if not len(self.vectors):
            raise ValueError("cannot search an empty corpus: the index has no vectors")
        self.precision, self.truncate_dim, self.model = precision, truncate_dim, dict(model or {})
        self.ids = [str(i) for i in range(len(self.vectors))] if ids is None else list(ids)
        self.texts = None if texts is None else list(texts)
        for name, values in (("ids", self.ids), ("texts", self.texts)):
            if values is not None and len(values) != len(self.vectors):
                raise ValueError(f"{len(values)} {name} for {len(self.vectors)} vectors")

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best vectors of each query, best first: scores [Q, k] and their indices int32 [Q, k].

        `queries` [Q, D] in the index's precision. Scores are float32 cosines, or minus the number of differing bits
        (int32). Of equal scores the lower index comes first. k larger than the index gives all of it. All devices of the
        process search, a block of queries each.
        """
        queries = _checked(queries, self.precision, "queries")
        if queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} numbers each, stored vectors {self.vectors.shape[1]}")
        if k < 1:
            raise ValueError(f"k={k} must be positive")
        k = min(k, len(self))
        bits = self.precision in ("binary", "ubinary")
        similarity = _negative_hamming if bits else functools.partial(_cosine, exact=self.precision == "int8")
        scores = np.empty((len(queries), k), np.int32 if bits else np.float32)
        indices = np.empty((len(queries), k), np.int32)
        devices, blocks = jax.local_devices(), list(_blocks(len(queries), BLOCK_QUERIES))
        for group in (blocks[i : i + len(devices)] for i in range(0, len(blocks), len(devices))):
            # A block a device, each by the program of one device: their number changes no bit.
            placed = [jax.device_put(queries[rows], device) for rows, device in zip(group, devices)]
            best = [None] * len(group)
            for columns in _blocks(len(self), BLOCK_VECTORS):
                new = [similarity(block, self.vectors[columns]) for block in placed]
                found = [np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), n.shape) for n in new]
                if columns.start:  # earlier indices stand first, so that top_k keeps them on ties
                    new = [jnp.concatenate([top, n], 1) for (top, _), n in zip(best, new)]
                    found = [np.concatenate([i, f], 1) for (_, i), f in zip(best, found)]
                tops = [jax.lax.top_k(n, min(k, n.shape[1])) for n in new]
                best = [(top, np.take_along_axis(f, np.asarray(i), 1)) for (top, i), f in zip(tops, found)]
            for rows, (top, found) in zip(group, best):
                scores[rows], indices[rows] = top, found
        return scores, indices

    def check_model(self, encoder: Encoder) -> None:
        """An error if the stored vectors are known to come from other weights than the encoder's."""
        made_by = self.model.get("digest")
        if made_by and encoder.digest and made_by != encoder.digest:
            raise ValueError(
                f"the index was made with the model at {self.model.get('path')} (digest {made_by:.12}), "
                f"not with the one at {encoder.path} (digest {encoder.digest:.12})"
            )

    def save(self, folder) -> None:
        """Write vectors.safetensors and index.json; the folder appears whole or not at all."""
        with paths.replace_folder(folder, is_ours=is_index, marker=INFO) as partial:
            safetensors.numpy.save_file({"vectors": self.vectors}, partial / VECTORS)
            info = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "precision": self.precision,
                "truncate_dim": self.truncate_dim,
                "model": self.model,
                "ids": self.ids,
                "texts": self.texts,
            }
            (partial / INFO).write_text(json.dumps(info) + "\n")

    @classmethod
    def load(cls, folder) -> "Index":
        """The index that `save` wrote."""
        name, folder = folder, paths.path(folder)
        if not (folder / INFO).is_file() or not (folder / VECTORS).is_file():
            raise FileNotFoundError(f"no index at {name}: expected a folder with {INFO} and {VECTORS}")
        try:
            info = json.loads((folder / INFO).read_text())
            version = info["format"], info["format_version"]
            if version != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"format {version} is not {(FORMAT, FORMAT_VERSION)}")
            with paths.local(folder, lambda name: name == VECTORS) as copy:
                vectors = safetensors.numpy.load_file(copy / VECTORS)["vectors"]
            fields = {name: info[name] for name in ("ids", "texts", "truncate_dim", "model")}
            return cls(vectors, info["precision"], **fields)
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a usable index: {error!r}") from error


def is_index(folder) -> bool:
    """Whether `Index.save` wrote the folder."""
    try:
        return paths.read_json(paths.path(folder) / INFO)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Corpus(NamedTuple):
    """What a corpus file holds: documents of one or more chunks, and an id a chunk."""

    documents: list[list[str]]
    ids: list[str]

    @property
    def texts(self) -> list[str]:
        """All chunks in order, one an id."""
        return [chunk for document in self.documents for chunk in document]


def read_jsonl(path) -> list[tuple[str, dict]]:
    """(where, row) of each line of a JSONL file, blank lines skipped; an invalid line is an error.

    `where` names the file and the line, for further errors.
    """
    file = paths.path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: expected JSON lines")
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.decode("utf-8")
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: invalid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {line.strip()!r:.60}")
            rows.append((where, row))
    return rows


def read_corpus(path) -> Corpus:
    """Read a corpus file; a row without an id or text, a repeated id or an empty file is an error."""
    documents, ids = [], []
    for where, row in read_jsonl(path):
        name, chunks = row.get("_id"), row.get("chunks", [row["text"]] if "text" in row else None)
        if not isinstance(name, str) or not name:
            raise ValueError(f'{where}: "_id" is {name!r}, expected a string')
        if not isinstance(chunks, list) or not all(isinstance(c, str) for c in chunks) or not "".join(chunks).strip():
            raise ValueError(f'{where} (_id {name!r}) has no text: expected "text" or a list "chunks" with text in it')
        documents.append(chunks)
        ids += [f"{name}#{k}" for k in range(len(chunks))] if "chunks" in row else [name]
    if not documents:
        raise ValueError(f"{path} is an empty corpus")
    repeated = [name for name, count in collections.Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: the id {repeated[0]!r} stands for more than one text ({len(repeated)} such ids)")
    return Corpus(documents, ids)


def build(
    encoder: Encoder, corpus: Corpus, *, precision: str = "float32", truncate_dim: int | None = None, **keywords
) -> Index:
    """Encode a corpus into an index; `keywords` go to `encode_documents`."""
    vectors = encoder.encode_documents(corpus.documents, precision=precision, truncate_dim=truncate_dim, **keywords)
    model = {"path": str(encoder.path), "digest": encoder.digest}
    return Index(
        np.concatenate(vectors), precision, ids=corpus.ids, texts=corpus.texts, truncate_dim=truncate_dim, model=model
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
        raise ValueError(f"{noun}: {(~np.isfinite(vectors).all(1)).sum()} of {len(vectors)} are not finite")
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
