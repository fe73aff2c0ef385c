"""`embed VERB …`: one module per verb; `python -m embed.cli VERB …` does the same."""

import importlib
import pkgutil
import sys
from typing import NoReturn

import embed


def verbs() -> dict[str, str]:
    """{verb: first line of its module's docstring}, without importing the modules."""
    import ast
    from pathlib import Path

    result = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("common", "__main__"):
            source = Path(__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
            result[module.name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return result


def main(argv: list[str] | None = None) -> int:
    """Run `embed VERB arguments`."""
    from embed.cli.common import run

    argv = sys.argv[1:] if argv is None else argv
    known = verbs()
    if argv[:1] == ["--version"]:
        print(f"embed {embed.__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: embed VERB [arguments]      embed VERB --help\n")
        print("\n".join(f"  {verb:10} {line}" for verb, line in known.items()))
        print("\nWith EMBED_TRACEBACK=1 in the environment, an error shows its traceback.")
        return 0 if argv else 2
    if argv[0] not in known:
        from embed.config import nearest

        print(
            f"embed: {argv[0]!r} is not a verb: expected {', '.join(known)}{nearest(argv[0], known)}", file=sys.stderr
        )
        return 2
    return run(importlib.import_module(f"embed.cli.{argv[0]}").main, argv[1:])


def entry() -> NoReturn:
    """The program `embed`: run `main` and end the process, even if threads are still running."""
    from embed.cli.common import end

    end(main)
