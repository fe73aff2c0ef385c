"""Processes that compute together, joined by jax.distributed. Functions import jax only when they need it."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence

from embed import paths

# The folder is not writable, in a read-only or virtual file system, or a link that leads nowhere.
CANNOT_BE_MADE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
HEARTBEAT_SECONDS = 60  # after a process dies, the others end within this time


class PeerLostError(RuntimeError):
    """A computation of several processes failed: another process ended, or the network failed."""

    exit_code = 75  # EX_TEMPFAIL: the same command continues, or starts over


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    saves_at_sigterm: bool = True,
) -> None:
    """Join the other processes; call it before anything is computed. A process that has joined stays joined.

    `coordinator` is host:port of process 0. Without arguments, the job (TPU, GKE, Slurm) names the processes.
    ValueError if there is no such job, PeerLostError if the others do not answer. With `saves_at_sigterm`, SIGTERM only
    sets what `jax.experimental.multihost_utils.reached_preemption_sync_point` reads; otherwise it
    ends the process.
    """
    import jax

    if is_joined():
        return
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ValueError(f"--distributed needs a TPU, GKE or Slurm job, this process is in none: {error}") from error
    except RuntimeError as error:  # the others have not started, or have ended
        raise PeerLostError(f"cannot join the other processes: {error}; the same command tries again") from error


def is_joined() -> bool:
    """Whether this process has joined others. Does not import jax."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints. A single process is process 0."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def translate_peer_errors(at: str = "", then: str = "the same command starts again", but: tuple = ()) -> Iterator[None]:
    """Turn what the runtime raises when another process is gone into PeerLostError; for calls of the runtime only.

    The error says where it happened (`at`) and what happens `then`. Errors of the types `but` pass unchanged.
    """
    import jax

    try:
        yield
    except (RuntimeError, ValueError) as error:  # Gloo raises ValueError
        if jax.process_count() == 1 or isinstance(error, but):
            raise
        raise PeerLostError(
            f"process {jax.process_index()} of {jax.process_count()} cannot continue{at}: "
            f"{str(error).splitlines()[0]}. Another process ended or the network failed, see the logs; {then}"
        ) from error


def barrier() -> None:
    """Wait until every process of the job has reached this call."""
    if is_joined():
        from jax.experimental import multihost_utils

        with translate_peer_errors():
            multihost_utils.sync_global_devices("embed")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes call this."""
    import jax
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(bool(flag)).any()) if jax.process_count() > 1 else bool(flag)


def total(numbers: Sequence[int]) -> list[int]:
    """Each whole number summed over all processes. All processes call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return list(numbers)
    halves = np.array(numbers, np.int64).view(np.int32)  # jax would cut a number of 64 bits
    with translate_peer_errors():
        return np.asarray(multihost_utils.process_allgather(halves)).view(np.int64).sum(0).tolist()


def from_first(text: str) -> str:
    """The text of process 0, in all processes. All processes call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    padded[: len(content[:size])] = content[:size]
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode() if size else ""


def on_first_process(
    function: Callable[[], bool | None], then: Callable[[], None] = lambda: None, task: str = "continue"
) -> bool:
    """Call `function` in process 0, then `then` in all processes if there are several; return the flag to all of them.

    An error of `function` is raised in all processes, after `then`: as it is in process 0, elsewhere as a ValueError
    that process 0 cannot do the `task`. Other processes would see a change in a folder a moment later, and might decide
    differently.
    """
    import jax

    flag = error = None
    if is_first():
        try:
            flag = function()
        except Exception as caught:  # whatever it is, the other processes must not wait
            error = caught
    if jax.process_count() > 1:
        then()
        if any_process(error is not None):
            error = error or ValueError(f"process 0 cannot {task}: see its error")
    if error:
        raise error
    return any_process(bool(flag))


@contextlib.contextmanager
def hold(folder, refuse: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """`paths.lock` of process 0 on behalf of all processes, which leave the block together.

    Process 0 calls `refuse`. An error there is raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        checks = [lambda: None]  # of the processes that hold no lock

        def lock():
            try:
                refuse()
                checks[0] = stack.enter_context(paths.lock(folder))
                refuse()  # again: another process may have written the folder before this one locked it
            except OSError as error:
                if error.errno not in CANNOT_BE_MADE:
                    raise
                option = "--workdir, --output or config.data.directory"
                raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another {option}") from error

        on_first_process(lock, task=f"write {folder}")
        yield checks[0]
        barrier()  # now all see what process 0 has written
