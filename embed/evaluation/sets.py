"""Evaluation sets: queries, a corpus, and which texts of the corpus answer which query.

    data = read_set("scifact")                 BEIR, MTEB's hub layout, ConTEB, or what `embed prepare` writes

A folder is one of these, each file plain or compressed, Parquet too:

    corpus.jsonl, queries.jsonl, qrels/test.tsv     BEIR; the splits share the queries
    corpus.jsonl, queries.jsonl, qrels.jsonl        `embed prepare`
    corpus, queries, qrels or default               MTEB: configs of a card, or folders of Parquet
    documents, queries                              ConTEB: chunk_id is document, "_" and number

Corpus rows that name a `document` (or `doc_id`) are the chunks of that document, in order, and are embedded in its
context; `chunk`, if there, must be their position.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from embed import paths
from embed.preparation.sources import Conteb, Retrieval, Row, Source, SourceError
from embed.preparation.sources.hub import read_card


class RetrievalSet(NamedTuple):
    """Q queries, C corpus texts, and the judgments of each query."""

    name: str
    query_ids: list[str]
    queries: list[str]
    corpus_ids: list[str]
    corpus: list[str]
    documents: list[np.ndarray]  # corpus rows of each document in order, int[chunks]; without chunks, one row each
    judgments: list[dict[str, int]]  # of each query: {corpus id: grade}; more than 0 is relevant
    query_names: list[str] | None = None  # for errors
    corpus_names: list[str] | None = None
    counts: Mapping[str, int] = {}  # of what was read
    own: Mapping[str, str] = {}  # {id of a corpus text that has a title: its text without the title}

    @property
    def relevant_rows(self) -> list[np.ndarray]:
        """The corpus rows that are relevant to query i, int32[n], in the order of the judgments."""
        row_of = {name: row for row, name in enumerate(self.corpus_ids)}
        chosen = ([row_of[t] for t, grade in each.items() if grade > 0 and t in row_of] for each in self.judgments)
        return [np.array(rows, np.int32) for rows in chosen]

    @property
    def own_rows(self) -> np.ndarray:
        """The corpus row that has the id and the text of query i, with or without its title, -1 for none, int32[Q].

        It is no answer to itself.
        """
        row_of = {name: row for row, name in enumerate(self.corpus_ids)}
        rows = [row_of.get(name, -1) for name in self.query_ids]
        same = [
            row >= 0 and query.strip() in (self.corpus[row], self.own.get(name, self.corpus[row]))
            for name, row, query in zip(self.query_ids, rows, self.queries)
        ]
        return np.where(same, rows, -1).astype(np.int32)


PART = r"(.+-)?(corpus|queries|qrels|documents|default)[./]"  # the names of the files of a set

# What `read_set` counts and warns about, in words.
NOTICED = {
    "unjudged queries": "without a judgment, left out",
    "queries without a relevant text": "all judged irrelevant, score 0",
    "empty queries": "find nothing",
    "empty texts": "never found",
    "judgments of missing texts": "texts that are not in the corpus, never found",
    "judgments of missing queries": "queries that are not there, left out",
    "own texts": "queries that stand in the corpus; a query's own text does not count as found",
}


def read_subsets(folder, *, split: str = "test") -> Iterator[tuple[str, RetrievalSet]]:
    """(subset, set) of each subset of a folder: of MTEB's layout those with a SUBSET-corpus, otherwise "default"."""
    files = paths.files(folder) if paths.path(folder).is_dir() else {}
    card = files["README.md"].read_bytes().decode("utf-8", "replace") if "README.md" in files else ""
    configs = [f"{config.get('config_name')}." for config in read_card(card).get("configs") or []]
    subsets = sorted({match[1] for name in [*files, *configs] if (match := re.match(r"(.+?)-corpus[./]", name))})
    for subset in subsets or ["default"]:
        yield subset, read_set(folder, split=split, subset="" if subset == "default" else subset)


def files(folder) -> list:
    """The folder and the files of its set."""
    found = paths.files(folder) if paths.path(folder).is_dir() else {}
    return [folder, *(file for name, file in found.items() if re.match(PART, name))]


def has_set(folder) -> bool:
    """Whether a folder has the files of an evaluation set in one of the layouts, by their names."""
    if not f"{folder}" or not paths.path(folder).is_dir():
        return False
    names = paths.files(folder)
    card = names["README.md"].read_bytes().decode("utf-8", "replace") if "README.md" in names else ""
    configs = [f"{config.get('config_name')}." for config in read_card(card).get("configs") or []]
    parts = {match[1] for name in [*names, *configs] if (match := re.match(r"(corpus|queries|documents)[./]", name))}
    return "queries" in parts and len(parts) > 1


def read_set(folder, *, split: str = "test", subset: str = "", name: str = "") -> RetrievalSet:
    """Read an evaluation set of a folder, `split` and `subset` of it if it has several.

    ValueError for a damaged row, an id that occurs twice, a grade that is not a whole number, and a set without
    queries. What a metric can bear is counted, and a warning says it: queries without judgments are left out; empty
    texts and judgments of missing texts stay, as in trec_eval, so they lower the recall.
    """
    folder = paths.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: expected one with corpus, queries and qrels (BEIR, MTEB), or documents and queries "
            "(ConTEB)"
        )
    names = paths.files(folder)
    is_conteb = not any(n.startswith("corpus") for n in names) and any(n.startswith("documents") for n in names)
    if split != "test" and any(re.match(r"(.+-)?qrels\.", n) for n in names):
        raise ValueError(f"{folder} has one file of qrels, so it has no split {split!r}: leave out --splits")
    if is_conteb:
        source = Conteb(path=f"{folder}", split=split)
    else:
        source = Retrieval(path=f"{folder}", split=split, config=subset)
    return read_source(source, name or set_name(folder))


def set_name(folder) -> str:
    """The name of a folder's set; of SET/SPLIT in prepared data, SET."""
    folder = paths.path(folder)
    return folder.parent.name if is_prepared(folder) else folder.name or f"{folder}"


def is_prepared(folder) -> bool:
    """Whether a folder is SET/SPLIT in the evaluation sets of prepared data."""
    return paths.path(folder).parent.parent.name == "evaluation"


def read_source(source: Retrieval | Conteb, name: str) -> RetrievalSet:
    """Read an evaluation set from a source, which may also be a repository of the hub."""
    if isinstance(source, Conteb):
        made = _conteb(source, name)
    else:
        made = _retrieval(source, name)
    if not made.queries:
        raise ValueError(f"{name} has no query with a judgment: nothing can be evaluated")
    own = int((made.own_rows >= 0).sum())
    made = made._replace(counts={**made.counts, **({"own texts": own} if own else {})})
    for count, words in NOTICED.items():
        if made.counts.get(count):
            warnings.warn(f"{name}: {count} {made.counts[count]:,} ({words})", stacklevel=3)
    return made


def _retrieval(source: Retrieval, name: str) -> RetrievalSet:
    parts = source.parts()
    judged: dict[str, dict[str, int]] = {}
    for query, text, grade, location in _judgments(parts["qrels"]):
        grades = judged.setdefault(query, {})
        if grades.setdefault(text, grade) != grade:
            raise ValueError(
                f"{location}: {text!r} has score {grade} for {query!r}, but {grades[text]} in an earlier row"
            )
    queries, seen, unjudged = {}, {}, 0
    for row in _rows(parts["queries"]):
        query, text = _text(row, queries=True)
        _once(seen, query, row.location)
        unjudged += query not in judged
        if query in judged:
            queries[query] = (text, row.location)
    corpus, located, seen, documents, own, ids = [], [], {}, {}, {}, []
    for row in _rows(parts["corpus"]):
        text_id, text = _text(row)
        if row.value.get("title") and text_id in queries:
            own[text_id] = _text(row._replace(value={**row.value, "title": ""}))[1]
        _once(seen, text_id, row.location)
        _place(documents, row, len(ids))
        ids.append(text_id)
        corpus.append(text)
        located.append(f"{row.location} (_id {text_id!r:.80})")
    if not any(corpus):
        raise ValueError(f"{name}: all {len(corpus):,} texts of the corpus are empty")
    judgments = [judged[query] for query in queries]
    counts = {
        "queries": len(queries),
        "texts": len(corpus),
        "documents": len(documents),
        "judgments": sum(map(len, judgments)),
        "unjudged queries": unjudged,
        "queries without a relevant text": sum(not any(g > 0 for g in each.values()) for each in judgments),
        "empty queries": sum(not text.strip() for text, _ in queries.values()),
        "empty texts": sum(not text for text in corpus),
        "judgments of missing texts": sum(text not in seen for each in judgments for text in each),
        "judgments of missing queries": sum(len(each) for query, each in judged.items() if query not in queries),
    }
    return RetrievalSet(
        name,
        list(queries),
        [text for text, _ in queries.values()],
        ids,
        corpus,
        [np.array(rows) for rows in documents.values()],
        judgments,
        [f"{location} (_id {query!r:.80})" for query, (_, location) in queries.items()],
        located,
        counts,
        own,
    )


def _conteb(source: Conteb, name: str) -> RetrievalSet:
    """Documents in the order of the file, chunks by number.

    Each row is a query, as in ConTEB's evaluator, even if several ask the same.
    """
    parts = source.parts()
    chunks: dict[str, dict[int, str]] = {}
    for row in _rows(parts["documents"]):
        document, number = _chunk_id(row, row.value.get("chunk_id"))
        text = _string(row, source.chunk_column).strip()
        if number in chunks.setdefault(document, {}):
            raise ValueError(f"{row.location}: the chunk {document}_{number} occurs twice")
        chunks[document][number] = text
    queries, judgments = [], []
    for row in _rows(parts["queries"]):
        names = next((row.value[key] for key in ("chunk_ids", "chunk_id") if row.value.get(key)), None)
        answers = [_chunk_id(row, name) for name in (names if isinstance(names, list) else [names])]
        queries.append(_string(row, source.query_column))
        judgments.append({f"{document}_{number}": 1 for document, number in answers})
    ids, corpus, documents = [], [], []
    for document, numbered in chunks.items():
        documents.append(np.arange(len(ids), len(ids) + len(numbered)))
        for number in sorted(numbered):
            ids.append(f"{document}_{number}")
            corpus.append(numbered[number])
    there = set(ids)
    counts = {
        "queries": len(queries),
        "texts": len(corpus),
        "documents": len(documents),
        "judgments": sum(map(len, judgments)),
        "empty queries": sum(not query.strip() for query in queries),
        "empty texts": sum(not text for text in corpus),
        "judgments of missing texts": sum(text not in there for each in judgments for text in each),
    }
    query_ids = [f"q{i}" for i in range(len(queries))]
    return RetrievalSet(name, query_ids, queries, ids, corpus, documents, judgments, counts=counts)


def _chunk_id(row: Row, value) -> tuple[str, int]:
    """The document and the number of a chunk_id."""
    document, _, number = f"{value}".rpartition("_")
    if not isinstance(value, str) or not document or not number.isdecimal():
        raise ValueError(
            f'{row.location}: "chunk_id" is {value!r:.80}, expected a document, an underscore and a number'
        )
    return document, int(number)


def _string(row: Row, column: str) -> str:
    value = row.value.get(column)
    if not isinstance(value, str):
        raise ValueError(f'{row.location}: "{column}" is {value!r:.80}, expected a string')
    return value


def _rows(source: Source) -> Iterator[Row]:
    return map(_good, source.rows())


def _good(row: Row) -> Row:
    if row.error:
        raise SourceError(f"{row.location}: {row.error}")
    return row


def _judgments(source: Source) -> Iterator[tuple[str, str, int, str]]:
    """(query id, corpus id, grade, location); without a score the grade is 1."""
    for row in _rows(source):
        query, text = _id(row, "query-id", "query_id", "qid"), _id(row, "corpus-id", "corpus_id", "doc_id", "docid")
        given = row.value.get("score", 1)
        try:
            grade = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            grade = math.nan
        if not math.isfinite(grade) or grade != int(grade) or abs(grade) >= 2**31:
            raise ValueError(
                f"{row.location}: query-id {query!r}, corpus-id {text!r}, score {given!r:.80}: expected a whole number"
            )
        yield query, text, int(grade), row.location


def _text(row: Row, queries: bool = False) -> tuple[str, str]:
    """(id, text). The text of the corpus is (title + " " + text).strip(), as in MTEB; a query is unchanged."""
    name = _id(row, "_id", "id", "docid", "query_id" if queries else "_id")
    if "chunks" in row.value and not queries:
        raise ValueError(f'{row.location} has "chunks": in a corpus each chunk is a row, with "document" and "chunk"')
    columns = ("text", "contents", "content", "query")
    text = next((row.value[key] for key in columns if row.value.get(key) is not None), None)
    title = row.value.get("title")
    for value, what in ((text, "text"), (title or "", "title")):
        if not isinstance(value, str):
            raise ValueError(f"{row.location} (_id {name!r:.80}): the {what} is {value!r:.80}, expected a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{row.location} (_id {name!r:.80}): the {what} has a lone surrogate") from None
    return (name, text) if queries else (name, f"{title or ''} {text}".strip())


def _id(row: Row, *names: str) -> str:
    """An id: a string or a whole number."""
    value = next((row.value[name] for name in names if row.value.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f'{row.location}: "{names[0]}" is {value!r:.80}, expected a string or a whole number')
    try:
        f"{value}".encode()
    except UnicodeEncodeError:
        raise ValueError(f'{row.location}: "{names[0]}" is {value!r:.80}, which has a lone surrogate') from None
    return f"{value}"


def _once(seen: dict[str, str], name: str, location: str) -> None:
    if name in seen:
        raise ValueError(f"{location}: the id {name!r} is already used in {seen[name]}")
    seen[name] = location


def _place(documents: dict, row: Row, index: int) -> None:
    """Adds corpus row `index` to its document; a row that names none is a document of its own."""
    name = next((row.value[key] for key in ("document", "doc_id") if row.value.get(key) is not None), None)
    if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
        raise ValueError(f'{row.location}: "document" is {name!r:.80}, expected a string or a whole number')
    rows = documents.setdefault(("row", index) if name is None else f"{name}", [])
    chunk = row.value.get("chunk")
    if chunk is not None and name is not None and chunk != len(rows):
        raise ValueError(
            f"{row.location}: chunk {chunk!r:.80} of document {name!r} must be {len(rows)}: chunks are in order"
        )
    rows.append(index)
