"""Tables in Markdown and for a terminal."""

from collections.abc import Sequence

import rich.box
import rich.table

NONE = "–"  # for a missing figure


def number(value: float | None) -> str:
    """A figure with three digits."""
    return NONE if value is None else f"{value:.3f}"


def cell(text) -> str:
    """The text on one line, safe in a cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def row_of(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, right: int | None = None) -> str:
    """A table whose columns from `left` on (with `right`: the first `right`) are right-aligned numbers."""
    flush = range(left, len(heads)) if right is None else range(right)
    rule = ["---:" if k in flush else "---" for k in range(len(heads))]
    return "\n".join(map(row_of, [heads, rule, *rows]))


def bold_best(rows: list[list[str]], columns: Sequence[int]) -> list[list[str]]:
    """The rows with the largest figure of each of the columns in bold."""
    best = {c: max((row[c] for row in rows if row[c] != NONE), default="") for c in columns}
    return [[f"**{text}**" if text == best.get(c) else text for c, text in enumerate(row)] for row in rows]


def bold_row(row: list[str], first: int) -> list[str]:
    """A row with the largest figure from column `first` on in bold, if there are several."""
    best = max((text for text in row[first:] if text != NONE), default="")
    return [
        f"**{text}**" if k >= first and text == best and len(row) > first + 1 else text for k, text in enumerate(row)
    ]


def terminal(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> rich.table.Table:
    """A table for a terminal whose columns from `left` on are right-aligned; heads break at spaces."""
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for k, head in enumerate(heads):
        shown.add_column(
            head.replace(" ", "\n"), justify="left" if k < left else "right", vertical="bottom", no_wrap=True
        )
    for row in rows:
        shown.add_row(*row)
    return shown
