"""Losses that teach a student the vectors of a teacher. All are means over the valid texts of the batch.

s_i and t_i are the vectors of text i by the student and by the teacher. `cosine_loss` and `squared_error` compare them
directly, so both have the same dimensions. `similarity_kl` compares only which texts are similar to which, so the
student may have fewer or more dimensions. Ids are hashes of token content, as in `contrastive`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from embed.objectives.contrastive import cosine, normalize
from embed.typing import Array, Scalar, typechecked


def _mean(values: Float[Array, "N"], valid: Bool[Array, "N"] | None) -> Float[Array, ""]:
    valid = jnp.ones(len(values), bool) if valid is None else valid
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


@typechecked
def cosine_loss(
    student: Float[Array, "N D"], teacher: Float[Array, "N D"], *, valid: Bool[Array, "N"] | None = None
) -> Float[Array, ""]:
    """The distance of directions: L = (1/N) Σ_i (1 - cos(s_i, t_i)), half the squared distance of unit vectors."""
    return _mean(1 - (normalize(student) * normalize(teacher)).sum(-1), valid)


@typechecked
def squared_error(
    student: Float[Array, "N D"], teacher: Float[Array, "N D"], *, valid: Bool[Array, "N"] | None = None
) -> Float[Array, ""]:
    """The mean squared error of vectors that are not normalized: L = (1/(N D)) Σ_i ‖s_i - t_i‖²."""
    return _mean(jnp.square(student - teacher).mean(-1), valid)


@typechecked
def similarity_kl(
    student: Float[Array, "N D"],
    teacher: Float[Array, "N T"],
    *,
    temperature: Scalar,
    ids: Int[Array, "N"] | None = None,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """KL divergence of in-batch similarities: each text is compared with the other texts of the batch.

        L    = (1/N) Σ_i Σ_j p_ij log(p_ij / q_ij)
        p_ij = e^{cos(t_i,t_j)/τ} / Σ_k e^{cos(t_i,t_k)/τ}        q_ij likewise of the student

    j and k are the valid texts with another id than i. The mean is over valid texts that have such texts.
    """
    n = student.shape[0]
    other = ~jnp.eye(n, dtype=bool) if ids is None else ids[:, None] != ids[None, :]
    if valid is not None:
        other &= valid[:, None] & valid[None, :]
    counted = other.any(1)
    compared = other | ~counted[:, None]  # a row without others would be 0/0

    def log_softmax(x):
        logits = jnp.where(compared, cosine(x, x) / temperature, -jnp.inf)
        return jnp.where(compared, jax.nn.log_softmax(logits, axis=1), 0)

    log_p, log_q = log_softmax(normalize(teacher)), log_softmax(normalize(student))
    return _mean(jnp.where(other, jnp.exp(log_p) * (log_p - log_q), 0).sum(1), counted)
