import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed.checkpoints.merge import slerp


def tensors(shape=(4, 3), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_the_ends_are_the_two_parents(shape):
    a, b = tensors(shape)
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_a_tensor_is_one_vector_on_shoemakes_arc(t):
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
    """Fine-tuned siblings: what lies between them must be right relative to their difference, not to their size."""
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
