"""Masked (absorbing-state) diffusion: corruption, ELBO and chunked cross-entropy (arXiv 2602.11151)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from embed.typing import Array, Scalar, typechecked

T_MIN = 1e-3
NOISES = ("stratified", "independent", "bell", "fixed")


def stratified_ranks(rows: int) -> np.ndarray:
    """A permutation of 0..rows-1 in van der Corput order: any block of neighboring rows spreads over the whole range.

    For a power of two this is bit reversal. A device or a microbatch holds neighboring rows, so each has its own
    stratified sample of t.
    """
    bits = max(1, (rows - 1).bit_length())
    reversed_bits = [int(f"{j:0{bits}b}"[::-1], 2) for j in range(rows)]
    return np.argsort(np.argsort(reversed_bits, kind="stable"), kind="stable")


def bell_quantile(unit):
    """The quantile function of the density 6 t (1 - t) on (0, 1), NumPy or jax: the root of 3 t² - 2 t³ = `unit`."""
    xp = jnp if isinstance(unit, jax.Array) else np
    return 0.5 - xp.sin(xp.arcsin(1 - 2 * unit) / 3)


@typechecked
def corrupt(
    key: Array,
    tokens: Int[Array, "R L"],
    valid: Bool[Array, "R L"],
    *,
    mask_id: int,
    t_min: Scalar = T_MIN,
    noise: str = "stratified",
    mask_ratio: float = 0.2,
) -> tuple[Int[Array, "R L"], Bool[Array, "R L"], Float[Array, "R"]]:
    """Draw one t per row and replace each valid token by `mask_id` with probability t. Returns (noised, masked, t).

    `noise` is the distribution of t in (t_min, 1):

        stratified   t_j = frac(u + rank_j / R), scaled. Each row's t is uniform, and the t of all rows are evenly
                     spaced, which removes most of the variance of the 1/t weights
        independent  uniform, drawn for each row (arXiv 2602.11151)
        bell         density 6 t (1 - t), stratified: fewer rows that are almost clean or almost all masks
        fixed        t = mask_ratio in every row: masked-token prediction as in LLM2Vec (arXiv 2404.05961)

    Invalid tokens are never masked.
    """
    rows, _ = tokens.shape
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}")
    key_t, key_mask = jax.random.split(key)
    u = jax.random.uniform(key_t, (rows,) if noise == "independent" else ())
    unit = u if noise == "independent" else (u + jnp.asarray(stratified_ranks(rows), u.dtype) / rows) % 1.0
    t = t_min + (1 - t_min) * (bell_quantile(unit) if noise == "bell" else unit)
    t = jnp.full_like(t, mask_ratio) if noise == "fixed" else t
    masked = (jax.random.uniform(key_mask, tokens.shape) < t[:, None]) & valid
    return jnp.where(masked, mask_id, tokens), masked, t


@functools.lru_cache
def largest_mean_t(
    rows: int, parts: int, t_min: float = T_MIN, noise: str = "stratified", mask_ratio: float = 0.2
) -> float:
    """The largest mean t of any of `parts` equal blocks of neighboring rows in `corrupt`.

    With stratified t it is the largest over all u. The mean grows with u except where a row's unit wraps from 1 to 0,
    so it is largest just before a wrap. Then that row has the unit 1 and each other row ((its rank - that row's rank)
    mod R) / R. With independent t it is the mean plus six standard deviations, at most 1.
    """
    if noise == "fixed":
        return mask_ratio
    if noise == "independent":
        return min(1.0, t_min + (1 - t_min) * (0.5 + 6 * (12 * rows / parts) ** -0.5))
    largest = 0.0
    for block in stratified_ranks(rows).reshape(parts, -1):
        for wrapping in block:
            units = np.where(block == wrapping, rows, (block - wrapping) % rows) / rows
            largest = max(largest, float((bell_quantile(units) if noise == "bell" else units).mean()))
    return t_min + (1 - t_min) * largest


def capacity(rows: int, length: int, shards: int = 1, microbatches: int = 1, **noise) -> float:
    """The share of a block's tokens that need slots in `masked_nll`: the largest mean t plus six standard deviations.

    A block is what a device holds at a time: rows / shards / microbatches neighboring rows of `length` tokens. The
    standard deviation of its number of masked tokens is at most √tokens / 2, that of fair coins. A block of one row may
    be masked completely. `noise` has the keywords of `corrupt`.
    """
    parts = shards * microbatches
    if rows % parts:
        raise ValueError(
            f"{rows} rows per batch do not divide into {shards} devices (data x fsdp) times microbatches={microbatches}"
        )
    return min(1.0, largest_mean_t(rows, parts, **noise) + 3 / (rows // parts * length) ** 0.5)


def elbo_weights(t: Float[Array, "R"], valid: Bool[Array, "R L"]) -> Float[Array, "R"]:
    """The ELBO's weight of the cross-entropy of a row's masked tokens: 1 / (t · number of valid tokens).

    It assumes a uniform t. Under another distribution p(t), the loss weights the noise levels by p(t).
    """
    t = jnp.asarray(t)
    return 1 / (t.astype(jnp.promote_types(t.dtype, jnp.float32)) * jnp.maximum(valid.sum(), 1))


@typechecked
def elbo_loss(
    token_nll: Num[Array, "R L"], masked: Bool[Array, "R L"], t: Float[Array, "R"], valid: Bool[Array, "R L"]
) -> Float[Array, ""]:
    """L = (1 / number of valid tokens) · Σ_rows (1 / t) · Σ_masked CE(x_i), in nats per token.

    An upper bound on the negative log-likelihood per token, in at least float32; 0 if no token is valid.
    """
    dtype = jnp.promote_types(token_nll.dtype, jnp.float32)
    return (jnp.where(masked, token_nll.astype(dtype), 0) * elbo_weights(t, valid)[:, None]).sum()


def left_shift(hidden: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
    """Predict token i from the state at i - 1, as in a causal language model (arXiv 2602.11151).

    The shift runs over the whole L axis. The first token of a segment has no predecessor in it and must not be `valid`.
    """
    return jnp.roll(hidden, 1, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
@typechecked
def weighted_nll(
    hidden: Float[Array, "N D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "N"], Bool[Array, "N"]]:
    """Σ weights · CE with logits hidden · embeddingᵀ, each token's CE, and whether its target is the most likely token.

    Holds the logits of `chunk` tokens at once, never [N, V]; `chunk` must divide N. Losses are at least float32;
    products have the dtype of `hidden`. Only the sum has a gradient, for hidden and embedding. Because the weights are
    known, the gradient is computed together with each chunk's logits, so no backward pass computes the logits again.
    """
    return _in_chunks(hidden, embedding, targets, weights, chunk, differentiate=False)[0]


def _in_chunks(hidden, embedding, targets, weights, chunk: int, differentiate: bool):
    """(results, gradients of hidden and embedding) of `weighted_nll`; gradients are None unless `differentiate`."""
    tokens, width = hidden.shape
    if tokens % chunk:
        raise ValueError(f"chunk={chunk} must divide the {tokens} tokens")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    table = embedding.astype(hidden.dtype)

    def one(table_gradient, xs):  # the gradient is [D, V], which is faster with XLA's CPU compiler
        h, target, weight = xs
        logits = jnp.einsum("nd,vd->nv", h, table, preferred_element_type=dtype)
        target_logit = jnp.take_along_axis(logits, target[:, None], 1)[:, 0]
        log_total = jax.nn.logsumexp(logits, -1)
        results = log_total - target_logit, target_logit >= logits.max(-1)
        if not differentiate:
            return None, (results, None)
        is_target = target[:, None] == jnp.arange(logits.shape[1])
        gradient = weight[:, None] * (jnp.exp(logits - log_total[:, None]) - is_target)
        gradient = gradient.astype(hidden.dtype)
        table_gradient += jnp.einsum("nd,nv->dv", h, gradient, preferred_element_type=dtype)
        return table_gradient, (results, gradient @ table)

    chunks = [x.reshape(-1, chunk, *x.shape[1:]) for x in (hidden, targets, weights.astype(dtype))]
    start = jnp.zeros((width, len(embedding)), dtype) if differentiate else None
    table_gradient, (results, hidden_gradient) = jax.lax.scan(one, start, chunks)
    nll, correct = (x.reshape(tokens) for x in results)
    gradients = None
    if differentiate:
        gradients = hidden_gradient.reshape(tokens, width), table_gradient.T.astype(embedding.dtype)
    return ((weights * nll).sum(), nll, correct), gradients


def _weighted_nll_backward(chunk, gradients, cotangents):
    return *((cotangents[0] * x).astype(x.dtype) for x in gradients), None, None


weighted_nll.defvjp(functools.partial(_in_chunks, differentiate=True), _weighted_nll_backward)


@typechecked
def masked_nll(
    hidden: Float[Array, "R L D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "R L"],
    masked: Bool[Array, "R L"],
    weights: Float[Array, "R"],
    *,
    capacity: float,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "R L"], Bool[Array, "R L"], Bool[Array, "R L"]]:
    """`weighted_nll` of the masked tokens only: (sum, nll, correct, counted), 0 and False at all other tokens.

    `weights` has one weight per row, for all its tokens. With stratified t about half of the tokens are masked, and the
    vocabulary product is most of a small step. There are slots for `capacity` (a fraction) of the tokens, rounded up to
    whole chunks of `chunk`. Masked tokens without a slot are not in the sum and not `counted`: the caller must report
    their number. Tokens move between rows, so a batch over several devices needs one call on each device's rows.
    """
    hidden, targets, masked = jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(masked)
    rows, length, width = hidden.shape
    size = rows * length
    chunk = min(chunk, size)
    num_slots = -(-int(np.ceil(min(capacity, 1) * size)) // chunk) * chunk
    flat = masked.reshape(size)
    slot = jnp.cumsum(flat) - 1  # of each masked token
    counted = flat & (slot < num_slots)
    token = jnp.zeros(num_slots, jnp.int32)  # in each slot
    token = token.at[jnp.where(counted, slot, num_slots)].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    used = jnp.arange(num_slots) < counted.sum()
    total, nll, correct = weighted_nll(
        hidden.reshape(size, width)[token],
        embedding,
        targets.reshape(size)[token],
        jnp.where(used, jnp.asarray(weights)[token // length], 0),
        chunk,
    )

    def to_rows(x):  # slots -> R L; unused slots are dropped
        return jnp.zeros(size, x.dtype).at[jnp.where(used, token, size)].set(x, mode="drop").reshape(rows, length)

    return total, to_rows(nll), to_rows(correct), counted.reshape(rows, length)
