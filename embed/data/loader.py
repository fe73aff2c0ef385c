"""Batches as a pure function of (seed, step): no iterator, no state, no TensorFlow.

    DiffusionLoader     full rows: windows over a task's text
    ContrastiveLoader   pairs, triplets or chunked documents, packed group by group
    prefetch            a reader thread in front of a loader

Batch k costs the same at any k, a restart needs the step alone, and the global batch is the same for any number of
processes: each builds the rows or groups of it that its devices hold, and reads only their examples.
"""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from embed import rows
from embed.data.curriculum import Curriculum, Draw, make_key, random_bits, shuffled
from embed.rows import RowShape

if TYPE_CHECKING:
    from embed.data.store import Store


def _own(what: str, total: int, own: Sequence[int] | None) -> np.ndarray:
    """Which of the `total` rows or groups of a batch this process builds, in order, int[n]."""
    chosen = np.arange(total) if own is None else np.unique(own)
    if total < 1 or not len(chosen) or not 0 <= chosen[0] <= chosen[-1] < total:
        raise ValueError(f"{what}={total}: own={own} must be some of 0..{total - 1}")
    return chosen


def _runs(own: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of consecutive numbers."""
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)]


# --- diffusion --------------------------------------------------------------------------------------------------


class DiffusionLoader:
    """Rows of `length` tokens cut out of a task's text, int32[rows of this process, length] each.

    The windows of an epoch tile the task's flat token array, taken as a ring that starts at a place keyed by the
    epoch, so that other tokens stand at the cuts each time. A window crosses documents: each is a segment with its
    own positions. With `truncate_probability` a row is cut to a random length (arXiv 2602.11151).
    """

    def __init__(
        self,
        stores: Mapping[str, "Store"],
        phases: Sequence[tuple[int, Mapping[str, float]]],
        *,
        seed: int,
        rows: int,
        length: int,
        truncate_probability: float = 0.01,
        own: Sequence[int] | None = None,
    ):
        """`rows`: over all processes; `own`: those that this one builds, None = all."""
        self.seed, self.length, self.truncate_probability = seed, length, truncate_probability
        self.own, self.units = _own("rows", rows, own), rows
        tasks = sorted({task for _, rates in phases for task, rate in rates.items() if rate and task in stores})
        self._stores = {task: stores[task] for task in tasks}
        self._offsets = {task: stores[task].offsets("tokens") for task in tasks}  # int64[documents + 1]
        for task, offsets in self._offsets.items():
            if offsets[-1] < length:
                raise ValueError(f"the task {task!r} has {offsets[-1]} tokens, fewer than one row of {length}")
        windows = {task: int(offsets[-1]) // length for task, offsets in self._offsets.items()}
        self.curriculum = Curriculum(phases, windows, seed=seed, slots=rows)

    def __str__(self) -> str:
        return f"the diffusion loader of {', '.join(self.curriculum.tasks)}"

    def batch(self, step: int) -> dict:
        """tokens, segment_ids and positions of this process's rows; stats: fill, the share that is not padding."""
        draw = Draw(*map(np.concatenate, zip(*(self.curriculum.draw(step, *run) for run in _runs(self.own)))))
        tokens, segment_ids, positions = np.zeros((3, len(self.own), self.length), np.int32)
        for j, (task, epoch, index) in enumerate(zip(*draw)):
            tokens[j], segment_ids[j], positions[j] = self._window(self.curriculum.tasks[task], int(epoch), int(index))
        chance, keep = random_bits(make_key(self.seed, "truncate", step), 2 * self.own + np.array([[0], [1]]))
        cut = chance * 2.0**-64 < self.truncate_probability
        kept = np.where(cut, 1 + keep.astype(np.float64) * 2.0**-64 * (self.length - 1), self.length).astype(np.int64)
        inside = np.arange(self.length) < kept[:, None]
        batch = {"tokens": tokens * inside, "segment_ids": segment_ids * inside, "positions": positions * inside}
        return batch | {"stats": {"fill": float(inside.mean()), "cut": int(cut.sum())}}

    def _window(self, task: str, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, segment ids and positions of one window."""
        store, offsets = self._stores[task], self._offsets[task]
        total = int(offsets[-1])
        shift = int(make_key(self.seed, "shift", task, epoch)) % total
        start = (shift + index * self.length) % total
        stop = min(start + self.length, total)
        wrapped = self.length - (stop - start)
        tokens = store.flat("tokens", start, stop)
        begins = offsets[np.searchsorted(offsets, start, "right") : np.searchsorted(offsets, stop)] - start
        if wrapped:
            tokens = np.concatenate([tokens, store.flat("tokens", 0, wrapped)])
            begins = np.concatenate([begins, stop - start + offsets[: np.searchsorted(offsets, wrapped)]])
        first = np.zeros(self.length, np.int64)
        first[begins] = 1
        first[0] = 1
        segment_ids = np.cumsum(first)
        place = np.arange(self.length)
        return tokens, segment_ids, place - np.maximum.accumulate(place * first)


# --- contrastive ------------------------------------------------------------------------------------------------

STAGES = ("pair", "triplet", "contextual")


def split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The pieces of a flat array."""
    stops = np.cumsum(lengths)
    return [flat[stop - length : stop] for stop, length in zip(stops, lengths)]


class ContrastiveLoader:
    """Packed groups of contrastive examples and where each embedding stands in the flattened tables.

    A batch is `groups` groups of `group_size` examples, each packed by itself into `rows_per_group` rows; a process
    builds whole groups. R = groups · rows_per_group rows of the global batch; slots and `positive` are global, arrays
    are this process's part of it, axis 0 in order of groups:

        all         tokens, segment_ids, positions, span_ids   int32[rows, L]
        pair        query_slots, document_slots   int32[N] into the span table [R · S]
                    query_ids, document_ids   int32[N]   content of the tokens as they stand in the rows
                    valid   bool[N]   query and document have tokens
        triplet     the same, and negative_slots, negative_ids, negative_valid   [N, K]
        contextual  chunk_slots, chunk_ids, chunk_valid   [C] into the span table, C = documents · max_chunks
                    chunk_document   int32[C]   content of the whole document that holds the chunk
                    query_slots, query_ids   int32[N], N = documents · max_queries_per_document
                    positive   int32[N] into the chunks; document_slots   int32[N] into the segment table [R · G]
                    valid   bool[N]   query and positive chunk have tokens
        stats       fill   share of tokens that are not padding
                    cut    segments shortened to make their group fit
                    lost   examples (queries) that are there but not valid: a side of them has no tokens (left)

    Slots that stand for nothing (fewer negatives, chunks or queries than there is room for) are 0 and not valid.
    More negatives or queries than there is room for: as many as fit, by a draw keyed by seed, step and slot.
    """

    def __init__(
        self,
        stores: Mapping[str, "Store"],
        phases: Sequence[tuple[int, Mapping[str, float]]],
        *,
        stage: str,
        seed: int,
        group_size: int,
        groups: int,
        rows_per_group: int,
        shape: RowShape,
        num_negatives: int = 0,
        max_queries_per_document: int = 0,
        max_chunks: int = 0,
        separator_id: int | None = None,
        own: Sequence[int] | None = None,
    ):
        """`groups`: over all processes. The four arguments after `shape` are for triplet or contextual only."""
        if stage not in STAGES:
            raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
        if stage == "contextual" and (max_queries_per_document < 1 or not 1 <= max_chunks <= shape.spans):
            raise ValueError(
                f"the contextual stage needs max_queries_per_document={max_queries_per_document} of at least 1 "
                f"and max_chunks={max_chunks} in 1..{shape.spans}, the spans a row"
            )
        self.stage, self.seed, self.shape = stage, seed, shape
        self.group_size, self.rows_per_group, self.num_negatives = group_size, rows_per_group, num_negatives
        self.max_queries, self.max_chunks, self.separator_id = max_queries_per_document, max_chunks, separator_id
        self.own, self.units = _own("groups", groups, own), groups
        self._stores = stores
        self.curriculum = Curriculum(
            phases, {task: len(store) for task, store in stores.items()}, seed=seed, slots=group_size * groups
        )

    def __str__(self) -> str:
        return f"the {self.stage} loader of {', '.join(self.curriculum.tasks)}"

    def batch(self, step: int) -> dict:
        """This process's part of the batch of `step`, as the class says."""
        size = self.group_size
        runs = _runs(self.own)
        examples = [e for start, stop in runs for e in self._read(step, start * size, stop * size)]
        build = self._documents if self.stage == "contextual" else self._texts
        parts = [build(step, g, examples[i * size : (i + 1) * size]) for i, g in enumerate(self.own)]
        stats = [part.pop("stats") for part in parts]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        stats = {name: sum(s[name] for s in stats) for name in stats[0]}
        return batch | {"stats": {"fill": float((batch["segment_ids"] > 0).mean()), **stats}}

    def _read(self, step: int, start: int, stop: int) -> list[dict]:
        draw = self.curriculum.draw(step, start, stop)
        examples = [None] * (stop - start)
        for t in np.unique(draw.task):
            mine = np.flatnonzero(draw.task == t)
            for i, example in zip(mine, self._stores[self.curriculum.tasks[t]].read(draw.index[mine])):
                examples[i] = example
        return examples

    def _choose(self, what: str, step: int, slot: int, available: int, wanted: int) -> np.ndarray:
        """All of `available` things, in order, or a keyed draw of `wanted` of them without replacement."""
        if available <= wanted:
            return np.arange(available)
        return shuffled(make_key(self.seed, what, step, slot), available)[:wanted]

    def _pack(self, group: int, segments: list[rows.Segment]) -> tuple[rows.Packed, list[rows.Segment], dict]:
        packed, segments, cut = rows.pack_group(segments, self.shape, self.rows_per_group)
        arrays = packed.rows._asdict()
        # Slots of the global batch from here on.
        return packed._replace(row=packed.row + group * self.rows_per_group), segments, arrays | {"stats": {"cut": cut}}

    def _texts(self, step: int, group: int, examples: list[dict]) -> dict:
        """pair and triplet."""
        n, k = len(examples), self.num_negatives
        texts = [e["query"] for e in examples] + [e["document"] for e in examples]
        where = np.full((n, k), -1)  # of each negative in `texts`
        for i, e in enumerate(examples if self.stage == "triplet" else []):
            negatives = split(e["negatives"], e["negative_lengths"])
            chosen = self._choose("negatives", step, group * n + i, len(negatives), k)
            where[i, : len(chosen)] = len(texts) + np.arange(len(chosen))
            texts += [negatives[c] for c in chosen]
        packed, segments, out = self._pack(group, [rows.dense(text) for text in texts])
        ids, filled = rows.content_ids([s.tokens for s in segments]), _lengths(segments) > 0
        slots = packed.span_slots().astype(np.int32)
        valid = filled[:n] & filled[n : 2 * n]
        out |= dict(query_slots=slots[:n], document_slots=slots[n : 2 * n], valid=valid)
        out |= dict(query_ids=ids[:n], document_ids=ids[n : 2 * n])
        out["stats"]["lost"] = int((~valid).sum())
        if self.stage == "triplet":
            there = where >= 0
            out |= dict(negative_slots=np.where(there, slots[where], 0), negative_ids=np.where(there, ids[where], 0))
            out["negative_valid"] = there & filled[where]
        return out

    def _documents(self, step: int, group: int, examples: list[dict]) -> dict:
        """contextual."""
        n, q, c = len(examples), self.max_queries, self.max_chunks
        segments, counts = [], np.array([len(e["chunk_lengths"]) for e in examples])
        if counts.max() > c:
            raise ValueError(
                f"a document of {counts.max()} chunks is over max_chunks={c}: prepare the data with that bound"
            )
        for e in examples:
            segments.append(rows.chunked(split(e["document"], e["chunk_lengths"]), self.separator_id))
        where, answer = (
            np.full((n, q), -1),
            np.zeros((n, q), np.int64),
        )  # query in `segments`, its chunk in the document
        for i, e in enumerate(examples):
            queries = split(e["queries"], e["query_lengths"])
            chosen = self._choose("queries", step, group * n + i, len(queries), q)
            if len(queries) and not 0 <= e["positives"].min() <= e["positives"].max() < counts[i]:
                raise ValueError(f"positives {e['positives']} point outside a document of {counts[i]} chunks")
            where[i, : len(chosen)] = len(segments) + np.arange(len(chosen))
            answer[i, : len(chosen)] = e["positives"][chosen]
            segments += [rows.dense(queries[x]) for x in chosen]
        packed, segments, out = self._pack(group, segments)
        ids, filled, slots = rows.content_ids([s.tokens for s in segments]), _lengths(segments) > 0, packed.span_slots()

        chunk_slots, chunk_ids, chunk_document = np.zeros((3, n, c), np.int32)
        chunk_valid = np.zeros((n, c), bool)
        for i, (s, count) in enumerate(zip(segments[:n], counts)):
            content = s.tokens[s.spans > 0]  # without separators
            lengths = np.bincount(s.spans, minlength=count + 1)[1:]
            chunk_slots[i, :count] = slots[i] + np.arange(count)
            chunk_ids[i, :count] = rows.content_ids(split(content, lengths))
            chunk_document[i] = rows.content_ids([content])[0]
            chunk_valid[i, :count] = lengths > 0
        there = where >= 0
        valid = there & filled[where] & np.take_along_axis(chunk_valid, answer, 1)
        documents = np.arange(n)[:, None]
        positive = np.where(there, (group * n + documents) * c + answer, 0)
        document_slots = np.where(there, packed.segment_slots()[documents], 0)
        out |= {
            "chunk_slots": chunk_slots.reshape(-1),
            "chunk_ids": chunk_ids.reshape(-1),
            "chunk_document": chunk_document.reshape(-1),
            "chunk_valid": chunk_valid.reshape(-1),
            "query_slots": np.where(there, slots[where], 0).astype(np.int32).reshape(-1),
            "query_ids": np.where(there, ids[where], 0).reshape(-1),
            "positive": positive.astype(np.int32).reshape(-1),
            "document_slots": document_slots.astype(np.int32).reshape(-1),
            "valid": valid.reshape(-1),
        }
        out["stats"]["lost"] = int((there & ~valid).sum())
        return out


def _lengths(segments: Sequence[rows.Segment]) -> np.ndarray:
    return np.array([len(s.tokens) for s in segments], np.int64)


# --- reading ahead ----------------------------------------------------------------------------------------------


class ReaderStalledError(RuntimeError):
    """A loader gave no batch in the time that it has."""

    exit_code = 75  # EX_TEMPFAIL: the same command, started again, continues


def prefetch(
    loader, start: int, stop: int, depth: int = 2, timeout: float | None = None
) -> Iterator[tuple[int, dict, float]]:
    """(step, batch, seconds that it was waited for) of steps start..stop-1, in order, read `depth` ahead by one thread.

    What the reader raises is raised here, at its step, with a note that names the loader and the step. A batch that is not
    there after `timeout` seconds of waiting raises ReaderStalledError; the thread, which may never return, keeps no process alive.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room, over = threading.Semaphore(depth), threading.Event()

    def read():
        for step in range(start, stop):
            room.acquire()
            if over.is_set():
                return
            try:
                ready.put(loader.batch(step))
            except Exception as error:
                error.add_note(f"while {loader} read the batch of step {step}")
                ready.put(error)
                return

    threading.Thread(target=read, name="prefetch", daemon=True).start()
    try:
        for step in range(start, stop):
            began = time.perf_counter()
            try:
                batch = ready.get(timeout=timeout)
            except queue.Empty:
                raise ReaderStalledError(
                    f"{loader} gave no batch of step {step} in {timeout} s (config.execution.read_timeout): is its "
                    "storage there? The same command continues from the last checkpoint"
                ) from None
            if isinstance(batch, Exception):
                raise batch
            room.release()
            yield step, batch, time.perf_counter() - began
    finally:
        over.set()
        room.release()
