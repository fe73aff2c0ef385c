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

from embed.config import brief

FILE = Path(__file__).parent / "published.csv"
# The largest difference that is no error. Other kernels and orders of summation swap neighbors in a ranking.
TOLERANCE = 0.002


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
        known = sorted({score.model for score in every if score.model.startswith("perplexity-ai/")})
        raise ValueError(
            f"no published scores of {model!r}: there are those of {brief(known)}, and of reference models"
        )
    return found


def tasks_of(scores: Sequence[Score]) -> list[str]:
    """The tasks that published scores are of, without benchmarks, whose scores are means over tasks."""
    return sorted({score.task for score in scores if score.split or score.subset == "default"})


def compare(scores: Sequence[Score], records: Sequence[Mapping]) -> list[Comparison]:
    """The published scores of the tasks that `records` are of, each with ours in the same precision at full size."""
    ours: dict[tuple, dict[str, float]] = {}
    for record in records:
        for form, values in record["values"].items():
            key = record["task"], record["split"], form
            ours.setdefault(key, {})[record["subset"]] = values.get(record["main"])
    by_task = {(task, form): found for (task, _, form), found in ours.items()}

    def own(score: Score) -> float | None:
        if score.split:
            found = ours.get((score.task, score.split, score.precision), {})
        else:  # the paper does not name splits
            found = by_task.get((score.task, score.precision), {})
        if not (mean := re.fullmatch(r"\(mean of (\d+)\)", score.subset)):
            return found.get(score.subset)
        return float(np.mean(list(found.values()))) if len(found) == int(mean[1]) else None

    tasks = {record["task"] for record in records}
    return [Comparison(score, own(score)) for score in scores if score.task in tasks]
