"""The interface of a source: shards that are read apart from each other, and rows that are good or bad."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple


class SourceError(ValueError):
    """A source cannot be reached, is empty or is damaged. The message is one sentence."""


class UnreachableError(SourceError):
    """The connection to a source failed, or its server did: another attempt may succeed."""


# Classes of errors, or their bases, of a connection, in the standard library, httpx, aiohttp, requests, botocore and
# google.auth. Each file system raises those of its library, so they are told by name.
CONNECTION_ERRORS = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "Timeout",
    "TimeoutError",
    "TransportError",
    "gaierror",
}
BUSY = (408, 429)  # status of a server that asks for another attempt; 500 and more are its errors


class Shard(NamedTuple):
    """A part of a source. `start` and `stop` mean what the source says; `bytes` is its size, to balance work."""

    path: str
    start: int = 0
    stop: int | None = None
    bytes: int = 0
    name: str = ""  # the column _file


class Row(NamedTuple):
    """A row of a source. A bad row has an error and no value."""

    location: str  # file:line or file:row N
    value: dict | None = None
    error: str | None = None


class Source:
    """Rows of text, in shards. Subclasses are frozen dataclasses with gin names; they can be pickled."""

    def __getstate__(self) -> dict:
        """The fields, without what was found out since: reading a shard needs no more."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def build(self, scratch: str | os.PathLike) -> None:
        """Does, once, what must be done before `shards()`. A call after an interruption continues or starts again.

        It must be called in the process that calls `shards`, also if an earlier process has built the same folder.
        """

    def shards(self) -> list[Shard]:
        """All shards, in a fixed order. SourceError if the source cannot be reached or is empty."""
        raise NotImplementedError

    def read(self, shard: Shard) -> Iterator[Row]:
        """The rows of a shard in order, in constant memory. SourceError if a file is damaged."""
        raise NotImplementedError

    def describe(self) -> dict:
        """{"rows": int or None, "columns", "license": str or None, "files", "bytes"}. Reads as little as possible."""
        raise NotImplementedError

    def identity(self) -> dict:
        """What changes when the content of the source changes: files with sizes and versions, or a commit. JSON."""
        raise NotImplementedError

    def pinned(self, identity: dict) -> "Source":
        """This source with the content that it had when `identity` was recorded, if it can tell versions apart."""
        return self

    def limited(self, limit: int) -> "Source":
        """A source that need not find more than `limit` rows of a kind, for trials."""
        return self

    def undivided(self) -> "Source":
        """A source none of whose shards divides rows that belong together (task.group_by): whole files, or one shard.

        SourceError if it has none.
        """
        raise SourceError(f"the rows of {type(self).__name__} cannot be grouped: its shards divide them")

    def with_parts(self) -> "Source":
        """This source with the commits of its tables, for a process that reads without `build`."""
        return self

    def report(self) -> dict:
        """What `build` found, for info.json."""
        return {}

    def is_local(self) -> bool:
        """Whether `identity` asks nothing but a disk."""
        return False

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        """The rows of all shards, or the first `limit`."""
        return itertools.islice(itertools.chain.from_iterable(map(self.read, self.shards())), limit)

    def preview(self) -> "Source":
        """A source of the same rows that reads the first of them with less work, for `sample` and `describe`."""
        return self

    def sample(self, count: int = 10) -> list[Row]:
        """The first rows, good or bad, without `build`."""
        return list(self.preview().rows(count))


class cached:
    """A property that is worked out once. That of functools has one lock for all objects: one that waits stops all."""

    def __init__(self, function: Callable):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        value = instance.__dict__[self.function.__name__] = self.function(instance)
        return value


def source_error(message: str, error: BaseException) -> SourceError:
    """A SourceError of another error: an UnreachableError if the connection or the server is at fault."""
    return (UnreachableError if is_unreachable(error) else SourceError)(message)


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of a connection or of a server."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            holder = error if response is None else response
            names = ("status_code", "status", "code")
            status = next((getattr(holder, name) for name in names if hasattr(holder, name)), None)
        if f"{status}".isdecimal() and (int(status) in BUSY or int(status) >= 500):
            return True
        if CONNECTION_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text."""
    text = f"{error}".strip().split("\n")[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
