"""embed encode, index, search and mine: what they read, print and write."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small

from embed import cli, inference, runs
from embed.evaluation import retrieval
from embed.evaluation.sets import read_set

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


@pytest.mark.parametrize("precision", ["float32", "binary"])
def test_search_json_prints_one_object_per_result_and_nothing_else(model, tmp_path, capsys, precision):
    corpus, queries = tmp_path / "c.jsonl", ["the list", "ü\n“open”"]
    texts = {"a": "a list\nof numbers", "ü": "größe “x”", "c": "open a file"}
    corpus.write_text("".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()))
    search = ["search", "--model", model, "--corpus", str(corpus), "--precision", precision, "--top", "2", "--json"]
    assert cli.main([*search, "--query", queries[0], "--query", queries[1]]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    encoder = inference.load(model)
    stored, asked = (encoder.encode(some, precision=precision) for some in (list(texts.values()), queries))
    scores, indices = inference.search(asked, stored, 2, precision)
    assert rows == [
        {"query": query, "rank": rank + 1, "id": key, "score": pytest.approx(scores[q][rank]), "text": texts[key]}
        for q, query in enumerate(queries)
        for rank, key in enumerate(list(texts)[i] for i in indices[q])
    ]


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


def test_encode_writes_a_row_per_text_or_chunk(model, corpus, tmp_path):
    output = str(tmp_path / "v.npy")
    assert cli.main(["encode", "--model", model, "--corpus", corpus, "--precision", "ubinary", "--output", output]) == 0
    expected = inference.load(model).encode_documents([[t] for t in TEXTS] + [TEXTS[:2]], precision="ubinary")
    np.testing.assert_array_equal(np.load(output, allow_pickle=False), np.concatenate(expected), strict=True)
    more = ["--text", "the", "--text", "of a", "--overwrite"]
    assert cli.main(["encode", "--model", model, *more, "--output", output]) == 0
    assert np.load(output).shape == (2, 32)


def test_encode_writes_parquet_rows_of_ids_texts_and_vectors(model, corpus, tmp_path, capsys):
    output = tmp_path / "v.parquet"
    encode = ["encode", "--model", model, "--corpus", corpus, "--output"]
    assert cli.main([*encode, str(output)]) == 0 and cli.main([*encode, str(tmp_path / "v.npy")]) == 0
    rows = pq.read_table(output).to_pylist()
    assert [row["_id"] for row in rows] == ["t0", "t1", "t2", "d#0", "d#1"]
    assert [row["text"] for row in rows] == [*TEXTS, *TEXTS[:2]]
    np.testing.assert_array_equal(
        np.array([row["vector"] for row in rows], np.float32), np.load(tmp_path / "v.npy"), strict=True
    )
    assert cli.main([*encode, str(output), "--overwrite"]) == 0
    for content in (b"PAR1", b"other"):
        output.write_bytes(content)
        assert cli.main([*encode, str(output), "--overwrite"]) == 2
        assert "was not written by this command" in capsys.readouterr().err and output.read_bytes() == content


def test_a_late_interaction_model_warns_that_a_text_has_one_vector_here(model, corpus, tmp_path, capsys):
    config = dataclasses.replace(small.config(), token_dimensions=8)
    late = small.write_model(tmp_path / "late", small.random_params(config), config)
    for source, warned in ((late, True), (model, False)):
        output = tmp_path / f"{warned}.npy"
        assert cli.main(["encode", f"--model={source}", f"--corpus={corpus}", f"--output={output}"]) == 0
        assert ("is a late-interaction model: this command uses one vector" in capsys.readouterr().err) == warned


def test_mine_writes_negatives_that_are_not_relevant_to_the_query(model, tmp_path, capsys):
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
    # c0 and c3 have the same text, so the last bit decides which ranks first; they never appear together.
    same = {"c3": "c0"}
    assert [(r["query-id"], r["corpus-id"], sorted(same.get(n, n) for n in r["negatives"])) for r in rows] == [
        ("q0", "c0", ["c1", "c2"]),
        ("q1", "c1", ["c0"]),
        ("q1", "c2", ["c0"]),
    ]
    assert "short 3" in capsys.readouterr().out


def test_a_judge_scores_the_candidates_that_mine_writes_and_the_margin_compares_its_scores(model, tmp_path, capsys):
    texts = small.sentences(12, seed=3)
    files = {
        "corpus": [{"_id": f"c{i}", "text": text} for i, text in enumerate([*texts, texts[5], " "])],
        "queries": [{"_id": "q0", "text": "config file"}, {"_id": "q1", "text": "numbers"}],
        "qrels": [{"query-id": q, "corpus-id": c, "score": 1} for q, c in (("q0", "c0"), ("q1", "c1"), ("q1", "c2"))],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates, scores, output = (str(tmp_path / name) for name in ("candidates", "scores", "negatives"))
    mine = ["mine", "--model", model, "--data", str(tmp_path), "--rank_window", "2", "9"]
    assert cli.main([*mine, "--candidates", "--output", candidates]) == 0
    assert f"pairs; written to {candidates}" in capsys.readouterr().out
    pairs = [json.loads(line) for line in Path(candidates).read_text().splitlines()]
    relevant = [(p["query-id"], p["corpus-id"]) for p in pairs if p["rank"] is None]
    assert relevant == [("q0", "c0"), ("q1", "c1"), ("q1", "c2")]
    of = {q: [p for p in pairs if p["query-id"] == q and p["rank"] is not None] for q in ("q0", "q1")}
    for found in of.values():
        assert [p["rank"] for p in found] == sorted({p["rank"] for p in found} & set(range(2, 9))) and len(found) >= 4
        assert [p["score"] for p in found] == sorted((p["score"] for p in found), reverse=True)
        assert not {"c5", "c12"} <= {p["corpus-id"] for p in found}

    def judge(left_out=(), **changes):
        """Scores of every pair but some of q0: 0 for relevant texts, -1 for others, for q0 with `changes`."""
        rows = [p | {"score": -float(p["rank"] is not None)} for p in pairs]
        rows = [r | {"score": changes.get(r["corpus-id"], r["score"])} if r["query-id"] == "q0" else r for r in rows]
        kept = [row for row in rows if (row["query-id"], row["corpus-id"]) not in {("q0", name) for name in left_out}]
        Path(scores).write_text("".join(json.dumps(row) + "\n" for row in kept))
        return cli.main([*mine, "--scores", scores, "--margin", "0.5", "--output", output, "--overwrite"])

    ids = [p["corpus-id"] for p in of["q0"]]
    assert judge(left_out=ids[:1], **{ids[1]: -0.4, ids[3]: -0.5}) == 0
    rows = [json.loads(line) for line in Path(output).read_text().splitlines()]
    assert rows[0] == {"query-id": "q0", "corpus-id": "c0", "negatives": [ids[2], ids[3], *ids[4:]]}
    assert judge(left_out=["c0"]) == 2
    sentence = "has no score for 1 of the 3 relevant texts, first for query 'q0' and text 'c0'"
    assert sentence in capsys.readouterr().err
    for line, sentence in (
        ({"query-id": "q0", "corpus-id": "c99", "score": 1}, "corpus-id 'c99', score 1: expected ids"),
        ({"query-id": "q0", "corpus-id": "c0", "score": "1"}, "score '1': expected ids"),
        ({"query-id": "q0", "corpus-id": "c0", "score": 7}, "'c0' has score 7 for 'q0', and"),
    ):
        Path(scores).write_text(Path(candidates).read_text() + json.dumps(line))
        assert cli.main([*mine, "--scores", scores, "--output", output, "--overwrite"]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main([*mine, "--scores", scores, "--candidates", "--output", output, "--overwrite"]) == 2
    assert "argument --candidates: not allowed with argument --scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--corpus", "{corpus}"], "expected a model folder"),
        (["--model", "{model}", "--corpus", "nowhere"], "no file nowhere"),
        (["--model", "{model}", "--corpus", "{corpus}", "--truncate_dim", "99"], "truncate_dim=99 must be in 1..32"),
        (["--model", "{model}", "--corpus", "{corpus}", "--top", "0"], "--top=0 must be positive"),
        (["--model", "{model}", "--index", "nowhere"], "no index at nowhere"),
        (["--model", "{model}", "--index", "x", "--precision", "int8"], "set by --index"),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_exit_code_2(model, corpus, capsys, arguments, message):
    arguments = [a.format(model=model, corpus=corpus) for a in arguments]
    assert cli.main(["search", *arguments, "--query", "the"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed:")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("query", "message"),
    [(" ", "--query=' ' is blank"), ("", "--query='' is blank"), ("x\udcfc", "is not UTF-8 at character 1")],
)
def test_a_query_or_text_that_is_blank_or_not_utf8_is_refused(model, corpus, capsys, query, message):
    assert cli.main(["search", "--model", model, "--corpus", corpus, "--query", query]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["encode", "--model", model, "--text", query, "--output", corpus + ".npy"]) == 2
    assert message.replace("query", "text") in capsys.readouterr().err


# One text, one vector


def test_a_title_is_part_of_the_text_in_every_verb(model, tmp_path, capsys):
    rows = [{"_id": f"t{i}", "title": "open query", "text": text} for i, text in enumerate(TEXTS)]
    whole = [{"_id": row["_id"], "text": f"open query {row['text']}"} for row in rows]
    queries = [{"_id": "q", "text": "parse"}]
    qrels = [{"query-id": "q", "corpus-id": "t0", "score": 1}]
    outputs = []
    for name, corpus in (("titles", rows), ("whole", whole)):
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source, options = ["--model", model, "--corpus", str(folder / "corpus.jsonl")], ["--margin", "-2"]
        data = ["--model", model, "--data", str(folder)]
        assert cli.main(["encode", *source, "--output", str(folder / "v.npy")]) == 0
        assert cli.main(["index", *source, "--output", str(folder / "i")]) == 0
        assert cli.main(["evaluate", *data, "--output", str(folder / "e")]) == 0
        assert cli.main(["mine", *data, *options, "--output", str(folder / "n")]) == 0
        capsys.readouterr()
        assert cli.main(["search", *source, "--query", "parse"]) == 0
        index = inference.Index.load(folder / "i")
        written = [(folder / file).read_bytes() for file in ("v.npy", "n")]
        written.append([row["value"] for row in json.loads((folder / "e" / "summary.json").read_text())])
        (segment,) = index.segments
        texts = [row["text"] for row in segment.rows]
        outputs.append([*written, segment.vectors.tobytes(), texts, capsys.readouterr().out])
        vectors = np.load(folder / "v.npy")
        np.testing.assert_array_equal(vectors, segment.vectors)
        np.testing.assert_array_equal(vectors, retrieval.embed_corpus(inference.load(model), read_set(folder)))
    assert outputs[0] == outputs[1]


def test_an_empty_corpus_row_of_a_set_is_counted_and_never_found(model, tmp_path, capsys):
    files = {
        "corpus": [{"_id": "e", "text": " "}, *({"_id": f"c{i}", "text": text} for i, text in enumerate(TEXTS))],
        "queries": [{"_id": "q", "text": "config file"}],
        "qrels": [{"query-id": "q", "corpus-id": "c0", "score": 1}],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", model, "--data", str(tmp_path)]
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "e")]) == 0
    assert f"embed: warning: {tmp_path.name}: empty texts 1 (never found)" in (error := capsys.readouterr().err)
    assert "UserWarning" not in error
    encoder = inference.load(model)
    with pytest.warns(UserWarning, match="empty texts 1 "):
        data = read_set(tmp_path)
    forms = [retrieval.Form(precision) for precision in inference.PRECISIONS]
    for ranking in retrieval.rank(encoder, data, forms, depth=4).values():
        assert sorted(ranking[0]) == [-1, 1, 2, 3]
    assert cli.main(["mine", *arguments, "--margin", "-2", "--output", str(tmp_path / "n")]) == 0
    assert sorted(json.loads((tmp_path / "n").read_text())["negatives"]) == ["c1", "c2"]
    (tmp_path / "qrels.jsonl").write_text('{"query-id": "q", "corpus-id": "e", "score": 1}')
    assert cli.main(["mine", *arguments, "--output", str(tmp_path / "m")]) == 2
    assert "corpus.jsonl:1 (_id 'e') is relevant to a query but has no text" in capsys.readouterr().err


# Long texts


@pytest.mark.parametrize("verb", ["encode", "index", "search", "evaluate", "mine"])
def test_a_long_text_is_named_by_line_and_id_and_cut_if_asked(verb, model, tmp_path, capsys):
    rows = {
        "corpus": [{"_id": "a", "text": "the"}, {"_id": "b", "text": "the file " * 20}, {"_id": "c", "text": "a list"}],
        "queries": [{"_id": "q", "text": "the"}],
        "qrels": [{"query-id": "q", "corpus-id": "a", "score": 1}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = f"--data={tmp_path}" if verb in ("evaluate", "mine") else f"--corpus={tmp_path / 'corpus.jsonl'}"
    more = ["--query=the"] if verb == "search" else [f"--output={tmp_path / 'out'}"]
    arguments = [verb, f"--model={model}", source, *more, "--max_length=9"]
    if verb == "evaluate":  # which always cuts
        assert cli.main(arguments) == 0
        assert f"embed: warning: {tmp_path.name}: 1 of 3 texts were cut to 9 tokens" in capsys.readouterr().err
        return
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    line = "corpus.jsonl:2" if verb == "mine" else "corpus.jsonl, line 2"
    assert f"{line} (_id 'b') has" in error and "max_length (--max_length) is 9" in error and "--truncate" in error
    assert cli.main([*arguments, "--truncate"]) == 0
    noun = "texts" if verb == "mine" else "documents"
    assert f"1 of 3 {noun} were cut to 9 tokens" in capsys.readouterr().err


def test_max_length_may_not_exceed_that_of_the_model(tmp_path, capsys):
    model = small.write_model(tmp_path / "m", embedding={"max_length": 5})
    for value, message in ((6, "--max_length=6 must be at most 5"), (0, "--max_length=0 must be positive")):
        arguments = [f"--model={model}", "--text=x", f"--max_length={value}", f"--output={tmp_path / 'v.npy'}"]
        assert cli.main(["encode", *arguments]) == 2
        assert message in capsys.readouterr().err


# The model of an index


@pytest.mark.parametrize("change", ["weights", "separator", "tanh", "max_length"])
def test_an_index_is_refused_when_its_model_was_replaced(change, tmp_path, corpus, capsys):
    model, folder = tmp_path / "model", str(tmp_path / "index")
    small.write_model(model)
    assert cli.main(["index", f"--model={model}", f"--corpus={corpus}", f"--output={folder}"]) == 0
    search = ["search", f"--model={model}", f"--index={folder}", "--query=the"]
    assert cli.main(search) == 0
    changes = {
        "weights": dict(params_=small.random_params(small.config(), 1)),
        "separator": dict(embedding={"separator": False}),
        "tanh": dict(tanh=True),
        "max_length": dict(embedding={"max_length": 99}),
    }
    small.write_model(model, **changes[change])
    capsys.readouterr()
    assert cli.main(search) == 2
    error = capsys.readouterr().err
    assert f"the index was made with the model at {model} (digest " in error and len(error.splitlines()) == 1


def test_the_digest_of_a_checkpoint_depends_on_all_that_changes_a_vector_but_not_on_its_folder():
    made = runs.Checkpoint(
        "stage",
        {"folder": "a", "step": 3, "digest": "0123"},
        small.config(),
        lambda shardings: small.params(),
        small.tokenizer,
        {},
        True,
    )
    mesh = inference.encoder.sharding.make_mesh()

    def digest(**changes):
        return runs.make_encoder(dataclasses.replace(made, **changes), mesh).digest

    assert digest(identity=made.identity | {"folder": "b"}) == digest()
    changes = [{"separator": False}, {"max_length": 9}, {"context_length": 9}, {"tanh": True}]
    changes += [{"identity": made.identity | {"digest": "4"}}]
    changes += [{"identity": {"merge": [made.identity, made.identity], "ratio": ratio}} for ratio in (0.5, 0.6)]
    assert len({digest(), *(digest(**change) for change in changes)}) == 8
    assert runs.make_encoder(made, mesh, small.params()).digest is None  # for other parameters


# Output


def test_output_to_a_file_is_not_cut(model, tmp_path, capsys):
    text, name = "parse the config file " * 20, "a/very/long/identifier/" * 9
    (tmp_path / "c").write_text(json.dumps({"_id": name, "text": text}))
    assert cli.main(["search", f"--model={model}", f"--corpus={tmp_path / 'c'}", "--query=parse"]) == 0
    out = capsys.readouterr().out
    assert text.strip() in out and name in out and all(line == line.rstrip() for line in out.splitlines())
    output = tmp_path / ("long" * 40)
    assert cli.main(["encode", f"--model={model}", "--text=the", f"--output={output}"]) == 0
    assert capsys.readouterr().out.endswith(f"written to {output}\n")


def test_the_commands_of_docs_search_run_as_written(model, corpus, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.S)[1].splitlines()
    data = tmp_path / "set"
    data.mkdir()
    (data / "corpus.jsonl").write_text(json.dumps({"_id": "c", "text": "the"}))
    (data / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "a"}))
    (data / "qrels.jsonl").write_text(json.dumps({"query-id": "q", "corpus-id": "c", "score": 1}))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = shlex.split(command.replace("MODEL", model).replace("SET", "set"))
        assert arguments[0] == "embed" and cli.main(arguments[1:]) == 0, command
    assert len(commands) == 6
