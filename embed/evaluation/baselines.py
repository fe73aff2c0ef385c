"""A ranking without a model: BM25."""

import numpy as np

from embed.evaluation.retrieval import DEPTH, descending
from embed.evaluation.sets import RetrievalSet
from embed.inference.lexical import K1, B, library, splitter


def bm25(
    data: RetrievalSet,
    *,
    context: bool = False,
    language: str = "",
    k1: float = K1,
    b: float = B,
    depth: int = DEPTH,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The BM25 ranking of a set, int32 [Q, depth]; ties as in `retrieval.search`, -1 after the last text with a match.

    k1 and b are the defaults of bm25s (Lucene's variant of the formula). With `context`, each chunk follows the first
    chunk of its document, which names the module. With a `language` (ISO 639-3), words are split, stemmed and left out
    as in MTEB's BM25 (`lexical.analyzer`); without one, see `lexical.words`. `rows` are the part of the corpus that is
    searched, by default all.
    """
    texts = list(data.corpus)
    if context:
        for chunks in data.documents:
            for row in chunks[1:]:
                texts[row] = data.corpus[chunks[0]] + "\n" + data.corpus[row]
    split = splitter(language)
    searched = descending(data.corpus_ids, np.zeros(len(texts), bool))
    searched = searched if rows is None else searched[np.isin(searched, rows)]
    model = library().BM25(method="lucene", k1=k1, b=b)
    model.index([split(texts[row]) for row in searched], show_progress=False)
    ranking = np.full((len(data.queries), depth), -1, np.int32)
    vocabulary = model.vocab_dict
    for i, (query, own) in enumerate(zip(data.queries, data.own_rows)):
        tokens = [word for word in split(query) if word in vocabulary]
        if tokens:
            scores = np.where(searched == own, 0, model.get_scores(tokens))
            best = np.argsort(-scores, kind="stable")[:depth]
            best = best[scores[best] > 0]
            ranking[i, : len(best)] = searched[best]
    return ranking
