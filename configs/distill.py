"""A small student of a teacher model, from texts without pairs, in minutes on two CPU cores.

    embed encode --model=TEACHER --corpus=texts.jsonl --truncate --output=FOLDER/vectors.parquet
    embed pipeline --config=configs/distill.py:teacher=TEACHER --data_root=FOLDER --workdir=runs/student

TEACHER is a model folder. FOLDER also has test.jsonl, lines {"query": TEXT, "document": TEXT} that the student is
evaluated on, before and after, next to its teacher. docs/distill.md has more about it. Arguments after the teacher:

    compare      the same student also learns without the teacher, from the pairs of FOLDER/train.jsonl
    runlocal     shrinks all to seconds
"""

from ml_collections import ConfigDict

from configs import base
from embed.checkpoints.model_folder import read_architecture
from embed.config import parse_arg
from embed.models.transformer import SIZES

PAIRS = (
    'mixtures.rates = {"texts": {"own.texts": 1.0}, "pairs": {"own.pairs": 1.0}}',
    'own/pairs/files.paths = "{data_root}/train.jsonl"',
    'own/pairs/task.kind = "pair"',
)


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, teacher="", compare=False, runlocal=False, stage="")
    if not arg.teacher and not arg.runlocal:
        raise ValueError("config argument teacher='' must be a model folder: configs/distill.py:teacher=TEACHER")
    config = base.get_config()
    config.stage = arg.stage
    config.model.update(SIZES["micro" if arg.runlocal else "tiny"])
    config.model.update(rope_theta=1e4, dtype="float32")
    config.execution.update(mesh=dict(data=-1, fsdp=1), remat="none", unroll=64, dense_barrier=True)  # fast on CPU

    common = dict(
        matryoshka=(64, 256),
        temperature=0.05,
        optimizer=dict(learning_rate=1e-4, embedding_rate=30.0, warmup=0.05, decay=0.3, b2=0.98, weight_decay=0.01),
    )
    rows = dict(groups=2, rows_per_group=0, length=256, spans=32, segments=32)
    config.stages.distill = base.stage(
        "distill",
        curriculum=((800, "texts"),),
        teacher_dimensions=read_architecture(arg.teacher).hidden_size if arg.teacher else 1024,
        batch=rows | dict(group_size=128),
        **common,
    )
    if arg.compare:
        config.stages.pair = base.stage(
            "pair", curriculum=((800, "pairs"),), batch=rows | dict(group_size=64), **common
        )
    students = tuple(config.stages)
    for name in students:
        config.exports[name] = base.export(checkpoint=name, max_length=0)
    teachers = (arg.teacher,) if arg.teacher else ()
    config.evaluations.pairs = base.evaluation(
        data="pairs/test", alone=True, checkpoints=("random init", *students, *teachers)
    )
    if arg.runlocal:
        base.shrink(config)
    config.data.update(
        gin_file="configs/data/distill.gin",
        gin_bindings=PAIRS if arg.compare else (),
        vocab_size=512 if arg.runlocal else 8192,
    )
    return config
