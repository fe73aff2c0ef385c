"""Turns `python_docs` records into training texts: pairs, and modules as documents of chunks. No framework.

A query must read like something a person would type, and its document must not contain the source of the query.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from embed.preparation import python_sources

MIN_WORDS = 3  # a shorter summary says too little
MAX_MEMBERS_PER_OWNER = 4  # pairs per class or module in `member_pairs`

Pair = tuple[str, str]  # query, document


def words(*identifiers: str) -> str:
    """Identifiers as lower-case words, split at "_", "." and case.

    "jax.tree_util HTTPServer" -> "jax tree util http server".
    """
    return " ".join(_WORD.findall(" ".join(identifiers))).lower()


_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+|[^\W\d_a-zA-Z]+")


# --- pairs from records of `python_docs/functions` --------------------------------------------------------------------


def summary_pairs(function: Mapping) -> Iterator[Pair]:
    """First paragraph of the docstring -> function without its docstring."""
    if len((summary := python_sources.summary(function["docstring"])).split()) >= MIN_WORDS:
        yield summary, function["code"]


def description_pairs(function: Mapping) -> Iterator[Pair]:
    """Prose after the first paragraph -> function without its docstring."""
    if len((description := python_sources.description(function["docstring"])).split()) >= MIN_WORDS:
        yield description, function["code"]


def parameter_pairs(function: Mapping) -> Iterator[Pair]:
    """Documentation of the parameters -> function without its docstring."""
    if len((parameters := python_sources.parameters(function["docstring"])).split()) >= MIN_WORDS:
        yield parameters, function["code"]


# --- pairs from records of `python_docs/modules` ----------------------------------------------------------------------


def name_pairs(module: Mapping) -> Iterator[Pair]:
    """Words of class, function and arguments -> body only. Undocumented functions are included."""
    for member in module["members"]:
        if member["kind"] == "function" and len(body := member["code"][member["body"] :].strip()) >= 40:
            yield words(member["owner"], member["name"], member["arguments"]), body


def class_pairs(module: Mapping) -> Iterator[Pair]:
    """Summary of a class -> its header, its fields and the signatures of its methods."""
    for owner in module["members"]:
        if owner["kind"] == "class" and len(owner["summary"].split()) >= MIN_WORDS:
            methods = [m for m in module["members"] if m["kind"] == "function" and m["owner"] == owner["name"]]
            yield owner["summary"], "\n".join([owner["code"], *(m["code"][: m["body"]].rstrip() for m in methods)])


def member_pairs(module: Mapping) -> Iterator[Pair]:
    """Words and summary of a class or module -> one of its functions."""
    summaries = {m["name"]: m["summary"] for m in module["members"] if m["kind"] == "class"} | {"": module["summary"]}
    count: dict[str, int] = {}
    for member in module["members"]:
        owner = member["owner"]
        if member["kind"] == "function" and len(summaries.get(owner, "").split()) >= MIN_WORDS:
            count[owner] = count.get(owner, 0) + 1
            if count[owner] <= MAX_MEMBERS_PER_OWNER:
                yield f"{words(module['module'], owner)}: {summaries[owner]}", member["code"]


# --- documents of chunks ----------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """`header`: index of the chunk that names the owner, a class or the module (0)."""

    text: str
    query: str  # "": the chunk has no query
    header: int


def chunks(module: Mapping) -> list[Chunk]:
    """The module's header, then each class's header and each function without its docstring, in source order.

    A query is the words of the owner (module and class) and the summary of the function. The chunk does not name its
    owner, but the document does. The document contains no docstring of a function.
    """
    result = [Chunk(f"{module['module']}\n{module['summary']}".strip(), "", 0)]
    headers = {"": 0}
    for member in module["members"]:
        if member["kind"] == "class":
            headers[member["name"]] = len(result)
            result.append(Chunk(f"{member['code']}\n{member['summary']}".strip(), "", 0))
        else:
            query = ""
            if len(member["summary"].split()) >= MIN_WORDS:
                query = f"{words(module['module'], member['owner'])}: {member['summary']}"
            result.append(Chunk(member["code"], query, headers.get(member["owner"], 0)))
    return result


def documents(headers: Sequence[int], lengths: Sequence[int], *, max_chunks: int, max_tokens: int) -> list[list[int]]:
    """Divides a module into documents: lists of chunk indices that each start with the module's header (chunk 0).

    In a document that begins inside a class, the class's header comes second. A document has at most `max_chunks`
    chunks and, with a separator between chunks, at most `max_tokens` tokens. `headers[i]` is the index of chunk i's
    header and `lengths[i]` its number of tokens. A module with only a header gives no document.
    """
    result: list[list[int]] = []
    current: list[int] = []
    for index in range(1, len(headers)):
        if current:
            size = sum(lengths[i] + 1 for i in [*current, index]) - 1
            if len(current) == max_chunks or size > max_tokens:
                result.append(current)
                current = []
        if not current:
            current = sorted({0, headers[index]})
        if index not in current:
            current.append(index)
    return result + [current] if current else result
