"""Parts of a batch, one after the other: gradient caching, gradient accumulation, and the rows of each device."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from embed.models import sharding
from embed.models.attention import HEADS, ROWS


def _microbatches(count: int, rows: int) -> tuple[Callable, Callable]:
    """(split, join): reshape an array [R, …] to `count` microbatches [count, R / count, …], and back.

    Each microbatch takes consecutive rows from every device, so that it stays evenly sharded and, in the diffusion
    stage, has a stratified sample of t.
    """
    if count < 1 or rows % count:
        raise ValueError(f"{rows} rows do not divide into microbatches={count}")
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.gcd(sharding.batch_shards(mesh), rows // count)

    def split(x):
        microbatches = jnp.moveaxis(x.reshape(devices, count, -1, *x.shape[1:]), 1, 0)
        return microbatches.reshape(count, rows // count, *x.shape[1:])

    def join(x):
        return jnp.moveaxis(x.reshape(count, devices, -1, *x.shape[2:]), 0, 1).reshape(rows, *x.shape[2:])

    return split, join


def in_microbatches(function: Callable, count: int, *arrays):
    """function(*arrays) with results [R, …], computed in `count` microbatches of axis 0, one after the other.

    This is gradient caching: the forward pass keeps only the results. The backward pass recomputes the activations of
    one microbatch at a time while it adds up the gradients.
    """
    if count == 1:
        return function(*arrays)
    split, join = _microbatches(count, len(arrays[0]))
    results = jax.lax.map(jax.checkpoint(lambda inputs: function(*inputs)), [split(x) for x in arrays])
    return jax.tree.map(join, results)


def summed_over_microbatches(function: Callable, count: int, params, *arrays):
    """The sum of function(params, *arrays) -> (scalar, metrics) over `count` microbatches of the arrays [R, …].

    This is gradient accumulation, for a loss that is a sum over rows: the forward pass computes the gradient of each
    microbatch while its activations exist, so nothing is computed twice. Only the scalar is differentiable, and only
    with respect to params.
    """
    if count == 1:
        return function(params, *arrays)

    def sum_over(term, params, arrays):
        def add(sums, inputs):
            return jax.tree.map(jnp.add, sums, term(params, *inputs)), None

        shapes = jax.eval_shape(term, params, *(x[0] for x in arrays))
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), arrays)[0]

    total = jax.custom_vjp(functools.partial(sum_over, function))
    total.defvjp(
        functools.partial(sum_over, jax.value_and_grad(function, has_aux=True)),  # (result, gradient as the residual)
        lambda gradients, cotangents: (jax.tree.map(lambda x: cotangents[0] * x, gradients), None),
    )
    split, _ = _microbatches(count, len(arrays[0]))
    return total(params, [split(x) for x in arrays])


@jax.custom_vjp
def _reduce_gradient_early(x):
    """The identity. Its gradient is summed over devices and sharded immediately, not held whole until the optimizer."""
    return x


_reduce_gradient_early.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def on_each_device(function: Callable, arrays: tuple, table):
    """function(*arrays, table) with results [R, …]; each device calls it with its own rows of the arrays [R, …].

    The table [V, D] is gathered from its shards once and its gradient is scattered back once. The partitioner would do
    both in every iteration of a loop inside `function`. Without a mesh in the context this is the plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays, table)
    # The axes by which embed.models.sharding.RULES shards the table.
    axes = [axis if size % mesh.shape[axis] == 0 else None for axis, size in zip((HEADS, ROWS[1]), table.shape)]

    def inner(*inputs):
        *arrays, table = inputs
        for dimension, axis in enumerate(axes):
            if axis:
                table = jax.lax.all_gather(table, axis, axis=dimension, tiled=True)
        return function(*arrays, table)

    rows = PartitionSpec(ROWS)
    specs = (*(rows for _ in arrays), PartitionSpec(*axes))
    return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(
        *arrays, _reduce_gradient_early(table)
    )
