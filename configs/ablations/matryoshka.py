"""What do Matryoshka prefixes cost the whole vector, and what do they gain the prefixes?

    embed ablate --config=configs/ablations/matryoshka.py --workdir=runs/matryoshka

Every variant is measured with the whole vector and with a quarter of it.
"""

from ml_collections import ConfigDict

from configs.ablations import small


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg, "functions")
    whole, prefix = config.model.hidden_size, config.model.hidden_size // 4
    config.evaluations[f"functions at {prefix}"] = config.evaluations.functions.copy_and_resolve_references()
    config.evaluations[f"functions at {prefix}"].truncate_dim = prefix
    config.ablation.checkpoint = "pair"
    field = "stages.pair.matryoshka"
    config.ablation.variants = (
        ("equal weights", {field: (prefix, whole)}),
        ("whole vector only", {field: (whole,)}),
        ("prefix only", {field: (prefix,)}),
        ("weights 1 : 3", {field: (prefix, whole), f"{field}_weights": (1.0, 3.0)}),
        ("four prefixes", {field: (prefix // 4, prefix // 2, prefix, whole)}),
    )
    return config
