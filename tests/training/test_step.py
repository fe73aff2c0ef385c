import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import MODEL, Loader, make_step

from embed import config as configs
from embed.models import sharding, transformer
from embed.training import stages
from embed.training.step import make_step as make

PAIR = ConfigDict(
    dict(
        kind="pair",
        matryoshka=(16, 32),
        temperature=0.05,
        margin=0.1,
        batch=dict(groups=2, rows_per_group=2, group_size=3, length=8, spans=4, segments=4),
        execution=dict(microbatches=1),
        optimizer=make_step().stage.optimizer.to_dict(),
    )
)


def of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_what_a_step_takes_and_gives_lies_where_its_shapes_say():
    step, loader = make_step(), Loader()
    params = step.random_params(jax.random.key(0))
    state = step.init(params)
    assert of(params) == of(step.abstract_params) and of(state) == of(step.abstract_state)
    batch = loader.batch(0)
    batch.pop("stats")
    before = params["embedding"]
    params, state, metrics = step(params, state, step.put(batch, loader), 0)
    assert of(params) == of(step.abstract_params) and of(state) == of(step.abstract_state)
    assert before.is_deleted()  # donated
    assert set(metrics) == {"loss", "gradient_norm", "skipped", "accuracy", "masked_nll", "masked", "overflow"}


def test_the_step_that_is_compiled_from_shapes_is_the_one_that_runs():
    """Same program: no second compilation, and the same numbers."""
    step = make_step()
    compiled = step.lower().compile()
    batch = Loader().batch(0)
    batch.pop("stats")
    results = []
    for run in (step, compiled):
        params = step.random_params(jax.random.key(0))
        results.append(run(params, step.init(params), step.put(batch), jnp.int32(0))[2])
    assert {name: float(x) for name, x in results[0].items()} == {name: float(x) for name, x in results[1].items()}


def test_the_batch_that_is_lowered_is_what_the_loader_of_every_kind_makes():
    lowered = make(PAIR, MODEL, make_step().mesh, steps=10, seed=0, mask_id=2).lower()
    (_, _, batch, _), _ = lowered.args_info
    assert {name: x.shape for name, x in batch.items()} == {
        name: s for name, (s, _) in stages.abstract_batch(PAIR).items()
    }


@pytest.mark.parametrize("kind", stages.KINDS)
def test_the_diffusion_stage_alone_has_an_output_layer(kind):
    untied = transformer.make_config("micro", 64, tied=False)
    model = stages.stage_model(kind, untied)
    assert ("head" in transformer.abstract_params(model)) == (kind == "diffusion")
    assert stages.stage_model(kind, MODEL) == MODEL


def test_a_step_of_a_contrastive_stage_has_no_output_layer():
    untied = transformer.make_config("micro", 64, tied=False)
    step = make(PAIR, untied, make_step().mesh, steps=10, seed=0, mask_id=2)
    assert step.model.tied and "head" not in step.abstract_params and "head" not in step.params_sharding


def test_a_mesh_that_leaves_parameters_whole_is_an_error_before_anything_is_compiled():
    mesh = jax.sharding.AbstractMesh((1, 5, 1), sharding.AXES)  # 32 wide: 5 does not divide it
    with pytest.raises(ValueError, match="100.0% of the parameters' bytes stay unsharded"):
        make_step(mesh=mesh)


@pytest.mark.parametrize("name", ["diffusion", "pair", "contextual", "triplet"])
def test_every_stage_of_a_config_can_be_lowered(name):
    config = configs.load("configs/quickstart.py:runlocal")
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    assert (model.vocab_size, model.unroll, model.dense_barrier) == (512, 64, True)
    lowered = make(config.stages[name], model, make_step().mesh, steps=2, seed=0, mask_id=2).lower()
    (params, state, _, k), _ = lowered.args_info
    assert params["embedding"].shape == (512, 32) and params["embedding"].donated and not k.donated


def test_rows_of_whole_and_partial_batches_are_put_where_the_mesh_has_them():
    step, loader = make_step(), Loader()
    batch = loader.batch(3)
    batch.pop("stats")
    for placed in (step.put(batch), step.put(batch, loader)):
        np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
