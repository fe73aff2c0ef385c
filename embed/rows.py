"""Packed rows and spans: the one data layout of every stage and of inference.

A batch is R rows of L tokens with three integer maps (see `Rows`). A *segment* is one text or one document;
attention stays inside it. A *span* is the range of tokens that one embedding averages: a whole dense text, or one
chunk of a document (late chunking). Several segments share a row. This module uses only NumPy.
"""

import bisect
import hashlib
import math
from collections.abc import Callable, Sequence
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
    segment i as a whole is slot `row[i] * G + segment[i]` of the flattened segment table [R * G];
    its token k is slot `row[i] * L + first_token[i] + k` of the flattened rows [R * L].
    """

    rows: Rows
    row: np.ndarray  # int[n]
    first_token: np.ndarray  # int[n], from 0
    first_span: np.ndarray  # int[n], from 0
    segment: np.ndarray  # int[n], from 0
    shape: RowShape

    def span_slots(self, spans: np.ndarray | int = 0) -> np.ndarray:
        """Flat slot in the span table of span `spans` (from 0) of each segment, int[n]."""
        return self.row * self.shape.spans + self.first_span + spans

    def token_slots(self) -> np.ndarray:
        """Flat slot in the rows of the first token of each segment, int[n]."""
        return self.row * self.shape.length + self.first_token

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


class Window(NamedTuple):
    """A part of a long document that is encoded by itself."""

    segment: Segment  # its spans are numbered anew; a token that another window takes is in no span
    spans: np.ndarray  # int[m]: the span of the document, from 0, of each of its spans
    counts: np.ndarray  # int[m]: the number of tokens of each


def windows(segment: Segment, length: int) -> list[Window]:
    """A document as overlapping windows of `length` tokens; one that is not longer is its only window.

    Neighbours share half a window or more. A token is taken from the window in which it has most context on its
    shorter side: a quarter of a window or more, except at the ends of the document. So the cost is linear in the length
    of the document. A span may have tokens in several windows.
    """
    size = len(segment.tokens)
    count = 1 + max(0, -(-2 * (size - length) // max(length, 1)))
    starts = np.linspace(0, max(size - length, 0), count).round().astype(int)
    borders = [0, *((starts[:-1] + starts[1:] + length) // 2), size]
    result = []
    for start, first, stop in zip(starts, borders, borders[1:]):
        part = slice(start, start + length)
        spans = segment.spans[part].copy()
        spans[: first - start] = spans[stop - start :] = 0
        of_document, inverse, counts = np.unique(spans, return_inverse=True, return_counts=True)
        none = int(not len(of_document) or of_document[0] != 0)  # the first is that of tokens in no span
        local = Segment(segment.tokens[part], (inverse + none).astype(np.int32), len(of_document) - 1 + none)
        result.append(Window(local, of_document[1 - none :] - 1, counts[1 - none :]))
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
    # First fit gives the same rows when it fills one row after the other: each with the longest segment that fits, then
    # the next that does, and so on. The remaining segments are sorted by length, so a row finds them by bisection.
    order = np.argsort(-lengths, kind="stable")
    negative, width, index = (-lengths[order]).tolist(), spans[order].tolist(), order.tolist()
    narrowest = min(width, default=0)
    free = math.inf if num_rows is None else num_rows * shape.length - int(lengths.sum())  # tokens in all rows
    row, r = np.zeros(len(lengths), np.int64), 0
    while index:
        if r == num_rows or free < 0:
            return None
        free_tokens, free_spans, free_segments, i = shape.length, shape.spans, shape.segments, 0
        while free_segments and free_spans >= narrowest:
            i = bisect.bisect_left(negative, -free_tokens, i)
            while i < len(width) and width[i] > free_spans:
                i += 1
            if i == len(width):
                break
            free_tokens += negative.pop(i)
            free_spans -= width.pop(i)
            free_segments -= 1
            row[index.pop(i)] = r
        free -= free_tokens
        r += 1
    return row


def largest_cap(lengths: np.ndarray, spans: np.ndarray, shape: RowShape, num_rows: int) -> tuple[int, np.ndarray]:
    """The largest c for which first-fit-decreasing of min(length, c) fits `num_rows` rows, and each segment's row.

    First-fit-decreasing is not monotone: a larger cap than one that does not fit may fit. So bisection finds a cap that
    fits, and all larger ones whose total of tokens fits are tried at once.
    """

    def rows_of(cap: int) -> np.ndarray | None:
        return first_fit_decreasing(np.minimum(lengths, cap), spans, shape, num_rows)

    longest = max(1, min(int(lengths.max(initial=1)), shape.length))
    most = _last(lambda cap: np.minimum(lengths, cap).sum() <= num_rows * shape.length, longest)
    best, row = most, rows_of(most) if most else None
    if row is None:
        best = _last(lambda cap: rows_of(cap) is not None, most - 1)
        larger = np.arange(best + 1, most)
        best = int(larger[_caps_that_fit(lengths, spans, shape, num_rows, larger)].max(initial=best))
        row = rows_of(best) if best else None
    if row is None:
        raise ValueError(
            f"{len(lengths)} segments with {int(spans.sum())} spans do not fit {num_rows} rows of "
            f"{shape.length} tokens, {shape.spans} spans and {shape.segments} segments, even cut to one token each"
        )
    return best, row


def _last(holds: Callable[[int], bool], most: int) -> int:
    """A number n of 0..most that holds, while n + 1 does not or is above `most`; 0 always holds."""
    least, over = 0, most + 1
    while over - least > 1:
        middle = (least + over) // 2
        if holds(middle):
            least = middle
        else:
            over = middle
    return least


def _caps_that_fit(
    lengths: np.ndarray, spans: np.ndarray, shape: RowShape, num_rows: int, caps: np.ndarray
) -> np.ndarray:
    """Whether first-fit-decreasing of min(length, cap) fits `num_rows` rows, for many caps at once, bool[caps]."""
    need, widest = np.minimum(lengths, caps[:, None]).astype(np.int32), int(spans.max(initial=0))
    is_uniform = widest == spans.min(initial=widest)  # then spans limit the number of segments, and ties do not matter
    order = np.argsort(-(lengths[None] if is_uniform else need), kind="stable")
    need, width = np.take_along_axis(need, order, 1).T[..., None].copy(), np.broadcast_to(spans[order], need.shape).T
    most_segments = min(shape.segments, shape.spans // max(widest, 1)) if is_uniform else shape.segments
    # The free tokens, spans and segments of each row, [caps, rows], and views of them by slot = (cap, row).
    free = [np.full((len(caps), num_rows), n, np.int32) for n in (shape.length, shape.spans, most_segments)]
    tokens, other, segments = (x.reshape(-1) for x in free)
    fits, first_slot, result = np.empty(free[0].shape, bool), np.arange(len(caps)) * num_rows, np.ones(len(caps), bool)
    for n, w in zip(need, width):
        np.greater_equal(free[0], n, out=fits)
        if not is_uniform:
            fits &= free[1] >= w[:, None]
        slot = fits.argmax(1)
        slot += first_slot
        result &= fits.reshape(-1).take(slot)
        if not result.any():
            break
        tokens[slot] -= n[:, 0]
        if not is_uniform:
            other[slot] -= w.astype(np.int32)
        left = segments.take(slot)
        left -= 1
        segments[slot] = left
        if not left.all():
            tokens[slot[left == 0]] = -1  # no further segment fits
    return result


def write_rows(segments: Sequence[Segment], row: np.ndarray, shape: RowShape, num_rows: int) -> Packed:
    """Write segment i into row `row[i]`, after the segments that are already there."""
    row, lengths = np.asarray(row, np.int64), np.array([len(s.tokens) for s in segments], np.int64)
    order = np.argsort(row, kind="stable")
    begins = np.searchsorted(row[order], np.arange(num_rows))  # of each row in `order`

    def before(sizes: np.ndarray) -> np.ndarray:
        """Per segment, the sum of the sizes of the segments before it in its row."""
        totals = np.concatenate([[0], np.cumsum(sizes[order])])
        result = np.empty(len(order), np.int64)
        result[order] = totals[:-1] - totals[begins[row[order]]]
        return result

    first_span, segment_index = before(np.array([s.num_spans for s in segments], np.int64)), before(np.ones_like(row))
    rows = np.zeros((4, num_rows * shape.length), np.int32)
    first_token = before(lengths)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    slot = position + np.repeat(row * shape.length + first_token, lengths)
    spans = np.concatenate([np.zeros(0, np.int32), *(s.spans for s in segments)])
    rows[0, slot] = np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in segments)])
    rows[1, slot] = np.repeat(segment_index + 1, lengths)
    rows[2, slot] = position
    rows[3, slot] = np.where(spans > 0, spans + np.repeat(first_span, lengths), 0)
    rows = Rows(*rows.reshape(4, num_rows, shape.length))
    return Packed(rows, row, first_token, first_span, segment_index, shape)


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
