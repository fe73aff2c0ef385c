"""embed evaluate --data: what it prints, writes, continues and refuses."""

import dataclasses
import json
import re

import pytest
import small
from evaluation_sets import make

from embed import cli, inference
from embed.evaluation import compare, models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "set", chunked=True)


def run(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def values(output):
    rows = json.loads((output / "summary.json").read_text())
    return {(row["precision"], row["dimensions"], row["metric"]): row["value"] for row in rows}


def test_without_an_output_the_table_is_printed(model, data, capsys):
    assert run(f"--model={model}", f"--data={data}", "--precision", "int8") == 0
    output = capsys.readouterr().out
    assert "set test, 12 queries" in output and "int8" in output and "ndcg@10" in output


def test_forms_and_metrics_are_added_to_what_is_there(model, data, tmp_path, monkeypatch):
    output = tmp_path / "out"
    common = (f"--model={model}", f"--data={data}", f"--output={output}")
    assert run(*common, "--precision", "int8", "--metrics", "recall@3") == 0
    first = values(output)
    assert run(*common, "--precision", "binary", "--truncate_dim", 16) == 0
    assert run(*common, "--precision", "int8", "--metrics", "precision@5") == 0
    last = values(output)
    assert first.items() <= last.items() and ("int8", 32, "precision@5") in last and ("binary", 16, "ndcg@10") in last

    def fail(*_, **__):
        pytest.fail("a text was encoded again")

    monkeypatch.setattr(inference.Encoder, "encode_segments", fail)
    assert run(*common, "--precision", "binary", "--truncate_dim", 16) == 0
    assert run(*common, "--precision", "int8", "--metrics", "recall@3", "precision@5") == 0
    assert values(output) == last


def test_token_vectors_are_one_of_the_forms_of_a_late_interaction_model(data, tmp_path, capsys):
    config = dataclasses.replace(small.config(), token_dimensions=12)
    late, output = small.write_model(tmp_path / "late", small.random_params(config), config), tmp_path / "out"
    assert run(f"--model={late}", f"--data={data}", f"--output={output}") == 0
    assert {form for form, *_ in values(output)} == {"float32", "int8", "binary", "multi"}
    assert ("multi", None, "ndcg@10") in values(output)
    (model,), _ = compare.read([output])
    assert 48 < model.bytes("multi") < 48 * 60 and model.bytes("int8") == 32  # 12 numbers per token
    assert "| multi |" in "\n".join(compare.sections(tmp_path, [model], []))
    assert run(f"--model={late}", f"--data={data}", "--precision", "multi", "--truncate_dim", 16) == 0
    table = capsys.readouterr().out
    assert "multi" in table and "multi-16" not in table


def test_an_output_of_another_model_setting_or_content_is_refused(model, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(f"--model={model}", f"--data={data}", f"--output={output}") == 0
    other = small.write_model(tmp_path / "m", small.random_params(small.config(), 1))
    for arguments, sentence in (
        ([f"--model={other}", f"--data={data}"], "model.revision was"),
        ([f"--model={model}", f"--data={data}", "--alone"], "settings.alone was False, now True"),
        ([f"--model={model}", f"--data={data}", "--max_length=20"], "model.max_length was"),
        ([f"--model={model}", f"--data={make(tmp_path / 'set', chunked=False)}"], "of another content of set"),
    ):
        assert run(*arguments, f"--output={output}") == 2
        assert sentence in capsys.readouterr().err
    assert run("--model=bm25", f"--data={data}", f"--output={tmp_path / 'b'}") == 0
    assert run("--model=bm25", f"--data={data}", f"--output={tmp_path / 'b'}", "--languages", "eng") == 2
    assert "settings.language was '', now 'eng'" in capsys.readouterr().err


def test_texts_that_were_cut_are_counted_in_the_record(model, data, tmp_path, capsys):
    assert run(f"--model={model}", f"--data={data}", "--alone", "--max_length=4", f"--output={tmp_path / 'o'}") == 0
    assert "embed: warning: set: 24 of 24 texts were cut to 4 tokens" in capsys.readouterr().err
    record = json.loads((tmp_path / "o" / "records" / "set" / "default.test.json").read_text())
    assert record["counts"]["cut texts"] == 24 and record["counts"]["texts"] == 24


def test_the_name_of_a_run_and_its_stage_or_export_is_a_model(model, tmp_path):
    run_folder = tmp_path / "run"
    small.write_model(run_folder / "export" / "embed")
    assert models.resolve(f"{run_folder}:embed") == str(run_folder / "export" / "embed")
    assert models.resolve(str(model)) == str(model) and models.resolve("owner/name") == "owner/name"
    assert models.resolve("gs://bucket/model") == "gs://bucket/model"
    with pytest.raises(FileNotFoundError, match="neither .*/run/pair nor .*/run/export/pair is a stage or a model"):
        models.resolve(f"{run_folder}:pair")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data={data}"], "--model is needed"),
        (["--model={model}"], "name what to evaluate on: --data, --tasks, --benchmark or --reproduce"),
        (["--model={model}", "--tasks", "SciFact"], "--output is needed: results are saved task by task"),
        (["--model={model}", "--data={data}", "--data_root=x"], "--data_root is for --tasks and --benchmark"),
        (["--model={model}", "--tasks", "A", "--output=o", "--metrics", "ndcg@3"], "are for --data"),
        (["--model={model}", "--data={data}", "--metrics", "hits@3"], "metric 'hits@3' must be one of ndcg, recall"),
        (["--model={model}", "--data={data}", "--trec=5"], "--trec=5 must be positive, and needs --output"),
        (["--model={model}", "--data={data}", "--languages", "english"], "--languages=english must be ISO 639-3"),
        (["--model={model}", "--data={data}", "--languages", "eng"], "leave it out with --data"),
        (["--model={model}", "--data={data}", "--splits", "dev"], "no split 'dev'"),
        (["--model={model}", "--data={data}", "--truncate_dim", "64"], "truncate_dim=64 must be in 1..32"),
        (["--model={model}", "--data={data}", "--corpus_sizes", "99"], "--corpus_sizes=99 must be in 13..24"),
        (["--model=bm25", "--data={data}", "--precision", "int8"], "bm25 has no vectors"),
        (
            ["--model={model}", "--data={data}", "--precision", "multi"],
            "local/m has no token vectors; late-interaction",
        ),
        (["--model={model}", "--data", "{data}", "{data}"], "--data names two sets that are called set"),
        (["--reproduce=pplx"], "no published scores of 'pplx': there are those of .*Qwen/Qwen3-Embedding-0.6B"),
        (["--reproduce=pplx-embed-v1-0.6b", "--tasks", "SciFact"], "there is no published score of pplx-embed-v1-0.6b"),
        (
            ["--reproduce=pplx-embed-v1-0.6b", "--tasks", "SCIDOCS", "--precision", "float32"],
            "--precision=float32: published are scores in binary, int8",
        ),
        (["--reproduce=pplx-embed-v1-0.6b", "--data={data}"], "--reproduce has its own tasks"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, model, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*(argument.format(model=model, data=data) for argument in arguments)) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
    assert not list(tmp_path.iterdir())


def test_bm25_reads_each_chunk_alone(tmp_path, data):
    plain = make(tmp_path / "set", chunked=False)
    for folder, output in ((data, "a"), (plain, "b")):
        assert run("--model=bm25", f"--data={folder}", f"--output={tmp_path / output}") == 0
    assert values(tmp_path / "a") == values(tmp_path / "b")
