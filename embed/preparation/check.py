"""`embed prepare --check`: what the sources of a gin file give, from a few rows of each."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rich.table

from embed.console import make_console, print_table
from embed.preparation import settings
from embed.preparation.sources import Row, Shard, Source
from embed.preparation.tasks import Counts, Task, all_texts
from embed.tokenizers import Tokenizer

ROWS = 10  # of each source
THREADS = 16  # sources that are read at the same time
SHOWN = 60  # characters of an example


def check(
    *,
    gin_file: str | Path,
    gin_bindings: Sequence[str] = (),
    data_root: str = "",
    limit: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> bool:
    """Prints a table with a row per task, and a line per task whose source gives no examples; whether there is none.

    Lengths are in tokens of `tokenizer`, or in characters without one.
    """
    bound = settings.bind(gin_file, gin_bindings, data_root=data_root, limit=limit)
    names = sorted({*bound.trained(), *bound.evaluation.sets.values()})
    names = [name for name in names if name in bound.tasks]
    table = rich.table.Table(title=f"{len(names)} tasks of {gin_file}", title_justify="left")
    length = "tokens" if tokenizer else "characters"
    for column in ("task", "kind", "rows", "columns", "language", "license", length, "an example"):
        table.add_column(column, justify="right" if column in ("rows", length) else "left")
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda name: _row(bound.tasks[name], tokenizer), names))
    problems = [f"{name}: {result}" for name, result in zip(names, results) if isinstance(result, str)]
    for name, result in zip(names, results):
        if not isinstance(result, str):
            table.add_row(name, *result)
    if table.row_count:
        print_table(table)
    console = make_console()
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    for name in bound.registered:
        console.print(f"{name}: a task of seqio, which is not read here", markup=False, highlight=False)
    console.print(f"{len(names) - len(problems)} of {len(names)} tasks can be read", highlight=False)
    return not problems


def _row(task: Task, tokenizer: Tokenizer | None) -> tuple[str, ...] | str:
    """The cells of a task's row, or what is wrong with its source."""
    try:
        rows = task.source.sample(ROWS)
        about = task.source.describe()
        counts = Counts()
        sampled = dataclasses.replace(task, source=_Rows(tuple(rows)))
        made = [] if task.kind == "retrieval" else list(sampled.examples(Shard(""), counts))
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    if task.kind != "retrieval" and not made:
        reasons = ", ".join(f"{reason} {count}" for reason, count in (counts.rows + counts.dropped).items() if count)
        return f"the first {counts.rows_read} rows give no example ({reasons}) {'; '.join(counts.errors[:1])}".strip()
    texts = [text for example in made for text in all_texts(example)]
    lengths = [len(tokens) for tokens in tokenizer.encode(texts)] if tokenizer else list(map(len, texts))
    shown = " → ".join(" ".join(text.split())[:SHOWN] for text in texts[: 1 if task.kind == "text" else 2])
    return (
        task.kind,
        "?" if about.get("rows") is None else f"{about['rows']:,}",
        ", ".join(about.get("columns") or ()),
        task.language or ", ".join(task.languages),
        about.get("license") or "?",
        f"{sum(lengths) / max(len(made), 1):,.0f}",
        shown,
    )


@dataclasses.dataclass(frozen=True)
class _Rows(Source):
    """Rows that were read already."""

    rows: tuple[Row, ...]

    def read(self, shard: Shard):
        return iter(self.rows)
