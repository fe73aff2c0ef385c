"""Vectors of corpora larger than memory, in shards: `embed encode --input` (docs/search.md).

    FOLDER/encode.json                  what made the vectors, and the names of the input files
    FOLDER/docs.jsonl.00003.parquet     the vectors of part 3 of docs.jsonl, which has `shard_rows` rows

The name of an input file is its path below the folder that its pattern names (`corpus.find`). A shard appears whole,
and has the digest of the rows that it was made from: a part without a shard of the same rows is encoded, in any order,
by any process. So an interrupted run continues, and a changed input does not go unnoticed.
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from embed import distributed, paths
from embed.inference.chunkers import Chunker
from embed.inference.corpus import Part, Row, arrow, chunk_ids, read_parts, refuse_empty, refuse_repeated, to_json
from embed.inference.encoder import Encoder
from embed.rows import Segment

FORMAT, FORMAT_VERSION = "embed-shards", 1
INFO = "encode.json"
SHARD = re.compile(r"(.+)\.(\d{5,})\.parquet")
ROW_GROUP = 1 << 14  # rows, the part of a file that one process of preparation reads
COLUMNS = ["_id", "document", "start", "end", "text", "fields", "vector"]
NOT_FIELDS = ("_id", "text", "chunks", "title")
ABOUT = b"embed"  # the key of `About` in the schema of a shard
# Of a run: shards that were there or written, rows, …; see `About` and `missing`.
COUNTS = ("there", "written", "changed", "removed", "rows", "chunks", "cut", "empty")


class Settings(NamedTuple):
    """How rows are encoded."""

    precision: str = "float32"
    truncate_dim: int | None = None
    chunker: Chunker | None = None  # divides the texts of rows that are not in chunks
    truncate: bool = False  # cut texts that are too long, instead of an error
    skip_empty: bool = False  # leave out rows without text, instead of an error


class About(NamedTuple):
    """What a shard was made from."""

    digest: str  # of the rows
    is_last: bool  # whether its file has no further rows
    rows: int
    chunks: int  # vectors
    cut: int  # rows that were cut to the longest text
    empty: int  # rows without text that were left out


class Vectors(NamedTuple):
    """The vectors of rows, one per text or chunk, in order; the fields are the columns of a shard (COLUMNS)."""

    ids: list[str]
    documents: list[str]  # the id of the row
    starts: list[int | None]  # where a chunk begins in the text of its row, if a chunker divided it
    ends: list[int | None]
    texts: list[str]
    fields: list[str]  # the other fields of the row, as JSON
    vectors: np.ndarray


# --- encoding ---------------------------------------------------------------------------------------------------------


def tokenize(encoder: Encoder, rows: Sequence[Row], settings: Settings) -> tuple[list[Segment], int]:
    """(segments of the rows that no chunker divides, number of rows that were cut), computed without the device."""
    whole = [row for row in rows if row.is_document or not settings.chunker]
    refuse_repeated((name, row.source) for row in whole for name in row.ids())
    names = [row.source for row in whole]
    return encoder.fit_documents([row.chunks for row in whole], truncate=settings.truncate, names=names)


def encode(
    encoder: Encoder, rows: Sequence[Row], segments: Sequence[Segment], settings: Settings, progress: bool = False
) -> Vectors:
    """The vectors of rows: of each text, or of each chunk in its document; `segments` come from `tokenize`.

    ValueError for ids that are not unique, such as "a#0" and the first chunk of "a".
    """
    how = dict(precision=settings.precision, truncate_dim=settings.truncate_dim, show_progress_bar=progress)
    divided = [row for row in rows if settings.chunker and not row.is_document]
    names = [row.source for row in rows if row.is_document or not settings.chunker]
    whole = encoder.encode_segments(segments, names=names, **how)
    of_whole = iter(np.split(whole, np.cumsum([segment.num_spans for segment in segments])[:-1]))
    texts, names = [row.chunks[0] for row in divided], [row.source for row in divided]
    of_divided = iter(encoder.encode_long(texts, settings.chunker, names=names, **how) if divided else ())
    result, found, sources = Vectors([], [], [], [], [], [], whole[:0]), [whole[:0]], []
    for row in rows:
        if row.is_document or not settings.chunker:
            ids, texts, vectors = row.ids(), row.chunks, next(of_whole)
            offsets = [(None, None)] * len(ids)
        else:
            offsets, texts, vectors = next(of_divided)
            ids, offsets = chunk_ids(row.id, len(texts)), offsets.tolist()
        fields = to_json(row.source, {name: value for name, value in row.fields.items() if name not in NOT_FIELDS})
        result.ids.extend(ids)
        result.documents.extend([row.id] * len(ids))
        result.starts.extend(start for start, _ in offsets)
        result.ends.extend(end for _, end in offsets)
        result.texts.extend(texts)
        result.fields.extend([fields] * len(ids))
        sources.extend([row.source] * len(ids))
        found.append(vectors)
    if divided:
        refuse_repeated(zip(result.ids, sources))
    return result._replace(vectors=np.concatenate(found))


def parquet(vectors: Vectors, about: About | None = None) -> bytes:
    """A Parquet file with COLUMNS; `about` goes into its schema."""
    pa, pq = arrow("Parquet")
    ids, documents, starts, ends, texts, fields, array = vectors
    strings = [pa.array(values, pa.string()) for values in (ids, documents, texts, fields)]
    offsets = [pa.array(values, pa.int32()) for values in (starts, ends)]
    lists = pa.FixedSizeListArray.from_arrays(array.reshape(-1), array.shape[1])
    table = pa.table([*strings[:2], *offsets, *strings[2:], lists], names=COLUMNS)
    if about:
        table = table.replace_schema_metadata({ABOUT: json.dumps(about._asdict())})
    content = io.BytesIO()
    pq.write_table(table, content, row_group_size=ROW_GROUP)
    return content.getvalue()


def is_parquet(file) -> bool:
    """Whether a file is what `parquet` writes."""
    pa, pq = arrow(file)
    with paths.path(file).open("rb") as opened:
        try:
            return pq.read_schema(opened).names == COLUMNS
        except pa.ArrowException:
            return False


# --- the shards of a folder -------------------------------------------------------------------------------------------


def describe(
    encoder: Encoder, files: Mapping[str, str], shard_rows: int, settings: Settings, chunker: Mapping | None = None
) -> dict:
    """The content of encode.json; `chunker` is what describes `settings.chunker`."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {"path": str(encoder.path), "digest": encoder.digest},
        "precision": settings.precision,
        "truncate_dim": settings.truncate_dim,
        "max_length": encoder.max_length,
        "chunker": chunker and dict(chunker),
        "shard_rows": shard_rows,
        "inputs": list(files),
    }


def begin(folder, info: Mapping) -> None:
    """Write encode.json, or check it: ValueError names the first thing that differs from what made the other shards.

    The path of the model may differ. Further input files are added.
    """
    file = paths.path(folder) / INFO
    if file.exists():
        old = read_info(folder)
        was, now = old["model"], info["model"]
        if was["digest"] != now["digest"]:
            raise ValueError(
                f"{folder} was made with the model at {was['path']} (digest {was['digest']:.12}), not with the one at "
                f"{now['path']} (digest {now['digest']:.12}): choose another folder"
            )
        for name in ("precision", "truncate_dim", "max_length", "chunker", "shard_rows"):
            if old[name] != info[name]:
                was, now = json.dumps(old[name]), json.dumps(info[name])
                raise ValueError(f"{folder} was made with {name} {was}, not {now}: choose another folder")
        if gone := [name for name in old["inputs"] if name not in info["inputs"]]:
            raise ValueError(
                f"{folder} has vectors of {gone[0]}, which is not an input ({len(gone)} of {len(old['inputs'])} files "
                "are not): name the same files, and perhaps more, or choose another folder"
            )
        if old["inputs"] == info["inputs"]:
            return
    paths.write_json(file, info)


def write(
    encoder: Encoder, folder, files: Mapping[str, str], shard_rows: int, settings: Settings, share=(0, 1)
) -> Counter:
    """Write the shards that are missing of the k-th of n shares of all parts, `share` = (k, n); returns counts.

    The next part is read and tokenized while the device computes. In memory there are the rows and vectors of a shard,
    and the rows of the next one. The counts are those of `missing` and of the shards that were `written`.
    """
    found, counts = Counter(), Counter()
    parts = missing(folder, files, shard_rows, found, share)

    def read() -> tuple | None:
        if following := next(parts, None):
            name, part = following
            return shard_name(name, part.start.number), *_read(encoder, part, settings)
        return None

    with (
        tqdm(desc="encode", unit="row", unit_scale=True, disable=not distributed.is_first()) as bar,
        ThreadPoolExecutor(1, "read") as pool,
    ):
        waiting = pool.submit(read)
        while following := waiting.result():
            waiting = pool.submit(read)
            about = _write(encoder, folder, *following, settings)
            counts.update(count(about), written=1)
            bar.update(about.rows)
    return counts + found


def missing(
    folder, files: Mapping[str, str], shard_rows: int, counts: Counter, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[str, Part]]:
    """(name of the file, part) of each part of a share that has no shard of the same rows.

    Part p of file f of F is number pF + f, and n shares take turns: with F a multiple of n, each file is in one share.
    `counts` gets the shards that are `there`, those that are `changed`, because the rows of their part are others, and
    those that are `removed`, because their file has become shorter.
    """
    k, n = share
    written = shard_numbers(folder)
    for f, (name, path) in enumerate(files.items()):
        if (k - f) % math.gcd(len(files), n):
            continue
        present = set(written.get(name, ()))
        for part in read_parts(path, shard_rows, lambda p, f=f: (p * len(files) + f) % n == k):
            number = part.start.number
            if part.lines is None:
                continue
            about = read_about(paths.path(folder) / shard_name(name, number)) if number in present else None
            if about and (about.digest, about.is_last) == (part.digest, part.is_last):
                counts.update(count(about), there=1)
                continue
            counts["changed"] += number in present
            yield name, part
        for number in [number for number in present if number > part.start.number]:
            (paths.path(folder) / shard_name(name, number)).unlink(missing_ok=True)
            counts["removed"] += 1


def write_part(encoder: Encoder, folder, name: str, part: Part, settings: Settings) -> None:
    """Write the shard of one part."""
    _write(encoder, folder, shard_name(name, part.start.number), *_read(encoder, part, settings), settings)


def _read(encoder: Encoder, part: Part, settings: Settings) -> tuple[list[Row], list[Segment], About]:
    """The rows of a part and their segments, and what is known of them before they are encoded."""
    rows = part.rows()
    if not settings.skip_empty:
        refuse_empty(rows, f"part {part.start.number} of {part.path}")
    kept = [row for row in rows if not row.is_empty]
    segments, cut = tokenize(encoder, kept, settings)
    return kept, segments, About(part.digest, part.is_last, len(rows), 0, cut, len(rows) - len(kept))


def _write(encoder: Encoder, folder, shard: str, rows, segments, about: About, settings: Settings) -> About:
    vectors = encode(encoder, rows, segments, settings)
    about = about._replace(chunks=len(vectors.ids))
    paths.write(paths.path(folder) / shard, parquet(vectors, about))
    return about


def count(about: About) -> dict[str, int]:
    """The counts of a shard."""
    return {name: value for name, value in about._asdict().items() if name not in ("digest", "is_last")}


def shard_name(name: str, number: int) -> str:
    """The name of the shard of part `number` of the file `name`."""
    return f"{name}.{number:05d}.parquet"


def shard_numbers(folder) -> dict[str, list[int]]:
    """{name of a file: numbers of the parts that have a shard, ascending} of a folder. ValueError for other files."""
    folder, result = paths.path(folder), {}
    paths.entries(folder)  # other processes may have written some
    for shard in paths.files(folder).keys() - {INFO} if folder.exists() else ():
        if not (parsed := SHARD.fullmatch(shard)):
            raise ValueError(f"{folder} holds {shard}, which is not a shard: move it away or choose another folder")
        result.setdefault(parsed[1], []).append(int(parsed[2]))
    return {name: sorted(numbers) for name, numbers in result.items()}


def is_ours(folder) -> bool:
    """Whether a folder has the shards of `write`. ValueError if it holds other files too."""
    if not paths.has_format(paths.path(folder) / INFO, FORMAT):
        return False
    shard_numbers(folder)
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


def read_info(folder) -> dict:
    """The content of encode.json. FileNotFoundError if there is none, ValueError if it is of another version."""
    file = paths.path(folder) / INFO
    if not file.is_file():
        raise FileNotFoundError(
            f"no vectors in {folder}: expected a folder with {INFO}, as embed encode --input writes"
        )
    info = paths.read_json(file)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe shards: its format is not {FORMAT!r}")
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {info.get('format_version')!r:.40}, expected {FORMAT_VERSION}")
    return info


def read_about(file) -> About | None:
    """What a shard was made from; None for a file that is damaged."""
    pa, pq = arrow(file)
    try:
        with paths.path(file).open("rb") as opened:
            return About(**json.loads(pq.read_schema(opened).metadata[ABOUT]))
    except (pa.ArrowException, ValueError, TypeError, KeyError):
        return None


def read_shards(folder) -> tuple[dict, Iterator]:
    """(the content of encode.json, a pyarrow table per shard with COLUMNS, in the order of files and rows).

    A shard without rows has no table. ValueError if a shard is missing or damaged: no text may be lost unnoticed.
    """
    info, numbers = read_info(folder), shard_numbers(folder)
    if other := sorted(numbers.keys() - set(info["inputs"])):
        raise ValueError(f"{folder} holds {shard_name(other[0], numbers[other[0]][0])}, which {INFO} does not know")
    for name in info["inputs"]:
        found = numbers.get(name, [])
        if found != list(range(len(found))) or not found:
            _refuse_missing(folder, name, next(i for i in range(len(found) + 1) if i not in found))

    def tables() -> Iterator:
        for name in info["inputs"]:
            for number in numbers[name]:
                file = paths.path(folder) / shard_name(name, number)
                pa, pq = arrow(file)
                try:
                    with file.open("rb") as opened:
                        table = pq.read_table(opened)
                    about = About(**json.loads(table.schema.metadata[ABOUT]))
                except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{file} is damaged, not a shard ({error}): remove it, and encode again") from None
                if about.is_last != (number == numbers[name][-1]):
                    _refuse_missing(folder, name, number + 1)
                if len(table):
                    yield table.replace_schema_metadata()

    return info, tables()


def _refuse_missing(folder, name: str, number: int):
    raise ValueError(
        f"{folder} is incomplete: {shard_name(name, number)} is missing or outdated: embed encode does what is missing"
    )
