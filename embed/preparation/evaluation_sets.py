"""Held-out functions and modules as retrieval sets in BEIR's layout.

    corpus.jsonl    {"_id", "text"}; contextual sets add {"document", "chunk"}, with the rows of a document adjacent and
                    in order
    queries.jsonl   {"_id", "text"}
    qrels.jsonl     {"query-id", "corpus-id", "score": 1}

Equal queries become one query with several relevant texts.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from embed.preparation import examples, hygiene
from embed.tokenizers import Tokenizer


def functions(functions: Sequence[Mapping], *, max_queries: int) -> tuple[list, list, list]:
    """(corpus, queries, qrels): docstring summary -> function without its docstring."""
    corpus, labeled = [], []
    for function in functions:
        corpus.append({"_id": f"f{len(corpus)}", "text": function["code"]})
        labeled.append((function["summary"], corpus[-1]["_id"]))
    return corpus, *_queries(labeled, max_queries)


def contextual(
    modules: Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    chunk_length: int,
    document_length: int,
    max_chunks: int,
    max_queries: int,
    excluded: Collection[str] = (),
) -> tuple[list, list, list]:
    """(corpus, queries, qrels): words of the owner and summary -> chunk. Documents are divided as in training.

    A chunk's text is truncated to `chunk_length` tokens. A chunk whose digest is in `excluded` has no query.
    """
    corpus, labeled = [], []
    for module in modules:
        chunks = examples.chunks(module)
        texts = truncate([chunk.text for chunk in chunks], tokenizer, chunk_length)
        lengths = [len(tokens) for tokens in tokenizer.encode(texts)]
        for indices in examples.documents(
            [c.header for c in chunks], lengths, max_chunks=max_chunks, max_tokens=document_length
        ):
            document = f"d{len(corpus)}"
            for position, index in enumerate(indices):
                chunk_id = f"c{len(corpus)}"
                corpus.append({"_id": chunk_id, "text": texts[index], "document": document, "chunk": position})
                if chunks[index].query and hygiene.digest(chunks[index].text) not in excluded:
                    labeled.append((chunks[index].query, chunk_id))
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


def write(folder: str | Path, corpus: Iterable, queries: Iterable, qrels: Iterable) -> None:
    """Writes the three files to the new `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _queries(labeled: Iterable[tuple[str, str]], max_queries: int) -> tuple[list, list]:
    """Queries and qrels from (query, corpus id). Of more than `max_queries`, those with the smallest digests stay."""
    relevant: dict[str, list[str]] = {}
    for query, corpus_id in labeled:
        relevant.setdefault(query, []).append(corpus_id)
    kept = set(sorted(relevant, key=hygiene.digest)[:max_queries])
    queries, qrels = [], []
    for query in relevant:
        if query in kept:
            queries.append({"_id": f"q{len(queries)}", "text": query})
            qrels += [{"query-id": queries[-1]["_id"], "corpus-id": n, "score": 1} for n in relevant[query]]
    return queries, qrels
