"""A checkpoint that `embed convert` made out of somebody else's: a stage can start from it.

checkpoints/0/params      Orbax, float32
tokenizer/                its tokenizer
model.json                architecture, embedding settings, where it comes from
"""

import dataclasses
import json
from pathlib import Path

from embed.checkpoints import training_state
from embed.checkpoints.export import LEFT_OUT, replace_folder
from embed.models.transformer import TransformerConfig
from embed.tokenizers import Tokenizer

INFO = "model.json"
ARCHITECTURE = [f.name for f in dataclasses.fields(TransformerConfig) if f.name not in LEFT_OUT - {"tied"}]


def write(folder, params, config: TransformerConfig, tokenizer: Tokenizer, *, embedding: dict, source: dict) -> Path:
    """Write the folder; it appears whole or not at all, and replaces only one of its kind."""
    with replace_folder(folder, is_ours=lambda old: (Path(old) / INFO).is_file()) as partial:
        training_state.save_params(partial / "checkpoints", params)
        tokenizer.save(partial / "tokenizer")
        info = {
            "architecture": {name: getattr(config, name) for name in ARCHITECTURE},
            "embedding": embedding,
            "tokenizer_digest": tokenizer.digest,
            "source": source,
        }
        (partial / INFO).write_text(json.dumps(info, indent=2) + "\n")
    return Path(folder)


def check(folder: Path, config: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Raise a ValueError that lists how a run's model or tokenizer differs from the converted checkpoint's."""
    info = json.loads((folder / INFO).read_text())
    problems = [
        f"config.model.{name} is {getattr(config, name)!r}, the checkpoint's {value!r}"
        for name, value in info["architecture"].items()
        if getattr(config, name) != value
    ]
    if tokenizer.digest != info["tokenizer_digest"]:
        problems.append(f"the run's tokenizer is another one: set config.data.tokenizer={folder / 'tokenizer'}")
    if problems:
        raise ValueError(f"cannot start from {folder}: " + "; ".join(problems))
