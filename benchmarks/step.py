"""What a training step of each stage costs, and what each choice that was made for speed is worth on this machine.

    python benchmarks/step.py --config=configs/quickstart.py --workdir=runs/quickstart [--stages pair] [--trace=FOLDER]

Needs a workdir with prepared data. Prints for each stage the seconds of the loss, of its gradient and of the whole step
(the fastest of --repeats runs), with the products' arithmetic and the rate at which it was done; `matmul` is what one
2048³ product reaches. --trace writes a jax.profiler trace of three steps of each stage, for TensorBoard or Perfetto.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from embed import config, pipeline
from embed.cli.common import keep_freed_memory
from embed.models import sharding, transformer
from embed.training import loop, optimizer, stages

VARIANTS = {
    "as configured": {},
    "without dense_barrier": {"dense_barrier": False},
    "layers scanned": {"unroll": 1},
}


def fastest(function, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls after one that compiles."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def flops(stage, model: transformer.TransformerConfig, rows: int, length: int) -> float:
    """Arithmetic of the matrix products of one step: forward and twice that backward, 2 a multiply-add.

    Attention is counted over whole rows, as it is computed here; the diffusion stage adds the vocabulary product,
    forward twice because its logits are recomputed.
    """
    c, tokens = model, rows * length
    heads = c.num_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * c.num_kv_heads * c.head_dim + 3 * c.intermediate_size)
    total = 3 * c.num_layers * 2 * tokens * (layer + 2 * length * heads)
    if stage.kind == "diffusion":
        total += 4 * 2 * tokens * c.vocab_size * c.hidden_size
    return total


def measure(
    run: pipeline.Run, name: str, model: transformer.TransformerConfig, repeats: int, trace: str
) -> list[float]:
    """[GFLOP, seconds of the loss, of the gradient, of the step] of a stage under `model`."""
    stage = run.config.stages[name]
    phases = [(steps, run.mixtures[mixture]) for steps, mixture in stage.curriculum]
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    loader = stages.make_loader(stage, stores, phases, seed=0, separator_id=run.tokenizer.separator_id)
    batch = loader.batch(0)
    batch.pop("stats")
    batch = sharding.put_batch(sharding.make_mesh(), batch)
    loss = stages.make_loss(stage, model, run.tokenizer.mask_id)
    params = transformer.init(model, jax.random.key(0))
    tx = optimizer.make_optimizer(stage.optimizer, lambda step: 1e-4)
    state, key = jax.jit(tx.init)(params), jax.random.key(0)
    value = jax.jit(lambda params: loss(params, batch, key, 0.5)[0])
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch, key, 0.5)[0]))
    step = jax.jit(loop.make_train_step(loss, tx, 0, 100), donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), state]

    def whole():
        held[0], held[1], metrics = step(held[0], held[1], batch, 1)
        return metrics

    seconds = [fastest(lambda: value(params), repeats), fastest(lambda: gradient(params), repeats)]
    seconds.append(fastest(whole, repeats))
    if trace:
        with jax.profiler.trace(f"{trace}/{name}"):
            for _ in range(3):
                jax.block_until_ready(whole())
    return [flops(stage, model, *batch["tokens"].shape) / 1e9, *seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stages", nargs="*", help="default: all of the config")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trace", default="", help="folder for profiler traces")
    parser.add_argument(
        "--returned_memory", action="store_true", help="let malloc hand freed memory back, as by default"
    )
    arguments = parser.parse_args()
    kept = not arguments.returned_memory and keep_freed_memory()
    run = pipeline.Run(config.load(arguments.config), arguments.workdir, arguments.config)
    source = pipeline.provenance()
    print(f"python benchmarks/step.py --config={arguments.config} --workdir={arguments.workdir}:")
    print(f"commit {source['commit']}, {pipeline.machine()},")
    print(", ".join(f"{name} {version}" for name, version in source["versions"].items()), end="")
    print(f"; freed memory {'kept' if kept else 'returned to the kernel'}\n")
    a = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 2048)), jnp.float32)
    product = jax.jit(jnp.matmul)
    peak = 2 * 2048**3 / 1e9 / fastest(lambda: product(a, a), arguments.repeats)
    print(
        "| stage | variant | GFLOP | loss, s | gradient, s | step, s | GFLOP/s of the step |\n|---|---|---|---|---|---|---|"
    )
    print(f"| matmul | 2048³ | {2 * 2048**3 / 1e9:.1f} | | | | {peak:.0f} |")
    for name in arguments.stages or run.config.stages:
        for variant, changes in VARIANTS.items():
            model = dataclasses.replace(run.model, **changes)
            if changes and model == run.model:
                continue
            trace = arguments.trace if not changes else ""
            gflop, *seconds = measure(run, name, model, arguments.repeats, trace)
            cells = [f"{gflop:.1f}", *(f"{s:.3f}" for s in seconds), f"{gflop / seconds[-1]:.0f}"]
            print("| " + " | ".join([name, variant, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
