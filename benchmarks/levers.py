"""What each lever of a stage gives: trains variants of one stage and prints nDCG@10 on held-out functions.

    python benchmarks/levers.py --config=configs/laptop.py --from=runs/laptop --workdir=runs/levers --stage=pair \
        "as shipped" "no diffusion: stages.pair.init=" "half the batch: stages.pair.batch.groups=1"

A variant is a name and, after a colon, the config keys that it changes, separated by blanks. Data and the checkpoints
that the stage starts from are those of the run at `--from`. A variant that is complete is not trained again.
"""

import argparse
import json
import time
from pathlib import Path

from embed import config, graph, nodes, paths, runs
from embed.checkpoints.provenance import made_with
from embed.evaluation import retrieval


def parse_variant(text: str) -> tuple[str, list[str]]:
    """("name", ["--config.key=value", …]) of "name: key=value key=value"."""
    name, _, changes = text.partition(":")
    if data := [change for change in changes.split() if change.startswith("data.")]:
        raise ValueError(f"{name}: {data[0]} would change the data, which are those of --from")
    return name.strip(), [f"--config.{change}" for change in changes.split()]


def run_variant(arguments, name: str, overrides: list[str]) -> dict:
    """Train and evaluate one variant in a workdir of its own, which borrows data and starting checkpoints."""
    folder = Path(arguments.workdir) / name.replace(" ", "_")
    run = runs.Run(config.load(arguments.config, overrides), folder)
    if (done := folder / "lever.json").exists():
        return json.loads(done.read_text())
    stage = run.config.stages[arguments.stage]
    folder.mkdir(parents=True, exist_ok=True)
    for borrowed in ("data", stage.init if stage.init in run.config.stages else ""):
        if borrowed and not (folder / borrowed).exists():
            (folder / borrowed).symlink_to((Path(arguments.source) / borrowed).absolute())
    start = time.perf_counter()
    steps = nodes.train_stage(run, arguments.stage)["steps"]
    seconds = time.perf_counter() - start
    encoder = run.encoder(run.checkpoint(arguments.stage))
    figures = {}
    for benchmark in ("functions", "contextual"):
        for split in ("development", "test"):
            data = nodes.evaluation_set(run, f"{benchmark}/{split}")
            scores = retrieval.evaluate_retrieval(encoder, data, ("int8",))
            figures[f"{benchmark} {split}"] = scores["int8"]["ndcg@10"]
    row = {"name": name, "steps": steps, "seconds": seconds, **figures}
    paths.write_json(done, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--from", dest="source", required=True, help="a workdir with data and starting checkpoints")
    parser.add_argument("--workdir", required=True, help="a folder with a workdir for each variant")
    parser.add_argument("--stage", default="pair")
    parser.add_argument("variants", nargs="+", help='"name: key=value key=value"')
    arguments = parser.parse_args()
    rows = [run_variant(arguments, *parse_variant(variant)) for variant in arguments.variants]
    source = made_with()
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    print(f"python benchmarks/levers.py --config={arguments.config} --stage={arguments.stage}, int8 nDCG@10;")
    print(f"commit {source['commit']}, {graph.machine()}, {versions}\n")
    heads = list(rows[0])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        cells = [row["name"], str(row["steps"]), f"{row['seconds']:.0f}", *(f"{row[h]:.3f}" for h in heads[3:])]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
