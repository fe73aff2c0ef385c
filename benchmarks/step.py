"""The time of a training step of each stage, with and without the choices that were made for speed on CPU.

    python benchmarks/step.py --config=configs/quickstart.py --workdir=runs/quickstart [--stages pair] [--trace=FOLDER]

Needs a workdir with prepared data. For each stage it prints the FLOPs (`flops.hardware_flops`), the seconds of the
loss, of its gradient and of the whole step (the fastest of --repeats runs) and the FLOP/s of the step. The row `matmul`
is a 2048³ matrix product, for comparison. --trace writes a jax.profiler trace of three steps per stage, for TensorBoard
or Perfetto.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from header import header

from embed import config
from embed.cli.common import keep_freed_memory
from embed.models import sharding, transformer
from embed.runs import Run
from embed.training import flops, stages
from embed.training.step import make_step

VARIANTS = {
    "as configured": {},
    "without dense_barrier": {"dense_barrier": False},
    "layers scanned": {"unroll": 1},
}


def fastest(function, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one call that compiles."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(run: Run, name: str, model: transformer.TransformerConfig, repeats: int, trace: str) -> list[float]:
    """[GFLOP, seconds of the loss, of the gradient, of the step] of a stage with `model`."""
    stage = run.config.stages[name]
    phases = run.phases(name)
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    separator = run.tokenizer.separator_id
    stage = stages.with_rows(stage, stores, phases, separator_id=separator)
    batch = stages.make_loader(stage, stores, phases, seed=0, separator_id=separator).batch(0)
    batch.pop("stats")
    step = make_step(stage, model, sharding.make_mesh(), steps=100, seed=0, mask_id=run.tokenizer.mask_id)
    batch = step.put(batch)
    loss = stages.make_loss(stage, step.model, run.tokenizer.mask_id)
    params, key = step.random_params(jax.random.key(0)), jax.random.key(0)
    value = jax.jit(lambda params: loss(params, batch, key, 0.5)[0])
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch, key, 0.5)[0]))
    trained, state = jax.tree.map(jnp.copy, params), step.init(params)  # a copy, because the step donates its inputs

    def whole():
        nonlocal trained, state
        trained, state, metrics = step(trained, state, batch, 1)
        return metrics

    with jax.set_mesh(step.mesh):
        seconds = [fastest(lambda: value(params), repeats), fastest(lambda: gradient(params), repeats)]
    seconds.append(fastest(whole, repeats))
    if trace:
        with jax.profiler.trace(f"{trace}/{name}"):
            for _ in range(3):
                jax.block_until_ready(whole())
    return [flops.hardware_flops(stage, step.model, step.mesh) / 1e9, *seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stages", nargs="*", help="default: all stages of the config")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trace", default="", help="folder for profiler traces")
    parser.add_argument(
        "--returned_memory", action="store_true", help="leave malloc's default, to return freed memory to the kernel"
    )
    arguments = parser.parse_args()
    kept = not arguments.returned_memory and keep_freed_memory()
    run = Run(config.load(arguments.config), arguments.workdir, arguments.config)
    print(f"{header()}\nfreed memory {'kept by malloc' if kept else 'returned to the kernel'}\n")
    a = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 2048)), jnp.float32)
    product = jax.jit(jnp.matmul)
    peak = 2 * 2048**3 / 1e9 / fastest(lambda: product(a, a), arguments.repeats)
    print("| stage | variant | GFLOP | loss, s | gradient, s | step, s | GFLOP/s of the step |")
    print("|---|---|---|---|---|---|---|")
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
