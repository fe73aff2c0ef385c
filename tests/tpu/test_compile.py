"""Every stage of pplx-embed's config compiles for real TPU topologies, without a TPU. Minutes each: `make test-tpu`."""

import dataclasses
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is here, a TPU is not
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import pytest

from embed import config as configs
from embed.models import sharding, transformer
from embed.training import flops, hlo, plan, stages

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")


def compile_stage(kind, topology, slices=1, **changes):
    """The plan of a stage of the 0.6B config: all of it but the number of layers, which are scanned."""
    config = configs.load(f"configs/pplx_embed.py:size=0.6b,stage={kind}")
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    model = dataclasses.replace(stages.stage_model(kind, model), num_layers=2)
    axes = config.execution.mesh.to_dict() | changes
    return plan.make_plan(config.stages[kind], model, topology, axes, slices=slices), model, config.stages[kind]


@pytest.mark.parametrize("topology", ["v6e:8x8", "v5p:4x4x4"])
@pytest.mark.parametrize("kind", ["diffusion", "pair", "contextual", "triplet"])
def test_a_stage_compiles_and_fits(kind, topology):
    found, model, stage = compile_stage(kind, topology)
    assert found.fits and found.chips == 64
    # The other chips' parts of the parameters come here at least once; the compiler may say it with sums of zeros.
    assert sum(found.collectives.values()) > 2 * transformer.abstract_params(model)["layers"]["gate"].size
    assert found.model_flops * found.chips == pytest.approx(flops.model_flops(stage, model))


def test_a_step_that_the_compiler_finds_no_room_for_does_not_fit_in_its_words():
    with pytest.raises(plan.DoesNotFitError, match=r"does not fit: .*\(.*G\) exceeds available HBM \(15.75G\)"):
        compile_stage("diffusion", "v5e:2x2")


def test_slices_are_joined_along_data_and_only_sums_of_gradients_cross_the_network():
    found, model, _ = compile_stage("diffusion", "v6e:4x4", slices=2, data=2)
    across = {name: size for name, size in found.collectives.items() if hlo.BETWEEN in name}
    shard = found.memory["parameters"]
    assert set(across) == {f"all-reduce {hlo.BETWEEN}"}
    # A chip owns a sixteenth of the parameters in its slice, and sends the gradient of that; of the tied table it
    # sends two, of the lookup and of the output layer.
    assert shard < sum(across.values()) < 2 * shard


def test_fsdp_across_slices_is_refused():
    with pytest.raises(ValueError, match="mesh data=1 must be a multiple of the 2 slices"):
        compile_stage("diffusion", "v6e:4x4", slices=2)


def test_a_mesh_may_split_an_axis_of_the_torus():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5p:8x8x16", platform="tpu").devices
    assert sharding.make_mesh(data=2, fsdp=512, devices=devices).devices.shape == (2, 512, 1)
