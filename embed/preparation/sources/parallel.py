"""`parallel`: the same sentence in several languages."""

import contextlib
import itertools
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embed.preparation.sources import formats
from embed.preparation.sources.base import Row, Shard, Source, SourceError
from embed.preparation.sources.files import Files, open_file
from embed.preparation.sources.joined import Joined

LANGUAGE = "{language}"


@dataclass(frozen=True)
class Parallel(Joined):
    """One row per sentence: {language: text}.

    paths: files of text with {language} in their names, of which line k is the same sentence; or a tar archive.
    members: the names of an archive's members, with {language}.
    languages: those to read; empty for all.
    source: instead of paths, a source with one column per language. By default its column "translation", which has
        the languages, or all columns of text.
    columns: {language: column} of the source; "a.b" is the field b of the column a.
    """

    paths: str = ""
    members: str = ""
    languages: Sequence[str] = ()
    source: Source | None = None
    columns: Mapping[str, str] | None = None

    def parts(self) -> dict[str, Source]:
        if self.source:
            return {"source": self.source}
        if (LANGUAGE in f"{self.paths}") == bool(self.members) or (self.members and LANGUAGE not in self.members):
            raise SourceError(
                f"parallel.paths is {self.paths!r} and members is {self.members!r}: expected {LANGUAGE} in one of them"
            )
        pattern, members = (name.replace(LANGUAGE, "*") for name in (f"{self.paths}", self.members or "*"))
        return {"files": Files(pattern, members=members, format="text")}

    def build(self, scratch: str | os.PathLike) -> None:
        if not self.source:
            super().build(scratch)

    def shards(self) -> list[Shard]:
        return self.source.shards() if self.source else super().shards()

    def read(self, shard: Shard) -> Iterator[Row]:
        if not self.source:
            yield from super().read(shard)
            return
        for row in self.source.read(shard):
            yield row if row.error else self._columns(row)

    def sample(self, count: int = 10) -> list[Row]:
        if self.source:
            return [row if row.error else self._columns(row) for row in self.source.sample(count)]
        return super().sample(count)

    def describe(self) -> dict:
        described, sampled = super().describe(), self.sample(1)
        columns = sorted(sampled[0].value or ()) if sampled else []
        return {**described, "columns": columns, **({"rows": self.source.describe()["rows"]} if self.source else {})}

    def _columns(self, row: Row) -> Row:
        value = row.value
        if self.columns:
            found = {}
            for language, column in self.columns.items():
                text = value
                for name in column.split("."):
                    text = text.get(name) if isinstance(text, dict) else None
                found[language] = text
        else:
            found = value["translation"] if isinstance(value.get("translation"), dict) else value
            found = {name: text for name, text in found.items() if isinstance(text, str) and name != "_file"}
        found = {name: text for name, text in found.items() if not self.languages or name in self.languages}
        missing = [name for name in self.languages or found if not isinstance(found.get(name), str)]
        if missing or not found:
            return Row(row.location, None, f"no text in {', '.join(missing) or 'any column'}")
        return Row(row.location, found)

    def join(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        with contextlib.ExitStack() as stack:
            streams = {
                name: itertools.islice(formats.lines(stream), limit)
                for name, stream in self._open(temporary, stack).items()
            }
            where = self.members or self.paths
            for number, lines in enumerate(itertools.zip_longest(*streams.values()), 1):
                if None in lines:
                    counts = {
                        name: number - (line is None) + sum(1 for _ in lines_left)
                        for (name, lines_left), line in zip(streams.items(), lines)
                    }
                    lengths = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                    raise SourceError(f"the files of {where} have different numbers of lines: {lengths}")
                value, error = {}, None
                for name, line in zip(streams, lines):
                    try:
                        value[name] = line.decode("utf-8")
                    except UnicodeDecodeError:
                        error = f"the line in {name} is not UTF-8"
                yield Row(f"{where}:{number}", None if error else value, error)

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> dict[str, formats.BinaryIO]:
        """{language: open file}, sorted."""
        name = self.members or os.path.basename(f"{self.paths}")
        pattern = "(.+)".join(re.escape(part) for part in name.split(LANGUAGE, 1)).replace(re.escape(LANGUAGE), r"\1")
        opened, there = {}, set()

        def wanted(path: str) -> str | None:
            if not (match := re.fullmatch(pattern, path)):
                return None
            there.add(match[1])
            return match[1] if not self.languages or match[1] in self.languages else None

        for file in self._parts["files"]._inputs:
            if self.members:
                self._extract(file.path, temporary, wanted)
            elif language := wanted(os.path.basename(file.path)):
                compression = formats.kind(file.path).compression
                stream = stack.enter_context(open_file(file.path))
                opened[language] = stack.enter_context(formats.decompressed(stream, compression))
        for copy in Path(temporary).glob("*.text"):
            opened[copy.stem] = stack.enter_context(open(copy, "rb", buffering=formats.BUFFER))
        missing = [language for language in self.languages if language not in opened]
        if missing or not opened:
            some = ", ".join(sorted(there)[:20]) or "none"
            raise SourceError(
                f"{self.members or self.paths} has no {', '.join(missing) or 'language'}: there are {some}"
            )
        return dict(sorted(opened.items()))

    @staticmethod
    def _extract(archive: str, folder: Path, wanted) -> None:
        """Copies the members of an archive, since they are read side by side."""
        try:
            with (
                open_file(archive) as stream,
                formats.decompressed(stream, formats.kind(archive).compression) as content,
                tarfile.open(fileobj=content, mode="r|") as members,
            ):
                for member in members:
                    if member.isfile() and (language := wanted(member.name.removeprefix("./"))):
                        with open(folder / f"{language.replace('/', '%')}.text", "wb") as out:
                            shutil.copyfileobj(members.extractfile(member), out, formats.BUFFER)
        except Exception as error:  # each library has its own
            raise SourceError(f"{archive} cannot be read: {error}") from error
