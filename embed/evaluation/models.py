"""What is evaluated: an `Encoder`, BM25, or a model of sentence-transformers, behind one function that ranks a set."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from embed.evaluation import baselines, retrieval
from embed.evaluation.retrieval import Form, Model
from embed.evaluation.sets import RetrievalSet
from embed.inference.encoder import PRECISIONS, check_precision
from embed.inference.encoder import quantize as quantize_vectors

BM25 = "bm25"


class Candidate(NamedTuple):
    """A model that is evaluated."""

    name: str  # owner/name, as in MTEB
    revision: str  # changes with the weights
    model: Model | None  # None: BM25
    about: dict = {}  # for the record: path, digest, …

    @property
    def dimensions(self) -> int | None:
        return self.model and self.model.dimensions

    @property
    def is_own(self) -> bool:
        """Whether the model was trained for int8, and can do late chunking."""
        return self.model is not None and not isinstance(self.model, SentenceTransformers)

    def forms(self, precisions: Sequence[str] = (), dimensions: Sequence[int] = ()) -> list[Form]:
        """Every precision at full size, and as prefixes of `dimensions`. ValueError for one that the model lacks."""
        if self.model is None:
            if dimensions or set(precisions) - {"float32"}:
                raise ValueError("bm25 has no vectors: --precision and --truncate_dim are for models")
            return [Form("float32")]
        precisions = precisions or (retrieval.PRECISIONS if self.is_own else ("float32",))
        for precision in precisions:
            for size in (None, *dimensions):
                check_precision(precision, self.dimensions, size)
            if precision == "int8" and not self.is_own:
                raise ValueError(
                    f"--precision=int8: {self.name} has no int8 of its own, round(127·tanh v) is for models that were "
                    f"trained with it; float32, binary and ubinary are possible"
                )
        sizes = [None, *(size for size in dimensions if size != self.dimensions)]
        return [Form(precision, size) for size in sizes for precision in dict.fromkeys(precisions)]

    def rank(
        self,
        data: RetrievalSet,
        forms: Sequence[Form],
        *,
        alone: bool = False,
        language: str = "",
        depth: int = retrieval.DEPTH,
        parts: Mapping[str, np.ndarray] | None = None,
        show_progress_bar: bool = False,
    ) -> dict:
        """{form: ranking int32 [Q, depth]}; keywords as in `retrieval.rank`, `language` as in `baselines.bm25`."""
        if self.model is None:
            find = functools.partial(baselines.bm25, data, language=language, depth=depth)
            if parts is None:
                return {forms[0]: find()}
            return {name: {forms[0]: find(rows=rows)} for name, rows in parts.items()}
        how = dict(alone=alone or not self.is_own, depth=depth, parts=parts, show_progress_bar=show_progress_bar)
        return retrieval.rank(self.model, data, forms, **how)


class SentenceTransformers:
    """A model of sentence-transformers, with its own prompts for queries and documents; chunks are embedded alone."""

    def __init__(self, name: str, **keywords):
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(name, **keywords)
        self.dimensions = int(self.model.get_embedding_dimension())

    def encode(self, texts: Sequence[str], **keywords) -> np.ndarray:
        return np.asarray(self.model.encode_query(list(texts), convert_to_numpy=True), np.float32)

    def encode_documents(self, documents: Sequence[Sequence[str]], **keywords) -> list[np.ndarray]:
        flat = [chunk for document in documents for chunk in document]
        vectors = np.asarray(self.model.encode_document(flat, convert_to_numpy=True), np.float32)
        return np.split(vectors, np.cumsum([len(document) for document in documents])[:-1])

    def quantize(self, vectors: np.ndarray, precision: str) -> np.ndarray:
        if precision not in set(PRECISIONS) - {"int8"}:
            raise ValueError(f"precision {precision!r} must be float32, binary or ubinary")
        return quantize_vectors(vectors, precision)
