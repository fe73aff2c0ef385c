"""Python source trees -> functions, classes and modules, with `ast`.

Worker processes run this file, so it imports only the standard library. It reads, parses and walks a source file once
and returns plain dictionaries:

    module    package, module (dotted name), text, digest, summary (first paragraph of the docstring), functions,
              classes, order: [["class" | "function", index], …] in source order,
              digests: of the normalized content of all its functions, including nested ones, without docstrings
    function  name, owner (its class, dotted if nested, or ""), arguments (names), docstring, summary,
              code (source without the docstring, dedented), body (offset of the body in `code`), digest
    class     name (dotted if nested), summary, header (decorators, class statement and fields)
"""

import ast
import dataclasses
import gc
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    "test tests testing testdata test_data site-packages __pycache__ _vendor _vendored vendored third_party "
    "idlelib lib2to3 turtledemo ensurepip".split()
)
# Tests and generated modules.
SKIPPED_FILES = re.compile(
    r"(test_|gen_).*|.*(_test|_tests|_test_utils|_pb2|_pb2_grpc|_gen|_generated)\.py|conftest\.py"
)
MAX_FILE_BYTES = 1_000_000
SPLITS = ("train", "development", "test")


@dataclasses.dataclass(frozen=True)
class Packages:
    """The import packages of each split. `path`: folders to search for them (empty: sys.path)."""

    train: tuple[str, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]
    path: tuple[str, ...] = ()

    def folders(self) -> dict[str, dict[str, Path]]:
        """{split: {package: folder}} of the installed packages."""
        path = self.path or tuple(entry for entry in sys.path if entry)
        result: dict[str, dict[str, Path]] = {}
        for split in SPLITS:
            result[split] = {}
            for package in getattr(self, split):
                if package == "stdlib" and not self.path:
                    result[split][package] = Path(sysconfig.get_path("stdlib"))
                    continue
                for entry in path:
                    if (Path(entry) / package).is_dir():
                        result[split][package] = Path(entry) / package
                        break
        return result

    def versions(self) -> dict[str, str]:
        """{package: "name==version" of its distributions} for the installed packages."""
        installed = [package for packages in self.folders().values() for package in packages]
        if self.path:
            return {package: f"{package}==0" for package in installed}
        distributions = importlib.metadata.packages_distributions()
        versions = {}
        for package in installed:
            if package == "stdlib":
                versions[package] = "python==" + ".".join(map(str, sys.version_info[:3]))
            else:
                names = sorted(set(distributions.get(package, ())))
                versions[package] = ",".join(f"{n}=={importlib.metadata.version(n)}" for n in names) or f"{package}==0"
        return versions

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        folders = self.folders()
        return [p for split in SPLITS for p in getattr(self, split) if p not in folders[split]]


def files(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    """(dotted module name, path) of the package's sources, sorted. Skips tests, vendored and generated code."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("test_"))
        for name in sorted(names):
            if name.endswith(".py") and not SKIPPED_FILES.fullmatch(name):
                parts = list(Path(parent, name[:-3]).relative_to(folder).parts)
                if parts[-1] == "__init__":
                    parts.pop()
                if package != "stdlib":
                    parts.insert(0, package)
                yield ".".join(parts), os.path.join(parent, name)


def summary(docstring: str) -> str:
    """The first paragraph on one line, up to the first section or example."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return " ".join(_SECTION.split(paragraph, maxsplit=1)[0].split())


_TITLES = (
    "Args|Arguments|Parameters|Params|Attributes|Returns|Return|Yields|Raises|Example|Examples|Notes?|See Also|"
    "References"
)
_SECTION = re.compile(rf"^\s*(?:(?:{_TITLES})\s*(?::|\n\s*-{{3,}})|:\w+[^:\n]*:|>>>|\.\. |@param)", re.MULTILINE)
_PARAMETERS = re.compile(
    # Google: an indented block under the title. NumPy: up to the next underlined title.
    r"^(?:Args|Arguments|Parameters|Params):[ ]*\n((?:[ \t]+.*\n?|\s*\n)+)"
    r"|^Parameters\n-{3,}\n((?:(?!^.+\n-{3,}).*\n?)+)",
    re.MULTILINE,
)
_FIELD = re.compile(r"^:param[^:\n]*?(\w+):((?:.*\n?)(?:[ \t]+.*\n?)*)", re.MULTILINE)


def parameters(docstring: str) -> str:
    """The documentation of the parameters (Google, NumPy or Sphinx style) on one line, or ""."""
    if match := _PARAMETERS.search(docstring):
        return " ".join((match[1] or match[2]).split())
    return " ".join(f"{name}: {' '.join(text.split())}" for name, text in _FIELD.findall(docstring))


def description(docstring: str) -> str:
    """The prose between the first paragraph and the first section or example, on one line, or ""."""
    parts = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)
    return " ".join(_SECTION.split(parts[1], maxsplit=1)[0].split()) if len(parts) == 2 else ""


def digest(text: str) -> str:
    """Equals `copies.digest`, which a worker process does not import."""
    return hashlib.blake2b("".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_module(package: str, name: str, source: bytes) -> dict:
    """The module dictionary of one file. Raises SyntaxError, UnicodeDecodeError or ValueError (null bytes)."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    text = source.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    tree = ast.parse(text)
    reader = _Reader(text.split("\n"))
    reader.visit(tree.body, owner="")
    return {
        "package": package,
        "module": name,
        "text": text,
        "digest": digest(text),
        "summary": summary(ast.get_docstring(tree) or ""),
        "functions": reader.functions,
        "classes": reader.classes,
        "order": reader.order,
        "digests": sorted(reader.digests),
    }


class _Reader:
    """Walks the statements of one module. Skips its expressions, which hold most of the nodes."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        self.functions: list[dict] = []
        self.classes: list[dict] = []
        self.order: list[tuple[str, int]] = []
        self.digests: set[str] = set()

    def visit(self, statements: Iterable[ast.stmt], owner: str) -> None:
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if (function := self.function(node, owner)) is not None:
                    self.order.append(("function", len(self.functions)))
                    self.functions.append(function)
                self.nested(node.body)
            elif isinstance(node, ast.ClassDef):
                name = f"{owner}.{node.name}" if owner else node.name
                self.order.append(("class", len(self.classes)))
                self.classes.append(self.class_(node, name))
                self.visit(node.body, name)
            else:
                for block in _blocks(node):
                    self.visit(block, owner)

    def nested(self, statements: Iterable[ast.stmt]) -> None:
        """Adds the digests of functions inside a function. They are no examples, but the module contains them."""
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.digests.add(digest(self.code(node)[0]))
            for block in _blocks(node):
                self.nested(block)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> dict | None:
        code, body = self.code(node)
        content = digest(code)
        self.digests.add(content)
        docstring = ast.get_docstring(node) or ""
        if _trivial(node.body[1:] if docstring else node.body):
            return None
        arguments = node.args
        names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
        return {
            "name": node.name,
            "owner": owner,
            "arguments": " ".join(name for name in names if name not in ("self", "cls")),
            "docstring": docstring,
            "summary": summary(docstring),
            "code": code,
            "body": body,
            "digest": content,
        }

    def class_(self, node: ast.ClassDef, name: str) -> dict:
        fields = [s for s in node.body if isinstance(s, (ast.Assign, ast.AnnAssign))]
        end = max(_start(node.body[0]), node.lineno + 1)  # the first line after the class statement
        header = self.text(_start(node), end, node.col_offset)
        header += "".join("\n" + self.text(_start(s), s.end_lineno + 1, node.col_offset) for s in fields)
        return {"name": name, "summary": summary(ast.get_docstring(node) or ""), "header": header}

    def code(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, int]:
        """The function without its docstring, and the offset of its body."""
        start, end, indent = _start(node), node.end_lineno + 1, node.col_offset
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is None or not self.has_own_lines(first):
            body = _start(first)
            if body > node.lineno:
                head = self.text(start, body, indent)
                return head + "\n" + self.text(body, end, indent), len(head) + 1
            # def f(x): return x
            before = self.lines[body - 1].encode()[: first.col_offset].decode()
            head = "\n".join(filter(None, [self.text(start, body, indent), before[indent:]]))
            return self.text(start, end, indent), len(head)
        head = self.text(start, first.lineno, indent)
        return head + "\n" + self.text(first.end_lineno + 1, end, indent), len(head) + 1

    def has_own_lines(self, node: ast.stmt) -> bool:
        """Whether the statement shares its lines with no other statement."""
        before = self.lines[node.lineno - 1].encode()[: node.col_offset]
        after = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    def text(self, start: int, end: int, indent: int) -> str:
        """Lines start … end - 1 (from 1). Dedents lines that begin with `indent` columns of white space."""
        lines = self.lines[start - 1 : end - 1]
        if indent:
            lines = [line[indent:] if line[:indent].isspace() or not line.strip() else line for line in lines]
        return "\n".join(lines)


def _start(node: ast.stmt) -> int:
    """The first line of a statement, including decorators."""
    decorators = getattr(node, "decorator_list", None)
    return min(node.lineno, decorators[0].lineno) if decorators else node.lineno


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of statements directly inside a statement."""
    for field in ("body", "orelse", "finalbody"):
        if isinstance(block := getattr(node, field, None), list):
            yield block
    for handler in getattr(node, "handlers", ()):
        yield handler.body
    for case in getattr(node, "cases", ()):
        yield case.body


def _trivial(body: Sequence[ast.stmt]) -> bool:
    """Whether the body is empty or has only pass, constants and raise NotImplementedError."""
    for node in body:
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id in ("NotImplementedError", "NotImplemented"):
                continue
        return False
    return True


# Packages that this project installs. No held-out package is a copy of a training package.
PACKAGES = Packages(
    train=tuple(
        "stdlib tensorflow scipy jax matplotlib tensorflow_datasets numpy keras pyglove huggingface_hub IPython "
        "fontTools prompt_toolkit _pytest setuptools beartype pip tornado ipykernel PIL jupyter_client zmq "
        "mpl_toolkits psutil jedi packaging platformdirs nbformat click traitlets treescope h5py pyarrow pyparsing "
        "anyio optree urllib3 requests tensorflow_text pexpect simple_parsing markdown_it grpc attr opt_einsum gin "
        "tensorboardX ml_collections filelock parso tqdm dateutil xdist bm25s jupyter_core pluggy jsonschema "
        "nbclient".split()
    ),
    development=("absl", "clu", "etils", "fsspec", "rich"),
    test=("flax", "optax", "orbax", "seqio"),
)


class Reading:
    """Reads all files of the packages in worker processes, which start immediately. `result` waits for them.

    A context manager: at its end no worker runs, whatever ended the block.
    """

    def __init__(self, packages: Packages, *, limit: int | None = None, processes: int | None = None):
        """`limit`: at most that many files per split, chosen by the digest of their names."""
        self.packages = packages
        self.unreadable: dict[str, str] = {}
        work = []
        for split, folders in packages.folders().items():
            entries = [(package, *file) for package, folder in folders.items() for file in files(folder, package)]
            if limit is not None:
                entries = sorted(entries, key=lambda entry: digest(entry[1]))[:limit]
            work += [(os.path.getsize(path), split, package, module, path) for package, module, path in entries]
        work.sort(reverse=True)
        if processes is None:
            processes = min(
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8
            )
        self._folder = tempfile.TemporaryDirectory(prefix="python_docs_")
        self._workers = []
        # Not `multiprocessing`, which would import the caller's main module in each spawned process.
        for index in range(processes):
            share = [item[1:] for item in work[index::processes]]
            Path(self._folder.name, f"{index}.in").write_text(json.dumps(share), encoding="utf-8")
            command = [sys.executable, "-P", "-W", "ignore", __file__, self._folder.name, str(index)]
            self._workers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for worker in self._workers:
            worker.terminate()  # does nothing to one that has ended
            worker.wait()
        self._folder.cleanup()

    def result(self) -> dict[str, list[dict]]:
        """{split: modules sorted by name}. Sets `unreadable` to {path: reason} of the files that were left out."""
        modules: dict[str, list[dict]] = {split: [] for split in SPLITS}
        for index, worker in enumerate(self._workers):
            if worker.wait() != 0:
                raise RuntimeError(f"a worker that reads Python sources ended with exit code {worker.returncode}")
            with open(Path(self._folder.name, f"{index}.out"), "rb") as records:
                while record := pickle.load(records):
                    split, module = record
                    if "error" in module:
                        self.unreadable[module["path"]] = module["error"]
                    else:
                        modules[split].append(module)
        for split in SPLITS:
            modules[split].sort(key=lambda module: module["module"])
        return modules


def _work(folder: str, index: str) -> None:
    warnings.simplefilter("ignore")  # SyntaxWarnings of the sources
    gc.disable()  # syntax trees have no cycles, and scanning them doubles the time
    with open(Path(folder, f"{index}.out"), "wb") as out:
        for split, package, module, path in json.loads(Path(folder, f"{index}.in").read_text(encoding="utf-8")):
            try:
                source = Path(path).read_bytes()
                if b"def " not in source:
                    continue  # only imports and tables of constants
                if len(source) > MAX_FILE_BYTES:
                    raise ValueError(f"has {len(source)} bytes, at most {MAX_FILE_BYTES} are allowed")
                record = read_module(package, module, source)
            except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, LookupError) as error:
                record = {"path": path, "error": f"{type(error).__name__}: {error}"}
            pickle.dump((split, record), out)
        pickle.dump(None, out)


if __name__ == "__main__":
    _work(*sys.argv[1:])
