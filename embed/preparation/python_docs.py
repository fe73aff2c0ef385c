"""`python_docs`: documented Python source of the installed packages, as a source with two kinds of records.

    functions   a documented function: names, docstring, source without the docstring
    modules     a module: source text, and its classes and functions in source order, documented or not

Splits train, development and test are divided by *package*. `build` reads the packages, cleans the records and writes
them as JSON lines, in order of content, so that any prefix is a fair sample of all packages.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Set

from embed import paths
from embed.preparation import copies, numbers
from embed.preparation.python_sources import PACKAGES, SPLITS, Packages, Reading
from embed.preparation.sources import Files, Row, Shard, Source

MIN_SUMMARY_WORDS = 3
MAX_MODULE_CHARACTERS = 40_000  # of the text; members are not truncated
FIELDS = {
    "functions": ("module", "owner", "name", "arguments", "docstring", "code", "body"),
    "modules": ("module", "summary", "text", "members"),
}
RECORDS = tuple(FIELDS)
REPORT = "report.json"
MEMBER = ("owner", "name", "arguments", "summary", "code", "body")
PARTS = 8  # files per kind and split, so that several processes read them


@dataclasses.dataclass
class Corpus:
    """Clean {split: examples} of each config, and {reason: number of dropped items}."""

    functions: dict[str, list[dict]]
    modules: dict[str, list[dict]]
    dropped: dict[str, int]
    contaminated: set[str]  # digests of held-out functions inside training texts; no evaluation uses these functions


def clean(modules: dict[str, list[dict]], limit: int | None = None) -> Corpus:
    """Drops duplicates, drops held-out content from training, and counts both.

    Training loses every module that contains the text of a held-out function, even an undocumented or nested one, and
    every function equal to a held-out function. `limit`: at most that many examples per config and split.
    """
    dropped: dict[str, int] = {}
    held_out = {d for split in ("development", "test") for module in modules[split] for d in module["digests"]}
    result = Corpus({}, {}, dropped, set())
    seen_functions: set[str] = set()
    for split in ("test", "development", "train"):
        unique = modules[split]
        if not unique:
            raise ValueError(f"split {split!r} of python_docs is empty: none of its packages is installed")
        unique, dropped[f"{split}: duplicate modules"] = copies.deduplicate(unique, lambda m: m["digest"])
        functions = [{"module": m["module"], **function} for m in unique for function in m["functions"]]
        documented = [f for f in functions if len(f["summary"].split()) >= MIN_SUMMARY_WORDS]
        dropped[f"{split}: functions without a summary"] = len(functions) - len(documented)
        functions = documented
        if split == "train":
            unique, dropped["train: modules with held-out text"] = copies.decontaminate(
                unique, lambda m: m["digests"], held_out
            )
            functions, dropped["train: held-out functions"] = copies.decontaminate(
                functions, lambda f: [f["digest"]], held_out
            )
        functions, dropped[f"{split}: duplicate functions"] = copies.deduplicate(functions, lambda f: f["digest"])
        if split != "train":
            functions, dropped[f"{split}: functions of the other held-out split"] = copies.decontaminate(
                functions, lambda f: [f["digest"]], seen_functions
            )
            seen_functions |= {f["digest"] for f in functions}
        # In order of content, any prefix is a fair sample of all packages.
        result.functions[split] = sorted(functions, key=lambda f: f["digest"])[:limit]
        result.modules[split] = sorted(unique, key=lambda m: m["digest"])[:limit]
    _drop_contained(result)
    return result


def _drop_contained(corpus: Corpus) -> None:
    """Drops held-out functions whose text is part of a training function, or too short to tell."""
    training = {f["digest"]: f["code"] for module in corpus.modules["train"] for f in module["functions"]}
    training |= {f["digest"]: f["code"] for f in corpus.functions["train"]}
    held_out = [f for split in ("test", "development") for f in corpus.functions[split]]
    short = {f["digest"] for f in held_out if len(copies.normalize(f["code"])) < copies.WINDOW}
    rest = [f for f in held_out if f["digest"] not in short]
    inside = {rest[i]["digest"] for i in copies.contained([f["code"] for f in rest], training.values())}
    corpus.contaminated |= short | inside
    corpus.dropped["held-out functions too short to tell whether training has them"] = len(short)
    corpus.dropped["held-out functions found inside training text"] = len(inside)
    for split in ("test", "development"):
        corpus.functions[split] = [f for f in corpus.functions[split] if f["digest"] not in corpus.contaminated]


def module_record(record: dict, contaminated: Set[str] = frozenset()) -> dict:
    """A module dictionary of `python_sources` as a record, with members in source order.

    A member whose digest is in `contaminated` says so: training contains its text, and it is no evaluation query.
    """
    members = []
    for kind, index in record["order"]:
        if kind == "class":
            item = record["classes"][index]
            item = {
                "owner": item["name"],
                "name": item["name"],
                "arguments": "",
                "summary": item["summary"],
                "code": item["header"],
                "body": len(item["header"]),
            }
        else:
            item = record["functions"][index]
        members.append({"kind": kind, **{name: item[name] for name in MEMBER}})
        if item.get("digest") in contaminated:
            members[-1]["contaminated"] = True
    return {
        "module": record["module"],
        "summary": record["summary"],
        "text": record["text"][:MAX_MODULE_CHARACTERS],
        "members": members,
    }


@dataclasses.dataclass(frozen=True)
class PythonDocs(Source):
    """Records of one split. `train`, `development` and `test` are import packages, searched in `path` or sys.path."""

    records: str
    split: str = "train"
    train: tuple[str, ...] = PACKAGES.train
    development: tuple[str, ...] = PACKAGES.development
    test: tuple[str, ...] = PACKAGES.test
    path: tuple[str, ...] = ()
    limit: int = 0  # files per split, and records of a kind; 0 = all

    def __post_init__(self):
        numbers.check(self, "python_docs", {"limit": 0})
        for name, value, allowed in (("records", self.records, RECORDS), ("split", self.split, SPLITS)):
            if value not in allowed:
                raise ValueError(f"python_docs.{name}={value!r} must be one of {', '.join(allowed)}")

    @property
    def packages(self) -> Packages:
        return Packages(*(tuple(getattr(self, name)) for name in (*SPLITS, "path")))

    def limited(self, limit: int) -> "PythonDocs":
        return dataclasses.replace(self, limit=limit)

    def build(self, scratch) -> None:
        """Reads the packages and writes the records of all splits to `scratch`, once."""
        content = json.dumps([_versions(self.packages), dataclasses.asdict(self.packages), self.limit])
        folder = paths.path(scratch) / f"python_docs-{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"
        if not (folder / REPORT).exists():
            with Reading(self.packages, limit=self.limit or None) as reading:
                corpus = clean(reading.result(), self.limit or None)
            for records in RECORDS:
                for split in SPLITS:
                    for part, lines in enumerate(_lines(corpus, records, split)):
                        paths.write(folder / f"{records}-{split}-{part}.jsonl", lines)
            report = {
                "packages": _versions(self.packages),
                "packages not installed": self.packages.missing(),
                "unreadable files": reading.unreadable,
                "dropped": corpus.dropped,
            }
            paths.write_json(folder / REPORT, report)
        object.__setattr__(self, "_folder", folder)

    def shards(self) -> list[Shard]:
        return Files(paths=f"{self._folder}/{self.records}-{self.split}-*.jsonl").shards()

    def read(self, shard: Shard) -> Iterator[Row]:
        return Files(paths=shard.path).read(shard)

    def report(self) -> dict:
        """Packages, unreadable files, and what was dropped by reason; after `build`."""
        return paths.read_json(self._folder / REPORT)

    def describe(self) -> dict:
        folders = self.packages.folders()[self.split]
        return {"rows": None, "columns": sorted(FIELDS[self.records]), "license": None, "files": len(folders)}

    def identity(self) -> dict:
        return {"packages": _versions(self.packages)}

    def sample(self, count: int = 10) -> list[Row]:
        """The first records of the smallest packages, without `build`."""
        with tempfile.TemporaryDirectory() as scratch:
            few = dataclasses.replace(self, limit=count)
            few.build(scratch)
            return list(itertools.islice(itertools.chain.from_iterable(map(few.read, few.shards())), count))


@functools.lru_cache
def _versions(packages: Packages) -> dict[str, str]:
    """`Packages.versions`, which reads the metadata of everything that is installed."""
    return packages.versions()


def _lines(corpus: Corpus, records: str, split: str) -> Iterator[str]:
    """The content of the files of a kind of records and a split."""
    rows = getattr(corpus, records)[split]
    if records == "modules":
        rows = [module_record(row, corpus.contaminated) for row in rows]
    else:
        rows = [{name: row[name] for name in FIELDS[records]} for row in rows]
    for part in range(PARTS):
        yield "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows[part::PARTS])
