"""A small model for your own pairs, in about ten minutes on two CPU cores.

    embed pipeline --config=configs/pairs.py --data_root=FOLDER --workdir=runs/pairs

FOLDER has JSON lines {"query": TEXT, "document": TEXT}; docs/data.md says how to read others. The stages are diffusion
on the documents and pair training. `runlocal` shrinks them to seconds.
"""

from ml_collections import ConfigDict

from configs import base
from embed.config import parse_arg
from embed.models.transformer import SIZES


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="")
    config = base.get_config()
    config.stage = arg.stage
    config.model.update(SIZES["micro" if arg.runlocal else "tiny"])
    config.model.update(rope_theta=1e4, dtype="float32")
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none", unroll=64, dense_barrier=True)  # fast on CPU

    optimizer = dict(learning_rate=1e-4, embedding_rate=30.0, warmup=0.05, decay=0.3, b2=0.98, weight_decay=0.01)
    # A fast table would let diffusion destroy the similarity of texts that share words.
    config.stages.diffusion = base.stage(
        "diffusion",
        curriculum=((60, "diffusion"),),
        optimizer=optimizer | dict(embedding_rate=1.0),
        batch=dict(rows=32, length=128),
        execution=dict(logits_chunk=256),
    )
    config.stages.pair = base.stage(
        "pair",
        init="diffusion",
        curriculum=((600, "pairs"),),
        matryoshka=(64, 256),
        temperature=0.05,
        optimizer=optimizer,
        batch=dict(group_size=64, groups=2, rows_per_group=0, length=256, spans=16, segments=16),
    )
    config.exports["embed"] = base.export(checkpoint="pair", max_length=0)
    config.evaluations.pairs = base.evaluation(data="pairs/test", alone=True, checkpoints=("random init", "pair"))
    if arg.runlocal:
        base.shrink(config)
    config.data.update(gin_file="configs/data/pairs.gin", gin_bindings=(), vocab_size=512 if arg.runlocal else 8192)
    return config
