"""Metrics of a model on evaluation sets: folders of your own, MTEB's tasks and benchmarks, ConTEB.

    embed evaluate --model=FOLDER --data=sets/scifact --output=DIR
    embed evaluate --model=FOLDER --tasks SciFact NFCorpus --precision int8 binary --truncate_dim 256 --output=DIR
    embed evaluate --model=FOLDER --benchmark="MTEB(Multilingual, v2)" --types Retrieval --output=DIR
    embed evaluate --model=bm25 --benchmark=ConTEB --data_root=sets --output=DIR
    embed evaluate --reproduce=pplx-embed-v1-0.6b --output=DIR

A text is encoded once for all precisions and dimensions. Longer texts than the model takes are cut, with a warning. The
same command continues: what --output has is not computed again (docs/evaluation.md).

--reproduce evaluates a model on the tasks of its published scores, in their precision, and prints ours, published and
the difference. Its exit code is 1 if a difference is larger than --tolerance.
"""

import argparse
import contextlib


def main(argv: list[str] | None = None) -> int:
    """Run `embed evaluate arguments`; returns the exit code."""
    from embed import distributed, inference
    from embed.cli import common
    from embed.evaluation import published
    from embed.evaluation.metrics import check_metrics

    parser = common.Parser("evaluate", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    common.add_encoder_arguments(
        parser,
        "a model folder, RUN:NAME (a stage or export of a run), a hub id owner/name, bm25, or a model of "
        "sentence-transformers",
        truncate=False,
        required=False,
    )
    parser.add_argument("--name", help="owner/name of the model in MTEB's results (default: local/FOLDER, or the id)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data", nargs="+", help="folders of evaluation sets: BEIR, MTEB, ConTEB, or `embed prepare`")
    what.add_argument("--tasks", nargs="+", help="names of MTEB's tasks or of ConTEB's, such as SciFact")
    what.add_argument("--benchmark", help='name of a benchmark, such as "MTEB(eng, v2)", LongEmbed, NanoBEIR or ConTEB')
    parser.add_argument(
        "--reproduce", help="a published model, such as pplx-embed-v1-0.6b; --tasks chooses some of its"
    )
    parser.add_argument(
        "--tolerance",
        type=common.finite,
        default=published.TOLERANCE,
        help="of --reproduce, in 0..1 (default %(default)s)",
    )
    parser.add_argument("--data_root", help="folder of datasets, each named like the repository of its task")
    parser.add_argument("--languages", nargs="+", default=[], help="only tasks and subsets in these (ISO 639-3: eng)")
    parser.add_argument("--types", nargs="+", default=[], help="only tasks of these types, such as Retrieval or STS")
    parser.add_argument("--splits", nargs="+", default=[], help="only these splits (default: test, or the task's own)")
    parser.add_argument("--precision", nargs="+", default=[], choices=(*inference.PRECISIONS, "multi"))
    parser.add_argument("--truncate_dim", nargs="+", type=int, default=[], help="also evaluate these Matryoshka sizes")
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="of --data: ndcg, recall, mrr, map, precision @ a rank"
    )
    parser.add_argument("--corpus_sizes", nargs="+", type=int, default=[], help="of --data: also search in such parts")
    parser.add_argument("--trec", type=int, default=0, help="of --data: write TREC run files, this many texts a query")
    parser.add_argument("--alone", action="store_true", help="encode each chunk of a document by itself")
    parser.add_argument("--output", help="folder of the results; required for tasks and benchmarks")
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    scores = _prepare_reproduction(arguments) if arguments.reproduce else []
    _check(arguments)
    check_metrics(arguments.metrics)
    common.join(arguments, saves_at_sigterm=False)

    from embed.evaluation import local_run, models, records, sets  # these import what uses the devices

    inputs = [arguments.model, *(file for folder in arguments.data or [] for file in sets.files(folder))]
    keeps = common.keeps_work() if arguments.output else contextlib.nullcontext()
    with common.output(arguments, inputs, is_ours=records.is_evaluation, continues=True), keeps:
        local, tasks = _read_sets(arguments), _find_tasks(arguments)
        if scores:
            scores = _possible(scores, tasks)
        candidate = models.load(
            arguments.model,
            name=arguments.name or "",
            step=arguments.step,
            max_length=arguments.max_length,
            revision=(scores[0].revision or None) if scores else None,
        )
        if arguments.languages and arguments.data and candidate.model is not None:
            raise ValueError("--languages chooses among tasks, or the words of bm25: leave it out with --data")
        forms = candidate.forms(arguments.precision, arguments.truncate_dim)
        if arguments.output:
            _start(arguments, candidate)
        made = []
        for data, subset, split in local:
            found = local_run.evaluate(
                data,
                candidate,
                forms,
                arguments.output,
                subset=subset,
                split=split,
                alone=arguments.alone,
                languages=arguments.languages,
                metrics=arguments.metrics,
                corpus_sizes=arguments.corpus_sizes,
                trec=arguments.trec,
            )
            made += found
            _show(found)
        if tasks:
            made += _evaluate_tasks(arguments, candidate, forms, tasks)
        if distributed.is_first():
            if len(made) > 1:
                print_means(made)
            if arguments.output:
                records.summarize(arguments.output, candidate.dimensions)
        if not scores:
            return 0
        comparisons = published.compare(scores, made)
        if arguments.languages:  # other subsets were not evaluated
            comparisons = [each for each in comparisons if each.ours is not None]
        differs = distributed.is_first() and _compare(comparisons, arguments.tolerance, len(scores))
        return int(distributed.any_process(differs))


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for arguments that do not fit together."""
    import re

    if not arguments.model:
        raise ValueError("--model is needed: a model folder, a hub id, RUN:NAME or bm25")
    if not (arguments.data or arguments.tasks or arguments.benchmark):
        raise ValueError("name what to evaluate on: --data, --tasks, --benchmark or --reproduce")
    if arguments.data_root and arguments.data:
        raise ValueError("--data names folders itself: --data_root is for --tasks and --benchmark")
    if arguments.data and arguments.types:
        raise ValueError("--types is for --tasks and --benchmark")
    if not arguments.data and (arguments.metrics or arguments.corpus_sizes or arguments.trec):
        raise ValueError("--metrics, --corpus_sizes and --trec are for --data")
    if arguments.trec < 0 or (arguments.trec and not arguments.output):
        raise ValueError(f"--trec={arguments.trec} must be positive, and needs --output, the folder of the run files")
    if not arguments.output and not arguments.data:
        raise ValueError("--output is needed: results are saved task by task")
    if not 0 <= arguments.tolerance <= 1:
        raise ValueError(f"--tolerance={arguments.tolerance} must be in 0..1")
    for language in arguments.languages:
        if not re.fullmatch(r"[a-z]{3}(-[A-Z][a-z]{3})?", language):
            raise ValueError(f"--languages={language} must be ISO 639-3, such as eng or eng-Latn")


def _prepare_reproduction(arguments: argparse.Namespace) -> list:
    """The published scores of --reproduce; sets --model, --tasks and --precision if they are not given."""
    from embed.evaluation import published

    if arguments.data or arguments.benchmark:
        raise ValueError("--reproduce has its own tasks: leave out --data and --benchmark, or choose with --tasks")
    scores = published.scores_of(arguments.reproduce)
    every = published.tasks_of(scores)
    if unknown := sorted(set(arguments.tasks or []) - set(every)):
        raise ValueError(
            f"--tasks={unknown[0]}: there is no published score of {arguments.reproduce}; there are those of "
            f"{', '.join(every)}"
        )
    precisions = sorted({score.precision for score in scores})
    if wrong := sorted(set(arguments.precision) - set(precisions)):
        raise ValueError(f"--precision={wrong[0]}: published are scores in {', '.join(precisions)}")
    arguments.tasks = arguments.tasks or every
    arguments.precision = arguments.precision or precisions
    if arguments.model:  # another one has its own revision
        scores = [score._replace(revision="") for score in scores]
    arguments.model = arguments.model or scores[0].model
    return [score for score in scores if score.precision in arguments.precision]


def _possible(scores: list, tasks: list) -> list:
    """The published scores of the tasks, or of means over them. ValueError without any."""
    from embed.evaluation import published

    splits = {task.metadata.name: task.eval_splits for task in tasks}
    chosen = [
        score
        for score in scores
        if (score.subset == "(mean)" and set(published.BENCHMARKS.get(score.task, [score.task])) <= set(splits))
        or (
            score.subset != "(mean)" and score.task in splits and (not score.split or score.split in splits[score.task])
        )
    ]
    if not chosen:
        raise ValueError(f"there is no published score of {scores[0].model} in these tasks, splits and precisions")
    return chosen


def _compare(comparisons: list, tolerance: float, total: int) -> bool:
    """Print published scores beside ours; whether one differs by more than the tolerance or is missing."""
    from rich.table import Table

    from embed.console import print_table

    if not comparisons:
        print("none of the published scores was evaluated")
        return True
    title = f"{comparisons[0].published.model}: ours and published, tolerance {tolerance:g}"
    table = Table("task", "subset", "precision", "ours", "published", "difference", "", title=title)
    bad = 0
    for comparison in comparisons:
        score, ours, difference = comparison.published, comparison.ours, comparison.difference
        is_bad = difference is None or abs(difference) > tolerance
        bad += is_bad
        subset = " ".join(filter(None, (score.split, "" if score.subset == "default" else score.subset)))
        shown = ("–", "–") if ours is None else (f"{ours:.4f}", f"{difference:+.4f}")
        mark = "missing" if ours is None else "differs" if is_bad else ""
        table.add_row(score.task, subset, score.precision, shown[0], f"{score.value:.4f}", shown[1], mark)
    print_table(table)
    left_out = f"; {total - len(comparisons):,} others were not evaluated" if total > len(comparisons) else ""
    print(f"{len(comparisons) - bad:,} of {len(comparisons):,} published scores are reproduced{left_out}")
    return bool(bad)


def _read_sets(arguments: argparse.Namespace) -> list:
    """(set, subset, split) of each folder and subset of --data."""
    from embed import paths
    from embed.evaluation import sets

    found = [
        (data, subset, paths.path(folder).name if sets.is_prepared(folder) else split)
        for folder in arguments.data or []
        for split in arguments.splits or ["test"]
        for subset, data in sets.read_subsets(folder, split=split)
    ]
    named = [(data.name, subset, split) for data, subset, split in found]
    if repeated := [each for each in named if named.count(each) > 1]:
        raise ValueError(f"--data names two sets that are called {repeated[0][0]}: evaluate them one by one")
    return found


def _find_tasks(arguments: argparse.Namespace) -> list:
    """The tasks of --tasks or --benchmark."""
    from importlib.util import find_spec

    if arguments.data:
        return []
    if not find_spec("mteb"):
        raise ValueError(
            "--tasks and --benchmark need mteb: pip install torch==2.13.0, then pip install -e '.[mteb]'; "
            "--data needs nothing more"
        )
    from embed.evaluation import mteb_tasks

    return mteb_tasks.find(
        tasks=arguments.tasks or (),
        benchmark=arguments.benchmark or "",
        languages=arguments.languages,
        types=arguments.types,
        splits=arguments.splits,
        data_root=arguments.data_root or "",
    )


def _start(arguments: argparse.Namespace, candidate) -> None:
    """Write evaluation.json, or check that --output has the same evaluation."""
    from embed import distributed
    from embed.checkpoints.provenance import made_with
    from embed.evaluation import records

    # The words of BM25 depend on the language, and only of it.
    language = arguments.languages[0] if arguments.languages and arguments.data and candidate.model is None else ""
    settings = {"alone": arguments.alone, "language": language}
    model = {"name": candidate.name, "revision": candidate.revision, "dimensions": candidate.dimensions}
    about = {"model": {**model, **{k: v for k, v in candidate.about.items() if k != "path"}}, "settings": settings}
    distributed.on_first_process(lambda: records.start(arguments.output, about | made_with()))


def _evaluate_tasks(arguments: argparse.Namespace, candidate, forms: list, tasks: list) -> list[dict]:
    """The records of tasks of mteb."""
    from embed.console import say
    from embed.evaluation import mteb_run, retrieval

    foreign = None
    if candidate.model is not None and not candidate.is_own:
        forms, foreign = mteb_run.only_float32(forms, candidate), mteb_run.foreign_model(candidate)
    if any(form.precision == retrieval.MULTI for form in forms):
        if retrieval.MULTI in arguments.precision:
            raise ValueError("--precision=multi is for --data: mteb's tasks compare single vectors here")
        say("mteb's tasks compare single vectors: multi, the token vectors of this model, is for --data")
        forms = [form for form in forms if form.precision != retrieval.MULTI]
    made = []
    for task in tasks:
        found = mteb_run.evaluate(task, candidate, forms, arguments.output, alone=arguments.alone, foreign=foreign)
        made += found
        _show(found)
    return made


def _show(made: list[dict]) -> None:
    """Print a table of each record."""
    from rich.table import Table

    from embed import distributed
    from embed.console import print_table
    from embed.evaluation import records

    if not distributed.is_first():
        return
    for record in made:
        subset = records.shown_subset(record).removeprefix("default")
        queries = record["counts"].get("queries")
        title = f"{record['task']} {subset} {record['split']}".replace("  ", " ")
        metrics = list(dict.fromkeys(metric for values in record["values"].values() for metric in values))
        title += f", {queries:,} queries" if queries else ""
        table = Table("", *metrics, title=title, title_justify="left")
        for form, values in record["values"].items():
            table.add_row(form, *(f"{values[m]:.4f}" if m in values else "–" for m in metrics))
        print_table(table)


def print_means(made: list[dict]) -> None:
    """Print the mean of the main metric over tasks: of each task, the mean over its subsets and splits.

    Searches in parts of a corpus do not count.
    """
    import numpy as np
    from rich.table import Table

    from embed.console import print_table

    by_form: dict[str, dict[str, list[float]]] = {}
    for record in made:
        for form, values in record["values"].items():
            if record["main"] in values and not record.get("corpus_size"):
                by_form.setdefault(form, {}).setdefault(record["task"], []).append(values[record["main"]])
    table = Table("", "tasks", "mean", title="mean of the main metrics", title_justify="left")
    for form, tasks in by_form.items():
        table.add_row(form, f"{len(tasks)}", f"{np.mean([np.mean(values) for values in tasks.values()]):.4f}")
    print_table(table)
