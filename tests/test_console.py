"""What is printed: tables fit a terminal and are never cut in a log."""

import contextlib
import os
import re

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table

from embed.console import make_console, print_table

LONG = "word " * 400 + "end"


def table():
    made = Table("name", "text", title="A title", title_justify="left", box=SIMPLE_HEAD, expand=True)
    made.columns[1].no_wrap, made.columns[1].overflow = True, "ellipsis"
    made.add_row("a", LONG)
    made.add_row("b", "short")
    return made


@pytest.mark.parametrize("stderr", [False, True])
def test_a_table_in_a_log_is_as_wide_as_its_content_and_has_no_trailing_blanks(stderr, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(table(), stderr)
    out, err = capsys.readouterr()
    lines = (err if stderr else out).splitlines()
    assert (out if stderr else err) == "" and all(line == line.rstrip() for line in lines)
    assert lines[0] == "A title" and sum(LONG in line for line in lines) == 1
    assert max(map(len, lines)) < len(LONG) + 20


def test_a_table_is_as_wide_as_its_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
        print_table(table())
    lines = re.sub("\x1b.*?m", "", os.read(ours, 10_000).decode()).splitlines()
    os.close(ours)
    assert max(map(len, lines)) <= 40 and any("…" in line for line in lines)


def test_a_sentence_in_a_log_is_one_line_and_printed_as_it_is(capsys):
    make_console().print(f":smile: {LONG}", markup=False, highlight=False)
    assert capsys.readouterr().out == f":smile: {LONG}\n"
