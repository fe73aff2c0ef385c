"""Batches as a pure function of (seed, step): no iterator, no state, no TensorFlow.

    DiffusionLoader     full rows: windows cut from the text of a task
    ContrastiveLoader   pairs, triplets or chunked documents, packed group by group
    choose_rows         the rows of a group that the lengths of the data fill

Batch k costs the same for every k, a restart needs only the step number, and the global batch does not depend on the
number of processes. A batch consists of `num_shards` shards: rows (diffusion) or groups (contrastive). Each process
builds only the `shards` that its devices hold, and reads only their examples.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from embed import rows
from embed.data.curriculum import Curriculum, Draw, make_key, random_bits, shuffled
from embed.rows import RowShape

if TYPE_CHECKING:
    from embed.data.store import Store


# {kind of stage: the columns that its loader reads}, all int32[length]. A store may have more of them, except of text.
PAIR = ("query", "document")
COLUMNS = {
    "diffusion": ("tokens",),
    "pair": PAIR,
    "contextual": ("document", "chunk_lengths", "queries", "query_lengths", "positives"),
    "triplet": (*PAIR, "negatives", "negative_lengths"),
    "late_interaction": PAIR,
}


def _local_shards(name: str, total: int, shards: Sequence[int] | None) -> np.ndarray:
    """The indices of the shards that this process builds, sorted, int[n]; None = all `total` of them."""
    indices = np.arange(total) if shards is None else np.unique(shards)
    if total < 1 or not len(indices) or not 0 <= indices[0] <= indices[-1] < total:
        raise ValueError(f"{name}={total}: shards={shards} must be at least one index, each in 0..{total - 1}")
    return indices


def _consecutive_ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    """Sorted indices as (start, stop) ranges."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


# --- diffusion --------------------------------------------------------------------------------------------------


class DiffusionLoader:
    """Rows of `length` tokens, cut from the text of a task.

    The text of a task is one flat array of T tokens: its documents, one after the other. It is read as a ring. In each
    epoch, T // length windows tile the ring from an offset that depends on the epoch, so the cuts fall on other tokens
    in every epoch. A window is one row. It may contain several documents or parts of them: each is a segment with its
    own positions. With `truncate_probability` a row is truncated to a random length (arXiv 2602.11151).
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
        shards: Sequence[int] | None = None,
    ):
        """`rows`: in the global batch; `shards`: the indices of the rows that this process builds (None = all).

        `phases` is [(steps, {task: rate}), …], see `Curriculum`.
        """
        self.seed, self.length, self.truncate_probability = seed, length, truncate_probability
        self.shards, self.num_shards = _local_shards("rows", rows, shards), rows
        tasks = sorted({task for _, rates in phases for task, rate in rates.items() if rate and task in stores})
        self._stores = {task: stores[task] for task in tasks}
        for task, store in self._stores.items():
            if len(store.columns) > 1:
                raise ValueError(f"the task {task!r} has the columns {', '.join(store.columns)}; text has one, tokens")
            if (tokens := store.num_values()) < length:
                raise ValueError(f"the task {task!r} has {tokens} tokens, fewer than one row of {length}")
        windows = {task: store.num_values() // length for task, store in self._stores.items()}
        self.curriculum = Curriculum(phases, windows, seed=seed, slots=rows)

    def __str__(self) -> str:
        return f"the diffusion loader of {', '.join(self.curriculum.tasks)}"

    def batch(self, step: int) -> dict:
        """The rows of this process in the batch of `step`.

        tokens, segment_ids, positions   int32[local rows, length], as in `rows.Rows`
        stats                            fill: share of tokens that are not padding; cut: number of truncated rows
        """
        draws = [self.curriculum.draw(step, start, stop) for start, stop in _consecutive_ranges(self.shards)]
        draw = Draw(*map(np.concatenate, zip(*draws)))
        tokens = np.zeros((len(self.shards), self.length), np.int32)
        is_start = np.zeros_like(tokens, dtype=bool)
        for t in np.unique(draw.task):
            of_task = np.flatnonzero(draw.task == t)
            windows = self._windows(self.curriculum.tasks[t], draw.epoch[of_task], draw.index[of_task])
            tokens[of_task], is_start[of_task] = windows
        is_start[:, 0] = True
        segment_ids, offset = np.cumsum(is_start, 1, dtype=np.int32), np.arange(self.length, dtype=np.int32)
        positions = offset - np.maximum.accumulate(offset * is_start, 1)
        # Two random numbers per row: whether to truncate it, and to which length.
        chance, fraction = random_bits(make_key(self.seed, "truncate", step), 2 * self.shards + np.array([[0], [1]]))
        truncated = chance * 2.0**-64 < self.truncate_probability
        random_lengths = 1 + fraction.astype(np.float64) * 2.0**-64 * (self.length - 1)
        lengths = np.where(truncated, random_lengths, self.length).astype(np.int64)
        inside = np.arange(self.length) < lengths[:, None]
        batch = {"tokens": tokens * inside, "segment_ids": segment_ids * inside, "positions": positions * inside}
        return batch | {"stats": {"fill": float(inside.mean()), "cut": int(truncated.sum())}}

    def _windows(self, task: str, epochs: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts, [n, length] each, of n windows: each the window `index` of an epoch."""
        store = self._stores[task]
        shifts = {int(e): int(make_key(self.seed, "shift", task, int(e))) % store.num_values() for e in set(epochs)}
        shift = np.array([shifts[int(e)] for e in epochs])
        return store.windows((shift + indices * self.length) % store.num_values(), self.length)


# --- contrastive ------------------------------------------------------------------------------------------------

STAGES = ("pair", "triplet", "contextual", "late_interaction")


def split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The pieces of a flat array, one per length."""
    stops = np.cumsum(lengths)
    return [flat[stop - length : stop] for stop, length in zip(stops, lengths)]


class ContrastiveLoader:
    """Packed groups of contrastive examples, with tables that say which embedding is a query, a document, a chunk …

    A batch is `groups` groups of `group_size` examples. Each group is packed into `rows_per_group` rows of L tokens, so
    the global batch has R = groups · rows_per_group rows. The encoder computes two tables from it: spans [R · S, D] and
    segments [R · G, D] (see `embed.rows`). A *slot* is an index into one of these tables. Slots and `positive` refer to
    the global batch; the arrays are this process's part of it, whole groups in order along axis 0:

        all         tokens, segment_ids, positions, span_ids   int32[local rows, L]
        pair        query_slots, document_slots   int32[N] into the span table, N = local groups · group_size
                    query_ids, document_ids       int32[N] hashes of the tokens in the rows
                    valid                         bool[N]  query and document have tokens
        triplet     the same, and negative_slots, negative_ids, negative_valid   [N, K], K = num_negatives
        late_interaction
                    query_starts, document_starts     int32[N] slot of the first token in the flat rows [R · L]
                    query_lengths, document_lengths   int32[N] in tokens; with query_ids, document_ids, valid of a pair
        contextual  chunk_slots, chunk_ids, chunk_valid   [C] into the span table, C = documents · max_chunks
                    chunk_document                int32[C] hash of the whole document that contains the chunk
                    query_slots, query_ids        int32[N], N = documents · max_queries_per_document
                    positive                      int32[N] index of the query's chunk, in 0..C-1 of the global batch
                    document_slots                int32[N] into the segment table
                    valid                         bool[N]  query and positive chunk have tokens
        stats       fill   share of tokens that are not padding
                    cut    number of segments that were shortened so that their group fits
                    lost   number of examples (contextual: queries) that are not valid because one side has no tokens

    Unused entries (an example may have fewer negatives, chunks or queries than the array has columns) are 0 and not
    valid. An example with more negatives or queries than columns uses a random sample of them that depends on seed,
    step and the example's index in the batch.
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
        max_query_tokens: int = 0,
        max_document_tokens: int = 0,
        homogeneous: bool = False,
        shards: Sequence[int] | None = None,
    ):
        """`groups`: in the global batch; `shards`: the indices of the groups that this process builds (None = all).

        `phases` is [(steps, {task: rate}), …], see `Curriculum`. Only the triplet stage uses `num_negatives`, only the
        contextual stage the three arguments after it, and only the late-interaction stage the next two: it cuts longer
        texts to so many tokens. With `homogeneous`, a batch has examples of one task.
        """
        if stage not in STAGES:
            raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
        if stage == "contextual" and (max_queries_per_document < 1 or not 1 <= max_chunks <= shape.spans):
            raise ValueError(
                f"the contextual stage needs max_queries_per_document of at least 1, got {max_queries_per_document}, "
                f"and max_chunks in 1..{shape.spans} (the spans of a row), got {max_chunks}"
            )
        self.stage, self.seed, self.shape = stage, seed, shape
        self.group_size, self.rows_per_group, self.num_negatives = group_size, rows_per_group, num_negatives
        self.max_queries, self.max_chunks, self.separator_id = max_queries_per_document, max_chunks, separator_id
        self.max_tokens = {"query": max_query_tokens or None, "document": max_document_tokens or None}
        self.shards, self.num_shards = _local_shards("groups", groups, shards), groups
        self._stores = stores
        sizes = {task: len(store) for task, store in stores.items()}
        self.curriculum = Curriculum(phases, sizes, seed=seed, slots=group_size * groups, homogeneous=homogeneous)
        for task in self.curriculum.tasks if stage == "contextual" else ():
            if (most := stores[task].lengths("chunk_lengths").max) > max_chunks:
                raise ValueError(
                    f"the task {task!r} has a document of {most} chunks, more than batch.max_chunks={max_chunks}: "
                    "raise it, or prepare the data with it"
                )

    def __str__(self) -> str:
        return f"the {self.stage} loader of {', '.join(self.curriculum.tasks)}"

    def batch(self, step: int) -> dict:
        """This process's part of the batch of `step`: the arrays in the docstring of the class."""
        size = self.group_size
        ranges = _consecutive_ranges(self.shards)
        examples = [e for start, stop in ranges for e in self._read(step, start * size, stop * size)]
        build = self._text_group if self.stage != "contextual" else self._document_group
        groups = [build(step, g, examples[i * size : (i + 1) * size]) for i, g in enumerate(self.shards)]
        stats = [group.pop("stats") for group in groups]
        batch = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
        stats = {name: sum(s[name] for s in stats) for name in stats[0]}
        return batch | {"stats": {"fill": float((batch["segment_ids"] > 0).mean()), **stats}}

    def _read(self, step: int, start: int, stop: int) -> list[dict]:
        """Examples start..stop-1 of the global batch, one read per task."""
        draw = self.curriculum.draw(step, start, stop)
        examples = [None] * (stop - start)
        for t in np.unique(draw.task):
            of_task = np.flatnonzero(draw.task == t)
            for i, example in zip(of_task, self._stores[self.curriculum.tasks[t]].read(draw.index[of_task])):
                examples[i] = example
        return examples

    def _sample(self, purpose: str, step: int, example: int, available: int, limit: int) -> np.ndarray:
        """Indices below `available`: all of them in order, or `limit` random ones without replacement."""
        if available <= limit:
            return np.arange(available)
        return shuffled(make_key(self.seed, purpose, step, example), available)[:limit]

    def _pack(self, group: int, segments: list[rows.Segment]) -> tuple[rows.Packed, list[rows.Segment], dict]:
        """The packed rows, the segments as cut to fit, and the first arrays of the group. Slots become global here."""
        packed, segments, cut = rows.pack_group(segments, self.shape, self.rows_per_group)
        arrays = packed.rows._asdict() | {"stats": {"cut": cut}}
        return packed._replace(row=packed.row + group * self.rows_per_group), segments, arrays

    def _text_group(self, step: int, group: int, examples: list[dict]) -> dict:
        """The arrays of one group of n pairs, for cosines or for late interaction, or triplets."""
        n, k = len(examples), self.num_negatives
        texts = [e[side][: self.max_tokens[side]] for side in PAIR for e in examples]
        negative_index = np.full((n, k), -1)  # into `texts`; -1 = unused
        for i, e in enumerate(examples if self.stage == "triplet" else []):
            negatives = split(e["negatives"], e["negative_lengths"])
            sample = self._sample("negatives", step, group * n + i, len(negatives), k)
            negative_index[i, : len(sample)] = len(texts) + np.arange(len(sample))
            texts += [negatives[j] for j in sample]
        packed, segments, out = self._pack(group, [rows.dense(text) for text in texts])
        ids, nonempty = rows.content_ids([s.tokens for s in segments]), _lengths(segments) > 0
        slots = packed.span_slots().astype(np.int32)
        valid = nonempty[:n] & nonempty[n : 2 * n]
        out |= dict(query_ids=ids[:n], document_ids=ids[n : 2 * n], valid=valid)
        out["stats"]["lost"] = int((~valid).sum())
        if self.stage == "late_interaction":
            starts, lengths = packed.token_slots().astype(np.int32), _lengths(segments).astype(np.int32)
            out |= dict(query_starts=starts[:n], document_starts=starts[n:])
            out |= dict(query_lengths=lengths[:n], document_lengths=lengths[n:])
            # By `max_tokens`, or so that the group fits.
            out["stats"]["cut"] = int((lengths < [len(e[side]) for side in PAIR for e in examples]).sum())
            return out
        out |= dict(query_slots=slots[:n], document_slots=slots[n : 2 * n])
        if self.stage == "triplet":
            used = negative_index >= 0
            out["negative_slots"] = np.where(used, slots[negative_index], 0)
            out["negative_ids"] = np.where(used, ids[negative_index], 0)
            out["negative_valid"] = used & nonempty[negative_index]
        return out

    def _document_group(self, step: int, group: int, examples: list[dict]) -> dict:
        """The arrays of one group of n documents of up to c chunks, with up to q queries each."""
        n, q, c = len(examples), self.max_queries, self.max_chunks
        chunk_counts = np.array([len(e["chunk_lengths"]) for e in examples])
        segments = [rows.chunked(split(e["document"], e["chunk_lengths"]), self.separator_id) for e in examples]
        query_index = np.full((n, q), -1)  # into `segments`; -1 = unused
        positive_chunk = np.zeros((n, q), np.int64)  # of each query, in its document
        for i, e in enumerate(examples):
            queries = split(e["queries"], e["query_lengths"])
            sample = self._sample("queries", step, group * n + i, len(queries), q)
            if len(queries) and not 0 <= e["positives"].min() <= e["positives"].max() < chunk_counts[i]:
                raise ValueError(
                    f"positives {e['positives']} must be chunks of their document, 0..{chunk_counts[i] - 1}"
                )
            query_index[i, : len(sample)] = len(segments) + np.arange(len(sample))
            positive_chunk[i, : len(sample)] = e["positives"][sample]
            segments += [rows.dense(queries[j]) for j in sample]
        packed, segments, out = self._pack(group, segments)
        ids, nonempty = rows.content_ids([s.tokens for s in segments]), _lengths(segments) > 0
        slots = packed.span_slots()

        chunk_slots, chunk_ids, chunk_document = np.zeros((3, n, c), np.int32)
        chunk_valid = np.zeros((n, c), bool)
        for i, (s, count) in enumerate(zip(segments[:n], chunk_counts)):
            content = s.tokens[s.spans > 0]  # without separators
            lengths = np.bincount(s.spans, minlength=count + 1)[1:]
            chunk_slots[i, :count] = slots[i] + np.arange(count)
            chunk_ids[i, :count] = rows.content_ids(split(content, lengths))
            chunk_document[i] = rows.content_ids([content])[0]
            chunk_valid[i, :count] = lengths > 0
        used = query_index >= 0
        valid = used & nonempty[query_index] & np.take_along_axis(chunk_valid, positive_chunk, 1)
        documents = np.arange(n)[:, None]
        positive = np.where(used, (group * n + documents) * c + positive_chunk, 0)
        document_slots = np.where(used, packed.segment_slots()[documents], 0)
        out |= {
            "chunk_slots": chunk_slots.reshape(-1),
            "chunk_ids": chunk_ids.reshape(-1),
            "chunk_document": chunk_document.reshape(-1),
            "chunk_valid": chunk_valid.reshape(-1),
            "query_slots": np.where(used, slots[query_index], 0).astype(np.int32).reshape(-1),
            "query_ids": np.where(used, ids[query_index], 0).reshape(-1),
            "positive": positive.astype(np.int32).reshape(-1),
            "document_slots": document_slots.astype(np.int32).reshape(-1),
            "valid": valid.reshape(-1),
        }
        out["stats"]["lost"] = int((used & ~valid).sum())
        return out


def _lengths(segments: Sequence[rows.Segment]) -> np.ndarray:
    return np.array([len(s.tokens) for s in segments], np.int64)


# --- the number of rows -----------------------------------------------------------------------------------------

FILL = 0.95  # the least expected share of tokens in the rows of a group
MOST_CUT = 0.1  # the largest expected share of tokens that are cut off homogeneous groups
PACKED = 0.98  # the share that packing reaches in a group that has to be cut


def choose_rows(
    stores: Mapping[str, "Store"],
    phases: Sequence[tuple[int, Mapping[str, float]]],
    *,
    stage: str,
    group_size: int,
    shape: RowShape,
    num_negatives: int = 0,
    max_queries_per_document: int = 0,
    max_chunks: int = 0,
    separator_id: int | None = None,
    max_query_tokens: int = 0,
    max_document_tokens: int = 0,
    homogeneous: bool = False,
    multiple: int = 1,
) -> int:
    """The rows per group, a multiple of `multiple`: as many as are filled to FILL on average, the arguments as above.

    It is estimated from random groups with the lengths in the headers of the stores, by the rates of all phases. More
    rows would be padded more, fewer would cut more texts. Homogeneous groups of tasks with different lengths cannot all
    be full: they get the rows that cut off MOST_CUT of the tokens. All spans and segments of a group fit in any case.
    """
    rng = np.random.default_rng(0)
    shares: dict[str, float] = {}
    for steps, rates in phases:
        for task, rate in rates.items():
            shares[task] = shares.get(task, 0) + steps * rate / sum(rates.values())
    tasks = [task for task, share in shares.items() if share and task in stores and len(stores[task])]
    if not tasks:
        raise ValueError(f"batch.rows_per_group=0 needs data with examples; none of {', '.join(shares)} has any")
    share = np.array([shares[task] for task in tasks])
    groups = 256
    drawn = rng.choice(len(tasks), groups if homogeneous else (groups, group_size), p=share / share.sum())
    drawn = np.broadcast_to(drawn.reshape(groups, -1), (groups, group_size))
    tokens = np.zeros((groups, group_size))

    for t, task in enumerate(tasks):
        of_task = drawn == t

        def lengths(column: str, most: int, task: str = task, count: int = int(of_task.sum())) -> np.ndarray:
            """Random lengths of a column, at most `most`."""
            known = stores[task].lengths(column)
            return np.minimum(rng.choice(known.lengths, count, p=known.counts / known.counts.sum()), most)

        def mean(column: str, parts: str, task: str = task) -> float:
            """The mean length of a part of a column, such as of one negative of all negatives of an example."""
            return stores[task].lengths(column).total / max(stores[task].num_values(parts), 1)

        if stage == "contextual":
            separators = 0 if separator_id is None else lengths("chunk_lengths", max_chunks) - 1
            queries = lengths("query_lengths", max_queries_per_document) * mean("queries", "query_lengths")
            tokens[of_task] = np.minimum(lengths("document", shape.length) + separators, shape.length) + queries
            continue
        documents = lengths("document", min(shape.length, max_document_tokens or shape.length))
        tokens[of_task] = lengths("query", min(shape.length, max_query_tokens or shape.length)) + documents
        if stage == "triplet":
            # The header does not have their single lengths. They are documents, so the row cuts off as large a share.
            share_kept = documents.mean() / max(stores[task].lengths("document").mean, 1) if len(documents) else 1
            each = share_kept * mean("negatives", "negative_lengths")
            tokens[of_task] += lengths("negative_lengths", num_negatives) * each

    total = tokens.sum(1)
    # A row may stay short of `widest` spans, because the next segment needs them.
    segments = group_size * (1 + max_queries_per_document if stage == "contextual" else 2 + num_negatives)
    widest = max_chunks if stage == "contextual" else 1
    spans = group_size * (max_chunks + max_queries_per_document) if stage == "contextual" else segments
    per_row = min(shape.length, shape.segments)
    least = max(-(-spans // (shape.spans - widest + 1)), -(-segments // per_row), 1)

    def kept(rows: int) -> float:
        """The expected tokens of a group in that many rows."""
        return np.minimum(total, PACKED * rows * shape.length).mean()

    least_kept = (1 - MOST_CUT) * total.mean() if homogeneous else 0
    rows = -(-least // multiple) * multiple
    while kept(rows) < least_kept or kept(rows + multiple) >= FILL * (rows + multiple) * shape.length:
        rows += multiple
    return rows
