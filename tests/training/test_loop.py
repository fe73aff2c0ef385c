import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from embed.checkpoints import training_state
from embed.models import transformer
from embed.training import loop, sharding, stages
from embed.training.metrics import read_metrics

MODEL = transformer.make_config("micro", 64)
OPTIMIZER = ConfigDict(
    dict(
        learning_rate=1e-2,
        warmup=0.1,
        decay=0.5,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.1,
        clip=1.0,
        moment_dtype="float32",
    )
)
STAGE = ConfigDict(
    dict(
        kind="diffusion", microbatches=1, logits_chunk=8, logits_capacity=1.0, optimizer=OPTIMIZER, log_every=1,
        checkpoint_every=5, max_skipped=0,
    )
)  # fmt: skip


class Loader:
    """Random rows as a function of the step; `fail_at` plays a run that dies."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def batch(self, step):
        if step == self.fail_at:
            raise RuntimeError("killed")
        tokens = np.random.default_rng(step).integers(4, 64, (4, 16)).astype(np.int32)
        positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
        return {
            "tokens": tokens,
            "segment_ids": np.ones_like(tokens),
            "positions": positions,
            "stats": {"fill": 1.0, "cut": step},
        }


def train(folder, loader, steps=12, loss=None, mesh=None, stage=None, **keywords):
    return loop.train(
        folder,
        stage=ConfigDict(STAGE.to_dict() | (stage or {})),
        loss=loss or stages.make_loss(STAGE, MODEL, mask_id=2),
        loader=loader,
        steps=steps,
        initial_params=lambda shardings: transformer.init(MODEL, jax.random.key(0)),
        abstract_params=transformer.abstract_params(MODEL),
        seed=0,
        mesh=mesh or sharding.make_mesh(devices=jax.devices()[:1]),
        **keywords,
    )


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}


def test_a_run_that_died_continues_with_the_losses_of_an_unbroken_one_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", Loader())
    with pytest.raises(RuntimeError):
        train(tmp_path / "broken", Loader(fail_at=8))
    continued = train(tmp_path / "broken", Loader())
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 13))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(continued)):
        np.testing.assert_array_equal(x, y)


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path, Loader())
    before = losses(tmp_path)
    train(tmp_path, Loader(fail_at=0))
    assert losses(tmp_path) == before


def test_a_non_finite_loss_stops_the_run_and_reaches_no_checkpoint(tmp_path):
    finite = stages.make_loss(STAGE, MODEL, mask_id=2)

    def loss(params, batch, key, progress):
        value, metrics = finite(params, batch, key, progress)
        return jax.numpy.where(progress >= 0.5, jax.numpy.nan, value), metrics

    with pytest.raises(loop.NonFiniteLossError, match="loss of step 7 is nan"):
        train(tmp_path, Loader(), loss=loss)
    with training_state.open_manager(tmp_path / "checkpoints", save_every=5, keep=2) as manager:
        assert manager.latest_step() == 5
    params = training_state.load_params(tmp_path / "checkpoints", transformer.abstract_params(MODEL))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_non_finite_gradient_stops_the_run_and_reaches_no_checkpoint(tmp_path):
    finite = stages.make_loss(STAGE, MODEL, mask_id=2)

    def loss(params, batch, key, progress):
        value, metrics = finite(params, batch, key, progress)
        zero = jax.numpy.where(progress >= 0.5, params["norm"][0] - jax.lax.stop_gradient(params["norm"][0]), 1.0)
        return value + jax.numpy.sqrt(zero), metrics  # where it is 0, the gradient is infinite and the loss is not

    with pytest.raises(loop.NonFiniteLossError, match="gradient_norm of step 7 is (nan|inf)"):
        train(tmp_path, Loader(), loss=loss, stage={"checkpoint_every": 1})
    params = training_state.load_params(tmp_path / "checkpoints", transformer.abstract_params(MODEL))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_rows_sum_what_the_loader_counted_and_the_last_step_has_one(tmp_path):
    train(tmp_path, Loader(), steps=7, stage={"log_every": 5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["cut"], row["fill"]) for row in rows] == [(5, 0 + 1 + 2 + 3 + 4, 1.0), (7, 5 + 6, 1.0)]


def test_the_host_reads_no_metric_of_the_step_it_has_just_sent_off():
    read = []

    class OnDevice:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            read.append(self.step)
            return 0.0

    reported = []
    log = loop._Log(
        None, lambda step: 0.1, lambda step, row: reported.append(step), 0, 9, every=2, max_skipped=0, least_seconds=None
    )
    stats = {"fill": 1.0, "tokens": 1, "examples": 1, "waited": 0.0}
    for step in range(1, 6):
        log.add(step, {name: OnDevice(step) for name in ("loss", "gradient_norm", "skipped")}, stats)
        assert step not in read and step - 1 in [0, *read]
    log.flush()
    assert set(read) == {1, 2, 3, 4, 5} and reported == [2, 4]


def test_restored_parameters_are_the_final_ones(tmp_path):
    final = train(tmp_path, Loader(), steps=3)
    restored = training_state.load_params(tmp_path / "checkpoints", transformer.abstract_params(MODEL))
    for x, y in zip(jax.tree.leaves(final), jax.tree.leaves(restored)):
        np.testing.assert_array_equal(x, y)


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints at .*nothing"):
        training_state.load_params(tmp_path / "nothing", transformer.abstract_params(MODEL))
