"""Pooling over spans, the only one in the package (ARCHITECTURE.md; arXiv 2602.11151)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from embed.typing import Array, typechecked

POOLINGS = ("mean", "last")


@typechecked
def pool_spans(
    hidden: Float[Array, "R L D"], span_ids: Int[Array, "R L"], num_spans: int, pooling: str = "mean"
) -> Float[Array, "R S D"]:
    """One vector for each span 1..num_spans, in at least float32: the mean of its hidden states, or the last of them.

    Tokens with span id 0 belong to no span. A span without tokens is a zero vector and passes no gradient.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
    hidden = jnp.asarray(hidden)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    if pooling == "last":
        member = jax.nn.one_hot(span_ids - 1, num_spans, dtype=jnp.int32, axis=1)  # R S L
        last = (member * jnp.arange(1, hidden.shape[1] + 1)).max(-1)[..., None] - 1  # R S 1; -1 = no token
        return jnp.where(last < 0, 0, jnp.take_along_axis(hidden, jnp.maximum(last, 0), 1).astype(dtype))
    member = jax.nn.one_hot(span_ids - 1, num_spans, dtype=dtype, axis=1)  # R S L; id 0 -> -1 -> all zero
    totals = jnp.einsum("rsl,rld->rsd", member, hidden.astype(dtype))
    return totals / jnp.maximum(member.sum(-1, keepdims=True), 1)
