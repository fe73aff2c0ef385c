from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed.models import attention as module
from embed.models.attention import attention

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def random_heads(heads, kv_heads, dim=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, 8, h, dim)).astype(dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_grouped_query_attention_equals_the_reference(heads, kv_heads, causal):
    arrays = random_heads(heads, kv_heads)
    got = attention(*arrays, SEGMENTS, causal=causal)
    for row in range(2):
        want = reference.attention(*(a[row].astype(np.float64) for a in arrays), SEGMENTS[row], causal)
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-6)


def seen(segment_ids, **options) -> list[str]:
    """Which tokens each token of a row attends to: "1" or "."."""
    length = len(segment_ids)
    flat = np.zeros((1, length, 1, length), np.float32)  # equal scores: the weights are uniform over the visible tokens
    values = np.eye(length, dtype=np.float32)[None, :, None]  # so the output is the weights
    weights = np.asarray(attention(flat, flat, values, np.array([segment_ids]), **options))[0, :, 0]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    return ["".join("1" if w > 0 else "." for w in row) for row in weights]


def test_a_token_attends_to_its_own_segment_before_and_after_it_and_to_nothing_else():
    assert seen(SEGMENTS[0]) == [
        "111.....",
        "111.....",
        "111.....",
        "...11...",
        "...11...",
        ".....1..",
        "......11",  # padding attends only to padding
        "......11",
    ]


def test_with_a_causal_mask_a_token_attends_to_none_after_it():
    expected = ["1.......", "11......", "111.....", "...1....", "...11...", ".....1..", "......1.", "......11"]
    assert seen(SEGMENTS[0], causal=True) == seen(SEGMENTS[0], lookahead=0.0) == expected


def test_lookahead_opens_the_causal_mask_pair_by_pair_until_it_is_bidirectional(monkeypatch):
    one = np.ones(32, int)
    shares, before = [], set()
    for lookahead in (0.0, 0.25, 0.5, 0.75, 1.0):
        rows = seen(one, lookahead=jnp.float32(lookahead))
        pairs = {(i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark == "1"}
        assert before <= pairs and {(i, j) for i in range(32) for j in range(i + 1)} <= pairs
        shares.append((len(pairs) - 32 * 33 / 2) / (32 * 31 / 2))
        before = pairs
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 0.75, 1], atol=0.06)
    assert shares[0] == 0 and shares[-1] == 1
    monkeypatch.setattr(module, "MAX_SCORES", 96)  # blocks of three queries see the same
    half = seen(one, lookahead=0.5)
    monkeypatch.undo()
    assert half == seen(one, lookahead=0.5)


@pytest.mark.parametrize("kernel", ["splash", "triton", "cudnn"])
def test_a_kernel_without_lookahead_refuses_it(kernel):
    arrays = [np.zeros((1, 128, 1, 128), np.float32)] * 3
    with pytest.raises(ValueError, match=f"attention='{kernel}' has no lookahead"):
        attention(*arrays, np.ones((1, 128), int), lookahead=0.5, kernel=kernel)


def test_no_value_and_no_gradient_crosses_a_segment():
    arrays = random_heads(2, 1)
    inside = SEGMENTS[0] == 2
    segment_two = jax.jit(lambda arrays: attention(*arrays, SEGMENTS)[0, 3:5])
    others = [a.copy() for a in arrays]
    for a in others:
        a[0][~inside] = 100
    np.testing.assert_array_equal(segment_two(others), segment_two(arrays))
    for g in jax.jit(jax.grad(lambda arrays: (segment_two(arrays) ** 2).sum()))(arrays):
        np.testing.assert_array_equal(g[0][~inside], 0)
        assert np.abs(g[0][inside]).min() > 0


def test_bfloat16_stays_bfloat16_and_close():
    arrays = random_heads(4, 2)
    got = attention(*(jnp.asarray(a, jnp.bfloat16) for a in arrays), SEGMENTS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), attention(*arrays, SEGMENTS), atol=0.03)


@pytest.mark.parametrize("scores", [8, 20, 24, 40])  # blocks of 1, 2, 3 (of 8 queries) and 5
def test_blocks_of_queries_change_no_value_and_no_gradient(scores, monkeypatch):
    arrays = random_heads(4, 2)

    def outputs(*arrays):
        out, pullback = jax.vjp(lambda *a: attention(*a, SEGMENTS), *arrays)
        return out, *pullback(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    whole = outputs(*arrays)
    monkeypatch.setattr(module, "MAX_SCORES", scores)
    for got, want in zip(outputs(*arrays), whole):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_length_holds_more_scores_than_the_limit():
    heads = [jax.ShapeDtypeStruct((1, 8192, h, 8), "float32") for h in (2, 1, 1)]

    def loss(*arrays):
        return attention(*arrays, jnp.ones((1, 8192), jnp.int32)).sum()

    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(*heads).compile().memory_analysis().temp_size_in_bytes
        assert memory < 2 * 8192 * 8192 * 4 / 4, memory  # a quarter of one row's scores


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_rows_whose_scores_fill_the_cache_go_one_after_the_other_and_change_no_value_and_no_gradient(
    heads, kv_heads, monkeypatch
):
    arrays = random_heads(heads, kv_heads)

    def outputs(*arrays):
        out, pullback = jax.vjp(lambda *a: attention(*a, SEGMENTS), *arrays)
        return out, *pullback(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    together = outputs(*arrays)
    monkeypatch.setattr(module, "CACHED_SCORES", heads * 8 * 8)  # of one of the two rows
    assert "scan" in str(jax.make_jaxpr(outputs)(*arrays))
    for got, want in zip(outputs(*arrays), together):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_more_than_a_row_of_scores_is_held_on_cpu():
    rows = [jax.ShapeDtypeStruct((8, 1024, h, 8), "float32") for h in (2, 1, 1)]

    def loss(*arrays):
        return attention(*arrays, jnp.ones((8, 1024), jnp.int32)).sum()

    for function, copies in ((loss, 1), (jax.grad(loss), 3)):
        memory = jax.jit(function).lower(*rows).compile().memory_analysis().temp_size_in_bytes
        assert memory < (copies + 1) * 2 * 1024 * 1024 * 4, memory


@pytest.mark.parametrize("kernel, length, dim", [("splash", 256, 128), ("triton", 128, 32)])
@pytest.mark.parametrize("heads, kv_heads, causal", [(2, 2, False), (4, 2, False), (4, 2, True)])
def test_kernels_give_the_values_and_gradients_of_xla(kernel, length, dim, heads, kv_heads, causal):
    """In interpret mode, which runs the kernel's own program without its platform."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, length, h, dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]
    # Segments that cross the kernel's blocks, and padding.
    segment_ids = np.sort(rng.integers(1, 5, (2, length)), 1).astype(np.int32)
    segment_ids[1, -37:] = 0
    weights = rng.normal(size=(2, length, heads, dim)) * (segment_ids > 0)[..., None, None]

    def outputs(kernel, interpret):
        def loss(*arrays):
            out = attention(*arrays, segment_ids, causal=causal, kernel=kernel, interpret=interpret)
            return (out * weights).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out * (segment_ids > 0)[..., None, None], *gradients

    for got, want in zip(outputs(kernel, True), outputs("xla", False)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_does_not_fit_is_an_error_and_auto_chooses_another():
    arrays = random_heads(2, 1)
    np.testing.assert_array_equal(
        attention(*arrays, SEGMENTS, kernel="auto"), attention(*arrays, SEGMENTS, kernel="xla")
    )
    for kernel, message in (
        ("splash", "needs rows and heads in multiples of 128, not length 8"),
        ("triton", "needs rows in multiples of 16"),
        ("flash", "must be one of auto, xla, splash"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arrays, SEGMENTS, kernel=kernel)


@pytest.mark.parametrize(
    "backend, capability, kernel",
    [
        ("cpu", "", "xla"),
        ("tpu", "", "splash"),
        ("gpu", "7.5", "xla"),  # a T4
        ("gpu", "8.0", "triton"),
        ("gpu", "10.0", "triton"),
        ("gpu", "gfx942", "triton"),
    ],
)
def test_auto_takes_a_kernel_that_the_device_can_run(monkeypatch, backend, capability, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert module.default_kernel() == kernel
