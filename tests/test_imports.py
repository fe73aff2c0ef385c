"""Every module imports only from lower layers (the table in ARCHITECTURE.md)."""

import ast
from pathlib import Path

import pytest

import embed

ROOT = Path(embed.__file__).parent
# From the top down. Modules in the same layer do not import each other.
LAYERS = [
    {"cli"},
    {"ablation"},
    {"graph"},
    {"nodes", "exports"},
    {"evaluation"},
    {"runs"},
    {"inference", "training", "mining", "preparation"},
    {"checkpoints", "data", "fields"},
    {"objectives", "models"},
    {"rows", "tokenizers", "config", "distributed"},
    {"typing", "paths", "console"},
]
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
FORBIDDEN = {"inference": {"data", "training"}}  # although in a lower or the same layer
DATA_LIBRARIES = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin", "datasets", "apache_beam"}
# mteb hands over its data as `datasets`; without mteb the rest of evaluation works.
MTEB_LIBRARIES = {"mteb", "datasets"}

FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(source: str):
    """(line, dotted name) of every import in a module and its functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(file: str, source: str):
    """The forbidden imports of a file of embed/."""
    module = file.split("/")[0].removesuffix(".py")
    for line, name in imported(source):
        package, *inner = name.split(".")
        if package in MTEB_LIBRARIES and file.startswith("evaluation/mteb_"):
            continue
        if package == "mteb":
            yield f"{file}:{line} imports mteb: only evaluation/mteb_*.py may"
        if package in DATA_LIBRARIES and module != "preparation":
            yield f"{file}:{line} imports {package}: only preparation may"
        if package == "embed" and inner:
            other = inner[0]
            if other != module and (LAYER[other] <= LAYER[module] or other in FORBIDDEN.get(module, ())):
                yield f"{file}:{line} imports embed.{other}: {module} may not"


@pytest.mark.parametrize("file", FILES)
def test_imports_run_downward_only(file):
    assert list(violations(file, (ROOT / file).read_text())) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/pooling.py", "from embed.objectives import contrastive"),
        ("data/store.py", "import embed.checkpoints.merge"),
        ("training/loop.py", "def f():\n    from embed import runs"),
        ("inference/encoder.py", "from embed.data.store import Store"),
        ("rows.py", "import embed.models"),
        ("data/loader.py", "import tensorflow as tf"),
        ("evaluation/sets.py", "import datasets"),
        ("evaluation/models.py", "def f():\n    import mteb"),
        ("training/stages.py", "from seqio import preprocessors"),
    ],
)
def test_a_forbidden_import_is_reported(file, source):
    assert len(list(violations(file, source))) == 1
