"""Exact search over stored vectors, in every precision (docs/search.md)."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from embed import paths
from embed.inference.corpus import Corpus
from embed.inference.encoder import PRECISIONS, Encoder, check_count, is_int
from embed.inference.scores import cosines, negative_hamming

FORMAT = "embed-index"
FORMAT_VERSION = 2
VECTORS, INFO = "vectors.safetensors", "index.json"
DTYPES = {"float32": np.float32, "int8": np.int8, "binary": np.int8, "ubinary": np.uint8}
BLOCK_QUERIES, BLOCK_VECTORS = 256, 16384  # scores held at once


class Index:
    """N stored vectors: cosine for float32 and int8, negative Hamming distance for packed bits."""

    def __init__(
        self,
        vectors: np.ndarray,
        precision: str,
        *,
        ids: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        truncate_dim: int | None = None,
        model: dict | None = None,
        empty: Sequence[int] | None = None,
        max_length: int | None = None,
        cut: int = 0,
    ):
        """`vectors` are what `Encoder.encode` returns in `precision`: [N, D] or, for bits, [N, D/8].

        `ids` (default "0", "1", …) and `texts` have one entry per vector and are for showing results. `empty` holds
        the indices of vectors without a text, which are never found. By default these are the zero vectors; packed
        bits do not show them, so there it is none. `truncate_dim`, `model` ({"path", "digest"}), `max_length` in tokens
        and the number of texts that were `cut` to it record how the vectors were made.
        """
        self.vectors = _checked(vectors, precision, "stored vectors")
        if not len(self.vectors):
            raise ValueError("cannot search an empty corpus: the index has no vectors")
        self.precision, self.model = precision, dict(model or {})
        self.max_length, self.cut = max_length, cut
        self.ids = [str(i) for i in range(len(self.vectors))] if ids is None else list(ids)
        self.texts = None if texts is None else list(texts)
        for name, values in (("ids", self.ids), ("texts", self.texts)):
            if values is not None and len(values) != len(self.vectors):
                raise ValueError(f"{len(values)} {name} for {len(self.vectors)} vectors")
        bits = precision in ("binary", "ubinary")
        dimensions = self.vectors.shape[1] * (8 if bits else 1)
        if truncate_dim is not None and not (is_int(truncate_dim) and truncate_dim == dimensions):
            raise ValueError(f"truncate_dim={truncate_dim!r}, but the stored vectors have {dimensions} dimensions")
        self.truncate_dim = truncate_dim and int(truncate_dim)
        if empty is None:
            empty = [] if bits else np.flatnonzero(~self.vectors.any(1))
        for i in empty:
            if not is_int(i) or not 0 <= i < len(self.vectors):
                raise ValueError(f"empty contains {i!r}: expected indices of vectors, 0..{len(self.vectors) - 1}")
        self.empty = np.array(sorted(empty), np.int32)
        self._kept = np.setdiff1d(np.arange(len(self.vectors), dtype=np.int32), self.empty)
        if not len(self._kept):
            raise ValueError(f"cannot search an empty corpus: none of its {len(self.vectors)} vectors has a text")
        self._searched = self.vectors[self._kept] if len(self.empty) else self.vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best vectors of each query, best first: scores [Q, k] and indices int32 [Q, k].

        `queries` are [Q, D] in the index's precision. Scores are float32 cosines, or minus the number of differing
        bits (int32). On ties the lower index comes first. Empty vectors are never found, so there may be fewer than k
        results. All devices of the process search, each a block of queries.
        """
        queries = _checked(queries, self.precision, "queries")
        if queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} numbers each, stored vectors {self.vectors.shape[1]}")
        check_count("k", k)
        blocks = ((self._kept[rows], self._searched[rows]) for rows in _blocks(len(self._kept), BLOCK_VECTORS))
        return search_blocks(queries, blocks, min(k, len(self._kept)), self.precision)

    def check_model(self, encoder: Encoder) -> None:
        """ValueError unless the vectors come from the encoder's model: same weights, tokenizer and settings."""
        made_by = self.model.get("digest")
        if not made_by or not encoder.digest:
            missing = "the index does not say which model made it" if not made_by else "the model has no digest"
            raise ValueError(f"{missing}: the index cannot be checked against the model at {encoder.path}")
        if made_by != encoder.digest:
            raise ValueError(
                f"the index was made with the model at {self.model.get('path')} (digest {made_by:.12}), "
                f"not with the one at {encoder.path} (digest {encoder.digest:.12})"
            )

    def save(self, folder, *, overwrite: bool = False) -> None:
        """Write vectors.safetensors and index.json; the folder appears whole or not at all.

        An existing index is replaced only with `overwrite`; a folder with other files is never replaced.
        """
        with paths.replace_folder(folder, is_ours=is_index, marker=INFO, overwrite=overwrite) as partial:
            paths.write_tensors(partial / VECTORS, {"vectors": self.vectors})
            info = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "precision": self.precision,
                "truncate_dim": self.truncate_dim,
                "max_length": self.max_length,
                "cut": self.cut,
                "model": self.model,
                "empty": self.empty.tolist(),
                "vectors": {"shape": list(self.vectors.shape), "sha256": paths.file_digest(partial / VECTORS)},
                "ids": self.ids,
                "texts": self.texts,
            }
            (partial / INFO).write_text(json.dumps(info | {"sha256": _digest(info)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder) -> "Index":
        """Load an index that `save` wrote. ValueError names a file that was damaged or replaced."""
        name, folder = folder, paths.path(folder)
        if not (folder / INFO).is_file() or not (folder / VECTORS).is_file():
            raise FileNotFoundError(f"no index at {name}: expected a folder with {INFO} and {VECTORS}")
        info = _read_info(folder / INFO)
        with paths.local(folder, lambda name: name == VECTORS) as copy:
            if paths.file_digest(copy / VECTORS) != info["vectors"]["sha256"]:
                raise ValueError(
                    f"{folder / VECTORS} is not the file that {INFO} was written with: make the index again"
                )
            try:
                vectors = safetensors.numpy.load_file(copy / VECTORS)["vectors"]
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(f"{folder / VECTORS} holds no vectors ({error}): make the index again") from None
        names = ("ids", "texts", "truncate_dim", "model", "empty", "max_length", "cut")
        try:
            return cls(vectors, info["precision"], **{name: info[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{folder / INFO} does not describe its vectors: {error}") from None


def search_blocks(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the vectors that `blocks` give, as in `Index.search`: scores [Q, k] and indices int32 [Q, k].

    A block is (index of each vector int32[n], vectors [n, D] in `precision`), read once and one at a time. On ties the
    vector that comes earlier is first. With fewer than k vectors, the last ranks have the index -1.
    """
    bits = precision in ("binary", "ubinary")
    similarity = negative_hamming if bits else functools.partial(cosines, exact=precision == "int8")
    devices, groups = jax.local_devices(), list(_blocks(len(queries), BLOCK_QUERIES))
    # One block of queries per device at a time, computed by the program for one device: their number changes no bit.
    placed = [jax.device_put(queries[rows], devices[i % len(devices)]) for i, rows in enumerate(groups)]
    best: list = [None] * len(groups)
    for indices, vectors in blocks:
        new = []
        for i, group in enumerate(placed):
            scores = similarity(group, vectors)
            if best[i] is not None:  # earlier vectors come first, so that top_k keeps them on ties
                scores = jnp.concatenate([best[i][0], scores], 1)
            new.append(jax.lax.top_k(scores, min(k, scores.shape[1])))
        for i, (top, positions) in enumerate(new):
            known = np.zeros((len(top), 0), np.int32) if best[i] is None else best[i][1]
            index = np.concatenate([known, np.broadcast_to(indices, (len(top), len(indices)))], 1)
            best[i] = top, np.take_along_axis(index, np.asarray(positions), 1)
    scores = np.full((len(queries), k), -np.iinfo(np.int32).max if bits else -np.inf, np.int32 if bits else np.float32)
    found = np.full((len(queries), k), -1, np.int32)
    for rows, (top, index) in zip(groups, best):
        scores[rows, : top.shape[1]], found[rows, : top.shape[1]] = top, index
    return scores, found


def _read_info(file) -> dict:
    """The content of index.json; ValueError if it is damaged or its digest differs."""
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is damaged, not JSON: make the index again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe an index: its format is not {FORMAT!r}")
    if info.get("format_version") != FORMAT_VERSION:
        version = f"{info.get('format_version')!r:.40}"
        raise ValueError(f"{file} has format version {version}, expected {FORMAT_VERSION}: make the index again")
    if info.pop("sha256", None) != _digest(info):
        raise ValueError(f"{file} was changed after it was written: make the index again")
    for name, (allowed, expected) in FIELDS.items():
        if name not in info or not allowed(info[name]):
            value = f"is {info[name]!r:.60}" if name in info else "is missing"
            raise ValueError(f"{file}: {name} {value}, expected {expected}: make the index again")
    return info


def _is_text(value) -> bool:
    return isinstance(value, str)


def _are(allowed: Callable, values) -> bool:
    return isinstance(values, list) and all(map(allowed, values))


# The fields of index.json: {name: (whether a value is allowed, the allowed values in words)}.
FIELDS = {
    "precision": (lambda x: _is_text(x) and x in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "truncate_dim": (lambda x: x is None or is_int(x), "a number of dimensions or null"),
    "max_length": (lambda x: x is None or is_int(x), "a number of tokens or null"),
    "cut": (is_int, "a number of texts"),
    "model": (lambda x: isinstance(x, dict) and _is_text(x.get("digest") or ""), "an object with a path and a digest"),
    "empty": (lambda x: _are(is_int, x), "a list of indices"),
    "vectors": (lambda x: isinstance(x, dict) and _is_text(x.get("sha256")), "an object with a sha256"),
    "ids": (lambda x: _are(_is_text, x), "a list of strings"),
    "texts": (lambda x: x is None or _are(_is_text, x), "a list of strings or null"),
}


def _digest(info: Mapping) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def is_index(folder) -> bool:
    """Whether `Index.save` wrote the folder. ValueError if it holds other files too."""
    try:
        if paths.read_json(paths.path(folder) / INFO)["format"] != FORMAT:
            return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    for name in paths.files(folder).keys() - {INFO, VECTORS}:
        raise ValueError(f"{folder} holds {name}, which is not part of an index: move it away or choose another folder")
    return True


def build(
    encoder: Encoder,
    corpus: Corpus,
    *,
    precision: str = "float32",
    truncate_dim: int | None = None,
    truncate: bool = False,
    **keywords,
) -> Index:
    """Encode a corpus into an index; `truncate` is as in `encode_documents`, `keywords` go to `encode_segments`."""
    segments, cut = encoder.fit_documents(corpus.documents, truncate=truncate, names=corpus.names)
    vectors = encoder.encode_segments(
        segments, precision=precision, truncate_dim=truncate_dim, names=corpus.names, **keywords
    )
    has_tokens = np.concatenate([np.isin(np.arange(1, s.num_spans + 1), s.spans) for s in segments])
    return Index(
        vectors,
        precision,
        ids=corpus.ids,
        texts=corpus.texts,
        truncate_dim=truncate_dim,
        model={"path": str(encoder.path), "digest": encoder.digest},
        empty=np.flatnonzero(~has_tokens),
        max_length=encoder.max_length,
        cut=cut,
    )


def _checked(vectors, precision: str, noun: str) -> np.ndarray:
    """`vectors`, contiguous; ValueError unless they have the dtype and shape of `precision`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    vectors = np.ascontiguousarray(vectors)
    if vectors.ndim != 2 or vectors.dtype != DTYPES[precision]:
        raise ValueError(
            f"{noun} are {vectors.dtype}{list(vectors.shape)}, {precision} needs {np.dtype(DTYPES[precision])}[N, D]"
        )
    if precision == "float32" and not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        raise ValueError(f"{noun}: {len(bad)} of {len(vectors)} are not finite, first {bad[0]}")
    return vectors


def _blocks(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))
