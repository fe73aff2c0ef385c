"""Rows of one file: JSON, CSV, TSV, Parquet, text, whole documents; compressed files and tar archives.

format     extensions                  rows
json       .jsonl .ndjson .json        one object per line, or one array of objects
csv, tsv   .csv .tsv                   the first line has the columns. TSV has no quotes
parquet    .parquet
text       .txt                        one row per line: the text column
document   .md .rst .py … (DOCUMENTS)  one row per file: the text column
"""

import bz2
import contextlib
import csv
import fnmatch
import gzip
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from embed import paths
from embed.preparation.sources.base import Row, SourceError

DOCUMENTS = (
    "adoc asciidoc c cc cpp cs go h hpp html java js kt lua markdown md mdx org php pl ps1 py r rb rs rst scala sh sql "
    "swift tex ts xml"
).split()
FORMATS = {
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "txt": "text",
    "text": "text",
    **dict.fromkeys(DOCUMENTS, "document"),
}
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
ARCHIVES = {"tgz": "gz", "tbz2": "bz2", "txz": "xz", "tzst": "zst"}
BUFFER = 1 << 20
LONGEST = 1 << 28  # bytes of a line or document; more is a file of another kind
BATCH = 256  # rows of Parquet that are decoded at once
BOM = b"\xef\xbb\xbf"


class Kind(NamedTuple):
    """What a file's name says: the format (None: unknown, "tar": an archive) and the compression ("" for none)."""

    format: str | None
    compression: str


class Options(NamedTuple):
    """How files are read; the fields of `files` with these names."""

    format: str = "auto"
    members: str | Sequence[str] = "*"
    text_column: str = "text"
    columns: Sequence[str] = ()
    multiline: bool = True


def kind(name: str) -> Kind:
    """The kind of a file by its extensions."""
    parts = name.rsplit("/", 1)[-1].lower().split(".")[1:]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    extension = parts[-1] if parts else ""
    if extension in ARCHIVES and not compression:
        return Kind("tar", ARCHIVES[extension])
    return Kind("tar" if extension == "tar" else FORMATS.get(extension), compression)


def is_compressed(name: str) -> bool:
    """Whether the text of a file is several times as large as the file."""
    about = kind(name)
    return bool(about.compression) or about.format == "parquet"


def known(name: str, options: Options = Options()) -> Kind:  # noqa: B008
    """The kind of a file with `options.format`; SourceError if it is unknown."""
    result = kind(name)
    if result.format == "tar":
        return result
    if options.format != "auto":
        if options.format not in {*FORMATS.values(), "jsonl"}:
            raise SourceError(
                f"the format {options.format!r} is unknown: expected auto, {', '.join(sorted(set(FORMATS.values())))}"
            )
        return Kind(FORMATS.get(options.format, options.format), result.compression)
    if result.format is None:
        raise SourceError(
            f"the format of {name} is unknown: name it (format = json, csv, tsv, parquet, text or document), "
            "or choose files by a pattern"
        )
    return result


def rows(
    stream: BinaryIO, name: str, location: str, options: Options, start=0, stop=None, *, seekable: bool = True
) -> Iterator[Row]:
    """The rows of an open file that start in [start, stop); locations begin with `location`.

    `start` and `stop` count row groups of Parquet and otherwise bytes.
    """
    file_kind = known(name, options)
    with decompressed(stream, file_kind.compression) as content:
        if file_kind.format == "tar":
            yield from _tar(content, location, options)
        elif file_kind.format == "parquet":
            with (
                contextlib.nullcontext(content) if seekable and not file_kind.compression else _copied(content) as file
            ):
                yield from _parquet(file, location, options, start, stop)
        elif file_kind.format == "document":
            yield from _document(content, location, options)
        elif file_kind.format == "text":
            for at, line in _located(content, location, start, stop):
                yield _decoded(at, line, lambda text: {options.text_column: text})
        elif file_kind.format == "json":
            yield from _json(content, location, start, stop)
        else:
            yield from _csv(content, location, file_kind.format, options, start, stop)


def lines(stream: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The lines that start in the bytes [start, stop), without line ends (LF or CR LF) and without a byte order mark.

    Ranges that cover a file give every line once, whatever their limits.
    """
    position = 0
    if start:
        stream.seek(start - 1)  # a line that starts at `start` follows the end of a line
        position = start - 1 + len(_line(stream))
    while stop is None or position < stop:
        line = _line(stream)
        if not line:
            return
        if position == 0:
            position, line = len(line), line.removeprefix(BOM)
            if not line:
                return
        else:
            position += len(line)
        yield line[: -2 if line.endswith(b"\r\n") else -1] if line.endswith(b"\n") else line


def is_array(stream: BinaryIO) -> bool:
    """Whether a JSON file is one array, by its first byte that is not white space; nothing is consumed."""
    return stream.peek(64).removeprefix(BOM).lstrip()[:1] == b"["


def _line(stream: BinaryIO) -> bytes:
    line = stream.readline(LONGEST)
    if len(line) == LONGEST:
        raise SourceError(f"a line is longer than {LONGEST:,} bytes")
    return line


@contextlib.contextmanager
def decompressed(stream: BinaryIO, compression: str) -> Iterator[io.BufferedReader]:
    """The content of an open file, compressed or not, with a buffer."""
    if not compression:
        yield stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, BUFFER)
        return
    if compression == "zst":
        from backports import zstd

        # Web corpora are compressed with windows beyond the default limit of 128 MB.
        opened = zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: 31})
    else:
        opened = {"gz": gzip.GzipFile, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}[compression]
        opened = opened(fileobj=stream) if compression == "gz" else opened(stream)
    with opened, io.BufferedReader(opened, BUFFER) as content:
        yield content


@contextlib.contextmanager
def _copied(stream: BinaryIO) -> Iterator[BinaryIO]:
    """A copy on the disk of a stream that cannot seek."""
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, BUFFER)
        yield copy


def _located(stream: BinaryIO, location: str, start: int, stop: int | None) -> Iterator[tuple[str, bytes]]:
    """(location, line). The lines of a range are counted from its start, which the location names."""
    prefix = f"{location}@byte {start}:line " if start else f"{location}:"
    for number, line in enumerate(lines(stream, start, stop), 1):
        yield f"{prefix}{number}", line


def _decoded(location: str, content: bytes, value) -> Row:
    try:
        return Row(location, value(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Row(location, None, f"not UTF-8: byte {error.start} is {content[error.start]:#04x}")


def _document(stream: BinaryIO, location: str, options: Options) -> Iterator[Row]:
    content = stream.read(LONGEST)
    if len(content) == LONGEST:
        raise SourceError(f"a document is longer than {LONGEST:,} bytes")
    yield _decoded(f"{location}:1", content.removeprefix(BOM), lambda text: {options.text_column: text})


def _json(stream: BinaryIO, location: str, start: int, stop: int | None) -> Iterator[Row]:
    if not start and is_array(stream):
        import ijson

        if stream.peek(len(BOM)).startswith(BOM):
            stream.read(len(BOM))
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), 1):
            yield _object(f"{location}:row {number}", value)
        return
    for at, line in _located(stream, location, start, stop):
        if not line.strip():
            continue
        row = _decoded(at, line, lambda text: text)
        if row.error:
            yield row
            continue
        try:
            value = json.loads(row.value)
            if "\\ud" in row.value or "\\uD" in row.value:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield Row(at, None, "not Unicode: half a surrogate pair")
        except (ValueError, RecursionError) as error:
            yield Row(at, None, f"not JSON: {error}")
        else:
            yield _object(at, value)


def _object(location: str, value) -> Row:
    if isinstance(value, dict):
        return Row(location, value)
    return Row(location, None, f"not a JSON object: {json.dumps(value, ensure_ascii=False, default=str)[:40]}")


def _csv(stream, location: str, format: str, options: Options, start: int, stop: int | None) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if format == "tsv" else {"strict": True}
    if start:
        header, content = next(lines(stream), b""), lines(stream, start, stop)
        prefix, first = f"{location}@byte {start}:line ", 1
    else:
        content = lines(stream, 0, stop)
        header, prefix, first = next(content, b""), f"{location}:", 2
    try:
        columns = next(csv.reader([header.decode("utf-8")], **dialect), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"the first line must have the names of the columns ({error})") from None
    if not any(columns) or len(set(columns)) < len(columns):
        raise SourceError(f"the first line must have the names of the columns, each once: {columns!r:.200}")

    def row(number: int, parse) -> Row | None:
        try:
            values = parse()
        except csv.Error as error:
            return Row(f"{prefix}{number}", None, f"not {format.upper()}: {error}")
        if not values:
            return None
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            return Row(f"{prefix}{number}", None, "not UTF-8")
        if len(values) != len(columns):
            return Row(f"{prefix}{number}", None, f"{len(values)} values for {len(columns)} columns")
        return Row(f"{prefix}{number}", dict(zip(columns, values)))

    # Lone bytes become surrogates, which no text has: the row with them is bad, and no other.
    text = (line.decode("utf-8", "surrogateescape") for line in content)
    if format == "tsv" or not options.multiline:
        for number, line in enumerate(text, first):
            if result := row(number, lambda line=line: next(csv.reader([line], **dialect), [])):
                yield result
        return
    reader = csv.reader((f"{line}\n" for line in text), **dialect)
    while True:
        number = first + reader.line_num
        try:
            result = row(number, reader.__next__)
        except StopIteration:
            return
        if result:
            yield result
            # A stray quote may have taken many rows, which are all lost.
            for line in range(number + 1, first + reader.line_num) if result.error else ():
                yield Row(f"{prefix}{line}", None, f"inside of the bad row in line {number}")


def _parquet(stream: BinaryIO, location: str, options: Options, start: int, stop: int | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream, buffer_size=BUFFER)
    groups = range(file.num_row_groups)[start:stop]
    number = sum(file.metadata.row_group(i).num_rows for i in range(start))
    columns = list(options.columns) or None
    if columns and (missing := set(columns) - set(file.schema_arrow.names)):
        raise SourceError(f"no column {', '.join(sorted(missing))}: there are {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(BATCH, row_groups=list(groups), columns=columns):
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = [_one(batch.slice(i, 1)) for i in range(len(batch))]
        for value in values:
            number += 1
            yield Row(f"{location}:row {number}", *((None, "not UTF-8") if value is None else (value,)))


def _one(batch) -> dict | None:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _tar(stream: BinaryIO, location: str, options: Options) -> Iterator[Row]:
    patterns = [options.members] if isinstance(options.members, str) else options.members
    matched = False
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if not member.isfile() or paths.IGNORED.fullmatch(name.rsplit("/", 1)[-1]):
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                matched = True
                file = archive.extractfile(member)
                for row in rows(file, name, f"{location}!{name}", options, seekable=False):
                    yield row if row.value is None else row._replace(value={**row.value, "_file": name})
    if not matched:
        raise SourceError(f"no member matches {', '.join(patterns)}")
