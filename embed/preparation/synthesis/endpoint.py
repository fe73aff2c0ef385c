"""Requests to an OpenAI-compatible endpoint."""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from embed.preparation.synthesis.prompts import Settings
from embed.preparation.synthesis.report import Report
from embed.preparation.synthesis.usage import Account, estimate

MAX_WAIT = 120.0  # seconds between two attempts


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
