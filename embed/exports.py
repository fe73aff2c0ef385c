"""Checkpoints as model folders: what `embed export`, `embed merge` and the exports of a config write."""

import dataclasses
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from embed import paths, runs
from embed.checkpoints import export
from embed.models import transformer
from embed.runs import Checkpoint, Run


def export_model(
    run: Run, name: str, folder, *, step: int = 0, entry: ConfigDict | None = None, format: str = "", tanh: bool = False
):
    """Write a checkpoint as a model folder; what `entry` of config.exports says of it, or the only one that it has."""
    export.check_output(folder)
    found = run.checkpoint(name, step)
    entries = [e for e in run.config.exports.values() if e.checkpoint == name]
    if entry is None and len(entries) > 1:
        both = ", ".join(key for key, e in run.config.exports.items() if e.checkpoint == name)
        raise ValueError(f"{name} is exported as {both}, each in its own way: `embed pipeline` writes them")
    if entry := entry or next(iter(entries), None):
        found = dataclasses.replace(found, contextual=entry.contextual, max_length=entry.max_length or None)
    said = origin(found) | run.config.card.to_dict()
    file = run.workdir / "steps" / f"evaluate {name}.json"
    if file.exists() and runs.portable((saved := paths.read_json(file))["inputs"]["checkpoint"]) == runs.portable(
        found.identity
    ):
        said["figures"] = saved["result"]
    return write_model(found, folder, run.shardings, said, format=format, tanh=tanh)


def export_models(run: Run) -> dict:
    """Every entry of config.exports as export/NAME."""
    for name, entry in run.config.exports.items():
        export_model(run, entry.checkpoint, run.workdir / "export" / name, entry=entry)
    return {name: entry.checkpoint for name, entry in run.config.exports.items()}


def export_source(
    source: str, folder, *, step: int = 0, contextual: bool = False, format: str = "", tanh: bool = False
):
    """Write a model folder, hub id or stage folder as a model folder, or in another format."""
    export.check_output(folder)
    found = runs.find(source, step)
    found = dataclasses.replace(found, contextual=found.contextual or contextual)
    return write_model(found, folder, runs.over_all_devices, origin(found), format=format, tanh=tanh)


def merge_sources(a: tuple[str, int], b: tuple[str, int], ratio: float, folder):
    """Write the slerp of two models or stage folders, each with the step of a stage, as a model folder."""
    export.check_output(folder)
    found = runs.merged(f"{a[0]} and {b[0]}", runs.find(*a), runs.find(*b), ratio)
    return write_model(found, folder, runs.over_all_devices, origin(found))


def origin(checkpoint: Checkpoint) -> dict:
    """What a card tells of where a checkpoint comes from."""
    if checkpoint.provenance is not None:  # a model folder, which tells of itself
        return checkpoint.provenance | {"source": checkpoint.identity}
    found = {"checkpoint": checkpoint.name, "identity": checkpoint.identity, "lineage": runs.lineage(checkpoint)}
    if checkpoint.of:
        found["merge"] = {"of": list(checkpoint.of), "ratio": checkpoint.identity["ratio"]}
    return found


def write_model(
    checkpoint: Checkpoint, folder, shardings: Callable, provenance: Mapping, *, format: str = "", tanh: bool = False
):
    """Write any checkpoint as a model folder; its parameters pass through `shardings` of its model."""
    checkpoint.check_encoder()
    export.check_format(format, tanh)
    model = transformer.encoder_only(checkpoint.model, {})[0]
    embedding = {
        "matryoshka": list(checkpoint.matryoshka),
        "separator": checkpoint.separator,
        "contextual": checkpoint.contextual,
        "max_length": checkpoint.max_length,
    }
    params = transformer.encoder_only(checkpoint.model, checkpoint.params(shardings(model)))[1]
    return export.write(
        folder,
        params,
        model,
        checkpoint.load_tokenizer(),
        embedding=embedding,
        provenance=provenance,
        format=format,
        tanh=tanh,
    )
