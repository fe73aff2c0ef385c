"""All commands of a user, on tiny models."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jax.experimental.compilation_cache import compilation_cache

import colabs
from embed import cli, config, distributed, exports, graph, inference, nodes, runs, tokenizers
from embed.checkpoints import training_state
from embed.data.curriculum import Curriculum
from embed.data.loader import COLUMNS
from embed.data.store import Store, Writer
from embed.evaluation import needles, retrieval
from embed.evaluation.sets import read_set
from embed.models import transformer
from embed.training import stages
from embed.training.metrics import read_metrics

CONFIG = "configs/quickstart.py:runlocal"
ROOT = Path(__file__).parent.parent
MIXTURES = (("diffusion", "diffusion"), ("pair", "pairs"), ("contextual", "contextual"))
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A complete run of the pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def shared(workdir):
    """The override that makes a run read the data of `workdir`."""
    return f"--config.data.directory={workdir / 'data'}"


def make_run(workdir, *overrides, path=CONFIG):
    return runs.Run(config.load(path, overrides), workdir)


def said(capsys):
    """The only sentence on stderr."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("embed: ")]
    assert len(lines) == 1, error
    return lines[0]


# --- the pipeline ----------------------------------------------------------------------------------------------------


# The fixture `workdir` trains quickstart.py, the next test distill.py.
@pytest.mark.parametrize(
    "path", sorted({path.name for path in (ROOT / "configs").glob("*.py")} - {"base.py", "distill.py", "quickstart.py"})
)
def test_every_shipped_config_trains_each_stage_when_shrunk_by_runlocal(path, shared, tmp_path):
    run = make_run(tmp_path / "run", shared, path=f"configs/{path}:runlocal")
    if run.config.data.gin_file != config.load(CONFIG).data.gin_file:  # it reads pairs
        write_lines(tmp_path / "test.jsonl", pairs_of_pages())
        run = make_run(tmp_path / "run", f"--config.data.root={tmp_path}", path=f"configs/{path}:runlocal")
        nodes.prepare(run)
    for name in graph.order(run.config):
        trained = nodes.train_stage(run, name)
        assert trained["steps"] == 2 and trained["flops"] > 0
        assert all(np.isfinite(row["loss"]) for row in read_metrics(run.folder(name) / "metrics.jsonl"))
    folder = run.workdir / "mining"
    mined = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.exists() else set()
    assert mined == set(run.config.mining)


def pairs_of_pages():
    """Pairs of this project's pages: the first words of a paragraph and the paragraph."""
    paragraphs = [p for page in (ROOT / "docs").glob("*.md") for p in page.read_text().split("\n\n")]
    return [{"query": " ".join(p.split()[:4]), "document": p} for p in paragraphs if len(p) > 40]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_student_learns_from_the_vectors_that_encode_wrote_and_is_compared_with_its_teacher(tmp_path):
    """The commands of docs/distill.md."""
    rows, data, run = pairs_of_pages(), tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_lines(data / "test.jsonl", rows[:20])
    write_lines(data / "train.jsonl", rows[20:])
    write_lines(tmp_path / "texts.jsonl", ({"_id": f"{i}", "text": x["document"]} for i, x in enumerate(rows[20:])))
    teacher = small.write_model(tmp_path / "teacher")
    command = ["encode", f"--model={teacher}", f"--corpus={tmp_path / 'texts.jsonl'}", "--truncate"]
    assert cli.main([*command, f"--output={data / 'vectors.parquet'}"]) == 0
    path = f"configs/distill.py:runlocal,teacher={teacher},compare"
    assert config.load(path).stages.distill.teacher_dimensions == 32
    assert cli.main(["pipeline", f"--config={path}", f"--data_root={data}", f"--workdir={run}"]) == 0
    results = json.loads((run / "results.json").read_text())["checkpoints"]
    assert list(results) == ["random init", str(teacher), "distill", "pair", "BM25"]
    form, data = retrieval.Form("int8"), read_set(run / "data/evaluation/pairs/test")
    want = retrieval.evaluate_retrieval(inference.load(teacher), data, [form], alone=True)[form]
    assert results[str(teacher)]["pairs"]["int8"]["ndcg@10"] == pytest.approx(want["ndcg@10"], abs=1e-6)
    assert results["distill"] != results["random init"]


EVALUATIONS = """
    entry = dict(data="set/test", alone=True, checkpoints=("pair",), bm25=False)
    config.evaluations.stretched = base.evaluation(**entry, rope_theta=1e7)
    config.evaluations.prefix = base.evaluation(**entry, truncate_dim=8)
    config.evaluations.needles = base.evaluation(**entry, needle_tokens=60)
    return config
"""


def test_an_evaluation_may_stretch_positions_cut_vectors_or_hide_needles(small_graph, tmp_path):
    _, data = small_graph
    (tmp_path / "graph.py").write_text(small.GRAPH.replace("    return config\n", EVALUATIONS.lstrip("\n")))
    loaded = config.load(f"{tmp_path}/graph.py", [data, "--config.stages.pair.init="])
    run = runs.Run(loaded, tmp_path / "run")
    nodes.train_stage(run, "pair")
    nodes.evaluate(run, "pair")
    encoder, plain = run.encoder(run.checkpoint("pair")), nodes.evaluation_set(run, "set/test")
    needle = needles.hide(plain, 60, encoder.tokenizer)
    assert len(needle.queries) == 5 and len(needle.corpus) == 5
    form = retrieval.Form("float32")
    for name, used, texts, forms in (
        ("words", encoder, plain, form),
        ("stretched", encoder.with_rope_theta(1e7), plain, form),
        ("prefix", encoder, plain, retrieval.Form("float32", 8)),
        ("needles", encoder, needle, form),
    ):
        with np.load(nodes.ranking(run, "pair", name)) as kept:
            (want,) = retrieval.rank(used, texts, [forms], alone=True).values()
            np.testing.assert_array_equal(kept["float32"], want, err_msg=name)
            rankings = kept["float32"]
        if name == "words":
            first = rankings
        else:
            assert rankings.shape != first.shape or (rankings != first).any(), name


def test_the_planner_has_the_arrays_of_every_stage(workdir):
    run = make_run(workdir)
    for name, stage in run.config.stages.items():
        stores = {task: run.store(task) for _, rates in run.phases(name) for task in rates}
        separator = run.tokenizer.separator_id
        batch = stages.make_loader(stage, stores, run.phases(name), seed=0, separator_id=separator).batch(0)
        batch.pop("stats")
        assert stages.abstract_batch(stage) == {k: (v.shape, v.dtype.type) for k, v in batch.items()}


def test_results_have_every_row_set_and_precision(workdir):
    results = json.loads((workdir / "results.json").read_text())
    models = ["random init", "diffusion", "pair", "contextual", "triplet", "merged"]
    assert list(results["checkpoints"]) == [*models, "BM25", "BM25 + contextual", "BM25 + merged"]
    for name in [*models, "BM25 + contextual", "BM25 + merged"]:
        for benchmark in ("functions", "contextual", "contextual_alone"):
            for precision in ("float32", "int8", "binary"):
                figures = results["checkpoints"][name][benchmark][precision]
                assert 0 <= figures["ndcg@10"] <= 1 and 0 <= figures["recall@10"] <= 1
    parts = {"prepare", "stage diffusion", "stage pair", "stage contextual", "mine hard_negatives", "stage triplet"}
    assert set(results["seconds"]) >= parts | {"merge merged"}
    assert set(results["seconds_per_step"]) == {f"stage {name}" for name in results["stages"]}
    assert results["commit"] and results["versions"]["jax"]
    assert re.search(r"\d CPU cores, .*, [1-9]\d* GFLOP/s in a 2048³ float32 product", results["machine"])


def test_an_evaluation_finds_what_its_set_encoded_by_itself_does(workdir):
    run = make_run(workdir)
    encoder = run.encoder(run.checkpoint("contextual"))
    for name, evaluation in run.config.evaluations.items():
        forms = [retrieval.Form(precision) for precision in retrieval.PRECISIONS]
        alone = retrieval.rank(encoder, nodes.evaluation_set(run, evaluation.data), forms, alone=evaluation.alone)
        with np.load(nodes.ranking(run, "contextual", name)) as kept:
            for form, ranking in alone.items():
                np.testing.assert_array_equal(kept[form.precision], ranking)
        record = json.loads(nodes.record_file(run, "contextual", name).read_text())
        assert record["values"]["int8"]["ndcg@10"] == pytest.approx(
            np.mean(record["queries"]["values"]["int8"]), abs=1e-6
        )


def test_saved_rankings_have_the_scores_of_the_table(workdir):
    run = make_run(workdir)
    figures = json.loads((workdir / "results.json").read_text())["checkpoints"]["contextual"]
    for name, evaluation in run.config.evaluations.items():
        data, rankings = nodes.evaluation_set(run, evaluation.data), np.load(nodes.ranking(run, "contextual", name))
        assert {p: retrieval.score(rankings[p], data) for p in rankings} == figures[name]


def test_checkpoints_whose_names_differ_have_different_rankings_and_records(workdir):
    run = make_run(workdir)
    names = ("random init", "random_init", "a/b", "a_b", "/a/b", "../../prepare", "..")
    for file in (lambda name: nodes.ranking(run, name, "functions"), lambda name: run.record(f"evaluate {name}")):
        files = {Path(os.path.normpath(file(name))) for name in names}
        assert len(files) == len(names) and len({each.parent for each in files}) == 1


def test_every_node_has_a_name_of_its_own_which_other_nodes_do_not_change():
    loaded = config.load(CONFIG)
    before = [node.name for node in graph.make_nodes(loaded)]
    with loaded.unlocked():
        for part, stage in (("stages", "diffusion"), ("mining", "hard_negatives"), ("merges", "merged")):
            for kind in ("prepare", "mine", "denoise", "merge", "baselines", "search", "evaluate merged"):
                entry = loaded[part][stage].copy_and_resolve_references()
                loaded[part][kind if part == "stages" else f"{part} {kind}"] = entry
        loaded.stages.prepare.curriculum = tuple((1, name) for name in loaded.mining)
    after = [node.name for node in graph.make_nodes(loaded)]
    assert len(set(after)) == len(after) > len(before) + 15 and set(before) < set(after)


def test_a_node_whose_result_is_gone_is_not_complete(workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("data"), symlinks=True)
    run = make_run(copy, f"--config.data.directory={workdir / 'data'}")

    def incomplete():
        all_nodes = list(graph.make_nodes(run.config))[1:]  # without "prepare", which would prepare
        return [n.name for n in all_nodes if not graph.is_done(run, n)]

    assert incomplete() == []
    shutil.rmtree(copy / "export" / "embed")
    shutil.rmtree(copy / "rankings" / "functions")
    assert incomplete() == [n.name for n in graph.make_nodes(run.config) if n.kind in ("evaluate", "export")]
    shutil.rmtree(copy / "mining")
    (mine,) = (n for n in graph.make_nodes(run.config) if n.kind == "mine")
    assert not graph.is_done(run, mine)


def test_report_shows_the_table_and_its_plots_exist(workdir):
    text = (workdir / "report.md").read_text()
    for part in (
        "BM25 + merged",
        "plots/loss.png",
        "plots/ndcg.png",
        "ELBO",
        "ratio of merged (slerp)",
        "each chunk encoded by itself",
    ):
        assert part in text
    for plot in ("loss", "ndcg", "merge"):
        assert (workdir / "plots" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_stage_changes_the_model_it_starts_from_and_logs_each_step(workdir):
    run = make_run(workdir)
    for name, stage in run.config.stages.items():
        before, after = run.checkpoint(stage.init).params(), run.checkpoint(name).params()
        assert not np.array_equal(before["embedding"], after["embedding"])
        rows = read_metrics(workdir / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert all(np.isfinite(row["loss"]) and 0 < row["fill"] <= 1 for row in rows)


def test_a_finished_stage_keeps_its_parameters_and_tokenizer_and_names_its_parent(workdir):
    run = make_run(workdir)
    for name in run.config.stages:
        assert training_state.steps(workdir / name / "checkpoints") == [2]
        assert not (workdir / name / "checkpoints" / "2" / "optimizer").exists()
        assert tokenizers.load(workdir / name / "tokenizer").digest == run.tokenizer.digest
    pair = run.checkpoint("pair").identity
    assert pair["step"] == 2 and pair["folder"] == str(workdir / "pair")
    for name in ("contextual", "triplet"):
        for file in ("config.json", "run.json"):
            assert json.loads((workdir / name / file).read_text())["parent"] == pair


def test_a_complete_pipeline_is_not_run_again_and_prints_where_its_results_are(workdir, capsys):
    before = {path: path.stat().st_mtime_ns for path in (workdir / "steps").iterdir()}
    results = (workdir / "results.json").read_text()
    (workdir / "results.json").write_text(json.dumps(json.loads(results) | {"machine": "the one that computed them"}))
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={workdir}"]) == 0
    assert json.loads((workdir / "results.json").read_text())["machine"] == "the one that computed them"
    (workdir / "results.json").write_text(results)
    assert {path: path.stat().st_mtime_ns for path in (workdir / "steps").iterdir()} == before
    said = capsys.readouterr().out.splitlines()
    names = [node.name for node in graph.make_nodes(config.load(CONFIG))]
    assert [line.partition(" is complete: ")[0] for line in said if " is complete: " in line] == names
    for line in (
        f"prepare is complete: {workdir / 'data'}",
        f"stage pair is complete: {workdir / 'pair'}",
        f"evaluate merged is complete: {workdir / 'steps' / 'evaluate merged.json'}",
    ):
        assert line in said
    # Nothing is cut off if the output is not a terminal.
    assert not any("…" in line for line in said)
    hits = json.loads((workdir / "results.json").read_text())["search"]["hits"]
    for line, hit in zip(said[-1 - len(hits) : -1], hits):
        assert line.rstrip().endswith(f"{hit['id']}  {hit['text']}".rstrip())


def test_only_a_node_whose_inputs_changed_is_done_again(workdir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("data"), symlinks=True)
    (copy / "data").symlink_to(workdir / "data")
    steps = copy / "steps"
    before = {path.name: path.stat().st_mtime_ns for path in steps.iterdir()}
    # Moving a run changes no inputs; another ratio of a merge changes its checkpoint.
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={copy}", "--config.merges.merged.ratio=0.4"]) == 0
    changed = {path.name for path in steps.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {
        f"{name}.json" for name in ("merge merged", "evaluate merged", "baselines", "export", "search embed")
    }
    assert json.loads((copy / "results.json").read_text())["merges"]["merged"]["ratio"] == 0.4
    said = capsys.readouterr().out.splitlines()
    assert f"merge merged again, since merge.ratio changed: replaces {steps / 'merge merged.json'}" in said
    (line,) = (line for line in said if line.startswith("export again, since "))
    assert "changed: replaces " in line
    assert line.endswith(f"{copy / 'export' / 'embed'}, {copy / 'export' / 'embed-context'}")
    # The record of the node is lost, but its exports exist.
    (steps / "export.json").unlink()
    assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={copy}", "--config.merges.merged.ratio=0.4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"export: replaces {copy / 'export' / 'embed'}, {copy / 'export' / 'embed-context'}" in said


A_COMPLETE_STAGE = """
import sys
from embed import cli
assert cli.main(sys.argv[1:]) == 0
late = {"tensorboardX", "matplotlib.pyplot", "tensorflow", "torch", "wandb"} & sys.modules.keys()
assert not late, late
"""


def test_a_complete_stage_says_so_without_importing_what_only_training_needs(
    tmp_path,
):
    (tmp_path / "graph.py").write_text(small.GRAPH)
    small.write_data(tmp_path / "data")
    run = [
        f"--config={tmp_path}/graph.py:diffusion",
        f"--workdir={tmp_path}/run",
        f"--config.data.directory={tmp_path}/data",
    ]
    folder = tmp_path / "run" / "diffusion"
    options = dict(env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    first = subprocess.run([sys.executable, "-m", "embed.cli", "train", *run], **options)
    assert first.returncode == 0 and not first.stderr  # no messages of libraries
    assert all(line.startswith("diffusion  step ") for line in first.stdout.splitlines())
    done = subprocess.run([sys.executable, "-c", A_COMPLETE_STAGE, "train", *run], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"diffusion is complete: {folder}, step 6"] and not done.stderr


def test_a_relative_gin_file_is_found_beside_the_config_from_any_working_directory(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "graph.py").write_text(small.GRAPH)
    (mine / "data" / "mine.gin").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for found in (f"{mine}/graph.py:stage=x", "../mine/graph.py"):
        assert config.find("data/mine.gin", found) == mine / "data" / "mine.gin"
        assert config.find("mine/data/mine.gin", found) == mine / "data" / "mine.gin"  # from the folder above
        assert config.find("configs/data/python_docs.gin", found) == ROOT / "configs/data/python_docs.gin"
    (tmp_path / "here" / "data").mkdir()
    (tmp_path / "here" / "data" / "mine.gin").write_text("")
    assert config.find("data/mine.gin", str(mine / "graph.py")) == tmp_path / "here" / "data" / "mine.gin"
    with pytest.raises(
        FileNotFoundError,
        match="no file none.gin; searched in .*here, the folder of the config or one above it, .*configs",
    ):
        config.find("none.gin", str(mine / "graph.py"))
    run = runs.Run(
        config.load(str(mine / "graph.py"), ["--config.data.gin_file=data/nowhere.gin"]), tmp_path / "run", "x.py"
    )
    with pytest.raises(FileNotFoundError, match="no file data/nowhere.gin"):
        nodes.prepare(run)


def test_the_export_searches_a_corpus_file(workdir, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    texts = ["def add(a, b): return a + b", "def open_file(path): return open(path)", "class Tree: pass"]
    corpus.write_text("".join(json.dumps({"_id": f"t{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    for precision in ("float32", "int8", "binary", "ubinary"):
        arguments = ["search", f"--model={workdir}/export/embed", f"--corpus={corpus}", f"--query={texts[1]}"]
        assert cli.main([*arguments, f"--precision={precision}"]) == 0
        shown = capsys.readouterr().out
        assert shown.index("t1") < min(shown.index("t0"), shown.index("t2")), shown


def test_merging_two_exports_or_two_stage_folders_gives_the_pipelines_merged_model(workdir, tmp_path):
    run, texts = make_run(workdir), ["read a file", "a tree of arrays"]
    want = inference.load(workdir / "export" / "embed").encode(texts)
    for name in ("contextual", "triplet"):
        exports.export_model(run, name, tmp_path / name)
    for source in (tmp_path, workdir):
        output = tmp_path / f"merged of {source.name}"
        arguments = [f"--a={source}/contextual", f"--b={source}/triplet", "--ratio=0.8", f"--output={output}"]
        assert cli.main(["merge", *arguments]) == 0
        np.testing.assert_allclose(inference.load(output).encode(texts), want, atol=1e-6)


def test_cards_list_the_stages_with_their_parents_and_the_merge(workdir):
    card = (workdir / "export" / "embed" / "README.md").read_text()
    step = json.loads((workdir / "contextual" / "config.json").read_text())["parent"]
    assert "0.8 of the way from contextual to triplet" in card
    for part in ("| diffusion |", "| pair |", "| contextual |", "| triplet |", step["digest"], "random init"):
        assert part in card, part
    alone = (workdir / "export" / "embed-context" / "README.md").read_text()
    assert "# Contextual text embeddings" in alone and "| triplet |" not in alone


def test_sample_fills_every_mask(workdir, capsys):
    arguments = [f"--config={CONFIG}", f"--workdir={workdir}", "--text=def <mask> ( <mask> ) :"]
    assert cli.main(["sample", *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\s*\d ", line)]
    assert [line.count("_") for line in lines] == [2, 1, 0]


def test_sample_refuses_checkpoints_that_predict_nothing_and_other_tokenizers(workdir, tmp_path, capsys):
    shutil.copytree(workdir / "diffusion", tmp_path / "other")
    identity = json.loads((tmp_path / "other" / "config.json").read_text())
    identity["tokenizer"]["digest"] = "0123"
    (tmp_path / "other" / "config.json").write_text(json.dumps(identity))
    only = "only a diffusion stage predicts masked tokens"
    refused = dict.fromkeys(("random init", "pair", "merged", f"{workdir}/pair", f"{workdir}/export/embed"), only)
    for name, reason in (refused | {f"{tmp_path}/other": "the run's tokenizer has digest "}).items():
        arguments = [f"--config={CONFIG}", f"--workdir={workdir}", "--text=a <mask>", f"--checkpoint={name}"]
        assert cli.main(["sample", *arguments]) == 2
        assert f"--checkpoint={name} cannot fill in a text: {reason}" in said(capsys)


def test_texts_shorter_than_a_row_show_how_a_stage_denoises(workdir, tmp_path):
    data = tmp_path / "data"
    small.write_data(data, tokenizers.load(workdir / "data" / "tokenizer"))
    run = make_run(workdir, f"--config.data.directory={data}", "--config.report.texts=set/test")
    corpus = data / "evaluation" / "set" / "test" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]

    def write(text):
        corpus.write_text(
            "".join(json.dumps(row | {"text": text if i == 0 else ""}) + "\n" for i, row in enumerate(rows))
        )

    write("parse the file of a token")
    assert len(run.tokenizer.encode(["parse the file of a token"])[0]) < run.config.stages.diffusion.batch.length
    result = nodes.denoising(run, "diffusion")
    assert np.isfinite(result["elbo"]) and result["denoising"][0]["text"]
    write("def")
    with pytest.raises(ValueError, match="config.report.texts='set/test' has 1 tokens: at least 2 are needed"):
        nodes.denoising(run, "diffusion")


# 5_evaluate.ipynb needs mteb: tests/peers/test_mteb.py.
@pytest.mark.parametrize("name", ["1_quickstart", "2_train_your_own", "3_ablation", "4_bits_and_dimensions"])
def test_a_colab_runs_from_top_to_bottom(name, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "runs" / "quickstart")  # what is complete is not done again
    shutil.copytree(workdir / "data", tmp_path / "runs" / "quantization" / "data")
    outputs = colabs.execute(ROOT / "colabs" / f"{name}.ipynb", tmp_path)
    assert any(output.output_type == "display_data" for output in outputs)  # a plot


# --- other graphs ----------------------------------------------------------------------------------------------------

GRAPH = """
from configs import base
from embed.models.transformer import SIZES

def get_config(arg=""):
    config = base.get_config()
    config.stage = arg.removeprefix("stage=")
    config.model.update(SIZES["micro"])
    config.model.update(rope_theta=1e4, dtype="float32")
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none")
    # No diffusion; two pair stages in sequence; a triplet stage with two mined tasks before a contextual one.
    config.stages.first = base.stage("pair", curriculum=((2, "pairs"),))
    config.stages.second = base.stage("pair", init="first", curriculum=((1, "summaries"), (1, "pairs")))
    for name in ("summaries", "classes"):
        config.mining[f"hard_{name}"] = base.mining(checkpoint="second", tasks=(f"python_docs.{name}",), queries=20)
    config.mining.hard_classes.update(rank_window=(1, 40), precision="float32")
    mined = {"hard_summaries": 0.75, "hard_classes": 0.25}
    config.stages.hard = base.stage("triplet", init="second", curriculum=((2, mined),))
    config.stages.chunks = base.stage("contextual", init="hard", curriculum=((2, "contextual"),))
    base.shrink(config)
    config.stages.second.curriculum = ((1, "summaries"), (1, "pairs"))
    config.merges.between = base.merge(of=("second", "chunks"), ratio=0.25)
    config.exports.product = base.export(checkpoint="between", max_length=0)
    ranked = ("second", "between")
    config.evaluations.held_out = base.evaluation(data="functions/test", alone=True, checkpoints=ranked, bm25=False)
    return config
"""


@pytest.fixture(scope="session")
def own_graph(workdir, tmp_path_factory):
    """(config file, workdir) of a complete run of GRAPH, on the data of `workdir`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(GRAPH)
    arguments = [
        f"--config={folder / 'own.py'}",
        f"--workdir={folder / 'run'}",
        f"--config.data.directory={workdir / 'data'}",
    ]
    assert cli.main(["pipeline", *arguments]) == 0
    return folder / "own.py", folder / "run"


def test_another_graph_runs_in_the_order_of_its_parents(own_graph):
    file, folder = own_graph
    results = json.loads((folder / "results.json").read_text())
    assert graph.order(config.load(str(file))) == ["first", "second", "hard", "chunks"]
    assert list(results["checkpoints"]) == ["second", "between"] and not (folder / "data").exists()
    parents = {
        n: json.loads((folder / n / "config.json").read_text())["parent"] for n in ("first", "second", "hard", "chunks")
    }
    assert parents["first"] == {"random init": 0}
    assert [Path(parents[n]["folder"]).name for n in ("second", "hard", "chunks")] == ["first", "second", "hard"]
    assert inference.load(folder / "export" / "product").encode(["a text"]).shape == (1, 32)


def test_each_mined_task_has_its_own_window_size_and_precision_and_the_stage_draws_by_rate(own_graph, workdir):
    file, folder = own_graph
    run = make_run(folder, f"--config.data.directory={workdir / 'data'}", path=str(file))
    infos = {name: run.store(name).info for name in run.config.mining}
    assert {name: info["inputs"]["mining"]["precision"] for name, info in infos.items()} == {
        "hard_summaries": "int8",
        "hard_classes": "float32",
    }
    assert infos["hard_classes"]["inputs"]["mining"]["rank_window"] == [1, 40]
    assert all(info["mined"]["queries"] >= 1 for info in infos.values())
    assert all(info["inputs"]["checkpoint"] == run.checkpoint("second").identity for info in infos.values())
    assert run.phases("hard") == [(2, {"hard_summaries": 0.75, "hard_classes": 0.25})]


def test_a_stage_starts_from_a_stage_folder_of_another_run(own_graph, workdir, shared, tmp_path):
    _, other = own_graph
    run = [f"--config={CONFIG},stage=pair", f"--workdir={tmp_path / 'run'}", shared]
    assert cli.main(["train", *run, f"--config.stages.pair.init={other / 'second'}"]) == 0
    parent = json.loads((tmp_path / "run" / "pair" / "config.json").read_text())["parent"]
    assert parent == make_run(other, shared, path=str(other.parent / "own.py")).checkpoint("second").identity
    # The parent may move: its step and digest identify it.
    moved = tmp_path / "moved"
    shutil.copytree(other / "second", moved)
    assert cli.main(["train", *run, f"--config.stages.pair.init={moved}"]) == 0


FROM_THE_HUB = """
import sys
from embed import cli
wrong, right = sys.argv[1:-2], sys.argv[1:]
sys.exit(10 * (cli.main(wrong) != 2) + cli.main(right))
"""


@pytest.mark.parametrize("folder", ["on a disk", "in a bucket"])
def test_the_next_start_of_a_run_loads_the_programs_of_the_first(folder, tmp_path, request):
    workdir = tmp_path / "run" if folder == "on a disk" else f"{request.getfixturevalue('bucket')}/compiled-programs"
    run, hits, of_tests = make_run(workdir), [], jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)

    def hits_of_a_start():
        hits.clear()
        with run.compilation_cache():
            jax.jit(lambda x: jax.numpy.sin(x) * 3)(np.ones(7)).block_until_ready()  # another function at each start
        return len(hits)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert [hits_of_a_start(), hits_of_a_start()] == [0, 1] and list((run.workdir / "compiled").iterdir())
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of the user"))
        assert hits_of_a_start() == 0 and list((tmp_path / "of the user").iterdir())
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "of the user")
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        jax.config.update("jax_compilation_cache_dir", of_tests)
        compilation_cache.reset_cache()


def test_a_stage_starts_from_a_hub_id_with_its_own_tokenizer(tmp_path):
    """In a separate process, because huggingface_hub reads its environment when it is imported."""
    untied = transformer.make_config("micro", 640, tied=False, rope_theta=1e4)
    params = small.random_params(untied)
    tokenizer = tokenizers.load(small.write_bpe(tmp_path, small.sentences(100)))
    source = small.make_causal(small.write_model(tmp_path / "source", params, untied, tokenizer), params)
    cached = tmp_path / "cache" / "models--Qwen--Micro"
    shutil.copytree(source, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    run = tmp_path / "run"
    small.write_data(run / "data", tokenizer)
    (tmp_path / "graph.py").write_text(small.GRAPH)
    arguments = ["train", f"--config={tmp_path / 'graph.py'}:diffusion", f"--workdir={run}"]
    arguments += [
        "--config.stages.diffusion.init=Qwen/Micro",
        "--config.stages.diffusion.curriculum=((2, 'diffusion'),)",
    ]
    environment = {**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-c",
        FROM_THE_HUB,
        *arguments,
        "--config.model.vocab_size=640",
        "--config.model.tied=False",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "config.model.tied is True, the checkpoint's False" in done.stderr
    identity = json.loads((run / "diffusion" / "config.json").read_text())
    assert identity["left_shift"] and identity["parent"]["folder"] == "Qwen/Micro"  # its parent is causal
    after = runs.find(str(run / "diffusion")).params()
    change = np.abs(np.asarray(after["head"]) - params["head"])
    assert 0 < change.max() < 0.02  # after two steps


def test_the_parent_of_a_stage_is_checked_before_data_are_prepared(tmp_path, capsys):
    untied = transformer.make_config("micro", 640, tied=False)
    causal = small.make_causal(
        small.write_model(tmp_path / "source", small.random_params(untied), untied), small.random_params(untied)
    )
    arguments = [
        "prepare",
        f"--config={CONFIG}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.stages.diffusion.init={causal}",
    ]
    assert cli.main([*arguments, "--config.model.vocab_size=700", "--config.model.rope_theta=1e6"]) == 2
    assert (
        "config.model.vocab_size is 700, the checkpoint's 640; config.model.tied is True, the checkpoint's False"
        in said(capsys)
    )
    assert not (tmp_path / "run").exists()


def test_an_export_of_a_run_starts_a_stage_of_another(workdir, shared, tmp_path):
    run = [f"--config={CONFIG},stage=contextual", f"--workdir={tmp_path / 'run'}", shared]
    assert cli.main(["train", *run, f"--config.stages.contextual.init={workdir / 'export' / 'embed'}"]) == 0
    parent = json.loads((tmp_path / "run" / "contextual" / "config.json").read_text())["parent"]
    assert parent["folder"] == str(workdir / "export" / "embed") and parent["digest"]


def test_stages_that_wait_for_each_other_are_refused(tmp_path, capsys):
    for overrides, sentence in (
        (["--config.stages.diffusion.init=pair"], "is made of itself"),
        (["--config.merges.merged.of=('merged', 'pair')"], "'merged' is made of itself: merged <- merged"),
        (
            ["--config.report.fuse=('pear',)"],
            "config.report.fuse='pear' must be in the checkpoints of every evaluation with bm25",
        ),
        (["--config.mining.hard_negatives.checkpoint=merged"], "wait for each other"),
        (
            ["--config.exports.embed.checkpoint=merge"],
            "config.exports.embed.checkpoint='merge' must be one of contextual, ",
        ),
        (
            ["--config.stages.contextual.init=pear"],
            "config.stages.contextual.init='pear' must be one of contextual, ",
        ),
    ):
        assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *overrides]) == 2
        assert sentence in said(capsys)
    assert not (tmp_path / "run" / "steps").exists()


def test_names_that_the_data_do_not_have_are_refused_before_the_first_stage(workdir, shared, tmp_path, capsys):
    for overrides, sentence in (
        (["--config.stages.triplet.curriculum=((2, 'hard'),)"], "stage triplet: mixture 'hard' must be one of "),
        (
            ["--config.mining.hard_negatives.tasks=('summaries',)"],
            "config.mining.hard_negatives.tasks='summaries' must be one of",
        ),
        (
            ["--config.evaluations.functions.data=functions/tset"],
            "config.evaluations.functions.data='functions/tset' must be",
        ),
        (["--config.merges.merged.sweep_on=('functions',)"], "config.merges.merged.sweep_on='functions' must be"),
        (["--config.report.texts="], "config.report.texts='' must be"),
        (
            [
                "--config.stages.pair.execution.evaluate_every=2",
                "--config.stages.pair.execution.evaluate_on=('none/test',)",
            ],
            "config.stages.pair.execution.evaluate_on='none/test' must be",
        ),
    ):
        assert cli.main(["pipeline", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", shared, *overrides]) == 2
        assert sentence in said(capsys)
    assert not (tmp_path / "run" / "diffusion").exists()


@pytest.mark.parametrize("verb", ["prepare", "prepare --check", "pipeline"])
def test_names_that_the_gin_file_does_not_have_are_refused_before_data_are_prepared(verb, tmp_path, capsys):
    for override, sentence in (
        ("stages.triplet.curriculum=((2, 'hard'),)", "stage triplet: mixture 'hard' must be one of "),
        ("stages.triplet.curriculum=((2, 'pairs'),)", "but triplet batches need also negatives"),
        ("mining.hard_negatives.tasks=('summaries',)", "config.mining.hard_negatives.tasks='summaries' must be one of"),
        ("evaluations.functions.data=functions/tset", "config.evaluations.functions.data='functions/tset' must be a"),
    ):
        command, *flags = verb.split()
        run = [command, f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *flags, f"--config.{override}"]
        assert cli.main(run) == 2
        assert sentence in said(capsys)
    assert not (tmp_path / "run" / "data").exists()


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory):
    """(config file, --config.data.directory=…) of the small graph."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "graph.py").write_text(small.GRAPH)
    small.write_data(folder / "data")
    return folder / "graph.py", f"--config.data.directory={folder / 'data'}"


HARD = "query, document, negatives, negative_lengths"


@pytest.mark.parametrize(
    "stage, task, sentence",
    [
        ("pair", "diffusion", "'text' has the columns tokens, but pair batches need also query, document"),
        ("triplet", "pairs", "'pairs' has the columns query, document, but triplet batches need also negatives, negat"),
        ("diffusion", "pairs", "'pairs' has the columns query, document, but diffusion batches need also tokens"),
        ("diffusion", "hard", f"'hard' has the columns {HARD}, but diffusion batches need also tokens"),
        ("pair", "no", "stage pair: mixture 'no' must be one of diffusion, pairs, hard"),
    ],
)
def test_a_mixture_of_another_kind_is_refused_before_training(stage, task, sentence, small_graph, tmp_path, capsys):
    file, data = small_graph
    run = [f"--config={file}:{stage}", f"--workdir={tmp_path / 'run'}", data]
    assert cli.main(["train", *run, f"--config.stages.{stage}.curriculum=((2,'{task}'),)"]) == 2
    assert sentence in said(capsys)
    assert not (tmp_path / "run").exists()


def test_every_other_reference_to_data_of_another_kind_is_refused_too(small_graph, tmp_path, capsys):
    file, data = small_graph
    for stage, override, sentence in (
        (
            "pair",
            "stages.pair.curriculum=((2,{'pairs':1.0,'text':0.5}),)",
            "config.stages.pair.curriculum: the task 't",
        ),
        ("pair", "stages.pair.curriculum=((2,{'pears':1.0}),)", "config.stages.pair.curriculum='pears' must be one of"),
        (
            "triplet",
            "mining.hard.tasks=('text',)",
            "config.mining.hard.tasks: the task 'text' has the columns tokens, but pa",
        ),
    ):
        run = [f"--config={file}:{stage}", f"--workdir={tmp_path / 'run'}", data, f"--config.{override}"]
        assert cli.main(["train", *run]) == 2
        assert sentence in said(capsys)
    # A pipeline knows the columns of mined tasks before the data are prepared.
    run = [f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["pipeline", *run, "--config.stages.diffusion.curriculum=((2,'hard'),)"]) == 2
    assert "config.stages.diffusion.curriculum: the task 'hard' has the columns" in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, sentence",
    [
        (
            "exports.model.checkpoint=merge",
            "config.exports.model.checkpoint='merge' must be one of diffusion, merged, ",
        ),
        ("exports.model.checkpoint=", "config.exports.model.checkpoint='' must be one of diffusion, merged, "),
        ("merges.merged.of=('pair','triple')", "config.merges.merged.of='triple' must be one of"),
        ("evaluations.words.checkpoints=('pear',)", "config.evaluations.words.checkpoints='pear' must be one of"),
        ("mining.hard.checkpoint=pear", "config.mining.hard.checkpoint='pear' must be one of"),
        ("report.search=embed", "config.report.search='embed' must be one of model"),
        ("report.denoise=pair", "config.report.denoise='pair' must be one of diffusion"),
        (
            "stage=",
            "config.stage is empty: set it to one of diffusion, pair, triplet, with FILE.py:stage=NAME or --conf",
        ),
    ],
)
def test_an_unknown_name_anywhere_in_the_graph_is_refused_before_a_stage_is_trained(
    override, sentence, small_graph, tmp_path, capsys
):
    file, data = small_graph
    run = [f"--config={file}:diffusion", f"--workdir={tmp_path / 'run'}", data, f"--config.{override}"]
    assert cli.main(["train", *run]) == 2
    assert sentence in said(capsys)
    assert not (tmp_path / "run").exists()


def test_a_stage_may_be_trained_before_a_folder_that_the_graph_names_exists(small_graph, tmp_path, capsys):
    file, data = small_graph
    later = f"--config.mining.hard.checkpoint={tmp_path}/later/pair"
    run = [f"--config={file}:diffusion", f"--workdir={tmp_path / 'run'}", later]
    assert cli.main(["pipeline", *run, data]) == 2
    assert "config.mining.hard.checkpoint=" in said(capsys)
    graph.check(config.load(f"{file}:diffusion", [later]), whole=False)


def test_a_config_without_stages_says_so(tmp_path, capsys):
    for verb in ("train", "plan"):
        where = [f"--workdir={tmp_path}/run"] if verb == "train" else ["--topology=v5e:2x2"]
        assert cli.main([verb, "--config=configs/base.py", *where]) == 2
        assert "config.stage='': the config has no stage; add one" in said(capsys)


@pytest.mark.parametrize("verb", ["prepare", "train", "pipeline"])
def test_a_workdir_that_cannot_be_a_folder_is_refused_by_name(verb, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for workdir, reason in (("file", "a file"), ("file/a", "a file"), ("link", "a link"), ("link/a", "a link")):
        existing = tmp_path / workdir.removesuffix("/a")
        assert cli.main([verb, f"--config={CONFIG},stage=pair", f"--workdir={tmp_path / workdir}"]) == 2
        assert f"--workdir={tmp_path / workdir} must be a folder, but {existing} is {reason}" in said(capsys)
    directory = f"--config.data.directory={tmp_path / 'file'}"
    assert cli.main([verb, f"--config={CONFIG},stage=pair", f"--workdir={tmp_path / 'run'}", directory]) == 2
    assert f"config.data.directory='{tmp_path / 'file'}' must be a folder, but" in said(capsys)
    if verb != "train":  # which first needs data
        assert cli.main([verb, f"--config={CONFIG}", "--workdir=/proc/w"]) == 2
        assert re.search(r"/proc/w.* cannot be written \(.*\): choose another --workdir", said(capsys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_pair_stage_may_train_on_mined_negatives(small_graph, tmp_path):
    file, data = small_graph
    run = runs.Run(config.load(str(file), [data, "--config.stages.pair.curriculum=((2,'hard'),)"]), tmp_path)
    nodes.check_data(run, ["pair"])


@pytest.fixture(scope="module")
def mining_graph(tmp_path_factory):
    """(config file, --config.data.directory=…): two tasks of pairs, one of triplets, and mining with random weights."""
    folder = tmp_path_factory.mktemp("mining")
    small.write_data(folder / "data")
    texts = small.sentences(45, seed=9)
    writer = Writer(folder / "data" / "tasks" / "more", COLUMNS["pair"])
    for i, text in enumerate([*texts, *small.sentences(3)]):  # the last three documents are those of "pairs" too
        writer.append(dict(zip(COLUMNS["pair"], small.tokenizer().encode([f"the {i % 40} index", text]))))
    writer.close({})
    writer = Writer(folder / "data" / "tasks" / "triplets", COLUMNS["triplet"])
    for i in range(20):
        query, document, negative = small.tokenizer().encode(["a token", texts[i], texts[i + 1]])
        writer.append(
            dict(query=query, document=document, negatives=negative, negative_lengths=np.array([len(negative)]))
        )
    writer.close({})
    entries = """
    for pool in ("own", "union"):
        config.mining[pool] = base.mining(
            checkpoint="random init", tasks=("pairs", "more"), pool=pool, rank_window=(0, 30), margin=-2.0
        )
    mixed = {"own": 0.5, "union": 0.25, "triplets": 0.25}
    config.stages.mixed = base.stage("triplet", curriculum=((2, mixed),), **pair)
    return config
"""
    (folder / "graph.py").write_text(small.GRAPH.replace("    return config\n", entries))
    return folder / "graph.py", f"--config.data.directory={folder / 'data'}"


def everything(store):
    return store.read(np.arange(len(store)))


def contents(examples, side):
    return {tuple(example[side]) for example in examples}


def test_the_queries_of_several_tasks_get_negatives_from_their_own_task_or_from_all(mining_graph, tmp_path, capsys):
    run = runs.Run(config.load(str(mining_graph[0]), mining_graph[1:]), tmp_path / "run")
    tasks = {name: everything(run.store(name)) for name in ("pairs", "more")}
    documents = {name: contents(examples, "document") for name, examples in tasks.items()}
    foreign = 0
    for pool in ("own", "union"):
        counts = nodes.mine(run, pool)
        mined = everything(run.store(pool))
        for side in ("query", "document"):
            np.testing.assert_equal([e[side] for e in mined], [e[side] for task in tasks.values() for e in task])
        for i, example in enumerate(mined):
            own = "pairs" if i < len(tasks["pairs"]) else "more"
            cuts = np.cumsum(example["negative_lengths"])[:-1]
            negatives = (
                [tuple(part) for part in np.split(example["negatives"], cuts)] if len(example["negatives"]) else []
            )
            assert len(set(negatives)) == len(negatives) and tuple(example["document"]) not in negatives
            answers = {tuple(e["document"]) for e in mined if np.array_equal(e["query"], example["query"])}
            assert not answers & set(negatives)
            assert set(negatives) <= documents[own] | (
                documents["pairs"] | documents["more"] if pool == "union" else set()
            )
            foreign += sum(n not in documents[own] for n in negatives)
        assert counts == run.store(pool).info["mined"]
        assert counts["read"] == counts["queries"] + counts["unsampled"] == 108
        parts = [counts[name] for name in counts if name in ("negatives", "surplus") or name.startswith("removed_")]
        assert counts["candidates"] == sum(parts) == 108 * 30 and counts["negatives"] > 108
        assert counts["negatives"] == sum(len(e["negative_lengths"]) for e in mined)
        assert (
            f"{pool}: read 108 unsampled 0, candidates 3,240 = negatives {counts['negatives']}"
            in capsys.readouterr().out
        )
        assert foreign == 0 if pool == "own" else foreign > 50
    assert list(run.store("union").info["inputs"]["data"]) == ["pairs", "more"]


def test_the_ranks_of_a_window_are_of_documents_however_many_queries_each_answers(mining_graph, tmp_path):
    data = Path(mining_graph[1].partition("=")[2])
    shutil.copytree(data, tmp_path / "data")
    writer = Writer(tmp_path / "data" / "tasks" / "tools", COLUMNS["pair"])
    for i in range(100):
        query = f"{small.WORDS[i // 10]} {small.WORDS[i % 10]}"
        writer.append(dict(zip(COLUMNS["pair"], small.tokenizer().encode([query, small.sentences(5)[i % 5]]))))
    writer.close({})
    mining = ["tasks=('tools',)", "rank_window=(0, 5)"]
    overrides = [f"--config.data.directory={tmp_path / 'data'}", *(f"--config.mining.own.{each}" for each in mining)]
    run = runs.Run(config.load(str(mining_graph[0]), overrides), tmp_path / "run")
    counts = nodes.mine(run, "own")
    assert (counts["documents"], counts["candidates"], counts["negatives"]) == (5, 500, 400)
    mined, documents = everything(run.store("own")), contents(everything(run.store("tools")), "document")
    for example in mined:
        parts = np.split(example["negatives"], np.cumsum(example["negative_lengths"]))[:-1]
        assert {tuple(part) for part in parts} == documents - {tuple(example["document"])}


def test_a_sample_of_each_task_includes_every_example_with_one_of_its_queries(mining_graph, tmp_path):
    run = runs.Run(
        config.load(str(mining_graph[0]), [mining_graph[1], "--config.mining.own.queries=5"]), tmp_path / "run"
    )
    counts = nodes.mine(run, "own")
    pairs, more = (everything(run.store(name)) for name in ("pairs", "more"))
    expected = [e for task in (pairs, more) for e in task if tuple(e["query"]) in contents(task[:5], "query")]
    mined = everything(run.store("own"))
    np.testing.assert_equal([e["query"] for e in mined], [e["query"] for e in expected])
    assert (
        len(mined) == counts["queries"] == 108 - counts["unsampled"] and len(mined) >= 15
    )  # five occur twice in "more"


def test_mining_reads_its_examples_in_ranges(mining_graph, tmp_path, monkeypatch):
    sizes, read = [], Store.read

    def counted(store, indices):
        sizes.append(len(indices))
        return read(store, indices)

    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(nodes, "READ", 7)
    run = runs.Run(config.load(str(mining_graph[0]), mining_graph[1:]), tmp_path / "run")
    assert nodes.mine(run, "union")["queries"] == 108 and max(sizes) <= 7
    assert len(run.store("union")) == 108


def test_a_teacher_of_another_tokenizer_judges_the_candidates_and_is_part_of_the_inputs(mining_graph, tmp_path, capsys):
    bpe = tmp_path / "bpe"
    bpe.mkdir()
    tokenizer = tokenizers.load(small.write_bpe(bpe, small.sentences(50)))
    model = transformer.make_config("micro", max(tokenizer.vocab_size, tokenizer.mask_id + 1))
    teacher = small.write_model(tmp_path / "teacher", small.random_params(model), model, tokenizer)
    overrides = [mining_graph[1], f"--config.mining.union.teacher={teacher}", "--config.mining.union.margin=0.01"]
    run = runs.Run(config.load(str(mining_graph[0]), overrides), tmp_path / "run")
    counts = nodes.mine(run, "union")
    assert counts["removed_margin"] > 100 and counts["negatives"] > 50
    encoder, decode = inference.load(teacher), run.tokenizer.decode
    for example in run.store("union").read(np.arange(0, 108, 9)):
        parts = np.split(example["negatives"], np.cumsum(example["negative_lengths"]))[:-1]
        texts = [decode(tokens) for tokens in (example["query"], example["document"], *parts)]
        query, positive, *negatives = encoder.encode(texts, normalize_embeddings=True)
        assert all(query @ negative <= query @ positive - 0.01 + 1e-5 for negative in negatives)
    assert nodes.mine(run, "union") == counts
    del overrides[1]
    with pytest.raises(ValueError, match="was mined with other inputs: teacher"):
        nodes.mine(runs.Run(config.load(str(mining_graph[0]), overrides), tmp_path / "run"), "union")
    with pytest.raises(ValueError, match=r"config.mining.own.teacher='nobody' must be one of"):
        graph.check(config.load(str(mining_graph[0]), [mining_graph[1], "--config.mining.own.teacher=nobody"]))
    assert graph.order(config.load(str(mining_graph[0]), [mining_graph[1], "--config.mining.own.teacher=merged"]))[
        -1
    ] == ("mixed")


def test_a_stage_mixes_mined_tasks_and_prepared_triplets_by_rate(mining_graph, tmp_path):
    run = runs.Run(config.load(str(mining_graph[0]), mining_graph[1:]), tmp_path / "run")
    assert nodes.train_stage(run, "mixed")["steps"] == 2
    assert all(np.isfinite(row["loss"]) for row in read_metrics(run.folder("mixed") / "metrics.jsonl"))
    rates = {"own": 0.5, "union": 0.25, "triplets": 0.25}
    assert run.phases("mixed") == [(2, rates)]
    drawn = Curriculum(run.phases("mixed"), {task: len(run.store(task)) for task in rates}, seed=0, slots=1024)
    counts = np.bincount(drawn.draw(0, 0, 1024).task)
    assert dict(zip(drawn.tasks, counts.tolist())) == {"own": 512, "triplets": 256, "union": 256}
    identity = json.loads((run.folder("mixed") / "config.json").read_text())
    assert all(run.store(task).digest in json.dumps(identity) for task in rates)


def test_a_checkpoint_with_another_tokenizer_can_be_evaluated_and_exported_but_mines_nothing(workdir, shared, tmp_path):
    other = small.write_model(tmp_path / "other")
    run = make_run(tmp_path / "run", shared, f"--config.mining.hard_negatives.checkpoint={other}")
    encoder, texts = run.encoder(run.checkpoint(str(other))), ["parse the file"]
    np.testing.assert_allclose(encoder.encode(texts), inference.load(other).encode(texts), atol=1e-6)
    with pytest.raises(ValueError, match="cannot rank these data: the run's tokenizer has digest"):
        nodes.mine(run, "hard_negatives")
    exported = exports.export_model(run, str(other), tmp_path / "again")
    assert tokenizers.load(exported).digest == small.tokenizer().digest


def test_a_causal_model_is_refused_as_an_encoder_and_may_start_a_stage(workdir, shared, tmp_path):
    causal = small.make_causal(small.write_model(tmp_path / "causal"), small.params())
    run = make_run(tmp_path / "run", shared)
    checkpoint = run.checkpoint(str(causal))
    for attempt in (lambda: run.encoder(checkpoint), lambda: exports.export_model(run, str(causal), tmp_path / "no")):
        with pytest.raises(ValueError, match="is a causal language model, not an encoder: a stage can start from it"):
            attempt()
    assert checkpoint.left_shift and not (tmp_path / "no").exists()


def test_two_exports_of_one_checkpoint_each_have_their_own_settings(workdir, shared, tmp_path):
    run = make_run(workdir, shared)
    with run.config.unlocked():
        run.config.exports = {
            "short": run.config.exports["embed"].copy_and_resolve_references(),
            "chunks": run.config.exports["embed"].copy_and_resolve_references(),
        }
        run.config.exports.short.max_length, run.config.exports.chunks.contextual = 7, True
        run.workdir = tmp_path
        for stage in run.config.stages:
            (tmp_path / stage).symlink_to(workdir / stage)
    exports.export_models(run)
    about = {
        name: json.loads((tmp_path / "export" / name / "embed.json").read_text())["embedding"]
        for name in ("short", "chunks")
    }
    assert about["chunks"]["context_length"] == run.config.stages.contextual.batch.length
    assert [about[n]["max_length"] for n in about] == [7, None] and [about[n]["contextual"] for n in about] == [
        False,
        True,
    ]
    with pytest.raises(ValueError, match="merged has several exports, chunks, short: `embed pipeline`"):
        exports.export_model(run, "merged", tmp_path / "which")


# --- what identifies a stage ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(workdir, shared, tmp_path):
    """(arguments, folder) of a run whose diffusion stage is complete."""
    arguments = [f"--config={CONFIG},stage=diffusion", f"--workdir={tmp_path / 'run'}", shared]
    folder = tmp_path / "run" / "diffusion"
    shutil.copytree(workdir / "diffusion", folder)
    return arguments, folder


def test_a_changed_field_that_matters_is_named_with_both_values(trained, capsys):
    arguments, folder = trained
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    overrides = ["--config.seed=1", "--config.stages.diffusion.optimizer.clip=2.0", "--config.model.rope_theta=2e4"]
    assert cli.main(["train", *arguments, *overrides]) == 2
    sentence = said(capsys)
    for part in (
        "seed was 0, now 1",
        "stages.diffusion.optimizer.clip was 1.0, now 2.0",
        "model.rope_theta was 10000.0, now 20000.0",
    ):
        assert part in sentence
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before


def test_what_cannot_change_a_result_may_differ_at_every_start(trained, capsys):
    arguments, _ = trained
    overrides = [
        "--config.execution.mesh.fsdp=-1",
        "--config.execution.mesh.data=1",
        "--config.execution.remat=full",
        "--config.execution.unroll=1",
        "--config.execution.attention=xla",
        "--config.stages.diffusion.execution.microbatches=2",
        "--config.stages.diffusion.execution.logits_chunk=64",
        "--config.stages.diffusion.execution.log_every=3",
        "--config.stages.diffusion.execution.checkpoint_every=7",
        "--config.card.license=mit",
        "--config.stages.pair.temperature=0.5",
        "--config.data.gin_file=elsewhere.gin",
    ]
    assert cli.main(["train", *arguments, *overrides]) == 0
    assert "diffusion is complete" in capsys.readouterr().out


def test_a_comment_in_a_gin_file_changes_nothing_and_another_binding_is_refused(workdir, shared, tmp_path, capsys):
    text = (ROOT / "configs/data/python_docs.gin").read_text()
    for name, addition in (
        ("comment", "\n# nothing\n"),
        ("other", "\npython_docs/text/task.max_total_characters = 1000\n"),
    ):
        (tmp_path / f"{name}.gin").write_text(text + addition)
    arguments = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", shared]
    assert cli.main(["prepare", *arguments, f"--config.data.gin_file={tmp_path / 'comment.gin'}"]) == 0
    assert cli.main(["prepare", *arguments, f"--config.data.gin_file={tmp_path / 'other.gin'}"]) == 2
    assert "python_docs/text/task.max_total_characters was '40000000', now '1000'" in said(capsys)


def test_a_command_that_fails_before_its_first_checkpoint_claims_no_folder(workdir, shared, tmp_path, capsys):
    arguments = [f"--config={CONFIG},stage=diffusion", f"--workdir={tmp_path / 'run'}", shared]
    diverging = [
        "--config.stages.diffusion.optimizer.learning_rate=1e38",
        "--config.stages.diffusion.execution.max_skipped=0",
    ]
    failing = ["--config.stages.diffusion.batch.rows=3", "--config.stages.diffusion.execution.microbatches=2"]
    assert cli.main(["train", *arguments, *failing, *diverging]) == 2
    said(capsys)
    assert cli.main(["train", *arguments]) == 0


def test_a_second_run_in_the_same_workdir_is_refused(trained, shared, capsys):
    arguments, folder = trained
    shutil.rmtree(folder)
    run = make_run(folder.parent, shared)
    with distributed.hold(folder):
        assert cli.main(["train", *arguments]) == 2
        assert f"{folder} is in use by another process" in said(capsys)
    with distributed.hold(run.workdir / "pipeline"):
        assert cli.main(["pipeline", f"--config={CONFIG}", *arguments[1:]]) == 2
        assert "is in use by another process" in said(capsys)
    assert cli.main(["train", *arguments]) == 0


# --- parents that have not finished ---------------------------------------------------------------------------------


@pytest.fixture
def unfinished(workdir, shared, tmp_path):
    """A run whose pair stage has one of two steps: its last checkpoint is step 1."""
    folder = tmp_path / "unfinished"
    for name in ("diffusion", "pair"):
        shutil.copytree(workdir / name, folder / name)
    (folder / "pair" / "checkpoints" / "2").rename(folder / "pair" / "checkpoints" / "1")
    return folder


def test_an_unfinished_parent_is_refused_by_every_verb_unless_its_step_is_named(
    unfinished, workdir, shared, tmp_path, capsys
):
    run = [f"--workdir={unfinished}", shared]
    sets, stage = workdir / "data" / "evaluation" / "functions" / "test", unfinished / "pair"
    negatives = "--config.stages.triplet.curriculum=((2, 'hard_negatives'),)"
    verbs = {
        "train": (["train", f"--config={CONFIG},stage=contextual", *run], ["--config.stages.contextual.init_step=1"]),
        "mine in training": (
            ["train", f"--config={CONFIG},stage=triplet", *run, negatives, "--config.stages.triplet.init=diffusion"],
            ["--config.mining.hard_negatives.step=1"],
        ),
        "export": (
            ["export", f"--config={CONFIG}", *run, "--checkpoint=pair", f"--output={tmp_path / 'export'}"],
            ["--step=1"],
        ),
        "export a folder": (["export", f"--model={stage}", f"--output={tmp_path / 'other'}"], ["--step=1"]),
        "mine": (["mine", f"--model={stage}", f"--data={sets}", f"--output={tmp_path / 'mined'}"], ["--step=1"]),
        "evaluate": (["evaluate", f"--model={stage}", f"--data={sets}"], ["--step=1"]),
        "merge": (
            ["merge", f"--a={stage}", f"--b={unfinished / 'diffusion'}", f"--output={tmp_path / 'merged'}"],
            ["--step_a=1"],
        ),
    }
    for name, (refused, allowed) in verbs.items():
        assert cli.main(refused) == 2, name
        assert "has not finished: its last checkpoint is step 1 of 2" in said(capsys), name
        assert cli.main([*refused, *allowed]) == 0, name
        capsys.readouterr()
    assert json.loads((unfinished / "contextual" / "run.json").read_text())["parent"]["step"] == 1
    assert "| 1 |" in (tmp_path / "export" / "README.md").read_text()


def test_a_missing_step_is_refused_with_a_list_of_the_existing_ones(workdir, tmp_path, capsys):
    arguments = [
        "export",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        "--checkpoint=pair",
        f"--output={tmp_path / 'x'}",
    ]
    assert cli.main([*arguments, "--step=7"]) == 2
    assert "pair has no checkpoint of step 7, only of 2" in said(capsys)


def test_a_stage_continues_after_its_parent_is_gone_but_not_from_another_parent(workdir, shared, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(workdir / "contextual", folder / "contextual")
    identity = json.loads((folder / "contextual" / "config.json").read_text())
    identity["parent"]["folder"] = str(folder / "pair")
    (folder / "contextual" / "config.json").write_text(json.dumps(identity))
    arguments = ["train", f"--config={CONFIG},stage=contextual", f"--workdir={folder}", shared]
    assert cli.main(arguments) == 0
    assert "contextual is complete" in capsys.readouterr().out
    for wrong in ("--config.stages.contextual.init=triplet", "--config.stages.contextual.init_step=1"):
        assert cli.main([*arguments, wrong]) == 2
        assert "holds no checkpoint: train stage" in said(capsys)
    # The same if only the named step is gone.
    shutil.copytree(workdir / "pair", folder / "pair")
    identity["parent"]["step"] = 1
    (folder / "contextual" / "config.json").write_text(json.dumps(identity))
    assert cli.main([*arguments, "--config.stages.contextual.init_step=1"]) == 0
    assert "contextual is complete" in capsys.readouterr().out


def test_mined_negatives_are_used_after_their_checkpoint_is_gone(workdir, shared, tmp_path, capsys):
    folder = tmp_path / "run"
    for name in ("triplet", "mining"):
        shutil.copytree(workdir / name, folder / name)
    for file in ("triplet/config.json", "mining/hard_negatives/info.json"):
        (folder / file).write_text((folder / file).read_text().replace(str(workdir), str(folder)))
    assert cli.main(["train", f"--config={CONFIG},stage=triplet", f"--workdir={folder}", shared]) == 0
    assert "triplet is complete" in capsys.readouterr().out
    window = "--config.mining.hard_negatives.rank_window=(1,9)"
    assert cli.main(["train", f"--config={CONFIG},stage=triplet", f"--workdir={folder}", shared, window]) == 2
    assert "was mined with other inputs: mining.rank_window was [5, 50], now [1, 9]" in said(capsys)


# --- the evaluation in the loop, milestones -------------------------------------------------------------------------


def test_milestones_and_the_best_checkpoint_by_held_out_retrieval_are_kept(shared, tmp_path):
    arguments = [f"--config={CONFIG},stage=pair", f"--workdir={tmp_path / 'run'}", shared, "--config.stages.pair.init="]
    settings = dict(checkpoint_every=100, milestone_every=4, evaluate_every=3)
    arguments += [f"--config.stages.pair.execution.{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", *arguments, "--config.stages.pair.curriculum=((10, 'pairs'),)"]) == 0
    rows = read_metrics(tmp_path / "run" / "pair" / "metrics.jsonl")
    figures = {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}
    names = ["contextual/development", "functions/development"]  # all development sets, if none are named
    of_sets = {row["step"]: [row[f"evaluation/{name}"] for name in names] for row in rows if "evaluation" in row}
    assert {step: np.mean(values) for step, values in of_sets.items()} == figures
    assert list(figures) == [3, 6, 9, 10]
    best = max(figures, key=lambda step: (figures[step], -step))
    checkpoints = tmp_path / "run" / "pair" / "checkpoints"
    assert training_state.steps(checkpoints) == sorted({best, 4, 8, 10})
    # Milestones stay, whatever a later config says.
    assert cli.main(["train", *arguments[:4], "--config.stages.pair.curriculum=((10, 'pairs'),)"]) == 0
    assert training_state.steps(checkpoints) == sorted({best, 4, 8, 10})
    encoder = runs.load_encoder(str(tmp_path / "run" / "pair"), best if best != 10 else 0)
    form, folder = retrieval.Form("int8"), Path(shared.partition("=")[2]) / "evaluation"
    for name, figure in zip(names, of_sets[best]):
        found = retrieval.evaluate_retrieval(encoder, read_set(folder / name), [form])[form]["ndcg@10"]
        assert found == pytest.approx(figure, abs=1e-6)


def test_a_stage_is_evaluated_on_a_folder_that_is_not_in_its_data(shared, tmp_path):
    texts = small.sentences(8, seed=2)
    for name, rows in {
        "corpus": [{"_id": f"{i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": "q", "text": texts[3]}],
        "qrels": [{"query-id": "q", "corpus-id": "3", "score": 1}],
    }.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--config={CONFIG},stage=pair", f"--workdir={tmp_path / 'run'}", shared, "--config.stages.pair.init="]
    on = f"--config.stages.pair.execution.evaluate_on=({str(tmp_path / 'set')!r},)"
    short = ["--config.stages.pair.curriculum=((2, 'pairs'),)", "--config.stages.pair.execution.evaluate_every=2"]
    assert cli.main(["train", *arguments, on, *short]) == 0
    (row,) = [r for r in read_metrics(tmp_path / "run" / "pair" / "metrics.jsonl") if "evaluation" in r]
    assert row["evaluation"] == 1 and not [name for name in row if name.startswith("evaluation/")]


# --- bad input: one sentence, exit code 2 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["pipeline", f"--config={CONFIG}", "--config.seeed=1", "--workdir={workdir}"],
            "unknown config key 'seeed'; did you mean 'seed'?",
        ),
        (["pipeline", "--config=configs/none.py", "--workdir={workdir}"], "no file configs/none.py"),
        (
            ["train", f"--config={CONFIG},stage=triple", "--workdir={workdir}"],
            "config.stage='triple' must be one of contextual, diffusion, pair, triplet",
        ),
        (
            ["train", f"--config={CONFIG},stage=pair", "--workdir={workdir}", "--profile_steps=1:3"],
            "--profile_steps=1:3 must end at or before 2, the number of steps of stage pair",
        ),
        (
            ["export", f"--config={CONFIG}", "--workdir={workdir}", "--checkpoint=pair", "--output={workdir}/never"]
            + ["--contextual"],
            "--contextual is for --model; with --config, set exports.NAME.contextual",
        ),
        (["evaluate", "--model={workdir}/nowhere", "--data={workdir}/data/evaluation/functions/test"], "nowhere"),
        (["search", "--model={workdir}/export/embed", "--corpus={workdir}/empty.jsonl", "--query=x"], "empty.jsonl"),
        (["search", "--model={workdir}/export/embed", "--corpus={workdir}/none.jsonl", "--query=x"], "none.jsonl"),
        (["trane"], "'trane' is not a verb: expected"),
        (
            ["encode", "--model={workdir}/export/embed", "--text=x", "--output={workdir}/nowhere/x.npy"],
            "must be a file in a folder that exists",
        ),
        (
            ["train", f"--config={CONFIG},stage=pair", "--workdir={workdir}", "--process_id=1"],
            "--coordinator and --process_id need --num_processes",
        ),
        (["pipeline", f"--config={CONFIG}", "--workdir=s3://bucket/run"], "s3://bucket/run must be a folder or gs://"),
        (
            ["pipeline", f"--config={CONFIG}", "--config.data.gin_file=none.gin", "--workdir={workdir}"],
            "no file none.gin",
        ),
        (
            ["export", f"--config={CONFIG}", "--workdir={workdir}", "--checkpoint=nobody", "--output={workdir}/never"],
            "'nobody' is not a checkpoint: expected one of random init, contextual, diffusion, pair, triplet, merged, ",
        ),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_exit_code_2(workdir, arguments, sentence, capsys):
    (workdir / "empty.jsonl").write_text("")
    assert cli.main([a.replace("{workdir}", str(workdir)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_preparing_without_its_libraries_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "seqio", None)
    assert cli.main(["prepare", f"--config={CONFIG}", f"--workdir={tmp_path}/run"]) == 2
    assert "preparing data needs seqio: pip install -e '.[data]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unused_and_unknown_gin_bindings_are_refused_by_name(tmp_path, capsys):
    for binding, sentence in (
        ("vocabulary.charcters = 5", "'vocabulary.charcters'; the nearest valid one is 'vocabulary.characters'"),
        ("some_scope/vocabulary.characters = 5", "unused gin binding 'some_scope/vocabulary.characters'"),
    ):
        arguments = [
            "prepare",
            f"--config={CONFIG}",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.gin_bindings=({binding!r},)",
        ]
        assert cli.main(arguments) == 2
        assert sentence in capsys.readouterr().err


# --- several processes ----------------------------------------------------------------------------------------------


ERRORS_OF_THE_FIRST = """
import contextlib, sys
import jax
folder, coordinator, process = *sys.argv[1:3], int(sys.argv[3])
jax.distributed.initialize(coordinator, 2, process, heartbeat_timeout_seconds=10)
from embed import distributed

def fail():
    raise KeyError("odd")

for attempt in (lambda: distributed.on_first_process(fail), lambda: distributed.hold(folder, fail).__enter__()):
    try:
        attempt()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
print(distributed.on_first_process(lambda: process == 0), distributed.on_first_process(lambda: process == 1))
"""


def test_any_error_of_process_0_ends_all_processes_and_only_its_flag_counts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ERRORS_OF_THE_FIRST, str(tmp_path / "run"), address]
    options = dict(stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    running = [subprocess.Popen([*command, str(k)], **options) for k in range(2)]
    try:
        output = [process.communicate(timeout=60)[0].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
    first, second = ([line for line in lines if not line.startswith("[Gloo]")] for lines in output)
    assert first == ["KeyError: 'odd'", "KeyError: 'odd'", "True False"]
    assert second == [
        "ValueError: process 0 cannot continue: see its error",
        f"ValueError: process 0 cannot write {tmp_path / 'run'}: see its error",
        "True False",
    ]


def test_two_local_processes_train_mine_evaluate_export_and_merge_like_one(tmp_path):
    file, one, two = tmp_path / "graph.py", tmp_path / "one", tmp_path / "two"
    file.write_text(small.GRAPH)
    small.write_data(tmp_path / "data")
    shared = [f"--config.data.directory={tmp_path / 'data'}", "--config.stages.triplet.init=diffusion"]
    shared += ["--config.mining.hard.checkpoint=diffusion", "--config.stages.triplet.execution.evaluate_every=3"]
    shared += ["--config.stages.triplet.execution.evaluate_on=('set/test',)"]

    def commands(folder):
        of_run = [f"--workdir={folder}", *shared]
        # The checkpoint of the first stage starts the second one and mines its negatives.
        yield from (["train", f"--config={file}:{stage}", *of_run] for stage in ("diffusion", "triplet"))
        yield ["export", f"--config={file}", *of_run, "--checkpoint=triplet", f"--output={folder}/model"]
        yield ["merge", f"--a={folder}/diffusion", f"--b={folder}/triplet", f"--output={folder}/merged"]

    assert [cli.main(command) for command in commands(one)] == [0] * 4
    first, *others = commands(two)
    done = subprocess.run(
        ["bash", "launch/local.sh", "2", "--", *first],
        env={**ENVIRONMENT, "EMBED": str(small.write_program(tmp_path / "embed", *others, folder=ROOT))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def column(name, stage):
        return [
            [row[name] for row in read_metrics(folder / stage / "metrics.jsonl") if name in row]
            for folder in (one, two)
        ]

    assert [len(x) for x in column("loss", "diffusion")] == [6, 6]
    np.testing.assert_allclose(*column("loss", "diffusion"), rtol=1e-5)
    # Sums in another order may round an embedding to the next int8 level.
    np.testing.assert_allclose(*column("loss", "triplet"), rtol=2e-3)
    assert [len(x) for x in column("evaluation", "triplet")] == [2, 2]
    np.testing.assert_allclose(*column("evaluation", "triplet"), atol=0.1)  # five queries: one rank changes it much
    counts = [
        json.loads((folder / "mining" / "hard" / "info.json").read_text())["info"]["mined"] for folder in (one, two)
    ]
    assert counts[0] == counts[1]
    for model in ("model", "merged"):
        vectors = [inference.load(folder / model).encode(small.sentences(4)) for folder in (one, two)]
        np.testing.assert_allclose(*vectors, atol=1e-3)
