"""MaxSim and its loss against plain loops (reference.py): values and gradients, in float64 and float32."""

import jax
import numpy as np
import pytest
import reference

from embed.objectives import late_interaction

N, Q, K, P = 6, 3, 4, 5
QUERY_LENGTHS, DOCUMENT_LENGTHS = np.array([3, 1, 2, 3, 2, 1]), np.array([4, 2, 4, 1, 3, 2])


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(N, length, P)) for length in (Q, K)]


def masks(query_lengths=QUERY_LENGTHS, document_lengths=DOCUMENT_LENGTHS):
    return dict(
        query_valid=np.arange(Q) < query_lengths[:, None], document_valid=np.arange(K) < document_lengths[:, None]
    )


def some(*false):
    return ~np.isin(np.arange(N), false)


@jax.jit
def ours(arrays, query_valid, document_valid, options):
    scores = late_interaction.maxsim(arrays[0], query_valid, arrays[1], document_valid)
    return late_interaction.late_interaction_loss(scores, **options)


def value_and_grad(inputs, dtype, query_valid, document_valid, **options):
    with jax.enable_x64(dtype == np.float64):
        return jax.value_and_grad(ours)([x.astype(dtype) for x in inputs], query_valid, document_valid, options)


# With values that mean the same as leaving them out, so that one program serves all cases.
NEUTRAL = masks() | {"temperature": 0.5, "query_ids": np.arange(N), "document_ids": np.arange(N), "valid": some()}
CASES = {
    "plain": {},
    "cold": {"temperature": 0.1},
    "query ids": {"query_ids": np.array([1, 2, 3, 1, 5, 6])},
    "document ids": {"document_ids": np.array([1, 2, 3, 4, 2, 2])},
    "padding": {"valid": some(1, 5)},
    "one valid": {"valid": some(0, 1, 2, 3, 5)},
    "everything": {"query_ids": np.array([1, 2, 3, 1, 5, 6]), "document_ids": np.arange(N) // 2, "valid": some(2)},
    "a query without tokens": masks(query_lengths=np.array([3, 0, 2, 3, 2, 1])),
    "a document without tokens": masks(document_lengths=np.array([4, 2, 0, 1, 3, 2])),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_reference(case):
    check(NEUTRAL | CASES[case])


@pytest.mark.parametrize("block", [1, 4])
def test_documents_may_be_scored_in_any_blocks(block, monkeypatch):
    """Those of 4 divide the documents with a rest."""
    monkeypatch.setattr(late_interaction, "SCORES", block * N * Q * K)
    jax.clear_caches()
    check(NEUTRAL | CASES["everything"])
    jax.clear_caches()


def test_optional_arguments_can_be_left_out():
    check({"temperature": 0.5} | masks())


def check(options):
    """Value and gradients equal those of the reference: 1e-6 in float64, 1e-4 in float32."""

    def plain(*inputs):
        return reference.late_interaction_loss(*inputs, **options)

    want, gradients = plain(*arrays()), reference.gradient(plain, arrays())
    scale = max(np.abs(g).max() for g in gradients)
    for dtype, tolerance in ((np.float64, 1e-6), (np.float32, 1e-4)):
        value, got = value_and_grad(arrays(), dtype, **options)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, want, rtol=tolerance, atol=1e-12 if dtype == np.float64 else 1e-6)
        for g, w in zip(got, gradients):
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * scale)


def test_scores_are_sums_over_the_tokens_of_a_query():
    queries, documents = np.eye(4)[None, :3], np.stack([np.eye(4)[[0, 1]], np.eye(4)[[2, 3]]])
    valid = np.ones((1, 3), bool), np.ones((2, 2), bool)
    scores = late_interaction.maxsim(queries, valid[0], documents, valid[1])
    np.testing.assert_allclose(scores, [[2, 1]], rtol=1e-6)


def test_tokens_that_are_not_valid_change_nothing_and_get_no_gradient():
    options, padded = NEUTRAL, [x.copy() for x in arrays()]
    for x, valid in zip(padded, (options["query_valid"], options["document_valid"])):
        x[~valid] = 1e3
    (value, gradients), (want, _) = (value_and_grad(x, np.float32, **options) for x in (padded, arrays()))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for g, valid in zip(gradients, (options["query_valid"], options["document_valid"])):
        assert np.abs(g[~valid]).max() == 0 < np.abs(g[valid]).min(1).max()


@pytest.mark.parametrize("empty", ["nothing is valid", "all vectors are zero"])
def test_empty_batches_have_finite_gradients(empty):
    is_zero = empty == "all vectors are zero"
    inputs = [x * (not is_zero) for x in arrays()]
    lengths = QUERY_LENGTHS * is_zero, DOCUMENT_LENGTHS * is_zero
    options = NEUTRAL | masks(*lengths) | {"valid": np.full(N, is_zero)}
    value, gradients = value_and_grad(inputs, np.float32, **options)
    np.testing.assert_allclose(value, np.log(N) if is_zero else 0, rtol=1e-6)
    for g in gradients:
        np.testing.assert_array_equal(g, 0)


def test_memory_does_not_hold_the_cosines_of_all_documents():
    def memory(n):
        shapes = [jax.ShapeDtypeStruct((n, length, 8), np.float32) for length in (16, 64)]
        valid = [jax.ShapeDtypeStruct(x.shape[:2], bool) for x in shapes]
        compiled = jax.jit(jax.grad(ours)).lower(shapes, *valid, {"temperature": 1.0}).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(128) < 128 * 128 * 16 * 64 * 4 / 4  # a quarter of all cosines
