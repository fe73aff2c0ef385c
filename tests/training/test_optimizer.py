import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from embed.models import transformer
from embed.training.optimizer import make_optimizer, wsd_schedule

CONFIG = ConfigDict(
    dict(
        learning_rate=0.1,
        embedding_rate=1.0,
        warmup=0.1,
        decay=0.2,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.5,
        clip=1.0,
        moment_dtype="float32",
    )
)


def test_schedule_warms_up_linearly_stays_constant_and_decays_linearly_to_zero():
    schedule = wsd_schedule(2.0, steps=20, warmup=0.2, decay=0.25)
    rates = [float(schedule(jnp.asarray(step))) for step in range(20)]
    expected = [0.5, 1.0, 1.5, 2.0] + [2.0] * 11 + [2 * k / 6 for k in (5, 4, 3, 2, 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_schedule_without_phases_is_constant():
    schedule = wsd_schedule(3.0, steps=5, warmup=0.0, decay=0.0)
    assert [float(schedule(jnp.asarray(s))) for s in range(5)] == [3.0] * 5


def test_overlapping_warmup_and_decay_are_an_error():
    with pytest.raises(ValueError, match="warmup=0.7 and decay=0.6"):
        wsd_schedule(1.0, 10, 0.7, 0.6)


def test_clip_bounds_the_gradient_and_0_turns_clipping_off():
    params, gradients = {"w": jnp.zeros(4)}, {"w": jnp.full(4, 10.0)}
    for clip, first_moment in ((1.0, 0.1 * 0.5), (0.0, 0.1 * 10)):
        optimizer = make_optimizer(ConfigDict({**CONFIG, "clip": clip}), wsd_schedule(0.1, 10, 0, 0))
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose(state[1][0].mu["w"], first_moment, rtol=1e-6)


def test_weight_decay_applies_to_everything_but_norm_scales():
    config = transformer.make_config("micro", 16)
    params = transformer.init(config, jax.random.key(0))
    optimizer = make_optimizer(CONFIG, wsd_schedule(0.1, 10, 0, 0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert not np.any(update), name
        else:
            assert np.all(np.sign(update) == -np.sign(_leaf(params, path))), name


def test_gradients_are_clipped_by_their_global_norm():
    config = CONFIG.copy_and_resolve_references()
    config.weight_decay = 0.0
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    optimizer = make_optimizer(config, wsd_schedule(0.1, 10, 0, 0))
    big = {"a": jnp.array([300.0, 0.0]), "b": jnp.array([400.0])}
    unit = {"a": jnp.array([0.6, 0.0]), "b": jnp.array([0.8])}
    state = optimizer.init(params)
    _, after_big = optimizer.update(big, state, params)
    _, after_unit = optimizer.update(unit, state, params)
    for x, y in zip(jax.tree.leaves(after_big), jax.tree.leaves(after_unit)):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_the_embedding_table_moves_embedding_rate_times_as_far_and_nothing_else_changes():
    params = transformer.init(transformer.make_config("micro", 16, tied=False), jax.random.key(0))
    gradients = jax.tree.map(jnp.sin, params)

    def updates(embedding_rate):
        optimizer = make_optimizer(ConfigDict({**CONFIG, "embedding_rate": embedding_rate}), lambda _: 0.1)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    plain = updates(1.0)
    for rate in (0.0, 0.25, 30.0):
        scaled = updates(rate)
        np.testing.assert_allclose(scaled["embedding"], rate * plain["embedding"], rtol=1e-6)
        for name in ("layers", "norm", "head"):
            jax.tree.map(np.testing.assert_array_equal, scaled[name], plain[name])


def _leaf(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree
