"""Ranking by words: BM25 with bm25s, and the fusion of rankings."""

import functools
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import Stemmer
from jaxtyping import Bool, Float32, Int32

from embed.inference.stored_rows import load_array

FOLDER = "bm25"
K1, B = 1.5, 0.75  # the defaults of bm25s
WORD = re.compile(r"[^\W_]+")
CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

# What Snowball calls the languages that it stems, by ISO 639-3.
STEMMED = {
    **{"ara": "arabic", "arb": "arabic", "cat": "catalan", "dan": "danish", "deu": "german", "ell": "greek"},
    **{"eng": "english", "est": "estonian", "eus": "basque", "fin": "finnish", "fra": "french", "gle": "irish"},
    **{"hin": "hindi", "hun": "hungarian", "hye": "armenian", "ind": "indonesian", "ita": "italian"},
    **{"lit": "lithuanian", "nep": "nepali", "nld": "dutch", "nno": "norwegian", "nob": "norwegian"},
    **{"nor": "norwegian", "por": "portuguese", "ron": "romanian", "rus": "russian", "spa": "spanish"},
    **{"srp": "serbian", "swe": "swedish", "tam": "tamil", "tur": "turkish", "yid": "yiddish"},
}
UNSPACED = ("bod", "cmn", "jpn", "khm", "kor", "lao", "mya", "tha", "zho")  # each character counts as a word
# bm25s has lists of stop words of these.
HAVE_STOPWORDS = "english german dutch french spanish portuguese italian russian swedish norwegian".split()


@functools.cache
def library():
    """The module bm25s, imported only here: it computes with jax at once, which joining processes do not allow."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and reports each index
    return bm25s


def stopwords(name: str) -> set[str]:
    """The stop words of a language, by its English name."""
    lists = library().tokenization
    return set(lists.STOPWORDS_EN if name == "english" else getattr(lists, f"STOPWORDS_{name.upper()}"))


def analyzer(language: str) -> Callable[[str], list[str]]:
    """The function that gives the words of a text in a language (ISO 639-3), as in MTEB's BM25.

    Words of at least two characters in lower case, without stop words, stemmed by Snowball; the characters of
    languages without spaces. A language that has no stemmer keeps its words. MTEB also leaves out words that occur in
    nine texts of ten where it has no list of stop words; this does not.
    """
    if language in UNSPACED:
        ignored = stopwords("chinese") if language in ("cmn", "zho") else set()
        return lambda text: [
            c for c in unicodedata.normalize("NFKC", text).lower() if not c.isspace() and c not in ignored
        ]
    name = STEMMED.get(language, "")
    stop, pattern = stopwords(name) if name in HAVE_STOPWORDS else set(), re.compile(r"(?u)\b\w\w+\b")
    stem = Stemmer.Stemmer(name).stemWords if name else list
    return lambda text: stem([word for word in pattern.findall(text.lower()) if word not in stop])


def words(text: str) -> list[str]:
    """Lower-case words; identifiers are split at _ and case: parseHTTPHeader_v2 -> parse http header v2."""
    return [part.lower() for word in WORD.findall(text) for part in CASE.split(word)]


class BM25:
    """The BM25 scores of texts, in Lucene's variant of the formula.

    words.json     the words, in the order of their numbers
    starts.npy     int64[W + 1], where the postings of each word begin
    rows.npy       int32[P], the texts that have it
    scores.npy     float32[P], what it adds to the score of each
    """

    def __init__(self, folder: Path, count: int, language: str, words: int, postings: int):
        """What `build` wrote of `count` texts; ValueError if the files do not have that form."""
        self.count, self.split = count, splitter(language)  # of texts; the words of a text
        self._starts = load_array(folder / "starts.npy", np.int64, (words + 1,))
        self._rows = load_array(folder / "rows.npy", np.int32, (postings,))
        self._scores = load_array(folder / "scores.npy", np.float32, (postings,))
        file = folder / "words.json"
        try:
            self._numbers = {word: number for number, word in enumerate(json.loads(file.read_bytes()))}
            expected = len(self._numbers) == words
        except (ValueError, TypeError, RecursionError, OSError):
            expected = False
        expected = expected and self._starts[0] == 0 and self._starts[-1] == postings
        expected = expected and (np.diff(self._starts) >= 0).all() and bool(np.isfinite(self._scores).all())
        if not expected or (postings and not 0 <= self._rows.min() <= self._rows.max() < count):
            raise ValueError(f"{folder} does not hold the BM25 scores of {count} texts: make the index again")

    @classmethod
    def build(cls, folder: Path, texts: Iterable[str], language: str = "") -> dict:
        """Write the scores of texts into a new folder; returns the arguments of `BM25` after the count.

        Words are those of `analyzer` in a language (ISO 639-3), and of `words` without one. Memory is about 4 bytes per
        word of a text, and then 8 bytes per different word of a text.
        """
        split, numbers = splitter(language), {}
        ids = [np.array([numbers.setdefault(word, len(numbers)) for word in split(text)], np.int32) for text in texts]
        scores = {"data": np.zeros(0), "indices": np.zeros(0), "indptr": np.zeros(1)}
        if numbers:
            model = library().BM25(method="lucene", k1=K1, b=B)
            model.index(library().tokenization.Tokenized(ids, dict(numbers)), show_progress=False)
            scores = model.scores
        starts = np.asarray(scores["indptr"], np.int64)
        folder.mkdir()
        (folder / "words.json").write_text(json.dumps(list(numbers)), encoding="utf-8")
        np.save(folder / "starts.npy", starts[: len(numbers) + 1])
        np.save(folder / "rows.npy", np.asarray(scores["indices"], np.int32))
        np.save(folder / "scores.npy", np.asarray(scores["data"], np.float32))
        return {"language": language, "words": len(numbers), "postings": int(starts[-1])}

    def frequency(self, word: str) -> int:
        """The number of texts that have a word."""
        number = self._numbers.get(word)
        return 0 if number is None else int(self._starts[number + 1] - self._starts[number])

    def search(
        self, weights: Mapping[str, float], k: int, allowed: Bool[np.ndarray, " N"]
    ) -> tuple[Float32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """Scores and rows of the k best `allowed` texts for a query, best first, on ties the lower row.

        `weights` has the words of the query, and what their scores are multiplied by. A text without any of them is not
        found.
        """
        rows, scores = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for word, weight in weights.items():
            if (number := self._numbers.get(word)) is not None:
                part = slice(*self._starts[number : number + 2].tolist())
                rows.append(self._rows[part])
                scores.append(self._scores[part] * np.float32(weight))
        found, which = np.unique(np.concatenate(rows), return_inverse=True)
        total = np.bincount(which, np.concatenate(scores), len(found)).astype(np.float32)
        found, total = found[allowed[found]], total[allowed[found]]
        best = np.argsort(-total, kind="stable")[:k]
        return total[best], found[best]


def idf(count: int, frequency: int) -> float:
    """The weight of a word that `frequency` of `count` texts have, in Lucene's variant."""
    return float(np.log1p((count - frequency + 0.5) / (frequency + 0.5)))


def query_weights(query: str, segments: Sequence[BM25]) -> list[dict[str, float]]:
    """For each segment, the words of a query with their weights, so that they count as in all texts together.

    The scores of a segment contain the idf in its own texts. (Lengths stay relative to its own mean length.)
    """
    count = sum(segment.count for segment in segments)
    weights: list[dict[str, float]] = [{} for _ in segments]
    for word, times in Counter(segments[0].split(query)).items():
        frequency = sum(segment.frequency(word) for segment in segments)
        for segment, own in zip(segments, weights):
            if here := segment.frequency(word):
                own[word] = times * idf(count, frequency) / idf(segment.count, here)
    return weights


def check_language(language: str) -> None:
    """ValueError unless the words of a language (ISO 639-3) can be found."""
    if language not in STEMMED and language not in UNSPACED:
        known = ", ".join(sorted({*STEMMED, *UNSPACED}))
        raise ValueError(f"the language {language!r} has no stemmer; those of {known} have one, or leave it out")


def splitter(language: str) -> Callable[[str], list[str]]:
    """`analyzer` of a language, or `words` without one."""
    return analyzer(language) if language else words


def reciprocal_rank_fusion(*rankings: np.ndarray, k: int = 60, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Fuse rankings int [Q, n] into one (Cormack et al. 2009): int32 [Q, depth] and shares [Q, depth, rankings].

    A text scores Σ 1 / (k + rank) over the rankings that contain it, with ranks from 1; on ties the lower index comes
    first. -1 is an empty rank, in the rankings and in the result. Share r is what ranking r adds to the score, float32.
    """
    fused = np.full((len(rankings[0]), depth), -1, np.int32)
    shares = np.zeros((len(rankings[0]), depth, len(rankings)), np.float32)
    for row, lists in enumerate(zip(*rankings, strict=True)):
        parts: dict[int, list[float]] = {}
        for number, ranked in enumerate(lists):
            for rank, text in enumerate(ranked.tolist(), 1):
                if text >= 0:
                    parts.setdefault(text, [0.0] * len(rankings))[number] = 1 / (k + rank)
        best = sorted(parts, key=lambda text: (-sum(parts[text]), text))[:depth]
        fused[row, : len(best)] = best
        shares[row, : len(best)] = [parts[text] for text in best] or np.zeros((0, len(rankings)))
    return fused, shares
