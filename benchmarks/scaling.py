"""How a diffusion step scales from 8 to 1,024 chips, by the planner: it compiles for each topology and runs on none.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py --plot=docs/scaling.png

Needs libtpu (`pip install -e '.[tpu]'` in a separate environment). The batch is always the paper's, 1,024 rows of 4,096
tokens, so more chips have fewer rows each. Prints a table. --rows=FILE saves each finished row as a line of JSON, and a
later run with the same file does not compute these rows again.
"""

import argparse
import json
import os
from pathlib import Path

from header import header

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# (topology, slices). The last one is 1,024 chips again, in two slices joined by the data-center network.
TOPOLOGIES = (
    ("v5p:2x2x2", 1),
    ("v5p:2x4x4", 1),
    ("v5p:4x4x8", 1),
    ("v5p:8x8x16", 1),
    ("v5p:8x8x8", 2),
)
MAX_SHARDS = 512  # of the parameters; 2,560, the width of the 4B model, is not a multiple of 1,024
MAX_ROWS = {"0.6b": 16, "4b": 4}  # per chip and microbatch


def plan_row(size: str, topology: str, slices: int) -> dict:
    """The planner's figures for one model size on one topology."""
    from embed import config as configs
    from embed.models import transformer
    from embed.training import plan

    _, chips = plan.parse_topology(topology)
    chips *= slices
    config = configs.load(f"configs/pplx_embed.py:size={size},stage=diffusion")
    stage = config.stages.diffusion
    microbatches = max(1, stage.batch.rows // (chips * MAX_ROWS[size]))
    stage.execution.microbatches = microbatches
    axes = config.execution.mesh.to_dict() | {"data": max(slices, chips // MAX_SHARDS)}
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    result = plan.make_plan(stage, model, topology, axes, slices=slices)
    fields = ("chips", "model_flops", "memory", "collectives", "bounds", "peak", "fits")
    row = {name: getattr(result, name) for name in fields}
    return row | {
        "size": size,
        "topology": topology,
        "slices": slices,
        "microbatches": microbatches,
        "flops": result.chip.flops,
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| size | topology | chips | microbatches | memory, GB | sent, GB | compute, s | HBM, s | interconnect, s "
        "| network, s | bound | of peak, at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        bounds = row["bounds"]
        bound = max(bounds, key=bounds.get)
        name = f"{row['slices']} x {row['topology']}" if row["slices"] > 1 else row["topology"]
        ideal = row["model_flops"] / row["flops"]
        figures = [f"{bounds[kind]:.3f}" for kind in ("compute", "HBM", "interconnect", "network")]
        lines.append(
            f"| {row['size']} | {name} | {row['chips']} | {row['microbatches']} | {row['peak'] / 1e9:.2f} | "
            f"{sum(row['collectives'].values()) / 1e9:.2f} | {' | '.join(figures)} | {bound} | "
            f"{ideal / bounds[bound]:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Plot least step time, memory and bytes sent over the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for size, color in (("0.6b", "tab:blue"), ("4b", "tab:orange")):
        of_size = [row for row in rows if row["size"] == size and row["slices"] == 1]
        chips = [row["chips"] for row in of_size]
        for kind, style in (("compute", "-"), ("HBM", ":"), ("interconnect", "--")):
            axes[0].plot(chips, [row["bounds"][kind] for row in of_size], style, color=color, label=f"{size} {kind}")
        axes[1].plot(chips, [row["peak"] / 1e9 for row in of_size], "-o", color=color, label=size)
        axes[2].plot(chips, [sum(row["collectives"].values()) / 1e9 for row in of_size], "-o", color=color, label=size)
    titles = ("lower bounds on a step, s", "memory per chip, GB", "sent per chip and step, GB")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="v5p chips", xscale="log", yscale="log")
        axis.set_xticks(chips, [str(n) for n in chips], minor=False)
        axis.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--rows", type=Path, help="file that saves finished rows")
    arguments = parser.parse_args()
    saved = {}
    if arguments.rows and arguments.rows.exists():
        for row in map(json.loads, arguments.rows.read_text(encoding="utf-8").splitlines()):
            saved[row["size"], row["topology"], row["slices"]] = row
    rows = []
    for size in MAX_ROWS:
        for topology, slices in TOPOLOGIES:
            row = saved.get((size, topology, slices)) or plan_row(size, topology, slices)
            rows.append(row)
            if arguments.rows and (size, topology, slices) not in saved:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(f"{header('libtpu')}\n\n{table(rows)}")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
