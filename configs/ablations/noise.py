"""How should diffusion mask? The distribution of t, the left shift, annealing from a causal mask, before equal pairs.

    embed ablate --config=configs/ablations/noise.py --workdir=runs/noise

The decoder of table9.py is converted, so that the left shift and annealing have something to keep.
"""

from ml_collections import ConfigDict

from configs.ablations import small, table9
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False)
    config = table9.get_config("runlocal" if arg.runlocal else "")
    small.only(config, "functions", "contextual_alone")
    config.stages.pair.init = "diffusion"
    config.ablation.variants = (
        ("stratified", {}),
        ("independent", {"stages.diffusion.noise": "independent"}),
        ("bell-shaped", {"stages.diffusion.noise": "bell"}),
        ("no left shift", {"stages.diffusion.left_shift": "False"}),
        ("annealed mask", {"stages.diffusion.anneal": 0.5}),
    )
    return config
