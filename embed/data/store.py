"""Prepared examples: ragged columns of tokens with random access, on disk or in a cloud bucket (TensorStore, zarr3).

The examples of a store are divided into buckets, which different processes may write. Bucket b is row b of two arrays:

PATH/values/     int32  the bucket's examples, one after the other; of an example its columns, one after the other.
                        The first value of an example is stored as its complement (~v, negative), so that values show
                        where examples start without the offsets.
PATH/offsets/    int64  of each example the offsets of its columns in the values, then the end of the last example
PATH/info.json          columns, the examples and values of each bucket, a digest, histograms of the lengths; written
                        last, so a folder without it is not a store

An object holds many small chunks, each with a checksum, and an index of them (zarr3's sharding). So a store has few
objects, and reading an example reads two indices and two or three chunks. Nothing is kept in memory per example.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from embed import paths

CACHE_BYTES = 1 << 28  # decoded chunks and indices of all stores with this limit together
SHAPE = (1 << 24, 1 << 36)  # of the arrays: the most buckets, the most elements per bucket
MISSING = -(2**31)  # TensorStore returns this value for a missing chunk; no value and no complement is stored as it
# (data type, elements per object, elements per chunk, codec). An object's index has 16 bytes per chunk. Plain zstd
# compresses tokens better than after a byte shuffle, because it finds whole words again; offsets need the shuffle.
ARRAYS = {
    "values": ("int32", 1 << 22, 1 << 12, {"name": "zstd", "configuration": {"level": 3}}),
    "offsets": (
        "int64",
        1 << 19,
        1 << 10,
        {
            "name": "blosc",
            "configuration": {"cname": "zstd", "clevel": 5, "shuffle": "shuffle", "typesize": 8, "blocksize": 0},
        },
    ),
}
BUCKET = ARRAYS["values"][1]  # values after which a Writer begins a new bucket: one object


class Lengths(NamedTuple):
    """The lengths of a column in all examples, from the header. Lengths above 64 are rounded down by up to 3%."""

    max: int
    total: int
    lengths: np.ndarray  # int64[k], ascending
    counts: np.ndarray  # int64[k]: the number of examples of each length

    @property
    def mean(self) -> float:
        return self.total / max(int(self.counts.sum()), 1)


def _histogram(lengths: np.ndarray) -> dict:
    """The JSON of `Lengths`: exact up to 64, then 32 bins per power of two."""
    step = 1 << np.maximum(np.frexp(lengths.astype(np.float64))[1] - 6, 0).astype(np.int64)
    values, counts = np.unique(lengths // step * step, return_counts=True)
    return {
        "max": int(lengths.max(initial=0)),
        "total": int(lengths.sum()),
        "lengths": values.tolist(),
        "counts": counts.tolist(),
    }


def _merged(histograms: Sequence[Mapping]) -> dict:
    """The histogram of several disjoint sets of examples."""
    values, inverse = np.unique(np.concatenate([[0][:0], *(h["lengths"] for h in histograms)]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, inverse, np.concatenate([[0][:0], *(h["counts"] for h in histograms)]).astype(np.int64))
    return {
        "max": max((h["max"] for h in histograms), default=0),
        "total": sum(h["total"] for h in histograms),
        "lengths": values.astype(np.int64).tolist(),
        "counts": counts.tolist(),
    }


# --- writing ----------------------------------------------------------------------------------------------------


def write_bucket(
    path: str | Path,
    columns: Sequence[str],
    bucket: int,
    examples: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict:
    """Write n examples, {column: (flat values int[sum of lengths], lengths int[n])}, as a bucket; return its summary.

    The summary is JSON for `close`. The same examples give the same bytes, and a bucket that exists is overwritten, so
    a job that was killed can run again, and two processes may run the same job. Processes may write different buckets
    of one store at the same time. Values are in 0..2^31 - 2.
    """
    if not 0 <= bucket < SHAPE[0]:
        raise ValueError(f"bucket {bucket} must be in 0 … {SHAPE[0] - 1}")
    values, lengths = _interleave(columns, examples)
    ends = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])  # offset of each column of each example, and the end
    starts = ends[:-1].reshape(lengths.shape)[:, 0]
    digest = hashlib.sha256(lengths.astype("<i8").tobytes())
    digest.update(values.astype("<i4", copy=False).data)
    starts = starts[lengths.sum(1) > 0]
    values[starts] = ~values[starts]
    for name, content in (("values", values), ("offsets", ends if len(lengths) else ends[:0])):
        array, size = _create(path, name), ARRAYS[name][1]
        for start in range(0, len(content), size):
            with ts.Transaction() as transaction:  # one write per object
                part = content[start : start + size]
                # With the rest of the object, where the object that it replaces may have had values.
                empty = np.full(size - len(part), MISSING, array.dtype.numpy_dtype)
                row = array.with_transaction(transaction)[bucket, start : start + size]
                row.write(np.concatenate([part, empty])).result()
        _delete_from(array.kvstore, bucket, -(-len(content) // size))
    return {
        "bucket": bucket,
        "examples": len(lengths),
        "values": len(values),
        "digest": digest.hexdigest(),
        "lengths": {column: _histogram(lengths[:, c]) for c, column in enumerate(columns)},
    }


def _delete_from(objects: ts.KvStore, bucket: int, count: int) -> None:
    """Delete the objects of a bucket after the first `count`."""
    prefix = f"c/{bucket}/"
    for key in objects.list(ts.KvStore.KeyRange(prefix, f"c/{bucket}0")).result():
        if int(key.removeprefix(prefix.encode())) >= count:
            objects.write(key, None).result()


def close(path: str | Path, columns: Sequence[str], summaries: Sequence[Mapping], info: Mapping) -> None:
    """Write info.json, after which the store exists: the `summaries` of all its buckets, in any order, and `info`."""
    summaries = sorted(summaries, key=lambda summary: summary["bucket"])
    if [summary["bucket"] for summary in summaries] != list(range(len(summaries))):
        raise ValueError(f"{path} needs one summary for each bucket from 0, got {[s['bucket'] for s in summaries]}")
    for name in ARRAYS:
        _create(path, name)
    digests = [list(columns), [summary["digest"] for summary in summaries if summary["examples"]]]
    header = {
        "columns": list(columns),
        "buckets": [[summary["examples"], summary["values"]] for summary in summaries],
        "digest": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        "lengths": {column: _merged([summary["lengths"][column] for summary in summaries]) for column in columns},
        "info": dict(info),
    }
    ts.KvStore.open(paths.kvstore(path)).result().write("info.json", json.dumps(header).encode()).result()


class Writer:
    """Writes a store as a stream of examples, with bounded memory. The store exists once `close` has returned."""

    def __init__(self, path: str | Path, columns: Sequence[str]):
        """Replaces an unfinished store at `path`; raises FileExistsError if there is a complete one."""
        if not columns:
            raise ValueError("a store needs at least one column")
        self._path, self._columns = path, list(columns)
        folder = ts.KvStore.open(paths.kvstore(path)).result()
        if folder.read("info.json").result().state == "value":
            raise FileExistsError(f"{path} is a complete store already")
        folder.delete_range(ts.KvStore.KeyRange()).result()
        self._pending: list[Mapping] = []
        self._pending_values = 0
        self._summaries: list[dict] = []

    def append(self, example: Mapping[str, np.ndarray]) -> None:
        """Append one example: for each column int[length], values in 0..2^31 - 2."""
        self.extend({column: (values, [len(values)]) for column, values in example.items()})

    def extend(self, examples: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Append n examples: {column: (flat values int[sum of lengths], lengths int[n])}."""
        self._pending.append(_checked(self._columns, examples))
        self._pending_values += sum(len(values) for values, _ in self._pending[-1].values())
        if self._pending_values >= BUCKET:
            self._flush()

    def close(self, info: Mapping) -> None:
        """Write the last examples and info.json."""
        self._flush()
        close(self._path, self._columns, self._summaries, info)

    def _flush(self) -> None:
        if self._pending:
            examples = {
                column: tuple(np.concatenate(parts) for parts in zip(*(batch[column] for batch in self._pending)))
                for column in self._columns
            }
            self._summaries.append(write_bucket(self._path, self._columns, len(self._summaries), examples))
        self._pending, self._pending_values = [], 0


def _checked(columns: Sequence[str], examples: Mapping) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same examples as int32 values and int64 lengths; ValueError if they are not those of one store."""
    if set(examples) != set(columns):
        raise ValueError(f"the store has columns {sorted(columns)}, the example has {sorted(examples)}")
    result, count = {}, None
    for column in columns:
        values, lengths = (np.asarray(array) for array in examples[column])
        if values.ndim != 1 or values.dtype.kind not in "iu" and len(values):
            raise ValueError(f"column {column!r} must be 1-D integers, got {values.dtype}{list(values.shape)}")
        if len(values) and not 0 <= values.min() <= values.max() < 2**31 - 1:
            raise ValueError(f"column {column!r} must be in 0 … 2^31 - 2, got {values.min()} … {values.max()}")
        if lengths.sum() != len(values):
            raise ValueError(
                f"column {column!r}: the lengths must add up to its {len(values)} values, got {lengths.sum()}"
            )
        if count not in (None, len(lengths)):
            raise ValueError(f"column {column!r} has {len(lengths)} examples, the other columns {count}")
        count = len(lengths)
        result[column] = values.astype(np.int32), lengths.astype(np.int64)
    return result


def _interleave(columns: Sequence[str], examples: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """(values int32[total], lengths int64[n, columns]): the columns of each example, one after the other."""
    checked = _checked(columns, examples)
    lengths = np.stack([checked[column][1] for column in columns], 1)
    if len(columns) == 1:
        return checked[columns[0]][0], lengths  # a copy
    offsets = np.cumsum(lengths.reshape(-1)).reshape(lengths.shape) - lengths
    values = np.empty(int(lengths.sum()), np.int32)
    for c, column in enumerate(columns):
        flat, sizes = checked[column]
        values[np.repeat(offsets[:, c] - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(flat))] = flat
    return values, lengths


def _create(path, name: str) -> ts.TensorStore:
    dtype, per_object, per_chunk, codec = ARRAYS[name]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, per_chunk],
        "codecs": [little, codec, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    spec = {
        "driver": "zarr3",
        "kvstore": paths.kvstore(paths.path(path) / name),
        "metadata": {
            "shape": list(SHAPE),
            "data_type": dtype,
            "fill_value": MISSING,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, per_object]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    return ts.open(spec, create=True, open=True).result()


# --- reading ----------------------------------------------------------------------------------------------------


@functools.cache
def _context(cache_bytes: int) -> ts.Context:
    """One cache for all stores of this process with the same limit."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


class Store:
    """Reads a store. Decoded chunks stay in a cache of `cache_bytes`, shared by all stores with that number."""

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES):
        """Raises FileNotFoundError if there is no complete store at `path`, ValueError if it is damaged."""
        self._name, self._cache_bytes = str(path), cache_bytes
        header = read_header(path)
        self.columns: list[str] = header["columns"]
        self.info: dict = header["info"]
        self.digest: str = header["digest"]
        self._lengths = {
            name: Lengths(h["max"], h["total"], np.array(h["lengths"], np.int64), np.array(h["counts"], np.int64))
            for name, h in header["lengths"].items()
        }
        buckets = np.array(header["buckets"], np.int64).reshape(-1, 2)
        # Examples and values before each bucket, and their totals: int64[buckets + 1].
        self._examples, self._values = (np.concatenate([[0], np.cumsum(counts)]) for counts in buckets.T)
        self._arrays = {}
        for name in ARRAYS:
            spec = {"driver": "zarr3", "kvstore": paths.kvstore(paths.path(path) / name)}
            spec |= {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}  # a complete store never changes
            try:
                self._arrays[name] = ts.open(spec, context=_context(cache_bytes), open=True, read=True).result()
            except (ValueError, OSError) as error:
                raise self._damaged(error) from None

    def __reduce__(self):
        return Store, (self._name, self._cache_bytes)

    def __len__(self) -> int:
        return int(self._examples[-1])

    @property
    def bounds(self) -> np.ndarray:
        """The first example of each bucket, then the number of all: int64[buckets + 1]."""
        return self._examples

    def lengths(self, column: str) -> Lengths:
        """The lengths of a column's examples, from the header."""
        return self._lengths[column]

    def num_values(self, column: str | None = None) -> int:
        """The number of values of a column, by default of all columns."""
        return int(self._values[-1]) if column is None else self._lengths[column].total

    def read(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, np.ndarray]]:
        """The examples at `indices`, in that order: {column: int32[length]} each."""
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            return []
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"examples {indices.min()} … {indices.max()} must be in 0 … {len(self) - 1}")
        count = len(self.columns)
        bucket = np.searchsorted(self._examples, indices, "right") - 1
        index = indices - self._examples[bucket]
        # Neighbors are read together.
        cuts = np.flatnonzero((np.diff(index) != 1) | (np.diff(bucket) != 0)) + 1
        first, last = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(indices)]]) - 1
        buckets = bucket[first].tolist()
        offsets = self._read(
            "offsets", buckets, (index[first] * count).tolist(), ((index[last] + 1) * count + 1).tolist()
        )
        begin, end = (np.array([part[i] for part in offsets]) for i in (0, -1))
        if (begin < 0).any() or (end > np.diff(self._values)[bucket[first]]).any():
            raise self._damaged("offsets are missing or wrong")
        values = self._read("values", buckets, begin.tolist(), end.tolist())
        # The columns of all examples, one after the other.
        flat, lengths = np.concatenate(values), np.concatenate([np.diff(part) for part in offsets])
        if (lengths < 0).any():
            raise self._damaged("offsets are missing or wrong")
        ends = np.cumsum(lengths)
        starts, sizes = (ends - lengths)[::count], lengths.reshape(-1, count).sum(1)
        starts = starts[sizes > 0]
        if not np.array_equal(np.flatnonzero(flat < 0), starts) or (flat[starts] == MISSING).any():
            raise self._damaged("values are missing or wrong")
        flat[starts] = ~flat[starts]
        ends = ends.tolist()
        parts = [flat[a:b] for a, b in zip([0, *ends], ends)]
        return [dict(zip(self.columns, parts[i : i + count])) for i in range(0, len(parts), count)]

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of the values of all examples, read as a ring.

        `starts` int[n] are offsets in 0..num_values() - 1. Returns the values int32[n, length] and where an example
        starts, bool[n, length].
        """
        total, starts = self.num_values(), np.asarray(starts, np.int64)
        if len(starts) and not 0 <= starts.min() <= starts.max() < total:
            raise IndexError(f"windows at {starts.min()} … {starts.max()} must start in 0 … {total - 1}")
        pieces = []
        for offset in starts.tolist():
            remaining = length
            while remaining:
                bucket = int(np.searchsorted(self._values, offset, "right")) - 1
                size = min(remaining, int(self._values[bucket + 1]) - offset)
                begin = offset - int(self._values[bucket])
                pieces.append((bucket, begin, begin + size))
                remaining, offset = remaining - size, (offset + size) % total
        values = np.concatenate([np.zeros(0, np.int32), *(self._read("values", *zip(*pieces)) if pieces else ())])
        if (values == MISSING).any():
            raise self._damaged("values are missing")
        is_start = values < 0
        return np.where(is_start, ~values, values).reshape(-1, length), is_start.reshape(-1, length)

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """One window of `windows`: the values int32[stop - start] and where an example starts, bool[stop - start]."""
        values, is_start = self.windows([start], stop - start)
        return values[0], is_start[0]

    def _read(self, name: str, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        """Ranges of rows of an array, read at the same time."""
        array, batch = self._arrays[name], ts.Batch()
        reads = [array[row, a:b].read(batch=batch) for row, a, b in zip(rows, starts, stops)]
        batch.submit()
        try:
            return [read.result() for read in reads]
        except (ValueError, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, reason) -> ValueError:
        return ValueError(f"the prepared store {self._name} is damaged: {reason}; prepare it again")


def read_header(path: str | Path) -> dict:
    """info.json of a store: columns, buckets, digest, lengths, info. Raises the same errors as `Store`."""
    result = ts.KvStore.open(paths.kvstore(path)).result().read("info.json").result()
    if result.state != "value":
        raise FileNotFoundError(f"{path} is not a prepared store: it has no info.json (missing, or never finished)")
    try:
        header = json.loads(result.value)
        return {name: header[name] for name in ("columns", "buckets", "digest", "lengths", "info")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/info.json is damaged: {error!r}") from None
