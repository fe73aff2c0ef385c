import jax
import numpy as np
import pytest

from embed import mining
from embed.mining import judge_by, mine


def on_circle(*degrees):
    """Unit vectors at these angles. The cosine of two is the cosine of the difference of their angles."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


# One query at 0°, documents ranked 0, 1, 2, …; the positive is document 1 (10°, cosine 0.985).
QUERY = on_circle(0)
DOCUMENTS = on_circle(5, 10, 20, 40, 60, 90, 180)


def run(**changes):
    arguments = dict(positives=[1], num_negatives=3, rank_window=(0, 100), margin=None) | changes
    queries, documents = arguments.pop("queries", QUERY), arguments.pop("documents", DOCUMENTS)
    mined = mine(queries, documents, arguments.pop("positives"), **arguments)
    return mined.negatives, mined.counts


def test_negatives_are_the_best_ranked_documents_without_the_positive():
    negatives, counts = run()
    assert negatives.tolist() == [[0, 2, 3]] and negatives.dtype == np.int32
    assert counts == {
        "queries": 1,
        "candidates": 7,
        "negatives": 3,
        "surplus": 3,
        "removed_positive": 1,
        "removed_unscored": 0,
        "removed_margin": 0,
        "removed_duplicate": 0,
        "short": 0,
        "none": 0,
        "small_window": 0,
    }


def test_the_window_counts_ranks_from_zero_includes_the_positive_and_excludes_its_end():
    assert run(rank_window=(2, 5))[0].tolist() == [[2, 3, 4]]
    assert run(rank_window=(1, 3))[0].tolist() == [[2, -1, -1]]
    for judge in (None, judge_by(QUERY, DOCUMENTS)):
        assert run(rank_window=(50, 60), judge=judge)[0].tolist() == [[-1, -1, -1]]


def test_the_margin_keeps_negatives_below_the_positive():
    # cos 10° - 0.1 = 0.885: 5° and 20° (0.940) score above it, 40° (0.766) does not.
    assert run(margin=0.1)[0].tolist() == [[3, 4, 5]]
    # A margin of zero still removes documents that score above the positive.
    assert run(margin=0.0)[0].tolist() == [[2, 3, 4]]


def test_a_relative_margin_stays_below_a_negative_positive():
    documents = on_circle(95, 100, 105, 120, 180)  # the positive, 100°, has cosine -0.174
    # -0.174 - 0.174 * 0.5 = -0.260: 105° (-0.259) is too close, 120° is not. -0.174 * (1 - 0.5) would keep them all.
    negatives, _ = run(documents=documents, margin=0.5, relative=True)
    assert negatives.tolist() == [[3, 4, -1]]


def test_a_relative_margin_is_a_fraction_of_the_positive_s_score():
    documents = on_circle(60, 80, 90)  # cosines 0.5 (the positive), 0.174, 0
    assert run(documents=documents, positives=[0], margin=0.4, relative=True)[0].tolist() == [[1, 2, -1]]  # below 0.3
    assert run(documents=documents, positives=[0], margin=0.4)[0].tolist() == [[2, -1, -1]]  # below 0.1


def test_documents_with_the_content_of_the_positive_are_not_negatives():
    ids = np.array([7, 7, 1, 2, 3, 4, 7])
    assert run(document_ids=ids)[0].tolist() == [[2, 3, 4]]


def test_positives_of_an_equal_query_are_not_negatives():
    queries = np.repeat(QUERY, 3, 0)
    positives, query_ids = [1, 3, 2], np.array([5, 5, 6])
    negatives, _ = run(queries=queries, positives=positives, query_ids=query_ids)
    assert negatives.tolist() == [[0, 2, 4], [0, 2, 4], [0, 1, 3]]


def test_equal_documents_count_as_one_negative():
    documents = on_circle(5, 10, 20, 20, 40, 60)
    ids = np.array([0, 1, 2, 2, 3, 4])
    assert run(documents=documents, document_ids=ids)[0].tolist() == [[0, 2, 4]]
    assert run(documents=documents)[0].tolist() == [[0, 2, 3]]


def test_every_candidate_is_a_negative_surplus_or_removed_by_one_rule():
    queries, positives = on_circle(0, 180), [1, 6]
    ids = np.array([0, 1, 2, 3, 3, 4, 5])
    arguments = dict(queries=queries, positives=positives, margin=0.1, rank_window=(0, 5), document_ids=ids)
    negatives, counts = run(num_negatives=2, **arguments)
    # At 0°: ranks 0..4 are documents 0 1 2 3 4; 0 and 2 too close, 1 the positive, 4 repeats 3.
    # At 180°: documents 6 5 4 3 2: the positive, 5, 4, 3 (repeats 4), 2: one more than needed.
    assert negatives.tolist() == [[3, -1], [5, 4]]
    assert counts == {
        "queries": 2,
        "candidates": 10,
        "negatives": 3,
        "surplus": 1,
        "removed_positive": 2,
        "removed_unscored": 0,
        "removed_margin": 2,
        "removed_duplicate": 2,
        "short": 1,
        "none": 0,
        "small_window": 0,
    }


def test_a_window_smaller_than_num_negatives_and_a_query_without_negatives_are_counted():
    _, counts = run(rank_window=(1, 2))
    assert (counts["short"], counts["none"], counts["small_window"], counts["removed_positive"]) == (1, 1, 1, 1)


def test_the_lengths_of_the_vectors_do_not_matter():
    scaled = DOCUMENTS * np.array([[3], [0.1], [9], [2], [5], [1], [4]], np.float32)
    assert run(documents=scaled, queries=QUERY * 7)[0].tolist() == [[0, 2, 3]]


# --- exact, in blocks -------------------------------------------------------------------------------------------------


def brute_force(
    queries, documents, positives, *, num_negatives, rank_window, margin, relative, document_ids, query_ids
):
    """`mine` in float64, one query at a time, with its scores of all documents."""
    unit = [
        x / np.maximum(np.linalg.norm(x.astype(float), axis=1, keepdims=True), 1e-300) for x in (queries, documents)
    ]
    scores, result = unit[0] @ unit[1].T, []
    for i, row in enumerate(np.round(scores, 12)):  # equal vectors tie, whatever the order of their sums
        ranked = np.argsort(-row, kind="stable")[slice(*rank_window)]
        own = document_ids[positives[query_ids == query_ids[i]]]
        s = row[positives[i]]
        bound = np.inf if margin is None else s - margin * (abs(s) if relative else 1)
        seen, kept = set(), []
        for j in ranked:
            if document_ids[j] not in own and row[j] <= bound and document_ids[j] not in seen:
                kept.append(j)
            seen.add(document_ids[j])
        result.append((kept + [-1] * num_negatives)[:num_negatives])
    return np.array(result), scores


SHAPES = [  # queries, documents, dimensions, window, margin, relative
    (1, 1, 4, (0, 9), None, False),
    (1, 300, 16, (0, 300), 0.1, False),
    (37, 1, 3, (0, 1), 0.0, False),
    (40, 101, 32, (3, 50), 0.2, True),
    (33, 257, 100, (0, 20), -0.1, False),
    (7, 64, 1500, (5, 64), 0.05, True),
    (64, 50, 2, (0, 100), 0.01, False),
]
BLOCKS = [(1 << 16, 1 << 16, 256, 1 << 12), (16, 17, 5, 4)]  # QUERIES, DOCUMENTS, TILE, ROWS


def example(shape, dtype, seed=0):
    """Random arguments of `mine` for one of SHAPES. A third of the documents are copies, some queries are opposite."""
    count, size, dimensions, window, margin, relative = shape
    rng = np.random.default_rng(seed)
    documents = rng.normal(size=(size, dimensions))
    ids = np.where(rng.random(size) < 0.3, rng.integers(0, size, size), np.arange(size))
    documents = documents[ids]
    positives = rng.integers(0, size, count)
    sign = rng.choice([-1, 1], (count, 1))  # those with -1 have a negative score
    queries = sign * documents[positives] + rng.normal(size=(count, dimensions))
    if dtype == np.int8:
        queries, documents = (np.round(127 * np.tanh(x)) for x in (queries, documents))
    arguments = dict(num_negatives=4, rank_window=window, margin=margin, relative=relative)
    arguments |= dict(document_ids=ids, query_ids=rng.integers(0, max(1, count // 2), count))
    return queries.astype(dtype), documents.astype(dtype), positives, arguments


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_negatives_are_those_of_a_brute_force_search_in_float64_for_any_size_of_blocks(shape, dtype, monkeypatch):
    queries, documents, positives, arguments = example(shape, dtype)
    expected, cosines = brute_force(queries, documents, positives, **arguments)
    first = None
    for sizes in BLOCKS:
        for name, size in zip(("QUERIES", "DOCUMENTS", "TILE", "ROWS"), sizes):
            monkeypatch.setattr(mining, name, size)
        mined = mine(queries, documents, positives, **arguments)
        np.testing.assert_array_equal(mined.negatives, expected)
        is_there = expected >= 0
        np.testing.assert_allclose(
            mined.scores[is_there], np.take_along_axis(cosines, expected, 1)[is_there], atol=1e-6, rtol=0
        )
        np.testing.assert_allclose(mined.positive_scores, cosines[np.arange(len(queries)), positives], atol=1e-6)
        assert np.isnan(mined.scores[~is_there]).all() and (mined.ranks[~is_there] == -1).all()
        first = first or mined
        for ours, theirs in zip(mined, first):
            np.testing.assert_equal(ours, theirs)  # every bit


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_equal_vectors_tie_and_the_lower_index_wins_across_blocks(dtype, monkeypatch):
    vector = np.array([[3, -7, 100]]).astype(dtype)
    documents = np.concatenate([vector, -vector, np.repeat(vector, 40, 0)])
    for name in ("QUERIES", "DOCUMENTS", "TILE"):
        monkeypatch.setattr(mining, name, 6)
    mined = mine(np.repeat(vector, 7, 0), documents, [1] * 7, num_negatives=20, rank_window=(0, 20), margin=None)
    assert mined.negatives.tolist() == [[0, *range(2, 21)]] * 7
    np.testing.assert_allclose(mined.scores, 1, rtol=3e-7)


def test_a_rank_is_a_place_among_all_documents_of_the_ranking():
    documents = on_circle(5, 10, 20, 20, 40, 60)
    mined = mine(
        QUERY, documents, [1], num_negatives=3, rank_window=(0, 9), margin=0.1, document_ids=[0, 1, 2, 2, 3, 4]
    )
    assert mined.negatives.tolist() == [[4, 5, -1]] and mined.ranks.tolist() == [[4, 5, -1]]
    np.testing.assert_allclose(mined.positive_scores, np.cos(np.deg2rad(10)), atol=1e-6)
    np.testing.assert_allclose(mined.scores, [[*np.cos(np.deg2rad([40, 60])), np.nan]], atol=1e-6)


class Counted(np.ndarray):
    """An array that keeps in `most` how many of its rows were read at once."""

    def __getitem__(self, key):
        part = super().__getitem__(key)
        Counted.most = max(Counted.most, part.size // self.shape[1])
        return np.asarray(part)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_embeddings_in_files_are_read_in_blocks(dtype, tmp_path, monkeypatch):
    queries, documents, positives, arguments = example((90, 500, 8, (0, 30), 0.05, False), dtype)
    expected = mine(queries, documents, positives, **arguments)
    monkeypatch.setattr(mining, "QUERIES", 20)
    monkeypatch.setattr(mining, "DOCUMENTS", 30)
    monkeypatch.setattr(mining, "ROWS", 25)
    stored = []
    for name, array in (("queries", queries), ("documents", documents)):
        array.tofile(tmp_path / name)
        stored.append(np.memmap(tmp_path / name, dtype, "r", shape=array.shape).view(Counted))
    Counted.most = 0
    mined = mine(*stored, positives, **arguments)
    assert 0 < Counted.most <= 30
    for ours, theirs in zip(mined, expected):
        np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize("digits", [1, 3])
def test_a_device_needs_no_more_memory_than_the_docstring_says(digits):
    tiles, tile, dimensions, block, high = 4, 256, 128, 1 << 14, 100

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    program = mining._rank_block.lower(
        array(np.float32, tiles, tile, high),
        array(np.int32, tiles, tile, high),
        array(np.int8, tiles, digits, tile, dimensions),
        array(np.int8, digits, block, dimensions),
        array(np.float32, block),
        array(np.int32),
        size=block,
        group=16,
        k=high,
    )
    used = program.compile().memory_analysis()
    needed = (
        used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    )
    assert needed <= mining.device_bytes(tiles * tile, block, dimensions, high, digits)


# --- another model judges ---------------------------------------------------------------------------------------------


def test_the_margin_compares_the_scores_of_a_judge():
    judged = on_circle(90, 0, 10, 70, 20, 80, 5)  # what a better model sees: cosines 0, 1, .98, .34, .94, .17, 1
    mined = mine(QUERY, DOCUMENTS, [1], num_negatives=3, rank_window=(0, 9), margin=0.5, judge=judge_by(QUERY, judged))
    # The order stays that of the ranking.
    assert mined.negatives.tolist() == [[0, 3, 5]]
    np.testing.assert_allclose(mined.scores, np.cos(np.deg2rad([[90, 70, 80]])), atol=1e-6)
    np.testing.assert_allclose(mined.positive_scores, 1, atol=1e-6)
    assert mined.counts["removed_margin"] == 3 and mined.counts["removed_positive"] == 1


def test_candidates_without_a_score_are_removed_and_all_if_the_positive_has_none():
    scores = np.array([[-3.0, -2.0, np.nan, -2.1, -4.0, np.nan, -9.0], [1, np.nan, 1, 1, 1, 1, 1]], np.float32)

    def judge(rows, documents):
        return np.take_along_axis(scores[rows], documents, 1)

    arguments = dict(num_negatives=3, rank_window=(0, 9), margin=0.25, relative=True, judge=judge)
    mined = mine(np.repeat(QUERY, 2, 0), DOCUMENTS, [1, 1], **arguments)  # below -2 - 2 · 0.25
    assert mined.negatives.tolist() == [[0, 4, 6], [-1, -1, -1]]
    counts = {name: count for name, count in mined.counts.items() if count}
    assert counts == {
        "queries": 2,
        "candidates": 14,
        "negatives": 3,
        "removed_positive": 2,
        "removed_unscored": 8,
        "removed_margin": 1,
        "short": 1,
        "none": 1,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_window": (3, 3)}, r"rank_window=\(3, 3\) must be \(lo, hi\) with 0 <= lo < hi"),
        ({"num_negatives": 0}, "num_negatives=0 must be positive"),
        ({"margin": np.nan}, "margin=nan must be a finite number or None"),
        ({"margin": -np.inf}, "margin=-inf must be a finite number or None"),
        ({"positives": [7]}, r"positives must be in 0..6, got 7..7"),
        ({"positives": [1, 2]}, r"positives has shape \[2\], expected \[1\]"),
        ({"document_ids": np.arange(3)}, r"document_ids has shape \[3\], expected \[7\]"),
        ({"queries": QUERY * np.nan}, "1 of 1 query embeddings are not finite"),
        ({"documents": DOCUMENTS[:, :1]}, "queries have 2 dimensions, documents 1"),
        ({"documents": DOCUMENTS[:0]}, r"document embeddings have shape \[0, 2\]"),
    ],
)
def test_wrong_arguments_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
