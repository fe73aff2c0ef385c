"""What the config of a stage adds to the training loop: its model, its loss function, and the loader of its batches."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from embed.data.loader import ContrastiveLoader, TextLoader, choose_rows
from embed.models import sharding, transformer
from embed.rows import RowShape
from embed.training import losses

TEXT = ("causal", "diffusion")  # stages that predict the tokens of rows of text
NO_MARGIN = 2.0  # cosines differ by at most 2, so a margin of 2 masks nothing
KINDS = (*TEXT, "pair", "contextual", "triplet", "distill", "late_interaction")


def row_shape(batch) -> RowShape:
    """The packer's limits, from the batch config of a stage."""
    return RowShape(batch.length, batch.spans, batch.segments)


def stage_model(stage, model: transformer.TransformerConfig) -> transformer.TransformerConfig:
    """The model that a stage trains: with an output layer only if it predicts tokens, with a projection only for late
    interaction, causal if its config says so."""
    model = dataclasses.replace(model, token_dimensions=stage.get("token_dimensions", 0))
    if stage.kind in TEXT:
        return dataclasses.replace(model, causal=stage.kind == "causal")
    return dataclasses.replace(model, tied=True, causal=stage.attention == "causal")


def make_loss(stage, model: transformer.TransformerConfig, mask_id: int, left_shift: bool = False) -> Callable:
    """The loss function of a stage's config. With several devices, call it under `jax.set_mesh`."""
    if stage.kind in TEXT:
        options = dict(model=model, microbatches=stage.execution.microbatches, chunk=stage.execution.logits_chunk)
        if stage.kind == "causal":
            return functools.partial(losses.causal_loss, **options)
        how = noise(stage) | dict(anneal=stage.anneal)
        return functools.partial(losses.diffusion_loss, mask_id=mask_id, left_shift=left_shift, **how, **options)
    if stage.kind not in KINDS:
        raise ValueError(f"stage kind {stage.kind!r} must be one of {', '.join(KINDS)}")
    if stage.kind == "late_interaction":
        return functools.partial(
            losses.late_interaction_loss,
            model=model,
            microbatches=stage.execution.microbatches,
            temperature=stage.temperature,
            max_query_tokens=stage.batch.max_query_tokens,
            max_document_tokens=stage.batch.max_document_tokens,
        )
    embedding = losses.Embedding(
        model,
        row_shape(stage.batch),
        stage.execution.microbatches,
        pooling=stage.pooling,
        quantization=stage.quantization,
        early=stage.get("chunking") == "early",
    )
    common = dict(
        embedding=embedding,
        prefixes=losses.Prefixes(tuple(stage.matryoshka), tuple(stage.matryoshka_weights)),
        temperature=stage.temperature,
        spread_out=stage.spread_out,
    )
    if stage.kind == "triplet":
        return functools.partial(losses.triplet_loss, **common)
    if stage.kind == "distill":
        return functools.partial(losses.distill_loss, **common, cosine=stage.cosine, mse=stage.mse, kl=stage.kl)
    common |= dict(margin=stage.margin if stage.margin < NO_MARGIN else None, query_negatives=stage.query_negatives)
    if stage.kind == "pair":
        return functools.partial(losses.pair_loss, **common)
    return functools.partial(losses.contextual_loss, **common, alpha=stage.alpha, beta=tuple(stage.beta))


def noise(stage) -> dict:
    """The keywords of `masked_diffusion.corrupt` and `capacity` that a diffusion stage sets."""
    return dict(noise=stage.noise, mask_ratio=stage.mask_ratio)


def abstract_batch(stage) -> dict[str, tuple[tuple[int, ...], type]]:
    """{name: (shape, dtype)} of a stage's global batch, as `embed.data.loader` builds it."""
    batch = stage.batch
    if stage.kind in TEXT:
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
    if stage.kind == "distill":
        arrays |= {"slots": ((n,), np.int32), "ids": ((n,), np.int32), "valid": ((n,), np.bool_)}
        return arrays | {"teacher": ((n, stage.teacher_dimensions), np.float32)}
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
    if stage.kind in TEXT or stage.batch.rows_per_group:
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
    num_shards = batch.rows if stage.kind in TEXT else batch.groups
    common = dict(seed=seed, shards=None if mesh is None else sharding.local_shards(mesh, num_shards))
    if stage.kind in TEXT:
        return TextLoader(
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
        teacher_dimensions=stage.get("teacher_dimensions", 0),
    )
