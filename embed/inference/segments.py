"""A segment: vectors and rows that an index got at one time, in a folder that does not change afterwards.

vectors.npy               [N, D] in the precision of the index, memory-mapped
rows.jsonl, …             the rows (stored_rows.py)
codes.npy                 kind "binary": the sign bits of the vectors
lists.safetensors, …      kind "ivf": lists of similar vectors (candidates.py)
bm25/                     word statistics, if the index can be searched by words (lexical.py)
"""

import dataclasses
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from embed.inference import candidates, lexical
from embed.inference.ranking import DTYPES, check_vectors, nothing, rescore, search_blocks, vector_blocks
from embed.inference.stored_rows import RowWriter, StoredRows, load_array

VECTORS = "vectors.npy"


class Block(NamedTuple):
    """Some vectors and their rows, on their way into an index."""

    vectors: np.ndarray  # [n, D], or [n, D/8]
    rows: Sequence[Mapping]  # "_id" and, where there are any, the columns of stored_rows.COLUMNS


class Written(NamedTuple):
    """What index.json says of a segment, and the rows that are never found."""

    description: dict
    empty: np.ndarray


def write(
    folder: Path,
    blocks: Iterable[Block],
    precision: str,
    *,
    kind: str | None = None,
    recall: float = 0.95,
    words: bool = False,
    language: str = "",
) -> Written:
    """Write a segment into a local folder, block by block. `kind` None is chosen by the number of rows."""
    empty, shape = [], (0, 0)
    rows = RowWriter(folder)
    with (folder / VECTORS).open("wb") as file:
        for block in blocks:
            vectors = check_vectors(block.vectors, precision, "vectors")
            if len(block.rows) != len(vectors):
                raise ValueError(f"{len(block.rows)} rows for {len(vectors)} vectors")
            if not shape[0]:
                shape = (0, vectors.shape[1])
                _write_header(file, vectors.dtype, shape)  # with space for any number of rows
            if vectors.shape[1] != shape[1]:
                raise ValueError(f"vectors have {vectors.shape[1]} numbers each, those before them {shape[1]}")
            empty.append(np.flatnonzero(are_empty(vectors, precision)) + shape[0])
            vectors.tofile(file)
            rows.write(block.rows)
            shape = shape[0] + len(vectors), shape[1]
        if shape[0]:
            file.seek(0)
            _write_header(file, np.dtype(DTYPES[precision]), shape)
    fields, empty = rows.close(), np.concatenate([np.zeros(0, np.int64), *empty])
    count = shape[0]
    if not count:
        raise ValueError("cannot search an empty corpus: the index has no vectors")
    if len(empty) == count:
        raise ValueError(f"cannot search an empty corpus: none of its {count} vectors has a text")
    StoredRows(folder, count, fields).refuse_repeated()
    kind = candidates.choose_kind(kind, count, precision, shape[1])
    vectors = np.load(folder / VECTORS, mmap_mode="r")
    described = {"rows": count, "numbers": shape[1], "fields": fields, "kind": kind, "effort": None, "words": None}
    if kind != "exact":
        build = {"binary": candidates.build_scan, "ivf": candidates.build_lists}[kind]
        build(folder, vectors)
        effort = _tune(folder, vectors, kind, empty, recall, precision)
        described["effort"] = dataclasses.asdict(effort)
    if words:
        texts = (row.get("text", "") for row in StoredRows(folder, count, fields))
        lexical.Words.build(texts, language).save(folder / lexical.FOLDER)
        described["words"] = {"language": language}
    return Written(described, empty)


def _tune(folder: Path, vectors, kind: str, empty: np.ndarray, recall: float, precision: str) -> candidates.Effort:
    """The effort that finds the nearest of the other vectors for some of them."""
    kept = np.setdiff1d(np.arange(len(vectors), dtype=np.int32), empty.astype(np.int32))
    own = np.sort(np.random.default_rng(0).permutation(kept)[: candidates.TUNED_QUERIES])
    queries = vectors[own]
    _, near = search_blocks(queries, vector_blocks(vectors, kept), candidates.TUNED_K + 1, precision)
    truth = np.stack([found[found != row][: candidates.TUNED_K] for found, row in zip(near, own)])
    found = FINDERS[kind].load(folder, len(vectors), vectors.shape[1], empty)
    return candidates.tune(found, queries, own, truth, recall)


FINDERS = {"binary": candidates.Scan, "ivf": candidates.Lists}


class Segment:
    """A segment of an index, for searching."""

    def __init__(self, folder: Path, description: Mapping, precision: str, hidden: np.ndarray):
        """`hidden` int64: the rows that are never found, empty or deleted."""
        self.precision, self.kind, self.folder = precision, description["kind"], folder
        shape = description["rows"], description["numbers"]
        self.vectors = load_array(folder / VECTORS, DTYPES[precision], shape)
        self.rows = StoredRows(folder, description["rows"], description["fields"])
        self.kept = np.ones(len(self.rows), bool)
        self.kept[hidden] = False
        self.effort = description["effort"] and candidates.Effort(**description["effort"])
        self._candidates, self.num_lists = None, 1
        if self.kind != "exact":
            self._candidates = FINDERS[self.kind].load(folder, *shape, hidden)
            self.num_lists = self._candidates.lists
            if isinstance(self.vectors, np.memmap):  # a few rows are read, from everywhere
                self.vectors._mmap.madvise(mmap.MADV_RANDOM)
        self.language, self._words = description["words"] and description["words"]["language"], None

    def __len__(self) -> int:
        return len(self.rows)

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query: scores [Q, k] and rows int32 [Q, k], -1 after the last.

        `allowed` bool [N] are rows that may be found, by default all; `exact` compares every one of them.
        """
        kept = self.kept if allowed is None else self.kept & allowed
        count = int(kept.sum())
        if not count:
            return nothing(len(queries), k, self.precision)
        if exact or self._candidates is None or count <= candidates.EXACT_ROWS:
            chosen = np.flatnonzero(kept).astype(np.int32)
            return search_blocks(queries, vector_blocks(self.vectors, chosen), k, self.precision)
        scores, rows = nothing(len(queries), k, self.precision)
        depth = min(self.effort.depth * -(-k // candidates.TUNED_K), self._candidates.size)
        near = (
            [None] * len(queries) if allowed is not None else self._candidates.find(queries, depth, self.effort.probes)
        )
        for i, query in enumerate(queries):
            found = near[i]
            if found is None or (found >= 0).sum() < min(k, count):
                found = self._find_more(query, min(depth, count), kept)
            found = found[found >= 0]
            own = rescore(query, self._read(found))
            order = np.lexsort((found, -own))[:k]
            scores[i, : len(order)], rows[i, : len(order)] = own[order], found[order]
        return scores, rows

    def _find_more(self, query: np.ndarray, wanted: int, kept: np.ndarray) -> np.ndarray:
        """`wanted` candidates among the kept rows: more lists and rows are looked at until there are so many."""
        size, lists = self._candidates.size, self.num_lists
        factor = len(kept) / kept.sum()
        while True:
            depth, probes = min(int(wanted * factor), size), min(int(self.effort.probes * factor) + 1, lists)
            (found,) = self._candidates.find(query[None], depth, probes)
            found = found[found >= 0]
            found = found[kept[found]][:wanted]
            if len(found) >= wanted or (depth >= size and probes >= lists):
                return found
            factor *= 4

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Some vectors. The kernel is told of all of them first, so that a disk reads many at the same time."""
        if isinstance(self.vectors, np.memmap):
            width, page = self.vectors.shape[1] * self.vectors.itemsize, mmap.PAGESIZE
            for start in (rows.astype(np.int64) * width + self.vectors.offset).tolist():
                first = start - start % page
                self.vectors._mmap.madvise(mmap.MADV_WILLNEED, first, start + width - first)
        return self.vectors[rows]

    def search_words(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None):
        """The k rows with the highest BM25 score: scores float32 [Q, k] and rows int32 [Q, k], -1 after the last."""
        if self._words is None:
            self._words = lexical.Words.load(self.folder / lexical.FOLDER, len(self), self.language)
        return self._words.search(queries, k, self.kept if allowed is None else self.kept & allowed)


def _write_header(file, dtype: np.dtype, shape: tuple[int, int]) -> None:
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def are_empty(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Whether each vector is that of a text without tokens, bool [N]: zero, or packed with every bit set."""
    return (vectors == {"ubinary": 255, "binary": 127}.get(precision, 0)).all(1)
