"""The training loop of all stages.

Batch k and the key of step k are functions of (seed, k); the rest of the state is in the checkpoint. So a run that was
killed at any moment and started again has the losses of an uninterrupted run.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from embed import distributed, paths
from embed.checkpoints import training_state
from embed.data.prefetch import prefetch
from embed.training import flops
from embed.training.metrics import MetricsWriter
from embed.training.step import Step


class NonFiniteLossError(ValueError):
    """The loss or its gradient was not finite in too many consecutive steps."""


class PreemptedError(Exception):
    """A signal ended the run after a checkpoint; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Whether a signal asks this run to end, and which one."""

    # Counts the calls of all runs of this process. The processes of a job agree on a call in the near future, and that
    # may be one of the next stage.
    calls = itertools.count(1)

    def __init__(self):
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether to end after this step. All processes must ask at every step, and agree."""
        if jax.process_count() > 1:  # jax.distributed has handled SIGTERM since it was initialized
            return multihost_utils.reached_preemption_sync_point(next(self.calls))
        return self.number is not None

    def terminate(self, number, frame) -> None:
        self.number = self.number or number

    def interrupt(self, number, frame) -> None:
        """The first Ctrl-C asks the run to end, the second one ends the process."""
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"embed: interrupted: saving a checkpoint after this step; press Ctrl-C again to end at once\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # jax passes it on to the other processes


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Within the block SIGTERM and the first SIGINT (Ctrl-C) only ask the run to end."""
    request = StopRequest()
    handlers = {signal.SIGINT: request.interrupt} | (
        {} if jax.process_count() > 1 else {signal.SIGTERM: request.terminate}
    )
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # only the main thread can handle signals in Python
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        # A background job of a shell ignores Ctrl-C, which is meant for another process.
        if number == signal.SIGTERM or before[number] not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python
                signal.signal(number, handler)


def translate_peer_errors(step: int):
    """`distributed.translate_peer_errors` around a step."""
    return distributed.translate_peer_errors(
        f" at step {step}", "the same commands continue from the last checkpoint", but=(NonFiniteLossError,)
    )


def train(
    folder,
    *,
    step: Step,
    loader,
    initial_params: Callable,
    evaluate: Callable | None = None,
    evaluated_on: str = "",
    check_held: Callable = lambda: None,
    read_timeout: float | None = None,
    readers: int = 0,
    peak: float | None = None,
    profile_steps: range = range(0),
    writer: Callable = MetricsWriter,
    progress: Callable = lambda k, row: None,
    warn: Callable = print,
    log: Callable = lambda sentence: None,
):
    """Run `step.steps` steps in `folder`, from its newest checkpoint if there is one; return the final parameters.

    `initial_params(shardings)` computes the starting parameters if there is no checkpoint. Every `evaluate_every` steps
    and at the end, all processes call `evaluate(params)`, which returns {set: figure}. The mean goes into the row as
    `evaluation`, that of each of several sets as `evaluation/SET`, and the checkpoint with the highest mean of the same
    sets, which `evaluated_on` names, is kept. `check_held()` raises if another process has taken over the folder. A
    batch may take `read_timeout` seconds; `readers` processes read them, or a thread. `peak` is the FLOP/s of a device
    for the MFU, by default the published value. `profile_steps` are traced. `writer(folder, start)` returns a
    MetricsWriter. `progress(k, row)` receives each logged row, `warn(sentence)` what went wrong without ending the run,
    and `log(sentence)` the checkpoint it continues from.

    The host reads a step's metrics after it has dispatched the next step, so the devices never wait for it.
    NonFiniteLossError after more than max_skipped consecutive steps without a finite loss and gradient; PreemptedError
    after a SIGTERM or Ctrl-C, once a checkpoint is saved; ReaderStalledError, ReaderDiedError, CheckpointError and
    PeerLostError as documented there.
    """
    folder, execution, steps = paths.path(folder), step.stage.execution, step.steps
    checkpoints, every = folder / "checkpoints", execution.evaluate_every if evaluate else 0
    with (
        on_signals() as stop_requested,
        training_state.open_manager(
            checkpoints, save_every=execution.checkpoint_every, keep=execution.keep, evaluated_on=evaluated_on
        ) as manager,
        contextlib.ExitStack() as stack,
    ):
        start, params, state = training_state.restore_newest(
            manager, step.abstract_params, step.abstract_state, warn, final=steps
        )
        if 0 < start < steps:
            log(f"continues at step {start} of {steps}, from {checkpoints / str(start)}")
        if not start:
            params = initial_params(step.params_sharding)
            state = step.init(params)
        best = training_state.best(manager, evaluated_on)

        output = writer(folder, start) if jax.process_index() == 0 else None
        rows = stack.enter_context(_Log(output, step, progress, warn, start, peak or flops.device_peak()))
        reached, ending = steps, False
        for k, batch, waited in prefetch(loader, start, steps, depth=2, timeout=read_timeout, readers=readers):
            if k in profile_steps and k == max(start, profile_steps.start) and output:
                jax.profiler.start_trace(output.local / "profile")
            stats = _estimates(batch.pop("stats"), batch, loader) | {"waited": waited}
            with translate_peer_errors(k + 1):
                params, state, metrics = step(params, state, step.put(batch, loader), k)
                rows.add(k + 1, metrics, stats)
            ending = stop_requested()
            last, figure, figures = k + 1 == steps or ending, None, {}
            if every and (k + 1 == steps or (k + 1) % every == 0) and not (ending and k + 1 < steps):
                with translate_peer_errors(k + 1), rows.pause():
                    figures = evaluate(params)
                figure = sum(figures.values()) / len(figures)
            better = figure is not None and figure > best
            milestone = execution.milestone_every and (k + 1) % execution.milestone_every == 0
            saving = last or milestone or better or manager.should_save(k + 1)
            if saving or figure is not None or k + 1 == profile_steps.stop:
                with translate_peer_errors(k + 1):  # the counts so far must not be lost with this process
                    rows.flush(row=saving or figure is not None, figures=figures, keep=saving)
            if k in profile_steps and (last or k + 1 == profile_steps.stop) and output:
                jax.profiler.stop_trace()
            training_state.check(manager)
            if saving:
                check_held()
                best = figure if better else best
                training_state.save(
                    manager,
                    k + 1,
                    params,
                    None if k + 1 == steps else state,  # a finished stage needs no optimizer state
                    figure=figure if better else None,
                    evaluated_on=evaluated_on,
                    milestone=bool(milestone),
                )
            if ending:
                reached = k + 1
                break
    if jax.process_count() == 1 and stop_requested.number is not None:  # asked while the last step was saved
        ending = True
    if reached == steps:
        training_state.finish(checkpoints, evaluated_on)
    if ending:
        number = stop_requested.number or signal.SIGTERM
        what = "interrupted" if number == signal.SIGINT else "SIGTERM"
        raise PreemptedError(f"{what}: saved at step {reached} of {steps}; the same command continues", number)
    return params


def _estimates(stats: dict[str, float], batch: dict[str, np.ndarray], loader) -> dict[str, float]:
    """The fill, and of a whole batch the other counts of the loader, tokens, squared lengths of segments and examples.

    They are estimated from this process's part. Exact counts would need communication, for which the host would wait.
    """
    segments = batch["segment_ids"]
    apart = segments + np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)  # numbered over all rows
    lengths = np.bincount(apart[segments > 0])
    local = {"tokens": int(lengths.sum()), "squares": int((lengths**2).sum())}
    local["examples"] = int(batch["valid"].sum()) if "valid" in batch else len(batch["tokens"])
    local |= {name: n for name, n in stats.items() if name != "fill"}
    return {"fill": stats["fill"]} | {name: n * loader.num_shards / len(loader.shards) for name, n in local.items()}


COUNTED = ("skipped", "masked", "overflow")  # metrics that a row sums over steps


def _evaluation(figures: Mapping[str, float]) -> dict[str, float]:
    """The entries of a row for the figures of sets."""
    if not figures:
        return {}
    each = {f"evaluation/{name}": figure for name, figure in figures.items()} if len(figures) > 1 else {}
    return {"evaluation": sum(figures.values()) / len(figures)} | each


class _Log:
    """Reads a step's metrics while the next step runs, and writes a row every `log_every` steps.

    A row contains the metrics of its step and, since the previous row: the mean fill; the sums of COUNTED and of the
    loader's counts (`cut`, `lost`), so that no cut or lost text goes unreported; tokens and examples per second and
    device; MFU by both conventions (embed.training.flops) if the devices' peak is known; the share of time that the
    host waited for data. It also has the peak memory of a device. With several processes, the loader's counts and the
    speeds are estimates from the part of process 0 (`_estimates`).
    """

    def __init__(self, writer, step: Step, progress: Callable, warn: Callable, start: int, peak: float | None):
        self.writer, self.step, self.progress, self.warn, self.peak = writer, step, progress, warn, peak
        self.every, self.max_skipped = step.stage.execution.log_every, step.stage.execution.max_skipped
        self.clock, self.clock_step = time.perf_counter(), start
        self.pending = None  # (step, device metrics, stats) of the step just dispatched
        self.stats = []  # of the steps since the last row
        self.in_a_row = 0  # consecutive skipped steps

    def add(self, step: int, metrics: dict, stats: dict) -> None:
        self.flush()
        self.pending = step, metrics, stats

    def flush(self, row: bool = False, figures: Mapping[str, float] | None = None, keep: bool = False) -> None:
        """Wait for the pending step and read its metrics. With `row`, always write a row, with any `figures` of sets.

        With `keep`, the rows so far must survive this machine.
        """
        if self.pending:
            (step, metrics, stats), self.pending = self.pending, None
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
            self._read(step, metrics | _evaluation(figures or {}), stats, row)
        if keep and self.writer:
            self.writer.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block from the next row."""
        if self.pending:
            jax.block_until_ready(self.pending[1])
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # The error that ended the work matters more than one of the writer.
        with contextlib.suppress(*([Exception] if error else [])):
            if self.writer:
                self.writer.close(error)

    def _read(self, step: int, row: dict[str, float], stats: dict, write: bool) -> None:
        self.stats.append(stats | {name: row[name] for name in COUNTED if name in row})
        self.in_a_row = self.in_a_row + 1 if row["skipped"] else 0
        if self.in_a_row > self.max_skipped:
            name = "gradient_norm" if np.isfinite(row["loss"]) else "loss"
            raise NonFiniteLossError(
                f"the {name} of step {step} is {row[name]}, and {self.in_a_row} steps in a row were skipped "
                f"(max_skipped={self.max_skipped}); lower optimizer.learning_rate or check the batch; "
                "the last checkpoint is intact"
            )
        if step % self.every and not write:
            return
        now = time.perf_counter()
        elapsed, count = now - self.clock, step - self.clock_step
        self.clock, self.clock_step = now, step
        sums = {name: sum(s[name] for s in self.stats) for name in self.stats[0]}
        row |= sums | {"fill": sums["fill"] / len(self.stats)}
        tokens, squares, examples, waited = (row.pop(name) for name in ("tokens", "squares", "examples", "waited"))
        self.stats = []
        row["learning_rate"] = float(self.step.schedule(jnp.asarray(step - 1)))
        row["seconds_per_step"] = elapsed / count
        row["tokens_per_second_per_device"] = tokens / elapsed / jax.device_count()
        row["examples_per_second_per_device"] = examples / elapsed / jax.device_count()
        if self.peak:
            stage, model, reach = self.step.stage, self.step.model, self.peak * jax.device_count() * elapsed / count
            row["mfu"] = flops.model_flops(stage, model, tokens / count, squares / count) / reach
            row["mfu_full_rows"] = flops.model_flops(stage, model) / reach
        row["data_wait"] = min(waited / elapsed, 1.0)
        if stats := jax.local_devices()[0].memory_stats():
            row["memory_gb"] = stats["peak_bytes_in_use"] / 1e9
        if self.writer:
            self.writer.write(step, row)
        if row.get("overflow") and jax.process_index() == 0:
            self.warn(
                f"{row['overflow']:.0f} masked tokens up to step {step} are not in the loss: they exceed "
                "embed.objectives.masked_diffusion.capacity "
                f"({row['overflow'] / row['masked']:.2%} of all masked tokens since the last row)"
            )
        self.progress(step, row)
