"""configs/domain.py, with a tiny model that the test makes."""

import json
import shutil

import pytest
import small

from embed import cli, config, graph, runs, tokenizers
from embed.checkpoints import model_folder
from embed.evaluation.sets import read_set
from embed.models import transformer

CONFIG = "configs/domain.py"


def write_set(folder, texts):
    """An evaluation set that asks for each fourth text."""
    folder.mkdir()
    rows = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": text.split()[-1]} for i, text in enumerate(texts[::4])],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{4 * i}", "score": 1} for i in range(len(texts[::4]))],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model of another tokenizer than ours, pairs and a general set."""
    folder = tmp_path_factory.mktemp("given")
    texts = small.sentences(300, longest=12)
    words = tokenizers.load(small.write_bpe(folder, texts))
    sizes = transformer.make_config("micro", words.vocab_size)  # without a row for a mask
    settings = {"max_length": 64, "separator": False, "matryoshka": [8, 16]}
    small.write_model(folder / "model", small.random_params(sizes), sizes, words, embedding=settings)
    (folder / "pairs").mkdir()
    rows = [{"ask": f"{text.split()[0]} {i % 40}", "answer": text} for i, text in enumerate(texts)]
    (folder / "pairs" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_set(folder / "general.v1", small.sentences(24, seed=1))
    return folder


def arguments(given, workdir, *more):
    named = ["small", "query=ask", "document=answer", "steps=2", f"model={given}/model", f"general={given}/general.v1"]
    return [f"--config={CONFIG}:{','.join([*named, *more])}", f"--data_root={given / 'pairs'}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("domain") / "run"
    assert cli.main(["pipeline", *arguments(given, workdir)]) == 0
    return workdir


def test_the_curve_is_in_the_results_and_its_ends_are_the_two_models(given, run):
    results = json.loads((run / "results.json").read_text())
    model, merge = str(given / "model"), results["merges"]["merged"]
    assert list(results["checkpoints"]) == [model, "domain", "merged", "BM25"]
    assert merge["of"] == [model, "domain"] and [point["ratio"] for point in merge["sweep"]] == [0, 0.25, 0.5, 0.75, 1]
    assert merge["sets"] == {"domain": "domain/development", "general.v1": str(given / "general.v1")}
    figures = {name: row["general_v1"]["float32"]["ndcg@10"] for name, row in results["checkpoints"].items()}
    for k, name in ((0, model), (2, "merged"), (4, "domain")):
        assert merge["sweep"][k]["general.v1"] == pytest.approx(figures[name], abs=1e-6)


def test_what_is_forgotten_is_a_difference_from_the_model_before_with_an_interval(given, run):
    results = json.loads((run / "results.json").read_text())
    found = results["differences"]
    assert found["baseline"] == str(given / "model")
    assert [(row["set"], row["model"]) for row in found["rows"]] == [
        (name, model) for name in ("domain", "general_v1") for model in ("domain", "merged", "BM25")
    ]
    for row in found["rows"]:
        assert row["difference"] == pytest.approx(row["value"] - row["baseline"])
        assert row["low"] <= row["difference"] <= row["high"]


def test_the_curve_and_the_differences_are_in_the_report_and_printed(given, run, capsys):
    assert cli.main(["pipeline", *arguments(given, run)]) == 0  # which is complete
    out, report = capsys.readouterr().out, (run / "report.md").read_text()
    assert f"merged: nDCG@10 in float32 at each ratio; 0 is {given / 'model'}, 1 is domain; domain: " in out
    assert "0.5 (merged)" in out and "0.5 (merged)" in report
    assert f"nDCG@10 in float32 against the baseline {given / 'model'}, with 95% intervals" in out
    assert f"## Differences from {given / 'model'}" in report
    assert (run / "plots" / "merge.png").exists()


def test_the_held_out_parts_share_no_document_with_each_other_or_the_negatives(run):
    made = runs.Run(config.load("configs/base.py"), run)
    development, test = (read_set(run / "data" / "evaluation" / "domain" / part) for part in ("development", "test"))
    assert development.corpus and test.corpus and not {*development.corpus} & {*test.corpus}
    trained, word = set(), made.tokenizer
    store = runs.Store(run / "mining" / "hard_negatives")
    for example in store.read(range(len(store))):
        lengths, tokens = example["negative_lengths"], example["negatives"]
        trained.add(word.decode(example["document"]))
        for length in lengths:
            trained.add(word.decode(tokens[:length]))
            tokens = tokens[length:]
    assert len(trained) > 200 and not trained & {*development.corpus, *test.corpus}


def test_the_merged_model_keeps_the_settings_of_the_model_before(run):
    settings = model_folder.open_model(run / "export" / "embed").embedding
    assert (settings["max_length"], settings["separator"], settings["matryoshka"]) == (64, False, [8, 16])


def test_a_set_outside_the_data_that_changes_is_evaluated_again(given, run, tmp_path):
    copy = tmp_path / "given"
    shutil.copytree(given / "general.v1", copy)
    loaded = config.load(arguments(given, run)[0].removeprefix("--config="))
    nodes = {node.name: node for node in graph.make_nodes(loaded)}
    with loaded.unlocked():
        loaded.evaluations.general_v1.data = str(copy)
    before = graph.inputs(runs.Run(loaded, run), nodes["evaluate merged"])
    (copy / "queries.jsonl").write_text((copy / "queries.jsonl").read_text().replace("q0", "q00"))
    assert graph.inputs(runs.Run(loaded, run), nodes["evaluate merged"]) != before


def test_pairs_of_a_retrieval_folder_are_held_out_by_query_with_all_their_documents_in_training(given, tmp_path):
    path = f"{CONFIG}:model={given}/model,layout=retrieval,held_out_by=query,small"
    texts = [f"tool {i % 7} {text}" for i, text in enumerate(small.sentences(240, seed=3, longest=9))]
    source, workdir = write_set(tmp_path / "tools", texts), tmp_path / "run"
    rows = [{"query-id": f"q{i}", "corpus-id": f"d{i % 5}"} for i in range(60)]
    (source / "qrels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(60)]
    (source / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    assert cli.main(["prepare", f"--config={path}", f"--data_root={source}", f"--workdir={workdir}"]) == 0
    sets = [read_set(workdir / "data" / "evaluation" / "domain" / part) for part in ("development", "test")]
    made = runs.Run(config.load("configs/base.py"), workdir)
    store = made.store("own.pairs")
    asked, found = (
        {made.tokenizer.decode(example[side]) for example in store.read(range(len(store)))}
        for side in ("query", "document")
    )
    assert found == set(texts[:5]) and {*sets[0].corpus, *sets[1].corpus} <= found
    assert len(asked) + len(sets[0].queries) + len(sets[1].queries) == 60
    assert asked.isdisjoint(sets[0].queries + sets[1].queries) and set(sets[0].queries).isdisjoint(sets[1].queries)


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("steps=2", "config argument model is missing"),
        ("model={given}/none", "there is no folder {given}/none: expected a model folder, or a hub id"),
        ("model={given}/pairs", "{given}/pairs has no config.json"),
        ("model={given}/causal", "causal' must be an encoder: an export, pplx-embed or a bidirectional Qwen3"),
        ("model={given}/model,layout=beir", "layout='beir' must be one of files, retrieval"),
        ("model={given}/model,held_out_by=ask", "held_out_by='ask' must be one of query, document"),
        ("model={given}/model,general=a/x,general=b/x", "general='b/x': there is another set with the name x"),
        ("model={given}/model,general={given}/none", "none' must be a SET/SPLIT in "),
        ("model={given}/model,general={given}/pairs", "pairs' must be a SET/SPLIT in "),
        ("model={given}/model", "no file matches {given}/empty/*.jsonl*"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(argument, sentence, given, tmp_path, capsys):
    if not (given / "causal").exists():
        small.make_causal(small.write_model(given / "causal"), small.params())
    (given / "empty").mkdir(exist_ok=True)
    path = f"{CONFIG}:{argument.format(given=given)}"
    root = given / "empty"
    assert cli.main(["pipeline", f"--config={path}", f"--data_root={root}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert sentence.format(given=given) in capsys.readouterr().err
    assert not (tmp_path / "run" / "steps").exists()
