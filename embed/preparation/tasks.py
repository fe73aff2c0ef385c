"""A task: the rows of a source, turned into text examples of one kind. Pure Python; worker processes run it.

Kinds, with their text examples:

    text         {"text"}
    pair         {"query", "document"}
    triplet      {"query", "document", "negatives": [text, …]}
    contextual   {"chunks": [text, …], "queries": [(text, index of its chunk), …], "headers": [[index, …], …]}
                 or {"text", "queries": [(text, offset), …]}, which the tokenizer divides into chunks
    retrieval    no examples: a source that has a corpus, queries and relevance of its own, for an evaluation set
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from embed.preparation import numbers
from embed.preparation.columns import index_of, number_of, pick, query_text, text_of, texts_of
from embed.preparation.counts import (
    EARLY,
    EMPTY,
    EQUAL,
    HELD_OUT,
    JOINED,
    LANGUAGE,
    LONG,
    MOST_BAD,
    NO_ANSWER,
    NOT_HELD_OUT,
    PATTERN,
    SCORE,
    SEVERAL,
    SHORT,
    UNMAPPED,
    UNREAD,
    UNUSED,
    BadRowsError,
    Counts,
)
from embed.preparation.sources import Row, Shard, Source, SourceError

KINDS = ("text", "pair", "triplet", "contextual", "retrieval")
# The columns that a kind takes from its rows; those in brackets are optional.
COLUMNS = {
    "text": (("text",), ()),
    "pair": (("query", "document"), ()),
    "triplet": (("query", "document", "negatives"), ()),
    "contextual": ((), ("chunks", "text", "queries", "answers", "headers")),
    "retrieval": ((), ()),
}
TRAINING = -1  # the part of a row that is not held out
TEXTS = ("text", "query", "document", "negatives", "chunks", "queries")  # the parts of an example that are text
# {field: least value} of whole numbers; 0 = no limit.
LEAST = {
    "min_characters": 0,
    "max_characters": 1,
    "query_length": 0,
    "document_length": 0,
    "chunk_length": 1,
    "max_chunks": 1,
    "max_context": 1,
    "max_total_characters": 0,
    "buckets": 0,
}


@contextlib.contextmanager
def named(task: str) -> Iterator[None]:
    """Makes a ValueError in the block name the task; subclasses other than our own become ValueError."""
    try:
        yield
    except ValueError as error:
        kind = type(error) if isinstance(error, (BadRowsError, SourceError)) else ValueError
        raise kind(f"task {task!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. Columns name fields of a row: "a.b" is field b of field a, "a.*.b" that of every item of the list a.

    A row with lists of texts, queries or documents gives several examples. With the columns "text" and "answers" of a
    contextual task, a query is for the chunk where the text of its answer first occurs.

    With `group_by`, the rows of a shard with the same value of these fields make one example. A text has their
    different texts, one per line. A document has their different chunks, and the queries of one chunk only. A triplet
    has the sides that `label` says. A pair task pairs the query of each row with the document of another one, as for
    rows that say the same. Rows of other languages or scores do not enter a group.

    With `group_sizes`, a contextual task makes documents of unrelated chunks: the rows of a shard, once they are mapped
    and filtered, in random order, in groups of these sizes in turn (`documents`). They teach a model to keep the chunks
    of a document apart.

    Filters apply to every text of an example, except those with a column of their own.
    """

    source: Source
    kind: str
    columns: Mapping[str, str | Sequence[str]] = dataclasses.field(
        default_factory=dict
    )  # {column of the kind: field, or fields to join}
    map: str = ""  # "package.module:function" that yields rows for a row, before `columns`
    group_by: str | Sequence[str] = ()
    group_sizes: Sequence[int] = ()
    label: str = ""  # with group_by: the field that says what the `document` of a row is
    labels: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # {value of `label`: "document" or "negatives"}; others are unused

    language: str = ""  # of the texts, for reports
    languages: Sequence[str] = ()  # with language_field: those that are used
    language_field: str = ""
    score_field: str = ""
    min_score: float = 0.0
    # Matches of a regular expression are removed from every text, or from those of {column: regular expression}, before
    # the filters.
    remove: str | Mapping[str, str] = ""
    min_characters: int = 1
    max_characters: int = 1_000_000
    # A regular expression that must occur in the first text of an example: its text or query, or a document's first
    # chunk. With group_sizes it is the query of a row.
    keep: str = ""
    drop: str = ""  # one that must not occur in any

    # In tokens; a longer text is cut, and counted.
    query_length: int = 64  # 0 = no limit
    document_length: int = 512  # 0 = no limit
    chunk_length: int = 256
    max_chunks: int = 16  # a document with more is divided
    max_context: int = 4096  # tokens of a document with its separators; a longer one is divided

    weight_field: str = ""  # an example is repeated as often as `weights` says for the value of this field
    weights: Mapping[int, int] = dataclasses.field(default_factory=dict)  # {least value: repetitions}
    max_total_characters: int = 0  # of all examples; each shard gives its share. 0 = no limit
    held_out: float = 0.0  # fraction of the examples that is kept for an evaluation set
    held_out_by: str = ""  # rows with the same value of this field are held out together; "" = the group or the row
    # Fraction of the task's rows that may be bad, once all are read; a shard of mostly bad rows ends the run earlier.
    max_bad: float = 0.001
    buckets: int = 0  # parts of the store; 0 = from the size of the source

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"task.kind={self.kind!r} must be one of {', '.join(KINDS)}")
        needed, optional = COLUMNS[self.kind]
        allowed = {*needed, *optional, *(("chunk",) if self.groups and self.kind == "contextual" else ())}
        if unknown := [name for name in self.columns if name not in allowed]:
            hint = "; it needs task.group_by or task.group_sizes" if unknown[0] == "chunk" else ""
            raise ValueError(
                f"task.columns: {unknown[0]!r} is no column of a {self.kind} task: {', '.join(sorted(allowed))}{hint}"
            )
        removed = self.remove if isinstance(self.remove, Mapping) else {"": self.remove}
        fixed = {"answers", "headers", *(("text",) if self.kind == "contextual" else ())}
        if unknown := [name for name in removed if name and name not in allowed - fixed]:
            raise ValueError(
                f"task.remove: {unknown[0]!r} must be one of {', '.join(sorted(allowed - fixed))}"
                + ("; queries have offsets in the text of a document" if unknown[0] in fixed & {"text"} else "")
            )
        for name, pattern in (*(("remove", p) for p in removed.values()), ("keep", self.keep), ("drop", self.drop)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"task.{name}={pattern!r} is no regular expression: {error}") from None
        numbers.check(self, "task", LEAST, ("held_out", "max_bad"))
        if not numbers.is_number(self.min_score):
            raise ValueError(f"task.min_score={self.min_score!r} must be a number")
        if not isinstance(self.weights, Mapping) or not all(
            numbers.is_number(least) and numbers.is_whole(times, 1) for least, times in self.weights.items()
        ):
            raise ValueError(
                f"task.weights={self.weights!r} must be {{least value: repetitions}}, numbers and whole numbers of at "
                "least 1"
            )
        find_function(self.map) if self.map else None
        for name, field in (("min_score", "score_field"), ("weights", "weight_field")):
            if getattr(self, name) and not getattr(self, field):
                raise ValueError(f"task.{name} needs task.{field}")
        if "answers" in self.columns and "text" not in self.columns:
            raise ValueError("task.columns: 'answers' needs the column 'text'")
        if self.group_sizes and (self.group_by or self.kind != "contextual" or not _are_sizes(self.group_sizes)):
            raise ValueError(
                f"task.group_sizes={self.group_sizes!r} must be at least 1 each, in a contextual task without group_by"
            )
        if self.group_sizes and self.weight_field:
            raise ValueError(
                "task.weight_field repeats documents, whose rows differ with task.group_sizes: leave it out"
            )
        if bool(self.label) != bool(self.labels) or set(self.labels.values()) - {"document", "negatives"}:
            raise ValueError(
                f"task.label={self.label!r} and task.labels={self.labels!r} belong together: the field, and "
                '{value as text: "document" or "negatives"}'
            )
        if self.label and not (self.group_by and self.kind == "triplet"):
            raise ValueError("task.label needs task.group_by and kind 'triplet'")

    @property
    def groups(self) -> bool:
        """Whether several rows make an example."""
        return bool(self.group_by or self.group_sizes)

    @property
    def function(self) -> Callable[[dict], Iterable[dict]]:
        """`map` as a function; without one, a row stays as it is."""
        return find_function(self.map) if self.map else lambda row: (row,)

    @property
    def patterns(self) -> tuple[re.Pattern | None, re.Pattern | None]:
        return tuple(re.compile(pattern) if pattern else None for pattern in (self.keep, self.drop))

    def examples(
        self,
        shard: Shard,
        counts: Counts,
        *,
        held_out: bool = False,
        part: tuple[int, int] = (0, 1),
        limit: int = 0,
        characters: int = 0,
    ) -> Iterator[dict]:
        """The text examples of a shard, or with `held_out` those kept for an evaluation set; `counts` is updated.

        `part` (k, n): of what is held out, part k of n about equal ones. Reading ends after `limit` rows, and after
        examples of `characters`; 0 = no limit. An example has also "location" and "weight".
        """
        total, wanted, parts = 0, part[0] if held_out else TRAINING, part[1]
        units = self._units(self.source.read(shard), counts, limit, parts)
        for location, rows in units:
            cut = Counter()
            try:
                mapped = [each for row in rows for each in self.function(row)]
                if self.group_by:
                    made = self._from_group(mapped, cut)
                elif self.group_sizes:
                    made = [self._chunk(each) for each in mapped]
                else:
                    made = [example for each in mapped for example in self._make(each, cut)]
                found = self._part(rows[0], parts)
                reason, weight = self._reason(rows[0]), max(map(self._weight, rows))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                counts.bad(location, _reason_of(error), len(rows))
                continue
            counts.rows["used" if made else UNUSED] += len(rows)
            counts.cut.update(cut)
            for example in map(self._cleaned, made):
                counts.made += 1
                why = reason or self._text_reason(example)
                if why is None and found != wanted:
                    why = NOT_HELD_OUT if found == TRAINING else HELD_OUT
                if why:
                    counts.dropped[why] += 1
                    continue
                total += sum(map(len, all_texts(example)))
                yield example | {"location": location, "weight": weight}
            if characters and total >= characters:
                if self.group_by:  # whose rows are read already
                    counts.rows[UNREAD] += sum(len(rows) for _, rows in units)
                return

    def _units(self, rows: Iterable[Row], counts: Counts, limit: int, parts: int) -> Iterator[tuple[str, list[dict]]]:
        """(location, the rows that make examples together) of the good rows of a shard."""
        groups: dict[tuple, tuple[str, list[dict]]] = {}
        for row in rows:
            if limit and counts.rows_read >= limit:
                break
            if counts.rows_read and counts.rows_read % EARLY == 0:
                counts.check(max(self.max_bad, MOST_BAD))
            counts.rows_read += 1
            if row.error:
                counts.bad(row.location, row.error)
            elif not self.group_by:
                yield row.location, [row.value]
            else:
                try:
                    key, reason = (self._group(row.value), self._part(row.value, parts)), self._reason(row.value)
                except (KeyError, TypeError, IndexError, ValueError) as error:
                    counts.bad(row.location, _reason_of(error))
                    continue
                if reason:
                    counts.rows[reason] += 1
                else:
                    groups.setdefault(key, (row.location, []))[1].append(row.value)
        yield from groups.values()

    def _group(self, row: dict) -> str:
        names = (self.group_by,) if isinstance(self.group_by, str) else self.group_by
        return str([pick(row, name) for name in names])

    def documents(self, examples: Iterable[dict], cut: Counter) -> Iterator[dict]:
        """Documents of `group_sizes`, from examples of one chunk each; `cut` is updated. Holds all of them."""
        members, start = sorted(examples, key=lambda e: _digest((e["queries"], e["chunks"]))), 0
        for size in itertools.cycle(self.group_sizes):
            if not (group := members[start : start + size]):
                return
            start += len(group)
            cut[JOINED] += len(group)
            chunks = ((example["chunks"][0], [query for query, _ in example["queries"]]) for example in group)
            yield _document(chunks, cut) | {"location": group[0]["location"], "weight": 1}

    def _chunk(self, row: dict) -> dict:
        """A document of one chunk."""
        queries = [(query, 0) for query in texts_of(row, self._field("queries"))]
        return {"queries": queries, "chunks": [text_of(row, self._field("chunk"))], "headers": [[]]}

    def _make(self, row: dict, cut: Counter) -> Iterator[dict]:
        """The examples of one row. `cut` counts by reason what they lack."""
        if self.kind == "text":
            for text in self._texts(row, "text"):
                yield {"text": text}
        elif self.kind == "contextual":
            yield self._contextual(row, cut)
        else:
            queries, documents = self._texts(row, "query"), self._texts(row, "document")
            sides = {"negatives": texts_of(row, self._field("negatives"))} if self.kind == "triplet" else {}
            for query, document in itertools.product(queries, documents):
                yield {"query": query, "document": document} | sides

    def _contextual(self, row: dict, cut: Counter) -> dict:
        queries = pick(row, self._field("queries"))
        queries = [queries] if isinstance(queries, (str, Mapping)) else queries

        given = self.columns or ({"chunks"} if "chunks" in row else row)
        if "answers" in given:
            text, answers = text_of(row, self._field("text")), texts_of(row, self._field("answers"))
            if len(answers) != len(queries):
                raise ValueError(f"{len(queries)} queries have {len(answers)} answers")
            # An empty answer, as unanswerable questions may have, is in no chunk.
            offsets = [(query_text(q), text.find(answer) if answer else -1) for q, answer in zip(queries, answers)]
            found = [(query, offset) for query, offset in offsets if offset >= 0]
            cut[NO_ANSWER] += len(offsets) - len(found)
            return {"text": text, "queries": found}
        if "text" in given:
            text = text_of(row, self._field("text"))
            pairs = [(query_text(query), index_of(query, "offset")) for query in queries]
            if bad := [offset for _, offset in pairs if not 0 <= offset < len(text)]:
                raise ValueError(f"a query has the offset {bad[0]} in a text of {len(text)} characters")
            return {"text": text, "queries": pairs}
        chunks = texts_of(row, self._field("chunks"))
        pairs = [(query_text(query), index_of(query, "chunk")) for query in queries]
        if bad := [index for _, index in pairs if not 0 <= index < len(chunks)]:
            raise ValueError(f"a query names chunk {bad[0]} of {len(chunks)}")
        headers = pick(row, self._field("headers")) if self._field("headers") in row else [[]] * len(chunks)
        return {"chunks": chunks, "queries": pairs, "headers": headers}

    def _from_group(self, rows: Sequence[dict], cut: Counter) -> list[dict]:
        """The examples of a group of rows, none if it lacks a side. `cut` counts by reason what they lack."""
        if self.kind == "text":
            return [{"text": "\n".join(dict.fromkeys(t for row in rows for t in self._texts(row, "text")))}]
        if self.kind == "pair":
            sides = [(text_of(row, self._field("query")), text_of(row, self._field("document"))) for row in rows]
            sides = sorted(set(sides), key=_digest)  # any order that is not that of the rows
            shifted = zip(sides, sides[1:] + sides[:1])
            made = [{"query": q, "document": d} for (q, own), (_, d) in shifted if own != d and q != d]
            cut[EQUAL] += len(sides) - len(made) if made else 0
            return made
        if self.kind == "contextual":
            sides = ((text_of(r, self._field("chunk")), texts_of(r, self._field("queries"))) for r in rows)
            return [_document(sides, cut)]
        sides: dict[str, list[str]] = {"document": [], "negatives": []}
        labels, unmapped = {str(value): role for value, role in self.labels.items()}, 0
        for row in rows:
            if self.label:
                role = labels.get(str(pick(row, self.label)))
                if role:
                    sides[role] += self._texts(row, "document")
                unmapped += not role
            else:
                sides["document"] += self._texts(row, "document")
                sides["negatives"] += texts_of(row, self._field("negatives"))
        if not sides["document"] or not sides["negatives"]:
            return []
        cut[UNMAPPED] += unmapped
        query, negatives = text_of(rows[0], self._field("query")), sides["negatives"]
        return [{"query": query, "document": d, "negatives": negatives} for d in sides["document"]]

    def _field(self, column: str) -> str | Sequence[str]:
        return self.columns.get(column, column)

    def _texts(self, row: dict, column: str) -> list[str]:
        """The texts of a row in a column: one, of several fields joined, or those of a list."""
        field = self._field(column)
        return texts_of(row, field) if isinstance(field, str) else [text_of(row, field)]

    def _reason(self, row: dict) -> str | None:
        if self.language_field and self.languages and pick(row, self.language_field) not in self.languages:
            return LANGUAGE
        if self.score_field and not number_of(row, self.score_field) >= self.min_score:
            return SCORE
        return None

    def _cleaned(self, example: dict) -> dict:
        """An example without what `remove` matches. The text of a document stays: its queries have offsets in it."""
        if not self.remove:
            return example
        result = dict(example)
        for name in example:
            pattern = self.remove if isinstance(self.remove, str) else self.remove.get(self._column(name), "")
            if pattern and name != "headers" and not (name == "text" and self.kind == "contextual"):
                result[name] = _without(pattern, example[name])
        return result

    def _column(self, name: str) -> str:
        """The column that a part of an example is named by; a group's chunks are those of the column chunk."""
        return "chunk" if name == "chunks" and self.groups else name

    def _text_reason(self, example: dict) -> str | None:
        texts = list(all_texts(example))
        if not texts or not all(text.strip() for text in texts):
            return EMPTY
        if min(map(len, texts)) < self.min_characters:
            return SHORT
        if max(map(len, texts)) > self.max_characters:
            return LONG
        keep, drop = self.patterns
        if (keep and not keep.search(texts[0])) or (drop and any(drop.search(text) for text in texts)):
            return PATTERN
        return None

    def _part(self, row: dict, parts: int) -> int:
        """TRAINING, or of a row that is held out, the number of its part."""
        if not self.held_out:
            return TRAINING
        try:
            if self.held_out_by:
                value = pick(row, self.held_out_by)
            else:
                value = self._group(row) if self.group_by else {k: v for k, v in row.items() if k[:1] != "_"}
        except KeyError as error:
            raise KeyError(f"task.held_out_by: {error.args[0]}") from None
        position = int.from_bytes(_digest(("held out", value)), "little") / (self.held_out * 2.0**64)
        return int(position * parts) if position < 1 else TRAINING

    def _weight(self, row: dict) -> int:
        if not self.weight_field:
            return 1
        value = number_of(row, self.weight_field)
        reached = [least for least in self.weights if value >= least]
        return self.weights[max(reached)] if reached else 1


def _reason_of(error: Exception) -> str:
    """What an error says, with its class where it says only a name, as those of a user's function may."""
    message = str(error.args[0] if error.args else "")
    return message if " " in message else f"{type(error).__name__}: {message}"


def find_function(name: str) -> Callable:
    """The function "package.module:function". ValueError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"task.map={name!r} must be package.module:function: {error}") from None


def _are_sizes(values) -> bool:
    return isinstance(values, Sequence) and all(numbers.is_whole(value, 1) for value in values)


def all_texts(example: Mapping) -> Iterator[str]:
    """Every text of an example, in its order: of pairs and single chunks the query first, of documents the chunks."""
    for value in (example[name] for name in example if name in TEXTS):
        if isinstance(value, str):
            yield value
        else:
            yield from (item if isinstance(item, str) else item[0] for item in value)


def _document(parts: Iterable[tuple[str, Sequence[str]]], cut: Counter) -> dict:
    """A document of (chunk, its queries). Equal chunks are one; a query of several chunks has no single positive."""
    chunks: dict[str, int] = {}
    asked: dict[tuple[str, int], None] = {}
    for chunk, queries in parts:
        index = chunks.setdefault(chunk, len(chunks))
        asked |= dict.fromkeys((query, index) for query in queries)
    times = Counter(query for query, _ in asked)
    kept = [(query, index) for query, index in asked if times[query] == 1]
    cut[SEVERAL] += len(asked) - len(kept)
    return {"chunks": list(chunks), "queries": kept, "headers": [[]] * len(chunks)}


def _without(pattern: str, value):
    """A text, list of texts or list of queries without the matches of a regular expression, stripped."""
    if isinstance(value, str):
        return re.sub(pattern, "", value).strip()
    return [_without(pattern, v) if isinstance(v, str) else (_without(pattern, v[0]), v[1]) for v in value]


def _digest(value) -> bytes:
    """64 bits of BLAKE2b over the representation of a value."""
    return hashlib.blake2b(f"{value!r}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
