"""Every stage of pplx-embed's config compiles for TPU topologies, without a TPU. `make test-tpu`, minutes per test."""

import dataclasses
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is installed but there is no TPU
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import pytest

from embed import config as configs
from embed.models import sharding, transformer
from embed.training import flops, hlo, plan, stages

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")


def compile_stage(kind, topology, slices=1, **changes):
    """(plan, model, stage) of the 0.6B config with two layers: they are scanned, so more compile to the same loop."""
    config = configs.load("configs/pplx_embed.py:size=0.6b").unlock()
    config.stages.causal = configs.base().stage("causal", batch=config.stages.diffusion.batch.to_dict())
    config.stages.causal_pair = config.stages.pair.copy_and_resolve_references()
    config.stages.causal_pair.update(attention="causal", pooling="last")
    stage = config.stages[kind]
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    model = dataclasses.replace(stages.stage_model(stage, model), num_layers=2)
    axes = config.execution.mesh.to_dict() | changes
    return plan.make_plan(stage, model, topology, axes, slices=slices), model, stage


@pytest.mark.parametrize("topology", ["v6e:8x8", "v5p:4x4x4"])
@pytest.mark.parametrize("kind", ["causal", "diffusion", "pair", "causal_pair", "contextual", "triplet"])
def test_a_stage_compiles_and_fits(kind, topology):
    result, model, stage = compile_stage(kind, topology)
    assert result.fits and result.chips == 64
    # A chip gathers the other chips' shards of the parameters at least once, possibly as all-reduces with zeros.
    assert sum(result.collectives.values()) > 2 * transformer.abstract_params(model)["layers"]["gate"].size
    assert result.model_flops * result.chips == pytest.approx(flops.model_flops(stage, model))


def test_a_step_that_exceeds_the_memory_is_refused_with_the_compilers_message():
    with pytest.raises(plan.DoesNotFitError, match=r"does not fit: .*\(.*G\) exceeds available HBM \(15.75G\)"):
        compile_stage("diffusion", "v5e:2x2")


def test_slices_are_joined_along_data_and_only_sums_of_gradients_cross_the_network():
    result, model, _ = compile_stage("diffusion", "v6e:4x4", slices=2, data=2)
    across = {name: size for name, size in result.collectives.items() if hlo.BETWEEN in name}
    shard = result.memory["parameters"]
    assert set(across) == {f"all-reduce {hlo.BETWEEN}"}
    # A chip has a sixteenth of the parameters of its slice and sends the gradient of that shard. For the tied table it
    # sends two gradients: of the lookup and of the output layer.
    assert shard < sum(across.values()) < 2 * shard


def test_fsdp_across_slices_is_an_error():
    with pytest.raises(ValueError, match="mesh data=1 must be a multiple of the 2 slices"):
        compile_stage("diffusion", "v6e:4x4", slices=2)


def test_a_mesh_may_split_an_axis_of_the_torus():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5p:8x8x16", platform="tpu").devices
    assert sharding.make_mesh(data=2, fsdp=512, devices=devices).devices.shape == (2, 512, 1)
