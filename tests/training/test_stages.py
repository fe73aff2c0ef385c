import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed import config as configs
from embed import rows as embed_rows
from embed.data import store as stores
from embed.models import transformer
from embed.objectives import masked_diffusion
from embed.rows import RowShape
from embed.training import losses, stages

MODEL = transformer.make_config("micro", 64)
R, L, N, S = 16, 24, 32, 4
T = 40  # dimensions of the teacher
BATCH = dict(length=L, spans=S, segments=S)
LATE = dict(token_dimensions=8, batch=BATCH | dict(max_query_tokens=5, max_document_tokens=6))


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
        query_starts=np.arange(N) // 2 * L + np.arange(N) % 2 * 6,
        document_starts=np.arange(N) // 2 * L + 12,
        query_lengths=np.arange(N) % 5 + 1,
        document_lengths=np.arange(N) % 6 + 1,
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
def params(kind="pair"):
    return transformer.init(stages.stage_model(stage_of(kind), MODEL), jax.random.key(0))


def rows():
    return [batch()[name] for name in ("tokens", "segment_ids", "positions")]


def stage_of(kind, microbatches=1, **changes):
    own = LATE if kind == "late_interaction" else dict(matryoshka=(16, 32), batch=BATCH)
    changes = own | dict(temperature=0.05, execution=dict(microbatches=microbatches)) | changes
    return configs.base().stage(kind, **changes)


def loss_of(kind, microbatches, model=MODEL, **changes):
    stage = stage_of(kind, microbatches, **changes)
    loss = stages.make_loss(stage, stages.stage_model(stage, model), mask_id=2)
    return lambda params, batch: loss(params, batch, jax.random.key(0), 0.5)[0]


@pytest.mark.parametrize("microbatches", [2, 4, 16])
@pytest.mark.parametrize("kind", ["pair", "contextual", "triplet", "distill", "late_interaction"])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(kind, microbatches):
    whole = jax.jit(jax.value_and_grad(loss_of(kind, 1)))(params(kind), batch())
    cached = jax.jit(jax.value_and_grad(loss_of(kind, microbatches)))(params(kind), batch())
    np.testing.assert_allclose(cached[0], whole[0], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(cached[1]), jax.tree.leaves(whole[1])):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_gradient_accumulation_has_another_gradient_than_gradient_caching():
    """The negative control: with accumulation, the queries of each part see fewer negatives."""
    whole = jax.jit(jax.grad(loss_of("pair", 1)))(params(), batch())

    def accumulated(params):
        values = []
        for i in range(2):
            rows, examples = slice(i * R // 2, (i + 1) * R // 2), slice(i * N // 2, (i + 1) * N // 2)
            part = {k: v[rows] if v.shape == (R, L) else v[examples] for k, v in batch().items()}
            part |= {k: part[k] - i * R // 2 * S for k in ("query_slots", "document_slots")}
            values.append(loss_of("pair", 1)(params, part))
        return sum(values) / 2

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


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_distillation_is_the_weighted_sum_of_its_losses_on_each_prefix(quantization):
    loss = loss_of("distill", 1, cosine=1.0, mse=0.5, kl=2.0, quantization=quantization)(params(), batch())
    (pooled,) = losses.Embedding(MODEL, RowShape(**BATCH), 1, quantization="none")(params(), batch())
    student = np.asarray(pooled, np.float64)[batch()["slots"]]
    quantized = np.round(127 * np.tanh(student)) if quantization == "int8" else student
    teacher, total, known = batch()["teacher"].astype(np.float64), 0.0, {"valid": batch()["valid"]}
    for p in (16, 32):
        total += reference.cosine_loss(quantized[:, :p], teacher[:, :p], **known)
        total += 0.5 * reference.squared_error(student[:, :p], teacher[:, :p], **known)
        total += 2 * reference.similarity_kl(quantized[:, :p], teacher, temperature=0.05, ids=batch()["ids"], **known)
    np.testing.assert_allclose(loss, total / 2, rtol=1e-4)


def test_a_student_may_be_wider_than_its_teacher_if_only_similarities_are_compared():
    narrow, loss = batch() | {"teacher": batch()["teacher"][:, :8]}, loss_of("distill", 1, cosine=0.0)
    value, gradients = jax.jit(jax.value_and_grad(loss))(params(), narrow)
    assert value > 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_late_interaction_compares_the_projected_states_of_each_text_s_own_tokens():
    """Texts longer than the most tokens of a side are compared by their first ones."""
    of_kind = params("late_interaction")
    hidden = transformer.apply(MODEL, {k: v for k, v in of_kind.items() if k != "projection"}, *rows())
    vectors = np.asarray(hidden @ of_kind["projection"], np.float64).reshape(R * L, -1)

    def side(name, most):
        slots = batch()[f"{name}_starts"][:, None] + np.arange(most)
        return vectors[slots], np.arange(most) < batch()[f"{name}_lengths"][:, None]

    (queries, query_valid), (documents, document_valid) = side("query", 5), side("document", 6)
    want = reference.late_interaction_loss(
        queries,
        documents,
        query_valid=query_valid,
        document_valid=document_valid,
        temperature=0.05,
        **{name: batch()[name] for name in ("query_ids", "document_ids", "valid")},
    )
    np.testing.assert_allclose(loss_of("late_interaction", 1)(of_kind, batch()), want, rtol=1e-4)


def test_rows_that_do_not_divide_into_microbatches_are_an_error():
    with pytest.raises(ValueError, match="16 rows do not divide into microbatches=3"):
        jax.eval_shape(loss_of("pair", 3), params(), batch())


@pytest.mark.parametrize(
    "prefixes, message", [((), "matryoshka=.. needs at least one prefix"), ((33,), "prefix 33 must be between 1")]
)
def test_prefixes_outside_the_dimensions_of_the_model_are_an_error(prefixes, message):
    with pytest.raises(ValueError, match=message):
        losses.Prefixes(prefixes)(32, lambda p: jnp.float32(p))


def diffusion_loss(microbatches, left_shift=False):
    execution = dict(microbatches=microbatches, logits_chunk=8)
    return stages.make_loss(configs.base().stage("diffusion", execution=execution), MODEL, 2, left_shift)


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
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_, **__: 1.0)
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
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_, **__: 0.25)
    metrics = diffusion_loss(1)(params(), batch(), jax.random.key(0), 0.0)[1]
    capacity = R * L // 4
    assert metrics["overflow"] == metrics["masked"] - capacity > 0


def test_rows_per_group_of_zero_is_chosen_from_the_data_so_that_microbatches_divide_it():

    lengths = stores.Lengths(60, 6000, np.array([60]), np.array([100]))

    class Header:
        def __len__(self):
            return 100

        def lengths(self, column):
            return lengths

    batch = dict(rows_per_group=0, group_size=32, groups=2, length=128)
    stage = configs.base().stage("pair", batch=batch, execution=dict(microbatches=4))
    with pytest.raises(ValueError, match="rows_per_group=0 is chosen from the data, which are not read here: give a n"):
        stages.abstract_batch(stage)
    chosen = stages.with_rows(stage, {"a": Header()}, [(1, {"a": 1.0})], separator_id=None)
    assert chosen.batch.rows_per_group == 30  # 3,840 tokens; two groups of 30 rows divide by 4
    assert stages.abstract_batch(chosen)["tokens"][0] == (60, 128) and stage.batch.rows_per_group == 0


def test_the_causal_loss_is_the_mean_cross_entropy_of_each_token_given_those_before_it():
    stage = configs.base().stage("causal", execution=dict(logits_chunk=R * L))
    model = stages.stage_model(stage, MODEL)
    loss, metrics = stages.make_loss(stage, model, mask_id=2)(params(), batch(), jax.random.key(0), 0.0)
    rows = {name: batch()[name] for name in ("tokens", "segment_ids", "positions")}
    nll = []
    for tokens, segment_ids, positions in zip(*rows.values()):
        hidden = reference.encoder(model, params(), tokens, segment_ids, positions)
        each = reference.token_nll(hidden[:-1], np.asarray(params()["embedding"], np.float64), tokens[1:])
        nll += each[(segment_ids[1:] > 0) & (positions[1:] > 0)].tolist()
    np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("microbatches", [1, 4])
def test_annealing_starts_with_a_causal_mask_and_ends_with_a_bidirectional_one(microbatches):
    def value(progress, model=MODEL, **changes):
        execution = dict(microbatches=microbatches, logits_chunk=R * L)
        stage = configs.base().stage("diffusion", execution=execution, **changes)
        return float(stages.make_loss(stage, model, 2)(params(), batch(), jax.random.key(0), jnp.float32(progress))[0])

    causal, both = value(0.0, dataclasses.replace(MODEL, causal=True)), value(0.0)
    assert abs(causal - both) > 1e-4
    np.testing.assert_allclose(value(0.0, anneal=0.5), causal, rtol=1e-6)
    np.testing.assert_allclose([value(p, anneal=0.5) for p in (0.5, 0.9)], both, rtol=1e-6)
    assert value(0.25, anneal=0.5) not in (causal, both)


def contextual_batch(texts):
    """A document whose chunks are `texts`, and each of them alone, in one row of each kind."""
    packed = [embed_rows.pack([embed_rows.chunked(texts, 3)], RowShape(L, S, S))]
    packed.append(embed_rows.pack([embed_rows.dense(text) for text in texts], RowShape(L, S, S)))
    return [each.rows._asdict() for each in packed]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_early_chunking_embeds_each_chunk_as_if_it_stood_alone_and_late_chunking_does_not(pooling):
    rng = np.random.default_rng(0)
    document, alone = contextual_batch([rng.integers(4, 64, n) for n in (5, 3, 7)])
    how = dict(model=MODEL, shape=RowShape(L, S, S), microbatches=1, quantization="none", pooling=pooling)
    (want,) = losses.Embedding(**how)(params(), alone)
    early, whole = losses.Embedding(**how, early=True)(params(), document, documents=True)
    np.testing.assert_allclose(early[:3], want[:3], rtol=1e-4, atol=1e-5)
    (late,) = losses.Embedding(**how)(params(), document)
    assert np.abs(late[:3] - want[:3]).max() > 1e-2
    if pooling == "mean":  # the document is the mean over the tokens of its chunks
        np.testing.assert_allclose(whole[0], np.array([5, 3, 7]) @ want[:3] / 15, rtol=1e-4, atol=1e-5)


def test_training_compares_int8_values_or_their_tanh_or_the_pooled_vectors_themselves():
    how = dict(model=MODEL, shape=RowShape(L, S, S), microbatches=1)
    tables = {
        name: losses.Embedding(**how, quantization=name)(params(), batch())[0] for name in ("none", "tanh", "int8")
    }
    np.testing.assert_allclose(tables["tanh"], np.tanh(tables["none"]), rtol=1e-6)
    np.testing.assert_allclose(tables["int8"], np.round(127 * np.tanh(tables["none"])), atol=1e-4)


def test_prefixes_have_equal_weights_or_those_of_the_config():
    def value(*arguments):
        return float(losses.Prefixes(*arguments)(32, lambda p: jnp.float32(p)))

    assert value((8, 32)) == 20 and value((8, 32), (1.0, 3.0)) == 26 and value((8, 32), (2.0, 6.0)) == 26


@pytest.mark.parametrize("kind", ["pair", "contextual"])
def test_a_margin_of_two_masks_nothing_and_a_smaller_one_does(kind):
    def keywords(**changes):
        return stages.make_loss(configs.base().stage(kind, **changes), MODEL, 2).keywords

    assert keywords(margin=2.0)["margin"] is None and keywords()["margin"] == 0.1
    assert keywords()["query_negatives"] and not keywords(query_negatives=False)["query_negatives"]


@pytest.mark.parametrize("kind", ["pair", "contextual", "triplet"])
def test_the_spread_out_term_is_added_to_the_loss_with_its_weight(kind):
    plain, once, twice = (float(loss_of(kind, 1, spread_out=w)(params(), batch())) for w in (0.0, 1.0, 2.0))
    assert once > plain + 1e-3
    np.testing.assert_allclose(twice - plain, 2 * (once - plain), rtol=1e-3)


# Switches of a config


@pytest.mark.parametrize(
    "kind, field, value, read, default, want",
    [
        ("diffusion", "noise", "bell", lambda how: how["noise"], "stratified", "bell"),
        ("diffusion", "mask_ratio", 0.3, lambda how: how["mask_ratio"], 0.2, 0.3),
        ("diffusion", "anneal", 0.5, lambda how: how["anneal"], 0.0, 0.5),
        ("pair", "pooling", "last", lambda how: how["embedding"].pooling, "mean", "last"),
        ("triplet", "pooling", "last", lambda how: how["embedding"].pooling, "mean", "last"),
        ("pair", "quantization", "tanh", lambda how: how["embedding"].quantization, "int8", "tanh"),
        ("contextual", "chunking", "early", lambda how: how["embedding"].early, False, True),
        ("pair", "margin", 2.0, lambda how: how["margin"], 0.1, None),
        ("pair", "query_negatives", False, lambda how: how["query_negatives"], True, False),
        ("pair", "matryoshka", (8, 32), lambda how: how["prefixes"].sizes, None, (8, 32)),
        ("pair", "matryoshka_weights", (0.2, 1.0), lambda how: how["prefixes"].weights, (), (0.2, 1.0)),
        ("pair", "spread_out", 0.5, lambda how: how["spread_out"], 0.0, 0.5),
        ("distill", "spread_out", 0.5, lambda how: how["spread_out"], 0.0, 0.5),
        ("contextual", "alpha", 0.7, lambda how: how["alpha"], None, 0.7),
        ("contextual", "beta", (0.1, 0.3), lambda how: how["beta"], None, (0.1, 0.3)),
        ("pair", "temperature", 0.5, lambda how: how["temperature"], None, 0.5),
    ],
)
def test_a_switch_of_a_stage_reaches_its_loss(kind, field, value, read, default, want):
    base = configs.base()
    before = read(stages.make_loss(base.stage(kind), MODEL, 2).keywords)
    after = read(stages.make_loss(base.stage(kind, **{field: value}), MODEL, 2).keywords)
    assert after == want != before and (default is None or before == default)


def test_attention_of_a_stage_is_that_of_its_model():
    for attention, causal in (("bidirectional", False), ("causal", True)):
        stage = configs.base().stage("pair", attention=attention)
        assert stages.stage_model(stage, MODEL).causal == causal


def test_homogeneous_batches_have_examples_of_one_task(tmp_path):
    rng, made = np.random.default_rng(0), {}
    for first, name in ((10, "a"), (40, "b")):
        writer = stores.Writer(tmp_path / name, ["query", "document"])
        for _ in range(50):
            writer.append({side: rng.integers(first, first + 20, 4) for side in ("query", "document")})
        writer.close({"task": name})
        made[name] = stores.Store(tmp_path / name)
    batch = dict(group_size=8, groups=2, rows_per_group=2, length=64, spans=32, segments=32)
    mixed = set()
    for homogeneous in (False, True):
        stage = configs.base().stage("pair", batch=batch | dict(homogeneous=homogeneous))
        loader = stages.make_loader(stage, made, [(20, {"a": 0.5, "b": 0.5})], seed=0, separator_id=None)
        for step in range(20):
            tokens = loader.batch(step)["tokens"]
            of_both = bool(((tokens >= 10) & (tokens < 40)).any() and (tokens >= 40).any())
            mixed.add((homogeneous, of_both))
    assert (False, True) in mixed and (True, True) not in mixed and (True, False) in mixed
