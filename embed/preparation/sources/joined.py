"""Sources whose rows are joined from several files: joined once, to rows in a folder, with bounded memory."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embed import paths
from embed.preparation import numbers
from embed.preparation.sources.base import Row, Shard, Source, SourceError, cached
from embed.preparation.sources.files import Files
from embed.preparation.sources.hub import Hub, choose, config_splits, read_card

PART_BYTES = 1 << 24  # of a file of joined rows
SAMPLED = 20_000  # rows of each file that `sample` joins


@dataclass(frozen=True, kw_only=True)
class Joined(Source):
    """A source whose `build` writes its rows to files. Subclasses define `parts`, `join` and `names`.

    shard_bytes: size of the shards of joined rows.
    """

    shard_bytes: int = PART_BYTES

    def __post_init__(self):
        numbers.check(self, type(self).__name__.lower(), {"shard_bytes": 1})

    names = ()  # the columns

    def parts(self) -> dict[str, Source]:
        """The sources that are joined."""
        raise NotImplementedError

    def join(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        """All rows; with `limit`, only those that the first rows of each part give. Large data go to `temporary`."""
        raise NotImplementedError

    @cached
    def _parts(self) -> dict[str, Source]:
        return {name: part.pinned(self._identity.get(name, {})) for name, part in self.parts().items()}

    def pinned(self, identity: dict) -> "Joined":
        result = dataclasses.replace(self)
        result.__dict__["_identity"] = identity
        return result

    @cached
    def _identity(self) -> dict:
        """The identity of each part to read, of `pinned`."""
        return {}

    def build(self, scratch: str | os.PathLike) -> None:
        """Writes the rows to `scratch`: part-00000.jsonl … and, last, index.json with their sizes."""
        key = json.dumps([f"{self.__getstate__() | {'shard_bytes': 0}}", self.identity()], sort_keys=True, default=str)
        name = f"{type(self).__name__.lower()}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        folder = paths.path(scratch) / name
        if not (folder / "index.json").exists():
            paths.path(scratch).mkdir(parents=True, exist_ok=True)
            local = None if paths.is_bucket(folder) else Path(scratch)
            with tempfile.TemporaryDirectory(prefix=".join-", dir=local) as temporary:
                sizes, count = [], 0
                try:
                    for content in _blocks(self.join(Path(temporary))):
                        paths.write(_part(folder, len(sizes)), b"".join(content))
                        sizes.append(sum(map(len, content)))
                        count += len(content)
                except sqlite3.OperationalError as error:  # a full disk
                    raise SourceError(f"the join in {scratch} failed: {error}") from error
                if not count:
                    raise SourceError(f"{', '.join(self._parts)} of {type(self).__name__.lower()} join to no row")
                paths.write_json(folder / "index.json", {"rows": count, "parts": sizes})
        object.__setattr__(self, "built", {"folder": os.fspath(folder), **paths.read_json(folder / "index.json")})

    built = None

    def shards(self) -> list[Shard]:
        if not self.built:
            raise RuntimeError(f"{type(self).__name__}.build must be called before shards")
        result: list[Shard] = []
        for number, size in enumerate(self.built["parts"]):
            if result and result[-1].bytes + size <= self.shard_bytes:
                result[-1] = result[-1]._replace(stop=number + 1, bytes=result[-1].bytes + size)
            else:
                result.append(Shard(self.built["folder"], number, number + 1, size))
        return result

    def read(self, shard: Shard) -> Iterator[Row]:
        for number in range(shard.start, shard.stop):
            with _part(paths.path(shard.path), number).open("rb") as lines:
                for line in lines:
                    yield Row(*json.loads(line))

    def undivided(self) -> "Joined":
        return dataclasses.replace(self, shard_bytes=1 << 62)

    def sample(self, count: int = 10) -> list[Row]:
        preview = dataclasses.replace(self)
        preview.__dict__["_parts"] = {name: part.preview() for name, part in self._parts.items()}
        with tempfile.TemporaryDirectory() as temporary:
            return list(itertools.islice(preview.join(Path(temporary), SAMPLED), count))

    def describe(self) -> dict:
        described = [part.describe() for part in self._parts.values()]
        licenses = sorted({d["license"] for d in described if d["license"]})
        return {
            "rows": self.built["rows"] if self.built else None,
            "columns": list(self.names),
            "license": ", ".join(licenses) or None,
            "files": sum(d["files"] for d in described),
            "bytes": sum(d["bytes"] for d in described),
        }

    def is_local(self) -> bool:
        return all(part.is_local() for part in self._parts.values())

    def identity(self) -> dict:
        return {name: part.identity() for name, part in self._parts.items()}


def _part(folder, number: int):
    return folder / f"part-{number:05}.jsonl"


def _blocks(rows: Iterable[Row]) -> Iterator[list[bytes]]:
    """Rows as lines of JSON, in lists of about PART_BYTES."""
    block, size = [], 0
    for row in rows:
        block.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        size += len(block[-1])
        if size >= PART_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


@contextlib.contextmanager
def database(folder: Path, schema: str) -> Iterator[sqlite3.Connection]:
    """A new database on the disk, which nothing outlives."""
    with contextlib.closing(sqlite3.connect(Path(folder) / "join.sqlite", isolation_level=None)) as connection:
        connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;" + schema
        )
        connection.execute("BEGIN")
        yield connection


def field(row: Row, *names: str):
    """The first of several fields that a row has, for names that differ between data sets; None without any."""
    return next((row.value[name] for name in names if row.value.get(name) is not None), None)


def dataset_part(
    path: str, id: str, revision: str, streaming: bool, *, explicit, patterns: dict[str, str], splits: tuple[str, ...]
) -> Source:
    """One of the tables of a dataset, such as its queries, in a local folder, in a bucket or on the hub.

    explicit: a Source, or globs of the table's files relative to the dataset; empty to look for the table.
    patterns: {name of the config: regular expression of the files in a dataset without a list of configs}.
    splits: the splits to read, the first that there is; "" is all of them.
    """
    if isinstance(explicit, Source):
        return explicit
    if (path and id) or not (path or id or explicit):
        raise SourceError("expected the path or the id of a dataset, and not both")
    globs = [explicit] if isinstance(explicit, str) else list(explicit)
    if id:
        sizes, configs, commit = Hub(id=id, revision=revision).listing
        names = list(sizes)
        if explicit:
            return Hub(id=id, revision=commit, streaming=streaming, files=globs)
    elif explicit:
        return Files([name if paths.is_bucket(name) else os.path.join(path, name) for name in globs])
    else:
        folder = paths.path(path)
        if not folder.is_dir():
            raise SourceError(f"{path} is not a folder")
        names = list(paths.files(folder))
        card = (folder / "README.md").read_bytes() if "README.md" in names else b""
        configs = read_card(card.decode("utf-8", "replace")).get("configs") or []
    source, listed = id or path, [f"{config.get('config_name')}" for config in configs]
    if config := next((name for name in patterns if name in listed), ""):
        available = config_splits(source, names, configs, config)
        split = next((split for split in splits if not split or split in available), splits[0])
        chosen = choose(source, names, configs, config, split)
    else:
        combinations = ((split, pattern) for split in splits for pattern in patterns.values())
        filled = (pattern.replace("{split}", split or r"[\w.-]+") for split, pattern in combinations)
        lists = ([name for name in names if re.fullmatch(pattern, name)] for pattern in filled)
        chosen = next((files for files in lists if files), None)
        if not chosen:
            some = ", ".join(sorted(names)[:20])
            of = f" of the split {splits[0]!r}" if splits[0] and "{split}" in "".join(patterns.values()) else ""
            raise SourceError(f"{source} has no {' or '.join(filter(None, patterns))}{of}: its files are {some}")
    if id:
        return Hub(id=id, revision=commit, streaming=streaming, files=chosen)
    return Files([os.fspath(paths.path(path) / name) for name in chosen])
