import dataclasses
import json
import os
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

from embed import inference, tokenizers
from embed.checkpoints import converted, export, huggingface, training_state
from embed.checkpoints.card import model_card
from embed.cli import main
from embed.inference.encoder import read_model
from embed.models import transformer

EMBEDDING = {"matryoshka": [16, 32], "separator": False, "max_length": None}
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
    return huggingface.write(
        folder,
        random_params(config),
        config,
        tokenizer,
        layout="sentence-transformers",
        embedding=EMBEDDING,
        provenance={},
        card="c",
    )


def rewrite(folder, change, dtype=None):
    """Change the tensors of a folder: `change` gets and returns {name: array}."""
    path = folder / "model.safetensors"
    arrays = change(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({n: x.astype(dtype) if dtype else x for n, x in arrays.items()}, path)


@pytest.fixture
def folder(encoder_folder, tmp_path):
    return shutil.copytree(encoder_folder, tmp_path / "copy")


@pytest.fixture
def causal(folder, config):
    """The same weights as a causal language model in two files, with a head of its own."""
    return small.make_causal(folder, random_params(dataclasses.replace(config, tied=False)))


def test_what_was_written_is_read_bit_for_bit(encoder_folder, config):
    checkpoint = huggingface.open_checkpoint(encoder_folder)
    assert (checkpoint.config, checkpoint.causal, checkpoint.embedding) == (config, False, EMBEDDING)
    want = export.flatten(random_params(config))
    for name, got in export.flatten(checkpoint.params()).items():
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want[name])


def test_an_encoder_folder_embeds_as_the_parameters_it_was_written_from(encoder_folder, config, tokenizer):
    want = inference.Encoder(random_params(config), config, tokenizer)
    got = inference.load(encoder_folder)
    np.testing.assert_array_equal(got.encode(TEXTS), want.encode(TEXTS))
    np.testing.assert_array_equal(got.encode(TEXTS, precision="int8"), want.encode(TEXTS, precision="int8"))
    assert got.matryoshka == (16, 32) and got.digest == huggingface.open_checkpoint(encoder_folder).digest


def test_a_sentencepiece_model_travels_along(tmp_path):
    huggingface.write(
        tmp_path / "m", small.params(), small.config(), small.tokenizer(), layout="sentence-transformers",
        embedding=EMBEDDING, provenance={}, card="",
    )  # fmt: skip
    np.testing.assert_array_equal(inference.load(tmp_path / "m").encode(TEXTS), small.encoder().encode(TEXTS))


def test_causal_tensors_come_back_bit_for_bit_in_their_own_names_and_type(causal, config):
    checkpoint = huggingface.open_checkpoint(causal)
    assert checkpoint.causal and checkpoint.config == dataclasses.replace(config, tied=False)
    assert len(set(checkpoint.tensors.values())) == 2
    for dtype in (np.float32, ml_dtypes.bfloat16):
        original = {n: x.astype(dtype) for n, x in huggingface.tensors(random_params(checkpoint.config), "model.")}
        again = dict(huggingface.tensors(checkpoint.params(dtype=dtype), "model."))
        assert again.keys() == original.keys() and "lm_head.weight" in again
        for name, x in again.items():
            np.testing.assert_array_equal(x, original[name])


def test_a_tied_model_may_carry_its_head_if_it_is_the_table(folder, config):
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["embed_tokens.weight"]})
    assert "head" not in huggingface.open_checkpoint(folder).params()
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        huggingface.open_checkpoint(folder)


def test_bfloat16_files_are_read_exactly(folder):
    rewrite(folder, lambda t: t, ml_dtypes.bfloat16)
    want = safetensors.numpy.load_file(folder / "model.safetensors")["norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(huggingface.open_checkpoint(folder).params()["norm"], want)


def test_a_causal_folder_is_refused_by_load_with_what_to_do(causal):
    with pytest.raises(ValueError, match="is a causal language model, not an encoder: `embed convert .* OUTPUT`"):
        inference.load(causal)


def released(folder, kind):
    edit_config(
        folder, model_type="bidirectional_pplx_qwen3", is_causal=None, embed=None,
        auto_map={"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{kind}"},
    )  # fmt: skip
    return folder


def test_the_released_contextual_model_puts_its_separator_between_chunks_and_pools_it_nowhere(
    folder, config, tokenizer
):
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
    with pytest.raises(ValueError, match="document 0 has .* tokens, the model takes 12"):
        model.encode_documents([["parse the config", "number " * 20]])
    with pytest.warns(UserWarning, match="1 of 1 documents were cut to 12 tokens"):
        first, last = model.encode_documents([["number " * 20, "parse the config"]], truncate=True)[0]
    assert first.any() and not last.any()


def test_the_released_dense_model_joins_chunks_bare(folder):
    assert not inference.load(released(folder, "PPLXQwen3Model")).separator


@pytest.mark.parametrize("contextual", [False, True])
def test_the_pplx_layout_has_the_names_and_fields_of_the_release(contextual, tmp_path, config, tokenizer):
    path = huggingface.write(
        tmp_path / "m", random_params(config), config, tokenizer, layout="pplx", card="", provenance={},
        embedding=EMBEDDING | {"separator": contextual},
    )  # fmt: skip
    fields = json.loads((path / "config.json").read_text())
    assert fields["architectures"] == ["PPLXQwen3Model"] and fields["model_type"] == "bidirectional_pplx_qwen3"
    model = "PPLXQwen3ContextualModel" if contextual else "PPLXQwen3Model"
    assert fields["auto_map"] == {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{model}"}
    assert fields["use_bidirectional_attention"] is True and "is_causal" not in fields
    modules = [m["type"] for m in json.loads((path / "modules.json").read_text())]
    assert modules[-1] == "st_quantize.FlexibleQuantizer" and len(modules) == 3
    shapes = {n: x.shape for n, x in safetensors.numpy.load_file(path / "model.safetensors").items()}
    D, H, K, d, F, V = 32, 2, 1, 16, 48, config.vocab_size
    layer = {
        "input_layernorm": (D,), "self_attn.q_proj": (H * d, D), "self_attn.k_proj": (K * d, D),
        "self_attn.v_proj": (K * d, D), "self_attn.o_proj": (D, H * d), "self_attn.q_norm": (d,),
        "self_attn.k_norm": (d,), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }  # fmt: skip
    want = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == {"embed_tokens.weight": (V, D), "norm.weight": (D,), **want}
    assert inference.load(path).separator is contextual


def test_the_real_shapes_have_as_many_tensors_as_the_release():
    names = [dict(huggingface._their_shapes(transformer.make_config(s, 151936), "")) for s in ("0.6b", "4b")]
    assert [len(n) for n in names] == [310, 398]
    assert names[0]["layers.27.self_attn.o_proj.weight"] == (1024, 2048)
    assert sum(int(np.prod(s)) for s in names[0].values()) == 596_049_920


def test_large_checkpoints_are_written_in_several_files(tmp_path, config, tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    params = random_params(config)
    path = huggingface.write(
        tmp_path / "m",
        params,
        config,
        tokenizer,
        layout="sentence-transformers",
        embedding=EMBEDDING,
        provenance={},
        card="",
    )
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    np.testing.assert_array_equal(huggingface.open_checkpoint(path).params()["norm"], params["norm"])


def test_everything_that_is_wrong_is_listed_in_one_error(folder):
    def change(arrays):
        arrays["extra.weight"] = arrays.pop("norm.weight")
        arrays["layers.1.mlp.up_proj.weight"] = arrays["layers.1.mlp.up_proj.weight"].T.copy()
        arrays["layers.0.mlp.up_proj.weight"] = arrays["layers.0.mlp.up_proj.weight"].astype(np.int8)
        return arrays

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        huggingface.open_checkpoint(folder)
    for part in (
        "tensor norm.weight is missing", "tensor extra.weight is not part of this architecture",
        "tensor layers.1.mlp.up_proj.weight has shape [32, 48], expected [48, 32]",
        "tensor layers.0.mlp.up_proj.weight is I8, expected F32, BF16, F16",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="llama"), "model_type 'llama', expected qwen3 or bidirectional_pplx_qwen3"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', expected 'silu'"),
        (dict(attention_bias=True), "attention_bias=True, expected False"),
        (
            dict(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
            "rope parameters .*yarn.*, expected",
        ),
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "rope parameters .*yarn.*, expected rope_type",
        ),
        (dict(rope_parameters={"rope_theta": 5e6}), "two values of rope_theta, .10000.0, 5000000.0."),
        (dict(rope_parameters=[1]), "rope parameters .1., expected an object"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types .*sliding_attention.*, expected"),
        (dict(layer_types=3), "layer_types 3, expected full_attention alone"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0, expected a positive whole number"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers=2.0, expected a positive whole number"),
        (dict(rms_norm_eps=float("inf")), "rms_norm_eps=inf, expected a positive number"),
        (dict(embed={"separator": True}), "the embedding section lacks matryoshka; .* lacks max_length"),
        (dict(embed={"separator": "no", "matryoshka": [], "max_length": None}), "separator is 'no', expected true or"),
        (dict(embed=3), "config.json has embed=3, expected an object"),
        (dict(num_attention_heads=3, num_key_value_heads=2), "num_heads=3 must be a multiple of num_kv_heads=2"),
    ],
)
def test_another_architecture_is_refused(fields, message, folder):
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        huggingface.open_checkpoint(folder)


def test_truncated_files_pickles_and_paths_that_leave_the_folder_are_refused(folder, causal):
    path = causal / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is truncated or damaged"):
        huggingface.open_checkpoint(causal)
    path.unlink()
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is missing"):
        huggingface.open_checkpoint(causal)
    index = causal / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
        with pytest.raises(ValueError, match="which is not a file of this folder"):
            huggingface.open_checkpoint(causal)
    for file in causal.glob("model*"):
        file.unlink()
    (causal / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no .safetensors file; pytorch_model.bin is a pickle"):
        huggingface.open_checkpoint(causal)


def test_a_hub_id_is_found_in_the_cache_without_a_network(encoder_folder, tmp_path):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    name = "models--someone--some-model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(encoder_folder, tmp_path / name / "snapshots" / commit)
    rewrite(tmp_path / name / "snapshots" / ("b" * 40), lambda t: {**t, "norm.weight": 2 * t["norm.weight"]})
    (tmp_path / name / "refs").mkdir()
    (tmp_path / name / "refs" / "main").write_text("a" * 40)
    program = f"""
        import numpy as np
        from embed import inference
        here = inference.load({str(encoder_folder)!r}).encode("a query")
        np.testing.assert_array_equal(inference.load("someone/some-model").encode("a query"), here)
        np.testing.assert_allclose(
            inference.load("someone/some-model", revision={"b" * 40!r}).encode("a query"), 2 * here, rtol=1e-5)
        for wrong, say in (("someone/other", "there is no folder someone/other, and someone/other cannot be had"),
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
    from embed.checkpoints import export, huggingface
    from embed.models.transformer import abstract_params
    from embed.models import sharding

    checkpoint = huggingface.open_checkpoint(sys.argv[1])
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    for mesh in (mesh, sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])):
        shardings = sharding.parameter_shardings(mesh, abstract_params(checkpoint.config))
        whole, parts = export.flatten(checkpoint.params()), export.flatten(checkpoint.params(shardings))
        assert not parts["layers.gate"].sharding.is_fully_replicated
        for name, x in parts.items():
            np.testing.assert_array_equal(np.asarray(x), whole[name])
"""


def test_tensors_go_straight_into_their_shards(encoder_folder):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(encoder_folder)], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_makes_a_checkpoint_that_says_what_it_is(causal, tmp_path, capsys, dtype):
    assert main(["convert", str(causal), str(tmp_path / "out"), f"--dtype={dtype}"]) == 0
    assert f"{dtype}, causal" in capsys.readouterr().out
    checkpoint = huggingface.open_checkpoint(causal)
    info = json.loads((tmp_path / "out" / "model.json").read_text())
    assert info["source"]["causal"] and info["source"]["digest"] == checkpoint.digest
    abstract = transformer.abstract_params(checkpoint.config)
    restored = training_state.load_params(tmp_path / "out" / "checkpoints", abstract)
    for name, x in export.flatten(restored).items():
        want = export.flatten(checkpoint.params(dtype=dtype))[name].astype(np.float32)
        np.testing.assert_array_equal(x, want)
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer")
    converted.check(tmp_path / "out", dataclasses.asdict(checkpoint.config), tokenizer)
    wrong = dataclasses.asdict(checkpoint.config) | {"num_layers": 3}
    with pytest.raises(
        ValueError, match="config.model.num_layers is 3, the checkpoint's 2; the run's tokenizer is .*mask_id"
    ):
        converted.check(tmp_path / "out", wrong, small.tokenizer())
    other = tokenizers.load(tmp_path / "out" / "tokenizer", mask_id=5)
    with pytest.raises(ValueError, match="the run's tokenizer is .*'mask_id': 5"):
        converted.check(tmp_path / "out", {}, other)


def test_convert_replaces_what_it_wrote_and_nothing_else_and_says_so_before_it_reads(
    causal, tmp_path, capsys, monkeypatch
):
    for _ in range(2):
        assert main(["convert", str(causal), str(tmp_path / "out")]) == 0
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "model.json").write_text("{}")
    monkeypatch.setattr(huggingface.Checkpoint, "params", lambda *_: pytest.fail("weights were read"))
    assert main(["convert", str(causal), str(tmp_path / "web")]) == 2
    assert "exists and was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "web" / "model.json").read_text() == "{}"


def test_convert_takes_a_mask_and_refuses_one_outside_the_table(causal, tmp_path, capsys, config):
    assert main(["convert", str(causal), str(tmp_path / "out"), "--mask_id=7"]) == 0
    assert tokenizers.load(tmp_path / "out" / "tokenizer").mask_id == 7
    assert main(["convert", str(causal), str(tmp_path / "out"), f"--mask_id={config.vocab_size}"]) == 2
    assert f"mask_id={config.vocab_size} is behind the {config.vocab_size} rows" in capsys.readouterr().err


def test_export_turns_one_layout_into_another(encoder_folder, tmp_path, capsys):
    assert main(["export", f"--model={encoder_folder}", f"--output={tmp_path / 'native'}"]) == 0
    assert main(["export", f"--model={tmp_path / 'native'}", f"--output={tmp_path / 'back'}", "--format=pplx"]) == 0
    want = inference.load(encoder_folder).encode(TEXTS)
    for name in ("native", "back"):
        np.testing.assert_array_equal(inference.load(tmp_path / name).encode(TEXTS), want)
        assert (tmp_path / name / "README.md").read_text().startswith("---\n")
    assert main(["export", f"--model={encoder_folder}", f"--output={tmp_path / 'x'}", "--format=gguf"]) == 2
    assert "format 'gguf' must be one of native, sentence-transformers, pplx, onnx" in capsys.readouterr().err


def test_a_card_says_what_the_run_knows_and_that_the_rest_is_unknown(config):
    run = {
        "stages": {"pair": {"init": "", "curriculum": [(400, "pairs")]}}, "data": {"gin_file": "data.gin"},
        "merge": {"ratio": 0.8}, "export": {"languages": ["en"], "license": "mit"},
    }  # fmt: skip
    provenance = {
        "checkpoint": "merged", "config": run, "commit": "abc", "figures": {"functions": {"int8": {"ndcg@10": 0.4567}}},
        "source": {"path": "someone/model", "revision": "v2", "digest": "123"},
    }  # fmt: skip
    card = model_card(config, EMBEDDING, provenance, layout="sentence-transformers")
    head = card.split("---\n")[1]
    assert head.splitlines()[:4] == ["language:", '- "en"', 'license: "mit"', "library_name: sentence-transformers"]
    for part in ("| pair | random init | 400 of pairs |", "0.8 of the way", "| functions | int8 | 0.457 |", "16, 32",
                 "Made from someone/model at revision v2 (sha256 123)."):  # fmt: skip
        assert part in card
    bare = model_card(config, EMBEDDING | {"matryoshka": []}, {}, layout="native")
    assert "license:" not in bare and "| license | unknown |" in bare and "commit unknown" in bare


def test_what_a_model_says_of_its_run_stays_with_it_through_every_layout(encoder_folder, tmp_path):
    run = {"commit": "abc", "checkpoint": "pair", "figures": {"functions": {"int8": {"ndcg@10": 0.25}}}}
    params, config, tokenizer, how, _ = read_model(encoder_folder)
    path = huggingface.write(
        tmp_path / "a", params, config, tokenizer, layout="pplx", embedding=how, provenance=run, card=""
    )
    for layout in ("native", "sentence-transformers"):
        assert main(["export", f"--model={path}", f"--output={tmp_path / layout}", f"--format={layout}"]) == 0
        path = tmp_path / layout
        card = (path / "README.md").read_text()
        assert "commit abc" in card and "| functions | int8 | 0.250 |" in card


def test_a_table_with_exactly_the_rows_of_the_tokenizer_embeds(tmp_path, tokenizer):
    exact = transformer.make_config("micro", tokenizer.vocab_size)
    path = huggingface.write(
        tmp_path / "m", random_params(exact), exact, tokenizer, layout="sentence-transformers", embedding=EMBEDDING,
        provenance={}, card="",
    )  # fmt: skip
    assert inference.load(path).encode(TEXTS).shape == (len(TEXTS), 32)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode": "lasttoken"},
            "1_Pooling/config.json pools by .'lasttoken'., expected",
        ),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pools by .'cls_token'., expected the mean"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Dense"}],
            "has sentence_transformers.models.Dense, exp",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"q": "Query: "}, "default_prompt_name": "q"},
            "'Query: ' before",
        ),
    ],
)
def test_a_folder_that_makes_its_vectors_otherwise_is_refused(folder, file, content, message):
    edit_config(folder, embed=None)
    assert inference.load(folder).max_length == 32768
    write_json(folder / file, content)
    with pytest.raises(ValueError, match=message):
        inference.load(folder)


def test_a_tokenizer_that_adds_tokens_and_a_shorter_limit_are_heard(folder):
    edit_config(folder, embed=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"model_max_length": 8})
    assert inference.load(folder).max_length == 8
    model = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    model["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    write_json(folder / "tokenizer.json", model)
    with pytest.raises(ValueError, match="tokenizer.json adds tokens to each text"):
        inference.load(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max')
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        inference.load(folder)


def test_an_export_replaces_what_it_wrote_but_not_what_others_made_of_it(folder, tmp_path, capsys):
    export = ["export", f"--model={folder}", f"--output={tmp_path / 'out'}", "--format=sentence-transformers"]
    assert main(export) == main(export) == 0
    edit_config(tmp_path / "out", transformers_version="6")  # as a program does that saves a tuned model there
    assert main(export) == 2
    assert "exists and was not written by this command" in capsys.readouterr().err
    assert main(["export", f"--model={folder}", f"--output={folder}"]) == 2
    assert "is the model itself" in capsys.readouterr().err


def test_what_a_hub_repository_is_filtered_to_is_all_that_load_needs(encoder_folder, tmp_path):
    native = tmp_path / "native"
    embedding = dict(embedding=EMBEDDING, provenance={})
    export.export(native, small.params(), small.config(), small.tokenizer(), **embedding)
    for source in (native, encoder_folder):
        names = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        names += ["fp8/model.safetensors", "modeling.py", "pytorch_model.bin"]
        kept = set(
            filter_repo_objects(names, allow_patterns=huggingface.FILES, ignore_patterns=huggingface.OTHER_FILES)
        )
        assert not kept & set(names[-3:])
        copy = tmp_path / f"{source.name}-copy"
        for name in kept:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, copy / name)
        np.testing.assert_array_equal(inference.load(copy).encode(TEXTS), inference.load(source).encode(TEXTS))


def test_a_causal_model_without_a_head_is_taken_as_tied(causal):
    edit_config(causal, architectures=["Qwen3Model"])
    assert not huggingface.open_checkpoint(causal).config.tied  # its head is there
    where = json.loads((causal / "model.safetensors.index.json").read_text())["weight_map"]
    file = causal / where["lm_head.weight"]
    arrays = safetensors.numpy.load_file(file)
    del arrays["lm_head.weight"]
    safetensors.numpy.save_file(arrays, file)
    assert huggingface.open_checkpoint(causal).config.tied
    edit_config(causal, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(ValueError, match="tensor lm_head.weight is missing"):
        huggingface.open_checkpoint(causal)
