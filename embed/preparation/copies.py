"""Copies of texts: two texts are the same if they are equal without white space. `python_docs` drops those of code.

So re-indented and re-wrapped copies of a function count as copies.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from embed.preparation.windows import Hashes

Item = TypeVar("Item")
WINDOW = 32  # characters; `contained` accepts no shorter needle


def normalize(text: str) -> str:
    """The text without any white space."""
    return "".join(text.split())


def digest(text: str) -> str:
    """128 bits of BLAKE2b over the normalized text, in hex."""
    return hashlib.blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def deduplicate(items: Iterable[Item], key: Callable[[Item], str]) -> tuple[list[Item], int]:
    """(the first item of each key in order, number of items dropped)."""
    kept = {}
    count = 0
    for item in items:
        count += 1
        kept.setdefault(key(item), item)
    return list(kept.values()), count - len(kept)


def decontaminate(
    items: Iterable[Item], keys: Callable[[Item], Iterable[str]], held_out: Collection[str]
) -> tuple[list[Item], int]:
    """(the items without a held-out key in order, number of items dropped)."""
    kept = []
    count = 0
    for item in items:
        count += 1
        if not any(key in held_out for key in keys(item)):
            kept.append(item)
    return kept, count - len(kept)


def contained(needles: Sequence[str], texts: Iterable[str], window: int = WINDOW) -> set[int]:
    """Indices of the needles that occur, up to white space, inside one of the texts.

    A rolling hash of `window` characters finds candidates (Rabin and Karp, 1987). An exact comparison confirms them.
    A needle shorter than `window` normalized characters raises ValueError: it would match everywhere.
    """
    by_hash: dict[int, list[tuple[int, str]]] = {}
    for index, needle in enumerate(map(normalize, needles)):
        if len(needle) < window:
            raise ValueError(
                f"needle {index} has {len(needle)} characters without white space; it must have at least {window}"
            )
        by_hash.setdefault(int(_hashes(needle[:window]).windows(window)[0]), []).append((index, needle))
    if not by_hash:
        return set()
    hashes = np.array(sorted(by_hash), np.uint64)
    possible = np.zeros(1 << 16, bool)  # indexed by the top 16 bits: rejects nearly all offsets at once
    possible[hashes >> np.uint64(48)] = True

    block = 1 << 20
    matches: set[int] = set()
    for text in _joined(texts, block):
        for start in range(0, max(len(text) - window + 1, 0), block - window):
            rolling = _hashes(text[start : start + block]).windows(window)
            offsets = np.flatnonzero(possible[rolling >> np.uint64(48)])
            for offset in offsets[np.isin(rolling[offsets], hashes)]:
                for index, needle in by_hash[int(rolling[offset])]:
                    if text.startswith(needle, start + int(offset)):
                        matches.add(index)
    return matches


def _hashes(text: str) -> Hashes:
    return Hashes(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32) + np.uint32(1))


def _joined(texts: Iterable[str], size: int) -> Iterator[str]:
    """Strings of at least `size` characters: normalized texts joined by null characters, which no source contains."""
    pending: list[str] = []
    length = 0
    for text in texts:
        pending.append(normalize(text))
        length += len(pending[-1]) + 1
        if length >= size:
            yield "\0".join(pending)
            pending, length = [], 0
    yield "\0".join(pending)
