"""Where the program prints for people."""

import sys

from rich.console import Console

WIDE = 1000  # columns where output is no terminal: a log has room for any table, and nothing may be cut


def make_console(stderr: bool = False) -> Console:
    """A console as wide as its terminal, or WIDE where it writes into a file or a pipe; it breaks no line by itself."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, soft_wrap=True, width=None if stream.isatty() else WIDE)
