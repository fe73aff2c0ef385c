"""Our adapter in mteb, beside mteb's own models and our evaluation without mteb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest
import small
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
from mteb.models.model_meta import ModelMeta

import colabs
from embed import cli, inference
from embed.evaluation import metrics, models, mteb_model, mteb_run, mteb_tasks, published, records, retrieval
from embed.evaluation.models import Candidate
from embed.evaluation.retrieval import Form
from embed.evaluation.sets import read_set

ROOT = Path(__file__).parents[2]
TEXTS = small.sentences(90, seed=5, longest=20)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_retrieval(folder, split="test"):
    """A small set in MTEB's layout, with a card as the hub has it."""
    folder.mkdir(parents=True)
    parts = {"default": "qrels.jsonl", "corpus": "corpus.jsonl", "queries": "queries.jsonl"}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n" for name, path in parts.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    titles = ["", "the title"] * 45
    (folder / "corpus.jsonl").write_text(
        lines({"_id": f"c{i}", "title": title, "text": text} for i, (title, text) in enumerate(zip(titles, TEXTS)))
    )
    (folder / "queries.jsonl").write_text(
        lines({"_id": f"q{i}", "text": " ".join(text.split()[:3])} for i, text in enumerate(TEXTS[:30]))
    )
    qrels = [{"query-id": f"q{i}", "corpus-id": f"c{i}", "score": 2} for i in range(25)]
    qrels += [{"query-id": f"q{i}", "corpus-id": f"c{2 * i + 1}", "score": 1} for i in range(0, 20, 3)]
    (folder / "qrels.jsonl").write_text(lines(qrels))
    return folder


def write_pairs(folder):
    folder.mkdir(parents=True)
    texts, rng = sorted(set(TEXTS)), np.random.default_rng(0)
    pairs = [(a, b) for k, a in enumerate(texts) for b in texts[k + 1 : k + 8]]  # no two have equal cosines
    rows = [{"sentence1": a, "sentence2": b, "score": float(rng.uniform(0, 5))} for a, b in pairs]
    (folder / "validation.jsonl").write_text(lines(rows))


def write_conteb(folder, split):
    (folder / "documents").mkdir(parents=True)
    (folder / "queries").mkdir()
    (folder / "documents" / f"{split}.jsonl").write_text(
        lines({"chunk_id": f"d{i // 6}_{i % 6}", "chunk": text} for i, text in enumerate(TEXTS))
    )
    (folder / "queries" / f"{split}.jsonl").write_text(
        lines({"query": f"the {t}", "chunk_id": f"d{i // 6}_{i % 6}", "answer": ""} for i, t in enumerate(TEXTS[:20]))
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A --data_root with a retrieval task, an STS task and a set of ConTEB."""
    root = tmp_path_factory.mktemp("root")
    write_retrieval(root / "scifact")
    write_pairs(root / "JSTS")
    write_conteb(root / "squad-conteb-eval", "validation")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.write_model(tmp_path_factory.mktemp("model") / "small")


def evaluate(output, *arguments):
    code = cli.main(["evaluate", *map(str, arguments), f"--output={output}"])
    summary = json.loads((output / "summary.json").read_text()) if (output / "summary.json").exists() else []
    return code, {
        (r["task"], r["precision"], r["dimensions"], r["metric"]): r["value"]
        for r in summary
        if r["subset"] == "default"
    }


FORMS = ["--precision", "float32", "int8", "binary", "--truncate_dim", "16"]


@pytest.fixture(scope="module")
def evaluated(root, model, tmp_path_factory):
    """The folder of the three tasks and the summary."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    tasks = ["--tasks", "SciFact", "JSTS", "ConTEBSQuAD"]
    code, values = evaluate(output, f"--model={model}", *tasks, f"--data_root={root}", *FORMS)
    assert code == 0
    return output, values


# Retrieval


def test_a_task_gives_the_scores_of_its_folder_without_mteb(evaluated, root, model, tmp_path):
    _, by_mteb = evaluated
    code, ours = evaluate(tmp_path / "out", f"--model={model}", f"--data={root / 'scifact'}", *FORMS)
    assert code == 0
    compared = 0
    for (task, *key), value in by_mteb.items():
        if task == "SciFact":
            assert value == pytest.approx(ours["scifact", *key], abs=6e-6), key  # mteb rounds to five digits
            compared += 1
    assert compared == 6 * 5  # forms and metrics


def test_a_document_is_embedded_whole_in_a_task_of_conteb(evaluated, root, model, tmp_path):
    _, by_mteb = evaluated
    data = read_set(root / "squad-conteb-eval", split="validation")
    form = Form("float32")
    for alone in (False, True):
        ours = retrieval.evaluate_retrieval(inference.load(model), data, [form], alone=alone)[form]["ndcg@10"]
        if alone:
            options = [f"--model={model}", "--tasks", "ConTEBSQuAD", f"--data_root={root}", "--alone"]
            _, by_mteb = evaluate(tmp_path / "alone", *options, "--precision", "float32")
        assert by_mteb["ConTEBSQuAD", "float32", 32, "ndcg@10"] == pytest.approx(ours, abs=6e-6)
        assert ours < 1 or alone


def test_results_are_in_mtebs_layout_one_folder_a_form(evaluated, model):
    output, values = evaluated
    (revision,) = (output / "results" / "local__small").iterdir()
    assert sorted(folder.name for folder in (revision / "experiments").iterdir()) == [
        f"dimensions_{size}__precision_{precision}" for size in (16, 32) for precision in ("binary", "float32", "int8")
    ]
    cache = mteb.ResultCache(output)
    candidate = Candidate("local/small", revision.name, inference.load(model))
    for form in (Form("int8"), Form("binary", 16)):
        meta = mteb_model.make_meta(candidate, form)
        file = cache.get_task_result_path("SciFact", meta).parent / "model_meta.json"
        read = ModelMeta.model_validate_json_resolved(file.read_text())  # as docs/evaluation.md submits it
        assert (read.name, read.revision, read.experiment_name) == (meta.name, meta.revision, meta.experiment_name)
        assert read.framework == ["JAX", "safetensors"] and read.similarity_fn_name == "cosine"
        result = cache.load_task_result("SciFact", meta)
        assert result.scores["test"][0]["main_score"] == pytest.approx(
            values["SciFact", form.precision, form.dimensions or 32, "ndcg@10"]
        )
        assert not result.get_missing_evaluations(mteb.get_task("SciFact"))


def test_the_values_of_the_queries_have_the_score_as_their_mean(evaluated):
    output, values = evaluated
    for task, split in (("SciFact", "test"), ("ConTEBSQuAD", "validation")):
        record = json.loads((output / "records" / task / f"default.{split}.json").read_text())
        assert len(record["queries"]["ids"]) == record["counts"]["queries"] == len(record["queries"]["characters"])
        for form, found in record["queries"]["values"].items():
            assert np.mean(found) == pytest.approx(record["values"][form]["ndcg@10"], abs=6e-6)


def test_what_is_there_is_not_computed_again(evaluated, root, model, monkeypatch):
    output, before = evaluated

    def fail(*_, **__):
        pytest.fail("a text was encoded again")

    monkeypatch.setattr(inference.Encoder, "encode_documents", fail)
    code, after = evaluate(output, f"--model={model}", "--tasks", "SciFact", f"--data_root={root}", *FORMS)
    assert code == 0 and after == before


def test_our_metrics_equal_mtebs_on_the_same_ranking(root):
    data, rng = read_set(root / "scifact"), np.random.default_rng(0)
    run = {
        query: {data.corpus_ids[i]: float(rng.integers(8)) for i in rng.choice(90, 60, replace=False)}  # with ties
        for query in data.query_ids
    }
    judgments = dict(zip(data.query_ids, data.judgments))
    theirs = calculate_retrieval_scores(run, judgments, [1, 3, 10, 100])
    names = [f"{kind}@{k}" for kind in ("ndcg", "recall", "map", "precision") for k in (1, 3, 10, 100)]
    ours = metrics.score_run(run, judgments, [*names, "mrr@10"])
    for kind, scores in (("ndcg", theirs.ndcg), ("recall", theirs.recall), ("map", theirs.map)):
        for name, value in scores.items():
            assert ours[f"{kind}@{name.rpartition('_')[2] if '_' in name else name.rpartition('@')[2]}"].mean() == (
                pytest.approx(value, abs=6e-6)
            )
    of_queries = {query: row["ndcg_cut_10"] for query, row in theirs.all_scores.items()}
    np.testing.assert_allclose(ours["ndcg@10"], [of_queries[query] for query in data.query_ids], atol=1e-9)


def test_our_counts_equal_mtebs_descriptive_statistics(root):
    (task,) = mteb_tasks.find(tasks=["SciFact"], data_root=str(root))
    task.load_data()
    theirs = task._calculate_descriptive_statistics_from_split("test")
    ours = read_set(root / "scifact").counts
    assert (ours["queries"], ours["texts"]) == (theirs["num_queries"], theirs["num_documents"])
    average = theirs["relevant_docs_statistics"]["average_relevant_docs_per_query"]
    assert ours["judgments"] / ours["queries"] == pytest.approx(average)


def test_bm25_has_the_same_scores_with_and_without_mteb(root, tmp_path):
    _, by_mteb = evaluate(tmp_path / "a", "--model=bm25", "--tasks", "SciFact", f"--data_root={root}")
    _, ours = evaluate(tmp_path / "b", "--model=bm25", f"--data={root / 'scifact'}", "--languages", "eng")
    (theirs,) = mteb.evaluate(
        mteb.get_model("mteb/baseline-bm25s"),
        mteb_tasks.find(tasks=["SciFact"], data_root=str(root)),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    ).task_results
    for metric in ("ndcg@10", "recall@10"):
        value = by_mteb["SciFact", "float32", None, metric]
        assert value == pytest.approx(ours["scifact", "float32", None, metric], abs=6e-6)
        if metric == "ndcg@10":
            assert value == pytest.approx(theirs.scores["test"][0]["ndcg_at_10"], abs=0.02)  # it splits titles by \n


def test_candidates_of_a_reranking_task_are_scored_alone(root, model):
    data = read_set(root / "scifact")
    tables = mteb_tasks.tables(data)
    candidate = Candidate("local/small", "1", inference.load(model), {})
    metadata = mteb.get_task("SciFact").metadata
    how = dict(task_metadata=metadata, hf_split="test", hf_subset="default", encode_kwargs={"show_progress_bar": False})
    top_ranked = {query: data.corpus_ids[i : i + 20] for i, query in enumerate(data.query_ids)}
    for form in (Form("float32"), Form("int8", 16), Form("binary")):
        adapter = mteb_model.Adapter(candidate, form, mteb_model.Cache(), alone=True)
        adapter.index(tables["corpus"], num_proc=None, **how)
        whole = adapter.search(tables["queries"], top_k=90, num_proc=None, **how)
        few = adapter.search(tables["queries"], top_k=5, top_ranked=top_ranked, num_proc=None, **how)
        for query, found in few.items():
            among = sorted(top_ranked[query], key=lambda name: whole[query][name], reverse=True)
            fifth = whole[query][among[4]]
            assert len(found) == 5 and all(whole[query][name] >= fifth for name in found)


def test_texts_of_a_task_that_were_cut_are_counted_and_said(root, model, tmp_path, capsys):
    arguments = [f"--model={model}", "--tasks", "SciFact", f"--data_root={root}", "--max_length=6"]
    assert evaluate(tmp_path / "out", *arguments, "--precision", "int8", "binary")[0] == 0
    record = json.loads((tmp_path / "out" / "records" / "SciFact" / "default.test.json").read_text())
    cut = record["counts"]["cut texts"]
    assert record["counts"]["texts"] == 90 and record["counts"]["queries"] == 25 and 60 < cut <= 90
    assert f"SciFact: {cut} of 90 texts were cut to 6 tokens" in capsys.readouterr().err


def test_two_processes_evaluate_a_task_like_one_and_continue_it(evaluated, root, model, tmp_path):
    _, ours = evaluated
    command = [ROOT / "launch" / "local.sh", "2", "--", "evaluate", f"--model={model}", "--tasks", "SciFact"]
    embed = tmp_path / "embed"
    embed.write_text(f'#!/bin/sh\nexec {sys.executable} -m embed.cli "$@"\n')
    embed.chmod(0o755)
    environment = {**os.environ, "EMBED": str(embed), "JAX_PLATFORMS": "cpu", "LOGS": str(tmp_path / "logs")}
    for precisions in (["int8"], ["int8", "binary"]):
        more = [f"--data_root={root}", f"--output={tmp_path / 'out'}", "--precision", *precisions]
        done = subprocess.run([*command, *more], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["precision"] for row in rows} == {"int8", "binary"}
    for row in rows:
        assert row["value"] == pytest.approx(ours["SciFact", row["precision"], 32, row["metric"]], abs=1e-6)


def test_data_that_changed_under_one_name_are_read_again(root, model, tmp_path, capsys):
    """`datasets` knows a folder by its name and card."""
    arguments = [f"--model={model}", "--tasks", "SciFact", "--precision", "float32"]
    found = []
    for name in ("a", "b"):
        folder = write_retrieval(tmp_path / name / "scifact")
        if name == "b":
            (folder / "qrels.jsonl").write_text(lines([{"query-id": "q0", "corpus-id": "c5", "score": 1}]))
        _, values = evaluate(tmp_path / f"out_{name}", *arguments, f"--data_root={tmp_path / name}")
        found.append(values["SciFact", "float32", 32, "recall@100"])
        counts = json.loads((tmp_path / f"out_{name}" / "records" / "SciFact" / "default.test.json").read_text())[
            "counts"
        ]
        assert counts["queries"] == (25 if name == "a" else 1)
    assert evaluate(tmp_path / "out_a", *arguments, f"--data_root={tmp_path / 'b'}")[0] == 2
    assert "is of other data of SciFact: choose another --output" in capsys.readouterr().err


def test_an_interrupted_task_gets_the_queries_of_every_subset(tmp_path, model, monkeypatch):
    """MLQA-like: subsets of one task, interrupted while the second is evaluated."""
    root = tmp_path / "root" / "MLQARetrieval"
    task = two_subsets()
    monkeypatch.setattr(type(task), "load_data", _load_two_subsets(write_retrieval(root)))
    candidate, folder, form = Candidate("local/small", "1", inference.load(model)), tmp_path / "out", Form("int8")
    search, calls = mteb_model.Adapter.search, []

    def interrupted(self, *arguments, **keywords):
        calls.append(keywords["hf_subset"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return search(self, *arguments, **keywords)

    monkeypatch.setattr(mteb_model.Adapter, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mteb_run.evaluate(task, candidate, [form], folder, progress=False)
    task = two_subsets()
    made = mteb_run.evaluate(task, candidate, [form], folder, progress=False)
    assert calls == ["deu-deu", "eng-eng", "eng-eng"]  # the first is not searched again
    assert [record["subset"] for record in made] == ["deu-deu", "eng-eng"]
    # A record that was lost, as by a kill between mteb's file and ours, is made again.
    records.path(folder, "MLQARetrieval", "deu-deu", "test").unlink()
    task = two_subsets()
    again = mteb_run.evaluate(task, candidate, [form], folder, progress=False)
    assert calls[3:] == ["deu-deu"] and again == made
    for record in again:
        assert np.mean(record["queries"]["values"]["int8"]) == pytest.approx(
            record["values"]["int8"]["ndcg@10"], abs=6e-6
        )


def two_subsets():
    return mteb.get_task("MLQARetrieval", hf_subsets=["deu-deu", "eng-eng"], eval_splits=["test"])


def _load_two_subsets(folder):
    """A loader of a multilingual task that gives every subset the data of a folder."""

    def load(self, num_proc=None, **keywords):
        if not self.data_loaded:
            self.dataset = {s: {"test": mteb_tasks.tables(read_set(folder))} for s in self.hf_subsets}
            self.data_loaded = True

    return load


# Other models


def test_the_export_in_sentence_transformers_has_the_same_scores(evaluated, root, model, tmp_path):
    """Float32 of retrieval and of STS: mteb's own wrapper around sentence-transformers beside our engine."""
    from sentence_transformers import SentenceTransformer

    _, ours = evaluated
    tasks = mteb_tasks.find(tasks=["SciFact", "JSTS"], data_root=str(root))
    theirs = mteb.evaluate(
        SentenceTransformer(str(model), device="cpu"),
        tasks,
        cache=mteb.ResultCache(tmp_path),
        co2_tracker=False,
        show_progress_bar=False,
    )
    scores = {result.task_name: next(iter(result.scores.values()))[0] for result in theirs.task_results}
    assert ours["SciFact", "float32", 32, "ndcg@10"] == pytest.approx(scores["SciFact"]["ndcg_at_10"], abs=1e-4)
    assert ours["JSTS", "float32", 32, "cosine_spearman"] == pytest.approx(scores["JSTS"]["cosine_spearman"], abs=1e-4)


def test_a_model_of_sentence_transformers_is_evaluated_on_folders_and_tasks(root, tmp_path):
    import sentence_transformers
    import transformers

    folder = tmp_path / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    sentence_transformers.SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "st"))
    given = [f"--model={tmp_path / 'st'}", f"--data={root / 'scifact'}"]
    code, local = evaluate(tmp_path / "a", *given)
    assert code == 0 and {key[1] for key in local} == {"float32"}
    code, tasks = evaluate(tmp_path / "b", given[0], "--tasks", "SciFact", f"--data_root={root}")
    assert code == 0
    assert tasks["SciFact", "float32", 32, "ndcg@10"] == pytest.approx(
        local["scifact", "float32", 32, "ndcg@10"], abs=1e-4
    )
    assert evaluate(tmp_path / "c", *given, "--precision", "int8")[0] == 2
    # Other weights in a folder of the same name are another model.
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "st")
    assert evaluate(tmp_path / "a", *given)[0] == 2


def test_a_causal_model_with_pooling_of_the_last_token_is_left_to_sentence_transformers(tokenizer_folder, tmp_path):
    """The layout of Qwen3-Embedding."""
    import sentence_transformers
    import transformers
    from random_models import random_qwen3, save
    from sentence_transformers.sentence_transformer import modules

    folder = save(random_qwen3(transformers.Qwen3Model, is_causal=True), tokenizer_folder, tmp_path / "m")
    small.edit_config(folder, is_causal=None)
    transformer = modules.Transformer(str(folder))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "lasttoken")
    sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(tmp_path / "st"))
    candidate = models.load(str(tmp_path / "st"))
    assert not candidate.is_own and candidate.forms() == [Form("float32")]


# Names


def test_names_of_tasks_and_benchmarks_are_found_and_near_ones_suggested():
    for name, count in (("MTEB(Code, v1)", 12), ("ConTEB", 8), ("LongEmbed", 6)):
        assert len(mteb_tasks.find(benchmark=name)) == count
    ml = mteb_tasks.find(benchmark="MTEB(Multilingual, v2)", types=["Retrieval"])
    assert len(ml) == 18 and "MIRACLRetrievalHardNegatives" in [task.metadata.name for task in ml]
    (miracl,) = mteb_tasks.find(tasks=["MIRACLRetrievalHardNegatives"], languages=["swa", "jpn"])
    assert sorted(miracl.hf_subsets) == ["ja", "sw"]
    (tools,) = mteb_tasks.find(tasks=["ToolRetrieval"])
    assert len(tools.hf_subsets) > 30
    with pytest.raises(ValueError, match="there is no task 'SciFacts': did you mean SciFact"):
        mteb_tasks.find(tasks=["SciFacts"])
    with pytest.raises(ValueError, match="there is no benchmark 'ConTeb': did you mean ConTEB"):
        mteb_tasks.find(benchmark="ConTeb")
    with pytest.raises(ValueError, match="--types=retrieval must be one of .*Retrieval"):
        mteb_tasks.find(tasks=["SciFact"], types=["retrieval"])
    with pytest.raises(ValueError, match="no task is left by --languages=jpn"):
        mteb_tasks.find(tasks=["SciFact"], languages=["jpn"])
    with pytest.raises(ValueError, match="--splits=nonsense: the tasks have the splits test"):
        mteb_tasks.find(tasks=["SciFact"], splits=["nonsense"])
    for name, tasks in published.BENCHMARKS.items():
        if name.startswith("MTEB"):
            types = ["Retrieval"] if name.endswith(" Retrieval") else []
            found = mteb_tasks.find(benchmark=name.removesuffix(" Retrieval"), types=types)
            assert sorted(task.metadata.name for task in found) == sorted(tasks)
    assert published.BENCHMARKS["ConTEB"] == list(mteb_tasks.CONTEB)


def test_a_missing_folder_of_data_is_named_before_any_work(tmp_path, root):
    with pytest.raises(ValueError, match="has no folder nfcorpus for NFCorpus"):
        mteb_tasks.find(tasks=["SciFact", "NFCorpus"], data_root=str(root))
    with pytest.raises(ValueError, match="is not a folder"):
        mteb_tasks.find(tasks=["SciFact"], data_root=str(tmp_path / "none"))


def test_every_published_task_of_pplx_embed_is_a_task_of_mteb_or_conteb():
    for model in ("pplx-embed-v1-0.6b", "pplx-embed-v1-4b", "pplx-embed-context-v1-4b", "pplx-embed-context-v1-0.6b"):
        names = published.tasks_of(published.scores_of(model))
        tasks = {task.metadata.name: task for task in mteb_tasks.find(tasks=names)}
        assert list(tasks) == names
        for score in published.scores_of(model):
            if score.split:
                assert score.split in tasks[score.task].eval_splits, score


# Reproduction


def test_reproduction_prints_ours_beside_published_and_its_exit_code_says_whether_they_agree(
    root, model, tmp_path, monkeypatch, capsys
):
    arguments = ["--reproduce=all-MiniLM-L6-v2", f"--model={model}", "--tasks", "SciFact", f"--data_root={root}"]
    code, values = evaluate(tmp_path / "out", *arguments)
    output = capsys.readouterr().out
    ours = values["SciFact", "float32", 32, "ndcg@10"]
    assert code == 1 and f"{ours:.4f}" in output and f"{ours - 0.64508:+.4f}" in output and "differs" in output
    assert "0 of 1 published scores are reproduced" in output
    score = published.Score("m", "", "SciFact", "test", "default", "float32", ours + 0.001, "here")
    monkeypatch.setattr(published, "read", lambda: [score])
    assert evaluate(tmp_path / "out", "--reproduce=m", *arguments[1:])[0] == 0
    assert evaluate(tmp_path / "out", "--reproduce=m", *arguments[1:], "--tolerance=0.0005")[0] == 1


def test_data_that_cannot_be_read_are_one_sentence(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "root" / "scifact").mkdir(parents=True)
    (tmp_path / "root" / "scifact" / "notes.txt").write_text("nothing")
    arguments = [f"--model={model}", "--tasks", "SciFact", f"--data_root={tmp_path / 'root'}"]
    assert evaluate(tmp_path / "out", *arguments)[0] == 2
    assert "the data of SciFact" in capsys.readouterr().err
    assert isinstance(mteb_run.DataError("x"), ValueError)


def test_the_colab_of_evaluations_runs_from_top_to_bottom(tmp_path):
    outputs = colabs.execute(ROOT / "colabs" / "5_evaluate.ipynb", tmp_path)
    assert any(output.output_type == "display_data" for output in outputs)  # the plot
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    ours = [line.split() for line in said.splitlines() if "HERE: model" in line]
    assert {(task, precision) for task, *_, precision, _ in ours} == {
        (task, precision) for task in ("SciFact", "ConTEBSQuAD") for precision in ("float32", "int8", "binary")
    }
    assert "0.6874" in said and "of 1 published scores are reproduced" in said
