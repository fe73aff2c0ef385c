"""Hard negatives from embeddings: documents that a model ranks high for a query but that do not answer it."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from embed import distributed
from embed.models import sharding

# Sizes of blocks, which change no result. A device ranks QUERIES queries at once, against DOCUMENTS documents at a
# time; of these it holds the scores of TILE queries. The host judges ROWS queries at a time.
QUERIES, DOCUMENTS, TILE, ROWS = 1 << 16, 1 << 16, 256, 1 << 12
EXACT_DIMENSIONS = 1024  # float32 sums 1024 products of two int8 without rounding: 1024 · 128² = 2^24
DIGITS, BASE = 3, 1 << 7  # of a floating-point number, which becomes a whole number of 21 bits

Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Mined(NamedTuple):
    """Negatives of N queries, best rank first. `scores` and `positive_scores` are those that the margin compares."""

    negatives: np.ndarray  # int32 [N, num_negatives] into documents, -1 where too few are left
    ranks: np.ndarray  # int32 [N, num_negatives], -1 there
    scores: np.ndarray  # float32 [N, num_negatives], NaN there
    positive_scores: np.ndarray  # float32 [N]
    counts: dict[str, int]


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
    judge: Judge | None = None,
    mesh=None,
    progress: str = "",
) -> Mined:
    """The first `num_negatives` acceptable documents in a window of each query's ranking.

    Queries [N, D] and documents [M, D] are compared by cosine; `positives` int[N] index the documents. Candidates are
    the documents at ranks lo..hi-1 of `rank_window` (0 is the best; the positive has a rank too; the lower index wins a
    tie), except

        positive    those with the content of a positive of this query, or of any query with the same id
        unscored    those that the judge has no score for, and all if it has none for the positive
        margin      those that score above s(positive) - margin; with `relative`, above s - |s| * margin, which unlike
                    s * (1 - margin) stays below a negative s; margin=None removes none
        duplicate   those with the content of a better candidate

    Content is compared by `document_ids` int[M] and `query_ids` int[N]; by default all rows differ in content. The
    margin compares cosines, or what `judge(queries int[n], documents int[n, W])` returns: float32 [n, W], NaN where it
    has no score. `judge_by` makes one from the embeddings of another model.

    All documents are compared with every query, in whole numbers: int8 as they are, floating-point numbers rounded to
    21 bits of the largest in their vector, which costs nine products instead of one. So the result is the same, bit
    for bit, for any size of blocks and number of devices. All devices of `mesh` (by default those of all processes)
    rank, each its own queries. If the mesh spans several processes, all must make the same call, and each gets the
    whole result. `progress` is the title of a progress bar; without one there is none.

    Memory: embeddings may be np.memmap. The host reads at most QUERIES, DOCUMENTS or ROWS rows at once, holds two such
    blocks as whole numbers, and a few numbers per query and document. A device holds at most `device_bytes`: with int8
    vectors of 1,024 dimensions and 100 ranks 0.6 GB, with float32 1.5 GB (on CPU 0.8 and 2.3).

    `counts`: queries; candidates; of these, negatives, surplus (acceptable, but there were enough) and those that each
    rule removed: removed_positive, removed_unscored, removed_margin, removed_duplicate (the first rule that applies
    counts); short (queries with fewer than num_negatives); of the short queries, none (those without any) and
    small_window (those whose window is smaller than num_negatives).
    """
    queries, documents = _embeddings(query_embeddings, "query"), _embeddings(document_embeddings, "document")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}")
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
    if not (0 <= positives.min() and positives.max() < len(documents)):
        raise ValueError(f"positives must be in 0..{len(documents) - 1}, got {positives.min()}..{positives.max()}")
    check_window(num_negatives, rank_window)
    if margin is not None and not np.isfinite(margin):
        raise ValueError(f"margin={margin} must be a finite number or None")
    low, high = rank_window
    high = min(high, len(documents))

    # One number for each pair of contents, so that one search in a sorted list tests a whole block.
    _, query_content = np.unique(query_ids, return_inverse=True)
    _, document_content = np.unique(document_ids, return_inverse=True)
    answers = np.unique(query_content * len(documents) + document_content[positives])
    by_cosine = judge_by(queries, documents)

    mined = Mined(
        np.full((len(queries), num_negatives), -1, np.int32),
        np.full((len(queries), num_negatives), -1, np.int32),
        np.full((len(queries), num_negatives), np.nan, np.float32),
        np.full(len(queries), np.nan, np.float32),
        dict.fromkeys(
            ("queries", "candidates", "negatives", "surplus")
            + ("removed_positive", "removed_unscored", "removed_margin", "removed_duplicate")
            + ("short", "none", "small_window"),
            0,
        ),
    )
    counts = mined.counts
    mesh = sharding.make_mesh() if mesh is None else mesh
    size = _queries_per_device(len(queries), mesh.size)
    for rows, scores, ranked in _ranked(queries, documents, high, list(mesh.devices.flat), progress):
        scores, ranked = scores[:, low:], ranked[:, low:]  # n W, n W
        positive_scores = (judge or by_cosine)(rows, positives[rows, None])  # n 1
        if judge:
            scores = judge(rows, ranked)
        content = document_content[ranked]
        is_positive = _is_in(query_content[rows, None] * len(documents) + content, answers)
        unscored = np.isnan(scores - positive_scores) & ~is_positive
        bound = np.inf if margin is None else positive_scores - margin * (np.abs(positive_scores) if relative else 1)
        too_close = (scores > bound) & ~is_positive & ~unscored
        repeats = _repeats(content) & ~is_positive & ~unscored & ~too_close
        kept = ~(is_positive | unscored | too_close | repeats)

        index = np.cumsum(kept, 1) - 1  # among the kept candidates of a query
        query, column = np.nonzero(kept & (index < num_negatives))
        target = rows[query], index[query, column]
        mined.negatives[target], mined.ranks[target] = ranked[query, column], low + column
        mined.scores[target], mined.positive_scores[rows] = scores[query, column], positive_scores[:, 0]
        short = kept.sum(1) < num_negatives
        counts["queries"] += len(rows)
        counts["candidates"] += kept.size
        counts["negatives"] += len(query)
        counts["surplus"] += int(kept.sum()) - len(query)
        counts["short"] += int(short.sum())
        counts["none"] += int((kept.sum(1) == 0).sum())
        counts["small_window"] += int(short.sum()) if ranked.shape[1] < num_negatives else 0
        removed = {"positive": is_positive, "unscored": unscored, "margin": too_close, "duplicate": repeats}
        counts |= {f"removed_{name}": counts[f"removed_{name}"] + int(where.sum()) for name, where in removed.items()}
    if mesh.is_multi_process:
        with distributed.translate_peer_errors():
            return _gather(mined._replace(counts=counts), mesh, size)
    return mined._replace(counts=counts)


def check_window(num_negatives: int, rank_window: tuple[int, int]) -> None:
    """ValueError unless `mine` can take so many negatives from a window of ranks."""
    low, high = rank_window
    if not 0 <= low < high:
        raise ValueError(f"rank_window={rank_window} must be (lo, hi) with 0 <= lo < hi")
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} must be positive")


def judge_by(query_embeddings: np.ndarray, document_embeddings: np.ndarray) -> Judge:
    """A judge whose scores are the cosines of embeddings [N, D] and [M, D], which may be np.memmap."""

    def judge(rows: np.ndarray, documents: np.ndarray) -> np.ndarray:
        scores = np.empty(documents.shape, np.float32)
        if not documents.size:
            return scores
        step = max(1, ROWS // documents.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            ours, their_rows = query_embeddings[rows[part]], documents[part]
            theirs = document_embeddings[their_rows.reshape(-1)]
            (a, factor), (b, factors) = _whole(ours), _whole(theirs)
            a, b = a.astype(np.int32)[:, :, None], b.astype(np.int32).reshape(len(b), *their_rows.shape, -1)
            products = _products(lambda x, y: np.einsum("nwd,nwd->nw", np.broadcast_to(x, y.shape), y), a, b)
            scores[part] = products * factors.reshape(their_rows.shape) * factor[:, None]
        return scores

    return judge


def _ranked(
    queries, documents, high: int, devices: list, progress: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows int[n], cosines float32 [n, high], documents int32 [n, high]) of queries that this process ranks.

    Each device ranks a range of queries, against one block of documents after the other.
    """
    size = _queries_per_device(len(queries), len(devices))
    block = -(-len(documents) // -(-len(documents) // DOCUMENTS))
    group = max(1, round((block / high) ** 0.5))
    block += -block % group  # all blocks have one shape, so that one program is compiled
    starts, ranges = range(0, len(documents), block), range(0, len(queries), size)
    rank = functools.partial(_rank_block, size=len(documents), group=group, k=min(high, block))
    rounds = [list(zip(ranges[i:], devices)) for i in range(0, len(ranges), len(devices))]
    with progress_bar(progress, len(rounds) * len(documents), "document") as bar:
        for pairs in rounds:
            local = [(first, device) for first, device in pairs if device.process_index == jax.process_index()]
            if not local:
                continue
            states, tiles, factors = [], [], []
            for first, device in local:
                best, ranked, digits, factor = _tiles(queries[first : first + size], min(TILE, size), high)
                states.append(jax.device_put((best, ranked), device))
                tiles.append(jax.device_put(digits, device))
                factors.append(factor[:, None])
            blocks = _put_block(documents, 0, block, local)
            for start in starts:
                states = [rank(*state, *arguments) for state, *arguments in zip(states, tiles, *zip(*blocks))]
                if start + block < len(documents):  # the next block is copied while the devices compute
                    blocks = _put_block(documents, start + block, block, local)
                jax.block_until_ready(states)  # so that a device holds two blocks at most
                bar.update(min(block, len(documents) - start))
            for (first, _), factor, state in zip(local, factors, states):
                scores, ranked = (np.asarray(x).reshape(-1, high) for x in state)
                for row in range(0, len(factor), ROWS):
                    part = slice(row, min(row + ROWS, len(factor)))
                    yield np.arange(first + part.start, first + part.stop), scores[part] * factor[part], ranked[part]


def _tiles(queries: np.ndarray, tile: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of `_rank_block`: no ranks yet (two arrays), and queries [T, digits, tile, D]; and their factors."""
    digits, factors = _whole(queries)
    digits = np.pad(digits, ((0, 0), (0, -digits.shape[1] % tile), (0, 0)))
    digits = digits.reshape(len(digits), -1, tile, digits.shape[2]).swapaxes(0, 1)
    shape = len(digits), tile, high
    return np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32), digits, factors


def _put_block(documents: np.ndarray, start: int, block: int, local: list) -> list[tuple]:
    """(documents, factors, start) of a block, padded with zeros, on each local device."""
    digits, factors = _whole(documents[start : start + block])
    missing = block - len(factors)
    host = np.pad(digits, ((0, 0), (0, missing), (0, 0))), np.pad(factors, (0, missing)), np.int32(start)
    return [jax.device_put(host, device) for _, device in local]


def progress_bar(title: str, total: int, unit: str) -> tqdm:
    """A progress bar of process 0: live in a terminal, a line per minute in a log, nothing without a title."""
    every = 0.1 if sys.stderr.isatty() else 60
    shown = title and distributed.is_first()
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, mininterval=every, disable=not shown)


def summary(counts: dict[str, int]) -> str:
    """The counts of `mine` as a sentence: what became of all candidates, and the queries that got too few negatives."""
    text = {name: f"{name.removeprefix('removed_')} {count:,}" for name, count in counts.items()}
    removed = ", ".join(text[name] for name in counts if name.startswith("removed_"))
    return (
        f"{text['candidates']} = {text['negatives']} + {text['surplus']} + removed ({removed}); {text['queries']}, "
        f"{text['short']} ({text['none']}, {text['small_window']})"
    )


def device_bytes(queries: int, documents: int, dimensions: int, high: int, digits: int) -> int:
    """The memory of a device that ranks `queries` against blocks of `documents`, at most, in bytes.

    The queries with their best `high` ranks, two blocks of documents, and the products of a tile.
    """
    width, is_cpu = digits * dimensions, jax.default_backend() == "cpu"
    held = queries * (width + 16 * high) + 2 * documents * (width + 4)
    as_float32 = 4 * width * (documents + TILE) if is_cpu else 0
    return held + as_float32 + 4 * (digits**2 + 3) * TILE * documents


def _queries_per_device(queries: int, devices: int) -> int:
    """The number of queries that a device ranks at once: QUERIES, or fewer so that every device has some."""
    return min(QUERIES, -(-queries // devices))


@functools.partial(jax.jit, static_argnames=("size", "group", "k"), donate_argnums=(0, 1))
def _rank_block(best, ranked, queries, documents, factors, start, *, size, group, k):
    """The best of `best` [T, tile, high], the scores of `ranked`, and of documents start.. [digits, n, D].

    A score is the product of whole numbers times the document's factor. Earlier documents come first, so that top_k
    keeps them on ties.
    """
    number = documents.shape[1]
    valid = start + jnp.arange(number) < size
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.int8  # CPUs have no fast product of int8
    documents = documents.astype(dtype)

    def dot(a, b):
        if dtype == jnp.int8:
            return jnp.dot(a, b.T, preferred_element_type=jnp.int32)
        ranges = [slice(d, d + EXACT_DIMENSIONS) for d in range(0, a.shape[1], EXACT_DIMENSIONS)]
        parts = [jnp.dot(a[:, d], b[:, d].T, precision="highest") for d in ranges]
        return parts[0] if len(parts) == 1 else sum(part.astype(jnp.int32) for part in parts)

    def one_tile(inputs):
        best, ranked, queries = inputs
        scores = jnp.where(valid, _products(dot, queries.astype(dtype), documents) * factors, -jnp.inf)
        # The k best are in the k groups with the best maxima, which are far fewer numbers to sort.
        groups = scores.reshape(len(scores), -1, group)
        chosen = jnp.sort(jax.lax.top_k(groups.max(2), min(k, groups.shape[1]))[1], 1)
        index = (chosen[:, :, None] * group + jnp.arange(group)).reshape(len(scores), -1)
        new, column = jax.lax.top_k(jnp.take_along_axis(groups, chosen[:, :, None], 1).reshape(index.shape), k)
        new_ranked = start + jnp.take_along_axis(index, column, 1)
        best, column = jax.lax.top_k(jnp.concatenate([best, new], 1), best.shape[1])
        return best, jnp.take_along_axis(jnp.concatenate([ranked, new_ranked], 1), column, 1)

    return jax.lax.map(one_tile, (best, ranked, queries))


def _whole(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, D] as whole numbers: digits int8 [1 or DIGITS, n, D], highest first, and a factor float32 [n] each.

    A vector of unit length is its digits, each BASE times smaller than the one before, times its factor.
    """
    if vectors.dtype == np.int8:
        return np.asarray(vectors)[None], _inverse(np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.int32)))
    digits, lengths = np.empty((DIGITS, *vectors.shape), np.int8), np.empty(len(vectors))
    for start in range(0, len(vectors), ROWS):  # in float64
        part = slice(start, start + ROWS)
        rest = np.asarray(vectors[part], np.float64)
        largest = np.abs(rest).max(1, initial=0)
        rest = np.rint(rest * (_inverse(largest, np.float64) * (BASE**DIGITS // 2))[:, None])
        lengths[part] = np.sqrt((rest * rest).sum(1))
        for i in range(DIGITS):
            weight = BASE ** (DIGITS - 1 - i)
            digits[i, part] = digit = np.rint(rest / weight)
            rest -= digit * weight
    return digits, _inverse(lengths) * np.float32(BASE ** (DIGITS - 1))


def _inverse(values: np.ndarray, dtype=np.float32) -> np.ndarray:
    """1 / values, and 0 for 0."""
    return np.divide(1, values, out=np.zeros(len(values)), where=values > 0).astype(dtype)


def _products(dot: Callable, a, b):
    """float32 products of whole numbers: `dot(a[i], b[j])` is that of their digits i and j, exact.

    Pairs of digits of equal weight are added exactly, then the sums from the lowest up, so every device rounds alike.
    """
    total = None
    for weight in reversed(range(len(a) + len(b) - 1)):
        parts = [dot(a[i], b[weight - i]) for i in range(len(a)) if 0 <= weight - i < len(b)]
        part = parts[0] if len(parts) == 1 else sum(each.astype("int32") for each in parts)
        part = part.astype("float32")
        total = part if total is None else total * (1 / BASE) + part
    return total


def _gather(mined: Mined, mesh, size: int) -> Mined:
    """The results of `mine`, from each process's rows and its part of every count."""
    processes = np.array([device.process_index for device in mesh.devices.flat])
    owner = processes[np.arange(len(mined.negatives)) // size % len(processes)]
    most = np.bincount(owner).max()
    arrays = []
    for array in mined[:-1]:
        local, whole = array[owner == jax.process_index()], np.empty_like(array)
        padding = ((0, most - len(local)), *((0, 0) for _ in array.shape[1:]))
        for process, part in enumerate(multihost_utils.process_allgather(np.pad(local, padding))):
            whole[owner == process] = part[: (owner == process).sum()]
        arrays.append(whole)
    # Viewed as int32, because jax has no int64.
    parts = multihost_utils.process_allgather(np.array(list(mined.counts.values()), np.int64).view(np.int32))
    sums = np.ascontiguousarray(parts).view(np.int64).sum(0).tolist()
    return Mined(*arrays, dict(zip(mined.counts, sums)))


def _is_in(values: np.ndarray, sorted_set: np.ndarray) -> np.ndarray:
    """Whether each value is in a sorted array without repetitions, bool of the same shape."""
    index = np.minimum(np.searchsorted(sorted_set, values), len(sorted_set) - 1)
    return sorted_set[index] == values


def _repeats(content: np.ndarray) -> np.ndarray:
    """Whether the same value occurs further left in the row, bool [n, W]."""
    order = np.argsort(content, axis=1, kind="stable")
    values = np.take_along_axis(content, order, 1)
    repeats = np.zeros(content.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], values[:, 1:] == values[:, :-1], 1)
    return repeats


def _embeddings(values, noun: str) -> np.ndarray:
    values = values if isinstance(values, np.ndarray) else np.asarray(values)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"{noun} embeddings have shape {list(values.shape)}, expected [N, D] with N > 0")
    if values.dtype != np.int8:
        blocks = (values[start : start + DOCUMENTS] for start in range(0, len(values), DOCUMENTS))
        if bad := sum(int((~np.isfinite(block).all(1)).sum()) for block in blocks):
            raise ValueError(f"{bad} of {len(values)} {noun} embeddings are not finite")
    return values
