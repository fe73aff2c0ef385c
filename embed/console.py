"""Where the program prints for people."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from rich.console import Console

WIDE = 1000  # columns where output is no terminal: a log has room for any table, and nothing may be cut


def make_console(stderr: bool = False) -> Console:
    """A console as wide as its terminal, or WIDE where it writes into a file or a pipe; it breaks no line by itself."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, soft_wrap=True, emoji=False, width=None if stream.isatty() else WIDE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around the import of a library whose C++ part writes to the standard error whatever its log level is.

    What is written in the block is dropped where the block succeeds, and shown where it fails.
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
