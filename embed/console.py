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
    """Keep a library quiet while it is imported: its C++ part writes to standard error whatever its log level is.

    Output is dropped if the block succeeds, and shown if it fails.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(before, aside.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
