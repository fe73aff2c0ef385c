"""What a training step needs on hardware that this machine has not: memory, time and traffic, before paying.

The stage's real step is compiled for a topology of TPU chips by libtpu (no TPU needed) and read:

    memory       XLA's own account of the compiled program, a chip
    FLOPs        counted by formula (`model_flops`); the program's own count omits kernels and repeats of loops
    collectives  read from the compiled program, times the trip counts of the loops they stand in
    HBM traffic  estimated by formula (`hbm_bytes`)
"""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from embed.models import sharding, transformer
from embed.training import loop, stages
from embed.training.optimizer import make_optimizer, wsd_schedule


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip: bfloat16 FLOP/s, HBM bytes and bytes/s, bytes/s over all links and between slices."""

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    network: float  # the data-centre network, a chip's share


# cloud.google.com/tpu/docs: v4, v5e, v5p, v6e.
CHIPS = {
    "v4": Chip(275e12, 32e9, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95e9, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32e9, 1.640e12, 448e9, 12.5e9),
}

# jax's names of devices -> dense bfloat16 FLOP/s of one: of the chips above, and of NVIDIA's data sheets (without sparsity).
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
    """bfloat16 FLOP/s of one of this process's devices, None where it is not known."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind == name or (kind.startswith("NVIDIA") and kind.startswith(name))]
    return PEAK_FLOPS[names[0]] if names else None


def least_seconds(stage, model: transformer.TransformerConfig) -> float | None:
    """What a step's model FLOPs take on this run's devices at their peak; None where the peak is not known."""
    peak = device_peak()
    return model_flops(stage, model) / (jax.device_count() * peak) if peak else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step. Bytes and FLOPs are per chip, seconds per step."""

    chips: int
    slices: int
    shards: int  # parts of a batch's rows
    chip: Chip
    memory: dict[str, float]  # kind -> bytes
    model_flops: float  # without what is computed again
    hardware_flops: float
    hbm: float
    collectives: dict[str, float]  # kind -> bytes sent; "… between slices" over the data-centre network
    tokens: int  # of the global batch
    compile_seconds: float

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.chip.memory

    @property
    def bounds(self) -> dict[str, float]:
        """The least seconds a step takes by compute, memory, interconnect and the network between slices."""
        return {
            "compute": self.hardware_flops / self.chip.flops,
            "HBM": self.hbm / self.chip.bandwidth,
            "interconnect": sum(n for k, n in self.collectives.items() if BETWEEN not in k) / self.chip.interconnect,
            "network": sum(n for k, n in self.collectives.items() if BETWEEN in k) / self.chip.network,
        }


class DoesNotFitError(RuntimeError):
    """The compiler refused a step that needs more memory than a chip has. The sentence is its own."""

    exit_code = 1


def parse_topology(topology: str) -> tuple[str, int]:
    """("v5p", 128) of "v5p:4x4x8". Raises ValueError for a chip that is not in CHIPS."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"topology {topology!r} must be CHIP:AxB or CHIP:AxBxC with a chip of {', '.join(CHIPS)}")
    return name, math.prod(map(int, shape.split("x")))


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


def compile_step(stage, model: transformer.TransformerConfig, mesh, mask_id: int):
    """The compiled train step of a stage over a mesh, as `loop.train` runs it. DoesNotFitError as it says."""
    loss = stages.make_loss(stage, model, mask_id, left_shift=True)
    optimizer = make_optimizer(stage.optimizer, wsd_schedule(stage.optimizer.learning_rate, 100, 0.1, 0.1))
    params = transformer.abstract_params(model)
    params_sharding = sharding.parameter_shardings(mesh, params)
    sharding.check_sharded(mesh, params, params_sharding)
    state = jax.eval_shape(optimizer.init, params)
    state_sharding = sharding.state_shardings(mesh, state, params_sharding)
    rows = NamedSharding(mesh, sharding.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in abstract_batch(stage).items()
    }
    step = jax.jit(
        loop.make_train_step(loss, optimizer, 0, 100),
        donate_argnums=(0, 1),
        out_shardings=(params_sharding, state_sharding, None),
    )
    with jax.set_mesh(mesh):
        lowered = step.lower(
            sharding.with_sharding(params, params_sharding),
            sharding.with_sharding(state, state_sharding),
            batch,
            jax.ShapeDtypeStruct((), jnp.int32),
        )
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        kind, _, sentence = str(error).splitlines()[0].partition(": ")
        if kind != "RESOURCE_EXHAUSTED":
            raise
        raise DoesNotFitError(f"does not fit: {sentence}") from None


def make_plan(
    stage, model: transformer.TransformerConfig, topology: str, axes: dict, mask_id: int = 0, slices: int = 1
) -> Plan:
    """Compile a stage's step for so many slices of a topology and account for it. `axes` are those of config.mesh.

    DoesNotFitError if the compiler finds no room for it; a plan may still say that it does not fit.
    """
    from jax.experimental import topologies

    name, chips = parse_topology(topology)
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    chips *= slices
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:  # the plugin raises its own kinds
        raise ValueError(f"topology {topology}: {str(error).splitlines()[0]}; needs pip install -e '.[tpu]'") from None
    if len(devices) != chips:  # v4 and v5p may be described by core
        raise ValueError(f"topology {topology} has {len(devices)} devices, expected {chips}")
    mesh = sharding.make_mesh(**axes, devices=devices)
    if model.attention == "auto":  # of the topology, not of this machine
        length, head = stage.batch.length, model.head_dim
        model = dataclasses.replace(model, attention="splash" if length % 128 == head % 128 == 0 else "xla")
    start = time.perf_counter()
    compiled = compile_step(stage, model, mesh, mask_id)
    seconds = time.perf_counter() - start
    flops = model_flops(stage, model) / chips
    # Forward passes that are run again. A sum over rows, as the diffusion loss is, has each part's gradient at once.
    again = (model.remat == "full") + (stage.microbatches > 1 and stage.kind != "diffusion")
    return Plan(
        chips=chips, slices=slices, shards=sharding.batch_shards(mesh), chip=CHIPS[name], memory=memory(compiled, model, mesh),
        model_flops=flops, hardware_flops=flops * (3 + again) / 3, hbm=hbm_bytes(stage, model, mesh, again),
        collectives=collective_bytes(compiled.as_text(), chips, slices), tokens=tokens(stage), compile_seconds=seconds,
    )  # fmt: skip


def tokens(stage) -> int:
    """Tokens of a global batch, padding included."""
    rows, length = abstract_batch(stage)["tokens"][0]
    return rows * length


def forward_flops(stage, model: transformer.TransformerConfig) -> dict[str, float]:
    """FLOPs of one forward pass of the global batch, by part.

    layers       2 · tokens · (matrix parameters of a layer) · layers
    attention    4 · tokens · length · heads · head_dim · layers    full rows, both directions
    logits       2 · tokens · capacity · vocabulary · width         diffusion
    similarity   2 · queries · (documents it is compared with) · prefix, over the prefixes     contrastive
    """
    D, H, K, d, F = (
        model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim, model.intermediate_size,
    )  # fmt: skip
    n, length = tokens(stage), stage.batch.length
    flops = {
        "layers": 2.0 * n * model.num_layers * (D * d * (2 * H + 2 * K) + 3 * D * F),
        "attention": 4.0 * n * length * H * d * model.num_layers,
    }
    if stage.kind == "diffusion":
        return flops | {"logits": 2.0 * n * stage.logits_capacity * model.vocab_size * D}
    shapes = {name: shape for name, (shape, _) in abstract_batch(stage).items()}
    queries = shapes["query_slots"][0]
    others = {
        "pair": 2 * queries,
        "triplet": queries + math.prod(shapes.get("negative_slots", (0,))),
        "contextual": shapes.get("chunk_slots", (0,))[0] + 2 * queries,
    }[stage.kind]
    return flops | {"similarity": 2.0 * queries * others * sum(stage.matryoshka)}


def model_flops(stage, model: transformer.TransformerConfig) -> float:
    """FLOPs of a step over all chips: the forward pass three times, since each product has two in its gradient."""
    return 3 * sum(forward_flops(stage, model).values())


def hbm_bytes(stage, model: transformer.TransformerConfig, mesh, again: int) -> float:
    """Bytes a chip moves between memory and core in a step, estimated.

    Weights once a pass in the compute dtype (a fsdp mesh gathers them), the optimizer's seven float32 passes over its
    shard (read parameter, gradient and two moments, write three), and of each layer and token the widths that leave a
    fusion: about 6 of the residual stream, 4 of the heads, 3 of the MLP. Logits are written and read twice in float32, their
    gradient is written and read twice; each chunk of them reads the table twice, and reads and writes its gradient.
    """
    size = jnp.dtype(model.dtype).itemsize
    total, _ = transformer.count_params(transformer.abstract_params(model))
    own = tokens(stage) / sharding.batch_shards(mesh)
    width = 6 * model.hidden_size + 4 * model.num_heads * model.head_dim + 3 * model.intermediate_size
    passes = 3 + again
    activations = passes * own * model.num_layers * width * size / mesh.shape["tensor"]
    weights = passes * max(1, stage.microbatches) * total * size / mesh.shape["tensor"]
    logits = 0.0
    if stage.kind == "diffusion":
        masked, table = stage.logits_capacity * own, model.vocab_size * model.hidden_size
        chunks = max(stage.microbatches, masked / stage.logits_chunk)
        logits = masked * model.vocab_size * 3 * (4 + size) + chunks * table * 2 * (4 + size)
    return activations + weights + logits + 7 * 4 * total / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def memory(compiled, model: transformer.TransformerConfig, mesh) -> dict[str, float]:
    """Bytes a chip holds at the peak of a step, by kind, as XLA accounts for the compiled program."""
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


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


BETWEEN = "between slices"


def collective_bytes(hlo: str, chips: int, slices: int = 1) -> dict[str, float]:
    """Bytes a chip sends in one run of a compiled program, by kind of collective, each times its loops' trip counts.

    What goes over the network of several slices is counted apart, as "between slices".

    Of an array of B bytes over n chips: all-gather (its result) and reduce-scatter (its operand) B (n-1)/n, all-reduce
    twice that, all-to-all B (n-1)/n, collective-permute B.
    """
    bodies = _computations(hlo)
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    totals: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        for line in bodies[name][1]:
            match = re.search(r"= (.*?) ([a-z-]+)\(", line)
            if not match:
                continue
            result, operator = match.groups()
            kind = operator.removesuffix("-start")
            if kind in COLLECTIVES:
                size, n = float(sum(_bytes(result))), _group_size(line, chips)  # one collective may carry many arrays
                if operator == "collective-permute-start":
                    size = float(max(_bytes(result)))  # operand, result and two words
                elif operator == "all-gather-start":
                    size *= n / (n + 1)  # operands and results
                elif operator == "reduce-scatter":
                    size *= n  # its result is one part of the operand
                if n > 1:
                    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
                    totals[kind] = totals.get(kind, 0.0) + times * size * share
            if operator == "send" and (match := re.search(r'megascale_transfer_type="(\w+)"', line)):
                # What slices exchange goes through the hosts: the array, a word and a token.
                kind = f"{match.group(1).lower().replace('_', '-')} {BETWEEN}"
                share = (2 if kind.startswith("all-reduce") else 1) * (slices - 1) / slices
                totals[kind] = totals.get(kind, 0.0) + times * max(_bytes(result)) * share
            inner = times
            if operator == "while":
                inner = times * _trip_count(line, bodies)
            called = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [name.strip().lstrip("%") for name in group.split(",")]
            for other in called:
                if other in bodies:
                    visit(other, inner)

    visit(entry, 1.0)
    return totals


def _computations(hlo: str) -> dict[str, tuple[bool, list[str]]]:
    """{name: (is the entry, instructions)} of a module's text."""
    found, current = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if head:
            current = head.group(2)
            found[current] = (bool(head.group(1)), [])
        elif line.rstrip() == "}":
            current = None
        elif current:
            found[current][1].append(line)
    return found


def _trip_count(line: str, bodies) -> int:
    """How often a loop runs: what the compiler noted, or the constant that its condition compares with."""
    if match := re.search(r"known_trip_count\D*(\d+)", line):
        return int(match.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line).group(1)
    constants = [
        int(n) for text in bodies[condition][1] for n in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    ]
    return max(constants, default=1)


def _bytes(types: str) -> list[int]:
    """Sizes of the arrays in the text of a result type."""
    return [
        _SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
        if kind in _SIZES
    ]


def _group_size(line: str, chips: int) -> int:
    """Chips that take part in one instance of a collective."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)) if axis in sizes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match.group(1).split(","))
    return chips


def parameter_table(model: transformer.TransformerConfig, topology: str, axes: dict, slices: int = 1) -> str:
    """Each parameter's shape, its sharding as the rules resolve it on a topology, and its float32 bytes a chip."""
    _, chips = parse_topology(topology)
    mesh = jax.sharding.AbstractMesh(sharding.mesh_sizes(**axes, devices=chips * slices), sharding.AXES)
    params = transformer.abstract_params(model)
    lines = ["| parameter | shape | sharding | MB a chip |", "|---|---|---|---:|"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), s in zip(leaves, jax.tree.leaves(sharding.parameter_shardings(mesh, params))):
        size = math.prod(s.shard_shape(x.shape)) * 4 / 1e6
        lines.append(f"| {sharding.parameter_name(path)} | {list(x.shape)} | {tuple(s.spec)} | {size:.2f} |")
    return "\n".join(lines) + "\n"


def describe(plan: Plan, stage, model, steps: int, mfu: float, dollars: float | None) -> str:
    """A plan in words and numbers."""
    chip, bounds = plan.chip, plan.bounds
    bound = max(bounds, key=bounds.get)
    spare = (chip.memory - plan.peak) / 1e9
    lines = [
        f"{plan.chips} chips{f' in {plan.slices} slices' if plan.slices > 1 else ''}, {plan.shards} parts of {tokens(stage) // stage.batch.length} rows of {stage.batch.length} "
        f"tokens; compiled in {plan.compile_seconds:.0f} s",
        "",
        f"{'fits' if plan.fits else 'does not fit'}: {plan.peak / 1e9:.2f} of {chip.memory / 1e9:.0f} GB a chip, "
        f"{abs(spare):.2f} GB {'to spare' if plan.fits else 'too many'}",
        *(f"  {size / 1e9:8.3f} GB  {kind}" for kind, size in plan.memory.items()),
        "",
        f"model FLOPs a step: {plan.model_flops * plan.chips:.3e} (three forward passes)",
        *(f"  {value:10.3e}  {part}, a forward pass" for part, value in forward_flops(stage, model).items()),
        "",
        f"collectives, sent by a chip in a step: {sum(plan.collectives.values()) / 1e9:.3f} GB",
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
        f"schedule: {steps:,} steps, {total:.3e} tokens: {hours:,.1f} hours, {hours * plan.chips:,.0f} chip hours at {mfu:.0%} MFU",
    ]
    if dollars is not None:
        lines.append(f"  {hours * plan.chips * dollars:,.0f} dollars at {dollars} a chip hour")
    return "\n".join(lines)
