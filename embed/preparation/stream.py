"""The two maps that turn sources into stores, in memory that does not grow with the data.

    map 1   an input shard → its examples: read, filter, tokenize; sorted into buckets by a hash of their tokens
    map 2   a bucket → one part of the store: exact duplicates, which are all in one bucket, are dropped; the rest is
            shuffled by a keyed hash

With near duplicates, map 1 also sorts the bands of examples into buckets, and a map between the two compares those of
each bucket and lists what map 2 drops.

Every unit of work writes a marker when it is done, so that a run that was interrupted continues. The result depends
neither on the order of the work nor on interruptions: the order of a bucket is that of the keyed hashes.

    SCRATCH/TASK/00012.000.tokens   examples of input shard 12, first part: one section per bucket
    SCRATCH/TASK/00012.json         its counts and the sizes of its parts, last: the marker
    SCRATCH/TASK/parts.json         the sizes of all parts, once the map is done
    SCRATCH/TASK/00012.000.bands    bands of its examples: one section per bucket of bands
    SCRATCH/TASK/00012.000.located  ids and locations of its examples, for the report
    SCRATCH/near-duplicates/GROUP/00003.000.drop    ids to drop: a section per task and bucket of its store
    SCRATCH/near-duplicates/GROUP/00003.json        groups of near duplicates, for the report: the marker
    SCRATCH/near-duplicates/GROUP/parts.json        the sizes of all lists, once the map is done
    SCRATCH/TASK/bucket-00007.json  of the part of the store: the summary of `store.write_bucket` and counts
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

from embed import paths, tokenizers
from embed.data import store
from embed.data.curriculum import make_key, random_bits
from embed.data.loader import COLUMNS
from embed.preparation import contamination, examples, hygiene, near_duplicates
from embed.preparation.counts import Counts
from embed.preparation.hygiene import Findings, Hygiene
from embed.preparation.sources import Shard, formats
from embed.preparation.tasks import Task, all_texts, named

BATCH_CHARACTERS = 1 << 20  # texts that are tokenized together
PART_VALUES = 1 << 25  # int32 values of a shard that are held before a part is written
EXAMPLE_VALUES = 150  # values that take the memory of the Python objects of an example, about
BUCKET_BYTES = 1 << 28  # of source text, about, in a bucket
EXPANSION = 4  # size of text over that of its compressed file, about; Parquet is compressed inside
THREADS = 32  # small files of a bucket that are read at the same time
GATHERED = 1 << 20  # values of a bucket that are moved together
NEAR_BYTES = 1 << 27  # of source text, about, whose bands are compared together
NEAR_GROUPS, NEAR_MEMBERS = 20, 5  # groups of near duplicates of a bucket that the report may name, and members
NEAR_ROWS = 1000  # of a group, in which these members are looked for
DUPLICATES, NEAR, REPEATED = "exact duplicates", "near duplicates", "repeated by weight"
DIGEST, ID = "digest", "id"

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
    hygiene: Mapping[str, Hygiene] = dataclasses.field(default_factory=dict)  # without an entry, nothing is dropped

    def near_groups(self) -> dict[str, list[str]]:
        """{name: tasks} of tasks whose near duplicates are searched together."""
        groups: dict[str, list[str]] = {}
        for task in sorted(self.hygiene):
            if group := self.near_group(task):
                groups.setdefault(group, []).append(task)
        return groups

    def near_group(self, task: str) -> str:
        """The name of the tasks that near duplicates of a task are searched in; "" if they are not."""
        about = self.hygiene.get(task)
        if not about or not about.near_duplicates:
            return ""
        return f"with {about.compare_with}" if about.compare_with else f"task {task}"

    def near_buckets(self, group: str) -> int:
        """The number of buckets of bands of a group."""
        return max(1, -(-sum(text_bytes(self.shards[task]) for task in self.near_groups()[group]) // NEAR_BYTES))

    def index(self, task: str) -> str:
        """The folder of the index of the task's evaluation sets."""
        return os.fspath(paths.path(self.scratch) / "evaluation-index" / self.hygiene[task].index)

    def location(self, task: str, shard: int, number: int) -> str:
        """The location of the example with an id, in a task whose near duplicates are searched."""
        parts = [part for part in parts_of(self, "map_shard", task, "located") if part.unit == shard]
        for _, table in read_sections(parts, 0, 1):
            if len(rows := np.flatnonzero(table[ID].to_numpy() == np.uint64(number))):
                return table["location"][int(rows[0])].as_py()
        raise KeyError(number)

    def columns(self, task: str) -> tuple[str, ...]:
        return COLUMNS[self.stage(task)]

    def stage(self, task: str) -> str:
        return examples.STAGES[self.tasks[task].kind]

    def marker(self, task: str, shard: int):
        return paths.path(self.scratch) / task / f"{shard:05d}.json"

    def bucket_marker(self, task: str, bucket: int):
        return paths.path(self.scratch) / task / f"bucket-{bucket:05d}.json"

    def near_marker(self, group: str, bucket: int):
        return paths.path(self.scratch) / "near-duplicates" / group / f"{bucket:05d}.json"

    def part(self, task: str, shard: int, part: int, what: str = "tokens"):
        return paths.path(self.scratch) / task / f"{shard:05d}.{part:03d}.{what}"

    def near(self, group: str, bucket: int, part: int, what: str):
        return paths.path(self.scratch) / "near-duplicates" / group / f"{bucket:05d}.{part:03d}.{what}"


@functools.lru_cache(maxsize=1)
def load_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, loaded once per process."""
    return tokenizers.load(folder)


def num_buckets(task: Task, shards: Sequence[Shard]) -> int:
    """The number of parts of a task's store: `task.buckets`, or one for each BUCKET_BYTES of its source."""
    return task.buckets or max(1, -(-text_bytes(shards) // BUCKET_BYTES))


def text_bytes(shards: Sequence[Shard]) -> int:
    """About the size of the text in shards."""
    return sum(shard.bytes * (EXPANSION if formats.is_compressed(shard.path) else 1) for shard in shards)


# --- map 1 ------------------------------------------------------------------------------------------------------------


def map_shard(work: Work, task: str, shard: int, progress: Progress = lambda tokens, size: None) -> None:
    """Tokenizes an input shard of a task and sorts its examples into buckets. BadRowsError if much of it is bad."""
    counts, findings, parts, total, seen = Counts(), Findings(), [], 0, 0
    size = work.shards[task][shard].bytes
    pending = _Pending(work, task)
    with named(task):
        for batch in token_batches(work, task, shard, counts, findings):
            for _, divided in itertools.groupby(batch, lambda made: id(made[0])):
                pending.add(list(divided))
            made = sum(len(array) for _, columns in batch for array in columns.values())
            total += made
            progress(made, min(4 * total, size) - seen)  # bytes of source: an estimate until the end
            seen = min(4 * total, size)
            if pending.values >= PART_VALUES:
                parts.append(pending.write(shard, len(parts)))
                pending = _Pending(work, task)
    parts.append(pending.write(shard, len(parts)))
    progress(0, size - seen)
    marker = {"parts": parts, "counts": counts.to_json()}
    if task in work.hygiene:
        marker["hygiene"] = findings.to_json()
    paths.write_json(work.marker(task, shard), marker)


def token_batches(
    work: Work, name: str, shard: int, counts: Counts, findings: Findings | None = None
) -> Iterator[list[tuple[dict, examples.Columns]]]:
    """Batches of (text example, tokens) of a shard's examples; adjacent ones may have the same text example."""
    task, shards = work.tasks[name], work.shards[name]
    tokenizer = load_tokenizer(work.tokenizer)
    if not isinstance(task, Task):
        yield from task.token_batches(shards[shard], tokenizer, counts, -(-work.limit // len(shards)))
        return
    limits = {
        "limit": -(-work.limit // len(shards)),
        "characters": -(-task.max_total_characters // len(shards)),
    }
    findings = findings or Findings()
    about = work.hygiene.get(name)
    index = contamination.load(work.index(name)) if about and about.evaluation_sets else None

    made = task.examples(shards[shard], counts, **limits)
    if about:
        batches = _batches(made)
        made = (kept for batch in batches for kept in hygiene.screen(batch, task, about, index, counts, findings))
    if task.group_sizes:
        made = task.documents(made, counts.cut)
    for batch in _batches(made):
        result = examples.tokenize(task, batch, tokenizer, counts.cut, counts.dropped)
        counts.examples += len(result)
        yield result


def _batches(made: Iterable[dict]) -> Iterator[list[dict]]:
    """Text examples in lists of at least BATCH_CHARACTERS; the last one may be shorter."""
    batch: list[dict] = []
    characters = 0
    for example in made:
        batch.append(example)
        characters += sum(map(len, all_texts(example)))
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Pending:
    """Examples of a shard that are not written yet, in buckets."""

    def __init__(self, work: Work, task: str):
        self.work, self.task, self.columns, self.group = work, task, work.columns(task), work.near_group(task)
        self.examples: list[list] = [[] for _ in range(work.buckets[task])]
        self.near: list[tuple] = []  # (bands, id, bucket)
        self.locations: dict[int, str] = {}
        self.values = 0

    def add(self, parts: Sequence[tuple[dict, examples.Columns]]) -> None:
        """Adds the tokens of a text example; the parts of a long document have the same id."""
        example = parts[0][0]
        digests = [examples.digest(columns) for _, columns in parts]
        name = digests[0] if len(digests) == 1 else hashlib.blake2b(b"".join(digests), digest_size=8).digest()
        number = int.from_bytes(name[:8], "little")
        for digest, (_, columns) in zip(digests, parts):
            bucket = int.from_bytes(digest[:8], "little") % len(self.examples)
            self.examples[bucket].append((digest, number, example["weight"], columns))
            self.values += EXAMPLE_VALUES + sum(map(len, columns.values()))
            if "bands" in example:
                self.near.append((example["bands"], number, bucket))
                self.locations[number] = example["location"]

    def write(self, shard: int, part: int) -> dict[str, int]:
        """Writes the files of a part; returns {what: size in bytes}."""
        tables = {"tokens": (self._table(bucket) if bucket else None for bucket in self.examples)}
        if self.group:
            located = {
                ID: pa.array(self.locations.keys(), pa.uint64()),
                "location": pa.array(self.locations.values(), pa.string()),
            }
            tables |= {"bands": self._bands(), "located": [pa.table(located)]}
        return {
            what: write_sections(self.work.part(self.task, shard, part, what), of_part)
            for what, of_part in tables.items()
        }

    def _table(self, bucket: list) -> pa.Table:
        arrays = {
            DIGEST: pa.array([digest for digest, _, _, _ in bucket], pa.binary(16)),
            "weight": pa.array([weight for _, _, weight, _ in bucket], pa.int32()),
        }
        if self.group:
            arrays[ID] = pa.array([number for _, number, _, _ in bucket], pa.uint64())
        for name in self.columns:
            values = [columns[name] for _, _, _, columns in bucket]
            offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
            arrays[name] = pa.LargeListArray.from_arrays(
                pa.array(offsets, pa.int64()), pa.array(np.concatenate(values).astype(np.int32), pa.int32())
            )
        return pa.table(arrays)

    def _bands(self) -> Iterator[pa.Table | None]:
        """One table per bucket of bands: every band of every example, its id, and the bucket of the store."""
        buckets = self.work.near_buckets(self.group)
        if not self.near:
            yield from [None] * buckets
            return
        bands = np.stack([values for values, _, _ in self.near])
        ids = np.repeat(np.array([number for _, number, _ in self.near], np.uint64), bands.shape[1])
        stored = np.repeat(np.array([bucket for _, _, bucket in self.near], np.uint32), bands.shape[1])
        bands = bands.ravel()
        chosen = (bands >> np.uint64(32)) % np.uint64(buckets)
        order = np.argsort(chosen, kind="stable")
        for rows in np.split(order, np.searchsorted(chosen[order], np.arange(1, buckets))):
            arrays = {"band": bands[rows], ID: ids[rows], "bucket": stored[rows]}
            yield pa.table(arrays) if len(rows) else None


class Part(NamedTuple):
    """A file of sections that a unit of work wrote."""

    file: os.PathLike
    size: int
    unit: int


def list_parts(work: Work, name: str, task: str) -> None:
    """Writes the list of the files of a map that is done, so that those who read them need not open every marker."""
    paths.write_json(_parts_file(work, name, task), [marker["parts"] for marker in markers(work, name, task)])


def parts_of(work: Work, name: str, task: str, what: str) -> list[Part]:
    """The files of a map of a task or of a group, by unit of work and part."""
    file = _parts_file(work, name, task)
    of_unit = work.part if name == "map_shard" else work.near
    return [
        Part(of_unit(task, unit, part, what), sizes[what], unit)
        for unit, parts in enumerate(_read_parts(os.fspath(file), file.stat().mtime))
        for part, sizes in enumerate(parts)
    ]


def _parts_file(work: Work, name: str, task: str):
    return MAPS[name][1](work, task, 0).parent / "parts.json"


@functools.lru_cache(maxsize=4)
def _read_parts(file: str, time: float) -> list[list[dict[str, int]]]:
    """[[{what: size} of each part] of each unit of work], read once per process."""
    return paths.read_json(file)


def write_sections(file, tables: Iterable[pa.Table | None]) -> int:
    """Write a file of one Arrow stream per bucket, then uint64 offsets of all of them; it appears whole. Its size."""
    sink, offsets = pa.BufferOutputStream(), [0]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for table in tables:
        if table is not None:
            with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
                writer.write_table(table)
        offsets.append(sink.tell())
    sink.write(np.array(offsets, "<u8").tobytes())
    content = sink.getvalue().to_pybytes()
    paths.write(file, content)
    return len(content)


def read_sections(parts: Sequence[Part], section: int, sections: int) -> list[tuple[int, pa.Table]]:
    """(unit of work, table) of a section of each file that has it, by two small reads each."""

    def read(part: Part) -> pa.Table | None:
        system, name = fsspec.core.url_to_fs(os.fspath(part.file))
        at = part.size - 8 * (sections + 1 - section)
        start, stop = np.frombuffer(system.cat_file(name, at, at + 16), "<u8").tolist()
        if start == stop:
            return None
        with pa.ipc.open_stream(system.cat_file(name, start, stop)) as reader:
            return reader.read_all()

    tables = _several(read, parts, parts[0].file) if parts else ()
    return [(part.unit, table) for part, table in zip(parts, tables) if table is not None]


# --- between the maps -------------------------------------------------------------------------------------------------


def map_near(work: Work, group: str, bucket: int, progress: Progress = lambda *_: None) -> None:
    """Lists the near duplicates that share a band of this bucket."""
    tasks, buckets = work.near_groups()[group], work.near_buckets(group)
    rows = {name: [] for name in ("band", ID, "bucket", "task", "shard")}
    for number, task in enumerate(tasks):
        for shard, table in read_sections(parts_of(work, "map_shard", task, "bands"), bucket, buckets):
            for name in table.column_names:
                rows[name].append(table[name].to_numpy())
            rows["task"].append(np.full(len(table), number, np.uint32))
            rows["shard"].append(np.full(len(table), shard, np.uint32))
    empty = {"band": np.uint64, ID: np.uint64}
    rows = {k: np.concatenate([np.zeros(0, empty.get(k, np.uint32)), *arrays]) for k, arrays in rows.items()}
    drop, groups = near_duplicates.find(rows["band"], rows[ID], rows["task"])
    # A section for each task and bucket of its store.
    starts = np.cumsum([0, *(work.buckets[task] for task in tasks)])
    section = starts[rows["task"][drop]] + rows["bucket"][drop]
    dropped = np.unique(np.stack([section.astype(np.uint64), rows[ID][drop]], 1), axis=0)
    limits = np.searchsorted(dropped[:, 0], np.arange(starts[-1] + 1))
    tables = (pa.table({ID: dropped[a:b, 1]}) if b > a else None for a, b in itertools.pairwise(limits))
    size = write_sections(work.near(group, bucket, 0, "drop"), tables)
    named: dict[tuple, list] = {}  # by the first: two examples have many bands in common
    for members in groups:
        unique: dict[tuple, list] = {}
        for row in members[:NEAR_ROWS]:
            task, number = tasks[rows["task"][row]], int(rows[ID][row])
            unique.setdefault((task, number), [task, int(rows["shard"][row]), number])
        named.setdefault(next(iter(unique)), list(unique.values())[:NEAR_MEMBERS])
        if len(named) == NEAR_GROUPS:
            break
    paths.write_json(work.near_marker(group, bucket), {"parts": [{"drop": size}], "groups": list(named.values())})
    progress(0, sum(shard.bytes for task in tasks for shard in work.shards[task]) // buckets)


def _near_ids(work: Work, task: str, bucket: int) -> np.ndarray:
    """The ids of near duplicates in a bucket of a task's store."""
    group = work.near_group(task)
    if not group:
        return np.zeros(0, np.uint64)
    tasks = work.near_groups()[group]
    before = sum(work.buckets[other] for other in tasks[: tasks.index(task)])
    total = sum(work.buckets[other] for other in tasks)
    sections = read_sections(parts_of(work, "map_near", group, "drop"), before + bucket, total)
    return np.concatenate([np.zeros(0, np.uint64), *(table[ID].to_numpy() for _, table in sections)])


# --- map 2 ------------------------------------------------------------------------------------------------------------


def map_bucket(work: Work, task: str, bucket: int, progress: Progress = lambda *_: None) -> None:
    """Writes a part of a task's store from the sections of all input shards."""
    sections = read_sections(parts_of(work, "map_shard", task, "tokens"), bucket, work.buckets[task])
    columns, counts = work.columns(task), Counter()
    if sections:
        table = pa.concat_tables([table for _, table in sections]).combine_chunks()
        del sections  # the same values
        digests, rows = table[DIGEST], np.arange(len(table))
        if len(near := _near_ids(work, task, bucket)):
            rows = np.flatnonzero(~np.isin(table[ID].to_numpy(), near))
            counts[NEAR] = len(table) - len(rows)
        keep = rows[_unique(digests.take(pa.array(rows)))]
        counts[DUPLICATES] = len(rows) - len(keep)
        rows = keep[shuffled(digests.take(pa.array(keep)), make_key(work.seed, "bucket", task))]
        rows = np.repeat(rows, table["weight"].combine_chunks().to_numpy()[rows])
        if len(rows) > len(keep):
            counts[REPEATED] = len(rows) - len(keep)
        values = {name: _ragged(table[name], rows) for name in columns}
        del table
    else:
        values = {name: (np.zeros(0, np.int32), np.zeros(0, np.int64)) for name in columns}
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


def _ragged(column: pa.ChunkedArray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(flat int32 values, int64 lengths) of some rows of a column of lists, in their order.

    `Table.take` gives the same in five times the memory.
    """
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    flat, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
    starts, lengths = offsets[rows], np.diff(offsets)[rows]
    ends = np.cumsum(lengths)
    result = np.empty(lengths.sum(), np.int32)
    blocks = np.flatnonzero(np.diff(ends // GATHERED)) + 1
    for block in np.split(np.arange(len(rows)), blocks) if len(rows) else ():
        first, last = ends[block[0]] - lengths[block[0]], ends[block[-1]]
        shift = np.repeat(starts[block] - ends[block] + lengths[block], lengths[block])
        result[first:last] = flat[shift + np.arange(first, last)]
    return result, lengths


# --- what is done -----------------------------------------------------------------------------------------------------


def is_begun(scratch) -> bool:
    """Whether any input shard is tokenized."""
    return any(
        entry.name.endswith(".tokens")
        for folder in paths.entries(scratch)
        if folder.is_dir()
        for entry in paths.entries(folder)
    )


# {map: (the number of its units of work, the marker of one)} of a task or, between the maps, of a group.
MAPS = {
    "map_shard": (lambda work, task: len(work.shards[task]), Work.marker),
    "map_near": (Work.near_buckets, Work.near_marker),
    "map_bucket": (lambda work, task: work.buckets[task], Work.bucket_marker),
}


def markers(work: Work, name: str, task: str) -> Iterator[dict]:
    """The markers of all units of a map, which is done, one by one."""
    count, marker = MAPS[name]
    return _several(paths.read_json, [marker(work, task, unit) for unit in range(count(work, task))], work.scratch)


def _several(function: Callable, items: Sequence, folder) -> Iterator:
    """`function` of each item, several at once if the files that it reads are in a bucket."""
    if not paths.is_bucket(folder):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), 8 * THREADS):  # not all at once: none waits in memory for long
            yield from pool.map(function, items[start : start + 8 * THREADS])


def close(work: Work, task: str, info: Mapping) -> None:
    """Makes the parts of a task's store a store."""
    summaries = [marker["summary"] for marker in markers(work, "map_bucket", task)]
    store.close(paths.path(work.target) / task, work.columns(task), summaries, info)
