import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from embed import tokenizers
from embed.preparation.vocabulary import identifier_rules, train_sentencepiece

TEXTS = [
    f"def parse_config_{i}(path, HTTPServer): return open(path).readConfig(value{i}) or parse('Config {i}')"
    for i in range(300)
] + ["Reads the configuration of a server.", "größe ﬁne Straße"] * 20


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    train_sentencepiece(TEXTS, folder, vocab_size=160)
    return tokenizers.load(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train_sentencepiece(TEXTS, folder, vocab_size=400, split_identifiers=False)
    return tokenizers.load(folder)


def test_identifiers_are_split_into_the_words_of_prose(split):
    words = split.encode(["parse the http server"])[0]
    for text in ("parse_the_HTTPServer", "parseTheHttpServer", "parse the\n\tHTTP server"):
        np.testing.assert_array_equal(split.encode([text])[0], words, err_msg=text)


def test_without_splitting_case_and_bytes_survive_a_round_trip(plain):
    for text in ("parse_config", "HTTPServer", "größe 中"):
        assert plain.decode(plain.encode([text])[0]) == text


def test_offsets_are_those_of_the_tokens_in_the_text(split, plain, tmp_path):
    for tokenizer in (split, plain, tokenizers.load(bpe(tmp_path))):
        for text in ("parse_the  HTTPServer config", "größe 中 ﬁne", "a\n\tb ", "x🎉y", ""):
            offsets = tokenizer.offsets(text)
            ids = tokenizer.encode([text])[0]
            assert offsets.shape == (len(ids), 2) and offsets.dtype == np.int32
            assert (offsets[:, 0] <= offsets[:, 1]).all() and (np.diff(offsets[:, 0]) >= 0).all()
            in_tokens = {c for start, end in offsets for c in range(start, end)}
            assert all(c in in_tokens for c, character in enumerate(text) if character.isalnum()), text
        words = "parse the file config".split()
        found = ["parse the file config"[a:b].strip() for a, b in tokenizer.offsets("parse the file config")]
        assert "".join(found) == "".join(words)


def test_a_sentencepiece_model_that_is_empty_or_cut_anywhere_is_refused_without_noise(tmp_path, capfd):
    train_sentencepiece(TEXTS, tmp_path, vocab_size=60)
    file = tmp_path / "sentencepiece.model"
    whole = file.read_bytes()
    tokenizers.load(tmp_path)
    capfd.readouterr()
    pieces = whole.index(b"<sep>") + 200  # many cuts here fall between two pieces
    for size in (*range(pieces), *range(pieces, len(whole), 997), len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"sentencepiece.model: not a SentencePiece model \({size} bytes\)"):
            tokenizers.load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_control_tokens_have_fixed_ids_and_text_never_yields_them(split, plain):
    for tokenizer in (split, plain):
        assert (tokenizer.mask_id, tokenizer.separator_id) == (2, 3)
        ids = np.concatenate(tokenizer.encode(["<mask> <sep> <pad> <unk>", "a<mask>b"]))
        assert not np.isin(ids, [0, 2, 3]).any()


def bpe(folder, **changes):
    """A byte-level BPE that does not split words first, so that special tokens occur inside words."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(TEXTS, hf.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model.add_special_tokens(["<|end|>", "ing"])  # "ing" occurs in words
    model.add_tokens(["<tool>"])
    fields = json.loads(model.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(fields | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|end|>"}))
    return folder


def test_special_tokens_written_out_in_a_text_are_plain_text_even_inside_words(tmp_path):
    tokenizer = tokenizers.load(bpe(tmp_path))
    end, ing = tokenizer.separator_id, tokenizer.separator_id + 1
    for text in ("<|end|>", "a <|end|> b", "a<|end|><|end|>b", "singing", "ing"):
        (ids,) = tokenizer.encode([text])
        assert not {end, ing} & set(ids.tolist()) and tokenizer.decode(ids) == text
    plain = bpe(tmp_path, added_tokens=[]) and hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a <|end|> singing", *TEXTS[:3]):  # as without any special token
        np.testing.assert_array_equal(tokenizer.encode([text])[0], plain.encode(text).ids)


def test_an_added_token_that_is_not_special_is_found_in_texts_unless_it_is_the_mask_or_the_separator(tmp_path):
    tokenizer = tokenizers.load(bpe(tmp_path))
    (tool,) = tokenizer.encode(["<tool>"])[0]
    for ids in (dict(mask_id=int(tool)), dict(mask_id=1000, separator_id=int(tool))):
        config(tmp_path, **dict(separator_id=tokenizer.separator_id) | ids)
        other = tokenizers.load(tmp_path)
        (found,) = other.encode(["a <tool>"])
        assert tool not in found and other.decode(found) == "a <tool>" and other.decode([tool]) == ""
        assert other.digest != tokenizer.digest
        for save in ("save", "save_for_transformers"):
            (tmp_path / save).mkdir(exist_ok=True)
            getattr(other, save)(tmp_path / save, *([None] if save != "save" else []))
            assert tokenizers.load(tmp_path / save).digest == other.digest


def test_a_control_token_that_the_vocabulary_gives_to_texts_is_refused(huggingface, tmp_path):
    config(huggingface, sep_token="file")
    with pytest.raises(ValueError, match="the text 'file' yields the control token 'file': a separator, mask or other"):
        tokenizers.load(huggingface)
    config(huggingface, sep_token="[UNK]")
    with pytest.raises(ValueError, match="the unknown token '.UNK.' cannot be the separator or the mask"):
        tokenizers.load(huggingface)
    fields = json.loads(bpe(tmp_path).joinpath("tokenizer.json").read_text())
    fields["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="dropout=0.1 makes tokens random, expected null"):
        tokenizers.load(tmp_path)


def test_a_sentencepiece_model_without_mask_and_separator_as_control_symbols_is_refused(tmp_path):
    model = io.BytesIO()
    options = dict(vocab_size=60, hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, user_defined_symbols=["<mask>", "<sep>"], **options
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="spiece.model: the SentencePiece model has no control symbol '<mask>'"):
        tokenizers.load(tmp_path)


def test_a_text_that_is_not_valid_unicode_is_refused_with_its_index(split, tmp_path):
    for tokenizer in (split, tokenizers.load(bpe(tmp_path))):
        with pytest.raises(ValueError, match=r"^text 3 holds a lone surrogate U\+D800 at character 17: not valid"):
            tokenizer.encode(["a", "b", "🙂", "x" * 17 + "\ud800", "\udc00"])
        for wrong, shown in ((None, r"None \(NoneType"), (b"x", r"b'x' \(bytes"), (["x"], r"\['x'\] \(list")):
            with pytest.raises(ValueError, match=f"^text 1 is {shown}"):
                tokenizer.encode(["a", wrong])
        with pytest.raises(ValueError, match="not one string"):
            tokenizer.encode("a")


def test_encoding_adds_nothing_and_an_empty_text_has_no_tokens(split):
    one, both = split.encode(["server"])[0], split.encode(["server config"])[0]
    np.testing.assert_array_equal(both[: len(one)], one)
    assert [len(ids) for ids in split.encode(["", "  \n "])] == [0, 0]
    assert all(ids.dtype == np.int32 for ids in split.encode(["", "x"]))


def test_many_texts_at_once_equal_one_at_a_time(split):
    together = split.encode(TEXTS)
    for text, ids in zip(TEXTS[::50], together[::50]):
        np.testing.assert_array_equal(ids, split.encode([text])[0])


def test_training_is_deterministic_and_digests_distinguish_models(split, plain, tmp_path):
    train_sentencepiece(TEXTS, tmp_path, vocab_size=160)
    assert tokenizers.load(tmp_path).digest == split.digest != plain.digest


def test_a_saved_tokenizer_loads_unchanged(split, tmp_path):
    split.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.digest == split.digest and again.vocab_size == split.vocab_size


def test_rules_fold_ligatures_and_split_runs_of_capitals():
    rules = identifier_rules()
    assert rules["ﬁ"] == "fi" and rules["eC"] == "e c" and rules["PSe"] == "p se" and rules["_"] == " "


def test_a_vocabulary_without_texts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one training text"):
        train_sentencepiece([], tmp_path, vocab_size=50)


@pytest.fixture
def huggingface(tmp_path):
    model = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "read": 1, "file": 2, "<m>": 3, "<s>": 4}, unk_token="[UNK]"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_id": 3, "separator_id": 4}))
    return tmp_path


def test_a_hugging_face_tokenizer_adds_no_special_tokens(huggingface, tmp_path):
    tokenizer = tokenizers.load(huggingface)
    assert [ids.tolist() for ids in tokenizer.encode(["read file", "file what", ""])] == [[1, 2], [2, 0], []]
    assert (tokenizer.mask_id, tokenizer.separator_id, tokenizer.vocab_size) == (3, 4, 5)
    tokenizer.save(tmp_path / "copy")
    assert tokenizers.load(tmp_path / "copy").digest == tokenizer.digest


def test_a_digest_depends_on_the_tokens_of_texts_and_not_on_the_layout_of_the_file(huggingface, tmp_path):
    digest = tokenizers.load(huggingface).digest
    file = huggingface / "tokenizer.json"
    fields = json.loads(file.read_text())
    same = {**dict(reversed(fields.items())), "post_processor": None, "padding": None, "truncation": None}
    file.write_text(json.dumps(same, indent=4))
    assert tokenizers.load(huggingface).digest == digest
    fields["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    file.write_text(json.dumps(fields))
    assert tokenizers.load(huggingface).digest != digest


def test_a_tokenizer_saved_for_transformers_loads_unchanged(huggingface, split, tmp_path):
    for i, tokenizer in enumerate((tokenizers.load(huggingface), split)):
        (tmp_path / str(i)).mkdir()
        tokenizer.save_for_transformers(tmp_path / str(i), 512)
        again = tokenizers.load(tmp_path / str(i))
        for name in ("digest", "mask_id", "separator_id", "vocab_size"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_tokenizers_are_saved_to_and_loaded_from_a_bucket(bucket, huggingface, split):
    for i, tokenizer in enumerate((tokenizers.load(huggingface), split)):
        tokenizer.save(f"{bucket}/tokenizers/{i}")
        again = tokenizers.load(f"{bucket}/tokenizers/{i}")
        assert (again.digest, again.mask_id, again.separator_id) == (
            tokenizer.digest,
            tokenizer.mask_id,
            tokenizer.separator_id,
        )
    with pytest.raises(FileNotFoundError, match="no tokenizer in gs://"):
        tokenizers.load(f"{bucket}/tokenizers/nowhere")


def config(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_by_default_the_mask_is_the_first_id_after_the_vocabulary(huggingface):
    config(huggingface, separator_id=4)
    tokenizer = tokenizers.load(huggingface)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (5, 5)
    assert tokenizer.decode([1, tokenizer.mask_id, 2]) == "read file"


@pytest.mark.parametrize(
    "fields, separator",
    [
        (dict(sep_token="<m>", pad_token="<s>"), 3),
        (dict(sep_token=None, pad_token={"content": "<s>"}), 4),
        (dict(eos_token="<s>"), 4),
    ],
)
def test_the_separator_of_a_third_party_folder_is_its_sep_or_pad_or_eos_token(huggingface, fields, separator):
    config(huggingface, **fields)
    assert tokenizers.load(huggingface).separator_id == separator


def test_missing_and_wrong_files_are_named(huggingface, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected sentencepiece.model, spiece.model or tokenizer.json"):
        tokenizers.load(tmp_path / "nowhere")
    for fields, message in [
        (dict(separator_id=99), "separator_id = 99 is outside the vocabulary of 5 tokens"),
        (dict(separator_id=4, mask_id=-1), "mask_id = -1 must be in 0..2147483647"),
        (dict(separator_id=4, mask_id=10**30), "mask_id = 1000000000000000000000000000000 must be in 0..2147483647"),
        (dict(separator_id="4"), "has separator_id = '4', expected an integer"),
        (dict(pad_token="[PAD]"), "the separator '.PAD.' of tokenizer_config.json is not in the vocabulary"),
        (dict(sep_token=[3]), "has sep_token = .3., expected a token"),
        (dict(mask_id=3), "names no separator: it needs separator_id, sep_token, pad_token or eos_token"),
    ]:
        config(huggingface, **fields)
        with pytest.raises(ValueError, match=message):
            tokenizers.load(huggingface)
    (huggingface / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it must name the separator"):
        tokenizers.load(huggingface)
    (tmp_path / "sentencepiece.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds sentencepiece.model and tokenizer.json: keep the one to use"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizers.load(tmp_path)
