"""SentencePiece and Hugging Face tokenizers behind one small face. Encoding adds no special tokens."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

SENTENCEPIECE_FILE = "sentencepiece.model"
HUGGINGFACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer(Protocol):
    """`digest` is the sha256 (hex) of the model file: two tokenizers with one digest give the same tokens."""

    vocab_size: int
    mask_id: int
    separator_id: int
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32[length] of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; control tokens (mask, separator, padding) give nothing."""

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load` reads."""


class SentencePieceTokenizer:
    """A SentencePiece model with control symbols <mask> and <sep> (see `embed.data.vocabulary`)."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from None
        self.vocab_size = self._processor.vocab_size()
        self.mask_id = self._id("<mask>")
        self.separator_id = self._id("<sep>")
        self.digest = hashlib.sha256(model).hexdigest()

    def _id(self, piece: str) -> int:
        index = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(index) != piece:
            raise ValueError(f"the SentencePiece model has no piece {piece!r}; train it with that control symbol")
        return index

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = _texts(texts)
        # Threads cost more than they bring on a handful of texts.
        threads = -1 if len(texts) >= 64 else 1
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(texts, num_threads=threads)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, SENTENCEPIECE_FILE).write_bytes(self._model)


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, and which of its ids mask and separate."""

    def __init__(self, model: str, *, mask_id: int, separator_id: int):
        import tokenizers

        self._model = model
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"not a tokenizer.json ({len(model)} characters): {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        for name, index in (("mask_id", mask_id), ("separator_id", separator_id)):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"{name} = {index} is outside the vocabulary of {self.vocab_size} tokens")
        self.mask_id = mask_id
        self.separator_id = separator_id
        self.digest = hashlib.sha256(model.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch(_texts(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, HUGGINGFACE_FILE).write_text(self._model, encoding="utf-8")
        config = {"mask_id": self.mask_id, "separator_id": self.separator_id}
        Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that stands in a folder: sentencepiece.model, or tokenizer.json with tokenizer_config.json.

    Raises FileNotFoundError where neither is there, ValueError where a file does not say what it must.
    """
    folder = Path(folder)
    if (path := folder / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(path.read_bytes())
    if (path := folder / HUGGINGFACE_FILE).is_file():
        config_path = folder / CONFIG_FILE
        if not config_path.is_file():
            raise FileNotFoundError(f"{config_path} is missing: it must hold mask_id and separator_id")
        config = json.loads(config_path.read_text(encoding="utf-8"))
        for key in ("mask_id", "separator_id"):
            if not isinstance(config.get(key), int):
                raise ValueError(f"{config_path} must hold an integer {key!r}, it has {sorted(config)}")
        return HuggingFaceTokenizer(
            path.read_text(encoding="utf-8"), mask_id=config["mask_id"], separator_id=config["separator_id"]
        )
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {SENTENCEPIECE_FILE} or {HUGGINGFACE_FILE}")


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("encode takes a sequence of texts, not one string")
    return list(texts)
