"""Encode a corpus to vectors: a file or single texts to one file, or any number of large files to a folder of shards.

With --input, the same command continues an interrupted run, and any number of processes, or a runner of Apache Beam,
share the work.
"""

import argparse
import dataclasses
import functools
import io
import json
import os
import threading
from collections import Counter

import jax
import numpy as np

from embed import distributed, paths
from embed.cli import common
from embed.console import say
from embed.inference import corpus, shards
from embed.models import sharding

CORPUS = (
    'JSONL rows {"_id", "text"} or {"_id", "chunks": […]} (embedded in context), either with "title": docs/search.md'
)
OUTPUT = (
    "the file to write, one row per text or chunk, in order: vectors, or as FILE.parquet with ids and texts, such as a "
    "distill stage learns from; with --input a folder"
)
SHARD_ROWS = 65_536
_ONE_AT_A_TIME = threading.Lock()  # a worker of Beam may run several jobs in threads, which share its devices


def main(argv: list[str] | None = None) -> int:
    """Run `embed encode arguments`; returns the exit code."""
    parser = common.Parser("encode", __doc__)
    common.add_encoder_arguments(parser)
    common.add_vector_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", help=CORPUS)
    source.add_argument("--text", action="append", help="a text (may be repeated)")
    source.add_argument(
        "--input",
        action="append",
        help="a file or glob of JSONL (also in gzip) or Parquet with rows as in --corpus (may be repeated)",
    )
    common.add_chunker_arguments(parser)
    common.add_output_arguments(parser, OUTPUT)
    parser.add_argument("--shard_rows", type=int, help=f"with --input: rows of a shard (default {SHARD_ROWS:,})")
    parser.add_argument("--skip_empty", action="store_true", help="with --input: leave out and count rows without text")
    common.add_runner_arguments(parser)
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_texts("--text", args.text or [])
    common.check_chunker(args)
    options = common.runner_options(args)
    if args.input:
        with common.keeps_work():
            return _to_shards(args, options)
    common.refuse_given(args, ("shard_rows", "skip_empty", "runner"), "is for --input")
    return _to_file(args)


def _to_file(args: argparse.Namespace) -> int:
    """All vectors in one file."""
    is_parquet = args.output.lower().endswith(".parquet")
    if is_parquet:
        corpus.arrow(f"--output={args.output}")
    common.join(args, saves_at_sigterm=False)
    with common.output(args, inputs=[args.model, args.corpus], is_our_file=are_vectors):
        common.check_vectors(args.model, [args.precision], args.truncate_dim)
        if args.corpus:
            rows = corpus.read_rows(args.corpus)
            corpus.refuse_empty(rows, args.corpus)
        else:
            rows = [corpus.Row(f"--text={text!r:.40}", str(i), [text], {}) for i, text in enumerate(args.text)]
        encoder = common.load_encoder(args)
        settings = _settings(args, encoder)
        segments, _ = shards.tokenize(encoder, rows, settings)
        result = shards.encode(encoder, rows, segments, settings, progress=True)
        if not distributed.is_first():
            return 0
        if is_parquet:
            content = shards.parquet(result)
        else:
            opened = io.BytesIO()
            np.save(opened, result.vectors, allow_pickle=False)
            content = opened.getvalue()
        paths.write(args.output, content)
    say(f"{result.vectors.dtype}{list(result.vectors.shape)} written to {args.output}")
    return 0


def _settings(args: argparse.Namespace, encoder) -> shards.Settings:
    chunker = common.make_chunker(args, encoder)
    return shards.Settings(args.precision, args.truncate_dim, chunker, args.truncate, args.skip_empty)


def are_vectors(file) -> bool:
    """Whether a file is what this verb writes: a .npy file, or a Parquet file of vectors."""
    if str(file).lower().endswith(".parquet"):
        return shards.is_parquet(file)
    with paths.path(file).open("rb") as opened:
        return opened.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX


# --- shards -----------------------------------------------------------------------------------------------------------


def _to_shards(args: argparse.Namespace, options: list[str]) -> int:
    """The vectors of --input in shards."""
    if args.overwrite:
        raise ValueError("--overwrite is not for --input, which continues its output: choose another folder")
    if args.shard_rows is None:
        args.shard_rows = SHARD_ROWS
    if args.shard_rows < 1:
        raise ValueError(f"--shard_rows={args.shard_rows} must be at least 1")
    if args.runner:
        if args.distributed or args.num_processes is not None:
            raise ValueError("--runner has its own workers: leave out --distributed and --num_processes")
        from embed.preparation import runners

        runners.check(args.runner)
    corpus.arrow("--input")
    common.join(args, saves_at_sigterm=False, alone=True)
    alone = not distributed.is_joined() and args.num_processes is not None  # shares the work, but waits for nobody
    k, n = (args.process_id, args.num_processes) if alone else (jax.process_index(), jax.process_count())
    with common.output(
        args, inputs=[args.model], is_ours=shards.is_ours, continues=True, share=f".{k}-of-{n}" if alone else ""
    ):
        common.check_vectors(args.model, [args.precision], args.truncate_dim)
        files = corpus.find(args.input)
        if inside := [file for file in files.values() if paths.resolve(args.output) in paths.resolve(file).parents]:
            raise ValueError(
                f"--input matches {inside[0]}, which is inside --output={args.output}: choose another path"
            )
        _load.cache_clear()  # the same folder may have held another model
        encoder, settings = _load(json.dumps(vars(args)))
        chunker = {name: getattr(args, name) for name in ("chunker", "chunk_tokens", "overlap", "language")}
        info = shards.describe(encoder, files, args.shard_rows, settings, chunker if args.chunker else None)
        distributed.on_first_process(lambda: shards.begin(args.output, info), task=f"write {args.output}")
        if args.runner:
            counts = _run_on_beam(args, options, files)
        else:
            counts = shards.write(encoder, args.output, files, args.shard_rows, settings, (k, n))
            counts = Counter(dict(zip(shards.COUNTS, distributed.total([counts[name] for name in shards.COUNTS]))))
    say(("" if not alone else f"process {k} of {n}: ") + summary(counts, args.output))
    return 0


def summary(counts: Counter, output: str) -> str:
    """What was done, in one sentence; counts are shards.COUNTS."""
    text = {name: f"{counts[name]:,}" for name in shards.COUNTS}
    parts = [f"{text['rows']} rows", f"{text['chunks']} vectors"]
    parts += [f"{text['cut']} rows cut to the longest text"] * bool(counts["cut"])
    parts += [f"{text['empty']} rows without text left out"] * bool(counts["empty"])
    parts += [f"{text['changed']} shards written again, because their rows had changed"] * bool(counts["changed"])
    parts += [f"{text['removed']} shards removed, because their files are shorter now"] * bool(counts["removed"])
    return f"{text['written']} shards written to {output}, {text['there']} were there: {', '.join(parts)}"


@functools.lru_cache(maxsize=1)
def _load(arguments: str) -> tuple:
    """(encoder on the devices of this process, settings) of arguments in JSON, once per process."""
    args = argparse.Namespace(**json.loads(arguments))
    encoder = common.load_encoder(args, sharding.make_mesh(devices=jax.local_devices()))
    return encoder, _settings(args, encoder)


# --- on Apache Beam ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What all jobs share."""

    scratch: str
    output: str
    arguments: str  # of this verb, in JSON


def _run_on_beam(args: argparse.Namespace, options: list[str], files: dict[str, str]) -> Counter:
    """Write the shards that are missing on Beam, and return the counts of `shards.write`.

    This process reads the inputs once, to know where their parts start.
    """
    from embed.preparation import runners

    output = paths.path(args.output)
    work = Work(os.fspath(output / ".beam.partial"), os.fspath(output), json.dumps(vars(args)))
    counts, jobs, digests = Counter(), [], []
    for name, part in shards.missing(output, files, args.shard_rows, counts):
        shard = os.fspath(output / shards.shard_name(name, part.start.number))
        jobs.append(runners.Job(encode_part, (len(jobs), part.start, name, part.path), 0, shard))
        digests.append(part.digest)
    try:
        if jobs:
            runners.run_on_beam(jobs, work, args.runner, options)
    finally:
        if paths.path(work.scratch).exists():
            paths.path(work.scratch).rmtree()
    paths.entries(output)  # forgets what a client of a bucket knew
    for job, digest in zip(jobs, digests):
        about = shards.read_about(job.marker) if paths.path(job.marker).exists() else None
        if not about or about.digest != digest:
            raise ValueError(
                f"{job.marker} was not written: the workers may not reach this folder, which must be in a bucket or on "
                "a disk that all share"
            )
        counts.update(shards.count(about), written=1)
    return counts


def encode_part(work: Work, number: int, start: corpus.Start, name: str, path: str, progress) -> None:
    """Job `number`: write the shard of the part of a file that begins at `start`."""
    with _ONE_AT_A_TIME:
        encoder, settings = _load(work.arguments)
        part = next(corpus.read_parts(path, json.loads(work.arguments)["shard_rows"], start=start))
        shards.write_part(encoder, work.output, name, part, settings)
