"""SentencePiece and Hugging Face tokenizers behind one small face. Encoding adds no special tokens.

A text never yields a control token: the mask, the separator, the padding or any other special token. One that is
written out in a text, "<|endoftext|>", is tokenized as the characters that it is, by both kinds of tokenizers. So no
text can end a document, split a chunk or hide a token. In transformers that is `split_special_tokens=True`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from embed import paths

SENTENCEPIECE_FILES = ("sentencepiece.model", "spiece.model")  # ours; as transformers names it
HUGGINGFACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Of a tokenizer.json: what changes the tokens of a text.
SECTIONS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
SENTENCEPIECE_CLASS = "BertGenerationTokenizer"  # of transformers: runs the model itself, and adds nothing to a text
NO_LIMIT = 10**30  # what transformers writes for a tokenizer without a longest text


class Tokenizer(Protocol):
    """`digest` is a sha256 (hex) of the model: two tokenizers with one digest give the same tokens, and a model has it
    wherever it is saved.

    Of the special tokens a text yields the unknown token alone, where the vocabulary has one.

    `vocab_size` is one more than the largest id of texts and separator: the rows an encoder's table needs. The mask of
    the diffusion stage may lie behind it.
    """

    vocab_size: int
    mask_id: int
    separator_id: int
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32[length] of each text. ValueError for what is not a str, or not valid Unicode."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; control tokens (mask, separator, padding) give nothing."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load` reads to a folder on a disk or in a bucket."""

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """Writes the files that transformers' AutoTokenizer and `load` read; both give the same tokens."""


class SentencePieceTokenizer:
    """A SentencePiece model with control symbols <mask> and <sep> (see `embed.preparation.vocabulary`)."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {_first_line(error)}") from None
        self.vocab_size = self._processor.vocab_size()
        self.mask_id = self._id("<mask>")
        self.separator_id = self._id("<sep>")
        self.digest = hashlib.sha256(model).hexdigest()

    def _id(self, piece: str) -> int:
        index = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(index) != piece or not self._processor.is_control(index):
            raise ValueError(
                f"the SentencePiece model has no control symbol {piece!r}: train it with that control symbol"
            )
        return index

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = _texts(texts)
        # Threads cost more than they bring on a handful of texts.
        threads = -1 if len(texts) >= 64 else 1
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(texts, num_threads=threads)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: str | os.PathLike) -> None:
        paths.write(paths.path(folder) / SENTENCEPIECE_FILES[0], self._model)

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """As a class of transformers that runs SentencePiece itself and adds no token to a text.

        Multi-character rules of the normalisation (`embed.preparation.vocabulary`) cannot be said in a tokenizer.json.
        """
        Path(folder, SENTENCEPIECE_FILES[1]).write_bytes(self._model)
        piece = self._processor.id_to_piece
        pad, unknown = piece(self._processor.pad_id()), piece(self._processor.unk_id())
        _write_config(
            folder,
            tokenizer_class=SENTENCEPIECE_CLASS,
            split_special_tokens=True,
            model_max_length=max_length or NO_LIMIT,
            # Every symbol that the class has must be a piece that exists, or it is given an id beyond the table.
            pad_token=pad,
            bos_token=pad,
            eos_token=pad,
            unk_token=unknown,
            sep_token=piece(self.separator_id),
            mask_id=self.mask_id,
            separator_id=self.separator_id,
        )


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, and which ids mask and separate.

    The mask is by default the first id behind the vocabulary: a row that Qwen's table has and that no text yields.
    """

    def __init__(self, model: str, *, separator: int | str, mask_id: int | None = None):
        """`separator` is an id or a token."""
        import tokenizers

        _check_sections(model)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"not a tokenizer.json ({len(model)} characters): {_first_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        separator_id = self._tokenizer.token_to_id(separator) if isinstance(separator, str) else separator
        if separator_id is None:
            raise ValueError(f"the separator {separator!r}, which {CONFIG_FILE} names, is not in the vocabulary")
        # Not their number: ids may have gaps.
        entries = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 <= separator_id < entries:
            raise ValueError(f"separator_id = {separator_id} is outside the vocabulary of {entries} tokens")
        mask_id = entries if mask_id is None else mask_id
        if not 0 <= mask_id < 2**31:
            raise ValueError(f"mask_id = {mask_id} must be in 0..{2**31 - 1}")
        self.vocab_size = entries
        self.mask_id = mask_id
        self.adds_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0  # left to itself, to a text
        self.separator_id = separator_id
        self._model = self._control(model)
        # Without what `encode` does not do: an export leaves it out. With how it treats control tokens.
        fields = json.loads(self._model)
        parts = {k: v for k, v in fields.items() if k not in ("post_processor", "truncation", "padding")}
        parts["encode_special_tokens"] = True
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _control(self, model: str) -> str:
        """Have no text yield a control token; returns the tokenizer.json with separator and mask as special tokens.

        ValueError where that cannot be: the vocabulary itself gives the token to texts.
        """
        import tokenizers

        added = self._tokenizer.get_added_tokens_decoder()
        names = {index: self._tokenizer.id_to_token(index) for index in (self.separator_id, self.mask_id)}
        ordinary = [name for i, name in names.items() if name is not None and not (i in added and added[i].special)]
        if ordinary:
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in ordinary])
            model = self._tokenizer.to_str()
        self._tokenizer.encode_special_tokens = True
        fields = json.loads(model)["model"]
        if fields.get("dropout"):
            raise ValueError(f"dropout={fields['dropout']!r} draws other tokens each time, expected null")
        unknown = fields.get("unk_token")
        if fields.get("unk_id") is not None:
            unknown = self._tokenizer.id_to_token(fields["unk_id"])
        if unknown is not None and unknown in names.values():
            raise ValueError(f"the unknown token {unknown!r} cannot be the separator or the mask: texts yield it")
        added = self._tokenizer.get_added_tokens_decoder()
        control = {i: token.content for i, token in added.items() if token.special and token.content != unknown}
        probes = [probe for name in control.values() for probe in (name, f" {name} ", f"a{name}a")]
        for probe, encoding in zip(probes, self._tokenizer.encode_batch(probes, add_special_tokens=False)):
            if found := control.keys() & set(encoding.ids):
                raise ValueError(
                    f"the text {probe!r} yields the control token {control[min(found)]!r}: a separator, mask or other "
                    "special token must not be a word of the vocabulary"
                )
        return model

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch(_texts(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        paths.write(paths.path(folder) / HUGGINGFACE_FILE, self._model)
        _write_config(folder, mask_id=self.mask_id, separator_id=self.separator_id)

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """Without the post-processor if that would add tokens to a text, as `encode` adds none."""
        model = json.loads(self._model)
        if self.adds_tokens:
            model["post_processor"] = None
        model |= {"truncation": None, "padding": None}
        Path(folder, HUGGINGFACE_FILE).write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
        separator = self._tokenizer.id_to_token(self.separator_id)
        _write_config(
            folder,
            tokenizer_class="PreTrainedTokenizerFast",
            split_special_tokens=True,
            model_max_length=max_length or NO_LIMIT,
            pad_token=separator,
            sep_token=separator,
            mask_id=self.mask_id,
            separator_id=self.separator_id,
        )


def load(folder: str | os.PathLike, *, mask_id: int | None = None) -> Tokenizer:
    """The tokenizer that stands in a folder, on a disk or in a bucket: a SentencePiece model, or tokenizer.json with
    tokenizer_config.json.

    tokenizer_config.json may say `mask_id` and `separator_id`. Where it does not, as in the folders of others, the
    separator is its sep_token, or else its pad_token, which is the same one in pplx-embed (arXiv 2602.11151).

    `mask_id` is for a tokenizer.json and goes before what its folder says.

    Raises FileNotFoundError where no tokenizer is there, ValueError where a file does not say what it must.
    """
    folder = paths.path(folder)
    there = [name for name in (*SENTENCEPIECE_FILES, HUGGINGFACE_FILE) if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected {', '.join(SENTENCEPIECE_FILES)} or {HUGGINGFACE_FILE}"
        )
    if len(there) > 1:
        raise ValueError(f"{folder} holds {' and '.join(there)}: which one is meant is not clear, remove the other")
    path, config_path = folder / there[0], folder / CONFIG_FILE
    if path.name == HUGGINGFACE_FILE and not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing: it must say what separates chunks")
    try:
        if path.name != HUGGINGFACE_FILE:
            return SentencePieceTokenizer(path.read_bytes())
        model = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = paths.read_json(config_path)
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds {config!r:.40}, expected an object")
    ids = {name: config[name] for name in ("separator_id", "mask_id") if name in config}
    if mask_id is not None:
        ids["mask_id"] = mask_id
    for name, value in ids.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{config_path} has {name} = {value!r}, it must be an integer")
    separator = ids.pop("separator_id") if "separator_id" in ids else _find_separator(config, config_path)
    try:
        return HuggingFaceTokenizer(model, separator=separator, **ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_sections(model: str) -> None:
    """ValueError unless a tokenizer.json has every section, of which the library takes a missing one for none."""
    try:
        fields = json.loads(model)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise ValueError("expected an object with a model")
    if missing := [name for name in SECTIONS if name not in fields]:
        raise ValueError(f"{', '.join(missing)} missing, expected a section or null")


def _find_separator(config: dict, path) -> str:
    for name in ("sep_token", "pad_token", "eos_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise ValueError(f"{path} has {name} = {token!r:.80}, it must be a token")
    raise ValueError(f"{path} names no separator: it has none of separator_id, sep_token, pad_token, eos_token")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write_config(folder: str | os.PathLike, **fields) -> None:
    paths.write_json(paths.path(folder) / CONFIG_FILE, fields)


def _texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. ValueError names the first that is not a str, or not valid Unicode."""
    if isinstance(texts, str):
        raise ValueError("encode takes a sequence of texts, not one string")
    texts = list(texts)
    for i, text in enumerate(texts):
        check_text(f"text {i}", text)
    return texts


def check_text(name: str, text) -> None:
    """ValueError if `text`, which the error calls `name`, is not a str or not valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80} ({type(text).__name__}), expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):X}"
        raise ValueError(
            f"{name} holds a lone surrogate {surrogate} at character {error.start}: not valid Unicode text"
        ) from None
