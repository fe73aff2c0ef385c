"""Merging checkpoints on the sphere (Shoemake 1985; arXiv 2602.11151)."""

import jax
import jax.numpy as jnp

PARALLEL = 1e-6  # sin of the angle below which two tensors count as parallel and are mixed linearly


def slerp(a, b, t: float):
    """Spherical interpolation of two parameter trees, tensor by tensor; t=0 gives a, t=1 gives b.

        slerp(a, b; t) = sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b,    cos Ω = <a, b> / (‖a‖ ‖b‖)

    Each tensor is one flat vector with its own Ω, computed in at least float32; parallel, antiparallel and zero
    tensors are mixed linearly. The trees must agree in structure and shapes.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"cannot merge trees of different structure: {jax.tree.structure(a)} and {jax.tree.structure(b)}"
        )
    return jax.tree.map(lambda x, y: _slerp_tensor(x, y, t), a, b)


def _slerp_tensor(a, b, t):
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"cannot merge tensors of shapes {a.shape} and {b.shape}")
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    x, y = a.astype(dtype), b.astype(dtype)
    norm_x, norm_y = jnp.linalg.norm(x), jnp.linalg.norm(y)
    u, v = x / jnp.where(norm_x > 0, norm_x, 1), y / jnp.where(norm_y > 0, norm_y, 1)
    # Not arccos: it loses half the digits when the tensors are close, as fine-tuned siblings are.
    omega = 2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v))
    omega = jnp.where((norm_x > 0) & (norm_y > 0), omega, 0.0)
    sin = jnp.sin(omega)
    spherical = sin > PARALLEL
    safe = jnp.where(spherical, sin, 1)
    weight_a = jnp.where(spherical, jnp.sin((1 - t) * omega) / safe, 1 - t)
    weight_b = jnp.where(spherical, jnp.sin(t * omega) / safe, t)
    return (weight_a * x + weight_b * y).astype(a.dtype)
