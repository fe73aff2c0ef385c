"""Where every array lives: one mesh, one short rule table."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from embed.models.attention import HEADS, ROWS

AXES = (*ROWS, HEADS)  # data, fsdp, tensor

# Parameter name -> axes of its dimensions; the first match counts. Arrays under layers/ have a leading layer axis.
RULES = (
    (r"^(embedding|head)$", ("tensor", "fsdp")),  # V D
    (r"^layers/(query|key|value)$", (None, "fsdp", "tensor", None)),  # N D H d
    (r"^layers/output$", (None, "tensor", None, "fsdp")),  # N H d D
    (r"^layers/(gate|up)$", (None, "fsdp", "tensor")),  # N D F
    (r"^layers/down$", (None, "tensor", "fsdp")),  # N F D
    (r"norm$", ()),  # small: replicated
)
BATCH = PartitionSpec(ROWS)  # axis 0 of every array of a batch: rows, or examples


MAX_UNSHARDED = 0.02  # of the parameters' bytes


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one axis may be -1 and takes what is left.

    TPU slices are joined along data alone, whose one sum of gradients a step the data-centre network can bear; fsdp and
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
    else:  # a torus of 8x8x16 holds data=2, fsdp=512 as well
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: explicit axes would have objectives name them.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(data: int, fsdp: int, tensor: int, *, devices: int) -> tuple[int, int, int]:
    """The axes with -1 resolved; ValueError unless they cover so many devices."""
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
    """The NamedSharding of each parameter by RULES; a dimension that its axis does not divide stays whole."""

    def one(path, x):
        name = parameter_name(path)
        for pattern, axes in RULES:
            if re.search(pattern, name):
                axes = [a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes)]
                return NamedSharding(mesh, PartitionSpec(*axes))
        raise ValueError(f"no sharding rule matches parameter {name!r}; add one to embed.models.sharding.RULES")

    return jax.tree_util.tree_map_with_path(one, params)


def check_sharded(mesh: Mesh, params, shardings) -> None:
    """Refuse a mesh that could shard parameters but leaves more than MAX_UNSHARDED of their bytes on every device."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(shardings)))
    whole = sum(x.size * x.dtype.itemsize for x, s in pairs if s.is_fully_replicated)
    total = sum(x.size * x.dtype.itemsize for x, _ in pairs)
    if whole > MAX_UNSHARDED * total:
        raise ValueError(
            f"{whole / total:.1%} of the parameters' bytes stay unsharded on mesh {dict(mesh.shape)}, at most "
            f"{MAX_UNSHARDED:.0%} may: choose fsdp and tensor that divide the model's dimensions"
        )


def with_sharding(tree, shardings):
    """Shapes and dtypes of a tree with shardings: what a checkpoint is restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def state_shardings(mesh: Mesh, state, params_shardings):
    """Shardings of an optimizer state: subtrees shaped like the parameters follow them, the rest is replicated."""
    structure = jax.tree.structure(params_shardings)

    def is_params(x):
        return jax.tree.structure(x) == structure

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: params_shardings if is_params(x) else replicated, state, is_leaf=is_params)


def batch_shards(mesh: Mesh) -> int:
    """How many parts the mesh makes of the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, entries: int) -> NamedSharding:
    """Of an array of a batch with so many entries along axis 0: over (data, fsdp), whole where these do not divide it."""
    return NamedSharding(mesh, PartitionSpec() if entries % batch_shards(mesh) else BATCH)


def own_units(mesh: Mesh, units: int) -> list[int]:
    """Which of `units` equal parts of a batch (its rows, or its packed groups) the devices of this process hold, or hold some of.

    A mesh follows the wires between chips, so the parts of a process need not stand side by side; two processes may hold the same.
    """
    shards = batch_shards(mesh)
    parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    own = {i for (part, *_) in parts for i in range(*part.indices(shards))}
    return sorted({u for s in own for u in range(s * units // shards, -(-(s + 1) * units // shards))})


def put_batch(mesh: Mesh, batch: dict, own=(0,), units: int = 1) -> dict:
    """This process's units of a batch as global arrays, axis 0 over (data, fsdp); `own` of `units`, by default all of one.

    Tables (slots, ids, validity) are sharded by examples as token arrays are by rows; the objectives see them whole.
    """
    shards = batch_shards(mesh)
    place = np.full(units, -1)
    place[list(own)] = np.arange(len(own))

    def put(name, x):
        each = len(x) // len(own)  # rows of a unit
        total = each * units
        where = batch_sharding(mesh, total)
        if name == "tokens" and total % shards:
            raise ValueError(f"{total} rows a batch do not divide over {shards} devices (data x fsdp)")
        if total % shards and len(own) < units:
            raise ValueError(f"{total} entries of {name!r} a batch do not divide over {shards} devices (data x fsdp)")

        def part(index):
            rows = np.arange(total)[index[0]]
            return x[place[rows // each] * each + rows % each]

        return jax.make_array_from_callback((total, *x.shape[1:]), where, part)

    return {name: put(name, x) for name, x in batch.items()}
