import dataclasses

import numpy as np
import pytest
import small
from evaluation_sets import judged, make, write

from embed import inference
from embed.evaluation import baselines, metrics, retrieval
from embed.evaluation.retrieval import Form
from embed.evaluation.sets import read_set


def test_chunks_are_ranked_in_context_and_alone(tmp_path):
    encoder, data = small.encoder(), read_set(make(tmp_path / "set", chunked=True))
    queries, context = retrieval.embed_queries(encoder, data), retrieval.embed_corpus(encoder, data)
    documents = [data.corpus[6 * d : 6 * d + 6] for d in range(4)]
    np.testing.assert_allclose(context, np.concatenate(encoder.encode_documents(documents)), atol=1e-6)
    alone = retrieval.embed_corpus(encoder, data, alone=True)
    np.testing.assert_allclose(alone, encoder.encode(data.corpus), atol=1e-6)
    assert np.abs(alone - context).max() > 1e-2
    np.testing.assert_allclose(queries, encoder.encode(data.queries), atol=1e-6)


def test_a_title_comes_before_its_text(tmp_path):
    corpus = [{"_id": "c0", "title": "Trees", "text": "of arrays"}, {"_id": "c1", "title": "", "text": " as it is "}]
    qrels = [{"query-id": "q0", "corpus-id": "c0", "score": 1}]
    folder = write(tmp_path / "set", corpus, [{"_id": "q0", "text": "tree"}], qrels)
    assert read_set(folder).corpus == ["Trees of arrays", "as it is"]


def exact_scores(queries, corpus, precision):
    """Scores float64 [Q, C] of encoded texts."""
    if "binary" in precision:
        bits = [np.unpackbits(v.view(np.uint8), axis=1) for v in (queries, corpus)]
        return -(bits[0][:, None] != bits[1]).sum(-1).astype(float)
    unit = [v / np.linalg.norm(v.astype(float), axis=1, keepdims=True) for v in (queries, corpus)]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize("dimensions", [None, 16])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_a_ranking_equals_that_of_texts_encoded_in_the_precision(tmp_path, precision, dimensions):
    encoder, data = small.encoder(), read_set(make(tmp_path / "set", chunked=False))
    queries, corpus = (
        encoder.encode(texts, precision=precision, truncate_dim=dimensions) for texts in (data.queries, data.corpus)
    )
    form = Form(precision, dimensions)
    ranking = retrieval.rank(encoder, data, [form])[form]
    # Of equal scores, the greater id is first, as in trec_eval.
    descending = np.array(sorted(range(len(data.corpus)), key=data.corpus_ids.__getitem__, reverse=True))
    scores = exact_scores(queries, corpus, precision)[:, descending]
    np.testing.assert_array_equal(ranking[:, :24], descending[np.argsort(-scores, axis=1, kind="stable")])
    assert (ranking[:, 24:] == -1).all() and ranking.shape[1] == retrieval.DEPTH
    assert retrieval.evaluate_retrieval(encoder, data, [form]) == {form: retrieval.score(ranking, data)}


def test_ties_of_bits_are_ranked_as_trec_eval_ranks_them():
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(200, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    data = judged(*({int(row): 1 for row in rng.choice(200, 20, replace=False)} for _ in range(5)), corpus=200)
    data = data._replace(corpus_ids=[f"{i * 7919 % 200}" for i in range(200)])  # not in the order of the rows
    data = data._replace(judgments=[{data.corpus_ids[int(name[1:])]: 1 for name in each} for each in data.judgments])
    order = retrieval.descending(data.corpus_ids, np.zeros(200, bool))
    scores, ranking = retrieval.search(
        inference.quantize, queries, vectors, Form("binary"), order=order, own=data.own_rows, depth=200
    )
    run = {
        query: {data.corpus_ids[row]: float(score) for row, score in zip(rows, values)}
        for query, rows, values in zip(data.query_ids, ranking.tolist(), scores.tolist())
    }
    assert len(np.unique(scores[0])) < 10  # so most ranks are ties
    names = ["ndcg@10", "recall@10", "mrr@10", "map@100"]
    by_trec = metrics.score_run(run, dict(zip(data.query_ids, data.judgments)), names)
    ours = metrics.score_queries(ranking, data, names)
    for name in names:
        np.testing.assert_array_equal(ours[name], by_trec[name])


def test_search_in_blocks_equals_a_sort(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_VECTORS", 7)
    rng = np.random.default_rng(1)
    vectors, queries = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(9, 16)).astype(np.float32)
    order = rng.permutation(50)[:45].astype(np.int32)
    own = np.array([order[3], -1, *order[:7]], np.int32)
    scores, found = retrieval.search(
        inference.quantize, queries, vectors, Form("float32"), order=order, own=own, depth=50
    )
    exact = exact_scores(queries, vectors, "float32")
    for row, mine in enumerate(own):
        kept = np.array([i for i in order if i != mine])
        expected = kept[np.argsort(-exact[row, kept], kind="stable")]
        np.testing.assert_array_equal(found[row, : len(kept)], expected)
        assert (found[row, len(kept) :] == -1).all()
        np.testing.assert_allclose(scores[row, : len(kept)], exact[row, expected], rtol=1e-5)


def test_a_querys_own_text_does_not_count_and_empty_texts_are_never_found(tmp_path):
    corpus = [{"_id": f"{i}", "text": text} for i, text in enumerate(["a b c", "", "a b d", "e f g"])]
    queries = [{"_id": "0", "text": "a b c"}, {"_id": "blank", "text": " "}]
    qrels = [{"query-id": name, "corpus-id": "2", "score": 1} for name in ("0", "blank")]
    with pytest.warns(UserWarning):
        data = read_set(write(tmp_path / "set", corpus, queries, qrels))
    form = Form("float32")
    ranking = retrieval.rank(small.encoder(), data, [form], depth=4)[form]
    assert sorted(ranking[0].tolist()) == [-1, -1, 2, 3]
    assert ranking[1].tolist() == [-1] * 4
    assert baselines.bm25(data, depth=4)[0].tolist() == [2, -1, -1, -1]


def test_too_long_texts_are_cut_with_a_warning(tmp_path):
    encoder, data = small.encoder(max_length=4), read_set(make(tmp_path / "set", chunked=False))
    counts = {}
    with pytest.warns(UserWarning, match="^24 of 24 texts were cut to 4 tokens"):
        retrieval.embed_corpus(encoder, data, counts=counts)
    assert counts == {"cut texts": 24}
    assert np.array_equal(retrieval.embed_queries(encoder, data), encoder.encode(data.queries, truncate=True))


def test_a_corpus_is_encoded_in_slices(tmp_path, monkeypatch):
    encoder, data = small.encoder(), read_set(make(tmp_path / "set", chunked=True))
    whole = retrieval.embed_corpus(encoder, data)
    monkeypatch.setattr(retrieval, "SLICE", 3)
    np.testing.assert_allclose(retrieval.embed_corpus(encoder, data), whole, atol=1e-6)


def test_a_contextual_set_is_evaluated_both_ways(tmp_path):
    encoder, data = small.encoder(), read_set(make(tmp_path / "set", chunked=True))
    forms = [Form("float32"), Form("int8"), Form("int8", 16)]
    context = retrieval.evaluate_retrieval(encoder, data, forms)
    alone = retrieval.evaluate_retrieval(encoder, data, forms, alone=True)
    assert list(context) == list(alone) == forms
    assert context != alone
    # Query i is text i after one more word: without context even a random model ranks it first.
    assert alone[forms[0]]["ndcg@10"] > 0.8


@pytest.mark.parametrize("alone", [True, False])
def test_token_vectors_are_ranked_by_maxsim(tmp_path, alone):
    """Of equal scores the greater id is first. Chunks are encoded in their document, or alone."""
    config = dataclasses.replace(small.config(), token_dimensions=12)
    encoder = inference.Encoder(small.random_params(config), config, small.tokenizer())
    data = read_set(make(tmp_path / "set", chunked=True))
    forms, counts = retrieval.forms(encoder), {}
    assert forms[-1] == Form("multi")
    ranking = retrieval.rank(encoder, data, forms, alone=alone, counts=counts)[Form("multi")]
    texts = [[text] for text in data.corpus] if alone else [data.corpus[6 * d : 6 * d + 6] for d in range(4)]
    corpus = encoder.encode_segments_multi(encoder.fit_documents(texts)[0])
    descending = np.array(sorted(range(24), key=data.corpus_ids.__getitem__, reverse=True))
    scores = inference.maxsim(encoder.encode_tokens_multi(data.queries), corpus)[:, descending]
    np.testing.assert_array_equal(ranking[:, :24], descending[np.argsort(-scores, axis=1, kind="stable")])
    assert (ranking[:, 24:] == -1).all() and ranking.shape[1] == retrieval.DEPTH
    assert counts[retrieval.TOKEN_BYTES] == round(4 * 12 * sum(map(len, corpus)) / 24)


def test_a_text_that_is_its_own_query_is_left_out_of_a_ranking_by_maxsim():
    vectors = list(np.eye(4, dtype=np.float32)[:, None])
    ranking = retrieval.search_tokens(vectors[:2], vectors, order=np.arange(3), own=np.array([0, -1]), depth=4)
    assert ranking.tolist() == [[1, 2, -1, -1], [1, 0, 2, -1]]
