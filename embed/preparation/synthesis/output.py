"""The file of rows that a run writes and a later run continues."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from embed.preparation.synthesis.prompts import Settings
from embed.preparation.synthesis.usage import Usage

KEYS = (
    "query",
    "document",
    "document_id",
    "persona",
    "type",
    "length",
    "difficulty",
    "language",
    "model",
    "prompt",
    "usage",
)


class Document(NamedTuple):
    """A document to write queries for."""

    id: str
    text: str


class Output:
    """The rows that are written, and the documents that were skipped, in a second file OUTPUT.skipped.

    A row's usage is that of its document with all its requests; "queries" in it is the number of rows that share it.
    That number also shows whether the last document of an interrupted run is complete.
    """

    def __init__(self, path, model: str, settings: Settings):
        """Read what earlier runs wrote; `path` None writes nothing. An incomplete document at the end is removed."""
        self.path, self.model, self.prompt = path and Path(path), model, settings.digest
        self.texts: dict[str, str] = {}  # of the documents in the output
        self.skipped: set[str] = set()  # documents that are not asked for again
        self.usage = Usage()
        self.show: Callable[[dict], None] = lambda row: None  # called with each row
        self._opened = {}
        if self.path:
            self.log = self.path.with_name(f"{self.path.name}.skipped")
            self._read_rows()
            self._read_log()

    def _read_rows(self) -> None:
        last, start, left = {}, 0, 0  # document: its row, where its rows start, and how many are missing
        stop = 0
        for number, stop_of_line, row in _lines(self.path):
            self._check(self.path, number, row, KEYS)
            if row["document_id"] != last["document_id"] if left else row["document_id"] in self.texts:
                raise ValueError(
                    f"{self.path}, line {number} is damaged: the rows of a document are missing or in two places; "
                    "choose another --output"
                )
            if not left:
                start, left = stop, row["usage"]["queries"]
                self.texts[row["document_id"]] = row["document"]
                self.usage.add(*(row["usage"][field.name] for field in dataclasses.fields(Usage)))
                last = row
            left, stop = left - 1, stop_of_line
        if left:
            del self.texts[last["document_id"]]
            self.usage.add(*(-last["usage"][field.name] for field in dataclasses.fields(Usage)))
            stop = start
        _truncate(self.path, stop)

    def _read_log(self) -> None:
        stop = 0
        for number, stop, row in _lines(self.log):  # noqa: B007
            self._check(self.log, number, row, ("document_id", "reason", "again", "model", "prompt", "usage"))
            self.usage.add(*(row["usage"][field.name] for field in dataclasses.fields(Usage)))
            if not row["again"]:
                self.skipped.add(row["document_id"])
        _truncate(self.log, stop)

    def _check(self, file, number: int, row: dict, keys: Sequence[str]) -> None:
        usage, fields = row.get("usage"), {field.name for field in dataclasses.fields(Usage)}
        fields |= {"queries"} if "query" in keys else set()
        if row.keys() != set(keys) or not isinstance(usage, dict) or usage.keys() != fields:
            raise ValueError(f"{file}, line {number} was not written by this command: choose another path")
        for name, value in (("model", self.model), ("prompt", self.prompt)):
            if row[name] != value:
                what = "model" if name == "model" else "prompts or settings (their digest)"
                raise ValueError(
                    f"{file} was written with other {what}: {row[name]!r}, not {value!r}; choose another --output"
                )

    def write(self, rows: Sequence[dict], usage: Usage) -> None:
        """Append the rows of a document, with its usage."""
        shared = dataclasses.asdict(usage) | {"queries": len(rows)}
        rows = [row | {"model": self.model, "prompt": self.prompt, "usage": shared} for row in rows]
        for row in rows:
            self.show(row)
        self._append(self.path, rows)

    def skip(self, document_id: str, reason: str, usage: Usage, *, again: bool) -> None:
        """Record a document without rows; the next run asks for it only with `again`."""
        if usage.total or not again:
            row = {"document_id": document_id, "reason": reason, "again": again, "model": self.model}
            row |= {"prompt": self.prompt, "usage": dataclasses.asdict(usage)}
            self._append(self.path and self.log, [row])

    def _append(self, file, rows: Sequence[dict]) -> None:
        if file:
            if file not in self._opened:
                self._opened[file] = open(file, "ab", buffering=0)  # closed in close
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            while content:  # a write may be short
                content = content[self._opened[file].write(content) :]

    def close(self) -> None:
        """Close the files, with their content on the disk."""
        for opened in self._opened.values():
            os.fsync(opened.fileno())
            opened.close()
        self._opened = {}


def is_output(file) -> bool:
    """Whether a file has the content that `Output` writes; its last line may be incomplete."""
    with Path(file).open("rb") as opened:
        line = opened.readline()
    try:
        return json.loads(line).keys() == set(KEYS) if line.endswith(b"\n") else _is_start(line)
    except (ValueError, AttributeError):
        return False


def _is_start(line: bytes, start: bytes = b'{"query": "') -> bool:
    return line.startswith(start) or start.startswith(line)


def _lines(file: Path) -> Iterator[tuple[int, int, dict]]:
    """(number, offset of its end, object) of each line of a file that exists, without an incomplete last line."""
    if not file.exists():
        return
    stop = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            stop += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is damaged ({error}): remove the line") from None
            yield number, stop, row if isinstance(row, dict) else {}


def _truncate(file: Path, size: int) -> None:
    if file.exists() and file.stat().st_size != size:
        os.truncate(file, size)


def check_texts(output: Output, documents: Iterable[Document]) -> None:
    """ValueError unless the documents of the output are among `documents`, with the same text."""
    texts = {document.id: document.text for document in documents}
    for name, text in output.texts.items():
        if texts.get(name) != text:
            what = "has another text" if name in texts else "is missing"
            raise ValueError(f"the document {name!r} of {output.path} {what} in the corpus: choose another --output")
