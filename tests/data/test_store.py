import json
import multiprocessing

import numpy as np
import pytest
import tensorstore as ts

from embed import paths
from embed.data import store as stores
from embed.data.store import Store, Writer, close, read_header, write_bucket

EXAMPLES = [
    {"query": [1, 2, 3], "document": [4]},
    {"query": [], "document": [5, 6]},
    {"query": [7], "document": []},
    {"query": [8, 9], "document": [10, 11, 12]},
    {"query": [], "document": []},
    {"query": [0, 2**31 - 2], "document": [0]},
]
COLUMNS = ["query", "document"]


def ragged(examples, columns=None):
    """{column: (flat values, lengths)} of examples, as `extend` and `write_bucket` take them."""
    result = {}
    for name in columns or examples[0]:
        lengths = np.array([len(example[name]) for example in examples], np.int64)
        result[name] = np.array([v for example in examples for v in example[name]], np.int32), lengths
    return result


def texts(count, seed=0, longest=400):
    """Random documents of one column, as skewed as words are."""
    rng = np.random.default_rng(seed)
    return [{"tokens": (rng.zipf(1.3, n) % 150_000)} for n in rng.integers(0, longest, count)]


def write(path, examples, buckets=1, info=()):
    """A store whose examples are divided evenly, in order."""
    columns = list(examples[0])
    parts = np.array_split(np.arange(len(examples)), buckets)
    summaries = [write_bucket(path, columns, b, ragged([examples[i] for i in p], columns)) for b, p in enumerate(parts)]
    close(path, columns, summaries, dict(info))
    return Store(path)


def objects(path):
    """{name: bytes} of the files of a store."""
    return {name: file.read_bytes() for name, file in paths.files(path).items()}


def plain(examples):
    return [{name: np.asarray(values).tolist() for name, values in example.items()} for example in examples]


@pytest.fixture
def path(tmp_path):
    writer = Writer(tmp_path / "store", COLUMNS)
    for example in EXAMPLES:
        writer.append({name: np.array(values, np.int32) for name, values in example.items()})
    writer.close({"dropped": {"no tokens": 3}})
    return tmp_path / "store"


def test_examples_are_returned_in_the_order_of_the_indices(path):
    store = Store(path)
    assert len(store) == 6 and store.columns == COLUMNS and store.info == {"dropped": {"no tokens": 3}}
    for indices in ([3, 0, 2, 1, 3, 5, 4], [4], [4, 4], [0, 1, 2, 3, 4, 5], []):
        read = store.read(indices)
        assert plain(read) == [EXAMPLES[i] for i in indices]
        assert all(values.dtype == np.int32 for example in read for values in example.values())


@pytest.mark.parametrize("buckets", [2, 3, 6, 9])
def test_buckets_hold_the_examples_of_a_store_in_order(buckets, tmp_path):
    store = write(tmp_path, EXAMPLES, buckets)
    assert len(store) == 6 and len(read_header(tmp_path)["buckets"]) == buckets
    assert plain(store.read(range(6))) == EXAMPLES
    assert plain(store.read([5, 0, 3, 2])) == [EXAMPLES[i] for i in (5, 0, 3, 2)]


def test_the_header_has_the_lengths_of_each_column(path, tmp_path):
    for store in (Store(path), write(tmp_path / "three", EXAMPLES, 3)):
        lengths = store.lengths("query")
        assert (lengths.max, lengths.total, lengths.mean) == (3, 8, 8 / 6)
        assert (lengths.lengths.tolist(), lengths.counts.tolist()) == ([0, 1, 2, 3], [2, 1, 2, 1])
        assert store.num_values("document") == 7 and store.num_values() == 15


def test_long_lengths_are_rounded_down_by_at_most_3_percent(tmp_path):
    sizes = np.array([63, 64, 65, 100, 127, 128, 129, 1000, 4095, 4096, 99_999])
    store = write(tmp_path, [{"tokens": np.zeros(n, np.int32)} for n in sizes], 2)
    lengths = store.lengths("tokens")
    rounded = np.repeat(lengths.lengths, lengths.counts)
    assert rounded[:3].tolist() == [63, 64, 64] and lengths.max == 99_999 and lengths.total == sizes.sum()
    assert (rounded <= sizes).all() and (rounded >= sizes * 0.97).all()


@pytest.mark.parametrize("buckets", [1, 3])
def test_windows_read_the_documents_as_a_ring_and_show_where_they_start(buckets, tmp_path):
    examples = texts(40, longest=30)
    store = write(tmp_path, examples, buckets)
    flat = np.concatenate([e["tokens"] for e in examples])
    is_start = np.concatenate([np.arange(len(e["tokens"])) == 0 for e in examples])
    total = len(flat)
    starts = np.array([0, 5, total // 2, total - 3, total - 1])
    ring = (starts[:, None] + np.arange(100)) % total
    for got, want in zip(store.windows(starts, 100), (flat[ring], is_start[ring])):
        np.testing.assert_array_equal(got, want)
    values, begins = store.window(total - 3, total + 4)
    assert values.tolist() == [*flat[-3:], *flat[:4]] and begins.tolist() == [*is_start[-3:], *is_start[:4]]


def test_extending_by_many_examples_equals_appending_each(path, tmp_path):
    writer = Writer(tmp_path / "bulk", COLUMNS)
    writer.extend(ragged(EXAMPLES))
    writer.close({"dropped": {"no tokens": 3}})
    assert objects(tmp_path / "bulk") == objects(path)


def test_a_writer_begins_a_new_bucket_when_one_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BUCKET", 1000)
    examples = texts(60)
    writer = Writer(tmp_path, ["tokens"])
    for example in examples:
        writer.append(example)
    writer.close({})
    assert len(read_header(tmp_path)["buckets"]) > 5
    assert plain(Store(tmp_path).read(range(60))) == plain(examples)


def test_a_bucket_has_the_same_bytes_whoever_writes_it_and_however_often(tmp_path):
    examples = texts(500)
    write(tmp_path / "a", examples, 4)
    halves = [ragged(examples[i : i + 125]) for i in range(0, 500, 125)]
    write_bucket(tmp_path / "b", ["tokens"], 2, ragged(texts(900, seed=1)))  # to be replaced
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = [(tmp_path / "b", ["tokens"], b, halves[b]) for b in (3, 1)]
        summaries = pool.starmap(write_bucket, arguments)
    summaries += [write_bucket(tmp_path / "b", ["tokens"], b, halves[b]) for b in (2, 0, 2)][1:]
    close(tmp_path / "b", ["tokens"], summaries, {})
    assert objects(tmp_path / "a") == objects(tmp_path / "b")


def test_a_bucket_that_is_written_again_is_complete_at_all_times(tmp_path, monkeypatch):
    monkeypatch.setitem(stores.ARRAYS, "values", ("int32", 1 << 10, 1 << 8, stores.ARRAYS["values"][3]))
    examples, seen, transaction = texts(300), [], ts.Transaction
    write_bucket(tmp_path, ["tokens"], 0, ragged(examples))
    before = objects(tmp_path)
    assert len(before) > 5

    def observed():
        seen.append(objects(tmp_path))
        return transaction()

    with monkeypatch.context() as patch:
        patch.setattr(ts, "Transaction", observed)
        write_bucket(tmp_path, ["tokens"], 0, ragged(examples))
    assert len(seen) > 3 and all(content == before for content in [*seen, objects(tmp_path)])


def test_nothing_stays_of_a_bucket_that_is_overwritten_by_a_shorter_one(tmp_path, monkeypatch):
    monkeypatch.setitem(stores.ARRAYS, "values", ("int32", 1 << 10, 1 << 8, stores.ARRAYS["values"][3]))
    for name, counts in (("again", (300, 30, 0, 30)), ("once", (30,))):
        for count in counts:
            write_bucket(tmp_path / name, ["tokens"], 0, ragged(texts(300)[:count], ["tokens"]))
    assert objects(tmp_path / "again") == objects(tmp_path / "once")


def test_the_digest_is_that_of_the_examples_in_their_columns(path, tmp_path):
    def digest(name, examples):
        write(tmp_path / name, examples)
        return read_header(tmp_path / name)["digest"]

    original = digest("same", EXAMPLES)
    assert read_header(path)["digest"] == original
    moved = [{"query": e["query"] + e["document"], "document": []} for e in EXAMPLES]
    renamed = [{"query": e["query"], "text": e["document"]} for e in EXAMPLES]
    assert len({original, digest("moved", moved), digest("order", EXAMPLES[::-1]), digest("name", renamed)}) == 4


def test_a_store_that_was_never_closed_does_not_exist(tmp_path):
    Writer(tmp_path / "store", ["tokens"]).append({"tokens": np.array([1])})
    write_bucket(tmp_path / "store", ["tokens"], 0, ragged(texts(3)))
    with pytest.raises(FileNotFoundError, match="never finished"):
        Store(tmp_path / "store")


def test_a_store_needs_the_summary_of_each_bucket_once(tmp_path):
    summaries = [write_bucket(tmp_path, ["tokens"], b, ragged(texts(3))) for b in (0, 2)]
    with pytest.raises(ValueError, match=r"one summary for each bucket from 0, got \[0, 2\]"):
        close(tmp_path, ["tokens"], summaries, {})


def test_a_store_without_examples_can_be_opened(tmp_path):
    Writer(tmp_path, ["tokens"]).close({})
    assert len(Store(tmp_path)) == 0 and Store(tmp_path).lengths("tokens").mean == 0


def test_a_complete_store_is_not_overwritten(path):
    with pytest.raises(FileExistsError, match="complete store already"):
        Writer(path, ["query"])


def test_an_example_with_wrong_columns_or_values_is_an_error(tmp_path):
    writer = Writer(tmp_path / "store", ["tokens"])
    with pytest.raises(ValueError, match=r"columns \['tokens'\], the example has \['token'\]"):
        writer.append({"token": np.array([1])})
    for value in (-1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"column 'tokens' must be in 0 … 2.31 - 2, got {value}"):
            writer.append({"tokens": np.array([value])})


def test_an_index_outside_the_store_is_an_error(path):
    with pytest.raises(IndexError, match="examples 6 … 6 must be in 0 … 5"):
        Store(path).read([6])
    with pytest.raises(IndexError, match="windows at 15 … 15 must start in 0 … 14"):
        Store(path).windows([15], 1)


@pytest.mark.parametrize("array", ["values", "offsets"])
def test_a_changed_or_missing_chunk_and_a_broken_header_are_errors_that_name_the_store(array, path):
    (chunk,) = (p for p in (path / array / "c").rglob("*") if p.is_file())
    content = chunk.read_bytes()
    for position in (0, -1):  # in a chunk, in the index
        changed = bytearray(content)
        changed[position] ^= 1
        chunk.write_bytes(changed)
        with pytest.raises(ValueError, match=f"the prepared store {path} is damaged"):
            Store(path, cache_bytes=0).read([0])
    chunk.unlink()
    with pytest.raises(ValueError, match=f"{path} is damaged: {array} are missing"):
        Store(path, cache_bytes=0).read([0])
    if array == "values":
        with pytest.raises(ValueError, match=f"{path} is damaged: values are missing"):
            Store(path, cache_bytes=0).windows([0], 3)
    (path / "info.json").write_text(json.dumps({"columns": ["query"]}))
    with pytest.raises(ValueError, match="info.json is damaged"):
        Store(path)


def test_chunks_that_are_missing_inside_an_object_are_an_error(tmp_path):
    """The object exists, but the values of some examples were never written."""
    store = write(tmp_path, texts(100))
    array = stores._create(tmp_path, "values")
    array[0, 4096:8192].write(stores.MISSING).result()
    with pytest.raises(ValueError, match="damaged: values are missing or wrong"):
        store.read(range(100))


def read_bytes():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_a_cold_read_of_an_example_reads_kilobytes_and_a_warm_one_nothing(tmp_path):
    """An object of full size: 4 million values; the same for every object of a larger store."""
    rng = np.random.default_rng(0)
    lengths = np.full((1 << 22) // 200 + 1, 200)
    values = (rng.zipf(1.2, lengths.sum()) % 150_000).astype(np.int32)
    close(tmp_path, ["tokens"], [write_bucket(tmp_path, ["tokens"], 0, {"tokens": (values, lengths)})], {})
    assert (tmp_path / "values/c/0/0").stat().st_size > 4e6
    for cache_bytes in (10**6, 10**6 + 1):  # each has a cache of its own
        store, before = Store(tmp_path, cache_bytes), read_bytes()
        for index, limit in ((10_000, 64 * 1024), (10_000, 0), (10_001, 32 * 1024)):
            store.read([index])
            assert read_bytes() - before <= limit
            before = read_bytes()


def test_the_size_of_a_token_is_below_two_bytes_for_a_skewed_vocabulary_of_150000(tmp_path):
    rng = np.random.default_rng(0)
    words = 150_000 * rng.random((1 << 20) // 200) ** 8  # documents repeat their own words
    documents = [(words[rng.integers(0, len(words), 60)].astype(int))[rng.integers(0, 60, 200)] for _ in range(5000)]
    write(tmp_path, [{"tokens": document} for document in documents])
    assert sum(map(len, objects(tmp_path / "values").values())) < 2e6


def test_a_header_of_a_thousand_buckets_and_250_million_examples_opens_without_reading_them(tmp_path):
    summary = write_bucket(tmp_path, ["tokens"], 0, ragged(texts(100)))
    claimed = [summary | {"bucket": b, "examples": 250_000, "values": 50_000_000} for b in range(1000)]
    close(tmp_path, ["tokens"], claimed, {})
    before = read_bytes()
    assert len(Store(tmp_path)) == 250_000_000
    assert read_bytes() - before < 100_000


@pytest.mark.parametrize("cache_bytes, is_evicted", [(10_000_000, False), (600_000, True)])
def test_the_cache_limit_holds_for_all_stores_together(cache_bytes, is_evicted, tmp_path):
    for name in "abc":  # 400 kB each
        write(tmp_path / name, texts(500, longest=400))
    opened = [Store(tmp_path / name, cache_bytes) for name in "abc"]
    for store in opened:
        store.read(range(500))
    before = read_bytes()
    opened[0].read(range(500))
    assert (read_bytes() > before) == is_evicted


def test_a_store_in_a_bucket_equals_one_on_a_disk(bucket, tmp_path):
    examples = texts(300)
    for path in (f"{bucket}/store", tmp_path):
        write(path, examples, 3)
    assert objects(f"{bucket}/store") == objects(tmp_path)
    assert plain(Store(f"{bucket}/store").read([250, 3, 4, 120])) == plain(examples[i] for i in (250, 3, 4, 120))
