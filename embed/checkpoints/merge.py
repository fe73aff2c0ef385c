"""Merging checkpoints on the sphere (Shoemake 1985; arXiv 2602.11151)."""

import functools

import jax
import jax.numpy as jnp

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


def merge_params(a, b, t: float, shardings):
    """`slerp` of sharded trees, compiled array by array, with each result in its sharding.

    The results take the memory of `a`, which cannot be used afterwards. The peak is both trees and one more array.
    """
    _check(a, b)

    def merge(path, x, y, sharding):
        return _merge_sharded(sharding)(_is_stacked(path), x, y, jnp.float32(t))

    return jax.tree_util.tree_map_with_path(merge, a, b, shardings)


@functools.cache
def _merge_sharded(sharding):
    return jax.jit(_merge, static_argnums=0, donate_argnums=1, out_shardings=sharding)


def _is_stacked(path) -> bool:
    return any(getattr(key, "key", None) == "layers" for key in path)


def _merge(stacked: bool, a, b, t):
    a, b = jnp.asarray(a), jnp.asarray(b)
    return jax.vmap(_slerp_tensor, (0, 0, None))(a, b, t) if stacked else _slerp_tensor(a, b, t)


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
