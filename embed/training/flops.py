"""FLOPs and memory traffic of a step, by formula, and the peak rates of chips.

Model FLOPs are three times those of a forward pass, because the gradient of a product is two products. Recomputation
does not count. There are two conventions:

    segments   tokens that are not padding, each attending to its own segment: what the objective requires
    full rows  every position of every row, attending to the whole row: what a kernel without block sparsity computes

They are equal if each row is one segment without padding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from embed.models import sharding, transformer
from embed.objectives import masked_diffusion
from embed.training.stages import abstract_batch


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip."""

    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # bytes/s of HBM
    interconnect: float  # bytes/s over all links to other chips
    network: float  # bytes/s between slices: the chip's share of the data-center network


# From cloud.google.com/tpu/docs.
CHIPS = {
    "v4": Chip(275e12, 32e9, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95e9, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32e9, 1.640e12, 448e9, 12.5e9),
}

# jax's device kind -> dense bfloat16 FLOP/s. NVIDIA: from its data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def device_peak() -> float | None:
    """Peak bfloat16 FLOP/s of one of this process's devices; None if it is unknown."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind == name or (kind.startswith("NVIDIA") and kind.startswith(name))]
    return PEAK_FLOPS[names[0]] if names else None


def tokens(stage) -> int:
    """The tokens of a global batch, including padding."""
    rows, length = abstract_batch(stage)["tokens"][0]
    return rows * length


def forward_flops(
    stage, model: transformer.TransformerConfig, tokens: float | None = None, squares: float | None = None
) -> dict[str, float]:
    """FLOPs of one forward pass of the global batch, by part: {part: FLOPs}.

    layers       2 · tokens · (matrix parameters of a layer) · layers
    attention    4 · squares · heads · head_dim · layers        scores and mixed values, not causal
    logits       2 · tokens / 2 · vocabulary · width            diffusion: half of the tokens are masked, on average
    similarity   2 · queries · vectors per query · Σ prefixes   contrastive: unused entries of the tables included
                 2 · queries² · query tokens · document tokens · P      late interaction, of the longest texts
    projection   2 · tokens · width · P                         late interaction, of P token dimensions

    `tokens` is the number of tokens that are not padding, `squares` the sum of the squared segment lengths. Their
    defaults are those of full rows.
    """
    D, H, K, d, F = (
        model.hidden_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.intermediate_size,
    )
    shapes = {name: shape for name, (shape, _) in abstract_batch(stage).items()}
    rows, length = shapes["tokens"]
    tokens = rows * length if tokens is None else tokens
    squares = rows * length**2 if squares is None else squares
    flops = {
        "layers": 2.0 * tokens * model.num_layers * (D * d * (2 * H + 2 * K) + 3 * D * F),
        "attention": 4.0 * squares * H * d * model.num_layers,
    }
    if stage.kind == "diffusion":
        return flops | {"logits": 2.0 * tokens / 2 * model.vocab_size * D}
    queries = shapes["query_ids"][0]
    if stage.kind == "late_interaction":
        compared = queries**2 * stage.batch.max_query_tokens * stage.batch.max_document_tokens
        size = stage.token_dimensions
        return flops | {"similarity": 2.0 * compared * size, "projection": 2.0 * tokens * D * size}
    compared = {  # vectors per query
        "pair": 2 * queries,
        "triplet": queries + math.prod(shapes.get("negative_slots", (0,))),
        "contextual": shapes.get("chunk_slots", (0,))[0] + 2 * queries,
    }[stage.kind]
    return flops | {"similarity": 2.0 * queries * compared * sum(stage.matryoshka)}


def model_flops(
    stage, model: transformer.TransformerConfig, tokens: float | None = None, squares: float | None = None
) -> float:
    """Model FLOPs of a step over all chips; `tokens` and `squares` as in `forward_flops`."""
    return 3 * sum(forward_flops(stage, model, tokens, squares).values())


def passes(stage, model: transformer.TransformerConfig) -> int:
    """The cost of the layers in forward passes: three, and one for each recomputation in the backward pass.

    Microbatches of the diffusion stage recompute nothing: its loss is a sum over rows (`summed_over_microbatches`).
    """
    return 3 + (model.remat == "full") + (stage.execution.microbatches > 1 and stage.kind != "diffusion")


def capacity(stage, mesh) -> float:
    """The share of a diffusion batch's tokens that fit into the logits buffer of every device."""
    batch = stage.batch
    return masked_diffusion.capacity(
        batch.rows, batch.length, sharding.batch_shards(mesh), stage.execution.microbatches
    )


def hardware_flops(stage, model: transformer.TransformerConfig, mesh) -> float:
    """FLOPs that a step over all chips computes: full rows, recomputed layers (`passes`), the whole logits buffer once.

    The similarities of each prefix are recomputed in the backward pass.
    """
    parts = forward_flops(stage, model)
    total = passes(stage, model) * (parts["layers"] + parts["attention"]) + 4 * parts.get("similarity", 0)
    if stage.kind == "diffusion":
        total += 3 * parts["logits"] * 2 * capacity(stage, mesh)
    return total


def hbm_bytes(stage, model: transformer.TransformerConfig, mesh) -> float:
    """An estimate of the bytes that a chip moves between HBM and core in a step.

    weights      once per pass in the compute dtype (an fsdp mesh gathers them)
    optimizer    seven float32 passes over the shard: read parameter, gradient and two moments, write three
    activations  per layer and token the widths that leave a fusion: about 6 of the residual stream, 4 of the heads,
                 3 of the MLP
    logits       written and read twice in float32, their gradient written and read twice; each chunk of them reads the
                 table twice, and reads and writes the gradient of the table
    """
    size = jnp.dtype(model.dtype).itemsize
    total, _ = transformer.count_params(transformer.abstract_params(model))
    local_tokens = tokens(stage) / sharding.batch_shards(mesh)
    width = 6 * model.hidden_size + 4 * model.num_heads * model.head_dim + 3 * model.intermediate_size
    times = passes(stage, model)
    activations = times * local_tokens * model.num_layers * width * size / mesh.shape["tensor"]
    weights = times * stage.execution.microbatches * total * size / mesh.shape["tensor"]
    logits = 0.0
    if stage.kind == "diffusion":
        masked, table = capacity(stage, mesh) * local_tokens, model.vocab_size * model.hidden_size
        chunks = max(stage.execution.microbatches, masked / stage.execution.logits_chunk)
        logits = masked * model.vocab_size * 3 * (4 + size) + chunks * table * 2 * (4 + size)
    return activations + weights + logits + 7 * 4 * total / (mesh.shape["fsdp"] * mesh.shape["tensor"])
