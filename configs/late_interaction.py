"""Dense embeddings and late interaction from one encoder, compared on the Python sources of this machine.

    embed pipeline --config=configs/late_interaction.py --workdir=runs/late_interaction

The stages diffusion and pair are those of configs/quickstart.py. Late interaction starts from the pair stage, which has
seen the same pairs. docs/late_interaction.md has results.
"""

from ml_collections import ConfigDict

from configs import base, quickstart
from embed.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="")
    config = quickstart.get_config("runlocal" if arg.runlocal else "")
    config.stage = arg.stage
    for part in ("mining", "merges", "exports", "evaluations"):
        config[part] = ConfigDict()
    del config.stages["contextual"], config.stages["triplet"]
    pair = config.stages.pair
    config.stages.late_interaction = base.stage(
        "late_interaction",
        init="pair",
        curriculum=((100, "pairs"),),
        token_dimensions=64,
        optimizer=pair.optimizer.to_dict() | dict(learning_rate=3e-4, embedding_rate=3.0),
        batch=pair.batch.to_dict() | dict(max_query_tokens=32, max_document_tokens=64),
        execution=pair.execution.to_dict(),
    )
    config.exports["late-interaction"] = base.export(checkpoint="late_interaction", max_length=0)
    models = ("random init", "diffusion", "pair", "late_interaction")
    config.evaluations.functions = base.evaluation(data="functions/test", alone=True, checkpoints=models)
    config.evaluations.contextual_alone = base.evaluation(data="contextual/test", alone=True, checkpoints=models)
    config.report.update(denoise="", search="", fuse=())
    if arg.runlocal:
        base.shrink(config)
    return config
