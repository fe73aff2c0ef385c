"""Packed rows and spans: the one data layout of every stage and of inference.

A batch is R rows of L tokens with three integer maps (see `Rows`). A *segment* is one text or one document;
attention stays inside it. A *span* is the range of tokens that one embedding averages: a whole dense text, or one
chunk of a document (late chunking). Several segments share a row. This module uses only NumPy.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """The row arrays, all int32[R, L]."""

    tokens: np.ndarray
    segment_ids: np.ndarray  # 1..G in a row, 0 = padding; attention never crosses segments
    positions: np.ndarray  # restart at 0 in each segment
    span_ids: np.ndarray  # 1..S in a row, 0 = in no span (padding, separators)


class RowShape(NamedTuple):
    """The capacity of a row: `length` tokens, `spans` spans and `segments` segments."""

    length: int
    spans: int
    segments: int


class Segment(NamedTuple):
    """One text: its tokens and the span of each token (1.. in this segment, 0 = none)."""

    tokens: np.ndarray  # int32[n]
    spans: np.ndarray  # int32[n]
    num_spans: int  # slots in the span table, including those of empty chunks


class Packed(NamedTuple):
    """Rows and the position of each segment in them.

    Segment i, span k (from 0) is slot `row[i] * S + first_span[i] + k` of the flattened span table [R * S];
    segment i as a whole is slot `row[i] * G + segment[i]` of the flattened segment table [R * G].
    """

    rows: Rows
    row: np.ndarray  # int[n]
    first_span: np.ndarray  # int[n], from 0
    segment: np.ndarray  # int[n], from 0
    shape: RowShape

    def span_slots(self, spans: np.ndarray | int = 0) -> np.ndarray:
        """Flat slot in the span table of span `spans` (from 0) of each segment, int[n]."""
        return self.row * self.shape.spans + self.first_span + spans

    def segment_slots(self) -> np.ndarray:
        """Flat slot in the segment table of each segment, int[n]."""
        return self.row * self.shape.segments + self.segment


def dense(tokens: np.ndarray) -> Segment:
    """A text with one embedding: one segment, one span."""
    tokens = np.asarray(tokens, np.int32)
    return Segment(tokens, np.ones_like(tokens), 1)


def chunked(chunks: Sequence[np.ndarray], separator_id: int | None = None) -> Segment:
    """A document with one embedding per chunk: one segment, one span per chunk, in order.

    `separator_id` stands between chunks and belongs to no span (arXiv 2602.11151); None means no separator.
    """
    tokens, spans = [], []
    for k, chunk in enumerate(chunks):
        if k and separator_id is not None:
            tokens.append(np.array([separator_id], np.int32))
            spans.append(np.zeros(1, np.int32))
        tokens.append(np.asarray(chunk, np.int32))
        spans.append(np.full(len(chunk), k + 1, np.int32))
    if not tokens:
        return Segment(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
    return Segment(np.concatenate(tokens), np.concatenate(spans), len(chunks))


def cut(segment: Segment, length: int) -> Segment:
    """The first `length` tokens of a segment. It keeps all span slots; those that lose every token are empty."""
    if len(segment.tokens) <= length:
        return segment
    return segment._replace(tokens=segment.tokens[:length], spans=segment.spans[:length])


def windows(segment: Segment, length: int) -> list[Segment]:
    """A chunked document as consecutive windows of whole chunks, each a segment of at most `length` tokens.

    There are as few windows as possible and the longest is as short as possible, so that no chunk is left with little
    context. A chunk of more than `length` tokens is a window of its own. The separator between two windows is dropped.
    """
    if len(segment.tokens) <= length or segment.num_spans < 2:
        return [segment]
    sizes = np.bincount(segment.spans, minlength=segment.num_spans + 1)[1:]
    gap = int((segment.spans == 0).any())  # the separator
    starts = np.cumsum(sizes + gap) - sizes - gap

    def first_chunks(limit: int) -> list[int]:
        """The first chunk of each window if every window takes as many chunks as fit `limit`."""
        first = [0]
        for k in range(1, segment.num_spans):
            if starts[k] + sizes[k] - starts[first[-1]] > limit:
                first.append(k)
        return first

    # The smallest limit with as few windows is in low + 1 … high.
    low, high = int(sizes[sizes <= length].max(initial=1)) - 1, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(first_chunks(middle)) == len(first_chunks(length)) else (middle, high)
    result, first = [], [*first_chunks(high), segment.num_spans]
    for a, b in zip(first, first[1:]):
        part = slice(starts[a], starts[b - 1] + sizes[b - 1])
        result.append(Segment(segment.tokens[part], np.maximum(segment.spans[part] - a, 0), b - a))
    return result


def content_ids(texts: Sequence[np.ndarray]) -> np.ndarray:
    """A 32-bit hash of each token sequence, int32[n]: equal tokens have equal ids."""
    digests = (hashlib.blake2b(np.ascontiguousarray(t, np.int32), digest_size=4).digest() for t in texts)
    return np.frombuffer(b"".join(digests), np.int32)


def first_fit_decreasing(
    lengths: np.ndarray, spans: np.ndarray, shape: RowShape, num_rows: int | None = None
) -> np.ndarray | None:
    """The row of each segment, int[n], or None if `num_rows` rows cannot hold them.

    Takes the longest segment first and puts each into the first row that still holds its tokens, its spans and one more
    segment. With `num_rows=None` it opens a new row whenever no row does. A segment larger than a row is an error.
    """
    if len(lengths) and (lengths.max() > shape.length or spans.max() > shape.spans):
        if num_rows is not None:
            return None
        raise ValueError(
            f"a segment of {lengths.max()} tokens and {spans.max()} spans does not fit a row of "
            f"{shape.length} tokens and {shape.spans} spans"
        )
    max_rows = len(lengths) if num_rows is None else num_rows
    free_tokens = np.full(max_rows, shape.length)
    free_spans = np.full(max_rows, shape.spans)
    free_segments = np.full(max_rows, shape.segments)
    row = np.zeros(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        fits = (free_tokens >= lengths[i]) & (free_spans >= spans[i]) & (free_segments >= 1)
        r = int(fits.argmax()) if max_rows else 0
        if not max_rows or not fits[r]:
            return None
        row[i] = r
        free_tokens[r] -= lengths[i]
        free_spans[r] -= spans[i]
        free_segments[r] -= 1
    return row


def largest_cap(lengths: np.ndarray, spans: np.ndarray, shape: RowShape, num_rows: int) -> tuple[int, np.ndarray]:
    """The largest c for which first-fit-decreasing of min(length, c) fits `num_rows` rows, and each segment's row.

    The search starts at the largest c whose total of tokens fits and tries every smaller c in turn, because
    first-fit-decreasing is not monotone.
    """
    cap = min(int(lengths.max(initial=1)), shape.length)
    budget = num_rows * shape.length
    while cap > 1 and np.minimum(lengths, cap).sum() > budget:
        cap -= 1
    for c in range(cap, 0, -1):
        row = first_fit_decreasing(np.minimum(lengths, c), spans, shape, num_rows)
        if row is not None:
            return c, row
    raise ValueError(
        f"{len(lengths)} segments with {int(spans.sum())} spans do not fit {num_rows} rows of "
        f"{shape.length} tokens, {shape.spans} spans and {shape.segments} segments, even cut to one token each"
    )


def write_rows(segments: Sequence[Segment], row: np.ndarray, shape: RowShape, num_rows: int) -> Packed:
    """Write segment i into row `row[i]`, after the segments that are already there."""
    tokens, segment_ids, positions, span_ids = np.zeros((4, num_rows, shape.length), np.int32)
    used, span_count, segment_count = np.zeros((3, num_rows), np.int64)
    first_span, segment_index = np.zeros((2, len(segments)), np.int64)
    for i, (s, r) in enumerate(zip(segments, row)):
        start, stop = used[r], used[r] + len(s.tokens)
        tokens[r, start:stop] = s.tokens
        segment_ids[r, start:stop] = segment_count[r] + 1
        positions[r, start:stop] = np.arange(len(s.tokens))
        span_ids[r, start:stop] = np.where(s.spans > 0, s.spans + span_count[r], 0)
        first_span[i], segment_index[i] = span_count[r], segment_count[r]
        used[r] = stop
        span_count[r] += s.num_spans
        segment_count[r] += 1
    return Packed(Rows(tokens, segment_ids, positions, span_ids), np.asarray(row), first_span, segment_index, shape)


def pack(segments: Sequence[Segment], shape: RowShape, num_rows: int | None = None) -> Packed:
    """Pack segments by first-fit-decreasing, into as many rows as needed or into exactly `num_rows`."""
    lengths = np.array([len(s.tokens) for s in segments], np.int64)
    spans = np.array([s.num_spans for s in segments], np.int64)
    row = first_fit_decreasing(lengths, spans, shape, num_rows)
    if row is None:
        raise ValueError(
            f"{lengths.sum()} tokens in {len(segments)} segments do not fit {num_rows} rows of {shape.length}"
        )
    return write_rows(segments, row, shape, int(row.max(initial=-1)) + 1 if num_rows is None else num_rows)


def pack_group(segments: Sequence[Segment], shape: RowShape, num_rows: int) -> tuple[Packed, list[Segment], int]:
    """Pack a group into exactly `num_rows` rows; if it does not fit, cut its longest segments to one common length.

    Returns the packed rows, the segments after the cut, and the number of segments that were cut.
    """
    lengths = np.array([len(s.tokens) for s in segments], np.int64)
    spans = np.array([s.num_spans for s in segments], np.int64)
    cap, row = largest_cap(lengths, spans, shape, num_rows)
    segments = [cut(s, cap) for s in segments]
    return write_rows(segments, row, shape, num_rows), segments, int((lengths > cap).sum())
