"""What the ablations vary: the quickstart with fewer steps, on the Python sources of this machine.

from configs.ablations import small

config = small.get_config("runlocal" if arg.runlocal else "")
config.ablation.update(variants=(("int8", {}), ("none", {"stages.pair.quantization": "none"})), checkpoint="pair")
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config(arg)
    # A third of the quickstart's steps, so that a table takes tens of minutes on two cores.
    for stage in config.stages.values():
        stage.curriculum = tuple((-(-steps // 3), mixture) for steps, mixture in stage.curriculum)
    if not arg:
        config.data.gin_bindings = ("evaluation.max_queries = 1500",)
    return config


def only(config: ConfigDict, *evaluations: str) -> None:
    """Keep these evaluations: functions, contextual, contextual_alone."""
    for name in [name for name in config.evaluations if name not in evaluations]:
        del config.evaluations[name]
