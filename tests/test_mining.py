import numpy as np
import pytest

from embed import mining
from embed.mining import mine


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
    return mine(queries, documents, arguments.pop("positives"), **arguments)


def test_negatives_are_the_best_ranked_documents_without_the_positive():
    negatives, counts = run()
    assert negatives.tolist() == [[0, 2, 3]] and negatives.dtype == np.int32
    assert counts == {
        "queries": 1,
        "negatives": 3,
        "short": 0,
        "none": 0,
        "small_window": 0,
        "removed_positive": 0,
        "removed_margin": 0,
        "removed_duplicate": 0,
    }


def test_the_window_counts_ranks_from_zero_includes_the_positive_and_excludes_its_end():
    assert run(rank_window=(2, 5))[0].tolist() == [[2, 3, 4]]
    assert run(rank_window=(1, 3))[0].tolist() == [[2, -1, -1]]
    assert run(rank_window=(50, 60))[0].tolist() == [[-1, -1, -1]]


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


def test_removed_candidates_are_counted_only_for_queries_with_too_few_negatives():
    queries, positives = on_circle(0, 180), [1, 6]
    ids = np.array([0, 1, 2, 3, 3, 4, 5])
    negatives, counts = run(queries=queries, positives=positives, margin=0.1, rank_window=(0, 5), document_ids=ids)
    # At 0°: ranks 0..4 are documents 0 1 2 3 4; 0 and 2 too close, 1 the positive, 4 repeats 3.
    # At 180°: documents 6 5 4 3 2: the positive, 5, 4, 3 (repeats 4), 2: enough.
    assert negatives.tolist() == [[3, -1, -1], [5, 4, 2]]
    assert counts == {
        "queries": 2,
        "negatives": 4,
        "short": 1,
        "none": 0,
        "small_window": 0,
        "removed_positive": 1,
        "removed_margin": 2,
        "removed_duplicate": 1,
    }


def test_a_window_smaller_than_num_negatives_and_a_query_without_negatives_are_counted():
    _, counts = run(rank_window=(1, 2))
    assert (counts["short"], counts["none"], counts["small_window"], counts["removed_positive"]) == (1, 1, 1, 1)


def test_the_lengths_of_the_vectors_do_not_matter():
    scaled = DOCUMENTS * np.array([[3], [0.1], [9], [2], [5], [1], [4]], np.float32)
    assert run(documents=scaled, queries=QUERY * 7)[0].tolist() == [[0, 2, 3]]


def test_the_size_of_a_block_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(2, 30, 8)).astype(np.float32)
    arguments = dict(
        num_negatives=4, rank_window=(1, 20), margin=0.05, document_ids=np.arange(30) // 2, query_ids=np.arange(30) // 3
    )
    whole = mine(queries, documents, np.arange(30), **arguments)
    monkeypatch.setattr(mining, "BLOCK", 7)
    parts = mine(queries, documents, np.arange(30), **arguments)
    np.testing.assert_array_equal(parts[0], whole[0])
    assert parts[1] == whole[1] and 0 < whole[1]["short"] < 30


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
        ({"documents": DOCUMENTS[:0]}, r"document embeddings have shape \[0, 2\]"),
    ],
)
def test_wrong_arguments_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
