"""Which negatives does the pair stage need? The false-negative mask, the query-query term, homogeneous batches.

    embed ablate --config=configs/ablations/false_negatives.py --workdir=runs/false_negatives

The margin of the mask is 0.1 in the paper; a margin of 2 masks nothing.
"""

from ml_collections import ConfigDict

from configs.ablations import small


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg, "functions")
    config.ablation.checkpoint = "pair"
    config.ablation.variants = (
        ("margin 0.1", {}),
        ("margin 0", {"stages.pair.margin": 0.0}),
        ("no mask", {"stages.pair.margin": 2.0}),
        ("no query negatives", {"stages.pair.query_negatives": False}),
        ("homogeneous batches", {"stages.pair.batch.homogeneous": True}),
    )
    return config
