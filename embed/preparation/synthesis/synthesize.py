"""Write synthetic queries for documents with a language model behind an OpenAI-compatible endpoint.

The work of `embed synthesize` (docs/synthesize.md). Documents are independent of each other. All rows of a document are
appended to the output together, so an interrupted run loses only the documents that it was working on.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from embed.preparation.synthesis.endpoint import Endpoint, FailedError, Stop, StopError
from embed.preparation.synthesis.output import Document, Output
from embed.preparation.synthesis.prompts import (
    AGAIN,
    Parsed,
    candidates,
    choose_prompt,
    parse_choice,
    parse_queries,
    specifications,
    write_prompt,
)
from embed.preparation.synthesis.report import Report
from embed.preparation.synthesis.usage import Account, Budget, BudgetSpentError

BUDGET_SPENT = 3  # exit code
MAX_CONCURRENCY = 1000  # connections of the client


class NonsenseError(Exception):
    """The model gave no answer that can be used; `faults` has a reason for each query that is missing."""

    def __init__(self, faults: Sequence[str]):
        super().__init__(", ".join(faults))
        self.faults = faults


class Synthesis:
    """Documents in, rows out."""

    def __init__(
        self,
        endpoint: Endpoint,
        output: Output,
        report: Report,
        *,
        concurrency: int = 8,
        reasks: int = 2,
        max_tokens_total: int | None = None,
        max_failures: int = 10,
    ):
        """At most `concurrency` requests are open at a time.

        An answer that cannot be used is asked for again up to `reasks` times. The run stops after `max_failures`
        documents in a row without an answer. `max_tokens_total` includes the tokens of earlier runs.
        """
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("reasks", reasks, 0),
            ("failures", max_failures, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if concurrency > MAX_CONCURRENCY:
            raise ValueError(f"concurrency={concurrency} must be at most {MAX_CONCURRENCY}")
        self.endpoint, self.output, self.report, self.settings = endpoint, output, report, endpoint.settings
        self.concurrency, self.reasks, self.max_failures = concurrency, reasks, max_failures
        self.limit = max_tokens_total
        self.failed = 0  # documents in a row
        self.stop: Stop | None = None

    async def run(self, documents: Sequence[Document], advance: Callable[[], None] = lambda: None) -> Stop | None:
        """Write the rows of all documents that are not in the output; returns why it stopped before the last one."""
        self.report.read, self.report.earlier = len(documents), self.output.usage
        self.budget = Budget(self.limit, self.output.usage.total)
        pending = []
        for document in documents:
            if document.id in self.output.texts:
                self.report.in_output += 1
            elif document.id in self.output.skipped:
                self.report.skipped_before += 1
            elif not document.text.strip():
                self.report.skipped["no text"] += 1
            else:
                pending.append(document)
        self.report.not_asked = len(pending)
        remaining = iter(pending)
        for _ in range(len(documents) - len(pending)):
            advance()

        async def work() -> None:
            for document in remaining:
                if not self.stop:
                    await self._document(document)
                if self.stop:
                    return
                advance()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(pending))):
                    group.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self.output.close()
            await self.endpoint.client.close()
        failed = sum(
            count for reason, count in self.report.skipped.items() if reason.startswith(("endpoint", "refused"))
        )
        if not self.stop and failed:
            self.stop = Stop(75, f"the endpoint did not answer for {failed:,} documents: the same command asks again")
        elif not self.stop and pending and not self.report.used:
            reason = self.report.skipped.most_common(1)[0][0]
            self.stop = Stop(1, f"none of {len(pending):,} documents has queries; the most frequent reason is {reason}")
        return self.stop

    async def _document(self, document: Document) -> None:
        """Ask for one document and write its rows, or the reason why it has none."""
        people = candidates(self.settings, document.id)
        choose = choose_prompt(self.settings, document.text, people)
        # The longest persona stands for all of them: they are not chosen yet.
        wanted = specifications(self.settings, document.id, "xx")
        longest = max(people, key=len)
        prompts = [choose, *(write_prompt(self.settings, document.text, longest, one) for one in wanted)]
        account = None
        try:
            async with self.budget.account(sum(self.endpoint.cost(_messages(prompt)) for prompt in prompts)) as account:
                if self.stop:  # while it waited for the budget
                    return
                self.report.not_asked -= 1
                rows, lost = await self._rows(document, people, choose, account)
            if not rows:
                raise NonsenseError([reason for reason, _ in lost.most_common()])
        except NonsenseError as error:
            self._skip(document, account, f"nonsense: {error.faults[0]}", again=False)
        except FailedError as error:
            self._skip(document, account, error.reason, again=True)
            self.failed += 1
            if self.failed >= self.max_failures:
                code = 2 if error.reason.startswith("refused") else 75
                self._stop(code, f"{self.failed} documents in a row have no answer, the last one: {error}")
        except BudgetSpentError:
            if account:
                self._skip(document, account, "budget spent", again=True)
            self._stop(
                BUDGET_SPENT,
                f"the budget of {self.limit:,} tokens is spent ({self.budget.spent:,} used, and the next document "
                "might exceed it): the same command with a larger --max_tokens_total continues",
            )
        except StopError as error:
            self._skip(document, account, "endpoint refuses all requests", again=True)
            self._stop(*error.stop)
        except asyncio.CancelledError:
            if account:
                self._skip(document, account, "interrupted", again=True)
            raise
        else:
            self.output.write(rows, account.usage)
            self.report.used += 1
            self.report.cut += len(document.text) > self.settings.document_characters
            self.report.written += len(rows)
            self.report.lost += lost
            self.report.requested += len(rows) + lost.total()

    def _stop(self, code: int, sentence: str) -> None:
        self.stop = self.stop or Stop(code, sentence)

    def _skip(self, document: Document, account: Account, reason: str, *, again: bool) -> None:
        self.report.skipped[reason] += 1
        self.output.skip(document.id, reason, account.usage, again=again)

    async def _rows(self, document: Document, people, choose: str, account: Account) -> tuple[list[dict], Counter]:
        """The rows of a document, without provenance, and the number of queries that are missing by reason."""
        count = self.settings.num_personas
        (personas, language), faults = await self._ask(
            document, "choose", choose, lambda text: parse_choice(text, people, count), account
        )
        rows, lost = [], Counter()
        for persona, wanted in zip(personas, specifications(self.settings, document.id, language), strict=True):
            earlier = [row["query"] for row in rows]
            try:
                queries, faults = await self._ask(
                    document,
                    persona,
                    write_prompt(self.settings, document.text, persona, wanted),
                    lambda text: parse_queries(text, document.text, len(wanted), self.settings, earlier),  # noqa: B023
                    account,
                )
            except NonsenseError as error:
                lost.update(error.faults)
                continue
            lost.update(faults)
            for query, one in zip(queries, wanted, strict=True):
                if query is not None:
                    row = {"query": query, "document": document.text, "document_id": document.id, "persona": persona}
                    rows.append(row | one._asdict())
        return rows, lost

    async def _ask(self, document: Document, step: str, prompt: str, parse: Callable[[str], Parsed], account: Account):
        """(value, faults) of the best answer to a prompt; NonsenseError if none can be used."""
        best, messages = None, _messages(prompt)
        for attempt in range(self.reasks + 1):
            seed = self.settings.random(document.id, step, attempt).getrandbits(31)
            text, is_cut = await self.endpoint.ask(messages, seed, account)
            self.failed = 0
            parsed = parse(text)
            if is_cut and parsed.value is None:
                parsed = parsed._replace(faults=["answer is cut at its most tokens"] * len(parsed.faults))
            self.report.prose += parsed.has_prose
            if best is None or (
                parsed.value is not None and (best.value is None or len(parsed.faults) < len(best.faults))
            ):
                best = parsed
            if not parsed.faults:
                break
            self.report.unusable[parsed.faults[0]] += 1
            faults = ", ".join(dict.fromkeys(parsed.faults))
            answer = text[: self.settings.query_characters * 10] or "(nothing)"
            messages = [
                *_messages(prompt),
                {"role": "assistant", "content": answer},
                {"role": "user", "content": AGAIN.format(faults=faults)},
            ]
        if best.value is None:
            raise NonsenseError(best.faults)
        return best.value, best.faults


def _messages(prompt: str) -> list[dict]:
    """One message of the user: some models know no system message."""
    return [{"role": "user", "content": prompt}]
