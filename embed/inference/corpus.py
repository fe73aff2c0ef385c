"""Corpus files: the texts that are embedded, indexed and searched (docs/search.md).

A corpus is a JSONL file. A row is one text, or a document whose chunks are embedded in its context:

    {"_id": "a", "text": "…"}
    {"_id": "b", "chunks": ["…", "…"]}          the ids of its chunks are "b#0" and "b#1"

Both may have a "title", which goes before the text.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from embed import paths
from embed.tokenizers import check_text

GZIP = b"\x1f\x8b"
NOT_TEXT = {  # the first bytes of files that are not text in UTF-8
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    b"{\0\0\0": "UTF-32",
    b"\0\0\0{": "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}


class Row(NamedTuple):
    """A row of a corpus or of queries."""

    source: str  # file, line and id, for errors
    id: str
    chunks: list[str]  # a row with "text" has one
    fields: dict

    @property
    def is_empty(self) -> bool:
        """Whether all chunks are empty or white space."""
        return not any(map(str.strip, self.chunks))


class Corpus(NamedTuple):
    """The content of a corpus file: documents of one or more chunks, and one id per chunk."""

    documents: list[list[str]]
    ids: list[str]
    names: list[str]  # of each document, for errors

    @property
    def texts(self) -> list[str]:
        """All chunks in order, one per id."""
        return [chunk for document in self.documents for chunk in document]


def read_jsonl(path) -> list[tuple[str, dict]]:
    """(source, row) of each line of a JSONL file in UTF-8, plain or in gzip; `source` names file and line for errors.

    Blank lines are skipped; an invalid line is an error.
    """
    file = paths.path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of JSON lines")
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: expected JSON lines")
    rows = []
    with file.open("rb") as opened:
        piped = hasattr(opened, "peek") and not opened.seekable()
        start = opened.peek(8)[:8] if piped else opened.read(8)
        for magic, what in NOT_TEXT.items():
            if start.startswith(magic):
                raise ValueError(f"{path} is {what}, expected JSON lines in UTF-8, plain or in gzip")
        if not piped:
            opened.seek(0)
        for number, line in enumerate(_unpacked(path, opened) if start.startswith(GZIP) else opened, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                source = f"{path}, line {number}"
                rows.append((source, _parse(source, line)))
    return rows


def _unpacked(path, opened) -> Iterator[bytes]:
    """The lines of a gzip file."""
    number = 0
    try:
        with gzip.open(opened) as lines:
            for line in lines:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated: its gzip data end after line {number} ({error})") from None


def _parse(source: str, line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: not UTF-8 at byte {error.start} (0x{line[error.start]:02x}): convert the file"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: invalid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: invalid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected one JSON object per line, got {line.strip().decode()!r:.60}")
    return row


def _unique(pairs: list[tuple]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs more than once")
    return fields


def _no_number(name: str):
    raise ValueError(f"{name} is not a number")


def read_rows(path, *, queries: bool = False) -> list[Row]:
    """The rows of a corpus file or, with `queries`, of a query file. Ids must be unique, ids and texts strings.

    The text of a row is (title + " " + text).strip(), as in MTEB, and without a title text.strip(). The title of a
    document with "chunks" goes before its first chunk by the same rule. A query is its text, unchanged.
    """
    rows, seen, expected = [], {}, '"text"' if queries else '"text" or a list "chunks"'
    for source, fields in read_jsonl(path):
        name = check_id(source, fields, "_id")
        if name in seen:
            raise ValueError(f"{source}: the id {name!r} is already used in {seen[name]}")
        seen[name] = source.removeprefix(f"{path}, ")
        source = f"{source} (_id {name!r:.80})"
        if "text" in fields and "chunks" in fields:
            raise ValueError(f'{source} has "text" and "chunks": expected one of them')
        parts = fields.get("chunks", [fields["text"]] if "text" in fields else None)
        if not isinstance(parts, list) or (queries and "chunks" in fields):
            raise ValueError(f"{source} has no text: expected {expected}")
        title = fields.get("title")
        for part in [*parts, *([] if title is None else [title])]:
            check_text(f"{source}: a text, chunk or title", part)
        if not queries:
            if title and parts:
                parts = [f"{title} {parts[0]}".strip(), *parts[1:]]
            elif "text" in fields:
                parts = [parts[0].strip()]
        rows.append(Row(source, name, parts, fields))
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row")
    return rows


def check_id(source: str, fields: Mapping, name: str) -> str:
    """The id in field `name` of a row; ValueError unless it is a non-empty string."""
    value = fields.get(name)
    if isinstance(value, str) and value:
        check_text(f'{source}: "{name}"', value)
        return value
    hint = ""
    if isinstance(value, int) and not isinstance(value, bool):
        hint = f': write "{value}"'
    elif value is None and (near := name.lstrip("_")) != name and near in fields:
        hint = f', and there is "{near}": rename it'
    raise ValueError(f'{source}: "{name}" is {value!r:.80}, expected a string{hint}')


def refuse_empty(rows: Sequence[Row], path) -> None:
    """ValueError if any row has no text."""
    if empty := [row.source for row in rows if row.is_empty]:
        raise ValueError(f"{empty[0]} has no text; {len(empty):,} of the {len(rows):,} rows of {path} have none")


def read_corpus(path) -> Corpus:
    """Read a corpus file (`read_rows`); a row that is empty or white space is an error too."""
    rows = read_rows(path)
    refuse_empty(rows, path)
    ids: dict[str, str] = {}
    for row in rows:
        for name in [f"{row.id}#{k}" for k in range(len(row.chunks))] if "chunks" in row.fields else [row.id]:
            if name in ids:
                raise ValueError(f"{row.source}: the id {name!r} is already used in {ids[name]}")
            ids[name] = row.source
    return Corpus([row.chunks for row in rows], list(ids), [row.source for row in rows])
