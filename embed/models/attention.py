"""Bidirectional attention inside segments: one function for every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from embed.typing import Array, typechecked

# Scores of a row and head that are held at once: all of them up to 1,024 tokens, blocks of queries beyond.
MAX_SCORES = 2**20


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
    1/√d, softmax runs in float32. Holds [R, H, b, L] scores, with b queries at a time so that b · L ≤ MAX_SCORES, in the
    backward pass as well.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads in front of positions: on CPU the score and value products then are plain matrix products (13% of a step).
    query = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)  # R K h L d
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # R K L d

    def attend(query, query_segments):  # R K h b d, R b
        scores = jnp.einsum("rkhqd,rksd->rkhqs", query * head_dim**-0.5, key, preferred_element_type=jnp.float32)
        same_segment = query_segments[:, :, None] == segment_ids[:, None, :]  # R b s
        scores = jnp.where(same_segment[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("rkhqs,rksd->rkhqd", weights, value)

    block = block_size(length)
    if block == length:
        out = attend(query, segment_ids)
    else:
        queries = jnp.moveaxis(query.reshape(*query.shape[:3], -1, block, head_dim), 3, 0)  # L/b R K h b d
        segments = jnp.moveaxis(segment_ids.reshape(rows, -1, block), 1, 0)  # L/b R b
        blocks = jax.lax.map(jax.checkpoint(lambda x: attend(*x)), (queries, segments))
        out = jnp.moveaxis(blocks, 0, 3).reshape(query.shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def block_size(length: int) -> int:
    """The most queries that divide `length` and, against all keys, give at most MAX_SCORES scores."""
    most = min(length, max(1, MAX_SCORES // length))
    return next(b for b in range(most, 0, -1) if length % b == 0)
