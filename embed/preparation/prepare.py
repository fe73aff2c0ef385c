"""Turns sources into the stores that trainers read: builds `python_docs`, trains the vocabulary, runs each task once.

    prepare(directory, gin_file="configs/data/python_docs.gin")

    directory/tokenizer/sentencepiece.model
    directory/tasks/TASK/               store of `embed.data.store`, shuffled
    directory/mixtures.json             {mixture: {task: rate}}
    directory/evaluation/SET/SPLIT/     set of `embed.preparation.evaluation_sets`
    directory/tfds/                     the TFDS build
    directory/info.json                 arguments, packages, counts, dropped items by reason, seconds

`prepare` writes to a temporary folder and renames it at the end, or copies it to a bucket, info.json last. Only this
module parses gin.
"""

import contextlib
import dataclasses
import difflib
import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gin
import numpy as np
import rich.progress
import rich.table

from embed import paths, tokenizers
from embed.config import differences
from embed.console import make_console, print_table, quiet
from embed.data import store
from embed.preparation import evaluation_sets, python_sources, vocabulary

_WINDOW = 600  # characters per training text of the vocabulary


@gin.configurable("mixtures")
@dataclasses.dataclass(frozen=True)
class Mixtures:
    """rates: {mixture: {task: relative number of examples}}. Tasks outside all mixtures are not prepared."""

    rates: Mapping[str, Mapping[str, float]] = gin.REQUIRED


@gin.configurable("vocabulary")
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """characters: amount of training text, sampled evenly."""

    characters: int = 4_000_000


@gin.configurable("text")
@dataclasses.dataclass(frozen=True)
class Text:
    """max_characters: total of the diffusion text."""

    max_characters: int = 40_000_000


@gin.configurable("pairs")
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Maximum lengths of a pair in tokens."""

    query_length: int = 32
    document_length: int = 128


@gin.configurable("contextual")
@dataclasses.dataclass(frozen=True)
class Contextual:
    """Maximum lengths in tokens (a document with a separator between chunks) and number of chunks, for training.

    `chunk_length` also applies to the evaluation sets.
    """

    query_length: int = 32
    chunk_length: int = 64
    document_length: int = 1024
    max_chunks: int = 16


@gin.configurable("evaluation")
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """max_queries: per evaluation set. The other maxima are of a document in the contextual sets, length in tokens."""

    max_queries: int = 3000
    document_length: int = 1024
    max_chunks: int = 16


_CONFIGURABLES = {
    "mixtures": Mixtures,
    "vocabulary": Vocabulary,
    "text": Text,
    "pairs": Pairs,
    "contextual": Contextual,
    "evaluation": Evaluation,
}


def prepare(
    directory: str | Path,
    *,
    gin_file: str | Path,
    gin_bindings: Sequence[str] = (),
    vocab_size: int = 8192,
    split_identifiers: bool = True,
    seed: int = 0,
    limit: int | None = None,
    packages: python_sources.Packages | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Writes `directory`. Does nothing if it is complete and was prepared with the same arguments.

    `limit`: maximum number of source files, functions and modules per split, for trials. `packages`: by default
    `python_sources.PACKAGES`. With `tokenizer`, no vocabulary is trained. Raises ValueError for a directory with other
    arguments (names them), for unknown and unused gin bindings (names the nearest valid key), for empty splits and
    tasks, and for a `vocab_size` that the texts do not allow.
    """
    directory = paths.path(directory)
    settings = bind(gin_file, gin_bindings)
    if tokenizer:
        vocab_size, split_identifiers = tokenizer.vocab_size, None
    arguments = {
        "gin": {name: dataclasses.asdict(value) for name, value in settings.items()},
        "vocab_size": vocab_size,
        "split_identifiers": split_identifiers,
        "seed": seed,
        "limit": limit,
        "packages": dataclasses.asdict(packages) if packages else None,
        "tokenizer": tokenizer.digest if tokenizer else None,
    }
    arguments = json.loads(json.dumps(arguments))
    console = make_console(stderr=True)
    if (directory / "info.json").exists():
        previous = paths.read_json(directory / "info.json")["arguments"]
        if differing := list(differences(previous, arguments)):
            raise ValueError(
                f"{directory} was prepared with other arguments: "
                + "; ".join(f"{name.removeprefix('gin.')} was {was!r}, now {now!r}" for name, was, now in differing)
                + "; choose another directory or remove it"
            )
        console.print(f"data: {directory} is complete")
        return
    if not (paths.is_empty(directory) or paths.is_partial(directory)):
        raise ValueError(f"{directory} exists and has no prepared data (no info.json); choose another directory")

    with paths.replace_folder(directory, is_ours=lambda folder: False, marker="info.json") as partial:
        info = _write(partial, arguments, settings, packages, tokenizer, console)
        (partial / "info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    _print(console, info)


def _write(folder: Path, arguments: Mapping, settings: Mapping, packages, tokenizer, console) -> dict:
    limit, seed = arguments["limit"], arguments["seed"]
    progress = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
    )
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(part: str):
        start = time.monotonic()
        progress.update(bar, description=f"data: {part}")
        yield
        seconds[part] = round(time.monotonic() - start, 2)
        progress.advance(bar)

    rates = settings["mixtures"].rates
    names = sorted({task for mixture in rates.values() for task in mixture})
    packages = packages or python_sources.PACKAGES
    # Worker processes read the sources while this one imports TensorFlow.
    with (
        contextlib.ExitStack() as stack,
        progress,
        python_sources.Reading(packages, limit=limit) as reading,
        ThreadPoolExecutor(3) as pool,
    ):
        bar = progress.add_task("data", total=len(names) + 7)
        with timed("import tensorflow"):
            # Hides warnings about missing GPUs, which do not matter here. jax sets level 1; 0 is the user's choice.
            verbose = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "0"
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0" if verbose else "3"
            with contextlib.nullcontext() if verbose else quiet():
                import tensorflow_datasets as tfds

                from embed.preparation import python_docs, tasks
            tfds.disable_progress_bar()  # `progress` replaces it

            if unknown := [name for name in names if name not in tasks.TASKS]:
                raise ValueError(f"mixtures.rates: no task {unknown[0]!r}{_nearest(unknown[0], tasks.TASKS)}")
        with timed("read sources"):
            modules = reading.result()
        gc.collect()
        gc.freeze()  # keeps later collections from walking through all sources
        stack.callback(gc.unfreeze)
        with timed("deduplicate and decontaminate"):
            corpus = python_docs.clean(modules, limit)
            corpus.dropped["unreadable files"] = len(reading.unreadable)

        def train_and_register() -> tokenizers.Tokenizer:
            with timed("vocabulary and tasks"):
                if tokenizer:
                    tokenizer.save(folder / "tokenizer")
                else:
                    vocabulary.train_sentencepiece(
                        sample([m["text"] for m in corpus.modules["train"]], settings["vocabulary"].characters, seed),
                        folder / "tokenizer",
                        vocab_size=arguments["vocab_size"],
                        split_identifiers=arguments["split_identifiers"],
                    )
                trained = tokenizers.load(folder / "tokenizer")
                tasks.register(
                    folder / "tfds",
                    version,
                    trained,
                    max_text_characters=settings["text"].max_characters,
                    chunk_length=contextual.chunk_length,
                    context_length=contextual.document_length,
                    context_query_length=contextual.query_length,
                    max_chunks=contextual.max_chunks,
                )
                tasks.register_mixtures(rates)
                return trained

        def build_and_run_tasks(config: str) -> dict:
            with timed(f"build {config}"):
                builders[config].download_and_prepare()
            registered.result()
            counts = {}
            for name in (name for name in names if tasks.CONFIGS[name] == config):
                with timed(name):
                    counts[name] = run_task(name, folder / "tasks" / name, sequence_length, seed)
            return counts

        pairs, contextual = settings["pairs"], settings["contextual"]
        sequence_length = {"query": pairs.query_length, "document": pairs.document_length}
        builders = {
            config: python_docs.PythonDocs(
                config=config, data_dir=folder / "tfds", packages=packages, limit=limit, corpus=corpus
            )
            for config in ("functions", "modules")
        }
        version = str(builders["functions"].version)
        # One thread's Python code runs while the others are in SentencePiece or TensorFlow.
        registered = pool.submit(train_and_register)
        working = [pool.submit(build_and_run_tasks, config) for config in builders]
        try:
            tokenizer = registered.result()
            with timed("evaluation sets"):
                evaluation = _evaluation_sets(folder / "evaluation", corpus, tokenizer, settings)
            task_counts = {name: count for part in working for name, count in part.result().items()}
        except BaseException:
            corpus.clear()  # ends the builds, for which the pool would wait
            raise
        rates = {mixture: tasks.mixture_rates(mixture) for mixture in rates}  # as seqio has them
        counts = {name: task_counts[name] for name in names} | evaluation
        (folder / "mixtures.json").write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    return {
        "arguments": arguments,
        "packages": packages.versions(),
        "packages_missing": packages.missing(),
        "builder": f"python_docs:{version}",
        "vocabulary": {"digest": tokenizer.digest, "size": tokenizer.vocab_size},
        "counts": counts,
        "dropped": corpus.dropped,
        "unreadable": reading.unreadable,
        "seconds": seconds,
    }


def run_task(name: str, path: Path, sequence_length: Mapping[str, int], seed: int) -> dict:
    """Writes a task's train split to a store, shuffled, and returns its counts. Raises ValueError if it is empty."""
    import seqio

    from embed.preparation import tasks

    task = seqio.TaskRegistry.get(name)
    stage = tasks.TASKS[name]
    dataset = task.get_dataset(
        sequence_length=sequence_length if stage == "pair" else None,
        split="train",
        shuffle=False,
        trim_output_features=False,
        try_in_mem_cache=False,
    )
    # An example with an empty side, such as a query without tokens, has no training signal.
    sides = {"diffusion": ("tokens",), "pair": ("query", "document"), "contextual": ("document", "queries")}[stage]
    vocabulary = task.output_features[sides[0]].vocabulary
    vocabulary.lost.clear()
    values = {column: [] for column in tasks.COLUMNS[stage]}
    for batch in dataset.ragged_batch(1024):
        for column, ragged in batch.items():
            values[column] += np.split(ragged.values.numpy(), ragged.row_splits.numpy()[1:-1])
    kept = [i for i in range(len(values[sides[0]])) if all(len(values[side][i]) for side in sides)]
    lost = {"examples without tokens": len(values[sides[0]]) - len(kept), **vocabulary.lost}
    if not kept:
        raise ValueError(f"task {name!r} has no example with tokens; remove it from mixtures.rates")
    np.random.default_rng(int(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).hexdigest(), 16)).shuffle(kept)
    writer = store.Writer(path, tasks.COLUMNS[stage])
    writer.extend(
        {
            column: (np.concatenate([arrays[i] for i in kept]), np.array([len(arrays[i]) for i in kept]))
            for column, arrays in values.items()
        }
    )
    tokens = {
        column: int(sum(map(len, arrays)))
        for column, arrays in values.items()
        if column in ("tokens", "query", "document", "queries")
    }
    counts = {"examples": len(kept), "tokens": tokens, "lost": lost}
    writer.close({"task": name, "stage": stage, "vocabulary": vocabulary.tokenizer.digest, **counts})
    return counts


def sample(texts: Sequence[str], characters: int, seed: int) -> list[str]:
    """Windows of the texts, about `characters` in total, sampled evenly without replacement."""
    windows = [(i, start) for i, text in enumerate(texts) for start in range(0, len(text), _WINDOW)]
    chosen = random.Random(seed).sample(windows, min(len(windows), -(-characters // _WINDOW)))
    return [texts[i][start : start + _WINDOW] for i, start in chosen]


def _evaluation_sets(folder: Path, corpus, tokenizer, settings: Mapping) -> dict:
    from embed.preparation import python_docs

    evaluation = settings["evaluation"]
    counts = {}
    for split in ("development", "test"):
        sets = {
            "functions": evaluation_sets.functions(corpus.functions[split], max_queries=evaluation.max_queries),
            "contextual": evaluation_sets.contextual(
                [python_docs.module_example(m) for m in corpus.modules[split]],
                tokenizer,
                chunk_length=settings["contextual"].chunk_length,
                document_length=evaluation.document_length,
                max_chunks=evaluation.max_chunks,
                max_queries=evaluation.max_queries,
                excluded=corpus.contaminated,
            ),
        }
        for name, (texts, queries, qrels) in sets.items():
            if not queries:
                raise ValueError(f"evaluation set {name}/{split} has no query: its packages have too few docstrings")
            evaluation_sets.write(folder / name / split, texts, queries, qrels)
            counts[f"evaluation/{name}/{split}"] = {
                "corpus": len(texts),
                "queries": len(queries),
                "relevant": len(qrels),
                "documents": len({row.get("document", row["_id"]) for row in texts}),
            }
    return counts


# --- gin --------------------------------------------------------------------------------------------------------------


def bind(gin_file: str | Path, gin_bindings: Sequence[str] = ()) -> dict:
    """{configurable: its settings}. Unknown and unused bindings raise ValueError."""
    if not Path(gin_file).is_file():
        raise FileNotFoundError(f"no gin file {gin_file}")
    text = Path(gin_file).read_text(encoding="utf-8") + "\n" + "\n".join(gin_bindings)
    valid = [f"{name}.{f.name}" for name, kind in _CONFIGURABLES.items() for f in dataclasses.fields(kind)]
    gin.clear_config()
    try:
        bound = _bindings(text, gin_file)
        for key in bound:
            if "." in key and key.rpartition("/")[2] not in valid:
                raise ValueError(f"{gin_file}: unknown gin binding {key!r}{_nearest(key, valid)}")
        gin.parse_config(text)
        try:
            settings = {name: kind() for name, kind in _CONFIGURABLES.items()}
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{gin_file}: {str(error).splitlines()[0]}") from None
        # gin does not report unused macros and scopes.
        used = _bindings(gin.operative_config_str(), "operative config")
        for key in bound:
            if key not in used:
                raise ValueError(f"{gin_file}: unused gin binding {key!r}{_nearest(key, valid)}")
    finally:
        gin.clear_config()
    for name, value in settings.items():
        for field, number in dataclasses.asdict(value).items():
            if name != "mixtures" and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{gin_file}: {name}.{field} must be a whole number of at least 1, got {number!r}")
    _check_rates(settings["mixtures"].rates, gin_file)
    return settings


def _check_rates(rates, gin_file) -> None:
    if not isinstance(rates, dict) or not rates:
        raise ValueError(f"{gin_file}: mixtures.rates must be {{mixture: {{task: rate}}}}, got {rates!r}")
    for mixture, members in rates.items():
        if not isinstance(members, dict) or not members:
            raise ValueError(
                f"{gin_file}: mixture {mixture!r} must be {{task: rate}} with at least one task, got {members!r}"
            )
        for task, rate in members.items():
            if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"{gin_file}: the rate of {task!r} in {mixture!r} must be positive, got {rate!r}")


def _bindings(text: str, source) -> dict:
    """{"scope/configurable.parameter" or macro: None} of a gin text, in order. `source` is its name in errors."""
    try:
        statements = list(gin.config_parser.ConfigParser(text, gin.config.ParserDelegate()))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from None
    keys = {}
    for s in statements:
        if isinstance(s, gin.config_parser.BindingStatement):
            name = f"{s.scope}/{s.selector}" if s.scope else s.selector
            keys[f"{name}.{s.arg_name}" if s.arg_name else name] = None
        elif not isinstance(s, gin.config_parser.ImportStatement):
            raise ValueError(f"{source}: only bindings are allowed, got {type(s).__name__}")
    return keys


def _nearest(name: str, valid) -> str:
    name = name.rpartition("/")[2]
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; the nearest valid one is {nearest[0]!r}" if nearest else ""


# --- reporting --------------------------------------------------------------------------------------------------------


def _print(console, info: Mapping) -> None:
    table = rich.table.Table(title="Prepared data", title_justify="left")
    for column in ("", "examples", "tokens", "truncated or dropped", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, count in info["counts"].items():
        if "examples" in count:
            table.add_row(
                name,
                f"{count['examples']:,}",
                f"{sum(count['tokens'].values()):,}",
                f"{sum(count['lost'].values()):,}",
                f"{info['seconds'][name]:.1f}",
            )
        else:
            table.add_row(name, f"{count['queries']:,} queries", f"{count['corpus']:,} texts", "", "")
    table.add_section()
    for name, seconds in info["seconds"].items():
        if name not in info["counts"]:
            table.add_row(name, "", "", "", f"{seconds:.1f}")
    table.add_section()
    for reason, count in info["dropped"].items():
        if count:
            table.add_row(reason, "", "", f"{count:,}", "")
    print_table(table, stderr=True)
    if info["packages_missing"]:
        console.print(f"packages of python_docs that are not installed: {', '.join(info['packages_missing'])}")
