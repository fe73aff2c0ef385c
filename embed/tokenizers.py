"""SentencePiece and Hugging Face tokenizers with one small interface. Encoding adds no special tokens.

A text never yields a control token: the mask, the separator, the padding or any other special token. Both kinds of
tokenizers treat "<|endoftext|>" in a text as plain characters. So no text can end a document, split a chunk or hide a
token. In transformers this is `split_special_tokens=True`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from embed import paths

SENTENCEPIECE_FILES = ("sentencepiece.model", "spiece.model")  # our name, and that of transformers
HUGGINGFACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# The sections of a tokenizer.json that change the tokens of a text.
SECTIONS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
SENTENCEPIECE_CLASS = "BertGenerationTokenizer"  # runs SentencePiece in transformers, adds no tokens
NORMALIZER_SPEC = 3  # the number of this field of a SentencePiece model, which is written after the pieces
NO_LIMIT = 10**30  # what transformers writes for a tokenizer without a limit


class Tokenizer(Protocol):
    """What every tokenizer offers.

    `digest` is a sha256 (hex) of the model. Two tokenizers with the same digest give the same tokens; saving does not
    change it.

    The only special token that a text may yield is the unknown token, if the vocabulary has one.

    `vocab_size` is one more than the largest id of texts and separator: the number of rows in an encoder's table. The
    mask of the diffusion stage may have a larger id.
    """

    vocab_size: int
    mask_id: int
    separator_id: int
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32[length] per text. ValueError if one is not a str or not valid Unicode."""

    def offsets(self, text: str) -> np.ndarray:
        """int32[length, 2]: the first character of each token of `encode` in the text, and the one after its last.

        Characters that no token stands for, such as white space that is normalized away, are in no token. Tokens that
        share a character, such as the bytes of an emoji, all have it.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens. Control tokens (mask, separator, padding) are left out."""

    def save(self, folder: str | os.PathLike) -> None:
        """Write the files that `load` reads to a folder on a disk or in a bucket."""

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """Write files that `load` and transformers' AutoTokenizer read; both give the same tokens."""


class SentencePieceTokenizer:
    """A SentencePiece model with control symbols <mask> and <sep> (see `embed.preparation.vocabulary`)."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        # The library accepts no bytes at all, and the first pieces of a file that was cut after one of them.
        if NORMALIZER_SPEC not in _message_fields(model):
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): it is empty, cut or of another kind")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {_first_line(error)}") from None
        self.vocab_size = self._processor.vocab_size()
        self.unknown = self._processor.id_to_piece(self._processor.unk_id())
        self.mask_id = self._id("<mask>")
        self.separator_id = self._id("<sep>")
        self.digest = hashlib.sha256(model).hexdigest()

    def _id(self, piece: str) -> int:
        index, is_control = self.find(piece) or (None, False)
        if not is_control:
            raise ValueError(
                f"the SentencePiece model has no control symbol {piece!r}: train it with that control symbol"
            )
        return index

    def find(self, piece: str) -> tuple[int, bool] | None:
        """(id of a piece, whether it is a control symbol); None if the model does not have it."""
        try:
            index = self._processor.piece_to_id(piece.encode())
        except UnicodeEncodeError:  # a lone surrogate
            return None
        return (index, self._processor.is_control(index)) if self._processor.id_to_piece(index) == piece else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = _texts(texts)
        # For a few texts, starting threads takes longer than encoding.
        threads = -1 if len(texts) >= 64 else 1
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(texts, num_threads=threads)]

    def offsets(self, text: str) -> np.ndarray:
        (text,) = _texts([text])
        return _pairs(self._processor.encode(text, return_type="offset_mapping")["offsets"])

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: str | os.PathLike) -> None:
        paths.write(paths.path(folder) / SENTENCEPIECE_FILES[0], self._model)

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """Write the model for a class of transformers that runs SentencePiece itself and adds no tokens.

        A tokenizer.json cannot express multi-character normalization rules (`embed.preparation.vocabulary`).
        """
        Path(folder, SENTENCEPIECE_FILES[1]).write_bytes(self._model)
        piece = self._processor.id_to_piece
        pad = piece(self._processor.pad_id())
        _write_config(
            folder,
            tokenizer_class=SENTENCEPIECE_CLASS,
            split_special_tokens=True,
            model_max_length=max_length or NO_LIMIT,
            # Each of these symbols must be an existing piece, or the class gives it an id beyond the table.
            pad_token=pad,
            bos_token=pad,
            eos_token=pad,
            unk_token=self.unknown,
            sep_token=piece(self.separator_id),
            mask_id=self.mask_id,
            separator_id=self.separator_id,
        )


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, with the ids of mask and separator.

    By default the mask is the first id after the vocabulary. Qwen's table has a row for it, and no text yields it.
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
            raise ValueError(f"the separator {separator!r} of {CONFIG_FILE} is not in the vocabulary")
        # Not the number of tokens: ids may have gaps.
        entries = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 <= separator_id < entries:
            raise ValueError(f"separator_id = {separator_id} is outside the vocabulary of {entries} tokens")
        mask_id = entries if mask_id is None else mask_id
        if not 0 <= mask_id < 2**31:
            raise ValueError(f"mask_id = {mask_id} must be in 0..{2**31 - 1}")
        self.vocab_size = entries
        self.mask_id = mask_id
        # Whether its post-processor would add tokens to a text.
        self.adds_tokens = self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0
        self.separator_id = separator_id
        self._model = self._control(model)
        # Without the sections that `encode` ignores and exports leave out, but with the rule for control tokens.
        fields = json.loads(self._model)
        parts = {k: v for k, v in fields.items() if k not in ("post_processor", "truncation", "padding")}
        parts["encode_special_tokens"] = True
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _control(self, model: str) -> str:
        """Make sure that no text yields a control token; return tokenizer.json with special separator and mask tokens.

        ValueError if that is impossible because the vocabulary itself gives the token to texts.
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
            raise ValueError(f"dropout={fields['dropout']!r} makes tokens random, expected null")
        unknown = fields.get("unk_token")
        if fields.get("unk_id") is not None:
            unknown = self._tokenizer.id_to_token(fields["unk_id"])
        if unknown is not None and unknown in names.values():
            raise ValueError(f"the unknown token {unknown!r} cannot be the separator or the mask: texts yield it")
        added = self._tokenizer.get_added_tokens_decoder()
        control = {i: token.content for i, token in added.items() if token.special and token.content != unknown}
        probes = [probe for name in control.values() for probe in (name, f" {name} ", f"a{name}a")]
        for probe, encoding in zip(probes, self._tokenizer.encode_batch(probes, add_special_tokens=False)):
            if yielded := control.keys() & set(encoding.ids):
                raise ValueError(
                    f"the text {probe!r} yields the control token {control[min(yielded)]!r}: a separator, mask or "
                    "other special token must not be a word of the vocabulary"
                )
        return model

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(_texts(texts), add_special_tokens=False)  # without offsets
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def offsets(self, text: str) -> np.ndarray:
        return _pairs(self._tokenizer.encode(*_texts([text]), add_special_tokens=False).offsets)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        paths.write(paths.path(folder) / HUGGINGFACE_FILE, self._model)
        _write_config(folder, mask_id=self.mask_id, separator_id=self.separator_id)

    def save_for_transformers(self, folder: str | Path, max_length: int | None) -> None:
        """Write tokenizer.json without a post-processor that would add tokens, because `encode` adds none."""
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
    """The tokenizer in a folder, on a disk or in a bucket.

    It is a SentencePiece model, or tokenizer.json with tokenizer_config.json. The latter may have `mask_id` and
    `separator_id`. Without them, as in third-party folders, the separator is its sep_token, or else its pad_token (the
    same token in pplx-embed, arXiv 2602.11151), or else its eos_token.

    The argument `mask_id` overrides that of the folder; it applies only to tokenizer.json.

    FileNotFoundError if there is no tokenizer; ValueError if a file is malformed.
    """
    folder = paths.path(folder)
    existing = [name for name in (*SENTENCEPIECE_FILES, HUGGINGFACE_FILE) if (folder / name).is_file()]
    if not existing:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected {', '.join(SENTENCEPIECE_FILES)} or {HUGGINGFACE_FILE}"
        )
    if len(existing) > 1:
        raise ValueError(f"{folder} holds {' and '.join(existing)}: keep the one to use, remove the others")
    path, config_path = folder / existing[0], folder / CONFIG_FILE
    if path.name == HUGGINGFACE_FILE and not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing: it must name the separator")
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
            raise ValueError(f"{config_path} has {name} = {value!r}, expected an integer")
    separator = ids.pop("separator_id") if "separator_id" in ids else _find_separator(config, config_path)
    try:
        return HuggingFaceTokenizer(model, separator=separator, **ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_sections(model: str) -> None:
    """ValueError unless a tokenizer.json has every section. The library would silently skip a missing one."""
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
            raise ValueError(f"{path} has {name} = {token!r:.80}, expected a token")
    raise ValueError(f"{path} names no separator: it needs separator_id, sep_token, pad_token or eos_token")


def _message_fields(message: bytes) -> set[int]:
    """The numbers of the outermost fields of a protocol buffer whose fields are all bytes; without a cut last one."""
    numbers, i = set(), 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            value |= (message[i] & 0x7F) << shift
            i, shift = i + 1, shift + 7
            if message[i - 1] < 0x80:
                return value

    with contextlib.suppress(IndexError):
        while i < len(message):
            number, length = varint() >> 3, varint()
            i += length
            if i <= len(message):
                numbers.add(number)
    return numbers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write_config(folder: str | os.PathLike, **fields) -> None:
    paths.write_json(paths.path(folder) / CONFIG_FILE, fields)


def _pairs(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.asarray(offsets, np.int32).reshape(-1, 2)


def _texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. ValueError names the first one that is not a str or not valid Unicode."""
    if isinstance(texts, str):
        raise ValueError("encode needs a sequence of texts, not one string")
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
