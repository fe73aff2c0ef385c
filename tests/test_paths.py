"""Folders that hold nothing of their own, and what becomes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embed import paths

FOREIGN = ("lost+found", ".DS_Store", ".snapshot", "._a", ".nfs0001", ".Trash-1000", ".data.lock", ".data.x1.partial")


def write(folder, **files):
    with paths.replace_folder(folder, is_ours=lambda found: (found / "info").exists(), marker="info") as new:
        for name, text in ({"info": ""} | files).items():
            (new / name).write_text(text)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_nothing_but_what_a_file_system_a_desktop_or_a_lock_left_is_written_and_keeps_that(
    tmp_path, name
):
    (tmp_path / name).mkdir() if name in ("lost+found", ".snapshot") else (tmp_path / name).write_text("theirs")
    assert paths.is_empty(tmp_path) and paths.files(tmp_path) == {}
    write(tmp_path, a="1", b="2")
    write(tmp_path, a="3")  # again: the older content is ours
    assert {k: f.read_text() for k, f in paths.files(tmp_path).items()} == {"info": "", "a": "3"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["info", "a", name])


@pytest.mark.parametrize("name", ["data", "notes.txt", ".git", ".env"])
def test_a_folder_with_anything_else_is_refused_and_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="exists and was not written by this command"):
        write(tmp_path, a="1")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_interrupted_write_into_a_folder_that_stays_leaves_what_may_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    copy = paths.copy_file

    def fail(source, target):
        if Path(target).name == "b":
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    monkeypatch.setattr(paths, "copy_file", fail)
    with pytest.raises(OSError):
        write(tmp_path, a="1", b="2")
    assert paths.is_partial(tmp_path) and not (tmp_path / "info").exists()
    monkeypatch.undo()
    write(tmp_path, b="2")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "info", "lost+found"]


ON_A_DISK_OF_ITS_OWN = """
import sys
from embed import paths
with paths.replace_folder(sys.argv[1], is_ours=lambda found: False, marker="info") as new:
    (new / "info").write_text("whole")
print((paths.path(sys.argv[1]) / "info").read_text())
"""


def test_a_folder_where_a_disk_is_mounted_is_written(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs the right to mount a small file system of one's own")
    (tmp_path / "program.py").write_text(ON_A_DISK_OF_ITS_OWN)
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs none {tmp_path}/disk && exec {sys.executable} {tmp_path}/program.py {tmp_path}/disk"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_a_name_that_begins_with_a_tilde_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths.write_json("~/a/b.json", [1])
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == [1]
    assert str(paths.path("~/a/b.json")) == f"{tmp_path}/a/b.json" and str(paths.path("gs://~/a")) == "gs://~/a"
    assert str(paths.path("a~b")).endswith("/a~b")
