"""Makes and changes indexes (index.py): new files first, then index.json, and then old files are removed.

So an interrupted change leaves the index as it was.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.inference import index_files, segments
from embed.inference.index import Index
from embed.inference.index_files import INFO, NAMES, Provenance, is_index
from embed.inference.segments import Block, Segment, Settings
from embed.inference.stored_rows import load_array

COPIED_ROWS = 1 << 15  # rows that are copied at once


class Counts(NamedTuple):
    """What a change did to an index, in rows."""

    deleted: int = 0
    added: int = 0
    replaced: int = 0  # those of the documents of added rows


def create(
    folder,
    blocks: Iterable[Block],
    provenance: Provenance,
    settings: Settings = Settings(),  # noqa: B008
    *,
    overwrite: bool = False,
) -> Index:
    """Write a new index of `blocks`; it appears whole or not at all.

    An existing index is replaced only with `overwrite`; a folder with other files is never replaced.
    """
    if paths.is_empty(folder) or paths.is_partial(folder):
        with paths.replace_folder(folder, is_ours=is_index, marker=INFO, overwrite=overwrite) as local:
            described = {"0": _write_segment(local, "0", blocks, provenance, settings)}
            (local / INFO).write_bytes(index_files.content(provenance, described))
    else:
        paths.check_output(folder, is_ours=is_index, overwrite=overwrite)
        with _new_files(folder) as local:
            name = _next_name(folder)
            described = {name: _write_segment(local, name, blocks, provenance, settings)}
            _finish(folder, local, provenance, described)
    return Index.load(folder, check=False)


def update(
    folder,
    *,
    documents: Iterable[str] = (),
    blocks: Iterable[Block] | None = None,
    provenance: Provenance | None = None,
    settings: Settings | None = None,
    compact: bool = False,
) -> Counts:
    """Delete documents of an index, then add rows, then write it again as one segment: one change, whole or not at all.

    `documents` are ids of rows of a corpus; one that the index does not have is a ValueError. Added rows replace those
    of the same documents; their vectors must be made like the others (`provenance`). `settings` are those of the first
    segment by default. The caller holds the lock of the folder (`paths.lock`).
    """
    index = Index.load(folder)
    settings = settings or index.segments[0].settings
    described = {name: dict(each) for name, each in index.info["segments"].items()}
    searched = dict(zip(described, index.segments))
    deleted = added = replaced = 0
    provenance = provenance or index.provenance
    check_provenance(index.provenance, provenance, folder)
    cut = index.provenance.cut
    with _new_files(folder) as local:
        index.check_documents(documents := set(documents))
        for segment in index.segments:
            found = segment.rows.of_documents(documents)
            deleted += _hide(segment, [row for rows in found.values() for row in rows])
        if blocks is not None:
            name = _next_name(folder)
            described[name] = new = _write_segment(local, name, blocks, provenance, settings)
            if new["width"] != index.width:
                raise ValueError(f"{folder} has vectors of {index.width} numbers, not {new['width']}")
            hidden = load_array(local / new["hidden"], np.int64, (new["num_hidden"],))
            searched[name] = segment = Segment(local / name, new, index.precision, hidden)
            replaced = sum(_hide(old, old.rows.also_in(segment.rows)) for old in index.segments)
            added, cut = new["rows"], cut + provenance.cut
        if compact:
            name = str(1 + int(_next_name(folder)))
            blocks = itertools.chain.from_iterable(map(_blocks, searched.values()))
            described = {name: _write_segment(local, name, blocks, provenance, settings)}
        else:
            for name, segment in searched.items():
                hidden = np.flatnonzero(~segment.kept).astype(np.int64)
                if len(hidden) != described[name]["num_hidden"]:
                    described[name] |= _write_hidden(local, name, hidden, described[name]["hidden"])
        _finish(folder, local, provenance._replace(cut=cut), described)
    return Counts(deleted, added, replaced)


def check_provenance(first: Provenance, other: Provenance, folder) -> None:
    """ValueError unless further vectors were made as those of an index."""
    for name, a, b in (
        ("model", first.model.get("digest"), other.model.get("digest")),
        ("precision", first.precision, other.precision),
        ("truncate_dim", first.truncate_dim, other.truncate_dim),
        ("max_length", first.max_length, other.max_length),
    ):
        if a != b:
            raise ValueError(f"{folder} has vectors with {name} {a!r:.40}, not {b!r:.40}: they cannot be compared")


def _blocks(segment: Segment) -> Iterator[Block]:
    """The rows of a segment that can be found, with their vectors, in order."""
    for start in range(0, len(segment), COPIED_ROWS):
        rows = start + np.flatnonzero(segment.kept[start : start + COPIED_ROWS])
        if len(rows):
            yield Block(segment.vectors[rows], [segment.rows[row] for row in rows.tolist()])


def _hide(segment: Segment, rows) -> int:
    """Mark rows as never found: the number of those that were not."""
    before = int(segment.kept.sum())
    segment.kept[rows] = False
    return before - int(segment.kept.sum())


@contextlib.contextmanager
def _new_files(folder) -> Iterator[Path]:
    """A local folder for the new files of an index that exists, on its disk."""
    target = paths.resolve(folder)
    inside = None if paths.is_bucket(target) else Path(target)
    for left in inside.glob(".embed-*.partial") if inside else ():  # by a change that was killed
        shutil.rmtree(left)
    with (
        paths.whole(folder, "an existing folder is unchanged"),
        tempfile.TemporaryDirectory(prefix=".embed-", suffix=".partial", dir=inside) as local,
    ):
        yield Path(local)


def _next_name(folder) -> str:
    """The number of a new segment: above those of all files, also of a change that was interrupted."""
    numbers = [int(found[0]) for entry in paths.entries(folder) if (found := re.match(r"\d+", entry.name))]
    return str(max(numbers, default=-1) + 1)


def _finish(folder, local: Path, provenance: Provenance, described: Mapping) -> None:
    """Move new files into the index, replace index.json, and remove the files that belong to no segment any more."""
    target, content = paths.resolve(folder), index_files.content(provenance, described)
    needed = index_files.files(json.loads(content))
    new = {name: file for name, file in paths.files(local).items() if name in needed}
    if paths.is_bucket(target):
        for name, file in new.items():
            paths.copy_file(file, target / name)
    else:
        for name, file in new.items():
            paths.share(file)
            _sync(file)  # otherwise a power failure could leave an index.json of files without content
            Path(target, name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target / name)
            _sync(Path(target, name).parent)
    paths.write(target / INFO, content)
    if paths.is_bucket(target):
        for name, file in paths.files(target).items():
            if NAMES.fullmatch(name) and name not in needed:
                file.unlink()
        return
    _sync(target)
    for parent, _, names in os.walk(target, topdown=False):  # which does not follow symbolic links
        inside = Path(parent).relative_to(target).as_posix()
        for name in names:
            name = name if inside == "." else f"{inside}/{name}"
            if NAMES.fullmatch(name) and name not in needed:
                Path(target, name).unlink()
        if re.fullmatch(r"\d+(/bm25)?", inside):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(parent)


def _sync(path) -> None:
    """Let the disk write a file or the entries of a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_hidden(local: Path, name: str, hidden: np.ndarray, old: str = "") -> dict:
    """Write the hidden rows of a segment, under a new name; returns what index.json says of them."""
    number = 1 + int(re.findall(r"\d+", old)[-1]) if old else 0
    file = f"{name}.hidden-{number}.npy"
    np.save(local / file, hidden)
    return {"hidden": file, "num_hidden": len(hidden), "hidden_file": _file(local / file)}


def _write_segment(local: Path, name: str, blocks: Iterable[Block], provenance: Provenance, settings: Settings) -> dict:
    folder = local / name
    folder.mkdir()
    described, hidden = segments.write(folder, blocks, provenance.precision, settings)
    dimensions = described["width"] * (8 if provenance.precision in ("binary", "ubinary") else 1)
    if provenance.truncate_dim not in (None, dimensions):
        raise ValueError(f"truncate_dim={provenance.truncate_dim!r}, but the vectors have {dimensions} dimensions")
    files = {file: _file(Path(path)) for file, path in paths.files(folder).items()}
    return described | {"files": files} | _write_hidden(local, name, hidden)


def _file(file: Path) -> list:
    return [file.stat().st_size, paths.file_digest(file)]
