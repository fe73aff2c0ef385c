"""What is evaluated: an `Encoder`, BM25, or a model of sentence-transformers, behind one function that ranks a set."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from embed import paths, runs
from embed.checkpoints import model_folder
from embed.checkpoints.names import CONFIG
from embed.evaluation import baselines, retrieval
from embed.evaluation.retrieval import Form, Model
from embed.evaluation.sets import RetrievalSet
from embed.inference.precision import PRECISIONS, check_precision
from embed.inference.precision import quantize as quantize_vectors

BM25 = "bm25"
UNKNOWN = "no_revision_available"  # mteb's word


class Candidate(NamedTuple):
    """A model that is evaluated."""

    name: str  # owner/name, as in MTEB
    revision: str  # changes with the weights
    model: Model | None  # None: BM25
    about: dict = {}  # for the records: path, digest, parameters, …

    @property
    def dimensions(self) -> int | None:
        return self.model and self.model.dimensions

    @property
    def is_own(self) -> bool:
        """Whether our engine computes the vectors, with int8 as in training and late chunking."""
        return self.model is not None and not isinstance(self.model, SentenceTransformers)

    def forms(self, precisions: Sequence[str] = (), dimensions: Sequence[int] = ()) -> list[Form]:
        """Every precision at full size, and as prefixes of `dimensions`. ValueError for one that the model lacks."""
        if self.model is None:
            if dimensions or set(precisions) - {"float32"}:
                raise ValueError("bm25 has no vectors: --precision and --truncate_dim are for models")
            return [Form("float32")]
        precisions = precisions or (retrieval.precisions(self.model) if self.is_own else ("float32",))
        single = [precision for precision in precisions if precision != retrieval.MULTI]
        if len(single) < len(precisions) and retrieval.MULTI not in retrieval.precisions(self.model):
            raise ValueError(f"--precision=multi: {self.name} has no token vectors; late-interaction models have")
        for precision in single:
            for size in (None, *dimensions):
                check_precision(precision, self.dimensions, size)
            if precision == "int8" and not self.is_own:
                raise ValueError(
                    f"--precision=int8: {self.name} has no int8 of its own, round(127·tanh v) is for models that were "
                    "trained with it; float32, binary and ubinary are possible"
                )
        sizes = [None, *(size for size in dimensions if size != self.dimensions)]
        forms = [Form(precision, size) for size in sizes for precision in dict.fromkeys(single)]
        return forms + [Form(retrieval.MULTI)] * (len(single) < len(precisions))

    def rank(
        self,
        data: RetrievalSet,
        forms: Sequence[Form],
        *,
        alone: bool = False,
        language: str = "",
        depth: int = retrieval.DEPTH,
        parts: Mapping[str, np.ndarray] | None = None,
        counts: dict | None = None,
        show_progress_bar: bool = False,
    ) -> dict:
        """{form: ranking int32 [Q, depth]}; keywords as in `retrieval.rank`, `language` as in `baselines.bm25`."""
        if self.model is None:
            find = functools.partial(baselines.bm25, data, language=language, depth=depth)
            if parts is None:
                return {forms[0]: find()}
            return {name: {forms[0]: find(rows=rows)} for name, rows in parts.items()}
        how = dict(depth=depth, parts=parts, counts=counts, show_progress_bar=show_progress_bar)
        return retrieval.rank(self.model, data, forms, alone=alone or not self.is_own, **how)


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


def load(
    model: str,
    *,
    name: str = "",
    step: int = 0,
    max_length: int | None = None,
    rope_theta: float | None = None,
    revision: str | None = None,
) -> Candidate:
    """A model folder, RUN:NAME, a hub id (at a `revision`), bm25, or a model of sentence-transformers.

    `name` is owner/name in MTEB's results, by default the hub id or local/FOLDER.
    """
    source = resolve(model)
    own = source.lower() != BM25 and (runs.is_stage(source) or model_folder.is_encoder(source, revision))
    if rope_theta and not own:
        raise ValueError(f"--rope_theta={rope_theta:g}: only models that our engine encodes with have it, not {model}")
    if source.lower() == BM25:
        return Candidate(name or "embed/bm25", "lucene-1.5-0.75", None)
    folder = paths.path(source)
    is_local = paths.is_bucket(source) or folder.is_dir()
    name = name or (f"local/{folder.name}" if is_local else source)
    name = name if "/" in name else f"local/{name}"
    if not own:
        about = {"path": source}
        return Candidate(name, paths.digest(folder)[:16] if is_local else UNKNOWN, SentenceTransformers(source), about)
    encoder = runs.load_encoder(source, step, revision, max_length, rope_theta)
    about = {
        "path": source,
        "digest": encoder.digest,
        "max_length": encoder.max_length,
        **({"rope_theta": rope_theta} if rope_theta else {}),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(encoder.params)),
        "embedding_parameters": encoder.config.vocab_size * encoder.config.hidden_size,
        "matryoshka": list(encoder.matryoshka),
        **({} if runs.is_stage(source) else _card(source, revision)),
    }
    # Of a hub id MTEB wants the commit, the name of the snapshot's folder.
    commit = None if is_local else model_folder.resolve(source, revision, files=[CONFIG]).name
    return Candidate(name, commit or (encoder.digest or "unknown")[:16], encoder, about)


def resolve(model: str) -> str:
    """The folder of RUN:NAME, a stage or an export of a run; anything else unchanged."""
    run, _, name = model.rpartition(":")
    if not run or name.startswith("//") or paths.path(model).exists():
        return model
    folders = [paths.path(run) / name, paths.path(run) / "export" / name]
    for folder in folders:
        if runs.is_stage(folder) or (folder / CONFIG).exists():
            return f"{folder}"
    raise FileNotFoundError(f"--model={model}: neither {folders[0]} nor {folders[1]} is a stage or a model folder")


def _card(source: str, revision: str | None) -> dict:
    """{"license"} of a model's card, if it has one."""
    import huggingface_hub

    folder = paths.path(source) if paths.is_bucket(source) else model_folder.resolve(source, revision, ["README.md"])
    if not (folder / "README.md").exists():
        return {}
    card = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
    return {"license": card.data.license.lower()} if isinstance(card.data.license, str) else {}
