"""Turn text into vectors: tokenize, pack into rows, one forward pass, mean over spans, quantize (ARCHITECTURE.md).

For late interaction, project the tokens instead of averaging them.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from embed import distributed
from embed.checkpoints import model_folder
from embed.inference import long_texts
from embed.inference.chunkers import Chunker
from embed.inference.memory import TooLongError, check_memory, out_of_memory
from embed.inference.packing import FINE_WORK, batches
from embed.inference.precision import NotFiniteError, check_count, check_precision, convert, is_finite, quantize
from embed.models import sharding, transformer
from embed.models.pooling import pool_spans
from embed.objectives.contrastive import normalize as to_unit_length
from embed.rows import Segment, Window, chunked, cut, dense, windows, write_rows
from embed.tokenizers import check_text

# The settings of a model folder that `Encoder` takes.
ENCODER_SETTINGS = ("separator", "max_length", "context_length", "matryoshka", "tanh", "pooling")
STREAM_BATCHES, CHARACTERS_PER_TOKEN = 64, 4  # a block of `encode_stream`
QUANTIZED = 1 << 14  # vectors of `encode_long` that are quantized together


def load(
    path, *, dtype: str | None = None, revision: str | None = None, mesh=None, rope_theta: float | None = None
) -> "Encoder":
    """Load an encoder from a model folder: one that `embed export` wrote, pplx-embed, or another bidirectional Qwen3.

    `path` is a folder, a folder in a bucket (gs://), or the id of a repository on the Hugging Face hub, for example
    "perplexity-ai/pplx-embed-v1-0.6b", at `revision`. `dtype` of the computation is "float32" or "bfloat16"; the
    default is float32 on CPU and bfloat16 on accelerators. A causal language model is refused: it can only be trained
    from. `mesh` is as in `Encoder`; parameters are sharded over it as in training. `rope_theta` replaces the model's
    base of the rotary angles: a larger one stretches positions, for texts longer than those of training.

    Compiled programs are kept for later processes (`keep_compiled_programs`).
    """
    keep_compiled_programs()
    dtype = dtype or ("float32" if _on_cpu() else "bfloat16")
    mesh = sharding.make_mesh() if mesh is None else mesh
    model = model_folder.open_model(path, revision)
    if model.language_model:
        raise ValueError(
            f"{path} is a causal language model, not an encoder: it can be the `init` of a stage that trains one"
        )
    tokenizer = model.tokenizer()
    shardings = sharding.parameter_shardings(mesh, transformer.abstract_params(model.config))
    config, params = transformer.encoder_only(model.config, model.params(shardings, dtype))
    how = {name: model.embedding[name] for name in ENCODER_SETTINGS}
    config = dataclasses.replace(config, dtype=dtype)
    encoder = Encoder(params, config, tokenizer, **how, mesh=mesh, path=path, digest=model.digest)
    return encoder.with_rope_theta(rope_theta) if rope_theta else encoder


def keep_compiled_programs() -> None:
    """Let jax keep compiled programs, up to 1 GiB, in ~/.cache/embed/compiled (or below $XDG_CACHE_HOME).

    The next process loads them instead of compiling them again. Nothing changes if jax has a folder already
    (JAX_COMPILATION_CACHE_DIR), if its cache is off (JAX_ENABLE_COMPILATION_CACHE=false), or if the folder cannot be
    made.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embed" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the programs of small models are small
    compilation_cache.reset_cache()  # a process that has compiled something would not look at the folder


class Encoder:
    """A model that turns texts into vectors. Made by `load`, or from parameters in memory.

    All devices of the mesh share the rows of a batch. If the devices belong to several processes, every process makes
    the same Encoder and makes the same calls; each process gets all vectors.
    """

    def __init__(
        self,
        params,
        config: transformer.TransformerConfig,
        tokenizer,
        *,
        mesh=None,
        separator: bool = True,
        max_length: int | None = None,
        context_length: int | None = None,
        matryoshka: Sequence[int] = (),
        tanh: bool = False,
        pooling: str = "mean",
        path=None,
        digest: str | None = None,
    ):
        """`separator`: whether the separator token stands between the chunks of a document, as it did in training.

        `mesh` comes from `embed.models.sharding.make_mesh`; by default it spans all devices of all processes along
        data. Parameters that are on this mesh keep their shardings, others are copied to each of its devices.
        `max_length` is the largest number of tokens of a text or document, None for no limit. A document of more than
        `context_length` tokens, the longest in training, is encoded in overlapping windows (`rows.windows`); None means
        no windows. With `tanh`, float32 vectors are tanh(v) of the pooled v; int8 and bits do not change. `pooling` is
        that of `pool_spans`. `digest` identifies the model.
        """
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
        # Without the fields that matter only for gradients, encoders of one architecture share their compiled programs.
        unroll = config.num_layers if _on_cpu() else config.unroll
        self.config = dataclasses.replace(config, remat="none", dense_barrier=False, unroll=unroll)
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        self.params = jax.tree.map(lambda x: _on_mesh(x, self.mesh, config.dtype), params)
        self.tokenizer, self.separator = tokenizer, separator
        self.max_length = self._model_max_length = max_length  # the first may be changed, the second is the model's
        self.context_length = context_length
        self.matryoshka, self.tanh, self.pooling = tuple(matryoshka), tanh, pooling
        self.path, self.digest = path, digest

    def with_rope_theta(self, theta: float) -> "Encoder":
        """The same encoder with another base of the rotary angles; it shares the parameters."""
        if not 0 < theta < float("inf"):
            raise ValueError(f"rope_theta={theta!r} must be positive")
        changed = copy.copy(self)
        changed.config = dataclasses.replace(self.config, rope_theta=float(theta))
        if self.digest and changed.config != self.config:
            changed.digest = hashlib.sha256(f"{self.digest} rope_theta={theta:g}".encode()).hexdigest()
        return changed

    @property
    def dimensions(self) -> int:
        """Dimensions D of a float32 vector before truncation."""
        return self.config.hidden_size

    @property
    def token_dimensions(self) -> int:
        """Dimensions P of a token's vector (`encode_tokens_multi`); 0 if the model has no projection."""
        return self.config.token_dimensions

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch by default; on CPU so few that activations stay in its cache."""
        return sharding.batch_shards(self.mesh) * (1024 if _on_cpu() else 65536)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        precision: str = "float32",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """One vector per text, in order; a single str gives a single vector.

        Returns float32 [N, D] (the pooled mean itself, or its tanh), int8 [N, D], or packed bits [N, D/8]: binary is
        int8, ubinary is uint8. `truncate_dim` keeps a prefix of each vector, before bits are packed.
        `normalize_embeddings` is for float32 only. `batch_tokens` is the size of a batch in tokens; None means 1,024
        on CPU and 65,536 on accelerators per shard of the batch. It changes no result. A text longer than
        `max_length` is an error, or with `truncate=True` is cut with a warning. A text without tokens is an error, and
        so is a vector that is not finite (NotFiniteError). Errors name a text by its index, or by its entry in `names`.
        """
        if isinstance(texts, str):
            return self.encode(
                [texts],
                precision=precision,
                truncate_dim=truncate_dim,
                normalize_embeddings=normalize_embeddings,
                batch_tokens=batch_tokens,
                truncate=truncate,
            )[0]
        segments, _ = self.fit_texts(texts, truncate=truncate, names=names)
        name = _namer("text", len(segments), names)
        return self._embed(
            segments, name, precision, truncate_dim, normalize_embeddings, batch_tokens, show_progress_bar
        )

    def encode_tokens_multi(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Late interaction: one array float32 [tokens, P] per text, with a vector of length 1 per token.

        Compare them with `embed.inference.maxsim`. Queries and documents are encoded alike. Keywords and errors are as
        in `encode`; a model without a projection is an error.
        """
        segments, _ = self.fit_texts(texts, truncate=truncate, names=names)
        return self._embed_tokens(segments, _namer("text", len(segments), names), batch_tokens, show_progress_bar)

    def encode_segments_multi(
        self,
        segments: Sequence[Segment],
        *,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """The token vectors of each span of segments from `fit_documents`, in order: float32 [tokens, P] each."""
        name = _namer("document", len(segments), names)
        return self._embed_tokens(segments, name, batch_tokens, show_progress_bar)

    def fit_texts(
        self, texts: Sequence[str], *, truncate: bool = False, names: Sequence[str] | None = None
    ) -> tuple[list[Segment], int]:
        """(segments that `encode` embeds, number that were cut): a segment per text."""
        texts = _list("texts", texts, "a str or a list of str")
        name = _namer("text", len(texts), names)
        for i, text in enumerate(texts):
            check_text(name(i), text)
        tokens = self.tokenizer.encode(texts)
        for i, ids in enumerate(tokens):
            if not len(ids):
                raise ValueError(f"{name(i)} has no tokens: {texts[i]!r:.80}")
        return self._fit([dense(ids) for ids in tokens], "text", name, truncate)

    def fit_tokens(
        self, texts: Sequence[Sequence[int]], *, truncate: bool = False, names: Sequence[str] | None = None
    ) -> tuple[list[Segment], int]:
        """`fit_texts` for texts that are already tokenized."""
        name = _namer("text", len(texts), names)
        for i, ids in enumerate(texts):
            if not len(ids):
                raise ValueError(f"{name(i)} has no tokens")
            if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                raise ValueError(
                    f"{name(i)} has token {min(ids) if min(ids) < 0 else max(ids)}, the vocabulary 0 to "
                    f"{self.tokenizer.vocab_size - 1}"
                )
        return self._fit([dense(ids) for ids in texts], "text", name, truncate)

    def quantize(
        self, vectors, precision: str, *, truncate_dim: int | None = None, normalize: bool = False
    ) -> np.ndarray:
        """Convert float32 vectors of `encode`, not normalized, to those that `encode` gives with these settings."""
        if self.tanh and precision == "int8":
            quantize(vectors, "float32")  # refuses what is not finite
            check_precision(precision, vectors.shape[-1], truncate_dim, normalize)
            return np.array(jnp.round(jnp.asarray(vectors)[..., :truncate_dim] * 127).astype(jnp.int8))
        return quantize(vectors, precision, truncate_dim=truncate_dim, normalize=normalize)

    def encode_tokens(self, tokens: Sequence[np.ndarray], precision: str = "float32") -> np.ndarray:
        """`encode` for texts that are already tokenized; a text without tokens gives a zero vector."""
        return self._embed([dense(ids) for ids in tokens], _namer("text", len(tokens)), precision)

    def encode_documents(
        self,
        documents: Sequence[Sequence[str]],
        *,
        precision: str = "float32",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Late chunking: one array [chunks, D] per document, each chunk pooled from states that saw the whole document.

        In a document of more than `context_length` tokens they saw only the chunk's window (`embed.rows.windows`),
        because a model neither uses nor ignores more context than its training documents had. Keywords and precisions
        are as in `encode`. An empty chunk gives a zero vector (in binary: every bit set), and so does a chunk that
        `truncate=True` cuts off entirely. A document without tokens is an error.
        """
        segments, _ = self.fit_documents(documents, truncate=truncate, names=names)
        vectors = self._embed(
            segments,
            _namer("document", len(segments), names),
            precision,
            truncate_dim,
            normalize_embeddings,
            batch_tokens,
            show_progress_bar,
        )
        return np.split(vectors, np.cumsum([s.num_spans for s in segments])[:-1]) if segments else []

    def encode_stream(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        precision: str = "float32",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        batch_tokens: int | None = None,
        truncate: bool = False,
    ) -> Iterator[np.ndarray]:
        """The vectors of texts that are read one after the other, such as those of a corpus larger than memory.

        Yields what `encode` returns for each text, [D or D/8], and what `encode_documents` returns for each document (a
        list of chunks), [chunks, D or D/8], in order. Texts are read ahead by about STREAM_BATCHES batches, and those
        of the next block are tokenized while the current one is encoded. Keywords are as in `encode`. An error comes
        when its block is reached, and names a text by its index.
        """
        if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
            raise ValueError(f"texts is {texts!r:.80}, expected texts, each a str or a list of str")
        check_precision(precision, self.dimensions, truncate_dim, normalize_embeddings)
        characters = STREAM_BATCHES * (batch_tokens or self.batch_tokens) * CHARACTERS_PER_TOKEN
        blocks = _blocks(texts, characters)

        def read() -> tuple[list | None, Exception | None]:
            """The next block, or why it cannot be read: the vectors of the block before it come first."""
            try:
                return next(blocks, None), None
            except Exception as error:
                return None, error

        def fit(first: int, block: list) -> tuple[list[bool], list[Segment]]:
            is_text = [isinstance(item, str) for item in block]
            names = [f"text {first + i}" for i in range(len(block))]
            segments: dict[int, Segment] = {}
            for kind, fit_kind in ((True, self.fit_texts), (False, self.fit_documents)):
                members = [i for i, each in enumerate(is_text) if each == kind]
                if members:
                    some = [block[i] for i in members]
                    fitted, _ = fit_kind(some, truncate=truncate, names=[names[i] for i in members])
                    segments |= zip(members, fitted)
            return is_text, [segments[i] for i in range(len(block))]

        with concurrent.futures.ThreadPoolExecutor(1, "tokenize") as pool:
            first, (block, error) = 0, read()
            waiting = block and pool.submit(fit, first, block)
            while waiting:
                is_text, segments = waiting.result()
                start, first, (block, error) = first, first + len(is_text), read()
                waiting = block and pool.submit(fit, first, block)
                name = _namer("text", len(segments), [f"text {start + i}" for i in range(len(segments))])
                vectors = self._embed(segments, name, precision, truncate_dim, normalize_embeddings, batch_tokens)
                stops = np.cumsum([segment.num_spans for segment in segments])
                for one, segment, stop in zip(is_text, segments, stops):
                    yield vectors[stop - 1] if one else vectors[stop - segment.num_spans : stop]
        if error:
            raise error

    def encode_long(
        self,
        texts: str | Sequence[str],
        chunker: Chunker,
        *,
        window: int | None = None,
        precision: str = "float32",
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        names: Sequence[str] | None = None,
    ) -> long_texts.Chunks | list[long_texts.Chunks]:
        """Late chunking of texts of any length: the chunks of each one, embedded in its context.

        A single str gives a single result. `chunker` gives the character offsets of a text's chunks, which may overlap
        (`embed.inference.chunkers`). Chunks that do not overlap have the vectors that `encode_documents` gives them.

        A text of more than `window` tokens is encoded in overlapping windows (`rows.windows`): time is linear in its
        length, memory constant. The default is the model's `context_length`, or else its `max_length`; without both,
        a text is one window. Other keywords and errors are as in `encode`.
        """
        if isinstance(texts, str):
            names = ["the text"] if names is None else names
            return self.encode_long(
                [texts],
                chunker,
                window=window,
                precision=precision,
                truncate_dim=truncate_dim,
                normalize_embeddings=normalize_embeddings,
                batch_tokens=batch_tokens,
                show_progress_bar=show_progress_bar,
                names=names,
            )[0]
        check_precision(precision, self.dimensions, truncate_dim, normalize_embeddings)
        texts = _list("texts", texts, "a str or a list of str")
        fitted, window = self.fit_long(texts, chunker, window, names)
        name = _namer("text", len(texts), names)
        vectors = self._pool_windows([each.segment for each in fitted], name, window, batch_tokens, show_progress_bar)
        parts = np.split(vectors, np.cumsum([each.segment.num_spans for each in fitted])[:-1])
        pooled = [each.pool_chunks(part, self.pooling) for each, part in zip(fitted, parts)]
        pooled = np.concatenate([vectors[:0], *pooled])
        # The chunks of many texts at once, because each call takes half a millisecond; all may not fit the device.
        how = precision, truncate_dim, normalize_embeddings, self.tanh
        blocks = [pooled[i : i + QUANTIZED] for i in range(0, max(1, len(pooled)), QUANTIZED)]
        quantized = np.concatenate([convert(jnp.asarray(block), *how) for block in blocks])
        result = []
        own = np.split(quantized, np.cumsum([len(each.chunks) for each in fitted])[:-1])
        for text, each, chunks in zip(texts, fitted, own):
            offsets = np.array(each.chunks, np.int32)
            result.append(long_texts.Chunks(offsets, [text[a:b] for a, b in offsets], chunks))
        return result

    def fit_long(
        self, texts: Sequence[str], chunker: Chunker, window: int | None, names: Sequence[str] | None = None
    ) -> tuple[list[long_texts.Fitted], int | None]:
        """(what `encode_long` embeds of each text, its window)."""
        window = self.context_length or self.max_length if window is None else window
        if window is not None:
            check_count("window", window)
        name = _namer("text", len(texts), names)
        for i, text in enumerate(texts):
            check_text(name(i), text)
        separator_id = self.tokenizer.separator_id if self.separator else None
        how = chunker, self.tokenizer, separator_id
        return [long_texts.fit(text, *how, name(i)) for i, text in enumerate(texts)], window

    def fit_documents(
        self, documents: Sequence[Sequence[str]], *, truncate: bool = False, names: Sequence[str] | None = None
    ) -> tuple[list[Segment], int]:
        """(segments that `encode_documents` embeds, number that were cut): a segment per document, a span per chunk."""
        documents = _list("documents", documents, "a list of documents, each a list of str")
        name = _namer("document", len(documents), names)
        documents = [_list(name(i), d, "a list of str, one per chunk") for i, d in enumerate(documents)]
        for i, document in enumerate(documents):
            for k, chunk in enumerate(document):
                check_text(f"{name(i)}, chunk {k}", chunk)
        tokens = iter(self.tokenizer.encode([chunk for document in documents for chunk in document]))
        separator_id = self.tokenizer.separator_id if self.separator else None
        segments = [chunked([next(tokens) for _ in document], separator_id) for document in documents]
        for i, segment in enumerate(segments):
            if not segment.spans.any():
                raise ValueError(f"{name(i)} has no tokens in any of its {segment.num_spans} chunks")
        return self._fit(segments, "document", name, truncate)

    def encode_segments(
        self,
        segments: Sequence[Segment],
        *,
        precision: str = "float32",
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """The vectors of all spans of segments, in order: [spans, D]; keywords as in `encode`.

        The segments come from `fit_texts` or `fit_documents`, also from both.
        """
        name = _namer("document", len(segments), names)
        return self._embed(segments, name, precision, truncate_dim, False, batch_tokens, show_progress_bar)

    def _fit(self, segments: list[Segment], noun: str, name: Callable, truncate: bool) -> tuple[list[Segment], int]:
        """(segments cut to max_length, number that were cut), with a warning; ValueError without `truncate`."""
        long = [i for i, s in enumerate(segments) if self.max_length and len(s.tokens) > self.max_length]
        if not long:
            return segments, 0
        if not truncate:
            is_own = self.max_length == self._model_max_length
            limit = f"{'the model takes' if is_own else 'max_length (--max_length) is'} {self.max_length}"
            raise ValueError(
                f"{name(long[0])} has {len(segments[long[0]].tokens)} tokens, {limit} "
                f"({len(long)} of {len(segments)} are too long): shorten it, or cut with truncate=True (--truncate)"
            )
        kept = [cut(s, self.max_length) for s in segments]
        tokens = sum(len(s.tokens) for s in segments) - sum(len(s.tokens) for s in kept)
        chunks = sum(len(np.setdiff1d(segments[i].spans, np.append(kept[i].spans, 0))) for i in long)
        lost = f"{tokens} tokens" + (f", {chunks} whole chunks" if chunks else "")
        warnings.warn(
            f"{len(long)} of {len(segments)} {noun}s were cut to {self.max_length} tokens (lost: {lost})", stacklevel=4
        )
        return kept, len(long)

    def _embed(
        self, segments, name, precision, truncate_dim=None, normalize=False, batch_tokens=None, progress=False
    ) -> np.ndarray:
        """Vectors of all spans of all segments, in order: [total spans, D or D/8]."""
        check_precision(precision, self.dimensions, truncate_dim, normalize)
        finish = functools.partial(
            convert, precision=precision, truncate_dim=truncate_dim, normalize=normalize, tanh=self.tanh
        )
        # A text with one vector is never divided: the models that give it were trained on whole texts.
        window = self.context_length or np.inf
        is_long = np.array([s.num_spans > 1 and len(s.tokens) > window for s in segments], bool)
        if not is_long.any():
            return self._run(_pooled, finish, self.dimensions, segments, name, batch_tokens, progress)
        of_long = np.repeat(is_long, [s.num_spans for s in segments])
        short, long = (np.flatnonzero(is_long == which) for which in (False, True))
        rest = [segments[i] for i in short], lambda j: name(short[j])
        vectors = self._run(_pooled, finish, self.dimensions, *rest, batch_tokens, progress)
        divided = [segments[i] for i in long], lambda j: name(long[j])
        pooled = self._pool_windows(*divided, self.context_length, batch_tokens, progress)
        out = np.empty((len(of_long), vectors.shape[1]), vectors.dtype)
        out[~of_long], out[of_long] = vectors, finish(jnp.asarray(pooled))
        return out

    def _pool_windows(self, segments, name, window: int | None, batch_tokens=None, progress=False) -> np.ndarray:
        """The pooled vectors of all spans of all segments, float32 [total spans, D]; each segment in its windows."""
        flat, document, name = _windows(segments, [window] * len(segments), name)
        first = np.cumsum([0] + [segment.num_spans for segment in segments])
        divided = [each.segment for each in flat]
        vectors = self._run(_pooled, np.asarray, self.dimensions, divided, name, batch_tokens, progress)
        none = [np.zeros(0, np.int64)]
        spans = np.concatenate(none + [each.spans + first[d] for each, d in zip(flat, document)])
        return long_texts.combine(
            vectors, spans, np.concatenate(none + [each.counts for each in flat]), first[-1], self.pooling
        )

    def _embed_tokens(self, segments, name, batch_tokens=None, progress=False) -> list[np.ndarray]:
        """The token vectors of all spans of all segments, in order: float32 [tokens, P] each."""
        if not self.token_dimensions:
            raise ValueError(
                f"{self.path or 'this model'} has no token vectors: it was not trained by a late_interaction stage"
            )
        window = [self.context_length if segment.num_spans > 1 else None for segment in segments]
        of_tokens = _token_vectors, self.token_dimensions
        return self._of_tokens(*of_tokens, segments, window, name, batch_tokens, progress)

    def hidden_states(
        self, segments: Sequence[Segment], *, window: int | None = None, batch_tokens: int | None = None
    ) -> list[np.ndarray]:
        """The last hidden states of the tokens of each span of segments, in order: float32 [tokens, D] each.

        Their mean is the vector of the span. A segment of more than `window` tokens is encoded in overlapping windows.
        """
        limits, name = [window] * len(segments), _namer("text", len(segments))
        return self._of_tokens(_hidden_states, self.dimensions, segments, limits, name, batch_tokens)

    def _of_tokens(
        self, program, dimensions, segments, limits: Sequence[int | None], name, batch_tokens=None, progress=False
    ) -> list[np.ndarray]:
        """What `program` computes of the tokens of each span, in order; segment i in windows of limits[i] tokens."""
        if not segments:
            return []
        flat, _, name = _windows(segments, limits, name)
        divided = [each.segment for each in flat]
        vectors = self._run(program, np.asarray, dimensions, divided, name, batch_tokens, progress, of_tokens=True)
        # Tokens of no span, such as separators, have no vector.
        in_span = np.concatenate([s.spans > 0 for s in divided])
        counts = np.concatenate([np.bincount(s.spans, minlength=s.num_spans + 1)[1:] for s in segments])
        return np.split(vectors[in_span], np.cumsum(counts)[:-1])

    def _run(
        self,
        program: Callable,
        finish: Callable,
        dimensions: int,
        segments,
        name,
        batch_tokens,
        progress,
        of_tokens: bool = False,
    ) -> np.ndarray:
        """finish(the vectors of all segments), in order: of their spans, or of their tokens.

        `program` computes a table [R, S or L, dimensions] of a batch of rows.
        """
        counts = [len(s.tokens) if of_tokens else s.num_spans for s in segments]
        shards = sharding.batch_shards(self.mesh)
        batch_tokens = self.batch_tokens if batch_tokens is None else batch_tokens
        check_count("batch_tokens", batch_tokens)
        empty = finish(jnp.zeros((0, dimensions), jnp.float32))
        first = np.cumsum([0] + counts)
        out = np.empty((first[-1], empty.shape[1]), empty.dtype)
        bar = tqdm(total=len(segments), desc="encode", unit="text", disable=not (progress and distributed.is_first()))

        def store(members, packed, table):
            # Every device has all vectors. One quantizes, so that the program does not depend on the number of devices.
            table = table.addressable_data(0)
            finite, vectors = np.asarray(is_finite(table)), finish(table).reshape(-1, out.shape[1])  # R·S, R·S D
            slots = list(zip(members, packed.token_slots() if of_tokens else packed.span_slots()))
            if bad := sorted(i for i, slot in slots if not finite[slot : slot + counts[i]].all()):
                raise NotFiniteError(
                    f"the vector of {name(bad[0])} is not finite (NaN or infinity), and so are those of {len(bad)} of "
                    f"the {len(members)} in its batch: the model's weights are broken, or its activations overflow"
                )
            for i, slot in slots:
                out[first[i] : first[i + 1]] = vectors[slot : slot + counts[i]]
            bar.update(len(members))

        waiting = None  # the batch that the device computes while the next one is packed
        longest = max(range(len(segments)), key=lambda i: len(segments[i].tokens), default=0)
        with (
            bar,
            distributed.translate_peer_errors(but=(NotFiniteError, TooLongError)),
            out_of_memory(name, segments, longest),
        ):
            tokens = sum(len(segment.tokens) for segment in segments)
            fine = _on_cpu() and tokens * transformer.count_params(self.params)[1] > FINE_WORK
            for members, row, shape, num_rows in batches(segments, batch_tokens, shards, fine):
                packed = write_rows([segments[i] for i in members], row, shape, num_rows)
                rows = packed.rows
                if self.mesh.size > 1:  # every process has packed all rows, and puts its shards on its devices
                    rows = sharding.put_batch(self.mesh, rows._asdict()).values()
                with jax.set_mesh(self.mesh):  # attention kernels read it
                    arguments = {"config": self.config, "num_spans": shape.spans, "pooling": self.pooling}
                    # One row per shard exceeds the batch, so batch_tokens does not bound the memory.
                    if not waiting and shape.length * shards > batch_tokens:
                        check_memory(program.lower(self.params, *rows, **arguments), name(longest), segments[longest])
                    table = program(self.params, *rows, **arguments)
                if waiting:
                    store(*waiting)
                waiting = members, packed, table
            if waiting:
                store(*waiting)
        return out


@functools.partial(jax.jit, static_argnames=("config", "num_spans", "pooling"))
def _pooled(params, tokens, segment_ids, positions, span_ids, *, config, num_spans, pooling):
    """The vector of each span of rows [R, L], float32 [R, S, D], on every device. Compiled per R, L, mesh, config."""
    hidden = transformer.apply(config, params, tokens, segment_ids, positions)
    return jax.lax.with_sharding_constraint(pool_spans(hidden, span_ids, num_spans, pooling), PartitionSpec())


@functools.partial(jax.jit, static_argnames=("config", "num_spans", "pooling"))
def _hidden_states(params, tokens, segment_ids, positions, span_ids, *, config, num_spans, pooling):
    """The last hidden state of each token of rows [R, L], float32 [R, L, D], on every device; called as `_pooled`."""
    hidden = transformer.apply(config, params, tokens, segment_ids, positions).astype(jnp.float32)
    return jax.lax.with_sharding_constraint(hidden, PartitionSpec())


@functools.partial(jax.jit, static_argnames=("config", "num_spans", "pooling"))
def _token_vectors(params, tokens, segment_ids, positions, span_ids, *, config, num_spans, pooling):
    """The vector of each token of rows [R, L], float32 [R, L, P] of length 1, on every device; called as `_pooled`."""
    hidden = transformer.apply(config, params, tokens, segment_ids, positions)
    vectors = to_unit_length(transformer.token_vectors(params, hidden))
    return jax.lax.with_sharding_constraint(vectors, PartitionSpec())


def _windows(
    segments: Sequence[Segment], limits: Sequence[int | None], name: Callable
) -> tuple[list[Window], np.ndarray, Callable]:
    """(the windows of all segments, in order, the segment of each, the function that names the text of a window).

    Segment i is in windows of limits[i] tokens, or one for None.
    """
    parts = [windows(segment, limit or len(segment.tokens)) for segment, limit in zip(segments, limits)]
    document = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return [each for part in parts for each in part], document, lambda i: name(document[i])


def _blocks(texts: Iterable, characters: int) -> Iterator[list]:
    """The texts and documents in lists of about so many characters; those before one that cannot be read come first."""
    block, size, count, error, left = [], 0, 0, None, iter(texts)
    while True:
        try:
            text = next(left)
        except StopIteration:
            break
        except Exception as raised:
            error = raised
            break
        parts = [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else [None]
        if not all(isinstance(part, str) for part in parts):
            error = ValueError(f"text {count} is {text!r:.80}, expected a str or a list of str")
            break
        block.append(text)
        size, count = size + sum(map(len, parts)), count + 1
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block
    if error:
        raise error


def _namer(noun: str, count: int, names: Sequence[str] | None = None) -> Callable[[int], str]:
    """The function that gives the name of text i of `count` in errors."""
    if names is None:
        return lambda i: f"{noun} {i}"
    names = _list("names", names, "a list of str")
    if len(names) != count:
        raise ValueError(f"there are {len(names)} names for {count} {noun}s, expected one per {noun}")
    return lambda i: names[i]


def _list(name: str, values, expected: str) -> list:
    """The values as a list; ValueError for a single text, a dict or set, and what cannot be iterated over."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r:.80}, expected {expected}")
    return list(values)


def _on_mesh(x, mesh, dtype) -> jax.Array:
    """A parameter in `dtype` on a mesh: with its sharding if it is on this mesh, otherwise copied to every device."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
        return x.astype(dtype)
    replicated = NamedSharding(mesh, PartitionSpec())
    if mesh.is_multi_process:  # device_put would compare the values of all processes
        x = np.asarray(x).astype(dtype)
        return jax.make_array_from_callback(x.shape, replicated, lambda index: x[index])
    return jax.device_put(jnp.asarray(x, dtype), replicated)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
