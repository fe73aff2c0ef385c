"""How a diffusion step grows from 8 to 1,024 chips, by the planner: compiled for each topology, run on none.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py --plot=docs/scaling.png

Needs libtpu (`pip install -e '.[tpu]'`, an environment of its own). The paper's batch of 1,024 rows of 4,096 tokens stays, so a chip
has fewer rows the more there are. Prints a table; --rows keeps what is done, one JSON object a line, and is read again.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# (topology, slices): the last is 1,024 chips again, in two slices joined by the data-centre network.
TOPOLOGIES = (
    ("v5p:2x2x2", 1),
    ("v5p:2x4x4", 1),
    ("v5p:4x4x8", 1),
    ("v5p:8x8x16", 1),
    ("v5p:8x8x8", 2),
)
MOST_SHARDS = 512  # of the parameters: 2,560, the width of the 4B model, is no multiple of 1,024
ROWS_AT_ONCE = {"0.6b": 16, "4b": 4}  # of a chip; more are microbatches


def plan_row(size: str, topology: str, slices: int) -> dict:
    """The planner's figures of one step."""
    from embed import config as configs
    from embed.models import transformer
    from embed.training import plan

    _, chips = plan.parse_topology(topology)
    chips *= slices
    config = configs.load(f"configs/pplx_embed.py:size={size},stage=diffusion")
    stage = config.stages.diffusion
    microbatches = max(1, stage.batch.rows // (chips * ROWS_AT_ONCE[size]))
    stage.execution.microbatches = microbatches
    axes = config.execution.mesh.to_dict() | {"data": max(slices, chips // MOST_SHARDS)}
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    found = plan.make_plan(stage, model, topology, axes, slices=slices)
    kept = ("chips", "model_flops", "memory", "collectives", "bounds", "peak", "fits")
    row = {name: getattr(found, name) for name in kept}
    return row | {
        "size": size,
        "topology": topology,
        "slices": slices,
        "microbatches": microbatches,
        "flops": found.chip.flops,
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| size | topology | chips | microbatches | memory, GB | sent, GB | compute, s | HBM, s | interconnect, s | network, s | bound | of peak, at most |",
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
            f"{sum(row['collectives'].values()) / 1e9:.2f} | {' | '.join(figures)} | {bound} | {ideal / bounds[bound]:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Least step time, memory and bytes sent over the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for size, color in (("0.6b", "tab:blue"), ("4b", "tab:orange")):
        own = [row for row in rows if row["size"] == size and row["slices"] == 1]
        chips = [row["chips"] for row in own]
        for kind, style in (("compute", "-"), ("HBM", ":"), ("interconnect", "--")):
            axes[0].plot(chips, [row["bounds"][kind] for row in own], style, color=color, label=f"{size} {kind}")
        axes[1].plot(chips, [row["peak"] / 1e9 for row in own], "-o", color=color, label=size)
        axes[2].plot(chips, [sum(row["collectives"].values()) / 1e9 for row in own], "-o", color=color, label=size)
    titles = ("least seconds a step, by what binds", "memory a chip, GB", "sent by a chip in a step, GB")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="v5p chips", xscale="log", yscale="log")
        axis.set_xticks(chips, [str(n) for n in chips], minor=False)
        axis.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    parser.add_argument("--rows", type=Path, help="file that keeps what is done")
    arguments = parser.parse_args()
    done = (
        [json.loads(line) for line in arguments.rows.read_text().splitlines()]
        if arguments.rows and arguments.rows.exists()
        else []
    )
    rows = []
    for size in ROWS_AT_ONCE:
        for topology, slices in TOPOLOGIES:
            found = [row for row in done if (row["size"], row["topology"], row["slices"]) == (size, topology, slices)]
            rows.append(found[0] if found else plan_row(size, topology, slices))
            if arguments.rows and not found:
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    from embed.checkpoints.provenance import made_with

    source = made_with()
    print(f"python benchmarks/scaling.py: commit {source['commit']}, jax {source['versions']['jax']}\n\n{table(rows)}")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
