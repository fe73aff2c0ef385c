"""`retrieval`: queries with relevant texts, as in BEIR and MTEB. `conteb`: documents of chunks with queries."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from embed import paths
from embed.preparation import numbers
from embed.preparation.sources.base import Row, Source, SourceError
from embed.preparation.sources.joined import Joined, database, dataset_part, field

COMPRESSED = r"(\.(gz|zst|xz|bz2))?"


@dataclass(frozen=True, kw_only=True)
class _Dataset(Joined):
    """A dataset of several tables: in a folder (`path`, also in a bucket) or on the hub (`id`, as in `hub`)."""

    path: str = ""
    id: str = ""
    revision: str = ""
    streaming: bool = False

    def is_local(self) -> bool:
        return not self.id and not paths.is_bucket(self.path) and super().is_local()

    def part(self, name: str, patterns: dict[str, str], *splits: str) -> Source:
        """The table that the field `name` describes; see `dataset_part`."""
        revision = self._identity.get(name, {}).get("commit", self.revision)
        dataset = (f"{self.path}", self.id, revision, self.streaming)
        return dataset_part(*dataset, explicit=getattr(self, name), patterns=patterns, splits=splits)

    def with_parts(self) -> "_Dataset":
        return dataclasses.replace(self, **self._parts)


@dataclass(frozen=True)
class Retrieval(_Dataset):
    """One row per query and relevant text: query, document, title, score, negatives, query_id, document_id.

    negatives has the texts that were judged irrelevant for the query (score 0 or less). A query without a judgment in
    `split` gives no row, since files of queries are often shared by splits.

    titles: whether texts begin with their titles, in training and in evaluation.
    corpus, queries, qrels: a source of each, or globs relative to the dataset. By default they are looked for:
        the configs corpus, queries and qrels or default of a card, with "CONFIG-" before with `config`; the files of
        BEIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv or qrels.jsonl, compressed or not); folders with these names.
    document_id: "prefix" if the texts are the chunks of documents and their ids are document, `separator`, number.
        Only `evaluation_set` uses it.
    max_chunks: if not 0, documents are divided into ones of at most this many chunks.
    """

    split: str = "test"
    config: str = ""
    corpus: str | Sequence[str] | Source = ""
    queries: str | Sequence[str] | Source = ""
    qrels: str | Sequence[str] | Source = ""
    titles: bool = True
    document_id: str = ""
    separator: str = "-"
    max_chunks: int = 0

    def __post_init__(self):
        super().__post_init__()
        numbers.check(self, "retrieval", {"max_chunks": 0})

    names = ("query", "document", "title", "score", "negatives", "query_id", "document_id")

    def parts(self) -> dict[str, Source]:
        if self.document_id not in ("", "prefix"):
            raise SourceError(f'retrieval.document_id is {self.document_id!r}: expected "" or "prefix"')
        of = f"{self.config}-" if self.config else ""
        start = re.escape(of)

        def patterns(*names: str) -> dict[str, str]:
            return {f"{of}{name}": rf"{start}{name}(\.(jsonl|tsv|parquet){COMPRESSED}|/.*\.\w+)" for name in names}

        qrels = {
            f"{of}qrels": rf"{start}qrels/({{split}}(-[\d-]+of-\d+)?\.(tsv|jsonl|parquet){COMPRESSED}|{{split}}/.*)",
            **({f"{of}default": rf"{start}(default|data)/{{split}}[./-].*", self.config: r"(?!)"}),
            "": rf"{start}qrels\.(jsonl|tsv|parquet){COMPRESSED}",
        }
        return {
            "corpus": self.part("corpus", patterns("corpus"), self.split, "corpus", ""),
            "queries": self.part("queries", patterns("queries"), self.split, "queries", ""),
            "qrels": self.part("qrels", qrels, self.split),
        }

    def join(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        schema = """
            CREATE TABLE qrels (query TEXT, document TEXT, score REAL, location TEXT);
            CREATE TABLE queries (id TEXT PRIMARY KEY, text TEXT, location TEXT) WITHOUT ROWID;
            CREATE TABLE corpus (id TEXT PRIMARY KEY, title TEXT, text TEXT, location TEXT);
        """
        with database(temporary, schema) as db:
            judged = set()
            for row in self._judgments(limit):
                if row.error:
                    yield row
                    continue
                query, document, score = row.value["query"], row.value["document"], row.value["score"]
                judged.add(score > 0)
                db.execute("INSERT INTO qrels VALUES (?, ?, ?, ?)", (query, document, score, row.location))
            db.execute("CREATE INDEX by_query ON qrels (query)")
            db.execute("CREATE INDEX by_document ON qrels (document)")
            for table, column in (("queries", "query"), ("corpus", "document")):
                for row in self._parts[table].rows(limit):
                    if row.error:
                        yield row
                    elif error := self._add(db, table, column, row):
                        yield Row(row.location, None, error)
            yield from self._pairs(db, negatives=False in judged, complete=limit is None)

    def _judgments(self, limit: int | None = None) -> Iterator[Row]:
        """Rows {"query", "document", "score"}."""
        for row in self._parts["qrels"].rows(limit):
            if row.error:
                yield row
                continue
            query, document = field(row, "query-id", "query_id", "qid"), field(row, "corpus-id", "corpus_id", "doc_id")
            try:
                score = float(row.value.get("score", 1))
            except (TypeError, ValueError):
                yield Row(row.location, None, f"the score {row.value['score']!r:.40} is not a number")
                continue
            if query is None or document is None:
                yield Row(row.location, None, f"no query-id or no corpus-id: there are {_columns(row)}")
            else:
                yield Row(row.location, {"query": f"{query}", "document": f"{document}", "score": score})

    @staticmethod
    def _text(row: Row) -> tuple[str | None, str, str, str]:
        """(id, title, text, error)."""
        name, title = field(row, "_id", "id", "docid", "doc_id", "query_id"), row.value.get("title") or ""
        text = field(row, "text", "contents", "query")
        if name is None or not isinstance(text, str) or not isinstance(title, str):
            return None, "", "", f"no _id or no text: there are {_columns(row)}"
        return f"{name}", title, text, ""

    def _add(self, db, table: str, column: str, row: Row) -> str:
        """Adds a text that is judged; returns what is wrong with it."""
        name, title, text, error = self._text(row)
        if error or not db.execute(f"SELECT 1 FROM qrels WHERE {column} = ? LIMIT 1", (name,)).fetchone():
            return error
        values = (name, text, row.location) if table == "queries" else (name, title, text, row.location)
        marks = ", ".join("?" * len(values))
        if db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", values).rowcount:
            return ""
        first = db.execute(f"SELECT location FROM {table} WHERE id = ?", (name,)).fetchone()[0]
        return f"the id {name!r} is already used in {first}"

    def _pairs(self, db, negatives: bool, complete: bool) -> Iterator[Row]:
        joined = """
            SELECT qrels.query, qrels.document, score, qrels.location, queries.text, title, corpus.text
            FROM qrels LEFT JOIN queries ON queries.id = query LEFT JOIN corpus ON corpus.id = document
            WHERE score > 0 ORDER BY qrels.rowid"""
        irrelevant = """
            SELECT title, text FROM qrels JOIN corpus ON corpus.id = document
            WHERE query = ? AND score <= 0 AND trim(text) != '' ORDER BY qrels.rowid"""
        for query_id, document_id, score, location, query, title, document in db.execute(joined):
            if query is None or document is None:
                if complete:
                    name = f"query {query_id!r}" if query is None else f"text {document_id!r}"
                    yield Row(location, None, f"the {name} is missing")
            elif not query.strip() or not document.strip():
                name = f"query {query_id!r}" if not query.strip() else f"text {document_id!r}"
                yield Row(location, None, f"the {name} is empty")
            else:
                others = [self._titled(*text) for text in db.execute(irrelevant, (query_id,))] if negatives else []
                values = (query, self._titled(title, document), title, score, others, query_id, document_id)
                yield Row(location, dict(zip(self.names, values)))

    def _titled(self, title: str, text: str) -> str:
        return f"{title} {text}".strip() if self.titles and title else text

    def evaluation_set(self) -> tuple[Iterator[dict], Iterator[dict], Iterator[dict]]:
        """(corpus, queries, qrels) of the split, for `evaluation_sets.write`. SourceError for a bad row.

        The whole corpus, and the queries with a relevant text.
        """
        qrels = [row for row in map(_good, self._judgments()) if row["score"] > 0]
        judged = {row["query"] for row in qrels}

        def queries():
            for row in self._parts["queries"].rows():
                _good(row)
                name, _, text, error = self._text(row)
                _good(row._replace(error=error or None))
                if name in judged:
                    yield {"_id": name, "text": text}

        scores = ({"query-id": r["query"], "corpus-id": r["document"], "score": _number(r["score"])} for r in qrels)
        return self._corpus(), queries(), scores

    def _corpus(self) -> Iterator[dict]:
        numbers: dict[str, list[int]] = {}  # of a document: the number of its last chunk, the count of its chunks
        for row in self._parts["corpus"].rows():
            _good(row)
            name, title, text, error = self._text(row)
            _good(row._replace(error=error or None))
            value = {"_id": name, "text": self._titled(title, text).strip()}
            if self.document_id:
                document, _, number = name.rpartition(self.separator)
                if not document or not number.isdecimal():
                    raise SourceError(
                        f"{row.location}: the id {name!r} is not a document, {self.separator!r} and a number"
                    )
                last = numbers.setdefault(document, [-1, 0])
                if int(number) <= last[0]:
                    raise SourceError(
                        f"{row.location}: the chunk {name!r} comes after {document}{self.separator}{last[0]}"
                    )
                if self.max_chunks:
                    part, position = divmod(last[1], self.max_chunks)
                    value |= {"document": f"{document}{self.separator}{part}", "chunk": position}
                else:
                    value |= {"document": document, "chunk": last[1]}
                numbers[document] = [int(number), last[1] + 1]
            yield value


@dataclass(frozen=True)
class Conteb(_Dataset):
    """One row per document: document_id, chunks, queries [{"text", "chunk"}], chunk_ids.

    The layout of ConTEB: documents have chunk_id, which is document, "_" and number, and chunk; queries have query and
    chunk_id or chunk_ids. Chunks are sorted by number; the chunk of a query is an index of chunks. A query for several
    chunks occurs once for each.

    documents, queries: a source of each, or globs relative to the dataset. By default: the configs of these names of
        a card, else files or folders of these names.
    chunk_column, query_column: the columns of the texts.
    """

    split: str = "train"
    documents: str | Sequence[str] | Source = ""
    queries: str | Sequence[str] | Source = ""
    chunk_column: str = "chunk"
    query_column: str = "query"

    names = ("document_id", "chunks", "queries", "chunk_ids")

    def parts(self) -> dict[str, Source]:
        def patterns(name: str) -> dict[str, str]:
            return {name: rf"{name}(/{{split}}[./-].*|\.(jsonl|parquet){COMPRESSED})"}

        return {
            "documents": self.part("documents", patterns("documents"), self.split),
            "queries": self.part("queries", patterns("queries"), self.split),
        }

    def join(self, temporary: Path, limit: int | None = None) -> Iterator[Row]:
        schema = """
            CREATE TABLE documents (id TEXT UNIQUE, location TEXT);
            CREATE TABLE chunks (document TEXT, number INTEGER, text TEXT, PRIMARY KEY (document, number));
            CREATE TABLE queries (document TEXT, number INTEGER, text TEXT, location TEXT);
        """
        with database(temporary, schema) as db:
            for row in self._parts["documents"].rows(limit):
                if not (row := self._chunk(row)).error:
                    values = (row.value["document"], row.value["number"], row.value["text"])
                    db.execute("INSERT OR IGNORE INTO documents VALUES (?, ?)", (values[0], row.location))
                    if db.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", values).rowcount:
                        continue
                    row = Row(row.location, None, f"the chunk {values[0]}_{values[1]} occurs twice")
                yield row
            for row in self._queries(limit):
                if row.error:
                    yield row
                else:
                    values = (row.value["document"], row.value["number"], row.value["text"], row.location)
                    db.execute("INSERT INTO queries VALUES (?, ?, ?, ?)", values)
            db.execute("CREATE INDEX by_document ON queries (document)")
            yield from self._documents(db, complete=limit is None)

    def _documents(self, db, complete: bool) -> Iterator[Row]:
        of = "FROM chunks WHERE document = ? ORDER BY number"
        for document, location in db.execute("SELECT id, location FROM documents ORDER BY rowid"):
            numbers, chunks = zip(*db.execute(f"SELECT number, text {of}", (document,)))
            index, queries = {number: i for i, number in enumerate(numbers)}, []
            asked = "SELECT number, text, location FROM queries WHERE document = ? ORDER BY rowid"
            for number, text, at in db.execute(asked, (document,)):
                if number in index:
                    queries.append({"text": text, "chunk": index[number]})
                elif complete:
                    yield Row(at, None, f"the chunk {document}_{number} is missing")
            ids = [f"{document}_{number}" for number in numbers]
            yield Row(location, dict(zip(self.names, (document, list(chunks), queries, ids))))
        if complete:
            lost = "SELECT document, number, location FROM queries WHERE document NOT IN (SELECT id FROM documents)"
            for document, number, at in db.execute(f"{lost} ORDER BY rowid"):
                yield Row(at, None, f"the chunk {document}_{number} is missing")

    def _chunk(self, row: Row) -> Row:
        """A row of the documents as {"document", "number", "text"}."""
        if row.error:
            return row
        text = row.value.get(self.chunk_column)
        if not isinstance(text, str) or row.value.get("chunk_id") is None:
            return Row(row.location, None, f"no chunk_id or no {self.chunk_column}: there are {_columns(row)}")
        if not text.strip():
            return Row(row.location, None, f"the chunk {row.value['chunk_id']} is empty")
        return self._numbered(row.location, row.value["chunk_id"], text)

    def _queries(self, limit: int | None = None) -> Iterator[Row]:
        """Rows {"document", "number", "text"}: one per query and chunk."""
        for row in self._parts["queries"].rows(limit):
            if row.error:
                yield row
                continue
            text, ids = row.value.get(self.query_column), field(row, "chunk_ids", "chunk_id")
            if not isinstance(text, str) or not ids:
                yield Row(
                    row.location, None, f"no {self.query_column}, chunk_id or chunk_ids: there are {_columns(row)}"
                )
            elif not text.strip():
                yield Row(row.location, None, "the query is empty")
            else:
                for name in ids if isinstance(ids, list) else [ids]:
                    yield self._numbered(row.location, name, text)

    @staticmethod
    def _numbered(location: str, name, text: str) -> Row:
        document, _, number = f"{name}".rpartition("_")
        if not document or not number.isdecimal():
            return Row(location, None, f"the chunk_id {name!r:.80} is not a document, an underscore and a number")
        return Row(location, {"document": document, "number": int(number), "text": text})

    def evaluation_set(self) -> tuple[Iterator[dict], Iterator[dict], Iterator[dict]]:
        """(corpus, queries, qrels), for `evaluation_sets.write`: one text per chunk. Call `build` first.

        Equal queries are one query with several relevant texts. SourceError for a bad row.
        """
        relevant: dict[str, list[str]] = {}
        for document in map(_good, self.rows()):
            for query in document["queries"]:
                relevant.setdefault(query["text"], []).append(document["chunk_ids"][query["chunk"]])

        def corpus():
            for document in map(_good, self.rows()):
                for number, (name, text) in enumerate(zip(document["chunk_ids"], document["chunks"])):
                    yield {"_id": name, "text": text.strip(), "document": document["document_id"], "chunk": number}

        queries = ({"_id": f"q{i}", "text": text} for i, text in enumerate(relevant))
        qrels = (
            {"query-id": f"q{i}", "corpus-id": name, "score": 1}
            for i, names in enumerate(relevant.values())
            for name in dict.fromkeys(names)
        )
        return corpus(), queries, qrels


def _good(row: Row) -> dict:
    if row.error:
        raise SourceError(f"{row.location}: {row.error}")
    return row.value


def _number(score: float) -> float | int:
    return int(score) if score == int(score) else score


def _columns(row: Row) -> str:
    return ", ".join(itertools.islice((name for name in row.value if name != "_file"), 20))
