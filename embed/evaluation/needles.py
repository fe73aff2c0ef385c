"""Evaluation sets of long texts, each of which hides one short text that answers a query (needle in a haystack)."""

import numpy as np

from embed.evaluation.sets import RetrievalSet
from embed.tokenizers import Tokenizer

COUNT = 50  # of needles, and so of queries and texts


def hide(data: RetrievalSet, tokens: int, tokenizer: Tokenizer, count: int = COUNT, seed: int = 0) -> RetrievalSet:
    """A set of `count` texts of at most `tokens` tokens: a relevant text of `data` each, hidden among the same others.

    The others are texts of `data` that answer none of the queries, in a random order that all share, repeated if they
    are too few; one that no longer fits is skipped. The needles stand between two of them at depths that are spread
    over the length. A query must find its text. ValueError if there is no needle or nothing to hide it among.
    """
    sizes = np.array([len(ids) for ids in tokenizer.encode(data.corpus)])
    chosen: list[tuple[int, int]] = []  # query, its needle
    for query in np.random.default_rng(seed).permutation(len(data.queries)).tolist():
        rows = data.relevant_rows[query]
        if len(rows) and sizes[rows[0]] < tokens and rows[0] not in [needle for _, needle in chosen]:
            chosen.append((query, int(rows[0])))
        if len(chosen) == count:
            break
    answers = {row for query, _ in chosen for row in data.relevant_rows[query].tolist()}
    others = [row for row in range(len(data.corpus)) if row not in answers and sizes[row]]
    hay = np.random.default_rng(seed + 1).permutation(others).astype(int).tolist()
    texts = []
    for k, (query, needle) in enumerate(chosen):
        around = _filled(tokens - sizes[needle], hay, sizes)
        if not around:
            raise ValueError(
                f"{data.name} has no text that fits {tokens} tokens beside the answer of query "
                f"{data.query_ids[query]!r}"
            )
        ends = np.cumsum([0, *sizes[around]])
        depth = int(np.abs(ends - (k + 0.5) / len(chosen) * ends[-1]).argmin())
        texts.append("\n\n".join(data.corpus[row] for row in [*around[:depth], needle, *around[depth:]]))
    if not texts:
        raise ValueError(f"{data.name} has no relevant text of fewer than {tokens} tokens to hide")
    names = [data.query_ids[query] for query, _ in chosen]
    return RetrievalSet(
        name=f"{data.name}, {tokens} tokens",
        query_ids=names,
        queries=[data.queries[query] for query, _ in chosen],
        corpus_ids=[f"haystack of {name}" for name in names],
        corpus=texts,
        documents=[np.array([row]) for row in range(len(texts))],
        judgments=[{f"haystack of {name}": 1} for name in names],
        counts={"queries": len(names), "corpus": len(texts)},
    )


def _filled(tokens: int, rows: list[int], sizes: np.ndarray) -> list[int]:
    """Rows in order, again and again, without those that no longer fit into `tokens` tokens together."""
    filled = []
    while rows := [row for row in rows if sizes[row] <= tokens]:
        for row in rows:
            if sizes[row] <= tokens:
                tokens -= sizes[row]
                filled.append(row)
    return filled
