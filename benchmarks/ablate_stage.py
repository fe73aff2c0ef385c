"""Ablations of a stage: trains variants of the stage and prints their nDCG@10.

    python benchmarks/ablate_stage.py --config=configs/laptop.py --from=runs/laptop --workdir=runs/ablations \
        --stage=pair "as shipped" "no diffusion: stages.pair.init=" "half the batch: stages.pair.batch.groups=1"

A variant is a name and, after a colon, the config keys that it changes, separated by spaces. The data, the mined
negatives and the checkpoint that the stage starts from are those of the run at `--from`. A complete variant is not
trained again. `--also` is the folder of another evaluation set, for texts unlike those of training. Its chunks are
embedded alone.
"""

import argparse
import json
import time
from pathlib import Path

from header import header

from embed import config, nodes, paths, runs
from embed.evaluation.retrieval import Form, evaluate_retrieval
from embed.evaluation.sets import read_set

SETS = [(name, split) for name in ("functions", "contextual") for split in ("development", "test")]


def parse_variant(text: str) -> tuple[str, list[str]]:
    """("name", ["--config.key=value", …]) from "name: key=value key=value"."""
    name, _, changes = text.partition(":")
    if data := [change for change in changes.split() if change.startswith("data.")]:
        raise ValueError(f"{name}: {data[0]} cannot be changed, because the data are those of --from")
    return name.strip(), [f"--config.{change}" for change in changes.split()]


def run_variant(arguments, name: str, overrides: list[str]) -> dict:
    """Train and evaluate one variant in its own workdir, with links to data, mining and parent stage of --from."""
    folder = Path(arguments.workdir) / name.replace(" ", "_")
    run = runs.Run(config.load(arguments.config, overrides), folder)
    done, row = folder / "ablation.json", {}
    if done.exists():
        row = json.loads(done.read_text(encoding="utf-8"))
    stage = run.config.stages[arguments.stage]
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("data", "mining", stage.init):
        source = (Path(arguments.source) / shared).absolute()
        if shared and source.is_dir() and not (folder / shared).exists():
            (folder / shared).symlink_to(source)
    if not row:
        start = time.perf_counter()
        steps = nodes.train_stage(run, arguments.stage)["steps"]
        row = {"name": name, "steps": steps, "seconds": time.perf_counter() - start}
    sets = [(f"{benchmark} {split}", run.data / "evaluation" / benchmark / split, False) for benchmark, split in SETS]
    sets += [("/".join(Path(other).parts[-2:]), other, True) for other in arguments.also]
    if missing := [each for each in sets if each[0] not in row]:
        encoder = run.encoder(run.checkpoint(arguments.stage))
        for title, path, alone in missing:
            form = Form("int8")
            row[title] = evaluate_retrieval(encoder, read_set(path), [form], alone=alone)[form]["ndcg@10"]
        paths.write_json(done, row)
    return {"name": name, "steps": row["steps"], "seconds": row["seconds"]} | {title: row[title] for title, *_ in sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--from", dest="source", required=True, help="workdir with the data and the parent stage")
    parser.add_argument("--workdir", required=True, help="folder for the workdirs of the variants")
    parser.add_argument("--stage", default="pair")
    parser.add_argument("--also", action="append", default=[], help="folder of another evaluation set; repeatable")
    parser.add_argument("variants", nargs="+", help='"name: key=value key=value"')
    arguments = parser.parse_args()
    rows = [run_variant(arguments, *parse_variant(variant)) for variant in arguments.variants]
    print(header() + "\nnDCG@10 of int8 vectors\n")
    heads = list(rows[0])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        cells = [row["name"], str(row["steps"]), f"{row['seconds']:.0f}", *(f"{row[h]:.3f}" for h in heads[3:])]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
