import os
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest

from embed.models import sharding, transformer
from embed.training.stages import KINDS


def test_every_parameter_matches_a_rule():
    mesh = sharding.make_mesh()
    for size in transformer.SIZES:
        params = transformer.abstract_params(transformer.make_config(size, 64, token_dimensions=128))
        shardings = sharding.parameter_shardings(mesh, params)
        assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'adapter'"):
        sharding.parameter_shardings(sharding.make_mesh(), {"adapter": jax.ShapeDtypeStruct((4,), "float32")})


def test_a_mesh_that_does_not_cover_the_devices_is_an_error():
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 does not cover 1 devices"):
        sharding.make_mesh(data=3, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "held, num_shards, local",
    [([0, 2], 4, [0, 2]), ([0, 2], 8, [0, 1, 4, 5]), ([0, 2], 2, [0, 1]), ([3], 2, [1]), ([1], 3, [0, 1])],
)
def test_a_process_builds_every_shard_of_which_its_devices_hold_a_part(held, num_shards, local, monkeypatch):
    indices = {device: (slice(i, i + 1),) for device, i in enumerate(held)}
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 4)
    monkeypatch.setattr(
        sharding,
        "NamedSharding",
        lambda *_: types.SimpleNamespace(addressable_devices_indices_map=lambda shape: indices),
    )
    assert sharding.local_shards(None, num_shards) == local


def test_shards_are_put_in_the_order_of_their_indices():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    x = np.arange(12).reshape(6, 2)
    whole = sharding.put_batch(mesh, {"tokens": x, "slots": np.arange(9)})
    np.testing.assert_array_equal(whole["tokens"], x)
    parts = {"tokens": np.concatenate([x[4:], x[:2], x[2:4]])}
    placed = sharding.put_batch(mesh, parts, shards=[2, 0, 1], num_shards=3)
    np.testing.assert_array_equal(placed["tokens"], x)


# Forced host devices must be set before jax starts, so the program runs in a process of its own.
EQUAL_LOSSES = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpy as np
    from embed.config import base
    from embed.models import transformer
    from embed.rows import RowShape
    from embed.models import sharding
    from embed.training import losses as module, stages
    from embed.training.step import make_step

    devices = jax.devices()
    assert len(devices) == 8
    # Sums in another order differ in their last bits, and rounding to int8 can turn that into a whole level. Rounding
    # is element-wise, so it is not needed to test sharding.
    module.QUANTIZERS = module.QUANTIZERS | {"int8": lambda pooled: 127 * jnp.tanh(pooled)}
    model = transformer.make_config("micro", 64)
    rng = np.random.default_rng(0)
    R, L, N = 16, 24, 32
    shape = RowShape(L, 4, 4)
    batch = dict(
        tokens=rng.integers(4, 64, (R, L)), segment_ids=np.repeat([[1, 2, 3, 0]], R, 0).repeat(6, 1),
        positions=np.tile(np.arange(6), (R, 4)), span_ids=np.repeat([[1, 2, 3, 0]], R, 0).repeat(6, 1),
        query_slots=np.arange(N) // 2 * 4 + np.arange(N) % 2, document_slots=np.arange(N) // 2 * 4 + 2,
        query_ids=np.arange(N), document_ids=np.arange(N) // 2, valid=np.arange(N) != 3,
    )
    if "KIND" == "triplet":
        negatives = np.arange(2 * N).reshape(N, 2)
        batch |= dict(negative_slots=negatives % (4 * R), negative_ids=negatives % 40,
                      negative_valid=negatives % 5 != 0)
    if "KIND" == "contextual":  # the query is a row's first text, the chunk another text of the row
        batch |= dict(chunk_slots=np.arange(N) // 2 * 4 + 1 + np.arange(N) % 2, chunk_ids=np.arange(N) // 2 + 100,
                      chunk_document=np.arange(N) // 4, chunk_valid=np.arange(N) != 6, positive=np.arange(N) // 2 * 2)
    if "KIND" == "late_interaction":
        batch |= dict(query_starts=np.arange(N) // 2 * L + np.arange(N) % 2 * 6, query_lengths=np.arange(N) % 4 + 1,
                      document_starts=np.arange(N) // 2 * L + 12, document_lengths=np.arange(N) % 6 + 1)
    batch = {k: v.astype(bool if "valid" in k else np.int32) for k, v in batch.items()}
    if "KIND" == "distill":
        batch |= dict(slots=batch["query_slots"], ids=batch["query_ids"] // 2,
                      teacher=rng.normal(size=(N, 40)).astype(np.float32))
    rates = dict(learning_rate=1e-3, warmup=0.0, decay=0.0, b2=.98, eps=1e-6)
    stage = base().stage("KIND", optimizer=rates, batch=dict(length=L))
    if stage.kind in stages.TEXT:
        stage.execution.logits_chunk = 8
    else:
        stage.temperature = 0.1
        stage.batch.update(spans=4, segments=4)
        stage.update(dict(token_dimensions=16) if stage.kind == "late_interaction" else dict(matryoshka=(16, 32)))
    model = stages.stage_model(stage, model)

    def losses(mesh, microbatches=1):
        stage.execution.microbatches = microbatches
        step = make_step(stage, model, mesh, steps=4, seed=0, mask_id=2, left_shift=True)
        params = jax.tree.map(jax.device_put, transformer.init(model, jax.random.key(0)), step.params_sharding)
        state = step.init(params)
        if mesh.shape["fsdp"] > 1:
            assert not params["layers"]["gate"].sharding.is_fully_replicated
            assert not state[1][0].mu["layers"]["gate"].sharding.is_fully_replicated
        placed = step.put(batch)
        out = []
        for k in range(4):
            params, state, metrics = step(params, state, placed, k)
            assert not metrics.get("overflow", 0)
            out.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        return np.array(out)

    one = losses(sharding.make_mesh(devices=devices[:1]))
    np.testing.assert_allclose(losses(sharding.make_mesh(data=2, fsdp=2, tensor=2)), one, rtol=2e-5)
    np.testing.assert_allclose(losses(sharding.make_mesh(data=4, fsdp=2), microbatches=2), one, rtol=2e-5)
    assert np.unique(one).size == one.size
    """
)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_on_eight_devices_equal_those_on_one(kind):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", EQUAL_LOSSES.replace("KIND", kind)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
