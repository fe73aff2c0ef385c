"""Masked (absorbing-state) diffusion: corruption, ELBO and the chunked cross-entropy it needs (arXiv 2602.11151)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from embed.typing import Array, Scalar, typechecked


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
    key: Array, tokens: Int[Array, "R L"], valid: Bool[Array, "R L"], *, mask_id: int, t_min: Scalar = 1e-3
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


@typechecked
def elbo_loss(
    token_nll: Num[Array, "R L"], masked: Bool[Array, "R L"], t: Float[Array, "R"], valid: Bool[Array, "R L"]
) -> Float[Array, ""]:
    """L = (1 / number of valid tokens) · Σ_rows (1 / t) · Σ_masked CE(x_i), in nats a token.

    An upper bound on the negative log-likelihood of a token. At least float32; 0 if nothing is valid.
    """
    dtype = jnp.promote_types(token_nll.dtype, jnp.float32)
    weighted = jnp.where(masked, token_nll.astype(dtype), 0) / t.astype(dtype)[:, None]
    return weighted.sum() / jnp.maximum(valid.sum(), 1)


def left_shift(hidden: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
    """Predict token i from the state at i - 1, as a causal language model did (arXiv 2602.11151).

    Shifts the whole L axis; the first token of each segment then has no predecessor of its own and must be
    kept out of `valid`.
    """
    return jnp.roll(hidden, 1, axis=1)


@typechecked
def token_nll(
    hidden: Float[Array, "R L D"], embedding: Float[Array, "V D"], targets: Int[Array, "R L"], *, chunk: int
) -> tuple[Float[Array, "R L"], Bool[Array, "R L"]]:
    """Cross-entropy of each target under tied-embedding logits, and whether the target is the most likely token.

    Scans over chunks of `chunk` positions with all rows in each, and recomputes a chunk's logits in the backward
    pass: [R, chunk, V] is the most that is held, never [R, L, V]. Rows stay sharded. `chunk` must divide L.
    """
    rows, length, _ = hidden.shape
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    if length % chunk:
        raise ValueError(f"chunk={chunk} must divide the row length {length}")

    @jax.checkpoint
    def one(carry, xs):
        h, y = xs  # R c D, R c
        logits = jnp.einsum("rcd,vd->rcv", h, embedding.astype(h.dtype), preferred_element_type=dtype)
        target = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
        return carry, (jax.nn.logsumexp(logits, -1) - target, target >= logits.max(-1))

    def chunks(x):  # R L ... -> L/c R c ...
        return jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)

    _, (nll, correct) = jax.lax.scan(one, None, (chunks(hidden), chunks(targets)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(rows, length) for x in (nll, correct))


@typechecked
def masked_token_nll(
    hidden: Float[Array, "R L D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "R L"],
    masked: Bool[Array, "R L"],
    *,
    capacity: float,
    chunk: int,
) -> tuple[Float[Array, "R L"], Bool[Array, "R L"], Bool[Array, "R L"]]:
    """`token_nll` where `masked` says so and nowhere else: (nll, correct, counted), 0 and False elsewhere.

    With stratified t about half of the tokens are masked, and the vocabulary product is most of a small step. There is
    room for `capacity` (a fraction) of the tokens, rounded up to whole chunks of `chunk`; masked tokens beyond are not
    `counted`: leave them out of the loss and say how many they were. Tokens move between rows, so a batch over several
    devices calls this on each device's rows.
    """
    hidden, targets, masked = jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(masked)
    rows, length, width = hidden.shape
    size = rows * length
    chunk = min(chunk, size)
    room = min(-(-int(np.ceil(capacity * size)) // chunk) * chunk, -(-size // chunk) * chunk)
    flat = masked.reshape(size)
    place = jnp.cumsum(flat) - 1
    counted = flat & (place < room)
    slots = jnp.zeros(room, jnp.int32)
    slots = slots.at[jnp.where(counted, place, room)].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    found = token_nll(
        hidden.reshape(size, width)[slots][None], embedding, targets.reshape(size)[slots][None], chunk=chunk
    )

    def back(x):  # 1 room -> R L; an empty slot goes nowhere
        where = jnp.where(jnp.arange(room) < counted.sum(), slots, size)
        return jnp.zeros(size, x.dtype).at[where].set(x[0], mode="drop").reshape(rows, length)

    return *map(back, found), counted.reshape(rows, length)
