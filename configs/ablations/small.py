"""What the ablations vary: the quickstart with a third of its steps, on the Python sources of this machine.

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
    for stage in config.stages.values():
        stage.curriculum = tuple((-(-steps // 3), mixture) for steps, mixture in stage.curriculum)
    if "runlocal" not in arg:
        config.data.gin_bindings = ("evaluation.max_queries = 1500",)
    for name in [name for name in config.evaluations if evaluations and name not in evaluations]:
        del config.evaluations[name]
    return config
