"""Several processes that compute one thing together, joined by jax.distributed. Imports jax only when asked to."""

import contextlib
import sys
from collections.abc import Iterator

HEARTBEAT_SECONDS = 60  # so long after a process died the others end


class PeerLostError(RuntimeError):
    """What several processes compute together failed: another one ended, or the network did."""

    exit_code = 75  # EX_TEMPFAIL: the same command, started again, continues or does it anew


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    saves_at_sigterm: bool = True,
) -> None:
    """Join the other processes, before anything is computed.

    `coordinator` is host:port of process 0. Without arguments the job (TPU, GKE, Slurm) says who they are; ValueError where
    there is no such job, PeerLostError where they do not answer. With `saves_at_sigterm` the signal only sets what
    `jax.experimental.multihost_utils.reached_preemption_sync_point` reads, otherwise it ends the process.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ValueError(f"--distributed finds no TPU, GKE or Slurm job around this process: {error}") from error
    except RuntimeError as error:  # the others are not there yet, or no more
        raise PeerLostError(f"cannot join the other processes: {error}; the same command tries again") from error


def is_joined() -> bool:
    """Whether this process has joined others. Imports no jax."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints; a process alone is."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def peers(at: str = "", then: str = "the same command starts again", but: tuple = ()) -> Iterator[None]:
    """What computing together raises when another process is gone, as PeerLostError; around calls of the runtime alone.

    The error says where (`at`) and what happens `then`; errors of the kinds `but` are not the runtime's.
    """
    import jax

    try:
        yield
    except (RuntimeError, ValueError) as error:  # of the runtime; Gloo's come as ValueError
        if jax.process_count() == 1 or isinstance(error, but):
            raise
        raise PeerLostError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on{at}: {str(error).splitlines()[0]}. Another "
            f"process ended or the network failed, see their logs; {then}"
        ) from error


def meet() -> None:
    """Wait until every process of the job has come here."""
    if is_joined():
        from jax.experimental import multihost_utils

        with peers():
            multihost_utils.sync_global_devices("embed")
