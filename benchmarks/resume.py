"""How long a run takes from its start to the end of its first step, continued at step 100 and at step 50,000.

    python benchmarks/resume.py --config=configs/quickstart.py --workdir=runs/quickstart --stage=pair

Needs a workdir with prepared data; writes into a temporary folder. A checkpoint and a row of metrics for every tenth step
before it are put there, then the stage continues for one step, in a process of its own, three times each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = (100, 50_000)


def one_device_step(run, name: str, steps: int):
    """The training step of a stage on one device."""
    import jax

    from embed.models import sharding
    from embed.training.step import make_step

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return make_step(run.config.stages[name], run.model, mesh, steps=steps, seed=0, mask_id=run.tokenizer.mask_id)


def prepare(run, name: str, folder: Path, step: int) -> None:
    """A checkpoint of random parameters at `step`, and the metrics of the steps before."""
    import jax

    from embed.checkpoints import training_state

    made = one_device_step(run, name, step + 1)
    params = made.random_params(jax.random.key(0))
    state = made.init(params)
    with training_state.open_manager(folder / "checkpoints", save_every=1, keep=1) as manager:
        training_state.save(manager, step, params, state)
    rows = ({"step": k, "loss": 1.0, "gradient_norm": 1.0, "skipped": 0.0} for k in range(10, step + 1, 10))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def resume(run, name: str, folder: Path, step: int) -> dict[str, float]:
    """Seconds until the loader's first batch, and until the step is done and saved."""
    from embed.training import loop, stages

    begun = time.perf_counter()
    stage, phases = run.config.stages[name], run.phases(name)
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    loader = stages.make_loader(stage, stores, phases, seed=0, separator_id=run.tokenizer.separator_id)
    loader.batch(step)
    batch = time.perf_counter() - begun
    loop.train(
        folder,
        step=one_device_step(run, name, step + 1),
        loader=loader,
        initial_params=lambda shardings: sys.exit("the checkpoint was not found"),
    )
    return {"batch": batch, "whole": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stage", default="pair")
    parser.add_argument("--resume", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from embed import config
    from embed.checkpoints.provenance import made_with
    from embed.graph import machine
    from embed.runs import Run

    run = Run(config.load(arguments.config), arguments.workdir, arguments.config)
    if arguments.resume:
        folder, step = arguments.resume
        print(json.dumps(resume(run, arguments.stage, Path(folder), int(step))))
        return
    source = made_with()
    command = f"python benchmarks/resume.py --config={arguments.config} --workdir={arguments.workdir} --stage={arguments.stage}"
    print(f"{command}:\ncommit {source['commit']}, {machine()}, jax {source['versions']['jax']}; medians of three\n")
    print("| continued at step | first batch, s | to the end of the first step, s |\n|---:|---:|---:|")
    for step in STEPS:
        found = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                prepare(run, arguments.stage, Path(folder), step)
                again = [sys.executable, *sys.argv, "--resume", folder, str(step)]
                found.append(json.loads(subprocess.run(again, check=True, capture_output=True).stdout.splitlines()[-1]))
        medians = (statistics.median(one[name] for one in found) for name in ("batch", "whole"))
        print(f"| {step:,} | " + " | ".join(f"{seconds:.2f}" for seconds in medians) + " |", flush=True)


if __name__ == "__main__":
    main()
