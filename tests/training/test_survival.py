"""Kills, signals, damaged files, full disks, lost processes: a run must survive them or end with a clear error."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from small_run import MODEL, Loader, losses, train

from embed.checkpoints import training_state
from embed.distributed import PeerLostError
from embed.models import transformer
from embed.objectives import masked_diffusion
from embed.training import flops, loop, stages
from embed.training.metrics import MetricsWriter, log_line, read_metrics
from embed.training.step import make_train_step

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of 12 steps, with the parameters of step 12."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run, ended by its reader after step 11, with the checkpoints of steps 5 and 10."""

    def read(step):
        if step == 11:
            raise OSError("the reader fails")

    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(OSError, match="the reader fails"):
        train(folder, Loader(read))
    return folder


def load(folder, step=12):
    return training_state.load_params(folder / "checkpoints", step, transformer.abstract_params(MODEL))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# --- kills -----------------------------------------------------------------------------------------------------


def test_six_kills_at_random_moments_do_not_change_one_bit_of_the_losses(tmp_path):
    killed = subprocess.run(
        [sys.executable, HERE / "small_run.py", tmp_path / "killed", "6"], capture_output=True, text=True
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr[-3000:]
    steps = [int(line) for line in killed.stdout.split()]
    assert len(steps) == 7 and steps[-1] == small_run.LIFE and len(set(steps)) > 3  # they died at many different steps
    train(tmp_path / "unbroken", steps=small_run.LIFE)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert sorted(losses(tmp_path / "killed")) == list(range(1, small_run.LIFE + 1))
    assert_same(load(tmp_path / "killed", small_run.LIFE), load(tmp_path / "unbroken", small_run.LIFE))


@pytest.mark.parametrize(
    "number, sentence, code", [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "interrupted", 130)]
)
def test_a_signal_saves_after_the_step_and_the_next_run_continues_with_the_same_losses(
    tmp_path, unbroken, number, sentence, code
):
    def read(step):
        if step == 7:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(loop.PreemptedError, match=rf"{sentence}: saved at step \d of 12") as ended:
        train(tmp_path, Loader(read))
    assert ended.value.exit_code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    last = max(losses(tmp_path))
    assert 5 <= last <= 8 and f"step {last} of" in str(ended.value)  # batches are read up to two steps ahead
    asked, lines = [], []
    train(tmp_path, Loader(asked.append), log=lines.append)
    assert lines == [f"continues at step {last} of 12, from {tmp_path / 'checkpoints' / str(last)}"]
    assert min(asked) == last and losses(tmp_path) == losses(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_completes_the_stage_and_ends_the_process(tmp_path, number):
    with pytest.raises(loop.PreemptedError, match="saved at step 1 of 1"):
        train(tmp_path, Loader(lambda step: step == 0 and os.kill(os.getpid(), number)), steps=1)
    assert list(losses(tmp_path)) == [1] and training_state.is_finished(tmp_path / "checkpoints")
    train(tmp_path, steps=1)  # nothing left to do


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_run import Loader, train
from embed.cli.common import end, run
times, ignored = int(sys.argv[3]), sys.argv[4:]
if ignored:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def read(step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGINT)
    if step == 7 and times == 2:
        while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # until the first one was noticed
            pass
        os.kill(os.getpid(), signal.SIGINT)

end(run, lambda argv: train(Path(sys.argv[2]), Loader(read), steps=12) and 0)
"""


def interrupt(folder, *arguments):
    command = [sys.executable, "-c", INTERRUPTED, HERE, folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_first_ctrl_c_announces_a_checkpoint_and_the_second_one_ends_at_once(tmp_path):
    done = interrupt(tmp_path / "once", "1")
    waits, saved = (line for line in done.stderr.splitlines() if line.startswith("embed: "))
    assert done.returncode == 130, done.stderr
    assert waits == "embed: interrupted: saving a checkpoint after this step; press Ctrl-C again to end at once"
    step = max(losses(tmp_path / "once"))
    assert saved == f"embed: interrupted: saved at step {step} of 12; the same command continues"
    assert training_state.steps(tmp_path / "once" / "checkpoints")[-1] == step
    done = interrupt(tmp_path / "twice", "2")
    assert done.returncode == -signal.SIGINT and "saved at step" not in done.stderr


def test_training_ignores_ctrl_c_if_its_shell_made_the_job_ignore_it(tmp_path):
    done = interrupt(tmp_path, "1", "ignored")
    assert done.returncode == 0, done.stderr
    assert max(losses(tmp_path)) == 12


# --- checkpoints -----------------------------------------------------------------------------------------------


def _files(folder):
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    path = _files(checkpoint)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(checkpoint):
    path = _files(checkpoint)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_an_item(checkpoint):
    shutil.rmtree(checkpoint / "optimizer")


def empty_the_metadata(checkpoint):
    for path in checkpoint.rglob("_METADATA"):
        path.write_text("")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_an_item, empty_the_metadata])
def test_a_damaged_newest_checkpoint_is_named_and_put_aside_and_training_continues_from_the_one_before(
    tmp_path, interrupted, unbroken, damage
):
    shutil.copytree(interrupted, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(checkpoints / "10")
    warnings, asked = [], []
    final = train(tmp_path / "run", Loader(asked.append), warn=warnings.append)
    (warning,) = warnings
    assert warning.startswith(f"checkpoint 10 under {checkpoints} is damaged") and "continuing from step 5" in warning
    assert min(asked) == 5 and (checkpoints / "damaged-10").is_dir()
    assert losses(tmp_path / "run") == losses(unbroken)
    assert_same(final, load(unbroken))
    assert_same(load(tmp_path / "run"), load(unbroken))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_parameters_cannot_start_another_stage(tmp_path, unbroken, damage):
    shutil.copytree(unbroken, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "12" / "params")
    with pytest.raises(
        training_state.CheckpointError, match="checkpoint 12 under .* cannot be read.*train that stage again"
    ):
        load(tmp_path / "run")


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused_with_the_names_of_the_tensors(tmp_path):
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.abstract_params(MODEL))
    params["layers"]["gate"][1, 0, 0] = np.inf
    params["norm"][0] = np.nan
    with training_state.open_manager(tmp_path / "checkpoints", save_every=1, keep=1) as manager:
        training_state.save(manager, 12, jax.tree.map(jnp.asarray, params))
    said = (
        "checkpoint 12 under .*checkpoints has weights that are not finite: layers.1.mlp.gate_proj.weight, norm.weight$"
    )
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_the_checksum_finds_a_wrong_bit_that_the_checks_of_the_files_do_not_find(tmp_path, interrupted):
    shutil.copytree(interrupted, tmp_path / "run")
    sums = tmp_path / "run" / "checkpoints" / "10" / "checksums"
    (path,) = (path for path in sums.rglob("*") if path.is_file() and "optimizer" in path.read_text())
    saved = training_state.checksum(load(interrupted, 10))
    path.write_text(path.read_text().replace(str(int(saved)), str(int(saved) ^ 1)))
    warnings = []
    train(tmp_path / "run", warn=warnings.append)
    assert "the params of step 10 do not have the checksum" in warnings[0]


def test_a_finished_run_keeps_only_parameters_and_does_nothing_when_started_again(tmp_path, unbroken):
    assert training_state.steps(unbroken / "checkpoints") == [12]
    assert not (unbroken / "checkpoints" / "12" / "optimizer").exists()
    asked = []
    assert_same(train(unbroken, Loader(asked.append)), load(unbroken))
    assert not asked


def test_the_checksum_depends_on_every_bit():
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones((5,), jnp.bfloat16), "count": jnp.int32(3)}
    value = int(training_state.checksum(tree))
    assert int(training_state.checksum(jax.tree.map(jnp.copy, tree))) == value
    for name, change in (("a", jnp.float32(2**-20)), ("b", jnp.bfloat16(2**-7)), ("count", 1)):
        other = tree | {name: tree[name].at[(0,) * tree[name].ndim].add(change)}
        assert int(training_state.checksum(other)) != value
    assert int(training_state.checksum({"a": tree["a"], "b": tree["count"], "count": tree["b"]})) != value


def test_if_no_checkpoint_can_be_read_the_run_ends_and_changes_nothing(tmp_path, interrupted):
    shutil.copytree(interrupted, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("5", "10"):
        truncate(checkpoints / step)
    before = sorted(str(path) for path in checkpoints.rglob("*"))
    with pytest.raises(training_state.CheckpointError, match="no checkpoint under .* can be read; the newest, 10: .*"):
        train(tmp_path / "run")
    assert sorted(str(path) for path in checkpoints.rglob("*")) == before


ON_A_SMALL_DISK = """
import os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_run import Loader, losses, train
from embed.cli.common import run

disk, state = Path(sys.argv[2]), sys.argv[3]

def fill(step):
    if step == 7:
        try:
            with (disk / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass

def end(step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGTERM)

def remount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

asked = []
if state == "full":
    code = run(lambda argv: train(disk / "run", Loader(fill)))
    (disk / "ballast").unlink()
else:
    assert run(lambda argv: train(disk / "run", Loader(end))) == 143
    remount("ro")
    code = run(lambda argv: train(disk / "run"))
    remount("rw")
train(disk / "run", Loader(asked.append))
print(code, min(asked), len(losses(disk / "run")))
"""


@pytest.mark.parametrize("state, reason", [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_a_disk_that_cannot_be_written_is_an_error_and_the_last_checkpoint_stays_good(tmp_path, state, reason):
    if subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs the permission to mount a file system")
    disk, program = tmp_path / "disk", tmp_path / "program.py"
    disk.mkdir()
    program.write_text(ON_A_SMALL_DISK)
    mount = f"mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} {program} {HERE} {disk} {state}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    code, step, rows = done.stdout.split()
    assert code == "1"
    assert int(step) >= 1 and rows == "12"  # then continued from the last good checkpoint to the end
    assert any(line.startswith("embed: error:") and reason in line for line in done.stderr.splitlines())


# --- steps that are not finite -----------------------------------------------------------------------------------


def breaking(*steps, of=12):
    """The loss, with a gradient that is not finite in the given steps (from 0)."""
    finite = stages.make_loss(small_run.STAGE, MODEL, mask_id=2)

    def loss(params, batch, key, progress):
        value, metrics = finite(params, batch, key, progress)
        bad = jnp.isin(jnp.round(progress * of).astype(jnp.int32), jnp.array(steps))
        zero = jnp.where(bad, params["norm"][0] - jax.lax.stop_gradient(params["norm"][0]), 1.0)
        return value + jnp.sqrt(zero), metrics

    return loss


def test_a_step_without_a_finite_gradient_changes_no_parameter_and_no_moment_and_is_counted(tmp_path):
    settings = {"max_skipped": 2, "checkpoint_every": 100, "log_every": 4}
    train(tmp_path / "run", loss=breaking(5, 6), stage=settings, steps=12)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    # The first step is saved and so has a row.
    assert {step: row["skipped"] for step, row in rows.items()} == {1: 0, 4: 0, 8: 2, 12: 0}

    train_step = jax.jit(make_train_step(breaking(5), optimizer := _adamw(), 12))
    params = transformer.init(MODEL, jax.random.key(0))
    state = optimizer.init(params)
    batch = {k: v for k, v in Loader().batch(0).items() if k != "stats"}
    for step in range(5):
        params, state, metrics = train_step(params, state, batch, step, 0)
        assert not metrics["skipped"]
    new_params, new_state, metrics = train_step(params, state, batch, 5, 0)
    assert metrics["skipped"] and not np.isfinite(metrics["gradient_norm"])
    assert_same(new_params, params)
    arrays = lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim]  # noqa: E731
    assert_same(arrays(new_state), arrays(state))
    counts = [int(x) for x in jax.tree.leaves(new_state) if not x.ndim]
    assert counts and set(counts) == {6}  # the schedule stays a function of the step
    _, _, metrics = train_step(new_params, new_state, batch, 6, 0)
    assert np.isfinite(metrics["loss"])


def _adamw():
    from embed.training.optimizer import make_optimizer

    return make_optimizer(small_run.STAGE.optimizer, lambda step: 1e-3)


def test_more_than_max_skipped_steps_in_a_row_end_the_run_with_its_checkpoint_intact(tmp_path):
    with pytest.raises(
        loop.NonFiniteLossError, match=r"gradient_norm of step 9 is (nan|inf), and 3 steps in a row .*max_skipped=2"
    ):
        train(tmp_path, loss=breaking(2, 3, 6, 7, 8), stage={"max_skipped": 2})
    params = load(tmp_path, training_state.steps(tmp_path / "checkpoints")[-1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# --- readers and peers -------------------------------------------------------------------------------------------


def test_a_reader_that_stalls_is_named_and_ends_the_run_with_the_exit_code_for_a_restart():
    program = f"""
import sys, threading; sys.path.insert(0, {str(HERE)!r})
import tempfile; from pathlib import Path
from small_run import Loader, train
from embed.cli.common import run
stall = lambda step: step == 3 and threading.Event().wait()
sys.exit(run(lambda argv: train(Path(tempfile.mkdtemp()) / "run", Loader(stall), read_timeout=0.5)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 75
    assert "embed: error: the small loader gave no batch of step 3 in 0.5 s" in done.stderr


def test_the_error_after_a_lost_process_names_the_step_and_the_remedy(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(PeerLostError, match="process 0 of 4 cannot continue at step 9: Gloo all-reduce failed") as lost:
        with loop.translate_peer_errors(9):
            raise ValueError("Gloo all-reduce failed: Connection reset by peer\nmore")
    assert lost.value.exit_code == 75
    with pytest.raises(loop.NonFiniteLossError), loop.translate_peer_errors(9):  # not a peer's fault
        raise loop.NonFiniteLossError("nan")


def test_processes_may_agree_on_a_signal_of_one_run_in_the_next_run(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", lambda call: asked.append(call) or False)
    for _ in range(2):
        request = loop.StopRequest()
        assert not any(request() for _ in range(3))
    assert asked == list(range(asked[0], asked[0] + 6))  # jax compares a call with the one that was agreed on


# --- several processes -------------------------------------------------------------------------------------------

ONE_OF_SEVERAL = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import jax
folder, process, processes, coordinator, what = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
jax.config.update("jax_num_cpu_devices", 4 // processes)
jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=10)
from small_run import Loader, train
from embed.cli.common import end, run
from embed.models import sharding

# As on a pod, where a mesh follows the wires: no process has devices that stand side by side in it.
order = {1: [0, 1, 2, 3], 2: [0, 2, 1, 3], 4: [2, 0, 3, 1]}[processes]
mesh = sharding.make_mesh(devices=[jax.devices()[k] for k in order])
own = sharding.local_shards(mesh, 4)
assert own == sorted(order.index(k) for k in range(4) if k // (4 // processes) == process)

def read(step):
    if step == 7 and process == processes - 1 and what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    if step == 8 and what in ("SIGTERM", "SIGINT"):  # the run could end before jax looks for signals, once a second
        jax._src.distributed.global_state.client.blocking_key_value_get("RECEIVED_PREEMPTION_NOTICE", 60_000)

if what == "unreadable" and process == 1:  # as where one host's disk or network fails
    import orbax.checkpoint as ocp

    whole = ocp.StandardCheckpointHandler.restore
    def restore(self, directory, *arguments, **keywords):
        if "/10/" in str(directory):
            raise OSError("Input/output error")
        return whole(self, directory, *arguments, **keywords)
    ocp.StandardCheckpointHandler.restore = restore

warn = lambda sentence: print(sentence, file=sys.stderr)
end(run, lambda argv: train(folder, Loader(read, own), mesh=mesh, warn=warn) and 0)
"""


def run_processes(folder, count, what="nothing"):
    """[(exit code, stderr)] of `count` processes that train together.

    The last one gets the signal `what` at step 7. With "unreadable", process 1 cannot read checkpoint 10.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [
        [sys.executable, "-c", ONE_OF_SEVERAL, HERE, folder, str(k), str(count), address, what] for k in range(count)
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, error) for process, error in zip(running, errors)]


@pytest.mark.parametrize("number, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path, unbroken, number, code):
    ended = run_processes(tmp_path / "run", 2, number)
    assert [each for each, _ in ended] == [143, code], ended
    said = {int(step) for _, error in ended for step in re.findall(r": saved at step (\d+) of 12;", error)}
    assert said == {max(losses(tmp_path / "run"))}  # how far the processes come until all know of the signal is theirs
    (again,) = run_processes(tmp_path / "run", 1)
    assert again[0] == 0, again
    got, whole = losses(tmp_path / "run"), losses(unbroken)
    assert sorted(got) == sorted(whole)
    np.testing.assert_allclose([got[k] for k in sorted(got)], [whole[k] for k in sorted(whole)], rtol=1e-5)


def test_if_one_of_four_processes_dies_the_others_end_with_an_error_and_two_can_continue(tmp_path, unbroken):
    ended = run_processes(tmp_path / "run", 4, "SIGKILL")
    assert ended[3][0] == -signal.SIGKILL
    for code, error in ended[:3]:
        assert code in (75, -signal.SIGABRT), error[-2000:]  # our own, or that of jax's coordination service
        assert "Another process ended or the network failed" in error or "another task died" in error
    again = run_processes(tmp_path / "run", 2)
    assert [code for code, _ in again] == [0, 0], again
    got, whole = losses(tmp_path / "run"), losses(unbroken)
    assert sorted(got) == sorted(whole)
    np.testing.assert_allclose([got[k] for k in sorted(got)], [whole[k] for k in sorted(whole)], rtol=1e-5)


def test_if_one_of_two_processes_cannot_read_a_checkpoint_both_continue_from_the_one_before(
    tmp_path, interrupted, unbroken
):
    shutil.copytree(interrupted, tmp_path / "run")
    ended = run_processes(tmp_path / "run", 2, "unreadable")
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "run" / "checkpoints" / "damaged-10").is_dir()
    said = [error.partition("checkpoint 10 under ")[2].partition(")")[0] for _, error in ended]
    assert "another process could not read it" in said[0] and "Input/output error" in said[1]
    got, whole = losses(tmp_path / "run"), losses(unbroken)
    assert sorted(got) == sorted(whole)
    np.testing.assert_allclose([got[k] for k in sorted(got)], [whole[k] for k in sorted(whole)], rtol=1e-5)


# --- meshes ------------------------------------------------------------------------------------------------------

OTHER_MESHES = """
import os, signal, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import jax, numpy as np
from small_run import Loader, losses, train
from embed.models import sharding
from embed.training import loop

devices, folder = jax.devices(), Path(sys.argv[2])
eight = sharding.make_mesh(data=2, fsdp=2, tensor=2)
train(folder / "unbroken", mesh=eight)
four = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=devices[:4])
for until, mesh in ((3, eight), (7, four), (None, sharding.make_mesh(data=1, fsdp=4, tensor=2))):
    read = lambda step: step == until and os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(folder / "moved", Loader(read), mesh=mesh)
    except loop.PreemptedError as ended:
        print(ended)
a, b = losses(folder / "unbroken"), losses(folder / "moved")
assert sorted(a) == sorted(b) == list(range(1, 13))
np.testing.assert_allclose([b[k] for k in sorted(b)], [a[k] for k in sorted(a)], rtol=1e-5)
"""


def test_a_run_continues_on_other_meshes_with_the_same_losses(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", OTHER_MESHES, HERE, tmp_path],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SIGTERM: saved") == 2


# --- logged rows -------------------------------------------------------------------------------------------------


def test_a_row_has_speed_mfu_and_the_share_of_time_spent_waiting_for_data(tmp_path):
    lines = []
    train(
        tmp_path,
        stage={"log_every": 4, "checkpoint_every": 100},
        peak=1e9,
        progress=lambda step, row: lines.append(log_line(step, 12, row)),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    # At the peak of 1e9 FLOP/s, in seconds; all rows are one full segment.
    needed = flops.model_flops(small_run.STAGE, MODEL) / (1e9 * jax.device_count())
    assert [row["step"] for row in rows] == [1, 4, 8, 12]
    for row in rows:
        seconds = row["seconds_per_step"]
        np.testing.assert_allclose(row["tokens_per_second_per_device"], 4 * 16 / seconds / jax.device_count())
        np.testing.assert_allclose(row["examples_per_second_per_device"], 4 / seconds / jax.device_count())
        np.testing.assert_allclose([row["mfu"], row["mfu_full_rows"]], needed / seconds)
        assert 0 <= row["data_wait"] <= 1
        assert row["learning_rate"] > 0 and row["gradient_norm"] > 0 and row["skipped"] == 0
    assert lines[1].startswith("step 4/12  loss ") and " tokens/s/device" in lines[1]
    assert f"MFU {rows[1]['mfu']:.1%} in segments" in lines[1]


class HalfRows(Loader):
    """Rows with two segments of 4 tokens and 8 tokens of padding."""

    def batch(self, step):
        batch = super().batch(step)
        batch["segment_ids"][:, 4:] = [2] * 4 + [0] * 8
        return batch


def test_mfu_counts_segments_and_mfu_full_rows_counts_whole_rows(tmp_path):
    train(tmp_path, HalfRows(), steps=2, peak=1e9)
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        segments = flops.model_flops(small_run.STAGE, MODEL, tokens=4 * 8, squares=4 * 2 * 4**2)
        whole = flops.model_flops(small_run.STAGE, MODEL)
        np.testing.assert_allclose(row["mfu"] / row["mfu_full_rows"], segments / whole)
        assert row["masked"] <= 4 * 8 and row["overflow"] == 0


def test_masked_tokens_beyond_the_capacity_are_summed_since_the_last_row_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(masked_diffusion, "capacity", lambda *_, **__: 0.25)  # 16 of 64 tokens
    warnings = []
    train(tmp_path, steps=8, stage={"log_every": 4, "checkpoint_every": 100}, warn=warnings.append)
    first, *rows = read_metrics(tmp_path / "metrics.jsonl")
    assert first["overflow"] == first["masked"] - 16 > 0 and [row["step"] for row in rows] == [4, 8]
    assert rows[1]["overflow"] == rows[1]["masked"] - 4 * 16 > 0  # of four steps, each with a capacity of 16
    assert len(warnings) == 3
    share = rows[1]["overflow"] / rows[1]["masked"]
    assert warnings[2].startswith(f"{rows[1]['overflow']:.0f} masked tokens up to step 8 are not in the loss")
    assert warnings[2].endswith(f"({share:.2%} of all masked tokens since the last row)")


def test_padding_is_not_counted_as_tokens():
    batch = Loader().batch(0)
    batch["segment_ids"][:, 10:] = 0
    counts = loop._estimates(batch.pop("stats"), batch, Loader())
    assert counts == {"fill": 1.0, "cut": 0, "tokens": 40, "squares": 4 * 10**2, "examples": 4}


def test_counts_of_a_batch_are_estimated_from_the_part_of_a_process_without_unused_slots():
    batch = Loader(shards=[1]).batch(3)
    stats = batch.pop("stats") | {"lost": 2}
    counts = loop._estimates(stats, batch | {"valid": np.arange(7) < 5}, Loader(shards=[1]))
    squares = 4 * 16**2
    assert counts == {"fill": 1.0, "cut": 12, "lost": 8, "tokens": 64, "squares": squares, "examples": 5 * 4}


def test_profile_steps_write_a_trace(tmp_path):
    train(tmp_path, steps=6, profile_steps=range(2, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_weights_and_biases_gets_every_row_in_one_run_per_folder(tmp_path, monkeypatch):
    class Service:
        def __init__(self):
            self.opened, self.rows = [], []

        def init(self, **keywords):
            self.opened.append(keywords)
            return self

        def log(self, row, step):
            self.rows.append((step, row["loss"]))

        def finish(self, exit_code):
            self.rows.append(f"finished {exit_code}")

    def fails(step):
        if step == 2:
            raise OSError("the reader fails")

    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    writer = functools.partial(MetricsWriter, wandb="project")
    train(tmp_path / "run" / "pair", steps=3, writer=writer)
    train(tmp_path / "run" / "pair", steps=3, writer=writer)
    assert service.rows[:3] == list(losses(tmp_path / "run" / "pair").items()) and service.rows[3] == "finished 0"
    first, second = service.opened
    assert first == second and first["name"] == "run/pair" and first["project"] == "project"
    with pytest.raises(OSError, match="the reader fails"):
        train(tmp_path / "run" / "triplet", Loader(fails), steps=3, writer=writer)
    assert service.rows[-1] == "finished 1"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb=project needs the package wandb"):
        MetricsWriter(tmp_path, 0, wandb="project")


def test_counts_are_complete_after_an_interruption_between_two_rows(tmp_path):
    stage = {"log_every": 50}
    with pytest.raises(loop.PreemptedError):
        train(tmp_path, Loader(lambda step: step == 7 and os.kill(os.getpid(), signal.SIGTERM)), stage=stage)
    train(tmp_path, stage=stage)
    assert sum(row["cut"] for row in read_metrics(tmp_path / "metrics.jsonl")) == sum(range(12))
