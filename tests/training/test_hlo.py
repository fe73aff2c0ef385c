import os
import subprocess
import sys
import textwrap

from embed.training import hlo

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


def test_collectives_are_counted_by_kind_times_the_trip_counts_of_their_loops():
    got = hlo.collective_bytes(HLO, 8)
    assert got == {
        "all-gather": 3 * 5 * 32 * 4 * 2 * 3 / 4 + 16 * 4 * 7 / 8,  # groups of four chips in the loops
        "collective-permute": 3 * 5 * 8 * 4 * 2,
        "reduce-scatter": 2 * 8 * 4 * 7 / 8,  # its result is an eighth of its operand
        "all-reduce": 16 * 4 * 2 * 3 / 4 + (16 * 4 + 8 * 2) * 2 / 2,
    }


def test_traffic_between_slices_is_counted_separately():
    """The program of a slice contains it as transfers through the hosts, not as collectives."""
    sent = (
        "%send = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    local = "%other = (f32[9], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true"
    text = HLO.replace("  ROOT %all =", f"  {sent}\n  {local}\n  ROOT %all =")
    got = hlo.collective_bytes(text, 8, slices=4)
    assert got.pop("all-reduce between slices") == 2 * 8 * 128 * 4 * 2 * 3 / 4
    assert got == hlo.collective_bytes(HLO, 8)


def test_a_program_compiled_for_eight_devices_sends_the_bytes_of_its_arrays():
    """Real output of the compiler: a gather in a loop of seven iterations, followed by a sum over devices."""
    program = """
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from embed.models import sharding
        from embed.training import hlo
        mesh = sharding.make_mesh(data=1, fsdp=8)
        w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
        def f(w, x):
            whole = NamedSharding(mesh, P())
            def turn(c, _):
                return c + jnp.tanh(x @ jax.lax.with_sharding_constraint(w + c, whole)).sum(), None
            return jax.lax.scan(turn, 0.0, None, length=7)[0]
        text = jax.jit(f).lower(w, x).compile().as_text()
        print(hlo.collective_bytes(text, 8))
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=True
    )
    got = eval(done.stdout)  # a dict that this test printed
    assert got["all-gather"] in (7 * 64 * 32 * 4 * 7 / 8, 64 * 32 * 4 * 7 / 8)  # in the loop, or moved out of it
    assert got["all-reduce"] in (7 * 4 * 2 * 7 / 8, 4 * 2 * 7 / 8)
