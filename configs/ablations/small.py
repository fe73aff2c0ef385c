"""What the ablations vary: the quickstart with two layers, narrower, and a quarter of the steps.

    config = small.get_config(arg, "functions")
    config.ablation.checkpoint = "pair"
    config.ablation.variants = (("int8", {}), ("none", {"stages.pair.quantization": "none"}))

The argument is that of configs/quickstart.py: `runlocal`.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(arg: str = "", *evaluations: str) -> ConfigDict:
    """The config with these evaluations of the quickstart, by default all: functions, contextual, contextual_alone."""
    config = quickstart.get_config(arg)
    if "runlocal" not in arg:
        # Two layers, because attention has little to mix in one; narrow, so that a run takes minutes on a core.
        config.model.update(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32)
        config.model.intermediate_size = 256
        for stage in config.stages.values():
            if stage.get("matryoshka"):
                stage.matryoshka = (32, 128)
            stage.curriculum = tuple((-(-steps // 4), mixture) for steps, mixture in stage.curriculum)
        config.data.gin_bindings = ("evaluation.max_queries = 1500",)
    if unknown := set(evaluations) - set(config.evaluations):
        raise ValueError(f"evaluations {sorted(unknown)} must be of {', '.join(config.evaluations)}")
    for name in [name for name in config.evaluations if evaluations and name not in evaluations]:
        del config.evaluations[name]
    return config
