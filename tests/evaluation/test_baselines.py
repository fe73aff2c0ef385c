import math

import numpy as np

from embed.evaluation import baselines
from embed.evaluation.sets import RetrievalSet


def make(corpus, queries, documents=None):
    documents = [np.array([i]) for i in range(len(corpus))] if documents is None else documents
    ids = [f"c{i}" for i in range(len(corpus))]
    return RetrievalSet("set", [f"q{i}" for i in range(len(queries))], queries, ids, corpus, documents, [])


def test_bm25_ranks_as_the_formula_does():
    corpus = ["parse file", "parse parse config of the long text", "open file", "nothing"]
    query = ["parse", "file", "file"]
    texts = [text.split() for text in corpus]
    mean = np.mean([len(t) for t in texts])
    scores = []
    for text in texts:
        score = 0
        for word in query:
            containing, count = sum(word in t for t in texts), text.count(word)
            idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
        scores.append(score)
    order = sorted(range(4), key=lambda i: -scores[i])
    assert scores[order[2]] > 0 == scores[order[3]]
    assert baselines.bm25(make(corpus, [" ".join(query)]), depth=4).tolist() == [[*order[:3], -1]]


def test_bm25_leaves_ranks_empty_for_texts_without_a_common_word_and_breaks_ties_by_id():
    ranking = baselines.bm25(make(["a b", "c", "a b"], ["b", "zebra", "..."]), depth=3)
    assert ranking.tolist() == [[2, 0, -1], [-1, -1, -1], [-1, -1, -1]]  # c2 before c0, as in trec_eval


def test_bm25_in_a_language_stems_words_and_leaves_out_stop_words():
    corpus = make(["a study of cells", "the studied cells of the cell", "nothing"], ["studying a cell"])
    assert baselines.bm25(corpus, depth=3)[0].tolist() == [0, 1, -1]  # equal strings are "a", and "cell" of the second
    assert baselines.bm25(corpus, language="eng", depth=3)[0].tolist() == [1, 0, -1]  # has "cell" twice


def test_bm25_in_context_puts_the_first_chunk_of_the_document_before_each_other_chunk():
    corpus, documents = ["ledger", "def add", "parser", "def add"], [np.array([0, 1]), np.array([2, 3])]
    data = make(corpus, ["ledger add", "parser add"], documents)
    assert baselines.bm25(data, depth=2)[:, 0].tolist() == [0, 2]  # without context the two functions are equal
    assert baselines.bm25(data, context=True, depth=2)[:, 0].tolist() == [1, 3]
