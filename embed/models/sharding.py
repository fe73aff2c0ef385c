"""The sharding of every array: one mesh and one short table of rules."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from embed.models.attention import HEADS, ROWS

AXES = (*ROWS, HEADS)  # data, fsdp, tensor

# Parameter name -> axes of its dimensions; the first match applies. Arrays under layers/ have a leading layer axis.
RULES = (
    (r"^(embedding|head)$", ("tensor", "fsdp")),  # V D
    (r"^layers/(query|key|value)$", (None, "fsdp", "tensor", None)),  # N D H d
    (r"^layers/output$", (None, "tensor", None, "fsdp")),  # N H d D
    (r"^layers/(gate|up)$", (None, "fsdp", "tensor")),  # N D F
    (r"^layers/down$", (None, "tensor", "fsdp")),  # N F D
    (r"^projection$", ("fsdp", None)),  # D P
    (r"norm$", ()),  # small: replicated
)
BATCH = PartitionSpec(ROWS)  # axis 0 of every array of a batch: rows, or examples
MAX_UNSHARDED = 0.02  # of the parameters' bytes


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices. One axis may be -1 and takes the remaining devices.

    TPU slices are joined along data only: the data-center network can carry its one sum of gradients per step. fsdp and
    tensor stay inside a slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, devices=len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and devices[0].platform == "tpu":
        if sizes[0] % slices:
            raise ValueError(
                f"mesh data={sizes[0]} must be a multiple of the {slices} slices: fsdp and tensor do not cross the "
                "network between slices"
            )
        inside, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    else:  # splitting physical axes also allows data=2, fsdp=512 on a torus of 8x8x16
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: with explicit axes, objectives would have to name them.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(data: int, fsdp: int, tensor: int, *, devices: int) -> tuple[int, int, int]:
    """The axis sizes with -1 resolved. ValueError unless they cover exactly `devices` devices."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if math.prod(sizes) != devices or min(sizes) < 1:
        named = ", ".join(f"{a}={s}" for a, s in zip(AXES, (data, fsdp, tensor)))
        raise ValueError(f"mesh {named} does not cover {devices} devices; one axis may be -1")
    return tuple(sizes)


def parameter_name(path) -> str:
    """The name of a leaf of a parameter tree, `layers/query`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def parameter_shardings(mesh: Mesh, params):
    """The NamedSharding of each parameter by RULES. A dimension that its axis does not divide stays unsharded."""

    def one(path, x):
        name = parameter_name(path)
        for pattern, axes in RULES:
            if re.search(pattern, name):
                axes = [a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes)]
                return NamedSharding(mesh, PartitionSpec(*axes))
        raise ValueError(f"no sharding rule matches parameter {name!r}; add one to embed.models.sharding.RULES")

    return jax.tree_util.tree_map_with_path(one, params)


def check_sharded(mesh: Mesh, params, shardings) -> None:
    """ValueError if a mesh with fsdp or tensor leaves more than MAX_UNSHARDED of the parameters' bytes unsharded."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(shardings)))
    whole = sum(x.size * x.dtype.itemsize for x, s in pairs if s.is_fully_replicated)
    total = sum(x.size * x.dtype.itemsize for x, _ in pairs)
    if whole > MAX_UNSHARDED * total:
        raise ValueError(
            f"{whole / total:.1%} of the parameters' bytes stay unsharded on mesh {dict(mesh.shape)}; at most "
            f"{MAX_UNSHARDED:.0%} may, so choose fsdp and tensor that divide the model's dimensions"
        )


def with_sharding(tree, shardings):
    """The shapes and dtypes of a tree with shardings, as restoring a checkpoint requires."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def state_shardings(mesh: Mesh, state, params_shardings):
    """The shardings of an optimizer state: the parameters' own for subtrees with their structure, else replicated."""
    structure = jax.tree.structure(params_shardings)

    def is_params(x):
        return jax.tree.structure(x) == structure

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: params_shardings if is_params(x) else replicated, state, is_leaf=is_params)


def batch_shards(mesh: Mesh) -> int:
    """The number of shards into which the mesh divides the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, entries: int) -> NamedSharding:
    """The sharding of a batch array with `entries` along axis 0: (data, fsdp) if these divide it, else replicated."""
    return NamedSharding(mesh, PartitionSpec() if entries % batch_shards(mesh) else BATCH)


def local_shards(mesh: Mesh, num_shards: int) -> list[int]:
    """The indices of the shards that this process must build, of a batch in `num_shards` equal shards (rows or groups).

    These are all shards of which a device of this process holds a part. They need not be neighbors, because a mesh
    follows the wires between chips. Two processes may need the same shard.
    """
    mesh_shards = batch_shards(mesh)
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((mesh_shards,)).values()
    held = {i for (index, *_) in indices for i in range(*index.indices(mesh_shards))}
    ends = [(i * num_shards // mesh_shards, -(-(i + 1) * num_shards // mesh_shards)) for i in held]
    return sorted({shard for start, stop in ends for shard in range(start, stop)})


def put_batch(mesh: Mesh, batch: dict, shards=(0,), num_shards: int = 1) -> dict:
    """A batch as global arrays, sharded along axis 0 over (data, fsdp).

    `batch` holds the shards with these indices, one after the other, of `num_shards` in all; by default it is the whole
    batch. Tables (slots, ids, validity) are sharded by examples as token arrays are by rows; objectives see them whole.
    """
    mesh_shards = batch_shards(mesh)
    offset = np.full(num_shards, -1)
    offset[list(shards)] = np.arange(len(shards))

    def put(name, x):
        size = len(x) // len(shards)  # of a shard
        total = size * num_shards
        if total % mesh_shards and name == "tokens":
            raise ValueError(f"{total} rows per batch do not divide over {mesh_shards} devices (data x fsdp)")
        if total % mesh_shards and len(shards) < num_shards:
            raise ValueError(
                f"{total} entries of {name!r} per batch do not divide over {mesh_shards} devices (data x fsdp)"
            )

        def block(index):
            rows = np.arange(total)[index[0]]
            return x[offset[rows // size] * size + rows % size]

        return jax.make_array_from_callback((total, *x.shape[1:]), batch_sharding(mesh, total), block)

    return {name: put(name, x) for name, x in batch.items()}
