"""Corpus files: the texts that are embedded, indexed and searched (docs/search.md).

A corpus is a JSONL file. A row is one text, or a document whose chunks are embedded in its context:

    {"_id": "a", "text": "…"}
    {"_id": "b", "chunks": ["…", "…"]}          the ids of its chunks are "b#0" and "b#1"

Both may have a "title", which goes before the text. `read_rows` and `read_corpus` hold a whole file in memory.
`read_parts` reads one part after the other, also of Parquet.
"""

import codecs
import contextlib
import datetime
import decimal
import glob
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from embed import paths
from embed.tokenizers import check_text

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
BATCH = 256  # rows of Parquet that are decoded at once
BUFFER = 1 << 20  # bytes of Parquet that are read at once
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
    PARQUET: "Parquet",
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

    @property
    def is_document(self) -> bool:
        """Whether the row came in chunks."""
        return "chunks" in self.fields

    def ids(self) -> list[str]:
        """The ids of its chunks, or its own if it came as one text."""
        return chunk_ids(self.id, len(self.chunks)) if self.is_document else [self.id]


def chunk_ids(name: str, count: int) -> list[str]:
    """The ids of the chunks of a row."""
    return [f"{name}#{k}" for k in range(count)]


class Corpus(NamedTuple):
    """The content of a corpus file: documents of one or more chunks, and one id per chunk."""

    documents: list[list[str]]
    ids: list[str]
    names: list[str]  # of each document, for errors

    @property
    def texts(self) -> list[str]:
        """All chunks in order, one per id."""
        return [chunk for document in self.documents for chunk in document]


class Start(NamedTuple):
    """Where a part of a file starts."""

    number: int = 0  # of the part
    offset: int = 0  # bytes before it, unpacked; of Parquet rows
    line: int = 0  # lines before it; of Parquet rows


class Part(NamedTuple):
    """Consecutive rows of an input file."""

    path: str
    start: Start
    lines: list[tuple[str, bytes]] | None  # (file and line for errors, JSON) of each row; None if it was not wanted
    is_last: bool

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the rows."""
        return hashlib.sha256(b"\n".join(line for _, line in self.lines)).hexdigest()

    def rows(self) -> list[Row]:
        """The rows, checked as in `read_rows`; there may be none."""
        return _unique(make_row(source, _parse(source, line)) for source, line in self.lines)


def read_jsonl(path) -> list[tuple[str, dict]]:
    """(source, row) of each line of a JSONL file in UTF-8, plain or in gzip; `source` names file and line for errors.

    Blank lines are skipped; an invalid line is an error.
    """
    with _opened(path) as (opened, start):
        _refuse_other(path, start, "JSON lines in UTF-8, plain or in gzip")
        lines = ((f"{path}, line {number}", line) for _, number, line in _lines(path, opened, start))
        return [(source, _parse(source, line)) for source, line in lines]


def find(patterns: Sequence[str]) -> dict[str, str]:
    """{name: path} of the files of several paths or globs, on disks or in buckets, sorted by name.

    The name of a file is its path below the folder that its pattern names without a wildcard. FileNotFoundError for a
    pattern without a file, ValueError for two files with the same name.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        text = os.fspath(paths.path(pattern))
        if "**" in text:
            raise ValueError(f"{pattern} has **: write * for each folder")
        if paths.path(text).is_file():  # perhaps with a wildcard in its name
            fixed, files = os.path.dirname(text), [text]
        else:
            fixed = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), text.split("/")[:-1]))
            paths.entries(fixed or "/")  # another process may have just written a file
            matches = paths.path(fixed or "/").glob(text[len(fixed) + 1 :])
            files = [os.fspath(file) for file in matches if not paths.IGNORED.fullmatch(file.name) and file.is_file()]
        if not files:
            hint = f", perhaps {pattern}/*: it is a folder" if paths.path(text).is_dir() else ""
            raise FileNotFoundError(f"no file matches {pattern}: expected JSON lines or Parquet{hint}")
        for file in files:
            name = file[len(fixed) :].lstrip("/")
            if found.setdefault(name, file) != file:
                raise ValueError(
                    f"{found[name]} and {file} would both be {name}: name them by one pattern, such as FOLDER/*/*.jsonl"
                )
    return dict(sorted(found.items()))


def read_parts(
    path,
    size: int,
    wanted: Callable[[int], bool] = lambda number: True,
    start: Start = Start(),  # noqa: B008
) -> Iterator[Part]:
    """The rows of a JSONL file (plain or gzip) or Parquet file in parts of `size` rows, the last one shorter.

    One part is in memory at a time. A part whose number is not `wanted` has no lines, and of Parquet it is not even
    read. `start` is where an earlier call found the first part. A file without rows has one part without rows.
    """
    with _opened(path) as (opened, first):
        if first.startswith(PARQUET):
            yield from _parquet_parts(path, opened, size, wanted, start)
        else:
            _refuse_other(path, first, "JSON lines in UTF-8, plain or in gzip, or Parquet")
            yield from _jsonl_parts(path, opened, first, size, wanted, start)


@contextlib.contextmanager
def _opened(path) -> Iterator[tuple]:
    """(an open file, its first bytes); the file may be a pipe."""
    file = paths.path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of JSON lines")
    if not file.is_file():
        raise FileNotFoundError(f"no file {path}: expected JSON lines")
    with file.open("rb") as opened:
        if hasattr(opened, "peek") and not opened.seekable():
            yield opened, opened.peek(8)[:8]
        else:
            start = opened.read(8)
            opened.seek(0)
            yield opened, start


def _refuse_other(path, start: bytes, expected: str) -> None:
    for magic, what in NOT_TEXT.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}, expected {expected}")


def _jsonl_parts(path, opened, first: bytes, size: int, wanted: Callable, start: Start) -> Iterator[Part]:
    """`read_parts` of a JSONL file."""
    count, lines = 0, [] if wanted(start.number) else None
    for offset, number, line in _lines(path, opened, first, start):
        if count == size:
            yield Part(path, start, lines, False)
            start = Start(start.number + 1, offset, number - 1)
            count, lines = 0, [] if wanted(start.number) else None
        count += 1
        if lines is not None:
            lines.append((f"{path}, line {number}", line))
    yield Part(path, start, lines, True)


def _lines(path, opened, first: bytes, start: Start = Start()) -> Iterator[tuple[int, int, bytes]]:  # noqa: B008
    """(bytes before it, number, content) of each line that is not blank, from `start` on."""
    offset, number = start.offset, start.line
    for line in _unpacked(path, opened, start) if first.startswith(GZIP) else _from(opened, start):
        number += 1
        if content := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
            yield offset, number, content
        offset += len(line)


def _from(opened, start: Start) -> Iterator[bytes]:
    """The lines of an open file from a byte on."""
    if start.offset:
        opened.seek(start.offset)
    yield from opened


def _unpacked(path, opened, start: Start) -> Iterator[bytes]:
    """The lines of a gzip file."""
    number = start.line
    try:
        with gzip.open(opened) as lines:
            for line in _from(lines, start):
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated: its gzip data end after line {number} ({error})") from None


def _parquet_parts(path, opened, size: int, wanted: Callable, start: Start) -> Iterator[Part]:
    """`read_parts` of a Parquet file: each row as JSON without its nulls, because a column has a value in every row."""
    pa, pq = arrow(path)
    try:
        file = pq.ParquetFile(opened, buffer_size=BUFFER)
        total = file.metadata.num_rows
        numbers = range(max(1, -(-total // size)))
        for number in numbers[start.number :]:
            first, stop = number * size, min(total, (number + 1) * size)
            lines = list(_parquet_lines(path, file, first, stop)) if wanted(number) else None
            yield Part(path, Start(number, first, first), lines, number == numbers[-1])
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged, not Parquet ({str(error).splitlines()[0]})") from error


def _parquet_lines(path, file, first: int, stop: int) -> Iterator[tuple[str, bytes]]:
    """(source, JSON) of the rows first..stop-1 of an open Parquet file."""
    ends = list(itertools.accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
    groups = [i for i, end in enumerate(ends) if end > first and (i == 0 or ends[i - 1] < stop)]
    number = ends[groups[0] - 1] if groups and groups[0] else 0
    for batch in file.iter_batches(BATCH, row_groups=groups):
        before, number = number, number + len(batch)
        if number <= first:
            continue
        begin, end = max(first, before), min(stop, number)
        try:
            rows = batch.slice(begin - before, end - begin).to_pylist()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, rows {begin + 1} to {end}: not UTF-8") from None
        for k, row in enumerate(rows, begin + 1):
            row, source = {name: value for name, value in row.items() if value is not None}, f"{path}, row {k}"
            yield source, to_json(source, row).encode()
        if number >= stop:
            return


def arrow(what) -> tuple:
    """(pyarrow, pyarrow.parquet) for a file or folder. ValueError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{what} needs pyarrow: pip install pyarrow, or '.[search]'") from None
    return pyarrow, pyarrow.parquet


def to_json(source: str, fields: Mapping) -> str:
    """Fields of a row as JSON in ASCII; times are in ISO 8601. ValueError for a value that JSON does not have."""

    def convert(value):
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return str(value)
        raise TypeError(f"{value!r:.40} of type {type(value).__name__}")

    try:
        return json.dumps(fields, allow_nan=False, default=convert)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has a value that JSON does not have ({error})") from None


def _parse(source: str, line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_number)
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


def _without_repeats(pairs: list[tuple]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs more than once")
    return fields


def _no_number(name: str):
    raise ValueError(f"{name} is not a number")


def read_rows(path, *, queries: bool = False) -> list[Row]:
    """The rows of a corpus file or, with `queries`, of a query file (`make_row`). Ids must be unique."""
    rows = _unique(make_row(source, fields, queries=queries) for source, fields in read_jsonl(path))
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row")
    return rows


def make_row(source: str, fields: dict, *, queries: bool = False) -> Row:
    """The row of a corpus or, with `queries`, of queries. ValueError unless the id and all texts are strings.

    The text of a row is (title + " " + text).strip(), as in MTEB, and without a title text.strip(). The title of a
    document with "chunks" goes before its first chunk by the same rule. A query is its text, unchanged.
    """
    name = check_id(source, fields, "_id")
    source = f"{source} (_id {name!r:.80})"
    if "text" in fields and "chunks" in fields:
        raise ValueError(f'{source} has "text" and "chunks": expected one of them')
    parts = fields.get("chunks", [fields["text"]] if "text" in fields else None)
    if not isinstance(parts, list) or (queries and "chunks" in fields):
        raise ValueError(f"{source} has no text: expected " + ('"text"' if queries else '"text" or a list "chunks"'))
    title = fields.get("title")
    for part in [*parts, *([] if title is None else [title])]:
        check_text(f"{source}: a text, chunk or title", part)
    if not queries:
        if title and parts:
            parts = [f"{title} {parts[0]}".strip(), *parts[1:]]
        elif "text" in fields:
            parts = [parts[0].strip()]
    return Row(source, name, parts, fields)


def _unique(rows: Iterable[Row]) -> list[Row]:
    """The rows as a list; ValueError for an id that occurs more than once."""
    rows = list(rows)
    refuse_repeated((row.id, row.source) for row in rows)
    return rows


def refuse_repeated(ids: Iterable[tuple[str, str]]) -> None:
    """ValueError if an id of pairs (id, source) occurs more than once."""
    seen: dict[str, str] = {}
    for name, source in ids:
        if name in seen:
            raise ValueError(f"{source}: the id {name!r} is already used in {seen[name]}")
        seen[name] = source


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
    ids = [(name, row.source) for row in rows for name in row.ids()]
    refuse_repeated(ids)
    return Corpus([row.chunks for row in rows], [name for name, _ in ids], [row.source for row in rows])
