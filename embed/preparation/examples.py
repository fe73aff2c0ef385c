"""Text examples to tokens: the columns that the loaders read (`embed.data.loader.COLUMNS`)."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from embed.data.loader import float_values
from embed.preparation.tasks import Task
from embed.tokenizers import Tokenizer

# Of the first `length` tokens of a text, `CHARACTERS_PER_TOKEN * length` characters usually give all.
CHARACTERS_PER_TOKEN = 20
STAGES = {
    "text": "diffusion",
    "distill": "distill",
    "pair": "pair",
    "triplet": "triplet",
    "contextual": "contextual",
}
NO_TOKENS, NO_QUERY = "without tokens", "documents without a query"
PARTS, NO_QUERY_TOKENS = "parts of documents without a query", "queries without tokens or of a chunk without tokens"

Columns = dict[str, np.ndarray]  # of one example, int32[length] each


def encode(texts: Sequence[str], tokenizer: Tokenizer, length: int = 0) -> tuple[list[np.ndarray], int]:
    """(int32[at most length] of each text, number of texts that were cut); length 0 = no limit."""
    if not length:
        return tokenizer.encode(texts), 0
    prefixes = [text[: length * CHARACTERS_PER_TOKEN] for text in texts]
    encoded = tokenizer.encode(prefixes)
    # Text with longer tokens, such as runs of spaces.
    short = [i for i, t in enumerate(encoded) if len(t) <= length and len(prefixes[i]) < len(texts[i])]
    for i, tokens in zip(short, tokenizer.encode([texts[i] for i in short])):
        encoded[i] = tokens
    cut = sum(len(tokens) > length for tokens in encoded)
    return [tokens[:length] for tokens in encoded], cut


def tokenize(
    task: Task, examples: Sequence[dict], tokenizer: Tokenizer, cut: Counter, dropped: Counter
) -> list[tuple[dict, Columns]]:
    """(text example, its tokens) for each example of tokens; a long document gives several.

    `cut` counts texts that were cut, by column, and what documents lack; `dropped` counts text examples by reason.
    """
    if task.kind == "contextual":
        return _documents(task, examples, tokenizer, cut, dropped)
    text = 0 if task.kind == "text" else task.document_length
    limits = {"text": text, "query": task.query_length, "document": task.document_length}
    result: list[Columns] = [{} for _ in examples]
    for name in [name for name in ("text", "query", "document") if name in examples[0]]:
        tokens, shortened = encode([example[name] for example in examples], tokenizer, limits[name])
        cut[name] += shortened
        for columns, values in zip(result, tokens):
            columns["tokens" if name == "text" else name] = values
    if task.kind == "triplet":
        flat = [text for example in examples for text in example["negatives"]]
        tokens, shortened = encode(flat, tokenizer, task.document_length)
        cut["negatives"] += shortened
        start = 0
        for columns, example in zip(result, examples):
            negatives = tokens[start : start + len(example["negatives"])]
            start += len(negatives)
            columns["negatives"] = _joined(negatives)
            columns["negative_lengths"] = np.array([len(n) for n in negatives], np.int32)
    if task.kind == "distill":
        for columns, example in zip(result, examples):
            columns["vector"] = float_values(example["vector"])
    # An example with an empty side, such as a query without tokens, has no training signal.
    sides = ("tokens",) if "text" in examples[0] else ("query", "document")
    kept = [(e, c) for e, c in zip(examples, result) if all(len(c[side]) for side in sides)]
    dropped[NO_TOKENS] += len(examples) - len(kept)
    return kept


def _documents(task: Task, examples: Sequence[dict], tokenizer: Tokenizer, cut: Counter, dropped: Counter):
    documents = [split_text(example, tokenizer, task.chunk_length) for example in examples]
    chunks, shortened = encode([c for d in documents for c in d["chunks"]], tokenizer, task.chunk_length)
    cut["chunks"] += shortened
    queries, shortened = encode([q for d in documents for q, _ in d["queries"]], tokenizer, task.query_length)
    cut["queries"] += shortened
    result, first_chunk, first_query = [], 0, 0
    for example, document in zip(examples, documents):
        own = chunks[first_chunk : first_chunk + len(document["chunks"])]
        asked: dict[int, list[np.ndarray]] = {}
        for k, (_, index) in enumerate(document["queries"]):
            if len(tokens := queries[first_query + k]) and len(own[index]):
                asked.setdefault(index, []).append(tokens)
            else:
                cut[NO_QUERY_TOKENS] += 1
        first_chunk, first_query = first_chunk + len(own), first_query + len(document["queries"])
        parts = divide(
            document["headers"], [len(c) for c in own], max_chunks=task.max_chunks, max_tokens=task.max_context
        )
        before = len(result)
        for indices in parts:
            found = [(position, q) for position, i in enumerate(indices) for q in asked.get(i, ())]
            if found:
                columns = {
                    "document": _joined([own[i] for i in indices]),
                    "chunk_lengths": np.array([len(own[i]) for i in indices], np.int32),
                    "queries": _joined([q for _, q in found]),
                    "query_lengths": np.array([len(q) for _, q in found], np.int32),
                    "positives": np.array([position for position, _ in found], np.int32),
                }
                result.append((example, columns))
        if len(result) == before:
            dropped[NO_QUERY] += 1
        else:
            cut[PARTS] += len(parts) - (len(result) - before)
    return result


def divide(headers: Sequence[Sequence[int]], lengths: Sequence[int], *, max_chunks: int, max_tokens: int) -> list:
    """Divides a document into lists of at most `max_chunks` chunk indices, together at most `max_tokens` tokens.

    A part that starts with chunk i starts with the chunks `headers[i]` before it. `lengths` are in tokens; a separator
    between chunks counts as one. A chunk and its headers stay together even if they have more tokens.
    """
    result: list[list[int]] = []
    current: list[int] = []
    for index in range(len(lengths)):
        if current:
            size = sum(lengths[i] + 1 for i in [*current, index]) - 1
            if len(current) >= max_chunks or size > max_tokens:
                result.append(current)
                current = []
        if not current:
            current = list(headers[index])
        if index not in current:
            current.append(index)
    return result + [current] if current else result


def split_text(example: dict, tokenizer: Tokenizer, chunk_length: int) -> dict:
    """A contextual example whose document is one text, with chunks of at most about `chunk_length` tokens.

    A query's offset in the text becomes the index of the chunk that contains it.
    """
    if "text" not in example:
        return example
    from semantic_text_splitter import TextSplitter

    splitter = TextSplitter.from_callback(lambda text: len(tokenizer.encode([text])[0]), chunk_length)
    pieces = splitter.chunk_indices(example["text"])
    starts = np.array([start for start, _ in pieces])
    queries = [(text, max(int(np.searchsorted(starts, at, "right")) - 1, 0)) for text, at in example["queries"]]
    return {"chunks": [text for _, text in pieces], "queries": queries, "headers": [[]] * len(pieces)}


def digest(columns: Columns) -> bytes:
    """128 bits of BLAKE2b over the tokens of an example: equal examples are equal in training.

    A teacher's vector does not count: of one text, it may differ in its last digits.
    """
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(columns.keys() - {"vector"}):
        state.update(len(columns[name]).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(columns[name], "<i4"))
    return state.digest()


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
