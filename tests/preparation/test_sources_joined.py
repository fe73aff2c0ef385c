"""Retrieval sets, documents of chunks and parallel text: joined from several files."""

import gzip
import io
import json
import pickle
import sqlite3
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed import paths
from embed.evaluation.sets import read_set
from embed.inference import corpus as corpora
from embed.preparation import evaluation_sets
from embed.preparation.sources import Conteb, Files, Parallel, Retrieval, SourceError, joined
from embed.preparation.sources.base import Source

CORPUS = [
    {"_id": "a", "title": "A", "text": "text a"},
    {"_id": "b", "title": "", "text": "text b"},
    {"_id": "c", "text": "text c"},
    {"_id": "unused", "title": "U", "text": "never judged"},
]
QUERIES = [{"_id": "1", "text": "one"}, {"_id": "2", "text": "two"}, {"_id": "3", "text": "of another split"}]
QRELS = [("1", "a", 1), ("1", "b", 0), ("2", "c", 2), ("1", "c", 1), ("1", "a", -1)]
CHUNKS = [
    {"chunk_id": f"d{k % 2}_{n}", "chunk": f"chunk {n} of d{k % 2}"} for k, n in enumerate([10, 0, 9, 2, 1, 1, 2])
]
ASKED = [
    {"query": "first", "chunk_id": "d0_9"},
    {"query": "several", "chunk_ids": ["d0_10", "d1_2"]},
    {"query": "first", "chunk_id": "d1_1"},
]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder, files: dict[str, bytes]):
    for name, content in files.items():
        paths.write(f"{folder}/{name}", content)
    return str(folder)


def tsv(rows) -> bytes:
    return "".join("\t".join(map(str, row)) + "\n" for row in [("query-id", "corpus-id", "score"), *rows]).encode()


def qrels(rows):
    return [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in rows]


def parquet(rows) -> bytes:
    columns = {name: [row.get(name) for row in rows] for name in {key: None for row in rows for key in row}}
    pq.write_table(pa.table(columns), out := pa.BufferOutputStream())
    return out.getvalue().to_pybytes()


def card(*configs: tuple[str, str, str]) -> bytes:
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}" for name, split, file in configs
    ]
    return ("---\nconfigs:\n" + "\n".join(lines) + "\n---\n").encode()


LAYOUTS = {
    "BEIR": {
        "corpus.jsonl": jsonl(CORPUS),
        "queries.jsonl": jsonl(QUERIES),
        "qrels/train.tsv": tsv(QRELS),
        "qrels/test.tsv": tsv([("3", "a", 1)]),
    },
    "BEIR, compressed": {
        "corpus.jsonl.gz": gzip.compress(jsonl(CORPUS)),
        "queries.jsonl.gz": gzip.compress(jsonl(QUERIES)),
        "qrels.jsonl.gz": gzip.compress(jsonl(qrels(QRELS))),
    },
    "MTEB with a card": {
        "README.md": card(
            ("corpus", "corpus", "c.jsonl"), ("queries", "queries", "q.jsonl"), ("default", "train", "r.jsonl")
        )
        + b"\xff not UTF-8",
        "c.jsonl": jsonl(CORPUS),
        "q.jsonl": jsonl(QUERIES),
        "r.jsonl": jsonl(qrels(QRELS)),
    },
    "MTEB in Parquet": {
        "corpus/corpus-00000-of-00002.parquet": parquet(CORPUS[:2]),
        "corpus/corpus-00001-of-00002.parquet": parquet(CORPUS[2:]),
        "queries/queries-00000-of-00001.parquet": parquet(QUERIES),
        "data/train-00000-of-00001.parquet": parquet(qrels(QRELS)),
        "data/test-00000-of-00001.parquet": parquet(qrels([("3", "a", 1)])),
    },
}


def built(source: Source, scratch):
    source.build(scratch)
    rows = [row for shard in source.shards() for row in source.read(shard)]
    return [row.value for row in rows if row.error is None], [
        (row.location.rsplit("/", 1)[-1], row.error) for row in rows if row.error is not None
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_a_query_and_a_relevant_text_with_the_texts_that_were_judged_irrelevant(layout, tmp_path):
    source = Retrieval(path=write(tmp_path / "set", LAYOUTS[layout]), split="train")
    names = ("query", "document", "title", "score", "negatives", "query_id", "document_id")
    rows, bad = built(source, tmp_path / "scratch")
    assert rows == [
        dict(zip(names, values))
        for values in [
            ("one", "A text a", "A", 1.0, ["text b", "A text a"], "1", "a"),
            ("two", "text c", "", 2.0, [], "2", "c"),
            ("one", "text c", "", 1.0, ["text b", "A text a"], "1", "c"),
        ]
    ]
    plain, _ = built(Retrieval(path=source.path, split="train", titles=False), tmp_path / "scratch")
    texts = [
        {row["text"] for row in Retrieval(path=source.path, split="train", titles=titles).evaluation_set()[0]}
        for titles in (True, False)
    ]
    assert {row["document"] for row in plain} <= texts[1] and texts[0] != texts[1]
    assert plain[0]["document"] == "text a" and plain[0]["negatives"] == ["text b", "text a"]
    assert not bad and source.describe()["columns"] == list(names) and source.describe()["rows"] == 3
    assert [row.value for row in Retrieval(path=source.path, split="train").sample(2)] == rows[:2]


def test_configs_of_a_folder_and_named_files_are_read(tmp_path):
    files = {f"{name}-{part}": content for part, content in LAYOUTS["BEIR, compressed"].items() for name in ("x", "y")}
    folder = write(tmp_path / "set", files | {"x-qrels.jsonl.gz": gzip.compress(jsonl(qrels([("2", "b", 1)])))})
    assert built(Retrieval(path=folder, config="x"), tmp_path / "s")[0][0]["document"] == "text b"
    named = {"corpus": "y-corpus.jsonl.gz", "queries": "y-queries.jsonl.gz"}
    source = Retrieval(path=folder, qrels=Files(f"{folder}/x-qrels.jsonl.gz"), **named)
    assert built(source, tmp_path / "s")[0][0]["query"] == "two"
    parts = {"corpus": "y-corpus.jsonl.gz", "queries": "y-queries.jsonl.gz", "qrels": "x-qrels.jsonl.gz"}
    alone = Retrieval(**{part: f"{folder}/{name}" for part, name in parts.items()})
    assert built(alone, tmp_path / "s") == built(source, tmp_path / "s")
    with pytest.raises(SourceError, match="has no corpus: its files are x-corpus.jsonl.gz, x-qrels.jsonl.gz"):
        Retrieval(path=folder).build(tmp_path / "s")
    with pytest.raises(SourceError, match="has no split 'dev': there are train"):
        Retrieval(path=write(tmp_path / "card", LAYOUTS["MTEB with a card"]), split="dev").build(tmp_path / "s")
    with pytest.raises(SourceError, match="has no qrels or default of the split 'dev': its files are corpus.jsonl, "):
        Retrieval(path=write(tmp_path / "beir", LAYOUTS["BEIR"]), split="dev").build(tmp_path / "s")
    with pytest.raises(SourceError, match="expected the path or the id of a dataset, and not both"):
        Retrieval().build(tmp_path / "s")


def test_what_cannot_be_joined_is_a_bad_row_with_its_reason(tmp_path):
    files = {
        "corpus.jsonl": jsonl([*CORPUS, {"_id": "a", "text": "again"}, {"_id": "e", "text": " "}, {"_id": "f"}]),
        "queries.jsonl": jsonl([*QUERIES, {"_id": "4", "text": ""}]) + b"{\n",
        "qrels/test.tsv": tsv(
            [("1", "a", 1), ("9", "a", 1), ("1", "z", 1), ("4", "a", 1), ("1", "e", 1), ("1", "b", "x")]
        ),
    }
    rows, bad = built(Retrieval(path=write(tmp_path / "set", files)), tmp_path / "scratch")
    assert [row["document"] for row in rows] == ["A text a"]
    reasons = dict(bad)
    assert reasons.pop("queries.jsonl:5").startswith("not JSON")
    location = f"the id 'a' is already used in {tmp_path}/set/corpus.jsonl:1"
    assert reasons == {
        "test.tsv:7": "the score 'x' is not a number",
        "corpus.jsonl:5": location,
        "corpus.jsonl:7": "no _id or no text: there are _id",
        "test.tsv:3": "the query '9' is missing",
        "test.tsv:4": "the text 'z' is missing",
        "test.tsv:5": "the query '4' is empty",
        "test.tsv:6": "the text 'e' is empty",
    }


def test_a_join_is_done_once_and_again_when_a_file_has_changed_or_it_was_interrupted(tmp_path, monkeypatch):
    folder, scratch = write(tmp_path / "set", LAYOUTS["BEIR"]), tmp_path / "scratch"
    monkeypatch.setattr(joined, "PART_BYTES", 100)
    source = Retrieval(path=folder, split="train", shard_bytes=100)
    with pytest.raises(RuntimeError, match="build must be called before shards"):
        source.shards()
    rows, _ = built(source, scratch)
    shards, content = source.shards(), {name: file.read_bytes() for name, file in paths.files(scratch).items()}
    assert len(shards) == 3 and [row.value for row in pickle.loads(pickle.dumps(source)).read(shards[1])] == [rows[1]]
    next(iter(paths.files(scratch).values())).parent.joinpath("index.json").unlink()
    assert built(Retrieval(path=folder, split="train"), scratch)[0] == rows
    assert {name: file.read_bytes() for name, file in paths.files(scratch).items()} == content
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", None)
        assert built(Retrieval(path=folder, split="train"), scratch)[0] == rows
    write(folder, {"corpus.jsonl": jsonl([{**row, "text": "new " + row["text"]} for row in CORPUS])})
    assert built(Retrieval(path=folder, split="train"), scratch)[0][0]["document"] == "A new text a"


def test_rows_that_belong_together_are_in_one_shard_of_several_parts(tmp_path, monkeypatch):
    folder, scratch = write(tmp_path / "set", LAYOUTS["BEIR"]), tmp_path / "scratch"
    monkeypatch.setattr(joined, "PART_BYTES", 100)
    source = Retrieval(path=folder, split="train", shard_bytes=100)
    rows, _ = built(source, scratch)
    whole = source.undivided().pinned(source.identity())
    assert built(whole, scratch)[0] == rows and len(source.shards()) > 1
    (shard,) = whole.shards()
    assert shard.bytes == sum(part.bytes for part in source.shards())
    assert len(list(scratch.iterdir())) == 1  # joined once


def test_an_evaluation_set_has_the_whole_corpus_and_the_judged_queries(tmp_path):
    source = Retrieval(path=write(tmp_path / "set", LAYOUTS["BEIR"]), split="train")
    evaluation_sets.write(tmp_path / "out", *source.evaluation_set())
    corpus = corpora.read_rows(tmp_path / "out" / "corpus.jsonl")
    assert [(row.id, row.chunks) for row in corpus] == [
        (row.id, row.chunks) for row in corpora.read_rows(tmp_path / "set" / "corpus.jsonl")
    ]
    queries = [json.loads(line) for line in (tmp_path / "out" / "queries.jsonl").read_text().splitlines()]
    assert queries == QUERIES[:2]
    lines = (tmp_path / "out" / "qrels.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == qrels([("1", "a", 1), ("2", "c", 2), ("1", "c", 1)])
    broken = write(tmp_path / "broken", LAYOUTS["BEIR"] | {"queries.jsonl": b"{\n"})
    with pytest.raises(SourceError, match="queries.jsonl:1: not JSON"):
        list(Retrieval(path=broken, split="train").evaluation_set()[1])


def test_ids_with_numbers_make_the_chunks_of_documents(tmp_path):
    texts = [{"_id": name, "title": "T", "text": f"text {name}"} for name in ("x-y-0", "z-3", "x-y-2", "x-y-10")]
    files = {"corpus.jsonl": jsonl(texts), "queries.jsonl": jsonl(QUERIES), "qrels/test.tsv": tsv([("1", "z-3", 1)])}
    source = Retrieval(path=write(tmp_path / "set", files), document_id="prefix")
    corpus = list(source.evaluation_set()[0])
    assert [(row["_id"], row["document"], row["chunk"]) for row in corpus] == [
        ("x-y-0", "x-y", 0),
        ("z-3", "z", 0),
        ("x-y-2", "x-y", 1),
        ("x-y-10", "x-y", 2),
    ]
    assert corpus[0]["text"] == "T text x-y-0"
    for names, message in {
        ("a-2", "a-1"): "the chunk 'a-1' comes after a-2",
        ("a",): "the id 'a' is not a document",
    }.items():
        write(tmp_path / "set", {"corpus.jsonl": jsonl([{"_id": name, "text": "t"} for name in names])})
        with pytest.raises(SourceError, match=message):
            list(Retrieval(path=source.path, document_id="prefix").evaluation_set()[0])


@pytest.mark.parametrize("layout", ["card", "files", "Parquet"])
def test_a_document_has_its_chunks_by_number_and_its_queries(layout, tmp_path):
    files = {
        "card": {
            "README.md": card(("documents", "train", "d.jsonl"), ("queries", "train", "q.jsonl")),
            "d.jsonl": jsonl(CHUNKS),
            "q.jsonl": jsonl(ASKED),
        },
        "files": {"documents.jsonl": jsonl(CHUNKS), "queries.jsonl.gz": gzip.compress(jsonl(ASKED))},
        "Parquet": {
            "documents/train-00000-of-00001.parquet": parquet(CHUNKS),
            "queries/train-00000-of-00001.parquet": parquet(ASKED),
        },
    }
    source = Conteb(path=write(tmp_path / "set", files[layout]))
    rows, bad = built(source, tmp_path / "scratch")
    assert not bad and rows == [
        {
            "document_id": "d0",
            "chunks": ["chunk 1 of d0", "chunk 2 of d0", "chunk 9 of d0", "chunk 10 of d0"],
            "queries": [{"text": "first", "chunk": 2}, {"text": "several", "chunk": 3}],
            "chunk_ids": ["d0_1", "d0_2", "d0_9", "d0_10"],
        },
        {
            "document_id": "d1",
            "chunks": ["chunk 0 of d1", "chunk 1 of d1", "chunk 2 of d1"],
            "queries": [{"text": "several", "chunk": 2}, {"text": "first", "chunk": 1}],
            "chunk_ids": ["d1_0", "d1_1", "d1_2"],
        },
    ]
    evaluation_sets.write(tmp_path / "out", *source.evaluation_set())
    loaded = read_set(tmp_path / "out")
    assert len(loaded.documents) == 2 and len(loaded.queries) == 2
    lines = (tmp_path / "out" / "qrels.jsonl").read_text().splitlines()
    assert sorted((row["query-id"], row["corpus-id"]) for row in map(json.loads, lines)) == [
        ("q0", "d0_9"),
        ("q0", "d1_1"),
        ("q1", "d0_10"),
        ("q1", "d1_2"),
    ]


def test_a_bad_chunk_or_query_has_its_reason(tmp_path):
    chunks = [
        *CHUNKS,
        {"chunk_id": "d0_9", "chunk": "again"},
        {"chunk_id": "d0", "chunk": "x"},
        {"chunk_id": "d0_7", "chunk": ""},
    ]
    asked = [{"query": "q", "chunk_id": "d0_8"}, {"query": "q", "chunk_id": "d7_0"}, {"query": " ", "chunk_id": "d0_9"}]
    files = {"documents.jsonl": jsonl(chunks), "queries.jsonl": jsonl([*asked, {"text": "q"}])}
    rows, bad = built(Conteb(path=write(tmp_path / "set", files)), tmp_path / "scratch")
    assert len(rows) == 2 and sorted(bad) == [
        ("documents.jsonl:10", "the chunk d0_7 is empty"),
        ("documents.jsonl:8", "the chunk d0_9 occurs twice"),
        ("documents.jsonl:9", "the chunk_id 'd0' is not a document, an underscore and a number"),
        ("queries.jsonl:1", "the chunk d0_8 is missing"),
        ("queries.jsonl:2", "the chunk d7_0 is missing"),
        ("queries.jsonl:3", "the query is empty"),
        ("queries.jsonl:4", "no query, chunk_id or chunk_ids: there are text"),
    ]


def test_lines_of_several_files_are_sentences_in_several_languages(tmp_path):
    texts = {
        "de": "eins\n\nd\xe4\n".encode(),
        "fr": gzip.compress(b"un\r\ndeux\r\ntrois"),
        "el": b"\xff\nb\nc\n",
    }
    folder = write(tmp_path, {f"x/a.{name}.txt{'.gz' if name == 'fr' else ''}": text for name, text in texts.items()})
    source = Parallel(f"{folder}/x/a.{{language}}.txt*", languages=["fr", "de"])
    with pytest.raises(SourceError, match=r"has no fr, de: there are"):
        built(source, tmp_path / "s")
    write(folder, {"x/a.fr.txt": gzip.decompress(texts["fr"])})
    (tmp_path / "x" / "a.fr.txt.gz").unlink()
    rows, bad = built(Parallel(f"{folder}/x/a.{{language}}.txt", languages=["fr", "de"]), tmp_path / "s")
    assert rows == [{"de": "eins", "fr": "un"}, {"de": "", "fr": "deux"}, {"de": "dä", "fr": "trois"}] and not bad
    rows, bad = built(Parallel(f"{folder}/x/a.{{language}}.txt"), tmp_path / "s")
    assert len(rows) == 2 and bad == [("a.{language}.txt:1", "the line in el is not UTF-8")]
    write(folder, {"x/a.fr.txt": b"un\n"})
    with pytest.raises(SourceError, match="have different numbers of lines: de 3, el 3, fr 1"):
        built(Parallel(f"{folder}/x/a.{{language}}.txt"), tmp_path / "s")
    with pytest.raises(SourceError, match="has no xx: there are de, el, fr"):
        built(Parallel(f"{folder}/x/a.{{language}}.txt", languages=["xx"]), tmp_path / "s")
    with pytest.raises(SourceError, match="expected {language} in one of them"):
        built(Parallel(f"{folder}/x/a.txt"), tmp_path / "s")


def test_members_of_an_archive_and_columns_of_a_source_are_languages(tmp_path):
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as tar:
        for name, text in {"t/a.de-AT.txt": b"eins\n", "t/a.fr.txt": b"un\n", "t/README": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    source = Parallel(f"{tmp_path}/all.tar.xz", members="t/a.{language}.txt")
    assert built(source, tmp_path / "s") == ([{"de-AT": "eins", "fr": "un"}], [])
    assert source.describe()["columns"] == ["de-AT", "fr"] and source.describe()["rows"] == 1
    rows = [{"translation": {"de": "eins", "fr": "un"}, "score": 1, "x": {"y": "z"}}]
    write(tmp_path, {"a.jsonl": jsonl(rows), "b.jsonl": jsonl([{"de": "eins", "fr": "un", "score": 1}, {"fr": "un"}])})
    nested, flat = Files(f"{tmp_path}/a.jsonl"), Files(f"{tmp_path}/b.jsonl")
    assert built(Parallel(source=nested), tmp_path / "s")[0] == [{"de": "eins", "fr": "un"}]
    columns = {"en": "x.y", "fr": "translation.fr"}
    assert built(Parallel(source=nested, columns=columns), tmp_path / "s")[0] == [{"en": "z", "fr": "un"}]
    found = built(Parallel(source=flat, languages=["de", "fr"]), tmp_path / "s")
    assert found == ([{"de": "eins", "fr": "un"}], [("b.jsonl:2", "no text in de")])


def test_a_set_in_a_bucket_is_joined_in_a_bucket(bucket):
    folder = write(f"{bucket}/joined", LAYOUTS["BEIR, compressed"])
    rows, bad = built(Retrieval(path=folder), f"{bucket}/joined-scratch")
    assert [row["document_id"] for row in rows] == ["a", "c", "c"] and not bad
