"""What does each stage of the graph give? Every one is left out in turn.

    embed ablate --config=configs/ablations/stages.py --workdir=runs/stages

A variant without the last stages is measured at the stage before.
"""

from ml_collections import ConfigDict

from configs.ablations import small


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg)
    config.ablation.checkpoint = "merged"
    config.ablation.variants = (
        ("all stages", {}),
        ("no diffusion", {"stages.pair.init": ""}),
        (
            "no pair stage",
            {
                "stages.contextual.init": "diffusion",
                "stages.triplet.init": "diffusion",
                "mining.hard_negatives.checkpoint": "diffusion",
            },
        ),
        ("no contextual stage", {"ablation.checkpoint": "triplet"}),
        ("no triplet stage", {"ablation.checkpoint": "contextual"}),
        ("pair stage only", {"ablation.checkpoint": "pair"}),
    )
    return config
