"""The table of an ablation: every variant over its seeds, differences with intervals, cost, a plot.

    ablation.json          [{"variant", "seed", "task", "metric", "value"}, …]
    ablation.md, .html     the same for people
    plots/ablation.svg

A metric of other vectors than int8 names them: "ndcg@10 binary". The task "training" has the metrics "seconds" and
"pflop", 10¹⁵ FLOP.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.table

from embed import paths
from embed.checkpoints.provenance import made_with
from embed.evaluation import page, plots
from embed.evaluation.compare import MEASURES, bootstrap
from embed.evaluation.tables import NONE, cell, table, terminal

FORM = "int8"  # the vectors that are compared
COST = "training"


class Result(NamedTuple):
    """A variant with one seed."""

    variant: str
    seed: int
    records: Mapping[str, dict]  # {task: record}, see `records`
    cost: Mapping[str, float]  # of its training

    def value(self, task: str, form: str = FORM) -> float:
        """The main metric of an evaluation."""
        record = self.records[task]
        return record["values"][form][record["main"]]


def rows(results: Sequence[Result]) -> Iterator[dict]:
    """The rows of ablation.json."""
    for result in results:
        about = {"variant": result.variant, "seed": result.seed}
        for task, record in result.records.items():
            for form, values in record["values"].items():
                for metric, value in values.items():
                    named = metric if form == FORM else f"{metric} {form}"
                    yield about | {"task": task, "metric": named, "value": value}
        for metric, value in result.cost.items():
            yield about | {"task": COST, "metric": metric, "value": value}


def check_plot(plot: str, tasks: Sequence[str]) -> None:
    """ValueError if evaluations do not have the names that a plot needs."""
    for task in tasks if plot == "curve" else ():
        if not re.search(r"\d+$", task):
            raise ValueError(
                f"config.ablation.plot='curve' needs evaluations whose names end in a number, not {task!r}"
            )


def write(
    folder,
    results: Sequence[Result],
    *,
    command: str,
    missing: int = 0,
    plot: str = "dots",
    order: Sequence[str] = (),
    title: str = "Ablation",
) -> None:
    """Write the files of an ablation into a folder; `missing` runs are not complete yet.

    `order` has the names of all variants; the first is the one that others are compared with.
    """
    folder = Path(folder)
    paths.write_json(folder / "ablation.json", list(rows(results)))
    blocks = [f"# {title}", *sections(folder, results, command=command, missing=missing, plot=plot, order=order)]
    page.write(folder, blocks, name="ablation")


def sections(
    folder: Path, results: Sequence[Result], *, command: str, missing: int, plot: str, order: Sequence[str] = ()
) -> Iterator[str]:
    """The blocks of the page; draws the plot."""
    variants = _by_variant(results, order)
    made = made_with()
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    yield f"`{command}`, commit {made['commit']}, {versions}, {made['device']}."
    if missing:
        yield f"{missing} of {missing + len(results)} runs are not complete and not in the figures."
    if not results:
        return
    tasks = _tasks(results, plot)
    forms = list(results[0].records[tasks[0]]["values"])
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    draw = plots.curve_over_tasks if plot == "curve" else plots.dots
    draw(folder / "plots" / "ablation.svg", {name: _by_task(each, tasks) for name, each in variants.items()})
    compared = len(variants) > 1 and next(iter(variants)) == [*order, *variants][0]
    for form in sorted(forms, key=lambda form: form != FORM):
        yield from _table(variants, tasks, form)
        if form == FORM:
            yield "![Every variant on every task](plots/ablation.svg)"
        if compared:
            yield from _differences(variants, tasks, form)


def _by_task(results: Sequence[Result], tasks: Sequence[str]) -> dict[str, list[float]]:
    return {task: [result.value(task) for result in results] for task in tasks}


def _table(variants: Mapping[str, Sequence[Result]], tasks: Sequence[str], form: str) -> Iterator[str]:
    main = next(iter(variants.values()))[0].records[tasks[0]]["main"]
    yield f"## {MEASURES.get(main, main)}, {form}"
    heads, lines = _lines(variants, tasks, form)
    yield table(list(map(cell, heads)), [[cell(text) for text in line] for line in lines])
    if form == FORM:
        yield (
            "Mean ± standard deviation over the seeds. Seconds, without compilation, and PFLOP, 10¹⁵ operations of "
            "rows without padding, are those of all training stages of a variant, also of stages that it shares with "
            "others."
        )


def _lines(variants: Mapping[str, Sequence[Result]], tasks: Sequence[str], form: str) -> tuple[list, list[list[str]]]:
    """(heads, rows) of the table of a form; that of FORM has the cost."""
    heads = ["variant", "seeds", *tasks, *(["mean"] if len(tasks) > 1 else [])]
    lines = []
    for name, results in variants.items():
        values = np.array([[result.value(task, form) for task in tasks] for result in results])
        shown = [*values.T, values.mean(1)] if len(tasks) > 1 else [*values.T]
        line = [name, f"{len(results)}", *(spread(column) for column in shown)]
        if form == FORM:
            seconds, flops = (np.mean([result.cost[key] for result in results]) for key in ("seconds", "pflop"))
            line += [f"{seconds:,.0f}", f"{flops:,.3g}"]
        lines.append(line)
    return heads + ["seconds", "PFLOP"] * (form == FORM), lines


def render(results: Sequence[Result], plot: str = "dots", order: Sequence[str] = ()) -> rich.table.Table:
    """The table of FORM for a terminal."""
    return terminal(*_lines(_by_variant(results, order), _tasks(results, plot), FORM))


def _tasks(results: Sequence[Result], plot: str) -> list[str]:
    """The evaluations: those of a curve in the order of their numbers, because a config has them in the alphabet's."""
    tasks = list(results[0].records)
    return sorted(tasks, key=lambda task: int(re.search(r"\d+$", task)[0])) if plot == "curve" else tasks


def _by_variant(results: Sequence[Result], order: Sequence[str] = ()) -> dict[str, list[Result]]:
    variants: dict[str, list[Result]] = {name: [] for name in order}
    for result in results:
        variants.setdefault(result.variant, []).append(result)
    return {name: found for name, found in variants.items() if found}


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± sample standard deviation."""
    values = np.asarray(values)
    return f"{values.mean():{'+' if signed else ''}.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _differences(variants: Mapping[str, Sequence[Result]], tasks: Sequence[str], form: str) -> Iterator[str]:
    """Each variant against the first, in the vectors of a form."""
    first, *others = variants
    yield f"### Difference from {first}, {form}"
    lines = []
    for name in others:
        cells = [difference(variants[name], variants[first], task, form) for task in tasks]
        lines.append([cell(name), *cells])
    yield table(["variant", *map(cell, tasks)], lines)
    if form == FORM:
        yield (
            "Differences are taken seed by seed: their mean ± their standard deviation over the seeds that both "
            "variants have. The brackets say how far the mean could be off because the queries are a sample (95%, "
            "paired bootstrap); bold if they exclude 0. How far it could be off because of the seeds is in the ±."
        )


def difference(results: Sequence[Result], others: Sequence[Result], task: str, form: str = FORM) -> str:
    """The mean of paired differences, its deviation over seeds, its interval over queries; bold if it excludes zero."""
    ours, theirs = (
        {result.seed: _queries(result.records[task], form) for result in each} for each in (results, others)
    )
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds or any(ours[seed].keys() != theirs[seed].keys() for seed in seeds):
        return NONE
    ids = list(ours[seeds[0]])
    paired = np.array([[ours[seed][i] - theirs[seed][i] for i in ids] for seed in seeds])
    low, high = bootstrap(paired.mean(0))
    text = f"{spread(paired.mean(1), signed=True)} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _queries(record: Mapping, form: str) -> dict[str, float]:
    found = record["queries"]
    return dict(zip(found["ids"], found["values"][form]))
