"""Qwen3 sizes in every stage, at the batch, length and schedule of pplx-embed where they are known (arXiv 2602.11151).

    embed convert Qwen/Qwen3-0.6B-Base runs/qwen3-0.6b
    embed plan --config=configs/qwen3.py:size=0.6b,stage=diffusion --topology=v6e:8x8
    embed train --config=configs/qwen3.py:size=0.6b,stage=diffusion,init=runs/qwen3-0.6b --workdir=RUN

Data: the mixtures of `configs/data/python_docs.gin` until others are bound; lengths of the batch are those of the
paper. `runlocal` is the quickstart's, with the numerics and options of this file.
"""

from ml_collections import ConfigDict

from configs import quickstart
from embed.config import parse_arg
from embed.models.transformer import SIZES


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="", size="0.6b", init="")
    if arg.size not in ("0.6b", "4b"):
        raise ValueError(f"size={arg.size!r} must be 0.6b or 4b")
    config = quickstart.get_config("runlocal" if arg.runlocal else "")
    config.stage = arg.stage
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.unroll = 1
    config.model.dense_barrier = False
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    diffusion, pair, contextual, triplet = (
        config.stages[name] for name in ("diffusion", "pair", "contextual", "triplet")
    )
    if arg.runlocal:
        return config
    diffusion.init = arg.init

    small = arg.size == "0.6b"
    config.model.update(SIZES[arg.size])
    config.model.update(vocab_size=151936, rope_theta=1e6)
    config.data.tokenizer = f"{arg.init}/tokenizer" if arg.init else ""
    config.export.max_length = 32768
    prefixes = (128, 256, 512, 1024) if small else (128, 256, 512, 1024, 2048, 2560)
    for stage in (diffusion, pair, contextual, triplet):
        stage.checkpoint_every = 500
        # Fractions of the steps; not known of the paper.
        stage.optimizer.update(warmup=0.01, decay=0.1, b2=0.95, weight_decay=0.1)
    for stage in (pair, contextual, triplet):
        stage.matryoshka = prefixes

    diffusion.curriculum = ((60_000, "diffusion"),)
    diffusion.optimizer.learning_rate = 5e-4 if small else 3.16e-4
    diffusion.batch.update(rows=1024, length=4096)
    # From 4 rows a device at a time. Each chunk of logits reads and writes the gradient of the table once: few and large ones.
    diffusion.update(logits_capacity=0.65, logits_chunk=2048)

    pair.curriculum = ((50_000, "pairs"),)
    pair.temperature = 0.02
    pair.optimizer.learning_rate = 2e-4 if small else 5e-5
    # 16,384 pairs, a group of 128 of them in 32 rows: 256 tokens a pair. The paper's lengths are not known.
    pair.batch.update(group_size=128, groups=128, rows_per_group=32, length=1024, spans=32, segments=32)

    # Steps, batch and rate of the next two are not known; documents of 16 chunks of 256 tokens are a choice.
    contextual.curriculum = ((5_000, "contextual"),)
    contextual.temperature = 0.02
    contextual.optimizer.learning_rate = 5e-5 if small else 2e-5
    contextual.batch.update(
        group_size=8, groups=128, rows_per_group=10, length=4096, spans=64, segments=64, max_chunks=16
    )

    triplet.curriculum = ((5_000, "triplet"),)
    triplet.temperature = 0.03
    triplet.optimizer.learning_rate = 2e-5 if small else 1e-5
    triplet.batch.update(
        group_size=16, groups=128, rows_per_group=16, length=1024, spans=32, segments=32, num_negatives=4
    )
    return config
