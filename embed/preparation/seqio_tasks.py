"""Prepared tasks and mixtures as those of seqio, and a user's own seqio tasks in a gin file.

`register("runs/x/data")` registers what is prepared.

A task that only seqio knows is registered by a module of mixtures.modules. Its output features are either texts
(dtype tf.string), named as the columns of a kind (`embed.preparation.tasks.COLUMNS`) and tokenized as any other, or
tokens (tf.int32), named as the columns of a store and made with `TokenizerVocabulary`.
"""

import dataclasses
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from embed import paths, tokenizers
from embed.data.loader import COLUMNS
from embed.data.store import Store
from embed.preparation import examples, tasks
from embed.preparation.counts import Counts
from embed.preparation.sources import Shard, Source
from embed.preparation.sources.files import Input, find_files
from embed.preparation.stream import BUCKET_BYTES
from embed.tokenizers import Tokenizer

BATCH = 256  # examples that are read or tokenized together


class TokenizerVocabulary(seqio.Vocabulary):
    """Our tokenizer as a seqio vocabulary: the same tokens as at inference, no EOS."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    bos_id = eos_id = unk_id = None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode([s])[0].tolist()

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):  # bytes in a graph, an array in eager mode
            return self.tokenizer.encode([tf.compat.as_text(np.asarray(text).item())])[0]

        tokens = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        tokens.set_shape([None])
        return tokens

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda i: self.tokenizer.decode(i).encode(), [ids], tf.string, stateful=False)

    def __eq__(self, other) -> bool:
        return isinstance(other, TokenizerVocabulary) and other.tokenizer.digest == self.tokenizer.digest

    def __hash__(self) -> int:
        return hash(self.tokenizer.digest)


class _Source(seqio.DataSource):
    """The examples of a store; its buckets are the shards."""

    def __init__(self, path):
        store = Store(path)
        super().__init__(splits=("train",), num_input_examples={"train": len(store)})
        self._store, self.path = store, path

        self.columns = store.columns

    supports_arbitrary_sharding = False

    def list_shards(self, split: str) -> Sequence[str]:
        return [f"{i}" for i in range(len(self._store.bounds) - 1)]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_) -> tf.data.Dataset:
        shards = np.arange(len(self.list_shards(split)))
        if shard_info and shard_info.num_shards > 1:
            shards = shards[shard_info.index :: shard_info.num_shards]
        if shuffle:
            shards = np.random.default_rng(seed).permutation(shards)

        def generate():
            for shard in shards:
                first, last = self._store.bounds[shard : shard + 2]
                for start in range(first, last, BATCH):
                    yield from self._store.read(np.arange(start, min(start + BATCH, last)))

        signature = {name: tf.TensorSpec([None], tf.int32) for name in self._store.columns}
        return tf.data.Dataset.from_generator(generate, output_signature=signature)


def register(directory) -> None:
    """Registers (anew) the tasks and mixtures of prepared data with seqio, under their names."""
    directory = paths.path(directory)
    mixtures = paths.read_json(directory / "mixtures.json")
    vocabulary = TokenizerVocabulary(tokenizers.load(directory / "tokenizer"))
    for name in sorted({name for rates in mixtures.values() for name in rates}):
        source = _Source(directory / "tasks" / name)
        features = {column: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32) for column in source.columns}
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(name, source=source, preprocessors=[], output_features=features)
    for name, rates in mixtures.items():
        seqio.MixtureRegistry.remove(name)
        seqio.MixtureRegistry.add(name, list(rates.items()))


@dataclasses.dataclass(frozen=True)
class SeqioTask(Source):
    """A task that a module has registered with seqio, read through seqio. `modules` are imported by each process."""

    name: str
    kind: str
    modules: tuple[str, ...]
    max_bad: float = 0.0
    buckets: int = 0

    def shards(self) -> list[Shard]:
        """Those of seqio. The size of one that is not a file is not known: it counts as a bucket."""
        return [
            Shard(name, i, bytes=file.size if file else BUCKET_BYTES)
            for i, (name, file) in enumerate(zip(*self._listed()))
        ]

    def identity(self) -> dict:
        names, files = self._listed()
        return {"shards": [[name, file.size, file.version] if file else [name] for name, file in zip(names, files)]}

    def _listed(self) -> tuple[list[str], list[Input | None]]:
        """(the names of the shards, those that are files)."""
        names = [os.fspath(name) for name in self._task().source.list_shards("train")]
        return names, find_files(names)

    def _task(self) -> seqio.Task:
        return find(self.name, self.modules)

    def token_batches(self, shard: Shard, tokenizer: Tokenizer, counts: Counts, limit: int = 0) -> Iterator[list]:
        """Batches of ({"weight"}, tokens) of the examples of a shard, or with `limit` of so many."""
        task = self._task()
        for column, feature in task.output_features.items() if _is_tokens(task) else ():
            if feature.vocabulary != TokenizerVocabulary(tokenizer):
                raise ValueError(
                    f"its feature {column!r} has the vocabulary {feature.vocabulary}: tokens must be made by "
                    "TokenizerVocabulary with the tokenizer of these data; a feature of texts needs no vocabulary"
                )
        dataset = task.get_dataset(
            sequence_length=None,
            split="train",
            shuffle=False,
            trim_output_features=False,
            shard_info=seqio.ShardInfo(shard.start, len(task.source.list_shards("train"))),
        )
        plain = tasks.Task(source=None, kind=self.kind)
        batch = []
        for row in (dataset.take(limit) if limit else dataset).as_numpy_iterator():
            counts.rows_read += 1
            counts.rows["used"] += 1
            counts.made += 1
            batch.append(row)
            if len(batch) == BATCH:
                yield self._tokens(plain, batch, tokenizer, counts)
                batch = []
        if batch:
            yield self._tokens(plain, batch, tokenizer, counts)

    def _tokens(self, plain: tasks.Task, batch: list[dict], tokenizer: Tokenizer, counts: Counts) -> list:
        if _is_tokens(self._task()):
            made = [({"weight": 1}, {name: row[name] for name in COLUMNS[examples.STAGES[self.kind]]}) for row in batch]
        else:
            texts = [example for row in batch for example in plain._make(_decoded(row), counts.cut)]
            made = [
                ({"weight": 1}, c) for _, c in examples.tokenize(plain, texts, tokenizer, counts.cut, counts.dropped)
            ]
        counts.examples += len(made)
        return made


def find(name: str, modules: Sequence[str]) -> seqio.Task:
    """A registered task. ValueError if there is none."""
    for module in modules:
        importlib.import_module(module)
    if name not in seqio.TaskRegistry.names():
        raise ValueError(f"no task {name!r} in the gin file and none registered by {', '.join(modules)}")
    task = seqio.TaskRegistry.get(name)
    if isinstance(task.source, _Source):
        raise ValueError(
            f"the seqio task {name!r} is that of prepared data ({task.source.path}), which were registered in this "
            f"process: prepare in one that has only imported {', '.join(modules)}"
        )
    return task


def adapt(name: str, modules: Sequence[str]) -> SeqioTask:
    """The task `name` of seqio, with the kind that its output features say."""
    task = find(name, modules)
    features = task.output_features
    if _is_tokens(task):
        kinds = [kind for kind, stage in examples.STAGES.items() if set(features) == set(COLUMNS[stage])]
    else:
        kinds = [kind for kind, (needed, _) in tasks.COLUMNS.items() if needed and set(features) == set(needed)]
    if not kinds:
        raise ValueError(f"the seqio task {name!r} has the features {sorted(features)}, which are those of no kind")
    return SeqioTask(name, kinds[0], tuple(modules))


def _is_tokens(task: seqio.Task) -> bool:
    return all(feature.dtype == tf.int32 for feature in task.output_features.values())


def _decoded(row: Mapping) -> dict:
    def text(item):
        return item.decode() if isinstance(item, bytes) else item  # a number of a vector

    return {name: text(value) if isinstance(value, bytes) else list(map(text, value)) for name, value in row.items()}
