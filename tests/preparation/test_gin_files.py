"""Every gin file of configs/data binds, and has what the configs name."""

import functools
import importlib
from pathlib import Path

import pytest
import small

from configs import domain
from embed import nodes
from embed.models import transformer
from embed.preparation import settings
from embed.runs import Run

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in ROOT.glob("configs/data/*.gin"))
CONFIGS = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem not in ("__init__", "base"))


# What their configs bind.
BINDINGS = {"domain.gin": domain.bindings()}


@functools.cache
def bound(name: str) -> settings.Settings:
    return settings.bind(ROOT / "configs" / "data" / name, BINDINGS.get(name, ()), data_root="/data")


def flat(rates, mixture: str) -> dict[str, float]:
    """{task: its share} of a mixture of mixtures."""
    shares, total = {}, sum(rates[mixture].values())
    for member, rate in rates[mixture].items():
        for task, share in (flat(rates, member) if member in rates else {member: 1.0}).items():
            shares[task] = shares.get(task, 0.0) + share * rate / total
    return shares


def languages(made: settings.Settings, mixture: str) -> set[str]:
    tasks = (made.tasks[name] for name in flat(made.mixtures.rates, mixture))
    return {language for task in tasks for language in (task.language, *task.languages) if language}


@pytest.mark.parametrize("name", FILES)
def test_a_gin_file_binds_and_defines_every_task_that_it_names(name):
    made = bound(name)
    assert made.trained() and not made.registered


@pytest.mark.parametrize("name", ["multilingual.gin", "pplx_embed.gin"])
def test_tasks_say_their_language(name):
    tasks = bound(name).tasks
    untold = [n for n, task in tasks.items() if not (task.language or task.languages or task.language_field)]
    assert set(untold) <= {"java_cs.pairs"}  # code in two languages


@pytest.mark.parametrize("argument", ["", "runlocal"])
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_that_a_config_names_is_in_its_gin_file(name, argument, tmp_path):
    if name in ("distill", "domain"):
        wide = transformer.make_config("tiny", small.config().vocab_size)
        model = small.write_model(tmp_path / "model", small.random_params(wide), wide)
        argument += f",{'teacher' if name == 'distill' else 'model'}={model}"
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    config.data.root = str(tmp_path)
    described = {"gin_file": ROOT / config.data.gin_file, "data_root": str(tmp_path)}
    described["gin_bindings"] = tuple(config.data.gin_bindings)
    nodes.check_described(Run(config, tmp_path / "run"), described)


def test_multilingual_has_the_languages_and_holds_out_by_what_rows_share():
    made = bound("multilingual.gin")
    assert len(languages(made, "diffusion")) >= 128
    assert not any("squad_v11_dev" in f"{made.tasks[name].source}" for name in made.trained())
    for dataset in ("tldr", "medquad", "jsquad", "cmrc", "arcd", "norquad"):  # all tasks hold out the same rows
        tasks = [task for name, task in made.tasks.items() if name.startswith(f"{dataset}.")]
        assert len({(task.held_out, task.held_out_by) for task in tasks}) == 1 and tasks[0].held_out
    chunks = [made.tasks[f"squad.chunks_{count}"].source.max_chunks for count in (1, 2, 4, 8)]
    assert chunks == [1, 2, 4, 8] and made.tasks["squad.articles"].source.max_chunks == 0


def test_the_mixtures_of_the_paper_have_its_proportions():
    made, config = bound("pplx_embed.gin"), importlib.import_module("configs.pplx_embed").get_config("")
    rates = made.mixtures.rates
    diffusion = flat(rates, "diffusion")
    assert diffusion["fineweb_edu"] == 0.5 and len(languages(made, "diffusion")) == 30
    whole, steps = dict.fromkeys(("english", "multilingual", "cross_lingual", "code"), 0.0), 0
    for count, mixture in config.stages.pair.curriculum:
        steps += count
        for member, rate in rates[mixture].items():
            whole[member] += count * rate / sum(rates[mixture].values())
    shares = {member: total / steps for member, total in whole.items()}
    assert shares == pytest.approx(
        {"english": 0.656, "multilingual": 0.267, "cross_lingual": 0.067, "code": 0.01}, abs=1e-9
    )
    triplets = flat(rates, "triplets")
    assert len(triplets) == 12
    multilingual = triplets.pop("triplets.miracl")
    assert (multilingual, triplets.pop("triplets.code")) == pytest.approx((0.07, 0.01))
    assert {made.tasks[name].language for name in triplets} == {"en"}
    assert len(made.tasks["triplets.miracl"].languages) == 15
    ((_, mined),) = config.stages.triplet.curriculum
    expected = flat(rates, "triplets")
    assert {config.mining[name].tasks[0]: rate for name, rate in mined.items()} == pytest.approx(expected)
