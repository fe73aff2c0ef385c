"""The installed package, outside its repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs the installed package as the script `embed` does.
EMBED = "import sys; from embed.cli import entry; sys.argv[0] = 'embed'; entry()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The content of the wheel, as in site-packages after `pip install`."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("embed", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def embed(installed, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-c", EMBED, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_contains_one_package_with_every_config_and_gin_file(installed):
    assert sorted(entry.name for entry in installed.iterdir()) == ["embed", "embed-0.1.0.dist-info"]
    for kind in ("py", "gin"):
        ours = {str(file.relative_to(ROOT / "configs")) for file in (ROOT / "configs").rglob(f"*.{kind}")}
        assert ours and ours == {
            str(file.relative_to(installed / "embed" / "configs"))
            for file in (installed / "embed" / "configs").rglob(f"*.{kind}")
        }
    assert (installed / "embed" / "preparation" / "synthesis" / "personas.txt").is_file()
    assert "embed = embed.cli:entry" in (installed / "embed-0.1.0.dist-info" / "entry_points.txt").read_text()


def test_an_installed_package_prepares_its_data_in_any_folder_and_prints_only_its_own_lines(installed, tmp_path):
    refused = embed(installed, tmp_path, "train", "--config=configs/none.py", "--workdir=run")
    assert f"no file configs/none.py; searched in {tmp_path}, {installed}/embed/configs" in refused.stderr
    done = embed(installed, tmp_path, "prepare", "--config=configs/quickstart.py:runlocal", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "data" / "mixtures.json").exists() and not done.stdout
    head, table = done.stderr.split("Prepared data\n")
    assert len(head.splitlines()) <= 1 and "data: " in head  # the finished bar
    table, _, rest = table.rpartition("┘\n")
    assert set(line[0] for line in table.splitlines()) <= set("┏┃┡│├└") and "…" not in table
    assert not rest or rest.startswith("packages of python_docs that are not installed: ")


def test_a_user_config_extends_those_of_an_installed_package(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import base, quickstart\n"
        "def get_config(arg=''):\n"
        "    config = quickstart.get_config(arg)\n"
        "    config.stages.more = base.stage('pair', init='pair', curriculum=((0, 'pairs'),))\n"
        "    return config\n"
    )
    done = embed(installed, tmp_path, "pipeline", "--config=mine.py", "--workdir=run")
    assert done.returncode == 2
    assert "config.stages.more.curriculum=((0, 'pairs'),) must be ((steps, mixture or {task: rate})" in done.stderr
