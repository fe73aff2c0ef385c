"""Metrics of rankings, by trec_eval (pytrec_eval), as in BEIR and MTEB."""

import re
from collections.abc import Sequence

import numpy as np
import pytrec_eval
from jaxtyping import Float64, Int32

from embed.evaluation.sets import RetrievalSet

# Those of a run's report. A ranking shorter than k counts as empty after its end.
METRICS = ("ndcg@10", "recall@10", "mrr@10", "recall@100")
MEASURES = {"ndcg": "ndcg_cut", "recall": "recall", "map": "map_cut", "precision": "P", "mrr": "recip_rank"}


def score_queries(
    ranking: Int32[np.ndarray, "q k"], data: RetrievalSet, metrics: Sequence[str] = METRICS
) -> dict[str, Float64[np.ndarray, " q"]]:
    """{metric: its value for each query} of a ranking of corpus rows, best first; -1 is an empty rank.

    ndcg@k: gains are linear in the grade, the discount is 1 / log2(rank + 1). recall@k: the fraction of relevant texts
    among the first k. mrr@k: 1 / rank of the first relevant text if that is at most k. map@k, precision@k: as in
    trec_eval. Judged texts that are not in the corpus count as relevant; a query without a relevant text scores 0.
    """
    if len(ranking) != len(data.queries) or not len(ranking):
        raise ValueError(f"{len(ranking)} rankings for {len(data.queries)} queries: expected one per query, at least 1")
    run = {
        query: {data.corpus_ids[row]: -float(rank) for rank, row in enumerate(ranked) if row >= 0}
        for query, ranked in zip(data.query_ids, ranking.tolist())
    }
    return score_run(run, dict(zip(data.query_ids, data.judgments)), metrics)


def score_run(
    run: dict[str, dict[str, float]], judgments: dict[str, dict[str, int]], metrics: Sequence[str] = METRICS
) -> dict[str, Float64[np.ndarray, " q"]]:
    """`score_queries` of {query: {text: score}}, in the order of `judgments`.

    Of equal scores, the greater id comes first, as in trec_eval.
    """
    parts = check_metrics(metrics)
    of_trec = {"recip_rank"} & {MEASURES[part[1]] for part in parts.values()}
    of_trec |= {f"{MEASURES[part[1]]}.{part[2]}" for part in parts.values() if part[1] != "mrr"}
    found = pytrec_eval.RelevanceEvaluator(judgments, of_trec).evaluate(run)

    def value(query: str, metric: str) -> float:
        kind, k = parts[metric].groups()
        if kind != "mrr":
            return found.get(query, {}).get(f"{MEASURES[kind]}_{k}", 0.0)
        value = found.get(query, {}).get("recip_rank", 0.0)
        return value if value >= 1 / int(k) else 0.0

    return {metric: np.array([value(query, metric) for query in judgments]) for metric in metrics}


def check_metrics(metrics: Sequence[str]) -> dict[str, re.Match]:
    """{metric: match of (kind, rank)}. ValueError for a metric that does not exist."""
    parts = {metric: re.fullmatch(r"([a-z]+)@([1-9]\d*)", metric) for metric in metrics}
    for metric, part in parts.items():
        if not part or part[1] not in MEASURES:
            raise ValueError(
                f"metric {metric!r} must be one of {', '.join(MEASURES)}, then @ and a rank, as in ndcg@10"
            )
    return parts
