"""The quickstart's graph and data with more time to spend: how far a small dense model gets alone on two CPU cores.

    embed pipeline --config=configs/laptop.py --workdir=runs/laptop

What it reached: README.md, "More time". `runlocal` keeps the model and shrinks steps, batches and data.
"""

from ml_collections import ConfigDict

from configs import quickstart
from embed.config import parse_arg
from embed.models.transformer import SIZES


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config(arg)
    config.model.update(SIZES["small"])
    pair, contextual, triplet = (config.stages[name] for name in ("pair", "contextual", "triplet"))
    for stage in (pair, contextual, triplet):
        stage.matryoshka = (64, 128, 256, 512)
        stage.checkpoint_every = 200  # a step is most of a second: lose no more than minutes
    pair.optimizer.learning_rate = 3e-3  # of a model twice as wide
    config.mining.queries = 16384
    if not parse_arg(arg, runlocal=False, stage="").runlocal:
        pair.curriculum = ((1000, "pairs"),)
        pair.batch.update(group_size=128, rows_per_group=76)  # documents of up to about 80 tokens
        contextual.curriculum = ((400, "contextual"),)
        triplet.curriculum = ((150, "triplet"),)
    return config
