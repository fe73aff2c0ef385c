"""Evaluation sets as retrieval sets in BEIR's layout.

    corpus.jsonl    {"_id", "text"}; contextual sets add {"document", "chunk"}, with the rows of a document adjacent and
                    in order
    queries.jsonl   {"_id", "text"}
    qrels.jsonl     {"query-id", "corpus-id", "score": 1}

Equal queries of examples become one query with several relevant texts.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from embed import paths
from embed.preparation import copies, examples
from embed.preparation.counts import UNUSED, Counts
from embed.preparation.sources import Retrieval, Shard
from embed.preparation.stream import Progress, Work, load_tokenizer
from embed.preparation.tasks import Task, named
from embed.tokenizers import Tokenizer


def write_set(
    work: Work,
    name: str,
    max_queries: int,
    task_name: str,
    task: Task,
    part: tuple[int, int],
    target: str,
    size: int,
    progress: Progress,
) -> None:
    """Writes the evaluation set `name` of a task to the folder `target`, and its counts to its marker, last.

    The set is in memory until it is written. part: see `make`. size: the bytes that are read, for `progress`.
    """
    counts = Counts()
    with named(task_name):
        if task.kind == "retrieval" and not isinstance(task.source, Retrieval):  # which is read without
            task.source.build(work.scratch)
        tokenizer = load_tokenizer(work.tokenizer)
        corpus, queries, qrels = make(task, part, work.shards[task_name], tokenizer, max_queries, work.limit, counts)
        counts.check(task.max_bad)
    if not queries:
        raise ValueError(f"evaluation set {name} has no query: the task {task_name!r} gives none")
    write(target, corpus, queries, qrels)
    about = {
        "corpus": len(corpus),
        "queries": len(queries),
        "relevant": len(qrels),
        "documents": len({row.get("document", row["_id"]) for row in corpus}),
        "read": counts.to_json(),
    }
    paths.write_json(marker(work, name), about)
    progress(0, size)


def marker(work: Work, name: str):
    """The file with the counts of a set that is written."""
    return paths.path(work.scratch) / "evaluation" / f"{name}.json"


def make(
    task: Task,
    part: tuple[int, int],
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    max_queries: int,
    limit: int,
    counts: Counts,
):
    """(corpus, queries, qrels) of a task: of the examples that it holds out, or of all if it holds none out.

    part: (k, n) for the k-th of n sets of the task, which divide what it holds out.
    limit: of rows that are read; of a retrieval set, see `retrieval`.
    """
    if task.kind == "retrieval":
        return retrieval(task.source.evaluation_set(), max_queries, limit, counts)
    if task.kind not in ("pair", "contextual"):
        raise ValueError(f"an evaluation set needs a pair, contextual or retrieval task, got kind {task.kind!r}")

    def examples_of_all() -> Iterator[dict]:
        for shard in shards:
            of_shard = Counts()
            options = dict(held_out=bool(task.held_out), part=part, limit=-(-limit // len(shards)))
            read = task.examples(shard, of_shard, **options)
            yield from task.documents(read, of_shard.cut) if task.group_sizes else read
            counts.add(of_shard)

    made = examples_of_all()
    return pairs(made, max_queries) if task.kind == "pair" else contextual(made, task, tokenizer, max_queries)


def retrieval(
    made: tuple[Iterable[dict], Iterable[dict], Iterable[dict]], max_queries: int, limit: int, counts: Counts
) -> tuple[list, list, list]:
    """A set of a source: its whole corpus, and of more than `max_queries` queries those with the smallest digests.

    With `limit`, only the first `limit` queries, their texts and `limit` other texts; documents stay whole. The rows of
    all three tables count as read.
    """
    every, judgments = list(made[1]), list(made[2])
    kept = sorted(every[:limit] if limit else every, key=lambda row: copies.digest(row["text"]))[:max_queries]
    names = {row["_id"] for row in kept}
    queries = [row for row in every if row["_id"] in names]
    qrels = [row for row in judgments if row["query-id"] in names]
    relevant = {row["corpus-id"] for row in qrels}
    corpus, others, read = [], 0, 0
    for _, document in itertools.groupby(made[0], lambda row: row.get("document", row["_id"])):
        document = list(document)
        read += len(document)
        if limit and not any(row["_id"] in relevant for row in document):
            if others >= limit:
                continue
            others += len(document)
        corpus += document
    there = {row["_id"] for row in corpus}
    missing = [row for row in qrels if row["corpus-id"] not in there]
    for row in missing:
        counts.bad(f"the judgment of query {row['query-id']!r}", f"the text {row['corpus-id']!r} is not in the corpus")
    qrels = [row for row in qrels if row["corpus-id"] in there]
    judged = {row["query-id"] for row in qrels}
    queries = [row for row in queries if row["_id"] in judged]
    used = len(corpus) + len(queries) + len(qrels)
    counts.rows_read += read + len(every) + len(judgments)
    counts.rows["used"] += used
    counts.rows[UNUSED] += read + len(every) + len(judgments) - used - len(missing)
    return corpus, queries, qrels


def pairs(made: Iterable[dict], max_queries: int) -> tuple[list, list, list]:
    """Each document once, in order; the queries of all of them."""
    corpus: dict[str, str] = {}
    labeled = [(e["query"], corpus.setdefault(e["document"], f"d{len(corpus)}")) for e in made]
    return [{"_id": name, "text": text} for text, name in corpus.items()], *_queries(labeled, max_queries)


def contextual(made: Iterable[dict], task: Task, tokenizer: Tokenizer, max_queries: int) -> tuple[list, list, list]:
    """Documents are divided as in training. The text of a chunk is cut to `task.chunk_length` tokens."""
    corpus, labeled = [], []
    for example in made:
        document = examples.split_text(example, tokenizer, task.chunk_length)
        texts = truncate(document["chunks"], tokenizer, task.chunk_length)
        lengths = [len(tokens) for tokens in tokenizer.encode(texts)]
        for indices in examples.divide(
            document["headers"], lengths, max_chunks=task.max_chunks, max_tokens=task.max_context
        ):
            name = f"d{len(corpus)}"
            for position, index in enumerate(indices):
                chunk_id = f"c{len(corpus)}"
                corpus.append({"_id": chunk_id, "text": texts[index], "document": name, "chunk": position})
                labeled += [(query, chunk_id) for query, positive in document["queries"] if positive == index]
    return corpus, *_queries(labeled, max_queries)


def truncate(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[str]:
    """Truncates each text to about `length` tokens: bisects for the longest prefix of at most that many tokens."""
    result = list(texts)
    too_long = [i for i, tokens in enumerate(tokenizer.encode(texts)) if len(tokens) > length]
    low = {i: 0 for i in too_long}
    high = {i: len(texts[i]) for i in too_long}
    while pending := [i for i in too_long if high[i] - low[i] > 1]:
        middle = {i: (low[i] + high[i]) // 2 for i in pending}
        for i, tokens in zip(pending, tokenizer.encode([texts[i][: middle[i]] for i in pending])):
            (low if len(tokens) <= length else high)[i] = middle[i]
    for i in too_long:
        result[i] = texts[i][: low[i]]
    return result


def write(folder, corpus: Iterable, queries: Iterable, qrels: Iterable) -> None:
    """Writes the three files to `folder`."""
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths.write(paths.path(folder) / f"{name}.jsonl", lines)


def _queries(labeled: Iterable[tuple[str, str]], max_queries: int) -> tuple[list, list]:
    """Queries and qrels from (query, corpus id). Of more than `max_queries`, those with the smallest digests stay."""
    relevant: dict[str, list[str]] = {}
    for query, corpus_id in labeled:
        if corpus_id not in (ids := relevant.setdefault(query, [])):
            ids.append(corpus_id)
    kept = set(sorted(relevant, key=copies.digest)[:max_queries])
    queries, qrels = [], []
    for query in relevant:
        if query in kept:
            queries.append({"_id": f"q{len(queries)}", "text": query})
            qrels += [{"query-id": queries[-1]["_id"], "corpus-id": n, "score": 1} for n in relevant[query]]
    return queries, qrels
