"""The rows of a segment: ids, documents, texts and fields, on a disk, read one at a time.

rows.jsonl          a row per line: {"_id", "document", "text", "start", "end", "fields"}, without what is missing
offsets.npy         int64[N + 1], where each line begins
ids.npy             uint64[N], a hash of each row's id
documents.npy       uint64[N], a hash of its document's id
fieldK.npy          int32[N], the value of field K in each row, -1 for none
fieldK.json         the texts of its values
"""

import array
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

ROWS, OFFSETS, ID_HASHES, DOCUMENT_HASHES = "rows.jsonl", "offsets.npy", "ids.npy", "documents.npy"
COLUMNS = {"_id": str, "document": str, "text": str, "start": int, "end": int, "fields": dict}
# Fields beyond these limits are stored, but not filtered by: different values, characters of one, fields.
MAX_VALUES, MAX_CHARACTERS, MAX_FIELDS = 1_000_000, 1000, 100


class RowWriter:
    """Writes the rows of a segment into a local folder, a few at a time."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.unfiltered: dict[str, str] = {}  # {field beyond the limits: which one}
        self._file = (folder / ROWS).open("wb")
        self._offsets, self._ids, self._documents = array.array("q", [0]), array.array("Q"), array.array("Q")
        self._fields: dict[str, tuple[array.array, dict[str, int]]] = {}

    def write(self, rows: Iterable[Mapping]) -> None:
        """Append rows: mappings with "_id" and, where there are any, the other COLUMNS."""
        for row in rows:
            kept = {name: row[name] for name in COLUMNS if row.get(name) not in (None, {})}
            if kept.get("document") == kept["_id"]:
                del kept["document"]
            line = json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            self._file.write(line)
            self._offsets.append(self._offsets[-1] + len(line))
            self._ids.append(_hash(kept["_id"]))
            self._documents.append(_hash(document(kept)))
            for name, value in kept.get("fields", {}).items():
                if name not in self.unfiltered and (text := as_text(value)) is not None:
                    self._add(name, text)
            self.count += 1

    def _add(self, name: str, text: str) -> None:
        if name not in self._fields and len(self._fields) == MAX_FIELDS:
            if len(self.unfiltered) < MAX_FIELDS:
                self.unfiltered[name] = f"more than {MAX_FIELDS} fields"
            return
        codes, values = self._fields.setdefault(name, (array.array("i"), {}))
        codes.extend([-1] * (self.count - len(codes)))
        codes.append(values.setdefault(text, len(values)))
        if len(values) > MAX_VALUES or len(text) > MAX_CHARACTERS:
            is_long = len(text) > MAX_CHARACTERS
            which = f"a value of {len(text):,} characters" if is_long else f"more than {MAX_VALUES:,} values"
            self.unfiltered[name] = which
            del self._fields[name]

    def close(self) -> list[str]:
        """Write the other files; returns the fields to filter by. ValueError for an id that occurs more than once."""
        self._file.close()
        for name, values, dtype in (
            (OFFSETS, self._offsets, np.int64),
            (ID_HASHES, self._ids, np.uint64),
            (DOCUMENT_HASHES, self._documents, np.uint64),
        ):
            np.save(self.folder / name, np.array(values, dtype))
        for number, (codes, values) in enumerate(self._fields.values()):
            codes.extend([-1] * (self.count - len(codes)))
            np.save(self.folder / f"field{number}.npy", np.array(codes, np.int32))
            (self.folder / f"field{number}.json").write_text(json.dumps(list(values)), encoding="utf-8")
        stored = StoredRows(self.folder, self.count, list(self._fields))
        order = np.argsort(stored.ids, kind="stable")
        for i in np.flatnonzero(stored.ids[order[1:]] == stored.ids[order[:-1]]).tolist():
            first, second = order[i : i + 2].tolist()
            if (name := stored[first]["_id"]) == stored[second]["_id"]:
                raise ValueError(f"the id {name!r:.80} occurs more than once, in the rows {first:,} and {second:,}")
        return list(self._fields)


class StoredRows:
    """The rows that a `RowWriter` wrote. ValueError names a file that does not have the expected content."""

    def __init__(self, folder: Path, count: int, fields: Sequence[str]):
        self.folder, self.count, self.fields = folder, count, list(fields)
        self._offsets = load_array(folder / OFFSETS, np.int64, (count + 1,))
        self.ids, self.documents = (load_array(folder / x, np.uint64, (count,)) for x in (ID_HASHES, DOCUMENT_HASHES))
        self._codes = [load_array(folder / f"field{k}.npy", np.int32, (count,)) for k in range(len(fields))]
        # Files stay open: a change to the index may remove them.
        self._values = [(folder / f"field{k}.json").open("rb") for k in range(len(fields))]
        self._file = (folder / ROWS).open("rb")
        size = os.fstat(self._file.fileno()).st_size
        if self._offsets[0] != 0 or self._offsets[-1] != size or (np.diff(self._offsets) < 3).any():
            raise ValueError(f"{folder / OFFSETS} does not describe {ROWS}: make the index again")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        return (self[row] for row in range(self.count))

    def __getitem__(self, row: int) -> dict:
        start, stop = self._offsets[row : row + 2].tolist()
        line = os.pread(self._file.fileno(), stop - start, start)  # several threads may read
        try:
            content = json.loads(line.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or "_id" not in content or not all(map(_is_column, content.items())):
            raise ValueError(f"{self.folder / ROWS} has the line {line!r:.60}, which is no row: make the index again")
        return content

    def of_documents(self, names: Iterable[str]) -> dict[str, list[int]]:
        """{document: its rows} for those of the documents that there are."""
        wanted = set(names)
        hashes = np.fromiter(map(_hash, wanted), np.uint64, len(wanted))
        found: dict[str, list[int]] = {}
        for row in np.flatnonzero(np.isin(self.documents, hashes)).tolist():
            if (name := document(self[row])) in wanted:
                found.setdefault(name, []).append(row)
        return found

    def also_in(self, other: "StoredRows") -> np.ndarray:
        """The rows, int64, whose document has rows in `other` too."""
        hashes, first = np.unique(other.documents, return_index=True)
        rows = np.flatnonzero(np.isin(self.documents, hashes))
        theirs = first[np.searchsorted(hashes, self.documents[rows])] if len(rows) else rows
        same = [document(self[a]) == document(other[b]) for a, b in zip(rows.tolist(), theirs.tolist())]
        return rows[np.array(same, bool)]

    def matching(self, filters: Mapping[str, Sequence]) -> np.ndarray:
        """Whether each row has, in every field of `filters`, one of its values: bool [N]."""
        matches = np.ones(self.count, bool)
        for name, allowed in filters.items():
            if name not in self.fields:
                matches[:] = False
                continue
            number = self.fields.index(name)
            file = self._values[number]
            try:
                known = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
                codes = {value: code for code, value in enumerate(known)}
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{file.name} does not list values: make the index again") from None
            wanted = [codes[text] for value in allowed if (text := as_text(value)) in codes]
            matches &= np.isin(self._codes[number], wanted)
        return matches


def document(row: Mapping) -> str:
    """The document of a row, which for a text of its own is the row."""
    return row.get("document", row["_id"])


def as_text(value) -> str | None:
    """The text by which a field's value is compared: that of JSON, without quotes. None for lists and objects."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def load_array(file: Path, dtype, shape: Sequence[int]) -> np.ndarray:
    """A .npy file that NumPy wrote, memory-mapped; ValueError unless it has this dtype and shape.

    The header is compared, not parsed, because somebody else may have written it.
    """
    header, size = npy_header(dtype, shape), int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    try:
        with file.open("rb") as opened:
            expected = opened.read(len(header)) == header and os.fstat(opened.fileno()).st_size == len(header) + size
    except OSError:
        expected = False
    if not expected:
        raise ValueError(f"{file} is not an array {np.dtype(dtype)}{list(shape)}: make the index again")
    return np.memmap(file, dtype, "r", len(header), tuple(shape)) if size else np.zeros(shape, dtype)


def npy_header(dtype, shape: Sequence[int]) -> bytes:
    """The first bytes of a .npy file. Their number does not depend on the length of the first axis."""
    content = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(content, described)
    return content.getvalue()


def _hash(name: str) -> int:
    """64 bits of a hash of an id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _is_column(item: tuple) -> bool:
    name, value = item
    return name in COLUMNS and isinstance(value, COLUMNS[name])
