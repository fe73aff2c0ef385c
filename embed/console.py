"""What the program prints for people."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

WIDE = 10**6  # columns in a file or pipe: a log has room for any table, and nothing may be cut


def make_console(stderr: bool = False) -> Console:
    """A console as wide as its terminal, or WIDE if it writes to a file or a pipe; it breaks no line by itself."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, soft_wrap=True, emoji=False, width=None if stream.isatty() else WIDE)


def say(sentence: str) -> None:
    """Print a sentence on one line, never broken or cut, in process 0."""
    import jax

    if jax.process_index() == 0:
        make_console().print(sentence, markup=False, highlight=False)


def print_table(table: Table, stderr: bool = False) -> None:
    """Print a table as wide as the terminal; in a file or a pipe, as wide as its content."""
    console = make_console(stderr)
    if console.width == WIDE:
        table.expand = False
    with console.capture() as captured:
        console.print(table, soft_wrap=False)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), file=console.file)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what a library's C++ part writes to the standard error while it is imported, whatever its log level.

    sys.stderr still reaches the standard error. If the block fails, what was dropped is shown.
    """
    python, native = sys.stderr, os.dup(2)
    with tempfile.TemporaryFile() as dropped:
        if getattr(python, "rich_proxied_file", python) is sys.__stderr__:  # it writes to file descriptor 2
            # This stream stays open: log handlers that are made in the block keep it.
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.dup2(dropped.fileno(), 2)
        try:
            yield
        except BaseException:
            dropped.seek(0)
            os.write(native, dropped.read())
            raise
        finally:
            sys.stderr = python
            os.dup2(native, 2)
            os.close(native)
