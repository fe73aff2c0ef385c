"""Published scores (published.csv) beside ours.

published.csv has {model, revision, task, split, subset, precision, value, source}. A source "mteb VERSION" is a result
file of that version in the repository embeddings-benchmark/results at commit f4cc6c8 (CC0); "Table N" is a table of the
paper (arXiv 2602.11151). The subset "(mean of N)" is the mean over the N subsets of a task, "(mean)" that over a
benchmark.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).parent / "published.csv"
# The largest difference that is no error. Other kernels and orders of summation swap neighbors in a ranking.
TOLERANCE = 0.002


# The tasks of benchmarks that the paper states means of. ToolRetrieval is one task, with a subset per set.
_CODE = (
    "AppsRetrieval CodeEditSearchRetrieval CodeFeedbackMT CodeFeedbackST CodeSearchNetCCRetrieval "
    "CodeSearchNetRetrieval CodeTransOceanContest CodeTransOceanDL CosQA COIRCodeSearchNetRetrieval StackOverflowQA "
    "SyntheticText2SQL"
)
_MULTILINGUAL = (
    "StackOverflowQA TwitterHjerneRetrieval AILAStatutes ArguAna HagridRetrieval LegalBenchCorporateLobbying "
    "LEMBPasskeyRetrieval SCIDOCS SpartQA TempReasonL1 TRECCOVID WinoGrande BelebeleRetrieval MLQARetrieval "
    "StatcanDialogueDatasetRetrieval WikipediaRetrievalMultilingual CovidRetrieval MIRACLRetrievalHardNegatives"
)
_CONTEB = (
    "ConTEBCovidQA ConTEBESGReports ConTEBFootball ConTEBGeography ConTEBInsurance ConTEBMLDR ConTEBNarrativeQA "
    "ConTEBSQuAD"
)
BENCHMARKS = {
    "MTEB(Code, v1)": _CODE.split(),
    "MTEB(Multilingual, v2) Retrieval": _MULTILINGUAL.split(),
    "ConTEB": _CONTEB.split(),
    "ToolRetrieval": ["ToolRetrieval"],
}


class Score(NamedTuple):
    """A published score in 0..1."""

    model: str
    revision: str
    task: str
    split: str
    subset: str
    precision: str
    value: float
    source: str


class Comparison(NamedTuple):
    """A published score and ours; None if ours is missing."""

    published: Score
    ours: float | None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours - self.published.value


def read() -> list[Score]:
    """All published scores."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [Score(**{**row, "value": float(row["value"])}) for row in csv.DictReader(file)]


def scores_of(model: str) -> list[Score]:
    """The published scores of a model, named with or without its owner. ValueError for an unknown name."""
    every = read()
    found = [score for score in every if model in (score.model, score.model.rpartition("/")[2])]
    if not found:
        raise ValueError(
            f"no published scores of {model!r}: there are those of {', '.join(sorted({s.model for s in every}))}"
        )
    return found


def tasks_of(scores: Sequence[Score]) -> list[str]:
    """The tasks that published scores are of, with those of benchmarks whose mean is published."""
    named = {score.task for score in scores if score.split or score.subset == "default"}
    means = {task for score in scores if score.subset == "(mean)" for task in BENCHMARKS.get(score.task, ())}
    return sorted(named | means)


def compare(scores: Sequence[Score], records: Sequence[Mapping]) -> list[Comparison]:
    """The published scores of what `records` are of, each with ours in the same precision at full size.

    The mean over a benchmark is there if all its tasks are: the mean over tasks of the mean over subsets and splits.
    """
    ours: dict[tuple, dict[str, float]] = {}
    for record in records:
        for form, values in record["values"].items():
            key = record["task"], record["split"], form
            ours.setdefault(key, {})[record["subset"]] = values.get(record["main"])
    tasks = {record["task"] for record in records}

    def of_task(task: str, precision: str) -> list[float]:
        return [
            v for (name, _, form), found in ours.items() if (name, form) == (task, precision) for v in found.values()
        ]

    def own(score: Score) -> float | None:
        if score.subset == "(mean)":
            means = [of_task(task, score.precision) for task in BENCHMARKS[score.task]]
            return float(np.mean([np.mean(values) for values in means])) if all(means) else None
        if not score.split:  # the paper does not name splits
            found = of_task(score.task, score.precision)
            return found[0] if len(found) == 1 else None
        found = ours.get((score.task, score.split, score.precision), {})
        if not (mean := re.fullmatch(r"\(mean of (\d+)\)", score.subset)):
            return found.get(score.subset)
        return float(np.mean(list(found.values()))) if len(found) == int(mean[1]) else None

    def is_evaluated(score: Score) -> bool:
        if score.subset == "(mean)":
            return score.task in BENCHMARKS and set(BENCHMARKS[score.task]) <= tasks
        return score.task in tasks

    return [Comparison(score, own(score)) for score in scores if is_evaluated(score)]
