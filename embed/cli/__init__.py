"""`embed VERB …`: one module a verb; `python -m embed.cli.VERB …` is the same."""

import importlib
import pkgutil
import sys
from typing import NoReturn


def verbs() -> dict[str, str]:
    """{verb: first line of its module's docstring}, read without importing anything heavy."""
    import ast
    from pathlib import Path

    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("common", "__main__"):
            source = Path(__path__[0], f"{module.name}.py").read_text()
            found[module.name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run `embed VERB arguments`."""
    from embed.cli.common import run

    argv = sys.argv[1:] if argv is None else argv
    known = verbs()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: embed VERB [arguments]      embed VERB --help\n")
        print("\n".join(f"  {verb:10} {line}" for verb, line in known.items()))
        print("\nEMBED_TRACEBACK=1 in the environment shows where an error was found.")
        return 0 if argv else 2
    if argv[0] not in known:
        from embed.config import nearest

        print(
            f"embed: {argv[0]!r} is not a verb; there are {', '.join(known)}{nearest(argv[0], known)}", file=sys.stderr
        )
        return 2
    return run(importlib.import_module(f"embed.cli.{argv[0]}").main, argv[1:])


def entry() -> NoReturn:
    """The program `embed`: `main`, after which the process ends whatever it left running."""
    from embed.cli.common import end

    end(main)
