"""Search among millions of vectors: time to build, memory, milliseconds of a query, and recall against exact int8.

    python benchmarks/search_scale.py --model=MODEL --texts 'DATA/*/*.jsonl.gz' --folder=TMP

A text is a string of at least 20 characters, cut to 300, in any row of --texts; 100,000 of them, drawn at random, get
the vectors e_1, e_2, … of the model. The vectors of the index are

    int8(e_i + s · (e_j - e_k)),    i in turn, (j, k) a random text and one of its ten nearest,

so a perturbation is a difference between two texts that resemble each other, as large as such differences are (s = 1)
and in the directions in which texts differ; uniform noise would differ in all directions alike, which makes bits look
better than they are. One text in fifty is held out, and the queries are such texts, which the index has not seen.

Milliseconds are those of single queries, one after the other: first with vectors.npy dropped from the page cache
(cold), then the same queries again (warm). Recall is the share of the ten nearest by `Index.search(…, exact=True)`.
Memory is that of a process that only searches: its peak with the pages of files that it read, and what is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from header import header
from tqdm import tqdm

from embed import inference
from embed.inference import Index
from embed.inference.corpus import find, read_jsonl
from embed.inference.index_files import Provenance
from embed.inference.index_writer import create
from embed.inference.segments import Block, Settings

TEXTS, CHARACTERS = 100_000, (20, 300)
HELD_OUT, NEIGHBORS, BLOCK, QUERIES = 50, 10, 1 << 15, 200


def encode(model: str, patterns: list[str], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vectors float32 of the texts, the nearest ten of each, vectors of held-out texts); kept in a folder."""
    files = [folder / f"{name}.npy" for name in ("texts", "near", "queries")]
    if not all(file.exists() for file in files):
        rows = (row for pattern in patterns for path in find([pattern]).values() for _, row in read_jsonl(path))
        values = (x for row in rows for x in row.values() if isinstance(x, str) and len(x) >= CHARACTERS[0])
        texts = list(dict.fromkeys(text[: CHARACTERS[1]] for text in values))
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:TEXTS]]
        vectors = np.stack(list(inference.load(model).encode_stream(tqdm(texts))))
        held = np.arange(len(vectors)) % HELD_OUT == 0
        np.save(files[0], vectors[~held])
        near = inference.search(vectors[~held], vectors[~held], NEIGHBORS + 1, "float32")[1][:, 1:]
        np.save(files[1], near)
        np.save(files[2], vectors[held])
    return tuple(np.load(file) for file in files)


def perturbed(vectors: np.ndarray, near: np.ndarray, count: int, scale: float) -> Iterator[Block]:
    """Blocks of `count` vectors int8."""
    rng = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        j = rng.integers(0, len(vectors), len(rows))
        k = near[j, rng.integers(0, NEIGHBORS, len(rows))]
        made = vectors[rows % len(vectors)] + scale * (vectors[j] - vectors[k])
        yield Block(np.round(127 * np.tanh(made)).astype(np.int8), [{"_id": str(row)} for row in rows])


def measure(folder: Path, queries: np.ndarray) -> dict:
    """What a process that only searches measures."""
    start = time.perf_counter()
    searched = Index.load(folder, check=False)
    result = {"load": time.perf_counter() - start}
    vectors = folder / "0" / "vectors.npy"
    searched.search(queries[:1], 10)
    for turn in ("cold", "warm"):
        if turn == "cold":
            with vectors.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seconds, found = [], []
        for query in queries:
            start = time.perf_counter()
            found.append(searched.search(query[None], 10)[1][0])
            seconds.append(time.perf_counter() - start)
        result[turn] = np.percentile(seconds, [50, 99]).tolist()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    peak, anonymous = (1024 * int(status[name].split()[0]) for name in ("VmHWM", "RssAnon"))
    return result | {"found": np.array(found).tolist(), "anonymous": anonymous, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model, best of 1,024 dimensions")
    parser.add_argument("--texts", nargs="+", help="globs of corpora, JSON lines")
    parser.add_argument("--vectors", nargs="+", type=int, default=[1_000_000, 30_000_000])
    parser.add_argument("--scale", type=float, default=1.0, help="s of the perturbation")
    parser.add_argument("--kind", choices=("exact", "binary", "ivf"), help="of the index (default: chosen by size)")
    parser.add_argument("--recall", type=float, default=0.95, help="that the index is tuned to")
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="of one model: vectors of texts, and indexes, which stay",
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # of a process that only searches
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, np.load(arguments.folder / "asked.npy"))))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    vectors, near, held_out = encode(arguments.model, arguments.texts, arguments.folder)
    queries = np.round(127 * np.tanh(held_out[:: max(1, len(held_out) // QUERIES)][:QUERIES])).astype(np.int8)
    np.save(arguments.folder / "asked.npy", queries)
    print(header("faiss-cpu") + f"\n{len(vectors):,} texts of {vectors.shape[1]} dimensions, {len(queries)} queries\n")
    columns = ["vectors", "kind", "lists read", "candidates", "build, s", "GB on disk", "load, s"]
    columns += [
        "cold p50, ms",
        "p99",
        "warm p50, ms",
        "p99",
        "GB in memory",
        "of it anonymous",
        "recall tuned",
        "recall@10",
    ]
    columns += ["cosine of the 1st", "of the 10th"]
    print(f"| {' | '.join(columns)} |\n|{'--:|' * len(columns)}", flush=True)
    for count in arguments.vectors:
        print(report(count, vectors, near, queries, arguments), flush=True)


def report(count: int, vectors: np.ndarray, near: np.ndarray, queries: np.ndarray, arguments) -> str:
    """A line of the table."""
    folder = arguments.folder / f"index-{count}"
    start = time.perf_counter()
    blocks = perturbed(vectors, near, count, arguments.scale)
    made = create(folder, blocks, Provenance("int8"), Settings(arguments.kind, arguments.recall), overwrite=True)
    seconds = time.perf_counter() - start
    command = [sys.executable, __file__, f"--measure={folder}", f"--folder={arguments.folder}"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    scores, expected = made.search(queries, 10, exact=True)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(result["found"], expected.tolist())])
    (segment,) = made.segments
    found = segment.parameters
    cells = [f"{count:,}", segment.kind]
    cells += [f"{found.nprobe:,} of {segment.num_lists:,}", f"{found.candidates:,}"] if found else ["", ""]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    cells += [f"{seconds:,.0f}", f"{size / 1e9:.1f}", f"{result['load']:.1f}"]
    cells += [f"{1e3 * x:.1f}" for turn in ("cold", "warm") for x in result[turn]]
    cells += [f"{result[name] / 1e9:.1f}" for name in ("peak", "anonymous")]
    cells += [f"{found.recall:.3f}" if found else "", f"{recall:.3f}"]
    return f"| {' | '.join([*cells, *(f'{np.median(scores[:, rank]):.3f}' for rank in (0, 9))])} |"


if __name__ == "__main__":
    main()
