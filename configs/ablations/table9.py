"""Does diffusion pretraining matter? Table 9 of the paper (arXiv 2602.11151) with the controls that it lacks.

    embed ablate --config=configs/ablations/table9.py --workdir=runs/table9
    embed ablate --config=configs/ablations/table9.py:size=0.6b --workdir=gs://BUCKET/table9 --dry-run

A causal decoder is converted in four ways, {kept causal, bidirectional without further training, bidirectional +
masked-token prediction at a fixed ratio (MNTP), bidirectional + diffusion}, each with pooling of the last token and of
the mean. Then all are trained on the same pairs. The paper has the first and the last of the four. At the small size
the decoder is trained first, as long as MNTP and diffusion are (`steps=N`); at size=0.6b and 4b it is Qwen3.
"""

from ml_collections import ConfigDict

from configs import base, pplx_embed
from configs.ablations import small
from embed.config import parse_arg

BACKBONES = {
    "causal": {"stages.pair.init": "decoder", "stages.pair.attention": "causal"},
    "bidirectional": {"stages.pair.init": "decoder"},
    "MNTP": {"stages.pair.init": "mntp"},
    "diffusion": {"stages.pair.init": "diffusion"},
}


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, size="small", steps=0)
    if arg.steps and (arg.size != "small" or arg.steps < 0):
        raise ValueError(f"config argument steps={arg.steps} must be positive, and is for size=small only")
    if arg.size == "small":
        config = small.get_config("runlocal" * arg.runlocal, "functions")
        decoder = "decoder"
        text = dict(learning_rate=1e-3, embedding_rate=1.0, warmup=0.05, decay=0.3, b2=0.98, weight_decay=0.01)
        common = dict(
            curriculum=((2 if arg.runlocal else arg.steps or 400, "diffusion"),),
            optimizer=text,
            batch=dict(rows=4 if arg.runlocal else 16, length=128),
            execution=dict(logits_chunk=256),
        )
        config.stages.decoder = base.stage("causal", **common)
        config.stages.diffusion = base.stage("diffusion", init="decoder", **common)
        # The decoder's embeddings have been trained: pairs need less than from random weights.
        config.stages.pair.optimizer.update(learning_rate=3e-4, embedding_rate=10.0)
    else:
        config = pplx_embed.get_config(f"size={arg.size}" + ",runlocal" * arg.runlocal)
        decoder = config.stages.diffusion.init
        # As in the paper, a short English pair stage; its length is a choice.
        config.stages.pair.curriculum = ((2_000, "pairs_english" if not arg.runlocal else "pairs"),)
        sets = ("scifact/test", "nfcorpus/test") if not arg.runlocal else ("functions/test",)
        for name in sets:
            config.evaluations[name.partition("/")[0]] = base.evaluation(data=name, alone=True)
    config.stages.mntp = config.stages.diffusion.copy_and_resolve_references()
    config.stages.mntp.noise = "fixed"
    config.ablation.checkpoint = "pair"
    config.ablation.variants = tuple(
        (f"{name}, {pooling}", _from(decoder, changes) | {"stages.pair.pooling": pooling})
        for name, changes in BACKBONES.items()
        for pooling in ("last", "mean")
    )
    return config


def _from(decoder: str, changes: dict) -> dict:
    return {key: decoder if value == "decoder" else value for key, value in changes.items()}
