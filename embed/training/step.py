"""The training step of a stage over a mesh, shardings and jitted function: for the loop, planner and benchmarks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from embed.models import sharding, transformer
from embed.training import stages
from embed.training.optimizer import make_optimizer, wsd_schedule


@dataclasses.dataclass(frozen=True)
class Step:
    """A function (params, optimizer state, batch, k) -> (params, optimizer state, metrics); `make_step` builds it.

    A call donates parameters and state. k is the number of the step, from 0.
    """

    stage: ConfigDict
    model: transformer.TransformerConfig  # of this stage, see `stages.stage_model`
    mesh: Mesh
    steps: int
    seed: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    abstract_params: dict  # shapes, dtypes and shardings
    abstract_state: optax.OptState  # the same, of the optimizer state
    function: Callable  # jitted; the caller must set the mesh

    def __call__(self, params, state, batch: dict, k):
        with jax.set_mesh(self.mesh):  # attention kernels read it
            return self.function(params, state, batch, k, np.uint32(self.seed % 2**32))

    @property
    def params_sharding(self) -> dict:
        return _shardings(self.abstract_params)

    def random_params(self, key: jax.Array) -> dict:
        """Random initial parameters, sharded."""
        init = jax.jit(transformer.init, static_argnums=0, out_shardings=self.params_sharding)
        return init(self.model, key)

    def init(self, params) -> optax.OptState:
        """The initial optimizer state, sharded."""
        return jax.jit(self.optimizer.init, out_shardings=_shardings(self.abstract_state))(params)

    def put(self, batch: dict, loader=None) -> dict:
        """The arrays of a batch, without stats, as global arrays. Without `loader`, `batch` is the whole batch."""
        shards, num_shards = ((0,), 1) if loader is None else (loader.shards, loader.num_shards)
        return sharding.put_batch(self.mesh, batch, shards, num_shards)

    def lower(self) -> jax.stages.Lowered:
        """The step lowered from the shapes of a global batch, to be compiled also for devices that are not here."""
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh, shape[0]))
            for name, (shape, dtype) in stages.abstract_batch(self.stage).items()
        }
        k, seed = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
        with jax.set_mesh(self.mesh):
            return self.function.lower(self.abstract_params, self.abstract_state, batch, k, seed)


def make_step(
    stage,
    model: transformer.TransformerConfig,
    mesh: Mesh,
    *,
    steps: int,
    seed: int,
    mask_id: int,
    left_shift: bool = False,
    loss: Callable | None = None,
) -> Step:
    """The step of a stage that has `steps` steps in total; `loss` replaces the loss of the stage's config.

    ValueError if the mesh leaves too large a share of the parameters unsharded (`sharding.check_sharded`).
    """
    model = stages.stage_model(stage, model)
    settings = stage.optimizer
    schedule = wsd_schedule(settings.learning_rate, steps, settings.warmup, settings.decay)
    optimizer = make_optimizer(settings, schedule)
    params = transformer.abstract_params(model)
    params_sharding = sharding.parameter_shardings(mesh, params)
    sharding.check_sharded(mesh, params, params_sharding)
    state = jax.eval_shape(optimizer.init, params)
    state_sharding = sharding.state_shardings(mesh, state, params_sharding)
    loss = loss or stages.make_loss(stage, model, mask_id, left_shift)
    function = jax.jit(
        make_train_step(loss, optimizer, steps),
        donate_argnums=(0, 1),
        out_shardings=(params_sharding, state_sharding, None),
    )
    return Step(
        stage=stage,
        model=model,
        mesh=mesh,
        steps=steps,
        seed=seed,
        schedule=schedule,
        optimizer=optimizer,
        function=function,
        abstract_params=sharding.with_sharding(params, params_sharding),
        abstract_state=sharding.with_sharding(state, state_sharding),
    )


def make_train_step(loss: Callable, optimizer: optax.GradientTransformation, steps: int) -> Callable:
    """(params, optimizer state, batch, k, seed) -> (params, optimizer state, metrics), to be jitted with donation.

    The seed is an argument, so that runs with other seeds find the compiled program in the cache.

    A step whose loss or gradient is not finite changes no parameter and no moment, and sets `skipped` to 1. The
    optimizer's step counts still advance, so the learning rate stays a function of k.
    """

    def train_step(params, optimizer_state, batch, k, seed):
        key = jax.random.fold_in(jax.random.key(seed), k)
        (value, extra), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key, k / steps)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(gradients, optimizer_state, params)
        new_params = optax.apply_updates(params, updates)

        def keep(new, old):
            return jnp.where(finite | (new.ndim == 0), new, old)

        params, optimizer_state = jax.tree.map(keep, (new_params, new_state), (params, optimizer_state))
        return params, optimizer_state, {"loss": value, "gradient_norm": norm, "skipped": 1 - finite, **extra}

    return train_step


def _shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)
