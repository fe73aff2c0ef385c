"""Requests that wait at the same time are encoded in one batch: a queue and a thread per encoder."""

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from embed.inference.encoder import Encoder
from embed.inference.precision import check_count
from embed.rows import Segment


class OverloadedError(RuntimeError):
    """So many tokens wait that a request is not accepted."""


class ClosedError(RuntimeError):
    """The queue finishes what it has accepted, and accepts nothing more."""


class _Request(NamedTuple):
    segments: Sequence[Segment]
    tokens: int
    vectors: Future


class Batcher:
    """Encodes requests in the order in which they came, as many at a time as have `batch_tokens` tokens.

    A larger request is encoded by itself. If a batch fails, its requests are tried one by one, so that each gets its
    own vectors or its own error. At most `max_waiting` tokens wait. `encoded(requests, tokens)` is called before each
    batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_tokens: int,
        max_waiting: int,
        encoded: Callable[[int, int], None] = lambda requests, tokens: None,
    ):
        check_count("batch_tokens", batch_tokens)
        check_count("max_waiting", max_waiting)
        self.encoder, self.batch_tokens, self.max_waiting = encoder, batch_tokens, max_waiting
        self.waiting_tokens = 0  # of requests that were accepted, not cancelled and not begun
        self._encoded = encoded
        self._requests: collections.deque[_Request] = collections.deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, segments: Sequence[Segment]) -> "Future[np.ndarray]":
        """The vectors of all spans of the segments, float32 [spans, D], once they are computed.

        Cancelling the future drops the request, unless its batch has begun. OverloadedError if more than `max_waiting`
        tokens would wait; a request that finds nobody waiting is always accepted. ClosedError after `close`.
        """
        request = _Request(segments, sum(len(segment.tokens) for segment in segments), Future())
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if self.waiting_tokens and self.waiting_tokens + request.tokens > self.max_waiting:
                raise OverloadedError(
                    f"{self.waiting_tokens:,} tokens wait already and at most {self.max_waiting:,} may: try again later"
                )
            self.waiting_tokens += request.tokens
            self._requests.append(request)
            self._changed.notify()
        request.vectors.add_done_callback(lambda future: future.cancelled() and self._forget(request))
        return request.vectors

    def close(self) -> None:
        """Finish all accepted requests, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _forget(self, cancelled: _Request) -> None:
        with self._changed:
            for i, request in enumerate(self._requests):
                if request is cancelled:
                    del self._requests[i]
                    self.waiting_tokens -= request.tokens
                    return

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if len(batch) > 1:
                try:
                    self._encode(batch)
                    continue
                except Exception:  # of one of them
                    pass
            for request in batch:
                try:
                    self._encode([request])
                except Exception as error:
                    request.vectors.set_exception(error)

    def _next(self) -> list[_Request] | None:
        """The next batch, empty if its requests were cancelled; None at the end."""
        with self._changed:
            while not self._requests:
                if self._closed:
                    return None
                self._changed.wait()
            batch, tokens = [], 0
            while self._requests and (not batch or tokens + self._requests[0].tokens <= self.batch_tokens):
                request = self._requests.popleft()
                self.waiting_tokens -= request.tokens
                if request.vectors.set_running_or_notify_cancel():
                    batch.append(request)
                    tokens += request.tokens
        return batch

    def _encode(self, batch: list[_Request]) -> None:
        self._encoded(len(batch), sum(request.tokens for request in batch))
        segments = [segment for request in batch for segment in request.segments]
        vectors = self.encoder.encode_segments(segments, batch_tokens=self.batch_tokens)
        counts = [sum(segment.num_spans for segment in request.segments) for request in batch]
        for request, part in zip(batch, np.split(vectors, np.cumsum(counts)[:-1])):
            request.vectors.set_result(part)
