import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small
from huggingface_hub.utils import filter_repo_objects
from small import edit_config, random_params

from embed import inference, runs, tokenizers
from embed.checkpoints import model_folder, names, settings
from embed.models import transformer

EMBEDDING = small.EMBEDDING | {"matryoshka": [16, 32], "separator": False}
TEXTS = small.sentences(9, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.load(small.write_bpe(tmp_path_factory.mktemp("tokenizer"), small.sentences(100)))


@pytest.fixture(scope="module")
def config(tokenizer):
    return transformer.make_config("micro", tokenizer.vocab_size + 3, rope_theta=1e4)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory, tokenizer, config):
    folder = tmp_path_factory.mktemp("hf") / "encoder"
    return small.write_model(folder, random_params(config), config, tokenizer, embedding=EMBEDDING)


def rewrite(folder, change, dtype=None):
    """Change the tensors of a folder: `change` gets and returns {name: array}."""
    path = folder / "model.safetensors"
    arrays = change(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({n: x.astype(dtype) if dtype else x for n, x in arrays.items()}, path)


@pytest.fixture
def exported(encoder_folder, tmp_path):
    """A copy of an export that the test may change."""
    return shutil.copytree(encoder_folder, tmp_path / "exported")


@pytest.fixture
def folder(encoder_folder, tmp_path):
    """The same model as a third-party folder."""
    return small.foreign(shutil.copytree(encoder_folder, tmp_path / "copy"))


@pytest.fixture
def causal(exported, config):
    """The same weights as a causal language model in two files, with a head of its own."""
    return small.make_causal(exported, random_params(dataclasses.replace(config, tied=False)))


def test_what_was_written_is_read_bit_for_bit(encoder_folder, config):
    checkpoint = model_folder.open_model(encoder_folder)
    assert (checkpoint.config, checkpoint.language_model) == (config, False)
    assert checkpoint.embedding == EMBEDDING | {"tanh": False} and checkpoint.source == str(encoder_folder)
    want = names.flatten(random_params(config))
    for name, got in names.flatten(checkpoint.params()).items():
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want[name])


def test_an_encoder_folder_embeds_as_the_parameters_it_was_written_from(encoder_folder, config, tokenizer):
    want = inference.Encoder(random_params(config), config, tokenizer)
    got = inference.load(encoder_folder)
    np.testing.assert_array_equal(got.encode(TEXTS), want.encode(TEXTS))
    np.testing.assert_array_equal(got.encode(TEXTS, precision="int8"), want.encode(TEXTS, precision="int8"))
    assert got.matryoshka == (16, 32) and got.digest == model_folder.open_model(encoder_folder).digest


def test_a_sentencepiece_model_is_exported_and_loaded(tmp_path):
    model = inference.load(small.write_model(tmp_path / "m"))
    np.testing.assert_array_equal(model.encode(TEXTS), small.encoder().encode(TEXTS))
    assert model.tokenizer.digest == small.tokenizer().digest


def test_causal_tensors_come_back_bit_for_bit_in_their_own_names_and_type(causal, config):
    checkpoint = model_folder.open_model(causal)
    assert checkpoint.language_model and checkpoint.config == dataclasses.replace(config, tied=False, causal=True)
    assert len(set(checkpoint.tensors.values())) == 2
    for dtype in (np.float32, ml_dtypes.bfloat16):
        original = {n: x.astype(dtype) for n, x in names.tensors(random_params(checkpoint.config), "model.")}
        again = dict(names.tensors(checkpoint.params(dtype=dtype), "model."))
        assert again.keys() == original.keys() and "lm_head.weight" in again
        for name, x in again.items():
            np.testing.assert_array_equal(x, original[name])


def test_a_tied_model_may_contain_its_head_if_it_equals_the_embedding_table(folder, config):
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["embed_tokens.weight"]})
    assert "head" not in model_folder.open_model(folder).params()
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        model_folder.open_model(folder)


def test_bfloat16_files_are_read_exactly(folder):
    rewrite(folder, lambda t: t, ml_dtypes.bfloat16)
    want = safetensors.numpy.load_file(folder / "model.safetensors")["norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(model_folder.open_model(folder).params()["norm"], want)


def test_load_refuses_a_causal_folder_and_says_what_it_is_for(causal):
    with pytest.raises(ValueError, match="is a causal language model, not an encoder: it can be the `init` of a stage"):
        inference.load(causal)


def released(folder, kind):
    edit_config(
        folder,
        model_type="bidirectional_pplx_qwen3",
        is_causal=None,
        auto_map={"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{kind}"},
    )
    return folder


def test_the_released_contextual_model_separates_chunks_with_a_token_that_is_not_pooled(folder, config, tokenizer):
    model = inference.load(released(folder, "PPLXQwen3ContextualModel"))
    assert model.separator and model.max_length == 32768
    chunks = ["parse the config", "", "a list of numbers"]
    (got,) = model.encode_documents([chunks])
    ids = [tokenizer.encode([chunk])[0] for chunk in chunks]
    tokens = np.concatenate([ids[0], [tokenizer.separator_id], [tokenizer.separator_id], ids[2]]).astype(np.int32)
    row = tokens[None], np.ones((1, len(tokens)), np.int32), np.arange(len(tokens), dtype=np.int32)[None]
    hidden = np.asarray(jax.jit(transformer.apply, static_argnums=0)(config, random_params(config), *row))[0]
    n = len(ids[0])
    np.testing.assert_allclose(got[0], hidden[:n].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], hidden[n + 2 :].mean(0), rtol=1e-5, atol=1e-6)
    assert not got[1].any()
    np.testing.assert_array_equal(model.encode("a query"), model.encode_documents([["a query"]])[0][0])


def test_a_chunk_that_truncation_loses_is_an_error_unless_asked_for(folder):
    model = inference.load(released(folder, "PPLXQwen3ContextualModel"))
    model.max_length = 12
    with pytest.raises(ValueError, match="document 0 has .* tokens, max_length .--max_length. is 12"):
        model.encode_documents([["parse the config", "number " * 20]])
    with pytest.warns(UserWarning, match="1 of 1 documents were cut to 12 tokens"):
        first, last = model.encode_documents([["number " * 20, "parse the config"]], truncate=True)[0]
    assert first.any() and not last.any()


def test_the_released_dense_model_joins_chunks_without_a_separator(folder):
    assert not inference.load(released(folder, "PPLXQwen3Model")).separator


def test_everything_that_is_wrong_is_listed_in_one_error(folder):
    def change(arrays):
        arrays["extra.weight"] = arrays.pop("norm.weight")
        arrays["layers.1.mlp.up_proj.weight"] = arrays["layers.1.mlp.up_proj.weight"].T.copy()
        arrays["layers.0.mlp.up_proj.weight"] = arrays["layers.0.mlp.up_proj.weight"].astype(np.int8)
        return arrays

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        model_folder.open_model(folder)
    for part in (
        "tensor norm.weight is missing",
        "tensor extra.weight is not part of this architecture",
        "tensor layers.1.mlp.up_proj.weight has shape [32, 48], expected [48, 32]",
        "tensor layers.0.mlp.up_proj.weight is I8, expected F32, BF16, F16",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: {f"x.{name}": x for name, x in t.items()},
            "tensors embed_tokens.weight, .*, and {more} more are missing",
        ),
        (lambda t: t | {f"x.{name}": x for name, x in t.items()}, "tensors x.*, and {more} more are not part of"),
        (lambda t: {name: x.reshape(1, *x.shape) for name, x in t.items()}, "tensor .* has shape .*; and {more} more"),
        (lambda t: {name: x.astype(np.int8) for name, x in t.items()}, "tensor .* is I8, expected .*; and {more} more"),
        (lambda t: {name: x * np.float32("nan") for name, x in t.items()}, "not finite: .*, and {more} more"),
    ],
)
def test_an_error_about_many_tensors_names_a_few_and_counts_the_rest(change, message, folder):
    count = len(safetensors.numpy.load_file(folder / "model.safetensors"))
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message.format(more=count - 3)) as error:
        model_folder.open_model(folder).params()
    assert count > 20 and len(str(error.value)) < 700 + 2 * len(str(folder))


def test_truncated_files_pickles_and_paths_that_leave_the_folder_are_refused(folder, causal):
    path = causal / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is truncated or damaged"):
        model_folder.open_model(causal)
    path.unlink()
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is missing"):
        model_folder.open_model(causal)
    index = causal / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
        with pytest.raises(ValueError, match="which is not a file of this folder"):
            model_folder.open_model(causal)
    for file in causal.glob("model*"):
        file.unlink()
    (causal / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no .safetensors file; pytorch_model.bin is a pickle"):
        model_folder.open_model(causal)


def test_an_adapter_and_weights_that_the_index_does_not_name_are_refused(folder, causal):
    write_json(causal / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match="adapter_config.json is an adapter, which is not supported: merge it into"):
        model_folder.open_model(causal)
    (causal / "adapter_config.json").unlink()
    shutil.copy(folder / "model.safetensors", causal)
    with pytest.raises(ValueError, match="index.json does not name model.safetensors, which exists too: remove one"):
        model_folder.open_model(causal)


@pytest.mark.parametrize("value, kind", [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)])
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_tensor(value, kind, folder, causal, config):
    def spoil(arrays, name):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-1] = value
        return arrays

    rewrite(folder, lambda t: spoil(t, "layers.1.mlp.down_proj.weight"), kind)
    with pytest.raises(ValueError, match=r"copy has weights that are not finite: layers.1.mlp.down_proj.weight$"):
        inference.load(folder)
    with pytest.raises(ValueError, match=r"not finite: layers.1.mlp.down_proj.weight$"):
        merge(folder, folder)
    file = causal / "model-00001-of-00002.safetensors"
    safetensors.numpy.save_file(spoil(safetensors.numpy.load_file(file), "model.embed_tokens.weight"), file)
    with pytest.raises(ValueError, match=r"not finite: model.embed_tokens.weight$"):
        model_folder.open_model(causal).params()


def merge(*folders):
    return runs.merged("merged", *(runs.model_checkpoint(str(folder), None) for folder in folders), 0.5).params()


def test_a_weight_that_overflows_the_dtype_is_refused(folder):
    rewrite(folder, lambda t: {**t, "norm.weight": np.full_like(t["norm.weight"], np.finfo(np.float32).max)})
    assert np.isfinite(model_folder.open_model(folder).params()["norm"]).all()
    with pytest.raises(ValueError, match="not finite: norm.weight$"):
        model_folder.open_model(folder).params(dtype=ml_dtypes.bfloat16)


def test_a_hub_id_is_found_in_the_cache_without_a_network(encoder_folder, tmp_path):
    """In a separate process, because huggingface_hub reads its environment when it is imported."""
    name = "models--someone--some-model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(encoder_folder, tmp_path / name / "snapshots" / commit)
    other = small.foreign(tmp_path / name / "snapshots" / ("b" * 40))
    rewrite(other, lambda t: {**t, "norm.weight": 2 * t["norm.weight"]})
    (tmp_path / name / "refs").mkdir()
    (tmp_path / name / "refs" / "main").write_text("a" * 40)
    program = f"""
        import numpy as np
        from embed import inference
        here = inference.load({str(encoder_folder)!r}).encode("a query")
        np.testing.assert_array_equal(inference.load("someone/some-model").encode("a query"), here)
        np.testing.assert_allclose(
            inference.load("someone/some-model", revision={"b" * 40!r}).encode("a query"), 2 * here, rtol=1e-5)
        for wrong, say in (("someone/other", "no folder someone/other, and someone/other cannot be downloaded from"),
                           ("no-such-folder", "a hub id in the form owner/name")):
            try:
                inference.load(wrong)
            except FileNotFoundError as error:
                assert say in str(error), error
            else:
                raise AssertionError(wrong)
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Forced host devices must be set before jax starts.
SHARDED = """
    import jax, numpy as np, sys
    from embed.checkpoints import model_folder, names
    from embed.models.transformer import abstract_params
    from embed.models import sharding

    checkpoint = model_folder.open_model(sys.argv[1])
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    for mesh in (mesh, sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])):
        shardings = sharding.parameter_shardings(mesh, abstract_params(checkpoint.config))
        whole, parts = names.flatten(checkpoint.params()), names.flatten(checkpoint.params(shardings))
        assert not parts["layers.gate"].sharding.is_fully_replicated
        for name, x in parts.items():
            np.testing.assert_array_equal(np.asarray(x), whole[name])
"""


def test_tensors_are_read_directly_into_their_shards(encoder_folder):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(encoder_folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_table_with_exactly_the_rows_of_the_tokenizer_embeds(tmp_path, tokenizer):
    exact = transformer.make_config("micro", tokenizer.vocab_size)
    path = small.write_model(tmp_path / "m", random_params(exact), exact, tokenizer)
    assert inference.load(path).encode(TEXTS).shape == (len(TEXTS), 32)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_files_downloaded_from_the_hub_are_all_that_load_needs(encoder_folder, tmp_path):
    tanh = small.write_model(tmp_path / "tanh", tanh=True)
    for source in (encoder_folder, tanh):
        files = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        files += ["fp8/model.safetensors", "modeling.py", "pytorch_model.bin"]
        kept = set(filter_repo_objects(files, allow_patterns=model_folder.FILES))
        assert not kept & set(files[-3:])
        copy = tmp_path / f"{source.name}-copy"
        for name in kept:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, copy / name)
        np.testing.assert_array_equal(inference.load(copy).encode(TEXTS), inference.load(source).encode(TEXTS))


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


CHANGES = {
    "model.safetensors was changed; export it again, or delete embed.json": lambda f: flip_a_byte(
        f / "model.safetensors"
    ),
    "tokenizer.json was changed; export it again, or delete embed.json": lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text() + " "
    ),
    "config.json was changed; export it again, or delete embed.json": lambda f: edit_config(
        f, transformers_version="6"
    ),
    "config.json was changed; export it again": lambda f: edit_config(f, hidden_size=64),
    "1_Pooling/config.json was changed; export it again": lambda f: write_json(
        f / "1_Pooling" / "config.json", {"pooling_mode": "cls"}
    ),
    "model.safetensors is missing; export it again": lambda f: (f / "model.safetensors").unlink(),
    "modules.json is missing; export it again, or delete embed.json": lambda f: (f / "modules.json").unlink(),
    "extra.safetensors was added; export it again": lambda f: safetensors.numpy.save_file(
        {"x": np.zeros(1, np.float32)}, f / "extra.safetensors"
    ),
    "sentencepiece.model was added; ": lambda f: small.tokenizer().save(f),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_export_is_refused_with_the_name_of_the_file(message, exported):
    CHANGES[message](exported)
    with pytest.raises(ValueError, match=f"exported was changed after its export: {message}"):
        model_folder.open_model(exported)


OTHERS = [  # settings and what the error says about them if the folder is read without embed.json
    (dict(matryoshka=[], max_length=7), ""),
    (dict(), "matryoshka is [16, 32], then []; max_length is null, then 32768"),
    (dict(matryoshka=[], max_length=9, separator=True), "separator is true, then false"),
    (dict(matryoshka=[], max_length=9, contextual=True), "contextual is true, then false"),
]


@pytest.mark.parametrize("embedding, lost", OTHERS)
def test_the_error_about_a_changed_export_says_which_settings_are_lost_without_embed_json(
    embedding, lost, tmp_path, tokenizer, config
):
    folder = tmp_path / "m"
    small.write_model(folder, random_params(config), config, tokenizer, embedding=EMBEDDING | embedding)
    edit_config(folder, transformers_version="6")
    with pytest.raises(ValueError) as error:
        model_folder.open_model(folder)
    _, _, settings_ = str(error.value).partition(" to read it as a third-party folder")
    assert settings_ == (f", which changes its settings: {lost}" if lost else "")
    before = json.loads((folder / "embed.json").read_text())["embedding"]
    after = model_folder.open_model(small.foreign(folder)).embedding
    assert {name for name in before if before[name] != after[name]} == set(re.findall(r"(\w+) is ", lost))


def test_files_that_change_no_vector_may_be_added(exported):
    (exported / "LICENSE").write_text("MIT")
    (exported / "README.md").write_text("better words")
    assert model_folder.open_model(exported).embedding["matryoshka"] == [16, 32]


@pytest.mark.parametrize(
    "document, message",
    [
        ("{", "embed.json is not JSON"),
        ("[]", "embed.json is not what `embed export` writes: it has no files"),
        ('{"files": {}, "provenance": 3}', "it has no provenance"),
        ('{"files": {}, "provenance": {}, "embedding": 3}', "embedding is 3, expected an object"),
        (
            '{"files": {}, "provenance": {}, "embedding": {"separator": 1}}',
            "embedding lacks matryoshka; .*lacks contextual",
        ),
    ],
)
def test_a_wrong_embed_json_is_one_sentence(document, message, exported):
    (exported / "embed.json").write_text(document)
    if "embedding" in document:  # with the digests of the files
        files = settings.digests(
            exported, [p.name for p in exported.iterdir() if p.is_file() and p.name != "embed.json"]
        )
        (exported / "embed.json").write_text(json.dumps(json.loads(document) | {"files": files}))
    with pytest.raises(ValueError, match=message):
        model_folder.open_model(exported)


def test_a_digest_depends_on_content_and_not_on_location(encoder_folder, exported, folder, tmp_path, config, tokenizer):
    digest = model_folder.open_model(encoder_folder).digest
    assert len(digest) == 64 and model_folder.open_model(exported).digest == digest
    other = {"separator": True}
    changed = small.write_model(tmp_path / "s", random_params(config), config, tokenizer, embedding=EMBEDDING | other)
    foreign = model_folder.open_model(folder).digest
    rewrite(folder, lambda t: {**t, "norm.weight": t["norm.weight"] + 1})
    digests = {digest, model_folder.open_model(changed).digest, foreign, model_folder.open_model(folder).digest}
    assert len(digests) == 4
    once = model_folder.open_model(folder).digest
    write_json(folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text()) | {"x": 1})
    assert model_folder.open_model(folder).digest != once


def test_is_model_requires_a_config_with_a_model_type(encoder_folder, tmp_path):
    assert model_folder.is_model(encoder_folder) and not model_folder.is_model(tmp_path / "nowhere")
    for content in ("{}", "3", "{"):
        (tmp_path / "config.json").write_text(content)
        assert not model_folder.is_model(tmp_path)


def test_a_folder_in_a_bucket_is_read_like_one_on_a_disk(bucket, encoder_folder, config, tokenizer):
    url = f"{bucket}/model-folder/m"
    assert not model_folder.is_model(url)
    with pytest.raises(FileNotFoundError, match="there is no folder gs://"):
        model_folder.open_model(url)
    for scale in (2, 1):  # the second replaces the first
        params = jax.tree.map(lambda x, scale=scale: x * np.float32(scale), random_params(config))
        settings_ = dict(embedding=EMBEDDING, provenance={"checkpoint": "pair"})
        small.export.write(url, params, config, tokenizer, **settings_)
    model = model_folder.open_model(url)
    assert model_folder.is_model(url) and model.source == url and model.provenance["checkpoint"] == "pair"
    assert model.digest == model_folder.open_model(encoder_folder).digest
    for name, got in names.flatten(model.params()).items():
        np.testing.assert_array_equal(got, names.flatten(random_params(config))[name])
    np.testing.assert_array_equal(inference.load(url).encode(TEXTS), inference.load(encoder_folder).encode(TEXTS))
    assert tokenizers.load(url).digest == tokenizer.digest
    copy = model.folder
    assert copy.is_dir()
    del model
    assert not copy.exists()
    (small.export.paths.path(url) / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.tex, which no export wrote"):
        small.export.write(url, params, config, tokenizer, **settings_)


def test_a_causal_model_without_a_head_counts_as_tied(causal):
    edit_config(causal, architectures=["Qwen3Model"])
    assert not model_folder.open_model(causal).config.tied  # it has a head
    weight_map = json.loads((causal / "model.safetensors.index.json").read_text())["weight_map"]
    file = causal / weight_map["lm_head.weight"]
    arrays = safetensors.numpy.load_file(file)
    del arrays["lm_head.weight"]
    safetensors.numpy.save_file(arrays, file)
    assert model_folder.open_model(causal).config.tied
    edit_config(causal, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        model_folder.open_model(causal)
