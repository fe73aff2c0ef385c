"""--output of every verb: checked before the work, written whole, by one writer, replaced only if asked."""

import json
import shutil

import numpy as np
import pytest
import small

from embed import cli, paths, runs
from embed.checkpoints.model_folder import ModelFolder

VERBS = ("encode", "index", "evaluate", "mine", "export", "merge")
FOLDERS = ("index", "export", "merge")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models and an evaluation set that no test changes."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("a", 0), ("b", 1)):
        small.write_model(folder / name, small.random_params(small.config(), seed))
    rows = {
        "corpus": [{"_id": f"c{i}", "text": text} for i, text in enumerate(small.sentences(6))],
        "queries": [{"_id": "q", "text": "the"}],
        "qrels": [{"query-id": "q", "corpus-id": "c0", "score": 1}],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(verb, inputs, output, *more):
    model, corpus, data = f"--model={inputs}/a", f"--corpus={inputs}/corpus.jsonl", f"--data={inputs}"
    sources = {
        "encode": [model, corpus],
        "index": [model, corpus],
        "evaluate": [model, data],
        "mine": [model, data, "--margin=-2"],
        "export": [model],
        "merge": [f"--a={inputs}/a", f"--b={inputs}/b"],
    }
    return [verb, *sources[verb], f"--output={output}", *more]


@pytest.fixture
def refused(inputs, monkeypatch, capsys):
    """Run a verb that must be refused with a message before any model is read."""

    def fail(*_, **__):
        pytest.fail("a model was read")

    def run(verb, output, message, *more):
        with monkeypatch.context() as patch:
            patch.setattr(runs, "load_encoder", fail)
            patch.setattr(runs, "find", fail)
            patch.setattr(ModelFolder, "params", fail)
            assert cli.main(arguments(verb, inputs, output, *more)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0], lines

    return run


def content(path):
    """{file: bytes} of a file or folder."""
    return {"": path.read_bytes()} if path.is_file() else {n: f.read_bytes() for n, f in paths.files(path).items()}


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    """The output of each verb."""
    folder = tmp_path_factory.mktemp("written")
    for verb in VERBS:
        assert cli.main(arguments(verb, inputs, folder / verb)) == 0
    assert sorted(f.name for f in folder.iterdir()) == sorted(VERBS)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output_is_replaced_only_with_overwrite(verb, inputs, written, tmp_path, refused):
    output = tmp_path / "out"
    small_copy(written / verb, output)
    before = content(output)
    refused(verb, output, f"{output} exists: choose another path, or replace it with --overwrite")
    assert content(output) == before
    if verb not in FOLDERS:
        output.write_text("old")
    assert cli.main(arguments(verb, inputs, output, "--overwrite")) == 0
    after = content(output)
    assert after == before or (verb in ("export", "merge") and after.keys() == before.keys())
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def small_copy(source, target):
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_another_process_is_writing_is_refused(verb, tmp_path, refused):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with paths.lock(tmp_path / "out"):
        for name in ("out", "link"):
            refused(verb, tmp_path / name, "is in use by another process")


@pytest.mark.parametrize("verb", ["encode", "index"])
def test_a_verb_locks_its_output_before_the_model_is_read_and_ignores_the_lock_of_a_dead_process(
    verb, inputs, tmp_path, monkeypatch
):
    load, held = runs.load_encoder, []

    def load_while_held(*given):
        with pytest.raises(paths.BusyError), paths.lock(tmp_path / "out"):
            pass
        held.append(verb)
        return load(*given)

    (tmp_path / ".out.lock").write_text("")  # left by a process that was killed
    monkeypatch.setattr(runs, "load_encoder", load_while_held)
    assert cli.main(arguments(verb, inputs, tmp_path / "out")) == 0
    assert held == [verb] and [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_of_the_wrong_kind_is_refused(verb, tmp_path, refused):
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("theirs")
    if verb in FOLDERS:
        refused(verb, tmp_path / "file", "must be a folder, but it is a file", "--overwrite")
        refused(verb, tmp_path / "folder", "exists and was not written by this command", "--overwrite")
    else:
        refused(verb, tmp_path / "folder", "must be a file in a folder that exists", "--overwrite")
        refused(verb, tmp_path / "none" / "x", "must be a file in a folder that exists")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "theirs"


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_with_other_files_is_never_replaced(verb, written, tmp_path, refused):
    output = tmp_path / "out"
    shutil.copytree(written / verb, output)
    (output / "notes.txt").write_text("mine")
    refused(verb, output, "holds notes.txt", "--overwrite")
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_the_command_reads_is_refused(verb, inputs, refused):
    before = content(inputs)
    refused(verb, inputs / "a", f"is {inputs}/a, which this command reads", "--overwrite")
    refused(verb, inputs / "a" / "x", f"is inside {inputs}/a, which this command reads")
    if verb not in ("export", "merge"):
        refused(verb, inputs / "corpus.jsonl", "which this command reads", "--overwrite")
    if verb in FOLDERS:
        refused(verb, inputs, "which this command reads", "--overwrite")
    assert content(inputs) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dangling", [False, True])
def test_an_output_that_is_a_link_stays_a_link(verb, dangling, inputs, written, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "out")
    if not dangling:
        small_copy(written / verb, tmp_path / "elsewhere" / "out")
    assert cli.main(arguments(verb, inputs, tmp_path / "link", *([] if dangling else ["--overwrite"]))) == 0
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "elsewhere" / "out").keys() == content(
        written / verb
    ).keys()
    assert [f.name for f in (tmp_path / "elsewhere").iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_vectors(inputs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "v.npy"
    assert cli.main(arguments("encode", inputs, output)) == 0
    before = output.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(paths, "open", _FullDisk, raising=False)
    assert cli.main(arguments("encode", inputs, output, "--overwrite")) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed:")]
    assert len(error) == 1 and "No space left on device" in error[0] and f"{output} was not written" in error[0]
    assert output.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["v.npy"]


class _FullDisk:
    """A file on a full disk."""

    def __init__(self, handle, mode):
        self.file = open(handle, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[:100])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("verb", ["encode", "index"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--truncate_dim=33", "truncate_dim=33 must be in 1..32"),
        ("--truncate_dim=0", "truncate_dim=0 must be in 1..32"),
        ("--precision=binary --truncate_dim=12", "12 dimensions are not a multiple of 8"),
    ],
)
def test_vectors_that_the_model_cannot_give_are_refused_before_it_is_read(verb, option, message, tmp_path, refused):
    refused(verb, tmp_path / "out", message, *option.split())
    assert not list(tmp_path.iterdir())


def test_an_empty_rank_window_is_refused_before_the_model_is_read(tmp_path, refused):
    refused("mine", tmp_path / "out", "rank_window=(3, 3) must be", "--rank_window", "3", "3")
    refused("mine", tmp_path / "out", "num_negatives=0 must be positive", "--num_negatives=0")


def test_encode_writes_a_row_per_row_of_the_corpus(written, inputs):
    assert np.load(written / "encode").shape == (6, 32)
