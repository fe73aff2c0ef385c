import pytest

from embed import tokenizers
from embed.preparation.vocabulary import train_sentencepiece

TEXTS = [f"the quick brown fox jumps over {k} lazy d\u00f6gs \u6f22\u5b57" for k in range(300)]


def test_a_vocabulary_that_is_too_small_for_the_characters_is_refused_with_the_least_allowed_size(tmp_path):
    def train(size):
        train_sentencepiece(TEXTS, tmp_path, vocab_size=size, split_identifiers=False)

    with pytest.raises(ValueError, match=r"^config.data.vocab_size=262 must be at least (\d+): ") as refused:
        train(262)
    size = int(str(refused.value).partition("at least")[2].partition(":")[0])
    with pytest.raises(ValueError, match=f"^config.data.vocab_size={size - 1} must be at least {size}: "):
        train(size - 1)


def test_a_vocabulary_has_as_many_pieces_as_the_texts_give_and_as_are_asked_for(tmp_path):
    sizes = []
    for asked in (100_000, 73):
        train_sentencepiece(TEXTS, tmp_path, vocab_size=asked)
        sizes.append(tokenizers.load(tmp_path).vocab_size)
    assert 73 < sizes[0] < 1000 and sizes[1] == 73
