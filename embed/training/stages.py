"""What a stage adds to the training loop: a loss function over batches of rows, and the loader of these batches.

The loss function of a stage has the signature

    loss(params, batch, key, progress) -> (scalar, {metric: scalar})

    batch      the arrays of the loader (`abstract_batch` has their shapes)
    key        a PRNG key, a function of (seed, step)
    progress   the fraction of the stage's steps that are done, 0..1

Shapes: a batch is R rows of L tokens. The encoder gives hidden states [R, L, D]; pooling gives S span embeddings and G
segment embeddings per row, used as the flat tables [R · S, D] and [R · G, D]. A *slot* is an index into such a table.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from embed.data.loader import ContrastiveLoader, DiffusionLoader, choose_rows
from embed.models import sharding, transformer
from embed.models.attention import HEADS, ROWS
from embed.models.pooling import pool_spans
from embed.models.quantization import straight_through_int8
from embed.objectives import contrastive, late_interaction, masked_diffusion
from embed.rows import RowShape

KINDS = ("diffusion", "pair", "contextual", "triplet", "late_interaction")


def _microbatches(count: int, rows: int) -> tuple[Callable, Callable]:
    """(split, join): reshape an array [R, …] to `count` microbatches [count, R / count, …], and back.

    Each microbatch takes consecutive rows from every device, so that it stays evenly sharded and, in the diffusion
    stage, has a stratified sample of t.
    """
    if count < 1 or rows % count:
        raise ValueError(f"{rows} rows do not divide into microbatches={count}")
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.gcd(sharding.batch_shards(mesh), rows // count)

    def split(x):
        microbatches = jnp.moveaxis(x.reshape(devices, count, -1, *x.shape[1:]), 1, 0)
        return microbatches.reshape(count, rows // count, *x.shape[1:])

    def join(x):
        return jnp.moveaxis(x.reshape(count, devices, -1, *x.shape[2:]), 0, 1).reshape(rows, *x.shape[2:])

    return split, join


def in_microbatches(function: Callable, count: int, *arrays):
    """function(*arrays) with results [R, …], computed in `count` microbatches of axis 0, one after the other.

    This is gradient caching: the forward pass keeps only the results. The backward pass recomputes the activations of
    one microbatch at a time while it adds up the gradients.
    """
    if count == 1:
        return function(*arrays)
    split, join = _microbatches(count, len(arrays[0]))
    results = jax.lax.map(jax.checkpoint(lambda inputs: function(*inputs)), [split(x) for x in arrays])
    return jax.tree.map(join, results)


def summed_over_microbatches(function: Callable, count: int, params, *arrays):
    """The sum of function(params, *arrays) -> (scalar, metrics) over `count` microbatches of the arrays [R, …].

    This is gradient accumulation, for a loss that is a sum over rows: the forward pass computes the gradient of each
    microbatch while its activations exist, so nothing is computed twice. Only the scalar is differentiable, and only
    with respect to params.
    """
    if count == 1:
        return function(params, *arrays)

    def sum_over(term, params, arrays):
        def add(sums, inputs):
            return jax.tree.map(jnp.add, sums, term(params, *inputs)), None

        shapes = jax.eval_shape(term, params, *(x[0] for x in arrays))
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), arrays)[0]

    total = jax.custom_vjp(functools.partial(sum_over, function))
    total.defvjp(
        functools.partial(sum_over, jax.value_and_grad(function, has_aux=True)),  # (result, gradient as the residual)
        lambda gradients, cotangents: (jax.tree.map(lambda x: cotangents[0] * x, gradients), None),
    )
    split, _ = _microbatches(count, len(arrays[0]))
    return total(params, [split(x) for x in arrays])


@jax.custom_vjp
def _reduce_gradient_early(x):
    """The identity. Its gradient is summed over devices and sharded immediately, not held whole until the optimizer."""
    return x


_reduce_gradient_early.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def on_each_device(function: Callable, arrays: tuple, table):
    """function(*arrays, table) with results [R, …]; each device calls it with its own rows of the arrays [R, …].

    The table [V, D] is gathered from its shards once and its gradient is scattered back once. The partitioner would do
    both in every iteration of a loop inside `function`. Without a mesh in the context this is the plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays, table)
    # The axes by which embed.models.sharding.RULES shards the table.
    axes = [axis if size % mesh.shape[axis] == 0 else None for axis, size in zip((HEADS, ROWS[1]), table.shape)]

    def inner(*inputs):
        *arrays, table = inputs
        for dimension, axis in enumerate(axes):
            if axis:
                table = jax.lax.all_gather(table, axis, axis=dimension, tiled=True)
        return function(*arrays, table)

    rows = PartitionSpec(ROWS)
    specs = (*(rows for _ in arrays), PartitionSpec(*axes))
    return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(
        *arrays, _reduce_gradient_early(table)
    )


def diffusion_loss(
    params, batch, key, progress, *, model, mask_id: int, left_shift: bool, microbatches: int, chunk: int
):
    """Masked-diffusion ELBO in nats per token (arXiv 2602.11151).

    Metrics: `masked` counts the masked tokens; `overflow` those of them that exceed the logits buffer
    (`masked_diffusion.capacity`) and are left out of the loss; `accuracy` and `masked_nll` are means over the rest.
    """
    tokens, segment_ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    # With the shift, a token is predicted from its predecessor. The first token of a segment does not have one.
    valid = (segment_ids > 0) & (positions > 0) if left_shift else segment_ids > 0
    noised, masked, t = masked_diffusion.corrupt(key, tokens, valid, mask_id=mask_id)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    capacity = masked_diffusion.capacity(*tokens.shape, shards, microbatches)
    weights = masked_diffusion.elbo_weights(t, valid)

    def predict(params, noised, segment_ids, positions, *rest):
        hidden = transformer.apply(model, params, noised, segment_ids, positions)
        if left_shift:
            hidden = masked_diffusion.left_shift(hidden)
        table = transformer.output_embedding(params).astype(model.dtype)
        loss, *metrics = (x.sum() for x in on_each_device(sums, (hidden, *rest), table))
        return loss, metrics

    def sums(hidden, tokens, masked, weights, table):
        terms = masked_diffusion.masked_nll(hidden, table, tokens, masked, weights, capacity=capacity, chunk=chunk)
        return [x.sum()[None] for x in terms]

    rows = noised, segment_ids, positions, tokens, masked, weights
    loss, (nll, correct, counted) = summed_over_microbatches(predict, microbatches, params, *rows)
    count, total = jnp.maximum(counted, 1), masked.sum()
    return loss, {"accuracy": correct / count, "masked_nll": nll / count, "masked": total, "overflow": total - counted}


def embed_rows(params, batch, *, model, shape: RowShape, microbatches: int, documents: bool = False):
    """[spans], or with `documents` [spans, segments]: quantized embeddings [R * S, D] and [R * G, D] of a batch."""

    def pool(tokens, segment_ids, positions, span_ids):
        hidden = transformer.apply(model, params, tokens, segment_ids, positions)
        tables = [pool_spans(hidden, span_ids, shape.spans)]
        if documents:
            tables.append(pool_spans(hidden, jnp.where(span_ids > 0, segment_ids, 0), shape.segments))
        return tables

    rows = (batch[name] for name in ("tokens", "segment_ids", "positions", "span_ids"))
    tables = in_microbatches(pool, microbatches, *rows)
    return [straight_through_int8(table.reshape(-1, table.shape[-1])) for table in tables]


def over_prefixes(prefixes, dimensions: int, loss: Callable):
    """The mean of `loss(p)` over Matryoshka prefixes p, the first p dimensions of each embedding (arXiv 2602.11151).

    The backward pass recomputes the similarities of each prefix: for 16,384 pairs, one float32 matrix of them is
    1.07 GB.
    """
    if not prefixes:
        raise ValueError(f"matryoshka=() needs at least one prefix; ({dimensions},) trains only the whole embedding")
    for p in prefixes:
        if not 0 < p <= dimensions:
            raise ValueError(f"Matryoshka prefix {p} must be between 1 and the {dimensions} dimensions of the model")
    return sum(jax.checkpoint(loss, static_argnums=0)(p) for p in prefixes) / len(prefixes)


def pair_loss(params, batch, key, progress, *, model, shape, microbatches, prefixes, temperature, margin):
    """The loss of the pair stage (arXiv 2602.11151): N queries and N documents, in-batch negatives."""
    (spans,) = embed_rows(params, batch, model=model, shape=shape, microbatches=microbatches)
    q, d = spans[batch["query_slots"]], spans[batch["document_slots"]]

    def loss(p):
        return contrastive.pair_loss(
            q[:, :p],
            d[:, :p],
            temperature=temperature,
            margin=margin,
            query_ids=batch["query_ids"],
            document_ids=batch["document_ids"],
            valid=batch["valid"],
        )

    return over_prefixes(prefixes, model.hidden_size, loss), {"top1": _top1(q, d, batch["valid"])}


def triplet_loss(params, batch, key, progress, *, model, shape, microbatches, prefixes, temperature):
    """The loss of the triplet stage (arXiv 2602.11151): N queries, N documents, N · K hard negatives."""
    (spans,) = embed_rows(params, batch, model=model, shape=shape, microbatches=microbatches)
    q, d, h = (spans[batch[name]] for name in ("query_slots", "document_slots", "negative_slots"))

    def loss(p):
        return contrastive.triplet_loss(
            q[:, :p],
            d[:, :p],
            h[..., :p],
            temperature=temperature,
            query_ids=batch["query_ids"],
            document_ids=batch["document_ids"],
            negative_ids=batch["negative_ids"],
            valid=batch["valid"],
            negative_valid=batch["negative_valid"],
        )

    return over_prefixes(prefixes, model.hidden_size, loss), {"top1": _top1(q, d, batch["valid"])}


def contextual_loss(
    params, batch, key, progress, *, model, shape, microbatches, prefixes, temperature, margin, alpha, beta
):
    """The loss of the contextual stage (arXiv 2602.11151): N queries, C chunks and the N queries' whole documents.

    β follows a cosine from beta[0] to beta[1] over the stage.
    """
    spans, segments = embed_rows(params, batch, model=model, shape=shape, microbatches=microbatches, documents=True)
    q, c, d = spans[batch["query_slots"]], spans[batch["chunk_slots"]], segments[batch["document_slots"]]
    beta_now = beta[1] + (beta[0] - beta[1]) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    def loss(p):
        return contrastive.contextual_loss(
            q[:, :p],
            c[:, :p],
            d[:, :p],
            positive=batch["positive"],
            chunk_document=batch["chunk_document"],
            temperature=temperature,
            beta=beta_now,
            alpha=alpha,
            margin=margin,
            query_ids=batch["query_ids"],
            chunk_ids=batch["chunk_ids"],
            valid=batch["valid"],
            chunk_valid=batch["chunk_valid"],
        )

    top1 = _top1(q, c[batch["positive"]], batch["valid"])
    return over_prefixes(prefixes, model.hidden_size, loss), {"top1": top1, "beta": beta_now}


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


def row_shape(batch) -> RowShape:
    """The packer's limits, from the batch config of a stage."""
    return RowShape(batch.length, batch.spans, batch.segments)


def stage_model(stage, model: transformer.TransformerConfig) -> transformer.TransformerConfig:
    """The model that a stage trains: only diffusion has an output layer, and only late interaction a projection."""
    tied = model.tied or stage.kind != "diffusion"
    return dataclasses.replace(model, tied=tied, token_dimensions=stage.get("token_dimensions", 0))


def make_loss(stage, model: transformer.TransformerConfig, mask_id: int, left_shift: bool = False) -> Callable:
    """The loss function of a stage's config. With several devices, call it under `jax.set_mesh`."""
    if stage.kind == "diffusion":
        return functools.partial(
            diffusion_loss,
            model=model,
            mask_id=mask_id,
            left_shift=left_shift,
            microbatches=stage.execution.microbatches,
            chunk=stage.execution.logits_chunk,
        )
    if stage.kind == "late_interaction":
        return functools.partial(
            late_interaction_loss,
            model=model,
            microbatches=stage.execution.microbatches,
            temperature=stage.temperature,
            max_query_tokens=stage.batch.max_query_tokens,
            max_document_tokens=stage.batch.max_document_tokens,
        )
    common = dict(
        model=model,
        shape=row_shape(stage.batch),
        prefixes=tuple(stage.matryoshka),
        temperature=stage.temperature,
        microbatches=stage.execution.microbatches,
    )
    if stage.kind == "pair":
        return functools.partial(pair_loss, **common, margin=stage.margin)
    if stage.kind == "triplet":
        return functools.partial(triplet_loss, **common)
    if stage.kind == "contextual":
        return functools.partial(
            contextual_loss, **common, margin=stage.margin, alpha=stage.alpha, beta=tuple(stage.beta)
        )
    raise ValueError(f"stage kind {stage.kind!r} must be one of {', '.join(KINDS)}")


def abstract_batch(stage) -> dict[str, tuple[tuple[int, ...], type]]:
    """{name: (shape, dtype)} of a stage's global batch, as `embed.data.loader` builds it."""
    batch = stage.batch
    if stage.kind == "diffusion":
        names = ("tokens", "segment_ids", "positions")
        return {name: ((batch.rows, batch.length), np.int32) for name in names}
    if not batch.rows_per_group:
        raise ValueError("batch.rows_per_group=0 is chosen from the data, which are not read here: give a number")
    rows, n = batch.groups * batch.rows_per_group, batch.groups * batch.group_size
    names = ("tokens", "segment_ids", "positions", "span_ids")
    arrays = {name: ((rows, batch.length), np.int32) for name in names}
    if stage.kind == "contextual":
        c, q = n * batch.max_chunks, n * batch.max_queries_per_document
        arrays |= {name: ((c,), np.int32) for name in ("chunk_slots", "chunk_ids", "chunk_document")}
        arrays |= {name: ((q,), np.int32) for name in ("query_slots", "query_ids", "positive", "document_slots")}
        return arrays | {"chunk_valid": ((c,), np.bool_), "valid": ((q,), np.bool_)}
    where = ("slots",) if stage.kind != "late_interaction" else ("starts", "lengths")
    names = [f"{side}_{what}" for side in ("query", "document") for what in (*where, "ids")]
    arrays |= {name: ((n,), np.int32) for name in names} | {"valid": ((n,), np.bool_)}
    if stage.kind == "triplet":
        k = batch.num_negatives
        arrays |= {name: ((n, k), np.int32) for name in ("negative_slots", "negative_ids")}
        arrays["negative_valid"] = ((n, k), np.bool_)
    return arrays


def with_rows(stage, stores: dict, phases, *, separator_id: int | None):
    """A stage's config with a number for batch.rows_per_group=0 (`embed.data.loader.choose_rows`)."""
    if stage.kind == "diffusion" or stage.batch.rows_per_group:
        return stage
    microbatches, result = stage.execution.microbatches, stage.copy_and_resolve_references()
    multiple = microbatches // math.gcd(microbatches, stage.batch.groups)  # all rows divide into microbatches
    arguments = _contrastive_arguments(stage) | dict(separator_id=separator_id, multiple=multiple)
    result.batch.rows_per_group = choose_rows(stores, phases, **arguments)
    return result


def make_loader(stage, stores: dict, phases, *, seed: int, separator_id: int | None, mesh=None):
    """The loader of a stage's config. With a mesh it builds only what this process's devices hold, otherwise all.

    `phases` is [(steps, {task: rate}), …], see `embed.data.curriculum.Curriculum`.
    """
    batch = stage.batch
    num_shards = batch.rows if stage.kind == "diffusion" else batch.groups
    common = dict(seed=seed, shards=None if mesh is None else sharding.local_shards(mesh, num_shards))
    if stage.kind == "diffusion":
        return DiffusionLoader(
            stores,
            phases,
            rows=batch.rows,
            length=batch.length,
            truncate_probability=batch.truncate_probability,
            **common,
        )
    batch = with_rows(stage, stores, phases, separator_id=separator_id).batch
    return ContrastiveLoader(
        stores,
        phases,
        groups=batch.groups,
        rows_per_group=batch.rows_per_group,
        separator_id=separator_id,
        **_contrastive_arguments(stage),
        **common,
    )


def _contrastive_arguments(stage) -> dict:
    """The arguments that `ContrastiveLoader` and `choose_rows` have in common."""
    batch = stage.batch
    return dict(
        stage=stage.kind,
        group_size=batch.group_size,
        shape=row_shape(batch),
        num_negatives=batch.get("num_negatives", 0),
        max_query_tokens=batch.get("max_query_tokens", 0),
        max_document_tokens=batch.get("max_document_tokens", 0),
        max_chunks=batch.get("max_chunks", 0),
        max_queries_per_document=batch.get("max_queries_per_document", 0),
        homogeneous=batch.get("homogeneous", False),
    )
