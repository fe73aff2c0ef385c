"""Late interaction (ColBERT, arXiv 2004.12832): texts are compared token by token, with one vector per token.

All inputs are normalized here. Ids and empty slots mean the same as in `embed.objectives.contrastive`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from embed.objectives.contrastive import normalize
from embed.typing import Array, Scalar, typechecked

SCORES = 2**24  # cosines of tokens that exist at once, 64 MiB in float32


@typechecked
def maxsim(
    queries: Float[Array, "N Q P"],
    query_valid: Bool[Array, "N Q"],
    documents: Float[Array, "M K P"],
    document_valid: Bool[Array, "M K"],
) -> Float[Array, "N M"]:
    """The score of each query and document: for each query token the best document token, summed over query tokens.

        S_ij = Σ_a max_b s(q_ia, d_jb)        over valid tokens; 0 if the query or the document has none

    It is a sum and not a mean, as in ColBERT and in `embed.inference.maxsim`. The cosines of all tokens of the batch
    never exist at once: documents are scored in blocks of about SCORES cosines, which the backward pass recomputes.
    """
    q, d = normalize(queries), normalize(documents)

    @jax.checkpoint
    def scores(document):  # K P, K -> N
        d, valid = document
        cosines = jnp.einsum("nqp,kp->nqk", q, d, precision=jax.lax.Precision.HIGHEST)
        best = jnp.where(valid, cosines, -2).max(-1)  # no cosine is as low
        return jnp.where(query_valid & valid.any(), best, 0).sum(-1)

    block = max(1, SCORES // (q.shape[0] * q.shape[1] * d.shape[1]))
    return jax.lax.map(scores, (d, document_valid), batch_size=min(block, len(d))).T


@typechecked
def late_interaction_loss(
    scores: Float[Array, "N N"],
    *,
    temperature: Scalar,
    query_ids: Int[Array, "N"] | None = None,
    document_ids: Int[Array, "N"] | None = None,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE over the documents of the batch. S = `scores` has the MaxSim of each query and document.

        L = -(1/N) Σ_i log  e^{S_ii/τ} / ( e^{S_ii/τ} + Σ_{j≠i} e^{S_ij/τ} )

    Examples that share a query id or a document id are not negatives of each other. The mean is over valid examples;
    invalid examples are never negatives.
    """
    n = len(scores)
    valid = jnp.ones(n, bool) if valid is None else valid
    compared = jnp.broadcast_to(valid, (n, n))
    for ids in (query_ids, document_ids):
        if ids is not None:
            compared &= ids[:, None] != ids[None, :]
    logits = jnp.where(compared | jnp.eye(n, dtype=bool), scores, -jnp.inf) / temperature
    nll = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
    return jnp.where(valid, nll, 0).sum() / jnp.maximum(valid.sum(), 1)
