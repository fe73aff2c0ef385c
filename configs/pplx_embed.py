"""pplx-embed with the sizes, batches, lengths and schedules of the paper, where it states them (arXiv 2602.11151).

    embed plan --config=configs/pplx_embed.py:size=0.6b,stage=diffusion --topology=v6e:8x8
    embed prepare --config=configs/pplx_embed.py:size=0.6b --workdir=RUN --check
    embed prepare --config=configs/pplx_embed.py:size=0.6b --workdir=RUN
    embed train --config=configs/pplx_embed.py:size=0.6b,stage=diffusion --workdir=RUN

The argument `init` is the model that the diffusion stage starts from, a folder or hub id; the data use its tokenizer.
configs/data/pplx_embed.gin defines the mixtures. What the paper does not say is marked "a choice". `runlocal` runs the
same graph at toy size on the Python sources of this machine.
"""

from ml_collections import ConfigDict

from configs import base
from embed.config import parse_arg
from embed.models.transformer import SIZES

# The sets of the triplet stage and their shares, as in configs/data/pplx_embed.gin: 92% English, 7% multilingual, 1%
# code.
TRIPLETS = {
    "msmarco": 0.30,
    "hotpotqa": 0.12,
    "fever": 0.12,
    "nq": 0.10,
    "squad": 0.08,
    "trivia": 0.08,
    "gooaq": 0.06,
    "eli5": 0.03,
    "mldr": 0.02,
    "fiqa": 0.01,
    "miracl": 0.07,
    "code": 0.01,
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="", size="0.6b", init="")
    if arg.size not in ("0.6b", "4b"):
        raise ValueError(f"size={arg.size!r} must be 0.6b or 4b")
    small = arg.size == "0.6b"
    source = arg.init or f"Qwen/Qwen3-{arg.size.upper()}-Base"
    config = base.get_config()
    config.stage = arg.stage
    config.model.update(SIZES[arg.size])
    config.model.vocab_size = 151936
    config.data.gin_file = "configs/data/pplx_embed.gin"
    config.data.tokenizer = source

    prefixes = (128, 256, 512, 1024) if small else (128, 256, 512, 1024, 2048, 2560)
    config.stages.diffusion = base.stage(
        "diffusion",
        init=source,
        curriculum=((60_000, "diffusion"),),
        optimizer=dict(learning_rate=5e-4 if small else 3.16e-4),
        batch=dict(rows=1024, length=4096, truncate_probability=0.01),
        # Every chunk of logits reads and writes the gradient of the table, so chunks are few and large.
        execution=dict(logits_chunk=2048),
    )
    config.stages.pair = base.stage(
        "pair",
        init="diffusion",
        # English, then also cross-lingual pairs, then all languages. The division of the 50,000 steps is a choice.
        curriculum=((20_000, "pairs_english"), (10_000, "pairs_cross_lingual"), (20_000, "pairs_multilingual")),
        matryoshka=prefixes,
        temperature=0.02,
        optimizer=dict(learning_rate=2e-4 if small else 5e-5),
        # 16,384 pairs. A group of 128 pairs has 32 rows, that is 256 tokens per pair: a choice.
        batch=dict(group_size=128, groups=128, rows_per_group=32, length=1024),
    )
    # Steps, batches and learning rates of the next two stages are choices, and so are documents of 16 chunks of 256
    # tokens.
    config.stages.contextual = base.stage(
        "contextual",
        init="pair",
        curriculum=((5_000, "contextual"),),
        matryoshka=prefixes,
        temperature=0.02,  # a choice
        optimizer=dict(learning_rate=5e-5 if small else 2e-5),
        batch=dict(group_size=8, groups=128, rows_per_group=10, length=4096, spans=64, segments=64, max_chunks=16),
    )
    # The stage draws 10.2 million examples, so every query of a set is mined. Its documents are the candidates.
    for name in TRIPLETS:
        config.mining[f"mined_{name}"] = base.mining(
            checkpoint="pair", tasks=(f"triplets.{name}",), rank_window=(5, 100)
        )
    config.stages.triplet = base.stage(
        "triplet",
        init="pair",
        curriculum=((5_000, {f"mined_{name}": rate for name, rate in TRIPLETS.items()}),),
        matryoshka=prefixes,
        temperature=0.03,
        optimizer=dict(learning_rate=2e-5 if small else 1e-5),
        batch=dict(group_size=16, groups=128, rows_per_group=16, length=1024, num_negatives=4),
    )
    config.merges.merged = base.merge(of=("contextual", "triplet"), ratio=0.5)  # a choice
    config.exports["embed"] = base.export(checkpoint="merged")
    config.exports["embed-context"] = base.export(checkpoint="contextual", contextual=True)

    if arg.runlocal:
        base.shrink(config)
        config.model.update(SIZES["micro"])
        config.model.vocab_size = 0
        config.data.tokenizer = config.stages.diffusion.init = arg.init
        config.stages.pair.curriculum = ((1, "summaries"), (1, "pairs"))
        tasks = {"mined_summaries": "python_docs.summaries", "mined_classes": "python_docs.classes"}
        config.mining = ConfigDict(
            {name: base.mining(checkpoint="pair", tasks=(task,), rank_window=(5, 50)) for name, task in tasks.items()}
        )
        config.stages.triplet.curriculum = ((2, {"mined_summaries": 0.9, "mined_classes": 0.1}),)
    return config
