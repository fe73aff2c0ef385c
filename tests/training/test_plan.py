import dataclasses

import jax
import pytest

from embed import config as configs
from embed.cli import plan as plan_verb
from embed.cli.common import run
from embed.models import sharding, transformer
from embed.objectives import masked_diffusion
from embed.training import flops, plan


@pytest.mark.parametrize("topology", ["v6e", "v9:2x2", "v6e:2", "v6e:axb"])
def test_an_unknown_topology_is_an_error(topology):
    with pytest.raises(ValueError, match="must be CHIP:AxB or CHIP:AxBxC with a chip of v4, v5e, v5p, v6e"):
        plan.parse_topology(topology)
    assert plan.parse_topology("v5p:4x4x8") == ("v5p", 128)


GOLDEN = {
    "embedding": ("tensor", "fsdp"),
    "layers/attention_norm": (),
    "layers/down": (None, "tensor", "fsdp"),
    "layers/gate": (None, "fsdp", "tensor"),
    "layers/key": (None, "fsdp", "tensor", None),
    "layers/key_norm": (),
    "layers/mlp_norm": (),
    "layers/output": (None, "tensor", None, "fsdp"),
    "layers/query": (None, "fsdp", "tensor", None),
    "layers/query_norm": (),
    "layers/up": (None, "fsdp", "tensor"),
    "layers/value": (None, "fsdp", "tensor", None),
    "norm": (),
}


@pytest.mark.parametrize("size", ["0.6b", "4b"])
@pytest.mark.parametrize(
    "topology, axes", [("v6e:8x8", dict(data=1, fsdp=64, tensor=1)), ("v5p:4x4x8", dict(data=4, fsdp=16, tensor=2))]
)
def test_every_tensor_of_the_real_sizes_has_the_golden_sharding(size, topology, axes):
    model = transformer.make_config(size, 151936)
    mesh = jax.sharding.AbstractMesh(
        sharding.mesh_sizes(**axes, devices=plan.parse_topology(topology)[1]), sharding.AXES
    )
    params = transformer.abstract_params(model)
    shardings = sharding.parameter_shardings(mesh, params)
    got = {sharding.parameter_name(p): tuple(s.spec) for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    assert got == GOLDEN
    sharding.check_sharded(mesh, params, shardings)
    assert plan.parameter_table(model, topology, axes).count("\n") == 2 + len(GOLDEN)


def test_a_mesh_that_leaves_parameters_unsharded_is_an_error():
    model = transformer.make_config("micro", 512)  # 5 does not divide its width of 32
    mesh = jax.sharding.AbstractMesh((1, 5, 1), sharding.AXES)
    params = transformer.abstract_params(model)
    with pytest.raises(ValueError, match="100.0% of the parameters' bytes stay unsharded on mesh .*'fsdp': 5"):
        sharding.check_sharded(mesh, params, sharding.parameter_shardings(mesh, params))


PLAN = plan.Plan(
    chips=4,
    slices=2,
    shards=4,
    chip=flops.CHIPS["v6e"],
    memory={"parameters": 20e9, "program": 13e9},
    model_flops=1e12,
    hardware_flops=918e12,
    hbm=1.64e12 * 2,
    collectives={"all-gather": 448e9 * 0.5, "all-reduce between slices": 12.5e9 * 0.25},
    tokens=1000,
    compile_seconds=1,
)


def test_a_plan_says_what_bounds_its_step_and_whether_it_fits():
    assert not PLAN.fits and PLAN.bounds == {"compute": 1.0, "HBM": 2.0, "interconnect": 0.5, "network": 0.25}
    config = configs.load("configs/quickstart.py:runlocal")
    model = transformer.make_config("micro", 512)
    text = plan.describe(PLAN, config.stages.pair, model, 100, 0.5, 2.0)
    assert text.startswith("4 chips in 2 slices, 16 rows of 128 tokens in 4 shards; ")
    assert "does not fit: 33.00 of 32 GB per chip, 1.00 GB over" in text
    assert "three forward passes over full rows, with padding and attention between segments" in text
    assert "least step time: 2.000 s, bound by HBM" in text and "dollars at 2.0 per chip hour" in text
    assert dataclasses.replace(PLAN, memory={"parameters": 1e9}).fits


@pytest.mark.parametrize("needed", [4, 16])
def test_fit_skips_plans_that_the_compiler_refuses_and_says_if_none_fits(monkeypatch, capsys, needed):
    def make_plan(stage, *arguments, **keywords):
        if stage.execution.microbatches < needed:
            raise plan.DoesNotFitError("does not fit: used 40G of 32G hbm")
        return dataclasses.replace(PLAN, memory={"parameters": 1e9})

    monkeypatch.setattr(plan, "make_plan", make_plan)
    arguments = ["--config=configs/pplx_embed.py:stage=pair", "--topology=v6e:4x4"]
    code = run(plan_verb.main, [*arguments, "--fit"])
    printed = capsys.readouterr()
    assert "microbatches 1, remat none: does not fit: used 40G of 32G hbm" in printed.out
    if needed == 4:
        assert code == 0 and "\nconfigs/pplx_embed.py:stage=pair on v6e:4x4, microbatches 4, remat" in printed.out
    else:
        assert code == 1 and "of these 12 plans fits on v6e:4x4" in printed.err
    assert run(plan_verb.main, arguments) == 1  # one microbatch, as configured
    assert "embed: error: does not fit: used 40G of 32G hbm" in capsys.readouterr().err


def test_a_plan_that_masks_more_tokens_than_the_logits_buffer_holds_is_an_error(monkeypatch):
    stage = configs.load("configs/quickstart.py").stages.diffusion  # 32 rows of 128 tokens
    for shards, microbatches in ((1, 1), (32, 1), (4, 8), (4, 2)):
        stage.execution.microbatches = microbatches
        plan.check_capacity(stage, shards)
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_, **__: 0.55)
    with pytest.raises(
        ValueError, match=r"\d+ masked tokens in a device's 4 rows exceed the capacity of 281 .*microbatches=2"
    ):
        plan.check_capacity(stage, 4)


def test_rows_that_do_not_divide_into_devices_and_microbatches_are_an_error():
    stage = configs.load("configs/quickstart.py").stages.diffusion
    stage.execution.microbatches = 3
    with pytest.raises(ValueError, match="32 rows per batch do not divide into 4 devices .* times microbatches=3"):
        plan.check_capacity(stage, 4)
