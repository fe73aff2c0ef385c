"""Logs of a run: metrics.jsonl (one JSON object per line), TensorBoard event files, optionally Weights & Biases."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from embed import paths
from embed.console import make_console

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows of numbers to the logs in `folder`.

    It first drops the rows after `start_step`, so that a restarted run has each step once.

    Files in a bucket cannot be appended to. For a bucket, rows are written to a local folder that `flush` copies. The
    loop flushes before each checkpoint, so a host that is lost loses only rows that its restart writes again.

    `wandb` is the name of a Weights & Biases project that receives the rows too, one run per folder.
    """

    def __init__(self, folder, start_step: int, wandb: str = ""):
        from tensorboardX.event_file_writer import EventsWriter  # takes seconds: it imports torch where that is

        self.folder = paths.path(folder)
        self.bucket = paths.is_bucket(folder)
        self.local = Path(tempfile.mkdtemp(prefix="embed-") if self.bucket else self.folder)
        (self.local / "tensorboard").mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.folder / FILE) if row["step"] <= start_step]
        paths.write(self.local / FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = (self.local / FILE).open("a", encoding="utf-8")
        # Not SummaryWriter: when the disk is full, its thread ends and the caller waits forever.
        self.events = EventsWriter(str(self.local / "tensorboard" / "events"), f".{os.getpid()}")
        # TensorBoard then ignores earlier files from this step on.
        self._write_event(start_step + 1, session_log={"status": "START"})
        self.wandb = None
        if wandb:
            try:
                import wandb as service
            except ImportError:
                raise ValueError(f"--wandb={wandb} needs the package wandb: pip install -e '.[wandb]'") from None
            identity = hashlib.sha256(os.fspath(self.folder).encode()).hexdigest()[:12]
            self.wandb = service.init(
                project=wandb,
                id=identity,
                name=f"{self.folder.parent.name}/{self.folder.name}",
                dir=self.local,
                resume="allow",
            )

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append one row. Steps must increase."""
        values = [{"tag": name, "simple_value": value} for name, value in row.items()]
        try:
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
            self._write_event(step, summary={"value": values})
            self.events.flush()
        except OSError as error:  # it does not name the file
            raise OSError(error.errno, error.strerror, str(self.folder)) from error
        if self.wandb:
            self.wandb.log(row, step=step)

    def _write_event(self, step: int, **what) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.events.write_event(Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        """Copy everything written so far, including profiles, to the bucket."""
        if self.bucket:
            for name, file in paths.files(self.local).items():
                if not name.startswith("wandb/"):
                    paths.copy_file(file, self.folder / name)

    def close(self, error: BaseException | None = None) -> None:
        """Flush and close all logs. `error` is what ended the work. A folder whose lease is lost gets nothing."""
        self.file.close()
        self.events.close()
        try:
            if not isinstance(error, paths.LeaseLostError):
                self.flush()
        finally:
            if self.wandb:
                self.wandb.finish(exit_code=int(error is not None))
            if self.bucket:
                shutil.rmtree(self.local)


def read_metrics(path) -> list[dict]:
    """The rows of a metrics.jsonl, without a last line that a kill cut short."""
    rows, path = [], paths.path(path)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def log_line(step: int, total: int, row: dict[str, float]) -> str:
    """A row of `loop.train` as one readable line; fields that the row does not have are left out."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("gradient_norm", "gradient {:.3f}"),
        ("learning_rate", "rate {:.2e}"),
        ("tokens_per_second_per_device", "{:,.0f} tokens/s/device"),
        ("examples_per_second_per_device", "{:,.1f} examples/s/device"),
        ("mfu", "MFU {:.1%} in segments"),
        ("data_wait", "waited for data {:.0%}"),
        ("memory_gb", "memory {:.1f} GB"),
    )
    parts = [form.format(row[name]) for name, form in shown if name in row]
    if row.get("skipped"):
        parts.append(f"SKIPPED {row['skipped']:.0f}")
    return f"step {step}/{total}  " + "  ".join(parts)


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable]:
    """Yields `update(step, row)`: a bar with steps, loss and time left, or one line per row without a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = make_console()
    if not console.is_terminal:
        yield lambda step, row: print(f"{description}  {log_line(step, total, row)}", flush=True)
        return
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, figures="")

        def update(step, row):
            figures = f"loss {row['loss']:.4f}"
            if "mfu" in row:
                figures += f" MFU {row['mfu']:.0%}"
            bar.update(task, completed=step, figures=figures)

        yield update
