"""Retrieval on the evaluation sets: read, rank, score.

    data = read_set(folder)
    rankings = rank(encoder, data, ["float32", "int8"])            {precision: int32 [Q, DEPTH]}
    score(rankings["int8"], data)                                  {"ndcg@10", "recall@10", "mrr@10", "recall@100"}

A set is a folder with corpus.jsonl, queries.jsonl and qrels.jsonl in the layout of BEIR; where corpus rows name a
`document` and their place in it (`chunk`), they are the chunks of that document, in order.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.inference.encoder import Encoder
from embed.inference.index import Index, read_jsonl

DEPTH = 100  # how far down a ranking is kept


class Relevance(NamedTuple):
    """Which corpus rows answer a query, and how well (grade > 0)."""

    indices: np.ndarray  # int[n]
    grades: np.ndarray  # float[n]


class RetrievalSet(NamedTuple):
    """Q queries, C corpus texts, and what answers what."""

    name: str
    query_ids: list[str]
    queries: list[str]
    corpus_ids: list[str]
    corpus: list[str]
    documents: list[np.ndarray]  # corpus rows of each document, in order: int[chunks]; alone where there are none
    relevant: list[Relevance]  # of each query


def ndcg(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """nDCG@k of each query, float64 [Q]: Σ grade / log2(rank + 1), over the same sum of the best ranking there is.

    Gains are linear in the grade, as in trec_eval and BEIR. `ranking` int [Q, >=k] indexes the corpus, best first;
    -1 is a place left empty.
    """
    discount = 1 / np.log2(np.arange(2, k + 2))
    gained = (_gains(ranking, relevant, k) * discount).sum(1)
    best = [(np.sort(r.grades)[::-1][:k] * discount[: len(r.grades)]).sum() for r in relevant]
    return gained / np.array(best)


def recall(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """The fraction of a query's relevant texts among the first k, float64 [Q]."""
    return (_gains(ranking, relevant, k) > 0).sum(1) / np.array([len(r.indices) for r in relevant])


def reciprocal_rank(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """1 / rank of the first relevant text if it is among the first k, else 0, float64 [Q]."""
    found = _gains(ranking, relevant, k) > 0
    return np.where(found.any(1), 1 / (found.argmax(1) + 1), 0.0)


def metrics(ranking: np.ndarray, relevant: Sequence[Relevance]) -> dict[str, float]:
    """Means over the queries. A ranking shorter than k counts as empty below its end."""
    if not len(relevant) or len(ranking) != len(relevant):
        raise ValueError(f"{len(ranking)} rankings for {len(relevant)} queries; there must be as many, and some")
    return {
        "ndcg@10": float(ndcg(ranking, relevant, 10).mean()),
        "recall@10": float(recall(ranking, relevant, 10).mean()),
        "mrr@10": float(reciprocal_rank(ranking, relevant, 10).mean()),
        "recall@100": float(recall(ranking, relevant, 100).mean()),
    }


def read_set(folder) -> RetrievalSet:
    """Read an evaluation set. Every query must have an answer in the corpus: anything else is an error."""
    folder = paths.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected corpus.jsonl, queries.jsonl and qrels.jsonl in it")
    corpus, queries, qrels = (folder / f"{name}.jsonl" for name in ("corpus", "queries", "qrels"))
    corpus_ids, texts, rows = _read_texts(corpus)
    query_ids, query_texts, _ = _read_texts(queries)

    row_of = {name: row for row, name in enumerate(corpus_ids)}
    query_of = {name: row for row, name in enumerate(query_ids)}
    answers: list[dict[int, float]] = [{} for _ in query_ids]
    for where, row in read_jsonl(qrels):
        query, text, grade = row.get("query-id"), row.get("corpus-id"), row.get("score")
        if query not in query_of or text not in row_of or not isinstance(grade, (int, float)):
            raise ValueError(
                f"{where}: query-id {query!r}, corpus-id {text!r}, score {grade!r}: expected ids of {queries.name} "
                f"and {corpus.name} and a number"
            )
        if grade > 0:
            answers[query_of[query]][row_of[text]] = grade
    without = [name for name, answer in zip(query_ids, answers) if not answer]
    if without:
        raise ValueError(f"{qrels}: {len(without)} queries have no relevant text, the first is {without[0]!r}")
    relevant = [Relevance(np.array(list(a)), np.array(list(a.values()), float)) for a in answers]
    return RetrievalSet(str(folder), query_ids, query_texts, corpus_ids, texts, _documents(corpus, rows), relevant)


def embed_set(
    encoder: Encoder,
    data: RetrievalSet,
    *,
    alone: bool = False,
    queries: np.ndarray | None = None,
    show_progress_bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 vectors of the queries [Q, D] and of the corpus [C, D].

    Chunks of one document are encoded in its context (late chunking), with `alone` each by itself. `queries`: their vectors
    where they are known from before.
    """
    if queries is None:
        queries = encoder.encode(data.queries, show_progress_bar=show_progress_bar)
    if alone:
        return queries, encoder.encode(data.corpus, show_progress_bar=show_progress_bar)
    chunked = [[data.corpus[row] for row in rows] for rows in data.documents]
    vectors = encoder.encode_documents(chunked, show_progress_bar=show_progress_bar)
    corpus = np.empty((len(data.corpus), encoder.dimensions), np.float32)
    corpus[np.concatenate(data.documents)] = np.concatenate(vectors)
    return queries, corpus


def rank(
    encoder: Encoder,
    data: RetrievalSet,
    precisions: Sequence[str],
    *,
    alone: bool = False,
    queries: np.ndarray | None = None,
    depth: int = DEPTH,
    show_progress_bar: bool = False,
) -> dict[str, np.ndarray]:
    """{precision: the best `depth` corpus rows of each query, int32 [Q, depth]}; encodes once (see `embed_set`)."""
    queries, corpus = embed_set(encoder, data, alone=alone, queries=queries, show_progress_bar=show_progress_bar)
    return {p: Index(encoder.quantize(corpus, p), p).search(encoder.quantize(queries, p), depth)[1] for p in precisions}


def score(ranking: np.ndarray, data: RetrievalSet) -> dict[str, float]:
    """The metrics of a ranking of a set's corpus."""
    return metrics(ranking, data.relevant)


def evaluate_retrieval(
    encoder: Encoder, data: RetrievalSet, precisions: Sequence[str], *, alone: bool = False
) -> dict[str, dict[str, float]]:
    """{precision: metrics} of an encoder on a set."""
    return {p: score(ranking, data) for p, ranking in rank(encoder, data, precisions, alone=alone).items()}


def _gains(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """The grade of the text at each of the first k ranks, 0 where it is not relevant, float64 [Q, k]."""
    gains = np.zeros((len(relevant), k))
    for row, (ranked, answer) in enumerate(zip(np.asarray(ranking)[:, :k], relevant)):
        match = ranked[:, None] == answer.indices  # [k, n]
        gains[row, : len(ranked)] = np.where(match, answer.grades, 0).sum(1)
    return gains


def _read_texts(path) -> tuple[list[str], list[str], list[tuple[str, Mapping]]]:
    """(ids, texts, rows) of a file of {"_id", "text"} and perhaps "title"."""
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} is empty")
    for where, row in rows:
        if not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise ValueError(f'{where}: expected "_id" and "text", both strings, got {row!r:.80}')
        if not isinstance(row.get("title", ""), str):
            raise ValueError(f'{where}: "title" must be a string, got {row["title"]!r:.80}')
    ids = [row["_id"] for _, row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: {len(ids) - len(set(ids))} ids stand more than once")
    # A title stands in front of its text, as in BEIR's own evaluation.
    texts = [f"{row['title']} {row['text']}" if row.get("title") else row["text"] for _, row in rows]
    return ids, texts, rows


def _documents(path, rows: Sequence[tuple[str, Mapping]]) -> list[np.ndarray]:
    """The corpus rows of each document in chunk order; a row without a document is one by itself."""
    documents: dict[object, list[int]] = {}
    for i, (where, row) in enumerate(rows):
        chunks = documents.setdefault(row.get("document", i), [])
        if row.get("chunk", 0) != len(chunks):
            raise ValueError(
                f"{where}: chunk {row.get('chunk')!r} of document {row.get('document')!r} should be {len(chunks)}; "
                f"chunks stand in order"
            )
        chunks.append(i)
    return [np.array(chunks) for chunks in documents.values()]
