"""Pages of Markdown as documents of chunks, with their headings as queries. Functions for `task.map`."""

import re
from collections.abc import Iterator, Mapping

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```+|~~~+)")
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n.*?\n---\s*\n", re.DOTALL)


def sections(row: Mapping) -> Iterator[dict]:
    """{"chunks", "queries"} of a row with the column text; no row for a page without a heading and a text below it.

    A chunk is the text of a section, without its heading. The query for it is the title of the page, a colon and the
    heading: a chunk does not say which page it is of, so that its context matters.
    """
    chunks, queries, title = [], [], ""
    for heading, body in _split(_FRONT_MATTER.sub("", row["text"])):
        title = title or heading
        if heading and body:
            queries.append({"text": title if heading == title else f"{title}: {heading}", "chunk": len(chunks)})
        if body:
            chunks.append(body)
    if queries:
        yield {**row, "chunks": chunks, "queries": queries}


def pairs(row: Mapping) -> Iterator[dict]:
    """{"query", "document"} for each query of `sections`."""
    for page in sections(row):
        for query in page["queries"]:
            yield {**row, "query": query["text"], "document": page["chunks"][query["chunk"]]}


def _split(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text below it) of each section; the first heading is "" if the text starts without one."""
    heading, lines, fence = "", [], ""
    for line in text.splitlines():
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence):
                fence = ""
        if not fence and (match := _HEADING.match(line)):
            yield heading, "\n".join(lines).strip()
            heading, lines = match[2], []
        else:
            lines.append(line)
    yield heading, "\n".join(lines).strip()
