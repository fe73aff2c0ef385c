"""A training run of a few seconds, for the tests of the loop.

    python small_run.py FOLDER KILLS

starts KILLS processes in turn, which train in FOLDER and kill themselves (signal 9) at random moments, and then one
that runs to the end. A moment is a batch read or a file operation in the folder, including those of background saves;
no clock is involved. The program prints the last logged step of each process.
"""

import copy
import os
import random
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from embed import config
from embed.models import sharding, transformer
from embed.training import loop
from embed.training import step as embed_step
from embed.training.metrics import read_metrics

LIFE = 100  # steps of the program's run
MODEL = transformer.make_config("micro", 64)
STAGE = config.base().stage(
    "diffusion",
    batch=dict(rows=4, length=16),
    execution=dict(logits_chunk=8, log_every=1, checkpoint_every=5, max_skipped=0),
    optimizer=dict(learning_rate=1e-2, warmup=0.1, decay=0.5, b2=0.98),
)
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")


class Loader:
    """Batches of four random rows, a function of the step. `read(step)` is called first and may raise."""

    def __init__(self, read=lambda step: None, shards=range(4)):
        self.read, self.shards, self.num_shards = read, list(shards), 4

    def __str__(self):
        return "the small loader"

    def batch(self, step):
        self.read(step)
        tokens = np.random.default_rng(step).integers(4, 64, (4, 16)).astype(np.int32)
        tokens = tokens[self.shards]
        positions = np.tile(np.arange(16, dtype=np.int32), (len(tokens), 1))
        stats = {"fill": 1.0, "cut": step}
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions, "stats": stats}


def make_step(*, steps: int = 12, mesh=None, loss=None, **execution):
    """The step of the small model; `execution` overrides fields of STAGE.execution."""
    stage = copy.deepcopy(STAGE)
    stage.execution.update(execution)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return embed_step.make_step(stage, MODEL, mesh, steps=steps, seed=0, mask_id=2, loss=loss)


def train(folder: Path, loader=None, *, steps: int = 12, stage=None, mesh=None, loss=None, **keywords):
    """Train the small model; `stage` overrides fields of STAGE.execution, `keywords` go to `loop.train`."""
    step = make_step(steps=steps, mesh=mesh, loss=loss, **(stage or {}))

    def initial_params(shardings):
        return step.random_params(jax.random.key(0))

    return loop.train(folder, step=step, loader=loader or Loader(), initial_params=initial_params, **keywords)


def losses(folder: Path) -> dict[int, float]:
    """{step: loss} from the metrics of a run."""
    return {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}


def live(folder: Path, moments: int | None) -> None:
    """Train in this process, which kills itself at the given moment (None = never)."""
    remaining = moments

    def tick(step=None):
        nonlocal remaining
        if remaining is not None and (remaining := remaining - 1) <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in FILE_EVENTS and str(folder) in str(arguments[0]):
            tick()

    sys.addaudithook(hook)
    train(folder, Loader(tick), steps=LIFE)


def main() -> None:
    import tensorboardX  # noqa: F401 - once, before the forks

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    # All processes compile the same programs.
    jax.config.update("jax_compilation_cache_dir", f"{folder}-compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    rng = random.Random(0)
    for life in range(kills + 1):
        moments = rng.randint(1, 250) if life < kills else None
        child = os.fork()  # jax is imported but has not started a backend, so forking is safe
        if not child:
            live(folder, moments)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != (signal.SIGKILL if life < kills else 0):
            sys.exit(f"life {life} ended with status {status}")
        print(max(losses(folder), default=0), flush=True)


if __name__ == "__main__":
    main()
