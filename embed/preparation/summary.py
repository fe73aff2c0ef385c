"""What `prepare` shows while it works and at its end."""

import time
from collections.abc import Mapping

import rich.progress
import rich.table

from embed.console import print_table
from embed.preparation import stream
from embed.preparation.counts import Counts

REFRESH = 0.1  # seconds between updates of the progress bar


class Bar:
    """Which part of the work is being done, how much of it, tokens per second and the time left."""

    def __init__(self, console):
        self._progress = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            "data: {task.description}",
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            "{task.fields[tokens]}",
            rich.progress.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # a thread that imports breaks on the import hook of tensorflow_datasets
        )
        self._task, self._tokens, self._shown = self._progress.add_task("", total=None, tokens=""), 0, 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, sentence: str) -> None:
        """Prints a sentence above the bar."""
        self._progress.console.print(sentence, markup=False, highlight=False)

    def start(self, part: str) -> None:
        """A part of the work begins."""
        self._tokens = 0
        self._progress.reset(self._task, description=part, total=None, tokens="")
        self._progress.refresh()

    def total(self, size: int) -> None:
        """The bytes of source that this part reads."""
        self._progress.update(self._task, total=size)

    def advance(self, tokens: int, size: int) -> None:
        """More tokens were made of more bytes of source."""
        self._tokens += tokens
        seconds = self._progress.tasks[0].elapsed or 1e-9
        rate = f"{self._tokens / 1e6:.1f}M tokens, {self._tokens / seconds / 1e3:,.0f}k/s"
        self._progress.update(self._task, advance=size, tokens=rate)
        if (now := time.monotonic()) > self._shown + REFRESH:
            self._shown = now
            self._progress.refresh()


def show(console, info: Mapping) -> None:
    """Prints the table of prepared data: of every task what was read, kept, dropped and cut, and bad rows."""
    table = rich.table.Table(title="Prepared data", title_justify="left")
    for column in ("", "rows", "examples", "tokens", ""):
        table.add_column(column, justify="right" if column else "left")
    for name, count in info["counts"].items():
        if "examples" not in count:
            table.add_row(name, "", f"{count['queries']:,} queries", "", f"{count['corpus']:,} texts")
            continue
        read, after = Counts.from_json(count["read"]), count["after"]
        tokens = f"{sum(count['tokens'].values()):,}"
        table.add_row(name, f"{read.rows_read:,}", f"{count['examples']:,}", tokens, "", style="bold")
        for what, number in read.rows.items():
            if what != "used" and number:
                table.add_row("", f"-{number:,}", "", "", what)
        for reason, number in (*read.dropped.items(), *after.items()):
            if number:
                sign = "+" if reason == stream.REPEATED else "-"
                table.add_row("", "", f"{sign}{number:,}", "", reason)
        for column, number in read.cut.items():
            if number:
                table.add_row("", "", f"{number:,}", "", column if " " in column else f"texts cut in {column}")
    table.add_section()
    for name, seconds in info["seconds"].items():
        table.add_row(name, "", "", f"{seconds:.1f} s", "")
    print_table(table, stderr=True)
    for name, count in info["counts"].items():
        for error in count.get("read", {}).get("errors", ()):
            console.print(f"bad row of {name}: {error}", markup=False, highlight=False)
    for name, report in info["sources"]["reports"].items():
        if missing := report.get("packages not installed"):
            console.print(f"packages of {name} that are not installed: {', '.join(missing)}")
            break
