"""The quickstart's graph and data with an hour to spend: how far a small dense model gets alone, on two CPU cores.

    embed pipeline --config=configs/laptop.py --workdir=runs/laptop

What it reached, and what each lever gave: README.md, "An hour on a laptop". `runlocal` shrinks it to a few seconds.
"""

from ml_collections import ConfigDict

from configs import quickstart
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config(arg)
    if parse_arg(arg, runlocal=False, stage="").runlocal:
        return config
    config.model.size = "small"
    prefixes = (64, 128, 512)
    diffusion, pair, contextual, triplet = (
        config.stages[name] for name in ("diffusion", "pair", "contextual", "triplet")
    )
    diffusion.curriculum = ((400, "diffusion"),)
    pair.curriculum = ((2400, "pairs"),)
    pair.optimizer.learning_rate = 3e-3
    pair.batch.update(group_size=128, rows_per_group=76)  # texts of up to about 80 tokens
    contextual.curriculum = ((300, "contextual"),)
    triplet.curriculum = ((300, "triplet"),)
    for stage in (pair, contextual, triplet):
        stage.matryoshka = prefixes
        stage.checkpoint_every = 200  # a step is most of a second: lose no more than minutes
    config.mining.queries = 0
    return config
