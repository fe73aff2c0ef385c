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


def main(argv: list[str] | None = None) -> int:
    """Run `embed evaluate arguments`; returns the exit code."""
    from embed import distributed, inference
    from embed.cli import common
    from embed.evaluation import published, records, sets
    from embed.evaluation.metrics import check_metrics
    from embed.evaluation.published import TOLERANCE

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
        "--tolerance", type=common.finite, default=TOLERANCE, help="of --reproduce, in 0..1 (default %(default)s)"
    )
    parser.add_argument("--data_root", help="folder of datasets, each named like the repository of its task")
    parser.add_argument("--languages", nargs="+", default=[], help="only tasks and subsets in these (ISO 639-3: eng)")
    parser.add_argument("--types", nargs="+", default=[], help="only tasks of these types, such as Retrieval or STS")
    parser.add_argument("--splits", nargs="+", default=[], help="only these splits (default: test, or the task's own)")
    parser.add_argument("--precision", nargs="+", default=[], choices=inference.PRECISIONS)
    parser.add_argument("--truncate_dim", nargs="+", type=int, default=[], help="also evaluate these Matryoshka sizes")
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="of --data: ndcg, recall, mrr, map, precision @ a rank"
    )
    parser.add_argument("--corpus_sizes", nargs="+", type=int, default=[], help="of --data: also search in such parts")
    parser.add_argument("--trec", type=int, help="of --data: write TREC run files with this many texts of a query")
    parser.add_argument("--alone", action="store_true", help="encode each chunk of a document by itself")
    parser.add_argument("--output", help="folder of the results; required for tasks and benchmarks")
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    scores = _prepare_reproduction(arguments) if arguments.reproduce else []
    if not arguments.model:
        raise ValueError("--model is needed: a model folder, a hub id, RUN:NAME or bm25")
    if not (arguments.data or arguments.tasks or arguments.benchmark):
        raise ValueError("name what to evaluate on: --data, --tasks, --benchmark or --reproduce")
    if arguments.data_root and arguments.data:
        raise ValueError("--data names folders itself: --data_root is for --tasks and --benchmark")
    if not arguments.data and (arguments.metrics or arguments.corpus_sizes or arguments.trec):
        raise ValueError("--metrics, --corpus_sizes and --trec are for --data")
    if arguments.trec and not arguments.output:
        raise ValueError("--trec needs --output, the folder of the run files")
    if arguments.trec is not None and arguments.trec < 1:
        raise ValueError(f"--trec={arguments.trec} must be positive")
    check_metrics(arguments.metrics)
    if not arguments.output and not arguments.data:
        raise ValueError("--output is needed: results are saved task by task")
    common.join(arguments, saves_at_sigterm=False)
    inputs = [arguments.model, *(file for folder in arguments.data or [] for file in sets.files(folder))]
    with common.output(arguments, inputs, is_ours=records.is_evaluation, continues=True), common.keeps_work():
        local = list(_read_sets(arguments)) if arguments.data else []
        tasks = _find_tasks(arguments) if not arguments.data else []
        splits = {task.metadata.name: task.eval_splits for task in tasks}
        scores = [score for score in scores if not score.split or score.split in splits[score.task]]
        candidate = load_candidate(arguments, scores[0].revision if scores else None)
        forms = candidate.forms(arguments.precision, arguments.truncate_dim)
        if arguments.output:
            _start(arguments, candidate)
        made = []
        for data, subset, split in local:
            found = _evaluate_set(arguments, candidate, forms, data, subset, split)
            made += found
            _show(found, candidate)
        for task in tasks:
            found = _evaluate_task(arguments, candidate, forms, task)
            made += found
            _show(found, candidate)
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
        return int(_compare(comparisons, arguments.tolerance))


def _prepare_reproduction(arguments: argparse.Namespace) -> list:
    """The published scores of --reproduce; sets --model, --tasks and --precision if they are not given."""
    from embed.evaluation import published

    if arguments.data or arguments.benchmark:
        raise ValueError("--reproduce has its own tasks: leave out --data and --benchmark, or choose with --tasks")
    scores = published.scores_of(arguments.reproduce)
    every = published.tasks_of(scores)
    if unknown := sorted(set(arguments.tasks or []) - set(every)):
        raise ValueError(f"--tasks={unknown[0]}: {arguments.reproduce} has no published score; there are {every}")
    arguments.tasks = arguments.tasks or every
    scores = [score for score in scores if score.task in arguments.tasks]
    if arguments.model:
        scores = [score._replace(revision="") for score in scores]
    arguments.model = arguments.model or scores[0].model
    arguments.precision = arguments.precision or sorted({score.precision for score in scores})
    return scores


def _compare(comparisons: list, tolerance: float) -> bool:
    """Print published scores beside ours; whether one differs by more than the tolerance or is missing."""
    from rich.table import Table

    from embed.console import print_table
    from embed.evaluation import published

    title = f"{comparisons[0].published.model}: ours and published, tolerance {tolerance:g}"
    table = Table("task", "subset", "precision", "ours", "published", "difference", "", title=title)
    bad = 0
    for score, ours in comparisons:
        difference = published.Comparison(score, ours).difference
        is_bad = difference is None or abs(difference) > tolerance
        bad += is_bad
        subset = " ".join(filter(None, (score.split, "" if score.subset == "default" else score.subset)))
        shown = (
            ("–", f"{score.value:.4f}", "–")
            if ours is None
            else (f"{ours:.4f}", f"{score.value:.4f}", f"{difference:+.4f}")
        )
        table.add_row(score.task, subset, score.precision, *shown, "differs" if is_bad else "")
    print_table(table)
    print(f"{len(comparisons) - bad:,} of {len(comparisons):,} published scores are reproduced")
    return bool(bad)


def load_candidate(arguments: argparse.Namespace, revision: str | None = None):
    """The model of --model (at a `revision` of the hub), --step, --max_length and --name."""
    import jax

    from embed import paths
    from embed.cli import common
    from embed.evaluation import models

    source = resolve(arguments.model)
    if source == models.BM25:
        return models.Candidate(arguments.name or "embed/bm25", "lucene-1.5-0.75", None)
    default = source if not paths.path(source).exists() else f"local/{paths.path(source).name}"
    name = arguments.name or default
    if "/" not in name:
        name = f"local/{name}"
    if not _is_ours(source):
        return models.Candidate(name, "no_revision_available", models.SentenceTransformers(source), {"path": source})
    arguments = argparse.Namespace(**{**vars(arguments), "model": source})
    encoder = common.load_encoder(arguments, revision or None)
    sizes = [leaf.size for leaf in jax.tree.leaves(encoder.params)]
    about = {
        "path": source,
        "digest": encoder.digest,
        "max_length": encoder.max_length,
        "parameters": sum(sizes),
        "embedding_parameters": encoder.config.vocab_size * encoder.config.hidden_size,
    }
    revision = (encoder.digest or "unknown")[:16]
    return models.Candidate(name, revision, encoder, about)


def resolve(model: str) -> str:
    """The folder of RUN:NAME, a stage or an export of a run; anything else unchanged."""
    from embed import paths, runs

    run, _, name = model.rpartition(":")
    if not run or paths.is_bucket(model) and run in ("gs", "s3") or paths.path(model).exists():
        return model
    folders = [paths.path(run) / name, paths.path(run) / "export" / name]
    for folder in folders:
        if runs.is_stage(folder) or (folder / "config.json").exists():
            return f"{folder}"
    raise FileNotFoundError(f"--model={model}: neither {folders[0]} nor {folders[1]} is a stage or a model folder")


def _is_ours(source: str) -> bool:
    """Whether our engine reads a model; otherwise sentence-transformers does."""
    from embed import paths, runs

    if runs.is_stage(source):
        return True
    try:
        runs.vector_size(source)
    except ValueError as error:
        folder = paths.path(source)
        if "model_type" in str(error) and (not folder.exists() or (folder / "modules.json").exists()):
            return False
        raise
    return True


def _read_sets(arguments: argparse.Namespace):
    """(set, subset, split) of each folder and subset of --data."""
    from embed.evaluation import sets

    for folder in arguments.data:
        for split in arguments.splits or ["test"]:
            for subset, data in sets.read_subsets(folder, split=split):
                yield data, subset, split


def _find_tasks(arguments: argparse.Namespace) -> list:
    from importlib.util import find_spec

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
    from embed import distributed
    from embed.checkpoints.provenance import made_with
    from embed.evaluation import records

    settings = {"alone": arguments.alone}
    model = {"name": candidate.name, "revision": candidate.revision, "dimensions": candidate.dimensions}
    about = {"model": {**model, **{k: v for k, v in candidate.about.items() if k != "path"}}, "settings": settings}
    distributed.on_first_process(lambda: records.start(arguments.output, about | made_with()))


def _evaluate_set(arguments, candidate, forms, data, subset: str, split: str) -> list[dict]:
    """The records of a local set, one per size of the corpus; what is there and complete is not computed again."""
    import numpy as np

    from embed import distributed, paths
    from embed.evaluation import judgments, records

    metrics = list(dict.fromkeys([*records.SUMMARIZED, *arguments.metrics]))
    needed = np.unique(np.concatenate(data.relevant_rows)) if arguments.corpus_sizes else ()
    parts = {"": np.arange(len(data.corpus))}
    for size, rows in judgments.nested(data.corpus_ids, needed, arguments.corpus_sizes).items():
        parts[f"{size}"] = rows
    names = {name: " ".join(filter(None, ("" if subset == "default" and name else subset, name))) for name in parts}
    files = {name: records.path(arguments.output or "", data.name, shown, split) for name, shown in names.items()}
    before = {name: _read(file) if arguments.output else {} for name, file in files.items()}
    for name, record in before.items():
        if record and record["digest"] != records.digest(data):
            raise ValueError(f"{files[name]} is of another content of {data.name}: choose another --output")
    missing = [form for form in forms if any(_lacks(record, form, metrics) for record in before.values())]
    if not missing and not arguments.trec:
        return list(before.values())
    depth = max(records.depth(metrics), arguments.trec or 0)
    language = arguments.languages[0] if arguments.languages else ""
    how = dict(alone=arguments.alone, language=language, depth=depth, show_progress_bar=True)
    rankings = candidate.rank(data, forms if arguments.trec else missing, parts=parts, **how)
    made = []
    for name, ranked in rankings.items():
        about = {"task": data.name, "subset": names[name], "split": split, "type": "Retrieval"}
        record = records.make(data, ranked, metrics, **about, languages=arguments.languages)
        if before[name]:
            record["values"] = before[name]["values"] | record["values"]
            record["queries"]["values"] = before[name]["queries"]["values"] | record["queries"]["values"]
        made.append(record)
        if arguments.output and distributed.is_first():
            records.write(paths.path(files[name]), record)
            if arguments.trec and not name:
                for form, ranking in ranked.items():
                    records.write_trec(
                        arguments.output, data, split, candidate.name, form, ranking[:, : arguments.trec]
                    )
    return made


def _read(file) -> dict:
    """The record of a file, {} if there is none; as process 0 sees it."""
    import json

    from embed import distributed

    saved = distributed.from_first(file.read_text(encoding="utf-8") if distributed.is_first() and file.exists() else "")
    return json.loads(saved) if saved else {}


def _lacks(record: dict, form, metrics: list[str]) -> bool:
    """Whether a record does not have all metrics of a form."""
    return not set(metrics) <= set(record.get("values", {}).get(f"{form}", ()))


def _evaluate_task(arguments, candidate, forms, task) -> list[dict]:
    from embed.evaluation import models, mteb_run

    foreign = None
    if isinstance(candidate.model, models.SentenceTransformers):
        foreign = mteb_run.foreign_model(resolve(arguments.model), candidate)
        forms = mteb_run.only_float32(forms, candidate)
    return mteb_run.evaluate(task, candidate, forms, arguments.output, alone=arguments.alone, foreign=foreign)


def _show(made: list[dict], candidate) -> None:
    """Print the table of a record."""
    from rich.table import Table

    from embed import distributed
    from embed.console import print_table

    if not distributed.is_first():
        return
    for record in made:
        subset = "" if record["subset"] == "default" else f" {record['subset']}"
        queries = record["counts"].get("queries")
        title = f"{record['task']}{subset} {record['split']}" + (f", {queries:,} queries" if queries else "")
        metrics = list(dict.fromkeys(metric for values in record["values"].values() for metric in values))
        table = Table("", *metrics, title=title, title_justify="left")
        for form, values in record["values"].items():
            table.add_row(form, *(f"{values[m]:.4f}" if m in values else "–" for m in metrics))
        print_table(table)


def print_means(made: list[dict]) -> None:
    """Print the mean of the main metric over tasks: of each task, the mean over its subsets and splits."""
    import numpy as np
    from rich.table import Table

    from embed.console import print_table

    by_form: dict[str, dict[str, list[float]]] = {}
    for record in made:
        for form, values in record["values"].items():
            if record["main"] in values:
                by_form.setdefault(form, {}).setdefault(record["task"], []).append(values[record["main"]])
    table = Table("", "tasks", "mean", title="mean of the main metrics", title_justify="left")
    for form, tasks in by_form.items():
        table.add_row(form, f"{len(tasks)}", f"{np.mean([np.mean(values) for values in tasks.values()]):.4f}")
    print_table(table)
