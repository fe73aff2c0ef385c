"""Embeddings in fewer bits (arXiv 2602.11151): int8 in training and at inference, binary at inference.

Everything here acts on each number alone, so it commutes with taking a Matryoshka prefix; packing bits does not:
take the prefix first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int8, Shaped, UInt8

from embed.typing import Array, typechecked


@typechecked
def int8(pooled: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """round(127 · tanh(v)) in -127..127. Compare with cosine."""
    return jnp.round(127 * jnp.tanh(pooled)).astype(jnp.int8)


@typechecked
def straight_through_int8(pooled: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values of `int8` as floats, with the gradient of 127 · tanh(v): rounding passes gradients unchanged."""
    smooth = 127 * jnp.tanh(pooled)
    return smooth + jax.lax.stop_gradient(jnp.round(smooth) - smooth)


@typechecked
def binary(pooled: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """v >= 0 -> +1, else -1, of the pooled vector itself: a small negative v is int8 0 but binary -1."""
    return jnp.where(pooled >= 0, 1, -1).astype(jnp.int8)


@typechecked
def pack_bits(vectors: Shaped[Array, "*shape D"]) -> UInt8[Array, "*shape Dbytes"]:
    """One bit a dimension (v >= 0), eight a byte, the first dimension in the highest bit. Compare with Hamming.

    Takes pooled or ±1 vectors. D must be a multiple of 8.
    """
    if vectors.shape[-1] % 8:
        raise ValueError(f"pack_bits needs a multiple of 8 dimensions, got {vectors.shape[-1]}")
    return jnp.packbits(vectors >= 0, axis=-1)
