"""The report of a run: one table, plots, and what else results.json holds, as report.md.

results.json; everything but `checkpoints` is optional, and a section stands in the report only if its key is there:

    checkpoints       {name: {benchmark: {precision: {"ndcg@10": …, "recall@10": …}}}}, the rows of the table in order;
                      benchmark is the name of an evaluation of the config
    evaluations       {benchmark: what it is, in words}
    slerp_sweep       [{"ratio": t, SET: nDCG@10, …}, …] on development splits
    slerp_ratio       the ratio chosen
    diffusion         [{"t": …, "accuracy": …, "nll": …}, …] masked-token accuracy and cross-entropy in nats at noise t
    elbo              the diffusion model's bound, nats per token
    denoising         [{"step": number or name, "text": …}, …] a sample as it is unmasked
    search            {"query": …, "precision": …, "hits": [{"rank", "score", "id", "text"}, …]}
    seconds           {stage: wall seconds}
    seconds_per_step  {stage: seconds}
    data              {name: count, text, or a dictionary of such}
    command, commit, machine   strings
    versions          {package: version}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib.figure
import rich.box
import rich.table

from embed.training.metrics import read_metrics

METRICS = {"ndcg@10": "nDCG@10", "recall@10": "recall@10"}
PRECISIONS = ("float32", "int8", "binary")
# Colours that differ in lightness too, for print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#D55E00", "#CC79A7")

NONE = "–"  # in the place of a figure that is not there
TITLE = "Retrieval"


def _benchmarks(results: Mapping) -> dict[str, str]:
    """{benchmark: its title} of the table's columns."""
    found = [name for row in results["checkpoints"].values() for name in row]
    return {name: name.replace("_", " ") for name in dict.fromkeys(found)}


def _legend(results: Mapping) -> str:
    told = results.get("evaluations", {})
    return " ".join(f"{title}: {told[name]}." for name, title in _benchmarks(results).items() if name in told)


def render_table(results: Mapping) -> rich.table.Table:
    """The table of a run for a terminal of 80 columns."""
    table = rich.table.Table(
        title=f"{TITLE}: nDCG@10 and recall@10",
        title_justify="left",
        caption=_legend(results),
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for benchmark in _benchmarks(results).values():
        for metric in METRICS.values():
            head = benchmark.replace(" ", "\n") + "\n" + metric.removesuffix("@10")
            table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for precision, rows in _sections(results):
        table.add_section()
        table.add_row(f"[bold]{precision}")
        for name, cells in rows:
            table.add_row(f"  {name}", *cells)
    return table


def markdown_table(results: Mapping) -> str:
    """The same table in Markdown, the best figure of a column and precision in bold."""
    heads = [f"{benchmark}<br>{metric}" for benchmark in _benchmarks(results).values() for metric in METRICS.values()]
    lines = [_row(["precision", "model", *heads]), _row(["---", "---", *["---:"] * len(heads)])]
    for precision, rows in _sections(results):
        best = [max(c for c in ("", *column) if c != NONE) for column in zip(*(cells for _, cells in rows))]
        for k, (name, cells) in enumerate(rows):
            marked = [f"**{c}**" if c == top else c for c, top in zip(cells, best)]
            lines.append(_row([precision if k == 0 else "", name, *marked]))
    return "\n".join(lines) + "\n"


def write_report(folder, results: Mapping, metrics: Mapping[str, Path]) -> Path:
    """Write folder/report.md and folder/plots/*.png; `metrics` maps each stage to its metrics.jsonl."""
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text("\n\n".join(_markdown(folder, results, metrics)) + "\n", encoding="utf-8")
    return path


def plot_losses(path, metrics: Mapping[str, Path]) -> None:
    """One panel a stage: the loss at each logged step, and its running mean."""
    figure, axes = _figure(len(metrics), (2.9 * len(metrics) + 0.4, 2.8))
    for axis, (stage, file) in zip(axes, metrics.items()):
        rows = [row for row in read_metrics(Path(file)) if "loss" in row]
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(steps, losses, color="#9DC3E6", linewidth=0.8)
        axis.plot(steps, _running_mean(losses), color=COLOURS[0], linewidth=1.6)
        axis.set_title(stage if rows else f"{stage}: nothing logged", loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
    axes[0].set_ylabel("training loss (nats)")
    figure.savefig(path, dpi=160)


def plot_ndcg(path, results: Mapping) -> None:
    """nDCG@10 in float32 of every row of the table, one bar a benchmark."""
    names = list(results["checkpoints"])
    titles = _benchmarks(results)
    shown = [b for b in titles if any(_figure_of(results, n, b, "float32", "ndcg@10") is not None for n in names)]
    figure, (axis,) = _figure(1, (max(6, 1.15 * len(names) + 1), 3.4))
    width = 0.8 / max(len(shown), 1)
    for k, benchmark in enumerate(shown):
        values = [_figure_of(results, name, benchmark, "float32", "ndcg@10") for name in names]
        places = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(names))]
        bars = axis.bar(
            places, [v or 0 for v in values], width * 0.92, color=COLOURS[k % len(COLOURS)], label=titles[benchmark]
        )
        axis.bar_label(bars, [_number(v) for v in values], fontsize=7, padding=2, color="#333333")
    axis.set_xticks(range(len(names)), [name.replace(" + ", " +\n").replace(" (", "\n(") for name in names])
    axis.set_ylabel("nDCG@10 (float32)")
    axis.margins(y=0.1)
    axis.legend(
        frameon=False, fontsize=8, ncols=max(len(shown), 1), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2
    )
    figure.savefig(path, dpi=160)


def plot_slerp(path, sweep) -> None:
    """nDCG@10 on the development split against the slerp ratio."""
    figure, (axis,) = _figure(1, (4.6, 3))
    ratios = [point["ratio"] for point in sweep]
    for k, benchmark in enumerate(_swept(sweep)):
        values = [point[benchmark] for point in sweep]
        axis.plot(ratios, values, marker="o", markersize=4, color=COLOURS[k % len(COLOURS)], label=benchmark)
    axis.set_xlabel("ratio: 0 is the first, 1 the second")
    axis.set_ylabel("nDCG@10, development split")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def _markdown(folder: Path, results: Mapping, metrics: Mapping[str, Path]) -> Iterator[str]:
    """The blocks of report.md; draws the plots they show."""
    yield "# Run report"
    facts = [f"{key}: `{results[key]}`" for key in ("command", "commit", "machine") if results.get(key)]
    if facts:
        yield "  \n".join(facts)

    yield f"## {TITLE}"
    yield markdown_table(results).rstrip()
    yield f"{_legend(results)} A dash: this row has no such vectors (BM25) or was not measured. Bold: best of the column.".strip()
    plot_ndcg(folder / "plots" / "ndcg.png", results)
    yield "![nDCG@10 of each checkpoint](plots/ndcg.png)"

    if metrics:
        yield "## Training"
        plot_losses(folder / "plots" / "loss.png", metrics)
        yield "![Training loss of each stage](plots/loss.png)"
        yield "Pale: each logged step; dark: running mean. Each stage has a loss of its own: compare within a panel."
    if results.get("slerp_sweep"):
        yield "## Merging: the slerp ratio on the development split"
        sweep = results["slerp_sweep"]
        benchmarks = _swept(sweep)
        chosen = results.get("slerp_ratio")
        rows = []
        for point in sweep:
            mark = " (chosen)" if point["ratio"] == chosen else ""
            rows.append([f"{point['ratio']:g}{mark}", *(_number(point.get(b)) for b in benchmarks)])
        yield _table(["ratio", *(f"{b} nDCG@10" for b in benchmarks)], rows)
        plot_slerp(folder / "plots" / "slerp.png", sweep)
        yield "![nDCG@10 against the slerp ratio](plots/slerp.png)"
    if results.get("diffusion"):
        yield "## Diffusion: predicting masked tokens"
        if results.get("elbo") is not None:
            yield f"ELBO: {results['elbo']:.3f} nats per token."
        rows = [[f"{p['t']:g}", _number(p.get("accuracy")), _number(p.get("nll"))] for p in results["diffusion"]]
        yield _table(["share masked, t", "accuracy", "cross-entropy (nats)"], rows)
    if results.get("denoising"):
        yield "## Diffusion: a sample, from masks to text"
        for state in results["denoising"]:
            yield f"Step {state['step']}:" if isinstance(state["step"], int) else f"{str(state['step']).capitalize()}:"
            yield _code(state["text"])
    if results.get("search"):
        search = results["search"]
        yield "## A search"
        precision = f" ({search['precision']})" if search.get("precision") else ""
        yield f"Query{precision}: **{_cell(search['query'])}**"
        rows = [[str(h["rank"]), f"{h['score']:.3f}", f"`{_cell(h['id'])}`", _cell(h["text"])] for h in search["hits"]]
        yield _table(["rank", "score", "id", "text"], rows, right=2)
    if results.get("seconds"):
        yield "## Time"
        steps = results.get("seconds_per_step", {})
        rows = [[stage, f"{s:.1f}", _number(steps.get(stage))] for stage, s in results["seconds"].items()]
        rows.append(["all", f"{sum(results['seconds'].values()):.1f}", NONE])
        yield _table(["stage", "seconds", "seconds a step"], rows)
    if results.get("data"):
        yield "## Data"
        yield _table(["what", "count"], list(_flat(results["data"])))
    if results.get("versions"):
        yield "## Versions"
        yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def _sections(results: Mapping) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """(precision, [(row name, cells)]): only rows that have a figure in that precision."""
    if not results.get("checkpoints"):
        raise ValueError("results have no checkpoints: nothing to tabulate")
    for precision in PRECISIONS:
        rows = []
        for name in results["checkpoints"]:
            values = [_figure_of(results, name, b, precision, m) for b in _benchmarks(results) for m in METRICS]
            if any(value is not None for value in values):
                rows.append((name, [_number(value) for value in values]))
        if rows:
            yield precision, rows


def _swept(sweep) -> list[str]:
    return [name for name in sweep[0] if name != "ratio"]


def _figure_of(results: Mapping, name: str, benchmark: str, precision: str, metric: str) -> float | None:
    return results["checkpoints"][name].get(benchmark, {}).get(precision, {}).get(metric)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _cell(text) -> str:
    """One line that does not end a Markdown cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: list[str], rows: list[list[str]], right: int | None = None) -> str:
    """A Markdown table; columns 1.. (with `right`: the first `right`) are numbers, set flush right."""
    flush = range(1, len(heads)) if right is None else range(right)
    rule = ["---:" if k in flush else "---" for k in range(len(heads))]
    return "\n".join(map(_row, [heads, rule, *rows]))


def _flat(values: Mapping, prefix: str = "") -> Iterator[list[str]]:
    """[dotted name, value in words] of a nested dictionary."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            items = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield [_cell(f"{prefix}{name}"), f"{value:,}" if number else _cell(items)]


def _code(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _running_mean(values) -> list[float]:
    """Each value's mean with its neighbours, a tenth of all points in the middle and fewer towards the ends."""
    half, last = len(values) // 20 + 1, len(values) - 1
    reach = [min(half, k, last - k) for k in range(len(values))]
    return [sum(values[k - r : k + r + 1]) / (2 * r + 1) for k, r in enumerate(reach)]


def _figure(panels: int, size: tuple[float, float]):
    """A row of panels. Without pyplot: no global state, and PNG needs no display."""
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#E4E4E4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, length=3)
        for text in (axis.xaxis.label, axis.yaxis.label):
            text.set_fontsize(9)
    return figure, axes
