"""The server over loopback, with the clients that its users have."""

import base64
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import openai
import pytest
import schemathesis
import small
import uvicorn
from schemathesis.specs.openapi.checks import positive_data_acceptance

from embed import cli, inference
from embed.inference import Encoder
from embed.inference.server import PATHS, Limits, make_app

TEXTS = small.sentences(12, seed=3)
ROOT = Path(__file__).parents[2]
DOCUMENTS = [["parse the file", "of a token", "open"], ["a vector"], ["read", "", "write the index"]]
TIMEOUT = 60


@pytest.fixture(scope="module")
def encoder():
    return small.encoder(matryoshka=(8, 32), max_length=200, digest="0123abcd")


@contextlib.contextmanager
def serving(encoders, ended=lambda: None, **how):
    """The URL of a server in a thread, which has ended after the block. `ended` is called once it accepts nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(encoders, **how), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        until(lambda: not server.servers[0].is_serving())
        ended()
        thread.join(TIMEOUT)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(encoder):
    with serving({"small": encoder}) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def call(url, body=None, headers=()):
    """(status, parsed answer, headers)."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content = answer.read().decode()
            return answer.status, json.loads(content) if content[:1] in "{[" else content, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def until(condition):
    """Wait; an error after TIMEOUT seconds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# --- vectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_client_of_openai_gets_vectors_of_length_1_in_the_order_of_the_texts(client, encoder, how):
    answer = client.embeddings.create(model="small", input=TEXTS, **how)
    assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
    vectors = [entry.embedding for entry in answer.data]
    if how.get("encoding_format") == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(vectors, unit(encoder.encode(TEXTS)), atol=1e-5)
    tokens = sum(map(len, encoder.tokenizer.encode(TEXTS)))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (tokens, tokens, "small")


def test_one_text_and_tokens_give_the_vectors_of_the_texts(client, encoder):
    tokens = [ids.tolist() for ids in encoder.tokenizer.encode(TEXTS)]
    expected = unit(encoder.encode(TEXTS))
    for given, rows in ((TEXTS[0], slice(1)), (tokens[0], slice(1)), (tokens, slice(None))):
        answer = client.embeddings.create(model="small", input=given)
        np.testing.assert_allclose([entry.embedding for entry in answer.data], expected[rows], atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("dimensions", [None, 8])
@pytest.mark.parametrize("name, precision, dtype", [("int8", "int8", np.int8), ("binary", "ubinary", np.uint8)])
def test_base64_formats_are_the_bytes_of_the_encoder(url, encoder, count, dimensions, name, precision, dtype):
    body = {"model": "small", "input": TEXTS[:count], "encoding_format": f"base64_{name}", "dimensions": dimensions}
    status, answer, _ = call(f"{url}/v1/embeddings", body)
    got = [np.frombuffer(base64.b64decode(entry["embedding"]), dtype) for entry in answer["data"]]
    expected = encoder.encode(TEXTS[:count], precision=precision, truncate_dim=dimensions)
    assert status == 200
    np.testing.assert_array_equal(got, expected)


def test_a_shorter_vector_is_a_prefix_and_has_length_1_again(client, encoder):
    answer = client.embeddings.create(model="small", input=TEXTS, dimensions=8)
    np.testing.assert_allclose(
        [entry.embedding for entry in answer.data], unit(encoder.encode(TEXTS)[:, :8]), atol=1e-5
    )


def test_chunks_of_documents_are_those_of_late_chunking(url, encoder):
    expected = encoder.encode_documents(DOCUMENTS, precision="int8")
    status, answer, _ = call(f"{url}/v1/contextualizedembeddings", {"model": "small", "input": DOCUMENTS})
    assert status == 200 and [document["index"] for document in answer["data"]] == [0, 1, 2]
    for document, vectors in zip(answer["data"], expected):
        assert [entry["index"] for entry in document["data"]] == list(range(len(vectors)))
        got = [np.frombuffer(base64.b64decode(entry["embedding"]), np.int8) for entry in document["data"]]
        np.testing.assert_array_equal(got, vectors)
    segments, _ = encoder.fit_documents(DOCUMENTS)
    assert answer["usage"]["total_tokens"] == sum(len(segment.tokens) for segment in segments)


def test_a_model_with_tanh_gives_the_int8_of_its_encoder():
    encoder = small.encoder(tanh=True)
    with serving({"tanh": encoder}) as url:
        _, answer, _ = call(f"{url}/v1/embeddings", {"model": "tanh", "input": TEXTS, "encoding_format": "base64_int8"})
    got = [np.frombuffer(base64.b64decode(entry["embedding"]), np.int8) for entry in answer["data"]]
    np.testing.assert_array_equal(got, encoder.encode(TEXTS, precision="int8"))


def test_concurrent_clients_of_two_models_get_their_own_vectors_and_share_batches(encoder):
    other = Encoder(small.random_params(small.config(), 1), small.config(), small.tokenizer())
    models = {"small": encoder, "other": other}
    texts = small.sentences(64, seed=9)
    expected = {name: unit(model.encode(texts)) for name, model in models.items()}
    with serving(models) as url, ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(name, i):
            return client.embeddings.create(model=name, input=texts[i]).data[0].embedding

        asked = [(name, i) for i in range(64) for name in models]
        for (name, i), vector in zip(asked, pool.map(lambda each: ask(*each), asked)):
            np.testing.assert_allclose(vector, expected[name][i], atol=1e-5)
        _, metrics, _ = call(f"{url}/metrics")
    assert 'embed_requests_total{path="/v1/embeddings",status="200"} 128.0' in metrics
    assert 'embed_vectors_total{model="other"} 64.0' in metrics


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"model": "large"}, 404, "model 'large' must be one of small"),
        ({"model": None}, 400, "model: Input should be a valid string"),
        ({"input": []}, 400, "input has 0 texts, a request may have 1 to 512"),
        ({"input": ["a"] * 513}, 400, "input has 513 texts, a request may have 1 to 512"),
        ({"input": ["a", ""]}, 400, "input.1 has no tokens: ''"),
        ({"input": "a " * 300}, 400, "input has 300 tokens, the model takes 200"),
        ({"input": [[3, 500]]}, 400, "input.0 has token 500, the vocabulary 0 to "),
        ({"input": [[-1]]}, 400, "input.0 has token -1, the vocabulary 0 to "),
        ({"input": [[1], []]}, 400, "input.1 has no tokens"),
        ({"dimensions": 0}, 400, "dimensions: Input should be greater than or equal to 1"),
        ({"dimensions": 33}, 400, "dimensions=33 must be in 1..32"),
        ({"dimensions": 12, "encoding_format": "base64_binary"}, 400, "12 dimensions are not a multiple of 8"),
        ({"encoding_format": "int8"}, 400, "encoding_format: Input should be 'float', 'base64', 'base64_int8'"),
        ({"dimension": 8}, 400, "dimension: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_request_is_a_sentence_that_names_the_value_and_what_is_allowed(url, change, status, message):
    got, answer, _ = call(f"{url}/v1/embeddings", {"model": "small", "input": "a"} | change)
    assert got == status and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], "input has 0 documents, a request may have 1 to 512"),
        ([[]], "input has 0 chunks, a request may have 1 to 16,000"),
        ([["a"], []], "input.1 has no tokens in any of its 0 chunks"),
        ([["a"] * 16_001], "input has 16,001 chunks, a request may have 1 to 16,000"),
    ],
)
def test_wrong_documents_are_refused(url, documents, message):
    status, answer, _ = call(f"{url}/v1/contextualizedembeddings", {"model": "small", "input": documents})
    assert status == 400 and message in answer["error"]["message"]


def test_the_client_of_openai_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="model 'x' must be one of small"):
        client.embeddings.create(model="x", input="a")
    with pytest.raises(openai.BadRequestError, match="has no tokens"):
        client.embeddings.create(model="small", input="")
    assert [model.id for model in client.models.list()] == ["small"]


def test_tokens_and_bytes_of_a_request_are_limited(encoder):
    with serving({"small": encoder}, limits=Limits(tokens=20, body=1000)) as url:
        status, answer, _ = call(f"{url}/v1/embeddings", {"model": "small", "input": ["a b c d e f g h"] * 3})
        assert status == 400 and "tokens, a request may have 1 to 20" in answer["error"]["message"]
        large = json.dumps({"model": "small", "input": "a", "user": "x" * 1000}).encode()
        for headers in ({}, {"Transfer-Encoding": "chunked"}):
            body = large if not headers else [large[:600], large[600:]]
            status, content = _send(url, body, headers)
            assert status == 413 and b"the body has more than 1,000 bytes" in content
        assert call(f"{url}/v1/embeddings", {"model": "small", "input": "a"})[0] == 200


def _send(url, body, headers):
    """(status, content) of a body, or of its parts."""
    import http.client

    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
    connection.request("POST", "/v1/embeddings", body, headers, encode_chunked=bool(headers))
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_with_a_key_only_its_holders_get_vectors(encoder):
    with serving({"small": encoder}, api_key="secret") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for body in ({"model": "small", "input": "a"}, b"no json"):
                status, answer, got = call(f"{url}/v1/embeddings", body, headers)
                assert status == 401 and got["WWW-Authenticate"] == "Bearer"
                assert answer["error"]["type"] == "authentication_error"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert len(client.embeddings.create(model="small", input="a").data[0].embedding) == 32
        assert [call(f"{url}/{path}")[0] for path in ("health", "info", "metrics", "v1/models")] == [200] * 3 + [401]


# --- load ----------------------------------------------------------------------------------------------------------


class Gate:
    """An encoder whose batches wait until it is opened."""

    def __init__(self, encoder):
        self._encoder, self.begun, self.open = encoder, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode_segments(self, segments, **how):
        self.begun.set()
        assert self.open.wait(TIMEOUT)
        return self._encoder.encode_segments(segments, **how)


def test_under_overload_what_is_not_refused_is_answered(encoder):
    gate = Gate(encoder)
    with (
        serving({"small": gate}, limits=Limits(batch_tokens=4, waiting_tokens=8)) as url,
        ThreadPoolExecutor(40) as pool,
    ):
        asked = [pool.submit(call, f"{url}/v1/embeddings", {"model": "small", "input": [[5, 6]]}) for _ in range(40)]
        # One or two are in the batch that waits, and four more have 8 tokens.
        until(lambda: sum(each.done() for each in asked) >= 34)
        gate.open.set()
        answers = [each.result(TIMEOUT) for each in asked]
    statuses = [status for status, *_ in answers]
    assert set(statuses) == {200, 429} and statuses.count(429) in (34, 35)
    for status, answer, headers in answers:
        if status == 429:
            assert headers["Retry-After"] == "1" and answer["error"]["type"] == "rate_limit_error"
            assert "tokens wait already and at most 8 may" in answer["error"]["message"]


def test_the_work_of_a_client_that_has_gone_is_dropped(encoder):
    gate = Gate(encoder)
    with serving({"small": gate}) as url:
        body = json.dumps({"model": "small", "input": "parse the file"}).encode()
        lines = ["POST /v1/embeddings HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        first = socket.create_connection(address)
        first.sendall(head.encode() + body)
        assert gate.begun.wait(TIMEOUT)
        second = socket.create_connection(address)
        second.sendall(head.encode() + body)
        until(lambda: 'embed_waiting_tokens{model="small"} 0.0' not in call(f"{url}/metrics")[1])
        second.close()
        until(lambda: "embed_dropped_total 1.0" in call(f"{url}/metrics")[1])
        assert 'embed_waiting_tokens{model="small"} 0.0' in call(f"{url}/metrics")[1]
        gate.open.set()
        assert first.recv(15) == b"HTTP/1.1 200 OK"
        first.close()
        assert 'embed_vectors_total{model="small"} 1.0' in call(f"{url}/metrics")[1]


def test_a_server_that_ends_finishes_what_it_took(encoder):
    gate = Gate(encoder)
    with ThreadPoolExecutor(2) as pool:
        with serving({"small": gate}, ended=gate.open.set) as url:
            body = {"model": "small", "input": "parse the file"}
            asked = [pool.submit(call, f"{url}/v1/embeddings", body)]
            assert gate.begun.wait(TIMEOUT)
            asked.append(pool.submit(call, f"{url}/v1/embeddings", body))
            until(lambda: 'embed_waiting_tokens{model="small"} 0.0' not in call(f"{url}/metrics")[1])
        assert [each.result(TIMEOUT)[0] for each in asked] == [200, 200]


# --- the rest of the API -------------------------------------------------------------------------------------------


def test_info_says_what_a_client_needs(url, encoder):
    _, about, _ = call(f"{url}/info")
    assert about["models"]["small"] == {
        "dimensions": 32,
        "matryoshka": [8, 32],
        "pooling": "mean",
        "max_length": 200,
        "context_length": None,
        "vocabulary": encoder.tokenizer.vocab_size,
        "dtype": "float32",
        "digest": "0123abcd",
    }
    assert about["limits"]["texts"] == 512
    assert call(f"{url}/health")[1] == {"status": "ok"}
    assert "openapi" in call(f"{url}/openapi.json")[1]


def test_every_answer_to_anything_is_what_the_openapi_document_says(url):
    schema, seen = schemathesis.openapi.from_url(f"{url}/openapi.json"), set()
    for operation in (result.ok() for result in schema.get_all_operations()):

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def check(case):
            # A schema cannot say how many tokens a text may have.
            answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])
            seen.add((case.path, answer.status_code))

        check()
    assert {path for path, _ in seen} == set(PATHS) and {status for _, status in seen} >= {200, 400, 404}


def test_a_fault_of_the_server_is_an_answer_and_is_counted(encoder):
    class Failing(Gate):
        def encode_segments(self, segments, **how):
            raise RuntimeError("the device is lost")

    with serving({"small": Failing(encoder)}) as url:
        status, answer, _ = call(f"{url}/v1/embeddings", {"model": "small", "input": "a"})
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert 'embed_requests_total{path="/v1/embeddings",status="500"} 1.0' in call(f"{url}/metrics")[1]


def test_the_programs_of_the_page_run_as_written():
    wide = dataclasses.replace(small.config(), hidden_size=64)
    encoder = Encoder(small.random_params(wide), wide, small.tokenizer())
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.S)
    assert len(programs) == 2
    with serving({"embed": encoder}) as url:
        for program in programs:
            scope = {}
            exec(program.replace("http://127.0.0.1:8000", url), scope)
            assert "vectors" not in scope or np.shape(scope["vectors"]) == (2, 64)
    assert scope["vector"].shape == (64,) and scope["vector"].dtype == np.int8


def test_missing_packages_are_one_sentence_that_says_how_to_install_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--model=a"]) == 2
    assert "pip install -e '.[serve]'" in capsys.readouterr().err


def test_the_program_announces_its_address_and_finishes_what_it_took_when_it_is_ended(tmp_path):
    model = small.write_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "embed.cli", "serve", f"--model=mine={model}", f"--port={port}"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EMBED_API_KEY": "secret"},
    )
    try:
        for line in process.stderr:
            if f"http://127.0.0.1:{port}" in line:
                break
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        vector = client.embeddings.create(model="mine", input=TEXTS[0]).data[0].embedding
        np.testing.assert_allclose(vector, unit(inference.load(model).encode(TEXTS[0])), atol=1e-5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode in (0, 143, -signal.SIGTERM)
    finally:
        process.kill()


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--model=a", "--model=b/a"], "two models are called 'a'"),
        (["--model==x"], "--model==x must be [NAME=]PATH"),
        (["--model=a", "--tokens=0"], "--tokens=0 must be positive"),
        (["--model=a", "--port=70000"], "--port=70000 must be from 0 to 65535"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(given, sentence, capsys):
    assert cli.main(["serve", *given]) == 2
    assert sentence in capsys.readouterr().err
