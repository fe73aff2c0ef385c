import jax
import numpy as np
import pytest

from embed.models import quantization


def vectors(shape=(6, 32)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_int8_is_the_rounded_squashed_vector():
    v = np.concatenate([vectors().ravel(), [0, 20, -20, -0.001, 0.0039, 0.0040]]).astype(np.float32)
    got = quantization.int8(v)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, np.round(127 * np.tanh(v.astype(np.float64))))
    assert got.min() == -127 and got.max() == 127


def test_straight_through_has_the_values_of_int8_and_the_gradient_of_the_squashing():
    v, weights = vectors(), np.random.default_rng(1).normal(size=(6, 32)).astype(np.float32)
    values, pull = jax.vjp(quantization.straight_through_int8, v)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.asarray(quantization.int8(v), np.float32), atol=1e-5)
    np.testing.assert_allclose(pull(weights)[0], weights * 127 / np.cosh(v.astype(np.float64)) ** 2, rtol=1e-5)


def test_binary_is_the_sign_of_the_pooled_vector_not_of_int8():
    v = np.array([0.5, 0.0, -0.0, -0.001, -2.0], np.float32)
    got = quantization.binary(v)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, [1, 1, 1, -1, -1])
    assert quantization.int8(v)[3] == 0


def test_pack_bits_packs_as_numpy_does():
    v = vectors((2, 3, 32))
    got = quantization.pack_bits(v)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.packbits(v >= 0, axis=-1))
    np.testing.assert_array_equal(got, quantization.pack_bits(quantization.binary(v)))


@pytest.mark.parametrize("prefix", [8, 16, 24])
def test_a_matryoshka_prefix_then_packing_equals_packing_then_slicing(prefix):
    v = vectors()
    np.testing.assert_array_equal(quantization.pack_bits(v[:, :prefix]), quantization.pack_bits(v)[:, : prefix // 8])


@pytest.mark.parametrize("function", ["int8", "binary", "straight_through_int8"])
def test_a_matryoshka_prefix_commutes_with_quantization(function):
    v, quantize = vectors(), getattr(quantization, function)
    np.testing.assert_array_equal(quantize(v[:, :5]), quantize(v)[:, :5])


def test_packing_dimensions_that_do_not_fill_bytes_is_an_error():
    with pytest.raises(ValueError, match="multiple of 8 dimensions, got 12"):
        quantization.pack_bits(vectors((2, 12)))
