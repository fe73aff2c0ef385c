"""Small evaluation sets."""

import json

import numpy as np
import small

from embed.evaluation.sets import RetrievalSet


def write(folder, corpus, queries, qrels):
    """A set in the layout of `embed prepare`."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make(folder, *, chunked):
    """24 texts, 12 queries."""
    texts = small.sentences(24, seed=5, longest=30)
    corpus = [{"_id": f"c{i}", "text": text} for i, text in enumerate(texts)]
    if chunked:
        for i, row in enumerate(corpus):
            row |= {"document": f"d{i // 6}", "chunk": i % 6}
    queries = [{"_id": f"q{i}", "text": f"the {text}"} for i, text in enumerate(texts[:12])]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"c{i}", "score": 1} for i in range(12)]
    return write(folder, corpus, queries, qrels + [{"query-id": "q3", "corpus-id": "c20", "score": 2}])


def judged(*answers: dict, corpus: int = 40) -> RetrievalSet:
    """A set with these judgments {row: grade} of its queries, and texts "text 0", …"""
    ids = [f"c{i:02}" for i in range(corpus)]
    return RetrievalSet(
        "set",
        [f"q{i}" for i in range(len(answers))],
        [f"query {i}" for i in range(len(answers))],
        ids,
        [f"text {i}" for i in range(corpus)],
        [np.array([i]) for i in range(corpus)],
        [{ids[row]: grade for row, grade in answer.items()} for answer in answers],
    )
