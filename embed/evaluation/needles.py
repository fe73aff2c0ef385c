"""Evaluation sets of long texts, each of which hides one short text that answers a query (needle in a haystack)."""

import itertools
from collections.abc import Iterator

import numpy as np

from embed.evaluation.sets import RetrievalSet
from embed.tokenizers import Tokenizer

COUNT = 50  # of needles, and so of queries and texts


def hide(data: RetrievalSet, tokens: int, tokenizer: Tokenizer, count: int = COUNT, seed: int = 0) -> RetrievalSet:
    """A set of `count` texts of about `tokens` tokens: a relevant text of `data` each, among the same other texts.

    The others are texts of `data` that answer none of the queries, in a random order that all share, repeated if they
    are too few. The needle stands between two of them; its depth is the same share of the length in no two texts. Its
    query must find the text. ValueError if the set has no needle that fits or nothing to hide it among.
    """
    order = np.random.default_rng(seed).permutation(len(data.queries))
    chosen: list[tuple[int, int]] = []  # query, its needle
    sizes = np.array([len(ids) for ids in tokenizer.encode(data.corpus)])
    for query in order.tolist():
        rows = data.relevant_rows[query]
        if len(rows) and sizes[rows[0]] < tokens and rows[0] not in [needle for _, needle in chosen]:
            chosen.append((query, int(rows[0])))
        if len(chosen) == count:
            break
    answers = {row for query, _ in chosen for row in data.relevant_rows[query].tolist()}
    others = [row for row in range(len(data.corpus)) if row not in answers and sizes[row]]
    if not chosen or not others:
        what = "no relevant text of fewer tokens" if not chosen else "no other text"
        raise ValueError(f"{data.name} has {what}, so nothing can be hidden in {tokens} tokens")
    hay = np.random.default_rng(seed + 1).permutation(others).tolist()
    texts = []
    for k, (_, needle) in enumerate(chosen):
        around = list(_until(tokens - sizes[needle], hay, sizes))
        depth = round((k + 0.5) / len(chosen) * len(around))
        texts.append("\n\n".join(data.corpus[row] for row in [*around[:depth], needle, *around[depth:]]))
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


def _until(tokens: int, rows: list[int], sizes: np.ndarray) -> Iterator[int]:
    """Rows, again and again, as long as their texts have at most `tokens` tokens together."""
    for row in itertools.cycle(rows):
        tokens -= sizes[row]
        if tokens < 0:
            return
        yield row
