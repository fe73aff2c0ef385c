"""Ranking by words: BM25 with bm25s, and the fusion of rankings."""

import functools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import Stemmer

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


class Words:
    """The BM25 scores of texts, in Lucene's variant of the formula."""

    def __init__(self, model, language: str):
        """`model` is a bm25s.BM25."""
        self._model, self._split = model, splitter(language)

    @classmethod
    def build(cls, texts: Iterable[str], language: str = "") -> "Words":
        """Count the words of texts in a language (ISO 639-3, see `analyzer`); without one, see `words`."""
        split = splitter(language)
        model = library().BM25(method="lucene", k1=K1, b=B)
        model.index([split(text) for text in texts], show_progress=False)
        return cls(model, language)

    def save(self, folder: Path) -> None:
        """Write the statistics into a new folder."""
        self._model.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path, count: int, language: str) -> "Words":
        """Read what `save` wrote of `count` texts; ValueError if it does not have that form."""
        try:
            how = dict(method="lucene", k1=K1, b=B, backend="numpy", dtype="float32", int_dtype="int32")
            model = library().BM25.load(folder, mmap=True, show_progress=False, **how)
            data, starts, rows = (model.scores[name] for name in ("data", "indptr", "indices"))
            model.vocab_dict.pop("", None)  # which bm25s gives to texts without words, and stores nothing for
            words = np.array(list(model.vocab_dict.values()), np.int64)
            expected = len(data) == len(rows) == starts[-1] and starts[0] == 0 and (np.diff(starts) >= 0).all()
            expected &= model.scores["num_docs"] == count and (not len(rows) or 0 <= rows.min() <= rows.max() < count)
            expected &= not len(words) or 0 <= words.min() <= words.max() < len(starts) - 1
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, EOFError):
            expected = False
        if not expected:
            raise ValueError(f"{folder} does not hold the word statistics of {count} texts: make the index again")
        return cls(model, language)

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the `allowed` bool [N] texts for each query, best first: scores float32 and rows int32 [Q, k].

        On ties the lower row comes first. -1 follows the last text that shares a word with the query.
        """
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int32)
        for i, query in enumerate(queries):
            if known := [word for word in self._split(query) if word in self._model.vocab_dict]:
                own = np.where(allowed, self._model.get_scores(known), 0)
                best = top(own, k)
                best = best[own[best] > 0]
                scores[i, : len(best)], rows[i, : len(best)] = own[best], best
        return scores, rows


def check_language(language: str) -> None:
    """ValueError unless the words of a language (ISO 639-3) can be found."""
    if language not in STEMMED and language not in UNSPACED:
        known = ", ".join(sorted({*STEMMED, *UNSPACED}))
        raise ValueError(f"the language {language!r} has no stemmer; those of {known} have one, or leave it out")


def splitter(language: str) -> Callable[[str], list[str]]:
    """`analyzer` of a language, or `words` without one."""
    return analyzer(language) if language else words


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k largest scores, largest first; on ties the lower index comes first."""
    if k < len(scores):
        least = np.partition(scores, -k)[-k]
        chosen = np.flatnonzero(scores >= least)
    else:
        chosen = np.arange(len(scores))
    return chosen[np.argsort(-scores[chosen], kind="stable")][:k]


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
