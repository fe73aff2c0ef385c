"""Plots of reports. No pyplot, so there is no global state; the file's extension says whether it is PNG or SVG."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import matplotlib.lines
import numpy as np

from embed.training.metrics import read_metrics

# The colors also differ in lightness, for print and for color-blind readers (Okabe and Ito).
COLORS = (
    "#0072B2",
    "#E69F00",
    "#999999",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
    "#8B5A2B",
    "#4B0082",
    "#7FA000",
    "#B22222",
)
COLUMNS = 3  # of panels in a grid
PANELS = 9  # at most, in a grid


def color(k: int) -> str:
    """The color of the line k."""
    return COLORS[k % len(COLORS)]


def losses(path, metrics: Mapping[str, Path]) -> None:
    """One panel per stage: the loss at each logged step, and its running mean."""
    figure, axes = _figure(len(metrics), (2.9 * len(metrics) + 0.4, 2.8))
    for axis, (stage, file) in zip(axes, metrics.items()):
        rows = [row for row in read_metrics(file) if "loss" in row]
        steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(steps, values, color="#9DC3E6", linewidth=0.8)
        axis.plot(steps, running_mean(values), color=COLORS[0], linewidth=1.6)
        axis.set_title(stage if rows else f"{stage}: nothing logged", loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
    axes[0].set_ylabel("training loss (nats)")
    figure.savefig(path, dpi=160)


def bars(path, names: Sequence[str], values: Mapping[str, Sequence[float | None]], label: str) -> None:
    """Groups of bars: a group per name, in it a bar per key of `values`, with its figure."""
    figure, (axis,) = _figure(1, (max(6, 1.15 * len(names) + 1), 3.4))
    width = 0.8 / max(len(values), 1)
    for k, (title, heights) in enumerate(values.items()):
        positions = [i + (k - (len(values) - 1) / 2) * width for i in range(len(names))]
        drawn = axis.bar(positions, [v or 0 for v in heights], width * 0.92, color=color(k), label=title)
        shown = ["–" if v is None else f"{v:.3f}" for v in heights]
        axis.bar_label(drawn, shown, fontsize=7, padding=2, color="#333333")
    axis.set_xticks(range(len(names)), [name.replace(" + ", " +\n").replace(" (", "\n(") for name in names])
    axis.set_ylabel(label)
    axis.margins(y=0.1)
    axis.legend(
        frameon=False, fontsize=8, ncols=max(len(values), 1), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2
    )
    figure.savefig(path, dpi=160)


def merge(path, merges: Mapping[str, Mapping]) -> None:
    """One panel per merge: nDCG@10 against its ratio."""
    figure, axes = _figure(len(merges), (4.6 * len(merges), 3))
    for axis, (name, merge) in zip(axes, merges.items()):
        ratios = [point["ratio"] for point in merge["sweep"]]
        for k, benchmark in enumerate(name for name in merge["sweep"][0] if name != "ratio"):
            values = [point[benchmark] for point in merge["sweep"]]
            axis.plot(ratios, values, marker="o", markersize=4, color=color(k), label=benchmark)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("ratio: 0 is the first, 1 the second")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("nDCG@10 (float32)")
    figure.savefig(path, dpi=160)


def dots(path, values: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One panel per task: the value of each seed of each variant, {variant: {task: values}}, and their mean."""
    names, tasks = list(values), list(next(iter(values.values())))
    figure, axes = _grid(len(tasks), 0.9 + 0.24 * len(names))
    for k, (axis, task) in enumerate(zip(axes, tasks)):
        for i, name in enumerate(names):
            found = values[name][task]
            axis.plot(found, [i] * len(found), marker="o", markersize=3, color="#9DC3E6", linestyle="none")
            axis.plot([np.mean(found)], [i], marker="|", markersize=13, markeredgewidth=2, color=COLORS[0])
        axis.set_yticks(range(len(names)), names if k % COLUMNS == 0 else [""] * len(names))
        axis.invert_yaxis()
        axis.grid(axis="x", color="#E4E4E4", linewidth=0.7)
        axis.margins(y=0.12)
        axis.set_title(task, loc="left", fontsize=9)
        axis.set_xlabel("nDCG@10, int8")
    figure.savefig(path)


def curve_over_tasks(path, values: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A line per variant over tasks whose names end in a number, {variant: {task: values of the seeds}}."""
    figure, (axis,) = _figure(1, (7, 3.4))
    sizes: list[float] = []
    for k, (name, of_tasks) in enumerate(values.items()):
        sizes, task = [float(re.search(r"\d+$", task)[0]) for task in of_tasks], next(iter(of_tasks))
        means = [np.mean(found) for found in of_tasks.values()]
        seeds = len(of_tasks[task])
        bars = [np.std(found, ddof=1) for found in of_tasks.values()] if seeds > 1 else None  # as in the table
        axis.errorbar(sizes, means, bars, marker="o", markersize=3.5, capsize=2, color=color(k), label=name)
    axis.set_xscale("log", base=2)
    _plain_ticks(axis, sizes)
    axis.set_xlabel(re.sub(r"\d+$", "", task).strip() + " …")
    axis.set_ylabel("nDCG@10, int8")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def lengths(path, lines: Sequence[tuple[str, Sequence[float], Mapping[str, Sequence[float]]]]) -> None:
    """One panel per set: a line per model over the length of the text, (set, lengths, {model: values}) each."""
    shown = lines[:PANELS]
    labels = list(dict.fromkeys(label for _, _, values in shown for label in values))
    figure, axes = _grid(len(shown), 2.5)
    for axis, (name, middles, values) in zip(axes, shown):
        for label, heights in values.items():
            axis.plot(middles, heights, marker="o", markersize=3.5, color=color(labels.index(label)))
        axis.set_xscale("log")
        _plain_ticks(axis, middles)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_xlabel("characters")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("nDCG@10")
    handles = [matplotlib.lines.Line2D([], [], color=color(k), label=label) for k, label in enumerate(labels)]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=min(len(labels), 4), loc="outside upper center")
    figure.savefig(path)


def sizes(path, points: Mapping[str, Sequence[tuple[float, float, str]]]) -> None:
    """A line per model: quality over the bytes of a text; points are (bytes, value, form)."""
    figure, (axis,) = _figure(1, (7, 3.6))
    for k, (label, found) in enumerate(points.items()):
        for precision, marker in (("float32", "o"), ("int8", "s"), ("binary", "^"), ("ubinary", "v"), ("multi", "D")):
            part = [(x, y) for x, y, form in found if form.partition("-")[0] == precision]
            if part:
                axis.plot(*zip(*part), marker=marker, markersize=5, color=color(k), linewidth=1)
        axis.plot([], [], color=color(k), label=label)
    for marker, precision in (("o", "float32"), ("s", "int8"), ("^", "binary"), ("D", "multi")):
        axis.plot([], [], marker=marker, color="#555555", linestyle="none", label=precision)
    axis.set_xscale("log", base=2)
    _plain_ticks(axis, sorted({x for found in points.values() for x, *_ in found}))
    axis.set_xlabel("bytes of a text")
    axis.set_ylabel("mean of the main metrics")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def curves(path, found: Sequence) -> None:
    """A row per stage: the running mean of the loss of each run, over steps and over hours (`compare.Curve`)."""
    stages = list(dict.fromkeys(curve.stage for curve in found))
    figure = matplotlib.figure.Figure(figsize=(9, 2.5 * len(stages) + 0.4), layout="constrained")
    axes = figure.subplots(len(stages), 2, squeeze=False)
    for line, stage in zip(axes, stages):
        for k, curve in enumerate(curve for curve in found if curve.stage == stage):
            rows = [row for row in curve.rows if "loss" in row]
            steps, values = [row["step"] for row in rows], running_mean([row["loss"] for row in rows])
            taken = np.diff([0, *steps]) * [row.get("seconds_per_step", 0) for row in rows]
            for axis, xs in zip(line, (steps, np.cumsum(taken) / 3600)):
                axis.plot(xs, values, color=color(k), label=curve.label)
        line[0].set_ylabel(f"{stage}: loss")
        for axis, label in zip(line, ("step", "hours")):
            _tidy(axis)
            axis.set_xlabel(label)
        line[1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def running_mean(values) -> list[float]:
    """Each value's mean with its neighbors: a tenth of all points in the middle, fewer toward the ends."""
    half, last = len(values) // 20 + 1, len(values) - 1
    reach = [min(half, k, last - k) for k in range(len(values))]
    return [sum(values[k - r : k + r + 1]) / (2 * r + 1) for k, r in enumerate(reach)]


def _figure(panels: int, size: tuple[float, float]):
    """A row of panels."""
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        _tidy(axis)
    return figure, axes


def _grid(panels: int, height: float):
    """A grid of panels."""
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = matplotlib.figure.Figure(figsize=(3.1 * columns + 0.4, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis in axes[:panels]:
        _tidy(axis)
    return figure, axes[:panels]


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set_fontsize(9)


def _plain_ticks(axis, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at the values, as plain numbers."""
    axis.set_xticks(values, [f"{value:,.0f}" for value in values])
    axis.minorticks_off()
