"""Generate text with a masked-diffusion model: each step unmasks the k most confident tokens, until none is masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from embed.models import transformer
from embed.objectives import masked_diffusion as md
from embed.typing import Array


@functools.partial(jax.jit, static_argnames=("model", "mask_id", "left_shift"))
def _predict(params, tokens: Int[Array, "1 L"], valid, *, model, mask_id: int, left_shift: bool):
    """The most likely token at each position and its probability, ([L], [L])."""
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.apply(model, params, tokens, valid.astype(jnp.int32), positions)
    hidden = md.left_shift(hidden) if left_shift else hidden
    logits = (hidden[0] @ transformer.output_embedding(params).astype(hidden.dtype).T).astype(jnp.float32)
    probabilities = jax.nn.softmax(logits.at[:, mask_id].set(-jnp.inf), -1)
    return probabilities.argmax(-1), probabilities.max(-1)


def denoise(
    params,
    model: transformer.TransformerConfig,
    tokens: Int[np.ndarray, "n"],
    *,
    mask_id: int,
    tokens_per_step: int,
    left_shift: bool = False,
    length: int = 128,
) -> list[np.ndarray]:
    """Fill every `mask_id` in `tokens`; returns the sequence before the first step and after each step, int32[n] each.

    A step predicts all masked positions at once and keeps the `tokens_per_step` most probable tokens; the rest stay
    masked, and the next step predicts them from the new tokens too. With the left shift nothing predicts the first
    token, so it must be given.
    """
    tokens = np.array(tokens, np.int32)
    if tokens_per_step < 1:
        raise ValueError(f"tokens_per_step={tokens_per_step} must be at least 1")
    if not 0 < len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens to denoise: must be between 1 and {length}")
    if left_shift and tokens[0] == mask_id:
        raise ValueError("with the left shift, the first token cannot be masked: it has no predecessor")
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    valid = (np.arange(length) < len(tokens))[None]
    states = [tokens]
    while (masked := np.flatnonzero(padded[0, : len(tokens)] == mask_id)).size:
        best, confidence = map(
            np.asarray, _predict(params, padded, valid, model=model, mask_id=mask_id, left_shift=left_shift)
        )
        chosen = masked[np.argsort(-confidence[masked], kind="stable")[:tokens_per_step]]
        padded[0, chosen] = best[chosen]
        states.append(padded[0, : len(tokens)].copy())
    return states


def elbo_and_accuracy(
    params,
    model: transformer.TransformerConfig,
    windows: Int[np.ndarray, "n L"],
    *,
    mask_id: int,
    left_shift: bool = False,
    levels=(0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    chunk: int = 512,
) -> tuple[dict[str, dict[str, float]], float]:
    """How well a model denoises held-out text: ({t: {"nll", "accuracy"}} for each masked fraction t, ELBO).

    "nll" is in nats per masked token. "accuracy" is the share of masked tokens whose most likely prediction is right.
    The ELBO is the loss of the diffusion stage over t stratified in (0.001, 1), in nats per token.
    """
    tokens = jnp.asarray(windows, jnp.int32)
    segment_ids, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    valid = positions >= int(left_shift)

    @jax.jit
    def evaluate(noised, masked):
        hidden = transformer.apply(model, params, noised, segment_ids, positions)
        hidden = md.left_shift(hidden) if left_shift else hidden
        table = transformer.output_embedding(params)
        ones = jnp.ones(len(tokens))
        return md.masked_nll(hidden, table, tokens, masked, ones, capacity=1.0, chunk=chunk)[1:3]

    key = jax.random.key(seed)
    figures = {}
    for t in levels:
        masked: Bool[Array, "n L"] = (
            jax.random.uniform(jax.random.fold_in(key, int(t * 1000)), tokens.shape) < t
        ) & valid
        nll, correct = evaluate(jnp.where(masked, mask_id, tokens), masked)
        count = jnp.maximum(masked.sum(), 1)
        figures[str(t)] = {
            "nll": float(nll.sum() / count),
            "accuracy": float(correct.sum() / count),
        }
    noised, masked, t = md.corrupt(key, tokens, valid, mask_id=mask_id)
    nll, _ = evaluate(noised, masked)
    elbo: Float[Array, ""] = md.elbo_loss(nll, masked, t, valid)
    return figures, float(elbo)
