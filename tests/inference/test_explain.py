"""What the tokens of a chunk contribute to its score."""

import io
import re

import matplotlib.image
import numpy as np
import pytest
import small

from embed import cli, inference
from embed.inference import chunkers
from embed.inference.explain import explain, page, picture

QUERY, TEXT = "search the index", " ".join(small.sentences(6, seed=2))


@pytest.fixture(scope="module")
def encoder():
    return small.encoder()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("overlap", [0, 3])
def test_the_contributions_of_a_chunk_add_up_to_its_cosine(pooling, overlap):
    encoder = small.encoder(pooling=pooling)
    chunker = chunkers.tokens(encoder.tokenizer, 10, overlap)
    chunks = explain(encoder, QUERY, TEXT, chunker, window=40)
    vectors = encoder.encode_long(TEXT, chunker, window=40).vectors
    want = inference.similarity(encoder.encode([QUERY]), vectors)[0]
    assert len(chunks) > 5
    for chunk, score in zip(chunks, want, strict=True):
        assert chunk.score == pytest.approx(score, abs=1e-5)
        assert chunk.contributions.sum() == pytest.approx(chunk.score, abs=1e-5)
        assert len(chunk.offsets) == len(chunk.contributions) == 10 or chunk is chunks[-1]
        assert np.count_nonzero(chunk.contributions) == (1 if pooling == "last" else len(chunk.offsets))
        assert chunk.start <= chunk.offsets.min() and chunk.offsets.max() <= chunk.end


def test_a_contribution_is_what_the_score_loses_if_the_token_were_orthogonal_to_the_query(encoder):
    (chunk,) = explain(encoder, QUERY, TEXT[:40])
    (segment,), _ = encoder.fit_texts([TEXT[:40]])
    (hidden,) = encoder.hidden_states([segment])
    asked = encoder.encode(QUERY)
    pooled = hidden.mean(0)
    np.testing.assert_allclose(pooled, encoder.encode(TEXT[:40]), atol=1e-5)
    dots = hidden @ asked / (len(hidden) * np.linalg.norm(asked) * np.linalg.norm(pooled))
    np.testing.assert_allclose(chunk.contributions, dots, atol=1e-6)


def test_the_page_shows_the_whole_text_and_escapes_it(encoder):
    text = "the <b>file</b> & a list\nof tokens"
    chunks = explain(encoder, "a <query>", text)
    shown = page("a <query>", text, chunks)
    (body,) = re.findall(r"<pre>(.*?)</pre>", shown, re.S)
    plain = re.sub(r"<[^>]*>", "", body).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert plain == text and "a &lt;query&gt;" in shown and "<b>" not in shown
    values = [float(value) for value in re.findall(r'title="([+-][\d.]+)"', body)]
    np.testing.assert_allclose(values, chunks[0].contributions, atol=6e-5)


def test_the_picture_has_colors_where_tokens_contribute(encoder):
    file = io.BytesIO()
    picture("costs $5 or $6", TEXT, explain(encoder, QUERY, TEXT, chunkers.tokens(encoder.tokenizer, 30)), file)
    file.seek(0)
    pixels = matplotlib.image.imread(file, format="png")[..., :3]
    assert (np.ptp(pixels, axis=2) > 0.3).mean() > 0.01  # not gray


def test_the_verb_prints_a_table_and_writes_a_page_or_a_picture(tmp_path, capsys):
    model = small.write_model(tmp_path / "model")
    (tmp_path / "text.md").write_text("The file. A list of the index. A vector of the query.")
    command = ["explain", f"--model={model}", "--query=the index", f"--file={tmp_path / 'text.md'}"]
    command += ["--chunker=sentences", "--chunk_tokens=20"]
    assert cli.main([*command, f"--output={tmp_path / 'map.html'}"]) == 0
    shown = capsys.readouterr().out
    assert "0–9" in shown and "10–30" in shown and "31–53" in shown
    assert (tmp_path / "map.html").read_text().count("<pre>") == 3
    assert cli.main([*command, "--top=1", f"--output={tmp_path / 'map.png'}"]) == 0
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*command, f"--output={tmp_path / 'map.html'}"]) == 2
    assert cli.main([*command, f"--output={tmp_path / 'map.html'}", "--overwrite"]) == 0
    capsys.readouterr()
    for arguments, sentence in (
        (["--output=map.pdf"], "--output=map.pdf must end in .html or .png"),
        (["--top=-1"], "--top=-1 must be positive"),
        (["--overlap=2"], "overlap=2 is for the chunker tokens, not sentences"),
        ([f"--file={tmp_path}/none"], "no file"),
    ):
        assert cli.main([*command, *arguments]) == 2
        assert sentence in capsys.readouterr().err
