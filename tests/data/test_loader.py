import numpy as np
import pytest

from embed import rows
from embed.data import curriculum
from embed.data import loader as loading
from embed.data.curriculum import BLOCK, PERIOD, Curriculum, random_bits
from embed.data.loader import ContrastiveLoader, TextLoader, choose_rows
from embed.data.store import Lengths, Store, Writer
from embed.rows import RowShape


class MemoryStore:
    """The reading half of embed.data.store.Store over lists of arrays; records the indices that were read."""

    def __init__(self, **columns):
        self.columns = {name: [np.asarray(x, np.int32) for x in column] for name, column in columns.items()}
        self.seen = []

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def read(self, indices):
        self.seen += list(indices)
        return [{name: column[i] for name, column in self.columns.items()} for i in indices]

    def lengths(self, column):
        sizes = np.array([len(x) for x in self.columns[column]])
        return Lengths(sizes.max(initial=0), sizes.sum(), *np.unique(sizes, return_counts=True))

    def num_values(self, column=None):
        return sum(len(x) for name in self.columns for x in self.columns[name] if column in (None, name))

    def windows(self, starts, length):
        documents = [x for x in self.columns["tokens"] if len(x)]
        flat, is_start = np.concatenate(documents), np.concatenate([np.arange(len(x)) == 0 for x in documents])
        window = (np.asarray(starts)[:, None] + np.arange(length)) % len(flat)
        return flat[window], is_start[window]


def texts(rng, count, shortest, longest):
    return [rng.integers(4, 1000, n) for n in rng.integers(shortest, longest + 1, count)]


def diffusion_stores():
    rng = np.random.default_rng(0)
    return {name: MemoryStore(tokens=texts(rng, 40, 0, 60)) for name in ("code", "prose")}


def contrastive_stores(stage, count=50):
    rng = np.random.default_rng(0)

    def pieces(least, most, longest):
        """For each example some random texts: (their tokens concatenated, their lengths)."""
        lists = [texts(rng, n, 1, longest) for n in rng.integers(least, most + 1, count)]
        return [np.concatenate([np.zeros(0, int), *x]) for x in lists], [[len(y) for y in x] for x in lists]

    def one():
        if stage == "contextual":
            document, chunk_lengths = pieces(1, 4, 6)
            queries, query_lengths = pieces(0, 5, 4)
            positives = [rng.integers(0, len(c), len(q)) for c, q in zip(chunk_lengths, query_lengths)]
            return MemoryStore(
                document=document,
                chunk_lengths=chunk_lengths,
                queries=queries,
                query_lengths=query_lengths,
                positives=positives,
            )
        if stage == "distill":
            vectors = [loading.float_values(vector) for vector in rng.normal(size=(count, 3))]
            return MemoryStore(tokens=texts(rng, count, 1, 20), vector=vectors)
        columns = dict(query=texts(rng, count, 1, 8), document=texts(rng, count, 4, 20))
        if stage == "triplet":
            columns["negatives"], columns["negative_lengths"] = pieces(0, 5, 10)
        return MemoryStore(**columns)

    return {"a": one(), "b": one()}


PHASES = [(3, {"code": 1.0}), (4, {"code": 0.25, "prose": 0.75})]
SHAPE = RowShape(32, 8, 6)
STAGES = {
    "diffusion": {},
    "pair": dict(rows_per_group=4),
    "triplet": dict(rows_per_group=8, num_negatives=3),
    "late_interaction": dict(rows_per_group=4, max_query_tokens=5, max_document_tokens=12),
    "contextual": dict(rows_per_group=6, max_queries_per_document=2, max_chunks=4, separator_id=3),
    "distill": dict(rows_per_group=3, teacher_dimensions=3),
}


def make(stage_name, process_index=0, process_count=1, seed=0, stores=None, shards=None, **changes):
    stage = stage_name  # `changes` may name another, invalid one
    num_shards = 8 if stage == "diffusion" else 4
    if shards is None:
        shards = range(process_index * num_shards // process_count, (process_index + 1) * num_shards // process_count)
    common = dict(seed=seed, shards=shards)
    if stage == "diffusion":
        arguments = dict(rows=8, length=16, truncate_probability=0.3) | changes
        return TextLoader(stores or diffusion_stores(), PHASES, **common, **arguments)
    arguments = dict(stage=stage, group_size=5, groups=4, shape=SHAPE) | STAGES[stage] | changes
    phases = [(3, {"a": 1.0}), (4, {"a": 0.25, "b": 0.75})]
    return ContrastiveLoader(stores or contrastive_stores(stage), phases, **common, **arguments)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- all loaders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_is_a_function_of_seed_and_step(stage):
    forward, backward = make(stage), make(stage)
    ahead = [forward.batch(k) for k in range(9)]
    for k in reversed(range(9)):
        assert_equal(backward.batch(k), ahead[k])
    assert_equal(make(stage).batch(50_000), make(stage).batch(50_000))
    assert not np.array_equal(ahead[0]["tokens"], ahead[1]["tokens"])
    assert not np.array_equal(ahead[0]["tokens"], make(stage, seed=1).batch(0)["tokens"])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_the_batches_of_all_processes_together_are_the_batch_of_one(stage, count):
    for step in (0, 5, 1000):
        whole = make(stage).batch(step)
        parts = [make(stage, index, count).batch(step) for index in range(count)]
        stats = [part.pop("stats") for part in parts]
        total = whole.pop("stats")
        assert_equal({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, whole)
        assert sum(s["cut"] for s in stats) == total["cut"]
        assert np.mean([s["fill"] for s in stats]) == pytest.approx(total["fill"])


def test_a_process_reads_only_its_own_examples():
    stores = [contrastive_stores("pair", count=1000) for _ in range(4)]
    for index, tasks in enumerate(stores):
        make("pair", index, 4, stores=tasks).batch(0)
    read = [tasks["a"].seen + tasks["b"].seen for tasks in stores]
    assert [len(r) for r in read] == [5] * 4 and len(set(sum(read, []))) == 20


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_costs_the_same_at_step_50000_as_at_step_100(stage, monkeypatch):
    drawn = []

    def counted(key, counters):
        drawn.append(np.size(counters))
        return random_bits(key, counters)

    monkeypatch.setattr(curriculum, "random_bits", counted)
    monkeypatch.setattr(loading, "random_bits", counted)
    work = {}
    for step in (100, 50_000):
        drawn.clear()
        make(stage).batch(step)
        work[step] = sum(drawn)
    assert work[50_000] < 1.3 * work[100]  # not equal: cycle walking takes a random number of rounds


@pytest.mark.parametrize("stage", STAGES)
def test_every_array_is_int32_or_bool_but_the_vectors_of_a_teacher(stage):
    for name, array in make(stage).batch(0).items():
        assert name == "stats" or array.dtype in ((np.float32,) if name == "teacher" else (np.int32, np.bool_)), name


@pytest.mark.parametrize("stage", STAGES)
def test_shards_that_are_not_contiguous_equal_those_of_the_whole_batch(stage):
    """On a pod, the devices of a process hold shards from several parts of a batch."""
    num_shards = 8 if stage == "diffusion" else 4
    for shards in ([0, 2], [1, 3], [0, 1, 3]):
        whole, part = make(stage).batch(5), make(stage, shards=shards).batch(5)
        for name in part.keys() - {"stats"}:
            size = len(whole[name]) // num_shards
            rows = np.concatenate([np.arange(s * size, (s + 1) * size) for s in shards])
            np.testing.assert_array_equal(part[name], whole[name][rows], err_msg=name)


@pytest.mark.parametrize("stage, total", [("diffusion", "rows=8"), ("pair", "groups=4")])
@pytest.mark.parametrize("shards", [[], [-1], [1, 8]])
def test_a_shard_outside_the_batch_is_an_error(stage, total, shards):
    message = f"{total}: shards=.* must be at least one index, each in 0..{int(total[-1]) - 1}"
    with pytest.raises(ValueError, match=message):
        make(stage, shards=shards)


# --- the curriculum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 99, 100, 1000, 4097])
def test_permute_is_a_permutation_of_any_size(size):
    out = curriculum.permute(curriculum.make_key("x"), np.arange(size), size)
    np.testing.assert_array_equal(np.sort(out), np.arange(size))
    if size >= 64:
        assert np.abs(np.corrcoef(out, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        assert (out != curriculum.permute(curriculum.make_key("y"), np.arange(size), size)).mean() > 0.9


def examples(curriculum, steps):
    """(task name, epoch, index) of every slot of the steps."""
    for step in steps:
        draw = curriculum.draw(step, 0, curriculum.slots)
        yield from ((curriculum.tasks[t], int(e), int(i)) for t, e, i in zip(*draw))


@pytest.mark.parametrize("slots", [7, 256, 3000])
def test_every_epoch_draws_each_example_once_in_a_new_order_across_blocks_and_phases(slots):
    sizes = {"a": 501, "b": 90}
    curriculum = Curriculum([(4, {"a": 1}), (3, {"a": 1, "b": 2}), (1, {"b": 1, "a": 1})], sizes, seed=3, slots=slots)
    seen = {}
    for task, epoch, index in examples(curriculum, range(max(10, 10_000 // slots))):
        seen.setdefault((task, epoch), []).append(index)
    for task, size in sizes.items():
        epochs = [order for (t, _), order in sorted(seen.items()) if t == task]
        assert len(epochs) > 2
        for order in epochs[:-1]:
            assert sorted(order) == list(range(size))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_every_block_has_the_exact_proportions_of_its_rates():
    rates = {"a": 0.5, "b": 0.3, "c": 0.2001}
    slots = BLOCK // 4
    curriculum = Curriculum([(100, rates)], dict.fromkeys(rates, 10**6), seed=0, slots=slots)
    for block in range(3):
        tasks = [task for task, _, _ in examples(curriculum, range(4 * block, 4 * block + 4))]
        for task, rate in rates.items():
            assert abs(tasks.count(task) - BLOCK * rate / sum(rates.values())) < 1
        assert len({*tasks[:20]}) > 1  # the tasks are mixed


@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_proportions_of_200_tasks_are_exact_in_a_period_and_within_one_in_each_block(homogeneous):
    """Of batches, if they are homogeneous. The phases end inside a block and inside a period."""
    rates = {f"{i:03}": np.exp(-i / 20) for i in range(199)}
    rates["rare"] = 1e-6 * sum(rates.values())
    shares = np.array([rates[name] for name in sorted(rates)]) / sum(rates.values())
    slots = 7 if homogeneous else 1 << 15
    unit = 1 if homogeneous else slots
    first = 3 * BLOCK + 100 if homogeneous else 5
    phases = [(first, {"000": 1, "rare": 1}), (1, rates)]
    curriculum = Curriculum(phases, dict.fromkeys(rates, 10**9), seed=0, slots=slots, homogeneous=homogeneous)

    task, rank = curriculum._slots(1, 0, 2 * PERIOD)
    counts = np.stack([np.bincount(part, minlength=200) for part in task.reshape(-1, BLOCK)])
    for period in counts.reshape(2, BLOCK, 200).sum(1):
        assert period.sum() == PERIOD and np.abs(period - PERIOD * shares).max() < 1
        np.testing.assert_array_equal(period, np.diff(curriculum._bounds[1]))
    assert np.abs(counts - BLOCK * shares).max() < 1 + 1 / BLOCK
    # Ranks continue over phases and count every slot of a task once.
    before = np.bincount(curriculum._slots(0, 0, first * unit)[0], minlength=200)
    for t in (0, 1, 100, 199):
        np.testing.assert_array_equal(rank[task == t], before[t] + np.arange((task == t).sum()))
    # Any part of the slots is the same, without those before it.
    for begin in (0, 1, BLOCK + 5, PERIOD - 3, PERIOD + 7 * BLOCK):
        part = curriculum._slots(1, begin, begin + 1500)
        for got, want in zip(part, (task, rank)):
            np.testing.assert_array_equal(got, want[begin : begin + 1500])


def test_a_homogeneous_batch_has_one_task_and_goes_through_its_examples():
    sizes = {"a": 50, "b": 1000}
    curriculum = Curriculum([(7, {"a": 1}), (1, {"a": 1, "b": 3})], sizes, seed=0, slots=20, homogeneous=True)
    batches = [list(examples(curriculum, [step])) for step in range(7 + BLOCK)]
    tasks = ["".join({task for task, _, _ in batch}) for batch in batches]
    assert tasks[:7] == ["a"] * 7 and tasks[7:].count("b") == BLOCK * 3 // 4
    seen = [example for batch in batches for example in batch if example[0] == "a"]
    for epoch in range(20):
        of_epoch = seen[epoch * 50 : epoch * 50 + 50]
        assert {e for _, e, _ in of_epoch} == {epoch} and {i for *_, i in of_epoch} == set(range(50))


def test_a_step_uses_its_phase_and_the_last_phase_continues_for_ever():
    curriculum = Curriculum([(2, {"a": 1}), (3, {"b": 1}), (1, {"c": 1})], dict.fromkeys("abc", 100), seed=0, slots=8)
    tasks = ["".join(sorted({task for task, _, _ in examples(curriculum, [step])})) for step in range(8)]
    assert tasks == ["a", "a", "b", "b", "b", "c", "c", "c"]


def test_drawing_part_of_a_batch_equals_slicing_the_whole():
    curriculum = Curriculum([(9, {"a": 1, "b": 1})], {"a": 30, "b": 40}, seed=0, slots=1500)
    whole = curriculum.draw(7, 0, 1500)
    for start, stop in ((0, 10), (700, 1300), (1499, 1500)):
        for part, all_ in zip(curriculum.draw(7, start, stop), whole):
            np.testing.assert_array_equal(part, all_[start:stop])


def test_a_task_with_rate_zero_is_left_out_and_needs_no_data():
    curriculum = Curriculum([(1, {"a": 1, "b": 0})], {"a": 5}, seed=0, slots=8)
    assert curriculum.tasks == ["a"]


@pytest.mark.parametrize(
    "phases, message",
    [
        ([], "at least one phase"),
        ([(0, {"a": 1})], "at least one step and a positive rate"),
        ([(5, {"a": 0})], "at least one step and a positive rate"),
        ([(5, {"a": 1, "b": -1})], "at least one step and a positive rate"),
        ([(5, {"c": 1})], "no data for the task 'c' of the curriculum; prepared tasks: a, b, empty"),
        ([(5, {"empty": 1})], "the task 'empty' has no examples"),
        ([(5, {"a": 1, "b": 9e-7})], "'b' has a share of 9e-07 in its mixture, less than one in 1048576"),
    ],
)
def test_an_impossible_curriculum_is_an_error(phases, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(phases, {"a": 5, "b": 5, "empty": 0}, seed=0, slots=8)


# --- diffusion --------------------------------------------------------------------------------------------------


def numbered_store(lengths):
    """Documents whose tokens are their offsets in the flat array."""
    return MemoryStore(tokens=np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))


LENGTHS = [5, 0, 1, 30, 7, 12, 0, 3, 16, 9, 22, 1, 1, 8]


def numbered_loader(**changes):
    arguments = dict(seed=0, rows=7, length=16, truncate_probability=0.0) | changes
    return TextLoader({"x": numbered_store(LENGTHS)}, [(1, {"x": 1})], **arguments)  # 115 tokens: 7 windows


@pytest.mark.parametrize("epoch", range(6))
def test_the_windows_of_an_epoch_tile_the_text_as_a_ring(epoch):
    tokens = numbered_loader().batch(epoch)["tokens"]
    np.testing.assert_array_equal((tokens[:, 1:] - tokens[:, :-1]) % sum(LENGTHS), 1)
    assert len(set(tokens.ravel().tolist())) == 7 * 16  # no token twice


def test_each_epoch_cuts_its_windows_at_another_offset():
    assert len({numbered_loader().batch(epoch)["tokens"][:, 0].min() for epoch in range(8)}) > 4


@pytest.mark.parametrize("epoch", range(6))
def test_segments_are_the_documents_and_positions_restart_in_each(epoch):
    batch = numbered_loader().batch(epoch)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for tokens, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"]):
        segment, position, previous = 0, 0, None
        for token, s, p in zip(tokens, segments, positions):
            # Where the ring closes, the last document meets the first: an ordinary boundary.
            position, segment = (position + 1, segment) if document[token] == previous else (0, segment + 1)
            previous = document[token]
            assert (s, p) == (segment, position)


def test_rows_are_full_unless_truncated():
    batch = numbered_loader().batch(0)
    assert (batch["segment_ids"] > 0).all() and batch["stats"] == {"fill": 1.0, "cut": 0}


def test_truncation_keeps_the_start_of_a_row_and_pads_the_rest():
    whole, cut = numbered_loader().batch(2), numbered_loader(truncate_probability=1.0).batch(2)
    kept = cut["segment_ids"] > 0
    lengths = kept.sum(1)
    assert lengths.min() >= 1 and lengths.max() < 16 and len(set(lengths)) > 2
    np.testing.assert_array_equal(kept, np.arange(16) < lengths[:, None])
    for name in ("tokens", "segment_ids", "positions"):
        np.testing.assert_array_equal(cut[name], whole[name] * kept)
    assert cut["stats"] == {"fill": pytest.approx(kept.mean()), "cut": 7}


def test_rows_are_truncated_with_the_given_probability_to_any_length():
    loader = numbered_loader(truncate_probability=0.2, rows=64)
    kept = np.concatenate([(loader.batch(k)["segment_ids"] > 0).sum(1) for k in range(30)])
    cut = kept[kept < 16]
    assert abs(len(cut) / len(kept) - 0.2) < 5 * np.sqrt(0.16 / len(kept))
    assert set(cut) == set(range(1, 16)) and abs(cut.mean() - 8) < 1.5


def test_less_text_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="the task 'x' has 115 tokens, fewer than one row of 200"):
        numbered_loader(length=200)


def test_a_store_with_more_columns_than_text_is_an_error():
    with pytest.raises(ValueError, match="the task 'x' has the columns query, document; text has one, tokens"):
        TextLoader({"x": MemoryStore(query=[[1] * 99], document=[[1] * 99])}, [(1, {"x": 1})], seed=0, rows=1, length=4)


# --- contrastive ------------------------------------------------------------------------------------------------


def span(batch, slot):
    """The tokens whose mean is the given slot of the span table."""
    row, k = divmod(int(slot), SHAPE.spans)
    return batch["tokens"][row][batch["span_ids"][row] == k + 1]


def drawn(loader, step):
    """The stored examples of the batch of a step, in order."""
    draw = loader.curriculum.draw(step, 0, loader.curriculum.slots)
    return [loader._stores[loader.curriculum.tasks[t]].read([i])[0] for t, _, i in zip(*draw)]


def content(tokens):
    return int(rows.content_ids([tokens])[0])


@pytest.mark.parametrize("stage, rows_per_group", [("pair", 2), ("pair", 20), ("triplet", 5), ("triplet", 20)])
def test_slots_point_at_the_texts_of_each_example_and_ids_are_hashes_of_their_tokens(stage, rows_per_group):
    loader = make(stage, rows_per_group=rows_per_group)
    batch = loader.batch(4)
    shortened = 0
    for i, example in enumerate(drawn(loader, 4)):
        for side in ("query", "document"):
            tokens = span(batch, batch[f"{side}_slots"][i])
            assert len(tokens) and batch[f"{side}_ids"][i] == content(tokens)
            np.testing.assert_array_equal(tokens, example[side][: len(tokens)])
            shortened += len(tokens) < len(example[side])
    assert batch["valid"].all() and batch["stats"]["lost"] == 0
    assert (shortened > 0) == (rows_per_group == 2) or stage == "triplet"
    if stage == "pair":
        assert batch["stats"]["cut"] == shortened
    assert batch["stats"]["fill"] == (batch["segment_ids"] > 0).mean()


def test_each_triplet_has_all_its_negatives_or_a_sample_without_replacement():
    loader = make("triplet", rows_per_group=20)
    counts, samples = set(), set()
    for step in range(6):
        batch = loader.batch(step)
        assert batch["stats"]["cut"] == 0
        for i, example in enumerate(drawn(loader, step)):
            stored = [tuple(x) for x in loading.split(example["negatives"], example["negative_lengths"])]
            valid = batch["negative_valid"][i]
            negatives = [tuple(span(batch, slot)) for slot in batch["negative_slots"][i][valid]]
            assert len(negatives) == min(len(stored), 3)
            assert not valid[len(negatives) :].any() and (batch["negative_slots"][i][~valid] == 0).all()
            remaining = list(stored)
            for negative, identity in zip(negatives, batch["negative_ids"][i][valid]):
                remaining.remove(negative)  # fails if one is used twice
                assert identity == content(negative)
            counts.add(len(stored))
            if len(stored) == 5:
                samples.add(tuple(stored.index(x) for x in negatives))
    assert counts == set(range(6)) and len(samples) > 3


def test_chunks_queries_positives_and_documents_of_the_contextual_stage_are_consistent():
    loader = make("contextual", rows_per_group=12)
    for step in range(4):
        batch = loader.batch(step)
        assert batch["stats"]["cut"] == batch["stats"]["lost"] == 0
        for i, example in enumerate(drawn(loader, step)):
            chunks = loading.split(example["document"], example["chunk_lengths"])
            queries = loading.split(example["queries"], example["query_lengths"])
            c, q = slice(4 * i, 4 * i + 4), slice(2 * i, 2 * i + 2)
            np.testing.assert_array_equal(batch["chunk_valid"][c], np.arange(4) < len(chunks))
            assert (batch["chunk_document"][c] == content(example["document"])).all()
            for slot, identity, chunk in zip(batch["chunk_slots"][c], batch["chunk_ids"][c], chunks):
                np.testing.assert_array_equal(span(batch, slot), chunk)
                assert identity == content(chunk)
            valid = batch["valid"][q]
            np.testing.assert_array_equal(valid, np.arange(2) < len(queries))
            stored = [(tuple(x), p) for x, p in zip(queries, example["positives"])]
            for j in np.flatnonzero(valid) + 2 * i:
                text = span(batch, batch["query_slots"][j])
                chunk, document = batch["positive"][j] - 4 * i, batch["document_slots"][j]
                stored.remove((tuple(text), chunk))  # each at most once, with its own positive
                assert batch["query_ids"][j] == content(text)
                row, segment = divmod(int(document), SHAPE.segments)
                pooled = (batch["segment_ids"][row] == segment + 1) & (batch["span_ids"][row] > 0)
                np.testing.assert_array_equal(batch["tokens"][row][pooled], example["document"])


def contextual_store(**changes):
    """The same document 20 times: chunks of 6, 5 and 4 tokens with one query each."""
    example = dict(
        document=np.arange(10, 25),
        chunk_lengths=[6, 5, 4],
        queries=np.arange(30, 36),
        query_lengths=[2, 2, 2],
        positives=[0, 1, 2],
    )
    return {name: MemoryStore(**{k: [v] * 20 for k, v in (example | changes).items()}) for name in ("a", "b")}


def test_a_query_whose_chunk_was_cut_off_is_invalid_and_counted():
    changes = dict(max_queries_per_document=3, max_chunks=3, separator_id=None)
    loader = make("contextual", stores=contextual_store(), rows_per_group=3, shape=RowShape(32, 16, 16), **changes)
    batch = loader.batch(0)  # a group has 5 documents and 15 queries: 105 tokens in a capacity of 96
    assert batch["stats"]["cut"] == 20 and batch["stats"]["lost"] == 0
    loader = make("contextual", stores=contextual_store(), rows_per_group=2, shape=RowShape(40, 16, 16), **changes)
    batch = loader.batch(0)  # a capacity of 80 tokens: the third chunks are cut off
    assert batch["stats"] == {"fill": pytest.approx((batch["segment_ids"] > 0).mean()), "cut": 20, "lost": 20}
    np.testing.assert_array_equal(batch["valid"], [True, True, False] * 20)
    np.testing.assert_array_equal(batch["chunk_valid"], [True, True, False] * 20)


@pytest.mark.parametrize("stage", ["pair", "triplet"])
def test_a_homogeneous_batch_reads_one_task(stage):
    tasks = contrastive_stores(stage, count=1000)
    loader = make(stage, stores=tasks, homogeneous=True)
    read = []
    for step in range(3, 40):
        before = len(tasks["a"].seen)
        loader.batch(step)
        read.append(len(tasks["a"].seen) - before)
    assert set(read) == {0, 20}


def long_tailed(stage, scale, seed):
    """A store of 2,000 examples whose lengths differ as those of texts do."""
    rng = np.random.default_rng(seed)

    def column(median, count=2000):
        return [
            np.ones(n, np.int32) for n in np.minimum(rng.lognormal(np.log(median), 0.9, count).astype(int) + 1, 3000)
        ]

    if stage == "contextual":
        document = column(100 * scale)
        chunks = [np.diff(np.unique([0, len(d), *rng.integers(0, len(d) + 1, 6)])) for d in document]
        queries = [[1] * rng.integers(1, 7) for _ in document]
        return MemoryStore(
            document=document,
            chunk_lengths=chunks,
            queries=[np.ones(9 * len(q), np.int32) for q in queries],
            query_lengths=[[9] * len(q) for q in queries],
            positives=[[0] * len(q) for q in queries],
        )
    if stage == "distill":
        return MemoryStore(tokens=column(60 * scale), vector=[loading.float_values(np.ones(3))] * 2000)
    columns = dict(query=column(10), document=column(60 * scale))
    if stage == "triplet":
        negatives = [column(60 * scale, rng.integers(0, 6)) for _ in range(2000)]
        columns |= dict(
            negatives=[np.concatenate([np.zeros(0, np.int32), *n]) for n in negatives],
            negative_lengths=[[len(x) for x in n] for n in negatives],
        )
    return MemoryStore(**columns)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("stage", ["pair", "triplet", "contextual", "distill", "late_interaction"])
def test_the_rows_that_are_chosen_from_the_lengths_are_filled_to_95_percent(stage, multiple):
    stores = {"short": long_tailed(stage, 1, 0), "long": long_tailed(stage, 3, 1), "unused": long_tailed(stage, 9, 2)}
    phases = [(1, {"short": 0.8, "long": 0.2, "unused": 0}), (1, {"short": 0.7, "long": 0.3})]
    group = dict(group_size=16 if stage == "contextual" else 64, shape=RowShape(512, 64, 64), stage=stage)
    names = ("num_negatives", "max_queries_per_document", "teacher_dimensions")
    group |= {name: STAGES[stage].get(name, 0) for name in names}
    group |= dict(max_query_tokens=40, max_document_tokens=90) if stage == "late_interaction" else {}
    group |= dict(separator_id=3, max_chunks=8)
    count = choose_rows(stores, phases, multiple=multiple, **group)
    assert count % multiple == 0

    def fill(count):
        loader = ContrastiveLoader(stores, phases, seed=0, groups=1, rows_per_group=count, **group)
        stats = [loader.batch(step)["stats"] for step in range(1, 40)]
        return np.mean([s["fill"] for s in stats]), np.mean([s["cut"] for s in stats])

    (filled, cut), (emptier, fewer) = fill(count), fill(count + multiple)
    assert filled >= 0.945 and emptier < 0.975 and fewer < cut


def test_at_most_a_tenth_of_the_tokens_is_cut_from_homogeneous_groups_of_short_and_of_long_texts():
    stores = {"short": MemoryStore(query=[[1]] * 99, document=[[1] * 9] * 99)}
    stores["long"] = MemoryStore(query=[[1]] * 99, document=[[1] * 199] * 99)
    arguments = dict(stage="pair", group_size=32, shape=RowShape(512, 64, 64))
    phases = [(1, {"short": 0.5, "long": 0.5})]
    assert choose_rows(stores, phases, **arguments) == 5  # 3,360 tokens, with a deviation of 540
    assert 11 <= choose_rows(stores, phases, homogeneous=True, **arguments) <= 12  # 6,400 or 320 tokens


def test_short_texts_are_given_the_rows_that_hold_their_spans_and_segments():
    short = {"a": MemoryStore(query=[[1]] * 100, document=[[2, 3]] * 100)}
    for shape, want in ((RowShape(512, 8, 64), 8), (RowShape(512, 64, 8), 8), (RowShape(4, 64, 64), 16)):
        arguments = dict(stage="pair", group_size=32, shape=shape)
        assert (count := choose_rows(short, [(1, {"a": 1})], **arguments)) >= want
        batch = ContrastiveLoader(short, [(1, {"a": 1})], seed=0, groups=1, rows_per_group=count, **arguments).batch(0)
        assert batch["valid"].all()
    documents = {"a": contextual_store()["a"]}
    arguments = dict(stage="contextual", group_size=9, shape=RowShape(512, 8, 8), max_chunks=3)
    arguments |= dict(max_queries_per_document=3)
    count = choose_rows(documents, [(1, {"a": 1})], **arguments)
    batch = ContrastiveLoader(documents, [(1, {"a": 1})], seed=0, groups=2, rows_per_group=count, **arguments).batch(0)
    assert batch["valid"].all()


def test_rows_cannot_be_chosen_without_examples():
    with pytest.raises(ValueError, match="rows_per_group=0 needs data with examples; none of a, b has any"):
        choose_rows(
            {"a": MemoryStore(query=[], document=[])},
            [(1, {"a": 1, "b": 1})],
            stage="pair",
            group_size=2,
            shape=SHAPE,
        )


def test_starts_and_lengths_of_late_interaction_are_the_tokens_of_each_text_cut_to_the_most_of_its_side():
    stores = {
        "a": MemoryStore(query=[[i] * (i % 8) for i in range(4, 54)], document=[[i] * 13 for i in range(104, 154)])
    }
    loader = ContrastiveLoader(
        stores,
        [(1, {"a": 1})],
        seed=0,
        stage="late_interaction",
        group_size=5,
        groups=2,
        shape=SHAPE,
        **STAGES["late_interaction"],
    )
    batch = loader.batch(3)
    flat, cut = batch["tokens"].reshape(-1), 0
    for i in range(10):
        query, document = (
            flat[batch[f"{side}_starts"][i] :][: batch[f"{side}_lengths"][i]] for side in ("query", "document")
        )
        name = document[0] - 100
        assert (document == name + 100).all() and len(document) == 12  # of 13
        assert (query == name).all() and len(query) == min(name % 8, 5)
        assert batch["valid"][i] == (name % 8 > 0)
        assert batch["document_ids"][i] == rows.content_ids([document])[0]
        cut += 1 + (name % 8 > 5)
    assert batch["stats"]["cut"] == cut > 10


def test_a_text_without_tokens_makes_its_example_invalid_and_counted():
    empty = [[]] * 10
    store = MemoryStore(query=[*empty, *[[5, 6]] * 20], document=[*[[7]] * 20, *empty])
    phases = [(1, {"a": 1})]
    batch = ContrastiveLoader(
        {"a": store}, phases, stage="pair", seed=0, group_size=30, groups=1, rows_per_group=15, shape=SHAPE
    ).batch(0)
    assert batch["valid"].sum() == 10 and batch["stats"]["lost"] == 20


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "dense"}, "stage='dense' must be one of pair, triplet, contextual, distill"),
        ({"max_queries_per_document": 0}, "max_queries_per_document of at least 1, got 0"),
        ({"max_chunks": 9}, r"max_chunks in 1..8 \(the spans of a row\), got 9"),
    ],
)
def test_invalid_arguments_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        make("contextual", **changes)


SPECIAL = np.array([-0.0, 1e-45, -3.4e38, np.pi], np.float32)


def test_a_text_has_the_vector_of_its_teacher_bit_by_bit():
    values = loading.float_values(SPECIAL)
    assert values.dtype == np.int32 and values.min() >= 0 and values.max() < 2**16
    assert loading.floats(values).tobytes() == SPECIAL.tobytes()
    stores = contrastive_stores("distill")
    batch = make("distill", stores=stores).batch(5)
    starts = {  # the row and the position of the embedding in each slot
        slot: np.argwhere(batch["span_ids"][slot // SHAPE.spans] == slot % SHAPE.spans + 1)[:, 0]
        for slot in batch["slots"].tolist()
    }
    known = {
        tuple(tokens): loading.floats(vector).tobytes()
        for store in stores.values()
        for tokens, vector in zip(*store.columns.values())
    }
    for slot, vector in zip(batch["slots"].tolist(), batch["teacher"]):
        assert known[tuple(batch["tokens"][slot // SHAPE.spans, starts[slot]])] == vector.tobytes()
    assert batch["valid"].all() and batch["teacher"].shape == (20, 3)


def test_vectors_of_other_dimensions_than_the_stage_expects_are_an_error():
    stores = contrastive_stores("distill")
    with pytest.raises(ValueError, match="task 'a' has vectors of at most 3 numbers; each .* teacher_dimensions=4"):
        make("distill", stores=stores, teacher_dimensions=4)
    stores["b"].columns["vector"][7] = stores["b"].columns["vector"][7][:4]
    with pytest.raises(ValueError, match="'b' has vectors of 2.98 on average, at most 3 numbers"):
        make("distill", stores=stores)


def test_a_document_with_more_than_max_chunks_is_an_error():
    with pytest.raises(ValueError, match="the task 'a' has a document of 3 chunks, more than batch.max_chunks=2"):
        make("contextual", stores=contextual_store(), max_chunks=2)


def test_a_positive_outside_its_document_is_an_error():
    with pytest.raises(ValueError, match=r"positives \[0 1 3\] must be chunks of their document, 0..2"):
        make("contextual", stores=contextual_store(positives=[0, 1, 3])).batch(0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_store_on_disk_gives_the_same_batches_as_one_in_memory(stage, tmp_path):
    memory = diffusion_stores() if stage == "diffusion" else contrastive_stores(stage)
    disk = {}
    for name, store in memory.items():
        writer = Writer(tmp_path / name, list(store.columns))
        for i in range(len(store)):
            writer.append({column: values[i] for column, values in store.columns.items()})
        writer.close({})
        disk[name] = Store(tmp_path / name)
    for step in (0, 20):
        assert_equal(make(stage, stores=disk).batch(step), make(stage, stores=memory).batch(step))
