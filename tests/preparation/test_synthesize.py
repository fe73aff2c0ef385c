"""Synthetic queries from an endpoint that answers well, fails, stalls, and returns nonsense."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from embed import cli
from embed.preparation.synthesis import prompts
from embed.preparation.synthesis.output import KEYS

ROOT = Path(__file__).parents[2]
KEY = "key-of-the-tests"
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


# --- the endpoint ---------------------------------------------------------------------------------------------------


class Request:
    """A request as the stub sees it: which document, which step."""

    def __init__(self, body, headers):
        self.body, self.headers, self.messages = body, headers, body["messages"]
        prompt = self.messages[0]["content"]
        self.document = re.search("<document>\n(.*?)\n</document>", prompt, re.DOTALL)[1]
        self.is_choice = '"personas"' in prompt
        self.count = int(re.search(r"(?:this list the|answers:) (\d+)", prompt)[1])
        self.lines = re.findall(r"^\d+\. .*", prompt, re.MULTILINE)
        self.is_again = len(self.messages) > 1

    def good(self):
        """A good answer, a function of the request."""
        if self.is_choice:
            return {"personas": list(range(1, self.count + 1)), "language": "en"}
        persona = re.search("Imagine this person: (.*)\\.\n", self.messages[0]["content"])[1]
        return {"queries": [f"what does {persona} ask {i}?" for i in range(self.count)]}


class Stub:
    """An OpenAI-compatible server on loopback.

    `answer(request)` returns a text, an object as JSON, a status, bytes of a web page, or an event: then the server
    sends single bytes until it is set, and hangs up after 5 s.
    """

    def __init__(self, answer=Request.good):
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.usage, self.finish, self.open, self.most_open = USAGE, "stop", 0, 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content, kind = 404, b'{"error": {"message": "no such path"}}', "application/json"
                if self.path == "/v1/chat/completions":
                    status, content, kind = stub.respond(Request(body, self.headers))
                with contextlib.suppress(OSError):  # the client has gone
                    if isinstance(content, threading.Event):
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                        self.close_connection = True
                        for _ in range(50):
                            if not content.wait(0.1):
                                self.wfile.write(b" ")
                        return
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request, client_address):
                """Nothing: a client that has ended leaves its requests."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, request):
        with self.lock:
            self.requests.append(request)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            answer = self.answer(request)
        finally:
            with self.lock:
                self.open -= 1
        if isinstance(answer, int):
            error = {"error": {"message": f"said {answer} to {request.headers['Authorization']}"}}
            return answer, json.dumps(error).encode(), "application/json"
        if isinstance(answer, bytes | threading.Event):
            return 200, answer, "text/html"
        text = answer if isinstance(answer, str) else json.dumps(answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        completion |= {"usage": self.usage} if self.usage else {}
        return 200, json.dumps(completion).encode(), "application/json"

    def asked(self):
        """{document: number of requests}"""
        return Counter(request.document for request in self.requests)


@pytest.fixture
def stub():
    made = Stub()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("embed.preparation.synthesis.endpoint.MAX_WAIT", 0.0)  # no waiting between attempts
    write_corpus(6)


def write_corpus(count):
    rows = [{"_id": f"d{i}", "text": f"Document number {i} is about a subject of its own."} for i in range(count)]
    Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(stub, *more):
    given = ["--corpus=corpus.jsonl", f"--base_url={stub.url}", "--model=m", "--queries_per_document=3"]
    given += [] if "--check" in more else ["--output=pairs.jsonl"]
    return ["synthesize", *given, *more]


def run(stub, *more):
    return cli.main(arguments(stub, *more))


def rows(file="pairs.jsonl"):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def table(printed):
    """{name: count} of the printed table."""
    out = printed if isinstance(printed, str) else printed.readouterr().out
    return {m[1].strip(): float(m[2].replace(",", "")) for m in re.finditer("[│┃] (.*?) +[│┃] +([0-9.,]+) [│┃]", out)}


def by_document(some):
    return sorted(some, key=lambda row: (row["document_id"], row["persona"], row["query"]))


def test_every_row_is_a_pair_with_its_provenance(stub, capsys):
    assert run(stub) == 0
    written = rows()
    assert Counter(row["document_id"] for row in written) == {f"d{i}": 3 for i in range(6)}
    personas = prompts.read_personas()
    for row in written:
        assert tuple(row) == KEYS
        assert row["document"] == f"Document number {row['document_id'][1]} is about a subject of its own."
        assert row["persona"] in personas and row["query"] == f"what does {row['persona']} ask 0?"
        assert row["type"] in prompts.TYPES and row["length"] in prompts.LENGTHS
        assert row["difficulty"] in prompts.DIFFICULTIES and row["language"] == "en" and row["model"] == "m"
        # One request chose the personas, and three wrote a query each.
        assert row["usage"] == {"prompt_tokens": 400, "completion_tokens": 40, "estimated": 0, "queries": 3}
    assert len({row["prompt"] for row in written}) == 1
    counts = table(capsys)
    assert counts["documents read"] == counts["used"] == 6 and counts["queries requested"] == counts["written"] == 18
    assert counts["answers"] == 24 and counts["tokens"] == 24 * 110 and "of these estimated" not in counts


def test_the_prompts_ask_for_what_the_rows_say(stub):
    assert run(stub, "--languages", "de", "fr", "--queries_per_document=4", "--personas_per_document=2") == 0
    written = rows()
    assert Counter(row["language"] for row in written) == {"de": 12, "fr": 12}
    for request in stub.requests:
        text = request.messages[0]["content"]
        assert request.count == 2 and request.document in text
        if not request.is_choice:
            persona = re.search("Imagine this person: (.*)\\.\n", text)[1]
            one = [row for row in written if (row["document"], row["persona"]) == (request.document, persona)]
            assert len(one) == 2
            for row, line in zip(one, request.lines):
                assert prompts.TYPES[row["type"]] in line and prompts.LENGTHS[row["length"]] in line
                assert prompts.DIFFICULTIES[row["difficulty"]] in line and f"language: {row['language']}" in line


def test_requests_depend_only_on_the_seed_and_the_document(stub):
    def asked(*more):
        stub.requests = []
        Path("pairs.jsonl").unlink(missing_ok=True)
        assert run(stub, *more) == 0
        return by_document(rows()), sorted(json.dumps(request.body) for request in stub.requests)

    first = asked("--concurrency=1")
    assert asked("--concurrency=6") == first
    assert asked("--seed=1") != first
    seeds = [request.body["seed"] for request in stub.requests]
    assert len(set(seeds)) == len(seeds)


def test_parameters_of_the_request_can_be_set_and_removed(stub):
    assert run(stub, '--request={"seed": null, "top_p": 0.9}', "--temperature=0.25", "--limit=1") == 0
    body = stub.requests[0].body
    assert "seed" not in body and body["top_p"] == 0.9 and body["temperature"] == 0.25
    assert body["response_format"] == {"type": "json_object"} and body["max_tokens"] == 1024


def test_each_chunk_of_a_document_is_a_document(stub):
    Path("corpus.jsonl").write_text('{"_id": "a", "title": "T", "chunks": ["one", "", "two"]}\n')
    assert run(stub) == 0
    assert {(row["document_id"], row["document"]) for row in rows()} == {("a#0", "T one"), ("a#2", "two")}


def test_a_long_document_is_cut_in_the_prompt_only_and_counted(stub, capsys):
    assert run(stub, "--max_document_characters=10", "--limit=2") == 0
    assert stub.asked() == {"Document n": 8} and rows()[0]["document"].startswith("Document number")
    assert table(capsys)["documents cut in the prompt"] == 2


def test_the_key_is_sent_and_never_shown(stub, capsys, caplog, monkeypatch):
    stub.answer = lambda request: 400  # the message of the endpoint has the key
    assert run(stub, "--retries=0") == 75
    assert stub.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    stub.answer = lambda request: 401
    assert run(stub) == 2
    printed = capsys.readouterr()
    assert "said 401 to Bearer ***" in printed.err
    assert KEY not in printed.out + printed.err + caplog.text
    assert not any(KEY in file.read_text() for file in Path().iterdir())
    assert run(stub, "--api_key_variable=sk-123") == 2
    assert "sk-123" not in capsys.readouterr().err


# --- budget and concurrency -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 3])
def test_the_bound_of_open_requests_is_reached_and_never_exceeded(stub, bound):
    reached, exceeded = threading.Event(), threading.Event()

    def answer(request):
        if stub.open >= bound:
            reached.set()
        assert reached.wait(60)
        if stub.open > bound:
            exceeded.set()
        if len(stub.requests) <= bound:
            exceeded.wait(0.5)  # time for a request that must not come
        return request.good()

    stub.answer = answer
    assert run(stub, f"--concurrency={bound}") == 0
    assert stub.most_open == bound and len(rows()) == 18


def test_a_run_stops_at_its_budget_and_continues_with_a_larger_one(stub, capsys):
    budget = 7_200  # a document may need some 6,000, and needs 440
    assert run(stub, f"--max_tokens_total={budget}", "--concurrency=2") == 3
    first = rows()
    printed = capsys.readouterr()
    assert "the budget of 7,200 tokens is spent" in printed.err and "larger --max_tokens_total" in printed.err
    used = len({row["document_id"] for row in first})
    assert 0 < used < 6 and table(printed.out)["not asked"] == 6 - used
    spent = 110 * len(stub.requests)
    assert spent <= budget and len(stub.requests) == 4 * used  # no document was left half done
    asked = len(stub.requests)
    # The total includes earlier runs.
    assert run(stub, f"--max_tokens_total={budget}", "--concurrency=2") == 3 and len(stub.requests) == asked
    assert run(stub, "--max_tokens_total=1000000") == 0
    assert rows()[: len(first)] == first and len(rows()) == 18 and set(stub.asked().values()) == {4}


def test_a_budget_holds_when_answers_are_as_long_as_allowed_and_asked_for_again(stub):
    stub.usage = {"prompt_tokens": 300, "completion_tokens": 1024}
    stub.answer = lambda request: request.good() if request.is_again else "nonsense"
    assert run(stub, "--max_tokens_total=30000", "--concurrency=4") == 3
    assert 0 < 1324 * len(stub.requests) <= 30_000


def test_a_budget_holds_when_prompts_have_more_tokens_than_estimated(stub):
    stub.usage = {"prompt_tokens": 3000, "completion_tokens": 10}
    assert run(stub, "--max_tokens_total=45000", "--concurrency=1") == 3
    assert 0 < 3010 * len(stub.requests) <= 45_000  # the estimate alone would start a fourth document, to 48,160


def test_unknown_usage_is_estimated_and_said(stub, capsys):
    stub.usage = None
    assert run(stub, "--limit=1", "--price_in=2", "--price_out=4") == 0
    usage, counts = rows()[0]["usage"], table(capsys)
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    texts = [request.messages[0]["content"] for request in stub.requests]
    assert usage["prompt_tokens"] == sum(-(-len(text.encode()) // 3) for text in texts)
    assert usage["completion_tokens"] > 0 and usage["estimated"] == total == counts["of these estimated"]
    cost = (2 * usage["prompt_tokens"] + 4 * usage["completion_tokens"]) / 1e6
    assert counts["cost"] == pytest.approx(cost, abs=1e-4)


# --- an endpoint that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure, reason",
    [(429, "status 429"), (500, "status 500"), (b"<html>", "response is not a chat completion")],
)
def test_a_failed_request_is_tried_again_and_counted(stub, failure, reason, capsys):
    failed = Counter()

    def answer(request):
        name = json.dumps(request.messages)
        failed[name] += 1
        return failure if failed[name] <= 2 else request.good()

    stub.answer = answer
    assert run(stub, "--retries=2", "--limit=2") == 0
    assert set(failed.values()) == {3} and len(rows()) == 6
    counts = table(capsys)
    assert counts[reason] == counts["requests without an answer"] == 16 and counts["answers"] == 8


@pytest.mark.parametrize("drips", [False, True])
def test_a_stalled_connection_is_given_up_and_its_tokens_are_estimated(stub, drips, capsys):
    let_go, first = threading.Event(), threading.Lock()

    def answer(request):
        if first.acquire(blocking=False):  # the first request stalls
            if drips:
                return let_go  # the response begins, and a byte comes now and then
            assert let_go.wait(60)
        return request.good()

    stub.answer = answer
    try:
        assert run(stub, "--timeout=1", "--limit=1") == 0
    finally:
        let_go.set()
    counts = table(capsys)
    assert counts["no answer within 1 s"] == 1 and len(stub.requests) == 5 and len(rows()) == 3
    assert counts["of these estimated"] > 1024 and counts["tokens"] == counts["of these estimated"] + 440


def test_documents_without_an_answer_are_skipped_and_asked_for_by_the_next_run(stub, capsys):
    stub.answer = lambda request: 503 if "number 2" in request.document else request.good()
    assert run(stub, "--retries=1") == 75
    assert "did not answer for 1 documents" in capsys.readouterr().err
    assert stub.asked()["Document number 2 is about a subject of its own."] == 2 and len(rows()) == 15
    stub.answer = Request.good
    assert run(stub) == 0
    assert len(rows()) == 18 and table(capsys)["already in the output"] == 5


@pytest.mark.parametrize(
    "status, code, sentence",
    [(503, 75, "Error code: 503"), (429, 75, "Error code: 429"), (400, 2, "refused: Error code")],
)
def test_a_run_stops_when_documents_in_a_row_have_no_answer(stub, status, code, sentence, capsys):
    write_corpus(30)
    stub.answer = lambda request: status
    assert run(stub, "--retries=0", "--concurrency=1") == code
    printed = capsys.readouterr()
    assert f"10 documents in a row have no answer, the last one: {sentence}" in printed.err
    assert len(stub.requests) == 10 and table(printed.out)["not asked"] == 20


def test_documents_without_an_answer_between_others_do_not_stop_a_run(stub, capsys):
    write_corpus(24)
    stub.answer = lambda request: 503 if int(re.search("[0-9]+", request.document)[0]) % 2 else request.good()
    assert run(stub, "--retries=0", "--concurrency=1") == 75
    assert table(capsys)["used"] == 12


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_run_stops_at_once_when_the_endpoint_refuses_everything(stub, status, capsys):
    stub.answer = lambda request: status
    assert run(stub, "--concurrency=1") == 2
    assert f"the endpoint refuses all requests: Error code: {status}" in capsys.readouterr().err
    assert len(stub.requests) == 1


def test_an_endpoint_that_is_not_there_is_one_sentence(stub, capsys):
    stub.server.server_close()
    assert run(stub, "--retries=1", "--limit=1") == 75
    assert "did not answer" in capsys.readouterr().err


# --- nonsense -------------------------------------------------------------------------------------------------------

COPY = "number 3 is about a subject of its own: and some more words"
NONSENSE = {
    "no JSON object": "I would rather not.",
    "empty answer": "<think>What a document.</think>",
    "wrong keys": {"questions": ["a"]},
    "wrong number of queries": {"queries": ["a", "b", "c"]},
    "empty query": {"queries": ["  "]},
    "query is not a text": {"queries": [7]},
    "query is too long": {"queries": ["word " * 100]},
    "query copies the document": {"queries": ["document number 3 is ABOUT a subject of its own"]},
}


@pytest.mark.parametrize("reason", NONSENSE)
def test_nonsense_is_asked_for_again_then_skipped_and_counted(stub, reason, capsys):
    def answer(request):
        bad = "number 3" in request.document and not request.is_choice
        return NONSENSE[reason] if bad else request.good()

    stub.answer = answer
    assert run(stub, "--reasks=2") == 0
    counts = table(capsys)
    assert len(rows()) == 15 and counts["used"] == 5 and counts[f"skipped: nonsense: {reason}"] == 1
    assert counts["documents read"] == 6 and counts[f"asked again or skipped: {reason}"] == 9
    again = [request for request in stub.requests if request.is_again]
    assert len(again) == 6 and all(reason in request.messages[2]["content"] for request in again)
    (skipped,) = rows("pairs.jsonl.skipped")
    assert skipped["document_id"] == "d3" and skipped["usage"]["prompt_tokens"] == 1000
    asked = len(stub.requests)
    assert run(stub) == 0 and len(stub.requests) == asked  # a skipped document is not paid for twice
    counts = table(capsys)
    assert counts["skipped by earlier runs"] == 1 and counts["already in the output"] == 5


@pytest.mark.parametrize(
    "choice, reason",
    [
        ({"personas": [1, 2, 99], "language": "en"}, "persona not in the list"),
        ({"personas": [1, 2], "language": "en"}, "wrong number of personas"),
        ({"personas": [1, 1, 1], "language": "en"}, "wrong number of personas"),
        ({"personas": [1, 2, 3], "language": "the language of poets"}, "no language code"),
        ({"personas": [1, 2, 3]}, "wrong keys"),
    ],
)
def test_a_choice_of_personas_that_is_nonsense_skips_the_document(stub, choice, reason, capsys):
    stub.answer = lambda request: choice
    assert run(stub, "--reasks=1") == 1
    printed = capsys.readouterr()
    assert f"none of 6 documents has queries; the most frequent reason is nonsense: {reason}" in printed.err
    assert len(stub.requests) == 12


def test_a_good_answer_to_the_second_request_is_used(stub, capsys):
    stub.answer = lambda request: request.good() if request.is_again else "Sure! Which ones?"
    assert run(stub) == 0
    counts = table(capsys)
    assert len(rows()) == 18 and counts["asked again or skipped: no JSON object"] == 24 and counts["answers"] == 48
    seeds = [request.body["seed"] for request in stub.requests]
    assert len(set(seeds)) == len(seeds)  # with the same seed, a model might repeat its answer


def test_an_answer_that_is_cut_at_its_most_tokens_is_named_so(stub, capsys):
    stub.answer, stub.finish = lambda request: '{"personas": [1, 2', "length"
    assert run(stub, "--limit=1", "--reasks=0") == 1
    assert table(capsys)["skipped: nonsense: answer is cut at its most tokens"] == 1


def test_queries_of_an_answer_that_is_good_in_part_are_kept_and_the_others_counted(stub, capsys):
    def answer(request):
        return request.good() if request.is_choice else {"queries": ["a good one", " ", "a GOOD one."]}

    stub.answer = answer
    assert run(stub, "--personas_per_document=1", "--limit=1") == 0
    counts = table(capsys)
    assert [row["query"] for row in rows()] == ["a good one"] and rows()[0]["usage"]["queries"] == 1
    assert counts["queries requested"] == 3 and counts["written"] == 1
    assert counts["skipped: empty query"] == counts["skipped: query is repeated"] == 1


@pytest.mark.parametrize(
    "text",
    [
        'Sure, here you are:\n```json\n{"queries": ["a"]}\n```\nAsk me more!',
        'Not {this}, but {"queries": ["a"]}',
        'I thought of {"queries": ["b"]} first. {"queries": ["a"]}',
    ],
)
def test_prose_around_the_json_is_ignored_and_counted(text):
    parsed = prompts.parse_queries(text, "d", 1, prompts.Settings(prompts.read_personas()))
    assert parsed == (["a"], [], True)


@pytest.mark.parametrize(
    "text", ['{"queries": ["a"]}', '```JSON\n{"queries": [" a\n "]}```', '<think>{"x": 1}</think>\n{"queries": ["a"]}']
)
def test_fences_reasoning_and_line_breaks_are_no_prose(text):
    assert prompts.parse_queries(text, "d", 1, prompts.Settings(prompts.read_personas())) == (["a"], [], False)


@pytest.mark.parametrize("text", ["{" * 5000, '{"a":' * 5000, "[1, 2]", '"queries"', "null"])
def test_text_without_an_object_is_no_json(text):
    assert prompts.find_json(text).faults == ["no JSON object"]


@pytest.mark.parametrize(
    "query, document, is_copy",
    [
        (
            "Die Katze sitzt auf der Matte und sieht den Hund an?",
            "X die katze sitzt auf der Matte und sieht den Hund an.",
            1,
        ),
        ("sitzt auf der Matte", "Die Katze sitzt auf der Matte.", 0),  # common words are no copy
        (
            "猫は敷物の上に座って犬を静かに見つめているところだ",
            "ある日、猫は敷物の上に座って犬を静かに見つめているところだ。",
            1,
        ),
        ("猫はどこに座る", "猫はどこに座るか。", 0),
        ("Short.", "short", 1),  # the whole document
    ],
)
def test_a_copy_is_a_long_part_of_the_document_or_all_of_it(query, document, is_copy):
    answer = json.dumps({"queries": [query]})
    parsed = prompts.parse_queries(answer, document, 1, prompts.Settings(prompts.read_personas()))
    assert parsed.faults == ["query copies the document"] * is_copy


def test_a_query_that_cannot_be_written_is_refused():
    answer = r'{"queries": ["a \ud800"]}'
    parsed = prompts.parse_queries(answer, "d", 1, prompts.Settings(prompts.read_personas()))
    assert parsed.faults == ["query is not a text"]


# --- continuing -----------------------------------------------------------------------------------------------------


def unbroken(stub):
    """The rows of a run that nothing interrupts."""
    assert cli.main(arguments(stub)[:-1] + ["--output=whole.jsonl"]) == 0
    stub.requests = []
    return by_document(rows("whole.jsonl"))


def interrupt(stub, number, at):
    """Run the command in a process that gets a signal at request `at`; (code, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "embed.cli", *arguments(stub, "--concurrency=2")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    over, first = threading.Event(), threading.Lock()

    def answer(request):
        if len(stub.requests) >= at:
            if first.acquire(blocking=False):
                process.send_signal(number)
            over.wait(60)
        return request.good()

    stub.answer = answer
    try:
        out, error = process.communicate(timeout=120)
    finally:
        over.set()
    stub.answer = Request.good
    return process.returncode, out, error


def test_a_killed_run_continues_and_its_rows_are_those_of_an_unbroken_run(stub):
    whole = unbroken(stub)
    code, _, _ = interrupt(stub, signal.SIGKILL, at=14)
    assert code == -signal.SIGKILL
    kept = rows()
    assert kept and len(kept) < 18
    done = {row["document"] for row in kept}
    before = stub.asked()
    assert run(stub) == 0
    assert by_document(rows()) == whole and rows()[: len(kept)] == kept
    assert all(stub.asked()[document] == before[document] == 4 for document in done)


def test_ctrl_c_keeps_what_is_done_and_counts_what_was_spent(stub, capsys):
    whole = unbroken(stub)
    code, out, error = interrupt(stub, signal.SIGINT, at=14)
    assert code == 130 and "the same command does the rest" in error and "documents read" in out
    kept = rows()
    assert kept and len(kept) < 18 and "Traceback" not in error
    (spent,) = {row["reason"] for row in rows("pairs.jsonl.skipped")}
    assert spent == "interrupted"
    assert run(stub) == 0
    assert by_document(rows()) == whole
    # Only requests without an answer, at most one per open document, are in no count.
    counts = table(capsys)
    assert counts["tokens"] + counts["tokens of earlier runs"] >= (len(stub.requests) - 2) * 110


@pytest.mark.parametrize("cut", [1, 40, "row", "rows"])
def test_an_incomplete_document_at_the_end_is_dropped_and_asked_for_again(stub, cut):
    whole = unbroken(stub)
    content = Path("whole.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    left = {"row": b"".join(lines[:-1]), "rows": b"".join(lines[:-2])}.get(
        cut, content[: -cut if cut in (1, 40) else 0]
    )
    Path("pairs.jsonl").write_bytes(left)
    assert run(stub) == 0
    assert by_document(rows()) == whole and set(stub.asked().values()) == {4} and len(stub.asked()) == 1


def test_a_first_row_that_is_incomplete_is_dropped(stub):
    whole = unbroken(stub)
    Path("pairs.jsonl").write_bytes(Path("whole.jsonl").read_bytes()[:30])
    assert run(stub) == 0 and by_document(rows()) == whole


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--model=other"], "was written with other model: 'm', not 'other'"),
        (["--seed=1"], "was written with other prompts or settings"),
        (["--languages", "de"], "was written with other prompts or settings"),
    ],
)
def test_an_output_of_another_model_or_other_settings_is_refused(stub, more, sentence, capsys):
    assert run(stub, "--limit=1") == 0
    before = Path("pairs.jsonl").read_bytes()
    assert run(stub, *more) == 2
    assert sentence in capsys.readouterr().err and Path("pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda text: text.replace("Document number 0", "Another number 0"),
            "'d0' of {} has another text in the corpus",
        ),
        (lambda text: text.replace("d0", "e0"), "'d0' of {} is missing in the corpus"),
    ],
)
def test_an_output_of_another_corpus_is_refused(stub, change, sentence, capsys):
    assert run(stub, "--limit=1") == 0
    corpus = Path("corpus.jsonl")
    corpus.write_text(change(corpus.read_text()))
    assert run(stub) == 2
    assert sentence.format(Path("pairs.jsonl").absolute()) in capsys.readouterr().err


@pytest.mark.parametrize("content", ["que", "notes\n", '{"query": "a"}\n', "[]\n"])
def test_a_file_of_something_else_is_not_touched(stub, content, capsys):
    Path("pairs.jsonl").write_text(content)
    assert run(stub) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert Path("pairs.jsonl").read_text() == content and not stub.requests


def test_a_missing_row_in_the_middle_is_an_error_that_names_the_line(stub, capsys):
    assert run(stub) == 0
    lines = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(lines[:4] + lines[5:]))
    assert run(stub) == 2
    assert "line 6 is damaged: the rows of a document are missing" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_one_sentence(stub, monkeypatch, capsys):
    def append(self, file, some):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embed.preparation.synthesis.Output._append", append)
    assert run(stub) == 1
    assert capsys.readouterr().err == "embed: error: [Errno 28] No space left on device\n"


# --- check ----------------------------------------------------------------------------------------------------------


def test_check_prints_prompts_answers_and_rows_of_one_document_and_writes_nothing(stub, capsys):
    assert run(stub, "--check") == 0
    out = capsys.readouterr().out
    assert set(stub.asked()) == {"Document number 0 is about a subject of its own."} and len(stub.requests) == 4
    for request in stub.requests:
        assert request.messages[0]["content"] in out and json.dumps(request.good()) in out
    assert out.count('{"query": "') == 3 and [file.name for file in Path().iterdir()] == ["corpus.jsonl"]


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--queries_per_document=0"], "queries_per_document=0 must be positive"),
        (["--concurrency=0"], "concurrency=0 must be at least 1"),
        (["--limit=0"], "--limit=0 must be at least 1"),
        (["--languages", "klingon speech"], "languages contains 'klingon speech'"),
        (["--base_url=localhost:8000"], "--base_url must be http://HOST/… or https://HOST/…"),
        (["--base_url=http://name:secret@host/v1"], "without a name or password"),
        (["--request=[]"], "--request=[] must be a JSON object"),
        (['--request={"model": "x"}'], "request sets 'model'"),
        (["--personas=none.txt"], "none.txt"),
        (["--api_key_variable=NOT_SET"], "must be the name of an environment variable that is set"),
        (["--output=s3://bucket/pairs.jsonl"], "must be on a disk"),
        (["--output=corpus.jsonl"], "is corpus.jsonl, which this command reads"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_the_first_request(stub, more, sentence, capsys):
    assert run(stub, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and "secret" not in line and not stub.requests


def test_a_missing_package_is_one_sentence(stub, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert run(stub) == 2
    assert "needs the package openai: pip install -e '.[synthesize]'" in capsys.readouterr().err


def test_personas_come_from_a_file(stub):
    Path("people.txt").write_text("# who asks\na pilot\n\na diver\na baker\n")
    assert run(stub, "--personas=people.txt", "--limit=2") == 0
    assert {row["persona"] for row in rows()} == {"a pilot", "a diver", "a baker"}


def test_a_longer_list_of_personas_is_drawn_from_for_each_document():
    settings = prompts.Settings(tuple(f"person {i}" for i in range(1000)))
    first, second = (prompts.candidates(settings, name) for name in "ab")
    assert len(set(first)) == len(first) == settings.candidates and set(first) != set(second)
    assert prompts.candidates(settings, "a") == first


def test_every_setting_changes_the_digest():
    settings = prompts.Settings(prompts.read_personas())
    changed = {"personas": ("a",) * 9, "languages": ("de",), "request": {"top_p": 1}, "temperature": 0.1}
    digests = {settings.digest}
    for field in dataclasses.fields(settings):
        value = changed.get(field.name, getattr(settings, field.name))
        digests.add(dataclasses.replace(settings, **{field.name: changed.get(field.name) or value + 1}).digest)
    assert len(digests) == 1 + len(dataclasses.fields(settings))
