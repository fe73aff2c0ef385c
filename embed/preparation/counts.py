"""What became of the rows and examples of a task, by reason."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

BAD, EMPTY, PATTERN, SHORT, LONG = "bad rows", "empty texts", "pattern", "shorter than min_characters", "too long"
LANGUAGE, SCORE, HELD_OUT, NOT_HELD_OUT = "other languages", "score below min_score", "held out", "not held out"
UNUSED, UNREAD = "rows without an example", "beyond max_total_characters"
NO_ANSWER, SEVERAL = "queries without their answer in the text", "queries of several chunks"
JOINED = "chunks of documents of task.group_sizes"
EQUAL, UNMAPPED = "pairs with equal sides", "rows with a label that is not mapped"
EARLY = 10_000  # rows after which a shard of which more than MOST_BAD is bad ends the run, and not only its task
MOST_BAD = 0.5
MAX_EXAMPLES_OF_ERRORS = 10  # bad rows that a report names


class BadRowsError(ValueError):
    """More rows of an input are bad than the task tolerates."""


@dataclasses.dataclass
class Counts:
    """What became of the rows and examples of a shard.

    read = bad + without an example + beyond max_total_characters + used (of groups: + filtered by reason);
    made = kept + dropped by reason.
    """

    rows_read: int = 0
    rows: Counter = dataclasses.field(default_factory=Counter)  # {what became of them: number}
    made: int = 0  # text examples
    examples: int = 0  # of tokens: a long document becomes several
    dropped: Counter = dataclasses.field(default_factory=Counter)  # {reason: text examples}
    # {column: texts cut to their length}, and {what examples lack: number}
    cut: Counter = dataclasses.field(default_factory=Counter)
    errors: list = dataclasses.field(default_factory=list)  # "location: reason" of the first bad rows

    def bad(self, location: str, reason: str, rows: int = 1) -> None:
        self.rows[BAD] += rows
        if len(self.errors) < MAX_EXAMPLES_OF_ERRORS:
            self.errors.append(f"{location}: {reason}")

    def check(self, max_bad: float) -> None:
        """BadRowsError if more than the fraction `max_bad` of the rows is bad."""
        if self.rows[BAD] > max_bad * self.rows_read:
            raise BadRowsError(
                f"{self.rows[BAD]:,} of {self.rows_read:,} rows are bad, more than task.max_bad={max_bad:g} allows: "
                + "; ".join(self.errors[:3])
            )

    def check_made(self) -> None:
        """ValueError if the rows gave no example, which says why."""
        if not self.made - self.dropped.total():
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in (self.rows + self.dropped).items() if n)
            raise ValueError("; ".join([f"{self.rows_read:,} rows give no example ({reasons})", *self.errors[:1]]))

    def add(self, other: "Counts") -> None:
        self.rows_read += other.rows_read
        self.made += other.made
        self.examples += other.examples
        for name in ("rows", "dropped", "cut"):
            getattr(self, name).update(getattr(other, name))
        self.errors = (self.errors + other.errors)[:MAX_EXAMPLES_OF_ERRORS]

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), **{n: dict(getattr(self, n)) for n in ("rows", "dropped", "cut")}}

    @classmethod
    def from_json(cls, value: Mapping) -> "Counts":
        return cls(**{**value, **{name: Counter(value[name]) for name in ("rows", "dropped", "cut")}})
