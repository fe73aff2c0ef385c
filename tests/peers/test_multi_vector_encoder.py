"""MultiVectorEncoder of sentence-transformers gives the token vectors and scores of an exported model."""

import re

import numpy as np
import pytest
import sentence_transformers
import small
from random_models import TEXTS

from embed import inference, tokenizers
from embed.models import transformer

SAMPLES = [*small.sentences(6, seed=5), *TEXTS]


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json"])
def folder(request, tokenizer_folder, tmp_path_factory):
    tokenizer = small.tokenizer() if request.param == "sentencepiece" else tokenizers.load(tokenizer_folder)
    config = transformer.make_config("micro", tokenizer.vocab_size, rope_theta=1e4, token_dimensions=12)
    path = tmp_path_factory.mktemp("late") / "m"
    return small.write_model(path, small.random_params(config), config, tokenizer)


@pytest.fixture(scope="module")
def theirs(folder):
    return sentence_transformers.MultiVectorEncoder(str(folder), device="cpu")


@pytest.mark.parametrize("side", ["encode_query", "encode_document"])
def test_queries_and_documents_have_our_token_vectors(side, folder, theirs):
    found = getattr(theirs, side)(SAMPLES, convert_to_numpy=True)
    for one, other in zip(found, inference.load(folder).encode_tokens_multi(SAMPLES), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_scores_are_our_maxsim(folder, theirs):
    found = np.asarray(theirs.similarity(theirs.encode_query(SAMPLES[:9]), theirs.encode_document(SAMPLES)))
    encoder = inference.load(folder)
    want = inference.maxsim(encoder.encode_tokens_multi(SAMPLES[:9]), encoder.encode_tokens_multi(SAMPLES))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_a_copy_saved_by_sentence_transformers_gives_the_same_vectors(theirs, folder, tmp_path):
    theirs.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformers.MultiVectorEncoder(str(tmp_path / "again"), device="cpu")
    for one, other in zip(again.encode_query(SAMPLES), inference.load(folder).encode_tokens_multi(SAMPLES)):
        np.testing.assert_allclose(np.asarray(one), other, atol=1e-5, rtol=0)


def test_the_programs_on_the_card_run(folder):
    programs = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text().replace("FOLDER", str(folder)), re.S
    )
    scores = []
    for program in programs:
        names = {}
        exec(program, names)
        scores.append(np.asarray(names["scores"]))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert scores[0].shape == (1, 2)
