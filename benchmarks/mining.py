"""Queries per second and peak memory of `embed.mining.mine`, next to an earlier commit and faiss's exact search.

    python benchmarks/mining.py --before=COMMIT --faiss=FOLDER

Each run is a process of its own; the runs of the ways alternate, and the table has their medians. Peak memory is that
of the process beyond what it has after its imports. The embeddings are random int8 in files (np.memmap); faiss
(IndexFlatIP, `pip install --target=FOLDER faiss-cpu`) gets them as normalized float32 and only ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from header import header

ROOT = Path(__file__).parent.parent
WINDOW, NEGATIVES, FAISS_QUERIES = (5, 100), 4, 1024


def load(folder: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("queries", "documents"))


def mine(folder: str):
    """A function that mines, and gives the negatives."""
    from embed import mining

    queries, documents = load(folder)
    positives = np.arange(len(queries)) % len(documents)

    def run() -> np.ndarray:
        mined = mining.mine(queries, documents, positives, num_negatives=NEGATIVES, rank_window=WINDOW, margin=0.05)
        return mined[0]

    return run


def rank_with_faiss(folder: str):
    """A function that ranks, and gives the first documents of the window."""
    import faiss

    queries, documents = load(folder)

    def normalized(vectors: np.ndarray) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def run() -> np.ndarray:
        index = faiss.IndexFlatIP(documents.shape[1])
        for start in range(0, len(documents), 1 << 16):
            index.add(normalized(documents[start : start + (1 << 16)]))
        blocks = (queries[start : start + FAISS_QUERIES] for start in range(0, len(queries), FAISS_QUERIES))
        return np.concatenate([index.search(normalized(block), WINDOW[1])[1][:, WINDOW[0] :] for block in blocks])

    return run


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(way: str, folder: str, output: str) -> dict:
    run = rank_with_faiss(folder) if way == "faiss" else mine(folder)
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    negatives = run()
    seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    np.save(output, negatives[:, :NEGATIVES])
    return seconds | {"memory": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="", help="a commit, whose `embed` is measured too")
    parser.add_argument("--faiss", default="", help="the folder where faiss is installed")
    parser.add_argument("--shape", type=int, nargs=3, default=(20_000, 200_000, 256), metavar=("Q", "N", "D"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    count, size, dimensions = arguments.shape
    ways = {"embed": ROOT} | ({"faiss": arguments.faiss} if arguments.faiss else {})
    with tempfile.TemporaryDirectory() as folder:
        if arguments.before:
            ways = {"before": f"{folder}/before"} | ways
            Path(f"{folder}/before").mkdir()
            archive = subprocess.run(["git", "archive", arguments.before], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", f"{folder}/before"], input=archive.stdout, check=True)
        rng = np.random.default_rng(0)
        directions = rng.normal(size=(1000, dimensions))
        for name, number in (("queries", count), ("documents", size)):
            vectors = rng.normal(size=(number, dimensions)) + directions[np.arange(number) % 1000]
            np.save(f"{folder}/{name}.npy", np.clip(np.rint(30 * vectors), -127, 127).astype(np.int8))
        results: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, path in ways.items():
                command = [sys.executable, __file__, "--measure", way, folder, f"{folder}/{way}.npy"]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                results[way].append(json.loads(done.stdout))
        ours = np.load(f"{folder}/embed.npy")
        same = {way: (np.load(f"{folder}/{way}.npy") == ours).mean() for way in ways if way != "faiss"}
    print(header() + "\n")
    print(f"{count:,} queries, {size:,} documents, {dimensions} dimensions, int8, ranks {WINDOW[0]}..{WINDOW[1] - 1}\n")
    print("| | queries/s | CPU seconds | peak memory, MB | negatives as now |\n|---|---:|---:|---:|---:|")
    names = {"before": f"commit {arguments.before}", "embed": "now", "faiss": "faiss IndexFlatIP, float32, ranks only"}
    for way, runs in results.items():
        seconds, cpu, memory = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "memory"))
        equal = f"{same[way]:.2%}" if way in same else ""
        print(f"| {names[way]} | {count / seconds:,.0f} | {cpu:.0f} | {memory / 1e6:,.0f} | {equal} |")


if __name__ == "__main__":
    main()
