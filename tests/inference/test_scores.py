import numpy as np
import pytest

from embed.inference import quantize, similarity

VECTORS = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)


def cosine(a, b):
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("int8", "int8"), ("float32", "int8"), ("int8", "float32")])
def test_floats_and_int8_are_compared_by_cosine_also_with_each_other(kinds):
    a, b = (quantize(vectors, kind) for vectors, kind in zip((VECTORS[:5], VECTORS[5:]), kinds))
    got = similarity(a, b)
    assert got.shape == (5, 7) and got.dtype == np.float32
    np.testing.assert_allclose(got, cosine(a, b), atol=1e-6)
    assert not similarity(np.zeros((1, 64), np.float32), b).any()


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_are_compared_by_the_cosine_of_their_signs(precision):
    a, b = quantize(VECTORS[:5], precision), quantize(VECTORS[5:], precision)
    signs = np.where(VECTORS >= 0, 1, -1)
    np.testing.assert_allclose(similarity(a, b, precision), cosine(signs[:5], signs[5:]), atol=1e-6)
    if precision == "ubinary":
        np.testing.assert_array_equal(similarity(a, b), similarity(a, b, precision))


def test_vectors_that_are_not_of_one_kind_are_refused():
    int8, bits, binary = (quantize(VECTORS, kind) for kind in ("int8", "ubinary", "binary"))
    for a, b, precision, sentence in (
        (int8[:, :8], bits, None, "a is int8, b is uint8: they cannot be compared"),
        (VECTORS[:, :8], bits, None, "a is float32, b is uint8"),
        (bits, bits, "binary", "they cannot be compared as binary"),
        (binary, binary, "ubinary", "they cannot be compared as ubinary"),
        (int8, int8, "float32", "they cannot be compared as float32"),
        (int8, VECTORS, "int8", "they cannot be compared as int8"),
        (int8, binary, "binary", "a has 64 numbers per vector, b 8"),
        (VECTORS, VECTORS[0], None, r"b is float32\[64\], expected float32, int8 or uint8 \[N, D\]"),
        (VECTORS.astype(np.float64), VECTORS, None, "a is float64"),
        (VECTORS, VECTORS, "int4", "precision='int4' must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            similarity(a, b, precision)
