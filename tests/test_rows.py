import numpy as np
import pytest

from embed import rows
from embed.rows import RowShape


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, n).astype(np.int32) for n in lengths]


def read_back(packed, i, k=0):
    """The tokens of span k of segment i, read from the rows."""
    row, span = divmod(int(packed.span_slots(k)[i]), packed.shape.spans)
    return packed.rows.tokens[row][packed.rows.span_ids[row] == span + 1]


def check_invariants(packed, segments):
    r, shape = packed.rows, packed.shape
    assert all(a.dtype == np.int32 and a.shape == r.tokens.shape for a in r)
    np.testing.assert_array_equal(r.segment_ids == 0, np.cumsum(r.segment_ids[:, ::-1], 1)[:, ::-1] == 0)  # at the end
    for name in ("tokens", "positions", "span_ids"):
        assert (getattr(r, name)[r.segment_ids == 0] == 0).all()
    for i, segment in enumerate(segments):
        row, index = divmod(int(packed.segment_slots()[i]), shape.segments)
        here = np.flatnonzero(r.segment_ids[row] == index + 1)
        assert len(here) == len(segment.tokens) and (len(here) == 0 or here[-1] - here[0] + 1 == len(here))
        np.testing.assert_array_equal(r.tokens[row, here], segment.tokens)
        np.testing.assert_array_equal(r.positions[row, here], np.arange(len(here)))
        for k in range(segment.num_spans):
            np.testing.assert_array_equal(read_back(packed, i, k), segment.tokens[segment.spans == k + 1])
    slots = [packed.span_slots(k)[i] for i, s in enumerate(segments) for k in range(s.num_spans)]
    assert len(set(slots)) == len(slots) and max(slots, default=0) < len(r.tokens) * shape.spans
    assert (r.segment_ids <= shape.segments).all() and (r.span_ids <= shape.spans).all()


@pytest.mark.parametrize("shape", [RowShape(16, 8, 8), RowShape(16, 2, 8), RowShape(16, 8, 3), RowShape(40, 40, 40)])
def test_every_text_is_in_the_rows_once_with_its_own_positions_and_slots(shape):
    segments = [rows.dense(t) for t in texts([3, 16, 0, 5, 1, 8, 8, 2, 12])]
    check_invariants(rows.pack(segments, shape), segments)


def test_chunked_documents_and_texts_share_rows():
    a, b = texts([4, 0, 3, 2]), texts([5])
    segments = [rows.chunked(a, separator_id=3), rows.dense(b[0]), rows.chunked(a[:1]), rows.chunked([])]
    packed = rows.pack(segments, RowShape(32, 8, 4))
    assert len(packed.rows.tokens) == 1
    check_invariants(packed, segments)


def test_separators_are_between_chunks_and_in_no_span():
    segment = rows.chunked([[10, 11], [], [12]], separator_id=3)
    np.testing.assert_array_equal(segment.tokens, [10, 11, 3, 3, 12])
    np.testing.assert_array_equal(segment.spans, [1, 1, 0, 0, 3])
    assert segment.num_spans == 3
    np.testing.assert_array_equal(rows.chunked([[10, 11], [], [12]]).tokens, [10, 11, 12])


@pytest.mark.parametrize("shape", [RowShape(8, 9, 9), RowShape(100, 3, 9), RowShape(100, 9, 3)])
def test_tokens_spans_and_segments_each_limit_a_row(shape):
    packed = rows.pack([rows.dense(t) for t in texts([2] * 9)], shape)
    per_row = np.bincount(packed.row)
    assert per_row.max() == min(shape.length // 2, shape.spans, shape.segments)
    assert len(per_row) == -(-9 // per_row.max())


def plain_first_fit_decreasing(lengths, spans, shape, num_rows):
    free, row = [[shape.length, shape.spans, shape.segments] for _ in range(num_rows)], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = [lengths[i], spans[i], 1]
        for r in range(num_rows):
            if all(f >= n for f, n in zip(free[r], need)):
                free[r] = [f - n for f, n in zip(free[r], need)]
                row[i] = r
                break
        else:
            return None
    return [row[i] for i in range(len(lengths))]


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_first_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    lengths, spans = rng.integers(0, 14, 25), rng.integers(1, 4, 25)
    shape = RowShape(16, int(rng.integers(4, 9)), int(rng.integers(2, 6)))
    for num_rows in (8, 12, 16):
        got = rows.first_fit_decreasing(lengths, spans, shape, num_rows)
        want = plain_first_fit_decreasing(lengths, spans, shape, num_rows)
        assert (got is None) == (want is None)
        assert want is None or list(got) == want


@pytest.mark.parametrize("seed", range(20))
def test_a_group_that_does_not_fit_is_cut_to_the_largest_cap_that_does(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 20)
    shape, num_rows = RowShape(32, 6, 6), int(rng.integers(4, 14))
    ones = np.ones(20, int)
    caps = [
        c
        for c in range(1, shape.length + 1)
        if plain_first_fit_decreasing(np.minimum(lengths, c), ones, shape, num_rows) is not None
    ]
    packed, segments, cuts = rows.pack_group([rows.dense(t) for t in texts(lengths)], shape, num_rows)
    assert len(packed.rows.tokens) == num_rows
    assert cuts == (lengths > max(caps)).sum()
    for text, segment in zip(texts(lengths), segments):
        np.testing.assert_array_equal(segment.tokens, text[: max(caps)])
    check_invariants(packed, segments)


@pytest.mark.parametrize("is_dense", [True, False])
def test_the_largest_cap_is_that_of_an_exhaustive_search(is_dense):
    """Also where a larger cap fits although a smaller one does not."""
    above, impossible = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, shape = int(rng.integers(1, 60)), RowShape(64, int(rng.integers(3, 9)), int(rng.integers(2, 9)))
        lengths, spans = rng.zipf(1.3, n) % 100, np.ones(n, int) if is_dense else rng.integers(0, 4, n)
        num_rows = int(rng.integers(1, 20))
        fits = [
            plain_first_fit_decreasing(np.minimum(lengths, c), spans, shape, num_rows) is not None
            for c in range(1, min(lengths.max(), shape.length) + 1)
        ]
        if not any(fits):
            with pytest.raises(ValueError, match="even cut to one token each"):
                rows.largest_cap(lengths, spans, shape, num_rows)
            impossible += 1
            continue
        cap, row = rows.largest_cap(lengths, spans, shape, num_rows)
        assert cap == np.flatnonzero(fits).max() + 1
        assert list(row) == plain_first_fit_decreasing(np.minimum(lengths, cap), spans, shape, num_rows)
        above += not all(fits[:cap])
    assert above and impossible


def test_a_group_that_fits_is_not_cut_and_its_rows_are_padded():
    packed, segments, cuts = rows.pack_group([rows.dense(t) for t in texts([3, 4])], RowShape(8, 2, 2), 5)
    assert cuts == 0 and packed.rows.tokens.shape == (5, 8)
    check_invariants(packed, segments)


def test_a_cut_document_keeps_empty_slots_for_its_lost_chunks():
    packed, segments, cuts = rows.pack_group([rows.chunked(texts([3, 3, 3]))], RowShape(4, 5, 2), 1)
    assert cuts == 1 and segments[0].num_spans == 3
    assert [len(read_back(packed, 0, k)) for k in range(3)] == [3, 1, 0]


@pytest.mark.parametrize("size, length", [(101, 100), (150, 100), (151, 100), (1000, 100), (1000, 99), (7, 2), (9, 1)])
def test_every_token_is_taken_from_the_window_in_which_it_has_most_context(size, length):
    rng = np.random.default_rng(size)
    spans = np.repeat(np.arange(1, size + 1), rng.integers(0, 9, size))[:size].astype(np.int32)
    spans[rng.integers(0, len(spans), 3)] = 0  # separators
    document = rows.Segment(np.arange(len(spans), dtype=np.int32), spans, size)
    parts = rows.windows(document, length)
    tokens, of_document = [], []
    for part in parts:
        assert len(part.segment.tokens) == length
        np.testing.assert_array_equal(np.bincount(part.segment.spans, minlength=1)[1:], part.counts)
        taken = part.segment.spans > 0
        tokens.append(part.segment.tokens[taken])
        of_document.append(part.spans[part.segment.spans[taken] - 1] + 1)
        if len(parts) > 1:
            middle = part.segment.tokens[taken]
            first, last = part.segment.tokens[[0, -1]]
            for other in parts:  # in no other window is the shorter side longer, but for the rounding of a half
                start, end = other.segment.tokens[[0, -1]]
                assert (np.minimum(middle - first, last - middle) >= np.minimum(middle - start, end - middle) - 1).all()
    np.testing.assert_array_equal(np.concatenate(tokens), np.flatnonzero(spans))
    np.testing.assert_array_equal(np.concatenate(of_document), spans[spans > 0])
    assert sum(len(part.segment.tokens) for part in parts) <= 2 * len(spans) + length


def test_a_document_that_fits_is_its_only_window():
    document = rows.chunked(texts([3, 0, 4]), 2)
    (part,) = rows.windows(document, len(document.tokens))
    np.testing.assert_array_equal(part.segment.tokens, document.tokens)
    assert part.spans.tolist() == [0, 2] and part.counts.tolist() == [3, 4] and part.segment.num_spans == 2


def test_content_ids_are_equal_only_for_equal_tokens():
    a, b = texts([5, 5])
    ids = rows.content_ids([a, b, a.copy(), a[:4], a.astype(np.int64), []])
    assert ids.dtype == np.int32
    assert ids[0] == ids[2] == ids[4] and len(set(ids.tolist())) == 4
    assert rows.content_ids([]).shape == (0,)


@pytest.mark.parametrize("lengths", [[9], [3, 12]])
def test_a_text_longer_than_a_row_is_an_error_if_nothing_may_be_cut(lengths):
    with pytest.raises(ValueError, match=f"a segment of {max(lengths)} tokens .* does not fit a row of 8 tokens"):
        rows.pack([rows.dense(t) for t in texts(lengths)], RowShape(8, 4, 4))


def test_more_tokens_than_the_rows_hold_are_an_error_if_nothing_may_be_cut():
    with pytest.raises(ValueError, match="10 tokens in 2 segments do not fit 1 rows of 8"):
        rows.pack([rows.dense(t) for t in texts([5, 5])], RowShape(8, 4, 4), num_rows=1)


def test_more_texts_than_a_group_holds_are_an_error_that_names_its_capacity():
    with pytest.raises(ValueError, match="5 segments with 5 spans do not fit 1 rows of 8 tokens, 4 spans"):
        rows.pack_group([rows.dense(t) for t in texts([1] * 5)], RowShape(8, 4, 4), 1)
