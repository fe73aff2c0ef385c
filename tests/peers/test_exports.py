"""Exports in sentence-transformers, transformers and onnxruntime give the vectors of `embed.inference`."""

import dataclasses
import importlib
import json
import re

import numpy as np
import onnxruntime
import pytest
import sentence_transformers
import small
import torch
import transformers
from random_models import TEXTS
from sentence_transformers.base.modules import Transformer

from embed import cli, inference, tokenizers
from embed.checkpoints import onnx
from embed.models import transformer

# Control tokens written out, some inside words, are plain text.
WRITTEN_OUT = ["a <sep> b<mask>c <pad>", "of<|endoftext|> the <|endoftext|>", "<|endoftext|>"]
SAMPLES = [*small.sentences(6, seed=5), *TEXTS, *WRITTEN_OUT]


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json"])
def model(request, tokenizer_folder):
    """(parameters, config, tokenizer), with each kind of tokenizer."""
    tokenizer = small.tokenizer() if request.param == "sentencepiece" else tokenizers.load(tokenizer_folder)
    config = transformer.make_config("micro", tokenizer.vocab_size + 5, rope_theta=1e4)
    rng = np.random.default_rng(0)

    def fill(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32) * 0.3

    import jax

    params = jax.tree.map(fill, transformer.abstract_params(config))
    return params, config, tokenizer


@pytest.fixture(scope="module")
def encoder(model):
    return inference.Encoder(*model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return small.write_model(tmp_path_factory.mktemp("st") / "m", *model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sentence_transformers_gives_our_vectors_without_remote_code(attention, folder, encoder):
    theirs = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"attn_implementation": attention}
    )
    np.testing.assert_allclose(theirs.encode(SAMPLES), encoder.encode(SAMPLES), atol=1e-4, rtol=0)
    one_by_one = np.stack([theirs.encode(text) for text in SAMPLES])
    np.testing.assert_allclose(one_by_one, encoder.encode(SAMPLES), atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal, pooling", [(True, "last"), (True, "mean"), (False, "last")])
def test_a_causal_model_and_pooling_of_the_last_token_give_our_vectors_too(causal, pooling, model, tmp_path):
    params, config, tokenizer = model
    config = dataclasses.replace(config, causal=causal)
    folder = small.write_model(tmp_path / "m", params, config, tokenizer, embedding={"pooling": pooling})
    want = inference.Encoder(params, config, tokenizer, pooling=pooling).encode(SAMPLES)
    assert np.abs(want - inference.Encoder(*model).encode(SAMPLES)).max() > 0.1
    np.testing.assert_allclose(inference.load(folder).encode(SAMPLES), want, atol=1e-6, rtol=0)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(theirs.encode(SAMPLES), want, atol=1e-4, rtol=0)
    for format in ("pplx", "onnx"):
        assert cli.main(["export", f"--model={folder}", f"--format={format}", f"--output={tmp_path / format}"]) == 2
        assert not (tmp_path / format).exists()


def test_with_tanh_sentence_transformers_and_ours_both_give_tanh_of_the_vectors(model, encoder, tmp_path):
    folder = small.write_model(tmp_path / "m", *model, tanh=True)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    want = np.tanh(encoder.encode(SAMPLES))
    assert np.abs(want - encoder.encode(SAMPLES)).max() > 0.1
    ours = inference.load(folder)
    np.testing.assert_allclose(theirs.encode(SAMPLES), want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours.encode(SAMPLES), want, atol=1e-6, rtol=0)
    for precision in ("int8", "ubinary"):
        np.testing.assert_array_equal(
            ours.encode(SAMPLES, precision=precision), encoder.encode(SAMPLES, precision=precision)
        )
    rounded = np.round(127 * theirs.encode(SAMPLES)).astype(np.int8)
    assert (rounded == encoder.encode(SAMPLES, precision="int8")).mean() >= 0.999


def test_pplx_and_back_is_the_same_model(model, encoder, folder, tmp_path):
    assert cli.main(["export", f"--model={folder}", "--format=pplx", f"--output={tmp_path / 'pplx'}"]) == 0
    assert cli.main(["export", f"--model={tmp_path / 'pplx'}", f"--output={tmp_path / 'back'}"]) == 0
    for name in ("model.safetensors", "config.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    np.testing.assert_array_equal(inference.load(tmp_path / "pplx").encode(SAMPLES), encoder.encode(SAMPLES))


def test_a_copy_saved_by_sentence_transformers_gives_the_same_vectors(folder, encoder, tmp_path):
    sentence_transformers.SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode(SAMPLES), encoder.encode(SAMPLES), atol=1e-4, rtol=0)


def test_auto_model_gives_our_vectors(folder, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert type(theirs).__name__ == "Qwen3Model"
    batch = tokenizer(SAMPLES, padding=True, return_tensors="pt")
    for ids, mask, want in zip(batch["input_ids"], batch["attention_mask"], encoder.tokenizer.encode(SAMPLES)):
        np.testing.assert_array_equal(ids[mask.bool()], want)
    with torch.no_grad():
        hidden = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(pooled, encoder.encode(SAMPLES), atol=1e-4, rtol=0)


def test_the_transformer_module_is_named_by_a_path_that_releases_before_6_do_not_have(folder):
    """5.6, the last of them, has no multi_vector_encoder, so it fails to import the module."""
    first, _ = json.loads((folder / "modules.json").read_text())
    assert first["type"].startswith("sentence_transformers.multi_vector_encoder.")
    assert importlib.import_module(first["type"].rpartition(".")[0]).Transformer is Transformer


@pytest.mark.parametrize("contextual", [False, True])
def test_the_programs_on_the_card_run(contextual, model, encoder, tmp_path):
    folder = small.write_model(tmp_path / "m", *model, embedding={"contextual": contextual})
    card = (folder / "README.md").read_text().replace("FOLDER", str(folder))
    programs = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(programs) == (1 if contextual else 2)
    for program in programs:
        names = {}
        exec(program, names)
        assert np.shape(names["chunks" if contextual else "vectors"]) == (2, 32)


def test_the_program_on_the_onnx_card_runs(model, encoder, tmp_path):
    folder = small.write_model(tmp_path / "m", *model, format="onnx")
    card = (folder / "README.md").read_text().replace("FOLDER", str(folder))
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names = {}
    exec(program, names)
    assert (names["int8"] == encoder.encode(["a text", "another"], precision="int8")).mean() > 0.99


def test_onnxruntime_gives_our_vectors_in_every_precision(model, encoder, tmp_path):
    path = small.write_model(tmp_path / "m", *model, format="onnx")
    session = onnxruntime.InferenceSession(path / onnx.FILE)
    assert (path / "onnx" / onnx.DATA).stat().st_size > 10_000
    tokens = encoder.tokenizer.encode(SAMPLES)
    length = max(map(len, tokens))
    ids, mask = np.zeros((2, len(tokens), length), np.int64)
    for i, t in enumerate(tokens):
        ids[i, : len(t)], mask[i, : len(t)] = t, 1
    hidden, pooled, int8, bits = session.run(None, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(pooled, encoder.encode(SAMPLES), atol=1e-4, rtol=0)
    np.testing.assert_allclose((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None], pooled, atol=1e-5)
    assert (int8 == encoder.encode(SAMPLES, precision="int8")).mean() >= 0.9999
    assert (bits == encoder.encode(SAMPLES, precision="ubinary")).mean() >= 0.9999
    (alone,) = session.run(
        ["pooler_output"], {"input_ids": ids[:1, : len(tokens[0])], "attention_mask": mask[:1, : len(tokens[0])]}
    )
    np.testing.assert_allclose(alone[0], pooled[0], atol=1e-5)
