"""Evaluation sets as retrieval sets in BEIR's layout.

    corpus.jsonl    {"_id", "text"}; contextual sets add {"document", "chunk"}, with the rows of a document adjacent and
                    in order
    queries.jsonl   {"_id", "text"}
    qrels.jsonl     {"query-id", "corpus-id", "score": 1}

Equal queries become one query with several relevant texts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

from embed import paths
from embed.preparation import examples, hygiene
from embed.preparation.sources import Shard
from embed.preparation.tasks import Counts, Task
from embed.tokenizers import Tokenizer


def make(task: Task, shards: Sequence[Shard], tokenizer: Tokenizer, max_queries: int, limit: int, counts: Counts):
    """(corpus, queries, qrels) of a task: of the examples that it holds out, or of all if it holds none out."""
    if task.kind == "retrieval":
        return tuple(map(list, task.source.evaluation_set()))
    if task.kind not in ("pair", "contextual"):
        raise ValueError(f"an evaluation set needs a pair, contextual or retrieval task, got kind {task.kind!r}")

    def examples_of_all() -> Iterator[dict]:
        for shard in shards:
            of_shard = Counts()
            yield from task.examples(shard, of_shard, held_out=bool(task.held_out), limit=-(-limit // len(shards)))
            counts.add(of_shard)

    made = examples_of_all()
    return pairs(made, max_queries) if task.kind == "pair" else contextual(made, task, tokenizer, max_queries)


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
    kept = set(sorted(relevant, key=hygiene.digest)[:max_queries])
    queries, qrels = [], []
    for query in relevant:
        if query in kept:
            queries.append({"_id": f"q{len(queries)}", "text": query})
            qrels += [{"query-id": queries[-1]["_id"], "corpus-id": n, "score": 1} for n in relevant[query]]
    return queries, qrels


def texts(corpus: Iterable[dict], queries: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """(id, text) of every query and text of a set."""
    for row in (*queries, *corpus):
        yield row["_id"], row["text"]
