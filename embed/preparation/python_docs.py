"""`python_docs`: documented Python source of the installed packages, as a TFDS dataset.

Two configs with splits train, development and test, which are divided by *package*:

    functions   a documented function: names, docstring, source without the docstring
    modules     a module: source text, and its classes and functions in source order, documented or not

The version ends in a fingerprint of the options and of name==version of every package, so that a stale build is never
reused. `info.metadata` lists the packages and counts the dropped items by reason.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from embed.preparation import hygiene, python_sources

# Increment when the extracted content changes.
FORMAT = 1

MIN_SUMMARY_WORDS = 3
MAX_MODULE_CHARACTERS = 40_000  # of the text; members are not truncated


@dataclasses.dataclass
class Corpus:
    """Clean {split: examples} of each config, and {reason: number of dropped items}."""

    functions: dict[str, list[dict]]
    modules: dict[str, list[dict]]
    dropped: dict[str, int]
    contaminated: set[str]  # digests of held-out functions inside training texts; no evaluation uses these functions

    def clear(self) -> None:
        """Removes all examples. Builds that read them in other threads end."""
        for examples in [*self.functions.values(), *self.modules.values()]:
            examples.clear()


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
        unique, dropped[f"{split}: duplicate modules"] = hygiene.deduplicate(unique, lambda m: m["digest"])
        functions = [{"module": m["module"], **function} for m in unique for function in m["functions"]]
        documented = [f for f in functions if len(f["summary"].split()) >= MIN_SUMMARY_WORDS]
        dropped[f"{split}: functions without a summary"] = len(functions) - len(documented)
        functions = documented
        if split == "train":
            unique, dropped["train: modules with held-out text"] = hygiene.decontaminate(
                unique, lambda m: m["digests"], held_out
            )
            functions, dropped["train: held-out functions"] = hygiene.decontaminate(
                functions, lambda f: [f["digest"]], held_out
            )
        functions, dropped[f"{split}: duplicate functions"] = hygiene.deduplicate(functions, lambda f: f["digest"])
        if split != "train":
            functions, dropped[f"{split}: functions of the other held-out split"] = hygiene.decontaminate(
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
    short = {f["digest"] for f in held_out if len(hygiene.normalize(f["code"])) < hygiene.WINDOW}
    rest = [f for f in held_out if f["digest"] not in short]
    inside = {rest[i]["digest"] for i in hygiene.contained([f["code"] for f in rest], training.values())}
    corpus.contaminated |= short | inside
    corpus.dropped["held-out functions too short to tell whether training has them"] = len(short)
    corpus.dropped["held-out functions found inside training text"] = len(inside)
    for split in ("test", "development"):
        corpus.functions[split] = [f for f in corpus.functions[split] if f["digest"] not in corpus.contaminated]


_FEATURES = {
    "functions": {
        **dict.fromkeys(("module", "owner", "name", "arguments", "docstring", "code"), tfds.features.Text()),
        "body": tfds.features.Scalar(np.int64),
    },
    "modules": {
        **dict.fromkeys(("module", "summary", "text"), tfds.features.Text()),
        "members": tfds.features.Sequence(
            {
                **dict.fromkeys(("kind", "owner", "name", "arguments", "summary", "code"), tfds.features.Text()),
                "body": tfds.features.Scalar(np.int64),
            }
        ),
    },
}


def module_example(record: dict) -> dict:
    """A module dictionary of `python_sources` as an example of the `modules` config, with members in source order."""
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
        members.append({"kind": kind, **{name: item[name] for name in _MEMBER}})
    return {
        "module": record["module"],
        "summary": record["summary"],
        "text": record["text"][:MAX_MODULE_CHARACTERS],
        "members": members,
    }


_MEMBER = ("owner", "name", "arguments", "summary", "code", "body")


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `python_docs`. `corpus`: the clean records of `packages`; by default the builder reads them."""

    name = "python_docs"
    # Without it, TFDS 4.9.10 needs importlib_resources, which it does not install.
    code_path = epath.Path(__file__)
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="functions", description="Functions and their docstrings."),
        tfds.core.BuilderConfig(name="modules", description="Modules and their members."),
    ]

    def __init__(
        self,
        *,
        packages: python_sources.Packages = python_sources.PACKAGES,
        limit: int | None = None,
        corpus: "Corpus | None" = None,
        **kwargs,
    ):
        self._packages = packages.versions()
        self._sources = packages
        self._limit = limit
        self._corpus = corpus
        content = json.dumps([FORMAT, self._packages, dataclasses.asdict(packages), limit])
        fingerprint = int(hashlib.blake2b(content.encode(), digest_size=4).hexdigest(), 16)
        self.VERSION = tfds.core.Version(f"1.{FORMAT}.{fingerprint}")
        super().__init__(**kwargs)

    def _log_download_bytes(self) -> None:
        """Logs nothing: there is no download, and `prepare` reports its own progress."""

    def _log_download_done(self) -> None:
        pass

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documented Python source of installed packages, split by package.",
            features=tfds.features.FeaturesDict(_FEATURES[self.builder_config.name]),
            metadata=tfds.core.MetadataDict(packages=self._packages),
            disable_shuffling=True,  # examples are already in order of content
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        if self._corpus is None:
            with python_sources.Reading(self._sources) as reading:
                self._corpus = clean(reading.result(), self._limit)
        self.info.metadata["dropped"] = self._corpus.dropped
        splits = getattr(self._corpus, self.builder_config.name)
        return {split: self._generate_examples(splits[split]) for split in python_sources.SPLITS}

    def _generate_examples(self, records: list[dict]) -> Iterator[tuple[int, dict]]:
        for index, record in enumerate(records):
            if self.builder_config.name == "modules":
                yield index, module_example(record)
            else:
                yield index, {name: record[name] for name in _FEATURES["functions"]}
