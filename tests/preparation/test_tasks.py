"""Tasks: rows to text examples of each kind, filters, and counts that add up."""

import dataclasses
import json
from types import MappingProxyType

import pytest

from embed.preparation import counts as reasons
from embed.preparation import examples, tasks
from embed.preparation.columns import pick, text_of
from embed.preparation.counts import Counts
from embed.preparation.sources import Files, Hub, Parallel, Retrieval, Row, Shard, Source, SourceError
from embed.preparation.tasks import Task


@dataclasses.dataclass(frozen=True)
class Rows(Source):
    """Rows in memory."""

    values: tuple

    def read(self, shard):
        for i, value in enumerate(self.values):
            yield value if isinstance(value, Row) else Row(f"memory:{i + 1}", value)


def made(kind, *rows, read=MappingProxyType({}), **fields):
    """(examples without location and weight, counts) of a task over rows; `read`: arguments of `Task.examples`."""
    task, counts = Task(Rows(rows), kind, max_bad=1.0, **fields), Counts()
    result = list(task.examples(Shard(""), counts, **read))
    assert counts.rows_read == sum(counts.rows.values())
    assert counts.made == len(result) + sum(counts.dropped.values())
    return [{k: v for k, v in e.items() if k not in ("location", "weight")} for e in result], counts


def test_columns_name_fields_of_nested_rows_and_lists():
    row = {"q": {"text": "one"}, "passages": [{"text": "two", "title": "T"}, {"text": "three", "title": "U"}]}
    columns = {"query": "q.text", "document": "passages.*.text"}
    assert made("pair", row, columns=columns)[0] == [
        {"query": "one", "document": "two"},
        {"query": "one", "document": "three"},
    ]
    row = {"question": [["who?", "me"], ["what?", "that"]], "context": "c", "title": ""}
    assert pick(row, "question.*.0") == ["who?", "what?"] and pick(row, "question.1.0") == "what?"
    assert text_of({"title": "T", "text": "x"}, ("title", "text")) == "T x"
    assert text_of({"title": None, "text": "x"}, ("title", "text")) == "x"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "q"}, "no field 'document'; there are query"),
        ({"query": "q", "document": 3}, "field 'document' is 3, expected a text"),
        ({"query": "q", "document": ["x", None]}, "field 'document' has the item None, expected texts"),
        (Row("file:7", None, "not JSON"), "not JSON"),
    ],
)
def test_a_bad_row_is_counted_with_its_location_and_reason(row, message):
    result, counts = made("pair", {"query": "a", "document": "b"}, row)
    assert len(result) == 1 and counts.rows[reasons.BAD] == 1
    assert message in counts.errors[0] and counts.errors[0].startswith(("memory:2", "file:7"))


def test_more_bad_rows_than_allowed_are_an_error_that_names_the_first():
    counts = Counts(rows_read=1000)
    counts.bad("file:3", "not JSON")
    counts.check(0.001)
    counts.bad("file:9", "not UTF-8")
    with pytest.raises(reasons.BadRowsError, match=r"^2 of 1,000 rows are bad.*file:3: not JSON; file:9: not UTF-8$"):
        counts.check(0.001)


@pytest.mark.parametrize(
    "error, kind",
    [
        (SourceError("no file"), SourceError),
        (reasons.BadRowsError("2 of 3"), reasons.BadRowsError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"), ValueError),
        (json.JSONDecodeError("no JSON", "x", 0), ValueError),
    ],
)
def test_an_error_about_the_data_of_a_task_names_it(error, kind):
    with pytest.raises(ValueError, match="^task 'web': ") as raised, tasks.named("web"):
        raise error
    assert raised.type is kind and f"{error}" in f"{raised.value}"


def test_filters_count_what_they_drop_by_reason():
    rows = [
        {"text": "good text", "lang": "en", "score": 0.9},
        {"text": " \n ", "lang": "en", "score": 0.9},
        {"text": "hi", "lang": "en", "score": 0.9},
        {"text": "x" * 50, "lang": "en", "score": 0.9},
        {"text": "guter Text", "lang": "de", "score": 0.9},
        {"text": "poor text", "lang": "en", "score": "0.1"},
        {"text": "good, but ERROR", "lang": "en", "score": 1},
        {"text": "another one", "lang": "en", "score": 1},
    ]
    result, counts = made(
        "text",
        *rows,
        language_field="lang",
        languages=("en",),
        score_field="score",
        min_score=0.5,
        min_characters=5,
        max_characters=20,
        keep="good",
        drop="ERROR",
    )
    assert result == [{"text": "good text"}]
    assert counts.dropped == {
        reasons.EMPTY: 1,
        tasks.SHORT: 1,
        tasks.LONG: 1,
        tasks.LANGUAGE: 1,
        tasks.SCORE: 1,
        reasons.PATTERN: 2,
    }


def test_rows_with_the_same_value_make_a_document_with_its_queries():
    rows = [
        {"title": "A", "context": "first", "question": "q1"},
        {"title": "B", "context": "other", "question": "q2"},
        {"title": "A", "context": "second", "question": "q3"},
        {"title": "A", "context": "first", "question": "q4"},
    ]
    columns = {"chunk": "context", "queries": "question"}
    result, counts = made("contextual", *rows, columns=columns, group_by="title")
    assert result == [
        {"chunks": ["first", "second"], "queries": [("q1", 0), ("q3", 1), ("q4", 0)], "headers": [[], []]},
        {"chunks": ["other"], "queries": [("q2", 0)], "headers": [[]]},
    ]
    assert counts.rows == {"used": 4}


def test_a_label_makes_positives_and_negatives_of_the_rows_of_a_group():
    rows = [
        {"premise": "p", "hypothesis": "yes", "label": "entailment"},
        {"premise": "p", "hypothesis": "no", "label": "contradiction"},
        {"premise": "p", "hypothesis": "maybe", "label": "neutral"},
        {"premise": "lonely", "hypothesis": "yes", "label": "entailment"},
    ]
    result, counts = made(
        "triplet",
        *rows,
        columns={"query": "premise", "document": "hypothesis"},
        group_by="premise",
        label="label",
        labels={"entailment": "document", "contradiction": "negatives"},
    )
    assert result == [{"query": "p", "document": "yes", "negatives": ["no"]}]
    assert counts.rows == {"used": 3, tasks.UNUSED: 1} and counts.cut == {tasks.UNMAPPED: 1}


def test_held_out_examples_and_the_others_are_all_examples_and_groups_stay_together():
    rows = [{"query": f"q{i}", "document": f"d{i}", "page": i % 20} for i in range(200)]
    fields = dict(held_out=0.3, held_out_by="page")
    kept, counts = made("pair", *rows, **fields)
    held_out, _ = made("pair", *rows, read={"held_out": True}, **fields)
    assert counts.dropped == {reasons.HELD_OUT: len(held_out)} and len(kept) + len(held_out) == 200
    pages = [{int(e["query"][1:]) % 20 for e in part} for part in (kept, held_out)]
    assert pages[0] and pages[1] and not pages[0] & pages[1]


def test_what_is_held_out_divides_into_parts_that_share_no_group():
    rows = [{"query": f"q{i}", "document": f"d{i}", "page": i % 50} for i in range(200)]
    fields = dict(held_out=0.5, held_out_by="page")
    whole, _ = made("pair", *rows, read={"held_out": True}, **fields)
    parts = [made("pair", *rows, read={"held_out": True, "part": (k, 3)}, **fields)[0] for k in range(3)]
    assert sorted(e["query"] for part in parts for e in part) == sorted(e["query"] for e in whole)
    pages = [{int(e["query"][1:]) % 50 for e in part} for part in parts]
    assert all(pages) and sum(map(len, pages)) == len(set.union(*pages))


def test_weights_repeat_by_the_largest_value_that_is_reached():
    task = Task(
        Rows(tuple({"text": "x", "size": n} for n in (1, 2, 4, 1000))),
        "text",
        weight_field="size",
        weights={1: 1, 2: 2, 100: 8},
    )
    assert [e["weight"] for e in task.examples(Shard(""), Counts())] == [1, 2, 2, 8]


def test_reading_ends_at_the_limits():
    rows = [{"text": "12345"} for _ in range(10)]
    assert len(made("text", *rows, read={"limit": 3})[0]) == 3
    result, counts = made("text", *rows, read={"characters": 12})
    assert len(result) == 3 and counts.rows_read == 3
    rows = [{"text": f"{i % 100:05}"} for i in range(300)]
    result, counts = made("text", *rows, read={"characters": 12}, group_by="text")
    assert len(result) == 3 and counts.rows == {"used": 9, tasks.UNREAD: 291}


def test_the_rate_of_bad_rows_ends_reading_once_it_is_more_than_chance():
    task, counts = Task(Rows(({"text": 3},) + ({"text": "good"},) * 30_000), "text", max_bad=0.001), Counts()
    assert sum(1 for _ in task.examples(Shard(""), counts)) == 30_000
    for group_by in ("", "text"):
        task, counts = Task(Rows(({"text": 3},) * 30_000), "text", group_by=group_by), Counts()
        if group_by:
            task = dataclasses.replace(task, source=Rows(({"other": 3},) * 30_000))
        with pytest.raises(reasons.BadRowsError, match="10,000 of 10,000 rows are bad"):
            list(task.examples(Shard(""), counts))


def test_a_map_makes_rows_of_a_row():
    result, counts = made("pair", {"a": ["x y", "z"]}, {"a": []}, map=f"{__name__}:words_of")
    assert result == [{"query": "x", "document": "x y"}, {"query": "z", "document": "z"}]
    assert counts.rows == {"used": 1, tasks.UNUSED: 1}
    with pytest.raises(ValueError, match="task.map='nowhere:f' must be package.module:function"):
        Task(Rows(()), "pair", map="nowhere:f")


def words_of(row):
    for text in row["a"]:
        yield {"query": text.split()[0], "document": text}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="pairs"), "task.kind='pairs' must be one of text, distill, pair"),
        (dict(kind="pair", columns={"text": "t"}), "'text' is no column of a pair task: document, query"),
        (dict(kind="pair", keep="("), "task.keep='\\(' is no regular expression"),
        (dict(kind="pair", held_out=1.5), "task.held_out=1.5 must be between 0 and 1"),
        (dict(kind="pair", weights={1: 0}), "task.weights={1: 0} must be"),
        (dict(kind="pair", label="l", labels={"0": "document"}), "task.label needs task.group_by"),
        (dict(kind="triplet", group_by="k", label="l"), "task.label='l' and task.labels={} belong together"),
        (dict(kind="triplet", group_by="k", label="l", labels={"0": "positive"}), "belong together"),
        (dict(kind="contextual", columns={"chunk": "c"}), "it needs task.group_by or task.group_sizes"),
        (dict(kind="pair", min_score=0.5), "task.min_score needs task.score_field"),
        (dict(kind="pair", weights={1: 2}), "task.weights needs task.weight_field"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(Rows(()), **fields)


@pytest.mark.parametrize(
    "field, allowed",
    [
        *((name, "a whole number of at least 1") for name in ("max_characters", "chunk_length", "max_chunks")),
        ("max_context", "a whole number of at least 1"),
        *((name, "a whole number of at least 0") for name in ("min_characters", "query_length", "document_length")),
        *((name, "a whole number of at least 0") for name in ("max_total_characters", "buckets")),
        *((name, "between 0 and 1") for name in ("held_out", "max_bad")),
        ("min_score", "a number"),
    ],
)
def test_a_number_of_a_task_out_of_its_range_or_of_another_type_is_refused(field, allowed):
    wrong = ["x", None, True, float("nan")]
    wrong += [] if field == "min_score" else [-1]
    wrong += [0, 1.5] if allowed.endswith("at least 1") else [1.5] if field != "min_score" else []
    for value in wrong:
        with pytest.raises(ValueError) as raised:
            Task(Rows(()), "pair", **{field: value})
        assert str(raised.value) == f"task.{field}={value!r} must be {allowed}"
    Task(Rows(()), "pair", score_field="score", **{field: 1})


@pytest.mark.parametrize("value", [{1: 0}, {1: 1.5}, {"x": 1}, [1], {1: True}])
def test_weights_are_whole_numbers_of_at_least_1(value):
    with pytest.raises(ValueError, match=r"^task.weights=.* must be \{least value: repetitions\}"):
        Task(Rows(()), "pair", weights=value)


@pytest.mark.parametrize("value", [(0,), ("x",), (1.5,), 3])
def test_group_sizes_are_whole_numbers_of_at_least_1(value):
    with pytest.raises(ValueError, match="task.group_sizes=.* must be at least 1 each"):
        Task(Rows(()), "contextual", group_sizes=value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Files("x", shard_bytes=0), "files.shard_bytes=0 must be a whole number of at least 1"),
        (lambda: Hub(shard_bytes="x"), "hub.shard_bytes='x' must be a whole number of at least 1"),
        (lambda: Retrieval(shard_bytes=0), "retrieval.shard_bytes=0 must be a whole number of at least 1"),
        (lambda: Retrieval(max_chunks=-1), "retrieval.max_chunks=-1 must be a whole number of at least 0"),
        (lambda: Parallel(pairs=1.5), "parallel.pairs=1.5 must be a whole number of at least 0"),
        (lambda: Parallel(rates={"de": 1}), "parallel.rates needs parallel.pairs"),
        (
            lambda: Parallel(pairs=1, languages=("en",), rates={"de": 1}),
            "parallel.rates: 'de' is none of parallel.languages: en",
        ),
        (lambda: Parallel(pairs=1, rates={"de": 0}), "parallel.rates: the rate 0 of 'de' must be positive"),
    ],
)
def test_a_number_of_a_source_out_of_its_range_is_refused(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message


class Words:
    """One token per word."""

    vocab_size, separator_id = 1000, 999

    def encode(self, texts):
        import numpy as np

        return [np.array([len(w) for w in text.split()], np.int32) for text in texts]


def test_documents_are_divided_into_parts_that_begin_with_their_headers():
    assert examples.divide([[]] * 5, [3] * 5, max_chunks=2, max_tokens=100) == [[0, 1], [2, 3], [4]]
    assert examples.divide([[]] * 3, [3] * 3, max_chunks=9, max_tokens=7) == [[0, 1], [2]]
    headers = [[], [0], [0, 1], [0, 1], [0]]
    assert examples.divide(headers, [1] * 5, max_chunks=3, max_tokens=100) == [[0, 1, 2], [0, 1, 3], [0, 4]]
    assert examples.divide([], [], max_chunks=3, max_tokens=100) == []


def test_the_tokens_of_a_document_hold_its_chunks_and_queries():
    task = Task(Rows(()), "contextual", chunk_length=2, max_chunks=2, query_length=3)
    example = {
        "chunks": ["a bb ccc", "dddd", "e", "ff"],
        "queries": [("one two", 0), ("three", 1), ("x", 3)],
        "headers": [[]] * 4,
    }
    from collections import Counter

    cut, dropped = Counter(), Counter()
    (_, first), (_, second) = examples.tokenize(task, [example], Words(), cut, dropped)
    assert first["document"].tolist() == [1, 2, 4] and first["chunk_lengths"].tolist() == [2, 1]
    assert first["queries"].tolist() == [3, 3, 5] and first["query_lengths"].tolist() == [2, 1]
    assert first["positives"].tolist() == [0, 1] and second["positives"].tolist() == [1]
    assert cut == {"chunks": 1, "queries": 0, examples.PARTS: 0} and not dropped
    assert examples.tokenize(task, [{**example, "queries": []}], Words(), cut, dropped) == []
    assert dropped == {examples.NO_QUERY: 1}
    example = {"chunks": ["a", " "], "queries": [("q", 0), ("", 0), ("r", 1)], "headers": [[]] * 2}
    ((_, only),) = examples.tokenize(task, [example], Words(), cut := Counter(), dropped)
    assert only["queries"].tolist() == [1] and cut[examples.NO_QUERY_TOKENS] == 2


def test_a_text_is_split_into_chunks_and_offsets_become_chunks():
    text = "One two three four.\n\nFive six seven eight.\n\nNine ten."
    example = {"text": text, "queries": [("a", 0), ("b", text.index("seven")), ("c", len(text) - 1)]}
    result = examples.split_text(example, Words(), 4)
    assert [len(chunk.split()) <= 4 for chunk in result["chunks"]] == [True] * 3
    assert result["queries"] == [("a", 0), ("b", 1), ("c", 2)]


def test_encode_cuts_to_the_length_whatever_the_length_of_tokens():
    long_words = " ".join("w" * 300 for _ in range(5))
    tokens, cut = examples.encode([long_words, "a b c d e f", ""], Words(), 4)
    assert [t.tolist() for t in tokens] == [[300] * 4, [1] * 4, []] and cut == 2
    assert examples.encode(["a b"], Words(), 2)[1] == 0


def test_equal_tokens_have_equal_digests_and_moved_ones_do_not():
    import numpy as np

    def digest(query, document):
        return examples.digest({"query": np.array(query, np.int32), "document": np.array(document, np.int32)})

    assert digest([1, 2], [3]) == digest([1, 2], [3]) != digest([1], [2, 3])


def test_counts_survive_json():
    counts = Counts(rows_read=5, made=3)
    counts.bad("x:1", "no")
    counts.dropped["empty"] += 2
    assert Counts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


def test_a_contextual_task_without_columns_takes_those_that_a_row_has():
    chunks = {"chunks": ["a", "b"], "queries": [{"text": "q", "chunk": 1}]}
    offsets = {"text": "a b", "queries": [{"text": "q", "offset": 2}]}
    answers = {"text": "a b", "queries": ["q"], "answers": ["b"]}
    assert made("contextual", chunks)[0][0]["queries"] == [("q", 1)]
    assert made("contextual", offsets)[0][0]["queries"] == made("contextual", answers)[0][0]["queries"] == [("q", 2)]


def test_a_star_means_the_items_of_a_list_or_mapping_but_not_the_name_of_the_file():
    assert pick({"a": "x", "_file": "f"}, "*") == ["x"]
    with pytest.raises(TypeError, match=r"field 'a\.\*': 'abc' has no items"):
        pick({"a": "abc"}, "a.*")


@pytest.mark.parametrize("column", ["text", "answers", "headers"])
def test_offsets_in_the_text_of_a_document_stay_right(column):
    with pytest.raises(ValueError, match=f"task.remove: '{column}' must be one of chunks, queries"):
        Task(Rows(()), "contextual", remove={column: "x"})
