import json
import math

import numpy as np
import pytest
import small

from embed.evaluation import retrieval
from embed.evaluation.retrieval import Relevance


def relevance(*answers):
    return [Relevance(np.array(list(a)), np.array(list(a.values()), float)) for a in answers]


def write(folder, corpus, queries, qrels):
    folder.mkdir(exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make(folder, *, chunked):
    texts = small.sentences(24, seed=5, longest=30)
    corpus = [{"_id": f"c{i}", "text": text} for i, text in enumerate(texts)]
    if chunked:
        for i, row in enumerate(corpus):
            row |= {"document": f"d{i // 6}", "chunk": i % 6}
    queries = [{"_id": f"q{i}", "text": f"the {text}"} for i, text in enumerate(texts[:12])]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"c{i}", "score": 1} for i in range(12)]
    return write(folder, corpus, queries, qrels + [{"query-id": "q3", "corpus-id": "c20", "score": 2}])


# Metrics


def test_metrics_equal_a_table_worked_out_by_hand():
    relevant = relevance({4: 1}, {7: 1, 8: 1, 9: 1}, {1: 2, 2: 1}, {5: 1})
    ranking = np.array([[4, 0, 1], [0, 8, 7], [2, 1, 0], [1, 2, 3]])
    discount = [1, 1 / math.log2(3), 0.5]
    np.testing.assert_allclose(
        retrieval.ndcg(ranking, relevant, 3),
        [
            1,  # the only relevant text comes first
            (discount[1] + discount[2]) / sum(discount),  # two of three, at ranks 2 and 3
            (1 * discount[0] + 2 * discount[1]) / (2 * discount[0] + 1 * discount[1]),  # grades in the wrong order
            0,
        ],
        rtol=1e-12,
    )
    np.testing.assert_allclose(retrieval.recall(ranking, relevant, 3), [1, 2 / 3, 1, 0])
    np.testing.assert_allclose(retrieval.recall(ranking, relevant, 1), [1, 0, 1 / 2, 0])
    np.testing.assert_allclose(retrieval.reciprocal_rank(ranking, relevant, 3), [1, 1 / 2, 1, 0])
    np.testing.assert_allclose(retrieval.reciprocal_rank(ranking, relevant, 1), [1, 0, 1, 0])


def test_more_relevant_texts_than_ranks_do_not_lower_the_best_ndcg():
    relevant = relevance(dict.fromkeys(range(20), 1))
    assert retrieval.ndcg(np.arange(20)[None], relevant, 10)[0] == pytest.approx(1)
    assert retrieval.recall(np.arange(20)[None], relevant, 10)[0] == 0.5


def test_metrics_equal_loops_over_random_graded_rankings():
    rng = np.random.default_rng(0)
    ranking = np.array([rng.permutation(40)[:25] for _ in range(30)])
    ranking[3, 5:] = -1  # a ranking that ends early
    answers = [
        {int(d): float(rng.integers(1, 4)) for d in rng.choice(40, rng.integers(1, 15), replace=False)}
        for _ in range(30)
    ]
    for k in (1, 5, 10, 25):
        ndcg, recall, mrr = [], [], []
        for ranked, answer in zip(ranking.tolist(), answers):
            dcg = sum(answer.get(d, 0) / math.log2(r + 2) for r, d in enumerate(ranked[:k]))
            best = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(answer.values(), reverse=True)[:k]))
            hits = [r for r, d in enumerate(ranked[:k]) if d in answer]
            ndcg.append(dcg / best)
            recall.append(len(hits) / len(answer))
            mrr.append(1 / (hits[0] + 1) if hits else 0)
        np.testing.assert_allclose(retrieval.ndcg(ranking, relevance(*answers), k), ndcg, rtol=1e-12)
        np.testing.assert_allclose(retrieval.recall(ranking, relevance(*answers), k), recall)
        np.testing.assert_allclose(retrieval.reciprocal_rank(ranking, relevance(*answers), k), mrr)


def test_metrics_are_means_over_all_queries():
    means = retrieval.metrics(np.array([[0, 1], [0, 1]]), relevance({0: 1}, {5: 1}))
    assert means == {"ndcg@10": 0.5, "recall@10": 0.5, "mrr@10": 0.5, "recall@100": 0.5}
    with pytest.raises(ValueError, match="1 rankings for 2 queries"):
        retrieval.metrics(np.array([[0, 1]]), relevance({0: 1}, {5: 1}))


# Sets


def test_a_set_is_read_with_row_indices_for_ids(tmp_path):
    data = retrieval.read_set(make(tmp_path / "set", chunked=True))
    assert len(data.queries) == 12 and data.corpus_ids[20] == "c20"
    assert [rows.tolist() for rows in data.documents] == [list(range(6 * d, 6 * d + 6)) for d in range(4)]
    assert data.relevant[3].indices.tolist() == [3, 20] and data.relevant[3].grades.tolist() == [1, 2]
    assert data.relevant[4].indices.tolist() == [4]
    plain = retrieval.read_set(make(tmp_path / "plain", chunked=False))
    assert [rows.tolist() for rows in plain.documents] == [[i] for i in range(24)]


CORPUS, QUERIES = [{"_id": "c", "text": "x"}], [{"_id": "q", "text": "y"}]
QREL = {"query-id": "q", "corpus-id": "c", "score": 1}


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        ([], QUERIES, [QREL], "corpus.jsonl is empty"),
        (CORPUS, QUERIES, [], "qrels.jsonl: 1 queries have no relevant text, first 'q'"),
        (CORPUS, QUERIES, [QREL | {"score": 0}], "1 queries have no relevant text"),
        (CORPUS, QUERIES, [QREL | {"corpus-id": "z"}], "qrels.jsonl, line 1: query-id 'q', corpus-id 'z'"),
        (CORPUS * 2, QUERIES, [QREL], "corpus.jsonl, line 2: the id 'c' is already used in line 1"),
        ([{"_id": "c"}], QUERIES, [QREL], "corpus.jsonl, line 1 ._id .c.. has no text"),
        ([CORPUS[0] | {"document": "d", "chunk": 1}], QUERIES, [QREL], "chunk 1 of document 'd' must be 0"),
        ([CORPUS[0] | {"document": ["d"]}], QUERIES, [QREL], r"line 1 .*: \"document\" is \['d'\], expected a string"),
        (
            [{"_id": "c", "chunks": ["x"]}],
            QUERIES,
            [QREL],
            'line 1 .* has "chunks": in corpus.jsonl each chunk is a row',
        ),
        (
            [{"_id": "c", "text": ""}],
            QUERIES,
            [QREL],
            "corpus.jsonl, line 1 .* has no text; 1 of the 1 rows of .* have none",
        ),
        (CORPUS, [{"_id": "q", "text": " "}], [QREL], "queries.jsonl, line 1 .* has no text"),
        (CORPUS, [{"_id": "q", "chunks": ["x"]}], [QREL], 'queries.jsonl, line 1 .* has no text: expected "text"$'),
        (
            CORPUS,
            QUERIES,
            [QREL | {"query-id": ["q"]}],
            r"qrels.jsonl, line 1: \"query-id\" is \['q'\], expected a string",
        ),
        (CORPUS, QUERIES, [QREL | {"corpus-id": 7}], '"corpus-id" is 7, expected a string: write "7"'),
        (CORPUS, QUERIES, [QREL | {"score": True}], "score True: expected"),
        (CORPUS, QUERIES, [QREL | {"score": "1"}], "score '1': expected"),
        (CORPUS, QUERIES, [QREL, QREL | {"score": 2}], "line 2: 'c' has score 2 for 'q', but 1 in an earlier line"),
    ],
)
def test_a_broken_set_is_one_sentence(tmp_path, corpus, queries, qrels, message):
    with pytest.raises(ValueError, match=message):
        retrieval.read_set(write(tmp_path, corpus, queries, qrels))


def test_an_error_about_a_missing_folder_names_the_files_it_must_have(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one with corpus.jsonl, queries.jsonl and qrels.jsonl"):
        retrieval.read_set(tmp_path / "nowhere")


def test_rows_with_and_without_a_document_may_be_mixed(tmp_path):
    corpus = [{"_id": "a", "text": "x", "document": 1}, {"_id": "b", "text": "y"}, {"_id": "c", "text": "z"}]
    corpus.append({"_id": "d", "text": "u", "document": 1, "chunk": 1})
    folder = write(tmp_path / "set", corpus, [{"_id": "q", "text": "x"}], [QREL | {"corpus-id": "a"}])
    assert [rows.tolist() for rows in retrieval.read_set(folder).documents] == [[0, 3], [1], [2]]


# Models


def test_chunks_are_ranked_in_context_and_alone(tmp_path):
    encoder, data = small.encoder(), retrieval.read_set(make(tmp_path / "set", chunked=True))
    queries, context = retrieval.embed_set(encoder, data)
    documents = [data.corpus[6 * d : 6 * d + 6] for d in range(4)]
    np.testing.assert_allclose(context, np.concatenate(encoder.encode_documents(documents)), atol=1e-6)
    _, alone = retrieval.embed_set(encoder, data, alone=True)
    np.testing.assert_allclose(alone, encoder.encode(data.corpus), atol=1e-6)
    assert np.abs(alone - context).max() > 1e-2
    np.testing.assert_allclose(queries, encoder.encode(data.queries), atol=1e-6)


def test_a_title_comes_before_its_text(tmp_path):
    corpus = [{"_id": "c0", "title": "Trees", "text": "of arrays"}, {"_id": "c1", "title": "", "text": " as it is "}]
    qrels = [{"query-id": "q0", "corpus-id": "c0", "score": 1}]
    folder = write(tmp_path / "set", corpus, [{"_id": "q0", "text": "tree"}], qrels)
    assert retrieval.read_set(folder).corpus == ["Trees of arrays", "as it is"]


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_a_ranking_equals_that_of_texts_encoded_in_the_precision(tmp_path, precision):
    encoder, data = small.encoder(), retrieval.read_set(make(tmp_path / "set", chunked=False))
    queries, corpus = (encoder.encode(texts, precision=precision) for texts in (data.queries, data.corpus))
    if "binary" in precision:
        bits = [np.unpackbits(v.view(np.uint8), axis=1) for v in (queries, corpus)]
        scores = -(bits[0][:, None] != bits[1]).sum(-1).astype(float)
    else:
        unit = [v / np.linalg.norm(v.astype(float), axis=1, keepdims=True) for v in (queries, corpus)]
        scores = unit[0] @ unit[1].T
    ranking = retrieval.rank(encoder, data, [precision])[precision]
    np.testing.assert_array_equal(ranking, np.argsort(-scores, axis=1, kind="stable"))
    assert retrieval.evaluate_retrieval(encoder, data, [precision]) == {precision: retrieval.score(ranking, data)}


def test_a_contextual_set_is_evaluated_both_ways(tmp_path):
    encoder, data = small.encoder(), retrieval.read_set(make(tmp_path / "set", chunked=True))
    context = retrieval.evaluate_retrieval(encoder, data, ["float32", "int8"])
    alone = retrieval.evaluate_retrieval(encoder, data, ["float32", "int8"], alone=True)
    assert list(context) == list(alone) == ["float32", "int8"]
    assert context != alone
    # Query i is text i after one more word: without context even a random model ranks it first.
    assert alone["float32"]["ndcg@10"] > 0.8
