"""What does quantization in training cost and gain? The pair stage with int8, with tanh, with neither, and spread out.

    embed ablate --config=configs/ablations/quantization.py --workdir=runs/quantization

The tables of float32, int8 and binary vectors show what each kind of training is good for. `spread out` adds global
orthogonal regularization, which is meant for binary vectors.
"""

from ml_collections import ConfigDict

from configs.ablations import small


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg, "functions")
    config.ablation.checkpoint = "pair"
    config.ablation.variants = (
        ("int8", {}),
        ("tanh", {"stages.pair.quantization": "tanh"}),
        ("none", {"stages.pair.quantization": "none"}),
        ("int8, spread out", {"stages.pair.spread_out": 1.0}),
    )
    return config
