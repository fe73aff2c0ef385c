"""What a stage adds to the one loop: an objective over a batch of rows, and the loader that makes the batches.

A stage's loss function has the signature

    loss(params, batch, key, progress) -> (scalar, {name: scalar})

with `batch` the arrays of the loader, `key` a PRNG key that is a function of (seed, step), and `progress` the
fraction of the stage that is done.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from embed.data.loader import ContrastiveLoader, DiffusionLoader
from embed.models import sharding, transformer
from embed.models.attention import HEADS, ROWS
from embed.models.pooling import pool_spans
from embed.models.quantization import straight_through_int8
from embed.objectives import contrastive, masked_diffusion
from embed.rows import RowShape

KINDS = ("diffusion", "pair", "contextual", "triplet")


def _parts(count: int, rows: int) -> tuple[Callable, Callable]:
    """(split, join): an array [R, …] into `count` parts [count, R / count, …], and back.

    A part has neighbouring rows of each device: each has its share, and in the diffusion stage a stratified sample of t.
    """
    if count < 1 or rows % count:
        raise ValueError(f"{rows} rows do not divide into microbatches={count}")
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.gcd(sharding.batch_shards(mesh), rows // count)

    def split(x):
        parts = jnp.moveaxis(x.reshape(devices, count, -1, *x.shape[1:]), 1, 0)
        return parts.reshape(count, rows // count, *x.shape[1:])

    def join(x):
        return jnp.moveaxis(x.reshape(count, devices, -1, *x.shape[2:]), 0, 1).reshape(rows, *x.shape[2:])

    return split, join


def in_microbatches(function: Callable, count: int, *arrays):
    """function(*arrays) in `count` parts along axis 0, one after the other; its result [R, …] is that of the whole.

    Only results are kept for the backward pass, which makes each part's activations anew while it adds up the
    gradients: gradient caching, with one compiled pass over the parts.
    """
    if count == 1:
        return function(*arrays)
    split, join = _parts(count, len(arrays[0]))
    results = jax.lax.map(jax.checkpoint(lambda part: function(*part)), [split(x) for x in arrays])
    return jax.tree.map(join, results)


def summed_over_microbatches(function: Callable, count: int, params, *arrays):
    """The sum of function(params, *part) -> (scalar, metrics) over `count` parts of the arrays, one after the other.

    For a loss that is a sum over rows: each part's gradient is taken while its activations are there, and nothing is
    computed twice (gradient accumulation). Only the scalar has a gradient, for params.
    """
    if count == 1:
        return function(params, *arrays)

    def add_up(one, params, parts):
        sums = jax.eval_shape(one, params, *(x[0] for x in parts))
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(params, *part)), None), sums, parts)[0]

    total = jax.custom_vjp(functools.partial(add_up, function))
    total.defvjp(
        functools.partial(add_up, jax.value_and_grad(function, has_aux=True)),  # its results, and what to keep
        lambda gradients, cotangents: (jax.tree.map(lambda x: cotangents[0] * x, gradients), None),
    )
    split, _ = _parts(count, len(arrays[0]))
    return total(params, [split(x) for x in arrays])


@jax.custom_vjp
def _gradient_at_once(x):
    """x; its gradient is summed and sharded where it arises, not held whole until the optimizer asks for it."""
    return x


_gradient_at_once.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def on_each_device(function: Callable, arrays: tuple, table):
    """function(*arrays, table) with each device's rows of the arrays [R, …] by themselves; its results are [R, …].

    The table [V, D] is gathered once from its shards, and its gradient goes back to them once: not in each turn of a
    loop inside, as the partitioner would have it. Without a mesh in the context this is the plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays, table)
    # As embed.models.sharding.RULES shards it.
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
        *arrays, _gradient_at_once(table)
    )


def diffusion_loss(
    params, batch, key, progress, *, model, mask_id: int, left_shift: bool, microbatches: int, chunk: int
):
    """Masked-diffusion ELBO in nats a token (arXiv 2602.11151).

    Of the `masked` tokens `overflow` found no room among the logits and are not in the loss (`masked_diffusion.capacity`).
    """
    tokens, segment_ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    # With the shift the first token of a segment has no predecessor to be predicted from.
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
        found = on_each_device(sums, (hidden, *rest), table)
        loss, *metrics = (x.sum() for x in found)
        return loss, metrics

    def sums(hidden, tokens, masked, weights, table):
        found = masked_diffusion.masked_nll(hidden, table, tokens, masked, weights, capacity=capacity, chunk=chunk)
        return [x.sum()[None] for x in found]

    rows = noised, segment_ids, positions, tokens, masked, weights
    loss, (nll, correct, counted) = summed_over_microbatches(predict, microbatches, params, *rows)
    count, total = jnp.maximum(counted, 1), masked.sum()
    return loss, {"accuracy": correct / count, "masked_nll": nll / count, "masked": total, "overflow": total - counted}


def embed_rows(params, batch, *, model, shape: RowShape, microbatches: int, documents: bool = False):
    """Quantized span embeddings [R * S, D] of a batch and, if asked, of whole segments [R * G, D]."""

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
    """The mean of `loss(p)` over Matryoshka prefixes, each the first p dimensions of every embedding (arXiv 2602.11151).

    The backward pass makes the similarities of each prefix anew: at 16,384 pairs one float32 matrix of them is 1.07 GB.
    """
    if not prefixes:
        raise ValueError(f"matryoshka=() has no prefix; ({dimensions},) is the whole embedding alone")
    for p in prefixes:
        if not 0 < p <= dimensions:
            raise ValueError(f"Matryoshka prefix {p} must be between 1 and the {dimensions} dimensions of the model")
    return sum(jax.checkpoint(loss, static_argnums=0)(p) for p in prefixes) / len(prefixes)


def pair_loss(params, batch, key, progress, *, model, shape, microbatches, prefixes, temperature, margin):
    """The pair stage (arXiv 2602.11151)."""
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
    """The triplet stage (arXiv 2602.11151)."""
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
    """The contextual stage (arXiv 2602.11151), with β on a cosine from beta[0] to beta[1] over the stage."""
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


def _top1(q, d, valid):
    """How often a query's own document is the most similar of the batch; a progress figure, without gradient."""
    q, d = jax.lax.stop_gradient((contrastive.normalize(q), contrastive.normalize(d)))
    scores = jnp.where(valid[None, :], contrastive.cosine(q, d), -2)
    return ((jnp.diagonal(scores) >= scores.max(1)) & valid).sum() / jnp.maximum(valid.sum(), 1)


def row_shape(batch) -> RowShape:
    """The packer's limits out of a stage's batch config."""
    return RowShape(batch.length, batch.spans, batch.segments)


def stage_model(kind: str, model: transformer.TransformerConfig) -> transformer.TransformerConfig:
    """The model that a stage of this kind trains: the diffusion stage alone has an output layer."""
    return model if kind == "diffusion" else dataclasses.replace(model, tied=True)


def make_loss(stage, model: transformer.TransformerConfig, mask_id: int, left_shift: bool = False) -> Callable:
    """The loss function of a stage's config. Over several devices it is called under `jax.set_mesh`."""
    if stage.kind == "diffusion":
        return functools.partial(
            diffusion_loss,
            model=model,
            mask_id=mask_id,
            left_shift=left_shift,
            microbatches=stage.execution.microbatches,
            chunk=stage.execution.logits_chunk,
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
    """{name: (shape, dtype)} of a stage's global batch, as `embed.data.loader` makes it."""
    batch = stage.batch
    if stage.kind == "diffusion":
        names = ("tokens", "segment_ids", "positions")
        return {name: ((batch.rows, batch.length), np.int32) for name in names}
    rows, n = batch.groups * batch.rows_per_group, batch.groups * batch.group_size
    names = ("tokens", "segment_ids", "positions", "span_ids")
    arrays = {name: ((rows, batch.length), np.int32) for name in names}
    if stage.kind == "contextual":
        c, q = n * batch.max_chunks, n * batch.max_queries_per_document
        arrays |= {name: ((c,), np.int32) for name in ("chunk_slots", "chunk_ids", "chunk_document")}
        arrays |= {name: ((q,), np.int32) for name in ("query_slots", "query_ids", "positive", "document_slots")}
        return arrays | {"chunk_valid": ((c,), np.bool_), "valid": ((q,), np.bool_)}
    names = ("query_slots", "document_slots", "query_ids", "document_ids")
    arrays |= {name: ((n,), np.int32) for name in names} | {"valid": ((n,), np.bool_)}
    if stage.kind == "triplet":
        k = batch.num_negatives
        arrays |= {name: ((n, k), np.int32) for name in ("negative_slots", "negative_ids")}
        arrays["negative_valid"] = ((n, k), np.bool_)
    return arrays


def make_loader(stage, stores: dict, phases, *, seed: int, separator_id: int | None, mesh=None):
    """The loader of a stage's config: of what this process's devices hold of a batch, without a mesh of all of it.

    `phases` is [(steps, {task: rate}), …].
    """
    batch = stage.batch
    units = batch.rows if stage.kind == "diffusion" else batch.groups
    common = dict(seed=seed, own=None if mesh is None else sharding.local_shards(mesh, units))
    if stage.kind == "diffusion":
        return DiffusionLoader(
            stores,
            phases,
            rows=batch.rows,
            length=batch.length,
            truncate_probability=batch.truncate_probability,
            **common,
        )
    return ContrastiveLoader(
        stores,
        phases,
        stage=stage.kind,
        group_size=batch.group_size,
        groups=batch.groups,
        rows_per_group=batch.rows_per_group,
        shape=row_shape(batch),
        separator_id=separator_id,
        num_negatives=batch.get("num_negatives", 0),
        max_chunks=batch.get("max_chunks", 0),
        max_queries_per_document=batch.get("max_queries_per_document", 0),
        **common,
    )
