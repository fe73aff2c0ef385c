"""Wrong values of config fields are refused by name, before any data are read."""

import functools
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from embed import cli, config, fields
from embed.rows import RowShape, dense, pack_group
from embed.training import stages

QUICKSTART = "configs/quickstart.py"
# Fields that may be negative.
MAY_BE_NEGATIVE = {"mining.hard_negatives.margin"}


def test_the_configs_of_the_project_are_allowed():
    for name in ("quickstart", "laptop", "pplx_embed"):
        for arg in ("", ":runlocal"):
            fields.check(config.load(f"configs/{name}.py{arg}"))


def test_only_a_few_numbers_of_a_config_may_be_negative():
    numbers = {
        key: value
        for key, value in config.leaves(config.load(QUICKSTART))
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert len(numbers) > 80
    for key, value in numbers.items():
        overridden = config.load(QUICKSTART, [f"--config.{key}={type(value)(-3)}"])
        if key in MAY_BE_NEGATIVE:
            fields.check(overridden)
            continue
        with pytest.raises(ValueError, match=r"^[\w. -]+=-3(\.0)? must be "):
            fields.check(overridden)


@pytest.mark.parametrize(
    "override, sentence",
    [
        (
            "stages.pair.execution.checkpoint_every=0",
            "config.stages.pair.execution.checkpoint_every=0 must be at least 1",
        ),
        ("stages.pair.batch.group_size=0", "config.stages.pair.batch.group_size=0 must be at least 1"),
        (
            "stages.pair.kind=pairs",
            "config.stages.pair.kind='pairs' must be one of causal, diffusion, pair, contextual, triplet, distill",
        ),
        ("stages.pair.kind=triplet", "config.stages.pair.kind='triplet' must be the kind given to base.stage"),
        ("stages.pair.curriculum=((-1, 'pairs'),)", "config.stages.pair.curriculum=((-1, 'pairs'),) must be ((steps, "),
        ("stages.pair.curriculum=()", "config.stages.pair.curriculum=() must be"),
        ("stages.pair.curriculum=(400, 'pairs')", "config.stages.pair.curriculum=(400, 'pairs') must be"),
        ("stages.pair.curriculum=((1, {'a': -1}),)", "must be ((steps, mixture or {task: rate}), …)"),
        ("stages.pair.matryoshka=(64, 257)", "matryoshka=(64, 257) must be prefixes from 1 to the 256 dimensions"),
        ("stages.pair.matryoshka=()", "config.stages.pair.matryoshka=() must be prefixes"),
        ("stages.pair.temperature=0.0", "config.stages.pair.temperature=0.0 must be above 0"),
        ("stages.pair.optimizer.learning_rate=1e999", "config.stages.pair.optimizer.learning_rate=inf must be above 0"),
        ("stages.pair.optimizer.b2=1.0", "config.stages.pair.optimizer.b2=1.0 must be at least 0 and below 1"),
        ("stages.pair.optimizer.warmup=0.8", "config.stages.pair.optimizer.warmup=0.8 must be at most 0.7"),
        ("stages.pair.optimizer.moment_dtype=int8", "moment_dtype='int8' must be one of float32, bfloat16"),
        (
            "stages.pair.execution.microbatches=3",
            "config.stages.pair.execution.microbatches=3 must be a divisor of the 98",
        ),
        ("stages.diffusion.batch.truncate_probability=2.0", "truncate_probability=2.0 must be from 0 to 1"),
        (
            "stages.diffusion.left_shift=yes",
            "config.stages.diffusion.left_shift='yes' must be one of auto, True, False",
        ),
        ("stages.diffusion.noise=uniform", "config.stages.diffusion.noise='uniform' must be one of "),
        ("stages.diffusion.mask_ratio=0.0", "config.stages.diffusion.mask_ratio=0.0 must be above 0 and at most 1"),
        ("stages.diffusion.anneal=1.5", "config.stages.diffusion.anneal=1.5 must be from 0 to 1"),
        ("stages.contextual.chunking=none", "chunking='none' must be one of late, early"),
        ("stages.pair.pooling=max", "config.stages.pair.pooling='max' must be one of mean, last"),
        ("stages.pair.attention=full", "attention='full' must be one of bidirectional, causal"),
        ("stages.pair.quantization=int4", "config.stages.pair.quantization='int4' must be one of "),
        ("stages.pair.matryoshka_weights=(1.0,)", "config.stages.pair.matryoshka_weights=(1.0,) must be "),
        ("stages.pair.matryoshka_weights=(1.0, 0.0)", "matryoshka_weights=(1.0, 0.0) must be "),
        ("stages.pair.spread_out=-1.0", "config.stages.pair.spread_out=-1.0 must be "),
        ("stages.pair.margin=-0.1", "config.stages.pair.margin=-0.1 must be at least 0; 2 = no mask"),
        (
            "evaluations.functions.truncate_dim=12",
            "truncate_dim=12 must be a multiple of 8, at most the 256 dimensions",
        ),
        ("evaluations.functions.truncate_dim=512", "truncate_dim=512 must be a multiple of 8, at most the 256"),
        ("evaluations.functions.needle_tokens=64", "bm25=True must be False with needle_tokens"),
        ("merges.merged.method=mean", "config.merges.merged.method='mean' must be one of slerp, linear"),
        ("stages.contextual.beta=(0.2,)", "config.stages.contextual.beta=(0.2,) must be two numbers from 0 to 1"),
        (
            "stages.contextual.batch.max_chunks=33",
            "config.stages.contextual.batch.max_chunks=33 must be at most batch.spans",
        ),
        ("model.num_kv_heads=3", "num_heads=2 must be a multiple of num_kv_heads=3"),
        ("model.num_kv_heads=0", "config.model.num_kv_heads=0 must be at least 1"),
        ("model.head_dim=63", "config.model.head_dim=63 must be even and at least 2"),
        ("model.dtype=float16", "dtype='float16' must be float32 or bfloat16"),
        ("execution.attention=flash", "attention='flash' must be one of auto, xla"),
        ("execution.remat=some", "remat='some' must be one of"),
        ("execution.mesh.fsdp=0", "config.execution.mesh.fsdp=0 must be at least 1, or -1"),
        ("execution.mesh.fsdp=-1", "must be at least 1, or -1 for at most one axis"),
        ("seed=99999999999999999999", "config.seed=99999999999999999999 must be at least 0 and at most 2147483647"),
        (
            "stages.pair.batch.groups=True",
            "config key 'stages.pair.batch.groups' must be of type int like 2, got 'True'",
        ),
        (
            "stages.pair.batch.groups=None",
            "config key 'stages.pair.batch.groups' must be of type int like 2, got 'None'",
        ),
        (
            "stages.pair.temperature=" + "9" * 400,
            "config key 'stages.pair.temperature' must be of type float like 0.05",
        ),
        ("stages.pair.temperature=" + "(" * 5000, "config key 'stages.pair.temperature' must be of type float like"),
        ("stages.pair.curriculum=((99999999999,'pairs'),)", "must be ((steps, mixture or {task: rate}), …)"),
        ("stages.pair.curriculum=((1,{'a':1e999}),)", "must be ((steps, mixture or {task: rate}), …)"),
        ("stages.pair.matryoshka=(True,)", "matryoshka=(True,) must be prefixes from 1 to"),
        (
            "stages.pair.batch.length=2000000000",
            "length=2000000000 must be at most 21913098, because a batch has 98 rows",
        ),
        (
            "stages.contextual.batch.max_queries_per_document=99999999",
            "must be at most 67108863, because a batch has 32",
        ),
        (
            "stages.triplet.batch.rows_per_group=1",
            "rows_per_group=1 must be at least 16: a group has 128 texts, and a row",
        ),
        ("execution.readers=-1", "config.execution.readers=-1 must be at least 0 and at most 1024"),
        ("execution.cache_bytes=-1", "config.execution.cache_bytes=-1 must be at least 0 and below 2^63"),
        ("stages.pair.batch.rows_per_group=-1", "rows_per_group=-1 must be at least 0"),
        ("execution.read_timeout=1e10", "config.execution.read_timeout=10000000000.0 must be from 0 to 1e9"),
        ("mining.hard_negatives.rank_window=('a', 5)", "rank_window=('a', 5) must be (lo, hi) with 0 <= lo < hi"),
        ("merges.merged.of=('pair', 1)", "config.merges.merged.of=('pair', 1) must be two names"),
        ("report.fuse=('',)", "config.report.fuse=('',) must be each a name"),
        (
            "data.vocab_size=72",
            "config.data.vocab_size=72 must be at least 73: the control pieces and single characters",
        ),
        ("mining.hard_negatives.rank_window=(50, 5)", "rank_window=(50, 5) must be (lo, hi) with 0 <= lo < hi"),
        ("mining.hard_negatives.tasks=()", "tasks=() must be at least one name, each only once"),
        ("mining.hard_negatives.tasks=('a','b','a')", "must be at least one name, each only once"),
        ("mining.hard_negatives.pool=all", "pool='all' must be one of own, union"),
        ("mining.hard_negatives.precision=binary", "precision='binary' must be one of float32, int8"),
        ("merges.merged.ratio=1.5", "config.merges.merged.ratio=1.5 must be from 0 to 1"),
        ("merges.merged.sweep=(0.5, 2.0)", "config.merges.merged.sweep=(0.5, 2.0) must be each from 0 to 1"),
        ("merges.merged.of=('pair',)", "config.merges.merged.of=('pair',) must be two names"),
        ("report.mask_fraction=0.0", "config.report.mask_fraction=0.0 must be above 0 and at most 1"),
    ],
)
def test_every_verb_refuses_a_wrong_value_in_one_sentence_before_it_reads_anything(
    override, sentence, tmp_path, capsys
):
    for verb in ("prepare", "train", "pipeline"):
        assert (
            cli.main([verb, f"--config={QUICKSTART}:stage=pair", f"--workdir={tmp_path}/run", f"--config.{override}"])
            == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("embed: error: ") and sentence in line
    assert not (tmp_path / "run").exists()


NUMBERS = {int: [True, 1.5, 10**20, "7", None], float: [True, float("nan"), float("inf"), 10**400, 1e39, "7", None]}


def test_no_number_of_a_config_may_be_a_bool_too_large_not_finite_or_missing():
    loaded = config.load(QUICKSTART).to_dict()
    for key, value in config.leaves(config.load(QUICKSTART)):
        *parents, name = key.split(".")
        section = functools.reduce(dict.__getitem__, parents, loaded)
        for wrong in NUMBERS.get(type(value), [None]):
            with pytest.raises(ValueError, match=rf"^config\.{key}=.* must be "):
                section[name] = wrong
                fields.check(ConfigDict(loaded))
        section[name] = value
    fields.check(ConfigDict(loaded))


@pytest.mark.parametrize(
    "kind, batch, rows",
    [
        ("pair", dict(group_size=8, length=128, spans=4, segments=9), 4),
        ("pair", dict(group_size=8, length=1, spans=4, segments=9), 16),
        ("triplet", dict(group_size=8, length=128, spans=9, segments=4, num_negatives=3), 10),
        ("contextual", dict(group_size=9, length=128, spans=4, segments=4, max_chunks=4), 5),
    ],
)
def test_a_group_needs_the_rows_that_hold_one_token_of_each_text(kind, batch, rows):
    """The packer of the loader is the reference."""
    for count in (rows, rows - 1):
        loaded = config.load(QUICKSTART)
        loaded.stages[kind].batch.update(batch, groups=1, rows_per_group=count)
        texts = batch["group_size"] * (2 + batch.get("num_negatives", 0))
        segments, shape = [dense(np.ones(1))] * texts, RowShape(*(batch[n] for n in ("length", "spans", "segments")))
        if count == rows:
            fields.check(loaded)
            pack_group(segments, shape, count)
            continue
        sentence = (
            f"config.stages.{kind}.batch.rows_per_group={count} must be at least {rows}: a group has {texts} texts"
        )
        with pytest.raises(ValueError, match=sentence):
            fields.check(loaded)
        with pytest.raises(ValueError, match="do not fit"):
            pack_group(segments, shape, count)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(teacher_dimensions=0), "config.stages.student.teacher_dimensions=0 must be at least 1"),
        (dict(kl=-1.0), "config.stages.student.kl=-1.0 must be at least 0"),
        (dict(cosine=0.0, kl=0.0), "config.stages.student.kl=0.0 must be above 0 where cosine and mse are 0"),
        (dict(teacher_dimensions=128), "prefixes of at most teacher_dimensions=128: cosine=1.0 and mse=0.0 compare"),
        (dict(teacher_dimensions=128, cosine=0.0, mse=1.0), "prefixes of at most teacher_dimensions=128"),
        (dict(teacher_dimensions=128, cosine=0.0), None),  # similarities are compared between any dimensions
        (dict(batch=dict(rows_per_group=3)), "rows_per_group=3 must be at least 4: a group has 128 texts, and a row"),
        (dict(batch=dict(rows_per_group=4)), None),
    ],
)
def test_a_distill_stage_has_a_loss_that_its_teacher_allows(changes, sentence):
    from configs import base

    loaded = config.load(QUICKSTART)
    loaded.unlock()
    how = dict(teacher_dimensions=512, matryoshka=(64, 256), curriculum=((1, "texts"),), batch={}) | changes
    loaded.stages.student = base.stage("distill", **how)
    if sentence is None:
        fields.check(loaded)
        return
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fields.check(loaded)


def test_every_kind_of_stage_has_a_required_field():
    assert set(fields.KINDS) == set(stages.KINDS)


def test_a_vocabulary_with_byte_fallback_needs_all_bytes():
    overrides = ["--config.data.split_identifiers=False", "--config.data.vocab_size=259"]
    with pytest.raises(ValueError, match="config.data.vocab_size=259 must be at least 260"):
        fields.check(config.load(QUICKSTART, overrides))
    fields.check(config.load(QUICKSTART, [*overrides, "--config.data.tokenizer=a_folder"]))  # no vocabulary is trained


@pytest.mark.parametrize("kernel", ["splash", "triton", "cudnn"])
def test_only_the_kernel_that_can_anneal_a_mask_may_be_named_with_annealing(kernel):
    overrides = ["--config.stages.diffusion.anneal=0.5", f"--config.execution.attention={kernel}"]
    with pytest.raises(ValueError, match=f"anneal=0.5 must be 0 with execution.attention='{kernel}': only xla can"):
        fields.check(config.load(QUICKSTART, overrides))
    for allowed in (overrides[:1], overrides[1:], [overrides[0], "--config.execution.attention=xla"]):
        fields.check(config.load(QUICKSTART, allowed))
