"""A model small enough for tests: a SentencePiece vocabulary and an encoder with random weights."""

import functools
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers as hf

from embed import paths
from embed.checkpoints import export, names
from embed.data.store import Writer
from embed.inference import Encoder
from embed.models import transformer
from embed.tokenizers import SentencePieceTokenizer

WORDS = "the a of parse file config token return list number string open read write index vector search query".split()
EMBEDDING = {
    "matryoshka": [8, 32],
    "separator": True,
    "contextual": False,
    "pooling": "mean",
    "max_length": None,
    "context_length": None,
}


def sentences(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)),
        model_writer=model,
        model_type="unigram",
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<pad>",
        unk_piece="<unk>",
        control_symbols=["<mask>", "<sep>"],
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


@functools.cache
def config() -> transformer.TransformerConfig:
    return transformer.make_config("micro", tokenizer().vocab_size)


@functools.cache
def params() -> dict:
    """Weights of `config`, drawn by NumPy, because compiling `transformer.init` takes longer than the tests."""
    return random_params(config())


def write_data(folder, tokenizer_=None) -> None:
    """Prepared data of two tasks and one evaluation set, as from `embed prepare`. The folder may be in a bucket."""
    folder, texts, words = paths.path(folder), sentences(60), tokenizer_ or tokenizer()
    words.save(folder / "tokenizer")
    columns = {"text": ["tokens"], "pairs": ["query", "document"]}
    for task, sides in columns.items():
        writer = Writer(folder / "tasks" / task, sides)
        for i, text in enumerate(texts):
            tokens = words.encode([text, sentences(1, seed=i, longest=6)[0]])
            writer.append(dict(zip(sides, tokens[::-1] if len(sides) > 1 else tokens)))
        writer.close({"task": task})
    paths.write_json(folder / "mixtures.json", {"diffusion": {"text": 1.0}, "pairs": {"pairs": 1.0}})
    rows = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts[:20])],
        "queries": [{"_id": f"q{i}", "text": text.split()[0]} for i, text in enumerate(texts[:5])],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(5)],
    }
    for name, lines in rows.items():
        paths.write(
            folder / "evaluation" / "set" / "test" / f"{name}.jsonl", "".join(json.dumps(x) + "\n" for x in lines)
        )
    paths.write_json(folder / "info.json", {"arguments": "small"})


# A graph over `write_data` that runs in seconds.
GRAPH = """
from configs import base
from embed.models.transformer import SIZES

def get_config(arg=""):
    config = base.get_config()
    config.stage = arg
    config.model.update(SIZES["micro"])
    config.model.update(rope_theta=1e4, dtype="float32")
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none")
    config.stages.diffusion = base.stage("diffusion", curriculum=((6, "diffusion"),), batch=dict(rows=8, length=64))
    rows = dict(group_size=8, groups=2, rows_per_group=8, length=64, spans=8, segments=8)
    pair = dict(matryoshka=(8, 32), batch=rows)
    config.stages.pair = base.stage("pair", init="diffusion", curriculum=((6, "pairs"),), **pair)
    config.mining.hard = base.mining(checkpoint="pair", tasks=("pairs",), rank_window=(0, 20))
    config.stages.triplet = base.stage("triplet", init="pair", curriculum=((6, "hard"),), **pair)
    for stage in config.stages.values():
        stage.execution.update(log_every=1, checkpoint_every=2)
    config.merges.merged = base.merge(of=("pair", "triplet"))
    config.exports.model = base.export(checkpoint="merged", max_length=0)
    config.evaluations.words = base.evaluation(data="set/test", alone=True, checkpoints=("pair", "merged"), bm25=False)
    return config
"""


def write_bpe(folder: Path, texts) -> Path:
    """A tokenizer.json like that of Qwen: byte-level BPE, NFC, an end-of-text token that is never added."""
    model = hf.Tokenizer(hf.models.BPE())
    model.normalizer = hf.normalizers.NFC()
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def random_params(config: transformer.TransformerConfig, seed: int = 0) -> dict:
    """Random float32 weights of any encoder."""
    rng = np.random.default_rng(seed)
    shapes = names.flatten(transformer.abstract_params(config))
    return names.unflatten(
        {name: rng.normal(name.endswith("norm"), 0.2, x.shape).astype(np.float32) for name, x in shapes.items()}
    )


def write_model(folder, params_=None, config_=None, tokenizer_=None, *, embedding=(), provenance=(), **how) -> Path:
    """`export.write` of the small model or another one; `embedding` replaces single settings of EMBEDDING."""
    export.write(
        folder,
        params() if params_ is None else params_,
        config_ or config(),
        tokenizer_ or tokenizer(),
        embedding={**EMBEDDING, **dict(embedding)},
        provenance=dict(provenance),
        **how,
    )
    return folder if paths.is_bucket(folder) else Path(folder)


def foreign(folder: Path) -> Path:
    """Make the folder look like a third-party one: without embed.json."""
    (folder / "embed.json").unlink()
    return folder


def make_causal(folder: Path, params: dict) -> Path:
    """Turn a folder of `write_model` into a causal language model of these weights, in two files."""
    arrays = dict(names.tensors(params, prefix="model."))
    (folder / "model.safetensors").unlink()
    foreign(folder)
    weight_map = {}
    for i, part in enumerate((list(arrays)[::2], list(arrays)[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: arrays[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(
        folder,
        is_causal=None,
        use_bidirectional_attention=None,
        tie_word_embeddings="lm_head.weight" not in arrays,
    )
    return folder


def edit_config(folder: Path, **fields) -> None:
    """Change fields of config.json; None removes a field."""
    path = folder / "config.json"
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


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


def write_program(path, *commands, folder=".") -> Path:
    """A program like `embed` that also runs other commands, in the same process: joining others takes seconds.

    It runs in `folder`, in which {process} is the number of the process.
    """
    path.write_text(
        f"""#!{sys.executable}
import os, sys
from embed import cli
joined = [word for word in sys.argv if word.startswith(("--coordinator", "--num_processes", "--process_id"))]
os.chdir({str(folder)!r}.format(process=joined[-1].partition("=")[2]))
for command in (sys.argv[1:], {", ".join(f"[*{list(map(str, command))!r}, *joined]" for command in commands)}):
    if code := cli.main(command):
        sys.exit(code)
"""
    )
    path.chmod(0o755)
    return path
