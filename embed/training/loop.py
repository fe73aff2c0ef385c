"""The training loop, one for all stages.

Batch k and the key of step k are functions of (seed, k), the rest of the state is in the checkpoint: a run that is
killed at any moment and started again gives the losses of an unbroken one.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from embed.checkpoints import training_state
from embed.data.loader import prefetch
from embed.training import sharding
from embed.training.metrics import MetricsWriter
from embed.training.optimizer import make_optimizer, wsd_schedule


class NonFiniteLossError(ValueError):
    """The loss or its gradient became NaN or infinite."""


def make_train_step(loss: Callable, optimizer: optax.GradientTransformation, seed: int, steps: int) -> Callable:
    """(params, optimizer state, batch, step) -> (params, optimizer state, metrics), to be jitted with donation."""

    def train_step(params, optimizer_state, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        (value, extra), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key, step / steps)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return params, optimizer_state, {"loss": value, "gradient_norm": optax.global_norm(gradients), **extra}

    return train_step


def train(
    folder: Path,
    *,
    loss: Callable,
    loader,
    steps: int,
    initial_params: Callable,
    abstract_params,
    optimizer,
    seed: int,
    mesh,
    log_every: int,
    checkpoint_every: int,
    progress: Callable = lambda step, loss: None,
):
    """Train to `steps` under `folder` and return the final parameters; continues from the newest checkpoint there.

    `initial_params(shardings)` makes the starting parameters, called only when there is no checkpoint; `abstract_params`
    is their tree of shapes and dtypes. `optimizer` is the optimizer section of a config, `progress(step, loss)` is told of each
    logged step. Metrics are read from the device one log interval late, so the host never waits for the step it
    has just sent off; a non-finite loss or gradient raises NonFiniteLossError before anything after it is saved.
    """
    sharding.check_processes(mesh)
    schedule = wsd_schedule(optimizer.learning_rate, steps, optimizer.warmup, optimizer.decay)
    transformation = make_optimizer(optimizer, schedule)
    params_sharding = sharding.parameter_shardings(mesh, abstract_params)
    abstract_state = jax.eval_shape(transformation.init, abstract_params)
    state_sharding = sharding.state_shardings(mesh, abstract_state, params_sharding)

    with training_state.open_manager(folder / "checkpoints", save_every=checkpoint_every, keep=2) as manager:
        start = manager.latest_step() or 0
        if start:
            params, state = training_state.restore(
                manager,
                start,
                sharding.with_sharding(abstract_params, params_sharding),
                sharding.with_sharding(abstract_state, state_sharding),
            )
        else:
            params = initial_params(params_sharding)
            state = jax.jit(transformation.init, out_shardings=state_sharding)(params)

        train_step = jax.jit(
            make_train_step(loss, transformation, seed, steps),
            donate_argnums=(0, 1),
            out_shardings=(params_sharding, state_sharding, None),
        )
        writer = MetricsWriter(folder, start) if jax.process_index() == 0 else None
        log = _Log(writer, schedule, progress, start, log_every, steps)
        for step, batch in prefetch(loader, start, steps, depth=2):
            stats = batch.pop("stats")
            with jax.set_mesh(mesh):  # attention kernels ask for it
                params, state, metrics = train_step(params, state, sharding.put_batch(mesh, batch), step)
            log.add(step + 1, metrics, stats)
            if manager.should_save(step + 1) or step + 1 == steps:
                log.flush()  # a non-finite loss must not reach a checkpoint
                training_state.save(manager, step + 1, params, state, force=step + 1 == steps)
        log.flush()
        manager.wait_until_finished()
        if writer:
            writer.close()
    return params


class _Log:
    """Collects metrics on the device and writes them an interval late.

    A row holds the metrics of its own step, the mean fill and the sums of the loader's counts (this process's) since the
    row before: what was cut or lost is never left out.
    """

    def __init__(self, writer, schedule, progress, start: int, every: int, last: int):
        self.writer, self.schedule, self.progress, self.every, self.last = writer, schedule, progress, every, last
        self.clock, self.clock_step = time.perf_counter(), start
        self.pending = []  # (step, device metrics, loader stats), oldest first
        self.stats = []  # loader stats since the last row

    def add(self, step: int, metrics: dict, stats: dict) -> None:
        self.pending.append((step, metrics, stats))
        if step % self.every == 0:
            self._write(len(self.pending) - 1)  # all but the step just sent off

    def flush(self) -> None:
        self._write(len(self.pending))

    def _write(self, count: int) -> None:
        ready, self.pending = self.pending[:count], self.pending[count:]
        for step, metrics, stats in ready:
            self.stats.append(stats)
            for name in ("loss", "gradient_norm"):
                if not np.isfinite(value := float(metrics[name])):
                    raise NonFiniteLossError(
                        f"the {name} of step {step} is {value}; lower optimizer.learning_rate or look at "
                        "the batch; the last checkpoint before it is intact"
                    )
            if step % self.every and step != self.last:
                continue
            now = time.perf_counter()
            seconds = (now - self.clock) / max(step - self.clock_step, 1)
            self.clock, self.clock_step = now, step
            row = {name: float(x) for name, x in metrics.items()}
            row |= {name: sum(s[name] for s in self.stats) for name in stats}
            row["fill"] /= len(self.stats)
            self.stats = []
            row["learning_rate"] = float(self.schedule(jnp.asarray(step - 1)))
            row["seconds_per_step"] = seconds
            if self.writer:
                self.writer.write(step, row)
            self.progress(step, row["loss"])
