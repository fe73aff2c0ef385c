"""Late chunking of texts of any length: windows, overlapping chunks, chunkers."""

import re
from pathlib import Path

import numpy as np
import pytest
import small

from embed import inference, rows
from embed.inference import chunkers
from embed.models import transformer

ROOT = Path(__file__).parents[2]
TEXT = " ".join(small.sentences(30))


def words(size, overlap=0):
    """A chunker of `size` words."""

    def chunk(text):
        starts = [0] + [i + 1 for i, c in enumerate(text) if c == " "]
        ends = [i for i, c in enumerate(text) if c == " "] + [len(text)]
        return [(starts[i], ends[min(i + size, len(ends)) - 1]) for i in range(0, len(starts), size - overlap)]

    return chunk


@pytest.fixture(scope="module")
def encoder():
    return small.encoder()


def hidden(encoder, tokens):
    """The last hidden state of each token of a text, from one row of the model."""
    ids = np.asarray(tokens, np.int32)[None]
    ones, positions = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
    return np.asarray(transformer.apply(encoder.config, encoder.params, ids, ones, positions))[0]


@pytest.mark.parametrize("precision", inference.PRECISIONS)
def test_chunks_that_do_not_overlap_have_the_vectors_of_encode_documents(encoder, precision):
    chunks = encoder.encode_long(TEXT, words(7), precision=precision)
    assert chunks.texts == [TEXT[a:b] for a, b in chunks.offsets] and " ".join(chunks.texts) == TEXT
    (want,) = encoder.encode_documents([chunks.texts], precision=precision)
    assert chunks.vectors.dtype == want.dtype
    if precision == "float32":
        np.testing.assert_allclose(chunks.vectors, want, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(chunks.vectors, want)


def test_several_texts_give_the_chunks_of_each(encoder):
    texts = [TEXT, "the file", TEXT[:50]]
    for got, text in zip(encoder.encode_long(texts, words(5)), texts, strict=True):
        alone = encoder.encode_long(text, words(5))
        assert got.texts == alone.texts
        np.testing.assert_allclose(got.vectors, alone.vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("separator", [False, True])
def test_overlapping_chunks_are_means_over_the_tokens_of_one_encoding(separator):
    encoder = small.encoder(separator=separator)
    text = "the file of a list of the index"
    chunks = encoder.encode_long(text, words(4, overlap=2))
    assert chunks.texts == ["the file of a", "of a list of", "list of the index", "the index"]
    pieces = encoder.tokenizer.encode(["the file", "of a", "list of", "the index"])
    mark = [[encoder.tokenizer.separator_id]] if separator else []
    # Chunks begin at every piece, so that a separator stands before all but the first.
    parts = [pieces[0], *(p for piece in pieces[1:] for p in (*mark, piece))]
    states = np.split(hidden(encoder, np.concatenate(parts)), np.cumsum([len(p) for p in parts])[:-1])
    states = states[:: 1 + separator]
    for vector, members in zip(chunks.vectors, ((0, 1), (1, 2), (2, 3), (3,)), strict=True):
        want = np.concatenate([states[i] for i in members]).mean(0)
        np.testing.assert_allclose(vector, want, rtol=1e-5, atol=1e-5)


def test_a_separator_stands_only_where_a_chunk_begins(encoder):
    text = "the file of a list of the index"
    chunks = [(0, 13), (9, 31)]  # "the file of a", "of a list of the index": pieces the file | of a | list …
    got = encoder.encode_long(text, lambda _: chunks)
    a, b, c = encoder.tokenizer.encode(["the file ", "of a", " list of the index"])
    states = hidden(encoder, [*a, encoder.tokenizer.separator_id, *b, *c])
    after = len(a) + 1
    want = [np.concatenate([states[: len(a)], states[after : after + len(b)]]).mean(0), states[after:].mean(0)]
    np.testing.assert_allclose(got.vectors, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("size", [3, 40])
def test_a_long_text_takes_each_token_from_the_window_where_it_sees_most_context(size, pooling):
    encoder = small.encoder(pooling=pooling)
    chunks = encoder.encode_long(TEXT, words(size), window=60)
    segment = rows.chunked(encoder.tokenizer.encode(chunks.texts), encoder.tokenizer.separator_id)
    states = np.zeros((len(segment.tokens), encoder.dimensions), np.float32)
    count = -(-2 * (len(segment.tokens) - 60) // 60) + 1
    starts = np.linspace(0, len(segment.tokens) - 60, count).round().astype(int)
    assert count > 5
    side = np.full(len(segment.tokens), -1)  # the context on the shorter side
    for start in starts:
        window = np.arange(start, start + 60)
        of_window = np.minimum(window - start, start + 59 - window)
        better = of_window >= side[window]  # of equal ones the later
        states[window[better]] = hidden(encoder, segment.tokens[window])[better]
        side[window[better]] = of_window[better]
    for k, vector in enumerate(chunks.vectors):
        members = states[segment.spans == k + 1]
        want = members.mean(0) if pooling == "mean" else members[-1]
        np.testing.assert_allclose(vector, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10**6, 500])
def test_windows_that_hold_the_text_give_its_full_encoding(encoder, window):
    text = TEXT[:900]
    assert len(encoder.tokenizer.encode([text])[0]) < 450
    full = encoder.encode_long(text, words(9), window=10**6)
    np.testing.assert_allclose(
        encoder.encode_long(text, words(9), window=window).vectors, full.vectors, rtol=1e-6, atol=1e-6
    )


def test_the_window_is_by_default_the_context_of_training_or_else_the_longest_text():
    for how, window in ((dict(context_length=50), 50), (dict(max_length=70), 70)):
        encoder = small.encoder(**how)
        want = small.encoder().encode_long(TEXT, words(9), window=window).vectors
        np.testing.assert_allclose(encoder.encode_long(TEXT, words(9)).vectors, want, rtol=1e-5, atol=1e-6)


def test_encode_documents_divides_documents_longer_than_the_context_likewise(encoder):
    documents = [small.sentences(20), ["the", "a"], [TEXT], ["", *small.sentences(9, seed=1), ""]]
    spaced, ends = " ".join(documents[0]), np.cumsum([len(chunk) + 1 for chunk in documents[0]]) - 1
    offsets = [(end - len(chunk), end) for chunk, end in zip(documents[0], ends)]
    within = small.encoder(context_length=50)
    segments, _ = encoder.fit_documents(documents)
    assert [len(s.tokens) > 50 for s in segments] == [True, False, True, True]
    got = within.encode_documents(documents)
    long = encoder.encode_long(spaced, lambda _: offsets, window=50)
    for a, b in zip(got, [long.vectors, *encoder.encode_documents(documents[1:3])]):
        # The windows are packed into other rows here, so sums run in another order: values of order 1 in float32.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not got[3][[0, -1]].any() and got[3][1:-1].any(1).all()
    for a, b in zip(within.encode_documents(documents, precision="int8"), got, strict=True):
        np.testing.assert_array_equal(a, encoder.quantize(b, "int8"))


def test_texts_cut_by_a_chunker_that_gives_wrong_offsets_are_refused_by_name(encoder):
    for chunks, sentence in (
        ([(0, 99)], r"the text: chunk 0 has offsets \(0, 99\), expected 0 <= start < end <= 8"),
        ([(4, 8), (0, 3)], r"chunk 1 has offsets \(0, 3\), expected 4 <= start"),
        ([(3, 3)], r"chunk 0 has offsets \(3, 3\)"),
        (["the"], "chunk 0 is 'the', expected character offsets"),
        ([], "the chunker found no chunk in its 8 characters"),
    ):
        with pytest.raises(ValueError, match=sentence):
            encoder.encode_long("the file", lambda _, chunks=chunks: chunks)
    with pytest.raises(ValueError, match="row 2: the chunker found no chunk"):
        encoder.encode_long(["the file", ""], lambda text: [(0, 3)] if text else [], names=["row 1", "row 2"])
    with pytest.raises(ValueError, match="window=0 must be positive"):
        encoder.encode_long("the file", words(2), window=0)


def test_the_program_of_the_page_runs(encoder, tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "long.md").read_text(), re.S)
    small.write_model(tmp_path / "runs/quickstart/export/embed-context")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program, names)
    assert len(names["chunks"].texts) > 10


# --- chunkers ----------------------------------------------------------------------------------------------------


def chunk(chunker, text):
    return [text[a:b] for a, b in chunkers.check(chunker(text), len(text), "the text")]


def test_tokens_overlap_and_the_last_chunk_reaches_the_end(encoder):
    tokenizer = encoder.tokenizer
    text = "the file of a list of the index of the vector"
    assert chunk(chunkers.tokens(tokenizer, 4), text) == ["the file of a", " list of the index", " of the vector"]
    assert chunk(chunkers.tokens(tokenizer, 4, 2), text) == [
        "the file of a",
        " of a list of",
        " list of the index",
        " the index of the",
        " of the vector",
    ]
    for size in (1, 3, 11, 50):
        parts = chunk(chunkers.tokens(tokenizer, size), text)
        assert "".join(parts) == text and len(parts) == -(-11 // size)
    with pytest.raises(ValueError, match=r"overlap=4 must be in 0\.\.3"):
        chunkers.tokens(tokenizer, 4, 4)


@pytest.mark.parametrize("name", ["sentences", "paragraphs", "markdown", "code"])
def test_a_sentence_that_is_too_long_is_divided_into_few_chunks(name, encoder):
    long = "the list of a file and " * 30
    text = f"# The file.\n\nA list. {long.strip()}.\n\nThe end.\n"
    if name == "code":
        text = f"def first():\n    return [{', '.join(['the_list'] * 60)}]\n\n\ndef second():\n    return 1\n"
    offsets = chunkers.make(name, encoder, size=24)(text)
    sizes = [len(encoder.tokenizer.encode([text[a:b]])[0]) for a, b in offsets]
    total = len(encoder.tokenizer.encode([text])[0])
    assert max(sizes) <= 24 and len(sizes) <= total / 24 * 1.5 + 4
    assert "".join("".join(text[a:b].split()) for a, b in offsets) == "".join(text.split())


def test_sentences_are_units_and_short_ones_are_joined(encoder):
    text = "Dr. Smith opens the file. It is a list!  Read the index of\nthe token? The end."
    sentences = ["Dr. Smith opens the file.", "It is a list!", "Read the index of\nthe token?", "The end."]
    assert chunk(chunkers.sentences(encoder.tokenizer), text) == sentences
    joined = chunk(chunkers.sentences(encoder.tokenizer, least=15), text)
    assert 1 < len(joined) < 4
    for part in joined[:-1]:
        assert len(encoder.tokenizer.encode([part])[0]) >= 15
    assert chunk(chunkers.sentences(encoder.tokenizer, language="ja"), "読む。書く。") == ["読む。", "書く。"]
    divided = chunk(chunkers.sentences(encoder.tokenizer, 6), text)
    assert all(len(encoder.tokenizer.encode([part])[0]) <= 6 for part in divided) and len(divided) > 8


def test_markdown_is_divided_at_headings_and_code_at_functions(encoder):
    text = "# File\n\nRead it.\n\n## Index\n\nThe index.\n\nA list.\n\n## Token\n\nThe end.\n"
    assert chunk(chunkers.markdown(encoder.tokenizer, 40), text) == [
        "# File\n\nRead it.",
        "## Index\n\nThe index.\n\nA list.",
        "## Token\n\nThe end.",
    ]
    assert chunk(chunkers.paragraphs(encoder.tokenizer, 20), "The file.\nA list.\n\nThe end.") == [
        "The file.\nA list.",
        "The end.",
    ]
    units = [
        "import os",
        "def read(file):\n    return open(file)",
        "class Index:\n    def search(self):\n        return 1",
    ]
    assert chunk(chunkers.code(encoder.tokenizer, 50), "\n\n\n".join(units)) == units
    assert chunk(chunkers.markdown(encoder.tokenizer, 500), text) == [text.strip()]  # one section of the first level
    with pytest.raises(ValueError, match="needs the package tree-sitter-cobol: pip install tree-sitter-cobol"):
        chunkers.code(encoder.tokenizer, language="cobol")


def test_by_content_divides_where_the_vectors_change(encoder):
    before, after = (
        "The file of a file. Open the file. Read a file. Write the file.",
        "Query vector. Search the index vector query.",
    )
    text = f"{before} {after}"
    counts = [len(encoder.tokenizer.encode([part])[0]) for part in (before, after)]

    class Spy(inference.Encoder):
        """Gives the sentences before and after the change two orthogonal vectors."""

        def encode_long(self, text, chunker):
            offsets = np.array(chunker(text))
            return type("Chunks", (), {"vectors": np.where(offsets[:, :1] < len(before), [[1.0, 0.1]], [[0.0, 1.0]])})

    same = " ".join(["The file of a file."] * 60)
    assert [part.count(".") for part in chunk(chunkers.by_content(encoder, 40), same)].count(1) < 3
    spy = Spy(small.params(), small.config(), encoder.tokenizer)
    assert chunk(chunkers.by_content(spy, max(counts)), text) == [before, after]
    assert chunk(chunkers.by_content(spy, sum(counts) + 9), text) == [text]
    parts = chunk(chunkers.by_content(encoder, 20), TEXT[:400] + ". The end of the file. The list.")
    assert all(len(encoder.tokenizer.encode([part])[0]) <= 20 for part in parts) and len(parts) > 4


def test_a_chunker_is_made_by_its_name_and_other_arguments_are_refused(encoder):
    for name in chunkers.NAMES:
        assert chunk(chunkers.make(name, encoder, size=40), "The file. A list.")
    assert chunk(chunkers.make("tokens", encoder, size=2, overlap=1), "the file of") == ["the file", " file of"]
    with pytest.raises(ValueError, match="chunker='words' must be one of tokens, sentences"):
        chunkers.make("words", encoder)
    with pytest.raises(ValueError, match="overlap=3 is for the chunker tokens, not code"):
        chunkers.make("code", encoder, overlap=3)
    with pytest.raises(ValueError, match="least=9 is not for the chunker tokens"):
        chunkers.make("tokens", encoder, least=9)
    with pytest.raises(ValueError, match="language='de' is for the chunkers sentences, content and code, not markdown"):
        chunkers.make("markdown", encoder, language="de")
    with pytest.raises(ValueError, match="least=9 and size=8 tokens"):
        chunkers.make("markdown", encoder, size=8, least=9)
