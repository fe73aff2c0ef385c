"""`embed serve` under load: every accepted request counted, time per request, and memory over many of them.

    python benchmarks/serve.py --model=MODEL --requests=10000 --clients=16

The program starts the server as a user would. Clients send requests of 1 to 8 texts of 3 to 60 words without a pause,
and compare each answer with the vectors of `Encoder.encode`. Then four times as many clients do the same with a server
that lets only 2,000 tokens wait. Each request is answered rightly or refused with 429, and the counts of both sides
agree, or the benchmark fails. Memory is the resident memory of the server.
"""

import argparse
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from header import header

from embed import inference

WORDS = "read write the a file of list open close error path line value key cache index text token model vector".split()


def requests(count: int) -> list[list[str]]:
    """Requests of texts, the same in every run."""
    rng = np.random.default_rng(0)
    return [[" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(rng.integers(1, 9))] for _ in range(count)]


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


class Server:
    """`embed serve` in a process of its own."""

    def __init__(self, model: str, *options: str):
        command = [Path(sys.executable).with_name("embed"), "serve", f"--model=m={model}", "--port=0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def load(server: Server, asked: list[list[str]], expected: list[np.ndarray], times: int, clients: int) -> dict:
    """Send `times` requests from `clients` at once; what came back."""
    statuses, seconds, resident, wrong = [], [], [], []
    left = iter(range(times))  # next() of it is atomic
    host = server.url.removeprefix("http://")

    def client():
        connection = http.client.HTTPConnection(host, timeout=300)
        for number in left:
            which = number % len(asked)
            body, start = json.dumps({"model": "m", "input": asked[which]}), time.perf_counter()
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            statuses.append(answer.status)
            if answer.status == 200:
                seconds.append(time.perf_counter() - start)
                got = np.array([each["embedding"] for each in content["data"]], np.float32)
                if not np.allclose(got, expected[which], atol=1e-5):
                    wrong.append(number)
            if number % max(1, times // 10) == 0:
                resident.append(memory(server.process.pid))

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    total = time.perf_counter() - start
    resident.append(memory(server.process.pid))
    with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
        return {
            "counts": Counter(statuses),
            "wrong": len(wrong),
            "seconds": total,
            "percentiles": np.percentile(seconds, [50, 99]),
            "resident": resident,
            "metrics": metrics.read().decode(),
        }


def counted(metrics: str) -> dict[str, int]:
    """{status: requests of /v1/embeddings} of /metrics."""
    lines = re.findall(r"^embed_requests_total\{(.*?)\} (\S+)", metrics, re.M)
    pairs = (dict(re.findall(r'(\w+)="(.*?)"', labels)) | {"count": int(float(value))} for labels, value in lines)
    return {each["status"]: each["count"] for each in pairs if each["path"] == "/v1/embeddings"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    asked, encoder = requests(200), inference.load(arguments.model)
    expected = [encoder.encode(texts, normalize_embeddings=True) for texts in asked]
    print(
        header()
        + "\n\n| load | requests | answered | refused | wrong | requests/s | p50, ms | p99, ms | MB at each tenth |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|", flush=True)
    overload = ("--waiting_tokens=2000", "--tokens=2000")
    for name, clients, options in (("steady", arguments.clients, ()), ("too much", 4 * arguments.clients, overload)):
        with Server(arguments.model, *options) as server:
            result = load(server, asked, expected, arguments.requests, clients)
        counts, own = result["counts"], counted(result["metrics"])
        if {str(status): count for status, count in counts.items()} != own or not counts.keys() <= {200, 429}:
            raise SystemExit(f"the clients counted {json.dumps(counts)}, the server {json.dumps(own)}")
        if result["wrong"]:
            raise SystemExit(f"{result['wrong']} of {counts[200]} answers are not the vectors of the texts")
        cells = [name, arguments.requests, counts[200], counts[429], result["wrong"]]
        cells.append(round(arguments.requests / result["seconds"]))
        shown = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
        shown += [f"{1e3 * x:.0f}" for x in result["percentiles"]]
        shown.append(" ".join(f"{x / 1e6:.0f}" for x in result["resident"]))
        print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
