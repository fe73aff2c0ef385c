"""Retrieval on an evaluation set: embed it once, rank it in every form of the vectors, score.

data = sets.read_set(folder)
forms = [Form("float32"), Form("int8", 256)]
rankings = rank(encoder, data, forms)            {form: int32 [Q, DEPTH]}
score(rankings[forms[0]], data)                  {"ndcg@10", "recall@10", "mrr@10", "recall@100"}
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int32
from tqdm import tqdm

from embed import distributed
from embed.evaluation.metrics import METRICS, score_queries
from embed.evaluation.sets import RetrievalSet
from embed.inference.encoder import Encoder
from embed.inference.late_interaction import maxsim
from embed.inference.ranking import BLOCK_VECTORS, search_blocks

PRECISIONS = ("float32", "int8", "binary")  # that are evaluated
MULTI = "multi"  # the form of token vectors, compared by MaxSim
TOKEN_BYTES = "bytes of token vectors"  # the mean over the corpus: a count of a record
DEPTH = 100  # ranks that are kept
SLICE = 16384  # documents that are encoded at once, to bound the memory


class Form(NamedTuple):
    """A form of a model's vectors: a precision or MULTI, and the number of leading dimensions (None: all)."""

    precision: str
    dimensions: int | None = None

    def __str__(self) -> str:
        return self.precision if self.dimensions is None else f"{self.precision}-{self.dimensions}"


class Model(Protocol):
    """What is evaluated: `embed.inference.Encoder`, or a model of another library."""

    dimensions: int

    def encode(self, texts: Sequence[str], **keywords) -> Float32[np.ndarray, "n d"]: ...

    def encode_documents(self, documents: Sequence[Sequence[str]], **keywords) -> list[np.ndarray]: ...

    def quantize(self, vectors: Float32[np.ndarray, "n d"], precision: str) -> np.ndarray: ...


def forms(model: Model, dimensions: int | None = None) -> list[Form]:
    """The forms in which a model is evaluated; `dimensions` (0 or None: all) of its single vectors."""
    single = [Form(precision, dimensions or None) for precision in PRECISIONS]
    return single + [Form(MULTI)] * (MULTI in precisions(model))


def precisions(model: Model) -> tuple[str, ...]:
    """The precisions in which a model is evaluated: with MULTI if it has token vectors."""
    return (*PRECISIONS, MULTI) if isinstance(model, Encoder) and model.token_dimensions else PRECISIONS


def temporary(count: int, dimensions: int) -> Float32[np.ndarray, "n d"]:
    """Zero vectors in a temporary file (TMPDIR), which goes when they do: more may be kept than the memory holds."""
    if not count:
        return np.zeros((0, dimensions), np.float32)
    with tempfile.TemporaryFile(prefix="embed-vectors-") as file:
        file.truncate(count * dimensions * 4)
        return np.memmap(file, np.float32, "r+", shape=(count, dimensions))


def embed(
    model: Model,
    documents: Sequence[Sequence[str]],
    *,
    queries: bool = False,
    multi: bool = False,
    names: Sequence[str] | None = None,
    progress: str = "",
    truncate: bool = True,
    counts: dict | None = None,
) -> Float32[np.ndarray, "chunks d"] | list[Float32[np.ndarray, "tokens p"]]:
    """The vectors of all chunks of all documents in order, in a temporary file; an empty text has a zero vector.

    With `queries`, a document is one query. With `multi`, a list in memory: the token vectors of each chunk. With
    `truncate`, too long documents are cut, with a warning, and counted in
    `counts`. Errors name a document by its entry in `names`. A progress bar has the title `progress`.
    """
    noun = "queries" if queries else "texts"
    first = np.cumsum([0, *map(len, documents)])
    vectors, cut = [np.zeros((0, 0), np.float32)] * int(first[-1]), 0
    if not multi:
        vectors = temporary(int(first[-1]), model.dimensions)
    bar = tqdm(total=len(documents), desc=progress, unit="text", disable=not progress or not distributed.is_first())
    with bar:
        for start in range(0, len(documents), SLICE):
            stop = min(start + SLICE, len(documents))
            filled = [i for i in range(start, stop) if any(chunk.strip() for chunk in documents[i])]
            chosen, named = [documents[i] for i in filled], names and [names[i] for i in filled]
            if not filled:
                found = []
            elif isinstance(model, Encoder):
                with warnings.catch_warnings():  # which would tell the number of each slice
                    warnings.simplefilter("ignore")
                    segments, shortened = model.fit_documents(chosen, truncate=truncate, names=named)
                cut += shortened
                flat = (model.encode_segments_multi if multi else model.encode_segments)(segments, names=named)
                stops = np.cumsum([segment.num_spans for segment in segments])
                found = [flat[stop - segment.num_spans : stop] for segment, stop in zip(segments, stops)]
            elif queries:
                found = model.encode([text for (text,) in chosen])[:, None]
            else:
                found = model.encode_documents(chosen)
            for i, chunks in zip(filled, found):
                vectors[first[i] : first[i + 1]] = chunks
            bar.update(stop - start)
    if cut:
        said = f"{progress.rpartition(': ')[0]}: " if progress else ""
        warnings.warn(
            f"{said}{cut:,} of {len(documents):,} {noun} were cut to {model.max_length:,} tokens", stacklevel=3
        )
    if counts is not None:
        counts[f"cut {noun}"] = cut
    return vectors


def embed_queries(model: Model, data: RetrievalSet, **keywords) -> Float32[np.ndarray, "q d"] | list[np.ndarray]:
    """The vectors of a set's queries; `keywords` as in `embed`."""
    return embed(model, [[text] for text in data.queries], queries=True, names=data.query_names, **keywords)


def embed_corpus(
    model: Model, data: RetrievalSet, *, alone: bool = False, **keywords
) -> Float32[np.ndarray, "c d"] | list[np.ndarray]:
    """The vectors of a set's corpus; `keywords` as in `embed`.

    Chunks of one document are encoded in its context (late chunking), or with `alone` each by itself.
    """
    documents = [np.array([row]) for row in range(len(data.corpus))] if alone else data.documents
    names = data.corpus_names and [data.corpus_names[rows[0]] for rows in documents]
    texts = [[data.corpus[row] for row in rows] for rows in documents]
    vectors = embed(model, texts, names=names, **keywords)
    order = np.concatenate(documents)
    if np.array_equal(order, np.arange(len(order))):
        return vectors
    if isinstance(vectors, list):
        return [vectors[i] for i in np.argsort(order)]
    result = temporary(*vectors.shape)
    result[order] = vectors
    return result


def search(
    quantize: Callable[[np.ndarray, str], np.ndarray],
    queries: Float32[np.ndarray, "q d"],
    corpus: Float32[np.ndarray, "c d"],
    form: Form,
    *,
    order: Int32[np.ndarray, " n"],
    own: Int32[np.ndarray, " q"] | None = None,
    depth: int = DEPTH,
) -> tuple[np.ndarray, Int32[np.ndarray, "q depth"]]:
    """(scores, corpus rows) of the best `depth` of the corpus rows in `order` for each query; -1 is an empty rank.

    Of equal scores, the row that is earlier in `order` comes first. A query's `own` row is left out. Corpus vectors are
    read and quantized block by block. Several processes share the queries.
    """
    share = -(-len(queries) // jax.process_count())
    part = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    has_own = own is not None and bool((own >= 0).any())
    wanted = min(depth + has_own, len(order))
    blocks = (order[start : start + BLOCK_VECTORS] for start in range(0, len(order), BLOCK_VECTORS))
    scores, found = search_blocks(
        quantize(np.asarray(queries[part, : form.dimensions]), form.precision),
        ((rows, quantize(np.asarray(corpus[rows, : form.dimensions]), form.precision)) for rows in blocks),
        wanted,
        form.precision,
    )
    if has_own:
        is_own = found == own[part, None]
        others_first = np.argsort(is_own, axis=1, kind="stable")
        found = np.take_along_axis(np.where(is_own, -1, found), others_first, 1)
        scores = np.take_along_axis(scores, others_first, 1)
    empty = ((0, share - len(found)), (0, max(0, depth - found.shape[1])))
    found, scores = np.pad(found[:, :depth], empty, constant_values=-1), np.pad(scores[:, :depth], empty)
    if jax.process_count() > 1:
        found, scores = (multihost_utils.process_allgather(each, tiled=True) for each in (found, scores))
    return scores[: len(queries)], found[: len(queries)]


def search_tokens(
    queries: Sequence[np.ndarray],
    corpus: Sequence[np.ndarray],
    *,
    order: Int32[np.ndarray, " n"],
    own: Int32[np.ndarray, " q"] | None = None,
    depth: int = DEPTH,
) -> Int32[np.ndarray, "q depth"]:
    """The rows of `search`, by MaxSim of token vectors. Every process computes all of them."""
    scores = maxsim(queries, [corpus[row] for row in order])
    if own is not None:
        scores[order == own[:, None]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    found = np.where(np.take_along_axis(scores, best, 1) == -np.inf, -1, order[best])
    return np.pad(found, ((0, 0), (0, depth - found.shape[1])), constant_values=-1).astype(np.int32)


def descending(ids: Sequence[str], is_empty: np.ndarray) -> Int32[np.ndarray, " n"]:
    """The rows that are not empty, by id in descending order: trec_eval ranks equal scores so."""
    rows = np.flatnonzero(~is_empty)
    return np.array(sorted(rows.tolist(), key=ids.__getitem__, reverse=True), np.int32)


def rank(
    model: Model,
    data: RetrievalSet,
    forms: Sequence[Form],
    *,
    alone: bool = False,
    queries: np.ndarray | None = None,
    depth: int = DEPTH,
    parts: Mapping[str, np.ndarray] | None = None,
    counts: dict | None = None,
    show_progress_bar: bool = False,
) -> dict[Form, Int32[np.ndarray, "q depth"]] | dict[str, dict[Form, Int32[np.ndarray, "q depth"]]]:
    """{form: the best `depth` corpus rows of each query}. Texts are encoded once for all forms.

    `alone` is as in `embed_corpus`. `queries` are the query vectors if they are known already. A query without a text
    finds nothing, an empty text is never found, and a query's own text does not count (`RetrievalSet.own_rows`). With
    `parts` {name: corpus rows}, it is {name: {form: …}} of searches in these parts of the corpus. `counts` is as in
    `embed`.
    """
    title = data.name if show_progress_bar else ""
    of_queries = dict(progress=title and f"{title}: queries", counts=counts)
    of_corpus = dict(progress=title and f"{title}: corpus", counts=counts, alone=alone)
    if any(form.precision != MULTI for form in forms):
        queries = embed_queries(model, data, **of_queries) if queries is None else queries
        corpus = embed_corpus(model, data, **of_corpus)
    if any(form.precision == MULTI for form in forms):
        query_tokens = embed_queries(model, data, multi=True, **of_queries)
        corpus_tokens = embed_corpus(model, data, multi=True, **of_corpus)
        if counts is not None:
            counts[TOKEN_BYTES] = round(sum(each.nbytes for each in corpus_tokens) / max(len(corpus_tokens), 1))
    order = descending(data.corpus_ids, np.array([not text for text in data.corpus]))
    is_blank, own = np.array([not text.strip() for text in data.queries]), data.own_rows

    def find(form: Form, order: np.ndarray) -> np.ndarray:
        if form.precision == MULTI:
            ranking = search_tokens(query_tokens, corpus_tokens, order=order, own=own, depth=depth)
        else:
            ranking = search(model.quantize, queries, corpus, form, order=order, own=own, depth=depth)[1]
        return np.where(is_blank[:, None], -1, ranking)

    if parts is None:
        return {form: find(form, order) for form in forms}
    return {name: {form: find(form, order[np.isin(order, rows)]) for form in forms} for name, rows in parts.items()}


def score(ranking: np.ndarray, data: RetrievalSet, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The means over the queries of the metrics of a ranking."""
    return {metric: float(values.mean()) for metric, values in score_queries(ranking, data, metrics).items()}


def evaluate_retrieval(model: Model, data: RetrievalSet, forms: Sequence[Form], **keywords) -> dict[Form, dict]:
    """{form: metrics} of a model on a set; `keywords` as in `rank`."""
    return {form: score(ranking, data) for form, ranking in rank(model, data, forms, **keywords).items()}
