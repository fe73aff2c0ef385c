"""The whole graph of stages on the Python sources of this machine, in minutes on two CPU cores.

    embed pipeline --config=configs/quickstart.py --workdir=runs/quickstart

--config=configs/quickstart.py:runlocal shrinks it to a few minutes.
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
    config.model.update(rope_theta=1e4, dtype="float32")  # positions up to a thousand
    config.data.gin_file = "configs/data/python_docs.gin"
    config.card.languages = ("en",)
    # Fast on CPU.
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none", unroll=64, dense_barrier=True)

    prefixes = (64, 256)
    optimizer = dict(learning_rate=1e-4, embedding_rate=30.0, warmup=0.05, decay=0.3, b2=0.98, weight_decay=0.01)
    execution = dict(checkpoint_every=1000)
    # Groups have few rows, so documents are cut to about 64 tokens: more pairs per second help more than longer ones.
    rows = dict(length=128, spans=8, segments=8, groups=2, rows_per_group=49)

    # A fast table would let diffusion destroy the similarity of texts that share words.
    config.stages.diffusion = base.stage(
        "diffusion",
        curriculum=((60, "diffusion"),),
        optimizer=optimizer | dict(embedding_rate=1.0),
        batch=dict(rows=32, length=128),
        execution=execution | dict(logits_chunk=256),
    )
    config.stages.pair = base.stage(
        "pair",
        init="diffusion",
        curriculum=((400, "pairs"),),
        matryoshka=prefixes,
        temperature=0.05,  # 0.02 in the paper, at batch 16,384
        optimizer=optimizer,
        batch=rows | dict(group_size=96),
        execution=execution,
    )
    config.stages.contextual = base.stage(
        "contextual",
        init="pair",
        curriculum=((480, "contextual"),),
        matryoshka=prefixes,
        temperature=0.05,
        optimizer=optimizer,
        batch=dict(group_size=16, groups=2, rows_per_group=14, length=512, spans=32, segments=32, max_chunks=8),
        execution=execution,
    )
    config.mining.hard_negatives = base.mining(
        checkpoint="pair", tasks=("python_docs.summaries",), queries=8192, rank_window=(5, 50)
    )
    config.stages.triplet = base.stage(
        "triplet",
        init="pair",
        curriculum=((60, "hard_negatives"),),
        matryoshka=prefixes,
        temperature=0.05,
        optimizer=optimizer | dict(learning_rate=3e-5),
        batch=rows | dict(group_size=32, num_negatives=2),
        execution=execution,
    )

    config.merges.merged = base.merge(
        of=("contextual", "triplet"),
        ratio=0.8,
        sweep=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        sweep_on=("functions/development", "contextual/development"),
    )
    config.exports["embed"] = base.export(checkpoint="merged", max_length=0)
    config.exports["embed-context"] = base.export(checkpoint="contextual", contextual=True, max_length=0)
    models = ("random init", "diffusion", "pair", "contextual", "triplet", "merged")
    config.evaluations.functions = base.evaluation(data="functions/test", alone=True, checkpoints=models)
    config.evaluations.contextual = base.evaluation(data="contextual/test", checkpoints=models)
    config.evaluations.contextual_alone = base.evaluation(data="contextual/test", alone=True, checkpoints=models)
    config.report.update(denoise="diffusion", search="embed", texts="functions/test", fuse=("contextual", "merged"))
    if arg.runlocal:
        base.shrink(config)
    return config
