import jax
import numpy as np
import pytest
from small_run import MODEL, STAGE, Loader, losses, make_step, train

from embed.checkpoints import training_state
from embed.models import transformer
from embed.training import loop, stages
from embed.training.metrics import read_metrics


def dying_at(step):
    def read(k):
        if k == step:
            raise RuntimeError("killed")

    return Loader(read)


def test_a_run_that_died_continues_with_the_losses_of_an_uninterrupted_run_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", Loader())
    with pytest.raises(RuntimeError):
        train(tmp_path / "broken", dying_at(8))
    continued = train(tmp_path / "broken", Loader())
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 13))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(continued)):
        np.testing.assert_array_equal(x, y)


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path, Loader())
    before = losses(tmp_path)
    train(tmp_path, dying_at(0))
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
    params = training_state.load_params(tmp_path / "checkpoints", 5, transformer.abstract_params(MODEL))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_non_finite_gradient_stops_the_run_and_reaches_no_checkpoint(tmp_path):
    finite = stages.make_loss(STAGE, MODEL, mask_id=2)

    def loss(params, batch, key, progress):
        value, metrics = finite(params, batch, key, progress)
        zero = jax.numpy.where(progress >= 0.5, params["norm"][0] - jax.lax.stop_gradient(params["norm"][0]), 1.0)
        return value + jax.numpy.sqrt(zero), metrics  # at 0 the gradient is infinite and the loss is finite

    with pytest.raises(loop.NonFiniteLossError, match="gradient_norm of step 7 is (nan|inf)"):
        train(tmp_path, Loader(), loss=loss, stage={"checkpoint_every": 1})
    newest = training_state.steps(tmp_path / "checkpoints")[-1]
    params = training_state.load_params(tmp_path / "checkpoints", newest, transformer.abstract_params(MODEL))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_compiles_its_step_once(tmp_path):
    traced = []
    inner = stages.make_loss(STAGE, MODEL, mask_id=2)

    def loss(*arguments):
        traced.append(1)
        return inner(*arguments)

    train(tmp_path, steps=4, loss=loss)
    assert len(traced) == 1


def test_rows_sum_the_counts_of_the_loader_and_the_last_step_has_a_row(tmp_path):
    train(tmp_path, Loader(), steps=7, stage={"log_every": 5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 7 and sum(row["cut"] for row in rows) == sum(range(7))
    assert [(row["step"], row["cut"]) for row in rows if row["step"] == 5] == [(5, 1 + 2 + 3 + 4)]  # a row at each save


def test_the_host_reads_no_metrics_of_the_step_it_has_just_dispatched():
    read = []

    class OnDevice:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            read.append(self.step)
            return 0.0

    reported = []
    log = loop._Log(None, make_step(log_every=2), lambda step, row: reported.append(step), print, 0, None)
    stats = {"fill": 1.0, "tokens": 1, "squares": 1, "examples": 1, "waited": 0.0}
    for step in range(1, 6):
        log.add(step, {name: OnDevice(step) for name in ("loss", "gradient_norm", "skipped")}, stats)
        assert step not in read and step - 1 in [0, *read]
    log.flush()
    assert set(read) == {1, 2, 3, 4, 5} and reported == [2, 4]
    log.add(6, {name: OnDevice(6) for name in ("loss", "gradient_norm", "skipped")}, stats)
    log.add(7, {name: OnDevice(7) for name in ("loss", "gradient_norm", "skipped")}, stats)
    log.flush(row=True)
    assert reported == [2, 4, 6, 7]


def test_restored_parameters_are_the_final_ones(tmp_path):
    final = train(tmp_path, Loader(), steps=3)
    restored = training_state.load_params(tmp_path / "checkpoints", 3, transformer.abstract_params(MODEL))
    for x, y in zip(jax.tree.leaves(final), jax.tree.leaves(restored)):
        np.testing.assert_array_equal(x, y)


def test_missing_checkpoints_are_named(tmp_path):
    assert training_state.steps(tmp_path / "nothing") == []
    with pytest.raises(training_state.CheckpointError, match="checkpoint 1 under .*nothing cannot be read"):
        training_state.load_params(tmp_path / "nothing", 1, transformer.abstract_params(MODEL))
