"""Training checkpoints through Orbax: parameters and optimizer state as separate items, saved in the background."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


def open_manager(folder: Path, *, save_every: int, keep: int) -> ocp.CheckpointManager:
    """A manager that saves every `save_every` steps, keeps the newest `keep`, and finishes each save by a rename."""
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=save_every, max_to_keep=keep, enable_async_checkpointing=True, create=True
        ),
    )


def save(manager: ocp.CheckpointManager, step: int, params, optimizer_state, *, force: bool = False) -> bool:
    """Save under `step` if the policy says so, or anyway with `force`."""
    if manager.latest_step() == step:
        return False
    return manager.save(
        step,
        args=ocp.args.Composite(params=ocp.args.StandardSave(params), optimizer=ocp.args.StandardSave(optimizer_state)),
        force=force,
    )


def restore(manager: ocp.CheckpointManager, step: int, abstract_params, abstract_optimizer_state):
    """(params, optimizer state) of `step`, laid out as the abstract trees say (shape, dtype, sharding)."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract_params),
            optimizer=ocp.args.StandardRestore(abstract_optimizer_state),
        ),
    )
    return restored["params"], restored["optimizer"]


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
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))["params"]
