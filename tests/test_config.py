import pytest

from embed import config

QUICKSTART = "configs/quickstart.py"


def test_overrides_replace_single_fields_with_the_type_of_the_field():
    loaded = config.load(QUICKSTART, ["--config.stages.pair.optimizer.learning_rate=1", "--config.seed=7"])
    assert loaded.stages.pair.optimizer.learning_rate == 1.0 and loaded.seed == 7
    assert loaded.stages.triplet.optimizer.learning_rate != 1.0


def test_tuples_can_be_overridden():
    loaded = config.load(QUICKSTART, ["--config.stages.pair.curriculum=((3, 'pairs'),)"])
    assert tuple(map(tuple, loaded.stages.pair.curriculum)) == ((3, "pairs"),)


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
def test_wrong_keys_and_values_are_errors_that_name_what_is_allowed(path, overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config.load(path, overrides)


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match="configs/nowhere.py"):
        config.load("configs/nowhere.py")


def test_a_config_that_is_no_python_file_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json must be a Python file with get_config"):
        config.load(str(tmp_path / "config.json"))


def test_the_config_is_locked():
    with pytest.raises(AttributeError):
        config.load(QUICKSTART).nonsense = 1


def test_first_difference_names_the_key_and_both_values():
    a, b = {"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}}
    assert config.first_difference(a, b) == "x.z: 2, 3"
    assert config.first_difference(a, a) is None
    assert config.first_difference({"k": 1}, {}) == "k: 1, '<absent>'"
