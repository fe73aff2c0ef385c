"""The contrastive losses against plain loops (reference.py): values and gradients, in float64 and float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed.objectives import contrastive

N, D, K, C = 7, 5, 2, 9
LOSSES = {  # shapes of the arrays
    "pair_loss": [(N, D), (N, D)],
    "triplet_loss": [(N, D), (N, D), (N, K, D)],
    "contextual_loss": [(N, D), (C, D), (N, D)],
    "spread_out": [(N, D)],
}


def some(n, *false):
    valid = np.ones(n, bool)
    valid[list(false)] = False
    return valid


# Required arguments, and optional ones with values that mean the same as leaving them out.
REQUIRED = {
    "pair_loss": {"temperature": 0.2},
    "triplet_loss": {"temperature": 0.2},
    "contextual_loss": {
        "temperature": 0.2,
        "beta": 0.4,
        "positive": np.array([0, 1, 3, 4, 8, 5, 5]),  # the last two queries have one chunk
        "chunk_document": np.array([50, 50, 50, 60, 60, 70, 70, 50, 50]),  # document 50 occurs twice
    },
    "spread_out": {},
}
NEUTRAL = {
    "pair_loss": {"margin": 0.1, "query_ids": np.arange(N), "document_ids": np.arange(N), "valid": some(N)},
    "triplet_loss": {
        "query_ids": np.arange(N),
        "document_ids": np.arange(N),
        "negative_ids": np.arange(N * K).reshape(N, K) + 100,
        "valid": some(N),
        "negative_valid": np.ones((N, K), bool),
    },
    "contextual_loss": {
        "alpha": 0.2,
        "margin": 0.1,
        "query_ids": np.arange(N),
        "chunk_ids": np.arange(C),
        "valid": some(N),
        "chunk_valid": some(C),
    },
    "spread_out": {"ids": np.arange(N), "valid": some(N)},
}


def random_arrays(name):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in LOSSES[name]]


@functools.cache
def compiled(name, switches=()):
    def loss(arrays, kwargs):
        return getattr(contrastive, name)(*arrays, **kwargs, **dict(switches))

    return jax.jit(jax.value_and_grad(loss))


def value_and_grad(name, arrays, dtype=np.float32, **kwargs):
    kwargs = REQUIRED[name] | NEUTRAL[name] | kwargs
    switches = tuple((k, kwargs.pop(k)) for k in list(kwargs) if kwargs[k] is None or isinstance(kwargs[k], bool))
    with jax.enable_x64(dtype == np.float64):
        return compiled(name, switches)([a.astype(dtype) for a in arrays], kwargs)


def check(name, arrays, **kwargs):
    """Value and gradients equal those of the reference: 1e-6 in float64, 1e-4 in float32."""

    def plain(*xs):
        return getattr(reference, name)(*xs, **(REQUIRED[name] | NEUTRAL[name] | kwargs))

    want, gradients = plain(*arrays), reference.gradient(plain, arrays)
    scale = max(np.abs(g).max() for g in gradients)
    for dtype, tolerance in ((np.float64, 1e-6), (np.float32, 1e-4)):
        value, got = value_and_grad(name, arrays, dtype, **kwargs)
        assert value.dtype == dtype and value.shape == ()
        np.testing.assert_allclose(value, want, rtol=tolerance, atol=1e-12 if dtype == np.float64 else 1e-6)
        for g, w in zip(got, gradients):
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * scale)


QUERY_IDS = {"query_ids": np.array([1, 2, 3, 1, 5, 6, 7])}  # 0 and 3 are one text
DOCUMENT_IDS = {"document_ids": np.array([11, 12, 13, 14, 15, 12, 12])}  # 1, 5 and 6
CHUNK_IDS = {"chunk_ids": np.array([1, 2, 3, 4, 5, 6, 4, 1, 2])}  # 0 and 7, 1 and 8, 3 and 6
NEGATIVE_IDS = {"negative_ids": np.array([[12, 1], [2, 3], [11, 13], [4, 5], [6, 12], [7, 7], [8, 15]])}  # documents
VALID = {"valid": some(N, 2, 6)}
ONE_VALID = {"valid": some(N, 0, 1, 2, 4, 5, 6)}
NEGATIVE_VALID = {"negative_valid": np.arange(N * K).reshape(N, K) % 3 > 0}
CHUNK_VALID = {"chunk_valid": some(C, 2, 4, 6)}  # the positive of query 3 is invalid

CASES = {
    "pair_loss": {
        "plain": {},
        "cold": {"temperature": 0.05},
        "loose margin": {"margin": 3.0},
        "tight margin": {"margin": -0.2},
        "no margin": {"margin": None},
        "no query negatives": {"query_negatives": False},
        "query ids": QUERY_IDS,
        "document ids": DOCUMENT_IDS,
        "one text": {"query_ids": np.zeros(N, int)},
        "padding": VALID,
        "one valid": ONE_VALID,
        "everything": QUERY_IDS | DOCUMENT_IDS | VALID,
    },
    "triplet_loss": {
        "plain": {},
        "cold": {"temperature": 0.05},
        "query ids": QUERY_IDS,
        "document ids": DOCUMENT_IDS,
        "negative ids": DOCUMENT_IDS | NEGATIVE_IDS,
        "padding": VALID,
        "one valid": ONE_VALID,
        "missing negatives": NEGATIVE_VALID,
        "no negatives": {"negative_valid": np.zeros((N, K), bool)},
        "everything": QUERY_IDS | DOCUMENT_IDS | NEGATIVE_IDS | VALID | NEGATIVE_VALID,
    },
    "contextual_loss": {
        "plain": {},
        "cold": {"temperature": 0.05},
        "only chunks": {"beta": 0.0},
        "only its own document": {"beta": 0.0, "alpha": 1.0},
        "only documents": {"beta": 1.0},
        "loose margin": {"margin": 3.0},
        "tight margin": {"margin": -0.3},
        "no margin": {"margin": None},
        "no query negatives": {"query_negatives": False, "beta": 1.0},
        "query ids": QUERY_IDS,
        "chunk ids": CHUNK_IDS,
        "padding": VALID,
        "one valid": ONE_VALID,
        "missing chunks": CHUNK_VALID,
        "everything": QUERY_IDS | CHUNK_IDS | VALID | CHUNK_VALID,
    },
    "spread_out": {
        "plain": {},
        "ids": {"ids": QUERY_IDS["query_ids"]},
        "padding": VALID,
        "one valid": ONE_VALID,
        "everything": {"ids": QUERY_IDS["query_ids"]} | VALID,
    },
}


@pytest.mark.parametrize("name, case", [(name, case) for name in CASES for case in CASES[name]])
def test_loss_and_gradients_equal_the_reference(name, case):
    check(name, random_arrays(name), **CASES[name][case])


@pytest.mark.parametrize("name", LOSSES)
def test_each_optional_argument_can_be_left_out(name):
    arrays = random_arrays(name)
    full = NEUTRAL[name] | CASES[name]["everything"]
    for left_out in [*full, "all of them"]:
        kwargs = REQUIRED[name] | {k: v for k, v in full.items() if left_out not in (k, "all of them")}
        with jax.enable_x64(True):
            value = jax.jit(functools.partial(getattr(contrastive, name)))(*arrays, **kwargs)
        np.testing.assert_allclose(value, getattr(reference, name)(*arrays, **kwargs), rtol=1e-6, err_msg=left_out)


def test_queries_of_one_document_share_its_embedding():
    queries, chunks, table = random_arrays("contextual_loss")
    check("contextual_loss", [queries, chunks, table[[0, 0, 1, 1, 0, 2, 2]]])


def test_triplet_loss_without_negative_slots_is_infonce_over_documents():
    queries, documents, _ = random_arrays("triplet_loss")
    arrays = queries, documents, np.zeros((N, 0, D))
    with jax.enable_x64(True):
        value = contrastive.triplet_loss(*arrays, temperature=0.2)
    np.testing.assert_allclose(value, reference.triplet_loss(*arrays, temperature=0.2), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_with_nothing_valid_is_zero_with_zero_gradients(name):
    value, gradients = value_and_grad(name, random_arrays(name), valid=np.zeros(N, bool))
    assert value == 0
    for g in gradients:
        np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("marked", [True, False], ids=["marked invalid", "not marked"])
def test_zero_vectors_give_the_right_loss_and_get_no_gradient(name, marked):
    arrays = random_arrays(name)
    for a in arrays:
        a[3] = 0
    valid = some(N, 3) if marked else some(N)
    check(name, arrays, valid=valid)
    for g in value_and_grad(name, arrays, valid=valid)[1]:
        np.testing.assert_array_equal(g[3], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_content_of_invalid_rows_changes_nothing(name):
    arrays, kwargs = random_arrays(name), {"valid": some(N, 4)}
    if name == "contextual_loss":
        kwargs["chunk_valid"] = some(C, 8)  # the positive of query 4
    other = [a.copy() for a in arrays]
    for a in other:
        a[8 if len(a) == C else 4] *= -7
    for x, y in zip(*map(jax.tree.leaves, (value_and_grad(name, z, **kwargs) for z in (arrays, other)))):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_the_lengths_of_the_vectors_do_not_matter(name):
    arrays = random_arrays(name)
    long = value_and_grad(name, [127 * a for a in arrays])[0]
    np.testing.assert_allclose(long, value_and_grad(name, arrays)[0], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_input_is_computed_in_float32(name):
    low = [a.astype(jnp.bfloat16) for a in random_arrays(name)]
    value = jax.jit(functools.partial(getattr(contrastive, name)))(*low, **REQUIRED[name])
    assert value.dtype == jnp.float32
    plain = getattr(reference, name)(*(np.asarray(x, np.float64) for x in low), **REQUIRED[name])
    np.testing.assert_allclose(value, plain, rtol=1e-5)


def test_equal_texts_are_negatives_of_each_other_only_without_ids():
    texts = np.array([[1.0, 0], [1, 0]], np.float32)
    # With two equal pairs, the other document and the other query each weigh as much as the positive.
    np.testing.assert_allclose(contrastive.pair_loss(texts, texts, temperature=0.02), np.log(3), rtol=1e-5)
    same = contrastive.pair_loss(texts, texts, temperature=0.02, document_ids=np.array([5, 5]))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_a_candidate_above_the_margin_is_excluded_as_a_false_negative():
    queries = np.array([[1.0, 0], [0, 1]], np.float32)
    documents = queries[::-1]  # each query's own document is at a right angle, the other's is equal to it
    assert contrastive.pair_loss(queries, documents, temperature=1.0, margin=0.1) == pytest.approx(np.log(2), rel=1e-6)
    loose = contrastive.pair_loss(queries, documents, temperature=1.0, margin=1.5)
    assert loose == pytest.approx(np.log(2 + np.e), rel=1e-6)
