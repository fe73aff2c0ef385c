"""A model small enough for tests: a SentencePiece vocabulary and an encoder with random weights."""

import functools
import io

import jax
import numpy as np
import sentencepiece

from embed.checkpoints import export
from embed.inference import Encoder
from embed.models import transformer
from embed.tokenizers import SentencePieceTokenizer

WORDS = "the a of parse file config token return list number string open read write index vector search query".split()


def sentences(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)), model_writer=model, model_type="unigram", vocab_size=120,
        hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>", unk_piece="<unk>",
        control_symbols=["<mask>", "<sep>"], minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


@functools.cache
def config() -> transformer.TransformerConfig:
    return transformer.make_config("micro", tokenizer().vocab_size)


@functools.cache
def params() -> dict:
    """Random float32 weights, drawn by NumPy: compiling `transformer.init` takes longer than these tests."""
    rng = np.random.default_rng(0)
    shapes = export.flatten(transformer.abstract_params(config()))
    return export.unflatten(
        {name: rng.normal(name.endswith("norm"), 0.2, x.shape).astype(np.float32) for name, x in shapes.items()}
    )


def encoder(**keywords) -> Encoder:
    return Encoder(params(), config(), tokenizer(), **keywords)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config, params, tokens, segment_ids, positions):
    return transformer.apply(config, params, tokens, segment_ids, positions)


def hidden_states(tokens, length: int = 512) -> np.ndarray:
    """Hidden states of one token sequence in a row of its own, padded to `length`: float32 [n, D]."""
    n = len(tokens)
    row = np.pad(np.asarray(tokens, np.int32), (0, length - n))[None]
    segment_ids = (np.arange(length) < n).astype(np.int32)[None]
    return np.asarray(_apply(config(), params(), row, segment_ids, np.arange(length, dtype=np.int32)[None]))[0, :n]
