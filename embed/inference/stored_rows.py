"""The rows of an index: ids, documents, texts and fields, on a disk, read one at a time.

rows.jsonl     a row per line: {"_id", "document", "text", "start", "end", "fields"}, without what is missing
offsets.npy    int64[N + 1], where each line begins
keys.npy       uint64[N], a hash of each row's document
fieldK.npy     int32[N], the value of field K in each row, -1 for none
fieldK.json    the name of field K, and the texts of its values
"""

import array
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

ROWS, OFFSETS, KEYS = "rows.jsonl", "offsets.npy", "keys.npy"
COLUMNS = {"_id": str, "document": str, "text": str, "start": int, "end": int, "fields": dict}
MAX_VALUES = 1_000_000  # a field with more different values is stored, but not filtered by


class RowWriter:
    """Writes the rows of an index into a local folder, a few at a time."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.many = folder, 0, []  # fields with too many values
        self._file = (folder / ROWS).open("wb")
        self._offsets, self._keys = array.array("q", [0]), array.array("Q")
        self._fields: dict[str, tuple[array.array, dict[str, int]]] = {}

    def write(self, rows: Iterable[Mapping]) -> None:
        """Append rows: mappings with "_id" and, where there are any, the other COLUMNS."""
        for row in rows:
            kept = {name: row[name] for name in COLUMNS if row.get(name) not in (None, {})}
            if kept.get("document") == kept["_id"]:
                del kept["document"]
            line = json.dumps(kept, ensure_ascii=False).encode() + b"\n"
            self._file.write(line)
            self._offsets.append(self._offsets[-1] + len(line))
            self._keys.append(key(document(kept)))
            for name, value in kept.get("fields", {}).items():
                self._add(name, value)
            self.count += 1

    def _add(self, name: str, value) -> None:
        if name in self.many or (shown := as_text(value)) is None:
            return
        codes, values = self._fields.setdefault(name, (array.array("i"), {}))
        codes.extend([-1] * (self.count - len(codes)))
        codes.append(values.setdefault(shown, len(values)))
        if len(values) > MAX_VALUES:
            self.many.append(name)
            del self._fields[name]

    def close(self) -> list[str]:
        """Write the other files; returns the fields to filter by."""
        self._file.close()
        np.save(self.folder / OFFSETS, np.frombuffer(self._offsets, np.int64))
        np.save(self.folder / KEYS, np.frombuffer(self._keys, np.uint64) if self.count else np.zeros(0, np.uint64))
        for number, (name, (codes, values)) in enumerate(self._fields.items()):
            codes.extend([-1] * (self.count - len(codes)))
            np.save(self.folder / f"field{number}.npy", np.frombuffer(codes, np.int32))
            described = json.dumps({"name": name, "values": list(values)})
            (self.folder / f"field{number}.json").write_text(described, encoding="utf-8")
        return list(self._fields)


class StoredRows:
    """The rows that a `RowWriter` wrote. ValueError names a file that does not have the expected content."""

    def __init__(self, folder: Path, count: int, fields: Sequence[str]):
        self.folder, self.count, self.fields = folder, count, list(fields)
        self._offsets = load_array(folder / OFFSETS, np.int64, (count + 1,))
        self.keys = load_array(folder / KEYS, np.uint64, (count,))
        self._file = (folder / ROWS).open("rb")
        size = (folder / ROWS).stat().st_size
        if self._offsets[0] != 0 or self._offsets[-1] != size or (np.diff(self._offsets) < 3).any():
            raise ValueError(f"{folder / OFFSETS} does not describe {ROWS}: make the index again")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict:
        start, stop = self._offsets[row : row + 2]
        return self._parse(os.pread(self._file.fileno(), int(stop - start), int(start)))  # also in several threads

    def __iter__(self) -> Iterator[dict]:
        with (self.folder / ROWS).open("rb") as lines:
            yield from map(self._parse, lines)

    def _parse(self, line: bytes) -> dict:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or "_id" not in row or not all(_is(name, x) for name, x in row.items()):
            raise ValueError(f"{self.folder / ROWS} has the line {line!r:.60}, which is no row: make the index again")
        return row

    def of_documents(self, names: Iterable[str]) -> dict[str, list[int]]:
        """{document: its rows} for those of the documents that there are."""
        hashed: dict[int, list[str]] = {}
        for name in names:
            hashed.setdefault(key(name), []).append(name)
        wanted = np.fromiter(hashed, np.uint64, len(hashed))
        found: dict[str, list[int]] = {}
        for row in np.flatnonzero(np.isin(self.keys, wanted)).tolist():
            if (name := document(self[row])) in hashed[int(self.keys[row])]:
                found.setdefault(name, []).append(row)
        return found

    def refuse_repeated(self) -> None:
        """ValueError if rows of one document do not follow each other: it was written more than once."""
        first = np.flatnonzero(np.diff(self.keys, prepend=~self.keys[:1]))  # of each run of rows of one document
        order = first[np.argsort(self.keys[first], kind="stable")]
        for i in np.flatnonzero(self.keys[order[1:]] == self.keys[order[:-1]]).tolist():
            name, other = (document(self[int(row)]) for row in order[i : i + 2])
            if name == other:
                rows = " and ".join(f"{row:,}" for row in order[i : i + 2].tolist())
                raise ValueError(
                    f"the document {name!r:.80} occurs more than once: vectors {rows} begin one of this id"
                )

    def matching(self, filters: Mapping[str, Sequence]) -> np.ndarray:
        """Whether each row has, in every field of `filters`, one of its values: bool [N]."""
        matches = np.ones(self.count, bool)
        for name, allowed in filters.items():
            if name not in self.fields:
                matches[:] = False
                continue
            number = self.fields.index(name)
            file = self.folder / f"field{number}.json"
            try:
                described = json.loads(file.read_bytes())
                values = {value: code for code, value in enumerate(described["values"])}
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(f"{file} does not describe the field {name!r}: make the index again") from None
            codes = load_array(self.folder / f"field{number}.npy", np.int32, (self.count,))
            matches &= np.isin(codes, [values[text] for value in allowed if (text := as_text(value)) in values])
        return matches


def document(row: Mapping) -> str:
    """The document of a row, which for a text of its own is the row."""
    return row.get("document", row["_id"])


def as_text(value) -> str | None:
    """The text by which a field's value is compared: that of JSON, without quotes. None for lists and objects."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def key(name: str) -> int:
    """The hash of a document's id, 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def load_array(file: Path, dtype, shape: Sequence[int]) -> np.ndarray:
    """A .npy file, memory-mapped; ValueError unless it has this dtype and shape."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        expected = found.dtype == dtype and found.shape == tuple(shape) and found.flags.c_contiguous
    except (ValueError, EOFError, OSError, SyntaxError):
        expected = False
    if not expected:
        raise ValueError(f"{file} is not an array {np.dtype(dtype)}{list(shape)}: make the index again")
    return found


def _is(name: str, value) -> bool:
    return name in COLUMNS and isinstance(value, COLUMNS[name])
