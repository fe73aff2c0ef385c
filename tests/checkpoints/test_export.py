import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small
from small import random_params

from embed import exports, inference, tokenizers
from embed.checkpoints import export, model_folder, names
from embed.checkpoints.card import model_card
from embed.cli import main
from embed.models import transformer

TEXTS = small.sentences(9, seed=3)
LAYOUT = [
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "embed.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "spiece.model",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return tokenizers.load(small.write_bpe(tmp_path_factory.mktemp("tokenizer"), small.sentences(100)))


@pytest.fixture
def folder(tmp_path):
    return small.write_model(tmp_path / "model", provenance={"commit": "abc"})


def contents(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def read_json(path):
    return json.loads(path.read_text())


def test_the_folder_contains_what_programs_read_and_embed_json_names_all_files_but_the_card(folder):
    assert contents(folder) == LAYOUT
    document = read_json(folder / "embed.json")
    assert document["files"].keys() == set(LAYOUT) - {"README.md", "embed.json"}
    assert document["embedding"] == small.EMBEDDING | {"tanh": False}
    assert document["provenance"]["commit"] == "abc" and "jax" in document["provenance"]["versions"]
    assert [f.name for f in folder.parent.iterdir()] == ["model"]


def test_config_json_is_an_ordinary_qwen3_that_is_not_causal(folder):
    fields = read_json(folder / "config.json")
    assert fields["model_type"] == "qwen3" and fields["architectures"] == ["Qwen3Model"]
    assert fields["is_causal"] is False and fields["use_bidirectional_attention"] is True
    assert fields["hidden_size"] == 32 and "embed" not in fields and "remat" not in fields


def test_the_tokenizer_config_names_separator_and_mask(folder, bpe, tmp_path):
    fields = read_json(folder / "tokenizer_config.json")
    assert (fields["sep_token"], fields["mask_id"], fields["separator_id"]) == ("<sep>", 2, 3)
    config = transformer.make_config("micro", bpe.vocab_size + 3)
    other = small.write_model(tmp_path / "bpe", random_params(config), config, bpe)
    fields = read_json(other / "tokenizer_config.json")
    assert fields["sep_token"] == "<|endoftext|>" and fields["mask_id"] == bpe.mask_id
    assert model_folder.open_model(other).tokenizer().digest == bpe.digest


def test_bfloat16_parameters_are_written_as_float32(tmp_path):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), small.params())
    path = small.write_model(tmp_path / "m", params)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(tensors["norm.weight"], np.asarray(params["norm"], np.float32))


def test_the_head_of_the_diffusion_stage_is_not_exported(tmp_path):
    untied = transformer.make_config("micro", small.config().vocab_size, tied=False)
    path = small.write_model(tmp_path / "m", random_params(untied), untied)
    assert "lm_head.weight" not in safetensors.numpy.load_file(path / "model.safetensors")
    assert model_folder.open_model(path).config.tied


def test_large_models_are_written_in_several_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    path = small.write_model(tmp_path / "m")
    files = sorted(path.glob("model-*-of-*.safetensors"))
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 20_000 and f"-of-{len(files):05d}." in files[0].name
    index = read_json(path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(sizes)
    params = model_folder.open_model(path).params()
    for name, x in names.flatten(params).items():
        np.testing.assert_array_equal(x, names.flatten(small.params())[name])


def test_weights_of_another_shape_are_refused_before_anything_is_written(tmp_path):
    params = {**small.params(), "norm": jnp.ones(31), "extra": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=r"extra is not part of this architecture; parameter norm has shape \[31\], expected"
    ):
        small.write_model(tmp_path / "m", params)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["", "onnx"])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, format):
    query = small.params()["layers"]["query"].copy()
    query[1, 3, 0, 5] = np.inf
    params = {**small.params(), "layers": {**small.params()["layers"], "query": query}}
    with pytest.raises(
        ValueError, match="the model for .*m has weights that are not finite: layers.1.self_attn.q_proj.wei"
    ):
        small.write_model(tmp_path / "m", params, format=format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("matryoshka", [64], r"matryoshka is \[64\], expected a list of prefixes in 1..32"),
        ("separator", "yes", "separator is 'yes', expected true or false"),
        ("contextual", None, "contextual is None, expected true or false"),
        ("max_length", 0, "max_length is 0, expected a positive number"),
        ("context_length", -1, "context_length is -1, expected a positive number"),
        ("pooling", "cls", "pooling is 'cls', expected mean or last"),
        ("pool", "mean", "unknown field pool"),
    ],
)
def test_a_wrong_embedding_setting_is_named(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        small.write_model(tmp_path / "m", embedding={field: value})


def test_unknown_formats_and_tanh_in_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="format 'gguf' must be one of pplx, onnx"):
        small.write_model(tmp_path / "m", format="gguf")
    with pytest.raises(ValueError, match="tanh is for the model folder, not for format pplx"):
        small.write_model(tmp_path / "m", format="pplx", tanh=True)


def test_tanh_is_a_dense_module_with_the_identity(tmp_path):
    path = small.write_model(tmp_path / "m", tanh=True)
    assert [m["path"] for m in read_json(path / "modules.json")] == ["", "1_Pooling", "2_Dense"]
    (weight,) = safetensors.numpy.load_file(path / "2_Dense" / "model.safetensors").values()
    np.testing.assert_array_equal(weight, np.eye(32, dtype=np.float32))
    document = read_json(path / "embed.json")
    assert document["embedding"]["tanh"] and "2_Dense/model.safetensors" in document["files"]
    assert model_folder.open_model(path).embedding["tanh"]


@pytest.mark.parametrize("contextual", [False, True])
def test_the_pplx_layout_has_the_names_and_fields_of_the_release(contextual, tmp_path, bpe):
    config = transformer.make_config("micro", bpe.vocab_size + 3, rope_theta=1e4)
    embedding = {"contextual": contextual, "separator": contextual}
    path = small.write_model(tmp_path / "m", random_params(config), config, bpe, format="pplx", embedding=embedding)
    fields = read_json(path / "config.json")
    model = "PPLXQwen3ContextualModel" if contextual else "PPLXQwen3Model"
    assert fields["architectures"] == [model] and fields["model_type"] == "bidirectional_pplx_qwen3"
    assert fields["auto_map"] == {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": f"modeling.{model}"}
    assert fields["use_bidirectional_attention"] is True and "is_causal" not in fields
    modules = [m["type"] for m in read_json(path / "modules.json")]
    assert modules[-1] == "st_quantize.FlexibleQuantizer" and len(modules) == 3
    shapes = {n: x.shape for n, x in safetensors.numpy.load_file(path / "model.safetensors").items()}
    D, H, K, d, F, V = 32, 2, 1, 16, 48, config.vocab_size
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (H * d, D),
        "self_attn.k_proj": (K * d, D),
        "self_attn.v_proj": (K * d, D),
        "self_attn.o_proj": (D, H * d),
        "self_attn.q_norm": (d,),
        "self_attn.k_norm": (d,),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    want = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == {"embed_tokens.weight": (V, D), "norm.weight": (D,), **want}
    ours = model_folder.open_model(path).embedding
    theirs = model_folder.open_model(small.foreign(path)).embedding  # as for a program that does not read embed.json
    for embedding in (ours, theirs):
        assert (embedding["contextual"], embedding["separator"]) == (contextual, contextual)


def test_the_real_shapes_have_as_many_tensors_as_the_release():
    shapes = [names.shapes(transformer.make_config(s, 151936)) for s in ("0.6b", "4b")]
    assert [len(n) for n in shapes] == [310, 398]
    assert shapes[0]["layers.27.self_attn.o_proj.weight"] == (1024, 2048)
    assert sum(int(np.prod(s)) for s in shapes[0].values()) == 596_049_920


# Existing folders


def test_an_export_is_replaced_whole(folder):
    small.write_model(folder, format="onnx")
    assert "model.safetensors" not in contents(folder) and "onnx/model.onnx" in contents(folder)
    small.write_model(folder, provenance={"commit": "def"})
    assert contents(folder) == LAYOUT and read_json(folder / "embed.json")["provenance"]["commit"] == "def"


def edit_config(folder):
    small.edit_config(folder, transformers_version="6")  # like a program that saves a tuned model there


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "thesis.tex").write_text("years of work"), "holds thesis.tex, which no export wrote"),
        (lambda f: (f / "1_Pooling" / "x").write_text("x"), "holds 1_Pooling/x, which no export wrote"),
        (edit_config, "holds a config.json that differs from the export's"),
        (small.foreign, "exists and was not written by this command"),
    ],
)
def test_a_folder_that_is_not_an_export_is_refused_before_the_work_and_never_replaced(
    change, message, folder, monkeypatch
):
    change(folder)
    before = {name: (folder / name).read_bytes() for name in contents(folder)}
    monkeypatch.setattr(names, "tensors", lambda *_: pytest.fail("a tensor was fetched"))
    monkeypatch.setattr(model_folder.ModelFolder, "params", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        small.write_model(folder)
    assert main(["export", "--model=nowhere", f"--output={folder}"]) == 2
    assert {name: (folder / name).read_bytes() for name in contents(folder)} == before


def test_an_interrupted_export_leaves_the_old_one_and_no_other_files(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        small.write_model(folder)
    assert model_folder.open_model(folder).provenance["commit"] == "abc"
    assert [f.name for f in folder.parent.iterdir()] == ["model"]


# Devices and processes

WRITE = """
    import sys
    import jax, numpy as np, small
    from embed.checkpoints import names
    from embed.models import sharding
    from embed.models.transformer import abstract_params

    output, *cluster = sys.argv[1:]
    if cluster:
        jax.distributed.initialize(cluster[0], 2, int(cluster[1]))
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    shardings = sharding.parameter_shardings(mesh, abstract_params(small.config()))
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
    params = jax.tree.map(put, small.params(), shardings)
    assert params["layers"]["gate"].is_fully_addressable == (not cluster)
    small.write_model(output, params)
    if cluster:
        open(output + "-file", "w").close()
        broken = params | {"norm": params["norm"] * np.float32("nan")}
        for folder, written in ((output + "-broken", broken), (output + "-file/m", params)):
            try:
                small.write_model(folder, written)
            except (ValueError, OSError) as error:
                print(error)
            else:
                raise AssertionError(folder)
"""


def start(devices, *arguments):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    here = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }
    command = [sys.executable, "-c", textwrap.dedent(WRITE), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_small_weights(folder):
    params = names.flatten(model_folder.open_model(folder).params())
    for name, x in names.flatten(small.params()).items():
        np.testing.assert_array_equal(params[name], x)


def test_parameters_over_several_devices_are_written_unchanged(tmp_path):
    process = start(4, tmp_path / "m")
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert_small_weights(tmp_path / "m")


def test_the_first_of_two_processes_writes_and_a_failure_is_raised_in_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(2, tmp_path / "m", address, i) for i in range(2)]
    said = [process.communicate() for process in processes]
    assert [p.returncode for p in processes] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert all("has weights that are not finite: norm.weight" in output for output, _ in said)
    assert "m-file" in said[0][0] and "process 0 cannot write the model" in said[1][0]
    assert_small_weights(tmp_path / "m")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "m-file"]


# The command


def test_the_command_writes_an_existing_model_in_every_format(tmp_path, capsys):
    run = {"commit": "abc", "checkpoint": "pair", "figures": {"functions": {"int8": {"ndcg@10": 0.25}}}}
    source = small.write_model(tmp_path / "source", provenance=run)
    want, path = inference.load(source).encode(TEXTS), source
    for name, how in (("pplx", ["--format=pplx"]), ("tanh", ["--tanh"]), ("plain", [])):
        assert main(["export", f"--model={path}", f"--output={tmp_path / name}", *how]) == 0
        path = tmp_path / name
        got = inference.load(path).encode(TEXTS)
        np.testing.assert_allclose(got, np.tanh(want) if how == ["--tanh"] else want, atol=1e-6)
        card = (path / "README.md").read_text()  # the provenance is kept
        assert "commit abc" in card and "| functions | int8 | 0.250 |" in card and "Made from" in card
    assert main(["export", f"--model={path}", f"--output={path}"]) == 2
    assert f"is {path}, which this command reads" in capsys.readouterr().err
    assert main(["export", f"--model={path}", f"--output={tmp_path / 'x'}", "--format=gguf"]) == 2
    assert "format 'gguf' must be one of pplx, onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    "field, value",
    [
        ("lineage", 5),
        ("lineage", [{"name": "pair"}]),
        ("lineage", ["pair"]),
        ("merge", {"of": ["a"], "ratio": 0.5}),
        ("merge", "a and b"),
        ("figures", {"functions": 0.5}),
        ("figures", ["functions"]),
        ("figures", {"functions": {"int8": {"ndcg@10": "high"}}}),
        ("languages", 5),
        ("languages", [5]),
        ("license", ["MIT"]),
        ("versions", "1.0"),
    ],
)
def test_a_provenance_that_the_card_cannot_show_is_refused_before_the_weights_are_read(
    field, value, tmp_path, capsys, monkeypatch
):
    source = small.write_model(tmp_path / "source")
    document = json.loads((source / "embed.json").read_text())
    document["provenance"][field] = value
    (source / "embed.json").write_text(json.dumps(document))
    monkeypatch.setattr(model_folder.ModelFolder, "params", lambda *_: pytest.fail("weights were read"))
    assert main(["export", f"--model={source}", f"--output={tmp_path / 'new'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the provenance of {source} is not what an export writes" in line
    with pytest.raises(ValueError, match="the provenance of the model for .* is not what an export writes"):
        small.write_model(tmp_path / "new", provenance={field: value})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", ["", "https://x.org/model"])
def test_an_export_needs_the_name_of_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(small.write_model(tmp_path / "source"))
    for write in (
        lambda: small.write_model(folder),
        lambda: exports.export_source(source, folder),
        lambda: exports.merge_sources((source, 0), (source, 0), 0.5, folder),
    ):
        with pytest.raises(ValueError, match="a path is empty|is not a path"):
            write()
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio, tmp_path):
    source = str(small.write_model(tmp_path / "source"))
    with pytest.raises(ValueError, match=f"ratio={ratio} must be between 0 and 1"):
        exports.merge_sources((source, 0), (source, 0), ratio, tmp_path / "merged")


# The card


def test_a_card_has_the_known_facts_and_calls_the_rest_unknown():
    pair = {"folder": "gs://b/run/pair", "step": 400, "digest": "0123"}
    rows = [
        {
            **pair,
            "name": "pair",
            "kind": "pair",
            "phases": [[300, {"a": 1.0, "b": 2.0}], [100, {"a": 1.0}]],
            "parent": {"random init": 7},
        },
        {
            "name": "triplet",
            "kind": "triplet",
            "phases": [[50, {"hard": 1.0}]],
            "step": 50,
            "digest": "4567",
            "parent": pair,
        },
    ]
    provenance = {
        "checkpoint": "merged",
        "lineage": rows,
        "commit": "abc",
        "languages": ["en"],
        "license": "mit",
        "merge": {"of": ["contextual", "triplet"], "ratio": 0.8, "method": "slerp"},
        "figures": {"functions": {"int8": {"ndcg@10": 0.4567}}},
        "source": {"folder": "someone/model", "step": 0, "digest": "123"},
    }
    embedding = small.EMBEDDING | {"tanh": False}
    card = model_card(small.config(), embedding, provenance)
    head = card.split("---\n")[1]
    assert head.splitlines()[:4] == ["language:", '- "en"', 'license: "mit"', "library_name: sentence-transformers"]
    for part in (
        "| pair | pair | 300 of a and b, 100 of a | 400 | 0123 | random init, seed 7 |",
        "8, 32",
        "| triplet | triplet | 50 of hard | 50 | 4567 | gs://b/run/pair, step 400 (0123) |",
        "Merged by slerp, 0.8 of the way from contextual to triplet",
        "| functions | int8 | 0.457 |",
        "Made from someone/model (sha256 123).",
        'SentenceTransformer("FOLDER")',
    ):
        assert part in card, part
    bare = model_card(small.config(), embedding | {"matryoshka": []}, {}, format="pplx")
    assert "license:" not in bare and "| license | unknown |" in bare and "commit unknown" in bare
    assert "## Training" not in bare and "library_name" not in bare


def test_a_card_shows_how_a_contextual_model_is_used_and_what_tanh_means():
    embedding = small.EMBEDDING | {"tanh": False}
    plain, tanh = (model_card(small.config(), embedding | {"tanh": on}, {}) for on in (False, True))
    assert "A float32 vector is the pooled vector v" in plain and "A float32 vector is tanh(v)" in tanh
    assert "encode_documents" not in plain and "bidirectional Qwen3 encoder with mean pooling" in plain
    causal = dataclasses.replace(small.config(), causal=True)
    last = model_card(causal, embedding | {"pooling": "last"}, {})
    assert "causal Qwen3 encoder with pooling of the last token" in last and "the state of the last token" in last
    assert "encode_documents" in model_card(small.config(), embedding | {"contextual": True}, {})


# Late interaction


@pytest.fixture
def late(tmp_path):
    """(model folder, its encoder in memory)."""
    config = dataclasses.replace(small.config(), token_dimensions=12)
    params = random_params(config)
    return small.write_model(tmp_path / "late", params, config), inference.Encoder(params, config, small.tokenizer())


def test_the_projection_is_a_module_of_its_own_and_token_vectors_come_back_bit_by_bit(late):
    folder, encoder = late
    parts = ["1_Dense/config.json", "1_Dense/model.safetensors", "2_MultiVectorMask/config.json"]
    assert contents(folder) == sorted([*LAYOUT[1:], *parts, "3_Normalize/config.json"])
    (projection,) = safetensors.numpy.load_file(folder / "1_Dense" / "model.safetensors").values()
    np.testing.assert_array_equal(projection, encoder.params["projection"].T)
    assert read_json(folder / "config.json")["token_dimensions"] == 12
    assert read_json(folder / "config_sentence_transformers.json")["model_type"] == "MultiVectorEncoder"
    loaded = inference.load(folder)
    assert loaded.token_dimensions == 12
    for one, other in zip(loaded.encode_tokens_multi(TEXTS), encoder.encode_tokens_multi(TEXTS)):
        np.testing.assert_array_equal(one, other)
    assert "MultiVectorEncoder" in (folder / "README.md").read_text()


def test_an_export_of_an_export_has_the_same_projection(late, tmp_path):
    folder, _ = late
    assert main(["export", f"--model={folder}", f"--output={tmp_path / 'again'}"]) == 0
    for name in ("1_Dense/model.safetensors", "model.safetensors", "config.json", "modules.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "change, message", [("other", "1_Dense/model.safetensors was changed"), ("gone", "is missing")]
)
def test_a_changed_projection_is_refused(change, message, late):
    folder, _ = late
    file = folder / "1_Dense" / "model.safetensors"
    file.unlink()
    if change == "other":
        safetensors.numpy.save_file({"linear.weight": np.zeros((12, 32), np.float32)}, file)
    with pytest.raises(ValueError, match=message):
        inference.load(folder)


@pytest.mark.parametrize("how, option", [({"format": "onnx"}, "--format=onnx"), ({"tanh": True}, "--tanh")])
def test_formats_of_single_vectors_refuse_a_late_interaction_model(how, option, late, tmp_path, capsys):
    folder, _ = late
    arguments = ["--tanh"] if "tanh" in how else [f"--format={how['format']}"]
    assert main(["export", f"--model={folder}", f"--output={tmp_path / 'other'}", *arguments]) == 2
    assert f"{option} is for single vectors; a late-interaction model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
