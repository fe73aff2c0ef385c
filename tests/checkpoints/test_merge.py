import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
import small

from embed.checkpoints import model_folder
from embed.checkpoints.merge import slerp
from embed.cli import main


def tensors(shape=(4, 3), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_ratios_0_and_1_give_the_two_parents(shape):
    a, b = tensors(shape)
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_a_tensor_is_interpolated_as_one_vector_by_shoemakes_formula(t):
    a, b = tensors()
    np.testing.assert_allclose(slerp(a, b, t), reference.slerp(a.astype(float), b.astype(float), t), rtol=1e-5)


@pytest.mark.parametrize("degrees", [10, 60, 90, 150])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_in_the_plane_the_angle_is_divided_in_proportion(degrees, t):
    def at(angle):
        return np.array([np.cos(angle), np.sin(angle)])

    a, b = at(0.3), at(0.3 + np.deg2rad(degrees))
    np.testing.assert_allclose(slerp(a, b, t), at(0.3 + t * np.deg2rad(degrees)), atol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_equal_norms_stay_on_their_sphere(t):
    a, b = tensors((50, 40))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(np.linalg.norm(slerp(a, b, t)), np.linalg.norm(a), rtol=1e-5)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5])
def test_close_tensors_keep_float32_precision(angle):
    """As for fine-tuned siblings: the error must be small relative to their difference, not to their size."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=4096)
    a /= np.linalg.norm(a)
    step = rng.normal(size=4096)
    step -= (step @ a) * a
    step /= np.linalg.norm(step)
    low = [x.astype(np.float32) for x in (a, np.cos(angle) * a + np.sin(angle) * step)]
    got = np.asarray(slerp(*low, 0.5), np.float64)
    want = reference.slerp(*(x.astype(np.float64) for x in low), 0.5)
    assert np.linalg.norm(got - want) < 2e-7  # rounding of the result to float32


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_parallel_and_antiparallel_tensors_are_mixed_linearly(factor):
    a, _ = tensors()
    np.testing.assert_allclose(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=1e-5, atol=1e-6)


def test_a_zero_tensor_is_mixed_linearly():
    a, zero = tensors()[0], np.zeros((4, 3), np.float32)
    np.testing.assert_allclose(slerp(a, zero, 0.25), 0.75 * a, rtol=1e-6)
    np.testing.assert_allclose(slerp(zero, a, 0.25), 0.25 * a, rtol=1e-6)
    np.testing.assert_array_equal(slerp(zero, zero, 0.25), zero)


def test_each_tensor_of_a_tree_has_its_own_angle():
    (a, b), (c, d) = tensors(seed=0), tensors((5,), seed=1)
    merged = slerp({"x": a, "y": {"z": c}}, {"x": b, "y": {"z": d}}, 0.3)
    np.testing.assert_array_equal(merged["x"], slerp(a, b, 0.3))
    np.testing.assert_array_equal(merged["y"]["z"], slerp(c, d, 0.3))


def test_bfloat16_is_merged_in_float32_and_stays_bfloat16():
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in tensors())
    got = slerp(a, b, 0.5)
    assert got.dtype == jnp.bfloat16
    want = reference.slerp(np.asarray(a, float), np.asarray(b, float), 0.5)
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=2**-8)


def test_mismatched_trees_are_an_error():
    a, b = tensors()
    with pytest.raises(ValueError, match="structure"):
        slerp({"x": a}, {"y": b}, 0.5)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(3, 4\)"):
        slerp({"x": a}, {"x": b.T}, 0.5)


def test_a_stacked_array_under_layers_has_one_angle_per_layer():
    a, b = tensors((3, 4, 5))
    stacked = slerp({"layers": {"query": a}, "norm": a}, {"layers": {"query": b}, "norm": b}, 0.3)
    for i in range(3):
        np.testing.assert_allclose(stacked["layers"]["query"][i], slerp(a[i], b[i], 0.3), rtol=1e-6)
    np.testing.assert_array_equal(stacked["norm"], slerp(a, b, 0.3))
    assert np.abs(stacked["layers"]["query"] - stacked["norm"]).max() > 1e-3  # one angle for all gives another result


# Model folders


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    return [small.write_model(folder / name, small.random_params(small.config(), i)) for i, name in enumerate("ab")]


def merge(a, b, output, *more):
    return main(["merge", f"--a={a}", f"--b={b}", f"--output={output}", *more])


def test_merging_folders_equals_merging_their_files_tensor_by_tensor(parents, tmp_path):
    """In float64, with safetensors and without our parameter tree."""
    assert merge(*parents, tmp_path / "m", "--ratio=0.3") == 0
    a, b, got = (safetensors.numpy.load_file(f / "model.safetensors") for f in (*parents, tmp_path / "m"))
    assert got.keys() == a.keys()
    for name, x in got.items():
        want = reference.slerp(a[name].astype(np.float64), b[name].astype(np.float64), 0.3)
        np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-6 * np.abs(want).max(), err_msg=name)


def test_a_linear_merge_is_the_weighted_mean_of_every_tensor(parents, tmp_path):
    assert merge(*parents, tmp_path / "m", "--ratio=0.3", "--method=linear") == 0
    a, b, got = (safetensors.numpy.load_file(f / "model.safetensors") for f in (*parents, tmp_path / "m"))
    for name, x in got.items():
        want = 0.7 * a[name].astype(np.float64) + 0.3 * b[name].astype(np.float64)
        np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-6 * np.abs(want).max(), err_msg=name)
    about = model_folder.open_model(tmp_path / "m").provenance
    assert about["merge"]["method"] == about["identity"]["method"] == "linear"


def test_a_merged_folder_names_its_parents(parents, tmp_path):
    assert merge(*parents, tmp_path / "m", "--ratio=0.25") == 0
    model = model_folder.open_model(tmp_path / "m")
    digests = [model_folder.open_model(folder).digest for folder in parents]
    assert model.provenance["merge"] == {"of": [str(p) for p in parents], "ratio": 0.25, "method": "slerp"}
    assert [parent["digest"] for parent in model.provenance["identity"]["merge"]] == digests
    assert model.embedding == small.EMBEDDING | {"tanh": False}
    assert f"0.25 of the way from {parents[0]} to {parents[1]}" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("both", [False, True])
def test_a_merged_model_is_contextual_only_if_both_are(both, parents, tmp_path):
    for name, contextual in (("x", True), ("y", both)):
        small.write_model(tmp_path / name, embedding={"contextual": contextual})
    assert merge(tmp_path / "x", tmp_path / "y", tmp_path / "m") == 0
    assert model_folder.open_model(tmp_path / "m").embedding["contextual"] is both


def test_a_merged_model_has_the_shorter_context(tmp_path):
    for name, length in (("x", 90), ("y", None), ("z", 60)):
        small.write_model(tmp_path / name, embedding={"context_length": length})
    for other, length in (("y", 90), ("z", 60)):
        assert merge(tmp_path / "x", tmp_path / other, tmp_path / f"x{other}") == 0
        assert model_folder.open_model(tmp_path / f"x{other}").embedding["context_length"] == length


def test_models_that_embed_differently_are_not_merged(parents, tmp_path, capsys):
    other = small.write_model(tmp_path / "other", embedding={"max_length": 9})
    config = small.transformer.make_config("micro", small.config().vocab_size, num_layers=3)
    deeper = small.write_model(tmp_path / "deeper", small.random_params(config), config)
    words = small.transformer.make_config("micro", 700)
    bpe = model_folder.tokenizers.load(small.write_bpe(tmp_path, small.sentences(100)))
    tokens = small.write_model(tmp_path / "tokens", small.random_params(words), words, bpe)
    for second, message in (
        (other, "max_length is None and 9"),
        (deeper, "num_layers is 2 and 3"),
        (tokens, "tokenizer digest is"),
    ):
        assert merge(parents[0], second, tmp_path / "m") == 2
        assert message in capsys.readouterr().err
    assert merge(*parents, tmp_path / "m", "--ratio=2") == 2
    assert "--ratio=2.0 must be between 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# Forced host devices must be set before jax starts.
SHARDED = """
    import json, sys
    import jax, numpy as np, small
    from embed.checkpoints import merge, names
    from embed.cli import main
    from embed.models import sharding
    from embed.models.transformer import abstract_params

    a, b, output = sys.argv[1:]
    config = small.config()
    trees = [small.random_params(config, seed) for seed in (0, 1)]
    want = names.flatten(merge.slerp(*trees, 0.3))
    shardings = sharding.parameter_shardings(sharding.make_mesh(data=1, fsdp=4, tensor=2), abstract_params(config))
    x, y = (jax.tree.map(jax.device_put, tree, shardings) for tree in trees)
    merged = merge.merge_params(x, y, 0.3, shardings)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(x))  # its memory holds the result
    for name, leaf in names.flatten(merged).items():
        assert leaf.sharding == names.flatten(shardings)[name]
        np.testing.assert_allclose(leaf, want[name], rtol=1e-6, atol=1e-7)
    assert not merged["layers"]["gate"].sharding.is_fully_replicated
    assert jax.device_count() == 8
    assert main(["merge", f"--a={a}", f"--b={b}", "--ratio=0.3", f"--output={output}"]) == 0
"""


def test_merging_over_eight_devices_equals_merging_on_one(parents, tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    here = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), *map(str, parents), str(tmp_path / "eight")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert merge(*parents, tmp_path / "one", "--ratio=0.3") == 0
    one, eight = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("one", "eight"))
    for name, x in one.items():
        np.testing.assert_allclose(eight[name], x, rtol=1e-6, atol=1e-7)
