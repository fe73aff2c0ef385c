"""Masked (absorbing-state) diffusion: corruption, ELBO and the chunked cross-entropy it needs (arXiv 2602.11151)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from embed.typing import Array, Scalar, typechecked

T_MIN = 1e-3


def stratified_ranks(rows: int) -> np.ndarray:
    """A permutation of 0..rows-1 in van der Corput order: any run of neighbouring rows is spread over the whole range.

    For a power of two this is bit reversal. Devices and microbatches hold neighbouring rows, so each of them
    gets its own stratified sample of t.
    """
    bits = max(1, (rows - 1).bit_length())
    reversed_bits = [int(f"{j:0{bits}b}"[::-1], 2) for j in range(rows)]
    return np.argsort(np.argsort(reversed_bits, kind="stable"), kind="stable")


@typechecked
def corrupt(
    key: Array, tokens: Int[Array, "R L"], valid: Bool[Array, "R L"], *, mask_id: int, t_min: Scalar = T_MIN
) -> tuple[Int[Array, "R L"], Bool[Array, "R L"], Float[Array, "R"]]:
    """Draw one t a row and replace each valid token by `mask_id` with probability t. Returns (noised, masked, t).

    t_j = frac(u + rank_j / R) scaled to (t_min, 1): each row's t is uniform, and together they fill the range
    evenly, which takes most of the variance out of the 1/t weights. Invalid tokens are never masked.
    """
    rows, _ = tokens.shape
    key_t, key_mask = jax.random.split(key)
    u = jax.random.uniform(key_t)
    unit = (u + jnp.asarray(stratified_ranks(rows), u.dtype) / rows) % 1.0
    t = t_min + (1 - t_min) * unit
    masked = (jax.random.uniform(key_mask, tokens.shape) < t[:, None]) & valid
    return jnp.where(masked, mask_id, tokens), masked, t


@functools.lru_cache
def largest_mean_t(rows: int, parts: int, t_min: float = T_MIN) -> float:
    """The largest mean t that `corrupt` can give any of `parts` equal blocks of neighbouring rows, over all u.

    The mean grows with u but where a row's t falls from 1 back to t_min: just before, that row has 1, and each other one the
    distance of its rank behind it on the circle. A power of two of n rows a block: 1/2 + 1/(2n) for t_min = 0.
    """
    ranks = np.sort(stratified_ranks(rows).reshape(parts, -1))
    size = ranks.shape[1]
    # Of the row whose t is 1: the sum over the block of (rank - its own) mod rows.
    behind = ranks.sum(1, keepdims=True) - size * ranks + rows * np.arange(size)
    mean = float(behind.max() + rows) / (rows * size)
    return t_min + (1 - t_min) * mean


def capacity(rows: int, length: int, shards: int = 1, microbatches: int = 1) -> float:
    """The share of a block's tokens for which `masked_nll` needs room: the largest mean t and six standard deviations.

    A block is what a device holds at a time: rows / shards / microbatches neighbouring rows of `length` tokens. The number of
    masked tokens varies around its mean by at most 1/2 a square root of the tokens, as that of fair coins. Of one row all
    may be masked.
    """
    parts = shards * microbatches
    if rows % parts:
        raise ValueError(
            f"{rows} rows a batch do not divide into {shards} devices (data x fsdp) times microbatches={microbatches}"
        )
    return min(1.0, largest_mean_t(rows, parts) + 3 / (rows // parts * length) ** 0.5)


def elbo_weights(t: Float[Array, "R"], valid: Bool[Array, "R L"]) -> Float[Array, "R"]:
    """What the cross-entropy of a row's masked tokens counts in the ELBO: 1 / (t · number of valid tokens)."""
    t = jnp.asarray(t)
    return 1 / (t.astype(jnp.promote_types(t.dtype, jnp.float32)) * jnp.maximum(valid.sum(), 1))


@typechecked
def elbo_loss(
    token_nll: Num[Array, "R L"], masked: Bool[Array, "R L"], t: Float[Array, "R"], valid: Bool[Array, "R L"]
) -> Float[Array, ""]:
    """L = (1 / number of valid tokens) · Σ_rows (1 / t) · Σ_masked CE(x_i), in nats a token.

    An upper bound on the negative log-likelihood of a token. At least float32; 0 if nothing is valid.
    """
    dtype = jnp.promote_types(token_nll.dtype, jnp.float32)
    return (jnp.where(masked, token_nll.astype(dtype), 0) * elbo_weights(t, valid)[:, None]).sum()


def left_shift(hidden: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
    """Predict token i from the state at i - 1, as a causal language model did (arXiv 2602.11151).

    Shifts the whole L axis; the first token of each segment then has no predecessor of its own and must be
    kept out of `valid`.
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
    """Σ weights · CE under the logits hidden · embeddingᵀ, each token's CE, and whether its target is the most likely token.

    Holds the logits of `chunk` tokens at once, never [N, V]; `chunk` must divide N. Losses are at least float32, products
    have the dtype of `hidden`. Of the results the sum alone has a gradient, for hidden and embedding. With its weights known
    it is computed next to each chunk's logits, which are so made once, where a backward pass would make them again.
    """
    return _in_chunks(hidden, embedding, targets, weights, chunk, differentiate=False)[0]


def _in_chunks(hidden, embedding, targets, weights, chunk: int, differentiate: bool):
    """(results, gradients of hidden and embedding) of `weighted_nll`; the gradients None unless asked for."""
    tokens, width = hidden.shape
    if tokens % chunk:
        raise ValueError(f"chunk={chunk} must divide the {tokens} tokens")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    table = embedding.astype(hidden.dtype)

    def one(table_gradient, xs):  # [D, V], as XLA's CPU compiler likes it
        h, target, weight = xs
        logits = jnp.einsum("nd,vd->nv", h, table, preferred_element_type=dtype)
        target_logit = jnp.take_along_axis(logits, target[:, None], 1)[:, 0]
        log_total = jax.nn.logsumexp(logits, -1)
        found = log_total - target_logit, target_logit >= logits.max(-1)
        if not differentiate:
            return None, (found, None)
        is_target = target[:, None] == jnp.arange(logits.shape[1])
        gradient = weight[:, None] * (jnp.exp(logits - log_total[:, None]) - is_target)
        gradient = gradient.astype(hidden.dtype)
        table_gradient += jnp.einsum("nd,nv->dv", h, gradient, preferred_element_type=dtype)
        return table_gradient, (found, gradient @ table)

    chunks = [x.reshape(-1, chunk, *x.shape[1:]) for x in (hidden, targets, weights.astype(dtype))]
    start = jnp.zeros((width, len(embedding)), dtype) if differentiate else None
    table_gradient, (found, hidden_gradient) = jax.lax.scan(one, start, chunks)
    nll, correct = (x.reshape(tokens) for x in found)
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
    """`weighted_nll` where `masked` says so and nowhere else: (sum, nll, correct, counted), 0 and False elsewhere.

    `weights` are those of a row's tokens. With stratified t about half of the tokens are masked, and the vocabulary product
    is most of a small step. There is room for `capacity` (a fraction) of the tokens, rounded up to whole chunks of `chunk`;
    masked tokens beyond are not `counted` and not in the sum: say how many they were. Tokens move between rows, so a batch
    over several devices calls this on each device's rows.
    """
    hidden, targets, masked = jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(masked)
    rows, length, width = hidden.shape
    size = rows * length
    chunk = min(chunk, size)
    room = -(-int(np.ceil(min(capacity, 1) * size)) // chunk) * chunk
    flat = masked.reshape(size)
    place = jnp.cumsum(flat) - 1
    counted = flat & (place < room)
    slots = jnp.zeros(room, jnp.int32)
    slots = slots.at[jnp.where(counted, place, room)].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    used = jnp.arange(room) < counted.sum()
    total, nll, correct = weighted_nll(
        hidden.reshape(size, width)[slots],
        embedding,
        targets.reshape(size)[slots],
        jnp.where(used, jnp.asarray(weights)[slots // length], 0),
        chunk,
    )

    def back(x):  # room -> R L; an empty slot goes nowhere
        return jnp.zeros(size, x.dtype).at[jnp.where(used, slots, size)].set(x, mode="drop").reshape(rows, length)

    return total, back(nll), back(correct), counted.reshape(rows, length)
