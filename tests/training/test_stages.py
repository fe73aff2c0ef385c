import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ml_collections import ConfigDict

from embed.data import store as stores
from embed.models import transformer
from embed.objectives import masked_diffusion
from embed.training import stages

MODEL = transformer.make_config("micro", 64)
R, L, N, S = 16, 24, 32, 4
T = 40  # dimensions of the teacher
STAGE = dict(
    matryoshka=(16, 32),
    temperature=0.05,
    margin=0.1,
    alpha=0.2,
    beta=(0.2, 0.5),
    cosine=1.0,
    mse=0.5,
    kl=2.0,
    batch=dict(length=L, spans=S, segments=S),
)


@functools.cache
def batch() -> dict:
    """R rows of three texts and padding, with the slots and ids of every contrastive stage."""
    rng = np.random.default_rng(0)
    two = np.arange(2 * N).reshape(N, 2)
    arrays = dict(
        tokens=rng.integers(4, 64, (R, L)),
        segment_ids=np.repeat([[1, 2, 3, 0]], R, 0).repeat(6, 1),
        positions=np.tile(np.arange(6), (R, 4)),
        span_ids=np.repeat([[1, 2, 3, 0]], R, 0).repeat(6, 1),
        query_slots=np.arange(N) // 2 * S + np.arange(N) % 2,
        document_slots=np.arange(N) // 2 * S + 2,
        query_ids=np.arange(N),
        document_ids=np.arange(N) // 2,
        valid=np.arange(N) != 3,
        negative_slots=two % (S * R),
        negative_ids=two % 40,
        negative_valid=two % 5 != 0,
        chunk_slots=np.arange(N) // 2 * S + 1 + np.arange(N) % 2,
        chunk_ids=np.arange(N) // 2 + 100,
        chunk_document=np.arange(N) // 4,
        chunk_valid=np.arange(N) != 6,
        positive=np.arange(N) // 2 * 2,
        slots=np.arange(N) // 2 * S + np.arange(N) % 2,
        ids=np.arange(N) // 2,
    )
    arrays = {k: v.astype(bool if "valid" in k else np.int32) for k, v in arrays.items()}
    return arrays | {"teacher": rng.normal(size=(N, T)).astype(np.float32)}


@functools.cache
def params():
    return transformer.init(MODEL, jax.random.key(0))


def loss_of(kind, microbatches, model=MODEL):
    stage = ConfigDict(STAGE | {"kind": kind, "execution": {"microbatches": microbatches}})
    loss = stages.make_loss(stage, model, mask_id=2)
    return lambda params, batch: loss(params, batch, jax.random.key(0), 0.5)[0]


@pytest.mark.parametrize("microbatches", [2, 4, 16])
@pytest.mark.parametrize("kind", ["pair", "contextual", "triplet", "distill"])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(kind, microbatches):
    whole = jax.jit(jax.value_and_grad(loss_of(kind, 1)))(params(), batch())
    cached = jax.jit(jax.value_and_grad(loss_of(kind, microbatches)))(params(), batch())
    np.testing.assert_allclose(cached[0], whole[0], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(cached[1]), jax.tree.leaves(whole[1])):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_gradient_accumulation_has_another_gradient_than_gradient_caching():
    """The negative control: with accumulation, the queries of each part see fewer negatives."""
    whole = jax.jit(jax.grad(loss_of("pair", 1)))(params(), batch())

    def accumulated(params):
        losses = []
        for i in range(2):
            rows, examples = slice(i * R // 2, (i + 1) * R // 2), slice(i * N // 2, (i + 1) * N // 2)
            part = {k: v[rows] if v.shape == (R, L) else v[examples] for k, v in batch().items()}
            part |= {k: part[k] - i * R // 2 * S for k in ("query_slots", "document_slots")}
            losses.append(loss_of("pair", 1)(params, part))
        return sum(losses) / 2

    other = jax.jit(jax.grad(accumulated))(params())
    a, b = (np.asarray(g["layers"]["gate"]) for g in (whole, other))
    assert np.abs(a - b).max() > 0.05 * np.abs(a).max()


def test_only_the_activations_of_one_microbatch_are_held():
    """The memory of the compiled gradient depends on the size of a microbatch, not of the batch."""
    wide = transformer.make_config("micro", 64, num_layers=4, intermediate_size=512)
    shapes = transformer.abstract_params(wide)

    def memory(microbatches, copies):
        arrays = {
            k: jax.ShapeDtypeStruct((v.shape[0] * copies if v.shape == (R, L) else v.shape[0], *v.shape[1:]), v.dtype)
            for k, v in batch().items()
        }
        compiled = jax.jit(jax.grad(loss_of("pair", microbatches, wide))).lower(shapes, arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8, 8) < memory(1, 8) / 4
    assert memory(32, 32) < 2 * memory(8, 8)


def test_distillation_is_the_weighted_sum_of_its_losses_on_each_prefix():
    stage = ConfigDict(STAGE | {"kind": "distill", "execution": {"microbatches": 1}})
    loss = stages.make_loss(stage, MODEL, mask_id=2)(params(), batch(), jax.random.key(0), 0.5)[0]
    how = dict(model=MODEL, shape=stages.row_shape(stage.batch), microbatches=1)
    (pooled,) = stages.embed_rows(params(), batch(), **how, quantize=np.asarray)
    student = np.asarray(pooled, np.float64)[batch()["slots"]]
    int8, teacher = np.round(127 * np.tanh(student)), batch()["teacher"].astype(np.float64)
    total, known = 0.0, {"valid": batch()["valid"]}
    for p in STAGE["matryoshka"]:
        total += reference.cosine_loss(int8[:, :p], teacher[:, :p], **known)
        total += 0.5 * reference.squared_error(student[:, :p], teacher[:, :p], **known)
        total += 2 * reference.similarity_kl(int8[:, :p], teacher, temperature=0.05, ids=batch()["ids"], **known)
    np.testing.assert_allclose(loss, total / 2, rtol=1e-4)


def test_a_student_may_be_wider_than_its_teacher_if_only_similarities_are_compared():
    narrow = batch() | {"teacher": batch()["teacher"][:, :8]}
    stage = ConfigDict(STAGE | {"kind": "distill", "execution": {"microbatches": 1}, "cosine": 0.0, "mse": 0.0})
    loss = stages.make_loss(stage, MODEL, mask_id=2)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(p, narrow, jax.random.key(0), 0.5)[0]))(params())
    assert value > 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_rows_that_do_not_divide_into_microbatches_are_an_error():
    with pytest.raises(ValueError, match="16 rows do not divide into microbatches=3"):
        jax.eval_shape(loss_of("pair", 3), params(), batch())


@pytest.mark.parametrize(
    "prefixes, message", [((), "matryoshka=.. needs at least one prefix"), ((33,), "prefix 33 must be between 1")]
)
def test_prefixes_outside_the_dimensions_of_the_model_are_an_error(prefixes, message):
    with pytest.raises(ValueError, match=message):
        stages.over_prefixes(prefixes, 32, lambda p: jnp.float32(p))


def diffusion_loss(microbatches, left_shift=False):
    execution = dict(microbatches=microbatches, logits_chunk=8)
    return stages.make_loss(ConfigDict(dict(kind="diffusion", execution=execution)), MODEL, 2, left_shift)


def test_microbatches_of_a_diffusion_batch_give_the_gradient_of_the_whole():
    def gradient(microbatches):
        loss = diffusion_loss(microbatches, left_shift=True)
        return jax.jit(jax.grad(lambda p: loss(p, batch(), jax.random.key(0), 0.0)[0]))(params())

    for got, want in zip(jax.tree.leaves(gradient(4)), jax.tree.leaves(gradient(1))):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("microbatches", [1, 4, R])
def test_the_logits_buffer_holds_every_masked_token(microbatches, monkeypatch):
    """Even with one row per microbatch, which may be masked entirely. A buffer for all tokens gives the same loss."""
    full = batch() | dict(segment_ids=np.ones((R, L), np.int32))
    limited = jax.jit(lambda params, key: diffusion_loss(microbatches)(params, full, key, 0.0))
    results = [limited(params(), jax.random.key(k)) for k in range(20)]
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_: 1.0)
    unlimited = jax.jit(lambda params, key: diffusion_loss(microbatches)(params, full, key, 0.0))
    for k, (loss, metrics) in enumerate(results):
        want, all_metrics = unlimited(params(), jax.random.key(k))
        assert metrics["overflow"] == 0 and metrics["masked"] == all_metrics["masked"]
        np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_microbatches_recompute_the_network_in_contrastive_stages_but_not_in_the_diffusion_stage():
    def products(loss):
        """The number of matrix products in the program of the gradient, which contains the body of a loop once."""
        return str(jax.make_jaxpr(jax.grad(loss))(params())).count("dot_general[")

    def diffusion(microbatches):
        return lambda p: diffusion_loss(microbatches)(p, batch(), jax.random.key(0), 0.0)[0]

    def pair(microbatches):
        return lambda p: loss_of("pair", microbatches)(p, batch())

    assert products(diffusion(4)) == products(diffusion(1))
    assert products(pair(4)) > products(pair(1))  # so the count does see recomputation


def test_the_diffusion_loss_counts_masked_tokens_beyond_the_logits_buffer(monkeypatch):
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_: 0.25)
    metrics = diffusion_loss(1)(params(), batch(), jax.random.key(0), 0.0)[1]
    capacity = R * L // 4
    assert metrics["overflow"] == metrics["masked"] - capacity > 0


def test_rows_per_group_of_zero_is_chosen_from_the_data_so_that_microbatches_divide_it():
    from configs import base

    lengths = stores.Lengths(60, 6000, np.array([60]), np.array([100]))

    class Header:
        def __len__(self):
            return 100

        def lengths(self, column):
            return lengths

    batch = dict(rows_per_group=0, group_size=32, groups=2, length=128)
    stage = base.stage("pair", batch=batch, execution=dict(microbatches=4))
    with pytest.raises(ValueError, match="rows_per_group=0 is chosen from the data, which are not read here: give a n"):
        stages.abstract_batch(stage)
    chosen = stages.with_rows(stage, {"a": Header()}, [(1, {"a": 1.0})], separator_id=None)
    assert chosen.batch.rows_per_group == 30  # 3,840 tokens; two groups of 30 rows divide by 4
    assert stages.abstract_batch(chosen)["tokens"][0] == (60, 128) and stage.batch.rows_per_group == 0
