"""How long may a text be? Needles in texts of 512 to 32,768 tokens, by the RoPE base in training and at inference.

    embed ablate --config=configs/ablations/length.py --workdir=runs/length
    embed ablate --config=configs/ablations/length.py:longest=4096 --workdir=runs/length

Training rows have 128 tokens, so every length is outside of training. Shorter texts would not hold a function and
others around it. A larger base at inference stretches the positions of training; a larger base in training makes far
positions look near. The plot is over the length.
"""

from ml_collections import ConfigDict

from configs import base
from configs.ablations import small
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, longest=32768)
    if arg.longest < 512:
        raise ValueError(f"config argument longest={arg.longest} must be at least 512")
    config = small.get_config("runlocal" * arg.runlocal)
    lengths = (64, 128) if arg.runlocal else [2**k for k in range(9, 16) if 2**k <= arg.longest]
    config.evaluations = ConfigDict(
        {
            f"needle {n}": base.evaluation(data="functions/test", alone=True, bm25=False, needle_tokens=n)
            for n in lengths
        }
    )
    config.ablation.update(checkpoint="pair", plot="curve")
    stretched = {f"evaluations.needle {n}.rope_theta": 1e6 for n in lengths}
    config.ablation.variants = (
        ("1e4", {}),
        ("1e4, 1e6 at inference", stretched),
        ("1e6", {"model.rope_theta": 1e6}),
        ("1e2", {"model.rope_theta": 1e2}),
    )
    return config
