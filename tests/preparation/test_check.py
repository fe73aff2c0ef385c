"""`embed prepare --check`: a table of what sources give, and a line for each that gives nothing."""

import contextlib
import json
import socket
import threading

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from embed.preparation import check as checking
from embed.preparation.check import check
from embed.preparation.sources import hub, joined

GIN = """
task.kind = "pair"
works/task.source = @files()
works/files.paths = "{data_root}/good.jsonl"
works/task.language = "en"
column/task.source = @files()
column/files.paths = "{data_root}/good.jsonl"
column/task.columns = {"document": "answer"}
bad/task.source = @files()
bad/files.paths = "{data_root}/bad.jsonl"
missing/task.source = @files()
missing/files.paths = "{data_root}/none-*.jsonl"
groups/task.source = @files()
groups/files.paths = "{data_root}/groups.jsonl"
groups/task.group_by = "key"
remote/task.source = @hub()
remote/hub.id = "org/{name}"
evaluated/task.source = @retrieval()
evaluated/task.kind = "retrieval"
evaluated/retrieval.path = "{data_root}/set"
"""


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Sets the address of the hub, with an empty cache."""

    def set_endpoint(url: str):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield set_endpoint
    close_session()


@pytest.fixture
def closed_port():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent_hub():
    """A server that takes connections and never answers: (its port, the connections so far)."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], connections
    for connection in connections:
        connection.close()


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def run(folder, capsys, names, **options) -> tuple[bool, str]:
    """(result, what was printed) of a check of the tasks with these names."""
    rates = {name.replace("/", "."): 1.0 for name in names}
    (folder / "test.gin").write_text(f"{GIN}\nmixtures.rates = {{'pairs': {rates}}}\n")
    result = check(gin_file=folder / "test.gin", data_root=str(folder), **options)
    return result, capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    write(tmp_path / "good.jsonl", [{"query": f"query {i}", "document": f"document {i}"} for i in range(20)])
    write(tmp_path / "bad.jsonl", ["{\n", "not JSON\n"])
    write(tmp_path / "groups.jsonl", [{"key": i % 200, "query": f"q{i}", "document": f"d{i}"} for i in range(400)])
    write(tmp_path / "set" / "corpus.jsonl", [{"_id": "d", "text": "a relevant text"}])
    write(tmp_path / "set" / "queries.jsonl", [{"_id": "q", "text": "an asked query"}])
    write(tmp_path / "set" / "qrels.jsonl", [{"query-id": "q", "corpus-id": "d", "score": 1}])
    return tmp_path


def test_a_source_that_works_is_a_row_with_its_columns_and_an_example(folder, capsys):
    result, printed = run(folder, capsys, ["works"])
    (row,) = [line for line in printed.splitlines() if line.startswith("│ works")]
    for part in ("pair", "query, document, _file", "en", "query 0 → document 0"):
        assert part in row
    assert result and "1 of 1 tasks can be read" in printed


def test_bad_rows_of_a_source_that_works_are_named(folder, capsys):
    write(folder / "good.jsonl", ["nonsense\n", {"query": "query 0", "document": "document"}])
    result, printed = run(folder, capsys, ["works"])
    assert "works: 1 of 2 rows are bad: " in printed and "good.jsonl:1: not JSON" in printed
    assert result and "│ works" in printed


def test_sources_of_the_vocabulary_and_of_hygiene_are_opened_too(folder, capsys):
    bindings = (
        "vocabulary.tasks = ('missing',)",
        "works/hygiene.evaluation_sets = (@evaluated/retrieval(), @absent/retrieval())",
        "absent/retrieval.path = '{data_root}/absent'",
    )
    result, printed = run(folder, capsys, ["works"], gin_bindings=bindings)
    assert "missing: no file matches" in printed and "│ hygiene.evaluation_sets" in printed
    assert f"hygiene.evaluation_sets {folder}/absent test: " in printed and not result


def test_rows_are_read_until_one_passes_the_filters(folder, capsys):
    write(folder / "good.jsonl", [{"query": f"query {i}", "document": "in" if i > 50 else "out"} for i in range(60)])
    printed = run(folder, capsys, ["works"], gin_bindings=("task.drop = 'out'",))[1]
    assert "query 51 → in" in printed


def test_every_source_that_gives_nothing_is_one_line_with_its_reason(folder, capsys, endpoint, closed_port):
    endpoint(f"http://127.0.0.1:{closed_port}")
    result, printed = run(folder, capsys, ["works", "column", "bad", "missing", "remote/text"])
    lines = {line.split(":")[0]: line for line in printed.splitlines() if ": " in line}
    assert "no field 'answer'; there are query, document" in lines["column"]
    assert "bad rows 2" in lines["bad"] and "bad.jsonl:1: not JSON" in lines["bad"]
    assert "no file matches" in lines["missing"] and "none-*.jsonl" in lines["missing"]
    assert f"org/text is not in the local cache, and http://127.0.0.1:{closed_port}" in lines["remote.text"]
    assert lines["remote.text"].endswith("cannot be reached")
    assert not result and "1 of 5 tasks can be read" in printed


def test_a_hub_that_does_not_answer_is_asked_once_for_all_sources(folder, capsys, endpoint, silent_hub, monkeypatch):
    port, connections = silent_hub
    endpoint(f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    result, printed = run(folder, capsys, [f"remote/set_{i}" for i in range(30)])
    assert printed.count("cannot be reached") == 30 and "0 of 30 tasks can be read" in printed
    assert not result and len(connections) == 1


def test_sources_that_never_answer_are_given_up_and_the_others_shown(
    folder, capsys, endpoint, closed_port, silent_hub, monkeypatch
):
    endpoint(f"http://127.0.0.1:{closed_port}")
    run(folder, capsys, ["works", "remote/text"])  # imports the libraries
    endpoint(f"http://127.0.0.1:{silent_hub[0]}")
    monkeypatch.setattr(checking, "PATIENCE", 1.0)
    result, printed = run(folder, capsys, ["works", *(f"remote/set_{i}" for i in range(30))])
    assert printed.count("no answer, as from any other source, for 1 seconds") == 30
    assert not result and "1 of 31 tasks can be read" in printed


def test_groups_that_the_first_rows_do_not_complete_are_looked_for_in_more(folder, capsys):
    result, printed = run(folder, capsys, ["groups"])
    assert result and "1 of 1 tasks can be read" in printed


def test_an_evaluation_set_shows_a_query_and_its_relevant_text(folder, capsys):
    (folder / "test.gin").write_text(
        f"{GIN}\nmixtures.rates = {{'pairs': {{'works': 1.0}}}}\nevaluation.sets = {{'a/test': 'evaluated'}}\n"
    )
    assert check(gin_file=folder / "test.gin", data_root=str(folder))
    assert "an asked query → a relevant text" in capsys.readouterr().out


def test_a_join_whose_first_rows_do_not_belong_together_is_no_failure(folder, capsys, monkeypatch):
    monkeypatch.setattr(joined, "SAMPLED", 1)
    write(folder / "set" / "corpus.jsonl", [{"_id": name, "text": f"text {name}"} for name in ("other", "d")])
    mixture = "mixtures.rates = {'pairs': {'works': 1.0}}\nevaluation.sets = {'a/test': 'evaluated'}"
    (folder / "test.gin").write_text(f"{GIN}\n{mixture}\n")
    assert check(gin_file=folder / "test.gin", data_root=str(folder))
    printed = capsys.readouterr().out
    assert "none in the first rows" in printed and "2 of 2 tasks can be read" in printed
