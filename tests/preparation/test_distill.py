"""Texts with the vectors of a teacher: from the rows that `embed encode` writes to the store."""

import numpy as np
import pytest
import small

from embed.data.loader import floats
from embed.data.store import Store
from embed.inference import shards
from embed.preparation import examples
from embed.preparation.counts import BAD, BadRowsError
from embed.preparation.prepare import prepare
from embed.preparation.sources import Row, Shard, Source
from embed.preparation.tasks import Counts, Task

GIN = """
mixtures.rates = {"texts": {"own": 1.0}}
own/task.source = @files()
own/files.paths = "{data_root}/vectors.parquet"
own/task.kind = "distill"
own/task.document_length = 8
"""


def write(folder, texts, vectors):
    """The store of texts with vectors, prepared in `folder`."""
    ids, none = list(map(str, range(len(texts)))), [None] * len(texts)
    written = shards.Vectors(ids, ids, none, none, texts, ["{}"] * len(texts), vectors)
    (folder / "vectors.parquet").write_bytes(shards.parquet(written))
    (folder / "data.gin").write_text(GIN)
    arguments = dict(data_root=str(folder), tokenizer=small.tokenizer(), processes=1)
    prepare(folder / "data", gin_file=folder / "data.gin", **arguments)
    return Store(folder / "data" / "tasks" / "own")


def test_a_store_holds_each_text_once_with_its_vector_bit_by_bit(tmp_path):
    texts = small.sentences(30, seed=1)
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    vectors[0], vectors[1] = [-0.0, 1e-45, -3.4e38, np.pi, 1], [0, 0, -1, 0, 0]
    # A copy of a text is dropped, although its vector differs in the last digits.
    store = write(tmp_path, [*texts, texts[0]], np.concatenate([vectors, np.nextafter(vectors[:1], 9)]))
    cut = [tokens[:8].tolist() for tokens in small.tokenizer().encode(texts)]
    assert len(store) == len({tuple(tokens) for tokens in cut}) == 30
    found = 0
    for example in store.read(range(len(store))):
        index = cut.index(example["tokens"].tolist())
        got = floats(example["vector"])
        found += got.tobytes() == vectors[index].tobytes()
        np.testing.assert_allclose(got, vectors[index], rtol=1e-6)
    assert found >= 29


def made(*rows, **fields):
    class Rows(Source):
        def read(self, shard):
            return (Row(f"memory:{i + 1}", row) for i, row in enumerate(rows))

    counts = Counts()
    return list(Task(Rows(), "distill", max_bad=1.0, **fields).examples(Shard(""), counts)), counts


@pytest.mark.parametrize(
    "vector, message",
    [
        (None, "field 'vector' is None, expected a list of numbers"),
        ("1, 2", "field 'vector' is '1, 2', expected a list of numbers"),
        ([], r"field 'vector' is \[\], expected a list of numbers"),
        ([[1.0], [2.0]], "expected a list of numbers"),
        ([1.0, None], "field 'vector' has a number that is not finite in float32"),
        ([1.0, float("nan")], "field 'vector' has a number that is not finite in float32"),
        ([1.0, 1e39], "field 'vector' has a number that is not finite in float32"),
        ([0.0, 0.0], "field 'vector' is a zero vector, which has no direction"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_row_whose_vector_cannot_be_learned_is_bad_and_counted(vector, message):
    result, counts = made({"text": "a", "vector": [1, 2]}, {"text": "b", "vector": vector})
    assert [example["text"] for example in result] == ["a"] and counts.rows[BAD] == 1
    with pytest.raises(BadRowsError, match=f"1 of 2 rows are bad.*memory:2: .*{message}"):
        counts.check(0.001)


def test_a_row_without_a_vector_is_bad():
    result, counts = made({"text": "a"})
    assert not result and counts.errors == ["memory:1: no field 'vector'; there are text"]


def test_columns_name_the_text_and_the_vector():
    columns = {"text": ("title", "body"), "vector": "embedding"}
    row = {"title": "T", "body": "b [1]", "embedding": [1, 2]}
    ((example,), _) = made(row, columns=columns, remove=r"\[\d\]")
    assert example["text"] == "T b" and example["vector"].tolist() == [1, 2]


def test_fields_that_a_distill_task_cannot_have_are_refused():
    with pytest.raises(ValueError, match="task.group_by: a distill task has one text and its vector in each row"):
        made(group_by="text")
    with pytest.raises(ValueError, match="task.remove: 'vector' must be one of text"):
        made(remove={"vector": "x"})
    assert examples.STAGES["distill"] == "distill"
