"""Third-party folders give the vectors of sentence-transformers, or are refused because theirs would differ."""

import json
import shutil

import numpy as np
import pytest
import sentence_transformers
import small

from embed import inference, tokenizers
from embed.models import transformer

TEXTS = ["Parse the CONFIG file", "an Index of the list of a vector", "the Query"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}


@pytest.fixture(scope="module")
def original(tokenizer_folder, tmp_path_factory):
    tokenizer = tokenizers.load(tokenizer_folder)
    config = transformer.make_config("micro", tokenizer.vocab_size, rope_theta=1e4)
    path = tmp_path_factory.mktemp("foreign") / "m"
    return small.foreign(small.write_model(path, small.random_params(config), config, tokenizer))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "m")


def edit(path, **fields):
    """Change fields of a JSON object; None removes a field."""
    path.parent.mkdir(exist_ok=True)
    document = (json.loads(path.read_text()) if path.is_file() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def theirs(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def add_normalize(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append(dict(idx=2, name="2", path="2_Normalize", type="sentence_transformers.models.Normalize"))
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(folder / "2_Normalize" / "config.json")


HONORED = {
    "a normalizer": lambda f: edit(f / "tokenizer.json", normalizer={"type": "Lowercase"}),
    "rope_theta of its own": lambda f: edit(f / "config.json", rope_parameters=None),
    "rope_scaling of its own": lambda f: edit(
        f / "config.json", rope_parameters=None, rope_theta=None, rope_scaling={"type": "default", "rope_theta": 1e4}
    ),
    "types of layers": lambda f: edit(f / "config.json", layer_types=["full_attention"] * 2),
    "a window that is not used": lambda f: edit(f / "config.json", sliding_window=2, max_window_layers=0),
    "legacy pooling": lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode=None, embedding_dimension=None),
    "no sentence-transformers": lambda f: [
        (f / name).unlink()
        for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    ],
    "left padding": lambda f: edit(f / "tokenizer_config.json", padding_side="left"),
    "a prompt that is not the default": lambda f: edit(
        f / "config_sentence_transformers.json", prompts={"query": "Query: "}
    ),
}


@pytest.mark.parametrize("what", HONORED)
def test_honored_fields_give_the_vectors_of_sentence_transformers(what, folder):
    HONORED[what](folder)
    np.testing.assert_allclose(inference.load(folder).encode(TEXTS), theirs(folder).encode(TEXTS), atol=1e-5, rtol=0)


def test_a_normalize_module_is_an_argument_of_encode(folder):
    add_normalize(folder)
    got = inference.load(folder).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(got, theirs(folder).encode(TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "file, field", [("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")]
)
def test_with_truncate_a_limit_cuts_where_sentence_transformers_cuts(file, field, folder):
    edit(folder / file, **{field: 5})
    model = inference.load(folder)
    with pytest.raises(ValueError, match="the model takes 5"):
        model.encode(TEXTS)
    with pytest.warns(UserWarning, match="were cut to 5 tokens"):
        got = model.encode(TEXTS, truncate=True)
    np.testing.assert_allclose(got, theirs(folder).encode(TEXTS), atol=1e-5, rtol=0)


REFUSED = {
    "do_lower_case": lambda f: edit(f / "sentence_bert_config.json", do_lower_case=True),
    "truncate_dim": lambda f: edit(f / "config_sentence_transformers.json", truncate_dim=8),
    "default_prompt_name|prompt": lambda f: edit(
        f / "config_sentence_transformers.json", prompts={"q": "Query: "}, default_prompt_name="q"
    ),
    "rope_scaling": lambda f: edit(f / "config.json", rope_scaling=YARN),
    "config_kwargs": lambda f: edit(f / "sentence_bert_config.json", config_kwargs={"is_causal": True}),
    "processing_kwargs": lambda f: edit(
        f / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 3, "truncation": True}}
    ),
    "is_causal": lambda f: edit(f / "config.json", is_causal=True),
    "weightedmean": lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode="weightedmean"),
    "lasttoken": lambda f: edit(
        f / "1_Pooling" / "config.json", pooling_mode=None, pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True
    ),
    "eos_token": lambda f: edit(f / "tokenizer_config.json", eos_token="a", split_special_tokens=False),
    "has token 900 as": lambda f: edit(
        f / "tokenizer_config.json",
        added_tokens_decoder={"900": {"content": "the", "special": False, "normalized": False}},
        split_special_tokens=False,
    ),
    "added_tokens.json": lambda f: edit(f / "added_tokens.json", CONFIG=900),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_fields_change_the_vectors_of_sentence_transformers(what, folder, original):
    want = theirs(original).encode(TEXTS)
    REFUSED[what](folder)
    with pytest.raises(ValueError, match=what):
        inference.load(folder)
    try:
        got = theirs(folder).encode(TEXTS)
    except IndexError:  # a token that the table does not have
        return
    assert got.shape != want.shape or np.abs(got - want).max() > 1e-3


def test_the_refused_tokenizer_class_of_qwen_does_not_follow_tokenizer_json(folder):
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    want = inference.load(folder).encode(TEXTS)
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(ValueError, match="tokenizer_class='Qwen2Tokenizer', but tokenizer.json has another norm"):
        inference.load(folder)
    assert np.abs(theirs(folder).encode(TEXTS) - want).max() > 1e-3
