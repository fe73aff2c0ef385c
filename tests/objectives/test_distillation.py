"""The losses of distillation against plain loops (reference.py): values and gradients, in float64 and float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed.objectives import distillation

N, D, T = 7, 5, 8
LOSSES = {"cosine_loss": [(N, D), (N, D)], "squared_error": [(N, D), (N, D)], "similarity_kl": [(N, D), (N, T)]}
VALID = {"valid": np.arange(N) % 3 != 2}
IDS = {"ids": np.array([1, 2, 3, 1, 5, 2, 2])}
CASES = {
    "cosine_loss": {"plain": {}, "padding": VALID},
    "squared_error": {"plain": {}, "padding": VALID},
    "similarity_kl": {
        "plain": {},
        "cold": {"temperature": 0.05},
        "equal texts": IDS,
        "padding": VALID,
        "one text has no others": {"ids": np.array([1, 1, 1, 1, 1, 1, 2]), "valid": np.arange(N) < 6},
        "everything": IDS | VALID,
    },
}


def random_arrays(name):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in LOSSES[name]]


def required(name):
    return {"temperature": 0.2} if name == "similarity_kl" else {}


def value_and_grad(name, arrays, dtype=np.float32, **kwargs):
    def loss(arrays):
        return getattr(distillation, name)(*arrays, **(required(name) | kwargs))

    with jax.enable_x64(dtype == np.float64):
        return jax.jit(jax.value_and_grad(loss))([a.astype(dtype) for a in arrays])


def check(name, arrays, **kwargs):
    """Value and gradients equal those of the reference: 1e-6 in float64, 1e-4 in float32."""

    def plain(*xs):
        return getattr(reference, name)(*xs, **(required(name) | kwargs))

    want, gradients = plain(*arrays), reference.gradient(plain, arrays)
    scale = max(np.abs(g).max() for g in gradients)
    for dtype, tolerance in ((np.float64, 1e-6), (np.float32, 1e-4)):
        value, got = value_and_grad(name, arrays, dtype, **kwargs)
        assert value.dtype == dtype and value.shape == ()
        np.testing.assert_allclose(value, want, rtol=tolerance, atol=1e-12 if dtype == np.float64 else 1e-6)
        for g, w in zip(got, gradients):
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name, case", [(name, case) for name in CASES for case in CASES[name]])
def test_loss_and_gradients_equal_the_reference(name, case):
    check(name, random_arrays(name), **CASES[name][case])


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_with_nothing_valid_is_zero_with_zero_gradients(name):
    value, gradients = value_and_grad(name, random_arrays(name), valid=np.zeros(N, bool))
    assert value == 0
    for g in gradients:
        np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_slot_gets_no_gradient_and_changes_nothing(name):
    arrays, valid = random_arrays(name), np.arange(N) != 3
    for a in arrays:
        a[3] = 0
    check(name, arrays, valid=valid)
    value, gradients = value_and_grad(name, arrays, valid=valid)
    for g in gradients:
        np.testing.assert_array_equal(g[3], 0)
    others = [np.delete(a, 3, axis=0) for a in arrays]
    np.testing.assert_allclose(value, value_and_grad(name, others)[0], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_loss(name):
    (student, _), kwargs = random_arrays(name), IDS if name == "similarity_kl" else {}
    np.testing.assert_allclose(value_and_grad(name, [student, student], **kwargs)[0], 0, atol=1e-6)
    assert value_and_grad(name, [student, np.roll(student, 1, 0)], **kwargs)[0] > 0.1


def test_only_the_squared_error_depends_on_the_lengths_of_the_vectors():
    for name in LOSSES:
        student, teacher = random_arrays(name)
        values = [value_and_grad(name, [scale * student, teacher])[0] for scale in (1, 127)]
        assert (abs(values[1] / values[0] - 1) < 1e-4) == (name != "squared_error")


def test_bfloat16_vectors_are_compared_in_float32():
    for name in LOSSES:
        student, teacher = random_arrays(name)
        value = getattr(distillation, name)(jnp.asarray(student, jnp.bfloat16), jnp.float32(teacher), **required(name))
        assert value.dtype == jnp.float32
