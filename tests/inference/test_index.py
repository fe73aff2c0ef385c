import json

import numpy as np
import pytest
import small

from embed.inference import Index, index, quantize
from embed.inference import corpus as corpora
from embed.inference.scores import cosines


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
def test_bits_are_ranked_by_the_number_of_differing_bits(precision, dimensions):
    stored, queries = (vectors(n, dimensions, precision, seed=n) for n in (60, 7))
    differing = (bits(queries)[:, None] != bits(stored)).sum(-1)
    expected, order = by_hand(-differing, 60)
    scores, indices = Index(stored, precision).search(queries, 60)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(indices, order)


def test_int8_products_are_summed_without_rounding():
    rng = np.random.default_rng(0)
    stored = rng.integers(120, 128, (40, 3000)).astype(np.int8)  # dot products near 4.6e7, far beyond 2^24
    a = stored.astype(np.int64)
    cosine = np.asarray(cosines(stored, stored, exact=True)).astype(np.float64)
    exact = (a @ a.T) / np.sqrt(np.outer(*[(a * a).sum(1)] * 2))
    np.testing.assert_allclose(cosine, exact, rtol=3e-7)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_size_of_blocks_does_not_change_results(precision, monkeypatch):
    stored, queries = vectors(50, precision=precision), vectors(11, precision=precision, seed=1)
    stored[20:30] = stored[:10]  # equal scores on both sides of a block's edge
    whole = Index(stored, precision).search(queries, 12)
    monkeypatch.setattr(index, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(index, "BLOCK_VECTORS", 7)
    for result, expected in zip(Index(stored, precision).search(queries, 12), whole):
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_on_ties_the_lower_index_comes_first(precision):
    one = vectors(1, precision=precision)
    _, indices = Index(np.repeat(one, 6, 0), precision).search(one, 4)
    assert indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_zero_vector_is_never_found_and_the_others_keep_their_indices(precision):
    stored = vectors(6, precision=precision)
    stored[[0, 3]] = 0
    made = Index(stored, precision)
    scores, indices = made.search(stored[[4, 5]], 10)
    assert made.empty.tolist() == [0, 3] and len(made) == 6
    assert sorted(indices[0]) == [1, 2, 4, 5] and indices[:, 0].tolist() == [4, 5]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)


def test_packed_bits_are_never_found_if_marked_empty():
    stored = np.array([[255], [255], [1]], np.uint8)
    assert Index(stored, "ubinary").search(stored[:1], 3)[1].tolist() == [[0, 1, 2]]
    assert Index(stored, "ubinary", empty=[0]).search(stored[:1], 3)[1].tolist() == [[1, 2]]


def test_an_index_of_only_empty_vectors_is_refused():
    with pytest.raises(ValueError, match="none of its 2 vectors has a text"):
        Index(np.zeros((2, 8), np.int8), "int8")


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_an_empty_chunk_of_a_corpus_has_an_id_and_is_never_found(precision, tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "chunks": ["the file", "", "a list"]}, {"_id": "b", "text": "open"})
    encoder = small.encoder(digest="1")
    index.build(encoder, corpora.read_corpus(path), precision=precision).save(tmp_path / "i")
    made = Index.load(tmp_path / "i")
    assert made.ids == ["a#0", "a#1", "a#2", "b"] and made.empty.tolist() == [1]
    assert sorted(made.search(encoder.encode(["open"], precision=precision), 9)[1][0]) == [0, 2, 3]


def test_k_above_the_number_of_vectors_gives_all_of_them():
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
        empty=[2],
        max_length=9,
        cut=1,
    )
    made.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.vectors, made.vectors, strict=True)
    np.testing.assert_array_equal(loaded.empty, made.empty, strict=True)
    for name in ("precision", "ids", "texts", "truncate_dim", "model", "max_length", "cut"):
        assert getattr(loaded, name) == getattr(made, name)
    assert sorted(f.name for f in (tmp_path / "index").iterdir()) == ["index.json", "vectors.safetensors"]


def test_a_damaged_or_missing_index_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at .*: expected a folder with index.json"):
        Index.load(tmp_path)
    folder = tmp_path / "i"
    Index(vectors(3), "float32").save(folder)
    data = (folder / "vectors.safetensors").read_bytes()
    (folder / "vectors.safetensors").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="i/vectors.safetensors is not the file that index.json was written with"):
        Index.load(folder)


def test_an_index_with_the_vectors_of_another_index_is_refused(tmp_path):
    for seed in (0, 1):
        Index(vectors(3, seed=seed), "float32").save(tmp_path / str(seed))
    (tmp_path / "1" / "vectors.safetensors").replace(tmp_path / "0" / "vectors.safetensors")
    with pytest.raises(ValueError, match="is not the file that index.json was written with"):
        Index.load(tmp_path / "0")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("truncate_dim", 16, "was changed after it was written"),
        ("ids", ["x", "b", "c"], "was changed after it was written"),
        ("format_version", 1, "has format version 1, expected 2: make the index again"),
        ("format", "other", "its format is not 'embed-index'"),
    ],
)
def test_an_index_whose_description_was_changed_is_refused(tmp_path, field, value, message):
    Index(vectors(3), "float32", ids=["a", "b", "c"]).save(tmp_path / "i")
    file = tmp_path / "i" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path / "i")


def test_an_index_is_replaced_only_if_asked_and_without_other_files_in_its_folder(tmp_path):
    folder, new = tmp_path / "i", Index(vectors(3), "float32")
    Index(vectors(2), "float32").save(folder)
    with pytest.raises(ValueError, match="i exists: choose another path, or replace it with --overwrite"):
        new.save(folder)
    new.save(folder, overwrite=True)
    assert len(Index.load(folder)) == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="i holds notes.txt, which is not part of an index"):
        Index(vectors(4), "float32").save(folder, overwrite=True)
    assert len(Index.load(folder)) == 3 and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("stored", "precision", "message"),
    [
        (vectors(0), "float32", "empty corpus"),
        (vectors(2), "int8", r"stored vectors are float32\[2, 24\], int8 needs int8\[N, D\]"),
        (vectors(2)[0], "float32", r"stored vectors are float32\[24\]"),
        (vectors(2), "float64", "precision 'float64' must be one of"),
        (np.array([[1, np.nan]], np.float32), "float32", "1 of 1 are not finite"),
    ],
)
def test_vectors_of_another_dtype_or_shape_are_refused(stored, precision, message):
    with pytest.raises(ValueError, match=message):
        Index(stored, precision)


def test_queries_ids_and_k_that_do_not_match_the_vectors_are_refused():
    with pytest.raises(ValueError, match="queries have 16 numbers each, stored vectors 24"):
        Index(vectors(3), "float32").search(vectors(1, 16), 1)
    with pytest.raises(ValueError, match="2 ids for 3 vectors"):
        Index(vectors(3), "float32", ids=["a", "b"])
    for k in (0, -1, 2.0, "2", True):
        with pytest.raises(ValueError, match=f"k={k!r} must be positive, an int"):
            Index(vectors(3), "float32").search(vectors(1), k)


@pytest.mark.parametrize("empty", [[5], [-1], [3], [0.0], ["0"], [True], [None], np.array([3.0])])
def test_empty_vectors_outside_of_the_index_are_refused(empty):
    with pytest.raises(ValueError, match="empty contains .*: expected indices of vectors, 0..2"):
        Index(vectors(3), "float32", empty=empty)


@pytest.mark.parametrize("precision, stored", [("float32", 24), ("int8", 24), ("binary", 24), ("ubinary", 24)])
def test_a_truncate_dim_that_contradicts_the_width_of_the_vectors_is_refused(precision, stored):
    made = Index(vectors(3, precision=precision), precision, truncate_dim=np.int64(stored))
    assert made.truncate_dim == stored and type(made.truncate_dim) is int
    for other in (8, 3, 25, 0, 24.0, "24"):
        with pytest.raises(ValueError, match=f"truncate_dim={other!r}, but the stored vectors have 24 dimensions"):
            Index(vectors(3, precision=precision), precision, truncate_dim=other)


MISSING = object()


@pytest.mark.parametrize(
    "field, value",
    [
        *((name, MISSING) for name in index.FIELDS),
        *((name, value) for name in index.FIELDS for value in (5.5, "x", [None], {"sha256": 3, "digest": 4})),
    ],
)
def test_an_index_with_a_digest_but_a_wrong_field_is_refused(tmp_path, field, value):
    Index(vectors(3), "float32", ids=["a", "b", "c"], texts=["x", "y", "z"]).save(tmp_path / "i")
    file = tmp_path / "i" / "index.json"
    info = json.loads(file.read_text()) | {field: value}
    info = {name: value for name, value in info.items() if value is not MISSING and name != "sha256"}
    file.write_text(json.dumps(info | {"sha256": index._digest(info)}))
    with pytest.raises(ValueError, match=f"index.json: {field} is .*, expected .*: make the index again"):
        Index.load(tmp_path / "i")


def test_an_index_whose_fields_contradict_each_other_is_refused(tmp_path):
    Index(vectors(3), "float32").save(tmp_path / "i")
    file = tmp_path / "i" / "index.json"
    info = json.loads(file.read_text()) | {"ids": ["a"]}
    del info["sha256"]
    file.write_text(json.dumps(info | {"sha256": index._digest(info)}))
    with pytest.raises(ValueError, match="index.json does not describe its vectors: 1 ids for 3 vectors"):
        Index.load(tmp_path / "i")


@pytest.mark.parametrize("codec, name", [("utf-32", "UTF-32"), ("utf-32-be", "UTF-32"), ("utf-16", "UTF-16")])
def test_a_corpus_in_another_unicode_encoding_is_named(tmp_path, codec, name):
    for text in ('{"_id": "a", "text": "x"}', '\ufeff{"_id": "a", "text": "x"}'):
        for coding in {codec, codec.replace("-be", "-le")}:
            (tmp_path / "c").write_bytes(text.encode(coding))
            with pytest.raises(ValueError, match=f"c is {name}, expected JSON lines in UTF-8"):
                corpora.read_corpus(tmp_path / "c")


def test_an_index_of_a_corpus_finds_texts_and_chunks_in_context(tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "text": "the file"}, {"_id": "b", "chunks": ["open", "a list of"]})
    encoder = small.encoder()
    built = index.build(encoder, corpora.read_corpus(path), precision="int8")
    expected = encoder.encode_documents([["the file"], ["open", "a list of"]], precision="int8")
    np.testing.assert_array_equal(built.vectors, np.concatenate(expected))
    assert built.search(encoder.encode(["the file"], precision="int8"), 1)[1] == [[0]]


def test_an_index_of_another_or_an_unknown_model_is_refused():
    encoder = small.encoder(digest="1" * 64)
    made = Index(vectors(2), "float32", model={"path": "old", "digest": "2" * 64})
    with pytest.raises(ValueError, match="made with the model at old .digest 222222222222., not with"):
        made.check_model(encoder)
    with pytest.raises(ValueError, match="the index does not say which model made it"):
        Index(vectors(2), "float32").check_model(encoder)
    with pytest.raises(ValueError, match="the model has no digest"):
        made.check_model(small.encoder())
    Index(vectors(2), "float32", model={"path": "old", "digest": "1" * 64}).check_model(encoder)


def test_an_index_records_how_many_texts_were_cut_and_to_what_length(tmp_path):
    path = lines(tmp_path / "c", {"_id": "a", "text": "the file " * 9}, {"_id": "b", "text": "open"})
    encoder = small.encoder(max_length=5, digest="1")
    with pytest.raises(ValueError, match="c, line 1 ._id 'a'. has .* tokens, the model takes 5"):
        index.build(encoder, corpora.read_corpus(path))
    with pytest.warns(UserWarning, match="1 of 2 documents were cut to 5 tokens"):
        made = index.build(encoder, corpora.read_corpus(path), truncate=True)
    assert (made.cut, made.max_length) == (1, 5)
