"""Writes checkpoints as model folders, for `embed export`, `embed merge` and the exports of a config."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from embed import paths, runs
from embed.checkpoints import card, export
from embed.models import transformer
from embed.runs import Checkpoint, Run


def export_model(
    run: Run, name: str, folder, *, step: int = 0, entry: ConfigDict | None = None, format: str = "", tanh: bool = False
):
    """Write a checkpoint as a model folder.

    `entry` of config.exports says how; by default the only entry of the checkpoint, if it has one.
    """
    export.check_output(folder)
    checkpoint = run.checkpoint(name, step)
    entries = [e for e in run.config.exports.values() if e.checkpoint == name]
    if entry is None and len(entries) > 1:
        both = ", ".join(key for key, e in run.config.exports.items() if e.checkpoint == name)
        raise ValueError(f"{name} has several exports, {both}: `embed pipeline` writes them")
    if entry := entry or next(iter(entries), None):
        checkpoint = dataclasses.replace(checkpoint, contextual=entry.contextual, max_length=entry.max_length or None)
    provenance = origin(checkpoint) | run.config.card.to_dict()
    file = run.record(f"evaluate {name}")
    saved = paths.read_json(file) if file.exists() else None
    if saved and runs.portable(saved["inputs"]["checkpoint"]) == runs.portable(checkpoint.identity):
        provenance["figures"] = saved["result"]
    return write_model(checkpoint, folder, run.shardings, provenance, format=format, tanh=tanh)


def export_models(run: Run) -> dict:
    """Write every entry of config.exports as export/NAME."""
    for name, entry in run.config.exports.items():
        export_model(run, entry.checkpoint, run.workdir / "export" / name, entry=entry)
    return {name: entry.checkpoint for name, entry in run.config.exports.items()}


def export_source(
    source: str, folder, *, step: int = 0, contextual: bool = False, format: str = "", tanh: bool = False
):
    """Write a model folder, hub id or stage folder as a model folder or in another format."""
    export.check_output(folder)
    checkpoint = runs.find(source, step)
    checkpoint = dataclasses.replace(checkpoint, contextual=checkpoint.contextual or contextual)
    return write_model(checkpoint, folder, runs.over_all_devices, origin(checkpoint), format=format, tanh=tanh)


def merge_sources(a: tuple[str, int], b: tuple[str, int], ratio: float, folder):
    """Write the slerp of two models as a model folder. `a` and `b` are (source, step), with step 0 for models."""
    export.check_output(folder)
    checkpoint = runs.merged(f"{a[0]} and {b[0]}", runs.find(*a), runs.find(*b), ratio)
    return write_model(checkpoint, folder, runs.over_all_devices, origin(checkpoint))


def origin(checkpoint: Checkpoint) -> dict:
    """The provenance of a checkpoint, for its card."""
    if checkpoint.provenance is not None:  # a model folder has its own
        return checkpoint.provenance | {"source": checkpoint.identity}
    lineage = runs.lineage(checkpoint)
    provenance = {"checkpoint": checkpoint.name, "identity": checkpoint.identity, "lineage": lineage}
    if checkpoint.of:
        provenance["merge"] = {"of": list(checkpoint.of), "ratio": checkpoint.identity["ratio"]}
    return provenance


def write_model(
    checkpoint: Checkpoint, folder, shardings: Callable, provenance: Mapping, *, format: str = "", tanh: bool = False
):
    """Write any checkpoint as a model folder. Its parameters are loaded in `shardings(model)`."""
    checkpoint.check_encoder()
    export.check_format(format, tanh, checkpoint.model.token_dimensions)
    if checkpoint.not_exported:
        what = "; ".join(checkpoint.not_exported)
        warnings.warn(f"the export leaves out settings of {checkpoint.name}: {what}", stacklevel=2)
    card.check_provenance(provenance, checkpoint.name)
    model = transformer.encoder_only(checkpoint.model, {})[0]
    embedding = {
        "matryoshka": list(checkpoint.matryoshka),
        "separator": checkpoint.separator,
        "contextual": checkpoint.contextual,
        "max_length": checkpoint.max_length,
        "context_length": checkpoint.context_length,
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
