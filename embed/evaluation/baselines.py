"""Rankings without a model: BM25, and the fusion of two rankings."""

import logging
import re

import bm25s
import numpy as np

from embed.evaluation.retrieval import DEPTH, RetrievalSet

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and reports each index

WORD = re.compile(r"[^\W_]+")
CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str) -> list[str]:
    """Lower-case words; identifiers are split at _ and case: parseHTTPHeader_v2 -> parse http header v2."""
    return [part.lower() for word in WORD.findall(text) for part in CASE.split(word)]


def bm25(
    data: RetrievalSet, *, context: bool = False, k1: float = 1.5, b: float = 0.75, depth: int = DEPTH
) -> np.ndarray:
    """The BM25 ranking of a set, int32 [Q, depth]; on ties the lower index first, -1 after the last text with a match.

    k1 and b are the defaults of bm25s (Lucene's variant of the formula). With `context`, each chunk follows the first
    chunk of its document, which names the module.
    """
    texts = list(data.corpus)
    if context:
        for rows in data.documents:
            for row in rows[1:]:
                texts[row] = data.corpus[rows[0]] + "\n" + data.corpus[row]
    model = bm25s.BM25(method="lucene", k1=k1, b=b)
    model.index([words(text) for text in texts], show_progress=False)
    ranking = np.full((len(data.queries), depth), -1, np.int32)
    vocabulary = model.vocab_dict
    for row, query in enumerate(data.queries):
        tokens = [word for word in words(query) if word in vocabulary]
        if tokens:
            scores = model.get_scores(tokens)
            best = np.argsort(-scores, kind="stable")[:depth]
            best = best[scores[best] > 0]
            ranking[row, : len(best)] = best
    return ranking


def reciprocal_rank_fusion(*rankings: np.ndarray, k: int = 60, depth: int = DEPTH) -> np.ndarray:
    """Fuse rankings int [Q, n] into one, int32 [Q, depth] (Cormack et al. 2009).

    A text scores Σ 1 / (k + rank) over the rankings that contain it, with ranks from 1; on ties the lower index comes
    first. -1 is an empty rank, in the rankings and in the result.
    """
    fused = np.full((len(rankings[0]), depth), -1, np.int32)
    for row, lists in enumerate(zip(*rankings, strict=True)):
        scores: dict[int, float] = {}
        for ranked in lists:
            for rank, text in enumerate(ranked.tolist(), 1):
                if text >= 0:
                    scores[text] = scores.get(text, 0) + 1 / (k + rank)
        best = sorted(scores, key=lambda text: (-scores[text], text))[:depth]
        fused[row, : len(best)] = best
    return fused
