"""The training loop, one for all stages.

Batch k and the key of step k are functions of (seed, k), the rest of the state is in the checkpoint: a run that is
killed at any moment and started again gives the losses of an unbroken one.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from embed.checkpoints import training_state
from embed.data.loader import prefetch
from embed.models import sharding
from embed.training.metrics import MetricsWriter
from embed.training.optimizer import make_optimizer, wsd_schedule


class NonFiniteLossError(ValueError):
    """The loss or its gradient was NaN or infinite in too many steps in a row."""


class PreemptedError(Exception):
    """SIGTERM ended the run behind a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class PeerLostError(RuntimeError):
    """A step of several processes failed: another one ended, or the network did."""

    exit_code = 75  # EX_TEMPFAIL: the same command, started again, continues


def make_train_step(loss: Callable, optimizer: optax.GradientTransformation, seed: int, steps: int) -> Callable:
    """(params, optimizer state, batch, step) -> (params, optimizer state, metrics), to be jitted with donation.

    A step whose loss or gradient is not finite changes no parameter and no moment; `skipped` is 1. Counts go on, so that
    the learning rate stays a function of the step.
    """

    def train_step(params, optimizer_state, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        (value, extra), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key, step / steps)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(gradients, optimizer_state, params)
        new_params = optax.apply_updates(params, updates)

        def keep(new, old):
            return jnp.where(finite | (new.ndim == 0), new, old)

        params, optimizer_state = jax.tree.map(keep, (new_params, new_state), (params, optimizer_state))
        return params, optimizer_state, {"loss": value, "gradient_norm": norm, "skipped": 1 - finite, **extra}

    return train_step


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether a SIGTERM wants this run to end behind `step`. All processes agree; ask at every step."""
    if jax.process_count() > 1:  # jax.distributed has handled the signal since it was initialized
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python hands signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def peers(step: int) -> Iterator[None]:
    """What a step of several processes raises when one of them is gone, as PeerLostError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of the runtime; Gloo's come as ValueError
        if jax.process_count() == 1 or isinstance(error, NonFiniteLossError):
            raise
        raise PeerLostError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on at step {step}: "
            f"{str(error).splitlines()[0]}. Another process ended or the network failed, see their logs; the same "
            "commands continue from the last checkpoint"
        ) from error


def train(
    folder: Path,
    *,
    stage,
    loss: Callable,
    loader,
    steps: int,
    initial_params: Callable,
    abstract_params,
    seed: int,
    mesh,
    read_timeout: float | None = None,
    least_seconds: float | None = None,
    profile_steps: range = range(0),
    writer: Callable = MetricsWriter,
    progress: Callable = lambda step, row: None,
    warn: Callable = print,
):
    """Train to `steps` under `folder` and return the final parameters; continues from the newest checkpoint there.

    `stage` is the stage's config: its optimizer, log_every, checkpoint_every and max_skipped. `initial_params(shardings)`
    makes the starting parameters, called only when there is no checkpoint; `abstract_params` is their tree of shapes and
    dtypes. A batch may take `read_timeout` seconds. `least_seconds` is what a step's model FLOPs take at the devices'
    peak, for the log's MFU. `profile_steps` are traced. `writer(folder, start)` makes a MetricsWriter,
    `progress(step, row)` is told of each logged step, `warn(sentence)` of what went wrong and was mended.

    The host reads a step's metrics when it has sent off the next, so it never waits for the step it has just sent off.
    NonFiniteLossError after more than max_skipped steps in a row without a finite loss and gradient; PreemptedError after a
    SIGTERM, behind a checkpoint; ReaderStalledError, CheckpointError and PeerLostError as they say.
    """
    schedule = wsd_schedule(stage.optimizer.learning_rate, steps, stage.optimizer.warmup, stage.optimizer.decay)
    transformation = make_optimizer(stage.optimizer, schedule)
    params_sharding = sharding.parameter_shardings(mesh, abstract_params)
    sharding.check_sharded(mesh, abstract_params, params_sharding)
    abstract_state = jax.eval_shape(transformation.init, abstract_params)
    state_sharding = sharding.state_shardings(mesh, abstract_state, params_sharding)

    with (
        on_sigterm() as asked_to_end,
        training_state.open_manager(folder / "checkpoints", save_every=stage.checkpoint_every, keep=2) as manager,
    ):
        start, params, state = training_state.restore_newest(
            manager,
            sharding.with_sharding(abstract_params, params_sharding),
            sharding.with_sharding(abstract_state, state_sharding),
            warn,
        )
        if not start:
            params = initial_params(params_sharding)
            state = jax.jit(transformation.init, out_shardings=state_sharding)(params)

        train_step = jax.jit(
            make_train_step(loss, transformation, seed, steps),
            donate_argnums=(0, 1),
            out_shardings=(params_sharding, state_sharding, None),
        )
        log = _Log(
            writer(folder, start) if jax.process_index() == 0 else None,
            schedule, progress, start, every=stage.log_every, max_skipped=stage.max_skipped,
            least_seconds=least_seconds,
        )  # fmt: skip
        for step, batch, waited in prefetch(loader, start, steps, depth=2, timeout=read_timeout):
            if step in profile_steps and step == max(start, profile_steps.start):
                jax.profiler.start_trace(folder / "profile")
            stats = batch.pop("stats") | _sizes(batch, loader) | {"waited": waited}
            with jax.set_mesh(mesh), peers(step + 1):  # attention kernels ask for the mesh
                params, state, metrics = train_step(
                    params, state, sharding.put_batch(mesh, batch, loader.own, loader.units), step
                )
                log.add(step + 1, metrics, stats)
            ending = asked_to_end(step + 1)
            last = step + 1 == steps or ending
            saving = last or manager.should_save(step + 1)
            if saving or step + 1 == profile_steps.stop:
                with peers(step + 1):
                    log.flush(row=saving)  # what a row sums must not end with this process
            if step in profile_steps and (last or step + 1 == profile_steps.stop):
                jax.profiler.stop_trace()
            training_state.check(manager)
            if saving:
                training_state.save(manager, step + 1, params, state)
            if ending:
                break
        log.close()
    if start < steps and step + 1 < steps:
        raise PreemptedError(f"SIGTERM: saved at step {step + 1} of {steps}; the same command continues")
    return params


def _sizes(batch: dict[str, np.ndarray], loader) -> dict[str, float]:
    """Tokens and examples of a whole batch, out of this process's part of it."""
    own = {"tokens": int((batch["segment_ids"] > 0).sum()), "examples": len(batch.get("valid", batch["tokens"]))}
    return {name: n * loader.units / len(loader.own) for name, n in own.items()}


class _Log:
    """Reads a step's metrics when the next step is under way, and writes a row every so many steps.

    A row holds the metrics of its own step, the mean fill, and since the row before: the sums of the loader's counts (this
    process's) and of skipped steps, so that nothing cut or lost is left out; tokens and examples a second and device; MFU
    where the devices' peak is known; the share of the time that the host waited for data; the most memory a device has held.
    """

    def __init__(
        self, writer, schedule, progress, start: int, *, every: int, max_skipped: int, least_seconds: float | None
    ):  # fmt: skip
        self.writer, self.schedule, self.progress, self.every = writer, schedule, progress, every
        self.max_skipped, self.least_seconds = max_skipped, least_seconds
        self.clock, self.clock_step = time.perf_counter(), start
        self.pending = None  # (step, device metrics, stats) of the step just sent off
        self.stats = []  # of the steps since the last row
        self.in_a_row = 0  # steps skipped

    def add(self, step: int, metrics: dict, stats: dict) -> None:
        self.flush()
        self.pending = step, metrics, stats

    def flush(self, row: bool = False) -> None:
        """Read what is pending, waiting for it; with `row` write a row of it in any case."""
        if self.pending:
            (step, metrics, stats), self.pending = self.pending, None
            self._read(step, {name: float(x) for name, x in jax.device_get(metrics).items()}, stats, row)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def _read(self, step: int, row: dict[str, float], stats: dict, write: bool) -> None:
        self.stats.append(stats | {"skipped": row["skipped"]})
        self.in_a_row = self.in_a_row + 1 if row["skipped"] else 0
        if self.in_a_row > self.max_skipped:
            self.close()
            name = "gradient_norm" if np.isfinite(row["loss"]) else "loss"
            raise NonFiniteLossError(
                f"the {name} of step {step} is {row[name]}, and {self.in_a_row} steps in a row were skipped for that "
                f"(max_skipped={self.max_skipped}); lower optimizer.learning_rate or look at the batch; the last checkpoint is "
                "intact"
            )
        if step % self.every and not write:
            return
        now = time.perf_counter()
        elapsed, count = now - self.clock, step - self.clock_step
        self.clock, self.clock_step = now, step
        sums = {name: sum(s[name] for s in self.stats) for name in self.stats[0]}
        row |= sums | {"fill": sums["fill"] / len(self.stats)}
        tokens, examples, waited = (row.pop(name) for name in ("tokens", "examples", "waited"))
        self.stats = []
        row["learning_rate"] = float(self.schedule(jnp.asarray(step - 1)))
        row["seconds_per_step"] = elapsed / count
        row["tokens_per_second_per_device"] = tokens / elapsed / jax.device_count()
        row["examples_per_second_per_device"] = examples / elapsed / jax.device_count()
        if self.least_seconds:
            row["mfu"] = self.least_seconds * count / elapsed
        row["data_wait"] = min(waited / elapsed, 1.0)
        if stats := jax.local_devices()[0].memory_stats():
            row["memory_gb"] = stats["peak_bytes_in_use"] / 1e9
        if self.writer:
            self.writer.write(step, row)
        self.progress(step, row)
