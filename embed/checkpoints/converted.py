"""A checkpoint that `embed convert` made out of somebody else's: a stage can start from it.

checkpoints/0/params      Orbax, float32 or bfloat16
tokenizer/                its tokenizer
model.json                architecture, embedding settings, where it comes from
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from embed.checkpoints import training_state
from embed.checkpoints.export import LEFT_OUT, replace_folder
from embed.models.transformer import TransformerConfig
from embed.tokenizers import Tokenizer

INFO, FORMAT = "model.json", "embed-converted"
ARCHITECTURE = [f.name for f in dataclasses.fields(TransformerConfig) if f.name not in LEFT_OUT - {"tied"}]


def is_converted(folder) -> bool:
    """Whether `embed convert` wrote the folder."""
    try:
        return json.loads((Path(folder) / INFO).read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(folder, params, config: TransformerConfig, tokenizer: Tokenizer, *, embedding: dict, source: dict) -> Path:
    """Write the folder; it appears whole or not at all, and replaces only one of its kind.

    `source` has path, revision, digest and causal: whether it was a causal language model.
    """
    with replace_folder(folder, is_ours=is_converted) as partial:
        training_state.save_params(partial / "checkpoints", params)
        tokenizer.save(partial / "tokenizer")
        info = {
            "format": FORMAT,
            "architecture": {name: getattr(config, name) for name in ARCHITECTURE},
            "embedding": embedding,
            "tokenizer": _identity(tokenizer),
            "source": source,
        }
        (partial / INFO).write_text(json.dumps(info, indent=2) + "\n")
    return Path(folder)


def read_info(folder) -> dict:
    """model.json of a converted checkpoint."""
    if not is_converted(folder):
        raise FileNotFoundError(f"{folder} is not a folder that `embed convert` wrote")
    return json.loads((Path(folder) / INFO).read_text())


def check(folder, model: Mapping, tokenizer: Tokenizer | None = None) -> None:
    """Raise a ValueError that lists how a run's model or tokenizer differs from the converted checkpoint's.

    `model` has fields of the architecture by name; those it lacks are not compared.
    """
    info = read_info(folder)
    problems = [
        f"config.model.{name} is {model[name]!r}, the checkpoint's {value!r}"
        for name, value in info["architecture"].items()
        if name in model and model[name] != value
    ]
    if tokenizer and _identity(tokenizer) != info["tokenizer"]:
        problems.append(
            f"the run's tokenizer is {_identity(tokenizer)}, the checkpoint's {info['tokenizer']}: "
            f"set config.data.tokenizer={Path(folder) / 'tokenizer'}"
        )
    if problems:
        raise ValueError(f"cannot start from {folder}: " + "; ".join(problems))


def _identity(tokenizer: Tokenizer) -> dict:
    return {"digest": tokenizer.digest, "mask_id": tokenizer.mask_id, "separator_id": tokenizer.separator_id}
