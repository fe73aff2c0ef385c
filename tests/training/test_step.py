import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import MODEL, STAGE, Loader, make_step

from embed import config as configs
from embed.models import sharding, transformer
from embed.training import stages
from embed.training.step import make_step as make

PAIR = configs.base().stage(
    "pair",
    matryoshka=(16, 32),
    temperature=0.1,
    batch=dict(length=16, spans=4, segments=4, groups=2, group_size=4, rows_per_group=4),
    optimizer=STAGE.optimizer.to_dict(),
)


def layout(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_inputs_and_outputs_of_a_step_have_its_abstract_shapes_and_shardings():
    step, loader = make_step(), Loader()
    params = step.random_params(jax.random.key(0))
    state = step.init(params)
    assert layout(params) == layout(step.abstract_params) and layout(state) == layout(step.abstract_state)
    batch = loader.batch(0)
    batch.pop("stats")
    before = params["embedding"]
    params, state, metrics = step(params, state, step.put(batch, loader), 0)
    assert layout(params) == layout(step.abstract_params) and layout(state) == layout(step.abstract_state)
    assert before.is_deleted()  # donated
    assert set(metrics) == {"loss", "gradient_norm", "skipped", "accuracy", "masked_nll", "masked", "overflow"}


def test_the_step_compiled_from_shapes_gives_the_same_metrics_as_the_step_that_runs():
    step = make_step()
    compiled = step.lower().compile()
    batch = Loader().batch(0)
    batch.pop("stats")
    results = []
    for run, seed in ((step, ()), (compiled, (jnp.uint32(0),))):
        params = step.random_params(jax.random.key(0))
        results.append(run(params, step.init(params), step.put(batch), jnp.int32(0), *seed)[2])
    assert {name: float(x) for name, x in results[0].items()} == {name: float(x) for name, x in results[1].items()}


def test_the_lowered_batch_has_the_shapes_of_abstract_batch():
    lowered = make(PAIR, MODEL, make_step().mesh, steps=10, seed=0, mask_id=2).lower()
    (_, _, batch, _, _), _ = lowered.args_info
    assert {name: x.shape for name, x in batch.items()} == {
        name: s for name, (s, _) in stages.abstract_batch(PAIR).items()
    }


@pytest.mark.parametrize("kind", stages.KINDS)
def test_a_stage_has_only_the_parameters_and_the_mask_that_it_needs(kind):
    """An output layer if it predicts tokens, a projection for late interaction, a causal mask if its config says so."""
    stage, untied = configs.base().stage(kind), transformer.make_config("micro", 64, tied=False, token_dimensions=7)
    model = stages.stage_model(stage, untied)  # whatever another stage had
    params = transformer.abstract_params(model)
    assert ("head" in params) == (kind in ("causal", "diffusion"))
    assert ("projection" in params) == (kind == "late_interaction")
    assert model.token_dimensions == (128 if kind == "late_interaction" else 0)
    assert model.causal == (kind == "causal")
    if kind not in stages.TEXT:
        stage.attention = "causal"
        assert stages.stage_model(stage, untied).causal


def test_the_parameters_of_a_contrastive_step_have_no_output_layer():
    untied = transformer.make_config("micro", 64, tied=False)
    step = make(PAIR, untied, make_step().mesh, steps=10, seed=0, mask_id=2)
    assert step.model.tied and "head" not in step.abstract_params and "head" not in step.params_sharding


def test_a_mesh_that_leaves_parameters_unsharded_is_an_error_before_compilation():
    mesh = jax.sharding.AbstractMesh((1, 5, 1), sharding.AXES)  # 5 does not divide the width of 32
    with pytest.raises(ValueError, match="100.0% of the parameters' bytes stay unsharded"):
        make_step(mesh=mesh)


@pytest.mark.parametrize("name", ["diffusion", "pair", "contextual", "triplet"])
def test_every_stage_of_a_config_can_be_lowered(name):
    config = configs.load("configs/quickstart.py:runlocal")
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    assert (model.vocab_size, model.unroll, model.dense_barrier) == (512, 64, True)
    lowered = make(config.stages[name], model, make_step().mesh, steps=2, seed=0, mask_id=2).lower()
    (params, state, _, k, _), _ = lowered.args_info
    assert params["embedding"].shape == (512, 32) and params["embedding"].donated and not k.donated


def test_a_batch_put_with_or_without_its_loader_has_the_same_rows():
    step, loader = make_step(), Loader()
    batch = loader.batch(3)
    batch.pop("stats")
    for placed in (step.put(batch), step.put(batch, loader)):
        np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_steps_of_other_seeds_are_the_same_program_and_draw_other_masks():
    steps = [make(STAGE, MODEL, make_step().mesh, steps=12, seed=seed, mask_id=2) for seed in (0, 1, 2**32)]
    programs = [step.lower().as_text() for step in steps]
    assert programs[0] == programs[1] == programs[2]
    batch = Loader().batch(0)
    batch.pop("stats")
    losses = []
    for step in steps:
        params = step.random_params(jax.random.key(0))
        losses.append(float(step(params, step.init(params), step.put(batch), 0)[2]["loss"]))
    assert losses[0] != losses[1] and losses[0] == losses[2]  # a seed is 32 bits
