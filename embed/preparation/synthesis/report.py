"""Counts of a run, and its closing table."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import rich.table

from embed.preparation.synthesis.usage import Usage


@dataclasses.dataclass
class Report:
    """Counts of a run. `read` = `in_output` + `skipped_before` + `used` + `skipped` + `not_asked`, in documents."""

    read: int = 0
    in_output: int = 0
    skipped_before: int = 0
    used: int = 0
    not_asked: int = 0
    skipped: Counter = dataclasses.field(default_factory=Counter)
    cut: int = 0  # documents that the model saw only in part
    requested: int = 0  # queries, of the documents used
    written: int = 0
    lost: Counter = dataclasses.field(default_factory=Counter)  # requested = written + lost
    answers: int = 0
    prose: int = 0  # answers with text around the JSON object, which is ignored
    unusable: Counter = dataclasses.field(default_factory=Counter)  # answers, by reason
    failures: Counter = dataclasses.field(default_factory=Counter)  # requests without an answer
    usage: Usage = dataclasses.field(default_factory=Usage)
    earlier: Usage = dataclasses.field(default_factory=Usage)  # of earlier runs

    def table(self, price_in: float | None = None, price_out: float | None = None) -> rich.table.Table:
        """The closing table; prices are per million tokens."""
        table = rich.table.Table(title="Synthetic queries", title_justify="left")
        table.add_column("")
        table.add_column("count", justify="right")

        def rows(name: str, count: int, parts: Mapping[str, int], always: Sequence[str] = ()) -> None:
            table.add_row(name, f"{count:,}")
            for part, number in parts.items():
                if number or part in always:
                    table.add_row(f"  {part}", f"{number:,}")

        documents = {"already in the output": self.in_output, "skipped by earlier runs": self.skipped_before}
        documents |= {"used": self.used}
        documents |= {f"skipped: {reason}": count for reason, count in sorted(self.skipped.items())}
        rows("documents read", self.read, documents | {"not asked": self.not_asked}, ["used"])
        if self.cut:
            table.add_row("documents cut in the prompt", f"{self.cut:,}")
        table.add_section()
        lost = {f"skipped: {reason}": count for reason, count in sorted(self.lost.items())}
        rows("queries requested", self.requested, {"written": self.written} | lost, ["written"])
        table.add_section()
        unusable = {f"asked again or skipped: {reason}": count for reason, count in sorted(self.unusable.items())}
        rows("answers", self.answers, unusable | {"prose around the JSON, ignored": self.prose})
        if self.failures:
            rows("requests without an answer", self.failures.total(), dict(sorted(self.failures.items())))
        table.add_section()
        for name, usage in (("tokens", self.usage), ("tokens of earlier runs", self.earlier)):
            parts = {"in": usage.prompt_tokens, "out": usage.completion_tokens, "of these estimated": usage.estimated}
            if usage.total or usage is self.usage:
                rows(name, usage.total, parts)
        if price_in is not None or price_out is not None:
            for name, usage in (("cost", self.usage), ("cost of earlier runs", self.earlier)):
                cost = usage.prompt_tokens * (price_in or 0) + usage.completion_tokens * (price_out or 0)
                if usage.total or usage is self.usage:
                    table.add_row(name, f"{cost / 1e6:,.4f}")
        return table
