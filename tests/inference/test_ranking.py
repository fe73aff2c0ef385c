import numpy as np
import pytest

from embed.inference import quantize, ranking, search
from embed.inference.scores import cosines


def vectors(count, dimensions=24, precision="float32", seed=0):
    return quantize(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32), precision)


def bits(packed):
    return np.unpackbits(np.asarray(packed).view(np.uint8), axis=1).astype(int)


def by_hand(scores, k):
    """The k best columns of each row, the lower index first among equals."""
    order = np.array([sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores])
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_floats_and_int8_are_ranked_by_cosine(precision):
    stored, queries = vectors(60, precision=precision), vectors(7, precision=precision, seed=1)
    a, b = queries.astype(np.float64), stored.astype(np.float64)
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    expected, order = by_hand(cosine, 9)
    scores, indices = search(queries, stored, 9, precision)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.dtype == np.float32 and indices.dtype == np.int32


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dimensions", [24, 128])
def test_bits_are_ranked_by_the_number_of_differing_bits(precision, dimensions):
    stored, queries = (vectors(n, dimensions, precision, seed=n) for n in (60, 7))
    differing = (bits(queries)[:, None] != bits(stored)).sum(-1)
    expected, order = by_hand(-differing, 60)
    scores, indices = search(queries, stored, 60, precision)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(indices, order)


def test_int8_products_are_summed_without_rounding():
    rng = np.random.default_rng(0)
    stored = rng.integers(120, 128, (40, 3000)).astype(np.int8)  # dot products near 4.6e7, far beyond 2^24
    a = stored.astype(np.int64)
    cosine = np.asarray(cosines(stored, stored, exact=True)).astype(np.float64)
    exact = (a @ a.T) / np.sqrt(np.outer(*[(a * a).sum(1)] * 2))
    np.testing.assert_allclose(cosine, exact, rtol=3e-7)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_size_of_blocks_does_not_change_results(precision, monkeypatch):
    stored, queries = vectors(50, precision=precision), vectors(11, precision=precision, seed=1)
    stored[20:30] = stored[:10]  # equal scores on both sides of a block's edge
    whole = search(queries, stored, 12, precision)
    monkeypatch.setattr(ranking, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(ranking, "BLOCK_VECTORS", 7)
    for result, expected in zip(search(queries, stored, 12, precision), whole):
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_on_ties_the_lower_index_comes_first(precision):
    one = vectors(1, precision=precision)
    _, indices = search(one, np.repeat(one, 6, 0), 4, precision)
    assert indices.tolist() == [[0, 1, 2, 3]]


def test_k_above_the_number_of_vectors_gives_all_of_them():
    scores, indices = search(vectors(2), vectors(3), 10, "float32")
    assert scores.shape == indices.shape == (2, 3)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("dimensions", [24, 3000])
def test_a_query_is_scored_again_as_the_search_scores_it(precision, dimensions):
    stored, queries = vectors(40, dimensions, precision), vectors(3, dimensions, precision, seed=1)
    stored[7] = 0
    scores, rows = search(queries, stored, 40, precision)
    for query, expected, found in zip(queries, scores, rows):
        again = ranking.rescore(query, stored[found])
        assert again.dtype == np.float32
        np.testing.assert_allclose(again, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "precision", "message"),
    [
        (vectors(2), "int8", r"stored vectors are float32\[2, 24\], int8 needs int8\[N, D\]"),
        (vectors(2)[0], "float32", r"stored vectors are float32\[24\]"),
        (vectors(2), "float64", "precision 'float64' must be one of"),
        (np.array([[1, np.nan]], np.float32), "float32", "1 of 1 are not finite"),
    ],
)
def test_vectors_of_another_dtype_or_shape_are_refused(stored, precision, message):
    with pytest.raises(ValueError, match=message):
        search(stored, stored, 1, precision)


def test_queries_and_k_that_do_not_match_the_vectors_are_refused():
    with pytest.raises(ValueError, match="queries have 16 numbers each, stored vectors 24"):
        search(vectors(1, 16), vectors(3), 1, "float32")
    for k in (0, -1, 2.0, "2", True):
        with pytest.raises(ValueError, match=f"k={k!r} must be positive, an int"):
            search(vectors(1), vectors(3), k, "float32")
