import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embed.models.pooling import pool_spans

SPANS = np.array([[1, 1, 0, 2, 2, 2, 0, 4], [0, 0, 3, 3, 0, 3, 0, 0]])  # row 0 has no 3, row 1 only a 3


def hidden(dtype=np.float32):
    return np.random.default_rng(0).normal(size=(2, 8, 5)).astype(dtype)


def plain(h, span_ids, num_spans):
    out = np.zeros((len(h), num_spans, h.shape[-1]))
    for row in range(len(h)):
        for span in range(num_spans):
            tokens = [h[row, i] for i in range(h.shape[1]) if span_ids[row, i] == span + 1]
            if tokens:
                out[row, span] = sum(tokens) / len(tokens)
    return out


def test_each_span_is_the_mean_of_its_tokens_and_an_empty_one_is_zero():
    got = pool_spans(hidden(), SPANS, 5)
    np.testing.assert_allclose(got, plain(hidden(np.float64), SPANS, 5), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[0, 2], 0)


def test_gradients_reach_only_the_tokens_of_a_span_divided_by_their_number():
    weights = np.random.default_rng(1).normal(size=(2, 5, 5)).astype(np.float32)
    _, pull = jax.vjp(lambda h: pool_spans(h, SPANS, 5), hidden())
    want = np.zeros((2, 8, 5))
    for row, column in zip(*np.nonzero(SPANS)):
        span = SPANS[row, column]
        want[row, column] = weights[row, span - 1] / (SPANS[row] == span).sum()
    np.testing.assert_allclose(pull(weights)[0], want, rtol=1e-6)


def test_the_last_state_of_each_span_is_pooled_and_takes_the_whole_gradient():
    states, weights = hidden(), np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)
    got, pull = jax.vjp(lambda h: pool_spans(h, SPANS, 4, "last"), states)
    last = {(0, 0): 1, (0, 1): 5, (0, 3): 7, (1, 2): 5}  # (row, span): token
    want, gradient = np.zeros((2, 4, 5), np.float32), np.zeros((2, 8, 5), np.float32)
    for (row, span), token in last.items():
        want[row, span], gradient[row, token] = states[row, token], weights[row, span]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(pull(weights)[0], gradient)


def test_an_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match="pooling='max' must be one of mean, last"):
        pool_spans(hidden(), SPANS, 4, "max")


def test_bfloat16_states_are_averaged_in_float32():
    low = jnp.asarray(hidden(), jnp.bfloat16)
    got = pool_spans(low, SPANS, 5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, plain(np.asarray(low, np.float64), SPANS, 5), rtol=1e-5, atol=1e-7)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        got = pool_spans(jnp.asarray(hidden(np.float64)), SPANS, 5)
    np.testing.assert_allclose(got, plain(hidden(np.float64), SPANS, 5), rtol=1e-13)
