import numpy as np
import pytest
import small

from embed.evaluation import needles
from embed.evaluation.sets import RetrievalSet


def short_texts(count=40):
    """A set in which text i answers query i, of the first ten."""
    texts = [f"text {i} {sentence}" for i, sentence in enumerate(small.sentences(count, longest=12))]
    names = [f"d{i}" for i in range(count)]
    queries = [f"q{i}" for i in range(10)]
    judgments = [{f"d{i}": 1} for i in range(10)]
    rows = [np.array([i]) for i in range(count)]
    return RetrievalSet("short", queries, [f"query {i}" for i in range(10)], names, texts, rows, judgments)


@pytest.mark.parametrize("tokens", [100, 400, 2000])
def test_each_needle_is_hidden_once_in_a_text_of_the_wanted_length_among_the_same_others(tokens):
    data, tokenizer = short_texts(), small.tokenizer()
    long = needles.hide(data, tokens, tokenizer, count=8)
    assert len(long.queries) == len(long.corpus) == 8
    depths = []
    for query, text, judgment, name in zip(long.query_ids, long.corpus, long.judgments, long.corpus_ids):
        assert judgment == {name: 1}
        needle = data.corpus[int(query.removeprefix("q"))]
        parts = text.split("\n\n")
        assert parts.count(needle) == 1
        depths.append(parts.index(needle) / len(parts))
        size = sum(map(len, tokenizer.encode(parts)))
        assert tokens - 40 < size <= tokens
        parts.remove(needle)
        others = [data.corpus.index(part) for part in parts]
        assert others and not set(others) & {int(q.removeprefix("q")) for q in long.query_ids}
    assert depths == sorted(depths) and depths[-1] - depths[0] > 0.6


def test_the_needles_do_not_depend_on_the_length():
    data, tokenizer = short_texts(), small.tokenizer()
    assert needles.hide(data, 100, tokenizer).query_ids == needles.hide(data, 900, tokenizer).query_ids


def test_a_length_that_holds_no_needle_is_an_error():
    with pytest.raises(ValueError, match="short has no relevant text of fewer than 2 tokens to hide"):
        needles.hide(short_texts(), 2, small.tokenizer())


def test_texts_that_do_not_fit_are_skipped_and_every_needle_has_hay():
    data, tokenizer = short_texts(), small.tokenizer()
    long = " ".join(small.sentences(60, seed=1))
    mixed = data._replace(
        corpus=[*data.corpus[:10], *(f"{long} {text}" for text in data.corpus[10:38]), *data.corpus[38:]]
    )
    for text in needles.hide(mixed, 120, tokenizer).corpus:
        assert len(text.split("\n\n")) > 2 and len(tokenizer.encode([text])[0]) <= 130
    alone = data._replace(corpus=[*data.corpus[:10], *(f"{long} {text}" for text in data.corpus[10:])])
    with pytest.raises(ValueError, match="short has no text that fits 120 tokens beside the answer of query"):
        needles.hide(alone, 120, tokenizer)
