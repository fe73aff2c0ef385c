"""The quickstart's graph and data with more time to spend: how far a small dense model gets alone on two CPU cores.

    embed pipeline --config=configs/laptop.py --workdir=runs/laptop

What it reached, and what each lever gave: README.md, "More time". `runlocal` shrinks it to a few seconds.
"""

from ml_collections import ConfigDict

from configs import quickstart
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config(arg)
    if parse_arg(arg, runlocal=False, stage="").runlocal:
        return config
    config.model.size = "small"
    diffusion, pair, contextual, triplet = (
        config.stages[name] for name in ("diffusion", "pair", "contextual", "triplet")
    )
    pair.curriculum = ((800, "pairs"),)
    pair.optimizer.learning_rate = 3e-3  # of a model twice as wide
    pair.batch.update(group_size=128, rows_per_group=76)  # documents of up to about 80 tokens
    contextual.optimizer.learning_rate = 2e-3
    contextual.batch.rows_per_group = 13
    triplet.curriculum = ((150, "triplet"),)
    for stage in (pair, contextual, triplet):
        stage.matryoshka = (64, 128, 256, 512)
    for stage in (diffusion, pair, contextual, triplet):
        stage.checkpoint_every = 200  # a step is most of a second: lose no more than minutes
    config.mining.queries = 16384
    return config
