"""Turns sources into the stores that trainers read, as a stream that an interruption does not lose.

    prepare(directory, gin_file="configs/data/python_docs.gin")

    directory/tokenizer/
    directory/tasks/TASK/               store of `embed.data.store`, shuffled
    directory/mixtures.json             {mixture: {task: rate}}
    directory/evaluation/SET/SPLIT/     set of `embed.preparation.evaluation_sets`
    directory/hygiene.md, hygiene.json  what was dropped and found, by task
    directory/info.json                 arguments, counts by reason, seconds; written last

Until info.json is there, directory/plan.json says what is being prepared and directory/scratch holds what is done
(`embed.preparation.stream`). The same call continues; another one is refused.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from embed import paths, tokenizers
from embed.config import differences
from embed.console import make_console, quiet
from embed.preparation import (
    evaluation_sets,
    hygiene,
    hygiene_report,
    rates,
    runners,
    settings,
    stream,
    summary,
    vocabulary,
)
from embed.preparation.counts import Counts
from embed.preparation.runners import Clock, Job
from embed.preparation.settings import Settings
from embed.preparation.sources import Shard, Source
from embed.preparation.stream import Work
from embed.preparation.tasks import Task, all_texts, named

_WINDOW = 600  # characters per training text of the vocabulary
PLAN, INFO, SCRATCH = "plan.json", "info.json", "scratch"
EXTERNAL = "hygiene.evaluation_sets "  # before the name of a set that only hygiene names


def prepare(
    directory: str | Path,
    *,
    gin_file: str | Path,
    gin_bindings: Sequence[str] = (),
    data_root: str = "",
    vocab_size: int = 8192,
    split_identifiers: bool = True,
    seed: int = 0,
    limit: int | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    processes: int | None = None,
    runner: str = "",
    runner_options: Sequence[str] = (),
) -> None:
    """Writes `directory`. Does nothing if it is complete and was prepared with the same arguments.

    `data_root`: what {data_root} stands for in the gin file. `limit`: maximum number of rows per task, for trials. With
    `tokenizer`, no vocabulary is trained. `processes`: local worker processes (None: one per core). `runner`: a runner
    of Apache Beam, with its options, instead of local processes.

    Raises ValueError for a directory with other arguments or sources (names them), for unknown and unused gin bindings
    (names the nearest valid key), for empty tasks and sets, for too many bad rows, and for a `vocab_size` that the
    texts do not allow.
    """
    runners.check(runner)
    directory = paths.path(directory)
    bound = settings.bind(gin_file, gin_bindings, data_root=data_root, limit=limit)
    if tokenizer:
        vocab_size, split_identifiers = tokenizer.vocab_size, None
    arguments = {
        "gin": settings.bindings(gin_file, gin_bindings),
        "vocab_size": vocab_size,
        "split_identifiers": split_identifiers,
        "seed": seed,
        "limit": limit,
        "tokenizer": tokenizer.digest if tokenizer else None,
        "modules": {name: _module_digest(name) for name in bound.modules},
    }
    arguments = json.loads(json.dumps(arguments))
    stream.load_tokenizer.cache_clear()  # the same folder may have held another one
    console = make_console(stderr=True)
    if (directory / INFO).exists():
        if differing := _differing(directory / INFO, arguments):
            raise ValueError(
                f"{directory} was prepared with other arguments: {differing}; choose another directory or remove it"
            )
        _remove_scratch(directory)  # unless a run that was interrupted at its end did so
        _check_sources(directory, bound)
        console.print(f"data: {directory} is complete")
        return
    if (directory / PLAN).exists():
        if not (differing := _differing(directory / PLAN, arguments)):
            console.print(f"data: continues {directory}")
        elif stream.is_begun(directory / SCRATCH):
            raise ValueError(
                f"{directory} is half prepared with other arguments: {differing}; choose another directory or remove it"
            )
        else:
            console.print(f"data: begins {directory} anew: {differing}")
            for name in (SCRATCH, "tokenizer", "evaluation"):
                if (directory / name).exists():
                    (directory / name).rmtree()
            (directory / PLAN).unlink()
    elif not paths.is_empty(directory):
        raise ValueError(f"{directory} exists and has no prepared data (no {INFO}); choose another directory")
    with summary.Bar(console) as bar:
        info = _Preparation(directory, bound, arguments, bar, tokenizer, processes, runner, runner_options).run()
    summary.show(console, info)


def _check_sources(directory, bound: Settings) -> None:
    """ValueError if sources on a disk are not those that complete data were made of. Others are not asked.

    Data outlive their sources: those that are not there any more are not compared.
    """
    recorded, now = paths.read_json(directory / INFO)["sources"]["identity"], {}
    for name, source in _sources(directory, bound, missing_ok=True).items():
        if name in recorded:
            with contextlib.suppress(ValueError, OSError):
                if source.is_local():
                    now[name] = source.identity()
    if changed := _changed({name: recorded[name] for name in now}, now):
        raise ValueError(
            f"the sources of {', '.join(changed)} are not those that {directory} was prepared from: choose another "
            "directory, remove it, or restore them"
        )


def _sources(directory, bound: Settings, *, missing_ok: bool = False) -> dict[str, Source]:
    """{name in `identity`: source} of the tasks of a gin file, and of evaluation sets that only hygiene names."""
    result = {name: task.source for name, task in bound.tasks.items()}
    for about in bound.hygiene.values():
        sets = {name: directory / "evaluation" / name for name in bound.evaluation.sets}
        for name, source in hygiene.evaluation_sources(about, sets, missing_ok=missing_ok).items():
            if name not in sets:
                result[f"{EXTERNAL}{name}"] = source
    return result


def _changed(recorded: Mapping, now: Mapping) -> list[str]:
    """The names whose value is not the recorded one, sorted."""
    now = json.loads(json.dumps(now))
    return sorted(name for name in {*recorded, *now} if recorded.get(name) != now.get(name))


def _differing(file, arguments: Mapping) -> str:
    """The arguments recorded in a file that differ from these, as text; "" if none does."""
    recorded = paths.read_json(file)["arguments"]
    return "; ".join(
        f"{name.removeprefix('gin.')} was {was!r}, now {now!r}" for name, was, now in differences(recorded, arguments)
    )


def _remove_scratch(directory) -> None:
    """Removes what only an unfinished preparation needs."""
    if (directory / SCRATCH).exists():
        (directory / SCRATCH).rmtree()
    if (directory / PLAN).exists():
        (directory / PLAN).unlink()


def _check_examples(task: str, count: int, dropped: Mapping[str, int]) -> None:
    if not count:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in dropped.items() if number)
        hint = (
            '; hygiene.evaluation_texts = ("queries",) compares no documents, which may be those of training too'
            if dropped.get(hygiene.CONTAMINATED)
            else ""
        )
        raise ValueError(f"task {task!r} has no example left ({reasons or 'its rows give none'}){hint}")


class _Preparation:
    """The parts of `prepare` in order. Each part that is done already is skipped."""

    def __init__(self, directory, bound: Settings, arguments, bar, tokenizer, processes, runner, runner_options):
        self.directory, self.bound, self.arguments, self.tokenizer = directory, bound, arguments, tokenizer
        self.scratch = directory / SCRATCH
        self.processes, self.runner, self.runner_options = processes, runner, runner_options
        self.bar, self.clock = bar, Clock(bar.start)

    def run(self) -> dict:
        work, identity, reports = self._plan()
        with self.clock.part("tokenizer"):
            self._make_tokenizer(work)
        self._map(work, "evaluation sets", self._evaluation_jobs(work, identity))
        names = self.bound.evaluation.sets
        sets = {f"evaluation/{name}": paths.read_json(evaluation_sets.marker(work, name)) for name in names}
        with self.clock.part("index evaluation sets"):
            self._index_evaluation_sets(work)
        self._map(work, "read and tokenize", self._shard_jobs(work))
        counts = {name: self._counts(work, name) for name in work.tasks}
        for name in work.tasks:
            stream.list_parts(work, "map_shard", name)
        if work.near_groups():
            self._map(work, "near duplicates", self._near_jobs(work))
            for group in work.near_groups():
                stream.list_parts(work, "map_near", group)
        self._map(work, "write stores", self._bucket_jobs(work))
        with self.clock.part("mixtures"):
            counts = {name: self._close(work, name, counts[name]) for name in work.tasks}
            mixtures = rates.of_mixtures(self.bound.mixtures, work, counts)
        paths.write_json(self.directory / "mixtures.json", mixtures)
        hygiene_report.write(self.directory, work, counts)
        info = {
            "arguments": self.arguments,
            "vocabulary": {"digest": self.tokenizer.digest, "size": self.tokenizer.vocab_size},
            "counts": counts | sets,
            "sources": {"identity": identity, "reports": reports},
            "seconds": self.clock.seconds,
        }
        paths.write_json(self.directory / INFO, info)
        _remove_scratch(self.directory)
        return info

    def _plan(self) -> tuple[Work, dict, dict]:
        """The work to do, what identifies its sources, and the reports of sources that were built."""
        bound = self.bound
        plan = self.directory / PLAN
        recorded = paths.read_json(plan).get("identity", {}) if plan.exists() else {}
        # The content that was read until then. Everything reads these sources.
        sources = {n: source.pinned(recorded.get(n, {})) for n, source in _sources(self.directory, bound).items()}
        for name, task in bound.tasks.items():
            bound.tasks[name] = dataclasses.replace(task, source=sources[name])
        self.external = {n.removeprefix(EXTERNAL): source for n, source in sources.items() if n not in bound.tasks}
        tasks: dict[str, object] = {name: bound.tasks[name] for name in bound.trained() if name in bound.tasks}
        for name in bound.registered:
            tasks[name] = _import_seqio().adapt(name, bound.mixtures.modules)
        if not (self.directory / PLAN).exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            paths.write_json(self.directory / PLAN, {"arguments": self.arguments})
        shards, reports = {}, {}
        with self.clock.part("list sources"):
            for name in sorted({*tasks, *bound.evaluation.sets.values(), *bound.vocabulary.tasks}):
                task = tasks.get(name) or bound.tasks[name]
                source = sources.setdefault(name, task)
                with named(name):
                    shards[name] = []
                    if task.kind != "retrieval":
                        source.build(self.scratch)
                        shards[name] = source.shards()
                    if report := source.report():
                        reports[name] = report
            identity = {}
            for name, source in sources.items():
                with named(name) if name in {*tasks, *bound.tasks} else contextlib.nullcontext():
                    identity[name] = source.identity()
        buckets = {name: stream.num_buckets(tasks[name], shards[name]) for name in tasks}
        plan = {
            "arguments": self.arguments,
            "identity": identity,
            "shards": {name: len(shards[name]) for name in tasks},
            "buckets": buckets,
        }
        plan = json.loads(json.dumps(plan))
        recorded = paths.read_json(self.directory / PLAN)
        if "identity" in recorded and recorded != plan:
            changed = {name for what in plan if what != "arguments" for name in _changed(recorded[what], plan[what])}
            raise ValueError(
                f"the sources of {', '.join(sorted(changed))} have changed since this preparation began: remove "
                f"{self.directory}, or restore them"
            )
        paths.write_json(self.directory / PLAN, plan)
        work = Work(
            scratch=os.fspath(self.scratch),
            target=os.fspath(self.directory / "tasks"),
            tokenizer=os.fspath(self.directory / "tokenizer"),
            tasks=tasks,
            shards=shards,
            buckets=buckets,
            seed=self.arguments["seed"],
            limit=self.arguments["limit"] or 0,
            hygiene=bound.hygiene,
        )
        return work, identity, reports

    def _make_tokenizer(self, work: Work) -> None:
        folder = self.directory / "tokenizer"
        if self.tokenizer:
            self.tokenizer.save(folder)
            return
        if not (folder / tokenizers.SENTENCEPIECE_FILES[0]).exists():
            vocabulary.train_sentencepiece(
                self._vocabulary_texts(work),
                folder,
                vocab_size=self.arguments["vocab_size"],
                split_identifiers=self.arguments["split_identifiers"],
            )
        self.tokenizer = tokenizers.load(folder)
        if self.tokenizer.vocab_size < self.arguments["vocab_size"]:
            self.bar.say(
                f"data: the vocabulary has {self.tokenizer.vocab_size:,} pieces, fewer than config.data.vocab_size="
                f"{self.arguments['vocab_size']:,}: its texts give no more"
            )

    def _vocabulary_texts(self, work: Work) -> Iterator[str]:
        """Windows of the texts that the vocabulary is trained on, the same number of characters from each task."""
        about = self.bound.vocabulary
        ours = [name for name, task in work.tasks.items() if isinstance(task, Task)]
        names = list(about.tasks) or [name for name in ours if work.tasks[name].kind == "text"] or ours
        if not names:
            raise ValueError(
                "a vocabulary is trained on texts of tasks of the gin file, and no mixture has one: set "
                "config.data.tokenizer, or vocabulary.tasks in the gin file"
            )
        for name in names:
            task, shards = self.bound.tasks[name], work.shards[name]
            rng = random.Random(f"{self.arguments['seed']} vocabulary {name}")
            chosen = sorted(rng.sample(range(len(shards)), min(len(shards), 32)))
            counts = Counts()
            for index in chosen:
                share = about.characters // (len(names) * len(chosen))
                yield from _windows(task, shards[index], counts, share, self.arguments["limit"] or 0, rng)
            with named(name):
                counts.check_made()

    def _evaluation_jobs(self, work: Work, identity: Mapping) -> list[Job]:
        jobs = []
        for name, task_name in self.bound.evaluation.sets.items():
            task, size = self.bound.tasks[task_name], sum(shard.bytes for shard in work.shards[task_name])
            if task.kind == "retrieval":
                size = _bytes(identity[task_name])
                task = dataclasses.replace(task, source=task.source.with_parts())
            target = os.fspath(self.directory / "evaluation" / name)
            same = [other for other, of in self.bound.evaluation.sets.items() if of == task_name]
            part = same.index(name), len(same)
            arguments = (name, self.bound.evaluation.max_queries, task_name, task, part, target, size)
            marker = os.fspath(evaluation_sets.marker(work, name))
            jobs.append(Job(evaluation_sets.write_set, arguments, size, marker))
        return jobs

    def _index_evaluation_sets(self, work: Work) -> None:
        """Writes the indexes that training examples are compared with."""
        sets = {name: self.directory / "evaluation" / name for name in self.bound.evaluation.sets}
        for name, about in work.hygiene.items():
            if about.evaluation_sets:
                hygiene.build_index(about, work.index(name), sets, self.scratch, self.external)

    def _shard_jobs(self, work: Work) -> list[Job]:
        return [
            Job(stream.map_shard, (name, index), shard.bytes, os.fspath(work.marker(name, index)))
            for name in work.tasks
            for index, shard in enumerate(work.shards[name])
        ]

    def _near_jobs(self, work: Work) -> list[Job]:
        jobs = []
        for group, tasks in work.near_groups().items():
            size = sum(shard.bytes for name in tasks for shard in work.shards[name]) // work.near_buckets(group)
            jobs += [
                Job(stream.map_near, (group, bucket), size, os.fspath(work.near_marker(group, bucket)))
                for bucket in range(work.near_buckets(group))
            ]
        return jobs

    def _bucket_jobs(self, work: Work) -> list[Job]:
        jobs = []
        for name in work.tasks:
            size = sum(shard.bytes for shard in work.shards[name]) // work.buckets[name]
            jobs += [
                Job(stream.map_bucket, (name, bucket), size, os.fspath(work.bucket_marker(name, bucket)))
                for bucket in range(work.buckets[name])
            ]
        return jobs

    def _map(self, work: Work, part: str, jobs: list[Job]) -> None:
        with self.clock.part(part):
            jobs = runners.unfinished(jobs)
            if not jobs:
                return
            if self.runner:
                runners.run_on_beam(jobs, work, self.runner, self.runner_options)
            else:
                self.bar.total(sum(job.bytes for job in jobs))
                runners.run_locally(jobs, work, self.processes, self.bar.advance)
            if missing := runners.unfinished(jobs):
                raise ValueError(
                    f"{len(missing):,} of {len(jobs):,} units of work left no marker, such as {missing[0].marker}: the "
                    "workers may not reach this folder, which must be in a bucket or on a disk that all share"
                )

    def _counts(self, work: Work, name: str) -> Counts:
        counts = Counts()
        for marker in stream.markers(work, "map_shard", name):
            counts.add(Counts.from_json(marker["counts"]))
        with named(name):
            counts.check(work.tasks[name].max_bad)
        _check_examples(name, counts.examples, counts.dropped)
        return counts

    def _close(self, work: Work, name: str, counts: Counts) -> dict:
        """Makes a store of its parts, and returns what is known of it."""
        tokens, after, stored = Counter(), Counter(), 0
        for marker in stream.markers(work, "map_bucket", name):
            tokens.update(marker["tokens"])
            after.update(marker["counts"])
            stored += marker["examples"]
        expected = counts.examples - after[stream.DUPLICATES] - after[stream.NEAR] + after[stream.REPEATED]
        if stored != expected:
            raise ValueError(
                f"task {name!r} has {stored:,} examples in its store, but the counts say {expected:,}: files of "
                f"{self.directory} are missing or from another preparation; remove it"
            )
        dropped = counts.dropped + Counter({why: n for why, n in after.items() if why != stream.REPEATED})
        _check_examples(name, stored, dropped)
        result = {
            "rows": counts.rows_read,
            "examples": stored,
            "tokens": dict(tokens),
            "dropped": dict(dropped),
            "read": counts.to_json(),
            "after": dict(after),
        }
        about = {"task": name, "stage": work.stage(name), "vocabulary": self.tokenizer.digest, **result}
        stream.close(work, name, about)
        return result


def _import_seqio():
    """The module of seqio tasks. Hides warnings about missing GPUs, which do not matter here."""
    verbose = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "0"  # jax sets level 1; 0 is the user's choice
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0" if verbose else "3"
    with contextlib.nullcontext() if verbose else quiet():
        from embed.preparation import seqio_tasks
    return seqio_tasks


def _module_digest(name: str) -> str | None:
    """The SHA-256 of a module's file; None if it has none."""
    file = getattr(importlib.import_module(name), "__file__", None)
    return paths.file_digest(file) if file else None


def _bytes(identity: Mapping) -> int:
    """The size of the files that the identity of a source lists."""
    parts = [part for part in identity.values() if isinstance(part, Mapping)]
    return sum(size for _, size, *_ in identity.get("files", ())) + sum(map(_bytes, parts))


def _windows(
    task: Task, shard: Shard, counts: Counts, characters: int, limit: int, rng: random.Random
) -> Iterator[str]:
    """Windows of the texts of a shard, up to two of each, about `characters` in total; `counts` is updated."""
    for example in task.examples(shard, counts, limit=limit):
        for text in all_texts(example):
            starts = range(0, len(text), _WINDOW)
            for start in rng.sample(starts, min(2, len(starts))):
                if characters <= 0:
                    return
                yield text[start : start + _WINDOW]
                characters -= min(_WINDOW, len(text) - start)
