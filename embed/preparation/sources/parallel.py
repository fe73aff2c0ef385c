"""`parallel`: the same sentence in several languages."""

import contextlib
import dataclasses
import itertools
import operator
import os
import random
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embed.preparation import numbers
from embed.preparation.sources import formats
from embed.preparation.sources.base import Row, Shard, Source, SourceError, first_line, source_error
from embed.preparation.sources.files import Files, open_file
from embed.preparation.sources.joined import Joined

LANGUAGE = "{language}"
DOCUMENTS = "documents"  # the copy of a member


@dataclass(frozen=True)
class Parallel(Joined):
    """One row per sentence: {language: text}; with `documents`, one row per document.

    paths: files of text with {language} in their names, of which line k is the same sentence; or a tar archive.
    members: the names of an archive's members, with {language}.
    languages: those to read; empty for all.
    source: instead of paths, a source with one column per language. By default its column "translation", which has
        the languages, or all columns of text.
    columns: {language: column} of the source; "a.b" is the field b of the column a.
    documents: of paths, a file or member whose line k names the document of sentence k. The sentences of a document
        are adjacent; in the row they are the lines of one text.
    pairs: if not 0, the rows are this many pairs of texts per sentence instead: query, document, query_language,
        document_language. Each has two different languages, drawn by a hash of the sentence's texts.
    rates: {language: how often it is drawn}, relative to the 1 of the others.
    """

    paths: str = ""
    members: str = ""
    languages: Sequence[str] = ()
    source: Source | None = None
    columns: Mapping[str, str] | None = None
    documents: str = ""
    pairs: int = 0
    rates: Mapping[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        numbers.check(self, "parallel", {"pairs": 0})
        if self.rates and not self.pairs:
            raise ValueError("parallel.rates needs parallel.pairs")
        known = self.languages or tuple(self.columns or ())
        for language, rate in (self.rates or {}).items():
            if known and language not in known:
                where = "languages" if self.languages else "columns"
                raise ValueError(f"parallel.rates: {language!r} is none of parallel.{where}: {', '.join(known)}")
            if not numbers.is_number(rate, 0) or not rate:
                raise ValueError(f"parallel.rates: the rate {rate!r} of {language!r} must be positive")

    def parts(self) -> dict[str, Source]:
        if self.source:
            return {"source": self.source}
        if (LANGUAGE in f"{self.paths}") == bool(self.members) or (self.members and LANGUAGE not in self.members):
            raise SourceError(
                f"parallel.paths is {self.paths!r} and members is {self.members!r}: expected {LANGUAGE} in one of them"
            )
        pattern, members = (name.replace(LANGUAGE, "*") for name in (f"{self.paths}", self.members or "*"))
        return {"files": Files(pattern, members=members, format="text")}

    def undivided(self) -> "Parallel":
        return dataclasses.replace(self, source=self.source.undivided()) if self.source else super().undivided()

    def build(self, scratch: str | os.PathLike) -> None:
        if not self.source:
            super().build(scratch)

    def shards(self) -> list[Shard]:
        return self._parts["source"].shards() if self.source else super().shards()

    def read(self, shard: Shard) -> Iterator[Row]:
        if not self.source:
            yield from super().read(shard)
            return
        for row in self.source.read(shard):
            yield from (row,) if row.error else self._drawn(self._columns(row))

    def sample(self, count: int = 10) -> list[Row]:
        if self.source:
            rows = (row if row.error else self._columns(row) for row in self.source.sample(count))
            return [each for row in rows for each in self._drawn(row)][:count]
        return super().sample(count)

    def describe(self) -> dict:
        described, sampled = super().describe(), self.sample(1)
        columns = sorted(sampled[0].value or ()) if sampled else []
        return {**described, "columns": columns, **({"rows": self.source.describe()["rows"]} if self.source else {})}

    def _columns(self, row: Row) -> Row:
        value = row.value
        if self.columns:
            texts = {}
            for language, column in self.columns.items():
                text = value
                for name in column.split("."):
                    text = text.get(name) if isinstance(text, dict) else None
                texts[language] = text
        else:
            texts = value["translation"] if isinstance(value.get("translation"), dict) else value
            texts = {name: text for name, text in texts.items() if isinstance(text, str) and name != "_file"}
        texts = {name: text for name, text in texts.items() if not self.languages or name in self.languages}
        wanted = self.languages or {**texts, **(self.rates or {})}
        missing = [name for name in wanted if not isinstance(texts.get(name), str)]
        if missing or not texts:
            return Row(row.location, None, f"no text in {', '.join(missing) or 'any column'}")
        return Row(row.location, texts)

    def _drawn(self, row: Row) -> Iterator[Row]:
        """The row, or `pairs` pairs of its languages."""
        if row.error or not self.pairs:
            yield row
            return
        languages = [name for name, text in row.value.items() if text.strip()]
        if len(languages) < 2:
            yield Row(row.location, None, f"a text in {', '.join(languages) or 'no language'}, of two that pairs need")
            return
        rates = [(self.rates or {}).get(name, 1.0) for name in languages]
        rng = random.Random(f"{row.value}")  # not its location, which differs between copies of the data
        for _ in range(self.pairs):
            i = rng.choices(range(len(languages)), rates)[0]
            others = languages[:i] + languages[i + 1 :]
            drawn = languages[i], rng.choices(others, rates[:i] + rates[i + 1 :])[0]
            values = (*(row.value[name] for name in drawn), *drawn)
            yield Row(row.location, dict(zip(("query", "document", "query_language", "document_language"), values)))

    def join(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        rows = self._lines(temporary, limit)
        for row in self._joined(temporary, rows, limit) if self.documents else rows:
            yield from self._drawn(row)

    def _joined(self, temporary: Path, rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
        """Rows of documents from rows of sentences; of a document with bad sentences, every bad one."""
        first = next(rows, None)  # now the archive is extracted
        if first is None:
            return
        path = temporary / DOCUMENTS if self.members else self.documents
        if self.members and not path.exists():
            raise SourceError(f"{self.paths} has no member {self.documents}")
        with open_file(os.fspath(path)) as names:
            documents = map(bytes.strip, itertools.islice(formats.lines(names), limit))
            named = self._named(documents, itertools.chain([first], rows))
            for _, group in itertools.groupby(named, operator.itemgetter(0)):
                sentences = [row for _, row in group]
                errors = [row for row in sentences if row.error]
                if errors:
                    yield from errors
                    continue
                value = {name: "\n".join(row.value[name] for row in sentences) for name in sentences[0].value}
                yield Row(sentences[0].location, value)

    def _named(self, documents: Iterator[bytes], rows: Iterator[Row]) -> Iterator[tuple[bytes, Row]]:
        """(document, sentence) of each line. SourceError if there are not as many of one as of the other."""
        for number, (document, row) in enumerate(itertools.zip_longest(documents, rows), 1):
            if document is None or row is None:
                lines = number - (document is None) + sum(1 for _ in documents)
                sentences = number - (row is None) + sum(1 for _ in rows)
                text = self.members or self.paths
                raise SourceError(f"{self.documents} has {lines:,} lines, but {text} has {sentences:,} sentences")
            yield document, row

    def _lines(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        """Rows {language: text} of the lines."""
        with contextlib.ExitStack() as stack:
            streams = {
                name: itertools.islice(formats.lines(stream), limit)
                for name, stream in self._open(temporary, stack).items()
            }
            location = self.members or self.paths
            for number, lines in enumerate(itertools.zip_longest(*streams.values()), 1):
                if None in lines:
                    counts = {
                        name: number - (line is None) + sum(1 for _ in lines_left)
                        for (name, lines_left), line in zip(streams.items(), lines)
                    }
                    lengths = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                    raise SourceError(f"the files of {location} have different numbers of lines: {lengths}")
                value, error = {}, None
                for name, line in zip(streams, lines):
                    try:
                        value[name] = line.decode("utf-8")
                    except UnicodeDecodeError:
                        error = f"the line in {name} is not UTF-8"
                yield Row(f"{location}:{number}", None if error else value, error)

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> dict[str, formats.BinaryIO]:
        """{language: open file}, sorted."""
        name = self.members or os.path.basename(f"{self.paths}")
        pattern = "(.+)".join(re.escape(part) for part in name.split(LANGUAGE, 1)).replace(re.escape(LANGUAGE), r"\1")
        opened, languages = {}, set()

        def copy_name(path: str) -> str | None:
            """The language of a file or member, or DOCUMENTS; None for one that is not read."""
            if path == self.documents:
                return DOCUMENTS
            if not (match := re.fullmatch(pattern, path)):
                return None
            languages.add(match[1])
            return match[1] if not self.languages or match[1] in self.languages else None

        for file in self._parts["files"]._inputs:
            if self.members:
                self._extract(file.path, temporary, copy_name)
            elif language := copy_name(os.path.basename(file.path)):
                compression = formats.kind(file.path).compression
                stream = stack.enter_context(open_file(file.path))
                opened[language] = stack.enter_context(formats.decompressed(stream, compression))
        for copy in Path(temporary).glob("*.text"):
            opened[copy.stem] = stack.enter_context(open(copy, "rb", buffering=formats.BUFFER))
        missing = [language for language in self.languages or self.rates or () if language not in opened]
        if missing or not opened:
            some = ", ".join(sorted(languages)[:20]) or "none"
            raise SourceError(
                f"{self.members or self.paths} has no {', '.join(missing) or 'language'}: there are {some}"
            )
        return dict(sorted(opened.items()))

    @staticmethod
    def _extract(archive: str, folder: Path, copy_name) -> None:
        """Copies the members of an archive, since they are read side by side."""
        try:
            with (
                open_file(archive) as stream,
                formats.decompressed(stream, formats.kind(archive).compression) as content,
                tarfile.open(fileobj=content, mode="r|") as members,
            ):
                for member in members:
                    if member.isfile() and (language := copy_name(member.name.removeprefix("./"))):
                        name = language if language == DOCUMENTS else f"{language.replace('/', '%')}.text"
                        with open(folder / name, "wb") as out:
                            shutil.copyfileobj(members.extractfile(member), out, formats.BUFFER)
        except Exception as error:  # each library has its own
            raise source_error(f"{archive} cannot be read: {first_line(error)}", error) from error
