"""Writes the model folder that `embed.inference`, sentence-transformers, transformers and a stage's `init` read.

config.json                qwen3 with "is_causal": false
model*.safetensors         float32
tokenizer files            tokenizer.json or spiece.model, with tokenizer_config.json
modules.json, 1_Pooling    for sentence-transformers; 2_Dense with tanh
1_Dense, …                 instead of 1_Pooling for late interaction: the projection of token vectors
README.md                  the card
embed.json                 settings, digests, provenance; written last

The folder contains no code and no pickle. Two formats are for other programs: "pplx" is the layout of the released
pplx-embed, without its code (configuration.py, modeling.py, st_quantize.py); "onnx" has onnx/model.onnx instead of
weights and modules.
"""

import collections
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from embed import distributed, paths
from embed.checkpoints import model_config, names, onnx, settings
from embed.checkpoints.card import check_provenance, model_card
from embed.checkpoints.provenance import made_with
from embed.config import brief
from embed.models.transformer import TransformerConfig, abstract_params, encoder_only

FORMATS = ("", "pplx", "onnx")
SHARD_BYTES = 5 * 10**9  # per file of weights; a process holds no more of them at a time


def write(
    folder,
    params,
    config: TransformerConfig,
    tokenizer,
    *,
    embedding: Mapping,
    provenance: Mapping,
    format: str = "",
    tanh: bool = False,
):
    """Write an encoder and return the path. The folder appears whole or not at all, and replaces only another export.

    `params` may be sharded over devices and processes; then all processes must call this, and process 0 writes. It
    holds at most one file of weights (SHARD_BYTES) in memory; onnx needs four times the parameters.

    `embedding` has matryoshka (prefixes trained, list of int), separator (whether a separator token stands between the
    chunks of a document), contextual (whether the model is made for chunks in their document), max_length (tokens of
    the longest text, None for no limit) and context_length (tokens of the longest document in training, None if it is
    unknown); its tanh, if any, is ignored. With `tanh`, float32 vectors are tanh(v), which int8 training saw, instead
    of v. `provenance` is a JSON object (see `card`); commit and versions are added if it has none.

    ValueError lists all problems, or the tensors that are not finite, before anything is written.
    """
    config, params = encoder_only(config, params)
    embedding = {**embedding, "tanh": tanh}
    check_format(format, tanh, config.token_dimensions)
    _check(folder, params, config, tokenizer, embedding, provenance)
    check_output(folder)
    names.check_finite(params, f"the model for {folder}")
    provenance = made_with() | dict(provenance)
    if format == "onnx":
        params, stream = jax.tree.map(names.fetch, params), iter(())
    else:
        stream = names.tensors(params)

    def write_all():
        with paths.replace_folder(folder, is_ours=settings.is_export, marker=settings.FILE) as aside:
            if format == "onnx":
                onnx.save(aside, onnx.build(params, config))
            else:
                _write_weights(aside, config, stream)
            tokenizer.save_for_transformers(aside, embedding["max_length"])
            for name, document in model_config.documents(config, format, embedding, tokenizer.separator_id).items():
                paths.write_json(aside / name, document)
            if tanh:
                identity = {"linear.weight": np.eye(config.hidden_size, dtype=np.float32)}
                paths.write_tensors(aside / "2_Dense" / names.WEIGHTS, identity, {"format": "pt"})
            card = model_card(config, embedding, provenance, format=format)
            (aside / settings.CARD).write_text(card, encoding="utf-8")
            settings.write(aside, embedding, provenance)

    # Every process takes part in fetching a tensor: also after an error, until the last one.
    distributed.on_first_process(write_all, then=lambda: collections.deque(stream, maxlen=0), task="write the model")
    return paths.path(folder)


def check_output(folder, overwrite: bool = True) -> None:
    """`settings.check_output` before the work. All processes call this, and process 0 checks."""
    distributed.on_first_process(lambda: settings.check_output(folder, overwrite), task="write the model")


def check_format(format: str, tanh: bool, token_dimensions: int = 0) -> None:
    """ValueError before the work, unless `write` supports the format and its package is installed."""
    if token_dimensions and (format or tanh):
        what = f"--format={format}" if format else "--tanh"
        raise ValueError(f"{what} is for single vectors; a late-interaction model is exported without it")
    if format not in FORMATS:
        raise ValueError(f"format {format!r} must be one of {', '.join(FORMATS[1:])}, or empty for the model folder")
    if format and tanh:
        raise ValueError(f"tanh is for the model folder, not for format {format}")
    if format == "onnx" and not importlib.util.find_spec("onnx"):
        raise ValueError("--format=onnx needs the package onnx: pip install -e '.[onnx]'")


def _check(folder, params, config, tokenizer, embedding: Mapping, provenance: Mapping) -> None:
    check_provenance(provenance, f"the model for {folder}")
    shapes = {name: x.shape for name, x in names.flatten(params).items()}
    expected = {name: x.shape for name, x in names.flatten(abstract_params(config)).items()}
    problems = [f"parameter {name} is missing" for name in expected.keys() - shapes.keys()]
    problems += [f"parameter {name} is not part of this architecture" for name in shapes.keys() - expected.keys()]
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            problems.append(f"parameter {name} has shape {list(shapes[name])}, expected {list(expected[name])}")
    problems += settings.problems(embedding, config)
    if tokenizer.vocab_size > config.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
    if problems:
        raise ValueError(f"cannot export to {folder}: " + brief(sorted(problems)))


def _write_weights(folder: Path, config: TransformerConfig, stream: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write model.safetensors, or several files of at most SHARD_BYTES and their index; and that of a projection."""
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in names.shapes(config).items()}
    sizes.pop(names.NAMES["projection"], None)
    files, capacity = [], 0
    for name, size in sizes.items():
        if size > capacity:
            files.append([])
            capacity = SHARD_BYTES
        files[-1].append(name)
        capacity -= size
    weight_map = {}
    for i, members in enumerate(files):
        file = names.WEIGHTS if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        shard = {}
        for _ in members:
            name, tensor = next(stream)
            shard[name] = np.ascontiguousarray(tensor, np.float32)
        paths.write_tensors(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        paths.write_json(folder / names.INDEX, index)
    for name, tensor in stream:  # the projection
        (folder / names.PROJECTION).parent.mkdir()
        paths.write_tensors(
            folder / names.PROJECTION, {name: np.ascontiguousarray(tensor, np.float32)}, {"format": "pt"}
        )
