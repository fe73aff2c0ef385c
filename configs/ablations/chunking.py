"""Late or early chunking in training, and the weights of the contextual losses, by length of the document.

    embed ablate --config=configs/ablations/chunking.py --workdir=runs/chunking

Early chunking trains on the same batches, but each chunk attends only to itself. Every variant is measured on chunks in
their document and alone; report.md of a run has the figures by length.
"""

from ml_collections import ConfigDict

from configs.ablations import small
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False)
    config = small.get_config("runlocal" if arg.runlocal else "")
    config.ablation.checkpoint = "contextual"
    config.ablation.variants = (
        ("late", {}),
        ("early", {"stages.contextual.chunking": "early"}),
        ("no document loss", {"stages.contextual.beta": (0.0, 0.0)}),
        ("no in-document loss", {"stages.contextual.alpha": 0.0}),
        ("only in-document loss", {"stages.contextual.alpha": 1.0, "stages.contextual.beta": (0.0, 0.0)}),
    )
    return config
