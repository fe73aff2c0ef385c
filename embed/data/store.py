"""Prepared examples: ragged columns of tokens with random access, on disk or in a cloud bucket (TensorStore, zarr3).

PATH/COLUMN/          int32[sum of lengths]   all examples in one flat array, with a checksum per chunk
PATH/COLUMN.offsets/  int64[examples + 1]     example i is flat[offsets[i] : offsets[i + 1]]
PATH/info.json        columns, number of examples, a digest of all values; written last, so a folder without it is
                      not a store
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from embed import paths

CHUNK = 1 << 18  # elements
MEMORY_BYTES = 1 << 28  # columns up to this size are read into memory at their first use
CACHE_BYTES = 1 << 28  # chunks of larger columns
# TensorStore returns this value for a missing chunk. Tokens and lengths are never negative.
MISSING = -1


class Writer:
    """Writes a store. The store exists once `close` has returned."""

    def __init__(self, path: str | Path, columns: Sequence[str]):
        """Replaces an unfinished store at `path`; raises FileExistsError if there is a complete one."""
        if not columns:
            raise ValueError("a store needs at least one column")
        self._path = paths.path(path)
        self._kvstore = ts.KvStore.open(paths.kvstore(path)).result()
        if self._kvstore.read("info.json").result().state == "value":
            raise FileExistsError(f"{path} is a complete store already")
        self._kvstore.delete_range(ts.KvStore.KeyRange()).result()
        self._arrays = {}
        self._offsets = {column: [np.zeros(1, np.int64)] for column in columns}
        self._pending: dict[str, list[np.ndarray]] = {column: [] for column in columns}
        self._pending_size = dict.fromkeys(columns, 0)
        self._written = dict.fromkeys(columns, 0)
        self._hashes = {column: (hashlib.sha256(), hashlib.sha256()) for column in columns}  # of lengths, of values
        for column in columns:
            self._arrays[column] = _create(self._path, column, np.int32, 0)

    def append(self, example: Mapping[str, np.ndarray]) -> None:
        """Append one example: for each column int[length], values in 0..2^31 - 1."""
        arrays = {column: np.asarray(example[column]) for column in self._check(example)}
        self.extend({column: (array, np.array([len(array)])) for column, array in arrays.items()})

    def extend(self, examples: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Append n examples: {column: (flat values int[sum of lengths], lengths int[n])}."""
        count = None
        for column in self._check(examples):
            values, lengths = (np.asarray(array) for array in examples[column])
            if values.ndim != 1 or values.dtype.kind not in "iu" and len(values):
                raise ValueError(f"column {column!r} must be 1-D integers, got {values.dtype}{list(values.shape)}")
            if len(values) and not 0 <= values.min() <= values.max() < 2**31:
                raise ValueError(f"column {column!r} must be in 0 … 2^31 - 1, got {values.min()} … {values.max()}")
            if lengths.sum() != len(values):
                raise ValueError(
                    f"column {column!r}: the lengths must add up to its {len(values)} values, got {lengths.sum()}"
                )
            if count not in (None, len(lengths)):
                raise ValueError(f"column {column!r} has {len(lengths)} examples, the other columns {count}")
            count = len(lengths)
            for digest, array in zip(self._hashes[column], (lengths.astype("<i8"), values.astype("<i4"))):
                digest.update(array.tobytes())
            self._offsets[column].append(self._offsets[column][-1][-1] + np.cumsum(lengths, dtype=np.int64))
            self._pending[column].append(values.astype(np.int32))
            self._pending_size[column] += len(values)
            if self._pending_size[column] >= 16 * CHUNK:
                self._flush(column, whole_chunks=True)

    def close(self, info: Mapping) -> None:
        """Write pending values, the offsets and, last, info.json: `info` and the digest of all examples in order."""
        offsets = {column: np.concatenate([o for o in parts if len(o)]) for column, parts in self._offsets.items()}
        for column in self._arrays:
            self._flush(column, whole_chunks=False)
            _create(self._path, column + ".offsets", np.int64, len(offsets[column])).write(offsets[column]).result()
        digests = {column: [part.hexdigest() for part in parts] for column, parts in self._hashes.items()}
        header = {
            "columns": list(self._arrays),
            "examples": len(next(iter(offsets.values()))) - 1,
            "digest": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
            "info": dict(info),
        }
        self._kvstore.write("info.json", json.dumps(header, indent=1).encode()).result()

    def _flush(self, column: str, whole_chunks: bool) -> None:
        values = np.concatenate([np.zeros(0, np.int32), *self._pending[column]])
        size = len(values) // CHUNK * CHUNK if whole_chunks else len(values)
        start = self._written[column]
        if size:
            array = self._arrays[column].resize(exclusive_max=[start + size], expand_only=True).result()
            array[start : start + size].write(values[:size]).result()
            self._arrays[column] = array
        self._written[column] += size
        self._pending[column] = [values[size:]]
        self._pending_size[column] = len(values) - size

    def _check(self, example: Mapping) -> list[str]:
        if set(example) != set(self._arrays):
            raise ValueError(f"the store has columns {sorted(self._arrays)}, the example has {sorted(example)}")
        return list(self._arrays)


class Store:
    """Reads a store. Columns of up to MEMORY_BYTES stay in memory after their first use."""

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError if there is no complete store at `path`, ValueError if it is damaged."""
        self._name = str(path)
        self._path = paths.path(path)
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        header = read_header(path)
        self.columns: list[str] = header["columns"]
        self.info: dict = header["info"]
        self.digest: str = header["digest"]
        self._size: int = header["examples"]
        self._arrays = {}
        self._offsets = {}
        self._memory: dict[str, np.ndarray] = {}
        for column in self.columns:
            try:
                self._arrays[column] = _open(self._path, column, context)
                self._offsets[column] = _open(self._path, column + ".offsets", context).read().result()
            except (ValueError, OSError) as error:
                raise self._damaged(column, error) from None
            offsets, total = self._offsets[column], self._arrays[column].shape[0]
            if (
                len(offsets) != self._size + 1
                or offsets[0] != 0
                or offsets[-1] != total
                or (np.diff(offsets) < 0).any()
            ):
                raise ValueError(
                    f"the prepared store {path} is damaged: the offsets of column {column!r} do not match its {total} "
                    f"values in {len(offsets) - 1} examples; prepare it again"
                )

    def __len__(self) -> int:
        return self._size

    def read(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, np.ndarray]]:
        """The examples at `indices`, in that order: {column: int32[length]} each."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < self._size):
            raise IndexError(f"examples {indices.min()} … {indices.max()} must be in 0 … {self._size - 1}")
        columns = {}
        for column in self.columns:
            starts, stops = self._offsets[column][indices], self._offsets[column][indices + 1]
            if (values := self._in_memory(column)) is not None:
                columns[column] = [values[a:b] for a, b in zip(starts, stops)]
            else:
                reads = [self._arrays[column][a:b].read() for a, b in zip(starts, stops)]
                columns[column] = [self._checked(column, read.result) for read in reads]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def lengths(self, column: str) -> np.ndarray:
        """The length of each example, int64[examples]."""
        return np.diff(self._offsets[column])

    def offsets(self, column: str) -> np.ndarray:
        """The offset of each example in the flat array, and its total length, int64[examples + 1]."""
        return self._offsets[column]

    def flat(self, column: str, start: int, stop: int) -> np.ndarray:
        """A window of the flat array, across examples, int32[stop - start]."""
        total = int(self._offsets[column][-1])
        if not 0 <= start <= stop <= total:
            raise IndexError(f"window {start} … {stop} must be inside the {total} values of column {column!r}")
        if (values := self._in_memory(column)) is not None:
            return values[start:stop]
        return self._checked(column, self._arrays[column][start:stop].read().result)

    def _in_memory(self, column: str) -> np.ndarray | None:
        if column not in self._memory:
            if self._arrays[column].shape[0] * 4 > MEMORY_BYTES:
                return None
            values = self._checked(column, self._arrays[column].read().result)
            values.flags.writeable = False
            self._memory[column] = values
        return self._memory[column]

    def _checked(self, column: str, result) -> np.ndarray:
        try:
            values = result()
        except (ValueError, OSError) as error:
            raise self._damaged(column, error) from None
        if (values == MISSING).any():
            raise self._damaged(column, "a chunk is missing")
        return values

    def _damaged(self, column: str, reason) -> ValueError:
        return ValueError(
            f"the prepared store {self._name} is damaged in column {column!r}: {reason}; prepare it again"
        )


def read_header(path: str | Path) -> dict:
    """info.json of a store: columns, examples, digest, info. Raises the same errors as `Store`."""
    result = ts.KvStore.open(paths.kvstore(path)).result().read("info.json").result()
    if result.state != "value":
        raise FileNotFoundError(f"{path} is not a prepared store: it has no info.json (missing, or never finished)")
    try:
        header = json.loads(result.value)
        return {name: header[name] for name in ("columns", "examples", "digest", "info")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/info.json is damaged: {error!r}") from None


def _create(path, name: str, dtype, size: int) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": paths.kvstore(path / name),
        "metadata": {
            "shape": [size],
            "data_type": np.dtype(dtype).name,
            "fill_value": MISSING,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [CHUNK]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        "create": True,
    }
    return ts.open(spec).result()


def _open(path, name: str, context: ts.Context) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": paths.kvstore(path / name)}
    return ts.open(spec, context=context, open=True, read=True).result()
