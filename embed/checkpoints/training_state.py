"""Training checkpoints with Orbax: parameters and optimizer state as separate items, saved in the background.

    FOLDER/STEP/params      always
    FOLDER/STEP/optimizer   until the stage has finished
    FOLDER/STEP/checksums   one of each item's bits, computed on the devices and equal for every sharding

The checksums reveal a truncated file or a wrong bit when a checkpoint is read; then the checkpoint before it is used.
The folder may be in a bucket (gs://).
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from embed import distributed, paths
from embed.checkpoints import names


class CheckpointError(OSError):
    """A checkpoint cannot be written, or none can be read."""

    exit_code = 1


@dataclasses.dataclass
class _Policy(policies.PreservationPolicy):
    """Keeps the newest checkpoints, milestones, and the best of those evaluated on one set."""

    newest: int
    evaluated_on: str

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best = max(checkpoints, key=lambda info: _figure(info.metrics, self.evaluated_on), default=None)
        if best is not None and _figure(best.metrics, self.evaluated_on) == -math.inf:
            best = None
        newest = {info.step for info in checkpoints[-self.newest :]}
        return [
            info.step in newest or info is best or (info.metrics or {}).get("milestone", False) for info in checkpoints
        ]


def _figure(metrics, evaluated_on: str) -> float:
    return metrics["figure"] if metrics and metrics.get("evaluated_on") == evaluated_on else -math.inf


@contextlib.contextmanager
def open_manager(folder, *, save_every: int, keep: int, evaluated_on: str = "") -> Iterator[ocp.CheckpointManager]:
    """A manager that saves every `save_every` steps and completes each save by a rename (in a bucket by a marker file).

    It keeps the newest `keep` checkpoints, milestones, and the best of those saved with a figure of the set
    `evaluated_on`. The end of the context waits for pending saves. CheckpointError if one fails, unless another error
    ended the context.
    """
    manager = ocp.CheckpointManager(
        paths.path(folder),
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=save_every,
            preservation_policy=_Policy(keep, evaluated_on),
            best_fn=lambda metrics: _figure(metrics, evaluated_on),  # without it, metrics are not read again
            enable_async_checkpointing=True,
            create=True,
            cleanup_tmp_directories=True,  # of killed saves
        ),
    )
    try:
        yield manager
        with _written(manager):
            manager.wait_until_finished()
    finally:
        with contextlib.suppress(Exception):  # already reported, or hides the error that matters
            manager.close()


@jax.jit
def checksum(tree) -> jax.Array:
    """The uint32 sum of the bits of all arrays, weighted by position in the tree: any one wrong word changes it."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        total = 31 * total + bits.sum(dtype=jnp.uint32)
    return total


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params,
    optimizer_state=None,
    *,
    figure: float | None = None,
    evaluated_on: str = "",
    milestone: bool = False,
) -> None:
    """Begin to save under `step`, which must be newer than all before; without `optimizer_state`, only the parameters.

    `figure` is their result on the set `evaluated_on`. A `milestone` is kept forever. CheckpointError as in `check`.
    """
    items = {"params": params} | ({"optimizer": optimizer_state} if optimizer_state is not None else {})
    checksums = {name: int(checksum(tree)) for name, tree in items.items()}
    saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    metrics = {"milestone": milestone} | ({} if figure is None else {"figure": figure, "evaluated_on": evaluated_on})
    with _written(manager):
        manager.save(
            step, args=ocp.args.Composite(**saved, checksums=ocp.args.JsonSave(checksums)), metrics=metrics, force=True
        )


def best(manager: ocp.CheckpointManager, evaluated_on: str) -> float:
    """The highest figure of any checkpoint on a set, -inf if none has one."""
    return max((_figure(manager.metrics(step), evaluated_on) for step in manager.all_steps()), default=-math.inf)


def check(manager: ocp.CheckpointManager) -> None:
    """CheckpointError if a save in the background has failed."""
    with _written(manager):
        manager.check_for_errors()


@contextlib.contextmanager
def _written(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Raise any failure to write as a CheckpointError that names the last complete checkpoint."""
    try:
        yield
    except Exception as error:  # OSError, or an exception of TensorStore
        manager.reload()
        kept = f"step {manager.latest_step()}" if manager.latest_step() is not None else "none"
        raise CheckpointError(
            f"cannot write a checkpoint under {manager.directory}: {_first_line(error)}. "
            f"The last complete one is {kept}"
        ) from error


def _read(folder, items: dict) -> tuple[dict, dict[str, int]]:
    """(items of a checkpoint, laid out as their abstract trees; their checksums), read by this process alone.

    Orbax's own `restore` waits for the other processes in each item: if one cannot read its files, all others hang.
    Raises any exception of Orbax if files are missing or damaged.
    """
    restored = {
        name: ocp.StandardCheckpointHandler().restore(folder / name, args=ocp.args.StandardRestore(tree))
        for name, tree in items.items()
    }
    return restored, ocp.JsonCheckpointHandler().restore(folder / "checksums")


def restore_newest(
    manager: ocp.CheckpointManager, abstract_params, abstract_optimizer_state, warn: Callable, final: int | None = None
):
    """(step, params, optimizer state) of the newest readable checkpoint, or (0, None, None) without checkpoints.

    The arrays have the shapes, dtypes and shardings of the abstract trees. The checkpoint of step `final` has no
    optimizer state: None. A checkpoint is damaged if a process cannot read it or a checksum differs. After an older one
    has been read, damaged checkpoints are reported to `warn` and renamed to damaged-STEP; none is deleted.
    CheckpointError if no checkpoint can be read. All processes return the same step.
    """
    failures: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        items = {"params": abstract_params}
        if step != final:
            items["optimizer"] = abstract_optimizer_state
        restored = error = None
        try:
            restored, checksums = _read(manager.directory / str(step), items)
        except Exception as caught:  # there are many kinds of damage
            error = caught.with_traceback(None)  # a traceback would keep the restored arrays alive
        if distributed.any_process(error is not None):
            failures[step] = error or CheckpointError("another process could not read it")
            continue
        # All processes compute the same checksums, so they need not exchange this result.
        if wrong := [name for name in items if int(checksum(restored[name])) != checksums[name]]:
            failures[step] = CheckpointError(
                f"the {' and '.join(wrong)} of step {step} do not have the checksum that was saved with them"
            )
            continue
        for failed, error in failures.items():
            warn(
                f"checkpoint {failed} under {manager.directory} is damaged ({_first_line(error)}): continuing from "
                f"step {step}. The damaged one is now named damaged-{failed}"
            )
            if jax.process_index() == 0:
                _put_aside(paths.path(manager.directory), failed)
        if failures:
            distributed.any_process(False)  # wait for process 0
            manager.reload()
        return step, restored["params"], restored.get("optimizer")
    if failures:
        step, error = next(iter(failures.items()))
        raise CheckpointError(
            f"no checkpoint under {manager.directory} can be read; the newest, {step}: {_first_line(error)}. "
            "Remove the folder to restart this stage"
        ) from error
    return 0, None, None


def _put_aside(folder, step: int) -> None:
    target, n = folder / f"damaged-{step}", 1
    while target.exists():
        target, n = folder / f"damaged-{step}.{n}", n + 1
    if not paths.is_bucket(folder):
        (folder / str(step)).rename(target)
        return
    for name, file in paths.files(folder / str(step)).items():
        paths.copy_file(file, target / name)
    (folder / str(step)).rmtree()


def finish(folder, evaluated_on: str = "") -> None:
    """Keep only the parameters of the last checkpoint, of milestones and of the best one, once a stage has finished."""
    folder = paths.path(folder)
    with open_manager(folder, save_every=1, keep=1, evaluated_on=evaluated_on) as manager:
        infos = [_Info(step, manager.metrics(step)) for step in sorted(manager.all_steps())]
    keep = dict(zip((info.step for info in infos), _Policy(1, evaluated_on).should_preserve(infos, context=None)))
    if jax.process_index() == 0:
        for step, kept in keep.items():
            surplus = folder / str(step) / "optimizer" if kept else folder / str(step)
            if surplus.exists():
                surplus.rmtree() if paths.is_bucket(surplus) else shutil.rmtree(surplus)
    distributed.any_process(False)  # wait for process 0


class _Info(NamedTuple):
    step: int
    metrics: dict | None


def is_finished(folder) -> bool:
    """Whether `finish` is complete in the folder of a stage that has reached its last step."""
    return not any((paths.path(folder) / str(step) / "optimizer").exists() for step in steps(folder))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:1000]


def steps(folder) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order; empty if the folder does not exist."""
    folder = paths.path(folder)
    entries = [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.exists() else []
    # An object store has no rename. There a checkpoint is complete if it has this file.
    return sorted(int(e.name) for e in entries if not paths.is_bucket(e) or (e / "commit_success.txt").exists())


def digest(folder, step: int) -> str:
    """Identifies the parameters of a checkpoint: the checksum that was saved with them, as eight hex digits."""
    try:
        return f"{ocp.JsonCheckpointHandler().restore(paths.path(folder) / str(step) / 'checksums')['params']:08x}"
    except Exception as error:
        raise CheckpointError(f"checkpoint {step} under {folder} cannot be read: {_first_line(error)}") from error


def load_params(folder, step: int, abstract_params):
    """The parameters of the checkpoint of `step`, with the shapes, dtypes and shardings of the abstract tree.

    An array without a sharding goes to the first local device. CheckpointError if they cannot be read or their checksum
    differs; ValueError if they are not finite.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device),
        abstract_params,
    )
    error = None
    try:
        restored, checksums = _read(paths.path(folder) / str(step), {"params": target})
    except Exception as caught:
        error = caught.with_traceback(None)
    shared = any(len(x.sharding.device_set) > jax.local_device_count() for x in jax.tree.leaves(target))
    if distributed.any_process(error is not None) if shared else error:
        error = error or CheckpointError("another process could not read it")
    elif int(checksum(restored["params"])) != checksums["params"]:
        error = CheckpointError("its checksum is wrong")
    else:
        names.check_finite(restored["params"], f"checkpoint {step} under {folder}")
        return restored["params"]
    raise CheckpointError(
        f"checkpoint {step} under {folder} cannot be read: {_first_line(error)}. If it is damaged, train that stage "
        "again or name another of its steps"
    ) from error
