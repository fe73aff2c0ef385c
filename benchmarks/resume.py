"""How long a run takes to continue: seconds from its start to the end of its first step, at step 100 and step 50,000.

    python benchmarks/resume.py --config=configs/quickstart.py --workdir=runs/quickstart --stage=pair

Needs a workdir with prepared data. For each step and repetition it writes a checkpoint of random parameters and the
metrics of every tenth step before it into a temporary folder. A separate process then continues the stage for one step.
The table shows medians of three repetitions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from header import header

STEPS = (100, 50_000)


def one_device_step(run, name: str, steps: int):
    """The training step of a stage on one device."""
    import jax

    from embed.models import sharding
    from embed.training.step import make_step

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return make_step(run.config.stages[name], run.model, mesh, steps=steps, seed=0, mask_id=run.tokenizer.mask_id)


def prepare(run, name: str, folder: Path, step: int) -> None:
    """Write a checkpoint of random parameters at `step` and the metrics of the steps before it."""
    import jax

    from embed.checkpoints import training_state

    train_step = one_device_step(run, name, step + 1)
    params = train_step.random_params(jax.random.key(0))
    state = train_step.init(params)
    with training_state.open_manager(folder / "checkpoints", save_every=1, keep=1) as manager:
        training_state.save(manager, step, params, state)
    rows = ({"step": k, "loss": 1.0, "gradient_norm": 1.0, "skipped": 0.0} for k in range(10, step + 1, 10))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def resume(run, name: str, folder: Path, step: int) -> dict[str, float]:
    """Seconds until the loader's first batch, and until the step is done and saved."""
    from embed.training import loop, stages

    begin = time.perf_counter()
    stage, phases = run.config.stages[name], run.phases(name)
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    loader = stages.make_loader(stage, stores, phases, seed=0, separator_id=run.tokenizer.separator_id)
    loader.batch(step)
    batch = time.perf_counter() - begin
    loop.train(
        folder,
        step=one_device_step(run, name, step + 1),
        loader=loader,
        initial_params=lambda shardings: sys.exit("the checkpoint was not restored"),
    )
    return {"batch": batch, "step": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stage", default="pair")
    parser.add_argument("--resume", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from embed import config
    from embed.runs import Run

    run = Run(config.load(arguments.config), arguments.workdir, arguments.config)
    if arguments.resume:
        folder, step = arguments.resume
        print(json.dumps(resume(run, arguments.stage, Path(folder), int(step))))
        return
    print(header() + "\nmedians of three\n")
    print("| continued at step | first batch, s | to the end of the first step, s |\n|---:|---:|---:|")
    for step in STEPS:
        results = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                prepare(run, arguments.stage, Path(folder), step)
                command = [sys.executable, *sys.argv, "--resume", folder, str(step)]
                output = subprocess.run(command, check=True, capture_output=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
        medians = (statistics.median(result[name] for result in results) for name in ("batch", "step"))
        print(f"| {step:,} | " + " | ".join(f"{seconds:.2f}" for seconds in medians) + " |", flush=True)


if __name__ == "__main__":
    main()
