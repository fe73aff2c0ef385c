"""Fine-tunes an embedding model on pairs of a domain, and says what it gains there and forgets elsewhere.

    embed pipeline --config=configs/domain.py:model=MODEL,general=SET --data_root=PAIRS --workdir=RUN

MODEL is a model folder or hub id. PAIRS has JSON lines {"query": TEXT, "document": TEXT}. SET is the folder of an
evaluation set unlike them; `general=` may occur several times. Hard negatives are mined with MODEL, a triplet stage
trains on them, and the slerp of both models trades the domain for the rest. Other arguments:

    query=NAME, document=NAME   other names of the two fields
    layout=retrieval            PAIRS is a folder in the layout of BEIR or MTEB: its judged pairs
    held_out_by=query           hold out queries with their documents still in training (a fixed set of documents)
    steps=N                     of 128 pairs each (64 with `small`)
    small                       for models of a few layers on CPU, like those of configs/quickstart.py

docs/domain.md has the rest. `runlocal` needs no MODEL and no PAIRS: random weights and the Python sources of this
machine.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from embed.checkpoints import model_folder
from embed.config import parse_arg
from embed.evaluation.sets import set_name
from embed.models.transformer import SIZES

LAYOUTS = {
    "files": ("own/task.source = @files()", 'own/files.paths = "{data_root}/*.jsonl*"'),
    "retrieval": ("own/task.source = @retrieval()", 'own/retrieval.path = "{data_root}"'),
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        runlocal=False,
        stage="",
        model="",
        general=(),
        query="query",
        document="document",
        layout="files",
        held_out_by="document",
        steps=300,
        small=False,
    )
    for name, allowed in (("layout", tuple(LAYOUTS)), ("held_out_by", ("query", "document"))):
        if arg[name] not in allowed:
            raise ValueError(f"config argument {name}={arg[name]!r} must be one of {', '.join(allowed)}")
    if not arg.model and not arg.runlocal:
        raise ValueError("config argument model is missing: name a folder or hub id, configs/domain.py:model=…")
    config = base.get_config()
    config.stage = arg.stage
    model = arg.model or "random init"
    # How it embeds: the settings of embed.json, and its attention.
    how = _use_model(config, arg.model) if arg.model else dict.fromkeys(("matryoshka", "max_length"))
    if arg.small or not arg.model:
        config.model.dtype = "float32"
        config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none", unroll=64, dense_barrier=True)  # fast on CPU
    config.data.gin_file = "configs/data/domain.gin"
    config.data.gin_bindings = bindings(arg.layout, arg.query, arg.document, arg[arg.held_out_by])

    config.mining.hard_negatives = base.mining(checkpoint=model, tasks=("own.pairs",), rank_window=(0, 200))
    # The rate of the triplet stage of configs/pplx_embed.py, because a trained model should move, not start again. The
    # small models of configs/quickstart.py are mostly an embedding table, which learns faster.
    rates = dict(learning_rate=1e-4, embedding_rate=10.0) if arg.small else dict(learning_rate=2e-5)
    rows = dict(length=256, spans=16, segments=16) if arg.small else dict(length=1024)
    config.stages.domain = base.stage(
        "triplet",
        init=arg.model,
        curriculum=((arg.steps, "hard_negatives"),),
        matryoshka=tuple(how["matryoshka"] or (config.model.hidden_size,)),
        pooling=how.get("pooling", "mean"),
        attention=how.get("attention", "bidirectional"),
        temperature=0.05 if arg.small else 0.03,
        optimizer=rates | dict(warmup=0.1, decay=0.5, weight_decay=0.01),
        # rows_per_group=0: chosen from the lengths of the pairs.
        batch=rows | dict(group_size=16, groups=4 if arg.small else 8, rows_per_group=0, num_negatives=4),
    )

    # Ratio 0 is the model, 1 the fine-tuned one. The curve is on the development part, so that whoever chooses another
    # ratio has not seen the test part.
    config.merges.merged = base.merge(
        of=(model, "domain"),
        ratio=0.5,
        sweep=(0.0, 0.25, 0.5, 0.75, 1.0),
        sweep_on=("domain/development", *arg.general),
        alone=True,
    )
    config.exports["embed"] = base.export(checkpoint="merged", max_length=how["max_length"] or 0)
    named = {"domain": "domain/test"}
    for folder in arg.general:
        name = set_name(folder).replace(".", "_")
        if name in named:
            raise ValueError(f"config argument general={folder!r}: there is another set with the name {name}")
        named[name] = folder
    for name, data in named.items():
        config.evaluations[name] = base.evaluation(data=data, alone=True, checkpoints=(model, "domain", "merged"))
    config.report.baseline = model
    if arg.runlocal:
        _shrink(config)
    return config


def bindings(layout: str = "files", query: str = "query", document: str = "document", held_out_by: str = "document"):
    """What configs/data/domain.gin leaves open."""
    macros = {"QUERY": query, "DOCUMENT": document, "HELD_OUT_BY": held_out_by}
    return (*LAYOUTS[layout], *(f"{name} = {value!r}" for name, value in macros.items()))


def _use_model(config: ConfigDict, model: str) -> dict:
    """Take sizes, tokenizer and separator from a model; returns how it embeds."""
    if not model_folder.is_encoder(model):
        raise ValueError(
            f"config argument model={model!r} must be an encoder: an export, pplx-embed or a bidirectional Qwen3"
        )
    sizes, embedding = model_folder.read_architecture(model), model_folder.read_embedding(model)
    ours = set(config.model) - {"dtype", "tied"}
    config.model.update({name: value for name, value in dataclasses.asdict(sizes).items() if name in ours})
    config.data.tokenizer, config.data.separator = model, embedding["separator"]
    return embedding | {"attention": "causal" if sizes.causal else "bidirectional"}


def _shrink(config: ConfigDict) -> None:
    """`base.shrink`, on tasks and sets of the Python sources."""
    data = config.data
    if not data.tokenizer:
        config.model.update(SIZES["micro"])
    base.shrink(config)
    config.mining.hard_negatives.update(tasks=("python_docs.summaries",))
    config.merges.merged.sweep_on = ("functions/development", *config.merges.merged.sweep_on[1:])
    config.evaluations.domain.data = "functions/test"
