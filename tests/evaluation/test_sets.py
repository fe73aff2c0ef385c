import gzip
import json
import warnings

import numpy as np
import pytest
from evaluation_sets import make, write

from embed.evaluation.sets import has_set, read_set, read_subsets

CORPUS, QUERIES = [{"_id": "c", "text": "x"}], [{"_id": "q", "text": "y"}]
QREL = {"query-id": "q", "corpus-id": "c", "score": 1}


def test_a_set_is_read_with_its_documents_and_judgments(tmp_path):
    data = read_set(make(tmp_path / "set", chunked=True))
    assert (data.name, len(data.queries), data.corpus_ids[20]) == ("set", 12, "c20")
    assert [rows.tolist() for rows in data.documents] == [list(range(6 * d, 6 * d + 6)) for d in range(4)]
    assert data.judgments[3] == {"c3": 1, "c20": 2} and data.judgments[4] == {"c4": 1}
    assert data.relevant_rows[3].tolist() == [3, 20]
    plain = read_set(make(tmp_path / "plain", chunked=False))
    assert [rows.tolist() for rows in plain.documents] == [[i] for i in range(24)]


def test_a_folder_with_a_set_is_told_from_others_by_its_files(tmp_path):
    layouts = [
        make(tmp_path / "set", chunked=True),
        write_beir(tmp_path / "beir", ".gz"),
        write_mteb(tmp_path / "m", ""),
    ]
    assert all(map(has_set, layouts))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "queries.jsonl").write_text("")
    assert not any(map(has_set, ["", tmp_path / "half", tmp_path / "none", layouts[0] / "queries.jsonl"]))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_beir(folder, suffix):
    """Queries of two splits in one file, qrels as TSV with integer ids."""
    (folder / "qrels").mkdir(parents=True)
    opened = gzip.open if suffix == ".gz" else open
    with opened(folder / f"corpus.jsonl{suffix}", "wt") as file:
        file.write(lines([{"_id": "1", "title": "Title", "text": "one"}, {"_id": "2", "title": None, "text": "two "}]))
    with opened(folder / f"queries.jsonl{suffix}", "wt") as file:
        file.write(lines({"_id": name, "text": f"query {name}", "metadata": {}} for name in ("7", "8", "9")))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\t2\t1\n")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n8\t1\t2\n9\t1\t1\n9\t2\t0\n")
    return folder


def write_mteb(folder, suffix):
    """A card with the three configs, ids as numbers, qrels in Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {path}\n"
            for name, path in (("default", "qrels.parquet"), ("corpus", "c.jsonl"), ("queries", "q.jsonl"))
        )
        + "---\n"
    )
    pq.write_table(pa.table({"query-id": ["7"], "corpus-id": ["2"], "score": [1.0]}), folder / "qrels.parquet")
    (folder / "c.jsonl").write_text(
        lines([{"_id": 1, "title": "Title", "text": "one"}, {"_id": 2, "title": "", "text": "two "}])
    )
    (folder / "q.jsonl").write_text(lines([{"_id": 7, "text": "query 7"}, {"_id": 8, "text": "query 8"}]))
    return folder


@pytest.mark.filterwarnings("ignore:.*without a judgment")
@pytest.mark.parametrize("layout", [write_beir, write_mteb])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_and_mteb_folders_are_read_as_downloaded(tmp_path, layout, suffix):
    data = read_set(layout(tmp_path / "set", suffix))
    assert (data.query_ids, data.queries) == (["7"], ["query 7"])
    assert (data.corpus_ids, data.corpus) == (["1", "2"], ["Title one", "two"])
    assert data.judgments == [{"2": 1}]
    assert data.counts["unjudged queries"] == (2 if layout is write_beir else 1)


def test_another_split_has_its_own_judgments_and_queries(tmp_path):
    with pytest.warns(UserWarning, match="set: unjudged queries 1 .without a judgment, left out"):
        data = read_set(write_beir(tmp_path / "set", ""), split="dev")
    assert data.query_ids == ["8", "9"] and data.judgments == [{"1": 2}, {"1": 1, "2": 0}]


def write_conteb(folder):
    (folder / "documents").mkdir(parents=True)
    (folder / "queries").mkdir()
    chunks = [("b_1", "second"), ("b_0", "first"), ("a_x_0", "other")]
    (folder / "documents" / "test.jsonl").write_text(lines({"chunk_id": name, "chunk": text} for name, text in chunks))
    queries = [("?", "b_1"), ("!", "a_x_0"), ("?", "b_0")]
    (folder / "queries" / "test.jsonl").write_text(
        lines({"query": text, "chunk_id": name, "answer": ""} for text, name in queries)
        + lines([{"query": "several", "chunk_ids": ["b_0", "b_9"]}])
    )
    return folder


def test_a_conteb_folder_gives_documents_in_order_and_a_query_per_row(tmp_path):
    with pytest.warns(UserWarning, match="judgments of missing texts 1 "):
        data = read_set(write_conteb(tmp_path / "set"))
    assert data.corpus_ids == ["b_0", "b_1", "a_x_0"] and data.corpus == ["first", "second", "other"]
    assert [rows.tolist() for rows in data.documents] == [[0, 1], [2]]
    assert data.queries == ["?", "!", "?", "several"]
    assert data.judgments == [{"b_1": 1}, {"a_x_0": 1}, {"b_0": 1}, {"b_0": 1, "b_9": 1}]


def test_subsets_of_a_folder_are_sets(tmp_path):
    for subset in ("de", "en"):
        for name, rows in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", [QREL])):
            (tmp_path / f"{subset}-{name}.jsonl").write_text(lines(rows))
    assert [(subset, data.corpus) for subset, data in read_subsets(tmp_path)] == [("de", ["x"]), ("en", ["x"])]
    assert [subset for subset, _ in read_subsets(make(tmp_path / "one", chunked=False))] == ["default"]


def test_subsets_are_also_those_of_a_card(tmp_path):
    (tmp_path / "data").mkdir()
    configs = ""
    for name, file, rows in (("corpus", "c", CORPUS), ("queries", "q", QUERIES), ("qrels", "r", [QREL])):
        (tmp_path / "data" / f"{file}.jsonl").write_text(lines(rows))
        configs += f"- config_name: de-{name}\n  data_files:\n  - split: test\n    path: data/{file}.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [(subset, data.queries) for subset, data in read_subsets(tmp_path)] == [("de", ["y"])]


def test_a_query_with_the_text_of_a_titled_corpus_row_of_its_id_is_its_own(tmp_path):
    """As in ArguAna, whose corpus has titles and whose queries have none."""
    corpus = [{"_id": "q", "title": "animals", "text": "They feel."}, {"_id": "c", "title": "animals", "text": "No."}]
    queries = [{"_id": "q", "text": "They feel."}, {"_id": "c", "text": "animals No."}]
    qrels = [QREL, QREL | {"query-id": "c", "corpus-id": "q"}]
    with pytest.warns(UserWarning, match="own texts 2"):
        data = read_set(write(tmp_path / "set", corpus, queries, qrels))
    assert data.own_rows.tolist() == [0, 1]


def test_a_split_that_a_folder_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has one file of qrels, so it has no split 'dev'"):
        read_set(make(tmp_path / "set", chunked=False), split="dev")
    with pytest.raises(ValueError, match="train"):
        read_set(write_beir(tmp_path / "beir", ""), split="train")


def test_a_set_of_prepared_data_has_the_name_of_its_set(tmp_path):
    folder = make(tmp_path / "data" / "evaluation" / "functions" / "test", chunked=False)
    assert read_set(folder).name == "functions"


def test_what_a_metric_can_bear_is_counted_and_said(tmp_path):
    corpus = [*CORPUS, {"_id": "empty", "text": " "}, {"_id": "own", "text": "own text"}]
    queries = [
        *QUERIES,
        {"_id": "u", "text": "unjudged"},
        {"_id": "own", "text": "own text "},
        {"_id": "e", "text": ""},
    ]
    queries += [{"_id": "zero", "text": "nothing"}]
    qrels = [QREL, QREL | {"corpus-id": "missing"}, QREL | {"query-id": "own"}, QREL | {"query-id": "gone"}]
    qrels += [QREL | {"query-id": "e"}, QREL | {"query-id": "zero", "score": 0}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = read_set(write(tmp_path / "set", corpus, queries, qrels))
    said = [str(warning.message).removeprefix("set: ") for warning in caught]
    assert said == [
        "unjudged queries 1 (without a judgment, left out)",
        "queries without a relevant text 1 (all judged irrelevant, score 0)",
        "empty queries 1 (find nothing)",
        "empty texts 1 (never found)",
        "judgments of missing texts 1 (texts that are not in the corpus, never found)",
        "judgments of missing queries 1 (queries that are not there, left out)",
        "own texts 1 (queries that stand in the corpus; a query's own text does not count as found)",
    ]
    assert data.query_ids == ["q", "own", "e", "zero"]
    assert data.own_rows.tolist() == [-1, 2, -1, -1]


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        ([], QUERIES, [QREL], "corpus.jsonl is empty"),
        (CORPUS, QUERIES, [], "qrels.jsonl is empty"),
        (CORPUS, QUERIES, [QREL | {"query-id": "z"}], "set has no query with a judgment"),
        (CORPUS * 2, QUERIES, [QREL], "corpus.jsonl:2: the id 'c' is already used in .*corpus.jsonl:1"),
        (CORPUS, QUERIES * 2, [QREL], "queries.jsonl:2: the id 'q' is already used"),
        ([{"_id": "c"}], QUERIES, [QREL], "corpus.jsonl:1 ._id 'c'.: the text is None, expected a string"),
        ([{"text": "x"}], QUERIES, [QREL], 'corpus.jsonl:1: "_id" is None, expected a string or a whole number'),
        ([CORPUS[0] | {"title": 3}], QUERIES, [QREL], "the title is 3, expected a string"),
        ([CORPUS[0] | {"document": "d", "chunk": 1}], QUERIES, [QREL], "chunk 1 of document 'd' must be 0"),
        ([CORPUS[0] | {"document": ["d"]}], QUERIES, [QREL], r"\"document\" is \['d'\], expected a string"),
        ([{"_id": "c", "chunks": ["x"]}], QUERIES, [QREL], 'has "chunks": in a corpus each chunk is a row'),
        ([{"_id": "c", "text": ""}], QUERIES, [QREL], "all 1 texts of the corpus are empty"),
        (CORPUS, [{"_id": "q", "chunks": ["x"]}], [QREL], "queries.jsonl:1 .*the text is None, expected a string"),
        (CORPUS, QUERIES, [QREL | {"query-id": ["q"]}], r"\"query-id\" is \['q'\], expected a string"),
        (CORPUS, QUERIES, [QREL | {"score": True}], "score True: expected a whole number"),
        (CORPUS, QUERIES, [QREL | {"score": 0.5}], "qrels.jsonl:1: query-id 'q', .*score 0.5: expected a whole number"),
        (CORPUS, QUERIES, [QREL | {"score": "high"}], "score 'high': expected a whole number"),
        (CORPUS, QUERIES, [QREL | {"score": "Infinity"}], "score 'Infinity': expected a whole number"),
        (CORPUS, QUERIES, [QREL, QREL | {"score": 2}], "qrels.jsonl:2: 'c' has score 2 for 'q', but 1 in an earlier"),
    ],
)
def test_a_broken_set_is_one_sentence(tmp_path, corpus, queries, qrels, message):
    with pytest.raises(ValueError, match=message):
        read_set(write(tmp_path / "set", corpus, queries, qrels))


def test_an_infinite_grade_in_json_is_refused(tmp_path):
    folder = write(tmp_path / "set", CORPUS, QUERIES, [])
    (folder / "qrels.jsonl").write_text('{"query-id": "q", "corpus-id": "c", "score": Infinity}\n')
    with pytest.raises(ValueError, match="qrels.jsonl:1: .*"):
        read_set(folder)


def test_an_error_about_a_missing_folder_names_the_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one with corpus, queries and qrels .* or documents and"):
        read_set(tmp_path / "nowhere")


def test_rows_with_and_without_a_document_may_be_mixed(tmp_path):
    corpus = [{"_id": "a", "text": "x", "doc_id": 1}, {"_id": "b", "text": "y"}, {"_id": "c", "text": "z"}]
    corpus.append({"_id": "d", "text": "u", "doc_id": 1, "chunk": 1})
    folder = write(tmp_path / "set", corpus, [{"_id": "q", "text": "x"}], [QREL | {"corpus-id": "a"}])
    assert [rows.tolist() for rows in read_set(folder).documents] == [[0, 3], [1], [2]]


def test_scores_may_be_left_out_or_text_as_in_tsv(tmp_path):
    qrels = [{"query-id": "q", "corpus-id": "c"}, QREL | {"corpus-id": "d", "score": "2"}]
    data = read_set(write(tmp_path / "set", [*CORPUS, {"_id": "d", "text": "z"}], QUERIES, qrels))
    assert data.judgments == [{"c": 1, "d": 2}]
    assert isinstance(data.judgments[0]["d"], int) and np.concatenate(data.relevant_rows).tolist() == [0, 1]
