"""Variants of a config, on a small part of this machine's Python sources."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.ablations import small
from embed import ablation, cli, config, nodes, paths
from embed.evaluation import ablated
from embed.runs import Run

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(file.stem for file in (ROOT / "configs" / "ablations").glob("*.py") if file.stem != "small")
ABLATION = """
from configs import base
from configs.ablations import small

def get_config(arg=""):
    config = small.get_config("runlocal", "functions")
    config.data.update(limit=30, gin_bindings=("evaluation.max_queries = 20",))
    config.stages.pair.init = ""
    config.stages.more = config.stages.pair.copy_and_resolve_references()
    config.stages.more.init = "pair"
    config.ablation.update(checkpoint="more", seeds=(3, 5))
    config.ablation.variants = (
        ("mean", {}),
        ("last + causal", {"stages.more.pooling": "last", "stages.more.attention": "causal"}),
        ("one stage", {"ablation.checkpoint": "pair"}),
    )
    return config
"""


@pytest.fixture(scope="module")
def ablated_run(tmp_path_factory):
    """(config file, folder) of a complete ablation."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "own.py").write_text(ABLATION)
    assert cli.main(["ablate", f"--config={folder / 'own.py'}", f"--workdir={folder / 'runs'}"]) == 0
    return folder / "own.py", folder / "runs"


def rows(folder, **wanted):
    found = json.loads((folder / "ablation.json").read_text())
    return [row for row in found if wanted.items() <= row.items()]


def test_ablation_json_has_every_variant_seed_task_and_metric(ablated_run):
    _, folder = ablated_run
    found = rows(folder)
    assert {tuple(row) for row in found} == {("variant", "seed", "task", "metric", "value")}
    assert {(row["variant"], row["seed"]) for row in found} == {
        (name, seed) for name in ("mean", "last + causal", "one stage") for seed in (3, 5)
    }
    metrics = {row["metric"] for row in rows(folder, task="functions", variant="mean", seed=3)}
    assert {"ndcg@10", "ndcg@10 float32", "ndcg@10 binary", "recall@10"} <= metrics
    for row in rows(folder, task="training"):
        assert row["metric"] in ("seconds", "pflop") and row["value"] > 0


def test_the_values_are_those_of_the_records_of_each_run(ablated_run):
    file, folder = ablated_run
    for variant in ablation.variants(config.load(str(file)), folder):
        record = paths.read_json(
            nodes.record_file(Run(variant.config, variant.folder), variant.checkpoint, "functions")
        )
        (row,) = rows(folder, variant=variant.name, seed=variant.seed, task="functions", metric="ndcg@10")
        assert row["value"] == record["values"]["int8"]["ndcg@10"]
    values = [row["value"] for row in rows(folder, task="functions", metric="ndcg@10 float32")]
    assert len(set(values)) > 3  # variants and seeds differ


def test_a_stage_that_an_earlier_variant_has_is_not_trained_again(ablated_run):
    _, folder = ablated_run
    assert (folder / "data" / "info.json").exists()
    for seed in ("3", "5"):
        first = folder / "runs" / "mean" / seed
        assert (first / "pair").is_dir() and (first / "more").is_dir()
        later = folder / "runs" / "last + causal" / seed
        assert (later / "more").is_dir() and not (later / "pair").exists() and not (later / "data").exists()
        parent = paths.read_json(later / "more" / "config.json")["parent"]
        assert parent["folder"] == str(first / "pair")
        assert parent["digest"] == paths.read_json(first / "more" / "config.json")["parent"]["digest"]
        assert not any((folder / "runs" / "one stage" / seed).glob("*/checkpoints"))
    assert len({p["value"] for p in rows(folder, task="training", metric="pflop", variant="one stage")}) == 1
    (one,), (two,) = (
        rows(folder, task="training", metric="pflop", variant=name, seed=3) for name in ("one stage", "mean")
    )
    assert two["value"] == pytest.approx(2 * one["value"])


def test_a_complete_ablation_trains_nothing_and_keeps_its_figures(ablated_run, monkeypatch):
    file, folder = ablated_run
    before = (folder / "ablation.json").read_text()
    monkeypatch.setattr(nodes, "train_stage", lambda *_, **__: pytest.fail("trained again"))
    assert cli.main(["ablate", f"--config={file}", f"--workdir={folder}", "--only", "one stage", "mean"]) == 0
    assert (folder / "ablation.json").read_text() == before


def test_the_page_has_mean_and_deviation_over_seeds_differences_with_intervals_and_a_plot(ablated_run):
    _, folder = ablated_run
    page = (folder / "ablation.md").read_text()
    values = [row["value"] for row in rows(folder, task="functions", metric="ndcg@10", variant="last + causal")]
    assert f"| last + causal | 2 | {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in page
    assert "### Difference from mean, int8" in page and "### Difference from mean, binary" in page
    assert page.startswith("# Ablation: own\n") and "not complete" not in page
    assert f"jax {jax.__version__}" in page and "commit" in page
    html = (folder / "ablation.html").read_text()
    assert "data:image/svg+xml" in html and (folder / "plots" / "ablation.svg").exists()


def result(variant, seed, values, task="functions"):
    ids = [f"q{i}" for i in range(len(values))]
    record = {
        "main": "ndcg@10",
        "values": {"int8": {"ndcg@10": float(np.mean(values))}},
        "queries": {"ids": ids, "values": {"int8": values}},
    }
    return ablated.Result(variant, seed, {task: record}, {"seconds": 1.0, "pflop": 2.0})


def test_differences_are_paired_by_query_and_averaged_over_the_seeds_of_both():
    rng = np.random.default_rng(0)
    hard = rng.random(200)  # queries differ more than variants do
    base = [result("a", seed, (hard + 0.01 * rng.random(200)).tolist()) for seed in (0, 1)]
    better = [result("b", seed, (hard + 0.05).tolist()) for seed in (0, 1, 2)]
    text = ablated.difference(better, base, "functions")
    assert text.startswith("**+0.045 ± 0.000 [+0.04") and text.endswith("]**")
    assert ablated.difference(base, base, "functions") == "+0.000 ± 0.000 [+0.000, +0.000]"
    apart = [result("b", seed, (hard + shift).tolist()) for seed, shift in ((0, 0.1), (1, 0.3))]
    equal = [result("a", seed, hard.tolist()) for seed in (0, 1)]
    assert ablated.difference(apart, equal, "functions") == "**+0.200 ± 0.141 [+0.200, +0.200]**"
    other = [result("b", 7, hard.tolist())]
    assert ablated.difference(other, base, "functions") == "–"  # no common seed


def test_runs_that_are_not_complete_are_counted(tmp_path):
    ablated.write(tmp_path, [result("a", 0, [0.5, 1.0])], command="embed ablate", missing=3)
    assert "3 of 4 runs are not complete and not in the figures." in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize("argument", ["", ":runlocal"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_ablation_has_consistent_variants(name, argument, tmp_path):
    loaded = config.load(f"configs/ablations/{name}.py{argument}")
    found = ablation.variants(loaded, tmp_path)
    seeds = loaded.ablation.seeds
    assert len(seeds) == (2 if argument else 3) and len(found) == len(seeds) * len(loaded.ablation.variants)
    made = set()
    for variant in found:  # every stage is trained once, before it is used
        assert set(variant.parents) <= made
        new = {str(variant.folder / stage) for stage in variant.config.stages}
        assert not new & made
        made |= new
        assert variant.config.evaluations and not variant.config.exports
        Run(variant.config, variant.folder)  # all fields are allowed


def test_the_table_of_the_paper_has_its_four_cells_and_the_controls():
    for size in ("small", "0.6b"):
        loaded = config.load(f"configs/ablations/table9.py:size={size}")
        names = [name for name, _ in loaded.ablation.variants]
        assert names == [
            f"{backbone}, {pooling}"
            for backbone in ("causal", "bidirectional", "MNTP", "diffusion")
            for pooling in ("last", "mean")
        ]
        assert loaded.stages.mntp.noise == "fixed" and loaded.stages.diffusion.noise == "stratified"
        if size == "small":  # as many steps for the decoder as for what converts it
            steps = {sum(n for n, _ in loaded.stages[s].curriculum) for s in ("decoder", "mntp", "diffusion")}
            assert len(steps) == 1


def test_dry_run_prints_the_preparation_and_one_command_per_variant_in_order_with_all_options(capsys):
    arguments = ["--config=configs/ablations/table9.py:size=0.6b", "--workdir=gs://bucket/table9", "--data_root=/sets"]
    arguments += ["--config.ablation.seeds=(0,)", "--dry-run"]
    assert cli.main(["ablate", *arguments, "--launcher=launch/tpu.sh submit --name={variant} --"]) == 0
    lines = capsys.readouterr().out.splitlines()
    common = f"{' '.join(arguments[:3])} '--config.ablation.seeds=(0,)'"
    assert lines[0] == f"embed prepare {common}"
    commands = [line for line in lines if line.startswith("launch/")]
    assert len(commands) == 8
    assert commands[0] == f"launch/tpu.sh submit --name=causal-last -- ablate {common} '--only=causal, last'"
    assert "# after 'MNTP, last': the next command starts from stages of it" in lines
    assert cli.main(["ablate", *arguments, "--only", "MNTP, mean", "--only", "causal, mean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("--only=")[2] for line in lines if "--only" in line] == ["causal, mean'", "MNTP, mean'"]


def test_dry_run_prints_a_preparation_for_each_folder_of_data(tmp_path, capsys):
    file, lines = tmp_path / "own.py", ("small", {"data.vocab_size": 600, "data.limit": 20, "model.rope_theta": 1e5})
    file.write_text(
        ABLATION.replace(
            "    return config", f"    config.ablation.variants = (('a', {{}}), {lines!r})\n    return config"
        )
    )
    where = [f"--config={file}", f"--workdir={tmp_path}/w"]
    assert cli.main(["ablate", *where, "--dry-run"]) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == f"embed prepare {' '.join(where)}" and not any("prepare" in line for line in others)
    start, _, folder = second.rpartition(" --config.data.directory=")
    assert start == f"{first} --config.data.vocab_size=600 --config.data.limit=20"
    variant = ablation.variants(config.load(str(file)), f"{tmp_path}/w")[1]
    overridden = config.load(str(file), [each for each in shlex.split(second)[4:]])
    assert folder == variant.config.data.directory
    assert overridden.data.to_dict() == variant.config.data.to_dict()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("length:longest=256", "config argument longest=256 must be at least 512"),
        ("table9:size=0.6b,steps=7", "config argument steps=7 must be positive, and is for size=small only"),
        ("table9:steps=-7", "config argument steps=-7 must be positive"),
        ("../distill:compare", "config argument teacher='' must be a model folder"),
    ],
)
def test_arguments_of_a_config_that_mean_nothing_are_refused(name, sentence):
    path, _, argument = name.partition(":")
    with pytest.raises(ValueError, match=sentence):
        config.load(f"configs/ablations/{path}.py:{argument}")


def test_an_unknown_evaluation_of_a_small_ablation_is_refused():
    with pytest.raises(
        ValueError, match=r"evaluations \['functoins'\] must be of contextual, contextual_alone, functions"
    ):
        small.get_config("", "functoins")


def test_a_launcher_without_dry_run_is_refused_before_any_work(tmp_path, capsys):
    arguments = ["--config=configs/ablations/noise.py:runlocal", f"--workdir={tmp_path / 'noise'}", "--launcher=srun"]
    assert cli.main(["ablate", *arguments]) == 2
    assert "--launcher='srun' needs --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "noise").exists()


def test_seconds_are_those_of_the_steps_without_the_compilation_of_the_first(tmp_path):
    variant = ablation.variants(config.load("configs/ablations/matryoshka.py:runlocal"), tmp_path)[0]
    for stage, rates in (("diffusion", (9.0, 0.5, 0.25)), ("pair", (0.5, 2.0, 2.0))):
        folder = variant.folder / stage
        folder.mkdir(parents=True)
        rows = [{"step": step, "seconds_per_step": rate} for step, rate in zip((1, 11, 13), rates)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = Run(variant.config, variant.folder).record(f"stage {stage}")
        paths.write_json(record, {"result": {"flops": 1e15}})
    cost = ablation._cost(variant, {str(variant.folder): variant}, "")
    # diffusion: the first of 13 steps at the rate of the next ten; pair: the first was faster than they
    assert cost == {"seconds": 0.5 + 5 + 0.5 + 0.5 + 20 + 4, "pflop": 2.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ablation.variants": ()}, "config.ablation.variants is empty"),
        ({"ablation.variants": (("a", {}), ("a", {}))}, "has a name twice"),
        ({"ablation.variants": (("a", {"stages.pair.poling": "last"}),)}, "did you mean 'stages.pair.pooling'"),
        ({"ablation.variants": (("a", {"seed": "x"}),)}, "'seed' must be of type int like 0, got 'x'"),
        ({"ablation.checkpoint": "nothing"}, "config.ablation.checkpoint='nothing' must be one of"),
        (
            {"ablation.variants": (("a", {"stages.pair.quantization": "bits"}),)},
            "quantization='bits' must be one of int8",
        ),
        ({"evaluations": {}}, "config.evaluations is empty: an ablation compares its variants in at least one"),
        ({"ablation.plot": "curve"}, "needs evaluations whose names end in a number, not 'functions'"),
    ],
)
def test_an_ablation_that_cannot_run_is_refused_before_any_work(changes, message, tmp_path):
    loaded = config.load("configs/ablations/quantization.py:runlocal")
    if "evaluations" in changes:
        with loaded.unlocked():
            loaded.evaluations = {}
    else:
        loaded = config.changed(loaded, changes)
    with pytest.raises(ValueError, match=message):
        ablation.variants(loaded, tmp_path)
    assert not any(tmp_path.iterdir())


def folders(changes, name="quantization"):
    """{stage of the second variant: its folder}, for a first variant that changes nothing and one that does."""
    loaded = config.load(f"configs/ablations/{name}.py:runlocal")
    listed = (("first", {}), ("second", changes))
    loaded = config.changed(loaded, {"ablation.seeds": (0,), "ablation.variants": listed})
    return dict(ablation.variants(loaded, "runs")[1].made_by)


@pytest.mark.parametrize(
    "changes, shared",
    [
        ({"stages.pair.execution.log_every": 7}, {"diffusion", "pair"}),
        ({"execution.attention": "xla"}, {"diffusion", "pair"}),
        ({"stages.pair.margin": 0.2}, {"diffusion"}),
        ({"stages.pair.curriculum": ((3, "pairs"),)}, {"diffusion"}),
        ({"stages.pair.init_step": 1}, {"diffusion"}),
        ({"stages.pair.init": ""}, set()),  # diffusion is not needed
        ({"stages.diffusion.noise": "bell"}, set()),
        ({"model.rope_theta": 1e5}, set()),
        ({"data.vocab_size": 600}, set()),
    ],
)
def test_a_stage_is_shared_if_and_only_if_nothing_that_it_depends_on_differs(changes, shared):
    made_by = folders(changes)
    assert {stage for stage, folder in made_by.items() if "runs/first" in folder} == shared
    assert all("runs/second" in folder for stage, folder in made_by.items() if stage not in shared)


def test_a_stage_on_mined_negatives_depends_on_how_they_are_mined():
    mined = {"ablation.checkpoint": "triplet"}
    first = folders(mined | {"mining.hard_negatives.margin": 0.1}, "stages")
    assert "runs/second" in first["triplet"] and "runs/first" in first["pair"]


def test_the_data_of_the_config_are_in_data_whichever_variant_is_first():
    loaded = config.load("configs/ablations/quantization.py:runlocal")
    listed = (("small", {"data.vocab_size": 600}), ("as it is", {}))
    loaded = config.changed(loaded, {"ablation.seeds": (0,), "ablation.variants": listed})
    small, same = (variant.config.data.directory for variant in ablation.variants(loaded, "runs"))
    assert Path(same).name == "data" and Path(small).name.startswith("data-")


def test_a_config_with_a_baseline_of_its_report_can_be_ablated(tmp_path):
    loaded = config.load("configs/domain.py:runlocal")
    listed = (("as it is", {}), ("cold", {"stages.domain.temperature": 0.02}))
    changes = {"ablation.checkpoint": "domain", "ablation.seeds": (0,), "ablation.variants": listed}
    assert len(ablation.variants(config.changed(loaded, changes), tmp_path)) == 2


def test_tasks_of_a_curve_are_in_the_order_of_their_numbers(tmp_path):
    tasks = {f"needle {n}": result("a", 0, [0.5, n / 4096], "x").records["x"] for n in (1024, 128, 4096, 512)}
    found = [ablated.Result(name, 0, tasks, {"seconds": 1.0, "pflop": 1.0}) for name in ("a", "b")]
    ablated.write(tmp_path, found, command="embed ablate", plot="curve")
    heads = next(line for line in (tmp_path / "ablation.md").read_text().splitlines() if line.startswith("| variant"))
    assert [head.strip() for head in heads.split("|")[3:7]] == [f"needle {n}" for n in (128, 512, 1024, 4096)]


def test_differences_are_from_the_first_variant_or_left_out_as_long_as_it_is_missing(tmp_path):
    found = [result(name, 0, [0.5, 1.0]) for name in ("b", "c")]
    ablated.write(tmp_path, found, command="embed ablate", missing=1, order=("a", "b", "c"))
    assert "### Difference" not in (tmp_path / "ablation.md").read_text()
    ablated.write(tmp_path, [*found, result("a", 0, [0.4, 1.0])], command="embed ablate", order=("a", "b", "c"))
    assert "### Difference from a, int8" in (tmp_path / "ablation.md").read_text()


def test_an_unknown_variant_is_refused(ablated_run, capsys):
    file, folder = ablated_run
    assert cli.main(["ablate", f"--config={file}", f"--workdir={folder}", "--only=median"]) == 2
    assert "--only='median' must be one of 'mean', 'last + causal', 'one stage'" in capsys.readouterr().err


def test_a_variant_whose_stages_another_one_has_to_train_is_refused_before_any_work(ablated_run, tmp_path, capsys):
    file, _ = ablated_run
    where = [f"--config={file}", f"--workdir={tmp_path / 'new'}"]
    assert cli.main(["ablate", *where, "--only=last + causal"]) == 2
    error = capsys.readouterr().err
    assert "--only='last + causal' starts from the stage 'pair' of 'mean' with seed 3, which is not trained" in error
    assert not (tmp_path / "new").exists()
