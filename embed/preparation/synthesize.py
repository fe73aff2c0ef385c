"""Write synthetic queries for documents with a language model behind an OpenAI-compatible endpoint.

The work of `embed synthesize` (docs/synthesize.md). Documents are independent of each other. All rows of a document are
appended to the output together, so an interrupted run loses only the documents that it was working on.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import rich.table

from embed.preparation.prompts import (
    AGAIN,
    Parsed,
    Settings,
    candidates,
    choose_prompt,
    parse_choice,
    parse_queries,
    specifications,
    write_prompt,
)

KEYS = (
    "query",
    "document",
    "document_id",
    "persona",
    "type",
    "length",
    "difficulty",
    "language",
    "model",
    "prompt",
    "usage",
)
BUDGET_SPENT = 3  # exit code
# Estimate for a prompt until the endpoint counts more: with Qwen's tokenizer, English has 4.7, German 3.7, Bengali 2.5.
BYTES_PER_TOKEN = 3
MAX_WAIT = 120.0  # seconds between two attempts
MAX_CONCURRENCY = 1000  # connections of the client


class Document(NamedTuple):
    """A document to write queries for."""

    id: str
    text: str


class Stop(NamedTuple):
    """Why a run ended before its last document."""

    code: int
    sentence: str


class StopError(Exception):
    """No further document can be asked for."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.stop = Stop(code, sentence)


class FailedError(Exception):
    """The endpoint gave no answer to a request; another run may get one. `reason` is for counting."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


class NonsenseError(Exception):
    """The model gave no answer that can be used; `faults` has a reason for each query that is missing."""

    def __init__(self, faults: Sequence[str]):
        super().__init__(", ".join(faults))
        self.faults = faults


class BudgetSpentError(Exception):
    """The next request might exceed the budget."""


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Usage:
    """Tokens that were used, and how many of them are estimated because the endpoint did not report them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def add(self, prompt_tokens: int, completion_tokens: int, estimated: int) -> None:
        """Count the tokens of a request, or of a document."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.estimated += estimated


def estimate(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN)


class Budget:
    """Tokens that may be used. Documents reserve the most that their requests may need, and give back the rest."""

    def __init__(self, limit: int | None = None, spent: int = 0):
        self.limit, self.spent, self.reserved, self.open = limit, spent, 0, 0
        self._released = asyncio.Event()

    def fits(self, tokens: int) -> bool:
        """Whether that many tokens are left."""
        return self.limit is None or self.spent + self.reserved + tokens <= self.limit

    @contextlib.asynccontextmanager
    async def account(self, tokens: int):
        """An account that holds `tokens`. It waits for other documents to give back what they do not need."""
        while not self.fits(tokens):
            if not self.open:
                raise BudgetSpentError
            self._released.clear()
            await self._released.wait()
        account = Account(self)
        self.open += 1
        try:
            account.hold(tokens)
            yield account
        finally:
            account.release(account.held)
            self.open -= 1
            self._released.set()


class Account:
    """What a document has used, and what it holds of the budget."""

    def __init__(self, budget: Budget):
        self.budget, self.held, self.usage = budget, 0, Usage()

    def hold(self, tokens: int) -> None:
        """Make sure that at least `tokens` are held; BudgetSpentError if they are not left."""
        more = max(0, tokens - self.held)
        if not self.budget.fits(more):
            raise BudgetSpentError
        self.held += more
        self.budget.reserved += more

    def release(self, tokens: int) -> None:
        """Give back tokens that were held."""
        tokens = min(tokens, self.held)
        self.held -= tokens
        self.budget.reserved -= tokens

    def pay(self, prompt_tokens: int, completion_tokens: int, estimated: int, held: int) -> None:
        """Count a request for which `held` tokens were held."""
        self.release(held)
        self.usage.add(prompt_tokens, completion_tokens, estimated)
        self.budget.spent += prompt_tokens + completion_tokens


# --- the report -----------------------------------------------------------------------------------------------------


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


# --- the output -----------------------------------------------------------------------------------------------------


class Output:
    """The rows that are written, and the documents that were skipped, in a second file OUTPUT.skipped.

    A row's usage is that of its document with all its requests; "queries" in it is the number of rows that share it.
    That number also shows whether the last document of an interrupted run is complete.
    """

    def __init__(self, path, model: str, settings: Settings):
        """Read what earlier runs wrote; `path` None writes nothing. An incomplete document at the end is removed."""
        self.path, self.model, self.prompt = path and Path(path), model, settings.digest
        self.texts: dict[str, str] = {}  # of the documents in the output
        self.skipped: set[str] = set()  # documents that are not asked for again
        self.usage = Usage()
        self.show: Callable[[dict], None] = lambda row: None  # called with each row
        self._opened = {}
        if self.path:
            self.log = self.path.with_name(f"{self.path.name}.skipped")
            self._read_rows()
            self._read_log()

    def _read_rows(self) -> None:
        last, start, left = {}, 0, 0  # document: its row, where its rows start, and how many are missing
        stop = 0
        for number, stop_of_line, row in _lines(self.path):
            self._check(self.path, number, row, KEYS)
            if row["document_id"] != last["document_id"] if left else row["document_id"] in self.texts:
                raise ValueError(
                    f"{self.path}, line {number} is damaged: the rows of a document are missing or in two places; "
                    "choose another --output"
                )
            if not left:
                start, left = stop, row["usage"]["queries"]
                self.texts[row["document_id"]] = row["document"]
                self.usage.add(*(row["usage"][field.name] for field in dataclasses.fields(Usage)))
                last = row
            left, stop = left - 1, stop_of_line
        if left:
            del self.texts[last["document_id"]]
            self.usage.add(*(-last["usage"][field.name] for field in dataclasses.fields(Usage)))
            stop = start
        _truncate(self.path, stop)

    def _read_log(self) -> None:
        stop = 0
        for number, stop, row in _lines(self.log):  # noqa: B007
            self._check(self.log, number, row, ("document_id", "reason", "again", "model", "prompt", "usage"))
            self.usage.add(*(row["usage"][field.name] for field in dataclasses.fields(Usage)))
            if not row["again"]:
                self.skipped.add(row["document_id"])
        _truncate(self.log, stop)

    def _check(self, file, number: int, row: dict, keys: Sequence[str]) -> None:
        usage, fields = row.get("usage"), {field.name for field in dataclasses.fields(Usage)}
        fields |= {"queries"} if "query" in keys else set()
        if row.keys() != set(keys) or not isinstance(usage, dict) or usage.keys() != fields:
            raise ValueError(f"{file}, line {number} was not written by this command: choose another path")
        for name, value in (("model", self.model), ("prompt", self.prompt)):
            if row[name] != value:
                what = "model" if name == "model" else "prompts or settings (their digest)"
                raise ValueError(
                    f"{file} was written with other {what}: {row[name]!r}, not {value!r}; choose another --output"
                )

    def write(self, rows: Sequence[dict], usage: Usage) -> None:
        """Append the rows of a document, with its usage."""
        shared = dataclasses.asdict(usage) | {"queries": len(rows)}
        rows = [row | {"model": self.model, "prompt": self.prompt, "usage": shared} for row in rows]
        for row in rows:
            self.show(row)
        self._append(self.path, rows)

    def skip(self, document_id: str, reason: str, usage: Usage, *, again: bool) -> None:
        """Record a document without rows; the next run asks for it only with `again`."""
        if usage.total or not again:
            row = {"document_id": document_id, "reason": reason, "again": again, "model": self.model}
            row |= {"prompt": self.prompt, "usage": dataclasses.asdict(usage)}
            self._append(self.path and self.log, [row])

    def _append(self, file, rows: Sequence[dict]) -> None:
        if file:
            if file not in self._opened:
                self._opened[file] = open(file, "ab", buffering=0)  # closed in close
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            while content:  # a write may be short
                content = content[self._opened[file].write(content) :]

    def close(self) -> None:
        """Close the files, with their content on the disk."""
        for opened in self._opened.values():
            os.fsync(opened.fileno())
            opened.close()
        self._opened = {}


def is_output(file) -> bool:
    """Whether a file has the content that `Output` writes; its last line may be incomplete."""
    with Path(file).open("rb") as opened:
        line = opened.readline()
    try:
        return json.loads(line).keys() == set(KEYS) if line.endswith(b"\n") else _is_start(line)
    except (ValueError, AttributeError):
        return False


def _is_start(line: bytes, start: bytes = b'{"query": "') -> bool:
    return line.startswith(start) or start.startswith(line)


def _lines(file: Path) -> Iterator[tuple[int, int, dict]]:
    """(number, offset of its end, object) of each line of a file that exists, without an incomplete last line."""
    if not file.exists():
        return
    stop = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            stop += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is damaged ({error}): remove the line") from None
            yield number, stop, row if isinstance(row, dict) else {}


def _truncate(file: Path, size: int) -> None:
    if file.exists() and file.stat().st_size != size:
        os.truncate(file, size)


# --- the endpoint ---------------------------------------------------------------------------------------------------


class Endpoint:
    """Chat completions of an OpenAI-compatible endpoint, with bounded retries."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        settings: Settings,
        report: Report,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
    ):
        """`timeout` is for a whole answer, in seconds. After a failure, attempt k waits about `backoff` · 2^k s.

        Failures are too many requests, errors of the server, timeouts and lost connections.
        """
        try:
            import openai
        except ImportError:
            raise ValueError("embed synthesize needs the package openai: pip install -e '.[synthesize]'") from None
        self.openai, self.api_key, self.model, self.settings, self.report = openai, api_key, model, settings, report
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout)
        self.scale = 1.0  # the most that the endpoint counted for a prompt, relative to its estimate
        self.trace: Callable[[str, str], None] = lambda name, text: None  # shows prompts and answers

    def cost(self, messages: Sequence[Mapping]) -> int:
        """The most tokens that a request may need, by the estimate of its prompt."""
        prompt = sum(estimate(message["content"]) for message in messages)
        return math.ceil(self.scale * prompt) + self.settings.answer_tokens

    async def ask(self, messages: Sequence[Mapping], seed: int, account: Account) -> tuple[str, bool]:
        """(text of the answer, whether it was cut); the account pays.

        FailedError if there is no answer after all retries, or the endpoint refuses this request; StopError if it
        refuses all requests; BudgetSpentError before a request that might exceed the budget.
        """
        body = {
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.answer_tokens,
            "seed": seed,
            "response_format": {"type": "json_object"},
        }
        body = {name: value for name, value in (body | dict(self.settings.request)).items() if value is not None}
        self.trace("prompt", messages[-1]["content"])
        cost = self.cost(messages)
        for attempt in range(self.retries + 1):
            account.hold(cost)
            wait = sentence = None
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await self.client.chat.completions.create(
                        model=self.model, messages=list(messages), extra_body=body
                    )
                if read := self._read(answer, cost, account):
                    return read
                reason = "response is not a chat completion"
            except (TimeoutError, self.openai.APITimeoutError):
                reason = f"no answer within {self.timeout:g} s"
                # The endpoint may have worked until then.
                self._pay(account, cost - self.settings.answer_tokens, self.settings.answer_tokens, cost, cost)
            except self.openai.APIStatusError as error:
                reason, sentence = f"status {error.status_code}", self._sentence(error)
                if error.status_code in (401, 402, 404):
                    self.report.failures[reason] += 1
                    raise StopError(2, f"the endpoint refuses all requests: {sentence}") from None
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    self.report.failures[reason] += 1
                    raise FailedError(f"refused: {sentence}", f"refused with {reason}") from None
                wait = error.response.headers.get("retry-after")
            except self.openai.APIConnectionError:
                reason = "connection lost"
            except (self.openai.APIResponseValidationError, ValueError):
                reason = "response is not a chat completion"
            self.report.failures[reason] += 1
            if attempt < self.retries:
                seconds = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
                with contextlib.suppress(TypeError, ValueError):
                    seconds = max(seconds, float(wait))
                await asyncio.sleep(min(seconds, MAX_WAIT))
        raise FailedError(f"{sentence or reason}, {self.retries + 1} times", f"endpoint: {reason}")

    def _read(self, answer, cost: int, account: Account) -> tuple[str, bool] | None:
        """(text, whether it was cut) of a response; None if it is not a chat completion, such as a page of a proxy."""
        choices = getattr(answer, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            return None
        text = message.content if isinstance(message.content, str) else ""
        self.report.answers += 1
        usage = getattr(answer, "usage", None)
        counts = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        if all(isinstance(count, int) for count in counts):
            self._pay(account, *counts, 0, cost)
            self.scale = max(self.scale, self.scale * counts[0] / (cost - self.settings.answer_tokens))
        else:
            prompt, completion = cost - self.settings.answer_tokens, estimate(text)
            self._pay(account, prompt, completion, prompt + completion, cost)
        self.trace("answer", text)
        return text, choices[0].finish_reason == "length"

    def _pay(self, account: Account, prompt: int, completion: int, estimated: int, held: int) -> None:
        account.pay(prompt, completion, estimated, held)
        self.report.usage.add(prompt, completion, estimated)

    def _sentence(self, error) -> str:
        """What an error says, on one line, without the key."""
        text = " ".join(str(error).split())
        return (text.replace(self.api_key, "***") if self.api_key else text)[:300]


# --- the work -------------------------------------------------------------------------------------------------------


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


def check_texts(output: Output, documents: Iterable[Document]) -> None:
    """ValueError unless the documents of the output are among `documents`, with the same text."""
    texts = {document.id: document.text for document in documents}
    for name, text in output.texts.items():
        if texts.get(name) != text:
            what = "has another text" if name in texts else "is missing"
            raise ValueError(f"the document {name!r} of {output.path} {what} in the corpus: choose another --output")
