import json

import numpy as np
import pytest

from embed.data.store import Store, Writer

EXAMPLES = [
    {"query": [1, 2, 3], "document": [4]},
    {"query": [], "document": [5, 6]},
    {"query": [7], "document": []},
    {"query": [8, 9], "document": [10, 11, 12]},
]


@pytest.fixture
def path(tmp_path):
    writer = Writer(tmp_path / "store", ["query", "document"])
    for example in EXAMPLES:
        writer.append({name: np.array(values, np.int32) for name, values in example.items()})
    writer.close({"dropped": {"no tokens": 3}})
    return tmp_path / "store"


def test_examples_are_returned_in_the_order_of_the_indices(path):
    store = Store(path)
    assert len(store) == 4 and store.columns == ["query", "document"] and store.info == {"dropped": {"no tokens": 3}}
    for index, example in zip([3, 0, 2, 1, 3], store.read([3, 0, 2, 1, 3])):
        assert {name: values.tolist() for name, values in example.items()} == EXAMPLES[index]
        assert all(values.dtype == np.int32 for values in example.values())


def test_a_column_is_one_flat_array_with_offsets(path):
    store = Store(path)
    assert store.offsets("query").tolist() == [0, 3, 3, 4, 6]
    assert store.lengths("document").tolist() == [1, 2, 0, 3]
    assert store.flat("query", 2, 5).tolist() == [3, 7, 8]


def test_columns_above_the_memory_limit_are_read_from_disk_with_the_same_result(path, monkeypatch):
    monkeypatch.setattr("embed.data.store.MEMORY_BYTES", 0)
    store = Store(path)
    assert [e["document"].tolist() for e in store.read(range(4))] == [e["document"] for e in EXAMPLES]
    assert store.flat("document", 1, 4).tolist() == [5, 6, 10]


def test_extending_by_many_examples_equals_appending_each(path, tmp_path):
    writer = Writer(tmp_path / "bulk", ["query", "document"])
    columns = {}
    for name in ("query", "document"):
        lengths = np.array([len(e[name]) for e in EXAMPLES])
        columns[name] = (np.concatenate([np.array(e[name], np.int32) for e in EXAMPLES]), lengths)
    writer.extend(columns)
    writer.close({})
    one, many = Store(path), Store(tmp_path / "bulk")
    for a, b in zip(one.read(range(4)), many.read(range(4))):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_store_that_was_never_closed_does_not_exist(tmp_path):
    Writer(tmp_path / "store", ["tokens"]).append({"tokens": np.array([1])})
    with pytest.raises(FileNotFoundError, match="never finished"):
        Store(tmp_path / "store")


def test_a_complete_store_is_not_overwritten(path):
    with pytest.raises(FileExistsError, match="complete store already"):
        Writer(path, ["query"])


def test_an_example_with_wrong_columns_or_values_is_an_error(tmp_path):
    writer = Writer(tmp_path / "store", ["tokens"])
    with pytest.raises(ValueError, match=r"columns \['tokens'\], the example has \['token'\]"):
        writer.append({"token": np.array([1])})
    with pytest.raises(ValueError, match="column 'tokens' must be in 0 … 2.31 - 1, got -1"):
        writer.append({"tokens": np.array([-1])})


def test_an_index_outside_the_store_is_an_error(path):
    with pytest.raises(IndexError, match="examples 4 … 4 must be in 0 … 3"):
        Store(path).read([4])
    with pytest.raises(IndexError, match="window 5 … 7 must be inside the 6 values of column 'query'"):
        Store(path).flat("query", 5, 7)


def test_a_changed_or_missing_chunk_and_a_broken_header_are_errors(path):
    chunk = next(p for p in (path / "query").rglob("*") if p.is_file() and p.name != "zarr.json")
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="damaged in column 'query'"):
        Store(path).read([0])
    chunk.unlink()
    with pytest.raises(ValueError, match="a chunk is missing"):
        Store(path).read([0])
    (path / "info.json").write_text(json.dumps({"columns": ["query"]}))
    with pytest.raises(ValueError, match="info.json is damaged"):
        Store(path)
