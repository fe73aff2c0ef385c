"""The losses of the kinds of stages, from the parameters and a batch of rows.

A loss function has the signature

    loss(params, batch, key, progress) -> (scalar, {metric: scalar})

    batch      the arrays of the loader (`stages.abstract_batch` has their shapes)
    key        a PRNG key, a function of (seed, step)
    progress   the fraction of the stage's steps that are done, 0..1

Shapes: a batch is R rows of L tokens. The encoder gives hidden states [R, L, D]; pooling gives S span embeddings and G
segment embeddings per row, used as the flat tables [R · S, D] and [R · G, D]. A *slot* is an index into such a table.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from embed.models import sharding, transformer
from embed.models.pooling import pool_spans
from embed.models.quantization import QUANTIZERS
from embed.objectives import contrastive, distillation, late_interaction, masked_diffusion
from embed.rows import RowShape
from embed.training.microbatches import in_microbatches, on_each_device, summed_over_microbatches


def causal_loss(params, batch, key, progress, *, model, microbatches: int, chunk: int):
    """Cross-entropy of each token given those before it in its segment, in nats per token: a language model.

    Metric: `accuracy`, the share of tokens that are the most likely ones.
    """
    valid = (batch["segment_ids"] > 0) & (batch["positions"] > 0)
    weights = jnp.broadcast_to(1 / jnp.maximum(valid.sum(), 1), len(valid)).astype(jnp.float32)
    rows = batch["tokens"], batch["segment_ids"], batch["positions"], batch["tokens"], valid, weights
    options = dict(model=model, left_shift=True, capacity=1.0, microbatches=microbatches, chunk=chunk)
    loss, (_, correct, counted) = _predict_tokens(params, rows, **options)
    return loss, {"accuracy": correct / jnp.maximum(counted, 1)}


def diffusion_loss(
    params,
    batch,
    key,
    progress,
    *,
    model,
    mask_id: int,
    left_shift: bool,
    microbatches: int,
    chunk: int,
    noise: str = "stratified",
    mask_ratio: float = 0.2,
    anneal: float = 0.0,
):
    """Masked-diffusion ELBO in nats per token (arXiv 2602.11151).

    `noise` and `mask_ratio` are those of `masked_diffusion.corrupt`. In the first `anneal` of the steps, attention
    opens from causal to bidirectional, linearly.

    Metrics: `masked` counts the masked tokens; `overflow` those of them that exceed the logits buffer
    (`masked_diffusion.capacity`) and are left out of the loss; `accuracy` and `masked_nll` are means over the rest.
    """
    tokens, segment_ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    # With the shift, a token is predicted from its predecessor. The first token of a segment does not have one.
    valid = (segment_ids > 0) & (positions > 0) if left_shift else segment_ids > 0
    how = dict(noise=noise, mask_ratio=mask_ratio)
    noised, masked, t = masked_diffusion.corrupt(key, tokens, valid, mask_id=mask_id, **how)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    capacity = masked_diffusion.capacity(*tokens.shape, shards, microbatches, **how)
    rows = noised, segment_ids, positions, tokens, masked, masked_diffusion.elbo_weights(t, valid)
    options = dict(model=model, left_shift=left_shift, capacity=capacity, microbatches=microbatches, chunk=chunk)
    lookahead = jnp.minimum(progress / anneal, 1) if anneal else None
    loss, (nll, correct, counted) = _predict_tokens(params, rows, lookahead=lookahead, **options)
    count, total = jnp.maximum(counted, 1), masked.sum()
    return loss, {"accuracy": correct / count, "masked_nll": nll / count, "masked": total, "overflow": total - counted}


def _predict_tokens(
    params, rows, *, model, left_shift: bool, capacity: float, microbatches: int, chunk: int, lookahead=None
):
    """(loss, sums over the counted tokens of [CE, correct, 1]) of rows: input, segment ids, positions, targets, masked,
    weights; see `masked_diffusion.masked_nll`."""

    def predict(params, inputs, segment_ids, positions, *rest):
        hidden = transformer.apply(model, params, inputs, segment_ids, positions, lookahead)
        if left_shift:
            hidden = masked_diffusion.left_shift(hidden)
        table = transformer.output_embedding(params).astype(model.dtype)
        loss, *metrics = (x.sum() for x in on_each_device(sums, (hidden, *rest), table))
        return loss, metrics

    def sums(hidden, tokens, masked, weights, table):
        terms = masked_diffusion.masked_nll(hidden, table, tokens, masked, weights, capacity=capacity, chunk=chunk)
        return [x.sum()[None] for x in terms]

    return summed_over_microbatches(predict, microbatches, params, *rows)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How a contrastive stage makes vectors from rows."""

    model: transformer.TransformerConfig
    shape: RowShape
    microbatches: int
    pooling: str = "mean"  # of `pool_spans`
    quantization: str = "int8"  # a key of QUANTIZERS
    early: bool = False  # whether each chunk attends only to itself (early chunking), not to its document

    def __call__(self, params, batch, *, documents: bool = False):
        """[spans], or with `documents` [spans, segments]: embeddings [R * S, D] and [R * G, D] of a batch."""

        def pool(tokens, segment_ids, positions, span_ids):
            if self.early:
                hidden = transformer.apply(self.model, params, tokens, span_ids, _restart(positions, span_ids))
            else:
                hidden = transformer.apply(self.model, params, tokens, segment_ids, positions)
            tables = [pool_spans(hidden, span_ids, self.shape.spans, self.pooling)]
            if documents:
                segments = jnp.where(span_ids > 0, segment_ids, 0)
                tables.append(pool_spans(hidden, segments, self.shape.segments, self.pooling))
            return tables

        rows = (batch[name] for name in ("tokens", "segment_ids", "positions", "span_ids"))
        tables = in_microbatches(pool, self.microbatches, *rows)
        return [QUANTIZERS[self.quantization](table.reshape(-1, table.shape[-1])) for table in tables]


def _restart(positions, span_ids):
    """Positions [R, L] that restart at 0 in each span of adjacent tokens."""
    index = jnp.broadcast_to(jnp.arange(span_ids.shape[1], dtype=positions.dtype), span_ids.shape)
    is_start = jnp.diff(span_ids, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """A loss over Matryoshka prefixes p, the first p dimensions of each embedding (arXiv 2602.11151)."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()  # of their losses; () = equal

    def __call__(self, dimensions: int, loss: Callable):
        """The mean of `loss(p)`, weighted.

        The backward pass recomputes the similarities of each prefix: for 16,384 pairs, one float32 matrix of them is
        1.07 GB.
        """
        if not self.sizes:
            raise ValueError(
                f"matryoshka=() needs at least one prefix; ({dimensions},) trains only the whole embedding"
            )
        for p in self.sizes:
            if not 0 < p <= dimensions:
                raise ValueError(
                    f"Matryoshka prefix {p} must be between 1 and the {dimensions} dimensions of the model"
                )
        weights = self.weights or (1.0,) * len(self.sizes)
        pairs = zip(weights, self.sizes, strict=True)
        return sum(w * jax.checkpoint(loss, static_argnums=0)(p) for w, p in pairs) / sum(weights)


def pair_loss(params, batch, key, progress, *, embedding, prefixes, temperature, margin, query_negatives, spread_out):
    """The loss of the pair stage (arXiv 2602.11151): N queries and N documents, in-batch negatives."""
    (spans,) = embedding(params, batch)
    q, d = spans[batch["query_slots"]], spans[batch["document_slots"]]
    ids, valid = {"query_ids": batch["query_ids"], "document_ids": batch["document_ids"]}, batch["valid"]

    def loss(p):
        options = dict(temperature=temperature, margin=margin, query_negatives=query_negatives, valid=valid)
        value = contrastive.pair_loss(q[:, :p], d[:, :p], **options, **ids)
        return value + _spread(spread_out, p, (q, ids["query_ids"], valid), (d, ids["document_ids"], valid))

    return prefixes(embedding.model.hidden_size, loss), {"top1": _top1(q, d, valid)}


def triplet_loss(params, batch, key, progress, *, embedding, prefixes, temperature, spread_out):
    """The loss of the triplet stage (arXiv 2602.11151): N queries, N documents, N · K hard negatives."""
    (spans,) = embedding(params, batch)
    q, d, h = (spans[batch[name]] for name in ("query_slots", "document_slots", "negative_slots"))
    valid = batch["valid"]

    def loss(p):
        value = contrastive.triplet_loss(
            q[:, :p],
            d[:, :p],
            h[..., :p],
            temperature=temperature,
            query_ids=batch["query_ids"],
            document_ids=batch["document_ids"],
            negative_ids=batch["negative_ids"],
            valid=valid,
            negative_valid=batch["negative_valid"],
        )
        return value + _spread(spread_out, p, (q, batch["query_ids"], valid), (d, batch["document_ids"], valid))

    return prefixes(embedding.model.hidden_size, loss), {"top1": _top1(q, d, valid)}


def contextual_loss(
    params,
    batch,
    key,
    progress,
    *,
    embedding,
    prefixes,
    temperature,
    margin,
    query_negatives,
    spread_out,
    alpha,
    beta,
):
    """The loss of the contextual stage (arXiv 2602.11151): N queries, C chunks and the N queries' whole documents.

    β follows a cosine from beta[0] to beta[1] over the stage.
    """
    spans, segments = embedding(params, batch, documents=True)
    q, c, d = spans[batch["query_slots"]], spans[batch["chunk_slots"]], segments[batch["document_slots"]]
    beta_now = beta[1] + (beta[0] - beta[1]) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    valid, chunk_valid = batch["valid"], batch["chunk_valid"]

    def loss(p):
        value = contrastive.contextual_loss(
            q[:, :p],
            c[:, :p],
            d[:, :p],
            positive=batch["positive"],
            chunk_document=batch["chunk_document"],
            temperature=temperature,
            beta=beta_now,
            alpha=alpha,
            margin=margin,
            query_negatives=query_negatives,
            query_ids=batch["query_ids"],
            chunk_ids=batch["chunk_ids"],
            valid=valid,
            chunk_valid=chunk_valid,
        )
        return value + _spread(spread_out, p, (q, batch["query_ids"], valid), (c, batch["chunk_ids"], chunk_valid))

    top1 = _top1(q, c[batch["positive"]], valid)
    return prefixes(embedding.model.hidden_size, loss), {"top1": top1, "beta": beta_now}


def distill_loss(params, batch, key, progress, *, embedding, prefixes, temperature, spread_out, cosine, mse, kl):
    """The loss of the distill stage: N texts, each with the vector of a teacher; the weighted sum of three losses.

    `cosine` and `kl` weight directions and similarities of quantized vectors, which a model is used with. `mse` weights
    the error of pooled vectors before quantization, so that it teaches the teacher's scale too, by which int8 rounds.
    Prefixes of the student are compared with the same prefixes of the teacher; their similarities with those of the
    whole teacher. `top1` is the share of texts whose most similar other text of the batch is the teacher's.
    """
    (pooled,) = dataclasses.replace(embedding, quantization="none")(params, batch)
    pooled, teacher, ids, valid = pooled[batch["slots"]], batch["teacher"], batch["ids"], batch["valid"]
    student = QUANTIZERS[embedding.quantization](pooled)

    def loss(p):
        value = _spread(spread_out, p, (student, ids, valid))
        if cosine:
            value += cosine * distillation.cosine_loss(student[:, :p], teacher[:, :p], valid=valid)
        if mse:
            value += mse * distillation.squared_error(pooled[:, :p], teacher[:, :p], valid=valid)
        if kl:
            options = dict(temperature=temperature, ids=ids, valid=valid)
            value += kl * distillation.similarity_kl(student[:, :p], teacher, **options)
        return value

    def nearest(vectors):
        unit = contrastive.normalize(jax.lax.stop_gradient(vectors))
        return jnp.where((ids[:, None] != ids) & valid, contrastive.cosine(unit, unit), -2).argmax(1)

    top1 = ((nearest(student) == nearest(teacher)) & valid).sum() / jnp.maximum(valid.sum(), 1)
    return prefixes(embedding.model.hidden_size, loss), {"top1": top1}


def _spread(weight: float, prefix: int, *tables):
    """`weight` times the sum of `contrastive.spread_out` of tables (vectors [N, D], content ids, valid), 0 for 0."""
    if not weight:
        return 0.0
    return weight * sum(contrastive.spread_out(x[:, :prefix], ids=ids, valid=ok) for x, ids, ok in tables)


def late_interaction_loss(
    params, batch, key, progress, *, model, microbatches, temperature, max_query_tokens, max_document_tokens
):
    """The loss of the late-interaction stage: N queries and N documents, compared token by token."""

    def vectors(tokens, segment_ids, positions):
        return transformer.token_vectors(params, transformer.apply(model, params, tokens, segment_ids, positions))

    table = in_microbatches(vectors, microbatches, *(batch[name] for name in ("tokens", "segment_ids", "positions")))
    table = table.reshape(-1, table.shape[-1])

    def side(name, most):
        k = jnp.arange(most)
        valid = k < batch[f"{name}_lengths"][:, None]
        return table[jnp.where(valid, batch[f"{name}_starts"][:, None] + k, 0)], valid

    scores = late_interaction.maxsim(*side("query", max_query_tokens), *side("document", max_document_tokens))
    loss = late_interaction.late_interaction_loss(
        scores,
        temperature=temperature,
        query_ids=batch["query_ids"],
        document_ids=batch["document_ids"],
        valid=batch["valid"],
    )
    return loss, {"top1": _share_first(jax.lax.stop_gradient(scores), batch["valid"])}


def _top1(q, d, valid):
    """The share of valid queries q [N, D] whose own positive d [N, D] is the most similar in the batch; no gradient."""
    q, d = jax.lax.stop_gradient((contrastive.normalize(q), contrastive.normalize(d)))
    return _share_first(contrastive.cosine(q, d), valid)


def _share_first(scores, valid):
    """The share of valid queries whose own positive has the highest of their scores [N, N] of valid documents."""
    scores = jnp.where(valid[None, :], scores, -jnp.inf)
    return ((jnp.diagonal(scores) >= scores.max(1)) & valid).sum() / jnp.maximum(valid.sum(), 1)
