"""Documents and drawn pairs of parallel text, and parts of the documents of evaluation sets."""

import io
import json
import tarfile
from collections import Counter

import pytest

from embed.preparation.sources import Files, Parallel, Retrieval, SourceError

TEXTS = {"de": "eins\nzwei\ndrei\n", "en": "one\ntwo\nthree\n", "fr": "un\ndeux\ntrois\n"}


@pytest.fixture(params=["files", "archive"])
def text(request, tmp_path):
    """Fields of `parallel` for three sentences of two documents in three languages."""
    files = {f"t.{name}.txt": content for name, content in TEXTS.items()} | {"ids.tsv": "a\na\nb\n"}
    if request.param == "files":
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return {"paths": f"{tmp_path}/t.{{language}}.txt", "documents": f"{tmp_path}/ids.tsv"}
    with tarfile.open(tmp_path / "t.tar.xz", "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return {"paths": f"{tmp_path}/t.tar.xz", "members": "t.{language}.txt", "documents": "ids.tsv"}


def rows(source, folder):
    source.build(folder)
    return [row.value for shard in source.shards() for row in source.read(shard)]


def test_sentences_of_a_document_are_one_row(text, tmp_path):
    made = rows(Parallel(**text), tmp_path / "scratch")
    assert made == [
        {"de": "eins\nzwei", "en": "one\ntwo", "fr": "un\ndeux"},
        {"de": "drei", "en": "three", "fr": "trois"},
    ]


def test_pairs_have_two_languages_drawn_at_their_rates_and_again_the_same(text, tmp_path):
    source = Parallel(**text | {"documents": ""}, pairs=200, rates={"en": 8.0})
    made = rows(source, tmp_path / "scratch")
    assert made == rows(source, tmp_path / "again") and len(made) == 600
    for row in made:
        query, document = row["query_language"], row["document_language"]
        assert query != document
        lines = TEXTS[query].split().index(row["query"]), TEXTS[document].split().index(row["document"])
        assert lines[0] == lines[1]
    share = Counter(row["query_language"] for row in made)
    assert 0.75 < share["en"] / 600 < 0.85 and abs(share["de"] - share["fr"]) < 60


def test_a_rate_of_a_language_that_is_not_there_is_an_error(text, tmp_path):
    with pytest.raises(SourceError, match="has no xx: there are de, en, fr"):
        Parallel(**text, pairs=2, rates={"xx": 2.0}).build(tmp_path / "scratch")
    with pytest.raises(ValueError, match="'en' is none of parallel.columns: de, fr"):
        Parallel(source=Files("x.csv"), columns={"de": "a", "fr": "b"}, pairs=2, rates={"en": 2.0})


def test_a_missing_list_of_documents_is_named(text, tmp_path):
    if "members" in text:
        with pytest.raises(SourceError, match="has no member other.tsv"):
            Parallel(**text | {"documents": "other.tsv"}).build(tmp_path / "scratch")


def test_pairs_do_not_depend_on_the_folder_of_the_data(tmp_path):
    drawn = []
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        folder.mkdir(parents=True)
        for language in ("de", "en", "fr", "it"):
            (folder / f"t.{language}.txt").write_text("".join(f"{language} {i}\n" for i in range(20)))
        drawn.append(rows(Parallel(paths=f"{folder}/t.{{language}}.txt", pairs=3), folder / "scratch"))
    assert drawn[0] == drawn[1]
    assert len({(row["query_language"], row["document_language"]) for row in drawn[0]}) == 12


@pytest.mark.parametrize("ids, count", [("a\na\n", 2), ("a\na\nb\nc\nc\n", 5)])
def test_other_numbers_of_document_ids_and_sentences_are_an_error(ids, count, tmp_path):
    for name, content in {f"t.{name}.txt": content for name, content in TEXTS.items()}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "ids").write_text(ids)
    source = Parallel(paths=f"{tmp_path}/t.{{language}}.txt", documents=f"{tmp_path}/ids")
    with pytest.raises(SourceError, match=f"ids has {count} lines, but .*txt has 3 sentences$"):
        source.build(tmp_path / "scratch")


def test_every_bad_sentence_of_a_document_is_named(tmp_path):
    (tmp_path / "t.de.txt").write_bytes(b"eins\n\xff\ndrei\n\xfe\n")
    (tmp_path / "t.en.txt").write_bytes(b"\xff\ntwo\nthree\nfour\n")
    (tmp_path / "ids").write_text("a\na\nb\nc\n")
    source = Parallel(paths=f"{tmp_path}/t.{{language}}.txt", documents=f"{tmp_path}/ids")
    source.build(tmp_path / "scratch")
    read = [row for shard in source.shards() for row in source.read(shard)]
    assert [row.location.rsplit(":", 1)[1] for row in read if row.error] == ["1", "2", "4"]
    assert [row.value for row in read if not row.error] == [{"de": "drei", "en": "three"}]
    assert len(source.sample(2)) == 2  # of the documents, too, only the first lines


def test_pairs_are_drawn_from_the_columns_of_a_source(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"de": "eins", "en": "one"}) + "\n" + json.dumps({"de": "x", "en": ""})
    )
    source = Parallel(source=Files(f"{tmp_path}/t.jsonl"), pairs=2)
    good, other, bad = [row for shard in source.shards() for row in source.read(shard)]
    assert {good.value["query"], good.value["document"]} == {"eins", "one"} and other.value
    assert bad.error == "a text in de, of two that pairs need"


def test_documents_of_an_evaluation_set_are_divided_into_parts(tmp_path):
    corpus = [{"_id": f"x-{i}", "text": f"t{i}"} for i in (0, 1, 3, 4, 5)] + [{"_id": "y-0", "text": "u"}]
    for name, lines in {
        "corpus": corpus,
        "queries": [{"_id": "q", "text": "q"}],
        "qrels": [{"query-id": "q", "corpus-id": "x-1", "score": 1}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made, _, _ = Retrieval(path=str(tmp_path), document_id="prefix", max_chunks=2).evaluation_set()
    places = [(row["document"], row["chunk"]) for row in made]
    assert places == [("x-0", 0), ("x-0", 1), ("x-1", 0), ("x-1", 1), ("x-2", 0), ("y-0", 0)]
