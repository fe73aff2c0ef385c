"""Where a run's numbers go: metrics.jsonl (one object a line) and TensorBoard event files."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends rows of numbers. Opened at step s it first drops rows after s: a restart continues, never repeats."""

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, row: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable]:
    """A bar with steps, loss and the time left; yields `update(step, loss)`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, loss="…")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4f}")
