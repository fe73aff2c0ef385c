"""Read the batches of a loader ahead of time, in a thread or in processes.

A reader process is a fresh Python interpreter that imports only this package's `data`: no jax and no TensorFlow. It has
a pipe to this process. It gets the loader, then one message per batch that it may read, and it sends each batch as a
pickle with the arrays after it, which are copied once. It ends when the pipe closes, so also when this process dies.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe

import numpy as np


class ReaderStalledError(RuntimeError):
    """A loader did not return a batch within the timeout."""

    exit_code = 75  # EX_TEMPFAIL: the same command, started again, continues


class ReaderDiedError(RuntimeError):
    """A reader process ended before its batch."""

    exit_code = 75


def prefetch(
    loader, start: int, stop: int, depth: int = 2, timeout: float | None = None, readers: int = 0
) -> Iterator[tuple[int, dict, float]]:
    """Yields (step, batch, seconds waited for it) for steps start..stop-1.

    A thread reads up to `depth` batches ahead; with `readers`, that many processes read whole batches in turn, each up
    to `depth` ahead. The loader must be picklable then.

    An exception of the loader is raised here at the step that it belongs to, with a note that names the loader and the
    step. ReaderStalledError is raised after `timeout` seconds of waiting for one batch, ReaderDiedError if the process
    that reads it was killed. Threads are daemons: they may hang forever, and the process can still exit.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    if readers < 0:
        raise ValueError(f"readers={readers} must be at least 0")
    with contextlib.ExitStack() as stack:
        kind, count = (_Process, readers) if readers else (_Thread, 1)
        working = []
        for i in range(min(count, stop - start)):
            working.append(kind(loader, range(start + i, stop, count), depth))
            stack.callback(working[-1].close)
        for step in range(start, stop):
            begin, reader = time.perf_counter(), working[(step - start) % count]
            try:
                batch = reader.ready.get(timeout=timeout)
            except queue.Empty:
                raise ReaderStalledError(
                    f"{loader} gave no batch of step {step} in {timeout} s (config.execution.read_timeout): check its "
                    "storage; the same command continues from the last checkpoint"
                ) from None
            if isinstance(batch, Exception):
                batch.add_note(f"while {loader} read the batch of step {step}")
                raise batch
            reader.allow()
            yield step, batch, time.perf_counter() - begin


class _Thread:
    """Puts the batches of `steps` into `ready`, then an exception if there was one."""

    def __init__(self, loader, steps: range, depth: int):
        self.ready: queue.SimpleQueue = queue.SimpleQueue()
        self._capacity, self._stopped = threading.Semaphore(depth), threading.Event()
        threading.Thread(target=self._read, args=(loader, steps), name="prefetch", daemon=True).start()

    def allow(self) -> None:
        """One more batch may be read."""
        self._capacity.release()

    def close(self) -> None:
        self._stopped.set()
        self._capacity.release()

    def _read(self, loader, steps: range) -> None:
        for step in steps:
            self._capacity.acquire()
            if self._stopped.is_set():
                return
            try:
                self.ready.put(loader.batch(step))
            except Exception as error:
                self.ready.put(error)
                return


class _Process:
    """The same as `_Thread` in a process; a thread here receives its batches."""

    def __init__(self, loader, steps: range, depth: int):
        self.ready: queue.SimpleQueue = queue.SimpleQueue()
        self._connection, theirs = Pipe()
        command = f"from embed.data import prefetch; prefetch.serve({theirs.fileno()})"
        # One arena of malloc, as the command line sets it in this process: with one per thread, the memory of a store
        # is several times the limit of its cache.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and signals to the job are for this process, which ends the readers
        )
        theirs.close()
        # Sent by the thread, because the process reads only once it has started.
        content, self._last = pickle.dumps((loader, steps)), len(steps)
        threading.Thread(target=self._receive, args=(content, depth), name="prefetch", daemon=True).start()

    def allow(self) -> None:
        with contextlib.suppress(OSError):  # it has died; `ready` will say so
            self._connection.send_bytes(b"next")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self, content: bytes, depth: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.send_bytes(content)
        for _ in range(depth):
            self.allow()
        try:
            for _ in range(self._last):
                self.ready.put(_receive(self._connection))
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            error = f"a reader process {how}, perhaps because memory ran out (config.execution.readers)"
            self.ready.put(ReaderDiedError(f"{error}; the same command continues from the last checkpoint"))


def serve(handle: int) -> None:
    """The life of a reader process, at the other end of a pipe."""
    connection, capacity = Connection(handle), threading.Semaphore(0)
    loader, steps = pickle.loads(connection.recv_bytes())

    def listen():
        with contextlib.suppress(EOFError, OSError):
            while connection.recv_bytes():
                capacity.release()
        os._exit(0)  # the trainer has ended, and a read may hang

    threading.Thread(target=listen, daemon=True).start()
    for step in steps:
        capacity.acquire()
        try:
            batch = loader.batch(step)
        except Exception as error:
            batch = error
        try:
            _send(connection, batch)
        except OSError:
            return
    threading.Event().wait()  # until the pipe closes


def _send(connection: Connection, value) -> None:
    """Send an object: a pickle, then the contents of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        pickle.loads(content, buffers=buffers)  # an exception may be impossible to restore
    except Exception:
        buffers, content = [], pickle.dumps(RuntimeError(f"{type(value).__name__}: {value}"))
    sizes = [buffer.raw().nbytes for buffer in buffers]
    connection.send_bytes(pickle.dumps((content, sizes)))
    for buffer, size in zip(buffers, sizes):
        if size:
            connection.send_bytes(buffer.raw())


def _receive(connection: Connection):
    """The object of one `_send`."""
    content, sizes = pickle.loads(connection.recv_bytes())
    buffers = [np.empty(size, np.uint8) for size in sizes]
    for buffer in buffers:
        if len(buffer):
            connection.recv_bytes_into(buffer)
    return pickle.loads(content, buffers=buffers)
