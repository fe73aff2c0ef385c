import json

import numpy as np
import pytest
import small

from embed import cli
from embed.evaluation import judgments
from embed.evaluation.sets import read_set

CLICKS = [
    ("cheap flights", "air.example"),
    ("low cost flights", "air.example"),
    (" low cost flights ", "air.example"),  # the same query
    ("flights to rome", "rome.example"),
    ("cheap flights", "rome.example"),
    ("weather", "weather.example"),
    *((f"q{i}", "home.example") for i in range(5)),
    ("", "air.example"),
]


def test_queries_that_led_to_one_url_are_relevant_to_each_other():
    made = judgments.by_shared_urls(CLICKS, max_per_url=4)
    text = {row["_id"]: row["text"] for row in made.corpus}
    assert len(text) == 9 and list(text.values())[:4] == [
        "cheap flights",
        "low cost flights",
        "flights to rome",
        "weather",
    ]
    pairs = {(text[row["query-id"]], text[row["corpus-id"]]) for row in made.qrels}
    flights = ("cheap flights", "low cost flights")
    assert pairs == {flights, flights[::-1], ("cheap flights", "flights to rome"), ("flights to rome", "cheap flights")}
    assert [row["text"] for row in made.queries] == ["cheap flights", "low cost flights", "flights to rome"]
    assert made.counts == {
        "clicks": 12,
        "empty queries": 1,
        "urls of too many queries": 1,
        "queries": 9,
        "urls": 4,
        "queries with a partner": 3,
    }


def test_a_sample_of_queries_does_not_depend_on_their_order():
    made = judgments.by_shared_urls(CLICKS, max_queries=2)
    again = judgments.by_shared_urls(reversed(CLICKS), max_queries=2)
    assert len(made.queries) == 2 and len(made.corpus) == 9
    assert {row["text"] for row in made.queries} == {row["text"] for row in again.queries}


def test_relevance_is_the_fusion_of_the_systems():
    first, second = np.array([[2, 0, 1]]), np.array([[0, 1, -1]])
    qrels = judgments.by_fusion(["q"], ["a", "b", "c"], [first, second], relevant=2)
    # a: 1/62 + 1/61, b: 1/63 + 1/62, c: 1/61
    assert [(row["query-id"], row["corpus-id"]) for row in qrels] == [("q", "a"), ("q", "b")]


def test_parts_of_a_corpus_are_nested_and_have_what_is_relevant():
    ids = [f"t{i}" for i in range(100)]
    parts = judgments.nested(ids, [7, 7, 99], [2, 10, 50, 100])
    assert [len(rows) for rows in parts.values()] == [2, 10, 50, 100]
    assert parts[2].tolist() == [7, 99]
    for small_part, large in zip(list(parts.values()), list(parts.values())[1:]):
        assert set(small_part.tolist()) < set(large.tolist())
    for size in (1, 101):
        with pytest.raises(ValueError, match=f"--corpus_sizes={size} must be in 2..100"):
            judgments.nested(ids, [7, 99], [size])


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.filterwarnings("ignore:.*own text does not count")
def test_query2query_is_made_and_evaluated_at_several_sizes(tmp_path, capsys):
    texts = small.sentences(60, seed=3)
    log = write(tmp_path / "log.jsonl", [{"query": text, "url": f"u{i // 3}"} for i, text in enumerate(texts)])
    folder, output = tmp_path / "set", tmp_path / "out"
    assert cli.main(["judge", f"--log={log}", f"--output={folder}"]) == 0
    data = read_set(folder)
    assert len(data.queries) == len(set(texts)) and (data.own_rows >= 0).all()
    model = small.write_model(tmp_path / "model")
    sizes = ["--corpus_sizes", f"{len(set(texts))}", "--metrics", "recall@5", "recall@1000"]
    assert cli.main(["evaluate", f"--model={model}", f"--data={folder}", f"--output={output}", *sizes]) == 0
    rows = json.loads((output / "summary.json").read_text())
    values = {(row["subset"], row["precision"], row["metric"]): row["value"] for row in rows}
    assert values["default", "int8", "recall@1000"] == 1
    assert values[f"default@{len(set(texts))}", "int8", "recall@5"] == values["default", "int8", "recall@5"] < 1


def test_query2doc_is_judged_by_several_systems_and_a_smaller_corpus_is_easier(tmp_path):
    texts = small.sentences(80, seed=4, longest=12)
    corpus = write(tmp_path / "c.jsonl", [{"_id": f"t{i}", "text": text} for i, text in enumerate(texts)])
    queries = write(
        tmp_path / "q.jsonl", [{"_id": f"q{i}", "text": " ".join(t.split()[:2])} for i, t in enumerate(texts[:20])]
    )
    model = small.write_model(tmp_path / "model")
    folder, output = tmp_path / "set", tmp_path / "out"
    arguments = ["judge", f"--queries={queries}", f"--corpus={corpus}", f"--output={folder}", "--relevant=3"]
    assert cli.main([*arguments, "--systems", "bm25"]) == 2  # one system
    assert cli.main([*arguments, "--systems", "bm25", "bm25"]) == 2  # twice
    chunked = write(tmp_path / "chunks.jsonl", [{"_id": "a", "chunks": ["x", "y"]}])
    assert cli.main([*arguments[:2], f"--corpus={chunked}", *arguments[3:], "--systems", "bm25", str(model)]) == 2
    assert cli.main([*arguments, "--max_queries=-1", "--systems", "bm25", str(model)]) == 2
    assert cli.main([*arguments, "--systems", "bm25", str(model)]) == 0
    data = read_set(folder)
    assert len(data.queries) == 20 and all(len(judged) == 3 for judged in data.judgments)
    assert json.loads((folder / "judged.json").read_text())["systems"] == ["bm25", str(model)]
    more = ["--trec=7", "--metrics", "recall@3", "--corpus_sizes", "60", "--name=o/m"]
    assert cli.main(["evaluate", "--model=bm25", f"--data={folder}", f"--output={output}", *more]) == 0
    rows = json.loads((output / "summary.json").read_text())
    found = {row["subset"]: row["value"] for row in rows if row["metric"] == "recall@3"}
    assert 0 < found["default"] <= found["default@60"] < 1
    (record,) = (json.loads(file.read_text()) for file in (output / "records" / "set").glob("*.60.json"))
    assert record["counts"]["texts"] == 60
    assert cli.main(["report", str(output), f"--output={tmp_path / 'report'}"]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "| set | o/m | 60 |" in report and "| set | nDCG@10 | 1 | 20 |" in report  # the part is not one of its sets
    run = (output / "runs" / "run.retrieve.top_7.set.test.o_m-float32.trec").read_text().splitlines()
    query, q0, text, rank, score, tag = run[0].split("\t")
    assert (query, q0, rank, score, tag) == ("q0", "Q0", "1", "1.0", "o_m-float32") and text in data.corpus_ids
    assert max(int(line.split("\t")[3]) for line in run) == 7
