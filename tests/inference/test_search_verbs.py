"""embed encode, index, search and mine, from files to what they print and write."""

import json

import numpy as np
import pytest
import small

from embed import cli, inference

TEXTS = ["parse the config file", "a list of numbers", "open a vector index and search"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small.write_model(tmp_path_factory.mktemp("export") / "model"))


@pytest.fixture
def corpus(tmp_path):
    rows = [{"_id": f"t{i}", "text": text} for i, text in enumerate(TEXTS)] + [{"_id": "d", "chunks": TEXTS[:2]}]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("precision", inference.PRECISIONS)
def test_search_prints_rank_score_id_and_text_of_the_nearest(model, corpus, capsys, precision):
    arguments = ["--model", model, "--corpus", corpus, "--precision", precision, "--truncate_dim", "16"]
    assert cli.main(["search", *arguments, "--query", TEXTS[2], "--top", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert rows[0][:5] == ["1", "0" if "binary" in precision else "1.000", "t2", "open", "a"]
    assert len(rows) == 2


def test_a_stored_index_gives_the_results_of_the_corpus(model, corpus, tmp_path, capsys):
    folder = str(tmp_path / "index")
    assert cli.main(["index", "--model", model, "--corpus", corpus, "--precision", "int8", "--output", folder]) == 0
    assert "5 int8 vectors" in capsys.readouterr().out
    search = ["search", "--model", model, "--query", "the list", "--query", "open"]
    cli.main([*search, "--index", folder])
    stored = capsys.readouterr().out
    cli.main([*search, "--corpus", corpus, "--precision", "int8"])
    assert stored == capsys.readouterr().out
    assert "d#0" in stored and stored.count("cosine") == 2


def test_encode_writes_a_row_a_text_or_chunk(model, corpus, tmp_path):
    output = str(tmp_path / "v.npy")
    assert cli.main(["encode", "--model", model, "--corpus", corpus, "--precision", "ubinary", "--output", output]) == 0
    expected = inference.load(model).encode_documents([[t] for t in TEXTS] + [TEXTS[:2]], precision="ubinary")
    np.testing.assert_array_equal(np.load(output, allow_pickle=False), np.concatenate(expected), strict=True)
    assert cli.main(["encode", "--model", model, "--text", "the", "--text", "of a", "--output", output]) == 0
    assert np.load(output).shape == (2, 32)


def test_mine_writes_negatives_that_are_no_answer_of_the_query(model, tmp_path, capsys):
    files = {
        "corpus": [{"_id": f"c{i}", "text": text} for i, text in enumerate([*TEXTS, TEXTS[0]])],
        "queries": [{"_id": "q0", "text": "config file"}, {"_id": "q1", "text": "numbers"}],
        "qrels": [
            {"query-id": "q0", "corpus-id": "c0", "score": 1},
            {"query-id": "q1", "corpus-id": "c1", "score": 1},
            {"query-id": "q1", "corpus-id": "c2", "score": 1},
        ],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "negatives.jsonl"
    paths = ["--model", model, "--data", str(tmp_path), "--output", str(output)]
    code = cli.main(["mine", *paths, "--margin", "-2", "--num_negatives", "3"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 0
    # c0 and c3 are one text, so which of them ranks first is a matter of a last bit; both never appear.
    same = {"c3": "c0"}
    assert [(r["query-id"], r["corpus-id"], sorted(same.get(n, n) for n in r["negatives"])) for r in rows] == [
        ("q0", "c0", ["c1", "c2"]),
        ("q1", "c1", ["c0"]),
        ("q1", "c2", ["c0"]),
    ]
    assert "short 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--corpus", "{corpus}"], "expected a model folder"),
        (["--model", "{model}", "--corpus", "nowhere"], "no file nowhere"),
        (["--model", "{model}", "--corpus", "{corpus}", "--truncate_dim", "99"], "truncate_dim=99 must be in 1..32"),
        (["--model", "{model}", "--corpus", "{corpus}", "--top", "0"], "k=0 must be positive"),
        (["--model", "{model}", "--index", "nowhere"], "no index at nowhere"),
        (["--model", "{model}", "--index", "x", "--precision", "int8"], "fixed by --index"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(model, corpus, capsys, arguments, message):
    arguments = [a.format(model=model, corpus=corpus) for a in arguments]
    assert cli.main(["search", *arguments, "--query", "the"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed:")]
    assert len(error) == 1 and message in error[0]


def test_a_query_without_tokens_is_one_sentence(model, corpus, capsys):
    assert cli.main(["search", "--model", model, "--corpus", corpus, "--query", " "]) == 2
    assert "text 0 has no tokens" in capsys.readouterr().err
