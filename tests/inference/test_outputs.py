"""--output of every verb: checked before the work, written whole, by one writer, replaced only if asked."""

import json
import os
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import small

from embed import cli, paths, runs
from embed.checkpoints.model_folder import ModelFolder

VERBS = ("encode", "index", "evaluate", "mine", "export", "merge")
FOLDERS = ("index", "evaluate", "export", "merge")
REPLACES = tuple(verb for verb in VERBS if verb != "evaluate")  # which continues its output


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
    if verb not in REPLACES:
        more = [option for option in more if option != "--overwrite"]
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


def names(files):
    """The names of files, without the number of an index's segment, which is another one each time."""
    return {re.sub(r"^\d+", "N", name) for name in files}


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    """The output of each verb."""
    folder = tmp_path_factory.mktemp("written")
    for verb in VERBS:
        assert cli.main(arguments(verb, inputs, folder / verb)) == 0
    assert sorted(f.name for f in folder.iterdir()) == sorted(VERBS)
    return folder


@pytest.mark.parametrize("verb", REPLACES)
def test_an_existing_output_is_replaced_only_with_overwrite(verb, inputs, written, tmp_path, refused):
    output = tmp_path / "out"
    small_copy(written / verb, output)
    before = content(output)
    refused(verb, output, f"{output} exists: choose another path, or replace it with --overwrite")
    assert content(output) == before
    assert cli.main(arguments(verb, inputs, output, "--overwrite")) == 0
    after = content(output)
    assert after == before or (verb in ("export", "merge", "index") and names(after) == names(before))
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

    def load_while_held(*given, **how):
        with pytest.raises(paths.BusyError), paths.lock(tmp_path / "out"):
            pass
        held.append(verb)
        return load(*given, **how)

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
        refused(verb, tmp_path / "file", "exists and was not written by this command", "--overwrite")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "theirs"


OTHER_FILES = {
    "text": b"some text",
    "empty": b"",
    "bytes": bytes(range(256)),
    "json": b'{"model_type": "qwen3"}',
    "list": b"[]",
    "lines": b'{"_id": "a", "text": "the"}\n',
}


@pytest.mark.parametrize("verb", ["encode", "mine"])
def test_a_file_of_another_kind_is_never_replaced(verb, inputs, written, tmp_path, refused):
    others = {f"of {name}": content(written / name)[""] for name in VERBS if name not in FOLDERS and name != verb}
    others["weights"] = content(inputs / "a")["model.safetensors"]
    for name, before in (OTHER_FILES | others).items():
        (tmp_path / name).write_bytes(before)
        refused(verb, tmp_path / name, "exists and was not written by this command", "--overwrite")
        assert (tmp_path / name).read_bytes() == before


@pytest.fixture(scope="module")
def owned(inputs, written, tmp_path_factory):
    """Folders with a content of their own."""
    folder = tmp_path_factory.mktemp("owned")
    shutil.copytree(inputs / "a", folder / "model")
    shutil.copytree(inputs / "a", folder / "foreign")
    small.foreign(folder / "foreign")
    shutil.copytree(written / "index", folder / "index")
    small.write_data(folder / "data")
    (folder / "stage" / "checkpoints").mkdir(parents=True)
    paths.write_json(folder / "stage" / "config.json", {"stage": {}, "phases": []})
    return folder


@pytest.mark.parametrize(
    "inside, what",
    [
        ("model", "a model folder"),
        ("model/1_Pooling", "a model folder"),
        ("foreign", "a model folder"),
        ("index", "an index"),
        ("stage", "a stage folder"),
        ("stage/checkpoints", "a stage folder"),
        ("data", "prepared data"),
        ("data/evaluation/set/test", "prepared data"),
        ("data/tasks/pairs", "a folder of examples"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_an_output_inside_a_folder_with_a_content_of_its_own_is_refused(verb, inside, what, owned, refused):
    before = content(owned)
    for name in ("new", *(f.name for f in (owned / inside).iterdir() if f.is_file())):
        refused(verb, owned / inside / name, f", {what}: choose another path", "--overwrite")
    assert content(owned) == before


@pytest.mark.parametrize("name", ["config.json", "index.json", "info.json", "embed.json"])
def test_an_output_next_to_the_json_files_of_other_programs_is_written(name, inputs, tmp_path):
    paths.write_json(tmp_path / name, {"name": "theirs"})
    assert cli.main(arguments("encode", inputs, tmp_path / "v.npy")) == 0


@pytest.mark.parametrize("verb", ["index", "export", "merge"])
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
    if verb not in ("evaluate", "export", "merge"):
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
    assert (tmp_path / "link").is_symlink()
    assert names(content(tmp_path / "elsewhere" / "out")) == names(content(written / verb))
    assert [f.name for f in (tmp_path / "elsewhere").iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["encode", "index", "export", "merge"])
def test_a_full_disk_leaves_the_old_output_and_names_only_it(verb, inputs, written, tmp_path, capsys):
    """Larger files than this limit cannot be written."""
    output, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    small_copy(written / verb, output)
    before, handler = content(output), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        code = cli.main(arguments(verb, inputs, output, "--overwrite"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("embed:"))
    kept = "an existing f" + ("older is unchanged" if verb in FOLDERS else "ile is unchanged")
    assert (code, error) == (1, f"embed: error: [Errno 27] File too large; {output} was not written; {kept}")
    assert content(output) == before and [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", FOLDERS)
def test_other_users_can_read_every_file_of_a_written_folder(verb, written):
    for name, file in paths.files(written / verb).items():
        assert os.stat(file).st_mode & 0o777 == os.stat(written / "encode").st_mode & 0o777, name


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
