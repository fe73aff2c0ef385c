"""Merging checkpoints on the sphere (Shoemake 1985; arXiv 2602.11151), or linearly."""

import functools

import jax
import jax.numpy as jnp

METHODS = ("slerp", "linear")
PARALLEL = 1e-6  # two tensors count as parallel if the sine of their angle is below this


def slerp(a, b, t: float):
    """Spherical interpolation of two parameter trees, weight by weight: t=0 gives a, t=1 gives b.

        slerp(a, b; t) = sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b,    cos Ω = <a, b> / (‖a‖ ‖b‖)

    Each weight is one flat vector with its own Ω, computed in at least float32. An array under `layers` is stacked and
    contains one weight per layer. Parallel, antiparallel and zero weights are mixed linearly. Both trees must have the
    same structure and shapes.
    """
    _check(a, b)
    return jax.tree_util.tree_map_with_path(lambda path, x, y: _merge(_is_stacked(path), x, y, t), a, b)


def linear(a, b, t: float):
    """(1 - t) · a + t · b of two parameter trees, in at least float32."""
    _check(a, b)
    return jax.tree.map(lambda x, y: _linear(jnp.asarray(x), jnp.asarray(y), t), a, b)


def check_method(method: str) -> None:
    """ValueError unless there is a merge of this name."""
    if method not in METHODS:
        raise ValueError(f"the method {method!r} of a merge must be one of {', '.join(METHODS)}")


def merge_params(a, b, t: float, shardings, method: str = "slerp"):
    """`slerp` or `linear` of sharded trees, compiled array by array, with each result in its sharding.

    The results take the memory of `a`, which cannot be used afterwards. The peak is both trees and one more array.
    """
    _check(a, b)
    check_method(method)

    def merge(path, x, y, sharding):
        return _merge_sharded(sharding)(method == "linear", _is_stacked(path), x, y, jnp.float32(t))

    return jax.tree_util.tree_map_with_path(merge, a, b, shardings)


@functools.cache
def _merge_sharded(sharding):
    def merge(is_linear: bool, stacked: bool, a, b, t):
        return _linear(a, b, t) if is_linear else _merge(stacked, a, b, t)

    return jax.jit(merge, static_argnums=(0, 1), donate_argnums=2, out_shardings=sharding)


def _is_stacked(path) -> bool:
    return any(getattr(key, "key", None) == "layers" for key in path)


def _merge(stacked: bool, a, b, t):
    a, b = jnp.asarray(a), jnp.asarray(b)
    return jax.vmap(_slerp_tensor, (0, 0, None))(a, b, t) if stacked else _slerp_tensor(a, b, t)


def _linear(a, b, t):
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return ((1 - t) * a.astype(dtype) + t * b.astype(dtype)).astype(a.dtype)


def _check(a, b) -> None:
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"cannot merge trees with different structures: {jax.tree.structure(a)} and {jax.tree.structure(b)}"
        )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(f"cannot merge tensors of shapes {jnp.shape(x)} and {jnp.shape(y)}")


def _slerp_tensor(a, b, t):
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    x, y = a.astype(dtype), b.astype(dtype)
    norm_x, norm_y = jnp.linalg.norm(x), jnp.linalg.norm(y)
    u, v = x / jnp.where(norm_x > 0, norm_x, 1), y / jnp.where(norm_y > 0, norm_y, 1)
    # arccos would lose half the digits for close tensors, such as those of two fine-tuned siblings.
    omega = 2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v))
    omega = jnp.where((norm_x > 0) & (norm_y > 0), omega, 0.0)
    sin = jnp.sin(omega)
    spherical = sin > PARALLEL
    safe = jnp.where(spherical, sin, 1)
    weight_a = jnp.where(spherical, jnp.sin((1 - t) * omega) / safe, 1 - t)
    weight_b = jnp.where(spherical, jnp.sin(t * omega) / safe, t)
    return (weight_a * x + weight_b * y).astype(a.dtype)
