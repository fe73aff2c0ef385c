"""MaxSim of token vectors: exact, without an index."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

SCORES = 2**24  # cosines of tokens that exist at once, 64 MiB


def maxsim(
    queries: Sequence[Float32[np.ndarray, "q p"]], documents: Sequence[Float32[np.ndarray, "k p"]]
) -> Float32[np.ndarray, "n m"]:
    """The score of each query and document: the sum over the query's tokens of the cosine of the best document token.

    Texts are arrays of vectors of length 1, as `Encoder.encode_tokens_multi` gives them. A text without vectors has
    score 0. Scores compare the documents of one query: a longer query has higher ones.
    """
    lengths = np.array([len(text) for text in documents], np.int64)
    scores, filled = np.zeros((len(queries), len(documents)), np.float32), np.flatnonzero(lengths)
    asked = [i for i, text in enumerate(queries) if len(text)]
    if not asked or not len(filled):
        return scores
    tokens = np.concatenate([queries[i] for i in asked])
    of_query = np.cumsum([0, *(len(queries[i]) for i in asked)])[:-1]  # its first token
    block = np.cumsum(lengths[filled]) * len(tokens) // SCORES
    for part in np.split(filled, np.flatnonzero(np.diff(block)) + 1):
        of_document = np.cumsum([0, *lengths[part]])[:-1]
        cosines = tokens @ np.concatenate([documents[j] for j in part]).T
        best = np.maximum.reduceat(cosines, of_document, axis=1)  # query tokens, documents
        scores[np.ix_(asked, part)] = np.add.reduceat(best, of_query, axis=0)
    return scores
