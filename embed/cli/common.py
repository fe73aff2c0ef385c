"""What the verbs share: errors of the user as one sentence, the config argument, the other processes of a job."""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from embed import distributed, paths
from embed.distributed import is_first as is_first

WRONG_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Run a verb. What a user can mend ends in one sentence and an exit code; with EMBED_TRACEBACK=1 also where it was found.

    0 done; 2 wrong input; 1 the machine's fault, as a full disk; 75 try the same command again, as when another process
    of the run died; 130 interrupted; 143 ended by SIGTERM behind a checkpoint.
    """
    keep_freed_memory()
    try:
        code = main(argv) or 0
        distributed.meet()  # no process ends before process 0 has written
        return code
    except BrokenPipeError:  # of `embed … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as SIGPIPE: a run whose reader went away is not done
    except Exception as error:
        code = getattr(
            error, "exit_code", 2 if isinstance(error, WRONG_INPUT) else 1 if isinstance(error, OSError) else 0
        )
        if not code or os.environ.get("EMBED_TRACEBACK"):
            raise
        kind = "" if code == 143 else "error: "
        print(f"embed: {kind}{'; '.join([str(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        if code == 75 or (code != 143 and distributed.is_joined()):
            _leave(code)
        return code
    except KeyboardInterrupt:
        print("embed: interrupted", file=sys.stderr)
        _leave(130)


def _leave(code: int) -> NoReturn:
    """End at once: threads of the runtime may be at work, and with a process gone jax would wait for it to say goodbye."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory instead of handing it back to the kernel; False where there is no glibc.

    XLA on CPU allocates its temporary buffers anew for every step. Above 32 MB malloc maps and unmaps each of them,
    and the kernel zeroes every page again. What that costs depends on the machine (ARCHITECTURE.md, "Speed").
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
    # One arena: the others are made of mapped heaps of 64 MB.
    return all(
        libc.mallopt(name, value) for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    )


def check_output(path: str | None) -> None:
    """Refuse a file that could not be written, before the work rather than behind it."""
    if path and not paths.is_bucket(path) and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise FileNotFoundError(f"--output={path} must be a file in a folder that exists")


def parse_range(name: str, text: str) -> range:
    """range(A, B) of "A:B"; empty for an empty text."""
    if not text:
        return range(0)
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise ValueError(f"{name}={text} must be A:B with whole numbers A < B")
    return range(int(start), int(stop))


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--config=FILE.py[:arg], --workdir, and --config.key=value through `parse_config`."""
    parser.add_argument("--config", required=required, help="config file, FILE.py or FILE.py:argument,name=value")
    parser.add_argument("--workdir", required=required, help="where the run lives; the same command continues it")
    parser.epilog = "Single fields of the config: --config.key.key=value."


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None):
    """(arguments, config) of a verb with `add_config_arguments`."""
    from embed import config

    arguments, overrides = parser.parse_known_args(argv)
    return arguments, config.load(arguments.config, overrides)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """--model and --step: the arguments of `runs.load_encoder`."""
    parser.add_argument(
        "--model", required=True, help="a model folder, a hub id owner/name, or a stage folder of a run"
    )
    parser.add_argument("--step", type=int, default=0, help="of a stage that has not finished; by default its last")


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """--distributed, or --coordinator, --num_processes and --process_id: the arguments of `join`."""
    parser.add_argument(
        "--distributed", action="store_true", help="join the job's other processes: TPU pod, GKE, Slurm"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, where several processes work together")
    parser.add_argument("--num_processes", type=int, help="how many processes work together")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")


def join(arguments: argparse.Namespace, *, saves_at_sigterm: bool = True) -> None:
    """Join the other processes if the arguments ask for it; before anything is computed (`embed.distributed.join`)."""
    several = arguments.num_processes is not None
    if not several and (arguments.coordinator or arguments.process_id is not None):
        raise ValueError("--coordinator and --process_id need --num_processes: this process would work alone")
    if arguments.distributed and several:
        raise ValueError("--distributed finds the processes by itself: leave out --num_processes")
    if several and (not arguments.coordinator or arguments.process_id not in range(arguments.num_processes)):
        raise ValueError(
            f"--num_processes={arguments.num_processes} needs --coordinator=HOST:PORT and --process_id from 0 to "
            f"{arguments.num_processes - 1}, not {arguments.coordinator} and {arguments.process_id}"
        )
    if arguments.distributed or several:
        distributed.join(
            arguments.coordinator, arguments.num_processes, arguments.process_id, saves_at_sigterm=saves_at_sigterm
        )
