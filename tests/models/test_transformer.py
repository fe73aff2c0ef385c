import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from embed import rows
from embed.models import sharding, transformer
from embed.models.pooling import pool_spans

VOCABULARY = 50
CONFIG = transformer.TransformerConfig(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    rope_theta=100.0,
)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    tree = jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))
    # Norm scales start at 1, so a forgotten one would not show.
    return jax.tree.map(lambda x: x * rng.uniform(0.7, 1.3, x.shape).astype(np.float32), jax.device_get(tree))


encode = jax.jit(functools.partial(transformer.apply, CONFIG))


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]


def one(tokens):
    """Hidden states of one text in a row of its own without padding, [n, D]."""
    tokens = np.asarray(tokens, np.int32)[None]
    return np.asarray(encode(params(), tokens, np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None])[0])


def pooled(packed):
    """The flattened span and segment tables of packed rows."""

    @jax.jit
    def tables(params, r):
        hidden = transformer.apply(CONFIG, params, r.tokens, r.segment_ids, r.positions)
        whole = pool_spans(hidden, jnp.where(r.span_ids > 0, r.segment_ids, 0), packed.shape.segments)
        return pool_spans(hidden, r.span_ids, packed.shape.spans), whole

    return map(np.concatenate, tables(params(), packed.rows))


def test_hidden_states_equal_the_float64_reference():
    packed = rows.pack([rows.dense(t) for t in texts([5, 3, 2])], rows.RowShape(12, 4, 4)).rows
    got = encode(params(), packed.tokens, packed.segment_ids, packed.positions)
    want = reference.encoder(CONFIG, params(), packed.tokens[0], packed.segment_ids[0], packed.positions[0])
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


def test_hidden_states_of_a_causal_model_equal_the_float64_reference():
    config = dataclasses.replace(CONFIG, causal=True)
    packed = rows.pack([rows.dense(t) for t in texts([5, 3, 2])], rows.RowShape(12, 4, 4)).rows
    got = transformer.apply(config, params(), packed.tokens, packed.segment_ids, packed.positions)
    want = reference.encoder(config, params(), packed.tokens[0], packed.segment_ids[0], packed.positions[0])
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


def test_rope_turns_the_halves_of_a_head_against_each_other():
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 7, 100, 1000]])
    got = transformer.apply_rope(x, transformer.rope_tables(positions, 8, 1e4))
    want = [[reference.rope(head, p, 1e4) for head in heads] for heads, p in zip(x[0].astype(np.float64), positions[0])]
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])  # position 0 turns nothing


def test_packed_rows_equal_one_text_at_a_time():
    batch = texts([7, 1, 4, 11, 4, 7])
    packed = rows.pack([rows.dense(t) for t in batch], rows.RowShape(16, 3, 3))
    assert len(packed.rows.tokens) < len(batch)  # several share a row
    spans, documents = pooled(packed)
    alone = np.stack([one(t).mean(0) for t in batch])
    np.testing.assert_allclose(spans[packed.span_slots()], alone, atol=1e-5)
    np.testing.assert_allclose(documents[packed.segment_slots()], alone, atol=1e-5)


def test_the_content_of_padding_changes_nothing():
    (text,) = texts([7])
    r = rows.pack([rows.dense(text)], rows.RowShape(16, 1, 1)).rows
    junk = r.tokens.copy()
    junk[0, 7:] = 9
    for tokens in (r.tokens, junk):
        np.testing.assert_allclose(encode(params(), tokens, r.segment_ids, r.positions)[0, :7], one(text), atol=1e-5)


def test_a_later_token_changes_an_earlier_hidden_state():
    (text,) = texts([7])
    other = text.copy()
    other[-1] = (other[-1] + 1) % VOCABULARY
    assert np.abs(one(text)[0] - one(other)[0]).max() > 1e-3


def test_order_matters():
    (text,) = texts([7])
    assert np.abs(one(text).mean(0) - one(text[::-1]).mean(0)).max() > 1e-3


@pytest.mark.parametrize("separator", [None, 3])
def test_late_chunking_is_the_mean_over_a_chunks_states_in_its_document(separator):
    chunks, (query,) = texts([4, 2, 5]), texts([4], seed=1)
    packed = rows.pack([rows.chunked(chunks, separator), rows.dense(query)], rows.RowShape(20, 5, 3))
    spans, documents = pooled(packed)

    gap = [] if separator is None else [separator]
    hidden = one([*chunks[0], *gap, *chunks[1], *gap, *chunks[2]])
    s = len(gap)
    pieces = [hidden[:4], hidden[4 + s : 6 + s], hidden[6 + 2 * s : 11 + 2 * s]]
    for k, piece in enumerate(pieces):
        np.testing.assert_allclose(spans[packed.span_slots(k)[0]], piece.mean(0), atol=1e-5)
    np.testing.assert_allclose(documents[packed.segment_slots()[0]], np.concatenate(pieces).mean(0), atol=1e-5)
    np.testing.assert_allclose(spans[packed.span_slots()[1]], one(query).mean(0), atol=1e-5)
    assert np.abs(pieces[0].mean(0) - one(chunks[0]).mean(0)).max() > 1e-3  # the context shows


@functools.cache
def values_and_gradients(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    r = rows.pack([rows.dense(t) for t in texts([5, 3, 7])], rows.RowShape(10, 4, 4)).rows

    def loss(params):
        hidden = transformer.apply(config, params, r.tokens, r.segment_ids, r.positions)
        return (jnp.sin(hidden) * (r.segment_ids > 0)[..., None]).sum(), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params())
    return hidden, gradients


@pytest.mark.parametrize(
    "changes", [{"unroll": 9}, {"remat": "full"}, {"remat": "dots"}, {"dense_barrier": True}], ids=str
)
def test_execution_options_change_no_value_and_no_gradient(changes):
    (hidden, gradients), (want, want_gradients) = values_and_gradients(**changes), values_and_gradients()
    np.testing.assert_allclose(hidden, want, atol=1e-5)
    for g, w in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


def test_every_parameter_has_a_gradient():
    _, gradients = values_and_gradients()
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients))


def test_bfloat16_compute_is_close_and_keeps_float32_parameters():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    (text,) = texts([7])
    arrays = text[None], np.ones((1, 7), np.int32), np.arange(7, dtype=np.int32)[None]
    got = jax.jit(functools.partial(transformer.apply, low))(params(), *arrays)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got[0], np.float32), one(text), atol=0.15)
    assert {x.dtype for x in jax.tree.leaves(transformer.abstract_params(low))} == {jnp.dtype("float32")}


def test_sizes_have_the_published_numbers_of_parameters():
    total, without_embedding = transformer.count_params(
        transformer.abstract_params(transformer.make_config("0.6b", 151936))
    )
    assert (total, total - without_embedding) == (596_049_920, 155_582_464)
    total, without_embedding = transformer.count_params(
        transformer.abstract_params(transformer.make_config("4b", 151936))
    )
    assert (total, total - without_embedding) == (4_022_468_096, 388_956_160)


def test_initial_states_have_the_scale_of_the_final_norm_and_initial_predictions_are_nearly_uniform():
    config = transformer.make_config("micro", 500, hidden_size=64)
    tree = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    tokens = np.arange(128, dtype=np.int32)[None]
    hidden = jax.jit(functools.partial(transformer.apply, config))(tree, tokens, np.ones_like(tokens), tokens)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(hidden))), transformer.FINAL_NORM, rtol=1e-3)
    # A table of scale 0.64 / √D under states of that scale.
    np.testing.assert_allclose(np.std(hidden @ tree["embedding"].T), 0.64 * transformer.FINAL_NORM, rtol=0.1)


@pytest.mark.parametrize("num_layers", [1, 12])
def test_initial_states_stay_near_the_embeddings_at_any_depth(num_layers):
    config = transformer.make_config("micro", 500, hidden_size=64, num_layers=num_layers)
    tree = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    tokens = np.arange(128, dtype=np.int32)[None]
    hidden = jax.jit(functools.partial(transformer.apply, config))(tree, tokens, np.ones_like(tokens), tokens)[0]
    embeddings = tree["embedding"][:128]
    cosines = (hidden * embeddings).sum(1) / np.linalg.norm(hidden, axis=1) / np.linalg.norm(embeddings, axis=1)
    assert cosines.min() > 0.5**0.5  # what the layers add is shorter than the embedding


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads=3 must be a multiple of num_kv_heads=2"),
        ({"remat": "some"}, "remat='some' must be one of"),
        ({"dtype": "float16"}, "dtype='float16' must be float32 or bfloat16"),
    ],
)
def test_a_config_that_cannot_work_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_an_unknown_size_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'7b' must be one of 0.6b, 4b, tiny, small, micro"):
        transformer.make_config("7b", 100)


def test_abstract_parameters_have_no_sharding_even_if_a_mesh_is_set_at_the_first_call():
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        shapes = transformer.abstract_params(dataclasses.replace(CONFIG, hidden_size=16))
    assert {x.sharding for x in jax.tree.leaves(shapes)} == {None}
