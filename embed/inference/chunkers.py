"""Chunkers: functions of a text that give the character offsets (start, end) of its chunks, in order (docs/long.md).

`Encoder.encode_long` takes any such function. Most of the ones here need the extra `chunk`. Sizes are in tokens. A
unit, such as a sentence, of fewer than `least` tokens is joined with the next one; one of more than `size` is divided.
"""

import importlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from embed.tokenizers import Tokenizer

Offsets = list[tuple[int, int]]
Chunker = Callable[[str], Offsets]
SENTENCE_END = re.compile(r"""[.!?…。！？]["')\]”’»]*$""")
NAMES = ("tokens", "sentences", "paragraphs", "markdown", "code", "content")


def make(
    name: str, encoder, *, size: int = 256, least: int = 1, overlap: int = 0, language: str | None = None
) -> Chunker:
    """The chunker of a name (NAMES) with an encoder's tokenizer; `content` also asks the encoder for vectors.

    `overlap` is for tokens only. `language` is that of `sentences` and `content` ("en" by default), or the programming
    language of `code` ("python").
    """
    tokenizer = encoder.tokenizer
    if name not in NAMES:
        raise ValueError(f"chunker={name!r} must be one of {', '.join(NAMES)}")
    if overlap and name != "tokens":
        raise ValueError(f"overlap={overlap} is for the chunker tokens, not {name}")
    if least != 1 and name == "tokens":
        raise ValueError(f"least={least} is not for the chunker tokens")
    if language and name not in ("sentences", "content", "code"):
        raise ValueError(f"language={language!r} is for the chunkers sentences, content and code, not {name}")
    if name == "tokens":
        return tokens(tokenizer, size, overlap)
    if name == "content":
        return by_content(encoder, size, least=least, language=language or "en")
    if name == "sentences":
        return sentences(tokenizer, size, least=least, language=language or "en")
    if name == "code":
        return code(tokenizer, size, least=least, language=language or "python")
    return {"paragraphs": paragraphs, "markdown": markdown}[name](tokenizer, size, least=least)


def tokens(tokenizer: Tokenizer, size: int = 256, overlap: int = 0) -> Chunker:
    """Chunks of `size` tokens, each with the last `overlap` tokens of the one before it."""
    if not 0 <= overlap < size:
        raise ValueError(f"overlap={overlap} must be in 0..{size - 1}, less than the {size} tokens of a chunk")

    def chunk(text: str) -> Offsets:
        offsets = tokenizer.offsets(text)
        # The last chunk is the first that reaches the end.
        firsts = range(0, max(len(offsets) - overlap, 1), size - overlap) if len(offsets) else ()
        return [(int(offsets[i, 0]), int(offsets[i : i + size, 1].max())) for i in firsts]

    return chunk


def sentences(tokenizer: Tokenizer, size: int = 256, *, least: int = 1, language: str = "en") -> Chunker:
    """Sentences by the rules of a language (sentencex), joined until they have `least` tokens."""
    sentencex = _library("sentencex")

    pack = _pack(tokenizer, size)

    def chunk(text: str) -> Offsets:
        units = [(each["start_index"], each["end_index"]) for each in sentencex.get_sentence_boundaries(language, text)]
        joined: list[list[int]] = []
        for start, end in filter(None, (_strip(text, unit) for unit in units)):
            is_short = joined and _count(tokenizer, text[slice(*joined[-1])]) < least
            if is_short and _count(tokenizer, text[joined[-1][0] : end]) <= size:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        return [each for start, end in joined for each in pack(text, [(start, end)])]

    return chunk


def paragraphs(tokenizer: Tokenizer, size: int = 256, *, least: int = 1) -> Chunker:
    """Paragraphs; a longer one is divided at the ends of sentences, then of words."""
    return _split(_library("semantic_text_splitter").TextSplitter, tokenizer, size, least)


def markdown(tokenizer: Tokenizer, size: int = 256, *, least: int = 1) -> Chunker:
    """The largest sections that fit, each with its heading; one without subsections is divided at its blocks."""
    return _split(_library("semantic_text_splitter").MarkdownSplitter, tokenizer, size, least)


def code(tokenizer: Tokenizer, size: int = 256, *, least: int = 1, language: str = "python") -> Chunker:
    """Functions and classes by a tree-sitter grammar; a longer one is divided at its statements.

    The package tree-sitter-LANGUAGE must be installed.
    """
    grammar = _library(f"tree_sitter_{language}").language()
    return _split(_library("semantic_text_splitter").CodeSplitter, tokenizer, size, least, grammar)


def by_content(encoder, size: int = 256, *, least: int = 1, language: str = "en") -> Chunker:
    """Runs of sentences between which the content changes, as the encoder sees it.

    A border between sentences has the cosine of two means of token vectors, in the context of the whole text: those of
    the two sentences before it and of the two after it. A text of more than `size` tokens is divided at the border with
    the smallest cosine; then each part again. A part has at least `least` tokens and two sentences, unless its
    sentences are too long for that.
    """
    of_sentences = sentences(encoder.tokenizer, size, language=language)

    def chunk(text: str) -> Offsets:
        offsets = of_sentences(text)
        if len(offsets) < 2:
            return offsets
        vectors = encoder.encode_long(text, of_sentences).vectors
        ends = np.cumsum([0, *(_count(encoder.tokenizer, text[a:b]) for a, b in offsets)])
        totals = np.concatenate([np.zeros_like(vectors[:1]), np.cumsum(vectors * np.diff(ends)[:, None], 0)])
        borders = np.arange(1, len(offsets))  # border k is before sentence k
        before = totals[borders] - totals[np.maximum(borders - 2, 0)]
        after = totals[np.minimum(borders + 2, len(offsets))] - totals[borders]
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosines = np.append(np.inf, (before * after).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny))
        parts, waiting = [], [(0, len(offsets))]
        while waiting:
            first, stop = waiting.pop()
            inside = np.arange(first + 1, stop)
            if ends[stop] - ends[first] <= size or not len(inside):
                parts.append((first, stop))
                continue
            long_enough = np.minimum(ends[inside] - ends[first], ends[stop] - ends[inside]) >= least
            far_enough = np.minimum(inside - first, stop - inside) >= 2
            allowed = next((each for each in (long_enough & far_enough, long_enough) if each.any()), long_enough | True)
            k = int(inside[allowed][np.argmin(cosines[inside[allowed]])])
            waiting += [(first, k), (k, stop)]
        return [(offsets[a][0], offsets[b - 1][1]) for a, b in sorted(parts)]

    return chunk


def check(offsets: Sequence, length: int, name: str) -> Offsets:
    """The offsets of a chunker as a list; ValueError unless they are chunks of a text of `length` characters."""
    result, previous = [], 0
    for k, pair in enumerate(offsets):
        try:
            start, end = map(int, pair)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: chunk {k} is {pair!r:.60}, expected character offsets (start, end)") from None
        if not previous <= start < end <= length:
            raise ValueError(
                f"{name}: chunk {k} has offsets ({start}, {end}), expected {previous} <= start < end <= {length}: in "
                "the order of their starts, within the text"
            )
        result.append((start, end))
        previous = start
    if not result:
        raise ValueError(f"{name}: the chunker found no chunk in its {length} characters")
    return result


def _split(splitter, tokenizer: Tokenizer, size: int, least: int, *arguments) -> Chunker:
    if not 1 <= least <= size:
        raise ValueError(f"least={least} and size={size} tokens: expected 1 <= least <= size")
    splits = splitter.from_callback(*arguments, lambda text: _count(tokenizer, text), (least, size))
    pack = _pack(tokenizer, size)

    def chunk(text: str) -> Offsets:
        # The splitter stops at `least` tokens, also where it divides a sentence: its words are put together again.
        result: list[Offsets] = []
        for start, part in splits.chunk_indices(text):
            end, before = start + len(part), result[-1][-1] if result else None
            if before and "\n" not in text[before[1] : start] and not SENTENCE_END.search(text[: before[1]][-10:]):
                result[-1].append((start, end))
            else:
                result.append([(start, end)])
        return [each for parts in result for each in (parts if len(parts) == 1 else pack(text, parts))]

    return chunk


def _pack(tokenizer: Tokenizer, size: int) -> Callable[[str, Offsets], Offsets]:
    """The function that divides what some chunks of a text span into as few as possible, at the ends of words."""
    splitter = _library("semantic_text_splitter").TextSplitter
    splits = splitter.from_callback(lambda text: _count(tokenizer, text), size)

    def pack(text: str, parts: Offsets) -> Offsets:
        first, inner = parts[0][0], text[parts[0][0] : parts[-1][1]]
        return [(first + start, first + start + len(part)) for start, part in splits.chunk_indices(inner)]

    return pack


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode([text])[0])


def _strip(text: str, unit: tuple[int, int]) -> tuple[int, int] | None:
    """The offsets without white space at the ends; None if nothing is left."""
    start, end = unit
    inner = text[start:end]
    start, end = end - len(inner.lstrip()), start + len(inner.rstrip())
    return (start, end) if start < end else None


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.replace("_", "-")
        raise ValueError(f"this chunker needs the package {package}: pip install {package}, or '.[chunk]'") from None
