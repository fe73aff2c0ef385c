"""Finds the texts of evaluation sets in training examples, by hashes of windows of their letters.

The index has every 12th window of 48 letters of an evaluation text, and every 4th of 16 characters from U+2E80 on
(Chinese, Japanese, Korean), of which each says about as much as three letters. A shorter text has one hash, of all its
letters, and equals a whole training text or none. An example is contaminated if it has at least the fraction `overlap`
of an evaluation text's windows: a common phrase in a long text does not matter, a text with a changed word does.

    FOLDER/hashes.npy   uint64[n], sorted
    FOLDER/owners.npy   uint32[n]: the evaluation text of each hash
    FOLDER/windows.npy  uint32[texts]: the number of hashes of each text
    FOLDER/texts.json   [[set, "queries" or "corpus", id], …], last
"""

import functools
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from embed import paths
from embed.preparation.windows import Hashes, letters

WINDOW, DENSE_WINDOW = 48, 16
STEPS = 4  # windows of the index start at every WINDOW / STEPS
DENSE = 0x2E80
SHORTEST = 8  # letters; a shorter evaluation text says nothing
MAX_OWNERS = 16  # texts with the same window; for others it counts as missing
BATCH = 1 << 20  # characters that are indexed together
PARTS = ("queries", "corpus")


def build(folder, texts: Iterable[tuple[str, str, str, str]]) -> None:
    """Writes the index of (set, part, id, text); once."""
    folder = paths.path(folder)
    if (folder / "texts.json").exists():
        return
    names, hashes, owners = [], [], []

    def add(batch: list[str]) -> None:
        values, index = entries(batch)
        hashes.append(values)
        owners.append((index + len(names) - len(batch)).astype(np.uint32))

    batch, characters = [], 0
    for *name, text in texts:
        names.append(name)
        batch.append(text)
        characters += len(text)
        if characters >= BATCH:
            add(batch)
            batch, characters = [], 0
    add(batch)
    hashes, owners = np.concatenate(hashes), np.concatenate(owners)
    order = np.lexsort((owners, hashes))
    arrays = {"hashes": hashes[order], "owners": owners[order]}
    for name, array in (arrays | {"windows": np.bincount(owners, minlength=len(names)).astype(np.uint32)}).items():
        content = io.BytesIO()
        np.save(content, array)
        paths.write(folder / f"{name}.npy", content.getvalue())
    paths.write(folder / "texts.json", json.dumps(names, ensure_ascii=False))


def set_texts(name: str, corpus: Iterable[dict], queries: Iterable[dict], parts: Sequence[str]) -> Iterator[tuple]:
    """(set, part, id, text) of a set; `parts` says of which of its parts."""
    for part, rows in (("queries", queries), ("corpus", corpus)):
        if part in parts:
            for row in rows:
                yield name, part, row["_id"], row["text"]


def entries(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64[n], index of the text of each int64[n]) of evaluation texts, each hash once per text."""
    codes, bounds = letters(texts)
    hashes = Hashes(codes)
    starts, stops, indices = [], [], []
    dense = np.concatenate([[0], np.cumsum(codes >= DENSE)])
    for size in (WINDOW, DENSE_WINDOW):
        first, index = _steps(bounds, size)
        if size == DENSE_WINDOW:
            kept = dense[first + size] - dense[first] == size
            first, index = first[kept], index[kept]
        starts, stops, indices = [*starts, first], [*stops, first + size], [*indices, index]
    lengths = np.diff(bounds)
    with_windows = np.isin(np.arange(len(texts)), np.concatenate(indices))
    whole = np.flatnonzero(~with_windows & (lengths >= SHORTEST))
    starts, stops, indices = [*starts, bounds[whole]], [*stops, bounds[whole + 1]], [*indices, whole]
    values = hashes.ranges(np.concatenate(starts), np.concatenate(stops))
    pairs = np.unique(np.stack([np.concatenate(indices).astype(np.uint64), values], 1), axis=0)
    return pairs[:, 1], pairs[:, 0].astype(np.int64)


def _steps(bounds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(first characters, text indices) of the windows that cover each text in steps; the last one ends the text."""
    step = size // STEPS
    free = np.diff(bounds) - size  # characters that a window can move by
    counts = np.where(free >= 0, -(-free // step) + 1, 0)
    index = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.minimum(bounds[:-1][index] + number * step, bounds[1:][index] - size), index


class Index:
    """The index in a folder. In a local folder it is mapped into memory, which processes share."""

    def __init__(self, folder):
        self._hashes, self._owners, self._windows = (_load(folder, n) for n in ("hashes", "owners", "windows"))
        bits = min(max(len(self._hashes) * 16, 1 << 16).bit_length(), 26)
        self._shift = np.uint64(64 - bits)
        self._possible = np.zeros(1 << bits, bool)  # by the top bits of a hash: rejects nearly all at once
        self._possible[self._hashes >> self._shift] = True

    def find(self, texts: Sequence[str], examples: np.ndarray, overlap: float) -> list[tuple[int, int]]:
        """(example, evaluation text) of contaminated examples, sorted. `examples`: int64[texts], of which each is."""
        codes, bounds = letters(texts)
        hashes = Hashes(codes)
        lengths = np.diff(bounds)
        short = np.flatnonzero((lengths >= SHORTEST) & (lengths < WINDOW))
        matched = [self._entries(hashes.ranges(bounds[short], bounds[short + 1]), short)]
        for size in (WINDOW, DENSE_WINDOW) if (codes >= DENSE).any() else (WINDOW,):
            windows = hashes.windows(size)
            at = np.flatnonzero(self._possible[windows >> self._shift])
            index = np.searchsorted(bounds, at, "right") - 1
            inside = at + size <= bounds[index + 1]
            matched.append(self._entries(windows[at[inside]], index[inside]))
        index, entry = (np.concatenate(values) for values in zip(*matched))
        if not len(index):
            return []
        found = np.unique(np.stack([examples[index], entry], 1), axis=0)  # each window counts once
        pairs = np.stack([found[:, 0], self._owners[found[:, 1]]], 1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        return [tuple(pair) for pair in pairs[counts >= overlap * self._windows[pairs[:, 1]]].tolist()]

    def _entries(self, values: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of the text, entry of the index) of all matches of hash values with their texts."""
        first = np.searchsorted(self._hashes, values)
        counts = np.minimum(np.searchsorted(self._hashes, values, "right") - first, MAX_OWNERS)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(index, counts), np.repeat(first, counts) + number


def _load(folder, name: str) -> np.ndarray:
    file = paths.path(folder) / f"{name}.npy"
    return np.load(io.BytesIO(file.read_bytes())) if paths.is_bucket(folder) else np.load(Path(file), mmap_mode="r")


def load(folder: str) -> Index:
    """The index of a folder, loaded once per process."""
    return _loaded(folder, (paths.path(folder) / "texts.json").stat().mtime)


@functools.lru_cache(maxsize=4)
def _loaded(folder: str, time: float) -> Index:
    return Index(folder)
