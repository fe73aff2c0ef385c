"""The report of a run, report.md: one table, plots, and the other results of results.json.

Only `checkpoints` is required in results.json; the report has a section for each other key that is present:

    checkpoints       {name: {benchmark: {precision: {"ndcg@10": …, "recall@10": …}}}}, the rows of the table in order;
                      benchmark is the name of an evaluation of the config
    evaluations       {benchmark: its description}
    merges            {merge: {"ratio": the ratio chosen, "sweep": [{"ratio": t, SET: nDCG@10, …}, …]}}, on development
                      splits
    diffusion         [{"t": …, "accuracy": …, "nll": …}, …] masked-token accuracy, cross-entropy in nats, at noise t
    elbo              the diffusion model's bound, nats per token
    denoising         [{"step": number or name, "text": …}, …] a sample while it is unmasked
    search            {"query": …, "precision": …, "hits": [{"rank", "score", "id", "text"}, …]}
    stages            {stage: {"kind": its objective, "init": the checkpoint it started from}}
    seconds           {node: wall seconds}
    seconds_per_step  {node: seconds} of those that are stages
    data              {name: count, text, or a dictionary of these}; the report shows counts and `counts`
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
# The colors also differ in lightness, for print and for color-blind readers (Okabe and Ito).
COLORS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#D55E00", "#CC79A7")

NONE = "–"  # for a missing figure
TITLE = "Retrieval"


def _benchmarks(results: Mapping) -> dict[str, str]:
    """{benchmark: its title}, in the order of the table's columns."""
    names = [name for row in results["checkpoints"].values() for name in row]
    return {name: name.replace("_", " ") for name in dict.fromkeys(names)}


def _legend(results: Mapping) -> str:
    described = results.get("evaluations", {})
    return " ".join(f"{title}: {described[name]}." for name, title in _benchmarks(results).items() if name in described)


def render_table(results: Mapping) -> rich.table.Table:
    """The table of a run, for a terminal of 80 columns."""
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
    """The same table in Markdown; the best figure of each column and precision is bold."""
    heads = [f"{benchmark}<br>{metric}" for benchmark in _benchmarks(results).values() for metric in METRICS.values()]
    lines = [_row(["precision", "model", *heads]), _row(["---", "---", *["---:"] * len(heads)])]
    for precision, rows in _sections(results):
        best = [max(c for c in ("", *column) if c != NONE) for column in zip(*(cells for _, cells in rows))]
        for k, (name, cells) in enumerate(rows):
            marked = [f"**{c}**" if c == top else c for c, top in zip(cells, best)]
            lines.append(_row([precision if k == 0 else "", name, *marked]))
    return "\n".join(lines) + "\n"


def write_report(folder, results: Mapping, metrics: Mapping[str, Path]) -> Path:
    """Write folder/report.md and folder/plots/*.png; `metrics` is {stage: its metrics.jsonl}."""
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text("\n\n".join(_markdown(folder, results, metrics)) + "\n", encoding="utf-8")
    return path


def plot_losses(path, metrics: Mapping[str, Path]) -> None:
    """One panel per stage: the loss at each logged step, and its running mean."""
    figure, axes = _figure(len(metrics), (2.9 * len(metrics) + 0.4, 2.8))
    for axis, (stage, file) in zip(axes, metrics.items()):
        rows = [row for row in read_metrics(file) if "loss" in row]
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axis.plot(steps, losses, color="#9DC3E6", linewidth=0.8)
        axis.plot(steps, _running_mean(losses), color=COLORS[0], linewidth=1.6)
        axis.set_title(stage if rows else f"{stage}: nothing logged", loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
    axes[0].set_ylabel("training loss (nats)")
    figure.savefig(path, dpi=160)


def plot_ndcg(path, results: Mapping) -> None:
    """nDCG@10 in float32 of every row of the table, one bar per benchmark."""
    names = list(results["checkpoints"])
    titles = _benchmarks(results)
    shown = [b for b in titles if any(_figure_of(results, n, b, "float32", "ndcg@10") is not None for n in names)]
    figure, (axis,) = _figure(1, (max(6, 1.15 * len(names) + 1), 3.4))
    width = 0.8 / max(len(shown), 1)
    for k, benchmark in enumerate(shown):
        values = [_figure_of(results, name, benchmark, "float32", "ndcg@10") for name in names]
        positions = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(names))]
        bars = axis.bar(
            positions, [v or 0 for v in values], width * 0.92, color=COLORS[k % len(COLORS)], label=titles[benchmark]
        )
        axis.bar_label(bars, [_number(v) for v in values], fontsize=7, padding=2, color="#333333")
    axis.set_xticks(range(len(names)), [name.replace(" + ", " +\n").replace(" (", "\n(") for name in names])
    axis.set_ylabel("nDCG@10 (float32)")
    axis.margins(y=0.1)
    axis.legend(
        frameon=False, fontsize=8, ncols=max(len(shown), 1), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2
    )
    figure.savefig(path, dpi=160)


def plot_slerp(path, merges: Mapping[str, Mapping]) -> None:
    """One panel per merge: nDCG@10 on the development split against the slerp ratio."""
    figure, axes = _figure(len(merges), (4.6 * len(merges), 3))
    for axis, (name, merge) in zip(axes, merges.items()):
        ratios = [point["ratio"] for point in merge["sweep"]]
        for k, benchmark in enumerate(_swept(merge["sweep"])):
            values = [point[benchmark] for point in merge["sweep"]]
            axis.plot(ratios, values, marker="o", markersize=4, color=COLORS[k % len(COLORS)], label=benchmark)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("ratio: 0 is the first, 1 the second")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("nDCG@10, development split")
    figure.savefig(path, dpi=160)


def _markdown(folder: Path, results: Mapping, metrics: Mapping[str, Path]) -> Iterator[str]:
    """The blocks of report.md; draws the plots in them."""
    yield "# Run report"
    facts = [f"{key}: `{results[key]}`" for key in ("command", "commit", "machine") if results.get(key)]
    if facts:
        yield "  \n".join(facts)

    yield f"## {TITLE}"
    yield markdown_table(results).rstrip()
    yield (
        f"{_legend(results)} A dash: this row has no such vectors (BM25) or was not measured. Bold: best of the column."
    ).strip()
    plot_ndcg(folder / "plots" / "ndcg.png", results)
    yield "![nDCG@10 of each checkpoint](plots/ndcg.png)"
    yield "\n".join(f"- {sentence}" for sentence in _about_figures(results))

    if metrics:
        yield "## Training"
        plot_losses(folder / "plots" / "loss.png", metrics)
        yield "![Training loss of each stage](plots/loss.png)"
        yield "Pale: each logged step. Dark: running mean, as in the table. STAGE/metrics.jsonl has every logged row."
        yield _losses(results, metrics)
        yield "\n".join(f"- {sentence}" for sentence in _about_losses(results, metrics))
    if merges := results.get("merges"):
        for name, merge in merges.items():
            yield f"## Merging: the slerp ratio of {_cell(name)} on the development split"
            benchmarks, rows = _swept(merge["sweep"]), []
            for point in merge["sweep"]:
                mark = " (chosen)" if point["ratio"] == merge["ratio"] else ""
                rows.append([f"{point['ratio']:g}{mark}", *(_number(point.get(b)) for b in benchmarks)])
            yield _table(["ratio", *(f"{b} nDCG@10" for b in benchmarks)], rows)
        plot_slerp(folder / "plots" / "slerp.png", merges)
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
        rows = [[_cell(node), f"{s:.1f}", _number(steps.get(node))] for node, s in results["seconds"].items()]
        rows.append(["all", f"{sum(results['seconds'].values()):.1f}", NONE])
        yield _table(["work", "seconds", "seconds per step"], rows)
    if results.get("data"):
        yield "## Data"
        data = results["data"]
        if counts := data.get("counts"):
            heads = list(dict.fromkeys(key for count in counts.values() for key in count if _is_count(count[key])))
            rows = [[_cell(name), *(_total(count.get(key)) for key in heads)] for name, count in counts.items()]
            yield _table(["task or evaluation set", *heads], rows)
        rows = [[_cell(k), _total(v)] for k, v in data.items() if isinstance(v, int) and not isinstance(v, bool)]
        if rows:
            yield _table(["what", "count"], rows)
        yield "Everything else about the data, such as arguments and packages, is in results.json."
    if results.get("versions"):
        yield "## Versions"
        yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())


# How to read the loss of each objective, in any stage.
LOSSES = {
    "diffusion": "the bound on the negative log-likelihood per token, in nats, at noise levels drawn at each step",
    "pair": "cross-entropy of finding a query's document among the other documents and queries of its batch. Batch "
    "size and temperature change its level",
    "contextual": "a weighted sum of three cross-entropies: of finding a query's chunk among the similar chunks of its "
    "own document, that chunk among all chunks of the batch, and its whole document among documents. The weights "
    "change over the stage",
    "triplet": "cross-entropy of finding a query's document among the documents of the batch and the mined negatives, "
    "which a checkpoint ranked high for these queries. These are harder than random texts, so a loss above that of the "
    "previous stage does not mean a worse model",
}


def _kinds(results: Mapping) -> dict[str, str]:
    """{stage: its objective}."""
    return {name: stage["kind"] for name, stage in results.get("stages", {}).items()}


def _about_figures(results: Mapping) -> Iterator[str]:
    """Sentences that explain the rows of the table."""
    rows, kinds = results["checkpoints"], _kinds(results)
    yield "nDCG@10 is 1 if each query ranks its relevant texts first; recall@10 is the share of them in the first ten."
    shown = [precision for precision, _ in _sections(results)]
    if len(shown) > 1:
        yield (
            f"{', '.join(shown)} are the same vectors: int8 takes a quarter of float32's memory, binary 1/32. "
            "The plot shows float32."
        )
    if "random init" in rows:
        yield (
            "random init is the model before any training. It is above zero: texts that share words have similar means "
            "of random token vectors."
        )
    if diffusion := [name for name in rows if kinds.get(name) == "diffusion"]:
        yield (
            f"{', '.join(diffusion)}: masked diffusion trains the state of each token to predict tokens. It never "
            "compares the mean states of two texts, so such a checkpoint may rank below random init. Its purpose is to "
            "start later stages."
        )
    if "BM25" in rows:
        yield "BM25 is the lexical baseline: it compares words and learns nothing."
    if any(name.startswith("BM25 + ") for name in rows):
        yield "BM25 + NAME fuses the two rankings by reciprocal rank."


def _losses(results: Mapping, metrics: Mapping[str, Path]) -> str:
    """A table with a row per stage: the running mean of its loss at five steps."""
    kinds, lines = _kinds(results), []
    for stage, file in metrics.items():
        rows = [row for row in read_metrics(file) if "loss" in row]
        means, last = _running_mean([row["loss"] for row in rows]), len(rows) - 1
        course = [_number(means[round(last * part)]) if rows else NONE for part in (0, 0.25, 0.5, 0.75, 1)]
        lines.append([_cell(stage), kinds.get(stage, NONE), f"{rows[-1]['step']:,}" if rows else NONE, *course])
    return _table(["stage", "objective", "steps", "loss at first", "25%", "50%", "75%", "at last"], lines)


def _about_losses(results: Mapping, metrics: Mapping[str, Path]) -> Iterator[str]:
    """Sentences that explain the losses, by objective."""
    kinds = _kinds(results)
    yield "Each objective has its own loss, and each stage its own batches: compare within a row."
    for kind, sentence in LOSSES.items():
        if stages := [stage for stage in metrics if kinds.get(stage) == kind]:
            yield f"{', '.join(stages)} ({kind}): {sentence}."
    if any(results.get("stages", {}).get(stage, {}).get("init") for stage in metrics):
        yield (
            "The loss of a stage that starts from a trained checkpoint may rise first: the learning rate was low at "
            "the end of the previous stage and rises again at the start of this one. The retrieval table shows what a "
            "stage gained."
        )


def _sections(results: Mapping) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """(precision, [(row name, cells)]); only rows with a figure in that precision."""
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
    """The text on one line, safe in a Markdown cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: list[str], rows: list[list[str]], right: int | None = None) -> str:
    """A Markdown table; columns 1.. (with `right`: the first `right`) are right-aligned numbers."""
    flush = range(1, len(heads)) if right is None else range(right)
    rule = ["---:" if k in flush else "---" for k in range(len(heads))]
    return "\n".join(map(_row, [heads, rule, *rows]))


def _is_count(value) -> bool:
    """Whether a value is a number or a dictionary of numbers."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(item, int) and not isinstance(item, bool) for item in values)


def _total(value) -> str:
    """A count, or the sum of a dictionary of counts, as text."""
    value = sum(value.values()) if isinstance(value, Mapping) else value
    return NONE if value is None else f"{value:,}"


def _code(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _running_mean(values) -> list[float]:
    """Each value's mean with its neighbors: a tenth of all points in the middle, fewer toward the ends."""
    half, last = len(values) // 20 + 1, len(values) - 1
    reach = [min(half, k, last - k) for k in range(len(values))]
    return [sum(values[k - r : k + r + 1]) / (2 * r + 1) for k, r in enumerate(reach)]


def _figure(panels: int, size: tuple[float, float]):
    """A row of panels. Without pyplot there is no global state, and PNG needs no display."""
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
