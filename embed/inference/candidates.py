"""Candidates for exact scoring: vectors whose sign bits differ in few places from those of the query, by FAISS.

`Scan` compares the bits of all vectors. `Lists` compares those of the vectors near the query: k-means divides them into
lists, and `nprobe` lists are read. FAISS's own files are not used, because reading them is not safe if somebody else
wrote them: arrays are, after `Lists.load` has checked them.
"""

import concurrent.futures
import dataclasses
import os
import threading
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float32, Int32, Int64, UInt8

from embed import paths
from embed.inference.ranking import slices
from embed.inference.stored_rows import load_array

KINDS = ("exact", "binary", "ivf")
EXACT_ROWS, BINARY_ROWS = 100_000, 1_000_000  # the most rows for which a kind is chosen
CODES, LIST_CODES, LIST_ROWS, LISTS = "codes.npy", "list_codes.npy", "list_rows.npy", "lists.safetensors"
BLOCK, THREADS = 1 << 14, 8  # vectors in float32 at once, and most blocks at the same time
MAX_CLUSTER_DIMENSIONS = 256  # of the space in which k-means runs
CANDIDATES = (50, 100, 200, 500, 1000, 2000, 4000)  # numbers that are tried
CANDIDATE_COST = 400  # of reading and scoring one, in codes that are compared meanwhile
TUNED_QUERIES, TUNED_K = 256, 10
POINTS_PER_LIST, ITERATIONS = 40, 8  # of k-means
GROUPS = 4  # of centroids, that are looked through for the list of a vector


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How much a search looks at: candidates of a query for ten results, and lists (1 for a scan)."""

    candidates: int
    nprobe: int
    recall: float  # of the ten nearest, for some of the vectors among the others


def choose_kind(kind: str | None, rows: int, precision: str, dimensions: int) -> str:
    """`kind`, or the one for so many rows. ValueError if the vectors cannot be searched so."""
    coarse = precision in ("float32", "int8") and dimensions % 8 == 0
    if kind is None:
        kind = "exact" if rows <= EXACT_ROWS or not coarse else "binary" if rows <= BINARY_ROWS else "ivf"
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if kind != "exact" and not coarse:
        raise ValueError(
            f"kind={kind} compares sign bits and then float32 or int8 vectors of a multiple of 8 dimensions, the "
            f"vectors are {precision} of {dimensions}"
        )
    if kind != "exact":
        faiss()
    return kind


def sign_bits(vectors: np.ndarray) -> UInt8[np.ndarray, "N D/8"]:
    """The packed bits v >= 0 of float32 or int8 vectors, as in the precision ubinary."""
    return np.packbits(vectors >= 0, axis=1)


class Scan:
    """All vectors, compared by their bits."""

    lists = 1

    def __init__(self, codes: UInt8[np.ndarray, "N D/8"], ids: Int64[np.ndarray, " N"]):
        self._ids, self.size = ids, len(ids)
        self._index = faiss().IndexBinaryFlat(codes.shape[1] * 8)
        self._index.add(np.ascontiguousarray(codes))

    @classmethod
    def load(cls, folder: Path, rows: int, dimensions: int, hidden: np.ndarray) -> "Scan":
        """What `build_scan` wrote, without the `hidden` rows."""
        codes = load_array(folder / CODES, np.uint8, (rows, dimensions // 8))
        kept = np.setdiff1d(np.arange(rows), hidden)
        return cls(codes[kept] if len(hidden) else codes, kept)

    def find(self, queries: np.ndarray, count: int, nprobe: int = 1) -> Int64[np.ndarray, "Q n"]:
        """The `count` rows whose bits are nearest to those of each query, nearest first; -1 after the last."""
        _, found = self._index.search(sign_bits(queries), min(count, self.size))
        return np.where(found >= 0, self._ids[found], -1)


class Lists:
    """The vectors in lists of similar ones, compared by their bits."""

    def __init__(self, codes, ids, offsets, mean, projection, centroids, hidden):
        """Arrays of `build_lists`: list l has rows ids[offsets[l]:offsets[l + 1]], with `codes`; but `hidden` rows."""
        library, bits = faiss(), codes.shape[1] * 8
        self.lists, self.mean, self.projection, self.centroids = len(centroids), mean, projection, centroids
        inverted = library.ArrayInvertedLists(self.lists, codes.shape[1])
        kept = np.ones(len(ids), bool)
        kept[hidden] = False
        for number, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
            here = kept[ids[start:stop]]
            members, bytes_ = ids[start:stop][here].astype(np.int64), codes[start:stop][here]
            if len(members):
                inverted.add_entries(number, len(members), library.swig_ptr(members), library.swig_ptr(bytes_))
        self._quantizer, self._inverted = library.IndexBinaryFlat(bits), inverted  # FAISS keeps no reference
        self._index = library.IndexBinaryIVF(self._quantizer, bits, self.lists)
        self._index.replace_invlists(inverted, False)
        self.size = int(kept.sum())
        self._index.is_trained, self._index.ntotal = True, self.size
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path, rows: int, dimensions: int, hidden: np.ndarray) -> "Lists":
        """What `build_lists` wrote, without the `hidden` rows; ValueError if FAISS could not work with it."""
        file = folder / LISTS
        try:
            small = safetensors.numpy.load_file(file)
            mean, projection, centroids, offsets = (
                small[name] for name in ("mean", "projection", "centroids", "offsets")
            )
            reduced = centroids.shape[1]
            expected = (mean.shape, projection.shape, offsets.shape) == (
                (dimensions,),
                (dimensions, reduced),
                (len(centroids) + 1,),
            )
            floats = all(x.dtype == np.float32 and np.isfinite(x).all() for x in (mean, projection, centroids))
            expected &= floats and len(centroids) > 0 and offsets.dtype == np.int64
            expected &= offsets[0] == 0 and offsets[-1] == rows and (np.diff(offsets) >= 0).all()
        except (safetensors.SafetensorError, KeyError, IndexError, ValueError, OSError):
            expected = False
        if not expected:
            raise ValueError(f"{file} does not describe lists of {rows} vectors: make the index again")
        ids = load_array(folder / LIST_ROWS, np.int32, (rows,))
        if rows and not (ids.min() >= 0 and ids.max() < rows):
            raise ValueError(f"{folder / LIST_ROWS} has numbers of rows outside 0..{rows - 1}: make the index again")
        codes = load_array(folder / LIST_CODES, np.uint8, (rows, dimensions // 8))
        return cls(codes, ids, offsets, mean, projection, centroids, hidden)

    def find(self, queries: np.ndarray, count: int, nprobe: int) -> Int64[np.ndarray, "Q n"]:
        """As `Scan.find`, of the vectors in the `nprobe` lists nearest to each query."""
        nprobe = min(nprobe, self.lists)
        distances = _distances(reduce_dimensions(queries, self.mean, self.projection), self.centroids)
        nearest = np.ascontiguousarray(np.argpartition(distances, nprobe - 1, axis=1)[:, :nprobe], np.int64)
        unused = np.zeros(nearest.shape, np.int32)  # distances to the lists
        with self._lock:  # the number of lists is a field of the index
            self._index.nprobe = nprobe
            return self._index.search_preassigned(sign_bits(queries), min(count, self.size), nearest, unused)[1]


def build_scan(folder: Path, vectors: np.ndarray) -> None:
    """Write the bits of all vectors [N, D] into a folder, for `Scan.load`."""
    codes = np.lib.format.open_memmap(folder / CODES, "w+", np.uint8, (len(vectors), vectors.shape[1] // 8))
    for rows in slices(len(vectors), BLOCK):
        codes[rows] = sign_bits(vectors[rows])
    codes.flush()


def build_lists(folder: Path, vectors: np.ndarray) -> None:
    """Divide vectors [N, D] into lists by k-means and write them into a folder, for `Lists.load`.

    k-means sees the directions of the vectors, minus their mean, in their `MAX_CLUSTER_DIMENSIONS` principal
    components. The number of lists is the power of two nearest to 4 sqrt(N).
    """
    library, count = faiss(), len(vectors)
    lists = min(2 ** round(np.log2(4 * np.sqrt(count))), count)
    sample = vectors[np.sort(np.random.default_rng(0).permutation(count)[: lists * POINTS_PER_LIST])]
    mean, projection = _principal_components(sample[:: max(1, len(sample) // 100_000)])
    points = np.concatenate([reduce_dimensions(sample[rows], mean, projection) for rows in slices(len(sample), BLOCK)])
    del sample
    means = library.Kmeans(
        points.shape[1], lists, niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=10**9
    )
    means.train(points)
    centroids = np.array(means.centroids)
    del points
    nearest = _Nearest(centroids)
    of_row = np.empty(count, np.int32)

    def assign(rows: slice) -> None:
        of_row[rows] = nearest(reduce_dimensions(vectors[rows], mean, projection))

    with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(assign, slices(count, BLOCK)):
            pass
    ids = np.argsort(of_row, kind="stable").astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=lists))]).astype(np.int64)
    position = np.empty(count, np.int32)  # of each row in the lists
    position[ids] = np.arange(count, dtype=np.int32)
    codes = np.lib.format.open_memmap(folder / LIST_CODES, "w+", np.uint8, (count, vectors.shape[1] // 8))
    for rows in slices(count, BLOCK):
        codes[position[rows]] = sign_bits(vectors[rows])
    codes.flush()
    np.save(folder / LIST_ROWS, ids)
    small = {"mean": mean, "projection": projection, "centroids": centroids, "offsets": offsets}
    paths.write_tensors(folder / LISTS, small)


def tune(found: Scan | Lists, queries: np.ndarray, own: np.ndarray, truth: np.ndarray, recall: float) -> Parameters:
    """The cheapest search that finds a share `recall` of `truth` int[Q, k], the rows that are nearest to each query.

    Row own[q], which is query q itself, does not count. A candidate is scored exactly, so the share that is found is
    the share of the truth among the candidates. More lists or more candidates may raise it: the numbers of lists grow
    by a fifth at a time, each with the fewest candidates that suffice.
    """
    total = (truth >= 0).sum()
    if not total:  # of one vector there is no other
        return Parameters(1, 1, 1.0)
    counts = sorted({min(count, found.size) for count in CANDIDATES})

    def shares(nprobe: int) -> np.ndarray:
        """The share among each number of candidates; of some queries at a time, because reading all lists is slow."""
        hits = np.zeros(len(counts))
        for rows in slices(len(queries), 16):
            near = found.find(queries[rows], counts[-1] + 1, nprobe)
            for candidates, itself, expected in zip(near, own[rows], truth[rows]):
                is_true = np.isin(candidates[candidates != itself], expected[expected >= 0])
                hits += [is_true[:count].sum() for count in counts]
        return hits / total

    best, nprobe = (np.inf, None), 1
    while True:
        reached, read = shares(nprobe), nprobe / found.lists * found.size
        if (enough := reached >= recall).any():
            i = int(enough.argmax())
            cost = read + CANDIDATE_COST * counts[i]
            best = min(best, (cost, Parameters(counts[i], nprobe, float(reached[i]))), key=lambda each: each[0])
        if nprobe == found.lists or read >= best[0]:
            break
        nprobe = min(max(nprobe + 1, round(1.2 * nprobe)), found.lists)
    return best[1] or Parameters(counts[-1], found.lists, float(reached[-1]))


def reduce_dimensions(
    vectors: np.ndarray, mean: Float32[np.ndarray, " D"], projection: Float32[np.ndarray, "D d"]
) -> Float32[np.ndarray, "N d"]:
    """The directions of vectors [N, D], minus their mean, projected."""
    x = np.asarray(vectors, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return (x - mean) @ projection


class _Nearest:
    """Finds the nearest of many centroids [K, d], as matrix products.

    Centroids are in about sqrt(K) groups of neighbors; those in the `GROUPS` groups nearest to a point are compared. It
    is the nearest of all but for a point in hundreds, where another list takes the point as well.
    """

    def __init__(self, centroids: Float32[np.ndarray, "K d"]):
        count, library = max(1, round(np.sqrt(len(centroids)))), faiss()
        groups = library.Kmeans(centroids.shape[1], count, niter=ITERATIONS, min_points_per_centroid=1)
        groups.train(centroids)
        of_centroid = groups.index.search(centroids, 1)[1][:, 0]
        self._members = [np.flatnonzero(of_centroid == group) for group in range(count)]
        self._groups, self._centroids = groups.index, [centroids[members] for members in self._members]

    def __call__(self, points: Float32[np.ndarray, "N d"]) -> Int32[np.ndarray, " N"]:
        """The number of the nearest centroid of each point."""
        probed = min(GROUPS, len(self._members))
        _, near = self._groups.search(points, probed)
        order = np.argsort(near, axis=None, kind="stable")  # the pairs of points and groups, group by group
        ends = np.cumsum(np.bincount(near.ravel(), minlength=len(self._members)))
        least, found = np.full(len(points), np.inf, np.float32), np.zeros(len(points), np.int32)
        for pairs, members, centroids in zip(np.split(order, ends[:-1]), self._members, self._centroids):
            rows = pairs // probed
            if len(rows) and len(members):
                distances = _distances(points[rows], centroids)
                best = distances.argmin(1)
                distance = distances[np.arange(len(rows)), best]
                closer = distance < least[rows]
                least[rows[closer]], found[rows[closer]] = distance[closer], members[best[closer]]
        return found


def _distances(points: np.ndarray, centroids: np.ndarray) -> Float32[np.ndarray, "N K"]:
    """The squared distances, without the squared length of each point."""
    return (centroids**2).sum(1) - 2 * points @ centroids.T


def _principal_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean direction [D] of vectors [N, D], and their first principal components [D, d]."""
    size = vectors.shape[1]
    none, every = np.zeros(size, np.float32), np.eye(size, dtype=np.float32)
    total, products = np.zeros(size), np.zeros((size, size))
    for rows in slices(len(vectors), BLOCK):
        x = reduce_dimensions(vectors[rows], none, every)
        total += x.sum(0, dtype=np.float64)
        products += x.T @ x
    mean = total / len(vectors)
    _, components = np.linalg.eigh(products / len(vectors) - np.outer(mean, mean))  # in ascending order
    return mean.astype(np.float32), components[:, ::-1][:, :MAX_CLUSTER_DIMENSIONS].astype(np.float32).copy()


def faiss():
    """The module faiss; ValueError if it is not installed."""
    try:
        import faiss as library
    except ModuleNotFoundError:
        raise ValueError(
            "an index of the kind binary or ivf needs faiss: pip install -e '.[search]', or take --kind=exact"
        ) from None
    return library
