"""The two maps that turn sources into stores, in memory that does not grow with the data.

    map 1   an input shard → its examples: read, filter, tokenize; sorted into buckets by a hash of their tokens
    map 2   a bucket → one part of the store: exact duplicates, which are all in one bucket, are dropped; the rest is
            shuffled by a keyed hash

Every unit of work writes a marker when it is done, so that a run that was interrupted continues. The result depends
neither on the order of the work nor on interruptions: the order of a bucket is that of the keyed hashes.

    SCRATCH/TASK/00012.000.tokens   examples of input shard 12, first part: one section per bucket
    SCRATCH/TASK/00012.json         its counts, last: the marker
    SCRATCH/TASK/bucket-00007.json  of the part of the store: the summary of `store.write_bucket` and counts
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import fsspec
import numpy as np
import pyarrow as pa

from embed import paths, tokenizers
from embed.data import store
from embed.data.curriculum import make_key, random_bits
from embed.data.loader import COLUMNS
from embed.preparation import examples
from embed.preparation.sources import Shard
from embed.preparation.tasks import Counts, Task, all_texts

BATCH_CHARACTERS = 1 << 20  # texts that are tokenized together
PART_VALUES = 1 << 25  # int32 values of a shard that are held before a part is written
BUCKET_BYTES = 1 << 28  # of source text, about, in a bucket
DUPLICATES, REPEATED = "exact duplicates", "repeated by weight"
DIGEST = "digest"

Progress = Callable[[int, int], None]  # (tokens, bytes of source) since the last call


@dataclasses.dataclass(frozen=True)
class Work:
    """What both maps need; picklable."""

    scratch: str
    target: str  # folder of the stores
    tokenizer: str  # its folder
    tasks: Mapping[str, object]  # {name: Task, or another object with its method `token_examples`}
    shards: Mapping[str, Sequence[Shard]]
    buckets: Mapping[str, int]
    seed: int
    limit: int = 0  # rows per task; 0 = all

    def columns(self, task: str) -> tuple[str, ...]:
        return COLUMNS[self.stage(task)]

    def stage(self, task: str) -> str:
        return examples.STAGES[self.tasks[task].kind]

    def marker(self, task: str, shard: int):
        return paths.path(self.scratch) / task / f"{shard:05d}.json"

    def bucket_marker(self, task: str, bucket: int):
        return paths.path(self.scratch) / task / f"bucket-{bucket:05d}.json"

    def part(self, task: str, shard: int, part: int):
        return paths.path(self.scratch) / task / f"{shard:05d}.{part:03d}.tokens"


@functools.lru_cache(maxsize=1)
def load_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, loaded once per process."""
    return tokenizers.load(folder)


def num_buckets(task: Task, shards: Sequence[Shard]) -> int:
    """The number of parts of a task's store: `task.buckets`, or one for each BUCKET_BYTES of its source."""
    return task.buckets or max(1, -(-sum(shard.bytes for shard in shards) // BUCKET_BYTES))


# --- map 1 ------------------------------------------------------------------------------------------------------------


def map_shard(work: Work, task: str, shard: int, progress: Progress = lambda tokens, size: None) -> None:
    """Tokenizes an input shard of a task and sorts its examples into buckets. BadRowsError if too much of it is bad."""
    counts, part, total, seen = Counts(), 0, 0, 0
    size = work.shards[task][shard].bytes
    pending, values = _Pending(work.columns(task), work.buckets[task]), 0
    for batch in _named(task, token_batches(work, task, shard, counts)):
        made = 0
        for weight, columns in batch:
            pending.add(columns, weight)
            made += sum(map(len, columns.values()))
        values, total = values + made, total + made
        progress(made, min(4 * total, size) - seen)  # bytes of source: an estimate until the end
        seen = min(4 * total, size)
        if values >= PART_VALUES:
            write_sections(work.part(task, shard, part), pending.tables())
            pending, values, part = _Pending(work.columns(task), work.buckets[task]), 0, part + 1
    write_sections(work.part(task, shard, part), pending.tables())
    progress(0, size - seen)
    paths.write_json(work.marker(task, shard), {"parts": part + 1, "counts": counts.to_json()})


def token_batches(work: Work, name: str, shard: int, counts: Counts) -> Iterator[list[tuple[int, examples.Columns]]]:
    """Batches of (weight, tokens) of a shard's examples."""
    task, shards = work.tasks[name], work.shards[name]
    tokenizer = load_tokenizer(work.tokenizer)
    if not isinstance(task, Task):
        yield from task.token_batches(shards[shard], tokenizer, counts)
        return
    limits = {
        "limit": -(-work.limit // len(shards)),
        "characters": -(-task.max_total_characters // len(shards)),
    }
    batch: list[dict] = []
    characters = 0
    for example in task.examples(shards[shard], counts, **limits):
        batch.append(example)
        characters += sum(map(len, all_texts(example)))
        if characters >= BATCH_CHARACTERS:
            yield _tokenized(task, batch, tokenizer, counts)
            batch, characters = [], 0
    counts.check(task.max_bad)
    if batch:
        yield _tokenized(task, batch, tokenizer, counts)


def _tokenized(task: Task, batch: list[dict], tokenizer, counts: Counts) -> list[tuple[int, examples.Columns]]:
    made = examples.tokenize(task, batch, tokenizer, counts.cut, counts.dropped)
    counts.examples += len(made)
    return [(example["weight"], columns) for example, columns in made]


def _named(task: str, batches: Iterator) -> Iterator:
    """The batches; an error about their data names the task."""
    try:
        yield from batches
    except ValueError as error:
        raise type(error)(f"task {task!r}: {error}") from error


class _Pending:
    """Examples of a shard that are not written yet, in buckets."""

    def __init__(self, columns: Sequence[str], buckets: int):
        self.columns, self.buckets = columns, buckets
        self.examples: list[list] = [[] for _ in range(buckets)]

    def add(self, columns: examples.Columns, weight: int) -> None:
        digest = examples.digest(columns)
        bucket = int.from_bytes(digest[:8], "little") % self.buckets
        self.examples[bucket].append((digest, weight, columns))

    def tables(self) -> Iterator[pa.Table | None]:
        for bucket in self.examples:
            yield self._table(bucket) if bucket else None

    def _table(self, bucket: list) -> pa.Table:
        arrays = {
            DIGEST: pa.array([digest for digest, _, _ in bucket], pa.binary(16)),
            "weight": pa.array([weight for _, weight, _ in bucket], pa.int32()),
        }
        for name in self.columns:
            values = [columns[name] for _, _, columns in bucket]
            offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
            arrays[name] = pa.LargeListArray.from_arrays(
                pa.array(offsets, pa.int64()), pa.array(np.concatenate(values).astype(np.int32), pa.int32())
            )
        return pa.table(arrays)


def write_sections(file, tables: Iterator[pa.Table | None]) -> None:
    """Write a file of one Arrow stream per bucket, then uint64 offsets of all of them; it appears whole."""
    sink, offsets = pa.BufferOutputStream(), [0]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for table in tables:
        if table is not None:
            with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
                writer.write_table(table)
        offsets.append(sink.tell())
    sink.write(np.array(offsets, "<u8").tobytes())
    paths.write(file, sink.getvalue().to_pybytes())


def read_section(file, bucket: int, buckets: int) -> pa.Table | None:
    """The section of a bucket, by two small reads; None if it is empty."""
    system, name = fsspec.core.url_to_fs(os.fspath(file))
    end = system.size(name)
    at = end - 8 * (buckets + 1 - bucket)
    start, stop = np.frombuffer(system.cat_file(name, at, at + 16), "<u8").tolist()
    if start == stop:
        return None
    with pa.ipc.open_stream(system.cat_file(name, start, stop)) as reader:
        return reader.read_all()


# --- map 2 ------------------------------------------------------------------------------------------------------------


def map_bucket(work: Work, task: str, bucket: int, parts: Sequence[int], progress: Progress = lambda *_: None) -> None:
    """Writes a part of a task's store from the sections of all input shards; `parts`: how many files each has."""
    files = [work.part(task, shard, part) for shard, count in enumerate(parts) for part in range(count)]
    tables = [t for file in files if (t := read_section(file, bucket, work.buckets[task])) is not None]
    columns, counts = work.columns(task), Counter()
    if tables:
        table = pa.concat_tables(tables).combine_chunks()
        keep = _unique(table[DIGEST])
        counts[DUPLICATES] = len(table) - len(keep)
        order = shuffled(table[DIGEST].take(pa.array(keep)), make_key(work.seed, "bucket", task))
        rows = keep[order]
        rows = np.repeat(rows, table["weight"].combine_chunks().to_numpy()[rows])
        if len(rows) > len(keep):
            counts[REPEATED] = len(rows) - len(keep)
        table = table.take(pa.array(rows))
    values = {
        name: _ragged(table[name]) if tables else (np.zeros(0, np.int32), np.zeros(0, np.int64)) for name in columns
    }
    summary = store.write_bucket(paths.path(work.target) / task, columns, bucket, values)
    tokens = {name: len(flat) for name, (flat, _) in values.items() if name in TOKEN_COLUMNS}
    paths.write_json(
        work.bucket_marker(task, bucket),
        {"summary": summary, "counts": counts, "examples": len(values[columns[0]][1]), "tokens": tokens},
    )
    progress(sum(tokens.values()), sum(shard.bytes for shard in work.shards[task]) // work.buckets[task])


TOKEN_COLUMNS = ("tokens", "query", "document", "queries", "negatives")


def _unique(digests: pa.ChunkedArray) -> np.ndarray:
    """Indices of the first row of each digest, in order."""
    values = np.frombuffer(_bytes(digests), "V16")
    _, first = np.unique(values, return_index=True)
    return np.sort(first)


def shuffled(digests: pa.ChunkedArray, key: np.uint64) -> np.ndarray:
    """The order of rows by a keyed hash of their digest: it depends on the content and the key alone."""
    halves = np.frombuffer(_bytes(digests), "<u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], random_bits(key, halves[:, 0])))


def _bytes(digests: pa.ChunkedArray) -> bytes:
    array = digests.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    return array.buffers()[1].to_pybytes()[array.offset * 16 : (array.offset + len(array)) * 16]


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(flat int32 values, int64 lengths) of a column of lists."""
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy(zero_copy_only=False), np.diff(array.offsets.to_numpy())


# --- what is done -----------------------------------------------------------------------------------------------------


def is_begun(scratch) -> bool:
    """Whether any input shard is tokenized."""
    scratch = paths.path(scratch)
    return scratch.exists() and any(
        entry.name.endswith(".tokens") for folder in scratch.iterdir() if folder.is_dir() for entry in folder.iterdir()
    )


def shards_done(work: Work, task: str) -> dict[int, dict]:
    """{shard: marker} of the input shards that are tokenized."""
    return _markers(paths.path(work.scratch) / task, lambda stem: stem.isdigit())


def buckets_done(work: Work, task: str) -> dict[int, dict]:
    """{bucket: marker} of the parts of the store that are written."""
    return _markers(paths.path(work.scratch) / task, lambda stem: stem.startswith("bucket-"))


def _markers(folder, chosen: Callable[[str], bool]) -> dict[int, dict]:
    if not folder.exists():
        return {}
    files = {f.name[:-5]: f for f in folder.iterdir() if f.name.endswith(".json") and chosen(f.name[:-5])}
    return {int(stem.rpartition("-")[2]): paths.read_json(file) for stem, file in sorted(files.items())}


def close(work: Work, task: str, info: Mapping) -> None:
    """Makes the parts of a task's store a store."""
    done = buckets_done(work, task)
    summaries = [done[bucket]["summary"] for bucket in range(work.buckets[task])]
    store.close(paths.path(work.target) / task, work.columns(task), summaries, info)
