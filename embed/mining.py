"""Hard negatives from embeddings: documents that a model ranks high for a query but that do not answer it."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from embed import distributed
from embed.models import sharding

BLOCK = 512  # a device holds the scores of this many queries against all documents


def mine(
    query_embeddings: np.ndarray,
    document_embeddings: np.ndarray,
    positives: Sequence[int],
    *,
    num_negatives: int,
    rank_window: tuple[int, int],
    margin: float | None,
    document_ids: np.ndarray | None = None,
    query_ids: np.ndarray | None = None,
    relative: bool = False,
    mesh=None,
) -> tuple[np.ndarray, dict[str, int]]:
    """The first `num_negatives` acceptable documents in a window of each query's ranking.

    Queries [N, D] and documents [M, D] are compared by cosine; `positives` int[N] index the documents. Candidates are
    the documents at ranks lo..hi-1 of `rank_window` (0 is the best; the positive has a rank too; the lower index wins a
    tie), except

        positive    those with the content of a positive of this query, or of any query with the same id
        margin      those that score above s(positive) - margin; with `relative`, above s - |s| * margin, which unlike
                    s * (1 - margin) stays below a negative s; margin=None removes none
        duplicate   those with the content of a better candidate

    Content is compared by `document_ids` int[M] and `query_ids` int[N]; by default all rows differ in content.

    All devices of `mesh` (by default those of all processes) rank, one block of queries at a time; each holds all
    documents. If the mesh spans several processes, all must make the same call, and each gets the whole result. The
    result does not depend on the number of devices.

    Returns int32 [N, num_negatives] into documents, -1 where too few are left, and counts: queries; negatives; short
    (queries with fewer than num_negatives); of the short queries, none (those without any) and small_window (those
    whose window is smaller than num_negatives); and the candidates of the short queries that each rule removed:
    removed_positive, removed_margin, removed_duplicate (the first rule that applies counts).
    """
    queries, documents = _embeddings(query_embeddings, "query"), _embeddings(document_embeddings, "document")
    positives = np.asarray(positives, np.int32)
    query_ids = np.arange(len(queries)) if query_ids is None else np.asarray(query_ids)
    document_ids = np.arange(len(documents)) if document_ids is None else np.asarray(document_ids)
    for name, array, length in (
        ("positives", positives, len(queries)),
        ("query_ids", query_ids, len(queries)),
        ("document_ids", document_ids, len(documents)),
    ):
        if array.shape != (length,):
            raise ValueError(f"{name} has shape {list(array.shape)}, expected [{length}]")
    if len(positives) and not (0 <= positives.min() and positives.max() < len(documents)):
        raise ValueError(f"positives must be in 0..{len(documents) - 1}, got {positives.min()}..{positives.max()}")
    check_window(num_negatives, rank_window)
    if margin is not None and not np.isfinite(margin):
        raise ValueError(f"margin={margin} must be a finite number or None")
    low, high = rank_window
    high = min(high, len(documents))

    # One number for each pair of contents, so that one np.isin tests a whole block.
    _, query_content = np.unique(query_ids, return_inverse=True)
    _, document_content = np.unique(document_ids, return_inverse=True)
    answers = np.unique(query_content * len(documents) + document_content[positives])

    negatives = np.full((len(queries), num_negatives), -1, np.int32)
    counts = dict.fromkeys(
        ("queries", "negatives", "short", "none", "small_window")
        + ("removed_positive", "removed_margin", "removed_duplicate"),
        0,
    )
    counts["queries"] = len(queries)
    mesh = sharding.make_mesh() if mesh is None else mesh
    for start, scores, ranked, positive_score in _ranked(queries, documents, positives, high, list(mesh.devices.flat)):
        rows = slice(start, start + BLOCK)
        scores, ranked, positive_score = scores[:, low:], ranked[:, low:], positive_score[:, None]  # n W, n W, n 1

        content = document_content[ranked]
        is_positive = np.isin(query_content[rows, None] * len(documents) + content, answers)
        bound = np.inf if margin is None else positive_score - margin * (np.abs(positive_score) if relative else 1)
        too_close = (scores > bound) & ~is_positive
        repeats = _repeats(content) & ~is_positive & ~too_close
        kept = ~(is_positive | too_close | repeats)

        index = np.cumsum(kept, 1) - 1  # among the kept candidates of a query
        query, column = np.nonzero(kept & (index < num_negatives))
        negatives[start + query, index[query, column]] = ranked[query, column]
        short = kept.sum(1) < num_negatives
        counts["short"] += int(short.sum())
        counts["none"] += int((kept.sum(1) == 0).sum())
        counts["small_window"] += int(short.sum()) if ranked.shape[1] < num_negatives else 0
        for name, removed in (("positive", is_positive), ("margin", too_close), ("duplicate", repeats)):
            counts[f"removed_{name}"] += int(removed[short].sum())
    if mesh.is_multi_process:
        with distributed.translate_peer_errors():
            negatives, counts = _gather(negatives, counts, mesh)
    counts["negatives"] = int((negatives >= 0).sum())
    return negatives, counts


def check_window(num_negatives: int, rank_window: tuple[int, int]) -> None:
    """ValueError unless `mine` can take so many negatives from a window of ranks."""
    low, high = rank_window
    if not 0 <= low < high:
        raise ValueError(f"rank_window={rank_window} must be (lo, hi) with 0 <= lo < hi")
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} must be positive")


def _ranked(queries, documents, positives, high: int, devices: list) -> Iterator[tuple[int, np.ndarray, ...]]:
    """(first query, *the results of `_rank`) of each block of queries that a device of this process ranks.

    Device b modulo the number of devices ranks block b, with a program for one device. So the number of devices does
    not change any bit of the result.
    """
    starts = range(0, len(queries), BLOCK)
    local = {k: d for k, d in enumerate(devices[: len(starts)]) if d.process_index == jax.process_index()}
    tables = {k: jax.device_put(documents, device) for k, device in local.items()}
    for group in (starts[i : i + len(devices)] for i in range(0, len(starts), len(devices))):
        blocks = {k: slice(group[k], group[k] + BLOCK) for k in local if k < len(group)}
        results = [_rank(queries[rows], tables[k], positives[rows], high=high) for k, rows in blocks.items()]
        for rows, block in zip(blocks.values(), results):
            yield rows.start, *map(np.asarray, block)


def _gather(negatives: np.ndarray, counts: dict[str, int], mesh) -> tuple[np.ndarray, dict[str, int]]:
    """The results of `mine`, from each process's rows of `negatives` and its part of every count but `queries`."""
    processes = np.array([device.process_index for device in mesh.devices.flat])
    owner = processes[np.arange(len(negatives)) // BLOCK % len(processes)]
    most = np.bincount(owner).max()
    local = negatives[owner == jax.process_index()]
    rows = multihost_utils.process_allgather(np.pad(local, ((0, most - len(local)), (0, 0))))
    for process, part in enumerate(rows):
        negatives[owner == process] = part[: (owner == process).sum()]
    # Viewed as int32, because jax has no int64.
    parts = multihost_utils.process_allgather(np.array(list(counts.values()), np.int64).view(np.int32))
    sums = np.ascontiguousarray(parts).view(np.int64).sum(0).tolist()
    return negatives, dict(zip(counts, sums)) | {"queries": counts["queries"]}


@functools.partial(jax.jit, static_argnames="high")
def _rank(queries, documents, positives, *, high):
    """Of each query, the `high` best documents (cosines [n, high], indices [n, high]) and its positive's cosine [n]."""

    def normalize(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-30)

    scores = jnp.dot(normalize(queries), normalize(documents).T, precision="highest")
    return *jax.lax.top_k(scores, high), jnp.take_along_axis(scores, positives[:, None], 1)[:, 0]


def _repeats(content: np.ndarray) -> np.ndarray:
    """Whether the same value occurs further left in the row, bool [n, W]."""
    order = np.argsort(content, axis=1, kind="stable")
    values = np.take_along_axis(content, order, 1)
    repeats = np.zeros(content.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], values[:, 1:] == values[:, :-1], 1)
    return repeats


def _embeddings(values, noun: str) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"{noun} embeddings have shape {list(values.shape)}, expected [N, D] with N > 0")
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values).all(1)).sum()} of {len(values)} {noun} embeddings are not finite")
    return values
