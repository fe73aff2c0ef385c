import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from embed.data.loader import ContrastiveLoader
from embed.data.prefetch import ReaderDiedError, ReaderStalledError, prefetch
from embed.data.store import Store, Writer
from embed.rows import RowShape


class Counting:
    """Batch k is k; fails at one step."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def __str__(self):
        return "the counting loader"

    def batch(self, step):
        if step == self.fail_at:
            raise OSError("disk on fire")
        return step


def reader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def all_readers_end():
    for thread in reader_threads():
        thread.join(timeout=10)
    return not reader_threads()


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetch_yields_every_step_in_order(depth):
    assert [(step, batch) for step, batch, _ in prefetch(Counting(), 3, 20, depth)] == [(k, k) for k in range(3, 20)]
    assert list(prefetch(Counting(), 5, 5, depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_reads_at_most_depth_batches_ahead(depth):
    ahead = []

    class Watched(Counting):
        def batch(self, step):
            ahead.append(step - taken)
            return super().batch(step)

    taken = -1
    for step, _, _ in prefetch(Watched(), 0, 50, depth):
        taken = step
    assert 1 <= max(ahead) <= depth + 1  # `taken` is updated an instant after a batch leaves the queue


def test_prefetch_raises_an_error_of_the_reader_at_its_step():
    got = []
    with pytest.raises(OSError, match="disk on fire") as caught:
        for step, *_ in prefetch(Counting(fail_at=4), 0, 10, 3):
            got.append(step)
    assert got == [0, 1, 2, 3]
    assert caught.value.__notes__ == ["while the counting loader read the batch of step 4"]
    assert all_readers_end()


def test_prefetch_ends_its_thread_when_the_consumer_stops():
    for _ in prefetch(Counting(), 0, 10**9, 5):
        break
    assert all_readers_end()


def test_a_prefetch_depth_of_zero_is_an_error():
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        next(prefetch(Counting(), 0, 5, 0))


def test_a_stalled_reader_is_named_with_its_step_and_does_not_keep_the_process_alive():
    class Stalled(Counting):
        def batch(self, step):
            if step == 2:
                release.wait()
            return super().batch(step)

    release, got = threading.Event(), []
    with pytest.raises(ReaderStalledError, match=r"the counting loader gave no batch of step 2 in 0.05 s") as caught:
        for step, *_ in prefetch(Stalled(), 0, 10, 2, timeout=0.05):
            got.append(step)
    assert got == [0, 1] and caught.value.exit_code == 75
    assert all(thread.daemon for thread in reader_threads())
    release.set()
    assert all_readers_end()


# --- reader processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 3])
def test_processes_yield_the_batches_of_the_loader_in_order(readers, tmp_path):
    writer, rng = Writer(tmp_path, ["query", "document"]), np.random.default_rng(0)
    for _ in range(50):
        writer.append({"query": rng.integers(0, 99, 5), "document": rng.integers(0, 99, rng.integers(30))})
    writer.close({})
    loader = ContrastiveLoader(
        {"a": Store(tmp_path)},
        [(1, {"a": 1})],
        stage="pair",
        seed=0,
        group_size=4,
        groups=2,
        rows_per_group=4,
        shape=RowShape(32, 8, 8),
    )
    got = list(prefetch(loader, 3, 10, readers=readers))
    assert [step for step, *_ in got] == list(range(3, 10))
    for step, batch, _ in got:
        want = loader.batch(step)
        assert batch.keys() == want.keys() and batch["stats"] == want["stats"]
        for name in want.keys() - {"stats"}:
            np.testing.assert_array_equal(batch[name], want[name])
            assert batch[name].dtype == want[name].dtype


class Failing(Counting):
    """Fails in one of several ways at step 4."""

    def __init__(self, how):
        self.how = how

    def batch(self, step):
        if step == 4:
            self.fail()
        return {"step": step, "process": os.getpid(), "empty": np.zeros((0, 3), np.int32)}

    def fail(self):
        match self.how:
            case "error":
                raise OSError("disk on fire")
            case "unpicklable":
                raise UnpicklableError("not", "one argument")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                threading.Event().wait()


class UnpicklableError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


@pytest.mark.parametrize(
    "how, kind, message",
    [
        ("error", OSError, "disk on fire"),
        ("unpicklable", RuntimeError, "UnpicklableError: not one argument"),
        ("kill", ReaderDiedError, "a reader process was killed by SIGKILL"),
        ("hang", ReaderStalledError, "the counting loader gave no batch of step 4 in 5 s"),
    ],
)
def test_what_goes_wrong_in_a_reader_process_is_an_error_at_its_step(how, kind, message):
    got = {}
    with pytest.raises(kind, match=message) as caught:
        for step, batch, _ in prefetch(Failing(how), 0, 9, timeout=5 if how == "hang" else None, readers=2):
            got[step] = batch
    assert list(got) == [0, 1, 2, 3] and all(batch["step"] == step for step, batch in got.items())
    assert got[0]["empty"].shape == (0, 3)
    processes = {batch["process"] for batch in got.values()}
    assert len(processes) == 2 and os.getpid() not in processes
    if how in ("kill", "hang"):
        assert caught.value.exit_code == 75
    if how != "hang":
        assert caught.value.__notes__ == ["while the counting loader read the batch of step 4"]
    for process in processes:  # they have ended
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert all_readers_end()


class Modules(Counting):
    def batch(self, step):
        return {name for name in ("jax", "tensorflow", "seqio", "torch") if name in sys.modules}


def test_a_reader_process_imports_no_jax_and_no_tensorflow():
    assert [batch for _, batch, _ in prefetch(Modules(), 0, 1, readers=1)] == [set()]


# The reader is killed neither by a signal to it nor by its parent, which dies while the reader hangs.
DYING = """
    import os, signal
    from test_prefetch import Failing, prefetch
    for step, batch, _ in prefetch(Failing("hang"), 3, 9, readers=1):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_reader_process_ends_with_its_parent_even_while_it_hangs():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(DYING)]
    # This returns when the last process that holds the other end of the pipe for stderr has ended.
    died = subprocess.run(command, env=environment, capture_output=True, timeout=60, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
