"""`files`: rows of files on a disk or in a bucket."""

import dataclasses
import glob
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from embed import paths
from embed.preparation import numbers
from embed.preparation.sources import formats
from embed.preparation.sources.base import Row, Shard, Source, SourceError, cached, first_line, source_error

COUNTED = 64  # at most this many Parquet files are opened to count their rows
THREADS = 16  # that open remote files at once


class Input(NamedTuple):
    """A file: where it is, its path relative to the fixed part of its pattern, and what changes with its content."""

    path: str  # absolute, or a URL
    name: str
    size: int
    version: str


def find(pattern: str | os.PathLike) -> list[Input]:
    """The files of a path, glob or folder, local or in a bucket, sorted. SourceError if there is none."""
    import fsspec

    text = os.fspath(paths.path(pattern))
    scheme = f"{text.partition('://')[0]}://" if paths.is_bucket(text) else ""
    try:
        system, inside = fsspec.url_to_fs(text)
        system.invalidate_cache()
        if system.isfile(inside):
            root, matches = os.path.dirname(inside), {inside: system.info(inside)}
        elif system.isdir(inside):
            root, matches = inside.rstrip("/"), system.find(inside, detail=True)
        else:
            fixed = itertools.takewhile(lambda part: not glob.has_magic(part), inside.split("/")[:-1])
            root, matches = "/".join(fixed), system.glob(inside, detail=True)
    except Exception as error:  # each file system has its own
        raise source_error(f"{pattern} cannot be reached: {first_line(error)}", error) from error
    result = []
    for path, info in sorted(matches.items()):
        name = path[len(root) :].lstrip("/")
        if info["type"] == "file" and not any(paths.IGNORED.fullmatch(part) for part in name.split("/")):
            result.append(Input(scheme + path, name, info["size"], _version(scheme + path, info)))
    if not result:
        raise SourceError(f"no file matches {pattern}")
    return result


def find_files(names: Sequence[str]) -> list[Input | None]:
    """The file of each path, local or in a bucket; None for a name that is not the path of a file."""
    import fsspec

    def one(name: str) -> Input | None:
        try:
            system, inside = fsspec.url_to_fs(name)
            info = system.info(inside)
        except Exception:  # each file system has its own
            return None
        return Input(name, name, info["size"], _version(name, info)) if info["type"] == "file" else None

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, names))


def _version(path: str, info: dict) -> str:
    """What changes with the content of a file; `info` is that of its file system."""
    keys = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified")
    version = next((info[k] for k in keys if k in info), "") if paths.is_bucket(path) else os.stat(path).st_mtime_ns
    return f"{version}"


def open_file(path: str) -> BinaryIO:
    """A file on a disk or in a bucket, or hf://."""
    if not paths.is_bucket(path):
        return open(path, "rb", buffering=formats.BUFFER)
    import fsspec

    system, inside = fsspec.url_to_fs(path)
    return system.open(inside, "rb")


@dataclass(frozen=True, kw_only=True)
class FileReader(Source):
    """Rows of files of any format; subclasses say which files. Every row also has the column _file.

    format: of every file, or "auto" to tell it by the extension; `formats` has the list.
    members: patterns of the members to read of tar archives; `*` also matches slashes.
    text_column: the column of the formats text and document.
    columns: the only columns to read of Parquet files; empty for all.
    multiline: whether values in CSV may contain line ends. If not, a large file is split into shards.
    shard_bytes: size of the shards of large files that can be split: JSON lines, text, TSV, Parquet; not compressed.

    A shard is a range of bytes, and has the rows that start in it, or of Parquet a range of row groups.
    """

    format: str = "auto"
    members: str | Sequence[str] = "*"
    text_column: str = "text"
    columns: Sequence[str] = ()
    multiline: bool = True
    shard_bytes: int = 1 << 26

    def __post_init__(self):
        numbers.check(self, type(self).__name__.lower(), {"shard_bytes": 1})

    def inputs(self) -> list[Input]:
        """The files, in a fixed order."""
        raise NotImplementedError

    def open(self, path: str) -> BinaryIO:
        """Opens a file of `inputs` or a shard."""
        return open_file(path)

    def location(self, path: str) -> str:
        """How locations of rows name a file."""
        return path

    def undivided(self) -> "FileReader":
        return dataclasses.replace(self, shard_bytes=1 << 62)

    def can_split(self) -> bool:
        """Whether files can be opened before they are read."""
        return True

    @property
    def options(self) -> formats.Options:
        """How the files are read."""
        return formats.Options(self.format, self.members, self.text_column, self.columns, self.multiline)

    @cached
    def _inputs(self) -> list[Input]:
        files = self.inputs()
        for file in files:
            formats.known(file.path, self.options)
        if not any(file.size for file in files):
            raise SourceError(f"{files[0].path} is empty, and so is every other of {len(files):,} files")
        return files

    def shards(self) -> list[Shard]:
        large = [file for file in self._inputs if self.can_split() and file.size > self.shard_bytes]
        with ThreadPoolExecutor(THREADS) as pool:
            split = dict(zip(large, pool.map(self._split, large)))
        result = []
        for file in self._inputs:
            if file.size:
                result += split.get(file) or [Shard(file.path, 0, None, file.size, file.name)]
        return result

    def _split(self, file: Input) -> list[Shard] | None:
        """Shards of a large file; None if it cannot be split."""
        kind = formats.known(file.path, self.options)
        if kind.compression or kind.format in ("tar", "document") or (kind.format == "csv" and self.multiline):
            return None
        if kind.format == "parquet":
            groups = self._guard(file.path, lambda f: _groups(f, self.shard_bytes))
            return [Shard(file.path, *group, file.name) for group in groups]
        if kind.format == "json" and self._guard(file.path, formats.is_array):
            return None
        count = math.ceil(file.size / self.shard_bytes)
        limits = [file.size * i // count for i in range(count + 1)]
        return [Shard(file.path, start, stop, stop - start, file.name) for start, stop in itertools.pairwise(limits)]

    def _guard(self, path: str, function):
        """`function` of the open file; SourceError if it fails."""
        try:
            with self.open(path) as opened:
                return function(opened if hasattr(opened, "peek") else io.BufferedReader(opened, formats.BUFFER))
        except SourceError as error:
            raise type(error)(f"{self.location(path)}: {error}") from None
        except Exception as error:  # each library has its own
            raise source_error(f"{self.location(path)} cannot be read: {first_line(error)}", error) from error

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        if limit is None:
            return super().rows()
        files = (Shard(file.path, 0, None, file.size, file.name) for file in self._inputs if file.size)
        return itertools.islice(itertools.chain.from_iterable(map(self.read, files)), limit)

    def read(self, shard: Shard) -> Iterator[Row]:
        location, last = self.location(shard.path), ""
        try:
            with self.open(shard.path) as opened:
                for row in formats.rows(opened, shard.path, location, self.options, shard.start, shard.stop):
                    last = f" after {row.location}"
                    if row.value is not None:
                        row.value.setdefault("_file", shard.name)
                    yield row
        except SourceError as error:
            raise type(error)(f"{location}: {error}") from None
        except Exception as error:  # each library has its own
            raise source_error(f"{location} cannot be read{last}: {first_line(error)}", error) from error

    def describe(self) -> dict:
        rows, columns = 0, []
        for file in self._inputs:
            is_parquet = formats.known(file.path, self.options) == ("parquet", "")
            if not (is_parquet and self.can_split() and len(self._inputs) <= COUNTED):
                rows = None
                break
            rows += self._guard(file.path, lambda f: _metadata(f).num_rows)
        for row in self.sample():
            columns += [name for name in row.value or () if name not in columns]
        size = sum(file.size for file in self._inputs)
        return {"rows": rows, "columns": columns, "license": None, "files": len(self._inputs), "bytes": size}

    def identity(self) -> dict:
        return {"files": [[file.name, file.size, file.version] for file in self._inputs]}


def _metadata(stream: BinaryIO):
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream).metadata


def _groups(stream: BinaryIO, shard_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of ranges of row groups of about `shard_bytes`."""
    metadata, result = _metadata(stream), []
    start = size = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        size += sum(group.column(j).total_compressed_size for j in range(group.num_columns))
        if size >= shard_bytes or i + 1 == metadata.num_row_groups:
            result.append((start, i + 1, size))
            start, size = i + 1, 0
    return result


@dataclass(frozen=True)
class Files(FileReader):
    """Files on a disk or in a bucket: paths, globs or folders.

    paths: one or several, local (~ is the home folder), gs:// or s3://. The column _file of a row is its file's path
        relative to the part of the glob before the first wildcard, or to the folder.
    """

    paths: str | Sequence[str] = ()

    def is_local(self) -> bool:
        return not any(map(paths.is_bucket, self._patterns))

    @property
    def _patterns(self) -> Sequence[str]:
        return [self.paths] if isinstance(self.paths, (str, os.PathLike)) else self.paths

    def inputs(self) -> list[Input]:
        patterns = self._patterns
        if not patterns:
            raise SourceError("files.paths is empty: expected a path, a glob or a list of them")
        files: dict[str, Input] = {}
        for pattern in patterns:
            for file in find(pattern):
                files.setdefault(file.path, file)
        return list(files.values())
