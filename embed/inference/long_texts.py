"""Late chunking of texts of any length: what is encoded, and the vectors of chunks from those of their parts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embed.inference import chunkers
from embed.rows import Segment, chunked
from embed.tokenizers import Tokenizer


class Chunks(NamedTuple):
    """The chunks of a text: their character offsets, int32 [C, 2], their texts and their vectors [C, D or D/8]."""

    offsets: np.ndarray
    texts: list[str]
    vectors: np.ndarray


class Fitted(NamedTuple):
    """A text as it is encoded: pieces that do not overlap, each a span of one segment."""

    chunks: chunkers.Offsets
    pieces: chunkers.Offsets
    of_chunk: list[tuple[int, int]]  # the first piece of each chunk, and the one after its last
    segment: Segment

    def pool_chunks(self, pooled: np.ndarray, pooling: str) -> np.ndarray:
        """The vectors of the chunks, float32 [C, D], from those of the pieces."""
        counts = np.bincount(self.segment.spans, minlength=self.segment.num_spans + 1)[1:]
        members = np.concatenate([np.arange(*pieces) for pieces in self.of_chunk])
        chunk = np.repeat(np.arange(len(self.chunks)), [stop - first for first, stop in self.of_chunk])
        return combine(pooled[members], chunk, counts[members], len(self.chunks), pooling)


def fit(text: str, chunker: chunkers.Chunker, tokenizer: Tokenizer, separator_id: int | None, name: str) -> Fitted:
    """The chunks of a text and its tokens. ValueError for wrong offsets, and if no chunk has a token."""
    chunks = chunkers.check(chunker(text), len(text), name)
    pieces, starts_chunk, of_chunk = _parts(chunks)
    segment = _joined(tokenizer.encode([text[a:b] for a, b in pieces]), starts_chunk, separator_id)
    if not segment.spans.any():
        raise ValueError(f"{name} has no tokens in any of its {len(chunks)} chunks")
    return Fitted(chunks, pieces, of_chunk, segment)


def _parts(chunks: chunkers.Offsets) -> tuple[chunkers.Offsets, list[bool], list[tuple[int, int]]]:
    """Chunks that may overlap as pieces that do not.

    (offsets of each piece, whether a chunk begins with it, (first piece, stop) of each chunk). A chunk that overlaps
    with no other is one piece.
    """
    borders = sorted({border for chunk in chunks for border in chunk})
    starts = {start for start, _ in chunks}
    pieces, reached, waiting = [], 0, iter(chunks)
    chunk = next(waiting)
    for a, b in zip(borders, borders[1:]):
        while chunk and chunk[0] <= a:
            reached, chunk = max(reached, chunk[1]), next(waiting, None)
        if a < reached:
            pieces.append((a, b))
    index = {start: k for k, (start, _) in enumerate(pieces)}
    stop = {end: k + 1 for k, (_, end) in enumerate(pieces)}
    return pieces, [start in starts for start, _ in pieces], [(index[start], stop[end]) for start, end in chunks]


def _joined(pieces: Sequence[np.ndarray], starts_chunk: Sequence[bool], separator_id: int | None) -> Segment:
    """A segment with a span per piece, and the separator before each that begins a chunk, except the first."""
    whole = chunked(pieces, separator_id)
    if separator_id is None or all(starts_chunk):
        return whole
    keep = np.ones(len(whole.tokens), bool)
    gaps = np.flatnonzero(whole.spans == 0)  # before pieces 1, 2, …
    keep[gaps[~np.array(starts_chunk[1:], bool)]] = False
    return whole._replace(tokens=whole.tokens[keep], spans=whole.spans[keep])


def combine(vectors: np.ndarray, spans: np.ndarray, counts: np.ndarray, total: int, pooling: str) -> np.ndarray:
    """The vectors of `total` spans from those of their parts, in order: float32 [total, D].

    Part i is of span spans[i] and has counts[i] tokens. The mean of a span is that of its parts, weighted by tokens;
    with `pooling` "last" it has the vector of its last part.
    """
    weights = counts.astype(np.float32)
    if pooling == "last":
        parts = np.flatnonzero(counts)
        weights = np.zeros(len(spans), np.float32)
        weights[list({spans[i]: i for i in parts}.values())] = 1
    weights /= np.maximum(np.bincount(spans, weights, total)[spans], 1)
    out = np.zeros((total, vectors.shape[1]), np.float32)
    np.add.at(out, spans, vectors * weights[:, None].astype(np.float32))
    return out
