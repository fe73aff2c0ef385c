"""Near duplicates by MinHash (Broder, 1997): hashes of bands of signatures, and which examples to drop.

The similarity of two texts is that of their sets of SHINGLE successive letters (Jaccard); two examples are as similar
as the product of the similarities of their sides: of two pairs with the same document, both stay unless their queries
are alike. Of all examples with an equal band, the one with the smallest id stays. So an example is dropped if one that
is like it has a smaller id, which depends on neither the order nor the number of shards.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embed.preparation.windows import Hashes, letters

PERMUTATIONS = 112
SHINGLE = 12  # letters
SEED = 1
ROWS = 256  # signatures that are fetched from the library together: it gives Python integers


@functools.lru_cache
def num_bands(similarity: float) -> tuple[int, int]:
    """(bands, rows of a band) such that examples of this similarity have an equal band about as often as not.

    (1 / bands)^(1 / rows) is the similarity that is found with a probability of 1 - 1/e.
    """
    rows = min(range(1, PERMUTATIONS + 1), key=lambda r: abs((r / PERMUTATIONS) ** (1 / r) - similarity))
    return PERMUTATIONS // rows, rows


def sides(example: Mapping) -> tuple[str, ...]:
    """The texts of an example that are compared, each with the same side of others."""
    if "queries" in example:
        return (example["text"] if "text" in example else "\n".join(example["chunks"]),)
    return (example["text"],) if "text" in example else (example["query"], example["document"])


def bands(examples: Sequence[Mapping], similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64[examples, bands], bool[examples]: whether all sides have letters)."""
    number, rows = num_bands(similarity)
    factors = np.random.default_rng(SEED).integers(0, 2**63, (2, PERMUTATIONS), dtype=np.uint64) * np.uint64(2)
    mixed = np.zeros((len(examples), PERMUTATIONS), np.uint64)
    complete = np.ones(len(examples), bool)
    for texts, factor in zip(zip(*map(sides, examples)), factors):
        signatures, has_letters = _signatures(texts)
        mixed += signatures * (factor + np.uint64(1))
        complete &= has_letters
    result = mixed[:, : number * rows].reshape(-1, number, rows).sum(-1, dtype=np.uint64)
    result ^= result >> np.uint64(32)  # the high bits choose the bucket
    return result * np.uint64(0x9E3779B97F4A7C15), complete


def _signatures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64[texts, PERMUTATIONS] of 32 bits each, bool[texts]: whether a text has letters)."""
    import rensa

    codes, limits = letters(texts)
    hashes = Hashes(codes)
    lengths = np.diff(limits)
    counts = np.where(lengths > 0, np.maximum(lengths - SHINGLE + 1, 1), 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    # The shingles of all texts in a row, without those across two texts; a shorter text is one shingle.
    shingles = np.zeros(offsets[-1], np.uint64)
    windows = hashes.windows(SHINGLE)
    index = np.arange(offsets[-1]) + np.repeat(limits[:-1] - offsets[:-1], counts)
    long = np.repeat(lengths >= SHINGLE, counts)
    shingles[long] = windows[index[long]]
    short = np.flatnonzero((lengths > 0) & (lengths < SHINGLE))
    shingles[offsets[short]] = hashes.ranges(limits[short], limits[short + 1])
    result = np.zeros((len(texts), PERMUTATIONS), np.uint64)
    for start in range(0, len(texts), ROWS):
        part = offsets[start : start + ROWS + 1]
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            shingles[part[0] : part[-1]], (part - part[0]).astype(np.uint64), PERMUTATIONS, SEED
        )
        size = (len(part) - 1) * PERMUTATIONS
        values = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, size)
        result[start : start + ROWS] = values.reshape(-1, PERMUTATIONS)
    return result, lengths > 0


def find(bands: np.ndarray, ids: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """(bool[rows]: what to drop, the rows of each group with the one that stays first) of rows with a band each.

    bands: uint64[rows]. Rows of the same example have the same id (uint64) and task. In a group, the example with the
    smallest (id, task) stays; other rows of it, and of equal examples of its task, stay too.
    """
    drop = np.zeros(len(bands), bool)
    _, inverse, counts = np.unique(bands, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    rows = rows[np.lexsort((tasks[rows], ids[rows], bands[rows]))]
    if not len(rows):
        return drop, iter(())
    starts = np.concatenate([[True], bands[rows][1:] != bands[rows][:-1]])
    first = rows[np.maximum.accumulate(np.where(starts, np.arange(len(rows)), 0))]
    drop[rows] = (ids[rows] != ids[first]) | (tasks[rows] != tasks[first])
    limits = itertools.pairwise([*np.flatnonzero(starts), len(rows)])
    return drop, (rows[a:b] for a, b in limits if drop[rows[a:b]].any())
