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
        assert min(others) >= 8 or not set(others) & {int(q.removeprefix("q")) for q in long.query_ids}
    assert depths == sorted(depths) and depths[-1] - depths[0] > 0.6


def test_the_needles_do_not_depend_on_the_length():
    data, tokenizer = short_texts(), small.tokenizer()
    assert needles.hide(data, 100, tokenizer).query_ids == needles.hide(data, 900, tokenizer).query_ids


def test_a_length_that_holds_no_needle_is_an_error():
    with pytest.raises(
        ValueError, match="short has no relevant text of fewer tokens, so nothing can be hidden in 2 to"
    ):
        needles.hide(short_texts(), 2, small.tokenizer())
