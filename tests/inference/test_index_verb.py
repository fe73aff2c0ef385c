"""embed index and search: kinds, words, filters, documents, changes."""

import json

import pytest
import small

from embed import cli
from embed.inference import Index

ROWS = [
    {"_id": "a", "text": "parse the config file", "lang": "en", "year": 2020},
    {"_id": "b", "text": "a list of numbers", "lang": "de", "year": 2021},
    {"_id": "c", "chunks": ["open a vector index", "and search the list", "of files"], "lang": "en", "year": 2021},
    {"_id": "d", "text": "open the file", "lang": "fr", "year": 2020},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small.write_model(tmp_path_factory.mktemp("export") / "model"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def index(model, tmp_path):
    corpus, folder = write(tmp_path / "c.jsonl", ROWS), str(tmp_path / "index")
    arguments = ["--model", model, "--corpus", corpus, "--precision", "int8", "--bm25", "--output", folder]
    assert cli.main(["index", *arguments]) == 0
    return folder


def search(capsys, *arguments):
    """The results of a search, parsed."""
    capsys.readouterr()
    assert cli.main(["search", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_results_have_the_fields_and_the_document_of_their_row(model, index, capsys):
    results = search(capsys, "--model", model, "--index", index, "--query", "open a vector index", "--top", "9")
    assert [set(result) >= {"query", "rank", "id", "score", "text"} for result in results] == [True] * 6
    by_id = {result["id"]: result for result in results}
    assert by_id["c#1"]["document"] == "c" and by_id["c#1"]["fields"] == {"lang": "en", "year": 2021}
    assert "document" not in by_id["a"] and by_id["a"]["text"] == "parse the config file"


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (["lang=en"], {"a", "c#0", "c#1", "c#2"}),
        (["lang=en", "lang=de"], {"a", "b", "c#0", "c#1", "c#2"}),
        (["lang=en", "year=2021"], {"c#0", "c#1", "c#2"}),
        (["lang=xx"], set()),
    ],
)
def test_filters_of_one_field_are_alternatives_and_those_of_several_all_hold(model, index, capsys, filters, ids):
    chosen = [argument for each in filters for argument in ("--filter", each)]
    for more in ([], ["--hybrid"], ["--exact"]):
        results = search(capsys, "--model", model, "--index", index, "--query", "the list of file", *chosen, *more)
        assert {result["id"] for result in results} == ids


def test_hybrid_results_say_what_vectors_and_words_add(model, index, tmp_path, capsys):
    for source in (["--index", index], ["--corpus", str(tmp_path / "c.jsonl"), "--precision", "int8"]):
        results = search(capsys, "--model", model, *source, "--query", "config", "--hybrid", "--top", "3")
        for result in results:
            assert result["score"] == pytest.approx(sum(result["shares"].values()))
        with_words = [result["id"] for result in results if result["shares"]["bm25"]]
        assert with_words == ["a"] and results[0]["id"] == "a"
    capsys.readouterr()
    assert cli.main(["search", "--model", model, "--index", index, "--query", "config", "--hybrid"]) == 0
    first = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["1"])
    assert first[2].endswith("%") and first[3] == "a"


def test_documents_have_the_chunks_that_were_found(model, index, capsys):
    asked = ["--model", model, "--index", index, "--query", "and search the list", "--by_document"]
    results = search(capsys, *asked, "--top", "2")
    assert len(results) == 2 and results[0]["document"] == "c"
    assert results[0]["score"] == results[0]["chunks"][0]["score"] >= results[0]["chunks"][-1]["score"]
    assert {chunk["id"] for chunk in results[0]["chunks"]} <= {"c#0", "c#1", "c#2"}
    assert {result["document"] for result in search(capsys, *asked, "--top", "9")} == {"a", "b", "c", "d"}
    assert cli.main(["search", *asked]) == 0
    assert capsys.readouterr().out.count("c#") == 3


def test_an_index_is_updated_deleted_from_and_compacted(model, index, tmp_path, capsys):
    more = write(tmp_path / "more.jsonl", [{"_id": "c", "text": "whole"}, {"_id": "e", "text": "the query"}])
    update = ["index", "--update", index]
    capsys.readouterr()
    assert cli.main([*update, "--model", model, "--corpus", more]) == 0
    out = capsys.readouterr().out
    assert "vectors: 0 deleted, 2 added, 3 replaced by these" in out and "5 int8 vectors" in out
    assert cli.main([*update, "--delete", "a", "d"]) == 0
    assert "vectors: 2 deleted, 0 added" in capsys.readouterr().out
    asked = ["--model", model, "--index", index, "--query", "whole query", "--hybrid"]
    before = search(capsys, *asked)
    assert {result["id"] for result in before} == {"b", "c", "e"}
    assert cli.main([*update, "--compact"]) == 0
    assert len(Index.load(index).segments) == 1 and {r["id"] for r in search(capsys, *asked)} == {"b", "c", "e"}
    assert cli.main([*update, "--delete", "nobody"]) == 2
    assert "has no document 'nobody'; 1 of 1 are missing" in capsys.readouterr().err


def test_vectors_of_another_model_or_precision_are_not_added(model, index, tmp_path, capsys):
    other = str(small.write_model(tmp_path / "other", small.random_params(small.config(), 5)))
    more = write(tmp_path / "more.jsonl", [{"_id": "e", "text": "the query"}])
    for arguments, message in (
        (["--model", other, "--precision", "int8"], "has vectors with model"),
        (["--model", model, "--precision", "float32"], "has vectors with precision 'int8', not 'float32'"),
        (["--model", model, "--max_length", "9"], "has vectors with max_length None, not 9"),
        (["--model", model, "--bm25", "eng"], "was made with --bm25=any: --compact changes it for all rows"),
        (["--model", model, "--delete", "nobody"], "has no document 'nobody'; 1 of 1 are missing"),
    ):
        assert cli.main(["index", "--update", index, "--corpus", more, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert len(Index.load(index)) == 6


def test_an_index_is_made_of_encoded_shards_with_the_same_results(model, index, tmp_path, capsys):
    shards, second = str(tmp_path / "shards"), str(tmp_path / "second")
    encode = ["encode", "--model", model, "--input", str(tmp_path / "c.jsonl"), "--precision", "int8"]
    assert cli.main([*encode, "--shard_rows", "3", "--output", shards]) == 0
    assert cli.main(["index", "--vectors", shards, "--output", second, "--bm25"]) == 0
    query = ["--model", model, "--query", "open a vector index", "--hybrid"]
    assert search(capsys, *query, "--index", second) == search(capsys, *query, "--index", index)
    cut = [*encode, "--max_length", "3", "--truncate", "--output", str(tmp_path / "cut")]
    assert cli.main(cut) == 0
    assert cli.main(["index", "--vectors", str(tmp_path / "cut"), "--output", str(tmp_path / "third")]) == 0
    made = Index.load(tmp_path / "third").provenance
    assert made.max_length == 3 and made.cut > 0


def test_texts_are_divided_by_a_chunker(model, tmp_path, capsys):
    text = "parse the config file and open a list of numbers"
    corpus = write(tmp_path / "c.jsonl", [{"_id": "a", "text": text, "n": 1}])
    made = ["--model", model, "--corpus", corpus, "--chunker", "tokens", "--chunk_tokens", "5"]
    assert cli.main(["index", *made, "--output", str(tmp_path / "i")]) == 0
    results = search(capsys, "--model", model, "--index", str(tmp_path / "i"), "--query", "open", "--top", "99")
    assert len(results) > 1 and {result["document"] for result in results} == {"a"}
    assert all(result["text"] == text[result["start"] : result["end"]] for result in results)


@pytest.mark.parametrize("kind", ["exact", "binary", "ivf"])
def test_the_kind_of_an_index_is_an_option_and_what_it_reaches_is_printed(model, tmp_path, capsys, kind):
    rows = [{"_id": str(i), "text": text} for i, text in enumerate(small.sentences(60, seed=2))]
    corpus = write(tmp_path / "c.jsonl", rows)
    made = ["index", "--model", model, "--corpus", corpus, "--precision", "int8", "--kind", kind, "--recall", "0.9"]
    assert cli.main([*made, "--output", str(tmp_path / "i")]) == 0
    out = capsys.readouterr().out
    assert "60 int8 vectors" in out and (f"{kind}: finds " in out) == (kind != "exact")
    results = search(capsys, "--model", model, "--index", str(tmp_path / "i"), "--query", rows[7]["text"])
    assert results[0]["text"] == rows[7]["text"] and results[0]["score"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --output=FOLDER, a new index, or --update=INDEX"),
        (["--output=o", "--update=u"], "expected --output=FOLDER, a new index, or --update=INDEX"),
        (["--output=o"], "--output needs --corpus=FILE or --vectors=FOLDER"),
        (["--output=o", "--corpus=c"], "--corpus needs --model=MODEL"),
        (["--output=o", "--corpus=c", "--vectors=v"], "--corpus and --vectors: expected one of them"),
        (["--output=o", "--vectors=v", "--model=m"], "--model is for --corpus; --vectors=v says how they were made"),
        (["--output=o", "--vectors=v", "--chunker=code"], "--chunker is for --corpus; --vectors=v says how"),
        (["--output=o", "--vectors=v", "--precision=int8"], "--precision is for --corpus; --vectors=v says how"),
        (["--output=o", "--vectors=v", "--delete=a"], "--delete changes an index: it needs --update=INDEX"),
        (["--output=o", "--corpus=c", "--model=m", "--overlap=3"], "--overlap is for --chunker"),
        (["--update=u", "--delete=a", "--kind=exact"], "--kind is for new rows or --compact"),
        (["--update=u", "--delete=a", "--model=m"], "--model is for --corpus"),
        (["--update=u", "--compact", "--overwrite"], "--overwrite is for --output"),
        (["--update=u"], "--update needs rows"),
        (["--output=o", "--vectors=v", "--recall=1.5"], "--recall=1.5 must be above 0, and 1 at most"),
        (["--output=o", "--vectors=v", "--bm25=klingon"], "the language 'klingon' has no stemmer; those of ara, "),
        (["--output=o", "--vectors=nowhere"], "no vectors in nowhere"),
        (["--update=nowhere", "--compact"], "no index at nowhere"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["index", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter=lang"], "--filter=lang must be FIELD=VALUE"),
        (["--filter=language=en"], "no row has a field 'language' to filter by; the fields are: lang, year"),
    ],
)
def test_a_filter_that_cannot_match_is_refused(model, index, arguments, message, capsys):
    assert cli.main(["search", "--model", model, "--index", index, "--query=the", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_hybrid_search_of_an_index_without_words_is_refused_before_the_model_is_read(model, tmp_path, capsys):
    corpus = write(tmp_path / "c.jsonl", ROWS)
    assert cli.main(["index", "--model", model, "--corpus", corpus, "--output", str(tmp_path / "i")]) == 0
    assert cli.main(["search", "--model", "nowhere", "--index", str(tmp_path / "i"), "--query=the", "--hybrid"]) == 2
    assert "cannot be searched by words: make it with --bm25" in capsys.readouterr().err
