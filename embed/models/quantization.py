"""Quantized embeddings (arXiv 2602.11151): int8 in training and at inference, binary at inference.

All functions but `pack_bits` are element-wise, so they commute with taking a Matryoshka prefix. Take the prefix before
packing bits.
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


# What a contrastive stage may do to pooled vectors before it compares them; `int8` is the paper's.
QUANTIZERS = {"int8": straight_through_int8, "tanh": jnp.tanh, "none": lambda pooled: pooled}


@typechecked
def binary(pooled: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """+1 where v >= 0, else -1. Takes the pooled vector, not int8: a small negative v has int8 0 but binary -1."""
    return jnp.where(pooled >= 0, 1, -1).astype(jnp.int8)


@typechecked
def pack_bits(vectors: Shaped[Array, "*shape D"]) -> UInt8[Array, "*shape Dbytes"]:
    """One bit per dimension (v >= 0), eight per byte, the first dimension in the highest bit. Compare with Hamming.

    Takes pooled or ±1 vectors. D must be a multiple of 8.
    """
    if vectors.shape[-1] % 8:
        raise ValueError(f"pack_bits needs a multiple of 8 dimensions, got {vectors.shape[-1]}")
    return jnp.packbits(vectors >= 0, axis=-1)
