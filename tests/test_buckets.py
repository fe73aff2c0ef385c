"""A run with its workdir, data and model folders in a bucket: gs://, on a local server."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small

from embed import cli, config, distributed, exports, inference, nodes, paths, runs
from embed.checkpoints import training_state
from embed.inference.shards import read_shards
from embed.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The config file of small.GRAPH."""
    path = tmp_path_factory.mktemp("config") / "graph.py"
    path.write_text(small.GRAPH)
    return path


@pytest.fixture(scope="module")
def data(bucket):
    """Prepared data in the bucket."""
    small.write_data(f"{bucket}/data")
    return f"--config.data.directory={bucket}/data"


def complete(file, workdir, *overrides):
    """Train every stage of small.GRAPH, evaluate and export the merged checkpoint."""
    for stage in ("diffusion", "pair", "triplet"):
        assert cli.main(["train", f"--config={file}:{stage}", f"--workdir={workdir}", *overrides]) == 0
    run = runs.Run(config.load(str(file), overrides), workdir)
    nodes.evaluate(run, "merged")
    exports.export_models(run)
    return workdir


@pytest.fixture(scope="module")
def workdir(bucket, data, file):
    """A complete run in the bucket, on data there."""
    return complete(file, f"{bucket}/run", data)


@pytest.fixture(scope="module")
def local(tmp_path_factory, file):
    """The same run on a disk."""
    folder = tmp_path_factory.mktemp("local") / "run"
    small.write_data(folder / "data")
    return complete(file, folder)


def losses(folder, stage):
    return {row["step"]: row["loss"] for row in read_metrics(paths.path(folder) / stage / "metrics.jsonl")}


def test_a_run_in_a_bucket_gives_the_results_of_one_on_a_disk(workdir, local):
    for stage in ("diffusion", "pair", "triplet"):
        assert losses(workdir, stage) == losses(local, stage) and len(losses(local, stage)) == 6
        remote, here = (paths.path(folder) / stage for folder in (workdir, local))
        assert training_state.steps(remote / "checkpoints") == training_state.steps(here / "checkpoints") == [6]
        assert training_state.digest(remote / "checkpoints", 6) == training_state.digest(here / "checkpoints", 6)
        assert any(name.startswith("tensorboard/") for name in paths.files(remote))
    rankings = [(paths.path(folder) / "rankings" / "words" / "merged.npz").read_bytes() for folder in (workdir, local)]
    assert {name: x.tolist() for name, x in np.load(io.BytesIO(rankings[0])).items()} == {
        name: x.tolist() for name, x in np.load(io.BytesIO(rankings[1])).items()
    }
    texts = ["parse the file", "open a list"]
    vectors = [inference.load(f"{folder}/export/model").encode(texts) for folder in (workdir, local)]
    np.testing.assert_array_equal(*vectors)


def test_a_complete_stage_in_a_bucket_is_not_trained_again(workdir, data, file, capsys):
    assert cli.main(["train", f"--config={file}:pair", f"--workdir={workdir}", data]) == 0
    assert f"pair is complete: {workdir}/pair, step 6" in capsys.readouterr().out


def test_a_stage_on_a_disk_starts_from_a_stage_and_from_a_model_folder_in_a_bucket(workdir, data, file, tmp_path):
    for name, init in (("stage", f"{workdir}/pair"), ("model", f"{workdir}/export/model")):
        arguments = [f"--config={file}:pair", f"--workdir={tmp_path / name}", data, f"--config.stages.pair.init={init}"]
        assert cli.main(["train", *arguments]) == 0
        parent = json.loads((tmp_path / name / "pair" / "config.json").read_text())["parent"]
        assert parent["folder"] == init and parent["digest"]


def test_verbs_read_and_write_in_a_bucket(workdir, bucket, tmp_path):
    corpus = f"{bucket}/corpus.jsonl"
    paths.write(
        corpus, "".join(json.dumps({"_id": f"t{i}", "text": t}) + "\n" for i, t in enumerate(small.sentences(9)))
    )
    model = f"--model={workdir}/export/model"
    assert cli.main(["encode", model, f"--corpus={corpus}", f"--output={bucket}/vectors.npy"]) == 0
    assert cli.main(["encode", model, f"--corpus={corpus}", f"--output={tmp_path / 'vectors.npy'}"]) == 0
    assert paths.path(f"{bucket}/vectors.npy").read_bytes() == (tmp_path / "vectors.npy").read_bytes()
    shards = [f"--input={bucket}/corp*.jsonl", f"--output={bucket}/shards", "--shard_rows=4"]
    assert cli.main(["encode", model, *shards]) == 0
    names = [*(f"corpus.jsonl.{k:05d}.parquet" for k in range(3)), "encode.json"]
    assert list(paths.files(f"{bucket}/shards")) == names
    (paths.path(f"{bucket}/shards") / names[1]).unlink()
    assert cli.main(["encode", model, *shards]) == 0
    assert list(paths.files(f"{bucket}/shards")) == names
    vectors = [v for table in read_shards(f"{bucket}/shards")[1] for v in table["vector"].to_pylist()]
    np.testing.assert_allclose(vectors, np.load(tmp_path / "vectors.npy"), atol=1e-6)
    assert cli.main(["index", model, f"--corpus={corpus}", f"--output={bucket}/index"]) == 0
    assert cli.main(["search", model, f"--index={bucket}/index", "--query=parse"]) == 0
    for change in (["--delete=t1"], [model, f"--corpus={corpus}"], ["--compact"]):
        assert cli.main(["index", f"--update={bucket}/index", *change]) == 0
    described = json.loads((paths.path(bucket) / "index" / "index.json").read_text())["segments"]
    assert len(described) == 1
    left = {name.split("/")[0].split(".")[0] for name in paths.files(f"{bucket}/index")}
    assert left == {*described, "index"} and cli.main(["search", model, f"--index={bucket}/index", "--query=a"]) == 0
    # An index made by a stage can be searched only with that stage.
    stages = [f"--model={workdir}/{name}" for name in ("pair", "triplet")]
    assert cli.main(["index", stages[0], f"--corpus={corpus}", f"--output={bucket}/index"]) == 2
    assert cli.main(["index", stages[0], f"--corpus={corpus}", f"--output={bucket}/index", "--overwrite"]) == 0
    assert [cli.main(["search", s, f"--index={bucket}/index", "--query=parse"]) for s in stages] == [0, 2]
    remaining = [name for name in paths.files(bucket) if name.startswith(".")]
    assert not remaining, remaining
    assert cli.main(["merge", f"--a={workdir}/pair", f"--b={workdir}/triplet", f"--output={bucket}/merged"]) == 0
    texts = ["parse the file", "open a list"]
    merged, exported = (
        inference.load(f"{name}").encode(texts) for name in (f"{bucket}/merged", f"{workdir}/export/model")
    )
    np.testing.assert_allclose(merged, exported, atol=1e-6)


# Trains without TensorFlow and dies by SIGKILL before batch 5, like a lost host.
KILLED = """
    import os, signal, sys
    for name in ("tensorflow", "tensorflow_datasets", "seqio", "gin"):
        sys.modules[name] = None
    from embed import cli
    from embed.data import loader
    batch = loader.ContrastiveLoader.batch
    def mortal(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)
    loader.ContrastiveLoader.batch = mortal
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_rows_of_metrics_survive_a_lost_host_and_the_restart_adds_those_after_its_checkpoint(
    workdir, bucket, data, file
):
    arguments = [
        "train",
        f"--config={file}:pair",
        f"--workdir={bucket}/lost",
        data,
        f"--config.stages.pair.init={workdir}/diffusion",
    ]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *arguments]
    environment = {**os.environ, "EMBED_RUN_ID": "lost"}
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    saved = training_state.steps(f"{bucket}/lost/pair/checkpoints")[-1]
    assert set(range(1, saved + 1)) <= set(losses(f"{bucket}/lost", "pair")) and saved >= 1
    # Its lease still exists: another run is refused, a restart of the same run (EMBED_RUN_ID) continues.
    with pytest.raises(paths.BusyError, match="is in use by process"), distributed.hold(f"{bucket}/lost/pair"):
        pass
    again = subprocess.run(
        [sys.executable, "-m", "embed.cli", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(f"{bucket}/lost", "pair") == losses(workdir, "pair")


def test_a_lease_is_released_and_expires(bucket, monkeypatch):
    folder = f"{bucket}/leased"
    for _ in range(2):
        with paths.lock(folder):
            with pytest.raises(paths.BusyError, match="is in use by process"), paths.lock(folder):
                pass
    paths.write_json(f"{bucket}/.leased.lock", {"host": "gone", "process": 1, "run": "", "time": 0})
    with paths.lock(folder):
        pass


def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside_and_the_previous_one_is_restored(bucket, tmp_path):
    folder, warnings = f"{bucket}/damaged", []
    params, state = {"norm": jnp.arange(4.0)}, {"count": jnp.int32(3)}
    with training_state.open_manager(folder, save_every=1, keep=2) as manager:
        for step in (1, 2):
            training_state.save(manager, step, params, state)
    for name, file in paths.files(f"{folder}/2").items():
        if "/d/" in name:  # the arrays
            file.write_bytes(file.read_bytes()[:-4])
    with training_state.open_manager(folder, save_every=1, keep=2) as manager:
        step, restored, _ = training_state.restore_newest(manager, params, state, warnings.append)
    assert step == 1 and np.array_equal(restored["norm"], params["norm"]) and "checkpoint 2 under" in warnings[0]
    assert training_state.steps(folder) == [1] and any(name.startswith("damaged-2/") for name in paths.files(folder))


def test_a_lease_that_another_process_took_over_is_an_error_before_the_next_write(bucket, monkeypatch):
    monkeypatch.setattr(paths, "RENEW_SECONDS", 0.01)
    with paths.lock(f"{bucket}/taken") as check:
        check()
        with pytest.raises(paths.LeaseLostError, match="was taken over by another process"):
            while True:  # the emulator compares generations and writes in two steps: a renewal between them may win
                paths.write_json(f"{bucket}/.taken.lock", {"host": "other", "process": 1, "run": "", "time": 0})
                check()


def test_a_lease_that_was_not_renewed_in_time_is_an_error_before_the_next_write(bucket, monkeypatch):
    """As after a process was suspended, before its thread can renew."""
    with paths.lock(f"{bucket}/expired") as check:
        check()
        monkeypatch.setattr(paths, "LEASE_SECONDS", -1.0)
        with pytest.raises(
            paths.LeaseLostError, match=r"the lock of .*/expired expired: it was last renewed \d+ s ago"
        ):
            check()


def test_a_folder_in_a_bucket_is_written_whole(bucket):
    with paths.replace_folder(f"{bucket}/whole", is_ours=lambda folder: True, marker="z.json") as aside:
        (aside / "a").write_text("1")
        (aside / "z.json").write_text("{}")
    with (
        pytest.raises(OSError, match="fails"),
        paths.replace_folder(f"{bucket}/whole", is_ours=lambda folder: True, marker="z.json") as aside,
    ):
        (aside / "b").write_text("2")
        raise OSError("it fails")
    assert list(paths.files(f"{bucket}/whole")) == ["a", "z.json"]


def test_an_export_that_was_interrupted_in_a_bucket_is_refused_and_can_be_written_again(workdir, bucket, monkeypatch):
    def fail(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paths, "copy_file", fail)
        small.write_model(f"{bucket}/killed")
    with pytest.raises(ValueError, match="is half an export, which was interrupted: export it again"):
        inference.load(f"{bucket}/killed")
    small.write_model(f"{bucket}/killed")
    assert inference.load(f"{bucket}/killed").encode(["parse"]).shape == (1, 32)


def test_data_and_corpora_are_read_from_s3(s3, file, local, tmp_path):
    small.write_data(f"{s3}/data")
    arguments = [f"--config={file}:pair", f"--workdir={tmp_path / 'run'}", f"--config.data.directory={s3}/data"]
    assert cli.main(["train", *arguments, f"--config.stages.pair.init={local}/diffusion"]) == 0
    assert losses(tmp_path / "run", "pair") == losses(local, "pair")
    content = "".join(json.dumps({"_id": f"t{i}", "text": t}) + "\n" for i, t in enumerate(small.sentences(5)))
    paths.write(f"{s3}/corpus.jsonl", content)
    (tmp_path / "corpus.jsonl").write_text(content)
    for name, corpus in (("s3", f"{s3}/corpus.jsonl"), ("disk", tmp_path / "corpus.jsonl")):
        model = f"--model={local}/export/model"
        assert cli.main(["encode", model, f"--corpus={corpus}", f"--output={tmp_path / name}"]) == 0
    assert (tmp_path / "s3").read_bytes() == (tmp_path / "disk").read_bytes()
    with pytest.raises(ValueError, match="must be a folder or gs://: checkpoints are not written to s3://"):
        runs.Run(config.load(str(file)), f"{s3}/run")
