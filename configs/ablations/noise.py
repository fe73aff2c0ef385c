"""How should diffusion mask? The distribution of t, the left shift, annealing from a causal mask, before equal pairs.

    embed ablate --config=configs/ablations/noise.py --workdir=runs/noise

The decoder of table9.py is converted, so that the left shift and annealing have something to keep.
"""

from ml_collections import ConfigDict

from configs.ablations import table9


def get_config(arg: str = "") -> ConfigDict:
    config = table9.get_config(arg)
    config.stages.pair.init = "diffusion"
    config.ablation.variants = (
        ("stratified", {}),
        ("independent", {"stages.diffusion.noise": "independent"}),
        ("bell-shaped", {"stages.diffusion.noise": "bell"}),
        ("no left shift", {"stages.diffusion.left_shift": "False"}),
        ("annealed mask", {"stages.diffusion.anneal": 0.5}),
    )
    return config
