"""An HTTP server of vectors: OpenAI's /v1/embeddings, and Perplexity's /v1/contextualizedembeddings for late chunking.

Requests that wait at the same time share batches (embed.inference.batching). docs/serve.md describes the API.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

import numpy as np
import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import embed
from embed.inference.batching import Batcher, OverloadedError
from embed.inference.encoder import Encoder
from embed.inference.memory import TooLongError
from embed.inference.precision import check_precision
from embed.rows import Segment

PRECISION = {"float": "float32", "base64": "float32", "base64_int8": "int8", "base64_binary": "ubinary"}
Format = Literal["float", "base64", "base64_int8", "base64_binary"]
PATHS = ("/v1/embeddings", "/v1/contextualizedembeddings", "/v1/models", "/health", "/info", "/metrics")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may have, and how much may wait. The first three are those of Perplexity's API."""

    texts: int = 512  # of /v1/embeddings, or documents of /v1/contextualizedembeddings
    chunks: int = 16_000
    tokens: int = 120_000
    body: int = 16 << 20  # bytes
    batch_tokens: int | None = None  # None: that of `Encoder.encode`
    waiting_tokens: int = 1_000_000


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="The id of a model that /v1/models lists.")
    dimensions: StrictInt | None = Field(None, ge=1, description="Keep so many leading dimensions; default: all.")
    user: str | None = Field(None, description="Is ignored.")


class EmbeddingsRequest(_Input):
    """Texts, or texts that are already tokenized by the model's tokenizer."""

    input: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Format = Field("float", description="float and base64 are vectors of length 1 in float32.")


class ContextualizedRequest(_Input):
    """Documents, each a list of chunks in order. A query is a document of one chunk."""

    input: list[list[StrictStr]]
    encoding_format: Format = Field("base64_int8", description="float and base64 are vectors of length 1 in float32.")


class Usage(BaseModel):
    """Tokens of the texts; of a document also the separators between its chunks."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of a text or chunk: numbers, or base64 of float32 (little endian), int8, or bits."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Document(BaseModel):
    """The vectors of a document's chunks, in order."""

    object: Literal["list"]
    index: int
    data: list[Embedding]


class ContextualizedResponse(BaseModel):
    """Documents in the order of the request."""

    object: Literal["list"]
    data: list[Document]
    model: str
    usage: Usage


class _Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """As in OpenAI's API."""

    error: _Problem


ERRORS = {
    400: "The request is wrong; the message says what is allowed.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too much waits: try again later.",
    500: "The server failed.",
}


class ApiError(Exception):
    """An answer with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> JSONResponse:
        """The answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        problem = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": problem}, self.status, headers)


class _Edge:
    """Around the app: checks the key, refuses a body of more than `limit` bytes before it is in memory, and counts."""

    def __init__(self, app: ASGIApp, metrics: "_Metrics", limit: int, api_key: str | None):
        self.app, self.metrics, self.limit = app, metrics, limit
        self.authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, size, status = time.perf_counter(), 0, None
        headers = dict(scope["headers"])

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return {"type": "http.disconnect"} if size > self.limit else message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def answer(message: Message) -> None:
            if size <= self.limit:  # otherwise the app complains about a client that went
                await noted(message)

        try:
            length = headers.get(b"content-length", b"")
            if refusal := self._unauthorized(scope["path"], headers):
                await refusal.response()(scope, receive, noted)
            elif length.isdigit() and int(length) > self.limit:
                await self._too_large().response()(scope, receive, noted)
            else:
                await self.app(scope, limited, answer)
                if size > self.limit:
                    await self._too_large().response()(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, status or 500).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)

    def _unauthorized(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        given = headers.get(b"authorization", b"")
        if self.authorization and path.startswith("/v1/") and not hmac.compare_digest(given, self.authorization):
            return ApiError(401, "the request needs the header 'Authorization: Bearer KEY' with the key of this server")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.limit:,} bytes: send fewer texts at a time")


class _Metrics:
    """Prometheus metrics of an app."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()

        def make(kind, name, about, labels, **how):
            return kind(f"embed_{name}", about, labels, registry=self.registry, **how)

        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        self.requests = make(counter, "requests", "Requests that were answered.", ["path", "status"])
        self.dropped = make(counter, "dropped", "Requests whose client had gone before its vectors were computed.", [])
        self.vectors = make(counter, "vectors", "Vectors that were sent.", ["model"])
        self.tokens = make(counter, "tokens", "Tokens that were encoded for them.", ["model"])
        self.seconds = make(histogram, "request_seconds", "Time from a request to its answer.", ["path"])
        buckets = [4**k for k in range(2, 10)]
        self.batch = make(histogram, "batch_tokens", "Tokens of a batch.", ["model"], buckets=buckets)
        self.shared = make(histogram, "batch_requests", "Requests of a batch.", ["model"], buckets=[1, 2, 4, 8, 16, 64])
        self.waiting = make(prometheus_client.Gauge, "waiting_tokens", "Tokens that wait for a batch.", ["model"])


def make_app(encoders: Mapping[str, Encoder], limits: Limits = Limits(), api_key: str | None = None) -> FastAPI:
    """The server of {id: encoder}. With `api_key`, requests to /v1 need it as a bearer token."""
    metrics = _Metrics()
    batchers: dict[str, Batcher] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        for name, encoder in encoders.items():
            batchers[name] = Batcher(
                encoder,
                batch_tokens=limits.batch_tokens or encoder.batch_tokens,
                max_waiting=limits.waiting_tokens,
                encoded=lambda requests, tokens, name=name: _observe(metrics, name, requests, tokens),
            )
            metrics.waiting.labels(name).set_function(lambda name=name: batchers[name].waiting_tokens)
        yield
        for batcher in batchers.values():
            await asyncio.to_thread(batcher.close)

    app = FastAPI(title="embed", version=embed.__version__, lifespan=lifespan, description=__doc__)
    app.add_middleware(_Edge, metrics=metrics, limit=limits.body, api_key=api_key)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return ApiError(400, f"{where or 'the body'}: {first['msg']}", where or None).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed: see its log").response()

    async def answer(request: Request, body: _Input, read: Callable, entries: Callable) -> Response:
        """The answer to a request whose segments are read(encoder, input, limits).

        entries(segments, vectors) is the data of the answer.
        """
        if body.model not in encoders:
            message = f"model {body.model!r} must be one of {', '.join(encoders)}"
            raise ApiError(404, message, "model", "model_not_found")
        encoder = encoders[body.model]
        segments = await asyncio.to_thread(_read, encoder, body, read, limits)
        try:
            pooled = await _while_connected(request, batchers[body.model].submit(segments))
        except OverloadedError as error:
            raise ApiError(429, str(error)) from error
        except TooLongError as error:
            raise ApiError(400, str(error), "input") from error
        except _GoneError:
            metrics.dropped.inc()
            raise ApiError(499, "the client has gone") from None  # nobody reads it
        metrics.vectors.labels(body.model).inc(len(pooled))
        metrics.tokens.labels(body.model).inc(_tokens(segments))
        content = await asyncio.to_thread(_content, encoder, body, segments, pooled, entries)
        return Response(content, media_type="application/json")

    errors = {status: {"model": ErrorResponse, "description": about} for status, about in ERRORS.items()}
    secured = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # for the OpenAPI page: _Edge checks it
    how = dict(responses=errors, dependencies=secured)

    @app.post("/v1/embeddings", response_model=EmbeddingsResponse, **how)
    async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
        """A vector per text."""
        return await answer(request, body, _texts, lambda segments, vectors: _embeddings(vectors))

    @app.post("/v1/contextualizedembeddings", response_model=ContextualizedResponse, **how)
    async def contextualized(request: Request, body: ContextualizedRequest) -> Response:
        """A vector per chunk of each document, computed within the document."""
        return await answer(request, body, _documents, _of_documents)

    @app.get("/v1/models", dependencies=secured, responses={401: errors[401]})
    async def models() -> dict:
        """The models of this server, in OpenAI's form."""
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "embed"} for name in encoders]
        return {"object": "list", "data": entries}

    @app.get("/health")
    async def health() -> dict:
        """Whether the server takes requests."""
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict:
        """The models and the limits of a request."""
        about = {name: _about(encoder) for name, encoder in encoders.items()}
        return {"version": embed.__version__, "models": about, "limits": dataclasses.asdict(limits)}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        content = prometheus_client.generate_latest(metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


class _GoneError(Exception):
    pass


async def _while_connected(request: Request, computed: "Future[np.ndarray]") -> np.ndarray:
    """The result, or _GoneError as soon as the client has gone; then the work is cancelled."""
    result = asyncio.wrap_future(computed)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise _GoneError
    finally:
        gone.cancel()
        computed.cancel()  # unless it is done


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _observe(metrics: _Metrics, name: str, requests: int, tokens: int) -> None:
    metrics.shared.labels(name).observe(requests)
    metrics.batch.labels(name).observe(tokens)


def _about(encoder: Encoder) -> dict:
    """What a client may want to know of a model."""
    return {
        "dimensions": encoder.dimensions,
        "matryoshka": list(encoder.matryoshka),
        "pooling": encoder.pooling,
        "max_length": encoder.max_length,
        "context_length": encoder.context_length,
        "vocabulary": encoder.tokenizer.vocab_size,
        "dtype": str(encoder.config.dtype),
        "digest": encoder.digest,
    }


def _check_count(noun: str, count: int, limit: int) -> None:
    if not 1 <= count <= limit:
        raise ValueError(f"input has {count:,} {noun}, a request may have 1 to {limit:,}")


def _tokens(segments: Sequence[Segment]) -> int:
    return sum(len(segment.tokens) for segment in segments)


def _read(encoder: Encoder, body: _Input, read: Callable, limits: Limits) -> list[Segment]:
    """The segments of a request; ApiError if something is wrong with it."""
    try:
        check_precision(PRECISION[body.encoding_format], encoder.dimensions, body.dimensions)
    except ValueError as error:
        raise ApiError(400, str(error).replace("truncate_dim", "dimensions"), "dimensions") from error
    try:
        segments = read(encoder, body.input, limits)
        _check_count("tokens", _tokens(segments), limits.tokens)
    except ValueError as error:
        raise ApiError(400, str(error), "input") from error
    return segments


def _texts(encoder: Encoder, given, limits: Limits) -> list[Segment]:
    """The texts of a request: a text, its tokens, or a list of either."""
    single = isinstance(given, str) or bool(given) and isinstance(given[0], int)
    inputs = [given] if single else given
    _check_count("texts", len(inputs), limits.texts)
    fit = encoder.fit_texts if isinstance(inputs[0], str) else encoder.fit_tokens
    return fit(inputs, names=["input"] if single else [f"input.{i}" for i in range(len(inputs))])[0]


def _documents(encoder: Encoder, documents: list[list[str]], limits: Limits) -> list[Segment]:
    _check_count("documents", len(documents), limits.texts)
    _check_count("chunks", sum(map(len, documents)), limits.chunks)
    return encoder.fit_documents(documents, names=[f"input.{i}" for i in range(len(documents))])[0]


def _content(encoder: Encoder, body: _Input, segments: Sequence[Segment], pooled: np.ndarray, entries) -> bytes:
    """The answer in JSON, of the vectors [N, D] of all spans."""
    precision, count = PRECISION[body.encoding_format], len(pooled)
    # A program is compiled for each number of vectors, so it is rounded up to a power of two.
    padded = np.pad(pooled, ((0, (1 << (count - 1).bit_length()) - count), (0, 0)))
    settings = dict(truncate_dim=body.dimensions, normalize=precision == "float32")
    vectors = encoder.quantize(padded, precision, **settings)[:count]
    if body.encoding_format == "float":
        shown = vectors.tolist()
    else:
        little_endian = vectors.astype(vectors.dtype.newbyteorder("<"))
        shown = [base64.b64encode(vector.tobytes()).decode() for vector in little_endian]
    usage = {"prompt_tokens": _tokens(segments), "total_tokens": _tokens(segments)}
    data = entries(segments, shown)
    return json.dumps({"object": "list", "data": data, "model": body.model, "usage": usage}).encode()


def _embeddings(vectors: Sequence) -> list[dict]:
    return [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]


def _of_documents(segments: Sequence[Segment], vectors: Sequence) -> list[dict]:
    remaining = iter(vectors)
    chunks = [list(itertools.islice(remaining, segment.num_spans)) for segment in segments]
    return [{"object": "list", "index": i, "data": _embeddings(each)} for i, each in enumerate(chunks)]
