"""Training steps of each stage, compared with the same model in PyTorch: tokens per second, MFU, peak memory.

    python benchmarks/train.py                                    CPU: configs/quickstart.py; GPU: 0.6B diffusion
    python benchmarks/train.py --stages pair:14 --output=FILE     one stage in 14 microbatches (gradient caching)
    python benchmarks/train.py --config=configs/pplx_embed.py:size=0.6b --stages diffusion:4 pair:8 --rows=8 --groups=4

Both sides run the stage of the config on the same random texts, which all have one length. `embed` packs them into rows
as its loader does. PyTorch (transformers' Qwen3, scaled-dot-product attention, fused AdamW, torch.compile on a GPU)
gets them as a batch without padding. The objective is the same, term by term, with Matryoshka prefixes, int8 rounding,
clipping and gradient caching. Only `embed` masks equal contents, which random texts do not have. Compute is in bfloat16
with float32 parameters, on CPU in float32.

Each side and stage runs in a separate process. The processes take turns for --rounds rounds, because two processes of
the same program differ by more than the steps of one. Needs no data, TensorFlow or seqio. Without torch, its rows say
so.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent
SIDES = ("embed", "PyTorch")
# glibc's malloc keeps freed memory, as embed.cli.common sets it. For both sides: it makes both faster on CPU.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}
DEFAULTS = {  # by platform; pair:7 divides the quickstart's 98 rows into 7 microbatches of 14
    "cpu": dict(
        config="configs/quickstart.py", stages=["diffusion", "pair", "pair:7", "contextual", "triplet"], rows=0
    ),
    "gpu": dict(config="configs/pplx_embed.py:size=0.6b", stages=["diffusion:4"], rows=8),
}


# --- what is measured -------------------------------------------------------------------------------------------


def text_length(stage) -> int:
    """The largest length at which the rows of a group hold all of its texts uncut."""
    from embed import rows

    batch, n = stage.batch, stage.batch.group_size
    shape = rows.RowShape(batch.length, batch.spans, batch.segments)
    texts, chunks = n * (2 + batch.get("num_negatives", 0)), 0
    if stage.kind == "contextual":
        texts, chunks = n * batch.max_queries_per_document, batch.max_chunks
    spans = np.array([chunks] * (n if chunks else 0) + [1] * texts)
    longest = min(batch.length, batch.rows_per_group * batch.length // spans.sum())
    return next(
        length
        for length in range(longest, 0, -1)
        if rows.first_fit_decreasing(spans * length, spans, shape, batch.rows_per_group) is not None
    )


def random_texts(stage, vocabulary: int) -> dict[str, np.ndarray]:
    """The texts of both sides: rows, or queries, documents and negatives, int32[…, length]. The last id is the mask."""
    batch = stage.batch
    if stage.kind == "diffusion":
        shapes = {"rows": (batch.rows, batch.length)}
    else:
        n, length = batch.groups * batch.group_size, text_length(stage)
        shapes = {"queries": (n, length), "documents": (n, length)}
        if stage.kind == "triplet":
            shapes["negatives"] = (n, batch.num_negatives, length)
        if stage.kind == "contextual":
            shapes = {
                "queries": (n, batch.max_queries_per_document, length),
                "documents": (n, batch.max_chunks, length),
            }
    rng = np.random.default_rng(0)
    return {name: rng.integers(5, vocabulary - 1, shape).astype(np.int32) for name, shape in shapes.items()}


def specification(arguments, selection: str) -> tuple[dict, dict, float]:
    """(stage and model as plain values, texts, model FLOPs per step) of "STAGE" or "STAGE:MICROBATCHES"."""
    from embed import config as configs
    from embed.models import transformer
    from embed.training import flops, stages

    config = configs.load(arguments.config, arguments.overrides)
    name, _, microbatches = selection.partition(":")
    stage = config.stages[name]
    stage.execution.microbatches = int(microbatches or stage.execution.microbatches)
    size = "rows" if stage.kind == "diffusion" else "groups"
    stage.batch[size] = getattr(arguments, size) or stage.batch[size]
    config.model.dtype = "float32" if arguments.platform == "cpu" else "bfloat16"
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    model = stages.stage_model(stage, model)
    texts = random_texts(stage, model.vocab_size)
    # A segment is one text, or all chunks of a document.
    lengths = [
        (x.size, x[0].size if stage.kind == "contextual" and name == "documents" else x.shape[-1])
        for name, x in texts.items()
    ]
    tokens, squares = (sum(size * length**power for size, length in lengths) for power in (0, 1))
    settings = {"stage": stage.to_dict(), "model": dataclasses.asdict(model)}
    return settings, texts, flops.model_flops(stage, model, tokens, squares)


def timed(step, steps: int) -> list[float]:
    """Seconds of each of `steps` calls, after one call that compiles."""
    seconds = []
    for k in range(steps + 1):
        begin = time.perf_counter()
        step(k)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


# --- embed ------------------------------------------------------------------------------------------------------


class Texts:
    """The random texts as a store for the contrastive loader, whose batch has each example once."""

    def __init__(self, tables: dict[str, np.ndarray], contextual: bool):
        self.tables, self.contextual = tables, contextual

    def __len__(self) -> int:
        return len(self.tables["queries"])

    def read(self, indices: np.ndarray) -> list[dict]:
        return [self._example(**{name: table[i] for name, table in self.tables.items()}) for i in indices]

    def _example(self, queries, documents, negatives=()) -> dict:
        negatives = np.reshape(negatives, (-1, documents.shape[-1])).astype(np.int32)

        def lengths(table):
            return np.full(len(table), table.shape[-1])

        if self.contextual:
            return {
                "document": documents.reshape(-1),
                "chunk_lengths": lengths(documents),
                "queries": queries.reshape(-1),
                "query_lengths": lengths(queries),
                "positives": np.arange(len(queries)) % len(documents),
            }
        return {
            "query": queries,
            "document": documents,
            "negatives": negatives.reshape(-1),
            "negative_lengths": lengths(negatives),
        }


def make_batch(stage, texts: dict[str, np.ndarray]) -> dict:
    """The batch of packed rows that the loader builds from the texts."""
    from embed.training import stages

    if stage.kind == "diffusion":
        tokens = texts["rows"]
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    stores = {"random": Texts(texts, stage.kind == "contextual")}
    batch = stages.make_loader(stage, stores, [(1, {"random": 1.0})], seed=0, separator_id=None).batch(0)
    stats = batch.pop("stats")
    if stats["cut"] or stats["lost"]:
        raise ValueError(f"{stats['cut']} texts of stage {stage.kind} were cut and {stats['lost']} lost")
    return batch


def measure_embed(stage, model: dict, texts: dict[str, np.ndarray], steps: int) -> dict:
    import jax

    from embed.models import sharding, transformer
    from embed.training.step import make_step

    libraries = peak_memory()
    model = transformer.TransformerConfig(**model)
    batch = make_batch(stage, texts)
    fill = float((batch["segment_ids"] > 0).mean())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    train_step = make_step(stage, model, mesh, steps=100, seed=0, mask_id=model.vocab_size - 1)
    params = train_step.random_params(jax.random.key(0))
    state, batch = train_step.init(params), train_step.put(batch)

    def step(k):
        nonlocal params, state
        params, state, metrics = train_step(params, state, batch, k)
        jax.block_until_ready((params, metrics))

    seconds = timed(step, steps)
    stats = jax.devices()[0].memory_stats()
    memory = {"memory": stats["peak_bytes_in_use"]} if stats else {"memory": peak_memory(), "libraries": libraries}
    return {"seconds": seconds, "fill": fill, **memory}


# --- PyTorch ----------------------------------------------------------------------------------------------------


def pytorch_model(model: dict, device: str):
    """transformers' Qwen3 with the same sizes, bidirectional."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        intermediate_size=model["intermediate_size"],
        is_causal=False,
        use_cache=False,
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
    )
    network = transformers.Qwen3Model(config).to(device).train()
    if model["remat"] != "none":
        network.gradient_checkpointing_enable()
    return network


def pytorch_contrast(stage, q, d, others):
    """The loss of embed.objectives.contrastive for one prefix.

    q [N, D] are queries, d [N or C, D] documents or chunks, others [M, D] negatives or whole documents, or None.
    """
    import torch
    from torch.nn import functional as F

    q, d, others = (x if x is None else F.normalize(x, dim=-1) for x in (q, d, others))
    index = torch.arange(len(q), device=q.device)

    def nll(positive, scores, allowed):
        logits = torch.cat([positive[:, None], scores.masked_fill(~allowed, -torch.inf)], 1) / stage.temperature
        return (logits.logsumexp(1) - positive / stage.temperature).mean()

    def with_queries(documents, other, same):
        """Negatives: `other` documents that are not the `same`, and `other` queries, both only below the margin."""
        qd, qq = q @ documents.T, q @ q.T
        positive = qd.diagonal()
        limit = positive[:, None] + stage.margin
        allowed = torch.cat([other & ~same & (qd <= limit), other & (qq <= limit)], 1)
        return nll(positive, torch.cat([qd, qq], 1), allowed)

    other = index[:, None] != index
    if stage.kind == "pair":
        return with_queries(d, other, ~other)
    if stage.kind == "triplet":
        scores = torch.cat([q @ d.T, q @ others.T], 1)
        everyone = torch.ones(len(q), len(others), dtype=torch.bool, device=q.device)
        return nll(scores.diagonal(), scores, torch.cat([other, everyone], 1))
    queries, chunks = stage.batch.max_queries_per_document, stage.batch.max_chunks
    document, of_chunk = index // queries, torch.arange(len(d), device=q.device) // chunks
    target = document * chunks + index % queries % chunks
    scores, in_document = q @ d.T, document[:, None] == of_chunk
    allowed = target[:, None] != torch.arange(len(d), device=q.device)
    positive = scores.gather(1, target[:, None])[:, 0]
    in_sequence, in_batch = nll(positive, scores, allowed & in_document), nll(positive, scores, allowed)
    chunk_loss = stage.alpha * in_sequence + (1 - stage.alpha) * in_batch
    document_loss = with_queries(others[document], target[:, None] != target, document[:, None] == document)
    return stage.beta[0] * document_loss + (1 - stage.beta[0]) * chunk_loss


def pytorch_loss(stage, model: dict, network, texts: dict[str, np.ndarray], device: str):
    """A function that adds the gradients of a step to the network and returns the loss."""
    import torch
    from torch.nn import functional as F

    forward = torch.compile(network) if device == "cuda" else network
    ids = {name: torch.tensor(x, dtype=torch.int64, device=device) for name, x in texts.items()}

    def autocast():
        return torch.autocast(device, torch.bfloat16, enabled=model["dtype"] == "bfloat16")

    def hidden(rows):
        with autocast():
            return forward(input_ids=rows).last_hidden_state

    def diffusion():
        rows = ids["rows"]
        # Stratified over rows as in embed, or the number of masked tokens would vary from step to step.
        unit = (torch.rand(1, device=device) + torch.randperm(len(rows), device=device) / len(rows)) % 1
        t = (1e-3 + (1 - 1e-3) * unit)[:, None]
        masked, total = torch.rand(rows.shape, device=device) < t, 0
        for part in torch.arange(len(rows), device=device).chunk(stage.execution.microbatches):
            m, x = masked[part], rows[part]
            h = hidden(x.masked_fill(m, model["vocab_size"] - 1))[m]
            with autocast():
                logits = F.linear(h, network.embed_tokens.weight)
            nll = F.cross_entropy(logits.float(), x[m], reduction="none")
            loss = (nll / t.expand_as(rows)[part][m]).sum() / rows.numel()
            loss.backward()
            total = total + loss.detach()
        return total

    def int8(v):
        v = 127 * torch.tanh(v)
        return v + (v.round() - v).detach()

    def mean(rows, pieces):
        """The mean hidden state of each of `pieces` equal parts of a row, [rows, pieces, D]."""
        h = hidden(rows).float()
        return h.view(len(rows), pieces, -1, h.shape[-1]).mean(2)

    def objective(tables):
        pooled = {name: int8(x.flatten(0, 1)) for name, x in tables.items()}
        others = pooled.get("negatives")
        if stage.kind == "contextual":
            others = int8(tables["documents"].mean(1))  # all chunks have the same length
        vectors = pooled["queries"], pooled["documents"], others
        losses = [pytorch_contrast(stage, *(x if x is None else x[:, :p] for x in vectors)) for p in stage.matryoshka]
        return sum(losses) / len(losses)

    def contrastive():
        pieces = {name: 1 for name in ids}
        rows = {name: x.flatten(0, -2) for name, x in ids.items()}
        if stage.kind == "contextual":  # late chunking: a document is one row
            pieces["documents"], rows["documents"] = ids["documents"].shape[1], ids["documents"].flatten(1)
        if stage.execution.microbatches == 1:
            loss = objective({name: mean(rows[name], pieces[name]) for name in rows})
            loss.backward()
            return loss.detach()
        # GradCache: compute all vectors without a graph, then their gradients, then each part again with a graph.
        parts = {name: rows[name].chunk(stage.execution.microbatches) for name in rows}
        with torch.no_grad():
            vectors = {name: torch.cat([mean(part, pieces[name]) for part in parts[name]]) for name in rows}
        for x in vectors.values():
            x.requires_grad_()
        loss = objective(vectors)
        loss.backward()
        for name, x in vectors.items():
            for part, gradient in zip(parts[name], x.grad.chunk(stage.execution.microbatches)):
                mean(part, pieces[name]).backward(gradient)
        return loss.detach()

    return diffusion if stage.kind == "diffusion" else contrastive


def measure_pytorch(stage, model: dict, texts: dict[str, np.ndarray], steps: int) -> dict:
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  so that `libraries` includes it

    libraries, settings = peak_memory(), stage.optimizer
    device = "cpu" if model["dtype"] == "float32" else "cuda"
    network = pytorch_model(model, device)
    loss = pytorch_loss(stage, model, network, texts, device)
    adamw = torch.optim.AdamW(
        network.parameters(),
        lr=1e-4,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step(k):
        value = loss()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        value.item()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed(step, steps)
    if device == "cuda":
        return {"seconds": seconds, "fill": 1.0, "memory": torch.cuda.max_memory_allocated()}
    return {"seconds": seconds, "fill": 1.0, "memory": peak_memory(), "libraries": libraries}


# --- the table --------------------------------------------------------------------------------------------------


def about() -> dict:
    """Provenance, device and peak FLOP/s. Runs in a process that ends, because jax holds the memory of a GPU."""
    from importlib.metadata import PackageNotFoundError, version

    import jax
    import jax.numpy as jnp

    from embed.checkpoints.provenance import made_with
    from embed.graph import machine
    from embed.training import flops

    source = made_with()
    for name in ("torch", "transformers"):
        try:
            source["versions"][name] = version(name)
        except PackageNotFoundError:
            source["versions"][name] = "not installed"
    peak, peak_source = flops.device_peak(), "published"
    if peak is None:
        a, product = jnp.ones((2048, 2048)), jax.jit(jnp.matmul)
        seconds = timed(lambda _: product(a, a).block_until_ready(), 8)
        peak, peak_source = (
            2 * 2048**3 / min(seconds),
            "measured: the fastest of 8 products of 2048 x 2048 matrices, by jax",
        )
    return source | {
        "machine": machine(),
        "peak": peak,
        "peak_source": peak_source,
        "platform": jax.default_backend(),
    }


def child(side: str, *more: str) -> dict:
    """The JSON that a process of one side prints. ValueError with the last error of a process that fails."""
    environment = {**KEEP_FREED_MEMORY, **os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, f"--child={side}", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # jax adds lines after it
        raise ValueError((errors or lines)[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_child(side: str, folder: str, steps: int) -> None:
    if side == "about":
        print(json.dumps(about()))
        return
    settings = json.loads((Path(folder) / "specification.json").read_text(encoding="utf-8"))
    texts = dict(np.load(Path(folder) / "texts.npz"))
    measure = {"embed": measure_embed, "PyTorch": measure_pytorch}[side]
    print(json.dumps(measure(ConfigDict(settings["stage"]), settings["model"], texts, steps)))


def measure_stage(arguments, selection: str, peak: float) -> list[str]:
    """The rows of the table for a stage, one per side."""
    settings, texts, flops = specification(arguments, selection)
    microbatches = settings["stage"]["execution"]["microbatches"]
    label = settings["stage"]["kind"] + (f", {microbatches} microbatches" if microbatches > 1 else "")
    runs, failures = {side: [] for side in SIDES}, {}
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        failures["PyTorch"] = "not installed"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "specification.json").write_text(json.dumps(settings), encoding="utf-8")
        np.savez(Path(folder) / "texts.npz", **texts)
        for side in SIDES * arguments.rounds:
            if side not in failures:
                try:
                    runs[side].append(child(side, f"--folder={folder}", f"--steps={arguments.steps}"))
                except ValueError as error:
                    failures[side] = f"failed: {str(error)[:150]}"
    tokens, lines = sum(x.size for x in texts.values()), []
    medians = {
        side: statistics.median(s for run in runs[side] for s in run["seconds"])
        for side in SIDES
        if side not in failures
    }
    for side in SIDES:
        if side in failures:
            lines.append(f"| {label} | {side} | {failures[side]}" + " |" * 8)
            continue
        of_processes = [statistics.median(run["seconds"]) for run in runs[side]]
        largest = max(runs[side], key=lambda run: run["memory"])
        libraries = f"{largest['libraries'] / 1e9:.2f}" if "libraries" in largest else ""
        ratio = f"{medians['PyTorch'] / medians[side]:.2f}" if "PyTorch" in medians else ""
        cells = [
            label,
            side,
            f"{tokens:,}",
            f"{largest['fill']:.0%}",
            f"{medians[side]:.3f} ({min(of_processes):.3f}–{max(of_processes):.3f})",
            f"{tokens / medians[side]:,.0f}",
            f"{flops / medians[side] / peak:.1%}",
            f"{largest['memory'] / 1e9:.2f}",
            libraries,
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="config file; --config.key=value overrides a field")
    parser.add_argument("--stages", nargs="+", help="STAGE or STAGE:MICROBATCHES")
    parser.add_argument("--rows", type=int, help="rows of a diffusion batch; 0 = the config's")
    parser.add_argument("--groups", type=int, default=0, help="groups of a contrastive batch; 0 = the config's")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after one that compiles")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side and stage")
    parser.add_argument("--peak_tflops", type=float, help="peak of the device; default: published, or measured by jax")
    parser.add_argument("--output", type=Path, help="file for a copy of the output")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.child:
        return run_child(arguments.child, arguments.folder, arguments.steps)
    sys.path.insert(0, str(ROOT))
    source, output = child("about"), []
    arguments.platform = source["platform"]
    for name, value in DEFAULTS.get(arguments.platform, DEFAULTS["gpu"]).items():
        if getattr(arguments, name) is None:
            # The default number of rows applies only to the default config.
            applies = name != "rows" or arguments.config == DEFAULTS["gpu"]["config"]
            setattr(arguments, name, value if applies else 0)
    if arguments.peak_tflops:
        source |= {"peak": arguments.peak_tflops * 1e12, "peak_source": "--peak_tflops"}

    def write(line: str) -> None:
        print(line, flush=True)
        output.append(line)

    load = "{:.1f}".format
    write(f"python {shlex.join(sys.argv)}\ncommit {source['commit']}, {source['machine']}")
    write(", ".join(f"{name} {number}" for name, number in source["versions"].items()))
    write(f"config {arguments.config}; load average before: {load(os.getloadavg()[0])}")
    write(
        f"{arguments.rounds} processes of {arguments.steps} steps per side, alternating; seconds are the median "
        "(fastest–slowest process)"
    )
    write(
        "MFU: for both sides three forward passes by formula, inside segments and without padding, relative to "
        f"{source['peak'] / 1e12:.3g} TFLOP/s ({source['peak_source']})"
    )
    if arguments.platform == "cpu":
        write("memory: peak of a process, including compilation; both sides with malloc keeping freed memory")
    write("")
    write(
        "| stage | program | tokens per step | fill | seconds | tokens/s | MFU | peak memory, GB | of it libraries "
        "| tokens/s relative to PyTorch |"
    )
    write("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for selection in arguments.stages:
        for line in measure_stage(arguments, selection, source["peak"]):
            write(line)
    write(f"\nload average after: {load(os.getloadavg()[0])}")
    if arguments.output:
        arguments.output.write_text("\n".join(output) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
