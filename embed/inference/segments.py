"""A segment: vectors and rows that an index got at one time, in a folder that does not change afterwards.

vectors.npy               [N, D] in the precision of the index, memory-mapped
rows.jsonl, …             the rows (stored_rows.py)
codes.npy                 kind "binary": the sign bits of the vectors
lists.safetensors, …      kind "ivf": lists of similar vectors (candidates.py)
bm25/                     scores of words (lexical.py)
"""

import dataclasses
import mmap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embed.inference import candidates, lexical
from embed.inference.ranking import DTYPES, check_vectors, nothing, rescore, search_blocks, vector_blocks
from embed.inference.stored_rows import RowWriter, StoredRows, load_array, npy_header

VECTORS = "vectors.npy"
RECALL = 0.95
FEW_ROWS = 10_000  # so many that a filter leaves are compared one by one


class Block(NamedTuple):
    """Some vectors and their rows, on their way into an index."""

    vectors: np.ndarray  # [n, D], or [n, D/8]
    rows: Sequence[Mapping]  # "_id" and, where there are any, the columns of stored_rows.COLUMNS


class Settings(NamedTuple):
    """How a segment is searched; None is the default."""

    kind: str | None = None  # of candidates.KINDS; None: by the number of rows
    recall: float = RECALL  # share of the ten nearest that the kinds binary and ivf find
    bm25: str | None = None  # the language of lexical.BM25, "" for any; None: no search by words


def write(folder: Path, blocks: Iterable[Block], precision: str, settings: Settings) -> tuple[dict, np.ndarray]:
    """Write a segment into a local folder, block by block: (its description, the rows without text, never found)."""
    empty, count, width = [np.zeros(0, np.int64)], 0, None
    bits = precision in ("binary", "ubinary")
    rows = RowWriter(folder)
    with (folder / VECTORS).open("wb") as file:
        for block in blocks:
            vectors = check_vectors(block.vectors, precision, "vectors")
            if len(block.rows) != len(vectors):
                raise ValueError(f"{len(block.rows)} rows for {len(vectors)} vectors")
            if width is None:
                width = vectors.shape[1]
                file.write(npy_header(vectors.dtype, (0, width)))
            if vectors.shape[1] != width:
                raise ValueError(f"vectors have {vectors.shape[1]} numbers each, those before them {width}")
            empty.append(np.flatnonzero(are_empty(vectors, precision)) + count)
            vectors.tofile(file)
            rows.write(block.rows)
            count += len(vectors)
            # An error comes as soon as it is certain.
            kind = candidates.choose_kind(settings.kind, count, precision, width * (8 if bits else 1))
        if count:
            file.seek(0)
            file.write(npy_header(DTYPES[precision], (count, width)))
    if not count:
        raise ValueError("cannot search an empty corpus: the index has no vectors")
    fields, hidden = rows.close(), np.concatenate(empty)
    if len(hidden) == count:
        raise ValueError(f"cannot search an empty corpus: none of its {count} vectors has a text")
    vectors = load_array(folder / VECTORS, DTYPES[precision], (count, width))
    described = {
        "rows": count,
        "width": width,
        "fields": fields,
        "unfiltered": rows.unfiltered,
        "kind": kind,
        "settings": settings._asdict(),
        "parameters": None,
        "bm25": None,
    }
    if kind != "exact":
        build = {"binary": candidates.build_scan, "ivf": candidates.build_lists}[kind]
        build(folder, vectors)
        found = _tune(folder, vectors, kind, hidden, settings.recall, precision)
        if found.recall < settings.recall:
            warnings.warn(
                f"the search finds {found.recall:.3f} of the ten nearest vectors, not {settings.recall:g}, with "
                f"{found.candidates:,} candidates in all lists: kind exact finds all",
                stacklevel=2,
            )
        described["parameters"] = dataclasses.asdict(found)
    if settings.bm25 is not None:
        texts = (row.get("text", "") for row in StoredRows(folder, count, fields))
        described["bm25"] = lexical.BM25.build(folder / lexical.FOLDER, texts, settings.bm25)
    return described, hidden


def _tune(folder: Path, vectors, kind: str, empty: np.ndarray, recall: float, precision: str) -> candidates.Parameters:
    """The parameters with which some of the vectors find the nearest of the others."""
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
        """`hidden` int64: the rows that are never found, without text or deleted."""
        self.precision, self.kind, self.description = precision, description["kind"], description
        shape = description["rows"], description["width"]
        self.vectors = load_array(folder / VECTORS, DTYPES[precision], shape)
        self.rows = StoredRows(folder, shape[0], description["fields"])
        self.kept = np.ones(len(self.rows), bool)
        self.kept[hidden] = False
        self.parameters, self.num_lists, self._candidates = None, 1, None
        if self.kind != "exact":
            self.parameters = candidates.Parameters(**description["parameters"])
            self._candidates = FINDERS[self.kind].load(folder, *shape, hidden)
            self.num_lists = self._candidates.lists
            self.vectors._mmap.madvise(mmap.MADV_RANDOM)  # a few rows are read, from everywhere
        self.settings = Settings(**description["settings"])
        how = description["bm25"]
        self.bm25 = lexical.BM25(folder / lexical.FOLDER, len(self.rows), **how) if how else None

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
        if exact or self._candidates is None:
            chosen = np.flatnonzero(kept).astype(np.int32)
            return search_blocks(queries, vector_blocks(self.vectors, chosen), k, self.precision)
        scores, rows = nothing(len(queries), k, self.precision)
        wanted = min(self.parameters.candidates * -(-k // candidates.TUNED_K), count)
        if allowed is None:
            near = self._candidates.find(queries, wanted, self.parameters.nprobe)
        else:  # of few rows all are candidates
            near = [np.flatnonzero(kept) if count <= FEW_ROWS else kept[:0]] * len(queries)
        for i, (query, found) in enumerate(zip(queries, near)):
            if (found >= 0).sum() < min(k, count):
                found = self._find_more(query, wanted, kept)
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
            count, nprobe = min(int(wanted * factor), size), min(int(self.parameters.nprobe * factor) + 1, lists)
            (found,) = self._candidates.find(query[None], count, nprobe)
            found = found[found >= 0]
            found = found[kept[found]][:wanted]
            if len(found) >= wanted or (count >= size and nprobe >= lists):
                return found
            factor *= 4

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Some vectors. The kernel is told of all of them first, so that a disk reads many at the same time."""
        width, page = self.vectors.shape[1] * self.vectors.itemsize, mmap.PAGESIZE
        for start in (rows.astype(np.int64) * width + self.vectors.offset).tolist():
            first = start - start % page
            self.vectors._mmap.madvise(mmap.MADV_WILLNEED, first, start + width - first)
        return self.vectors[rows]


def are_empty(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Whether each vector is that of a text without tokens, bool [N]: zero, or packed with every bit set."""
    return (vectors == {"ubinary": 255, "binary": 127}.get(precision, 0)).all(1)
