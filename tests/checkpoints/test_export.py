import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small

from embed import tokenizers
from embed.checkpoints import export

EMBEDDING = {"matryoshka": [8, 32], "separator": True, "max_length": 512}


@pytest.fixture
def folder(tmp_path):
    return export.export(
        tmp_path / "model", small.params(), small.config(), small.tokenizer(), embedding=EMBEDDING,
        provenance={"stages": ["pair"], "commit": "abc"},
    )  # fmt: skip


def edit(folder, **fields):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | fields))


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_what_is_exported_is_read_back_bit_for_bit(folder):
    params, config, settings = export.read(folder)
    assert config == small.config()
    expected = export.flatten(small.params())
    read = export.flatten(params)
    assert read.keys() == expected.keys() and "layers.query" in read
    for name, value in read.items():
        np.testing.assert_array_equal(value, expected[name], strict=True)
    assert {k: settings["embedding"][k] for k in EMBEDDING} == EMBEDDING
    assert settings["embedding"]["dimensions"] == 32
    assert settings["provenance"] == {"stages": ["pair"], "commit": "abc"}
    assert settings["tokenizer_digest"] == tokenizers.load(folder).digest == small.tokenizer().digest


def test_the_folder_holds_exactly_weights_config_and_tokenizer(folder):
    assert sorted(f.name for f in folder.parent.rglob("*")) == [
        "config.json", "model", "model.safetensors", "sentencepiece.model"
    ]  # fmt: skip


def test_bfloat16_parameters_are_exported_as_float32(tmp_path):
    params = {**small.params(), "norm": jnp.asarray(small.params()["norm"], jnp.bfloat16)}
    export.export(tmp_path / "m", params, small.config(), small.tokenizer(), embedding=EMBEDDING, provenance={})
    assert export.read(tmp_path / "m")[0]["norm"].dtype == np.float32


def test_compute_settings_are_not_part_of_the_export(folder):
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    assert architecture.keys().isdisjoint({"dtype", "remat", "unroll"})
    assert architecture["hidden_size"] == 32


def test_an_export_is_replaced_whole(folder):
    (folder / "leftover").touch()
    export.export(folder, small.params(), small.config(), small.tokenizer(), embedding=EMBEDDING, provenance={"n": 2})
    assert export.read(folder)[2]["provenance"] == {"n": 2}
    assert not (folder / "leftover").exists()


def test_a_folder_that_is_not_an_export_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not written by this command"):
        export.export(tmp_path, small.params(), small.config(), small.tokenizer(), embedding=EMBEDDING, provenance={})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_export_leaves_the_old_one_and_no_debris(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export.export(folder, small.params(), small.config(), small.tokenizer(), embedding=EMBEDDING, provenance={})
    assert export.read(folder)[2]["provenance"]["commit"] == "abc"
    assert [f.name for f in folder.parent.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_loses_nothing(folder):
    folder.rename(folder.with_name(".model.old"))  # what such a kill leaves
    with pytest.raises(RuntimeError), export.replace_folder(folder, is_ours=export.is_export):
        raise RuntimeError
    assert export.read(folder)[2]["provenance"]["commit"] == "abc"


def test_weights_that_do_not_fit_or_are_not_finite_are_not_exported(tmp_path):
    params = {**small.params(), "norm": jnp.full(31, jnp.nan)}
    with pytest.raises(ValueError, match=r"norm is not finite; tensor norm has shape \[31\], expected \[32\]"):
        export.export(tmp_path / "m", params, small.config(), small.tokenizer(), embedding=EMBEDDING, provenance={})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("matryoshka", [64], r"matryoshka is \[64\], expected a list of prefixes in 1..32"),
        ("separator", "yes", "separator is 'yes', expected true or false"),
        ("max_length", 0, "max_length is 0, expected a positive number"),
        ("pooling", "cls", "unknown field pooling"),
    ],
)
def test_a_wrong_embedding_setting_is_named(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        export.export(
            tmp_path / "m", small.params(), small.config(), small.tokenizer(),
            embedding=EMBEDDING | {field: value}, provenance={},
        )  # fmt: skip


def test_one_error_lists_every_tensor_problem(folder):
    def change(tensors):
        del tensors["norm"]
        tensors["layers.query"] = tensors["layers.query"][:, :5]
        tensors["extra.bias"] = np.zeros(3, np.float32)
        tensors["embedding"] = tensors["embedding"].astype(np.float16)

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        export.read(folder)
    for problem in (
        "norm is missing", "extra.bias is not part", "layers.query has shape [2, 5, 2, 16], expected [2, 32, 2, 16]",
        "embedding is F16, expected F32",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_a_truncated_weights_file_and_a_bad_config_are_reported_together(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    document = json.loads((folder / "config.json").read_text())
    document["architecture"] |= {"num_heads": "two", "flavour": 1}
    del document["architecture"]["head_dim"]
    edit(folder, architecture=document["architecture"])
    with pytest.raises(ValueError) as caught:
        export.read(folder)
    for problem in ("truncated or damaged", "num_heads='two'", "unknown field flavour", "lacks head_dim"):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 99}, "format version 99 is unknown, this program reads 1"),
        ({"format": "gguf"}, "has format 'gguf', expected \"embed\""),
        ({"embedding": None}, "has no embedding section"),
        ({"architecture": []}, "has no architecture"),
    ],
)
def test_a_config_of_another_kind_is_one_sentence(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        export.read(folder)


def test_a_config_that_is_not_json_is_one_sentence(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        export.read(folder)


def test_a_wrong_path_says_what_is_expected_there(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected an exported model, a folder with config.json"):
        export.read(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model lacks model.safetensors"):
        export.read(folder)
