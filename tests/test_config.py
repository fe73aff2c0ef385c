import re
from pathlib import Path

import pytest

from embed import config, runs

ROOT = Path(__file__).parent.parent
QUICKSTART = "configs/quickstart.py"


def test_overrides_replace_single_fields_and_keep_their_type():
    loaded = config.load(QUICKSTART, ["--config.stages.pair.optimizer.learning_rate=1", "--config.seed=7"])
    assert loaded.stages.pair.optimizer.learning_rate == 1.0 and loaded.seed == 7
    assert loaded.stages.triplet.optimizer.learning_rate != 1.0


def test_tuples_can_be_overridden():
    loaded = config.load(QUICKSTART, ["--config.stages.pair.curriculum=((3, 'pairs'),)"])
    assert tuple(map(tuple, loaded.stages.pair.curriculum)) == ((3, "pairs"),)


def test_an_argument_whose_default_is_a_tuple_may_occur_several_times():
    parsed = config.parse_arg("set=a/b=c,small,set=gs://d", set=(), other=(), small=False)
    assert (parsed.set, parsed.other, parsed.small) == (("a/b=c", "gs://d"), (), True)


@pytest.mark.parametrize(
    "path, overrides, message",
    [
        (
            QUICKSTART,
            ["--config.stages.pair.optimizer.learnin_rate=1"],
            "did you mean 'stages.pair.optimizer.learning_rate'",
        ),
        (QUICKSTART, ["--config.seed=many"], "'seed' must be of type int like 0, got 'many'"),
        (QUICKSTART, ["--workdirr=x"], "unknown argument '--workdirr=x'"),
        (QUICKSTART + ":runlcal", [], "unknown config argument 'runlcal'; did you mean 'runlocal'"),
        (QUICKSTART + ":runlocal=perhaps", [], "runlocal='perhaps' must be True or False"),
    ],
)
def test_errors_about_keys_and_values_name_what_is_allowed(path, overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config.load(path, overrides)


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match="no file configs/nowhere.py; searched in"):
        config.load("configs/nowhere.py")


def test_a_config_that_is_not_a_python_file_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json must be a Python file with get_config"):
        config.load(str(tmp_path / "config.json"))


BASE = "from configs import base\n\ndef get_config(arg=''):\n    config = base.get_config()\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (BASE, "get_config returns None, expected a config of configs/base.py"),
        ("def get_config(arg=''):\n    return {}\n", "get_config returns {}, expected a config"),
        (BASE + "    del config.model.tied\n    return config\n", "lacks model.tied: build it on configs/base.py"),
        (
            BASE + "    config.stages.a = base.stage('pair')\n    del config.stages.a.margin\n    return config\n",
            "lacks stag",
        ),
        (BASE + "    config.exports.a = 3\n    return config\n", "config.exports.a is 3, expected an entry of base"),
        (
            BASE + "    config.merges.a = base.export()\n    return config\n",
            "lacks merges.a.alone, merges.a.method, merges.a.of",
        ),
        (BASE + "    config.seed = 'x'\n    return config\n", "line 5: TypeError"),
    ],
)
def test_a_file_without_a_whole_config_is_refused_in_one_sentence(text, message, tmp_path):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(ValueError, match=f"config file .*wrong.py.*{message}"):
        config.load(str(tmp_path / "wrong.py"))


@pytest.mark.parametrize("name", ["", " ", "a/b", "/x", "a\n"])
@pytest.mark.parametrize("part", ["stages", "mining", "merges", "exports", "evaluations"])
def test_a_name_of_the_graph_that_is_no_name_of_a_file_is_refused(part, name):
    loaded = config.load(QUICKSTART)
    with loaded.unlocked():
        loaded[part][name] = next(iter(loaded[part].values()))
    with pytest.raises(ValueError, match=rf"config.{part} has the name"):
        runs.check_names(loaded)


@pytest.mark.parametrize("part", ["stages", "mining", "merges"])
def test_a_name_that_a_workdir_uses_itself_is_refused(part):
    for name in runs.RESERVED:
        loaded = config.load(QUICKSTART)
        with loaded.unlocked():
            loaded[part][name] = next(iter(loaded[part].values()))
        with pytest.raises(ValueError, match=rf"config.{part}.{name}: the name must be none of data, "):
            runs.check_names(loaded)


def test_the_config_is_locked():
    with pytest.raises(AttributeError):
        config.load(QUICKSTART).nonsense = 1


def test_differences_name_every_key_with_both_values():
    a, b = {"x": {"y": 1, "z": 2}, "k": 1}, {"x": {"y": 1, "z": 3}}
    assert list(config.differences(a, b)) == [("k", 1, "absent"), ("x.z", 2, 3)]
    assert list(config.differences(a, a)) == []


def test_shipped_configs_are_found_from_any_working_directory(tmp_path, monkeypatch):
    here = config.load(QUICKSTART)
    monkeypatch.chdir(tmp_path)
    assert config.load(QUICKSTART) == here
    assert config.find(here.data.gin_file).is_absolute()
    with pytest.raises(FileNotFoundError, match="no file configs/nowhere.gin; searched in"):
        config.find("configs/nowhere.gin")


SHIPPED = ("quickstart", "laptop", "pplx_embed")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("arg", ["", ":runlocal"])
def test_every_field_of_a_shipped_config_is_in_base(name, arg):
    from configs import base

    shipped, made = (
        config.load(f"configs/{name}.py{arg}"),
        {
            "stages": base.stage,
            "mining": base.mining,
            "merges": base.merge,
            "exports": base.export,
            "evaluations": base.evaluation,
        },
    )
    for part, make in made.items():
        for entry in shipped[part].values():
            fresh = make(entry.kind) if part == "stages" else make()
            assert dict(config.leaves(entry)).keys() == dict(config.leaves(fresh)).keys()
    rest = {key for key, _ in config.leaves(shipped) if key.partition(".")[0] not in made}
    assert rest == {key for key, _ in config.leaves(base.get_config())}


def test_an_unknown_field_or_kind_is_refused():
    from configs import base

    with pytest.raises(KeyError, match="temprature"):
        base.stage("pair", temprature=0.1)
    with pytest.raises(ValueError, match="stage kind 'pairs' must be one of causal, diffusion, pair"):
        base.stage("pairs")


def test_shipped_configs_import_only_base():
    for name in SHIPPED:
        assert "from configs import base\n" in (text := (ROOT / "configs" / f"{name}.py").read_text())
        assert text.count("from configs") == 1


def test_the_curriculum_of_the_paper_is_english_then_cross_lingual_then_multilingual():
    pair = config.load("configs/pplx_embed.py").stages.pair
    assert [mixture for _, mixture in pair.curriculum] == ["pairs_english", "pairs_cross_lingual", "pairs_multilingual"]
    assert sum(steps for steps, _ in pair.curriculum) == 50_000


def test_every_override_in_the_docs_is_a_field():
    files = [*(f"configs/{name}.py" for name in SHIPPED), "configs/distill.py:runlocal", "configs/domain.py:runlocal"]
    known = {key for file in files for key, _ in config.leaves(config.load(file))}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").iterdir()]
    shown = {(page.name, key) for page in pages for key in re.findall(r"--config\.([\w.]+)=", page.read_text())}
    # "--config.key.key=value" shows the form
    assert len(shown) > 5 and {(page, key) for page, key in shown if key not in known | {"key.key", "key"}} == set()
