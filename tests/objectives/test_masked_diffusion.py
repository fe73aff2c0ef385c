import math

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed.objectives import masked_diffusion as md

MASK = 2


def corrupt(seed, rows, length, valid=None, t_min=1e-3):
    tokens = np.random.default_rng(seed).integers(4, 50, (rows, length))
    valid = np.ones((rows, length), bool) if valid is None else valid
    return tokens, *map(np.asarray, md.corrupt(jax.random.key(seed), tokens, valid, mask_id=MASK, t_min=t_min))


def test_masked_tokens_become_the_mask_and_all_others_stay():
    tokens, noised, masked, _ = corrupt(0, 8, 64)
    assert (noised[masked] == MASK).all() and masked.any()
    np.testing.assert_array_equal(noised[~masked], tokens[~masked])


def test_invalid_tokens_are_never_masked():
    valid = np.arange(8 * 64).reshape(8, 64) % 3 > 0
    tokens, noised, masked, _ = corrupt(1, 8, 64, valid)
    assert not masked[~valid].any()
    np.testing.assert_array_equal(noised[~valid], tokens[~valid])


def test_a_row_is_masked_with_its_own_probability_t():
    length = 4096
    _, _, masked, t = corrupt(2, 64, length)
    deviation = (masked.mean(1) - t) / np.sqrt(t * (1 - t) / length)
    assert np.abs(deviation).max() < 4.5 and 0.7 < deviation.std() < 1.3


def test_masks_of_different_rows_are_independent():
    _, _, masked, t = corrupt(3, 2, 8192, t_min=0.4)
    both = t[0] * t[1]
    assert abs((masked[0] & masked[1]).mean() - both) < 5 * math.sqrt(both / 8192)


def draws(rows, count=2000, t_min=1e-3):
    """t of many keys, [count, rows]."""
    one = np.zeros((rows, 1), np.int32)
    keys = jax.random.split(jax.random.key(0), count)
    corrupt_t = jax.vmap(lambda key: md.corrupt(key, one, one > -1, mask_id=MASK, t_min=t_min)[2])
    return np.asarray(jax.jit(corrupt_t)(keys))


@pytest.mark.parametrize("rows", [1, 6, 16])
def test_t_of_each_row_is_uniform_over_its_range(rows):
    t_min = 0.1
    t = draws(rows, t_min=t_min)
    assert t.min() >= t_min and t.max() <= 1
    for row in range(rows):  # Kolmogorov-Smirnov against the uniform distribution, 1 in 10^6
        grid = (np.sort(t[:, row]) - t_min) / (1 - t_min)
        distance = np.abs(grid - (np.arange(len(t)) + 0.5) / len(t)).max()
        assert distance < math.sqrt(math.log(2e6) / (2 * len(t)))


@pytest.mark.parametrize("rows", [1, 2, 6, 16, 64])
def test_t_is_stratified_over_the_batch(rows):
    for t in draws(rows, count=20, t_min=0):
        assert sorted(np.floor((t - t.min()) * rows + 1e-3)) == list(range(rows))  # equally spaced


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32])
def test_t_is_stratified_over_every_block_of_neighboring_rows(block):
    for t in draws(64, count=20, t_min=0):
        for part in t.reshape(-1, block):
            # On the circle, because frac() wraps: all gaps between neighbors are 1 / block.
            np.testing.assert_allclose(np.diff(np.sort(part), append=part.min() + 1), 1 / block, atol=1e-5)


@pytest.mark.parametrize("rows, parts", [(8, 2), (8, 8), (6, 3), (12, 4), (20, 4), (96, 24), (12, 1), (1024, 64)])
def test_the_largest_mean_t_of_a_block_equals_the_maximum_over_a_fine_grid_of_u(rows, parts):
    ranks = md.stratified_ranks(rows)
    u = np.concatenate(
        [np.arange(1, rows + 1) / rows - 1e-9, np.linspace(0, 1, 4001)[:-1]]
    )  # just before each wrap, and between wraps
    means = ((u[:, None] + ranks / rows) % 1).reshape(len(u), parts, -1).mean(2)
    np.testing.assert_allclose(md.largest_mean_t(rows, parts, t_min=0.0), means.max(), atol=1e-8)
    assert md.largest_mean_t(rows, parts, t_min=0.1) == pytest.approx(0.1 + 0.9 * means.max(), abs=1e-8)


@pytest.mark.parametrize("block", [1, 2, 4, 16, 64])
def test_the_largest_mean_t_of_a_power_of_two_of_rows(block):
    assert md.largest_mean_t(64, 64 // block, t_min=0.0) == pytest.approx(1 / 2 + 1 / (2 * block), abs=1e-12)


BLOCKS = [
    (8, 1, 1, 16),
    (8, 4, 1, 64),
    (8, 4, 2, 16),
    (64, 4, 4, 32),
    (12, 2, 3, 40),
    (30, 5, 1, 24),
    (96, 8, 3, 128),
    (6, 2, 1, 7),
]


@pytest.mark.parametrize("rows, shards, microbatches, length", BLOCKS)
def test_no_masked_token_of_thousands_of_draws_is_without_a_slot(rows, shards, microbatches, length):
    tokens, parts = np.ones((rows, length), np.int32), shards * microbatches
    slots = np.ceil(md.capacity(rows, length, shards, microbatches) * rows * length / parts)

    def largest(key):
        masked = md.corrupt(key, tokens, tokens > 0, mask_id=MASK)[1]
        return masked.reshape(parts, -1).sum(1).max()

    counts = np.asarray(jax.jit(lambda keys: jax.lax.map(largest, keys))(jax.random.split(jax.random.key(0), 4000)))
    assert counts.max() <= slots
    if rows > parts:  # negative control: slots for the average number would not suffice
        assert (counts > 0.5 * rows * length / parts).mean() > 0.1
        mean = md.largest_mean_t(rows, parts)
        assert counts.max() > (mean - 0.05) * rows * length / parts  # and the bound is tight


@pytest.mark.parametrize("rows", [1, 6, 16])
@pytest.mark.parametrize("noise, distribution", [("independent", lambda t: t), ("bell", lambda t: 3 * t**2 - 2 * t**3)])
def test_t_has_the_distribution_that_is_named(rows, noise, distribution):
    one, keys = np.zeros((rows, 1), np.int32), jax.random.split(jax.random.key(0), 2000)
    t = jax.jit(jax.vmap(lambda key: md.corrupt(key, one, one > -1, mask_id=MASK, t_min=0.0, noise=noise)[2]))(keys)
    for row in range(rows):  # Kolmogorov-Smirnov, 1 in 10^6
        grid = distribution(np.sort(np.asarray(t, np.float64)[:, row]))
        assert np.abs(grid - (np.arange(2000) + 0.5) / 2000).max() < math.sqrt(math.log(2e6) / 4000)
    apart = np.sort(t, 1)
    if rows > 1:  # bell is stratified: its strata have equal probability
        cells = np.floor(distribution(apart.astype(np.float64)) * rows - distribution(apart[:, :1]) * rows + 1e-3)
        assert (cells == np.arange(rows)).all() == (noise == "bell")


def test_a_fixed_ratio_masks_that_share_of_the_tokens_and_weights_them_by_their_mean():
    tokens = np.ones((8, 4096), np.int32)
    how = dict(noise="fixed", mask_ratio=0.15)
    _, masked, t = md.corrupt(jax.random.key(0), tokens, tokens > 0, mask_id=MASK, **how)
    np.testing.assert_array_equal(t, np.float32(0.15))
    assert abs(masked.mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / tokens.size)
    assert md.capacity(8, 4096, **how) == pytest.approx(0.15 + 3 / math.sqrt(tokens.size))


@pytest.mark.parametrize("noise", ["independent", "bell", "fixed"])
@pytest.mark.parametrize("rows, shards, microbatches, length", BLOCKS[1:5])
def test_no_masked_token_is_without_a_slot_under_any_noise(rows, shards, microbatches, length, noise):
    tokens, parts = np.ones((rows, length), np.int32), shards * microbatches
    slots = np.ceil(md.capacity(rows, length, shards, microbatches, noise=noise) * rows * length / parts)

    def largest(key):
        masked = md.corrupt(key, tokens, tokens > 0, mask_id=MASK, noise=noise)[1]
        return masked.reshape(parts, -1).sum(1).max()

    counts = jax.jit(lambda keys: jax.lax.map(largest, keys))(jax.random.split(jax.random.key(0), 2000))
    assert counts.max() <= slots


def test_an_unknown_noise_is_an_error():
    with pytest.raises(ValueError, match="noise='cosine' must be one of stratified, independent, bell, fixed"):
        md.corrupt(jax.random.key(0), np.ones((2, 2), int), np.ones((2, 2), bool), mask_id=MASK, noise="cosine")


def test_a_block_of_one_row_has_slots_for_all_its_tokens():
    assert md.capacity(64, 4096, 64, 1) == md.capacity(64, 4096, 16, 4) == 1.0
    assert md.capacity(1024, 4096, 64) == pytest.approx(0.5 + 1 / 32 + 3 / 256, abs=5e-4)


def test_rows_that_do_not_divide_into_blocks_are_an_error():
    with pytest.raises(ValueError, match="8 rows per batch do not divide into 3 devices .* times microbatches=1"):
        md.capacity(8, 16, 3)


def batch(rows=3, length=8, seed=0):
    rng = np.random.default_rng(seed)
    valid = rng.random((rows, length)) < 0.8
    masked = valid & (rng.random((rows, length)) < 0.5)
    return rng.exponential(size=(rows, length)), masked, rng.uniform(0.01, 1, rows), valid


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-6), (np.float32, 1e-4)])
def test_elbo_loss_and_gradient_equal_the_reference(dtype, tolerance):
    nll, masked, t, valid = batch()
    with jax.enable_x64(dtype == np.float64):
        value, grad = jax.value_and_grad(md.elbo_loss)(nll.astype(dtype), masked, t.astype(dtype), valid)
    (want,) = reference.gradient(lambda x: reference.elbo_loss(x, masked, t, valid), [nll])
    assert value.dtype == dtype
    np.testing.assert_allclose(value, reference.elbo_loss(nll, masked, t, valid), rtol=tolerance)
    np.testing.assert_allclose(grad, want, rtol=tolerance)


def test_elbo_loss_of_nothing_valid_is_zero_with_zero_gradient():
    nll, _, t, _ = batch()
    nothing = np.zeros(nll.shape, bool)
    value, grad = jax.value_and_grad(md.elbo_loss)(nll.astype(np.float32), nothing, t.astype(np.float32), nothing)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_elbo_loss_ignores_tokens_that_are_not_masked():
    nll, masked, t, valid = batch()
    np.testing.assert_array_equal(
        md.elbo_loss(np.where(masked, nll, np.nan).astype(np.float32), masked, t, valid),
        md.elbo_loss(nll.astype(np.float32), masked, t, valid),
    )


def test_elbo_of_a_uniform_prediction_is_the_logarithm_of_the_vocabulary():
    """The expectation of masked / t is 1, so the bound of a uniform model is log V."""
    rows, length, vocabulary = 256, 256, 50
    _, _, masked, t = corrupt(4, rows, length, t_min=0.05)
    loss = md.elbo_loss(np.full((rows, length), np.log(vocabulary)), masked, t, np.ones((rows, length), bool))
    np.testing.assert_allclose(loss, np.log(vocabulary), rtol=0.02)


def test_left_shift_puts_the_state_before_each_token_at_its_position():
    hidden = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(md.left_shift(hidden)[:, 1:], hidden[:, :-1])


N, D, V = 36, 5, 41


def states(dtype=np.float64):
    rng = np.random.default_rng(0)
    hidden, embedding = rng.normal(size=(N, D)), rng.normal(size=(V, D))
    return hidden.astype(dtype), embedding.astype(dtype), rng.integers(0, V, N), rng.normal(size=N)


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("chunk", [4, N])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-6), (np.float32, 1e-4)])
def test_weighted_nll_and_gradients_equal_the_reference_for_every_chunk(chunk, dtype, tolerance):
    hidden, embedding, targets, weights = states()

    def loss(h, e, scale=3.0):
        total, *parts = md.weighted_nll(h, e, targets, weights.astype(dtype), chunk)
        return scale * total, (total, *parts)

    def plain(h, e):
        return 3 * (reference.token_nll(h, e, targets) * weights).sum()

    with jax.enable_x64(dtype == np.float64):
        arrays = [hidden.astype(dtype), embedding.astype(dtype)]
        with_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (total, nll, correct)), gradients = with_gradient(*arrays)
        without = jax.jit(loss)(*arrays)[1]
    assert total.dtype == nll.dtype == dtype
    np.testing.assert_allclose(total, plain(hidden, embedding) / 3, rtol=tolerance)
    np.testing.assert_allclose(nll, reference.token_nll(hidden, embedding, targets), rtol=tolerance)
    np.testing.assert_array_equal(correct, (hidden @ embedding.T).argmax(-1) == targets)
    for got, want in zip(without, (total, nll, correct)):
        close(got, want, 1e-6)
    for got, want in zip(gradients, reference.gradient(plain, [hidden, embedding])):
        close(got, want, tolerance)


def all_equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, jex.core.ClosedJaxpr)):
            if isinstance(parameter, jex.core.ClosedJaxpr):
                yield from all_equations(parameter.jaxpr)
            elif isinstance(parameter, jex.core.Jaxpr):
                yield from all_equations(parameter)


def sizes(function, *arrays):
    """The sizes of all arrays that a call computes."""
    equations = all_equations(jax.make_jaxpr(function)(*arrays).jaxpr)
    return [math.prod(variable.aval.shape) for equation in equations for variable in equation.outvars]


def gradient_of_the_sum(targets, weights, chunk):
    return jax.grad(lambda h, e: md.weighted_nll(h, e, targets, weights, chunk)[0], argnums=(0, 1))


@pytest.mark.parametrize("chunk, held", [(4, False), (N, True)])
def test_logits_of_all_tokens_are_never_held(chunk, held):
    hidden, embedding, targets, weights = states(np.float32)
    computed = sizes(gradient_of_the_sum(targets, weights, chunk), hidden, embedding)
    assert chunk * V in computed  # so the logits of a chunk are among them
    assert (max(computed) >= N * V) == held


def test_a_chunk_needs_three_products_of_the_vocabulary_and_the_backward_pass_repeats_none():
    hidden, embedding, targets, weights = states(np.float32)
    jaxpr = jax.make_jaxpr(gradient_of_the_sum(targets, weights, 4))(hidden, embedding).jaxpr
    assert [x.primitive.name for x in all_equations(jaxpr)].count("dot_general") == 3


def test_a_chunk_that_does_not_divide_the_tokens_is_an_error():
    hidden, embedding, targets, weights = states(np.float32)
    with pytest.raises(ValueError, match="chunk=5 must divide the 36 tokens"):
        md.weighted_nll(hidden, embedding, targets, weights.astype(np.float32), 5)


def test_bfloat16_states_give_float32_losses_and_gradients_that_are_rounded_once():
    hidden, embedding, targets, weights = states(np.float32)
    weights = weights.astype(np.float32)
    low = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(embedding, jnp.bfloat16)
    total, nll, _ = md.weighted_nll(*low, targets, weights, 4)
    assert total.dtype == nll.dtype == jnp.float32
    exact = [np.asarray(x, float) for x in low]
    np.testing.assert_allclose(nll, reference.token_nll(*exact, targets), rtol=1e-4)
    gradients = gradient_of_the_sum(targets, weights, 4)(*low)
    want = reference.gradient(lambda h, e: (reference.token_nll(h, e, targets) * weights).sum(), exact)
    for got, expected in zip(gradients, want):
        assert got.dtype == jnp.bfloat16
        close(np.asarray(got, float), expected, 2**-7)


R, L = 3, 12


def of_rows(x):
    return x.reshape(R, L, *x.shape[1:])


@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_losses_and_gradients_of_masked_tokens_only_equal_those_of_all_tokens(capacity):
    hidden, embedding, targets, _ = states(np.float32)
    weights = np.random.default_rng(2).exponential(size=R).astype(np.float32)
    masked = np.random.default_rng(1).random((R, L)) < 0.3
    assert masked.sum() <= capacity * N

    def compact(arrays):
        h, e = arrays
        total, *parts = md.masked_nll(of_rows(h), e, of_rows(targets), masked, weights, capacity=capacity, chunk=4)
        return total, parts

    def full(arrays):
        weight = jnp.where(masked, weights[:, None], 0).reshape(N)
        total, *parts = md.weighted_nll(*arrays, targets, weight, N)
        return total, [*(jnp.where(masked, of_rows(x), 0) for x in parts), masked]

    (got, got_parts), got_gradients = jax.jit(jax.value_and_grad(compact, has_aux=True))([hidden, embedding])
    (want, want_parts), want_gradients = jax.jit(jax.value_and_grad(full, has_aux=True))([hidden, embedding])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip([*got_parts, *got_gradients], [*want_parts, *want_gradients]):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_sum_over_masked_tokens_is_the_elbo():
    hidden, embedding, targets, _ = states(np.float32)
    _, masked, t, valid = batch(R, L)
    t = t.astype(np.float32)
    total, nll, _, counted = md.masked_nll(
        of_rows(hidden), embedding, of_rows(targets), masked, md.elbo_weights(t, valid), capacity=1.0, chunk=4
    )
    np.testing.assert_allclose(total, md.elbo_loss(nll, counted, t, valid), rtol=1e-6)


def test_masked_tokens_beyond_the_capacity_are_left_out_and_can_be_counted():
    hidden, embedding, targets, _ = states(np.float32)
    masked, weights = np.ones((R, L), bool), np.ones(R, np.float32)

    def half(hidden):
        return md.masked_nll(of_rows(hidden), embedding, of_rows(targets), masked, weights, capacity=0.5, chunk=3)

    total, nll, _, counted = half(hidden)
    assert counted.sum() == N // 2
    np.testing.assert_array_equal(nll != 0, counted)
    np.testing.assert_allclose(total, nll.sum(), rtol=1e-6)
    computed = sizes(half, hidden)
    assert 3 * V in computed and max(computed) < N * V / 2
