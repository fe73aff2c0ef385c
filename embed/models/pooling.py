"""Mean pooling over spans, the only pooling in the package (ARCHITECTURE.md; arXiv 2602.11151)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from embed.typing import Array, typechecked


@typechecked
def pool_spans(hidden: Float[Array, "R L D"], span_ids: Int[Array, "R L"], num_spans: int) -> Float[Array, "R S D"]:
    """The mean of the hidden states of each span 1..num_spans, in at least float32.

    Tokens with span id 0 belong to no span. A span without tokens is a zero vector and passes no gradient.
    """
    hidden = jnp.asarray(hidden)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    member = jax.nn.one_hot(span_ids - 1, num_spans, dtype=dtype, axis=1)  # R S L; id 0 -> -1 -> all zero
    totals = jnp.einsum("rsl,rld->rsd", member, hidden.astype(dtype))
    return totals / jnp.maximum(member.sum(-1, keepdims=True), 1)
