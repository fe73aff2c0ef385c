"""Any number of evaluations and runs side by side: by task, language, length of the text, precision and dimension.

    models, runs = read([DIR, RUN, …])
    page.write(folder, sections(folder, models, runs))

DIR is what `embed evaluate` wrote, RUN the workdir of a run. Differences between two models have 95% intervals of a
paired bootstrap over the queries.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from embed import paths
from embed.evaluation import plots, records
from embed.evaluation.retrieval import MULTI, TOKEN_BYTES
from embed.evaluation.tables import NONE, bold_best, bold_row, cell, number, table
from embed.training.metrics import FILE, read_metrics

SAMPLES = 2000  # of the bootstrap
LENGTHS = 4  # groups of queries by the length of their text
MEASURES = {"ndcg@10": "nDCG@10", "recall@10": "recall@10"}


class Evaluated(NamedTuple):
    """A model and its records."""

    label: str
    dimensions: int | None
    records: dict[tuple[str, str, str], dict]  # by task, subset, split
    parts: Sequence[dict] = ()  # the records of searches in parts of a corpus
    about: Mapping = {}  # evaluation.json

    def form(self, form: str) -> str:
        """The form that is shown beside others in `form`: a model without vectors has only one."""
        return form if self.dimensions else "float32"

    def value(self, key: tuple, form: str, metric: str = "") -> float | None:
        """A metric, by default the main one."""
        record = self.records.get(key)
        return record and record["values"].get(self.form(form), {}).get(metric or record["main"])

    def queries(self, key: tuple, form: str) -> dict[str, float]:
        """{query: its nDCG@10}."""
        found = self.records.get(key, {}).get("queries", {})
        return dict(zip(found.get("ids", ()), found.get("values", {}).get(self.form(form), ())))

    def bytes(self, form: str) -> float | None:
        """Bytes of a text's vector, or of those of its tokens on average."""
        if form != MULTI:
            return size(form, self.dimensions)
        found = [n for record in self.records.values() if (n := record["counts"].get(TOKEN_BYTES))]
        return float(np.mean(found)) if found else None

    @property
    def forms(self) -> list[str]:
        return list(dict.fromkeys(form for record in self.records.values() for form in record["values"]))


class Curve(NamedTuple):
    """The logged metrics of a stage of a run."""

    label: str
    stage: str
    rows: list[dict]


def read(sources: Sequence) -> tuple[list[Evaluated], list[Curve]]:
    """The models and the training curves of folders of `embed evaluate` and of runs.

    ValueError for a folder that is neither.
    """
    models, curves, folders = [], [], []  # folders: of each model, to tell models of one name apart
    for source in sources:
        folder = paths.path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {source}: expected one of `embed evaluate`, or a workdir")
        if records.is_evaluation(folder):
            if not records.read(folder):
                raise ValueError(f"{source} has no result yet: no set of it was evaluated to the end")
            models.append(_evaluated(folder, records.read_about(folder)["model"]["name"].removeprefix("local/")))
            folders.append(folder)
            continue
        found = sorted(child for child in folder.iterdir() if (child / FILE).exists())
        inner = folder / records.EVALUATED
        if not found and not inner.is_dir():
            raise ValueError(f"{source} is neither a folder of `embed evaluate` nor of a run")
        if inner.is_dir():
            file = folder / "results.json"
            results = paths.read_json(file) if file.exists() else {"checkpoints": {}}
            each = {records.read_about(child)["model"]["name"]: child for child in sorted(inner.iterdir())}
            for name in [*results["checkpoints"], *(n for n in each if not file.exists())]:
                if name in each:
                    label = name if len(sources) == 1 else f"{folder.name}: {name}"
                    models.append(_evaluated(each[name], label, results.get("evaluations")))
                    folders.append(folder)
        for stage in found:
            label = stage.name if len(sources) == 1 else f"{folder.name}: {stage.name}"
            curves.append(Curve(label, stage.name, read_metrics(stage / FILE)))
    return [model._replace(label=label) for model, label in zip(models, _labels(models, folders))], curves


def _labels(models: Sequence[Evaluated], folders: Sequence) -> list[str]:
    """The labels of the models, with their folders where several have one name."""
    labels = [model.label for model in models]
    short = [f"{label} ({folder.name})" if labels.count(label) > 1 else label for label, folder in zip(labels, folders)]
    return [
        f"{label} ({folder})" if short.count(name) > 1 else name for label, name, folder in zip(labels, short, folders)
    ]


def _evaluated(folder, label: str, tasks=None) -> Evaluated:
    every = [record for record in records.read(folder) if tasks is None or record["task"] in tasks]
    whole = {(r["task"], r["subset"], r["split"]): r for r in every if not r.get("corpus_size")}
    parts = [record for record in every if record.get("corpus_size")]
    about = records.read_about(folder)
    return Evaluated(label, about["model"].get("dimensions"), whole, parts, about)


def bootstrap(differences: Float64[np.ndarray, " q"], samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of paired differences: percentiles of the means of resampled queries."""
    rng, count = np.random.default_rng(seed), len(differences)
    size = max(1, 2**22 // count)
    means = [
        rng.multinomial(count, np.full(count, 1 / count), min(size, samples - start)) @ differences / count
        for start in range(0, samples, size)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def sections(folder, models: Sequence[Evaluated], curves: Sequence[Curve], baseline: str = "") -> Iterator[str]:
    """The blocks of the report; draws its plots in folder/plots. `baseline` is the label that others are compared with,
    by default BM25 or else that of the first model."""
    drawn = Path(folder) / "plots"
    drawn.mkdir(parents=True, exist_ok=True)
    yield "# Evaluation"
    if models:
        yield "## Models"
        yield from _overview(models)
        yield from _tasks(models)
        yield from details(drawn, models, baseline)
        yield "## Evaluations"
        yield from _about(models)
    if curves:
        yield "## Training curves"
        plots.curves(drawn / "training.svg", curves)
        yield "![Training loss over steps and over hours](plots/training.svg)"
        yield (
            "The running mean of the loss. Stages with one name share a panel; their losses compare only if their "
            "objective, batch and temperature are equal."
        )


def details(drawn: Path, models: Sequence[Evaluated], baseline: str = "") -> Iterator[str]:
    """Differences from a baseline, languages, lengths and sizes; draws the plots in the folder `drawn`."""
    wanted = (model for model in models if (model.label == baseline if baseline else not model.dimensions))
    first = next(wanted, models[0])  # without vectors: BM25
    yield from _differences([first, *(model for model in models if model is not first)])
    yield from _languages(models)
    yield from _lengths(drawn, models)
    yield from _sizes(drawn, models)
    yield from _corpora(models)


def common(models: Sequence[Evaluated]) -> list[tuple[str, str, str]]:
    """The sets that all models were evaluated on, in the order of the first."""
    return [key for key in models[0].records if all(key in model.records for model in models)]


def main_form(models: Sequence[Evaluated]) -> str:
    """The form in which models are compared: of those that most models have, float32 or else the first."""
    counted = Counter(form for model in models if model.dimensions for form in model.forms)
    shared = [form for form, count in counted.items() if count == max(counted.values())]
    return "float32" if "float32" in shared or not shared else shared[0]


def mean(model: Evaluated, keys: Sequence[tuple], form: str) -> float | None:
    """The mean over tasks of the means over their subsets and splits; None if one is missing."""
    tasks: dict[str, list] = {}
    for key in keys:
        tasks.setdefault(key[0], []).append(model.value(key, form))
    values = [value for found in tasks.values() for value in found]
    return float(np.mean([np.mean(found) for found in tasks.values()])) if values and None not in values else None


def size(form: str, dimensions: int | None) -> float | None:
    """Bytes of a vector."""
    precision, _, prefix = form.partition("-")
    kept = int(prefix) if prefix else dimensions
    return kept and kept * {"float32": 4, "int8": 1}.get(precision, 1 / 8)


def _about(models: Sequence[Evaluated]) -> Iterator[str]:
    """What was evaluated, and how."""
    rows = []
    for model in models:
        made, settings = model.about.get("model", {}), model.about.get("settings", {})
        how = [f"{name} {value}" for name, value in settings.items() if value]
        how += [f"at most {made['max_length']:,} tokens"] if made.get("max_length") else []
        revision = f"{made.get('revision') or made.get('digest') or NONE}"[:16]
        rows.append([cell(model.label), revision, cell(", ".join(how) or NONE), model.about.get("commit") or NONE])
    yield table(["model", "revision", "settings", "commit of embed"], rows, left=4)


def _overview(models: Sequence[Evaluated]) -> Iterator[str]:
    keys = common(models)
    if not keys:
        yield "No set was evaluated with every model, so there is no mean to compare."
        return
    rows = []
    for model in models:
        for form in model.forms:
            bytes_ = model.bytes(form)
            shown = f"{bytes_:,.0f}" if bytes_ else NONE
            rows.append([cell(model.label), form, shown, number(mean(model, keys, form))])
    tasks = len({key[0] for key in keys})
    yield table(
        ["model", "vectors", "bytes", f"mean of {tasks} task{'s' * (tasks != 1)}"], bold_best(rows, [3]), left=2
    )
    left_out = {key for model in models for key in model.records} - set(keys)
    note = f" Left out: {len(left_out):,} sets that some models were not evaluated on." if left_out else ""
    yield f"The mean of the main metrics over the tasks that all models share, each task the mean of its subsets.{note}"


def _tasks(models: Sequence[Evaluated]) -> Iterator[str]:
    form = main_form(models)
    yield "## Tasks"
    every = list(dict.fromkeys(key for model in models for key in model.records))
    tasks: dict[str, list[tuple]] = {}
    for key in every:
        tasks.setdefault(key[0], []).append(key)
    rows = []
    for task, keys in tasks.items():
        record = next(model.records[keys[0]] for model in models if keys[0] in model.records)
        queries = sum((model_record(models, key)["counts"].get("queries") or 0) for key in keys)
        main = MEASURES.get(record["main"], record["main"])
        rows.append([cell(task), main, f"{len(keys)}", f"{queries:,}" if queries else NONE])
        rows[-1] += [number(mean(model, keys, form)) for model in models]
    heads = ["task", "metric", "sets", "queries", *(cell(model.label) for model in models)]
    yield f"Vectors in {form}."
    yield table(heads, [bold_row(row, 4) for row in rows], left=2)


def model_record(models: Sequence[Evaluated], key: tuple) -> Mapping:
    """The record of a set of the first model that has it."""
    return next(model.records[key] for model in models if key in model.records)


def _differences(models: Sequence[Evaluated]) -> Iterator[str]:
    """Every other model minus the first, with intervals."""
    form, (first, *others), rows = main_form(models), models, []
    for key in first.records:
        base = first.queries(key, form)
        for model in others:
            other = model.queries(key, form)
            shared = [query for query in base if query in other]
            if len(shared) < 2:
                continue
            found = np.array([other[query] - base[query] for query in shared])
            low, high = bootstrap(found)
            verdict = "" if low <= 0 <= high else "better" if low > 0 else "worse"
            name = " ".join(part for part in key if part not in ("default", "test"))
            rows.append([cell(name), cell(model.label), verdict, f"{len(shared):,}"])
            rows[-1] += [f"{found.mean():+.4f}", f"{low:+.4f}", f"{high:+.4f}"]
    if not rows:
        return
    yield f"## Differences from {cell(first.label)}"
    better, worse = (sum(row[2] == verdict for row in rows) for verdict in ("better", "worse"))
    yield (
        f"nDCG@10 in {form}, minus that of {cell(first.label)}, over the same queries, with the 95% interval of a "
        f"paired bootstrap ({SAMPLES:,} samples of the queries). Of {len(rows):,} differences, {better:,} are better "
        f"and {worse:,} are worse: their interval is on one side of 0. Without any true difference, "
        "about 1 in 20 would be marked too."
    )
    yield table(["set", "model", "", "queries", "difference", "low", "high"], rows, left=3)


def _languages(models: Sequence[Evaluated]) -> Iterator[str]:
    form, found = main_form(models), {}
    for key in common(models):
        for language in {name.split("-")[0] for name in model_record(models, key).get("languages") or ()}:
            found.setdefault(language, []).append(key)
    if len(found) < 2:
        return
    yield "## Languages"
    rows = []
    for language, keys in sorted(found.items()):
        rows.append([language, f"{len(keys)}", *(number(mean(model, keys, form)) for model in models)])
    yield f"The mean over the sets in a language, vectors in {form}. A set in two languages counts for both."
    yield table(["language", "sets", *(cell(m.label) for m in models)], [bold_row(row, 2) for row in rows], left=1)


def _lengths(drawn: Path, models: Sequence[Evaluated]) -> Iterator[str]:
    """How quality changes with the length of the relevant text: groups of equally many queries of each set."""
    form, rows, lines = main_form(models), [], []
    for key in dict.fromkeys(key for model in models for key in model.records):
        about = model_record(models, key).get("queries")
        if not about or len(about["ids"]) < 5 * LENGTHS:
            continue
        order = [i for i in np.argsort(about["characters"], kind="stable") if about["characters"][i]]
        groups = [part for part in np.array_split(np.array(order, int), LENGTHS) if len(part)]
        middles = [float(np.median([about["characters"][i] for i in part])) for part in groups]
        name = " ".join(part for part in key if part not in ("default", "test"))
        values = {}
        for model in models:
            of = model.queries(key, form)
            if set(about["ids"]) <= set(of):
                values[model.label] = [float(np.mean([of[about["ids"][i]] for i in part])) for part in groups]
        lines.append((name, middles, values))
        for k, (part, middle) in enumerate(zip(groups, middles)):
            low, high = (about["characters"][part[i]] for i in (0, -1))
            rows.append([cell(name), f"{low:,} to {high:,}", f"{middle:,.0f}", f"{len(part):,}"])
            rows[-1] += [number(values[m.label][k]) if m.label in values else NONE for m in models]
    if not rows:
        return
    yield "## Length of the text"
    plots.lengths(drawn / "lengths.svg", lines)
    yield "![nDCG@10 by the length of the relevant text](plots/lengths.svg)"
    if len(lines) > plots.PANELS:
        yield f"The plot shows the first {plots.PANELS} of {len(lines)} sets."
    yield f"nDCG@10 in {form} by the characters of the longest relevant text of a query, in groups of equal size."
    heads = ["set", "characters", "median", "queries", *(cell(model.label) for model in models)]
    yield table(heads, rows, left=2)


def _sizes(drawn: Path, models: Sequence[Evaluated]) -> Iterator[str]:
    keys, points = common(models), {}
    for model in models:
        found = [(model.bytes(form), mean(model, keys, form), form) for form in model.forms]
        points[model.label] = sorted(point for point in found if point[0] and point[1] is not None)
    points = {label: found for label, found in points.items() if len(found) > 1}
    if not points:
        return
    yield "## Size of the vectors"
    plots.sizes(drawn / "sizes.svg", points)
    yield "![Quality against bytes of a vector](plots/sizes.svg)"
    rows = []
    for label, found in points.items():
        full = max(found)[1]
        for bytes_, value, form in found:
            share = f"{value / full:.1%}" if full else NONE
            rows.append([cell(label), form, f"{bytes_:,.0f}", f"{math.floor(1e9 / bytes_):,}", number(value), share])
    yield table(["model", "vectors", "bytes", "texts per GB", "mean", "of the largest"], rows, left=2)


def _corpora(models: Sequence[Evaluated]) -> Iterator[str]:
    """The metrics of searches in parts of a corpus, beside those of the whole."""
    form, rows = main_form(models), []
    for model in models:
        for record in sorted(model.parts, key=lambda r: (r["task"], r["subset"], r["split"], r["corpus_size"])):
            rows.append((model, record))
        whole = {(r["task"], r["subset"], r["split"]) for r in model.parts}
        rows += [(model, model.records[key]) for key in model.records if key in whole]
    if not rows:
        return
    metrics = list(dict.fromkeys(m for _, record in rows for m in record["values"].get(form, {})))
    yield "## Size of the corpus"
    yield f"Vectors in {form}. A part has every relevant text and a fixed sample of the others."
    lines = [
        [cell(record["task"]), cell(model.label), f"{record['counts'].get('texts', 0):,}"]
        + [number(record["values"].get(form, {}).get(metric)) for metric in metrics]
        for model, record in sorted(rows, key=lambda row: (row[1]["task"], row[1]["counts"].get("texts", 0)))
    ]
    yield table(["set", "model", "texts", *metrics], lines, left=2)
