import copy
import dataclasses
import types

import jax
import numpy as np
import pytest

from embed import config as configs
from embed.models import transformer
from embed.training import flops, loop

MODEL = transformer.TransformerConfig(
    vocab_size=100, hidden_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=5, intermediate_size=7
)
DIFFUSION = configs.base().stage("diffusion", batch=dict(rows=2, length=6), execution=dict(logits_chunk=4))
CAUSAL = configs.base().stage("causal", batch=dict(rows=2, length=6), execution=dict(logits_chunk=4))
PAIR = configs.base().stage("pair", matryoshka=(2, 8), batch=dict(groups=1, rows_per_group=2, group_size=3, length=6))
WHOLE = types.SimpleNamespace(shards=[0], num_shards=1)
MESH = jax.sharding.AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))


def sizes(segment_ids, loader=WHOLE):
    ids = np.array(segment_ids, np.int32)
    counts = loop._estimates({"fill": 1.0}, {"segment_ids": ids, "tokens": ids}, loader)
    return counts["tokens"], counts["squares"]


def counted_by_hand(lengths) -> float:
    """Three forward passes of MODEL's layers: all products of each token and of each pair of tokens of a segment."""
    weights = 8 * 4 * 5 + 2 * 8 * 2 * 5 + 4 * 5 * 8 + 3 * 8 * 7  # query, key and value, output, MLP
    total = 0
    for n in lengths:
        for _ in range(n):
            total += 2 * weights * 3
            for _ in range(n):
                total += (2 * 5 + 2 * 5) * 4 * 3  # score and mixed value of each head and layer
    return 3 * total


def test_mfu_counts_tokens_and_pairs_of_tokens_only_inside_segments():
    batch = [[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 0]]  # five segments, two tokens of padding
    lengths = (3, 2, 1, 4)
    assert sizes(batch) == (10, 9 + 4 + 1 + 16)
    layers = counted_by_hand(lengths)
    assert flops.model_flops(DIFFUSION, MODEL, *sizes(batch)) == layers + 3 * 2 * 10 / 2 * 100 * 8  # half is masked
    assert flops.model_flops(PAIR, MODEL, *sizes(batch)) == layers + 3 * 2 * 3 * 6 * (2 + 8)
    whole = flops.model_flops(DIFFUSION, MODEL)
    assert whole == counted_by_hand([6, 6]) + 3 * 2 * 12 / 2 * 100 * 8
    assert flops.model_flops(DIFFUSION, MODEL, *sizes(batch)) < whole
    fixed = configs.base().stage("diffusion", noise="fixed", mask_ratio=0.25, batch=DIFFUSION.batch.to_dict())
    assert flops.model_flops(fixed, MODEL) == counted_by_hand([6, 6]) + 3 * 2 * 12 / 4 * 100 * 8


def test_a_causal_stage_predicts_every_token_and_attends_to_half_of_the_pairs():
    causal = dataclasses.replace(MODEL, causal=True)
    attention = flops.forward_flops(DIFFUSION, MODEL)["attention"]
    parts = flops.forward_flops(CAUSAL, causal)
    assert parts["logits"] == 2 * 12 * 100 * 8 and parts["attention"] == attention / 2


@pytest.mark.parametrize("stage", [DIFFUSION, PAIR])
def test_both_conventions_are_equal_if_each_row_is_one_full_segment(stage):
    assert flops.model_flops(stage, MODEL, *sizes(np.ones((2, 6)))) == flops.model_flops(stage, MODEL)


def test_a_process_extrapolates_its_counts_to_the_global_batch():
    """It has two of four shards, so its sums are half of the batch's."""
    half = types.SimpleNamespace(shards=[0, 3], num_shards=4)
    assert sizes([[1, 1, 2], [1, 0, 0]], half) == (2 * 4, 2 * (4 + 1 + 1))


def test_only_the_hardware_flops_contain_recomputation():
    full = dataclasses.replace(MODEL, remat="full")
    parts = flops.forward_flops(DIFFUSION, MODEL)
    # Each device has one row, which may be masked entirely, so the logits buffer holds all of its tokens.
    assert flops.hardware_flops(DIFFUSION, MODEL, MESH) == pytest.approx(
        flops.model_flops(DIFFUSION, MODEL) + 3 * parts["logits"]
    )
    again = flops.hardware_flops(DIFFUSION, full, MESH) - flops.hardware_flops(DIFFUSION, MODEL, MESH)
    assert again == pytest.approx(parts["layers"] + parts["attention"])
    cached = copy.deepcopy(PAIR)
    cached.execution.microbatches = 2
    assert [flops.passes(s, m) for s in (PAIR, cached) for m in (MODEL, full)] == [3, 4, 4, 5]
    assert flops.model_flops(DIFFUSION, full) == flops.model_flops(DIFFUSION, MODEL)


def test_late_interaction_compares_every_token_of_a_query_with_every_token_of_a_document():
    batch = PAIR.batch.to_dict() | dict(max_query_tokens=2, max_document_tokens=5)
    late = configs.base().stage("late_interaction", token_dimensions=4, batch=batch)
    parts, pair = flops.forward_flops(late, MODEL), flops.forward_flops(PAIR, MODEL)
    assert (parts["layers"], parts["attention"]) == (pair["layers"], pair["attention"])
    assert parts["projection"] == 2 * 12 * 8 * 4  # 12 tokens of width 8
    assert parts["similarity"] == 2 * 3 * 3 * 2 * 5 * 4


def test_known_devices_have_a_peak_and_unknown_ones_none(monkeypatch):
    def named(kind):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
        return flops.device_peak()

    assert named("TPU v5p") == 459e12 and named("NVIDIA H100 80GB HBM3") == 989e12 and named("TPU v99") is None


def test_flops_match_the_compilers_count_of_an_unrolled_forward_pass():
    model = transformer.make_config("micro", 512, unroll=2)
    stage = configs.load("configs/quickstart.py:runlocal").stages.pair
    length, rows = stage.batch.length, stage.batch.groups * stage.batch.rows_per_group
    array = jax.ShapeDtypeStruct((rows, length), np.int32)
    forward = jax.jit(lambda p, t, s, q: transformer.apply(model, p, t, s, q))
    compiled = forward.lower(transformer.abstract_params(model), array, array, array).compile()
    ours = flops.forward_flops(stage, model)
    counted = compiled.cost_analysis()["flops"]
    # The compiler also counts element-wise operations.
    assert 0.75 * counted < ours["layers"] + ours["attention"] < counted
