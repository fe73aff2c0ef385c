"""Files and folders appear whole: symbolic links, several writers, a full disk, files of the file system."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from embed import paths


def anything(folder):
    return True


@pytest.fixture
def small_files():
    """A context that limits files of this process to 4,096 bytes, as on a full disk."""

    class Limited:
        def __enter__(self):
            self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.old[1]))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)
            signal.signal(signal.SIGXFSZ, self.handler)

    return Limited()


def test_a_file_that_cannot_be_written_completely_is_unchanged(tmp_path, small_files):
    file = tmp_path / "f"
    paths.write(file, "old")
    with small_files, pytest.raises(OSError) as caught:
        paths.write(file, b"x" * 10_000)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.__notes__ == [f"{file} was not written; an existing file is unchanged"]
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_cannot_be_written_completely_is_unchanged(tmp_path, small_files):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "f").write_text("old")
    for name, write_file in WRITERS.items():
        with (
            small_files,
            pytest.raises(OSError) as caught,
            paths.replace_folder(folder, is_ours=anything, marker="f") as aside,
        ):
            write_file(aside / "f")
        assert caught.value.errno == errno.EFBIG, name
        lines = [str(caught.value), *caught.value.__notes__]
        assert lines == ["[Errno 27] File too large", f"{folder} was not written; an existing folder is unchanged"]
        assert (folder / "f").read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["d"]


WRITERS = {
    "python": lambda file: file.write_bytes(b"x" * 10_000),
    "paths": lambda file: paths.write(file, b"x" * 10_000),
    "safetensors": lambda file: paths.write_tensors(file, {"x": np.zeros(10_000)}),
}


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory: '.*/nowhere'"),
        paths.replace_folder(tmp_path / "d", is_ours=anything, marker="f"),
    ):
        open(tmp_path / "nowhere")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_every_file_of_a_written_folder_has_the_usual_permissions(tmp_path, mask):
    before = os.umask(mask)
    try:
        with paths.replace_folder(tmp_path / "d", is_ours=anything, marker="m") as aside:
            (aside / "in").mkdir()
            paths.write_tensors(aside / "m", {"x": np.zeros(3)})
            paths.write_tensors(aside / "in" / "n", {"x": np.zeros(3)}, {"format": "pt"})
            (aside / "o").touch(0o600)
        for name, usual in (("m", 0o666), ("o", 0o666), ("in/n", 0o666), ("in", 0o777), ("", 0o777)):
            assert (tmp_path / "d" / name).stat().st_mode & 0o777 == usual & ~mask, name
    finally:
        os.umask(before)


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    paths.write(tmp_path / "f", "x")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_stays_and_its_target_gets_the_content(tmp_path, dangling):
    (tmp_path / "elsewhere").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    if not dangling:
        (tmp_path / "elsewhere" / "file").write_text("old")
        (tmp_path / "elsewhere" / "folder").mkdir()
        (tmp_path / "elsewhere" / "folder" / "old").write_text("old")
    paths.write(tmp_path / "file", "new")
    with paths.replace_folder(tmp_path / "folder", is_ours=anything, marker="m") as aside:
        (aside / "m").write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"
    assert [f.name for f in (tmp_path / "elsewhere" / "folder").iterdir()] == ["m"]
    assert sorted(f.name for f in (tmp_path / "elsewhere").iterdir()) == ["file", "folder"]


def test_a_link_that_leads_back_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for is_ours in (None, anything):
        with pytest.raises(ValueError, match="a is a symbolic link that leads back to itself"):
            paths.check_output(tmp_path / "a", is_ours=is_ours)
    with pytest.raises(ValueError, match="leads back to itself"):
        paths.write(tmp_path / "a", "x")


def test_several_writers_of_one_file_or_folder_leave_the_whole_output_of_one(tmp_path):
    contents = [str(i) * 100_000 for i in range(8)]

    def write(content):
        paths.write(tmp_path / "file", content)
        with paths.replace_folder(tmp_path / "folder", is_ours=anything, marker="b") as aside:
            for name in "ab":
                (aside / name).write_text(content)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, contents * 4))
    assert (tmp_path / "file").read_text() in contents
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_another_process_wrote_meanwhile_is_replaced_only_if_asked(tmp_path):
    with (
        pytest.raises(ValueError, match="d exists: choose another path, or replace it with --overwrite"),
        paths.replace_folder(tmp_path / "d", is_ours=anything, marker="f", overwrite=False) as aside,
    ):
        (aside / "f").write_text("mine")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "f").write_text("theirs")
    assert (tmp_path / "d" / "f").read_text() == "theirs" and [f.name for f in tmp_path.iterdir()] == ["d"]


def test_a_locked_path_is_busy_under_each_of_its_names_and_no_lock_file_remains(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with paths.lock(tmp_path / "file"):
        for name in ("file", "link"):
            with pytest.raises(paths.BusyError, match="is in use by another process"), paths.lock(tmp_path / name):
                pass
    with paths.lock(tmp_path / "link"):
        pass
    assert [f.name for f in tmp_path.iterdir()] == ["link"]


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "theirs").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, is_ours, message in (
        ("folder", None, "must be a file in a folder that exists"),
        ("none/x", None, "must be a file in a folder that exists"),
        ("file/x", None, "must be a file in a folder that exists"),
        ("pipe", None, "is neither a file nor a folder"),
        ("x" * 300, None, "cannot be written: File name too long"),
        ("file", anything, "must be a folder, but it is a file"),
        ("file/x", anything, "cannot be written: Not a directory"),
        ("folder", lambda folder: False, "exists and was not written by this command"),
    ):
        with pytest.raises((ValueError, PermissionError), match=message):
            paths.check_output(tmp_path / name, is_ours=is_ours)
    for name, is_ours in (("file", None), ("folder", anything)):
        paths.check_output(tmp_path / name, is_ours=is_ours)
        with pytest.raises(ValueError, match="exists: choose another path, or replace it with --overwrite"):
            paths.check_output(tmp_path / name, is_ours=is_ours, overwrite=False)
    paths.check_output(tmp_path / "new" / "and" / "deeper", is_ours=anything, overwrite=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_without_write_permission_is_refused():
    for is_ours in (None, anything):
        with pytest.raises(PermissionError, match="/proc/self/x cannot be written"):
            paths.check_output("/proc/self/x", is_ours=is_ours)


IGNORED = ("lost+found", ".DS_Store", ".snapshot", "._a", ".nfs0001", ".Trash-1000", ".data.lock", ".data.x1.partial")


def write(folder, **files):
    with paths.replace_folder(folder, is_ours=lambda old: (old / "info").exists(), marker="info") as new:
        for name, text in ({"info": ""} | files).items():
            (new / name).write_text(text)


@pytest.mark.parametrize("name", IGNORED)
def test_a_folder_with_only_files_of_a_file_system_desktop_or_lock_is_written_and_keeps_them(tmp_path, name):
    (tmp_path / name).mkdir() if name in ("lost+found", ".snapshot") else (tmp_path / name).write_text("theirs")
    assert paths.is_empty(tmp_path) and paths.files(tmp_path) == {}
    write(tmp_path, a="1", b="2")
    write(tmp_path, a="3")  # again: the previous content is ours
    assert {k: f.read_text() for k, f in paths.files(tmp_path).items()} == {"info": "", "a": "3"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["info", "a", name])


@pytest.mark.parametrize("name", ["data", "notes.txt", ".git", ".env"])
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="exists and was not written by this command"):
        write(tmp_path, a="1")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_interrupted_write_into_a_folder_that_cannot_be_renamed_may_be_replaced(tmp_path, monkeypatch):
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


ON_A_MOUNT_POINT = """
import sys
from embed import paths
with paths.replace_folder(sys.argv[1], is_ours=lambda old: False, marker="info") as new:
    (new / "info").write_text("whole")
print((paths.path(sys.argv[1]) / "info").read_text())
"""


def test_a_mount_point_is_written(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs permission to mount a file system")
    (tmp_path / "program.py").write_text(ON_A_MOUNT_POINT)
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs none {tmp_path}/disk && exec {sys.executable} {tmp_path}/program.py {tmp_path}/disk"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_a_path_with_a_leading_tilde_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths.write_json("~/a/b.json", [1])
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == [1]
    assert str(paths.path("~/a/b.json")) == f"{tmp_path}/a/b.json" and str(paths.path("gs://~/a")) == "gs://~/a"
    assert str(paths.path("a~b")).endswith("/a~b")


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "a path is empty: expected a file or folder"),
        ("https://x.org/a", r"^https://x.org/a is not a path: expected a local path, gs://BUCKET/… or s3://BUCKET/…$"),
        ("https://huggingface.co/a/b-1.5/tree/main", "…; the hub id of this model is a/b-1.5$"),
        ("http://x.org/a", "^http://x.org/a is not a path"),
        ("file:///a", "^file:///a is not a path"),
        ("GS://b/a", "^GS://b/a is not a path"),
        ("gs://", "^gs:// is not a path"),
        ("s3://", "^s3:// is not a path"),
    ],
)
def test_an_empty_name_and_a_url_that_is_not_in_a_bucket_are_not_paths(name, message):
    with pytest.raises(ValueError, match=message):
        paths.path(name)


@pytest.mark.parametrize("url, package", [("gs://b/a", "gcsfs"), ("s3://b/a", "s3fs")])
def test_a_bucket_without_its_package_names_the_package(monkeypatch, url, package):
    assert str(paths.path(url)) == url
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{url} needs the package {package}: pip install {package}"):
        paths.path(url)


def test_the_parents_of_a_path_end_at_the_root_or_the_bucket(tmp_path):
    (tmp_path / "link").symlink_to("/a/b")
    assert list(map(str, paths.parents(tmp_path / "link" / "c"))) == ["/a/b", "/a", "/"]
    assert list(map(str, paths.parents("gs://b/x/y"))) == ["gs://b/x", "gs://b"]
    assert list(map(str, paths.parents("s3://b/x"))) == ["s3://b"] and paths.parents("gs://b") == []


@pytest.mark.parametrize("kind", ["bucket", "s3"])
def test_entries_are_those_of_other_processes_too(kind, request):
    folder = paths.path(f"{request.getfixturevalue(kind)}/entries")
    assert paths.entries(folder) == []
    other = tensorstore.KvStore.open(paths.kvstore(folder)).result()  # with no cache in common
    for names in (["a"], ["a", "b"]):
        other.write(names[-1], b"text").result()
        assert sorted(entry.name for entry in paths.entries(folder)) == names
        assert (folder / names[-1]).read_text() == "text"
