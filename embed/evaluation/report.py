"""The report of a run, report.md: one table, plots, and the other results of results.json.

Only `checkpoints` is required in results.json; the report has a section for each other key that is present:

    checkpoints       {name: {benchmark: {precision: {"ndcg@10": …, "recall@10": …}}}}, the rows of the table in order;
                      benchmark is the name of an evaluation of the config
    evaluations       {benchmark: its description}
    merges            {merge: {"ratio": the ratio chosen, "of": the two checkpoints, "sets": {SET: its name or folder},
                      "sweep": [{"ratio": t, SET: nDCG@10 in float32, …}, …]}}
    differences       those from the baseline of the config (`compare.differences`)
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

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.box
import rich.table

from embed.evaluation import compare, page, plots
from embed.evaluation.tables import NONE, cell, number, row_of, table, terminal
from embed.training.metrics import read_metrics

METRICS = {"ndcg@10": "nDCG@10", "recall@10": "recall@10"}
PRECISIONS = ("float32", "int8", "binary", "multi")
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
    lines = [row_of(["precision", "model", *heads]), row_of(["---", "---", *["---:"] * len(heads)])]
    for precision, rows in _sections(results):
        best = [max(c for c in ("", *column) if c != NONE) for column in zip(*(cells for _, cells in rows))]
        for k, (name, cells) in enumerate(rows):
            marked = [f"**{c}**" if c == top else c for c, top in zip(cells, best)]
            lines.append(row_of([precision if k == 0 else "", name, *marked]))
    return "\n".join(lines) + "\n"


def render_sweep(merge: Mapping) -> rich.table.Table:
    """The sweep of a merge, for a terminal."""
    heads = ["ratio", *_swept(merge["sweep"])]
    return terminal(heads, _sweep_rows(merge), left=1)


def about_sweep(merge: Mapping) -> str:
    """What the ends and the columns of a sweep are."""
    ends = "0 is {}, 1 is {}".format(*merge["of"])
    return "; ".join([ends, *(f"{name}: {data}" for name, data in merge["sets"].items())])


def render_differences(found: Mapping) -> rich.table.Table:
    """Differences from the baseline, for a terminal."""
    rows = [
        [row["set"], row["model"], compare.verdict(row), number(row["baseline"]), number(row["value"])]
        + [f"{row[key]:+.3f}" for key in ("difference", "low", "high")]
        for row in found["rows"]
    ]
    return terminal(["set", "model", "", "baseline", "value", "difference", "low", "high"], rows, left=3)


def write_report(
    folder, results: Mapping, metrics: Mapping[str, Path], models: Sequence = (), baseline: str = ""
) -> Path:
    """Write folder/report.md, report.html and plots/*.

    `metrics` is {stage: its metrics.jsonl}, `models` the checkpoints with their records (`compare.read`), `baseline`
    the one that others are compared with (`compare.details`).
    """
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    return page.write(folder, _markdown(folder, results, metrics, models, baseline))[0]


def _bars(results: Mapping) -> tuple[list[str], dict[str, list], str]:
    """The arguments of `plots.bars`: nDCG@10 in float32 of every row of the table, one bar per benchmark."""
    names, titles = list(results["checkpoints"]), _benchmarks(results)
    values = {title: [_figure_of(results, n, b, "float32", "ndcg@10") for n in names] for b, title in titles.items()}
    shown = {title: row for title, row in values.items() if any(value is not None for value in row)}
    return names, shown, "nDCG@10 (float32)"


def _markdown(
    folder: Path, results: Mapping, metrics: Mapping[str, Path], models: Sequence, baseline: str
) -> Iterator[str]:
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
    plots.bars(folder / "plots" / "ndcg.png", *_bars(results))
    yield "![nDCG@10 of each checkpoint](plots/ndcg.png)"
    yield "\n".join(f"- {sentence}" for sentence in _about_figures(results))

    if models:
        yield from compare.details(folder / "plots", models, baseline)
    if metrics:
        yield "## Training"
        plots.losses(folder / "plots" / "loss.png", metrics)
        yield "![Training loss of each stage](plots/loss.png)"
        yield "Pale: each logged step. Dark: running mean, as in the table. STAGE/metrics.jsonl has every logged row."
        yield _losses(results, metrics)
        yield "\n".join(f"- {sentence}" for sentence in _about_losses(results, metrics))
    if merges := results.get("merges"):
        for name, merge in merges.items():
            yield f"## Merging: the ratio of {cell(name)} ({merge['method']})"
            yield table(["ratio", *(f"{cell(b)} nDCG@10" for b in _swept(merge["sweep"]))], _sweep_rows(merge))
            yield cell(about_sweep(merge))
        plots.merge(folder / "plots" / "merge.png", merges)
        yield "![nDCG@10 against the ratio of the merge](plots/merge.png)"
    if results.get("diffusion"):
        yield "## Diffusion: predicting masked tokens"
        if results.get("elbo") is not None:
            yield f"ELBO: {results['elbo']:.3f} nats per token."
        rows = [[f"{p['t']:g}", number(p.get("accuracy")), number(p.get("nll"))] for p in results["diffusion"]]
        yield table(["share masked, t", "accuracy", "cross-entropy (nats)"], rows)
    if results.get("denoising"):
        yield "## Diffusion: a sample, from masks to text"
        for state in results["denoising"]:
            yield f"Step {state['step']}:" if isinstance(state["step"], int) else f"{str(state['step']).capitalize()}:"
            yield _code(state["text"])
    if results.get("search"):
        search = results["search"]
        yield "## A search"
        precision = f" ({search['precision']})" if search.get("precision") else ""
        yield f"Query{precision}: **{cell(search['query'])}**"
        rows = [[str(h["rank"]), f"{h['score']:.3f}", f"`{cell(h['id'])}`", cell(h["text"])] for h in search["hits"]]
        yield table(["rank", "score", "id", "text"], rows, right=2)
    if results.get("seconds"):
        yield "## Time"
        steps = results.get("seconds_per_step", {})
        rows = [[cell(node), f"{s:.1f}", number(steps.get(node))] for node, s in results["seconds"].items()]
        rows.append(["all", f"{sum(results['seconds'].values()):.1f}", NONE])
        yield table(["work", "seconds", "seconds per step"], rows)
    if results.get("data"):
        yield "## Data"
        data = results["data"]
        if counts := data.get("counts"):
            heads = list(dict.fromkeys(key for count in counts.values() for key in count if _is_count(count[key])))
            rows = [[cell(name), *(_total(count.get(key)) for key in heads)] for name, count in counts.items()]
            yield table(["task or evaluation set", *heads], rows)
        rows = [[cell(k), _total(v)] for k, v in data.items() if isinstance(v, int) and not isinstance(v, bool)]
        if rows:
            yield table(["what", "count"], rows)
        yield "Everything else about the data, such as arguments and packages, is in results.json."
    if results.get("versions"):
        yield "## Versions"
        yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())


# How to read the loss of each objective, in any stage.
LOSSES = {
    "causal": "cross-entropy of each token given those before it, in nats per token",
    "diffusion": "the bound on the negative log-likelihood per token, in nats, at noise levels drawn at each step",
    "pair": "cross-entropy of finding a query's document among the other documents and queries of its batch. Batch "
    "size and temperature change its level",
    "contextual": "a weighted sum of three cross-entropies: of finding a query's chunk among the similar chunks of its "
    "own document, that chunk among all chunks of the batch, and its whole document among documents. The weights "
    "change over the stage",
    "triplet": "cross-entropy of finding a query's document among the documents of the batch and the mined negatives, "
    "which a checkpoint ranked high for these queries. These are harder than random texts, so a loss above that of the "
    "previous stage does not mean a worse model",
    "distill": "a weighted sum of distances between the vectors of the student and those of its teacher, and between "
    "the similarities that both give to the texts of a batch; 0 if the student agrees with the teacher in everything",
    "late_interaction": "cross-entropy of finding a query's document among the other documents of its batch by MaxSim. "
    "Batch size, temperature and the number of tokens of the queries change its level",
}


def _kinds(results: Mapping) -> dict[str, str]:
    """{stage: its objective}."""
    return {name: stage["kind"] for name, stage in results.get("stages", {}).items()}


def _about_figures(results: Mapping) -> Iterator[str]:
    """Sentences that explain the rows of the table."""
    rows, kinds = results["checkpoints"], _kinds(results)
    yield "nDCG@10 is 1 if each query ranks its relevant texts first; recall@10 is the share of them in the first ten."
    shown = [precision for precision, _ in _sections(results) if precision != "multi"]
    if len(shown) > 1:
        yield (
            f"{', '.join(shown)} are the same vectors: int8 takes a quarter of float32's memory, binary 1/32. "
            "The plot shows float32."
        )
    if any("multi" in benchmark for row in rows.values() for benchmark in row.values()):
        yield (
            "multi is late interaction: a vector per token, compared by MaxSim. The other precisions of such a "
            "checkpoint are the mean vectors of the same encoder, which its stage does not train."
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
        means, last = plots.running_mean([row["loss"] for row in rows]), len(rows) - 1
        course = [number(means[round(last * part)]) if rows else NONE for part in (0, 0.25, 0.5, 0.75, 1)]
        lines.append([cell(stage), kinds.get(stage, NONE), f"{rows[-1]['step']:,}" if rows else NONE, *course])
    return table(["stage", "objective", "steps", "loss at first", "25%", "50%", "75%", "at last"], lines)


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
                rows.append((name, [number(value) for value in values]))
        if rows:
            yield precision, rows


def _swept(sweep) -> list[str]:
    return [name for name in sweep[0] if name != "ratio"]


def _sweep_rows(merge: Mapping) -> list[list[str]]:
    """The rows of the table of a sweep."""
    rows = []
    for point in merge["sweep"]:
        mark = " (merged)" if point["ratio"] == merge["ratio"] else ""
        rows.append([f"{point['ratio']:g}{mark}", *(number(point.get(name)) for name in _swept(merge["sweep"]))])
    return rows


def _figure_of(results: Mapping, name: str, benchmark: str, precision: str, metric: str) -> float | None:
    return results["checkpoints"][name].get(benchmark, {}).get(precision, {}).get(metric)


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
