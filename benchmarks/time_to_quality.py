"""nDCG@10 over training time: the pair stage, and the same model trained with sentence-transformers.

    python benchmarks/time_to_quality.py --config=configs/quickstart.py --workdir=runs/quickstart --plot=FILE.png

Needs a workdir with prepared data, torch and sentence-transformers (`make test-reference` installs them). All sides
start from the same random weights (the row of step 0), see the same texts in the same batches (as the pair stage cuts
them), use the same schedule, AdamW and clipping, and are evaluated by the same code in float32 on held-out functions.
The output lists the differences (DIFFERENCES). `embed` uses the negatives and dimensions of sentence-transformers,
`embed, as configured` those of the stage. Seconds are those of training steps, with compilation and data, without
evaluation. The sides run one after the other, each in a separate process.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from header import header
from train import KEEP_FREED_MEMORY

ROOT = Path(__file__).parent.parent
DIFFERENCES = """\
|  | embed | embed, as configured | sentence-transformers |
|---|---|---|---|
| batch | packed rows: {rows} x {length} tokens | the same | queries and documents, each padded to its longest text |
| vectors in training | tanh and int8 rounding, straight through | the same | the pooled mean as it is |
| loss over | all {dimensions} dimensions | the mean over the first {prefixes} | all {dimensions} dimensions |
| negatives of a query | other documents and other queries | the same | other documents |
| masked negatives | equal contents | also those more similar than the positive + {margin} | none |
| steps | its train step; batches are built between steps (`embed train`: in a thread) | the same | \
its model and MultipleNegativesRankingLoss in a plain PyTorch loop, not its Trainer; batches are built between steps; \
no torch.compile |
"""


def open_run(arguments):
    """(run, pair stage, its loader, its schedule)."""
    from embed import config
    from embed.runs import Run
    from embed.training import optimizer, stages

    run = Run(config.load(arguments.config), arguments.workdir, arguments.config)
    stage, phases = run.config.stages.pair, run.phases("pair")
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    loader = stages.make_loader(stage, stores, phases, seed=0, separator_id=run.tokenizer.separator_id)
    settings = stage.optimizer
    schedule = optimizer.wsd_schedule(settings.learning_rate, arguments.steps, settings.warmup, settings.decay)
    return run, stage, loader, schedule


def texts(batch: dict, slots: np.ndarray, spans: int) -> list[np.ndarray]:
    """The tokens of the texts in the given slots of the span table of a packed batch."""
    return [batch["tokens"][slot // spans][batch["span_ids"][slot // spans] == slot % spans + 1] for slot in slots]


def points(arguments) -> list[int]:
    """The numbers of steps after which to evaluate."""
    return sorted({*range(0, arguments.steps + 1, arguments.every), arguments.steps})


def train_embed(arguments, as_configured: bool = False) -> list:
    """The curve [(steps, seconds, nDCG@10), …] of `embed`."""
    import jax

    from embed import nodes
    from embed.evaluation.retrieval import Form, evaluate_retrieval
    from embed.models import sharding
    from embed.training.step import make_step

    run, stage, loader, _ = open_run(arguments)
    if not as_configured:
        stage.matryoshka, stage.margin = (run.model.hidden_size,), 2.0  # cosines differ by at most 2: masks nothing
    functions, start = nodes.evaluation_set(run, "functions/test"), run.checkpoint("random init")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = make_step(stage, run.model, mesh, steps=arguments.steps, seed=0, mask_id=run.tokenizer.mask_id)
    params = start.params(step.params_sharding)
    state = step.init(params)
    seconds, curve, done, lost = 0.0, [], 0, 0
    for point in points(arguments):
        begin = time.perf_counter()
        for k in range(done, point):
            batch = loader.batch(k)
            lost += batch.pop("stats")["lost"]
            params, state, _ = step(params, state, step.put(batch), k)
        jax.block_until_ready(params)
        seconds, done = seconds + time.perf_counter() - begin, point
        encoder = run.encoder(start, params=params)
        form = Form("float32")
        figures = evaluate_retrieval(encoder, functions, [form], alone=True)[form]
        curve.append((point, seconds, figures["ndcg@10"]))
    if lost:
        raise ValueError(f"{lost} pairs have a side without tokens; only embed leaves these out")
    return curve


def train_sentence_transformers(arguments) -> list:
    """The curve [(steps, seconds, nDCG@10), …] of sentence-transformers."""
    with tempfile.TemporaryDirectory() as folder:
        return _train_sentence_transformers(arguments, Path(folder) / "model")


def _train_sentence_transformers(arguments, folder: Path) -> list:
    import safetensors.torch
    import sentence_transformers
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from embed import exports, nodes
    from embed.evaluation.retrieval import Form, evaluate_retrieval
    from embed.inference import load

    run, stage, loader, schedule = open_run(arguments)
    functions, spans = nodes.evaluation_set(run, "functions/test"), stage.batch.spans
    exports.export_model(run, "random init", folder)
    (folder / "embed.json").unlink()  # it has digests of the weights, which each evaluation overwrites
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu").train()
    loss_function = MultipleNegativesRankingLoss(model, scale=1 / stage.temperature)
    settings = stage.optimizer
    groups = {
        name: {"params": [], "weight_decay": decay, "lr": rate}  # the schedule multiplies the rates
        for name, decay, rate in (
            ("norm", 0.0, 1.0),
            ("embed_tokens", settings.weight_decay, settings.embedding_rate),
            ("", settings.weight_decay, 1.0),
        )
    }
    for name, parameter in model.named_parameters():
        next(group for part, group in groups.items() if part in name)["params"].append(parameter)
    adamw = torch.optim.AdamW(groups.values(), betas=(settings.b1, settings.b2), eps=settings.eps, fused=True)
    values = [float(schedule(k)) for k in range(arguments.steps)]  # computed by jax, so outside the timed steps
    rates = torch.optim.lr_scheduler.LambdaLR(adamw, lambda k: values[min(k, arguments.steps - 1)])

    def features(tokens):
        length = max(map(len, tokens))
        ids, mask = np.zeros((2, len(tokens), length), np.int64)
        for i, text in enumerate(tokens):
            ids[i, : len(text)], mask[i, : len(text)] = text, 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    seconds, curve, done = 0.0, [], 0
    for point in points(arguments):
        begin = time.perf_counter()
        for k in range(done, point):
            batch = loader.batch(k)
            sides = [features(texts(batch, batch[f"{side}_slots"], spans)) for side in ("query", "document")]
            loss = loss_function(sides, None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            adamw.step()
            rates.step()
            adamw.zero_grad(set_to_none=True)
        seconds, done = seconds + time.perf_counter() - begin, point
        weights = {name: x.contiguous() for name, x in model[0].model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        form = Form("float32")
        figures = evaluate_retrieval(load(folder), functions, [form], alone=True)[form]
        curve.append((point, seconds, figures["ndcg@10"]))
    return curve


SIDES = {
    "embed": train_embed,
    "embed, as configured": functools.partial(train_embed, as_configured=True),
    "sentence-transformers": train_sentence_transformers,
}


def reached(curve: list, level: float) -> float | None:
    """The seconds at which a curve first reaches a level, interpolated linearly; None if it never does."""
    for (_, before, low), (_, seconds, value) in zip(curve, curve[1:]):
        if low < level <= value:
            return before + (level - low) / (value - low) * (seconds - before)
    return None


def plot(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    for side, curve in curves.items():
        axis.plot([point[1] for point in curve], [point[2] for point in curve], "-o", markersize=3, label=side)
    axis.set(xlabel="seconds of training", ylabel="nDCG@10, held-out functions")
    axis.legend()
    figure.savefig(path, dpi=110)


def measure(side: str) -> list:
    """The curve of a side, trained in a separate process."""
    # All sides run on the CPU, with the malloc settings of `embed train`.
    environment = {**KEEP_FREED_MEMORY, **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *sys.argv, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def describe(arguments) -> list[str]:
    """The header and the differences between the sides."""
    from embed import config

    settings = config.load(arguments.config)
    stage = settings.stages.pair
    differences = DIFFERENCES.format(
        rows=stage.batch.groups * stage.batch.rows_per_group,
        length=stage.batch.length,
        margin=stage.margin,
        prefixes=" and ".join(map(str, stage.matryoshka)),
        dimensions=settings.model.hidden_size,
    )
    return [
        header("torch", "transformers", "sentence-transformers"),
        f"{stage.batch.groups * stage.batch.group_size} pairs per step, {arguments.steps} steps, one run per side: "
        f"{', then '.join(arguments.order)}\n",
        differences,
    ]


def tables(curves: dict) -> list[str]:
    """The curves, and for each level of nDCG@10 that some side reaches and all start below, which side is first."""
    lines = [
        "| steps | " + " | ".join(f"{side}, s | nDCG@10" for side in curves) + " |",
        "|---:|" + "---:|---:|" * len(curves),
    ]
    for rows in zip(*curves.values()):
        lines.append(f"| {rows[0][0]} | " + " | ".join(f"{row[1]:.1f} | {row[2]:.3f}" for row in rows) + " |")
    lines += [
        "",
        "| nDCG@10 | " + " | ".join(f"{side}, s" for side in curves) + " | first |",
        "|---:|" + "---:|" * len(curves) + "---|",
    ]
    start = max(curve[0][2] for curve in curves.values())
    best = max(point[2] for curve in curves.values() for point in curve)
    for level in np.arange(0.05, best, 0.05):
        if level <= start:
            continue
        times = {side: reached(curve, level) for side, curve in curves.items()}
        first = min((side for side in curves if times[side] is not None), key=times.get)
        cells = [f"{seconds:.1f}" if seconds is not None else "not reached" for seconds in times.values()]
        lines.append(f"| {level:.2f} | " + " | ".join(cells) + f" | {first} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--order", nargs="+", choices=SIDES, default=list(SIDES), help="sides, in the order of running")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    print("\n".join(describe(arguments)), flush=True)
    load = f"load average {os.getloadavg()[0]:.1f}"
    curves = {side: measure(side) for side in arguments.order}
    print("\n".join(tables(curves)))
    print(f"\n{load} before, {os.getloadavg()[0]:.1f} after")
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
