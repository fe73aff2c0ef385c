import json

import numpy as np
import pytest
import small

from embed.inference import Index, index, quantize


def vectors(count, dimensions=24, precision="float32", seed=0):
    return quantize(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32), precision)


def bits(packed):
    return np.unpackbits(np.asarray(packed).view(np.uint8), axis=1).astype(int)


def by_hand(scores, k):
    """The k best columns of each row, the lower index first among equals."""
    order = np.array([sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores])
    return np.take_along_axis(scores, order, 1), order


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_floats_and_int8_are_ranked_by_cosine(precision):
    stored, queries = vectors(60, precision=precision), vectors(7, precision=precision, seed=1)
    a, b = queries.astype(np.float64), stored.astype(np.float64)
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    expected, order = by_hand(cosine, 9)
    scores, indices = Index(stored, precision).search(queries, 9)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.dtype == np.float32 and indices.dtype == np.int32


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dimensions", [24, 128])
def test_bits_are_ranked_by_the_number_that_differ(precision, dimensions):
    stored, queries = (vectors(n, dimensions, precision, seed=n) for n in (60, 7))
    differing = (bits(queries)[:, None] != bits(stored)).sum(-1)
    expected, order = by_hand(-differing, 60)
    scores, indices = Index(stored, precision).search(queries, 60)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(indices, order)


def test_int8_products_are_added_up_without_rounding():
    rng = np.random.default_rng(0)
    stored = rng.integers(120, 128, (40, 3000)).astype(np.int8)  # dot products near 4.6e7, far beyond 2^24
    a = stored.astype(np.int64)
    found = np.asarray(index._cosine(stored, stored, exact=True)).astype(np.float64)
    exact = (a @ a.T) / np.sqrt(np.outer(*[(a * a).sum(1)] * 2))
    np.testing.assert_allclose(found, exact, rtol=3e-7)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_blocks_change_nothing(precision, monkeypatch):
    stored, queries = vectors(50, precision=precision), vectors(11, precision=precision, seed=1)
    stored[20:30] = stored[:10]  # equal scores on both sides of a block's edge
    whole = Index(stored, precision).search(queries, 12)
    monkeypatch.setattr(index, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(index, "BLOCK_VECTORS", 7)
    for found, expected in zip(Index(stored, precision).search(queries, 12), whole):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_of_equal_scores_the_lower_index_comes_first(precision):
    one = vectors(1, precision=precision)
    _, indices = Index(np.repeat(one, 6, 0), precision).search(one, 4)
    assert indices.tolist() == [[0, 1, 2, 3]]


def test_a_zero_vector_is_found_last_with_cosine_zero():
    scores, indices = Index(np.array([[0, 0], [3, 4]], np.int8), "int8").search(np.array([[3, 4]], np.int8), 2)
    assert indices.tolist() == [[1, 0]]
    np.testing.assert_allclose(scores, [[1, 0]], atol=1e-7)


def test_more_results_than_vectors_gives_all_of_them():
    scores, indices = Index(vectors(3), "float32").search(vectors(2), 10)
    assert scores.shape == indices.shape == (2, 3)


def test_an_index_is_loaded_as_it_was_saved(tmp_path):
    made = Index(
        vectors(3, precision="binary"),
        "binary",
        ids=["a", "b", "c"],
        texts=["x", "y", "ü"],
        truncate_dim=24,
        model={"path": "m", "digest": "d"},
    )
    made.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.vectors, made.vectors, strict=True)
    for name in ("precision", "ids", "texts", "truncate_dim", "model"):
        assert getattr(loaded, name) == getattr(made, name)
    assert sorted(f.name for f in (tmp_path / "index").iterdir()) == ["index.json", "vectors.safetensors"]


def test_a_damaged_or_missing_index_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at .*: expected a folder with index.json"):
        Index.load(tmp_path)
    Index(vectors(3), "float32").save(tmp_path / "i")
    data = (tmp_path / "i" / "vectors.safetensors").read_bytes()
    (tmp_path / "i" / "vectors.safetensors").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="is not a usable index"):
        Index.load(tmp_path / "i")


@pytest.mark.parametrize(
    ("stored", "precision", "message"),
    [
        (vectors(0), "float32", "empty corpus"),
        (vectors(2), "int8", r"stored vectors are float32\[2, 24\], int8 has int8\[N, D\]"),
        (vectors(2)[0], "float32", r"stored vectors are float32\[24\]"),
        (vectors(2), "float64", "precision 'float64' must be one of"),
        (np.array([[1, np.nan]], np.float32), "float32", "1 of 1 are not finite"),
    ],
)
def test_vectors_that_are_not_of_the_precision_are_refused(stored, precision, message):
    with pytest.raises(ValueError, match=message):
        Index(stored, precision)


def test_queries_that_do_not_fit_the_vectors_are_refused():
    with pytest.raises(ValueError, match="queries have 16 numbers each, stored vectors 24"):
        Index(vectors(3), "float32").search(vectors(1, 16), 1)
    with pytest.raises(ValueError, match="2 ids for 3 vectors"):
        Index(vectors(3), "float32", ids=["a", "b"])
    with pytest.raises(ValueError, match="k=0 must be positive"):
        Index(vectors(3), "float32").search(vectors(1), 0)


# Corpus files


def test_a_corpus_holds_texts_and_chunked_documents(tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "text": "one"}, "", {"_id": "b", "chunks": ["two", "", "four"]})
    corpus = index.read_corpus(path)
    assert corpus.documents == [["one"], ["two", "", "four"]]
    assert corpus.ids == ["a", "b#0", "b#1", "b#2"]
    assert corpus.texts == ["one", "two", "", "four"]


def test_an_index_of_a_corpus_finds_texts_and_chunks_in_context(tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "text": "the file"}, {"_id": "b", "chunks": ["open", "a list of"]})
    encoder = small.encoder()
    built = index.build(encoder, index.read_corpus(path), precision="int8")
    expected = encoder.encode_documents([["the file"], ["open", "a list of"]], precision="int8")
    np.testing.assert_array_equal(built.vectors, np.concatenate(expected))
    assert built.search(encoder.encode(["the file"], precision="int8"), 1)[1] == [[0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is an empty corpus"),
        ([{"_id": "a", "text": "x"}, "{oops"], "line 2: invalid JSON"),
        (["[1]"], r"line 1: expected an object, got '\[1\]'"),
        ([{"text": "x"}], 'line 1: "_id" is None, expected a string'),
        ([{"_id": "a"}], "line 1 .*_id 'a'.* has no text"),
        ([{"_id": "a", "text": " "}], "has no text"),
        ([{"_id": "a", "chunks": ["", ""]}], "has no text"),
        ([{"_id": "a", "chunks": "x"}], "has no text"),
        ([{"_id": "a", "text": 3}], "has no text"),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], "the id 'a' stands for more than one text"),
    ],
)
def test_a_bad_corpus_is_one_sentence_that_names_the_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        index.read_corpus(lines(tmp_path / "c", *rows) if rows else lines(tmp_path / "c", ""))


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.jsonl: expected JSON lines"):
        index.read_corpus(tmp_path / "nothing.jsonl")


def test_an_index_of_other_weights_is_refused():
    encoder = small.encoder(digest="1" * 64)
    made = Index(vectors(2), "float32", model={"path": "old", "digest": "2" * 64})
    with pytest.raises(ValueError, match="made with the model at old .digest 222222222222., not with"):
        made.check_model(encoder)
    Index(vectors(2), "float32", model={"path": "old", "digest": "1" * 64}).check_model(encoder)
