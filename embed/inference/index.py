"""Indexes: vectors and rows on a disk, searched by vectors and by words (docs/search.md).

INDEX/index.json           what made the vectors, the segments with size and sha256 of each file (index_files.py)
INDEX/K/                   segment K (segments.py), written once; a new segment gets a new number
INDEX/K.hidden-J.npy       int64, the rows of segment K that are never found, without text or deleted
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.inference import index_files, lexical
from embed.inference.encoder import Encoder
from embed.inference.index_files import INFO, Provenance
from embed.inference.precision import check_count
from embed.inference.ranking import check_vectors
from embed.inference.segments import Segment
from embed.inference.stored_rows import document, load_array

CHECKED_BYTES = 1 << 30  # larger indexes are checked by the sizes of their files, unless asked otherwise
ATTEMPTS = 10  # to open an index that others change


class Hit(NamedTuple):
    """A row that was found."""

    row: int
    score: float
    content: dict  # what is stored of it, see `Index.content`
    shares: tuple[float, float] | None = None  # what vectors and BM25 add to the score, see `Index.search_hybrid`

    @property
    def id(self) -> str:
        """The id of the text or chunk."""
        return self.content["_id"]

    @property
    def document(self) -> str:
        """The id of the document that it is a chunk of, or its own."""
        return document(self.content)


class Index:
    """The vectors and rows of a folder: cosine for float32 and int8, negative Hamming distance for packed bits.

    It shows the folder as it was when it was opened, also while others change it.
    """

    def __init__(self, folder: Path, info: Mapping):
        self.folder, self.info = folder, info
        self.provenance = Provenance(**{name: info[name] for name in Provenance._fields})
        self.segments: list[Segment] = []
        for name, each in info["segments"].items():
            hidden = load_array(folder / each["hidden"], np.int64, (each["num_hidden"],))
            if len(hidden) and not 0 <= hidden.min() <= hidden.max() < each["rows"]:
                raise ValueError(f"{folder / each['hidden']} has numbers of rows outside 0..{each['rows'] - 1}")
            self.segments.append(Segment(folder / name, each, self.precision, hidden))
        self.width = self.segments[0].vectors.shape[1]
        self._first = np.cumsum([0, *map(len, self.segments)])

    @property
    def precision(self) -> str:
        """Precision of the vectors."""
        return self.provenance.precision

    @property
    def truncate_dim(self) -> int | None:
        """Dimensions that were kept, None for all."""
        return self.provenance.truncate_dim

    def __len__(self) -> int:
        """The number of rows that can be found."""
        return sum(int(segment.kept.sum()) for segment in self.segments)

    @classmethod
    def load(cls, folder, *, check: bool | None = None) -> "Index":
        """Open an index. ValueError names a file that was damaged or replaced.

        `check` compares the sha256 of every file; by default that is done up to 1 GiB. The sizes of files and whatever
        could make a search read outside of them are always checked. An index in a bucket is copied first.
        """
        for attempt in range(ATTEMPTS):
            info = index_files.read(folder)
            try:
                return cls._open(paths.path(folder), info, check)
            except (ValueError, FileNotFoundError):
                if attempt == ATTEMPTS - 1 or index_files.read(folder) == info:  # it was not changed meanwhile
                    raise

    @classmethod
    def _open(cls, folder, info: dict, check: bool | None) -> "Index":
        files, copy = index_files.files(info), None
        if paths.is_bucket(folder):
            copy = tempfile.TemporaryDirectory(prefix="embed-")
            for file in files:
                paths.copy_file(folder / file, Path(copy.name, file))
        local = Path(copy.name if copy else folder)
        if check is None:
            check = sum(size for size, _ in files.values()) <= CHECKED_BYTES
        for file, (size, digest) in files.items():
            if not (local / file).is_file():
                raise ValueError(f"{folder / file} is missing, although {INFO} names it: make the index again")
            same = (local / file).stat().st_size == size and (not check or paths.file_digest(local / file) == digest)
            if not same:
                raise ValueError(f"{folder / file} is not the file that {INFO} was written with: make the index again")
        index = cls(local, info)
        index.folder, index._copy = folder, copy  # which lives as long as the index
        return index

    def search(
        self, queries: np.ndarray, k: int, *, filters: Mapping[str, Sequence] | None = None, exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, best first: scores [Q, k] and numbers of rows int64 [Q, k].

        `queries` are what `Encoder.encode` returns in the index's precision. Scores are float32 cosines, or minus the
        number of differing bits (int32). With fewer than k results, the last ranks have the row -1; with fewer than k
        rows in the index, there are fewer ranks. `filters` has the allowed values of fields, such as {"lang": ["en",
        "de"]}. `exact` compares with every vector, also where the index has a faster way, which finds the stated share
        of the ten nearest and may find less of more.
        """
        queries = check_vectors(queries, self.precision, "queries")
        if queries.shape[1] != self.width:
            raise ValueError(f"queries have {queries.shape[1]} numbers each, stored vectors {self.width}")
        check_count("k", k)
        k = min(k, max(1, len(self)))
        allowed = self._allowed(filters)
        return self._merge([s.search(queries, k, some, exact) for s, some in zip(self.segments, allowed)], k)

    def search_bm25(
        self, queries: Sequence[str], k: int, *, filters: Mapping[str, Sequence] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by the words of the queries: scores float32 [Q, k]. Rows without any of them are not found."""
        check_count("k", k)
        self.check_bm25()
        k = min(k, max(1, len(self)))
        allowed = [s.kept if some is None else s.kept & some for s, some in zip(self.segments, self._allowed(filters))]
        scores, rows = (np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1))
        models = [segment.bm25 for segment in self.segments]
        for i, query in enumerate(queries):
            weights = lexical.query_weights(query, models)
            found = [model.search(own, k, some) for model, own, some in zip(models, weights, allowed)]
            own, best = self._merge([(score[None], row[None]) for score, row in found], k)
            scores[i, : own.shape[1]], rows[i, : best.shape[1]] = own[0], best[0]
        return scores, rows

    def search_hybrid(
        self,
        queries: np.ndarray,
        texts: Sequence[str],
        k: int,
        *,
        window: int = 100,
        filters: Mapping[str, Sequence] | None = None,
        exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The reciprocal rank fusion of the first `window` rows (at least k) by vectors and by BM25.

        Returns scores float32 [Q, k], rows int64 [Q, k], and what vectors and BM25 add to a score, [Q, k, 2].
        """
        window = max(window, k)
        by_vectors = self.search(queries, window, filters=filters, exact=exact)[1]
        by_words = self.search_bm25(texts, window, filters=filters)[1]
        rows, shares = lexical.reciprocal_rank_fusion(by_vectors, by_words, depth=min(k, max(1, len(self))))
        return shares.sum(-1), rows.astype(np.int64), shares

    def content(self, row: int) -> dict:
        """What is stored of a row: "_id", and where there are any "document", "text", "start", "end", "fields"."""
        segment = int(np.searchsorted(self._first, row, "right")) - 1
        return self.segments[segment].rows[int(row - self._first[segment])]

    def hits(self, scores: np.ndarray, rows: np.ndarray, shares: np.ndarray | None = None) -> list[Hit]:
        """The results of one query with their content: scores [k], rows [k], and shares [k, 2] of `search_hybrid`."""
        parts = [None] * len(rows) if shares is None else map(tuple, shares.tolist())
        found = zip(rows.tolist(), scores.tolist(), parts)
        return [Hit(row, score, self.content(row), share) for row, score, share in found if row >= 0]

    def check_bm25(self) -> None:
        """ValueError unless the index can be searched by words."""
        if any(segment.bm25 is None for segment in self.segments):
            raise ValueError(f"the index {self.folder} cannot be searched by words: make it with --bm25")

    def check_documents(self, documents: Iterable[str]) -> None:
        """ValueError unless each of the documents, ids of rows of a corpus, has rows that can be found."""
        documents, there = set(documents), set()
        for segment in self.segments:
            found = segment.rows.of_documents(documents)
            there |= {name for name, rows in found.items() if segment.kept[rows].any()}
        if missing := sorted(documents - there):
            raise ValueError(
                f"{self.folder} has no document {missing[0]!r}; {len(missing)} of {len(documents)} are missing"
            )

    def check_model(self, encoder: Encoder) -> None:
        """ValueError unless the vectors come from the encoder's model: same weights, tokenizer and settings."""
        made_by = self.provenance.model.get("digest")
        if not made_by or not encoder.digest:
            missing = "the index does not say which model made it" if not made_by else "the model has no digest"
            raise ValueError(f"{missing}: the index cannot be checked against the model at {encoder.path}")
        if made_by != encoder.digest:
            raise ValueError(
                f"the index was made with the model at {self.provenance.model.get('path')} (digest {made_by:.12}), "
                f"not with the one at {encoder.path} (digest {encoder.digest:.12})"
            )

    def _allowed(self, filters: Mapping[str, Sequence] | None) -> list[np.ndarray | None]:
        """Which rows of each segment have the values of `filters`."""
        if not filters:
            return [None] * len(self.segments)
        known = sorted({name for segment in self.segments for name in segment.rows.fields})
        for name, values in filters.items():
            for segment in self.segments:
                if name in (unfiltered := segment.description["unfiltered"]):
                    raise ValueError(f"the field {name!r} cannot be filtered by: it has {unfiltered[name]}")
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
