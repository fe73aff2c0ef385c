"""A late-interaction stage between dense ones: where its projection comes from, and what an export of it contains."""

import numpy as np
import pytest
import small

from embed import config, exports, graph, inference, nodes, runs
from embed.training.metrics import read_metrics

# `late` starts from a dense stage, `later` from late interaction, `dense` drops the projection again.
STAGES = """
    del config.stages["triplet"], config.mining["hard"], config.merges["merged"]
    config.stages.pair.init = ""
    late = dict(token_dimensions=12, batch=rows | dict(max_query_tokens=8, max_document_tokens=40))
    config.stages.late = base.stage("late_interaction", init="pair", curriculum=((4, "pairs"),), **late)
    config.stages.later = base.stage("late_interaction", init="late", curriculum=((1, "pairs"),), **late)
    config.stages.dense = base.stage("pair", init="late", curriculum=((1, "pairs"),), **pair)
    del config.stages["diffusion"]
    for stage in config.stages.values():
        stage.execution.log_every = 1
        stage.optimizer.learning_rate = 1e-6
    config.stages.late.optimizer.learning_rate = 1e-2
    config.stages.late.execution.evaluate_every = 4
    config.stages.late.execution.evaluate_on = ("set/test",)
    config.exports.model.checkpoint = "late"
    config.evaluations.words.checkpoints = ("pair", "late")
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run."""
    folder = tmp_path_factory.mktemp("late")
    file = folder / "graph.py"
    file.write_text(small.GRAPH.replace("    return config\n", STAGES))
    small.write_data(folder / "data")
    made = runs.Run(config.load(str(file), [f"--config.data.directory={folder / 'data'}"]), folder / "run")
    for name in graph.order(made.config):
        nodes.train_stage(made, name)
    return made


def params_of(run, name):
    return run.checkpoint(name).params()


def test_only_late_interaction_stages_have_a_projection(run):
    for name, has in (("pair", False), ("late", True), ("later", True), ("dense", False)):
        assert ("projection" in params_of(run, name)) == has
        assert run.identity(name)["model"]["token_dimensions"] == 12 * has
    assert params_of(run, "late")["projection"].shape == (32, 12)


def test_a_projection_starts_at_random_by_the_seed_or_from_the_parent(run):
    def start(name):
        return nodes._initial_params(run, name, run.shardings(run.checkpoint(name).model))

    random = np.asarray(start("late")["projection"])
    assert 0.8 < random.std() * 32**0.5 < 1.2
    np.testing.assert_array_equal(random, start("late")["projection"])
    np.testing.assert_array_equal(start("late")["norm"], params_of(run, "pair")["norm"])
    np.testing.assert_array_equal(start("later")["projection"], params_of(run, "late")["projection"])
    assert "projection" not in start("dense")
    np.testing.assert_array_equal(start("dense")["norm"], params_of(run, "late")["norm"])
    assert np.abs(params_of(run, "late")["projection"] - random).max() > 1e-3  # it is trained


def test_training_lowers_the_loss_and_is_evaluated_by_maxsim(run):
    rows = read_metrics(run.folder("late") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    (figures,) = nodes.evaluate(run, "late").values()
    assert set(figures) == {"float32", "int8", "binary", "multi"}
    assert rows[-1]["evaluation"] == pytest.approx(figures["multi"]["ndcg@10"])
    assert set(nodes.evaluate(run, "pair")["words"]) == {"float32", "int8", "binary"}


def test_an_export_gives_the_token_vectors_of_the_checkpoint(run, tmp_path):
    texts = small.sentences(9, seed=3)
    exports.export_model(run, "late", tmp_path / "model")
    for one, other in zip(
        inference.load(tmp_path / "model").encode_tokens_multi(texts),
        run.encoder(run.checkpoint("late")).encode_tokens_multi(texts),
    ):
        np.testing.assert_array_equal(one, other)


def test_a_stage_may_start_from_an_export_but_not_with_other_dimensions(run, tmp_path):
    exports.export_model(run, "late", tmp_path / "model")
    run.check_start("later", run.checkpoint(str(tmp_path / "model")))
    run.check_start("dense", run.checkpoint(str(tmp_path / "model")))
    wrong = run.config.copy_and_resolve_references()
    wrong.stages.later.token_dimensions = 16
    with pytest.raises(ValueError, match="later cannot start from late: its token_dimensions is 16, the check.* 12"):
        runs.Run(wrong, run.workdir).identity("later")


def test_models_with_and_without_a_projection_cannot_be_merged(run):
    with pytest.raises(ValueError, match="token_dimensions is 0 and 12"):
        runs.merged("both", run.checkpoint("pair"), run.checkpoint("late"), 0.5)
    load = runs.merged("both", run.checkpoint("late"), run.checkpoint("later"), 0.5).load
    assert load(None)["projection"].shape == (32, 12)
