"""Runs units of work, each whole or absent: in this process, in local processes or on Apache Beam.

They are those of `stream` and `evaluation_sets`, and on Beam the shards of `embed encode`.
"""

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import NamedTuple, Protocol

from embed import paths
from embed.preparation import stream
from embed.preparation.sources.base import UnreachableError
from embed.preparation.stream import Work

SMALL = 4 << 20  # bytes of source below which starting processes takes longer than the work
BYTES_PER_ROW = 1 << 10  # a guess, for runs with a limit of rows
REFRESH = 0.5  # seconds between updates of the progress bar


class Shared(Protocol):
    """What all jobs need, such as `stream.Work`; picklable."""

    scratch: str  # a folder, which the workers of Beam must reach


class Job(NamedTuple):
    """A unit of work: function(work, *arguments, progress) writes `marker` last; `bytes` of source are read."""

    function: Callable
    arguments: tuple
    bytes: int
    marker: str

    def run(self, work: Shared, progress: stream.Progress = lambda tokens, size: None) -> None:
        self.function(work, *self.arguments, progress)


def unfinished(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that have left no marker."""
    files = [(job, paths.path(job.marker)) for job in jobs]
    done = {folder: {entry.name for entry in paths.entries(folder)} for folder in {file.parent for _, file in files}}
    return [job for job, file in files if file.name not in done[file.parent]]


def run_locally(jobs: Sequence[Job], work: Work, processes: int | None, progress: stream.Progress) -> None:
    """Runs the jobs, the largest first, in `processes` processes (None = one per core; 1 = in this one).

    The first error ends the run. Processes end with this one, however it ends.
    """
    jobs = sorted(jobs, key=lambda job: -job.bytes)
    processes = min(cores() if processes is None else processes, len(jobs))
    to_read = sum(min(job.bytes, work.limit * BYTES_PER_ROW) if work.limit else job.bytes for job in jobs)
    if processes <= 1 or to_read < SMALL:
        for job in jobs:
            job.run(work, progress)
        return
    context = multiprocessing.get_context("spawn")
    tokens, size = context.Value("q"), context.Value("q")
    before, seen = set(multiprocessing.active_children()), [0, 0]

    def show() -> None:
        now = [tokens.value, size.value]
        progress(now[0] - seen[0], now[1] - seen[1])
        seen[:] = now

    with ProcessPoolExecutor(processes, context, _start, (work, tokens, size)) as pool:
        try:
            pending = {pool.submit(_run, job) for job in jobs}
            while pending:
                done, pending = wait(pending, REFRESH, FIRST_COMPLETED)
                show()
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, perhaps because memory ran out: the same command continues; fewer "
                "--processes need less"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(work: Work, tokens, size) -> None:
    """Prepares a worker process."""
    global _work, _progress
    # Each process has one core. A pool of one thread: without a pool (TOKENIZERS_PARALLELISM=false), tokenizers takes
    # up to twice the time.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = "1"

    def progress(more_tokens: int, more_bytes: int) -> None:
        for value, more in ((tokens, more_tokens), (size, more_bytes)):
            with value.get_lock():
                value.value += more

    def end_with_parent() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _work, _progress = work, progress


def _run(job: Job) -> None:
    job.run(_work, _progress)


def check(runner: str) -> None:
    """ValueError for a runner of Beam that cannot be used."""
    if runner.rpartition(".")[2].lower() == "directrunner":
        raise ValueError(
            "--runner=DirectRunner would download another runner first: use --runner=FnApiRunner, which also runs on "
            "this machine"
        )
    if runner and not importlib.util.find_spec("apache_beam"):
        raise ValueError("--runner needs Apache Beam: pip install -e '.[beam,data]'")


def run_on_beam(jobs: Sequence[Job], work: Shared, runner: str, options: Sequence[str]) -> None:
    """Runs the jobs as a Beam pipeline, whose workers must reach the folders of `work`.

    `runner` is a name that Beam knows, such as FnApiRunner, DataflowRunner, FlinkRunner or SparkRunner. An error about
    the data is raised here as one sentence, once the other jobs have ended.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

    parsed = PipelineOptions([f"--runner={runner}", *options])
    parsed.view_as(SetupOptions).save_main_session = False
    errors = paths.path(work.scratch) / "errors"
    if paths.entries(errors):
        errors.rmtree()
    # Workers read what to do from a file: services limit the size of a pipeline, which has only indices.
    file = paths.path(work.scratch) / f"jobs-{uuid.uuid4().hex[:8]}.pickle"
    paths.write(file, pickle.dumps((work, list(jobs))))
    with beam.Pipeline(options=parsed) as pipeline:
        (
            pipeline
            | "jobs" >> beam.Create(range(len(jobs)))
            | beam.Reshuffle()  # or one worker would run them all
            | "run" >> beam.ParDo(_do_fn(beam), os.fspath(file), os.fspath(errors))
        )
    file.unlink()
    if files := paths.entries(errors):
        raise ValueError(min(file.read_text(encoding="utf-8") for file in files))


@functools.lru_cache(maxsize=1)
def _read_jobs(file: str) -> tuple[Shared, list[Job]]:
    return pickle.loads(paths.path(file).read_bytes())


def _do_fn(beam):
    class Run(beam.DoFn):
        def process(self, index: int, file: str, errors: str):
            tokens = beam.metrics.Metrics.counter("embed", "tokens")
            work, jobs = _read_jobs(file)
            job = jobs[index]
            try:
                job.run(work, lambda more, _: tokens.inc(more))
            except UnreachableError:
                raise  # Beam tries again
            except ValueError as error:  # about the data: trying again, as Beam would, does not help
                name = "-".join(str(part).replace("/", "-") for part in job.arguments[:2])
                paths.write(paths.path(errors) / f"{job.function.__name__}-{name}.txt", str(error))
            return ()

    return Run()


class Clock:
    """Seconds by part of the work."""

    def __init__(self, start: Callable[[str], None] = lambda part: None):
        self.seconds: dict[str, float] = {}
        self._start = start

    @contextlib.contextmanager
    def part(self, name: str):
        begin = time.monotonic()
        self._start(name)
        yield
        self.seconds[name] = round(time.monotonic() - begin, 2)
