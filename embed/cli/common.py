"""What the verbs share: errors of the user as one sentence, the config argument."""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Run a verb. Wrong input ends in one sentence and exit code 2; with EMBED_TRACEBACK=1 also where it was found."""
    keep_freed_memory()
    try:
        return main(argv) or 0
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        if os.environ.get("EMBED_TRACEBACK"):
            raise
        print(f"embed: error: {'; '.join([str(error), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("embed: interrupted", file=sys.stderr)
        return 130


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
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise FileNotFoundError(f"--output={path} must be a file in a folder that exists")


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
