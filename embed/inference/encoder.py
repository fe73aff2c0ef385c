"""From text to vectors: tokenise, pack into rows, one forward pass, mean over spans, quantise (ARCHITECTURE.md)."""

import bisect
import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from embed import distributed
from embed.checkpoints import model_folder
from embed.models import quantization, sharding, transformer
from embed.models.pooling import pool_spans
from embed.rows import RowShape, Segment, chunked, cut, dense, write_rows

PRECISIONS = ("float32", "int8", "binary", "ubinary")
MIN_ROW_LENGTH = 64
TOKENS_PER_SPAN = 8  # a row of L tokens has L / 8 span slots


class NotFiniteError(ValueError):
    """A model gave vectors with NaN or infinity in them."""


class TooLongError(ValueError):
    """A text needs more memory than there is."""


def load(path, *, dtype: str | None = None, revision: str | None = None, mesh=None) -> "Encoder":
    """The encoder in a model folder: one that `embed export` wrote, a pplx-embed or another bidirectional Qwen3.

    `path` is a folder, one in a bucket (gs://) or the id of a repository on the Hugging Face hub,
    "perplexity-ai/pplx-embed-v1-0.6b", at its `revision`. `dtype` of the computation is "float32" or "bfloat16"; by default
    float32 on CPU and bfloat16 on accelerators. A causal language model is refused: it is something to train from. `mesh` as in
    `Encoder`; the parameters are sharded over it as in training.
    """
    dtype = dtype or ("float32" if _on_cpu() else "bfloat16")
    mesh = sharding.make_mesh() if mesh is None else mesh
    model = model_folder.open_model(path, revision)
    if model.causal:
        raise ValueError(
            f"{path} is a causal language model, not an encoder: it can be the `init` of a stage that trains one"
        )
    tokenizer = model.tokenizer()
    if getattr(tokenizer, "adds_tokens", False):
        raise ValueError(f"{path}: tokenizer.json adds tokens to each text, which is not done here")
    shardings = sharding.parameter_shardings(mesh, transformer.abstract_params(model.config))
    config, params = transformer.encoder_only(model.config, model.params(shardings, dtype))
    how = {name: model.embedding[name] for name in ("separator", "max_length", "matryoshka", "tanh")}
    return Encoder(
        params, dataclasses.replace(config, dtype=dtype), tokenizer, **how, mesh=mesh, path=path, digest=model.digest
    )


def quantize(
    pooled, precision: str, *, truncate_dim: int | None = None, normalize: bool = False, tanh: bool = False
) -> np.ndarray:
    """Pooled float32 vectors [..., D] in another precision: the prefix first, then `normalize`, then bits.

    float32 [..., D], with `tanh` tanh(v); int8 [..., D] = round(127 tanh v); ubinary uint8 [..., D/8] = packed bits
    of v >= 0, the first dimension highest; binary int8 [..., D/8] = ubinary - 128, as sentence-transformers has it.
    NotFiniteError for a vector that is not finite, which int8 and bits would hide.
    """
    check_precision(precision, pooled.shape[-1], truncate_dim, normalize)
    pooled = jnp.asarray(pooled)
    bad = np.flatnonzero(~np.asarray(_is_finite(pooled)))
    if len(bad):
        raise NotFiniteError(f"vector {bad[0]} is not finite; of {pooled[..., 0].size} vectors {len(bad)} are not")
    return _quantize(pooled, precision, truncate_dim, normalize, tanh)


def _quantize(pooled, precision: str, truncate_dim: int | None, normalize: bool, tanh: bool) -> np.ndarray:
    """`quantize` of what is checked already."""
    pooled = pooled[..., :truncate_dim]
    if precision == "int8":
        return np.array(quantization.int8(pooled))
    if precision in ("binary", "ubinary"):
        packed = np.array(quantization.pack_bits(pooled))
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    vectors = np.array(jnp.tanh(pooled) if tanh else pooled)
    if normalize:  # a zero vector stays one
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


class Encoder:
    """A model that turns texts into vectors. Made by `load`, or from parameters in memory.

    The rows of a batch are computed on all devices of its mesh. Where these belong to several processes, all of them make
    the same Encoder and call it alike; each gets all vectors.
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
        matryoshka: Sequence[int] = (),
        tanh: bool = False,
        path=None,
        digest: str | None = None,
    ):
        """`separator`: whether the separator token stands between the chunks of a document, as it did in training.

        `mesh`: of `embed.models.sharding.make_mesh`, by default one along data over all devices of all processes. Parameters
        that lie on it keep their shardings, others are copied to each of its devices. `max_length`: the most tokens of a text or
        document, None for no limit. `tanh`: float32 vectors are tanh(v) of the pooled mean v; int8 and bits are the same with it
        and without. `digest` identifies the model.
        """
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
        # How a gradient is computed makes no other program here: encoders of one architecture share those that are compiled.
        unroll = config.num_layers if _on_cpu() else config.unroll
        self.config = dataclasses.replace(config, remat="none", dense_barrier=False, unroll=unroll)
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        self.params = jax.tree.map(lambda x: _on_mesh(x, self.mesh, config.dtype), params)
        self.tokenizer, self.separator, self.max_length = tokenizer, separator, max_length
        self.matryoshka, self.tanh, self.path, self.digest = tuple(matryoshka), tanh, path, digest

    @property
    def dimensions(self) -> int:
        """D of a float32 vector before truncation."""
        return self.config.hidden_size

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
        """One vector a text, in the order of the texts; a single str gives a single vector.

        Returns float32 [N, D] (the pooled mean itself, or its tanh), int8 [N, D], or packed bits [N, D/8], binary int8
        or ubinary uint8. `truncate_dim` keeps a prefix of each vector, before bits are packed. `normalize_embeddings` is for
        float32 alone. `batch_tokens` is the size of a batch in tokens (None: for each device that has rows of its own
        4,096 on CPU, 65,536 on accelerators); it changes no result. A text longer than `max_length` is an error, or
        with `truncate=True` is cut with a warning. A text without tokens is an error, and so is a vector that is not
        finite (NotFiniteError). Errors call a text by its index, or as `names` say, one a text.
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
        texts, name = list(texts), _namer("text", names)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name(i)} is {text!r:.80} ({type(text).__name__}), expected a str")
        tokens = self.tokenizer.encode(texts)
        for i, ids in enumerate(tokens):
            if not len(ids):
                raise ValueError(f"{name(i)} has no tokens: {texts[i]!r:.80}")
        segments, _ = self._fit([dense(ids) for ids in tokens], "text", name, truncate)
        return self._embed(
            segments, name, precision, truncate_dim, normalize_embeddings, batch_tokens, show_progress_bar
        )

    def quantize(self, vectors, precision: str) -> np.ndarray:
        """Vectors that `encode` gave as float32 (not normalized) in another precision, as if encoded so."""
        if self.tanh and precision == "int8":
            quantize(vectors, "float32")  # for its check
            return np.array(jnp.round(jnp.asarray(vectors) * 127).astype(jnp.int8))
        return quantize(vectors, precision)

    def encode_tokens(self, tokens: Sequence[np.ndarray], precision: str = "float32") -> np.ndarray:
        """`encode` of texts that are tokenized already; the mean over one without tokens is a zero vector."""
        return self._embed([dense(ids) for ids in tokens], _namer("text"), precision)

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
        """One array [chunks, D] a document: each chunk pooled from hidden states that saw the whole document.

        Late chunking; keywords and precisions as in `encode`. An empty chunk is a zero vector (in binary: every bit
        set), and so is a chunk that `truncate=True` cut off entirely. A document without tokens is an error.
        """
        segments, _ = self.fit_documents(documents, truncate=truncate, names=names)
        vectors = self._embed(
            segments,
            _namer("document", names),
            precision,
            truncate_dim,
            normalize_embeddings,
            batch_tokens,
            show_progress_bar,
        )
        return np.split(vectors, np.cumsum([s.num_spans for s in segments])[:-1]) if segments else []

    def fit_documents(
        self, documents: Sequence[Sequence[str]], *, truncate: bool = False, names: Sequence[str] | None = None
    ) -> tuple[list[Segment], int]:
        """What `encode_documents` embeds, a segment a document with a span a chunk, and how many of them were cut."""
        documents, name = [d if isinstance(d, str) else list(d) for d in documents], _namer("document", names)
        for i, document in enumerate(documents):
            if isinstance(document, str) or not all(isinstance(chunk, str) for chunk in document):
                raise ValueError(f"{name(i)} is {document!r:.80}, expected a list of str, one a chunk")
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
        """Vectors of all spans of the segments of `fit_documents`, in order: [spans, D]; keywords as in `encode`."""
        name = _namer("document", names)
        return self._embed(segments, name, precision, truncate_dim, False, batch_tokens, show_progress_bar)

    def _fit(self, segments: list[Segment], noun: str, name: Callable, truncate: bool) -> tuple[list[Segment], int]:
        """The segments, none longer than max_length, and how many were cut, with a warning; or an error."""
        long = [i for i, s in enumerate(segments) if self.max_length and len(s.tokens) > self.max_length]
        if not long:
            return segments, 0
        if not truncate:
            raise ValueError(
                f"{name(long[0])} has {len(segments[long[0]].tokens)} tokens, the model takes {self.max_length} "
                f"({len(long)} of {len(segments)} are too long): shorten it, or cut with truncate=True (--truncate)"
            )
        kept = [cut(s, self.max_length) for s in segments]
        tokens = sum(len(s.tokens) for s in segments) - sum(len(s.tokens) for s in kept)
        chunks = sum(len(np.setdiff1d(segments[i].spans, np.append(kept[i].spans, 0))) for i in long)
        lost = f"{tokens} tokens" + (f", {chunks} whole chunks" if chunks else "")
        warnings.warn(
            f"{len(long)} of {len(segments)} {noun}s were cut to {self.max_length} tokens (lost: {lost})", stacklevel=3
        )
        return kept, len(long)

    def _embed(
        self, segments, name, precision, truncate_dim=None, normalize=False, batch_tokens=None, progress=False
    ) -> np.ndarray:
        """Vectors of all spans of all segments, in order: [total spans, D or D/8]."""
        check_precision(precision, self.dimensions, truncate_dim, normalize)
        shards = sharding.batch_shards(self.mesh)
        if batch_tokens is None:
            batch_tokens = shards * (4096 if _on_cpu() else 65536)  # 4,096: activations stay in a CPU's cache
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be positive")
        finish = functools.partial(
            _quantize, precision=precision, truncate_dim=truncate_dim, normalize=normalize, tanh=self.tanh
        )
        empty = finish(jnp.zeros((0, self.dimensions), jnp.float32))
        first = np.cumsum([0] + [s.num_spans for s in segments])
        out = np.empty((first[-1], empty.shape[1]), empty.dtype)
        bar = tqdm(total=len(segments), desc="encode", unit="text", disable=not (progress and distributed.is_first()))

        def store(members, packed, spans):
            # Every device has all of them. One quantizes, so that the number of devices makes no other program of it.
            spans = spans.addressable_data(0)
            finite, vectors = np.asarray(_is_finite(spans)), finish(spans).reshape(-1, out.shape[1])  # R·S, R·S D
            slots = list(zip(members, packed.span_slots()))
            if bad := sorted(i for i, slot in slots if not finite[slot : slot + segments[i].num_spans].all()):
                raise NotFiniteError(
                    f"the vector of {name(bad[0])} is not finite (NaN or infinity), and so are those of {len(bad)} of "
                    f"the {len(members)} in its batch: the model's weights are broken, or its activations overflow"
                )
            for i, slot in slots:
                out[first[i] : first[i + 1]] = vectors[slot : slot + segments[i].num_spans]
            bar.update(len(members))

        waiting = None  # the batch on the device, while the next one is packed
        longest = max(range(len(segments)), key=lambda i: len(segments[i].tokens), default=0)
        with bar, distributed.peers(but=(NotFiniteError, TooLongError)), _out_of_memory(name, segments, longest):
            for members, where, shape, num_rows in _batches(segments, batch_tokens, shards):
                packed = write_rows([segments[i] for i in members], where, shape, num_rows)
                rows = packed.rows
                if self.mesh.size > 1:  # every process has packed them all and puts its part
                    rows = sharding.put_batch(self.mesh, rows._asdict()).values()
                with jax.set_mesh(self.mesh):  # attention kernels ask for it
                    arguments = {"config": self.config, "num_spans": shape.spans}
                    if (
                        not waiting and shape.length * shards > batch_tokens
                    ):  # a row alone is more than a batch should be
                        _check_memory(_pooled.lower(self.params, *rows, **arguments), name(longest), segments[longest])
                    spans = _pooled(self.params, *rows, **arguments)
                if waiting:
                    store(*waiting)
                waiting = members, packed, spans
            if waiting:
                store(*waiting)
        return out


@functools.partial(jax.jit, static_argnames=("config", "num_spans"))
def _pooled(params, tokens, segment_ids, positions, span_ids, *, config, num_spans):
    """Rows [R, L] -> the mean of each span, float32 [R, S, D], on every device. Compiled once for each R, L, mesh and config."""
    hidden = transformer.apply(config, params, tokens, segment_ids, positions)
    return jax.lax.with_sharding_constraint(pool_spans(hidden, span_ids, num_spans), PartitionSpec())


@jax.jit
def _is_finite(vectors):
    """Whether each vector [..., D] is finite: bool, flat."""
    return jnp.isfinite(vectors).all(-1).reshape(-1)


def _namer(noun: str, names: Sequence[str] | None = None) -> Callable[[int], str]:
    """What errors call text i."""
    return lambda i: f"{noun} {i}" if names is None else names[i]


def _check_memory(lowered, name: str, segment: Segment) -> None:
    """TooLongError if the program of a text's row needs more memory than the device has."""
    analysis = lowered.compile().memory_analysis()
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    statistics = jax.local_devices()[0].memory_stats() or {}
    there = statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    if _on_cpu():
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there and needed > there:
        raise TooLongError(
            _too_long(name, segment, f"they need {needed / 1e9:,.1f} GB, there are {there / 1e9:,.1f} GB")
        )


def _too_long(name: str, segment: Segment, why: str) -> str:
    return (
        f"{name} has {len(segment.tokens):,} tokens, too many for the memory of this machine ({why}): shorten it, "
        f"or cut it with truncate=True and a max_length (--truncate --max_length=N)"
    )


@contextlib.contextmanager
def _out_of_memory(name: Callable, segments: Sequence[Segment], longest: int) -> Iterator[None]:
    """What the runtime raises when memory is used up, as TooLongError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = "it was used up; a smaller batch_tokens helps where there are many texts"
        raise TooLongError(_too_long(name(longest), segments[longest], why)) from error


def _on_mesh(x, mesh, dtype) -> jax.Array:
    """A parameter in another dtype on a mesh: sharded as it is if it lies there, otherwise a copy on every device."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
        return x.astype(dtype)
    replicated = NamedSharding(mesh, PartitionSpec())
    if mesh.is_multi_process:  # device_put would compare the values of all processes
        x = np.asarray(x).astype(dtype)
        return jax.make_array_from_callback(x.shape, replicated, lambda index: x[index])
    return jax.device_put(jnp.asarray(x, dtype), replicated)


def _batches(
    segments: Sequence[Segment], batch_tokens: int, shards: int = 1
) -> Iterator[tuple[list, np.ndarray, RowShape, int]]:
    """(segment indices, row of each, row shape, number of rows), longest segments first, every segment once.

    A row has the power of two that holds the longest segment still to do; then the longest that fits the room left
    goes in, until none does. Shapes repeat, so that few programs are compiled: batch_tokens // L rows, and in the
    last batch the power of four that suffices, each rounded up to a multiple of `shards`. A segment claims max(tokens, 8 · spans), so that L / 8 span slots
    always suffice.
    """
    stacks: dict[int, list[int]] = {}
    for i in reversed(range(len(segments))):
        claim = max(len(segments[i].tokens), TOKENS_PER_SPAN * int(segments[i].num_spans))
        stacks.setdefault(claim, []).append(i)
    claims = sorted(stacks)
    while claims:
        length = max(MIN_ROW_LENGTH, 1 << (claims[-1] - 1).bit_length())
        num_rows = -(-max(1, batch_tokens // length) // shards) * shards
        members, where = [], []
        for row in range(num_rows):
            room = length
            while k := bisect.bisect_right(claims, room):
                claim = claims[k - 1]
                members.append(stacks[claim].pop())
                where.append(row)
                room -= claim
                if not stacks[claim]:
                    del claims[k - 1]
        used = where[-1] + 1
        if used < num_rows:
            num_rows = min(num_rows, -(-(4 ** -(-(used - 1).bit_length() // 2)) // shards) * shards)
        spans = length // TOKENS_PER_SPAN
        yield members, np.array(where), RowShape(length, spans, spans), num_rows


def check_precision(precision: str, dimensions: int, truncate_dim: int | None = None, normalize: bool = False) -> None:
    """ValueError unless vectors of so many dimensions can be had in a precision, cut to `truncate_dim`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    if truncate_dim is not None and not 1 <= truncate_dim <= dimensions:
        raise ValueError(f"truncate_dim={truncate_dim} must be in 1..{dimensions}")
    kept = truncate_dim or dimensions
    if precision in ("binary", "ubinary") and kept % 8:
        raise ValueError(f"{precision} packs eight dimensions a byte: {kept} dimensions are not a multiple of 8")
    if normalize and precision != "float32":
        raise ValueError(f"normalize_embeddings is for float32 alone, not {precision}: its distance ignores lengths")


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
