"""The memory, time and traffic of a training step on TPUs that this machine does not have, before you pay for them.

libtpu compiles the real step of a stage for a topology of TPU chips, without a TPU. The plan reports, per chip:

    memory       XLA's account of the compiled program
    FLOPs        by formula for full rows (embed.training.flops); XLA's count omits kernels and the trip counts of loops
    collectives  read from the compiled program (embed.training.hlo)
    HBM traffic  estimated by formula (embed.training.flops)
"""

import dataclasses
import math
import re
import time

import jax
import numpy as np

from embed.models import sharding, transformer
from embed.objectives import masked_diffusion
from embed.training import flops, stages
from embed.training.flops import CHIPS, Chip
from embed.training.hlo import BETWEEN, collective_bytes
from embed.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step. Bytes and FLOPs are per chip, seconds per step."""

    chips: int
    slices: int
    shards: int  # of the rows of a batch
    chip: Chip
    memory: dict[str, float]  # kind -> bytes
    model_flops: float  # without recomputation
    hardware_flops: float  # with it
    hbm: float  # bytes between HBM and core
    collectives: dict[str, float]  # kind -> bytes sent; "… between slices" over the data-center network
    tokens: int  # of the global batch, padding included
    compile_seconds: float

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.chip.memory

    @property
    def bounds(self) -> dict[str, float]:
        """Lower bounds on the seconds of a step, by compute, HBM, interconnect and the network between slices."""
        return {
            "compute": self.hardware_flops / self.chip.flops,
            "HBM": self.hbm / self.chip.bandwidth,
            "interconnect": sum(n for k, n in self.collectives.items() if BETWEEN not in k) / self.chip.interconnect,
            "network": sum(n for k, n in self.collectives.items() if BETWEEN in k) / self.chip.network,
        }


class DoesNotFitError(RuntimeError):
    """The compiler refused a step that needs more memory than a chip has. The message is the compiler's."""

    exit_code = 1


def parse_topology(topology: str) -> tuple[str, int]:
    """The chip and the number of chips: ("v5p", 128) for "v5p:4x4x8". ValueError for a chip that is not in CHIPS."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"topology {topology!r} must be CHIP:AxB or CHIP:AxBxC with a chip of {', '.join(CHIPS)}")
    return name, math.prod(map(int, shape.split("x")))


def compile_step(stage, model: transformer.TransformerConfig, mesh):
    """The compiled train step of a stage over a mesh, the one that `loop.train` runs. May raise DoesNotFitError."""
    lowered = make_step(stage, model, mesh, steps=100, seed=0, mask_id=0, left_shift=True).lower()
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        kind, _, sentence = str(error).splitlines()[0].partition(": ")
        if kind != "RESOURCE_EXHAUSTED":
            raise
        raise DoesNotFitError(f"does not fit: {sentence}") from None


def make_plan(stage, model: transformer.TransformerConfig, topology: str, axes: dict, slices: int = 1) -> Plan:
    """Compile a stage's step for `slices` slices of a topology and return its costs.

    `model` is that of the stage (`stages.stage_model`). `axes` is config.execution.mesh: {"data": int, "fsdp": int,
    "tensor": int}.
    ValueError if the rows do not divide over the devices or the logits buffer is too small (`check_capacity`).
    DoesNotFitError if the compiler refuses the step because it needs too much memory; a returned plan may not fit
    either (`fits`).
    """
    from jax.experimental import topologies

    name, chips = parse_topology(topology)
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    chips *= slices
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:  # the plugin raises its own exception types
        raise ValueError(f"topology {topology}: {str(error).splitlines()[0]}; needs pip install -e '.[tpu]'") from None
    if len(devices) != chips:  # v4 and v5p may be described by core
        raise ValueError(f"topology {topology} has {len(devices)} devices, expected {chips}")
    mesh = sharding.make_mesh(**axes, devices=devices)
    if model.attention == "auto":  # choose the kernel for the topology, not for this machine
        length, head = stage.batch.length, model.head_dim
        model = dataclasses.replace(model, attention="splash" if length % 128 == head % 128 == 0 else "xla")
    check_capacity(stage, sharding.batch_shards(mesh))
    start = time.perf_counter()
    compiled = compile_step(stage, model, mesh)
    seconds = time.perf_counter() - start
    return Plan(
        chips=chips,
        slices=slices,
        shards=sharding.batch_shards(mesh),
        chip=CHIPS[name],
        memory=memory(compiled, model, mesh),
        model_flops=flops.model_flops(stage, model) / chips,
        hardware_flops=flops.hardware_flops(stage, model, mesh) / chips,
        hbm=flops.hbm_bytes(stage, model, mesh),
        collectives=collective_bytes(compiled.as_text(), chips, slices),
        tokens=flops.tokens(stage),
        compile_seconds=seconds,
    )


def check_capacity(stage, shards: int, draws: int = 8) -> None:
    """ValueError if a diffusion step over `shards` devices masks more tokens than fit into a device's logits buffer.

    It masks `draws` random batches of full rows and looks at the device and microbatch with the most masked tokens.
    """
    if stage.kind != "diffusion":
        return
    rows, length, microbatches = stage.batch.rows, stage.batch.length, stage.execution.microbatches
    share = masked_diffusion.capacity(rows, length, shards, microbatches, **stages.noise(stage))
    capacity = int(share * rows * length / shards / microbatches)
    full, how = np.ones((rows, length), np.int32), stages.noise(stage)
    corrupt = jax.jit(lambda key: masked_diffusion.corrupt(key, full, full > 0, mask_id=0, **how)[1].sum(1))
    for k in range(draws):
        masked = np.asarray(corrupt(jax.random.key(k))).reshape(shards * microbatches, -1).sum(1)
        if masked.max() > capacity:
            raise ValueError(
                f"{masked.max()} masked tokens in a device's {rows // shards // microbatches} rows exceed the capacity "
                f"of {capacity} logits (rows={rows}, length={length}, {shards} devices, microbatches={microbatches}): "
                "embed.objectives.masked_diffusion.capacity is too small"
            )


def memory(compiled, model: transformer.TransformerConfig, mesh) -> dict[str, float]:
    """Bytes that a chip holds at the peak of a step, by kind, from XLA's account of the compiled program."""
    stats = compiled.memory_analysis()
    params = transformer.abstract_params(model)
    shardings = sharding.parameter_shardings(mesh, params)
    shard = sum(
        math.prod(s.shard_shape(x.shape)) * 4 for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings))
    )
    peak = getattr(stats, "peak_memory_in_bytes", 0) or (stats.argument_size_in_bytes + stats.temp_size_in_bytes)
    state = stats.argument_size_in_bytes - shard
    return {
        "parameters": shard,
        "optimizer and batch": state,
        "program": stats.generated_code_size_in_bytes,
        "activations, gathered weights, gradients": max(peak - stats.argument_size_in_bytes, 0),
    }


def parameter_table(model: transformer.TransformerConfig, topology: str, axes: dict, slices: int = 1) -> str:
    """A Markdown table: each parameter's shape, its sharding on a topology, its float32 megabytes per chip."""
    _, chips = parse_topology(topology)
    mesh = jax.sharding.AbstractMesh(sharding.mesh_sizes(**axes, devices=chips * slices), sharding.AXES)
    params = transformer.abstract_params(model)
    lines = ["| parameter | shape | sharding | MB per chip |", "|---|---|---|---:|"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), s in zip(leaves, jax.tree.leaves(sharding.parameter_shardings(mesh, params))):
        size = math.prod(s.shard_shape(x.shape)) * 4 / 1e6
        lines.append(f"| {sharding.parameter_name(path)} | {list(x.shape)} | {tuple(s.spec)} | {size:.2f} |")
    return "\n".join(lines) + "\n"


def describe(plan: Plan, stage, model, steps: int, mfu: float, dollars: float | None) -> str:
    """The text of a plan; `steps`, `mfu` (a fraction) and `dollars` per chip hour give the cost of the schedule."""
    chip, bounds = plan.chip, plan.bounds
    bound = max(bounds, key=bounds.get)
    spare = (chip.memory - plan.peak) / 1e9
    rows, length = flops.tokens(stage) // stage.batch.length, stage.batch.length
    slices = f" in {plan.slices} slices" if plan.slices > 1 else ""
    lines = [
        f"{plan.chips} chips{slices}, {rows} rows of {length} tokens in {plan.shards} shards; compiled in "
        f"{plan.compile_seconds:.0f} s",
        "",
        f"{'fits' if plan.fits else 'does not fit'}: {plan.peak / 1e9:.2f} of {chip.memory / 1e9:.0f} GB per chip, "
        f"{abs(spare):.2f} GB {'to spare' if plan.fits else 'over'}",
        *(f"  {size / 1e9:8.3f} GB  {kind}" for kind, size in plan.memory.items()),
        "",
        f"model FLOPs per step: {plan.model_flops * plan.chips:.3e} (three forward passes over full rows, with "
        "padding and attention between segments)",
        *(f"  {value:10.3e}  {part}, one forward pass" for part, value in flops.forward_flops(stage, model).items()),
        "",
        f"collectives, sent per chip and step: {sum(plan.collectives.values()) / 1e9:.3f} GB",
        *(f"  {size / 1e9:8.3f} GB  {kind}" for kind, size in sorted(plan.collectives.items())),
        "",
        f"least step time: {bounds[bound]:.3f} s, bound by {bound}",
        *(f"  {seconds:8.3f} s  {kind}" for kind, seconds in bounds.items() if seconds),
    ]
    total, rate = plan.tokens * steps, plan.chips * chip.flops * mfu
    seconds = plan.model_flops * plan.chips * steps / rate
    hours = seconds / 3600
    lines += [
        "",
        f"schedule: {steps:,} steps, {total:.3e} tokens: {hours:,.1f} hours, {hours * plan.chips:,.0f} chip hours at "
        f"{mfu:.0%} MFU",
    ]
    if dollars is not None:
        lines.append(f"  {hours * plan.chips * dollars:,.0f} dollars at {dollars} per chip hour")
    return "\n".join(lines)
