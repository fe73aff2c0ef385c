"""The letters of texts, and hashes of every window of them (Rabin and Karp, 1987), in NumPy.

`letters` forgets case, accents, white space and punctuation, so that re-wrapped or re-cased copies are equal.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

# hash(i, j) = B^-i * sum_k c[k] * B^k for i <= k < j, from prefix sums modulo 2^64, where an odd B is invertible.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


class Hashes:
    """64-bit hashes of ranges of characters. `codes`: positive integers[n], such as code points."""

    def __init__(self, codes: np.ndarray):
        self.size = len(codes)
        powers = _powers(_BASE, self.size)
        self._sums = np.zeros(self.size + 1, np.uint64)
        np.cumsum(codes.astype(np.uint64) * powers[: self.size], out=self._sums[1:])

    def windows(self, size: int) -> np.ndarray:
        """Hashes of all windows of `size` characters, uint64[n - size + 1] by their first character."""
        if size > self.size:
            return np.zeros(0, np.uint64)
        result = self._sums[size:] - self._sums[: len(self._sums) - size]
        result *= _powers(_INVERSE, self.size)[: len(result)]
        return result

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Hashes of ranges of characters, uint64[k]. The hash of a range as long as a window equals the window's."""
        return (self._sums[stops] - self._sums[starts]) * _powers(_INVERSE, self.size)[starts]


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^n modulo 2^64 for an n of at least `count`, uint64[n + 1]."""
    return _power_table(base, max(count, 1).bit_length())


@functools.lru_cache(maxsize=4)
def _power_table(base: int, bits: int) -> np.ndarray:
    factors = np.full((1 << bits) + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def letters(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint32[n] of the letters and digits of all texts, bounds int64[len(texts) + 1] of each text's)."""
    texts = [text.casefold() for text in texts]
    codes = _table()[np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)]
    kept = codes != 0
    count = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(kept, out=count[1:])
    ends = np.cumsum([0, *map(len, texts)])
    return codes[kept], count[ends]


@functools.lru_cache
def _table() -> np.ndarray:
    """The code of each code point: a letter without accents, in lower case; 0 for what is neither letter nor digit."""
    table = np.zeros(0x110000, np.uint32)
    for code in range(0x110000):
        if (character := chr(code)).isalnum():
            parts = unicodedata.normalize("NFKD", character)
            # A character of several letters, such as a Hangul syllable, stays as it is.
            base = parts[0] if all(unicodedata.category(c)[0] == "M" for c in parts[1:]) else character
            lower = base.casefold()  # full-width capitals have parts that are capitals
            table[code] = ord(lower if len(lower) == 1 else base)
    return table
