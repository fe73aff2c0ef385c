"""`tfds`: a dataset that TensorFlow Datasets has prepared."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from embed.preparation import numbers
from embed.preparation.sources.base import Row, Shard, Source, SourceError, first_line, source_error
from embed.preparation.sources.files import find_files

SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class Tfds(Source):
    """A split of a prepared dataset. It is not downloaded or prepared here.

    name: as in tfds.builder, optionally with a config and version. data_dir: the folder of datasets, local or gs://.
    Nested features get names with slashes: {"a": {"b": 1}} is "a/b". Sequences are lists, bytes are text.

    shard_bytes: size of the shards, each a range of examples along the shards of the dataset.
    """

    name: str = ""
    split: str = "train"
    data_dir: str | None = None
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self):
        numbers.check(self, "tfds", {"shard_bytes": 1})

    def undivided(self) -> "Tfds":
        return dataclasses.replace(self, shard_bytes=1 << 62)

    def _builder(self):
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.name, data_dir=self.data_dir, try_gcs=False)
        except Exception as error:  # of TFDS, of the file system
            raise source_error(f"tfds.name {self.name!r} cannot be opened: {first_line(error)}", error) from error

    def _info(self):
        """(builder, info of the split)."""
        builder = self._builder()
        splits = builder.info.splits
        if not splits:
            raise SourceError(f"{self.name} is not prepared in {builder.data_dir}: prepare it with tfds build")
        if self.split not in splits:
            raise SourceError(f"{self.name} has no split {self.split!r}: there are {', '.join(sorted(splits))}")
        if not splits[self.split].num_examples:
            raise SourceError(f"the split {self.split!r} of {self.name} is empty")
        return builder, splits[self.split]

    def shards(self) -> list[Shard]:
        _, info = self._info()
        result, start, count = [], 0, 0
        per_example = (info.num_bytes or self._file_bytes(info)) / info.num_examples
        for length in info.shard_lengths:
            count += length
            if count and (count * per_example >= self.shard_bytes or start + count == info.num_examples):
                result.append(Shard(f"{self.name}/{self.split}", start, start + count, round(count * per_example)))
                start, count = start + count, 0
        return result

    @staticmethod
    def _file_bytes(info) -> int:
        """The size of the files of a split whose size is not recorded; SHARD_BYTES for one that cannot be found."""
        files = find_files([os.fspath(path) for path in info.filepaths])
        return sum(file.size if file else SHARD_BYTES for file in files)

    def read(self, shard: Shard) -> Iterator[Row]:
        last = ""
        try:
            for number, example in enumerate(self._examples(shard), shard.start):
                row = _row(f"{shard.path}:row {number + 1}", example)
                last = f" after {row.location}"
                yield row
        except Exception as error:  # of TensorFlow
            raise source_error(f"{shard.path} cannot be read{last}: {first_line(error)}", error) from error

    def _examples(self, shard: Shard) -> Iterator[dict]:
        import tensorflow_datasets as tfds

        builder = self._builder()
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            source = builder.as_data_source(split=self.split)
            return (source[i] for i in range(shard.start, shard.stop))
        part = tfds.core.ReadInstruction(self.split, from_=shard.start, to=shard.stop, unit="abs")
        options = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)  # in order, and lazily
        return iter(tfds.as_numpy(builder.as_dataset(split=part, shuffle_files=False, read_config=options)))

    def describe(self) -> dict:
        builder, info = self._info()
        sampled = self.sample(1)
        return {
            "rows": info.num_examples,
            "columns": sorted(sampled[0].value or ()),
            "license": builder.info.redistribution_info.license or None if builder.info.redistribution_info else None,
            "files": info.num_shards,
            "bytes": info.num_bytes or 0,
        }

    def identity(self) -> dict:
        builder, info = self._info()
        return {"name": builder.info.full_name, "shards": list(info.shard_lengths), "bytes": info.num_bytes}


def _row(location: str, example: dict) -> Row:
    value = {}
    try:
        for name, feature in _flat(example):
            value[name] = _plain(feature)
    except UnicodeDecodeError:
        return Row(location, None, f"{name} is not UTF-8")
    return Row(location, value)


def _flat(value: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    return itertools.chain.from_iterable(
        _flat(inner, f"{prefix}{name}/") if isinstance(inner, dict) else [(prefix + name, inner)]
        for name, inner in value.items()
    )


def _plain(value):
    """A feature as str, a number or a list of them."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if hasattr(value, "to_list"):  # a ragged tensor
        return _plain(value.to_list())
    return [_plain(item) for item in value] if isinstance(value, list) else value
