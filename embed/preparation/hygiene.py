"""Deduplication and decontamination by normalised content: pure functions, no framework.

Two texts are the same when they are equal after all white space is removed, so re-indented or re-wrapped copies of a
function count as copies.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
WINDOW = 32  # characters: no shorter text is looked for inside others


def normalise(text: str) -> str:
    """The text without any white space."""
    return "".join(text.split())


def digest(text: str) -> str:
    """128 bits of BLAKE2b over the normalised text, in hex."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def deduplicate(items: Iterable[Item], key: Callable[[Item], str]) -> tuple[list[Item], int]:
    """The first item of each key, in order, and how many later ones were dropped."""
    kept = {}
    count = 0
    for item in items:
        count += 1
        kept.setdefault(key(item), item)
    return list(kept.values()), count - len(kept)


def decontaminate(
    items: Iterable[Item], keys: Callable[[Item], Iterable[str]], held_out: Collection[str]
) -> tuple[list[Item], int]:
    """The items none of whose keys is held out, in order, and how many were dropped."""
    kept = []
    count = 0
    for item in items:
        count += 1
        if not any(key in held_out for key in keys(item)):
            kept.append(item)
    return kept, count - len(kept)


def contained(needles: Sequence[str], texts: Iterable[str], window: int = WINDOW) -> set[int]:
    """Indices of the needles that occur, up to white space, inside one of the texts.

    A rolling hash of `window` characters finds candidates (Rabin and Karp, 1987), an exact comparison confirms them.
    Needles shorter than `window` normalised characters raise ValueError: they would be found everywhere.
    """
    # hash(i) = sum_j c[i + j] * B^(i + j) over the window, times B^-i: prefix sums modulo 2^64, where an odd B is invertible.
    base = 0x9E3779B97F4A7C15
    by_hash: dict[int, list[tuple[int, str]]] = {}
    for index, needle in enumerate(map(normalise, needles)):
        if len(needle) < window:
            raise ValueError(
                f"needle {index} has {len(needle)} characters without white space, needs at least {window}"
            )
        value = 0
        for power, character in enumerate(needle[:window]):
            value += (ord(character) + 1) * pow(base, power, 2**64)
        by_hash.setdefault(value % 2**64, []).append((index, needle))
    if not by_hash:
        return set()
    hashes = np.array(sorted(by_hash), np.uint64)
    possible = np.zeros(1 << 16, bool)  # by the top 16 bits: rejects nearly all positions at once
    possible[hashes >> np.uint64(48)] = True

    block = 1 << 20
    inverse = pow(base, -1, 2**64)
    powers = _powers(base, block)
    inverses = _powers(inverse, block)
    found: set[int] = set()
    for text in _joined(texts, block):
        for start in range(0, max(len(text) - window + 1, 0), block - window):
            part = text[start : start + block]
            codes = np.frombuffer(part.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
            codes += np.uint64(1)
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers[: len(codes)])])
            rolling = (sums[window:] - sums[:-window]) * inverses[: len(codes) - window + 1]
            offsets = np.flatnonzero(possible[rolling >> np.uint64(48)])
            for offset in offsets[np.isin(rolling[offsets], hashes)]:
                for index, needle in by_hash[int(rolling[offset])]:
                    if text.startswith(needle, start + int(offset)):
                        found.add(index)
    return found


def _joined(texts: Iterable[str], size: int) -> Iterator[str]:
    """Normalised texts, joined by a null character (which no source has) to at least `size` characters."""
    pending: list[str] = []
    length = 0
    for text in texts:
        pending.append(normalise(text))
        length += len(pending[-1]) + 1
        if length >= size:
            yield "\0".join(pending)
            pending, length = [], 0
    yield "\0".join(pending)


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count - 1) modulo 2^64, uint64[count]."""
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base, np.uint64)]), dtype=np.uint64)
