"""Retrieval on the evaluation sets: read, rank, score.

    data = read_set(folder)
    rankings = rank(encoder, data, ["float32", "int8"])            {precision: int32 [Q, DEPTH]}
    score(rankings["int8"], data)                                  {"ndcg@10", "recall@10", "mrr@10", "recall@100"}

A set is a folder with corpus.jsonl, queries.jsonl and qrels.jsonl in the layout of BEIR. Corpus rows that name a
`document` and their position in it (`chunk`) are the chunks of that document, in order. Rows are read as in every verb
(`embed.inference.index.read_rows`, docs/search.md).
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.inference.encoder import Encoder
from embed.inference.index import Index, Row, check_id, read_jsonl, read_rows, refuse_empty

PRECISIONS = ("float32", "int8", "binary")  # that are evaluated
DEPTH = 100  # ranks that are kept


class Relevance(NamedTuple):
    """Which corpus rows answer a query, and how well (grade > 0)."""

    indices: np.ndarray  # int[n]
    grades: np.ndarray  # float[n]


class RetrievalSet(NamedTuple):
    """Q queries, C corpus texts, and the relevant texts of each query."""

    name: str
    query_ids: list[str]
    queries: list[str]
    corpus_ids: list[str]
    corpus: list[str]
    documents: list[np.ndarray]  # corpus rows of each document in order, int[chunks]; without chunks, one row each
    relevant: list[Relevance]  # of each query
    query_names: list[str] | None = None  # for errors
    corpus_names: list[str] | None = None


def ndcg(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """nDCG@k of each query, float64 [Q]: Σ grade / log2(rank + 1), divided by the same sum of the best ranking.

    Gains are linear in the grade, as in trec_eval and BEIR. `ranking` int [Q, >=k] indexes the corpus, best first; -1
    is an empty rank.
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
    match = _gains(ranking, relevant, k) > 0
    return np.where(match.any(1), 1 / (match.argmax(1) + 1), 0.0)


def metrics(ranking: np.ndarray, relevant: Sequence[Relevance]) -> dict[str, float]:
    """Means over the queries. A ranking shorter than k counts as empty after its end."""
    if not len(relevant) or len(ranking) != len(relevant):
        raise ValueError(f"{len(ranking)} rankings for {len(relevant)} queries: expected one per query, at least one")
    return {
        "ndcg@10": float(ndcg(ranking, relevant, 10).mean()),
        "recall@10": float(recall(ranking, relevant, 10).mean()),
        "mrr@10": float(reciprocal_rank(ranking, relevant, 10).mean()),
        "recall@100": float(recall(ranking, relevant, 100).mean()),
    }


def files(folder) -> list:
    """The three files of a set: corpus, queries, qrels."""
    return [paths.path(folder) / f"{name}.jsonl" for name in ("corpus", "queries", "qrels")]


def read_set(folder) -> RetrievalSet:
    """Read an evaluation set. ValueError unless every query has a text, and a relevant text in the corpus.

    A corpus row may be empty, as in BEIR: it is never found. A warning counts these rows.
    """
    folder = paths.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one with corpus.jsonl, queries.jsonl and qrels.jsonl")
    corpus, queries, qrels = files(folder)
    texts, asked = read_rows(corpus), read_rows(queries, queries=True)
    refuse_empty(asked, queries)
    documents = _documents(corpus, texts)
    if empty := sum(row.is_empty for row in texts):
        if empty == len(texts):
            refuse_empty(texts, corpus)
        warnings.warn(
            f"{empty:,} of the {len(texts):,} rows of {corpus} have no text; they are never found", stacklevel=2
        )

    row_of = {row.id: i for i, row in enumerate(texts)}
    query_of = {row.id: i for i, row in enumerate(asked)}
    answers: list[dict[int, float]] = [{} for _ in asked]
    judged: dict[tuple[str, str], float] = {}
    for source, row in read_jsonl(qrels):
        query, text, grade = check_id(source, row, "query-id"), check_id(source, row, "corpus-id"), row.get("score")
        number = isinstance(grade, (int, float)) and not isinstance(grade, bool) and math.isfinite(grade)
        if query not in query_of or text not in row_of or not number:
            raise ValueError(
                f"{source}: query-id {query!r}, corpus-id {text!r}, score {grade!r}: expected ids of {queries.name} "
                f"and {corpus.name} and a number"
            )
        if judged.setdefault((query, text), grade) != grade:
            before = judged[query, text]
            raise ValueError(f"{source}: {text!r} has score {grade!r} for {query!r}, but {before!r} in an earlier line")
        if grade > 0:
            answers[query_of[query]][row_of[text]] = grade
    without = [row.id for row, answer in zip(asked, answers) if not answer]
    if without:
        raise ValueError(f"{qrels}: {len(without)} queries have no relevant text, first {without[0]!r}")
    return RetrievalSet(
        str(folder),
        [row.id for row in asked],
        [row.chunks[0] for row in asked],
        [row.id for row in texts],
        [row.chunks[0] for row in texts],
        documents,
        [Relevance(np.array(list(a)), np.array(list(a.values()), float)) for a in answers],
        [row.source for row in asked],
        [row.source for row in texts],
    )


def embed_set(
    encoder: Encoder,
    data: RetrievalSet,
    *,
    alone: bool = False,
    queries: np.ndarray | None = None,
    show_progress_bar: bool = False,
    truncate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 vectors of the queries [Q, D] and of the corpus [C, D]; an empty text has a zero vector.

    Chunks of one document are encoded in its context (late chunking), or with `alone` each by itself. `queries` are the
    query vectors if they are known already. `truncate` is as in `Encoder.encode`.
    """
    keywords = {"show_progress_bar": show_progress_bar, "truncate": truncate}
    if queries is None:
        queries = encoder.encode(data.queries, names=data.query_names, **keywords)
    documents = [np.array([row]) for row in range(len(data.corpus))] if alone else data.documents
    documents = [rows for rows in documents if any(data.corpus[row].strip() for row in rows)]
    chunked = [[data.corpus[row] for row in rows] for rows in documents]
    names = data.corpus_names and [data.corpus_names[rows[0]] for rows in documents]
    vectors = encoder.encode_documents(chunked, names=names, **keywords)
    corpus = np.zeros((len(data.corpus), encoder.dimensions), np.float32)
    corpus[np.concatenate(documents)] = np.concatenate(vectors)
    return queries, corpus


def rank(
    encoder: Encoder, data: RetrievalSet, precisions: Sequence[str], *, depth: int = DEPTH, **keywords
) -> dict[str, np.ndarray]:
    """{precision: the best `depth` corpus rows of each query, int32 [Q, depth]}; `keywords` as in `embed_set`.

    Texts are encoded once for all precisions.
    """
    queries, corpus = embed_set(encoder, data, **keywords)
    empty = np.flatnonzero(~corpus.any(1))
    return {
        p: Index(encoder.quantize(corpus, p), p, empty=empty).search(encoder.quantize(queries, p), depth)[1]
        for p in precisions
    }


def score(ranking: np.ndarray, data: RetrievalSet) -> dict[str, float]:
    """Metrics of a ranking of a set's corpus."""
    return metrics(ranking, data.relevant)


def evaluate_retrieval(
    encoder: Encoder, data: RetrievalSet, precisions: Sequence[str], **keywords
) -> dict[str, dict[str, float]]:
    """{precision: metrics} of an encoder on a set; `keywords` as in `embed_set`."""
    return {p: score(ranking, data) for p, ranking in rank(encoder, data, precisions, **keywords).items()}


def _gains(ranking: np.ndarray, relevant: Sequence[Relevance], k: int) -> np.ndarray:
    """The grade of the text at each of the first k ranks, 0 if it is not relevant, float64 [Q, k]."""
    gains = np.zeros((len(relevant), k))
    for row, (ranked, answer) in enumerate(zip(np.asarray(ranking)[:, :k], relevant)):
        match = ranked[:, None] == answer.indices  # [k, n]
        gains[row, : len(ranked)] = np.where(match, answer.grades, 0).sum(1)
    return gains


def _documents(path, rows: Sequence[Row]) -> list[np.ndarray]:
    """The corpus rows of each document in chunk order; a row without `document` is a document of its own."""
    documents: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        if "chunks" in row.fields:
            raise ValueError(
                f'{row.source} has "chunks": in {path.name} each chunk is a row, with "document" and "chunk"'
            )
        document, chunk = row.fields.get("document"), row.fields.get("chunk", 0)
        if not isinstance(document, (str, int, type(None))):
            raise ValueError(f'{row.source}: "document" is {document!r:.80}, expected a string or a whole number')
        chunks = documents.setdefault(("row", i) if document is None else (type(document), document), [])
        if chunk != len(chunks):
            raise ValueError(
                f"{row.source}: chunk {chunk!r} of document {document!r} must be {len(chunks)}: chunks are in order"
            )
        chunks.append(i)
    return [np.array(chunks) for chunks in documents.values()]
