"""Maps of the `python_docs` tasks: a record to pairs, or a module to a document of chunks (`task.map` in gin files).

A query must read like something a person would type, and its document must not contain the source of the query.
"""

import re
from collections.abc import Iterator, Mapping

from embed.preparation import python_sources

MIN_WORDS = 3  # a shorter summary says too little
MAX_MEMBERS_PER_OWNER = 4  # pairs per class or module in `member_pairs`

Pair = dict[str, str]  # query, document


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
        yield {"query": summary, "document": function["code"]}


def description_pairs(function: Mapping) -> Iterator[Pair]:
    """Prose after the first paragraph -> function without its docstring."""
    if len((description := python_sources.description(function["docstring"])).split()) >= MIN_WORDS:
        yield {"query": description, "document": function["code"]}


def parameter_pairs(function: Mapping) -> Iterator[Pair]:
    """Documentation of the parameters -> function without its docstring."""
    if len((parameters := python_sources.parameters(function["docstring"])).split()) >= MIN_WORDS:
        yield {"query": parameters, "document": function["code"]}


# --- pairs from records of `python_docs/modules` ----------------------------------------------------------------------


def name_pairs(module: Mapping) -> Iterator[Pair]:
    """Words of class, function and arguments -> body only. Undocumented functions are included."""
    for member in module["members"]:
        if member["kind"] == "function" and len(body := member["code"][member["body"] :].strip()) >= 40:
            yield {"query": words(member["owner"], member["name"], member["arguments"]), "document": body}


def class_pairs(module: Mapping) -> Iterator[Pair]:
    """Summary of a class -> its header, its fields and the signatures of its methods."""
    for owner in module["members"]:
        if owner["kind"] == "class" and len(owner["summary"].split()) >= MIN_WORDS:
            methods = [m for m in module["members"] if m["kind"] == "function" and m["owner"] == owner["name"]]
            signatures = (method["code"][: method["body"]].rstrip() for method in methods)
            yield {"query": owner["summary"], "document": "\n".join([owner["code"], *signatures])}


def member_pairs(module: Mapping) -> Iterator[Pair]:
    """Words and summary of a class or module -> one of its functions."""
    summaries = {m["name"]: m["summary"] for m in module["members"] if m["kind"] == "class"} | {"": module["summary"]}
    count: dict[str, int] = {}
    for member in module["members"]:
        owner = member["owner"]
        if member["kind"] == "function" and len(summaries.get(owner, "").split()) >= MIN_WORDS:
            count[owner] = count.get(owner, 0) + 1
            if count[owner] <= MAX_MEMBERS_PER_OWNER:
                query = f"{words(module['module'], owner)}: {summaries[owner]}"
                yield {"query": query, "document": member["code"]}


# --- documents of chunks ----------------------------------------------------------------------------------------------


def document(module: Mapping) -> Iterator[dict]:
    """A module as a document: its header, then each class's header and each function without its docstring, in order.

    A query is the words of the owner (module and class) and the summary of the function. The chunk does not name its
    owner, but the document does. The document contains no docstring of a function. A part of a module begins with the
    module's header, and inside a class also with the class's (`headers`).
    """
    chunks, queries, headers = [f"{module['module']}\n{module['summary']}".strip()], [], [[]]
    owners = {"": 0}
    for member in module["members"]:
        index = len(chunks)
        if member["kind"] == "class":
            owners[member["name"]] = index
            chunks.append(f"{member['code']}\n{member['summary']}".strip())
            headers.append([0])
        else:
            if len(member["summary"].split()) >= MIN_WORDS and not member.get("contaminated"):
                query = f"{words(module['module'], member['owner'])}: {member['summary']}"
                queries.append({"text": query, "chunk": index})
            chunks.append(member["code"])
            headers.append(sorted({0, owners.get(member["owner"], 0)}))
    if len(chunks) > 1:
        yield {"chunks": chunks, "queries": queries, "headers": headers}
