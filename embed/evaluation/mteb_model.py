"""Our models as models of mteb: one encoding of a task serves every form of the vectors.

mteb calls `index` and `search` for retrieval, and `encode` for its other tasks. Its own CompressionWrapper is not used:
it calibrates int8 on the batch and compares bits by cosine.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import mteb
import numpy as np
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import OutputDType, PromptType

from embed.evaluation import baselines, retrieval
from embed.evaluation.models import Candidate
from embed.evaluation.retrieval import Form
from embed.evaluation.sets import RetrievalSet

OUTPUTS = {"float32": OutputDType.FLOAT32, "int8": OutputDType.INT8, "binary": OutputDType.BINARY}
NEEDS_COLUMNS = ("document", "chunk")  # of a corpus whose chunks are embedded in their documents


def experiment(form: Form, dimensions: int | None) -> dict:
    """What names the folder of results of a form: experiments/dimensions_D__precision_P."""
    return {"dimensions": form.dimensions or dimensions, "precision": form.precision} if dimensions else {}


def make_meta(candidate: Candidate, form: Form) -> ModelMeta:
    """What mteb records of a model."""
    about, bm25 = candidate.about, candidate.model is None
    sizes = sorted({candidate.dimensions, *about.get("matryoshka", ())}, reverse=True) if candidate.dimensions else None
    fields = dict(
        loader=None,
        name=candidate.name,
        revision=candidate.revision,
        release_date=None,
        languages=None,
        n_parameters=about.get("parameters"),
        n_embedding_parameters=about.get("embedding_parameters"),
        memory_usage_mb=about["parameters"] * 4 / 2**20 if "parameters" in about else None,
        max_tokens=about.get("max_length"),
        embed_dim=sizes[0] if sizes and len(sizes) == 1 else sizes,
        license=about.get("license"),
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=[] if bm25 else ["JAX", "safetensors"],
        similarity_fn_name=None if bm25 else ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        model_type=["sparse"] if bm25 else ["dense"],
        modalities=["text"],
        experiment_kwargs=experiment(form, candidate.dimensions) or None,
        output_dtypes=None if bm25 else OUTPUTS.get(form.precision),
    )
    try:
        return ModelMeta(**fields)
    except ValueError:  # a license that mteb does not know
        return ModelMeta(**fields | {"license": None})


def comparable(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Quantized vectors as float32 whose cosine ranks as the distance of the precision: bits become ±1."""
    if precision not in ("binary", "ubinary"):
        return vectors.astype(np.float32)
    packed = (vectors.astype(np.int16) + 128).astype(np.uint8) if precision == "binary" else vectors
    return 2.0 * np.unpackbits(packed, axis=1).astype(np.float32) - 1


class Cache:
    """The float32 vectors of a subset, in temporary files, shared by the forms of a model; and what was counted."""

    def __init__(self):
        self._kept: dict = {}
        self.counts = Counter()

    def get(self, key, make: Callable):
        """What `make` returned for this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class Adapter(AbsEncoder):
    """A model in one form. `on_results(subset, split, {query: {text: score}})` is called after each search.

    Chunks of a corpus with the columns `document` and `chunk` are embedded in their documents, unless `alone`.
    """

    def __init__(self, candidate: Candidate, form: Form, cache: Cache, *, alone: bool = False, on_results=None):
        self.candidate, self.form, self.cache, self.alone = candidate, form, cache, alone
        self.mteb_model_meta = make_meta(candidate, form)
        self.on_results = on_results or (lambda *_: None)

    def encode(
        self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, show_progress_bar=True, **keywords
    ) -> np.ndarray:
        """float32 [N, D] of the texts of a task that is not retrieval; see `comparable`."""
        texts = [text for batch in inputs for text in batch["text"]]
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
        title = f"{task_metadata.name}: texts" if show_progress_bar else ""
        vectors = self.cache.get((len(texts), digest), functools.partial(self._embed, [[t] for t in texts], title))
        return comparable(self._quantize(vectors), self.form.precision)

    def index(self, corpus, *, task_metadata, hf_split, hf_subset, encode_kwargs, **keywords) -> None:
        """Embed a corpus."""
        where = (task_metadata.name, hf_subset, hf_split)
        title = f"{task_metadata.name}: corpus" if encode_kwargs.get("show_progress_bar", True) else ""
        self._vectors, self._ids, self._order = self.cache.get(
            (*where, "corpus"), functools.partial(self._index, corpus, task_metadata, title)
        )

    def search(
        self, queries, *, task_metadata, hf_split, hf_subset, top_k, encode_kwargs, top_ranked=None, **keywords
    ) -> dict[str, dict[str, float]]:
        """The best `top_k` texts of each query, or of `top_ranked` the scores of its candidates."""
        where = (task_metadata.name, hf_subset, hf_split)
        title = f"{task_metadata.name}: queries" if encode_kwargs.get("show_progress_bar", True) else ""
        texts = self.cache.get(
            (*where, "query texts"), lambda: list(_texts(queries, task_metadata, PromptType.query, len(queries)))[0]
        )
        documents = [[text] for text in texts]
        vectors = self.cache.get((*where, "queries"), functools.partial(self._embed, documents, title, queries=True))
        if top_ranked is None:
            scores, found = retrieval.search(
                self.candidate.model.quantize, vectors, self._vectors, self.form, order=self._order, depth=top_k
            )
            results = {
                query: {self._ids[row]: value for row, value in zip(rows, values) if row >= 0}
                for query, rows, values in zip(queries["id"], found.tolist(), scores.astype(float).tolist())
            }
        else:
            results = self._rerank(list(queries["id"]), vectors, top_ranked, top_k)
        self.on_results(hf_subset, hf_split, results)
        return results

    def _rerank(self, names: Sequence[str], queries: np.ndarray, top_ranked: Mapping, top_k: int) -> dict:
        row_of = {name: row for row, name in enumerate(self._ids)}
        results = {}
        for i, query in enumerate(names):
            candidates = list(dict.fromkeys(top_ranked.get(query, ())))
            rows = np.array([row_of[name] for name in candidates], int)
            asked, texts = (
                comparable(self._quantize(np.asarray(each)), self.form.precision)
                for each in (queries[i : i + 1], self._vectors[rows])
            )
            norms = np.linalg.norm(asked) * np.linalg.norm(texts, axis=1)
            scores = (texts @ asked[0]) / np.where(norms > 0, norms, 1)
            best = np.argsort(-scores, kind="stable")[:top_k]
            results[query] = {candidates[k]: float(scores[k]) for k in best}
        return results

    def _quantize(self, vectors: np.ndarray) -> np.ndarray:
        return self.candidate.model.quantize(np.asarray(vectors[:, : self.form.dimensions]), self.form.precision)

    def _embed(self, documents: Sequence[Sequence[str]], title: str, queries: bool = False) -> np.ndarray:
        counts: dict[str, int] = {}
        vectors = retrieval.embed(self.candidate.model, documents, queries=queries, progress=title, counts=counts)
        self.cache.counts.update(counts)
        return vectors

    def _index(self, corpus, task_metadata, title: str):
        """(vectors, ids, the order of `retrieval.search`)."""
        ids = list(corpus["id"])
        if set(NEEDS_COLUMNS) <= set(corpus.column_names) and not self.alone:
            data, counts = to_set(corpus, [], {}, task_metadata), {}
            vectors = retrieval.embed_corpus(self.candidate.model, data, progress=title, counts=counts)
            empty = sum(not text for text in data.corpus)
            self.cache.counts.update(counts | {"texts": len(ids), "empty texts": empty})
            return vectors, ids, retrieval.descending(ids, np.array([not text for text in data.corpus]))
        vectors = retrieval.temporary(len(ids), self.candidate.dimensions)
        is_empty, start = np.zeros(len(ids), bool), 0
        for texts in _texts(corpus, task_metadata, PromptType.document, retrieval.SLICE):
            stop = start + len(texts)
            vectors[start:stop] = self._embed([[text] for text in texts], title)
            is_empty[start:stop] = [not text.strip() for text in texts]
            start = stop
        self.cache.counts.update({"texts": len(ids), "empty texts": int(is_empty.sum())})
        return vectors, ids, retrieval.descending(ids, is_empty)


class Lexical:
    """BM25 as a model of mteb, in the language of a task."""

    def __init__(self, candidate: Candidate, *, on_results=None):
        self.mteb_model_meta = make_meta(candidate, Form("float32"))
        self.on_results = on_results or (lambda *_: None)

    def index(self, corpus, **keywords) -> None:
        self._corpus = corpus

    def search(self, queries, *, task_metadata, hf_split, hf_subset, top_k, top_ranked=None, **keywords) -> dict:
        texts = next(_texts(queries, task_metadata, PromptType.query, len(queries)))
        data = to_set(self._corpus, texts, dict.fromkeys(queries["id"]), task_metadata)
        languages = {name.split("-")[0] for name in languages_of(task_metadata, hf_subset)}
        language = languages.pop() if len(languages) == 1 else "eng"
        chosen = {query: set(rows) for query, rows in (top_ranked or {}).items()}
        depth = len(data.corpus) if top_ranked else min(top_k, len(data.corpus))
        # mteb itself leaves out a query's own text, where a task asks for it.
        ranking = baselines.bm25(data._replace(query_ids=[""] * len(texts)), language=language, depth=depth)
        results = {}
        for query, rows in zip(data.query_ids, ranking.tolist()):
            names = [data.corpus_ids[row] for row in rows if row >= 0]
            names = [name for name in names if not top_ranked or name in chosen.get(query, ())][:top_k]
            results[query] = {name: float(-rank) for rank, name in enumerate(names)}
        self.on_results(hf_subset, hf_split, results)
        return results


class Recorded:
    """A model of mteb whose search results are seen by `on_results`; everything else is the model's own."""

    def __init__(self, model, on_results: Callable):
        self._model, self._on_results = model, on_results
        self.mteb_model_meta = model.mteb_model_meta

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_model"], name)

    def index(self, *arguments, **keywords) -> None:
        self._search = self._model
        if not isinstance(self._model, mteb.SearchProtocol):
            self._search = mteb.models.SearchEncoderWrapper(self._model)
        self._search.index(*arguments, **keywords)

    def search(self, *arguments, hf_split: str, hf_subset: str, **keywords) -> dict:
        results = self._search.search(*arguments, hf_split=hf_split, hf_subset=hf_subset, **keywords)
        self._on_results(hf_subset, hf_split, results)
        return results


def languages_of(task_metadata, subset: str) -> list[str]:
    """The languages of a subset, as "eng-Latn"."""
    languages = task_metadata.eval_langs
    return list(languages.get(subset, [])) if isinstance(languages, dict) else list(languages)


def to_set(corpus, queries: Sequence[str], judgments: Mapping[str, Mapping | None], task_metadata) -> RetrievalSet:
    """A corpus of mteb, with queries and their judgments, as a set of ours."""
    texts = [text for part in _texts(corpus, task_metadata, PromptType.document, retrieval.SLICE) for text in part]
    documents: dict = {}
    if set(NEEDS_COLUMNS) <= set(corpus.column_names):
        for row, name in enumerate(corpus["document"]):
            documents.setdefault(name, []).append(row)
    else:
        documents = {row: [row] for row in range(len(texts))}
    return RetrievalSet(
        task_metadata.name,
        list(judgments),
        list(queries),
        list(corpus["id"]),
        [text.strip() for text in texts],
        [np.array(rows) for rows in documents.values()],
        [dict(judged or {}) for judged in judgments.values()],
    )


def _texts(dataset, task_metadata, prompt_type: PromptType, size: int):
    """The texts of queries or of a corpus as mteb gives them to a model, in lists of `size`."""
    loader = create_dataloader(
        dataset, task_metadata=task_metadata, prompt_type=prompt_type, batch_size=max(1, size), num_proc=None
    )
    for batch in loader:
        yield list(batch["text"])
