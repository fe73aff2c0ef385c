"""Rankings without a model: BM25, and the fusion of two rankings."""

import logging
import re
import unicodedata
from collections.abc import Callable

import bm25s
import numpy as np
import Stemmer
from bm25s import tokenization

from embed.evaluation.retrieval import DEPTH, descending
from embed.evaluation.sets import RetrievalSet

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and reports each index

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
STOPWORDS = {  # bm25s has lists of these
    "english": tokenization.STOPWORDS_EN,
    **{
        name: getattr(tokenization, f"STOPWORDS_{name.upper()}")
        for name in "german dutch french spanish portuguese italian russian swedish norwegian".split()
    },
}


def analyzer(language: str) -> Callable[[str], list[str]]:
    """The function that gives the words of a text in a language (ISO 639-3), as in MTEB's BM25.

    Words of at least two characters in lower case, without stop words, stemmed by Snowball; the characters of
    languages without spaces. A language that has no stemmer keeps its words. MTEB also leaves out words that occur in
    nine texts of ten where it has no list of stop words; this does not.
    """
    if language in UNSPACED:
        ignored = set(tokenization.STOPWORDS_CHINESE) if language in ("cmn", "zho") else set()
        return lambda text: [
            c for c in unicodedata.normalize("NFKC", text).lower() if not c.isspace() and c not in ignored
        ]
    name = STEMMED.get(language, "")
    stop, pattern = set(STOPWORDS.get(name, ())), re.compile(r"(?u)\b\w\w+\b")
    stem = Stemmer.Stemmer(name).stemWords if name else list
    return lambda text: stem([word for word in pattern.findall(text.lower()) if word not in stop])


def words(text: str) -> list[str]:
    """Lower-case words; identifiers are split at _ and case: parseHTTPHeader_v2 -> parse http header v2."""
    return [part.lower() for word in WORD.findall(text) for part in CASE.split(word)]


def bm25(
    data: RetrievalSet,
    *,
    context: bool = False,
    language: str = "",
    k1: float = 1.5,
    b: float = 0.75,
    depth: int = DEPTH,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The BM25 ranking of a set, int32 [Q, depth]; ties as in `retrieval.search`, -1 after the last text with a match.

    k1 and b are the defaults of bm25s (Lucene's variant of the formula). With `context`, each chunk follows the first
    chunk of its document, which names the module. With a `language` (ISO 639-3), words are split, stemmed and left out
    as in MTEB's BM25; without one, see `words`. `rows` are the part of the corpus that is searched, by default all.
    """
    texts = list(data.corpus)
    if context:
        for chunks in data.documents:
            for row in chunks[1:]:
                texts[row] = data.corpus[chunks[0]] + "\n" + data.corpus[row]
    split = analyzer(language) if language else words
    searched = descending(data.corpus_ids, np.zeros(len(texts), bool))
    searched = searched if rows is None else searched[np.isin(searched, rows)]
    model = bm25s.BM25(method="lucene", k1=k1, b=b)
    model.index([split(texts[row]) for row in searched], show_progress=False)
    ranking = np.full((len(data.queries), depth), -1, np.int32)
    vocabulary = model.vocab_dict
    for i, (query, own) in enumerate(zip(data.queries, data.own_rows)):
        tokens = [word for word in split(query) if word in vocabulary]
        if tokens:
            scores = np.where(searched == own, 0, model.get_scores(tokens))
            best = np.argsort(-scores, kind="stable")[:depth]
            best = best[scores[best] > 0]
            ranking[i, : len(best)] = searched[best]
    return ranking


def reciprocal_rank_fusion(*rankings: np.ndarray, k: int = 60, depth: int = DEPTH) -> np.ndarray:
    """Fuse rankings int [Q, n] into one, int32 [Q, depth] (Cormack et al. 2009).

    A text scores Σ 1 / (k + rank) over the rankings that contain it, with ranks from 1; on ties the lower index comes
    first. -1 is an empty rank, in the rankings and in the result.
    """
    fused = np.full((len(rankings[0]), depth), -1, np.int32)
    for row, lists in enumerate(zip(*rankings, strict=True)):
        scores: dict[int, float] = {}
        for ranked in lists:
            for rank, text in enumerate(ranked.tolist(), 1):
                if text >= 0:
                    scores[text] = scores.get(text, 0) + 1 / (k + rank)
        best = sorted(scores, key=lambda text: (-scores[text], text))[:depth]
        fused[row, : len(best)] = best
    return fused
