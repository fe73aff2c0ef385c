"""Bidirectional attention inside segments: one function for every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from embed.typing import Array, typechecked


@typechecked
def attention(
    query: Float[Array, "R L H d"],
    key: Float[Array, "R L K d"],
    value: Float[Array, "R L K d"],
    segment_ids: Int[Array, "R L"],
) -> Float[Array, "R L H d"]:
    """Grouped-query attention in which a token sees exactly the tokens of its own segment, before and after it.

    Two segments of lengths 2 and 1 and one padding token, segment_ids [1, 1, 2, 0]; rows see columns:

        1 1 . .
        1 1 . .
        . . 1 .
        . . . 1

    Padding has segment id 0 and sees only padding, so its (unused) output stays finite. Scores are scaled by
    1/√d, softmax runs in float32. Holds [R, H, L, L] scores.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads in front of positions: on CPU the score and value products then are plain matrix products (13% of a step).
    query = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)  # R K h L d
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # R K L d
    scores = jnp.einsum("rkhqd,rksd->rkhqs", query * head_dim**-0.5, key, preferred_element_type=jnp.float32)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]  # R q s
    scores = jnp.where(same_segment[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("rkhqs,rksd->rkhqd", weights, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)
