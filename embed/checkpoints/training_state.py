"""Training checkpoints through Orbax: parameters and optimizer state as separate items, saved in the background.

Each checkpoint also holds a checksum of each item's bits, taken on the devices and the same for every sharding, so that a
file that was cut short or has a wrong bit is noticed when it is read, and the checkpoint before it is used.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read."""

    exit_code = 1


@contextlib.contextmanager
def open_manager(folder: Path, *, save_every: int, keep: int) -> Iterator[ocp.CheckpointManager]:
    """A manager that saves every `save_every` steps, keeps the newest `keep`, and finishes each save by a rename.

    Saves that were begun are finished at the end; CheckpointError if one fails, unless another error ended the work.
    """
    manager = ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=save_every,
            max_to_keep=keep,
            enable_async_checkpointing=True,
            create=True,
            cleanup_tmp_directories=True,  # what a killed save left
        ),
    )
    try:
        yield manager
        with _written(manager):
            manager.wait_until_finished()
    finally:
        with contextlib.suppress(Exception):  # has been told, or comes behind the error that matters
            manager.close()


@jax.jit
def checksum(tree) -> jax.Array:
    """uint32 sum of the bits of all arrays, weighted by their place in the tree: any one wrong word changes it."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        total = 31 * total + bits.sum(dtype=jnp.uint32)
    return total


def save(manager: ocp.CheckpointManager, step: int, params, optimizer_state) -> None:
    """Begin to save under `step`, which is newer than all before. CheckpointError as of `check`."""
    sums = {"params": int(checksum(params)), "optimizer": int(checksum(optimizer_state))}
    with _written(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer_state),
                checksums=ocp.args.JsonSave(sums),
            ),
            force=True,
        )


def check(manager: ocp.CheckpointManager) -> None:
    """CheckpointError if a save that was begun has failed."""
    with _written(manager):
        manager.check_for_errors()


@contextlib.contextmanager
def _written(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Any failure to write as a CheckpointError that says what is left."""
    try:
        yield
    except Exception as error:  # OSError, or what TensorStore makes of it
        manager.reload()
        kept = f"step {manager.latest_step()}" if manager.latest_step() is not None else "none"
        raise CheckpointError(
            f"cannot write a checkpoint under {manager.directory}: {_first_line(error)}. The last complete one is {kept}"
        ) from error


def _read(folder, items: dict) -> tuple[dict, dict[str, int]]:
    """(the items of a checkpoint, each laid out as its abstract tree says; their checksums), by this process alone.

    Orbax's own `restore` waits for the other processes in each item, so that one that cannot read its files would leave them
    waiting there. Raises whatever Orbax does where files are missing or damaged.
    """
    found = {
        name: ocp.StandardCheckpointHandler().restore(folder / name, args=ocp.args.StandardRestore(tree))
        for name, tree in items.items()
    }
    return found, ocp.JsonCheckpointHandler().restore(folder / "checksums")


def restore_newest(manager: ocp.CheckpointManager, abstract_params, abstract_optimizer_state, warn: Callable):
    """(step, params, optimizer state) of the newest checkpoint that can be read; (0, None, None) where there is none.

    The arrays are laid out as the abstract trees say (shape, dtype, sharding). One that a process cannot read, or whose
    checksum differs, is told to `warn` and put aside as damaged-STEP, once an older one has been read: nothing is deleted.
    CheckpointError where none can be read. All processes agree on the step.
    """
    items = {"params": abstract_params, "optimizer": abstract_optimizer_state}
    failures: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        found = error = None
        try:
            found, sums = _read(manager.directory / str(step), items)
        except Exception as caught:  # damage has many kinds
            error = caught.with_traceback(None)  # which would hold what was restored
        if _anywhere(error is not None):
            failures[step] = error or CheckpointError("another process could not read it")
            continue
        if wrong := [name for name in items if int(checksum(found[name])) != sums[name]]:  # the same in all processes
            failures[step] = CheckpointError(
                f"the {' and '.join(wrong)} of step {step} do not have the checksum that was saved with them"
            )
            continue
        for failed, error in failures.items():
            warn(
                f"checkpoint {failed} under {manager.directory} is damaged ({_first_line(error)}): continuing from "
                f"step {step}; it was put aside as damaged-{failed}"
            )
            if jax.process_index() == 0:
                _put_aside(Path(manager.directory), failed)
        if failures:
            _anywhere(False)  # wait for process 0
            manager.reload()
        return step, found["params"], found["optimizer"]
    if failures:
        step, error = next(iter(failures.items()))
        raise CheckpointError(
            f"no checkpoint under {manager.directory} can be read; the newest, {step}: {_first_line(error)}. "
            "Remove the folder to start this stage again"
        ) from error
    return 0, None, None


def _put_aside(folder: Path, step: int) -> None:
    target, n = folder / f"damaged-{step}", 1
    while target.exists():
        target, n = folder / f"damaged-{step}.{n}", n + 1
    (folder / str(step)).rename(target)


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(multihost_utils.process_allgather(jnp.asarray(flag)).any()) if jax.process_count() > 1 else flag


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:1000]


def save_params(folder: Path, params) -> None:
    """A checkpoint of parameters alone, as step 0: for `load_params`, not for `restore`."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))


def load_params(folder: Path, abstract_params):
    """The parameters of the newest checkpoint under `folder`, on this process's first device unless told otherwise."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoints at {folder}: train that stage first, or name another")
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{folder} holds no finished checkpoint: train that stage first, or name another")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device),
            abstract_params,
        )
        items = {"params": ocp.args.StandardRestore(target)}
        if checked := (folder / str(step) / "checksums").exists():  # `save_params` writes none
            items["checksums"] = ocp.args.JsonRestore()
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**items))
            if checked and int(checksum(restored["params"])) != restored["checksums"]["params"]:
                raise CheckpointError("its checksum is wrong")
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {step} under {folder} cannot be read: {_first_line(error)}. If it is damaged, train that "
                "stage again: the same command continues from the checkpoint before"
            ) from error
        return restored["params"]
