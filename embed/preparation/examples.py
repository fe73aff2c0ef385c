"""From `python_docs` records to training texts: pairs, and modules as documents of chunks. No framework.

A query must read like something a person would type; what it is cut out of is not in its document.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from embed.preparation import sources

MIN_WORDS = 3  # shorter summaries say nothing
MAX_MEMBERS_PER_OWNER = 4  # pairs that one class or module gives in `member_pairs`

Pair = tuple[str, str]  # query, document


def words(*identifiers: str) -> str:
    """Identifiers as lower-case words: cut at "_", "." and case ("jax.tree_util HTTPServer" -> "jax tree util http server")."""
    return " ".join(_WORD.findall(" ".join(identifiers))).lower()


_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+|[^\W\d_a-zA-Z]+")


# --- from records of `python_docs/functions` --------------------------------------------------------------------------


def summary_pairs(function: Mapping) -> Iterator[Pair]:
    """First paragraph of the docstring -> the function without its docstring."""
    if len((summary := sources.summary(function["docstring"])).split()) >= MIN_WORDS:
        yield summary, function["code"]


def description_pairs(function: Mapping) -> Iterator[Pair]:
    """The prose after the first paragraph -> the function."""
    if len((description := sources.description(function["docstring"])).split()) >= MIN_WORDS:
        yield description, function["code"]


def parameter_pairs(function: Mapping) -> Iterator[Pair]:
    """The documentation of the parameters -> the function."""
    if len((parameters := sources.parameters(function["docstring"])).split()) >= MIN_WORDS:
        yield parameters, function["code"]


# --- from records of `python_docs/modules` ----------------------------------------------------------------------------


def name_pairs(module: Mapping) -> Iterator[Pair]:
    """Words of class, function and arguments -> the body alone. Undocumented functions take part."""
    for member in module["members"]:
        if member["kind"] == "function" and len(body := member["code"][member["body"] :].strip()) >= 40:
            yield words(member["owner"], member["name"], member["arguments"]), body


def class_pairs(module: Mapping) -> Iterator[Pair]:
    """Summary of a class -> its header, fields and the signatures of its methods."""
    for owner in module["members"]:
        if owner["kind"] == "class" and len(owner["summary"].split()) >= MIN_WORDS:
            methods = [m for m in module["members"] if m["kind"] == "function" and m["owner"] == owner["name"]]
            yield owner["summary"], "\n".join([owner["code"], *(m["code"][: m["body"]].rstrip() for m in methods)])


def member_pairs(module: Mapping) -> Iterator[Pair]:
    """What a class (or the module) is about, and its words -> one of its functions."""
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
    """`header` is the index of the chunk that names the owner: 0 the module's, or a class's."""

    text: str
    query: str  # "" where nothing asks for this chunk
    header: int


def chunks(module: Mapping) -> list[Chunk]:
    """The module's header, then each class's header and each function without its docstring, in source order.

    A query is the owner's words (module and class) and the function's summary: its chunk does not say whose it is, the
    document does. No function's docstring is in the document.
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
    """Cuts a module into documents: lists of chunk indices, each starting with the module's header (chunk 0).

    A document that begins inside a class has the class's header next. It ends before it would have more than
    `max_chunks` chunks or, with a separator between chunks, more than `max_tokens` tokens. `headers[i]` is the chunk that
    heads chunk i. A module of nothing but its header gives no document.
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
