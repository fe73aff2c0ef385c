import dataclasses
import os
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import small

from embed import inference
from embed.inference import encoder as encoding
from embed.inference import memory, packing
from embed.models import sharding, transformer
from embed.rows import Segment

EMBEDDING = {"matryoshka": [8, 32], "separator": True, "max_length": None}
TEXTS = small.sentences(60, seed=1, longest=90) + ["the", "a list of a list " * 40]


@pytest.fixture(scope="module")
def encoder():
    return small.encoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_model(tmp_path_factory.mktemp("export") / "model")


def segments(lengths, spans=1):
    return [Segment(np.ones(n, np.int32), np.ones(n, np.int32), spans) for n in lengths]


def test_an_exported_model_runs_the_programs_that_the_run_s_encoder_compiled(folder):
    trained = dataclasses.replace(small.config(), unroll=64, dense_barrier=True, remat="full")  # as the quickstart
    shardings = sharding.parameter_shardings(sharding.make_mesh(), transformer.abstract_params(trained))
    want = inference.Encoder(jax.device_put(small.params(), shardings), trained, small.tokenizer()).encode(TEXTS)
    compiled = encoding._pooled._cache_size()
    np.testing.assert_array_equal(inference.load(folder).encode(TEXTS), want)
    assert encoding._pooled._cache_size() == compiled > 0


# One text


def test_a_vector_is_the_mean_of_the_text_s_own_hidden_states(encoder):
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (62, 32) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors):
        alone = small.hidden_states(small.tokenizer().encode([text])[0]).mean(0)
        np.testing.assert_allclose(vector, alone, atol=1e-5)


def test_padding_and_neighbors_in_the_row_change_nothing(encoder):
    tokens = small.tokenizer().encode(TEXTS[:1])[0]
    bare = small.hidden_states(tokens, length=len(tokens)).mean(0)
    np.testing.assert_allclose(encoder.encode(TEXTS[:20])[0], bare, atol=1e-5)


def test_a_vector_does_not_depend_on_its_batch(encoder):
    together = encoder.encode(TEXTS)
    for batch_tokens in (1, 300, 100_000):
        np.testing.assert_allclose(encoder.encode(TEXTS, batch_tokens=batch_tokens), together, atol=1e-5)
    reversed_ = encoder.encode(TEXTS[::-1])
    np.testing.assert_allclose(reversed_[::-1], together, atol=1e-5)


def test_one_str_gives_one_vector_and_no_texts_give_none(encoder):
    assert encoder.encode("parse the file").shape == (32,)
    np.testing.assert_allclose(encoder.encode("parse the file"), encoder.encode(["parse the file"])[0], atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode([], precision="ubinary").shape == (0, 4)
    assert encoder.encode_documents([]) == []


def test_tokens_and_texts_give_the_same_vectors(encoder):
    tokens = small.tokenizer().encode(TEXTS[:5])
    np.testing.assert_allclose(encoder.encode_tokens(tokens), encoder.encode(TEXTS[:5]), atol=1e-6)


def test_an_exported_model_gives_the_vectors_of_the_parameters_in_memory(encoder, folder):
    loaded = inference.load(folder)
    np.testing.assert_array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    assert (loaded.dimensions, loaded.separator, loaded.max_length, loaded.matryoshka) == (32, True, None, (8, 32))


# Precisions


def test_int8_is_127_tanh_rounded(encoder):
    pooled = encoder.encode(TEXTS)
    vectors = encoder.encode(TEXTS, precision="int8")
    assert vectors.dtype == np.int8
    np.testing.assert_array_equal(vectors, np.round(127 * np.tanh(pooled.astype(np.float64))))


def test_bits_are_packed_as_sentence_transformers_packs_them(encoder):
    pooled = encoder.encode(TEXTS)
    ubinary, binary = (encoder.encode(TEXTS, precision=p) for p in ("ubinary", "binary"))
    assert (ubinary.dtype, binary.dtype) == (np.uint8, np.int8) and ubinary.shape == binary.shape == (62, 4)
    weights = 2 ** np.arange(7, -1, -1)
    expected = ((pooled >= 0).reshape(62, 4, 8) * weights).sum(-1)
    np.testing.assert_array_equal(ubinary, expected)
    np.testing.assert_array_equal(binary, expected - 128)


def test_zero_is_a_set_bit():
    vectors = np.array([[0.0, -1e-9, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0]], np.float32)
    assert encoding.quantize(vectors, "ubinary").tolist() == [[0b10100001]]
    assert encoding.quantize(vectors, "binary").tolist() == [[0b10100001 - 128]]


def test_a_prefix_is_taken_before_bits_are_packed(encoder):
    whole = encoder.encode(TEXTS, precision="ubinary")
    np.testing.assert_array_equal(encoder.encode(TEXTS, precision="ubinary", truncate_dim=16), whole[:, :2])
    np.testing.assert_array_equal(encoder.encode(TEXTS, truncate_dim=5), encoder.encode(TEXTS)[:, :5])


def test_normalizing_comes_after_truncating(encoder):
    vectors = encoder.encode(TEXTS, truncate_dim=7, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    prefix = encoder.encode(TEXTS, truncate_dim=7)
    np.testing.assert_allclose(vectors * np.linalg.norm(prefix, axis=1, keepdims=True), prefix, atol=1e-6)


@pytest.mark.parametrize("precision", inference.PRECISIONS)
def test_quantizing_float32_vectors_equals_encoding_in_that_precision(encoder, precision):
    direct = encoder.encode(TEXTS, precision=precision)
    np.testing.assert_array_equal(encoding.quantize(encoder.encode(TEXTS), precision), direct, strict=True)


# Documents


@pytest.mark.parametrize("separator", [True, False])
def test_a_chunk_is_the_mean_of_its_tokens_hidden_states_in_the_document(separator):
    documents = [TEXTS[:3], TEXTS[3:4], TEXTS[4:11], ["the", "", "a file"]]
    arrays = small.encoder(separator=separator).encode_documents(documents)
    assert [v.shape for v in arrays] == [(3, 32), (1, 32), (7, 32), (3, 32)]
    for document, vectors in zip(documents, arrays):
        tokens, starts = [], []
        chunks = small.tokenizer().encode(document)
        for k, chunk in enumerate(chunks):
            tokens += [small.tokenizer().separator_id] if k and separator else []
            starts.append(len(tokens))
            tokens += chunk.tolist()
        hidden = small.hidden_states(tokens)
        for start, chunk, vector in zip(starts, chunks, vectors):
            expected = hidden[start : start + len(chunk)].mean(0) if len(chunk) else np.zeros(32)
            np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_document_of_one_chunk_is_a_text(encoder):
    vectors = np.concatenate(encoder.encode_documents([[text] for text in TEXTS]))
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS))


def test_a_later_chunk_changes_an_earlier_one(encoder):
    first, second = encoder.encode_documents([["parse the file", "open"], ["parse the file", "a list of vectors"]])
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_an_error_in_a_window_names_its_document():
    params = {**small.params(), "norm": np.full(32, np.nan, np.float32)}
    encoder = inference.Encoder(params, small.config(), small.tokenizer(), context_length=2)
    with pytest.raises(encoding.NotFiniteError, match="the vector of row 7 is not finite"):
        encoder.encode_documents([["the"] * 9, ["a"] * 9], names=["row 7", "row 8"])


def test_an_empty_chunk_is_a_zero_vector_in_every_precision_and_needs_no_tokens(encoder):
    document = [["", "the file", *[""] * 40]]
    assert not encoder.encode_documents(document)[0][[0, *range(2, 42)]].any()
    assert not encoder.encode_documents(document, precision="int8")[0][0].any()
    assert (encoder.encode_documents(document, precision="ubinary")[0][0] == 255).all()


# Errors


def test_a_text_without_tokens_is_named(encoder):
    with pytest.raises(ValueError, match="text 1 has no tokens: '  '"):
        encoder.encode(["the", "  "])
    with pytest.raises(ValueError, match="document 1 has no tokens in any of its 2 chunks"):
        encoder.encode_documents([["the"], ["", " "]])
    with pytest.raises(ValueError, match="document 0 has no tokens in any of its 0 chunks"):
        encoder.encode_documents([[]])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"precision": "float16"}, "precision 'float16' must be one of float32, int8, binary, ubinary"),
        ({"precision": "binary", "truncate_dim": 12}, "12 dimensions are not a multiple of 8"),
        ({"truncate_dim": 33}, r"truncate_dim=33 must be in 1..32"),
        ({"truncate_dim": 0}, r"truncate_dim=0 must be in 1..32"),
        ({"truncate_dim": True}, r"truncate_dim=True must be in 1..32, an int"),
        ({"truncate_dim": 8.0}, r"truncate_dim=8.0 must be in 1..32, an int"),
        ({"truncate_dim": "8"}, r"truncate_dim='8' must be in 1..32, an int"),
        ({"batch_tokens": 64.0}, "batch_tokens=64.0 must be positive, an int"),
        ({"names": []}, "there are 0 names for 1 texts, expected one per text"),
        ({"names": ["a", "b"]}, "there are 2 names for 1 texts, expected one per text"),
        ({"names": "a"}, "names is 'a', expected a list of str"),
        ({"precision": "int8", "normalize_embeddings": True}, "normalize_embeddings is for float32 only, not int8"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be positive"),
    ],
)
def test_a_wrong_keyword_is_one_sentence(encoder, keywords, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(["the"], **keywords)


NOT_LISTS = [{"_id": "1", "text": "abc"}, {"the"}, frozenset(["the"]), b"the", bytearray(b"the"), {}, 5, None]


@pytest.mark.parametrize("value", NOT_LISTS, ids=lambda value: type(value).__name__)
def test_what_is_not_a_list_of_texts_or_documents_is_refused(encoder, value):
    shown = re.escape(f"{value!r:.80}")
    with pytest.raises(ValueError, match=f"^texts is {shown}, expected a str or a list of str$"):
        encoder.encode(value)
    with pytest.raises(ValueError, match=f"^document 1 is {shown}, expected a list of str, one per chunk$"):
        encoder.encode_documents([["a"], value])
    with pytest.raises(ValueError, match=f"^documents is {shown}, expected a list of documents, each a list of str$"):
        encoder.encode_documents(value)


def test_a_str_is_neither_a_document_nor_a_list_of_documents(encoder):
    with pytest.raises(ValueError, match="document 1 is 'the', expected a list of str, one per chunk"):
        encoder.encode_documents([["a"], "the"])
    with pytest.raises(ValueError, match="documents is 'the', expected a list of documents"):
        encoder.encode_documents("the")


def test_other_sequences_of_texts_are_taken(encoder):
    want = encoder.encode(["the", "a"])
    for texts in (("the", "a"), np.array(["the", "a"]), (text for text in ("the", "a"))):
        np.testing.assert_array_equal(encoder.encode(texts), want)
    np.testing.assert_array_equal(
        encoder.encode_documents((("the",), ["a"]), truncate_dim=np.int64(8))[1], want[1:, :8]
    )


def test_documents_need_a_name_each(encoder):
    with pytest.raises(ValueError, match="there are 1 names for 2 documents, expected one per document"):
        encoder.encode_documents([["the"], ["a"]], names=["line 7"])


@pytest.mark.parametrize(
    "value, what",
    [
        ([[0.5] * 8], "of type list"),
        (0.5, "of type float"),
        (np.float32(0.5), r"float32\[\]"),
        (np.ones((2, 8), np.int8), r"int8\[2, 8\]"),
        (np.ones((2, 8), bool), r"bool\[2, 8\]"),
    ],
)
@pytest.mark.parametrize("precision", inference.PRECISIONS)
def test_only_arrays_of_floats_are_quantized(encoder, value, what, precision):
    for quantize in (encoding.quantize, encoder.quantize, small.encoder(tanh=True).quantize):
        with pytest.raises(ValueError, match=f"the vectors to quantize are {what}, expected an array of float32"):
            quantize(value, precision)


def test_an_error_about_a_long_text_says_whose_limit_it_is():
    encoder = small.encoder(max_length=5)
    with pytest.raises(ValueError, match="text 0 has .* tokens, the model takes 5 "):
        encoder.encode(["the a of " * 9])
    encoder.max_length = 3
    with pytest.raises(ValueError, match=r"text 0 has .* tokens, max_length \(--max_length\) is 3 "):
        encoder.encode(["the a of " * 9])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, r" is 3 \(int\), expected a str$"),
        (None, r" is None \(NoneType\), expected a str$"),
        ("a\ud800", r" holds a lone surrogate U\+D800 at character 1: not valid Unicode text$"),
    ],
)
def test_an_error_about_what_is_not_text_names_the_text_or_the_document_and_chunk(encoder, bad, message):
    with pytest.raises(ValueError, match="^text 1" + message):
        encoder.encode(["the", bad])
    with pytest.raises(ValueError, match="^line 8" + message):
        encoder.encode(["the", bad], names=["line 7", "line 8"])
    documents = [["the", "a", "open"], ["list", bad]]
    with pytest.raises(ValueError, match="^document 1, chunk 1" + message):
        encoder.encode_documents(documents)
    with pytest.raises(ValueError, match="^line 8, chunk 1" + message):
        encoder.encode_documents(documents, names=["line 7", "line 8"])


def test_texts_are_cut_only_if_asked_with_a_warning_that_counts_them():
    encoder = small.encoder(max_length=10)
    tokens = small.tokenizer().encode(["the a of " * 9])[0]
    message = f"text 1 has {len(tokens)} tokens, the model takes 10 \\(1 of 2 are too long\\)"
    with pytest.raises(ValueError, match=message):
        encoder.encode(["the", "the a of " * 9])
    with pytest.warns(UserWarning, match=f"1 of 2 texts were cut to 10 tokens \\(lost: {len(tokens) - 10} tokens\\)"):
        vectors = encoder.encode(["the", "the a of " * 9], truncate=True)
    np.testing.assert_allclose(vectors[1], small.hidden_states(tokens[:10]).mean(0), atol=1e-5)
    with pytest.warns(UserWarning, match="1 of 1 documents were cut to 10 tokens .lost: .* tokens, 2 whole chunks"):
        vectors = encoder.encode_documents([["the a of " * 9, "list", "a"]], truncate=True)[0]
    assert vectors[0].any() and not vectors[1:].any()


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="entries, the model only"):
        inference.Encoder(small.params(), encoding.dataclasses.replace(small.config(), vocab_size=5), small.tokenizer())


def test_with_tanh_float32_is_int8_before_rounding_and_other_precisions_do_not_change(encoder, folder, tmp_path):
    loaded = inference.load(small.write_model(tmp_path / "m", tanh=True))
    v = encoder.encode(TEXTS)
    np.testing.assert_allclose(loaded.encode(TEXTS), np.tanh(v.astype(np.float64)), atol=1e-6)
    for precision in inference.PRECISIONS[1:]:
        direct = encoder.encode(TEXTS, precision=precision)
        np.testing.assert_array_equal(loaded.encode(TEXTS, precision=precision), direct)
        np.testing.assert_array_equal(encoder.quantize(v, precision), direct)
    documents = [TEXTS[:3], TEXTS[3:5]]
    for got, want in zip(loaded.encode_documents(documents), encoder.encode_documents(documents)):
        np.testing.assert_allclose(got, np.tanh(want.astype(np.float64)), atol=1e-6)
    unit = loaded.encode(TEXTS, normalize_embeddings=True, truncate_dim=8)
    want = np.tanh(v[:, :8].astype(np.float64))
    np.testing.assert_allclose(unit, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)


def test_float32_vectors_of_a_tanh_model_are_quantized_with_one_tanh(encoder):
    model = small.encoder(tanh=True)
    for precision in inference.PRECISIONS[1:]:
        got, want = model.quantize(model.encode(TEXTS), precision), encoder.encode(TEXTS, precision=precision)
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(model.quantize(model.encode(TEXTS), "float32"), model.encode(TEXTS))


@pytest.mark.parametrize("tanh", [False, True])
def test_the_settings_of_encode_can_be_applied_to_its_float32_vectors(tanh):
    model = small.encoder(tanh=tanh)
    for precision in inference.PRECISIONS:
        for normalize in (False, True)[: 2 if precision == "float32" else 1]:
            got = model.quantize(model.encode(TEXTS), precision, truncate_dim=16, normalize=normalize)
            want = model.encode(TEXTS, precision=precision, truncate_dim=16, normalize_embeddings=normalize)
            np.testing.assert_array_equal(got, want, strict=True)
    with pytest.raises(ValueError, match="truncate_dim=33 must be in 1..32"):
        model.quantize(model.encode(TEXTS), "int8", truncate_dim=33)


@pytest.mark.parametrize("precision", inference.PRECISIONS)
def test_a_vector_that_is_not_finite_is_an_error_in_every_precision(precision):
    params = {**small.params(), "norm": np.array([np.nan, *small.params()["norm"][1:]], np.float32)}
    encoder = inference.Encoder(params, small.config(), small.tokenizer())
    message = "the vector of {} is not finite .NaN or infinity., and so are those of 3 of the 3 in its batch"
    with pytest.raises(encoding.NotFiniteError, match=message.format("text 0")):
        encoder.encode(["the", "a", "open the file"], precision=precision)
    with pytest.raises(ValueError, match=message.format("row 7")):
        encoder.encode_documents([["the", ""], ["a"], ["b"]], precision=precision, names=["row 7", "row 8", "row 9"])
    bad = np.array([[1.0] * 8, [np.inf] * 8], np.float32)
    for quantize in (small.encoder().quantize, small.encoder(tanh=True).quantize, encoding.quantize):
        with pytest.raises(ValueError, match="vector 1 is not finite; 1 of 2 vectors are not"):
            quantize(bad, precision)


def test_an_overflow_names_the_text_by_its_index():
    """Other texts may share its row; they do not change."""
    table = small.params()["embedding"].copy()
    unknown = small.tokenizer().encode(["ß"])[0]
    table[unknown[-1]] = np.inf
    encoder = inference.Encoder({**small.params(), "embedding": table}, small.config(), small.tokenizer())
    with pytest.raises(ValueError, match="the vector of text 40 is not finite"):
        encoder.encode([*small.sentences(40), "ß"], batch_tokens=1)


def test_errors_use_names_for_texts(encoder):
    with pytest.raises(ValueError, match="line 8 has no tokens"):
        encoder.encode(["the", " "], names=["line 7", "line 8"])
    with pytest.raises(ValueError, match="line 8 has no tokens in any of its 1 chunks"):
        encoder.encode_documents([["the"], [" "]], names=["line 7", "line 8"])


def test_a_text_that_does_not_fit_the_memory_of_the_machine_is_refused_before_it_is_computed(encoder, monkeypatch):
    """The compiled program says what it needs; here the machine has less."""
    pages = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", pages.get)
    texts = ["the", "a list of " * 1200]
    message = "text 1 has 3,600 tokens, too many for .* machine .they need .* GB, 0.0 GB are available.: shorten"
    with pytest.raises(encoding.TooLongError, match=message):
        encoder.encode(texts, batch_tokens=256)
    pages["SC_PHYS_PAGES"] = 10**9
    assert encoder.encode(texts, batch_tokens=256).shape == (2, 32)


def test_memory_that_is_used_up_is_one_sentence(encoder, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 35003121664 bytes.")

    monkeypatch.setattr(encoding, "_pooled", fail)
    with pytest.raises(encoding.TooLongError, match="text 1 has 4 tokens, too many for the memory .*it was used up"):
        encoder.encode(["the", "a list of file"])


# Batches


@pytest.mark.parametrize("fine", [False, True])
def test_batches_hold_every_segment_once_within_the_capacity_of_rows(fine):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 700, 500)
    spans = rng.integers(1, 30, 500)
    all_segments = [Segment(np.ones(n, np.int32), np.ones(n, np.int32), s) for n, s in zip(lengths, spans)]
    seen = []
    for members, row, shape, num_rows in packing.batches(all_segments, 4096, fine=fine):
        assert num_rows * shape.length <= max(4096, shape.length)
        assert shape.length % (8 if fine else 64) == 0 and shape.spans * 8 == shape.length
        assert row.max() < num_rows
        assert np.bincount(row, lengths[members]).max() <= shape.length
        assert np.bincount(row, spans[members]).max() <= shape.spans
        seen += members
    assert sorted(seen) == list(range(500))


def test_rows_are_at_least_90_percent_full_with_varied_lengths():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.6, 2000).astype(int) + 8
    capacity = sum(r * shape.length for _, _, shape, r in packing.batches(segments(lengths), 4096))
    assert lengths.sum() / capacity > 0.9


def test_many_texts_get_rows_of_about_their_length_and_the_same_vectors(encoder, monkeypatch):
    """Of 5,000 texts of 100 to 700 tokens: tokens times the length of their row, which is the cost of attention."""
    lengths = np.random.default_rng(0).normal(380, 90, 5000).clip(100, 700).astype(int)

    def attention(fine):
        made = list(packing.batches(segments(lengths), 4096, fine=fine))
        rows = sum(r * shape.length for _, _, shape, r in made)
        return sum(r * shape.length**2 for _, _, shape, r in made) / lengths.sum(), lengths.sum() / rows

    (coarse, coarse_fill), (fine, fine_fill) = attention(False), attention(True)
    assert fine < 0.75 * coarse and fine_fill > coarse_fill
    texts = small.sentences(60, seed=2, longest=200)
    few = encoder.encode(texts)
    monkeypatch.setattr(encoding, "FINE_WORK", 0)
    np.testing.assert_allclose(encoder.encode(texts), few, rtol=1e-5, atol=1e-5)


def test_few_programs_are_compiled_and_reused(encoder):
    encoding._pooled.clear_cache()
    encoder.encode(small.sentences(1500, seed=2, longest=200))
    compiled = encoding._pooled._cache_size()
    assert compiled <= 4  # rows of 256, 128 and 64 tokens, and the last batch
    encoder.encode(small.sentences(1500, seed=3, longest=200))
    small.encoder().encode(small.sentences(1500, seed=4, longest=200))  # another checkpoint of the same architecture
    assert encoding._pooled._cache_size() <= compiled + 1  # at most another last batch


def test_inference_needs_neither_tensorflow_nor_seqio_nor_training_nor_data(folder):
    program = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "seqio", "gin", "orbax", "embed.training", "embed.data"):
    sys.modules[name] = None
import embed.inference
encoder = embed.inference.load(sys.argv[1])
print(encoder.encode(["parse the file"]).shape, encoder.encode_documents([["a", "b"]])[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    assert done.stdout == "(1, 32) (2, 32)\n", done.stderr


# Streams


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_a_stream_gives_the_vectors_of_texts_and_documents_in_order(encoder, precision, monkeypatch):
    monkeypatch.setattr(encoding, "STREAM_BATCHES", 1)
    items = [*TEXTS[:20], TEXTS[20:23], *TEXTS[23:60], [TEXTS[60]], *TEXTS[61:]]
    read = []
    stream = encoder.encode_stream(
        (read.append(i) or item for i, item in enumerate(items)), precision=precision, batch_tokens=64
    )
    first = next(stream)
    assert len(read) < len(items) / 2  # the rest is not read yet
    got = [first, *stream]
    assert len(got) == len(read) == len(items)
    for item, vectors in zip(items, got):
        if isinstance(item, str):
            (want,) = encoder.encode([item], precision=precision)
        else:
            (want,) = encoder.encode_documents([item], precision=precision)
        assert vectors.shape == want.shape and vectors.dtype == want.dtype
        if precision == "float32":
            np.testing.assert_allclose(vectors, want, atol=1e-5)
        else:
            assert np.mean(vectors != want) < 0.01  # another batch may round a number to its neighbour


def test_an_error_in_a_stream_names_the_text_after_the_vectors_before_it(encoder, monkeypatch):
    monkeypatch.setattr(encoding, "STREAM_BATCHES", 1)
    stream = encoder.encode_stream(iter([*TEXTS[:40], "  ", *TEXTS[40:]]), batch_tokens=64)
    got = []
    with pytest.raises(ValueError, match="text 40 has no tokens"):
        got.extend(stream)
    assert 0 < len(got) <= 40

    def broken():
        yield from TEXTS[:40]
        raise OSError("the disk fails")

    for texts, error, sentence in (
        (broken(), OSError, "the disk fails"),
        (iter([*TEXTS[:40], None, "the"]), ValueError, "text 40 is None, expected a str or a list of str"),
        (iter([*TEXTS[:40], b"the"]), ValueError, "text 40 is b'the', expected"),
        (iter([*TEXTS[:40], ["the", 3]]), ValueError, "text 40 is .'the', 3., expected"),
    ):
        got = []
        with pytest.raises(error, match=sentence):
            got.extend(encoder.encode_stream(texts, batch_tokens=64))
        assert len(got) == 40
    assert list(encoder.encode_stream([])) == []
    for texts in ("a text", 3):
        with pytest.raises(ValueError, match="expected texts, each a str or a list of str"):
            next(encoder.encode_stream(texts))


def test_a_stream_that_is_left_ends_its_thread(encoder):
    stream = encoder.encode_stream(iter(TEXTS * 5), batch_tokens=64)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenize")]


# Compiled programs

START = """
import sys
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
from embed import inference
inference.load(sys.argv[1]).encode(["the file"])
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def test_the_next_process_loads_the_programs_that_a_process_has_compiled(tmp_path):
    model = small.write_model(tmp_path / "model")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment = {**plain, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start(**more):
        command = [sys.executable, "-c", START, str(model)]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=True)
        hits, folder = done.stdout.split()
        return int(hits), folder

    compiled = tmp_path / "cache" / "embed" / "compiled"
    assert start() == (0, str(compiled))
    files = sorted(compiled.iterdir())
    hits, _ = start()
    assert hits > 2 and len(files) > hits
    assert start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[1] == str(tmp_path / "own")
    assert start(JAX_ENABLE_COMPILATION_CACHE="false") == (0, "None")
