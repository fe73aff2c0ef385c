import math

import numpy as np
import pytest
from evaluation_sets import judged

from embed.evaluation import metrics, retrieval
from embed.evaluation.metrics import score_queries


def test_metrics_equal_a_table_worked_out_by_hand():
    data = judged({4: 1}, {7: 1, 8: 1, 9: 1}, {1: 2, 2: 1}, {5: 1})
    ranking = np.array([[4, 0, 1], [0, 8, 7], [2, 1, 0], [1, 2, 3]], np.int32)
    discount = [1, 1 / math.log2(3), 0.5]
    names = ["ndcg@3", "recall@3", "recall@1", "mrr@3", "mrr@1", "map@3", "precision@3"]
    found = score_queries(ranking, data, names)
    expected = {
        "ndcg@3": [
            1,  # the only relevant text comes first
            (discount[1] + discount[2]) / sum(discount),  # two of three, at ranks 2 and 3
            (1 * discount[0] + 2 * discount[1]) / (2 * discount[0] + 1 * discount[1]),  # grades in the wrong order
            0,
        ],
        "recall@3": [1, 2 / 3, 1, 0],
        "recall@1": [1, 0, 1 / 2, 0],
        "mrr@3": [1, 1 / 2, 1, 0],
        "mrr@1": [1, 0, 1, 0],
        "map@3": [1, (1 / 2 + 2 / 3) / 3, 1, 0],
        "precision@3": [1 / 3, 2 / 3, 2 / 3, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, err_msg=name)


def test_more_relevant_texts_than_ranks_do_not_lower_the_best_ndcg():
    data = judged(dict.fromkeys(range(20), 1))
    found = score_queries(np.arange(20, dtype=np.int32)[None], data, ["ndcg@10", "recall@10"])
    assert found["ndcg@10"][0] == pytest.approx(1) and found["recall@10"][0] == 0.5


def test_metrics_equal_loops_over_random_graded_rankings():
    rng = np.random.default_rng(0)
    ranking = np.array([rng.permutation(40)[:25] for _ in range(30)], np.int32)
    ranking[3, 5:] = -1  # a ranking that ends early
    ranking[4] = -1  # one that finds nothing
    answers = [
        {int(d): int(rng.integers(1, 4)) for d in rng.choice(40, rng.integers(1, 15), replace=False)} for _ in range(30)
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
        found = score_queries(ranking, judged(*answers), [f"ndcg@{k}", f"recall@{k}", f"mrr@{k}"])
        for name, values in (("ndcg", ndcg), ("recall", recall), ("mrr", mrr)):
            np.testing.assert_allclose(found[f"{name}@{k}"], values, rtol=1e-9, atol=1e-12)


def test_a_judged_text_that_is_not_in_the_corpus_counts_as_relevant_and_is_never_found():
    data = judged({0: 1})
    data.judgments[0]["elsewhere"] = 1
    found = score_queries(np.array([[0, 1]], np.int32), data, ["recall@10", "ndcg@10"])
    assert found["recall@10"][0] == 0.5
    assert found["ndcg@10"][0] == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_a_query_without_a_relevant_text_scores_zero():
    found = score_queries(np.array([[0], [1]], np.int32), judged({0: 0}, {1: 1}), metrics.METRICS)
    assert {name: values.tolist() for name, values in found.items()} == dict.fromkeys(metrics.METRICS, [0, 1])


def test_of_equal_scores_the_greater_id_is_first():
    judgments = {"q": {"a": 1}}
    assert metrics.score_run({"q": {"a": 0.5, "b": 0.5}}, judgments, ["mrr@10"])["mrr@10"] == [0.5]
    assert metrics.score_run({"q": {"a": 0.5, "A": 0.5}}, judgments, ["mrr@10"])["mrr@10"] == [1]


def test_scores_are_means_over_all_queries():
    data = judged({0: 1}, {5: 1})
    means = retrieval.score(np.array([[0, 1], [0, 1]], np.int32), data)
    assert means == {"ndcg@10": 0.5, "recall@10": 0.5, "mrr@10": 0.5, "recall@100": 0.5}
    with pytest.raises(ValueError, match="1 rankings for 2 queries"):
        retrieval.score(np.array([[0, 1]], np.int32), data)


@pytest.mark.parametrize("metric", ["ndcg", "ndcg@0", "accuracy@10", "ndcg@x"])
def test_a_metric_that_does_not_exist_is_refused(metric):
    with pytest.raises(ValueError, match=f"metric '{metric}' must be one of ndcg, recall, map, precision, mrr"):
        metrics.score_run({}, {}, [metric])
