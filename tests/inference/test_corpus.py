"""Corpus files: how rows are read, and errors that name file and line."""

import gzip
import json
import os
import threading

import pytest

from embed.inference.corpus import read_corpus, read_jsonl, read_rows


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_corpus_holds_texts_and_chunked_documents(tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "text": "one"}, "", {"_id": "b", "chunks": ["two", "", "four"], "n": 3})
    corpus = read_corpus(path)
    assert corpus.documents == [["one"], ["two", "", "four"]]
    assert corpus.ids == ["a", "b#0", "b#1", "b#2"]
    assert corpus.texts == ["one", "two", "", "four"]
    assert corpus.names == [f"{path}, line 1 (_id 'a')", f"{path}, line 3 (_id 'b')"]


@pytest.mark.parametrize(
    ("row", "chunks"),
    [
        ({"title": "Trees", "text": "of arrays "}, ["Trees of arrays"]),
        ({"title": "", "text": " as it is "}, ["as it is"]),
        ({"title": None, "text": "x"}, ["x"]),
        ({"title": "Trees", "text": ""}, ["Trees"]),
        ({"title": "Trees", "chunks": ["of", " arrays "]}, ["Trees of", " arrays "]),
        ({"chunks": [" a", "b "]}, [" a", "b "]),
        ({"text": "a\u2028b\x00c"}, ["a\u2028b\x00c"]),
        ({"text": "\U0001f600"}, ["\U0001f600"]),
    ],
)
def test_a_title_comes_before_the_text_or_the_first_chunk_as_in_mteb(tmp_path, row, chunks):
    path = tmp_path / "c"
    for ascii_ in (True, False):
        path.write_text(json.dumps({"_id": "a", **row}, ensure_ascii=ascii_), encoding="utf-8")
        assert [r.chunks for r in read_rows(path)] == [chunks]


def test_a_query_is_its_text_unchanged(tmp_path):
    path = lines(tmp_path / "q", {"_id": "a", "title": "no part of it", "text": " x "})
    assert [r.chunks for r in read_rows(path, queries=True)] == [[" x "]]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b,
        lambda b: b"\xef\xbb\xbf" + b,
        gzip.compress,
        lambda b: gzip.compress(b"\xef\xbb\xbf" + b),
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: b.rstrip(b"\n"),
        lambda b: b"\n  \n" + b,
    ],
    ids=["plain", "BOM", "gzip", "gzip of BOM", "CRLF", "no last newline", "blank lines"],
)
def test_the_same_rows_are_read_from_every_form_of_a_text_file(tmp_path, change):
    (tmp_path / "c").write_bytes(change('{"_id": "ä", "text": "ü"}\n{"_id": "b", "text": "x"}\n'.encode()))
    assert [row for _, row in read_jsonl(tmp_path / "c")] == [{"_id": "ä", "text": "ü"}, {"_id": "b", "text": "x"}]


def test_a_corpus_can_be_read_from_a_pipe(tmp_path):
    for name, content in (("plain", GOOD.encode()), ("gzip", gzip.compress(GOOD.encode()))):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=[content])
        writer.start()
        assert read_corpus(tmp_path / name).texts == ["ü"]
        writer.join()


GOOD = '{"_id": "a", "text": "ü"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.encode() + '{"_id": "b", "text": "ü"}'.encode("latin-1"), r"c, line 2: not UTF-8 at byte 22 \(0xfc\)"),
        (GOOD.encode("utf-16"), "c is UTF-16, expected JSON lines in UTF-8"),
        (GOOD.encode("utf-16-le"), "c is UTF-16"),
        (GOOD.encode("utf-16-be"), "c is UTF-16"),
        (b"\x28\xb5\x2f\xfd....", "c is a zstd archive"),
        (b"PK\x03\x04....", "c is a zip archive"),
        (gzip.compress(GOOD.encode() * 99, mtime=0)[:-12], "c is damaged or truncated: its gzip data end after line"),
        (b"", "c is empty: expected at least one row"),
        (b"\n\n", "c is empty: expected at least one row"),
    ],
)
def test_an_error_about_a_file_that_is_not_utf8_names_its_format(tmp_path, content, message):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path / "c")


def test_a_missing_file_and_a_folder_are_refused_as_a_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.jsonl: expected JSON lines"):
        read_corpus(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder, expected a file of JSON lines"):
        read_corpus(tmp_path)


A = {"_id": "a", "text": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([A, "{oops"], "line 2: invalid JSON .Expecting property name .*, column 2"),
        (["[1]"], r"line 1: expected one JSON object per line, got '\[1\]'"),
        (['{"_id": "a", "text": "x", "text": "y"}'], "line 1: invalid JSON .the key 'text' occurs more than once"),
        (['{"_id": "a", "text": "x", "n": NaN}'], "line 1: invalid JSON .NaN is not a number"),
        (['{"_id": "a", "text": "x\ty"}'], "line 1: invalid JSON .Invalid control character at, column 24"),
        (["[" * 100_000], "line 1: invalid JSON .*recursion"),
        ([{"text": "x"}], 'line 1: "_id" is None, expected a string'),
        ([{"id": "a", "text": "x"}], '"_id" is None, expected a string, and there is "id": rename it'),
        ([{"_id": 5, "text": "x"}], '"_id" is 5, expected a string: write "5"'),
        ([{"_id": "", "text": "x"}], "\"_id\" is '', expected a string"),
        ([{"_id": "a"}], "line 1 ._id 'a'. has no text: expected \"text\" or a list"),
        ([{"_id": "a", "chunks": "x"}], "has no text"),
        ([{"_id": "a", "text": 3}], "line 1 ._id 'a'.: a text, chunk or title is 3 .int., expected a str"),
        ([{"_id": "a", "text": None, "title": "x"}], "a text, chunk or title is None"),
        ([{"_id": "a", "chunks": ["x", 3]}], "a text, chunk or title is 3"),
        ([A | {"title": ["x"]}], r"a text, chunk or title is \['x'\]"),
        ([A | {"chunks": ["y"]}], 'line 1 ._id \'a\'. has "text" and "chunks": expected one of them'),
        (['{"_id": "a", "text": "x\\ud800"}'], "line 1 ._id 'a'.: .* holds a lone surrogate U.D800 at character 1"),
        (['{"_id": "x\\udfff", "text": "x"}'], 'line 1: "_id" holds a lone surrogate U.DFFF at character 1'),
        ([A, A | {"text": "y"}], "line 2 .*: the id 'a' is already used in .*line 1"),
        (
            [{"_id": "a", "chunks": ["x", "y"]}, {"_id": "a#1", "text": "y"}],
            "line 2 .*: the id 'a#1' is already used in .*line 1",
        ),
        ([{"_id": "b", "text": " "}, A], "line 1 ._id 'b'. has no text; 1 of the 2 rows of .* have none"),
        (
            [A, {"_id": "b", "text": ""}, {"_id": "c", "chunks": [" "]}],
            "line 2 ._id 'b'. has no text; 2 of the 3 rows",
        ),
        ([{"_id": "a", "chunks": []}], "has no text"),
    ],
)
def test_an_error_about_a_row_is_one_sentence_that_names_the_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(lines(tmp_path / "c", *rows))
    assert "\n" not in str(caught.value)
