"""The whole graph of stages on text in more than a hundred languages.

    embed prepare --config=configs/multilingual.py --workdir=RUN --data_root=DATA --check
    embed pipeline --config=configs/multilingual.py --workdir=RUN --data_root=DATA

configs/data/multilingual.gin says which sets DATA must have. `runlocal` runs the same graph at toy size on the Python
sources of this machine.
"""

from ml_collections import ConfigDict

from configs import base
from embed.config import parse_arg
from embed.models.transformer import SIZES

# Tasks whose hard negatives are mined. Those of a task are ranked among its own documents.
MINED = ("scifact.pairs", "medquad.pairs", "jsquad.pairs", "cmrc.pairs", "tldr.pairs", "codesearchnet.pairs")

LANGUAGES = "ar bn de en es fr hi id it ja ko nl pl pt_BR ru ta tr uk zh".split()
# Evaluation sets without documents of chunks.
DENSE = (
    "scifact",
    "tldr_translations",
    *(f"tldr_{language}" for language in LANGUAGES),
    "cmrc",
    "arcd",
    "norquad",
    *(f"gorilla_{name}" for name in ("huggingface", "pytorch", "tensor")),
    "metatool",
)


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="")
    config = base.get_config()
    config.stage = arg.stage
    thin = dict(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128, intermediate_size=128)
    config.model.update(SIZES["micro"] if arg.runlocal else SIZES["small"] | thin)
    config.model.update(rope_theta=1e4, dtype="float32")
    config.data.gin_file = "configs/data/multilingual.gin"
    config.data.vocab_size = 32_000
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none", unroll=64, dense_barrier=True)

    optimizer = dict(learning_rate=1e-4, embedding_rate=10.0, warmup=0.05, decay=0.3, b2=0.98, weight_decay=0.01)
    common = dict(matryoshka=(64, 128, 256, 512), temperature=0.05, execution=dict(checkpoint_every=100))
    # The number of rows is chosen from the lengths of the data: 95% of their tokens are text.
    rows = dict(length=256, spans=32, segments=32, groups=2, rows_per_group=0)
    # A fast table would let diffusion destroy the similarity of texts that share words.
    config.stages.diffusion = base.stage(
        "diffusion",
        curriculum=((100, "diffusion"),),
        optimizer=optimizer | dict(embedding_rate=1.0),
        batch=dict(rows=16, length=256),
        execution=dict(checkpoint_every=100, logits_chunk=256),
    )
    config.stages.pair = base.stage(
        "pair",
        init="diffusion",
        curriculum=((300, "pairs"),),
        optimizer=optimizer,
        batch=rows | dict(group_size=128),
        **common,
    )
    # Half of the documents have unrelated chunks, which teach a model to keep its chunks apart.
    config.stages.contextual = base.stage(
        "contextual",
        init="pair",
        curriculum=((300, "contextual"),),
        optimizer=optimizer,
        alpha=0.4,
        beta=(0.1, 0.1),
        batch=dict(group_size=16, groups=2, rows_per_group=0, length=1024, spans=64, segments=64, max_chunks=16),
        **common,
    )
    for task in MINED:
        config.mining[f"mined_{task.partition('.')[0]}"] = base.mining(
            checkpoint="pair", tasks=(task,), queries=8192, rank_window=(5, 50)
        )
    parts = {name: 1.0 for name in config.mining} | {"klue.triplets": 0.5}
    config.stages.triplet = base.stage(
        "triplet",
        init="pair",
        curriculum=((40, parts),),
        optimizer=optimizer,
        batch=rows | dict(group_size=32, num_negatives=2),
        **common,
    )

    config.merges.merged = base.merge(of=("contextual", "triplet"), ratio=0.5)
    config.exports["embed"] = base.export(checkpoint="merged", max_length=0)
    config.exports["embed-context"] = base.export(checkpoint="contextual", contextual=True, max_length=0)
    models = ("random init", "pair", "merged")
    for name in DENSE:
        config.evaluations[name] = base.evaluation(data=f"{name}/test", alone=True, checkpoints=models)
    for name in ("articles", "chunks_2", "chunks_4", "chunks_8"):
        config.evaluations[f"squad_{name}"] = base.evaluation(
            data=f"squad/{name}", checkpoints=("contextual", "merged")
        )
    models = ("random init", "pair", "contextual", "merged")
    config.evaluations.squad_alone = base.evaluation(data="squad/chunks_1", alone=True, checkpoints=models)
    for name in ("medquad", "jsquad"):
        config.evaluations[name] = base.evaluation(data=f"{name}/test", checkpoints=("contextual", "merged"))
        config.evaluations[f"{name}_alone"] = base.evaluation(data=f"{name}/test", alone=True, checkpoints=models)

    if arg.runlocal:
        base.shrink(config)
        config.data.split_identifiers = True
        config.stages.pair.curriculum = ((1, "summaries"), (1, "pairs"))
        config.mining = ConfigDict(
            {"mined_summaries": base.mining(checkpoint="pair", tasks=("python_docs.summaries",), rank_window=(5, 50))}
        )
        config.stages.triplet.curriculum = ((2, "mined_summaries"),)
        config.evaluations = ConfigDict()
    return config
