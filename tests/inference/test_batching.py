"""The queue of the server, over an encoder that waits for the test: what waits, shares a batch or is lost."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import small

from embed.inference.batching import Batcher, ClosedError, OverloadedError
from embed.rows import dense

TIMEOUT = 60  # seconds, so that a lost request is an error and not a wait


class Gate:
    """An encoder whose first batch begins, and then waits until it is opened."""

    def __init__(self, encoder):
        self.encoder, self.begun, self.open = encoder, threading.Event(), threading.Event()
        self.batches = []  # the number of segments of each

    def encode_segments(self, segments, **how):
        self.batches.append(len(segments))
        self.begun.set()
        assert self.open.wait(TIMEOUT)
        return self.encoder.encode_segments(segments, **how)


@pytest.fixture(scope="module")
def encoder():
    return small.encoder()


@pytest.fixture
def gate(encoder):
    return Gate(encoder)


def texts(encoder, *counts):
    """A segment of each number of tokens."""
    rng = np.random.default_rng(0)
    words = encoder.tokenizer.encode([" ".join(small.sentences(40))])[0]
    return [dense(rng.choice(words, count)) for count in counts]


def started(gate, **settings):
    """A Batcher whose thread is in the batch of a first request of one token; (the Batcher, that request)."""
    batcher = Batcher(gate, **{"batch_tokens": 10, "max_waiting": 20} | settings)
    first = batcher.submit(texts(gate.encoder, 1))
    assert gate.begun.wait(TIMEOUT) and batcher.waiting_tokens == 0
    return batcher, first


def test_a_request_has_the_vectors_that_it_has_alone(encoder):
    batcher = Batcher(encoder, batch_tokens=64, max_waiting=10_000)
    requests = [texts(encoder, *counts) for counts in ((3,), (5, 40, 2), (1, 1), (100,))]
    requests.append(encoder.fit_documents([["parse the file", "", "of a token"], ["open"]])[0])
    futures = [batcher.submit(segments) for segments in requests]
    for segments, future in zip(requests, futures):
        np.testing.assert_allclose(future.result(TIMEOUT), encoder.encode_segments(segments), atol=1e-5)
    batcher.close()


def test_requests_that_wait_share_a_batch_up_to_its_tokens_in_their_order(gate):
    encoded = []
    batcher, first = started(gate, encoded=lambda requests, tokens: encoded.append((requests, tokens)))
    rest = [batcher.submit(texts(gate.encoder, *counts)) for counts in ((4,), (3, 3), (1,), (9,))]
    assert batcher.waiting_tokens == 20
    gate.open.set()
    assert [len(future.result(TIMEOUT)) for future in (first, *rest)] == [1, 1, 2, 1, 1]
    assert encoded == [(1, 1), (2, 10), (2, 10)] and gate.batches == [1, 3, 2]
    batcher.close()


def test_a_request_larger_than_a_batch_is_encoded_by_itself(gate):
    batcher, _ = started(gate, max_waiting=100)
    rest = [batcher.submit(texts(gate.encoder, count)) for count in (2, 30, 2)]
    gate.open.set()
    assert all(len(future.result(TIMEOUT)) == 1 for future in rest) and gate.batches == [1, 1, 1, 1]
    batcher.close()


def test_too_many_waiting_tokens_are_refused_and_what_was_accepted_is_not_lost(gate):
    batcher, first = started(gate)
    accepted = [batcher.submit(texts(gate.encoder, 10)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="20 tokens wait already and at most 20 may: try again later"):
        batcher.submit(texts(gate.encoder, 1))
    gate.open.set()
    assert all(len(future.result(TIMEOUT)) == 1 for future in (first, *accepted))
    batcher.submit(texts(gate.encoder, 1)).result(TIMEOUT)
    batcher.close()


def test_a_request_larger_than_all_that_may_wait_is_accepted_when_nobody_waits(gate):
    batcher, _ = started(gate)
    large = batcher.submit(texts(gate.encoder, 50))
    with pytest.raises(OverloadedError, match="50 tokens wait already"):
        batcher.submit(texts(gate.encoder, 1))
    gate.open.set()
    assert len(large.result(TIMEOUT)) == 1
    batcher.close()


def test_a_cancelled_request_is_dropped_and_makes_room_at_once(gate):
    batcher, first = started(gate)
    gone, kept = (batcher.submit(texts(gate.encoder, 10)) for _ in range(2))
    assert gone.cancel() and batcher.waiting_tokens == 10
    new = batcher.submit(texts(gate.encoder, 10))
    gate.open.set()
    assert [len(future.result(TIMEOUT)) for future in (first, kept, new)] == [1, 1, 1]
    with pytest.raises(CancelledError):
        gone.result(TIMEOUT)
    assert gate.batches == [1, 1, 1]
    batcher.close()


def test_one_request_that_fails_does_not_fail_those_of_its_batch(encoder):
    class Failing(Gate):
        def encode_segments(self, segments, **how):
            if any(len(segment.tokens) == 3 for segment in segments):
                raise ValueError("three tokens")
            return super().encode_segments(segments, **how)

    gate = Failing(encoder)
    batcher, _ = started(gate)
    rest = [batcher.submit(texts(encoder, count)) for count in (2, 3, 4)]
    gate.open.set()
    assert len(rest[0].result(TIMEOUT)) == len(rest[2].result(TIMEOUT)) == 1
    with pytest.raises(ValueError, match="three tokens"):
        rest[1].result(TIMEOUT)
    batcher.close()


def test_closing_finishes_what_was_accepted_and_refuses_the_rest(gate):
    batcher, first = started(gate)
    waiting = batcher.submit(texts(gate.encoder, 2))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while True:  # until it is closed
        try:
            waiting_too = batcher.submit(texts(gate.encoder, 1))
            waiting_too.cancel()
        except ClosedError as error:
            assert "shutting down" in str(error)
            break
    gate.open.set()
    closing.join(TIMEOUT)
    assert not closing.is_alive() and first.done() and len(waiting.result(0)) == 1


def test_many_threads_get_their_own_vectors(encoder):
    batcher = Batcher(encoder, batch_tokens=200, max_waiting=100_000)
    requests = [texts(encoder, 1 + i % 17) for i in range(200)]
    results = {}

    def ask(start):
        for i in range(start, 200, 8):
            results[i] = batcher.submit(requests[i]).result(TIMEOUT)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    alone = encoder.encode_segments([segment for request in requests for segment in request])
    np.testing.assert_allclose(np.concatenate([results[i] for i in range(200)]), alone, atol=1e-5)
    assert batcher.waiting_tokens == 0
