"""Damaged files: they are read exactly as written, or an error of one line names the file."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed.evaluation.sets import read_set
from embed.inference import Index, index_files, quantize
from embed.inference.corpus import read_corpus
from embed.inference.index_files import Provenance
from embed.inference.index_writer import create
from embed.inference.segments import Block, Settings

bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)
ROWS = [
    {"_id": "a", "title": "Ünïcode", "text": "one \u2028 two", "n": [1, None, {"x": 2.5}]},
    {"_id": "b", "chunks": ["first", "", "thïrd"]},
    {"_id": "c", "text": "\U0001f600 three"},
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_id", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def damaged(draw, content: bytes):
    """The content with some bytes flipped, deleted, repeated, truncated or inserted."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "truncate", "delete", "repeat", "insert"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.sampled_from(b'\x00\xff"{}[]:,\\ \n\r9'))
        elif kind == "truncate":
            del content[at:]
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 20))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=4))
    return bytes(content)


def assert_sentence(error, *files):
    """The error is one line that names one of the files."""
    message = str(error)
    assert type(error) in (ValueError, FileNotFoundError), repr(error)
    assert "\n" not in message and any(str(file) in message for file in files), message


@functools.cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="embed-damage-"))


@pytest.fixture(scope="module", autouse=True)
def remove_scratch():
    yield
    shutil.rmtree(scratch())
    scratch.cache_clear()


def corpus(rows, newline="\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


@bounded
@given(damaged(corpus(ROWS)))
def test_a_damaged_corpus_is_read_as_written_or_refused_by_name(content):
    """The expected documents are read from the lines by a minimal reader."""
    file = scratch() / "corpus.jsonl"
    file.write_bytes(content)
    try:
        result = read_corpus(file)
    except (ValueError, FileNotFoundError) as error:
        assert_sentence(error, file)
        return
    rows = [json.loads(line) for line in content.removeprefix(b"\xef\xbb\xbf").decode().split("\n") if line.strip()]
    assert result.ids == [
        n for r in rows for n in ([r["_id"]] if "text" in r else [f"{r['_id']}#{k}" for k in range(len(r["chunks"]))])
    ]
    expected = []
    for row in rows:
        chunks = [row["text"].strip()] if "text" in row else list(row["chunks"])
        if row.get("title"):
            chunks[0] = (row["title"] + " " + (row["text"] if "text" in row else chunks[0])).strip()
        expected.append(chunks)
    assert result.documents == expected and all(any(map(str.strip, chunks)) for chunks in expected)


@bounded
@given(st.integers(0, 2), st.sampled_from(["_id", "text", "chunks", "title", "more"]), VALUES)
def test_a_corpus_row_with_another_value_is_read_or_refused_by_line(which, field, value):
    rows = [dict(row) for row in ROWS]
    rows[which][field] = value
    file = scratch() / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        result = read_corpus(file)
    except ValueError as error:
        assert_sentence(error, file)
        assert f"line {which + 1}" in str(error) or "is already used in" in str(error)
        return
    assert len(result.documents) == 3 and all(isinstance(text, str) for text in result.texts)
    assert len(result.texts) == len(result.ids) == len(set(result.ids))


SET = {
    "corpus": [
        {"_id": "a", "text": "x", "document": "d", "chunk": 0},
        {"_id": "b", "text": "y", "document": "d", "chunk": 1},
    ],
    "queries": [{"_id": "q", "text": "x"}],
    "qrels": [{"query-id": "q", "corpus-id": "a", "score": 1}],
}


@bounded
@given(
    st.sampled_from(
        [
            ("corpus", "document"),
            ("corpus", "chunk"),
            ("corpus", "text"),
            ("queries", "text"),
            ("queries", "_id"),
            ("qrels", "query-id"),
            ("qrels", "corpus-id"),
            ("qrels", "score"),
        ]
    ),
    VALUES,
)
@pytest.mark.filterwarnings("ignore")
def test_a_set_with_another_value_is_read_or_refused_by_file(field, value):
    name, key = field
    for file, rows in SET.items():
        rows = [dict(row) for row in rows]
        if file == name:
            rows[0][key] = value
        (scratch() / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        result = read_set(scratch())
    except ValueError as error:
        assert_sentence(error, *(scratch() / f"{file}.jsonl" for file in SET))
        return
    assert result.corpus_ids == ["a", "b"] and sorted(np.concatenate(result.documents)) == [0, 1]
    assert all(isinstance(grade, int) for judged in result.judgments for grade in judged.values())


STORED = [{"_id": name, "text": text, "fields": {"n": len(text)}} for name, text in zip("abcd", ["x", "ü", "", "z"])]


DESCRIBED = ["rows", "width", "fields", "kind", "parameters", "settings", "bm25", "files", "hidden"]


@functools.cache
def made() -> Index:
    vectors = quantize(np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32), "int8")
    vectors[2] = 0
    how = Provenance("int8", 16, {"path": "m", "digest": "d"}), Settings("ivf", bm25="")
    return create(scratch() / "good", [Block(vectors, STORED)], *how, overwrite=True)


def check_load_after(change) -> None:
    """Load the index after a change to its folder: it equals the saved one, or the change is an error."""
    expected, folder = made(), scratch() / "index"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch() / "good", folder)
    change(folder)
    try:
        loaded = Index.load(folder)
    except (ValueError, FileNotFoundError) as error:
        assert_sentence(error, folder)
        return
    assert loaded.provenance == expected.provenance and len(loaded) == len(expected) == 3
    np.testing.assert_array_equal(loaded.segments[0].vectors, expected.segments[0].vectors, strict=True)
    assert [loaded.content(i) for i in range(4)] == STORED


FILES = [
    "index.json",
    "0.hidden-0.npy",
    *(f"0/{name}" for name in ("vectors.npy", "rows.jsonl", "offsets.npy", "lists.safetensors", "list_rows.npy")),
    *("0/field0.json", "0/bm25/words.json", "0/bm25/scores.npy"),
]


@bounded
@given(st.sampled_from(FILES), st.data())
def test_an_index_with_a_damaged_file_is_loaded_as_saved_or_refused_by_name(file, data):
    made()
    content = data.draw(damaged((scratch() / "good" / file).read_bytes()))
    check_load_after(lambda folder: (folder / file).write_bytes(content))


@bounded
@given(
    st.sampled_from([*index_files.FIELDS, "format", "sha256", "more"]), VALUES | st.just("binary") | st.just("float32")
)
def test_an_index_with_another_value_in_index_json_is_loaded_as_saved_or_refused(field, value):
    def change(folder):
        described = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(described | {field: value}))

    check_load_after(change)


@bounded
@given(
    st.sampled_from(sorted(["rows", "width", "fields", "kind", "parameters", "settings", "bm25", "files", "hidden"])),
    VALUES,
)
def test_an_index_with_another_description_of_a_segment_is_loaded_as_saved_or_refused(field, value):
    """With the right digest, as somebody who means harm would write it."""

    def change(folder):
        info = json.loads((folder / "index.json").read_text())
        info["segments"]["0"][field] = value
        info.pop("sha256")
        (folder / "index.json").write_text(json.dumps(info | {"sha256": index_files._digest(info)}))

    check_load_after(change)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("becomes", ["nothing", "a folder"])
def test_an_index_with_a_missing_file_is_refused(file, becomes):
    def change(folder):
        (folder / file).unlink()
        if becomes == "a folder":
            (folder / file).mkdir()

    check_load_after(change)
    with pytest.raises((ValueError, FileNotFoundError), match=str(scratch() / "index")):
        Index.load(scratch() / "index")


def test_other_files_beside_an_index_change_nothing():
    check_load_after(lambda folder: (folder / "more.npy").write_text("x"))
    Index.load(scratch() / "index")
