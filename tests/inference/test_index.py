import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small

from embed.inference import (
    Index,
    candidates,
    index,
    index_files,
    index_writer,
    indexing,
    quantize,
    search,
    segments,
    shards,
    stored_rows,
)
from embed.inference import corpus as corpora
from embed.inference.index_files import Provenance
from embed.inference.index_writer import Counts, create, update
from embed.inference.segments import Block, Settings


def vectors(count, dimensions=24, precision="float32", seed=0):
    return quantize(np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32), precision)


def rows(count, first=0):
    """Three rows per document."""
    return [
        {
            "_id": f"d{i // 3}#{i % 3}",
            "document": f"d{i // 3}",
            "text": f"text {i} word{i % 7}",
            "fields": {"lang": ["en", "de", "fr"][i % 3], "year": i % 5, "tags": ["a"], "new": i % 2 == 0},
        }
        for i in range(first, first + count)
    ]


MADE = Provenance("int8", model={"path": "m", "digest": "d"})


def make(folder, stored, content=None, made=MADE, overwrite=False, **how):
    content = [{"_id": str(i)} for i in range(len(stored))] if content is None else content
    blocks = [Block(stored[a : a + 50], content[a : a + 50]) for a in range(0, len(stored), 50)]
    return create(folder, blocks, made, Settings(**how), overwrite=overwrite)


def add(folder, stored, content, made=MADE, **how):
    return update(folder, blocks=[Block(stored, content)], provenance=made, **how)


@pytest.fixture(scope="module")
def clustered():
    """3,000 vectors around 100 points, and 40 queries near some of them."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(100, 64))
    stored, queries = (points[rng.integers(0, 100, n)] + 0.5 * rng.normal(size=(n, 64)) for n in (3000, 40))
    return quantize(stored.astype(np.float32), "int8"), quantize(queries.astype(np.float32), "int8")


@pytest.fixture(scope="module", params=candidates.KINDS)
def kind(request):
    return request.param


def recall(found, expected):
    return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), expected.tolist())])


# Search


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_an_index_gives_the_results_of_its_vectors(precision, tmp_path):
    stored, queries = vectors(120, precision=precision), vectors(5, precision=precision, seed=1)
    made = make(tmp_path / "i", stored, made=MADE._replace(precision=precision))
    for found, expected in zip(made.search(queries, 9), search(queries, stored, 9, precision)):
        np.testing.assert_array_equal(found, expected)


def test_every_kind_finds_the_stated_share_of_the_nearest_and_scores_them_exactly(
    clustered, kind, tmp_path, monkeypatch
):
    stored, queries = clustered
    made = make(tmp_path / "i", stored, kind=kind, recall=0.9)
    scores, found = made.search(queries, 10)
    exact_scores, exact = made.search(queries, 10, exact=True)
    np.testing.assert_array_equal(exact, search(queries, stored, 10, "int8")[1])
    (segment,) = made.segments
    assert segment.kind == kind and recall(found, exact) >= (1 if kind == "exact" else 0.88)
    assert kind == "exact" or 0.9 <= segment.parameters.recall <= 1
    for query, row_scores, row in zip(queries, scores, found):
        a, b = query.astype(np.float64), stored[row].astype(np.float64)
        np.testing.assert_allclose(row_scores, b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1), atol=1e-6)
        assert (np.diff(row_scores) <= 0).all()


def test_a_search_for_very_many_gives_very_many(tmp_path):
    """FAISS finds nothing above some number of candidates, if it is told not to use a heap."""
    stored = np.random.default_rng(0).integers(-127, 128, (12_000, 64)).astype(np.int8)
    content = [{"_id": str(i), "fields": {"third": i % 3}} for i in range(12_000)]
    made = make(tmp_path / "i", stored, content, kind="ivf", recall=0.1)
    (found,) = made.search(stored[:1], 10_500)[1].tolist()
    assert len({*found}) == 10_500 and -1 not in found
    (found,) = made.search(stored[:1], 3_900, filters={"third": [1]})[1].tolist()
    assert len({*found}) == 3_900 and all(row % 3 == 1 for row in found)


def test_threads_may_search_one_index(clustered, tmp_path):
    stored, queries = clustered
    made = make(tmp_path / "i", stored, rows(3000), kind="ivf", recall=0.5)
    expected = [made.search(queries[i : i + 1], k)[1].tolist() for i in range(40) for k in (1, 300)]
    asked = [(i, k) for i in range(40) for k in (1, 300)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: made.search(queries[each[0] : each[0] + 1], each[1])[1].tolist(), asked))
        texts = list(pool.map(lambda i: made.content(i)["text"], range(3000)))
    assert found == expected and texts == [row["text"] for row in rows(3000)]


def test_a_recall_that_cannot_be_reached_is_a_warning(tmp_path):
    stored = np.random.default_rng(0).integers(1, 128, (5000, 64)).astype(np.int8)  # all bits are equal
    with pytest.warns(UserWarning, match=r"the search finds 0\.\d+ of the ten nearest vectors, not 0.95, with 4,000"):
        made = make(tmp_path / "i", stored, kind="binary")
    assert made.segments[0].parameters.recall < 0.95


def test_more_recall_takes_more_lists_and_candidates(clustered, tmp_path):
    found = [
        make(tmp_path / f"{share}", clustered[0], kind="ivf", recall=share).segments[0].parameters
        for share in (0.3, 0.9, 0.999)
    ]
    assert found[0].nprobe < found[2].nprobe and found[0].candidates <= found[2].candidates
    assert [each.recall >= share for each, share in zip(found, (0.3, 0.9, 0.999))] == [True] * 3


@pytest.mark.parametrize(
    ("count", "precision", "dimensions", "expected"),
    [
        (100_000, "int8", 64, "exact"),
        (100_001, "int8", 64, "binary"),
        (1_000_000, "float32", 64, "binary"),
        (1_000_001, "int8", 64, "ivf"),
        (1_000_001, "ubinary", 64, "exact"),
        (1_000_001, "int8", 60, "exact"),
    ],
)
def test_the_kind_is_chosen_by_the_number_of_vectors(count, precision, dimensions, expected):
    assert candidates.choose_kind(None, count, precision, dimensions) == expected


@pytest.mark.parametrize(("precision", "dimensions"), [("ubinary", 64), ("int8", 60)])
def test_a_kind_that_the_vectors_do_not_allow_is_refused(precision, dimensions):
    with pytest.raises(
        ValueError, match=f"kind=ivf compares sign bits .*, the vectors are {precision} of {dimensions}"
    ):
        candidates.choose_kind("ivf", 9, precision, dimensions)
    with pytest.raises(ValueError, match="kind='hnsw' must be one of exact, binary, ivf"):
        candidates.choose_kind("hnsw", 9, "int8", 64)


def test_without_faiss_the_error_comes_with_the_first_vector_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(candidates, "EXACT_ROWS", 70)
    stored, taken = vectors(200, precision="int8"), []

    def blocks():
        for start in range(0, 200, 50):
            taken.append(start)
            yield Block(stored[start : start + 50], [{"_id": str(i)} for i in range(start, start + 50)])

    with pytest.raises(ValueError, match="needs faiss: pip install -e '.\\[search\\]', or take --kind=exact"):
        create(tmp_path / "i", blocks(), MADE)
    assert taken == [0, 50] and not (tmp_path / "i").exists()
    assert len(create(tmp_path / "i", blocks(), MADE, Settings("exact"))) == 200


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_few_vectors_can_have_any_kind(count, kind, tmp_path):
    stored = vectors(count, precision="int8")
    made = make(tmp_path / "i", stored, kind=kind, recall=1.0)
    for found, expected in zip(made.search(stored, 4), search(stored, stored, 4, "int8")):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert made.search(stored, 10**12)[1].shape == (count, count)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_a_vector_of_a_text_without_tokens_is_never_found(precision, tmp_path):
    zero = quantize(np.zeros((1, 24), np.float32), precision)
    stored = np.concatenate([vectors(3, precision=precision), zero, vectors(2, precision=precision, seed=2)])
    made = make(tmp_path / "i", stored, made=MADE._replace(precision=precision))
    assert len(made) == 5
    assert sorted(made.search(zero, 9)[1][0]) == [0, 1, 2, 4, 5]


def test_an_index_without_vectors_or_of_only_empty_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty corpus: the index has no vectors"):
        make(tmp_path / "i", vectors(0, precision="int8"))
    with pytest.raises(ValueError, match="none of its 2 vectors has a text"):
        make(tmp_path / "i", np.zeros((2, 8), np.int8))
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (vectors(2), r"vectors are float32\[2, 24\], int8 needs int8\[N, D\]"),
        (vectors(2, precision="int8")[0], r"vectors are int8\[24\]"),
    ],
)
def test_vectors_of_another_dtype_or_shape_are_refused(stored, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "i", stored)


def test_blocks_of_different_widths_or_with_another_number_of_rows_are_refused(tmp_path):
    wide, narrow = (Block(vectors(2, width, "int8"), [{"_id": "a"}, {"_id": "b"}]) for width in (24, 16))
    with pytest.raises(ValueError, match="vectors have 16 numbers each, those before them 24"):
        create(tmp_path / "i", [wide, narrow], MADE)
    with pytest.raises(ValueError, match="1 rows for 2 vectors"):
        create(tmp_path / "i", [wide._replace(rows=[{"_id": "a"}])], MADE)
    with pytest.raises(ValueError, match="truncate_dim=16, but the vectors have 24 dimensions"):
        create(tmp_path / "i", [wide], MADE._replace(truncate_dim=16))


def test_queries_and_k_that_do_not_match_the_index_are_refused(tmp_path):
    made = make(tmp_path / "i", vectors(3, precision="int8"))
    with pytest.raises(ValueError, match="queries have 16 numbers each, stored vectors 24"):
        made.search(vectors(1, 16, "int8"), 1)
    with pytest.raises(ValueError, match="queries are float32"):
        made.search(vectors(1), 1)
    with pytest.raises(ValueError, match="k=0 must be positive, an int"):
        made.search(vectors(1, precision="int8"), 0)


# Rows


def test_the_content_of_rows_is_read_back(tmp_path):
    content = [*rows(4), {"_id": "alone", "document": "alone", "text": "ü\n😀", "start": 3, "end": 9, "fields": {}}]
    made = make(tmp_path / "i", vectors(5, precision="int8"), content)
    assert [made.content(i) for i in range(4)] == content[:4]
    assert made.content(4) == {"_id": "alone", "text": "ü\n😀", "start": 3, "end": 9}
    hits = made.hits(*(each[0] for each in made.search(vectors(5, precision="int8")[4:], 9)))
    assert len(hits) == 5 and (hits[0].id, hits[0].document, hits[0].row) == ("alone", "alone", 4)
    assert {hit.document for hit in hits} == {"d0", "d1", "alone"}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"lang": ["de"]}, lambda i: i % 3 == 1),
        ({"lang": ["de", "fr"], "year": [2]}, lambda i: i % 3 in (1, 2) and i % 5 == 2),
        ({"year": ["3", 4.0]}, lambda i: i % 5 in (3, 4)),
        ({"new": [True]}, lambda i: i % 2 == 0),
        ({"lang": ["xx"]}, lambda i: False),
    ],
)
def test_filters_leave_the_rows_with_the_values_of_fields(clustered, kind, filters, expected, tmp_path, monkeypatch):
    stored, queries = clustered
    monkeypatch.setattr(segments, "FEW_ROWS", 300)
    made = make(tmp_path / "i", stored, rows(3000), kind=kind, recall=0.95)
    allowed = [i for i in range(3000) if expected(i)]
    scores, found = made.search(queries, 10, filters=filters)
    if not allowed:
        assert (found == -1).all()
        return
    assert {*found.ravel().tolist()} <= {*allowed}
    nearest = np.array(allowed)[search(queries, stored[allowed], 10, "int8")[1]]
    assert recall(found, nearest) >= (1 if kind == "exact" else 0.9)


def test_a_field_that_no_row_has_or_that_is_a_list_cannot_be_filtered_by(tmp_path):
    made = make(tmp_path / "i", vectors(4, precision="int8"), rows(4))
    for name in ("language", "tags"):
        with pytest.raises(ValueError, match=f"no row has a field '{name}' .*; the fields are: lang, new, year"):
            made.search(vectors(1, precision="int8"), 1, filters={name: ["a"]})
    with pytest.raises(ValueError, match="the values of the filter 'lang' are 'en', expected a list"):
        made.search(vectors(1, precision="int8"), 1, filters={"lang": "en"})


def test_fields_beyond_the_limits_are_kept_but_not_filtered_by(tmp_path, monkeypatch):
    for name, value in (("MAX_VALUES", 5), ("MAX_CHARACTERS", 8), ("MAX_FIELDS", 2)):
        monkeypatch.setattr(stored_rows, name, value)
    fields = [{"url": f"{i}", "text": "long" * 4 * (i == 3), "last": 1} | ({"a": 1} if i > 6 else {}) for i in range(9)]
    content = [{"_id": str(i), "fields": x} for i, x in enumerate(fields)]
    made = make(tmp_path / "i", vectors(9, precision="int8"), content)
    assert [made.content(i)["fields"] for i in range(9)] == fields
    for name, why in (
        ("url", "more than 5 values"),
        ("text", "a value of 16 characters"),
        ("last", "more than 2 fields"),
    ):
        with pytest.raises(ValueError, match=f"the field '{name}' cannot be filtered by: it has {why}"):
            made.search(vectors(1, precision="int8"), 1, filters={name: ["1"]})
    assert made.search(vectors(1, precision="int8"), 9, filters={"a": [1]})[1][0, :3].max() >= 7


def test_half_a_character_in_a_field_is_kept(tmp_path):
    made = make(tmp_path / "i", vectors(1, precision="int8"), [{"_id": "a", "fields": {"name": "x\ud800"}}])
    assert made.content(0)["fields"] == {"name": "x\ud800"}
    assert made.search(vectors(1, precision="int8"), 1, filters={"name": ["x\ud800"]})[1] == [[0]]


def test_an_id_that_occurs_more_than_once_is_refused(tmp_path):
    again = [*rows(4), {"_id": "x"}, {"_id": "d0#1"}]
    with pytest.raises(ValueError, match="the id 'd0#1' occurs more than once, in the rows 1 and 5"):
        make(tmp_path / "i", vectors(6, precision="int8"), again)


# Words


def test_words_find_the_rows_that_share_them_and_filters_hold(tmp_path):
    made = make(tmp_path / "i", vectors(30, precision="int8"), rows(30), bm25="")
    scores, found = made.search_bm25(["word3", "nothing of it"], 9)
    assert found[0].tolist() == [3, 10, 17, 24, -1, -1, -1, -1, -1] and (found[1] == -1).all()
    assert (scores[0, :4] > 0).all()
    assert made.search_bm25(["word3"], 2, filters={"lang": ["de"]})[1].tolist() == [[10, -1]]


def test_both_rankings_are_fused_and_each_has_its_share(tmp_path):
    stored = vectors(30, precision="int8")
    made = make(tmp_path / "i", stored, rows(30), bm25="")
    query, text = stored[17:18], "word3 10"
    by_vectors, by_words = (ranked[1][0].tolist() for ranked in (made.search(query, 30), made.search_bm25([text], 30)))
    scores, found, shares = made.search_hybrid(query, [text], 30)
    for row, score, (of_vectors, of_words) in zip(found[0].tolist(), scores[0], shares[0]):
        assert of_vectors == np.float32(1 / (61 + by_vectors.index(row)))
        assert of_words == (np.float32(1 / (61 + by_words.index(row))) if row in by_words else 0)
        assert score == of_vectors + of_words
    assert (np.diff(scores[0]) <= 0).all() and {*found[0].tolist()} == {*range(30)}
    hit = made.hits(scores[0], found[0], shares[0])[0]
    assert hit.shares == tuple(shares[0, 0].tolist()) and min(hit.shares) > 0


def test_a_word_counts_as_in_all_segments_together(tmp_path):
    texts = ["alpha " * (1 + i % 3) + "beta" * (i % 2) for i in range(200)]
    content = [{"_id": str(i), "text": text} for i, text in enumerate(texts)]
    stored = vectors(201, precision="int8")
    make(tmp_path / "i", stored[:200], content, bm25="")
    add(tmp_path / "i", stored[200:], [{"_id": "new", "text": "alpha zyzzyva"}])
    parted = Index.load(tmp_path / "i").search_bm25(["zyzzyva alpha"], 3)
    assert parted[1][0, 0] == 200  # in its own segment, each of its words is in every text
    update(tmp_path / "i", compact=True)
    whole = Index.load(tmp_path / "i").search_bm25(["zyzzyva alpha"], 3)
    np.testing.assert_array_equal(parted[1], whole[1])
    np.testing.assert_allclose(parted[0], whole[0], rtol=0.2)  # lengths are compared within a segment


def test_texts_without_words_are_indexed_and_not_found_by_words(tmp_path):
    stored = vectors(4, precision="int8")
    made = make(tmp_path / "i", stored[:2], [{"_id": "a", "text": "!!!"}, {"_id": "b"}], bm25="")
    assert made.search_bm25(["the"], 2)[1].tolist() == [[-1, -1]]
    add(tmp_path / "i", stored[2:], [{"_id": "c", "text": "the"}, {"_id": "d", "text": "?"}])
    assert Index.load(tmp_path / "i").search_bm25(["the", "?"], 2)[1].tolist() == [[2, -1], [-1, -1]]


def test_an_index_without_bm25_says_so(tmp_path):
    made = make(tmp_path / "i", vectors(3, precision="int8"))
    with pytest.raises(ValueError, match="cannot be searched by words: make it with --bm25"):
        made.search_bm25(["a"], 1)


# Changes


def names(folder):
    return {file.name for file in folder.iterdir()}


def found_ids(folder, query, k=9, **how):
    made = Index.load(folder)
    scores, found = made.search(query, k, **how)
    return [hit.id for hit in made.hits(scores[0], found[0])]


def test_added_rows_are_found_and_replace_those_of_the_same_documents(kind, tmp_path):
    stored, new = vectors(30, precision="int8"), vectors(5, precision="int8", seed=5)
    make(tmp_path / "i", stored, rows(30), kind=kind, recall=1.0)
    content = [{"_id": "d2", "text": "whole"}, *({"_id": f"n{i}"} for i in range(4))]
    assert add(tmp_path / "i", new, content) == Counts(added=5, replaced=3)  # the chunks of d2
    made = Index.load(tmp_path / "i")
    assert len(made) == 32 and [segment.kind for segment in made.segments] == [kind] * 2
    assert found_ids(tmp_path / "i", new[:1])[0] == "d2"
    everything = found_ids(tmp_path / "i", stored[:1], 99)
    assert len(everything) == 32 and not {"d2#0", "d2#1", "d2#2"} & {*everything}
    assert made.content(34)["_id"] == "n3"


def test_deleted_documents_are_never_found_and_their_files_go(kind, tmp_path):
    stored = vectors(30, precision="int8")
    make(tmp_path / "i", stored, rows(30), kind=kind, recall=1.0, bm25="")
    assert update(tmp_path / "i", documents=["d0", "d9"]) == Counts(deleted=6)
    assert update(tmp_path / "i", documents=["d1"]) == Counts(deleted=3)
    everything = found_ids(tmp_path / "i", stored[:1], 99)
    assert len(everything) == 21 and not any(name.startswith(("d0#", "d1#", "d9#")) for name in everything)
    assert (Index.load(tmp_path / "i").search_bm25(["word0"], 9)[1][0][:4] == [7, 14, 21, -1]).all()
    assert names(tmp_path / "i") == {"index.json", "0", "0.hidden-2.npy"}
    with pytest.raises(ValueError, match="no document 'd0'; 2 of 3 are missing"):
        update(tmp_path / "i", documents=["d0", "d3", "x"])
    assert len(Index.load(tmp_path / "i")) == 21


def test_a_compacted_index_has_one_segment_with_the_rows_that_could_be_found(tmp_path):
    stored, new = vectors(30, precision="int8"), vectors(2, precision="int8", seed=5)
    make(tmp_path / "i", stored, rows(30), bm25="")
    add(tmp_path / "i", new, [{"_id": "x", "text": "word9"}, {"_id": "y"}])
    update(tmp_path / "i", documents=["d3"])
    before, query = found_ids(tmp_path / "i", stored[:1], 99), stored[:1]
    assert update(tmp_path / "i", compact=True) == Counts()
    made = Index.load(tmp_path / "i")
    assert found_ids(tmp_path / "i", query, 99) == before and len(made.segments) == 1 and len(made) == 29
    assert made.hits(*(each[0] for each in made.search_bm25(["word9"], 1)))[0].id == "x"
    assert names(tmp_path / "i") == {"index.json", "3", "3.hidden-0.npy"}


def test_one_change_deletes_then_adds_then_compacts(tmp_path):
    stored, new = vectors(30, precision="int8"), vectors(3, precision="int8", seed=5)
    make(tmp_path / "i", stored, rows(30), bm25="")
    content = [{"_id": "d0", "text": "word9"}, {"_id": "d1"}, {"_id": "y"}]
    assert add(tmp_path / "i", new, content, documents=["d0", "d5"], compact=True) == Counts(6, 3, 3)
    made = Index.load(tmp_path / "i")
    assert len(made.segments) == 1 and len(made) == 24 and made.provenance == MADE
    everything = {row["_id"] for row in made.segments[0].rows}
    kept = {row["_id"] for row in rows(30) if row["document"] not in ("d0", "d1", "d5")}
    assert everything == kept | {"d0", "d1", "y"}
    assert found_ids(tmp_path / "i", new[:1])[0] == "d0"


@pytest.mark.parametrize("kind", ["binary", "ivf"])
def test_a_change_keeps_how_the_index_is_searched(kind, tmp_path):
    make(tmp_path / "i", vectors(30, 64, "int8"), rows(30), kind=kind, recall=0.5, bm25="eng")
    add(tmp_path / "i", vectors(3, 64, "int8", seed=5), [{"_id": name} for name in "xyz"])
    update(tmp_path / "i", compact=True)
    (segment,) = Index.load(tmp_path / "i").segments
    assert (segment.kind, segment.settings) == (kind, Settings(kind, 0.5, "eng"))
    update(tmp_path / "i", compact=True, settings=Settings("exact"))
    (segment,) = Index.load(tmp_path / "i").segments
    assert segment.kind == "exact" and segment.bm25 is None


def test_an_open_index_shows_what_it_was_opened_with(tmp_path):
    stored = vectors(30, precision="int8")
    made = make(tmp_path / "i", stored, rows(30), bm25="")

    def found():
        arrays = [made.search(stored[:2], 5), made.search(stored[:2], 30, filters={"lang": ["en"]})]
        arrays.append(made.search_bm25(["word3"], 9))
        return [each.tolist() for pair in arrays for each in pair] + [made.content(row) for row in range(30)]

    before = found()
    other = [row | {"text": "word5", "fields": {"lang": "de"}} for row in rows(30, 300)]
    make(tmp_path / "i", vectors(30, precision="int8", seed=9), other, bm25="", overwrite=True)
    update(tmp_path / "i", compact=True)
    assert found() == before


def test_an_index_that_is_changed_while_it_is_opened_is_opened_as_it_is_then(tmp_path, monkeypatch):
    make(tmp_path / "i", vectors(30, precision="int8"), rows(30))
    opened = Index._open.__func__

    def after_a_change(cls, folder, info, check):
        monkeypatch.setattr(Index, "_open", classmethod(opened))
        update(tmp_path / "i", documents=["d0"], compact=True)
        return opened(cls, folder, info, check)

    monkeypatch.setattr(Index, "_open", classmethod(after_a_change))
    assert len(Index.load(tmp_path / "i")) == 27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model={"path": "m", "digest": "other"}), "has vectors with model 'd', not 'other'"),
        (dict(precision="ubinary"), "has vectors with precision 'int8', not 'ubinary'"),
        (dict(truncate_dim=24), "has vectors with truncate_dim None, not 24"),
        (dict(max_length=9), "has vectors with max_length None, not 9"),
    ],
)
def test_vectors_that_were_made_in_another_way_cannot_be_added(change, message, tmp_path):
    make(tmp_path / "i", vectors(3, precision="int8"))
    with pytest.raises(ValueError, match=message):
        update(tmp_path / "i", blocks=[], provenance=MADE._replace(**change))


def test_vectors_of_another_width_cannot_be_added(tmp_path):
    make(tmp_path / "i", vectors(3, precision="int8"))
    with pytest.raises(ValueError, match="has vectors of 24 numbers, not 16"):
        add(tmp_path / "i", vectors(1, 16, "int8"), [{"_id": "x"}])
    assert len(Index.load(tmp_path / "i")) == 3


CHANGES = {
    "add": lambda folder: add(folder, vectors(3, precision="int8", seed=7), [{"_id": x} for x in ("d0", "x", "y")]),
    "delete": lambda folder: update(folder, documents=["d0", "d4"]),
    "compact": lambda folder: update(folder, documents=["d0"], compact=True),
    "create": lambda folder: make(folder, vectors(5, precision="int8", seed=8), overwrite=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_interrupted_leaves_the_index_as_it_was(change, tmp_path, monkeypatch):
    """Before each step that others can see, and in the middle of the work."""
    stored, folder = vectors(30, precision="int8"), tmp_path / "i"
    make(folder, stored, rows(30), bm25="")
    state = lambda: found_ids(folder, stored[:1], 99)  # noqa: E731
    before, steps = state(), 0
    while True:
        left = [steps]
        with monkeypatch.context() as patched:

            def counted(function, left=left):
                def call(*arguments, **keywords):
                    if not left[0]:
                        raise KeyboardInterrupt
                    left[0] -= 1
                    return function(*arguments, **keywords)

                return call

            for owner, name in ((index_writer.os, "replace"), (index_writer.paths, "write"), (segments, "write")):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            try:
                CHANGES[change](folder)
                break
            except KeyboardInterrupt:
                assert state() == before
        # As a process that was killed leaves it.
        (folder / ".embed-x.partial").mkdir(exist_ok=True)
        steps += 1
    assert steps >= 3 and state() != before
    described = json.loads((folder / "index.json").read_text())["segments"]
    assert names(folder) == {"index.json", *described, *(each["hidden"] for each in described.values())}
    assert not [file for file in folder.rglob("*") if file.stat().st_mode & 0o444 != 0o444]


def test_files_behind_a_symbolic_link_are_not_removed(tmp_path):
    folder, mine = tmp_path / "i", tmp_path / "mine"
    make(folder, vectors(30, precision="int8"), rows(30))
    mine.mkdir()
    for name in ("vectors.npy", "thesis.tex"):
        (mine / name).write_text("mine")
    (folder / "7").symlink_to(mine)
    update(folder, documents=["d0"])
    assert {file.name for file in mine.iterdir()} == {"vectors.npy", "thesis.tex"}


def test_an_index_is_replaced_only_if_asked_and_without_other_files_in_its_folder(tmp_path):
    folder = tmp_path / "i"
    make(folder, vectors(2, precision="int8"))
    with pytest.raises(ValueError, match="i exists: choose another path, or replace it with --overwrite"):
        make(folder, vectors(3, precision="int8"))
    assert len(make(folder, vectors(3, precision="int8"), overwrite=True)) == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="i holds notes.txt, which is not part of an index"):
        make(folder, vectors(4, precision="int8"), overwrite=True)
    assert len(Index.load(folder)) == 3 and (folder / "notes.txt").read_text() == "mine"


# Damage


def rewrite(folder, change):
    """Change index.json, with its digest."""
    file = folder / "index.json"
    info = json.loads(file.read_text())
    change(info)
    info.pop("sha256", None)
    file.write_text(json.dumps(info | {"sha256": index_files._digest(info)}))


def test_a_damaged_or_missing_index_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at .*: expected a folder with index.json"):
        Index.load(tmp_path)
    folder = tmp_path / "i"
    make(folder, vectors(3, precision="int8"), rows(3), bm25="")
    for file in (path for path in folder.rglob("*") if path.is_file() and path.name != "index.json"):
        data = file.read_bytes()
        for content in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"{file} is not the file that index.json was written with"):
                Index.load(folder)
        file.unlink()
        with pytest.raises(ValueError, match=f"{file} is missing, although index.json names it"):
            Index.load(folder)
        file.write_bytes(data)
    assert len(Index.load(folder)) == 3


def test_a_large_index_is_checked_by_sizes_unless_asked(tmp_path, monkeypatch):
    make(tmp_path / "i", vectors(3, precision="int8"), rows(3))
    monkeypatch.setattr(index, "CHECKED_BYTES", 10)
    file = tmp_path / "i" / "0" / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    Index.load(tmp_path / "i")
    with pytest.raises(ValueError, match="vectors.npy is not the file"):
        Index.load(tmp_path / "i", check=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("truncate_dim", 16, "was changed after it was written"),
        ("format_version", 1, "has format version 1, expected 3: make the index again"),
        ("format", "other", "its format is not 'embed-index'"),
    ],
)
def test_an_index_whose_description_was_changed_is_refused(tmp_path, field, value, message):
    make(tmp_path / "i", vectors(3, precision="int8"))
    file = tmp_path / "i" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path / "i")


MISSING = object()


@pytest.mark.parametrize(
    "field, value",
    [
        *((name, MISSING) for name in index_files.FIELDS),
        *((name, value) for name in index_files.FIELDS for value in (5.5, "x", [None], {"sha256": 3, "digest": 4})),
    ],
)
def test_an_index_with_a_digest_but_a_wrong_field_is_refused(tmp_path, field, value):
    make(tmp_path / "i", vectors(3, precision="int8"))
    rewrite(tmp_path / "i", lambda info: info.pop(field) if value is MISSING else info.update({field: value}))
    with pytest.raises(ValueError, match=f"index.json: {field} is .*, expected .*: make the index again"):
        Index.load(tmp_path / "i")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", -1),
        ("rows", "3"),
        ("rows", 10**400),
        ("width", None),
        ("kind", "ivf"),
        ("kind", "other"),
        ("parameters", {"candidates": 1}),
        ("settings", {"kind": 1, "recall": 0.5, "bm25": None}),
        ("files", {"../../../etc/passwd": [1, "x"]}),
        ("files", {"/etc/passwd": [1, "x"]}),
        ("files", {"vectors.npy": 1}),
        ("hidden", "../1.hidden-0.npy"),
        ("hidden", "1.hidden-0.npy"),
        ("bm25", {"language": "", "words": -1, "postings": 0}),
        ("fields", "lang"),
        ("unfiltered", ["lang"]),
    ],
)
def test_a_segment_that_is_described_wrongly_is_refused(tmp_path, field, value):
    make(tmp_path / "i", vectors(3, precision="int8"))
    rewrite(tmp_path / "i", lambda info: info["segments"]["0"].update({field: value}))
    with pytest.raises(ValueError, match="index.json: segments is .*, expected segments with their files"):
        Index.load(tmp_path / "i")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("list_rows.npy", lambda x: x + 1, "list_rows.npy has numbers of rows outside 0..299"),
        ("list_rows.npy", lambda x: x - 1, "list_rows.npy has numbers of rows outside 0..299"),
        ("list_rows.npy", lambda x: x.astype(np.int64), "list_rows.npy is not an array int32[300]"),
        ("list_codes.npy", lambda x: x[:-1], "list_codes.npy is not an array uint8[300, 8]"),
        ("vectors.npy", lambda x: x[:, :-1], "vectors.npy is not an array int8[300, 64]"),
        ("vectors.npy", lambda x: np.asfortranarray(x), "vectors.npy is not an array int8[300, 64]"),
        ("vectors.npy", lambda x: x.astype(object), "vectors.npy is not an array int8[300, 64]"),
        ("vectors.npy", lambda x: b"PK" + x.tobytes(), "vectors.npy is not an array int8[300, 64]"),
        ("offsets.npy", lambda x: x[::-1].copy(), "offsets.npy does not describe rows.jsonl"),
        ("ids.npy", lambda x: x[:-1], "ids.npy is not an array uint64[300]"),
        ("field0.json", lambda x: b"[" * 100_000, "field0.json does not list values"),
        ("field0.json", lambda x: b"[[1]]", "field0.json does not list values"),
        ("lists.safetensors", lambda x: x | {"offsets": x["offsets"][::-1].copy()}, "does not describe lists of 300"),
        ("lists.safetensors", lambda x: x | {"offsets": x["offsets"] * 2}, "does not describe lists of 300"),
        ("lists.safetensors", lambda x: x | {"centroids": x["centroids"][1:]}, "does not describe lists of 300"),
        ("lists.safetensors", lambda x: x | {"mean": x["mean"][1:]}, "does not describe lists of 300"),
        ("lists.safetensors", lambda x: {}, "does not describe lists of 300"),
        ("bm25/rows.npy", lambda x: x + 300, "bm25 does not hold the BM25 scores of 300 texts"),
        ("bm25/rows.npy", lambda x: x.astype(np.float32), "rows.npy is not an array int32"),
        ("bm25/starts.npy", lambda x: x * 7, "bm25 does not hold the BM25 scores of 300 texts"),
        ("bm25/starts.npy", lambda x: x.astype(np.uint64), "starts.npy is not an array int64"),
        ("bm25/scores.npy", lambda x: x * np.nan, "bm25 does not hold the BM25 scores of 300 texts"),
        ("bm25/words.json", lambda x: b"[" * 100_000, "bm25 does not hold the BM25 scores of 300 texts"),
        ("bm25/words.json", lambda x: b'["a", "a"]', "bm25 does not hold the BM25 scores of 300 texts"),
    ],
)
def test_files_that_would_make_a_search_read_elsewhere_are_refused_whoever_wrote_them(
    clustered, tmp_path, file, change, message
):
    """index.json has the digests of the changed files, as those of somebody who means harm would."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "i"
    make(folder, clustered[0][:300], rows(300), kind="ivf", bm25="")
    path = folder / "0" / file
    if file.endswith(".safetensors"):
        save_file(change(load_file(path)), path)
    elif file.endswith(".json"):
        path.write_bytes(change(path.read_bytes()))
    elif isinstance(changed := change(np.load(path)), bytes):
        path.write_bytes(changed)
    else:
        np.save(path, changed)
    rewrite(folder, lambda info: info["segments"]["0"]["files"].update({file: index_writer._file(path)}))
    with pytest.raises(ValueError, match=re.escape(message)):
        Index.load(folder).search(clustered[1][:1], 3, filters={"lang": ["en"]})


@pytest.mark.parametrize("line", [b'{"_id": "x!', b'{"_id": 123}', b'["_id", "12"]', b"[" * 11])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    folder = tmp_path / "i"
    make(folder, vectors(3, precision="int8"), [{"_id": f"a{i}"} for i in range(3)])
    path = folder / "0" / "rows.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(line[: len(first) - 1].ljust(len(first) - 1) + b"\n" + b"".join(others))
    rewrite(folder, lambda info: info["segments"]["0"]["files"].update({"rows.jsonl": index_writer._file(path)}))
    made = Index.load(folder)
    assert made.content(1) == {"_id": "a1"}
    with pytest.raises(ValueError, match="rows.jsonl has the line .*, which is no row"):
        made.content(0)


# Corpora and models


def corpus_rows(path, *content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return corpora.read_rows(path)


def build(encoder, folder, read, precision="float32", **how):
    blocks_of = indexing.encode(encoder, read, shards.Settings(precision, **how))
    return create(folder, *reversed(blocks_of))


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_an_empty_chunk_of_a_corpus_has_an_id_and_is_never_found(precision, tmp_path):
    read = corpus_rows(
        tmp_path / "c", {"_id": "a", "chunks": ["the file", "", "a list"], "n": 1}, {"_id": "b", "text": "open"}
    )
    encoder = small.encoder(digest="1")
    made = build(encoder, tmp_path / "i", read, precision)
    assert [made.content(i)["_id"] for i in range(4)] == ["a#0", "a#1", "a#2", "b"]
    assert made.content(0)["fields"] == {"n": 1} and made.content(2)["document"] == "a"
    assert sorted(made.search(encoder.encode(["open"], precision=precision), 3)[1][0]) == [0, 2, 3] and len(made) == 3


def test_an_index_of_a_corpus_finds_texts_and_chunks_in_context(tmp_path):
    read = corpus_rows(tmp_path / "c", {"_id": "a", "text": "the file"}, {"_id": "b", "chunks": ["open", "a list of"]})
    encoder = small.encoder()
    built = build(encoder, tmp_path / "i", read, "int8")
    expected = encoder.encode_documents([["the file"], ["open", "a list of"]], precision="int8")
    np.testing.assert_array_equal(built.segments[0].vectors, np.concatenate(expected))
    assert built.search(encoder.encode(["the file"], precision="int8"), 1)[1] == [[0]]


def test_an_index_of_another_or_an_unknown_model_is_refused(tmp_path):
    encoder = small.encoder(digest="1" * 64)

    def of(digest):
        model = {"path": "old", "digest": digest}
        return make(tmp_path / "i", vectors(2, precision="int8"), made=Provenance("int8", model=model), overwrite=True)

    with pytest.raises(ValueError, match="made with the model at old .digest 222222222222., not with"):
        of("2" * 64).check_model(encoder)
    with pytest.raises(ValueError, match="the index does not say which model made it"):
        of(None).check_model(encoder)
    with pytest.raises(ValueError, match="the model has no digest"):
        of("2" * 64).check_model(small.encoder())
    of("1" * 64).check_model(encoder)


def test_an_index_records_how_many_texts_were_cut_and_to_what_length(tmp_path):
    read = corpus_rows(tmp_path / "c", {"_id": "a", "text": "the file " * 9}, {"_id": "b", "text": "open"})
    encoder = small.encoder(max_length=5, digest="1")
    with pytest.raises(ValueError, match="c, line 1 ._id 'a'. has .* tokens, the model takes 5"):
        build(encoder, tmp_path / "i", read)
    with pytest.warns(UserWarning, match="1 of 2 documents were cut to 5 tokens"):
        made = build(encoder, tmp_path / "i", read, truncate=True)
    assert (made.provenance.cut, made.provenance.max_length) == (1, 5)


def test_an_index_may_be_moved(tmp_path):
    stored = vectors(9, precision="int8")
    make(tmp_path / "i", stored)
    shutil.move(tmp_path / "i", tmp_path / "j")
    assert found_ids(tmp_path / "j", stored[4:5])[0] == "4"


@pytest.mark.parametrize("codec, name", [("utf-32", "UTF-32"), ("utf-32-be", "UTF-32"), ("utf-16", "UTF-16")])
def test_a_corpus_in_another_unicode_encoding_is_named(tmp_path, codec, name):
    for text in ('{"_id": "a", "text": "x"}', '\ufeff{"_id": "a", "text": "x"}'):
        for coding in {codec, codec.replace("-be", "-le")}:
            (tmp_path / "c").write_bytes(text.encode(coding))
            with pytest.raises(ValueError, match=f"c is {name}, expected JSON lines in UTF-8"):
                corpora.read_corpus(tmp_path / "c")
