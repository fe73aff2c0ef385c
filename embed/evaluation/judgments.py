"""Evaluation sets that are judged without people, from logs and corpora, in the manner of the paper (§5.4).

query2query: queries that led to the same URL answer each other. query2doc: the texts that several systems rank high
together are relevant.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embed.inference.lexical import reciprocal_rank_fusion


class Tables(NamedTuple):
    """A set in the layout of `embed prepare`, and what was counted."""

    corpus: list[dict]
    queries: list[dict]
    qrels: list[dict]
    counts: Mapping[str, int]


def by_shared_urls(clicks: Iterable[tuple[str, str]], *, max_queries: int = 0, max_per_url: int = 100) -> Tables:
    """query2query: the corpus is all queries; two queries with a clicked URL in common are relevant to each other.

    clicks: (query, URL). A URL of more than `max_per_url` queries, such as a home page, joins none. Of more than
    `max_queries` (0: all) queries with a partner, those with the smallest digests are asked; the corpus stays whole. A
    query's own text has its own id in the corpus, so that it does not count as found.
    """
    urls: dict[str, dict[str, None]] = {}
    names: dict[str, str] = {}
    counts = Counter()
    for query, url in clicks:
        counts["clicks"] += 1
        if not query.strip():
            counts["empty queries"] += 1
            continue
        urls.setdefault(url, {})[names.setdefault(query.strip(), f"q{len(names)}")] = None
    partners: dict[str, dict[str, None]] = {}
    for members in urls.values():
        if len(members) > max_per_url:
            counts["urls of too many queries"] += 1
            continue
        for name in members:
            partners.setdefault(name, {}).update((other, None) for other in members if other != name)
    texts = {name: query for query, name in names.items()}
    asked = [name for name in texts if partners.get(name)]
    counts |= {"queries": len(names), "urls": len(urls), "queries with a partner": len(asked)}
    asked = sample(asked, texts, max_queries)
    return Tables(
        [{"_id": name, "text": text} for name, text in texts.items()],
        [{"_id": name, "text": texts[name]} for name in asked],
        [{"query-id": name, "corpus-id": other, "score": 1} for name in asked for other in partners[name]],
        dict(counts),
    )


def sample(names: Sequence[str], texts: Mapping[str, str], most: int) -> list[str]:
    """At most `most` names (0: all), those whose texts have the smallest digests, in the given order."""
    if not most or len(names) <= most:
        return list(names)
    kept = set(sorted(names, key=lambda name: hashlib.sha256(texts[name].encode()).digest())[:most])
    return [name for name in names if name in kept]


def by_fusion(
    query_ids: Sequence[str], corpus_ids: Sequence[str], rankings: Sequence[np.ndarray], *, relevant: int, k: int = 60
) -> list[dict]:
    """query2doc: qrels with the first `relevant` texts of the reciprocal rank fusion of rankings int [Q, n]."""
    fused, _ = reciprocal_rank_fusion(*rankings, k=k, depth=relevant)
    return [
        {"query-id": query, "corpus-id": corpus_ids[row], "score": 1}
        for query, rows in zip(query_ids, fused.tolist())
        for row in rows
        if row >= 0
    ]


def nested(ids: Sequence[str], needed: Iterable[int], sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """{size: rows} of parts of a corpus: the rows that are `needed`, then others in the order of the digest of their
    ids. A larger part contains the smaller ones. ValueError for a size that does not hold what is needed."""
    first = sorted(set(needed))
    others = np.setdiff1d(np.arange(len(ids)), first)
    order = sorted(others.tolist(), key=lambda row: hashlib.sha256(ids[row].encode()).digest())
    parts = {}
    for size in sizes:
        if not len(first) <= size <= len(ids):
            raise ValueError(
                f"--corpus_sizes={size} must be in {len(first)}..{len(ids)}: the relevant texts, and all texts"
            )
        parts[size] = np.array(sorted([*first, *order[: size - len(first)]]), np.int32)
    return parts
