import dataclasses

import numpy as np
import pytest
import reference
import small

from embed import inference
from embed.inference import late_interaction
from embed.inference.encoder import Encoder

TEXTS = small.sentences(40, seed=1, longest=60) + ["the", "a list of a list " * 30]


@pytest.fixture(scope="module")
def encoder():
    config = dataclasses.replace(small.config(), token_dimensions=12)
    return Encoder(projected(), config, small.tokenizer())


def projected():
    projection = np.random.default_rng(7).normal(size=(32, 12)).astype(np.float32)
    return small.params() | {"projection": projection}


def plain_vectors(tokens):
    vectors = small.hidden_states(tokens).astype(np.float64) @ projected()["projection"]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_every_token_has_its_projected_state_of_length_one(encoder):
    found = encoder.encode_tokens_multi(TEXTS)
    assert len(found) == len(TEXTS) and encoder.token_dimensions == 12
    for vectors, tokens in zip(found, small.tokenizer().encode(TEXTS)):
        assert vectors.shape == (len(tokens), 12) and vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, plain_vectors(tokens), atol=1e-5)


def test_token_vectors_do_not_depend_on_the_batch(encoder):
    for batch_tokens in (1, 300):
        for one, other in zip(encoder.encode_tokens_multi(TEXTS, batch_tokens=batch_tokens), plain(TEXTS)):
            np.testing.assert_allclose(one, other, atol=1e-5)


def plain(texts):
    return [plain_vectors(tokens) for tokens in small.tokenizer().encode(texts)]


def test_the_tokens_of_a_chunk_saw_its_document_and_separators_have_no_vector(encoder):
    documents = [TEXTS[:3], ["the", "", "a file"], TEXTS[3:4]]
    segments, _ = encoder.fit_documents(documents)
    found = encoder.encode_segments_multi(segments)
    want = []
    for segment in segments:
        vectors = plain_vectors(segment.tokens)
        want += [vectors[segment.spans == k + 1] for k in range(segment.num_spans)]
    assert [len(x) for x in found] == [len(x) for x in want] and 0 in map(len, found)
    for one, other in zip(found, want):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_single_vectors_are_those_of_the_encoder_without_a_projection(encoder):
    np.testing.assert_array_equal(encoder.encode(TEXTS[:9]), small.encoder().encode(TEXTS[:9]))


def test_a_model_without_a_projection_has_no_token_vectors():
    with pytest.raises(ValueError, match="this model has no token vectors: it was not trained by a late_interaction s"):
        small.encoder().encode_tokens_multi(TEXTS[:1])


def test_no_texts_have_no_vectors_and_a_text_without_tokens_is_an_error(encoder):
    assert encoder.encode_tokens_multi([]) == []
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        encoder.encode_tokens_multi(["a", " "])


@pytest.mark.parametrize("scores", [1, 300, 2**24])
def test_maxsim_equals_plain_loops_in_blocks_of_any_size(scores, monkeypatch):
    monkeypatch.setattr(late_interaction, "SCORES", scores)
    rng = np.random.default_rng(0)
    queries, documents = (
        [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths] for lengths in ([3, 0, 5, 1], [7, 2, 0, 1, 9, 4])
    )
    queries, documents = ([x / np.linalg.norm(x, axis=1, keepdims=True) for x in side] for side in (queries, documents))
    all_of = [[np.ones(len(x), bool) for x in side] for side in (queries, documents)]
    want = reference.maxsim(np.array(queries, object), all_of[0], np.array(documents, object), all_of[1])
    found = inference.maxsim(queries, documents)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want.astype(float), atol=1e-6)
    np.testing.assert_array_equal(inference.maxsim([], documents), np.zeros((0, 6)))
