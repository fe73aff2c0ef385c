import dataclasses
import textwrap

import jax
import numpy as np
import pytest

from embed import config as configs
from embed.cli import plan as plan_verb
from embed.cli.common import run
from embed.models import sharding, transformer
from embed.training import plan

HLO = textwrap.dedent(
    """
    HloModule jit_step

    %add (a: f32[], b: f32[]) -> f32[] {
      ROOT %sum = f32[] add(%a, %b)
    }

    %body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
      %gathered = bf16[32,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
      %called = f32[4] custom-call(%y), frontend_attributes={kernel_metadata={
      "block": 128
      }}, metadata={op_name="not the end of the computation"}
      %sent = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
      ROOT %out = (s32[], bf16[8,4]) tuple(%i, %x)
    }

    %condition (p: (s32[], bf16[8,4])) -> pred[] {
      %limit = s32[]{:T(128)} constant(5)
      ROOT %less = pred[] compare(%i, %limit), direction=LT
    }

    %outer (p: (s32[])) -> (s32[]) {
      %inner = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body
      ROOT %r = (s32[]) tuple(%i)
    }

    %outer_condition (p: (s32[])) -> pred[] {
      ROOT %less = pred[] compare(%i, %n), direction=LT
    }

    ENTRY %main (a: f32[16]) -> f32[16] {
      %loop = (s32[]) while(%u), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
      %two = (f32[16]{0}, bf16[8]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
      %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%part), replica_groups=[1,8]<=[8], dimensions={0}
      %part = f32[2]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
      ROOT %all = f32[16]{0} all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
    }
    """
)


def test_collectives_are_counted_by_kind_times_the_trips_of_their_loops():
    got = plan.collective_bytes(HLO, 8)
    assert got == {
        "all-gather": 3 * 5 * 32 * 4 * 2 * 3 / 4 + 16 * 4 * 7 / 8,  # groups of four chips in the loops
        "collective-permute": 3 * 5 * 8 * 4 * 2,
        "reduce-scatter": 2 * 8 * 4 * 7 / 8,  # its result is an eighth of what is reduced
        "all-reduce": 16 * 4 * 2 * 3 / 4 + (16 * 4 + 8 * 2) * 2 / 2,
    }


def test_what_slices_exchange_is_counted_apart():
    """Not as collectives: they stand in a slice's program as transfers through its hosts."""
    sent = (
        "%send = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    local = "%other = (f32[9], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true"
    hlo = HLO.replace("  ROOT %all =", f"  {sent}\n  {local}\n  ROOT %all =")
    got = plan.collective_bytes(hlo, 8, slices=4)
    assert got.pop("all-reduce between slices") == 2 * 8 * 128 * 4 * 2 * 3 / 4
    assert got == plan.collective_bytes(HLO, 8)


def test_a_program_compiled_for_eight_devices_moves_what_its_arrays_hold():
    """On real text of the compiler: a gather in a loop of seven turns, and a sum over devices behind it."""
    import os
    import subprocess
    import sys

    program = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from embed.models import sharding
        from embed.training import plan
        mesh = sharding.make_mesh(data=1, fsdp=8)
        w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
        def f(w, x):
            whole = NamedSharding(mesh, P())
            def turn(c, _):
                return c + jnp.tanh(x @ jax.lax.with_sharding_constraint(w + c, whole)).sum(), None
            return jax.lax.scan(turn, 0.0, None, length=7)[0]
        text = jax.jit(f).lower(w, x).compile().as_text()
        print(plan.collective_bytes(text, 8))
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=True
    )
    got = eval(done.stdout)  # a dict that this test printed
    assert got["all-gather"] in (7 * 64 * 32 * 4 * 7 / 8, 64 * 32 * 4 * 7 / 8)  # in the loop, or moved out of it
    assert got["all-reduce"] in (7 * 4 * 2 * 7 / 8, 4 * 2 * 7 / 8)


@pytest.mark.parametrize("topology", ["v6e", "v9:2x2", "v6e:2", "v6e:axb"])
def test_a_topology_that_does_not_exist_is_an_error(topology):
    with pytest.raises(ValueError, match="must be CHIP:AxB or CHIP:AxBxC with a chip of v4, v5e, v5p, v6e"):
        plan.parse_topology(topology)
    assert plan.parse_topology("v5p:4x4x8") == ("v5p", 128)


def test_flops_are_those_that_the_compiler_counts_in_an_unrolled_forward_pass():
    model = transformer.make_config("micro", 512, unroll=2)
    stage = configs.load("configs/quickstart.py:runlocal").stages.pair
    length, rows = stage.batch.length, stage.batch.groups * stage.batch.rows_per_group
    array = jax.ShapeDtypeStruct((rows, length), np.int32)
    forward = jax.jit(lambda p, t, s, q: transformer.apply(model, p, t, s, q))
    compiled = forward.lower(transformer.abstract_params(model), array, array, array).compile()
    ours = plan.forward_flops(stage, model)
    counted = compiled.cost_analysis()["flops"]
    # The compiler counts the element-wise operations as well.
    assert 0.75 * counted < ours["layers"] + ours["attention"] < counted


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
def test_every_tensor_of_the_real_sizes_is_sharded_as_written(size, topology, axes):
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


def test_a_mesh_that_leaves_parameters_whole_is_an_error():
    model = transformer.make_config("micro", 512)  # 32 wide: 5 does not divide it
    mesh = jax.sharding.AbstractMesh((1, 5, 1), sharding.AXES)
    params = transformer.abstract_params(model)
    with pytest.raises(ValueError, match="100.0% of the parameters' bytes stay unsharded on mesh .*'fsdp': 5"):
        sharding.check_sharded(mesh, params, sharding.parameter_shardings(mesh, params))


PLAN = plan.Plan(
    chips=4, slices=2, shards=4, chip=plan.CHIPS["v6e"], memory={"parameters": 20e9, "program": 13e9}, model_flops=1e12,
    hardware_flops=918e12, hbm=1.64e12 * 2, collectives={"all-gather": 448e9 * 0.5, "all-reduce between slices": 12.5e9 * 0.25}, tokens=1000, compile_seconds=1,
)  # fmt: skip


def test_a_plan_says_what_binds_it_and_whether_it_fits():
    found = PLAN
    assert not found.fits and found.bounds == {"compute": 1.0, "HBM": 2.0, "interconnect": 0.5, "network": 0.25}
    config = configs.load("configs/quickstart.py:runlocal")
    model = transformer.make_config("micro", 512)
    text = plan.describe(found, config.stages.pair, model, 100, 0.5, 2.0)
    assert text.startswith("4 chips in 2 slices, ")
    assert "does not fit: 33.00 of 32 GB a chip, 1.00 GB too many" in text
    assert "least step time: 2.000 s, bound by HBM" in text and "dollars at 2.0 a chip hour" in text
    assert dataclasses.replace(found, memory={"parameters": 1e9}).fits


@pytest.mark.parametrize("needed", [4, 16])
def test_fit_passes_over_what_the_compiler_refuses_and_says_where_nothing_fits(monkeypatch, capsys, needed):
    def make_plan(stage, *arguments, **keywords):
        if stage.microbatches < needed:
            raise plan.DoesNotFitError("does not fit: used 40G of 32G hbm")
        return dataclasses.replace(PLAN, memory={"parameters": 1e9})

    monkeypatch.setattr(plan, "make_plan", make_plan)
    arguments = ["--config=configs/qwen3.py:stage=pair", "--topology=v6e:4x4"]
    code = run(plan_verb.main, [*arguments, "--fit"])
    printed = capsys.readouterr()
    assert "microbatches 1, remat none: does not fit: used 40G of 32G hbm" in printed.out
    if needed == 4:
        assert code == 0 and "\nconfigs/qwen3.py:stage=pair on v6e:4x4, microbatches 4, remat" in printed.out
    else:
        assert code == 1 and "of these 12 plans fits on v6e:4x4" in printed.err
    assert run(plan_verb.main, arguments) == 1  # one microbatch, as configured
    assert "embed: error: does not fit: used 40G of 32G hbm" in capsys.readouterr().err
