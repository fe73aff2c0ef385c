"""The interface of a source: shards that are read apart from each other, and rows that are good or bad."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple


class SourceError(ValueError):
    """A source cannot be reached, is empty or is damaged. The message is one sentence."""


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


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text."""
    text = f"{error}".strip().split("\n")[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
