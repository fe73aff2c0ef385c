import pytest

from embed.preparation.vocabulary import train_sentencepiece

TEXTS = [f"the quick brown fox jumps over {k} lazy d\u00f6gs \u6f22\u5b57" for k in range(300)]


@pytest.mark.parametrize(
    "split_identifiers, vocab_size, allowed", [(False, 262, "at least"), (True, 100_000, "at most")]
)
def test_a_vocabulary_size_that_the_texts_do_not_allow_is_refused_with_the_nearest_allowed_size(
    tmp_path, split_identifiers, vocab_size, allowed
):
    def train(size):
        train_sentencepiece(TEXTS, tmp_path, vocab_size=size, split_identifiers=split_identifiers)

    with pytest.raises(ValueError, match=rf"^vocab_size={vocab_size} must be {allowed} (\d+): ") as refused:
        train(vocab_size)
    size = int(str(refused.value).partition(allowed)[2].partition(":")[0])
    beyond = size - 1 if allowed == "at least" else size + 1
    with pytest.raises(ValueError, match=f"^vocab_size={beyond} must be {allowed} {size}: "):
        train(beyond)
    if allowed == "at most":
        train(size)
