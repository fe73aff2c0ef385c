"""`embed prepare --check`: what the sources of a gin file give, from a few rows of each."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import rich.table

from embed.console import make_console, print_table
from embed.preparation import settings
from embed.preparation.counts import BAD, Counts
from embed.preparation.hygiene import evaluation_sources
from embed.preparation.sources import Row, Shard, Source
from embed.preparation.sources.joined import Joined
from embed.preparation.tasks import Task, all_texts
from embed.tokenizers import Tokenizer

ROWS = 10  # of each source
MORE_ROWS = 10_000  # at most, if those make no example
THREADS = 16  # sources that are read at the same time
PATIENCE = 30.0  # seconds without an answer of any source, after which those that are left are given up
SHOWN = 60  # characters of an example
LISTED = 6  # columns and languages that are named


def check(
    *,
    gin_file: str | Path,
    gin_bindings: Sequence[str] = (),
    data_root: str = "",
    limit: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> bool:
    """Prints a table with a row per task, and lines about bad rows and about tasks that give no examples.

    Returns whether all tasks give some.

    Lengths are in tokens of `tokenizer`, or in characters without one.
    """
    bound = settings.bind(gin_file, gin_bindings, data_root=data_root, limit=limit)
    tasks = dict(bound.tasks)
    for about in bound.hygiene.values():
        others = evaluation_sources(about, {name: name for name in bound.evaluation.sets}, missing_ok=True)
        for name, source in others.items():
            if name not in bound.evaluation.sets:
                tasks[f"hygiene.evaluation_sets {name}"] = Task(source, "retrieval")
    names = sorted(tasks)
    table = rich.table.Table(title=f"Tasks of {gin_file}", title_justify="left")
    length = "tokens" if tokenizer else "characters"
    for column in ("task", "kind", "rows", "columns", "language", "license", length, "an example"):
        table.add_column(column, justify="right" if column in ("rows", length) else "left")
    results = _in_threads(lambda name: _row(tasks[name], tokenizer), names)
    notes: list[str] = []
    problems = [f"{name}: {result}" for name, result in zip(names, results) if isinstance(result, str)]
    for name, result in zip(names, results):
        if not isinstance(result, str):
            table.add_row(name, *result[0])
            if result[1]:
                notes.append(f"{name}: {result[1]}")
    if table.row_count:
        print_table(table)
    console = make_console()
    for line in notes + problems:
        console.print(line, markup=False, highlight=False)
    for name in bound.registered:
        from embed.preparation import seqio_tasks  # imports TensorFlow

        seqio_tasks.adapt(name, bound.mixtures.modules)
        console.print(f"{name}: a task of seqio, whose rows are not read here", markup=False, highlight=False)
    console.print(f"{len(names) - len(problems)} of {len(names)} tasks can be read", highlight=False)
    return not problems


def _in_threads(function: Callable, names: Sequence[str]) -> list:
    """`function` of each name. Libraries of file systems retry for minutes, so that no thread is waited for forever."""
    waiting, answers, results, threads = queue.SimpleQueue(), queue.SimpleQueue(), {}, []

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                name = waiting.get_nowait()
                try:
                    answers.put((name, function(name), None))
                except BaseException as error:
                    answers.put((name, None, error))

    for name in names:
        waiting.put(name)
    while len(results) < len(names):
        try:
            name, result, error = answers.get(timeout=PATIENCE if threads else 0)
        except queue.Empty:
            if waiting.empty():
                break
            for _ in range(THREADS):  # at first, and when all others hang
                threads.append(threading.Thread(target=work, daemon=True))
                threads[-1].start()
            continue
        if error:
            raise error
        results[name] = result
    return [results.get(name, f"no answer, as from any other source, for {PATIENCE:g} seconds") for name in names]


def _row(task: Task, tokenizer: Tokenizer | None) -> tuple[tuple[str, ...], str] | str:
    """(the cells of a task's row, a remark about it or ""), or what is wrong with its source."""
    try:
        rows, about = task.source.sample(ROWS), task.source.describe()
        made, counts = _examples(task, rows)
        if not made and counts.rows[BAD] < counts.rows_read:  # those that make a group or pass the filters may follow
            made, counts = _examples(task, task.source.sample(MORE_ROWS))
        # Of tables that are joined, such as queries and a large corpus, the first rows may not belong together.
        apart = isinstance(task.source, Joined) and not rows
        if not apart:
            counts.check_made()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    texts = [text for example in made for text in all_texts(example)]
    lengths = [len(tokens) for tokens in tokenizer.encode(texts)] if tokenizer else list(map(len, texts))
    shown = " → ".join(" ".join(text.split())[:SHOWN] for text in texts[: 1 if task.kind in ("text", "distill") else 2])
    bad = f"{counts.rows[BAD]:,} of {counts.rows_read:,} rows are bad: {counts.errors[0]}" if counts.rows[BAD] else ""
    cells = (
        task.kind,
        "?" if about.get("rows") is None else f"{about['rows']:,}",
        _listed(about.get("columns") or ()),
        task.language or _listed(task.languages),
        about.get("license") or "?",
        f"{sum(lengths) / len(made):,.0f}" if made else "?",
        "none in the first rows" if apart else shown,
    )
    return cells, bad


def _examples(task: Task, rows: Sequence[Row]) -> tuple[list[dict], Counts]:
    """The text examples of rows; of an evaluation set, its queries and relevant texts."""
    if task.kind == "retrieval":
        task = dataclasses.replace(task, kind="pair")
    counts = Counts()
    return list(dataclasses.replace(task, source=_Rows(tuple(rows))).examples(Shard(""), counts)), counts


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED + 1 else ""
    return ", ".join(names[:LISTED] if more else names) + more


@dataclasses.dataclass(frozen=True)
class _Rows(Source):
    """Rows that were read already."""

    rows: tuple[Row, ...]

    def read(self, shard: Shard):
        return iter(self.rows)
