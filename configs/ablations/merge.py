"""Slerp against linear merges of the contextual and the triplet stage, by ratio.

    embed ablate --config=configs/ablations/merge.py --workdir=runs/merge

All variants of a seed share their stages.
"""

from ml_collections import ConfigDict

from configs.ablations import small


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg)
    config.ablation.checkpoint = "merged"
    config.ablation.variants = tuple(
        (f"{method} {ratio}", {"merges.merged.method": method, "merges.merged.ratio": ratio})
        for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)
        for method in (("slerp", "linear") if 0 < ratio < 1 else ("slerp",))
    )
    return config
