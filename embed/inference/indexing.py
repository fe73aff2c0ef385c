"""What goes into an index: a corpus that is encoded now, or the shards of `embed encode --input`."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from embed import paths
from embed.inference import shards
from embed.inference.corpus import Row
from embed.inference.encoder import Encoder
from embed.inference.index_files import Provenance
from embed.inference.segments import Block


def encode(
    encoder: Encoder, rows: Sequence[Row], settings: shards.Settings, progress: bool = False
) -> tuple[Provenance, Iterator[Block]]:
    """(how the vectors are made, vectors and rows) of a corpus."""
    segments, cut = shards.tokenize(encoder, rows, settings)
    found = shards.encode(encoder, rows, segments, settings, progress=progress)
    columns = found.ids, found.documents, found.texts, found.starts, found.ends, found.fields
    model = {"path": str(encoder.path), "digest": encoder.digest}
    made = Provenance(settings.precision, settings.truncate_dim, model, encoder.max_length, cut)
    return made, iter([Block(found.vectors, _rows(*columns))])


def read(folder) -> tuple[Provenance, Iterator[Block]]:
    """The same of shards, one in memory at a time."""
    info, tables = shards.read_shards(folder)
    names = (shards.shard_name(name, n) for name, numbers in shards.shard_numbers(folder).items() for n in numbers)
    about = (shards.read_about(paths.path(folder) / name) for name in names)
    cut = sum(each.cut for each in about if each)  # a damaged one is an error when it is read
    made = Provenance(info["precision"], info["truncate_dim"], info["model"], info["max_length"], cut)

    def block(table) -> Block:
        names = ("_id", "document", "text", "start", "end", "fields")
        lists = table.column("vector").combine_chunks()
        vectors = lists.flatten().to_numpy().reshape(len(lists), -1)
        return Block(np.ascontiguousarray(vectors), _rows(*(table.column(name).to_pylist() for name in names)))

    return made, map(block, tables)


def _rows(ids, documents, texts, starts, ends, fields) -> list[dict]:
    names = ("_id", "document", "text", "start", "end")
    values = zip(zip(ids, documents, texts, starts, ends), fields)
    return [dict(zip(names, row)) | {"fields": json.loads(of_row)} for row, of_row in values]
