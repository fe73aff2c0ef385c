"""Exact ranking of vectors by their similarity to queries, in every precision."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int8

from embed.inference.precision import PRECISIONS, check_count
from embed.inference.scores import EXACT_DIMENSIONS, cosines, negative_hamming

DTYPES = {"float32": np.float32, "int8": np.int8, "binary": np.int8, "ubinary": np.uint8}
BLOCK_QUERIES, BLOCK_VECTORS = 256, 16384  # scores held at once


def search(queries: np.ndarray, vectors: np.ndarray, k: int, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The k best vectors of each query, best first: scores [Q, k] and indices int32 [Q, k].

    `queries` and `vectors` are what `Encoder.encode` returns in `precision`: [N, D] or, for bits, [N, D/8]. Scores are
    float32 cosines, or minus the number of differing bits (int32). On ties the lower index comes first. With fewer than
    k vectors there are fewer results. All devices of the process search, each a block of queries.
    """
    vectors, queries = check_vectors(vectors, precision, "stored vectors"), check_vectors(queries, precision, "queries")
    if queries.shape[1] != vectors.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} numbers each, stored vectors {vectors.shape[1]}")
    check_count("k", k)
    every = np.arange(len(vectors), dtype=np.int32)
    return search_blocks(queries, vector_blocks(vectors, every), min(k, len(vectors)), precision)


def vector_blocks(vectors: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks of `search_blocks` for some rows, in ascending order, of vectors that may be a memory-mapped file."""
    start = 0
    while start < len(rows):
        # The last blocks are powers of two, so that few programs are compiled, whatever rows a filter leaves.
        left = len(rows) - start
        size = min(BLOCK_VECTORS, 1 << (left.bit_length() - 1))
        chosen = rows[start : start + size]
        follow = size == chosen[-1] - chosen[0] + 1  # without gaps: no copy
        yield chosen, vectors[chosen[0] : chosen[-1] + 1] if follow else vectors[chosen]
        start += size


def search_blocks(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the vectors that `blocks` give, as in `search`: scores [Q, k] and indices int32 [Q, k].

    A block is (index of each vector int32[n], vectors [n, D] in `precision`), read once and one at a time. On ties the
    vector that comes earlier is first. With fewer than k vectors, the last ranks have the index -1.
    """
    bits = precision in ("binary", "ubinary")
    similarity = negative_hamming if bits else functools.partial(cosines, exact=precision == "int8")
    devices, groups = jax.local_devices(), list(slices(len(queries), BLOCK_QUERIES))
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
    scores, found = nothing(len(queries), k, precision)
    for rows, top in zip(groups, best):
        if top is not None:
            scores[rows, : top[0].shape[1]], found[rows, : top[0].shape[1]] = top
    return scores, found


def rescore(
    query: Float32[np.ndarray, " D"] | Int8[np.ndarray, " D"],
    vectors: Float32[np.ndarray, "N D"] | Int8[np.ndarray, "N D"],
) -> Float[np.ndarray, " N"]:
    """The cosine of a query and each vector, float32 [N], as `search` computes it, without compiling a program."""
    # The products of two int8 are summed without rounding.
    exact = np.float64 if vectors.dtype == np.int8 and len(query) > EXACT_DIMENSIONS else np.float32
    a, b = query.astype(exact), vectors.astype(exact)
    norms = np.sqrt(np.einsum("nd,nd->n", b, b)) * np.linalg.norm(a)
    return np.divide(b @ a, norms, out=np.zeros(len(b), exact), where=norms > 0).astype(np.float32)


def nothing(count: int, k: int, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores [count, k] and indices [count, k] of no results: the lowest score, and -1."""
    bits = precision in ("binary", "ubinary")
    lowest, dtype = (-np.iinfo(np.int32).max, np.int32) if bits else (-np.inf, np.float32)
    return np.full((count, k), lowest, dtype), np.full((count, k), -1, np.int32)


def check_vectors(vectors, precision: str, noun: str) -> np.ndarray:
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


def slices(size: int, block: int) -> Iterator[slice]:
    """The slices of 0..size - 1 that have `block` numbers, the last one fewer."""
    return (slice(start, min(start + block, size)) for start in range(0, size, block))
