"""The whole house at a micro size, through the commands a user types."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest
import small
from nbclient import NotebookClient

from embed import cli, config, pipeline, tokenizers
from embed.checkpoints import huggingface
from embed.evaluation import retrieval
from embed.models import transformer
from embed.training import plan, stages
from embed.training.metrics import read_metrics

CONFIG = "configs/quickstart.py:runlocal"
ROOT = Path(__file__).parent.parent
MIXTURES = (("diffusion", "diffusion"), ("pair", "pairs"), ("contextual", "contextual"), ("triplet", "triplet"))
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A complete run of the pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def prepared(workdir, tmp_path):
    """A workdir of which only the data are prepared."""
    folder = tmp_path / "run"
    (folder / "steps").mkdir(parents=True)
    shutil.copy(workdir / "config.json", folder)
    shutil.copy(workdir / "steps" / "prepare.json", folder / "steps")
    (folder / "data").symlink_to(workdir / "data")
    return folder


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_shipped_config_trains_a_step_of_each_stage_when_shrunk_by_runlocal(path, workdir, tmp_path):
    shrunk = config.load(
        f"configs/{path}:runlocal", [f"--config.stages.{s}.curriculum=((1, {m!r}),)" for s, m in MIXTURES]
    )
    assert shrunk.data == config.load(CONFIG).data, "data of its own: prepare them here"
    run = pipeline.Run(shrunk, tmp_path / "run")
    run.data.symlink_to(workdir / "data")
    for name, _ in MIXTURES:
        assert pipeline.train_stage(run, name) == {"steps": 1}
        (row,) = read_metrics(run.workdir / name / "metrics.jsonl")
        assert np.isfinite(row["loss"])


def test_the_planner_knows_the_arrays_of_every_stage(workdir):
    run = pipeline.Run(config.load(CONFIG), workdir)
    for name, mixture in MIXTURES:
        stage = run.config.stages[name]
        stores = {task: run.store(task) for task in run.mixtures[mixture]}
        phases = [(1, run.mixtures[mixture])]
        separator = run.tokenizer.separator_id
        batch = stages.make_loader(stage, stores, phases, seed=0, separator_id=separator).batch(0)
        batch.pop("stats")
        got = {k: (v.shape, v.dtype.type) for k, v in batch.items()}
        assert {k: v for k, v in plan.abstract_batch(stage).items() if k in got} == got
        assert set(plan.abstract_batch(stage)) == set(got)


def test_results_have_every_row_set_and_precision(workdir):
    results = json.loads((workdir / "results.json").read_text())
    models = ["random init", "diffusion", "pair", "contextual", "triplet", "merged"]
    assert list(results["checkpoints"]) == [*models, "BM25", "BM25 + contextual", "BM25 + merged"]
    for name in [*models, "BM25 + contextual", "BM25 + merged"]:
        for benchmark in ("functions", "contextual", "contextual_alone"):
            for precision in ("float32", "int8", "binary"):
                figures = results["checkpoints"][name][benchmark][precision]
                assert 0 <= figures["ndcg@10"] <= 1 and 0 <= figures["recall@10"] <= 1
    assert set(results["seconds"]) >= {"prepare", "diffusion", "pair", "contextual", "mine", "triplet", "merge"}
    assert results["commit"] and results["versions"]["jax"]


def test_kept_rankings_score_what_the_table_says(workdir):
    run = pipeline.Run(config.load(CONFIG), workdir)
    figures = json.loads((workdir / "results.json").read_text())["checkpoints"]["contextual"]
    for benchmark, (data, _) in pipeline.benchmarks(run).items():
        rankings = np.load(run.ranking("contextual", benchmark))
        assert {p: retrieval.score(rankings[p], data) for p in rankings} == figures[benchmark]


def test_report_shows_the_table_and_its_plots_exist(workdir):
    text = (workdir / "report.md").read_text()
    for part in ("BM25 + merged", "plots/loss.png", "plots/ndcg.png", "ELBO", "slerp ratio"):
        assert part in text
    for plot in ("loss", "ndcg", "slerp"):
        assert (workdir / "plots" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_stage_changes_the_model_it_starts_from_and_logs_each_step(workdir):
    run = pipeline.Run(config.load(CONFIG), workdir)
    for name, stage in run.config.stages.items():
        before, after = run.params(stage.init or "random init"), run.params(name)
        assert not np.array_equal(before["embedding"], after["embedding"])
        rows = read_metrics(workdir / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert all(np.isfinite(row["loss"]) and 0 < row["fill"] <= 1 for row in rows)


def test_a_stage_starts_from_a_converted_causal_checkpoint_with_its_own_tokenizer(tmp_path, capsys):
    untied = transformer.make_config("micro", 640, tied=False)
    tokenizer = tokenizers.load(small.write_bpe(tmp_path, small.sentences(100)))
    source = huggingface.write(
        tmp_path / "source", small.random_params(untied), untied, tokenizer, layout="pplx", card="", provenance={},
        embedding={"matryoshka": [], "separator": False, "max_length": None},
    )  # fmt: skip
    small.edit_config(source, model_type="qwen3")
    small.make_causal(source, small.random_params(untied))
    converted = tmp_path / "converted"
    assert cli.main(["convert", str(source), str(converted)]) == 0
    run = [f"--config={CONFIG},stage=diffusion", f"--workdir={tmp_path / 'run'}"]
    run += [f"--config.data.tokenizer={converted / 'tokenizer'}", f"--config.stages.diffusion.init={converted}"]
    run += ["--config.model.rope_theta=1e6"]
    capsys.readouterr()
    wrong = [*run, "--config.model.vocab_size=700"]
    assert cli.main(["prepare", *wrong]) == 2 and not (tmp_path / "run").exists()  # before anything is written
    said = capsys.readouterr().err
    assert "config.model.vocab_size is 700, the checkpoint's 640; config.model.tied is True" in said
    run += ["--config.model.vocab_size=640", "--config.model.tied=False"]
    assert cli.main(["prepare", *run]) == 0 and cli.main(["train", *run]) == 0
    assert cli.main(["export", *run, f"--checkpoint={converted}", f"--output={tmp_path / 'x'}"]) == 2
    assert "must be one of contextual, diffusion, pair, triplet, merged" in capsys.readouterr().err
    trained = pipeline.Run(config.load(run[0].removeprefix("--config="), run[2:]), tmp_path / "run")
    after, before = trained.params("diffusion"), small.random_params(untied)
    assert trained.left_shift  # its source was causal
    change = np.abs(np.asarray(after["head"]) - before["head"])
    assert 0 < change.max() < 0.02  # two steps away from what was converted


def test_training_the_triplet_stage_by_itself_mines_its_negatives_once(workdir, tmp_path):
    run = pipeline.Run(config.load(CONFIG), tmp_path / "run")
    shutil.copytree(workdir / "data", run.data, ignore=shutil.ignore_patterns("tfds"))
    shutil.rmtree(run.data / "tasks" / "triplet")
    (run.workdir / "pair").symlink_to(workdir / "pair")
    assert pipeline.train_stage(run, "triplet") == {"steps": 2}
    info = run.data / "tasks" / "triplet" / "info.json"
    before = info.stat().st_mtime_ns
    assert pipeline.mine(run) == json.loads((workdir / "steps" / "mine.json").read_text())["result"]
    assert info.stat().st_mtime_ns == before


def test_a_complete_pipeline_is_not_run_again(workdir):
    before = {path: path.stat().st_mtime_ns for path in (workdir / "steps").iterdir()}
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={workdir}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (workdir / "steps").iterdir()} == before


def test_the_export_searches_a_corpus_file(workdir, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    texts = ["def add(a, b): return a + b", "def open_file(path): return open(path)", "class Tree: pass"]
    corpus.write_text("".join(json.dumps({"_id": f"t{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    for precision in ("float32", "int8", "binary", "ubinary"):
        arguments = ["search", f"--model={workdir}/export/embed", f"--corpus={corpus}", f"--query={texts[1]}"]
        assert cli.main([*arguments, f"--precision={precision}"]) == 0
        shown = capsys.readouterr().out
        assert shown.index("t1") < min(shown.index("t0"), shown.index("t2")), shown


def test_merging_two_exports_gives_the_pipelines_merged_model(workdir, tmp_path):
    run = pipeline.Run(config.load(CONFIG), workdir)
    for name in ("contextual", "triplet"):
        pipeline.export_model(run, name, tmp_path / name)
    arguments = [f"--a={tmp_path}/contextual", f"--b={tmp_path}/triplet", "--ratio=0.8", f"--output={tmp_path}/merged"]
    assert cli.main(["merge", *arguments]) == 0
    from embed import inference

    texts = ["read a file", "a tree of arrays"]
    ours = inference.load(tmp_path / "merged").encode(texts)
    np.testing.assert_allclose(ours, inference.load(workdir / "export" / "embed").encode(texts), atol=1e-6)


def test_sample_fills_every_mask(workdir, capsys):
    arguments = [f"--config={CONFIG}", f"--workdir={workdir}", "--text=def <mask> ( <mask> ) :"]
    assert cli.main(["sample", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("_") for line in lines] == [2, 1, 0]


@pytest.mark.parametrize("name", ["quickstart.ipynb"])
def test_the_colab_runs_from_top_to_bottom_and_is_stored_without_outputs(name, workdir, monkeypatch):
    assert name in os.listdir(ROOT / "colabs")
    notebook = nbformat.read(ROOT / "colabs" / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    monkeypatch.setenv("EMBED_MODEL", str(workdir / "export" / "embed"))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds and "display_data" in kinds


# --- bad input: one sentence, exit code 2 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["pipeline", f"--config={CONFIG}", "--config.seeed=1", "--workdir={workdir}"],
            "unknown config key 'seeed'; did you mean 'seed'?",
        ),
        (
            ["pipeline", f"--config={CONFIG}", "--config.seed=1", "--workdir={workdir}"],
            "was made by another config (seed: 0, 1 now)",
        ),
        (["pipeline", "--config=configs/none.py", "--workdir={workdir}"], "no config file at configs/none.py"),
        (
            ["train", f"--config={CONFIG},stage=triple", "--workdir={workdir}"],
            "config.stage='triple' must be one of contextual, diffusion, pair, triplet",
        ),
        (["evaluate", "--model={workdir}/nowhere", "--data={workdir}/data/evaluation/functions/test"], "nowhere"),
        (["search", "--model={workdir}/export/embed", "--corpus={workdir}/empty.jsonl", "--query=x"], "empty.jsonl"),
        (["search", "--model={workdir}/export/embed", "--corpus={workdir}/none.jsonl", "--query=x"], "none.jsonl"),
        (["trane"], "'trane' is not a verb; there are"),
        (
            ["merge", "--a={workdir}/export/embed", "--b={workdir}/bare", "--output={workdir}/never"],
            "they embed differently",
        ),
        (
            ["encode", "--model={workdir}/export/embed", "--text=x", "--output={workdir}/nowhere/x.npy"],
            "must be a file in a folder that exists",
        ),
        (
            ["train", f"--config={CONFIG},stage=pair", "--workdir={workdir}", "--process_id=1"],
            "--coordinator and --process_id need --num_processes",
        ),
        (["pipeline", f"--config={CONFIG}", "--workdir=gs://bucket/run"], "gs://bucket/run is a URL"),
        (
            ["pipeline", f"--config={CONFIG}", "--config.data.gin_file=none.gin", "--workdir={workdir}"],
            "no gin file none.gin",
        ),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_exit_code_2(workdir, arguments, sentence, capsys):
    (workdir / "empty.jsonl").write_text("")
    if not (workdir / "bare").exists():
        shutil.copytree(workdir / "export" / "embed", workdir / "bare")
        settings = json.loads((workdir / "bare" / "config.json").read_text())
        settings["embedding"]["separator"] = False
        (workdir / "bare" / "config.json").write_text(json.dumps(settings))
    assert cli.main([a.replace("{workdir}", str(workdir)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_a_workdir_of_another_gin_file_is_refused(workdir, tmp_path, capsys):
    changed = tmp_path / "python_docs.gin"
    changed.write_text((ROOT / "configs/data/python_docs.gin").read_text() + "\ntext.max_characters = 1000\n")
    run = config.load(CONFIG, [f"--config.data.gin_file={changed}"])
    assert pipeline.resolve(run)["data"]["gin_digest"] != pipeline.resolve(config.load(CONFIG))["data"]["gin_digest"]
    assert (
        cli.main(["pipeline", f"--config={CONFIG}", f"--config.data.gin_file={changed}", f"--workdir={workdir}"]) == 2
    )
    assert "was made by another config (data.gin_digest" in capsys.readouterr().err


def test_preparing_without_its_libraries_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "seqio", None)
    assert cli.main(["prepare", f"--config={CONFIG}", f"--workdir={tmp_path}/run"]) == 2
    assert "preparing data needs seqio: pip install -e '.[data]'" in capsys.readouterr().err


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert pipeline.provenance()["commit"] == "unknown"


def test_unused_and_unknown_gin_bindings_are_refused_by_name(tmp_path, capsys):
    for binding, sentence in (
        ("vocabulary.charcters = 5", "'vocabulary.charcters'; the nearest valid one is 'vocabulary.characters'"),
        ("some_scope/vocabulary.characters = 5", "'some_scope/vocabulary.characters' is used by nothing"),
    ):
        workdir = tmp_path / str(len(binding))
        arguments = [
            "prepare",
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            f"--config.data.gin_bindings=({binding!r},)",
        ]
        assert cli.main(arguments) == 2
        assert sentence in capsys.readouterr().err


# --- processes: killed, and several ---------------------------------------------------------------------------------

STEPS = "--config.stages.diffusion.curriculum=((9, 'diffusion'),)"
SAVING = "--config.stages.diffusion.checkpoint_every=4"

# Trains as `embed train` does, without TensorFlow, and dies by SIGKILL before batch KILL_AT.
KILLED = textwrap.dedent(
    """
    import os, signal, sys
    for name in ("tensorflow", "tensorflow_datasets", "seqio", "gin"):
        sys.modules[name] = None
    from embed import cli
    from embed.data import loader
    batch = loader.DiffusionLoader.batch
    def mortal(self, step):
        if step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)
    loader.DiffusionLoader.batch = mortal
    sys.exit(cli.main(sys.argv[1:]))
    """
)


def _train(folder, *arguments, stage="diffusion", kill_at=-1, command=None):
    command = command or [sys.executable, "-c", KILLED, "train"]
    arguments = [f"--config={CONFIG},stage={stage}", f"--workdir={folder}", STEPS, SAVING, *arguments]
    environment = {**ENVIRONMENT, "KILL_AT": str(kill_at)}
    return subprocess.run([*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


def _reconfigure(folder):
    """Let the workdir be that of a config with more diffusion steps."""
    pipeline.write_json(folder / "config.json", pipeline.resolve(config.load(CONFIG, [STEPS, SAVING])))


def _losses(folder, stage="diffusion"):
    return {row["step"]: row["loss"] for row in read_metrics(folder / stage / "metrics.jsonl")}


def test_kill_9_in_mid_stage_then_the_same_command_gives_the_losses_of_an_unbroken_run(prepared, tmp_path):
    _reconfigure(prepared)
    unbroken = tmp_path / "unbroken"
    shutil.copytree(prepared, unbroken, symlinks=True)
    done = _train(unbroken)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _train(prepared, kill_at=8).returncode == -9
    assert len(_losses(prepared)) < 9
    again = _train(prepared)
    assert again.returncode == 0, again.stderr[-2000:]
    assert _losses(prepared) == _losses(unbroken)
    assert sorted(_losses(prepared)) == list(range(1, 10))


def test_two_local_processes_train_the_losses_of_one(prepared, tmp_path):
    _reconfigure(prepared)
    two = tmp_path / "two"
    shutil.copytree(prepared, two, symlinks=True)
    done = _train(prepared)
    assert done.returncode == 0, done.stderr[-2000:]
    embed = tmp_path / "embed"
    embed.write_text(f'#!/bin/sh\nexec {sys.executable} -m embed.cli "$@"\n')
    embed.chmod(0o755)
    # The second stage starts from the checkpoint of the first.
    for stage in ("diffusion", "pair"):
        launched = _train(two, stage=stage, command=["env", f"EMBED={embed}", "bash", "launch/local.sh", "2", "--", "train"])
        assert launched.returncode == 0, launched.stdout[-2000:] + launched.stderr[-2000:]
    done = _train(prepared, stage="pair")
    assert done.returncode == 0, done.stderr[-2000:]
    one_losses, two_losses = _losses(prepared), _losses(two)
    assert sorted(two_losses) == sorted(one_losses) == list(range(1, 10))
    np.testing.assert_allclose([two_losses[s] for s in range(1, 10)], [one_losses[s] for s in range(1, 10)], rtol=1e-5)
    # Sums in another order may round an embedding to the next of int8's levels.
    pairs = [list(_losses(folder, "pair").values()) for folder in (two, prepared)]
    np.testing.assert_allclose(*pairs, rtol=2e-3)
