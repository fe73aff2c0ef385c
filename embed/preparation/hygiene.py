"""What a task drops besides exact duplicates.

`Hygiene` says which examples are dropped: those that have a text of an evaluation set (`contamination`), that are in
another language than stated (`languages`), and near duplicates (`near_duplicates`).
"""

import dataclasses
import fnmatch
import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embed import paths
from embed.preparation import contamination, languages, near_duplicates, numbers
from embed.preparation.counts import Counts
from embed.preparation.sources import Retrieval, Source
from embed.preparation.tasks import Task, all_texts

CONTAMINATED, OTHER_LANGUAGE = "with a text of an evaluation set", "identified as another language"
LIBRARIES = {"near_duplicates": ("rensa",), "language": ("langcodes", "py3langid")}
MAX_LOCATED, MAX_LOCATIONS = 200, 3  # evaluation texts of a shard that are located, and locations of each


@dataclasses.dataclass(frozen=True)
class Hygiene:
    """What is dropped of a task. Everything is off by default. It does not apply to tasks that only seqio knows.

    near_duplicates: the similarity (0 to 1) of near duplicates, such as 0.75; 0 = off. See `near_duplicates`.
    compare_with: a name; all tasks with the same name are searched together. "" = a task is compared with itself only.
    evaluation_sets: names or patterns of evaluation.sets ("*": all), folders in the layout of BEIR or MTEB, and sources
        that have an evaluation set. Training examples with their texts are dropped.
    evaluation_texts: which of their texts: queries, corpus or both.
    overlap: the fraction of an evaluation text that an example must have; 0 = any 48 letters in a row.
    language: whether the language of texts is identified, and examples of a task that are not in `task.language` or
        `task.languages` are dropped. Without a stated language they are only counted.
    """

    near_duplicates: float = 0.0
    compare_with: str = ""
    evaluation_sets: Sequence[str | Source] = ()
    evaluation_texts: Sequence[str] = contamination.PARTS
    overlap: float = 0.5
    language: bool = False

    def __post_init__(self):
        numbers.check(self, "hygiene", {}, ("near_duplicates", "overlap"))
        for name, modules in LIBRARIES.items():
            missing = [module for module in modules if getattr(self, name) and not importlib.util.find_spec(module)]
            if missing:
                raise ValueError(f"hygiene.{name} needs {', '.join(missing)}: pip install -e '.[hygiene]'")
        if isinstance(self.evaluation_sets, str):
            raise ValueError(f"hygiene.evaluation_sets must be a list, got {self.evaluation_sets!r}")
        if unknown := set(self.evaluation_texts) - set(contamination.PARTS):
            raise ValueError(f"hygiene.evaluation_texts: {unknown.pop()!r} must be one of queries, corpus")

    @property
    def index(self) -> str:
        """The name of the index of its evaluation sets, or "" without any."""
        content = repr((tuple(self.evaluation_sets), tuple(self.evaluation_texts)))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest() if self.evaluation_sets else ""

    @property
    def is_on(self) -> bool:
        return bool(self.near_duplicates or self.evaluation_sets or self.language)


@dataclasses.dataclass
class Findings:
    """What was found in the examples of a shard."""

    languages: Counter = dataclasses.field(default_factory=Counter)  # {code: examples}
    other: Counter = dataclasses.field(default_factory=Counter)  # of these, those dropped
    hits: Counter = dataclasses.field(default_factory=Counter)  # {number of an evaluation text: examples}
    locations: dict = dataclasses.field(default_factory=dict)  # {number of an evaluation text: [its first locations]}

    def add(self, other: "Findings") -> None:
        for name in ("languages", "other", "hits"):
            getattr(self, name).update(getattr(other, name))
        for owner, located in other.locations.items():
            self.locations[owner] = (self.locations.get(owner, []) + located)[:MAX_LOCATIONS]

    def to_json(self) -> dict:
        counters = {name: dict(getattr(self, name)) for name in ("languages", "other", "hits")}
        return counters | {"locations": self.locations}

    @classmethod
    def from_json(cls, value: Mapping) -> "Findings":
        return cls(
            Counter(value["languages"]),
            Counter(value["other"]),
            Counter({int(number): count for number, count in value["hits"].items()}),
            {int(number): located for number, located in value["locations"].items()},
        )


def build_index(
    hygiene: Hygiene, target, sets: Mapping[str, object], scratch, opened: Mapping[str, Source] | None = None
) -> None:
    """Writes the index of the evaluation sets to the folder `target`, once.

    sets: {name: its folder}. opened: {name: source} of others, to read these instead of opening them again.
    """
    contamination.build(target, _texts(hygiene, sets, scratch, opened or {}))


def _texts(hygiene: Hygiene, sets: Mapping, scratch, opened: Mapping[str, Source]) -> Iterator[tuple]:
    """(set, part, id, text) of all evaluation texts."""
    for name, source in evaluation_sources(hygiene, sets).items():
        source = opened.get(name, source)
        if not isinstance(source, Retrieval):  # which is read without
            source.build(scratch)
        corpus, queries, _ = source.evaluation_set()
        yield from contamination.set_texts(name, corpus, queries, hygiene.evaluation_texts)


def evaluation_sources(hygiene: Hygiene, sets: Mapping[str, object], *, missing_ok: bool = False) -> dict[str, Source]:
    """{name: source} of the evaluation sets. ValueError for what is neither a set of `sets`, a folder nor a source.

    missing_ok: folders need not be there.
    """
    result: dict[str, Source] = {}
    for item in hygiene.evaluation_sets:
        if isinstance(item, str):
            if names := fnmatch.filter(sets, item):
                result |= {name: Retrieval(path=os.fspath(sets[name])) for name in names}
            elif missing_ok or paths.path(item).is_dir():
                result[item] = Retrieval(path=item)
            else:
                raise ValueError(
                    f"hygiene.evaluation_sets: {item!r} is neither a folder nor one of {', '.join(sets) or 'no sets'}"
                )
        elif hasattr(item, "evaluation_set"):
            about = [getattr(item, name, "") for name in ("path", "id", "config", "split")]
            result[" ".join(filter(None, about))] = item
        else:
            raise ValueError(f"hygiene.evaluation_sets: {item!r:.60} has no evaluation set: expected @retrieval()")
    return result


def screen(
    examples: list[dict],
    task: Task,
    hygiene: Hygiene,
    index: contamination.Index | None,
    counts: Counts,
    findings: Findings,
) -> list[dict]:
    """The text examples of a batch that stay; `counts` and `findings` are updated.

    index: of the evaluation sets, if there are any. With `near_duplicates`, an example that can be compared gets
    "bands".
    """
    if index:
        texts = [(text, i) for i, example in enumerate(examples) for text in all_texts(example)]
        found = index.find([text for text, _ in texts], np.array([i for _, i in texts]), hygiene.overlap)
        for i, owner in found:
            findings.hits[owner] += 1
            if owner in findings.locations or len(findings.locations) < MAX_LOCATED:
                located = findings.locations.setdefault(owner, [])
                located.extend([examples[i]["location"]] if len(located) < MAX_LOCATIONS else ())
        dropped = {i for i, _ in found}
        counts.dropped[CONTAMINATED] += len(dropped)
        examples = [example for i, example in enumerate(examples) if i not in dropped]
    if hygiene.language:
        allowed = languages.accepted((task.language,) if task.language else tuple(task.languages))
        kept = []
        for example in examples:
            language = languages.identify(near_duplicates.sides(example)[-1])
            findings.languages[language] += 1
            if not allowed or language in allowed:
                kept.append(example)
            else:
                findings.other[language] += 1
        counts.dropped[OTHER_LANGUAGE] += len(examples) - len(kept)
        examples = kept
    if hygiene.near_duplicates and examples:
        bands, complete = near_duplicates.bands(examples, hygiene.near_duplicates)
        for example, values, known in zip(examples, bands, complete):
            if known:
                example["bands"] = values
    return examples
