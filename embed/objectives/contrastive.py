"""Contrastive losses of the three stages (arXiv 2602.11151). s is the cosine; all inputs are normalized here.

Ids are hashes of token content. Two examples with equal ids are not negatives of each other; embeddings never decide
whether two texts are equal. Arrays are global: under jit with rows sharded over devices, every query has the negatives
of all devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from embed.typing import Array, Scalar, typechecked

_TINY = 1e-24  # a vector with a smaller squared norm counts as an empty slot


def normalize(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """x / ‖x‖ in at least float32. An empty (zero) vector stays zero and gets no gradient: neither 0/0 nor g/√ε."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jnp.where(square > _TINY, jax.lax.rsqrt(jnp.maximum(square, _TINY)), 0)


def cosine(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """Dot products of normalized rows, at full precision on every platform."""
    return jnp.einsum("nd,md->nm", a, b, precision=jax.lax.Precision.HIGHEST)


def _nll(positive: Float[Array, "N"], terms: list[tuple[Array, Array]], temperature) -> Float[Array, "N"]:
    """-log( e^{s+/τ} / (e^{s+/τ} + Σ e^{s/τ}) ) over the cosines of each (scores [N, M], allowed bool[N, M])."""
    logits = [positive[:, None]] + [jnp.where(allowed, scores, -jnp.inf) for scores, allowed in terms]
    return jax.nn.logsumexp(jnp.concatenate(logits, 1) / temperature, axis=1) - positive / temperature


def _mean(values: Float[Array, "N"], valid: Bool[Array, "N"]) -> Float[Array, ""]:
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def _all(n: int, valid: Array | None) -> Bool[Array, "n"]:
    return jnp.ones(n, bool) if valid is None else valid


def _same(ids: Array | None, other: Array | None = None) -> Array | bool:
    """Whether content is equal, [N, M]; False if there are no ids."""
    return False if ids is None else ids[:, None] == (ids if other is None else other)[None, :]


def _within(scores: Float[Array, "N M"], positive: Float[Array, "N"], margin: Scalar | None) -> Array | bool:
    """m_i(x) of the losses, bool[N, M]: whether s(q_i, x) exceeds that of the positive by at most `margin`."""
    return True if margin is None else scores <= positive[:, None] + margin


@typechecked
def pair_loss(
    queries: Float[Array, "N D"],
    documents: Float[Array, "N D"],
    *,
    temperature: Scalar,
    margin: Scalar | None = 0.1,
    query_ids: Int[Array, "N"] | None = None,
    document_ids: Int[Array, "N"] | None = None,
    valid: Bool[Array, "N"] | None = None,
    query_negatives: bool = True,
) -> Float[Array, ""]:
    """InfoNCE over in-batch documents and in-batch queries with a false-negative mask (arXiv 2602.11151).

        L = -(1/N) Σ_i log  e^{s(q_i,d_i)/τ} /
            ( e^{s(q_i,d_i)/τ} + Σ_{j≠i} m_i(d_j) e^{s(q_i,d_j)/τ} + Σ_{j≠i} m_i(q_j) e^{s(q_i,q_j)/τ} )
        m_i(x) = 1[ s(q_i,x) <= s(q_i,d_i) + margin ]

    Examples that share a query id or a document id are not negatives of each other in either sum. The mean is over
    valid examples; invalid examples are never negatives. With margin=None, m is 1; without `query_negatives`, the sum
    over queries is left out.
    """
    n = queries.shape[0]
    q, d, valid = normalize(queries), normalize(documents), _all(n, valid)
    qd = cosine(q, d)
    positive = jnp.diagonal(qd)
    other = ~jnp.eye(n, dtype=bool) & valid & ~(_same(query_ids) | jnp.asarray(_same(document_ids)))
    terms = [qd, cosine(q, q)] if query_negatives else [qd]
    return _mean(_nll(positive, [(s, other & _within(s, positive, margin)) for s in terms], temperature), valid)


@typechecked
def contextual_loss(
    queries: Float[Array, "N D"],
    chunks: Float[Array, "C D"],
    documents: Float[Array, "N D"],
    *,
    positive: Int[Array, "N"],
    chunk_document: Int[Array, "C"],
    temperature: Scalar,
    beta: Scalar,
    alpha: Scalar = 0.2,
    margin: Scalar | None = 0.1,
    query_ids: Int[Array, "N"] | None = None,
    chunk_ids: Int[Array, "C"] | None = None,
    valid: Bool[Array, "N"] | None = None,
    chunk_valid: Bool[Array, "C"] | None = None,
    query_negatives: bool = True,
) -> Float[Array, ""]:
    """Chunk- and document-level InfoNCE for late chunking (arXiv 2602.11151).

        L        = β L_global + (1 - β) (α L_seq + (1 - α) L_batch)
        L_seq    : the positive chunk against the chunks of its document
        L_batch  : the positive chunk against every chunk of the batch
        L_global : -(1/N) Σ_i log e^{s(q_i,d_i)/τ} /
                   ( Σ_j Mdup_ij m_i(d_j) e^{s(q_i,d_j)/τ} + Σ_{j≠i} m_i(q_j) e^{s(q_i,q_j)/τ} )

    `documents[i]` is the whole document of query i. `positive[i]` is the index of its chunk in `chunks`.
    `chunk_document[c]` is the content id of the document that contains chunk c. Mdup removes every j≠i whose document
    has the content of d_i, in the query–document sum only. The margin applies in L_global only. An example is a query
    with its positive chunk. Examples that share a query id or a chunk id are not negatives of each other in any term,
    and neither is a chunk with the content of the positive. `margin` and `query_negatives` are as in `pair_loss`.
    """
    n, c = queries.shape[0], chunks.shape[0]
    q, k, d = normalize(queries), normalize(chunks), normalize(documents)
    chunk_valid = _all(c, chunk_valid)
    valid = _all(n, valid) & chunk_valid[positive]
    document_ids = chunk_document[positive]
    positive_ids = None if chunk_ids is None else chunk_ids[positive]

    is_positive = jax.nn.one_hot(positive, c, dtype=bool)  # N C
    # Chunks that are the positive of an example with the same query.
    twin = jnp.asarray(_same(query_ids)) & valid[None, :] if query_ids is not None else jnp.zeros((n, n), bool)
    answers_twin = (twin.astype(jnp.float32) @ is_positive.astype(jnp.float32)) > 0  # N C
    same_chunk = _same(positive_ids, chunk_ids)
    allowed = chunk_valid & ~is_positive & ~(answers_twin | same_chunk)
    qk = cosine(q, k)
    chunk_score = jnp.take_along_axis(qk, positive[:, None], 1)[:, 0]
    same_document = _same(document_ids, chunk_document)
    seq = _nll(chunk_score, [(qk, allowed & same_document)], temperature)
    batch = _nll(chunk_score, [(qk, allowed)], temperature)

    qd = cosine(q, d)
    document_score = jnp.diagonal(qd)
    other = ~jnp.eye(n, dtype=bool) & valid & ~(twin | jnp.asarray(_same(positive_ids)))
    terms = [(qd, other & ~_same(document_ids))] + ([(cosine(q, q), other)] if query_negatives else [])
    global_ = _nll(document_score, [(s, ok & _within(s, document_score, margin)) for s, ok in terms], temperature)
    local = alpha * _mean(seq, valid) + (1 - alpha) * _mean(batch, valid)
    return beta * _mean(global_, valid) + (1 - beta) * local


@typechecked
def triplet_loss(
    queries: Float[Array, "N D"],
    documents: Float[Array, "N D"],
    negatives: Float[Array, "N K D"],
    *,
    temperature: Scalar,
    query_ids: Int[Array, "N"] | None = None,
    document_ids: Int[Array, "N"] | None = None,
    negative_ids: Int[Array, "N K"] | None = None,
    valid: Bool[Array, "N"] | None = None,
    negative_valid: Bool[Array, "N K"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE over all documents and all hard negatives of the batch (arXiv 2602.11151), without queries and margin.

        L = -(1/N) Σ_i log e^{s(q_i,d_i)/τ} / ( Σ_j e^{s(q_i,d_j)/τ} + Σ_j Σ_k e^{s(q_i,d^h_jk)/τ} )

    Every query is compared with the documents and negatives of all examples, except those with the content of its own
    positive and the documents of examples with the same query id. The negatives of an invalid example do not count.
    """
    n, k, dim = negatives.shape
    q, d, h = normalize(queries), normalize(documents), normalize(negatives.reshape(n * k, dim))
    valid = _all(n, valid)
    negative_valid = jnp.broadcast_to(valid[:, None], (n, k)) & (True if negative_valid is None else negative_valid)
    negative_ids = None if negative_ids is None else negative_ids.reshape(n * k)
    qd = cosine(q, d)
    other = ~jnp.eye(n, dtype=bool) & valid & ~(_same(query_ids) | jnp.asarray(_same(document_ids)))
    content = _same(document_ids, negative_ids) if document_ids is not None and negative_ids is not None else False
    hard = jnp.broadcast_to(negative_valid.reshape(n * k) & ~jnp.asarray(content), (n, n * k))
    positive = jnp.diagonal(qd)
    return _mean(_nll(positive, [(qd, other), (cosine(q, h), hard)], temperature), valid)


@typechecked
def spread_out(
    vectors: Float[Array, "N D"], *, ids: Int[Array, "N"] | None = None, valid: Bool[Array, "N"] | None = None
) -> Float[Array, ""]:
    """Global orthogonal regularization (Zhang et al. 2017, arXiv 1708.06320, equation 6), over pairs of unequal texts.

        L = M1² + max(0, M2 - 1/D),    M1 = mean s(x_i, x_j),    M2 = mean s(x_i, x_j)²,    i≠j

    These are the moments of vectors that are uniform on the sphere. The bits of such vectors carry most.
    """
    n, dim = vectors.shape
    valid, x = _all(n, valid), normalize(vectors)
    scores = cosine(x, x)
    pairs = ~jnp.eye(n, dtype=bool) & valid[:, None] & valid & ~jnp.asarray(_same(ids))
    count = jnp.maximum(pairs.sum(), 1)
    first, second = (jnp.where(pairs, s, 0).sum() / count for s in (scores, scores**2))
    return first**2 + jnp.maximum(second - 1 / dim, 0)
