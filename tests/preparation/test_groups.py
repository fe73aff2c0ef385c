"""Examples of tasks from rows with lists and from groups of rows."""

import dataclasses
from collections import Counter

import pytest

from embed.preparation import markdown
from embed.preparation.counts import Counts
from embed.preparation.sources import Row, Shard, Source
from embed.preparation.tasks import Task


@dataclasses.dataclass(frozen=True)
class Rows(Source):
    rows: tuple

    def read(self, shard):
        return (Row(f"file:{number}", row) for number, row in enumerate(self.rows, 1))


def examples(rows, **fields) -> tuple[list[dict], Counts]:
    """(the examples of rows without their location and weight, counts)."""
    counts, task = Counts(), Task(Rows(tuple(rows)), **fields)
    made = task.examples(Shard(""), counts)
    if task.group_sizes:
        made = task.documents(made, counts.cut)
    return [{k: v for k, v in example.items() if k not in ("location", "weight")} for example in made], counts


def test_lists_of_queries_documents_and_texts_give_an_example_each():
    row = {"asked": [["q1", "a1"], ["q2", "a2"]], "text": "d", "more": {"x": "t1", "y": "t2"}}
    made, _ = examples([row], kind="pair", columns={"query": "asked.*.0", "document": "text"})
    assert made == [{"query": "q1", "document": "d"}, {"query": "q2", "document": "d"}]
    made, _ = examples([row], kind="text", columns={"text": "more.*"})
    assert made == [{"text": "t1"}, {"text": "t2"}]
    made, _ = examples([row], kind="pair", columns={"query": ("asked.0.0", "text"), "document": "text"})
    assert made == [{"query": "q1 d", "document": "d"}]


def test_a_query_is_for_the_place_of_its_answer_and_left_out_without_one():
    row = {"text": "one two three", "q": ["a", "b", "c"], "a": ["three", "absent", "one"]}
    columns = {"text": "text", "queries": "q", "answers": "a"}
    made, counts = examples([row], kind="contextual", columns=columns)
    assert made == [{"text": "one two three", "queries": [("a", 8), ("c", 0)]}]
    assert counts.cut == {"queries without their answer in the text": 1}
    made, counts = examples([{**row, "a": ["", "", "one"]}], kind="contextual", columns=columns)
    assert made[0]["queries"] == [("c", 0)] and counts.cut == {"queries without their answer in the text": 2}
    _, counts = examples([{**row, "a": ["one"]}], kind="contextual", columns=columns)
    assert counts.errors == ["file:1: 3 queries have 1 answers"]


@pytest.mark.parametrize("offset", [-1, 13, 10**6])
def test_a_query_whose_offset_is_not_in_the_text_is_a_bad_row(offset):
    row = {"text": "one two three", "queries": [{"text": "a", "offset": offset}]}
    made, counts = examples([row], kind="contextual", columns={"text": "text"})
    assert not made and counts.errors == [f"file:1: a query has the offset {offset} in a text of 13 characters"]


def test_answers_without_a_text_are_refused():
    with pytest.raises(ValueError, match="task.columns: 'answers' needs the column 'text'"):
        Task(Rows(()), "contextual", columns={"answers": "a", "chunks": "c"})


def test_rows_of_several_fields_make_a_text_with_each_line_once():
    rows = [("a", 1, "x"), ("a", 2, "y"), ("a", 1, "z"), ("a", 1, "x")]
    rows = [{"k": k, "n": n, "text": text} for k, n, text in rows]
    made, counts = examples(rows, kind="text", group_by=("k", "n"))
    assert made == [{"text": "x\nz"}, {"text": "y"}] and counts.rows == {"used": 4}


def test_a_group_of_pairs_pairs_every_row_with_another_one():
    rows = [{"key": "k", "text": text} for text in "abcde"] + [{"key": "alone", "text": "f"}]
    made, counts = examples(rows, kind="pair", group_by="key", columns={"query": "text", "document": "text"})
    assert sorted(e["query"] for e in made) == sorted(e["document"] for e in made) == list("abcde")
    assert all(e["query"] != e["document"] for e in made)
    assert [(e["query"], e["document"]) for e in made] != list(zip("abcde", "bcdea"))  # not the order of the rows
    assert counts.rows == {"used": 5, "rows without an example": 1}
    rows = [{"key": "k", "query": text, "document": text[:1]} for text in ("a1", "a2", "b1", "b2", "b3")]
    made, counts = examples(rows, kind="pair", group_by="key")
    assert counts.cut == {"pairs with equal sides": 5 - len(made)} and 0 < len(made) < 5


def test_a_group_has_the_queries_of_one_chunk_only():
    rows = [("q", "c1"), ("q", "c2"), ("r", "c2"), ("r", "c2")]
    rows = [{"key": "k", "query": query, "chunk": chunk} for query, chunk in rows]
    made, counts = examples(rows, kind="contextual", group_by="key", columns={"queries": "query", "chunk": "chunk"})
    assert counts.cut == {"queries of several chunks": 2}
    assert made == [{"chunks": ["c1", "c2"], "queries": [("r", 1)] * 2, "headers": [[], []]}] or made == [
        {"chunks": ["c1", "c2"], "queries": [("r", 1)], "headers": [[], []]}
    ]


def test_patterns_are_removed_from_all_texts_or_from_those_of_a_column():
    row = {"query": "{{q}} ", "document": "{{d}}"}
    made, _ = examples([row], kind="pair", remove=r"\{\{|\}\}")
    assert made == [{"query": "q", "document": "d"}]
    made, _ = examples([row], kind="pair", remove={"document": r"\W"})
    assert made == [{"query": "{{q}} ", "document": "d"}]
    rows = [{"key": 1, "query": "- q", "chunk": "- c"}]
    columns = {"queries": "query", "chunk": "chunk"}
    made, _ = examples(rows, kind="contextual", group_by="key", columns=columns, remove={"chunk": "^- "})
    assert made == [{"chunks": ["c"], "queries": [("- q", 0)], "headers": [[]]}]
    _, counts = examples([{"text": "gone"}, {"text": "stays"}], kind="text", remove="gone")
    assert counts.dropped == {"empty texts": 1}


@pytest.mark.parametrize(
    "remove, message",
    [
        ("(", r"task.remove='\(' is no regular expression"),
        ({"text": "a"}, "task.remove: 'text' must be one of document, query$"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused(remove, message):
    with pytest.raises(ValueError, match=message):
        Task(Rows(()), "pair", remove=remove)


PAGE = """---
title: front matter
---
# Page #

Intro.

## Empty

### Code

```python
# not a heading
```

# Another
Text.
"""


def test_a_page_of_markdown_is_a_document_whose_queries_are_its_headings():
    (page,) = markdown.sections({"text": PAGE})
    assert page["chunks"] == ["Intro.", "```python\n# not a heading\n```", "Text."]
    assert page["queries"] == [
        {"text": "Page", "chunk": 0},
        {"text": "Page: Code", "chunk": 1},
        {"text": "Page: Another", "chunk": 2},
    ]
    made, _ = examples([{"text": PAGE}], kind="pair", map="embed.preparation.markdown:pairs")
    assert made[0] == {"query": "Page", "document": "Intro."} and len(made) == 3


def test_a_page_without_headings_gives_nothing():
    assert not list(markdown.sections({"text": "only text"})) and not list(markdown.sections({"text": "# only this"}))


def test_unrelated_rows_make_documents_of_the_given_sizes_and_each_row_is_in_one():
    rows = [{"query": f"q{i}", "document": f"d{i}", "_file": f"{i}"} for i in range(20)]
    fields = dict(kind="contextual", columns={"queries": "query", "chunk": "document"}, group_sizes=(1, 2, 4))
    made, counts = examples(rows, **fields)
    assert [len(example["chunks"]) for example in made] == [1, 2, 4, 1, 2, 4, 1, 2, 3]
    assert sorted(chunk for example in made for chunk in example["chunks"]) == sorted(row["document"] for row in rows)
    for example in made:
        assert [(f"q{chunk[1:]}", index) for index, chunk in enumerate(example["chunks"])] == example["queries"]
    assert made != sorted(made, key=lambda e: int(e["chunks"][0][1:]))  # not in the order of the rows
    assert counts.rows == {"used": 20} and counts.cut["chunks of documents of task.group_sizes"] == 20
    assert examples(rows[::-1], **fields)[0] == made  # whatever order they have


def test_unrelated_rows_are_mapped_and_filtered_one_by_one():
    pages = [{"text": "".join(f"# {p} {s}\nsection {s} of {p}\n\n" for s in range(8))} for p in range(20)]
    fields = dict(kind="contextual", columns={"queries": "query", "chunk": "document"}, group_sizes=(4, 8))
    made, counts = examples(pages, map="embed.preparation.markdown:pairs", drop="section 3", **fields)
    assert [len(example["chunks"]) for example in made] == [4, 8] * 11 + [4, 4]
    assert counts.dropped == {"pattern": 20} and counts.made == 160
    pages_of = [{chunk.split()[-1] for chunk in example["chunks"]} for example in made]
    assert sum(map(len, pages_of)) > 0.75 * 140  # few of them are from the same page
    rows = [{"query": "two words" if i % 2 else f"{i}", "document": f"- x {i}"} for i in range(10)]
    made, counts = examples(rows, **fields | {"keep": r"\w \w", "remove": {"chunk": "^- "}})
    assert counts.dropped == {"pattern": 5}  # of its query
    assert sorted(made[0]["chunks"] + made[1]["chunks"]) == [f"x {i}" for i in range(1, 10, 2)]


def test_rows_of_a_group_are_filtered_and_held_out_one_by_one():
    rows = [{"key": i // 4, "page": i % 8, "lang": ("en", "fr")[i % 2], "text": f"t{i}"} for i in range(80)]
    fields = dict(kind="text", group_by="key", held_out=0.3, held_out_by="page")
    task = Task(Rows(tuple(rows)), **fields)
    parts = [list(task.examples(Shard(""), Counts(), held_out=held_out)) for held_out in (False, True)]
    pages = [{int(t[1:]) % 8 for example in part for t in example["text"].split()} for part in parts]
    assert pages[0] and pages[1] and not pages[0] & pages[1]
    made, counts = examples(rows, kind="text", group_by="key", language_field="lang", languages=("fr",))
    assert counts.rows == {"other languages": 40, "used": 40} and made[0]["text"] == "t1\nt3"
    made, _ = examples(rows, kind="text", group_by="key", held_out=0.3)
    assert all(len(example["text"].split()) == 4 for example in made) and 8 < len(made) < 20  # whole groups


def test_held_out_rows_are_in_documents_of_their_own():
    rows = [{"query": f"q{i}", "document": f"d{i}"} for i in range(40)]
    fields = dict(kind="contextual", columns={"queries": "query", "chunk": "document"}, group_sizes=(4,), held_out=0.4)
    kept, counts = examples(rows, **fields)
    task = Task(Rows(tuple(rows)), **fields)
    held_out = list(task.documents(task.examples(Shard(""), Counts(), held_out=True), Counter()))
    chunks = [{chunk for example in part for chunk in example["chunks"]} for part in (kept, held_out)]
    assert chunks[0] and chunks[1] and not chunks[0] & chunks[1] and len(chunks[0] | chunks[1]) == 40
    assert counts.dropped["held out"] == len(chunks[1])


@pytest.mark.parametrize(
    "fields", [dict(kind="pair"), dict(kind="contextual", group_by="x"), dict(kind="contextual", sizes=(0,))]
)
def test_group_sizes_are_only_for_contextual_tasks_without_groups(fields):
    sizes = fields.pop("sizes", (2,))
    with pytest.raises(ValueError, match="task.group_sizes=.* must be at least 1 each, in a contextual task"):
        Task(Rows(()), group_sizes=sizes, **fields)
