"""`prepare`: a stream of two maps that continues after any interruption, and whose counts add up."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import small

from embed import paths, tokenizers
from embed.data.store import Store
from embed.preparation import copies, runners, settings, stream
from embed.preparation.counts import Counts
from embed.preparation.prepare import _windows, prepare
from embed.preparation.settings import bind

GIN = """
mixtures.rates = {"diffusion": {"texts": 1.0}, "both": {"pairs": 3.0, "more": 1.0}}
texts/task.source = @files()
texts/files.paths = "{data_root}/texts/*.jsonl"
texts/task.kind = "text"
texts/task.buckets = 3
pairs/task.source = @files()
pairs/files.paths = "{data_root}/pairs.jsonl"
pairs/task.kind = "pair"
pairs/task.query_length = 8
pairs/task.document_length = 16
more/task.source = @files()
more/files.paths = "{data_root}/more.csv"
more/task.kind = "pair"
more/task.columns = {"query": "title", "document": "body"}
more/task.held_out = 0.2
evaluation.sets = {"more/test": "more"}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Texts in four files with copies within and between them, pairs in JSON lines and in CSV, and a gin file."""
    root = tmp_path_factory.mktemp("sources")
    texts = small.sentences(60, seed=1)
    (root / "texts").mkdir()
    for part in range(4):
        lines = [json.dumps({"text": text}) for text in texts[part * 10 : part * 10 + 30]]
        (root / "texts" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    queries, documents = small.sentences(80, seed=2, longest=12), small.sentences(80, seed=3)
    with open(root / "pairs.jsonl", "w") as out:
        for query, document in zip(queries, documents):
            out.write(json.dumps({"query": query, "document": document}) + "\n")
    with open(root / "more.csv", "w") as out:
        out.write("title,body\n")
        for query, document in zip(queries[:50], documents[30:]):
            out.write(f'{query},"{document}"\n')
    (root / "data.gin").write_text(GIN)
    return root


def run(sources, folder, *bindings, **more):
    more = {"tokenizer": small.tokenizer(), "processes": 1} | more
    prepare(folder, gin_file=sources / "data.gin", gin_bindings=bindings, data_root=str(sources), **more)
    return folder


@pytest.fixture(scope="module")
def data(sources, tmp_path_factory):
    return run(sources, tmp_path_factory.mktemp("prepared") / "data")


def files(folder):
    """{relative path: bytes} of prepared data, without the seconds."""
    content = {name: file.read_bytes() for name, file in paths.files(folder).items()}
    info = json.loads(content.pop("info.json"))
    info.pop("seconds")
    return content | {"info.json": info}


def decoded(store, column):
    tokenizer = small.tokenizer()
    return sorted(tokenizer.decode(example[column]) for example in store.read(np.arange(len(store))))


def test_a_store_holds_every_text_once(sources, data):
    texts = {json.loads(line)["text"] for f in (sources / "texts").iterdir() for line in f.read_text().splitlines()}
    store = Store(data / "tasks" / "texts")
    assert decoded(store, "tokens") == sorted(texts) and len(store) == len(texts) == 60
    info = json.loads((data / "info.json").read_text())["counts"]["texts"]
    assert info["after"] == {stream.DUPLICATES: 60} and info["read"]["rows_read"] == 120
    assert info["tokens"] == {"tokens": sum(len(e["tokens"]) for e in store.read(np.arange(60)))}


def test_read_is_used_plus_dropped_for_every_task(data):
    info = json.loads((data / "info.json").read_text())["counts"]
    for name in ("texts", "pairs", "more"):
        read, after = Counts.from_json(info[name]["read"]), info[name]["after"]
        assert read.rows_read == sum(read.rows.values())
        assert read.made == read.examples + sum(read.dropped.values())  # no long documents here
        assert info[name]["examples"] == read.examples - after[stream.DUPLICATES] == len(Store(data / "tasks" / name))


def test_held_out_examples_are_an_evaluation_set_and_not_in_training(data):
    folder = data / "evaluation" / "more" / "test"
    corpus = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    info = json.loads((data / "info.json").read_text())["counts"]
    assert len(corpus) == info["more"]["read"]["dropped"]["held out"] > 3
    training = decoded(Store(data / "tasks" / "more"), "document")
    assert not set(corpus) & set(training) and len(training) + len(corpus) == 50


RETRIEVAL = """
mixtures.rates = {"diffusion": {"texts": 1.0}}
texts/task.source = @files()
texts/files.paths = "{data_root}/texts/*.jsonl"
texts/task.kind = "text"
whole/task.source = @retrieval()
chunks/task.source = @retrieval()
chunks/retrieval.document_id = "prefix"
retrieval.path = "{data_root}/set"
whole/task.kind = "retrieval"
chunks/task.kind = "retrieval"
evaluation.sets = {"whole/test": "whole", "chunks/test": "chunks"}
"""


@pytest.fixture
def retrieval_set(sources, tmp_path):
    """Nine documents of two chunks; each has a query for its second chunk."""
    write = {
        "corpus": [{"_id": f"{d}-{c}", "text": f"text {d} {c}"} for d in range(9) for c in range(2)],
        "queries": [{"_id": f"q{d}", "text": f"which is {d}?"} for d in range(9)],
        "qrels": [{"query-id": f"q{d}", "corpus-id": f"{d}-1", "score": 1} for d in range(9)],
    }
    shutil.copytree(sources / "texts", tmp_path / "sources" / "texts")
    (tmp_path / "sources" / "set").mkdir()
    for name, rows in write.items():
        (tmp_path / "sources" / "set" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sources" / "data.gin").write_text(RETRIEVAL)
    return tmp_path / "sources"


def read_set(folder, name):
    lines = {n: (folder / "evaluation" / name / f"{n}.jsonl").read_text() for n in ("corpus", "queries", "qrels")}
    corpus, queries, qrels = ([json.loads(line) for line in text.splitlines()] for text in lines.values())
    counts = json.loads((folder / "info.json").read_text())["counts"][f"evaluation/{name}"]["read"]
    return [r["_id"] for r in corpus], [r["_id"] for r in queries], [r["corpus-id"] for r in qrels], counts


def test_a_retrieval_set_has_max_queries_of_the_smallest_digests_and_counts_its_rows(retrieval_set, tmp_path):
    folder = run(retrieval_set, tmp_path / "data", "evaluation.max_queries = 4")
    corpus, queries, relevant, counts = read_set(folder, "whole/test")
    chosen = sorted(range(9), key=lambda d: copies.digest(f"which is {d}?"))[:4]
    assert queries == [f"q{d}" for d in sorted(chosen)] and relevant == [f"{d}-1" for d in sorted(chosen)]
    assert len(corpus) == 18 and counts["rows_read"] == 18 + 9 + 9 == sum(counts["rows"].values())
    assert counts["rows"]["used"] == 18 + 4 + 4


def test_a_limit_gives_a_retrieval_set_its_first_queries_their_texts_and_a_few_others(retrieval_set, tmp_path):
    folder = run(retrieval_set, tmp_path / "data", limit=3)
    corpus, queries, relevant, _ = read_set(folder, "whole/test")
    assert queries == ["q0", "q1", "q2"] and relevant == ["0-1", "1-1", "2-1"]
    assert corpus == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    corpus, *_ = read_set(folder, "chunks/test")  # documents stay whole
    assert corpus == [f"{d}-{c}" for d in range(5) for c in range(2)]


def test_evaluation_sets_are_made_by_several_processes_and_only_once(retrieval_set, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "SMALL", 0)
    one = run(retrieval_set, tmp_path / "one")
    local, jobs = runners.run_locally, []

    def recorded(some, *rest):
        jobs.append([job.function for job in some])
        if len(jobs) == 2:
            raise KeyboardInterrupt
        local(some, *rest)

    monkeypatch.setattr(runners, "run_locally", recorded)
    with pytest.raises(KeyboardInterrupt):
        run(retrieval_set, tmp_path / "two", processes=2)
    assert [[f.__name__ for f in some] for some in jobs] == [["write_set"] * 2, ["map_shard"] * 4]
    two = run(retrieval_set, tmp_path / "two", processes=2)
    assert jobs[2] == [stream.map_shard] * 4 and files(two) == files(one)


def test_judgments_of_texts_that_the_corpus_lacks_are_bad_rows(retrieval_set, tmp_path):
    with open(retrieval_set / "set" / "qrels.jsonl", "a") as out:
        out.write('{"query-id": "q0", "corpus-id": "nope", "score": 1}\n')
    with pytest.raises(ValueError, match="1 of .* rows are bad.* of query 'q0': the text 'nope' is not in the corpus"):
        run(retrieval_set, tmp_path / "data")


def test_queries_whose_judgments_are_all_bad_are_not_in_a_set(retrieval_set, tmp_path):
    with open(retrieval_set / "set" / "queries.jsonl", "a") as out:
        out.write('{"_id": "lost", "text": "where?"}\n')
    with open(retrieval_set / "set" / "qrels.jsonl", "a") as out:
        out.write('{"query-id": "lost", "corpus-id": "nope", "score": 1}\n')
    folder = run(retrieval_set, tmp_path / "data", "task.max_bad = 0.2", "evaluation.max_queries = 100")
    _, queries, relevant, counts = read_set(folder, "whole/test")
    assert "lost" not in queries and len(queries) == len(relevant) == 9 and counts["rows"]["bad rows"] == 1


def test_an_evaluation_set_without_a_query_is_refused_in_one_sentence(retrieval_set, tmp_path):
    (retrieval_set / "set" / "qrels.jsonl").write_text('{"query-id": "q0", "corpus-id": "0-1", "score": 0}\n')
    with pytest.raises(
        ValueError, match="evaluation set (whole|chunks)/test has no query: the task '(whole|chunks)' g"
    ):
        run(retrieval_set, tmp_path / "data")
    (retrieval_set / "set" / "corpus.jsonl").write_text("{\n")
    (retrieval_set / "set" / "qrels.jsonl").write_text('{"query-id": "q0", "corpus-id": "0-1", "score": 1}\n')
    with pytest.raises(ValueError, match="task '(whole|chunks)': .*corpus.jsonl:1: not JSON"):
        run(retrieval_set, tmp_path / "new")


def test_lengths_are_cut_and_counted(data):
    store = Store(data / "tasks" / "pairs")
    assert store.lengths("query").max == 8 and store.lengths("document").max == 16
    cut = json.loads((data / "info.json").read_text())["counts"]["pairs"]["read"]["cut"]
    assert cut["query"] > 0 and cut["document"] > 10


def test_the_store_depends_neither_on_processes_nor_on_the_order_of_the_work(sources, data, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "SMALL", 0)
    assert files(run(sources, tmp_path / "two", processes=2)) == files(data)
    local = runners.run_locally

    def shuffled(jobs, *rest):
        for job in random.Random(0).sample(list(jobs), len(jobs)):
            local([job], *rest)

    monkeypatch.setattr(runners, "run_locally", shuffled)
    assert files(run(sources, tmp_path / "shuffled")) == files(data)


def test_another_seed_gives_the_same_examples_in_another_order(sources, data, tmp_path):
    other = run(sources, tmp_path / "data", seed=1)
    one, two = (Store(folder / "tasks" / "texts") for folder in (data, other))
    assert decoded(one, "tokens") == decoded(two, "tokens") and one.digest != two.digest


KILLED = """
import contextlib, os, signal, sys
tests, folder, gin_file, data_root, *attempts = sys.argv[1:]
sys.path.insert(0, tests)
import small
from embed import paths
from embed.data import store
from embed.preparation.prepare import _windows, prepare

tokenizer = small.tokenizer()

def attempt(left):
    def dying(kind):
        nonlocal left
        left -= 1
        if not left:
            print(kind, end=" ", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(kind, function):
        def changed(*arguments):
            dying(kind)
            return function(*arguments)
        return changed

    transaction = store.ts.Transaction

    @contextlib.contextmanager
    def uncommitted():
        with transaction() as begun:
            yield begun
            dying("object")

    paths.write, store._create = before("file", paths.write), before("array", store._create)
    store.ts.Transaction = uncommitted
    prepare(folder, gin_file=gin_file, data_root=data_root, tokenizer=tokenizer, processes=1)

for left in attempts:
    if not (child := os.fork()):
        try:
            attempt(int(left))
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed(attempts, folder, sources):
    """What each of several processes was about to write when it killed itself, at its n-th write: file, array, object.

    They prepare one after the other, and "" is one that completed.
    """
    arguments = [Path(__file__).parents[1], folder, sources / "data.gin", sources, *attempts]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[-1] for line in ended} <= {"0", f"{-signal.SIGKILL}"}, ended
    return [line.rpartition(" ")[0] for line in ended]


def test_a_preparation_that_is_killed_twenty_times_gives_the_same_bytes(sources, data, tmp_path):
    rng = random.Random(7)
    # Later writes at each start, since what is done is not done again.
    at = killed([rng.randint(1, 12) for _ in range(20)], tmp_path / "data", sources)
    assert Counter(at).keys() == {"file", "array", "object"} and len(at) == 20
    run(sources, tmp_path / "data")
    assert files(tmp_path / "data") == files(data)


def test_other_arguments_are_refused_by_name_when_data_are_there_or_half_there(sources, data, tmp_path):
    with pytest.raises(ValueError, match="prepared with other arguments: pairs/task.query_length was '8', now '9'"):
        run(sources, data, "pairs/task.query_length = 9")
    assert killed([12], tmp_path / "half", sources) == ["file"]
    with pytest.raises(ValueError, match="half prepared with other arguments: seed was 0, now 5"):
        run(sources, tmp_path / "half", seed=5)
    assert files(run(sources, tmp_path / "half")) == files(data)


def test_sources_that_change_between_two_starts_are_refused_by_name(sources, tmp_path):
    shutil.copytree(sources, tmp_path / "sources")
    assert killed([8], tmp_path / "data", tmp_path / "sources") == ["file"]
    with open(tmp_path / "sources" / "more.csv", "a") as out:
        out.write("one,two\n")
    with pytest.raises(ValueError, match="the sources of more have changed since this preparation began"):
        run(tmp_path / "sources", tmp_path / "data")


def test_complete_data_of_other_files_are_refused_by_task_and_are_used_without_their_files(sources, tmp_path, capfd):
    shutil.copytree(sources, tmp_path / "sources")
    folder = run(tmp_path / "sources", tmp_path / "data")
    shutil.copytree(sources, tmp_path / "other", copy_function=shutil.copy)  # other times
    with pytest.raises(ValueError, match=f"the sources of more, pairs, texts are not those that {folder} was prepared"):
        run(tmp_path / "other", folder)
    (tmp_path / "sources").rename(tmp_path / "moved")
    run(tmp_path / "moved", folder)  # the same files
    with open(tmp_path / "moved" / "more.csv", "a") as out:
        out.write("one,two\n")
    (tmp_path / "moved" / "pairs.jsonl").unlink()
    with pytest.raises(ValueError, match="the sources of more are not those"):
        run(tmp_path / "moved", folder)
    shutil.rmtree(tmp_path / "moved" / "texts")
    (tmp_path / "moved" / "more.csv").unlink()
    capfd.readouterr()
    run(tmp_path / "moved", folder)
    assert "is complete" in capfd.readouterr().err


def test_an_external_evaluation_set_that_changes_is_noticed(sources, tmp_path):
    external = tmp_path / "set"
    external.mkdir()
    rows = {"corpus": {"_id": "d", "text": "one"}, "queries": {"_id": "q", "text": "two"}}
    for name, row in (rows | {"qrels": {"query-id": "q", "corpus-id": "d", "score": 1}}).items():
        (external / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    bound = f"hygiene.evaluation_sets = ('*', '{external}')"
    folder = run(sources, tmp_path / "data", bound)
    identity = json.loads((folder / "info.json").read_text())["sources"]["identity"]
    assert set(identity) == {"texts", "pairs", "more", f"hygiene.evaluation_sets {external}"}
    run(sources, folder, bound)
    (external / "corpus.jsonl").write_text('{"_id": "d", "text": "three"}\n')
    with pytest.raises(ValueError, match=f"the sources of hygiene.evaluation_sets {external} are not those"):
        run(sources, folder, bound)
    shutil.rmtree(external)
    run(sources, folder, bound)
    with pytest.raises(ValueError, match="is neither a folder nor one of more/test"):
        run(sources, tmp_path / "new", bound)


def test_bad_rows_are_tolerated_up_to_a_rate_and_named(sources, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"query": "parse", "document": "file"}\n' * 8 + '{"query": 3}\n{"que\n')
    names = [f'pairs/files.paths = "{tmp_path}/bad.jsonl"']
    with pytest.raises(ValueError, match=r"^task 'pairs': 2 of 10 rows are bad.*bad.jsonl:9: .*; .*bad.jsonl:10: "):
        run(sources, tmp_path / "one", *names)
    folder = run(sources, tmp_path / "two", *names, "pairs/task.max_bad = 0.2")
    read = json.loads((folder / "info.json").read_text())["counts"]["pairs"]["read"]
    assert read["rows"] == {"bad rows": 2, "used": 8} and len(read["errors"]) == 2


def test_a_cluster_of_bad_rows_in_a_long_file_is_not_the_rate_of_its_task(sources, tmp_path):
    rows = ["nonsense\n"] * 15 + [json.dumps({"text": f"text {i}"}) + "\n" for i in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    bound = (f"texts/files.paths = '{tmp_path}/rows.jsonl'", "texts/task.buckets = 1")
    info = json.loads((run(sources, tmp_path / "data", *bound) / "info.json").read_text())
    assert info["counts"]["texts"]["read"]["rows"] == {"bad rows": 15, "used": 20_000}


def test_the_rate_of_bad_rows_is_that_of_the_task_not_of_a_file(sources, tmp_path):
    (tmp_path / "documents").mkdir()
    for number in range(20):
        (tmp_path / "documents" / f"{number}.md").write_bytes(
            b"\xff\xfe\xff" if number == 7 else b"parse file %d" % number
        )
    names = [f'texts/files.paths = "{tmp_path}/documents/*.md"']
    folder = run(sources, tmp_path / "data", *names, "texts/task.max_bad = 0.2")
    read = json.loads((folder / "info.json").read_text())["counts"]["texts"]["read"]
    assert read["rows"] == {"bad rows": 1, "used": 19}
    with pytest.raises(ValueError, match=r"^task 'texts': 1 of 20 rows are bad.*7.md"):
        run(sources, tmp_path / "other", *names, "texts/task.max_bad = 0.04")


def test_a_task_whose_examples_are_all_near_duplicates_is_refused(sources, tmp_path):
    text = " ".join(small.sentences(20, seed=5))
    for name, word in (("pairs", "list"), ("more", "index")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": text, "document": f"{text} {word}"}) + "\n")
    names = [f'{name}/files.paths = "{tmp_path}/{name}.jsonl"' for name in ("pairs", "more")]
    names += [f"{name}/task.document_length = 2000" for name in ("pairs", "more")]
    names += ["more/task.columns = {}", "more/task.held_out = 0.0", "evaluation.sets = {}"]
    names += ["hygiene.near_duplicates = 0.75", 'hygiene.compare_with = "all"', "mixtures.unit = 'tokens'"]
    names += ["mixtures.rates = {'both': {'pairs': 3.0, 'more': 1.0}}"]
    with pytest.raises(ValueError, match=r"^task '(pairs|more)' has no example left \(near duplicates 1\)"):
        run(sources, tmp_path / "data", *names)


def test_the_closing_table_names_what_examples_lack(sources, tmp_path, capsys):
    row = {"text": "parse file", "queries": ["open", "index"], "answers": ["file", "absent"]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    names = [f'texts/files.paths = "{tmp_path}/asked.jsonl"', "texts/task.kind = 'contextual'"]
    columns = {"text": "text", "queries": "queries", "answers": "answers"}
    run(sources, tmp_path / "data", *names, f"texts/task.columns = {columns}", "texts/task.buckets = 1")
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert " 1 queries without their answer in the text" in shown


def test_what_an_interruption_at_the_end_left_is_removed(sources, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "scratch" / "texts").mkdir(parents=True)
    (tmp_path / "data" / "plan.json").write_text("{}")
    assert files(run(sources, tmp_path / "data")) == files(data)


def test_many_short_examples_are_written_in_parts(sources, data, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(stream, "PART_VALUES", 3000)  # more than the tokens of all pairs
    bucket, parts = stream.map_bucket, {}

    def observed(work, task, *rest):
        parts[task] = stream.parts_of(work, "map_shard", task, "tokens")
        bucket(work, task, *rest)

    monkeypatch.setattr(stream, "map_bucket", observed)
    folder = run(sources, tmp_path / "data")
    assert Store(folder / "tasks" / "pairs").digest == Store(data / "tasks" / "pairs").digest
    assert [part.unit for part in parts["pairs"]].count(0) > 3


@pytest.mark.parametrize("gathered", [1, 7, 1 << 20])
def test_rows_of_lists_are_gathered_as_arrow_takes_them(gathered, monkeypatch):
    monkeypatch.setattr(stream, "GATHERED", gathered)
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 99, length).tolist() for length in rng.integers(0, 9, 30)]
    column = pa.chunked_array([lists[:11], lists[11:]], pa.large_list(pa.int32()))
    for rows in (rng.integers(0, 30, 50), np.arange(3), np.zeros(0, int)):
        values, lengths = stream._ragged(column, rows)
        expected = column.take(pa.array(rows)).to_pylist()
        assert values.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))


def test_a_task_without_examples_is_refused(sources, tmp_path):
    with pytest.raises(ValueError, match=r"task 'pairs' has no example left \(pattern \d+\)"):
        run(sources, tmp_path / "data", 'pairs/task.keep = "nothing has this"')


def test_weights_repeat_examples(sources, tmp_path):
    (tmp_path / "w.jsonl").write_text('{"text": "parse file", "n": 1}\n{"text": "open index", "n": 5}\n')
    names = [f'texts/files.paths = "{tmp_path}/w.jsonl"', 'texts/task.weight_field = "n"']
    folder = run(sources, tmp_path / "data", *names, "texts/task.weights = {1: 1, 5: 3}")
    assert decoded(Store(folder / "tasks" / "texts"), "tokens") == ["open index"] * 3 + ["parse file"]


def rates(sources, tmp_path, *bindings):
    folder = run(sources, tmp_path / "data", *bindings)
    counts = json.loads((folder / "info.json").read_text())["counts"]
    return json.loads((folder / "mixtures.json").read_text()), counts


def test_mixtures_nest_and_multiply_their_rates(sources, tmp_path):
    bound = 'mixtures.rates = {"inner": {"pairs": 3.0, "more": 1.0}, "outer": {"inner": 2.0, "pairs": 1.0}}'
    mixtures, _ = rates(sources, tmp_path, bound, "texts/task.kind = 'text'", 'vocabulary.tasks = ("texts",)')
    assert set(mixtures) == {"inner", "outer"} and mixtures["inner"] == {"pairs": 3.0, "more": 1.0}
    from embed.preparation import seqio_tasks

    # seqio divides the rate of a mixture in a mixture among its tasks in the same way.
    seqio_tasks.register(tmp_path / "data")
    seqio_tasks.seqio.MixtureRegistry.remove("nested")
    seqio_tasks.seqio.MixtureRegistry.add("nested", [("inner", 2.0), ("pairs", 1.0)])
    nested = seqio_tasks.seqio.MixtureRegistry.get("nested")
    assert mixtures["outer"] == pytest.approx({task.name: nested.get_rate(task) for task in nested.tasks}, rel=1e-12)
    assert mixtures["outer"]["more"] == pytest.approx(2 / 4) and mixtures["outer"]["pairs"] == pytest.approx(1 + 6 / 4)


def test_rates_by_size_and_in_tokens_follow_from_what_was_counted(sources, tmp_path):
    bound = ("mixtures.alpha = {'both': 0.5}", "mixtures.unit = 'tokens'")
    mixtures, counts = rates(sources, tmp_path, *bound)
    size = {name: sum(counts[name]["tokens"].values()) for name in ("pairs", "more")}
    mean = {name: size[name] / counts[name]["examples"] for name in size}
    expected = {name: rate * size[name] ** 0.5 / mean[name] for name, rate in (("pairs", 3.0), ("more", 1.0))}
    assert mixtures["both"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_rates_of_texts_are_shares_of_tokens_with_either_unit_and_only_sizes_follow_it(unit, sources, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(small.sentences(40, seed=5))}) + "\n")
    bound = (
        "mixtures.rates = {'plain': {'texts': 3.0, 'long': 1.0}, 'sized': {'texts': 1.0, 'long': 1.0},"
        " 'outer': {'sized': 1.0, 'texts': 1.0}}",
        "mixtures.alpha = {'sized': 0.5}",
        f"mixtures.unit = '{unit}'",
        "evaluation.sets = {}",
        "long/task.source = @files()",
        f"long/files.paths = '{tmp_path}/long.jsonl'",
        "long/task.kind = 'text'",
    )
    mixtures, counts = rates(sources, tmp_path, *bound)
    count = {name: counts[name] for name in ("texts", "long")}
    size = {n: c["examples"] if unit == "examples" else c["tokens"]["tokens"] for n, c in count.items()}
    assert mixtures["plain"] == {"texts": 3.0, "long": 1.0}
    assert mixtures["sized"] == pytest.approx({name: size[name] ** 0.5 for name in size}, rel=1e-12)
    share = size["long"] ** 0.5 / sum(n**0.5 for n in size.values())
    assert mixtures["outer"] == pytest.approx({"texts": 2 - share, "long": share}, rel=1e-12)


def test_registered_seqio_tasks_give_the_examples_of_the_store(data):
    import seqio

    from embed.preparation import seqio_tasks

    seqio_tasks.register(data)
    task, tokenizer = seqio.TaskRegistry.get("texts"), small.tokenizer()
    rows = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    store = Store(data / "tasks" / "texts")
    expected = store.read(np.arange(len(store)))
    assert [row["tokens"].tolist() for row in rows] == [example["tokens"].tolist() for example in expected]
    parts = [
        list(task.get_dataset(None, "train", shuffle=False, shard_info=seqio.ShardInfo(i, 2)).as_numpy_iterator())
        for i in range(2)
    ]
    assert all(parts) and sorted(row["tokens"].tolist() for part in parts for row in part) == sorted(
        row["tokens"].tolist() for row in rows
    )
    task = seqio.TaskRegistry.get("pairs")
    assert task.output_features["query"].vocabulary.encode("parse file") == tokenizer.encode(["parse file"])[0].tolist()
    assert seqio.MixtureRegistry.get("both").get_rate(task) == 3.0


OWN = """
import seqio
import tensorflow as tf

def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"query": ["parse file", "open index"], "document": ["a", "read a list"]})

vocabulary = seqio.PassThroughVocabulary(1)
seqio.TaskRegistry.add(
    "own_pairs",
    source=seqio.FunctionDataSource(source, splits=["train"]),
    preprocessors=[],
    output_features=dict.fromkeys(
        ("query", "document"), seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=0)
    ),
)
"""


def test_a_users_own_seqio_task_is_used_by_the_name_of_its_module(sources, tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    bound = (
        "mixtures.modules = ('own_tasks',)",
        "mixtures.rates = {'both': {'own_pairs': 1.0}}",
        "evaluation.sets = {}",
    )
    folder = run(sources, tmp_path / "data", *bound)
    assert decoded(Store(folder / "tasks" / "own_pairs"), "query") == ["open index", "parse file"]
    mixed = "mixtures.rates = {'both': {'own_pairs': 1.0, 'pairs': 3.0}}"
    folder = run(sources, tmp_path / "mixed", bound[0], mixed, bound[2], "pairs/task.held_out = 0.0")
    assert json.loads((folder / "mixtures.json").read_text()) == {"both": {"own_pairs": 1.0, "pairs": 3.0}}
    import seqio

    from embed.preparation import seqio_tasks

    seqio_tasks.register(folder)
    try:
        examples = seqio.MixtureRegistry.get("both").get_dataset(None, "train", num_epochs=None, seed=0).take(60)
        counts = Counter(tuple(example["query"].numpy()) for example in examples)
        store = Store(folder / "tasks" / "own_pairs")
        own = {tuple(example["query"]) for example in store.read(np.arange(len(store)))}
        # 15 of 60 are expected: fewer than 4 or more than 28 would be no mixture of 1 : 3.
        assert own < counts.keys() and 4 <= sum(counts[query] for query in own) <= 28
    finally:
        seqio.TaskRegistry.remove("own_pairs")  # that of the store; the module registers its own again
    monkeypatch.delitem(sys.modules, "own_tasks")
    with pytest.raises(ValueError, match="no task 'others' in the gin file and none registered by own_tasks"):
        run(sources, tmp_path / "other", bound[0], "mixtures.rates = {'both': {'others': 1.0}}", bound[2])


FILES = """
import seqio
import tensorflow as tf

seqio.TaskRegistry.add(
    "file_texts",
    source=seqio.TextLineDataSource({"train": %r}),
    preprocessors=[lambda lines: lines.map(lambda line: {"text": line})],
    output_features={"text": seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)},
)
"""


def test_the_shards_of_a_seqio_task_have_the_sizes_of_its_files_and_their_changes_are_noticed(
    sources, tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text("parse file\n" * 3)
    (tmp_path / "b.txt").write_text("open index\n")
    (tmp_path / "file_tasks.py").write_text(FILES % [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])
    (tmp_path / "own_tasks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    from embed.preparation import seqio_tasks

    task = seqio_tasks.adapt("file_texts", ("file_tasks",))
    assert [shard.bytes for shard in task.shards()] == [33, 11] and stream.num_buckets(task, task.shards()) == 1
    before = task.identity()
    assert [shard[:2] for shard in before["shards"]] == [[f"{tmp_path}/a.txt", 33], [f"{tmp_path}/b.txt", 11]]
    (tmp_path / "b.txt").write_text("read lists\n")
    os.utime(tmp_path / "b.txt", (1, 1))
    assert task.identity() != before
    # A function has no files.
    own = seqio_tasks.adapt("own_pairs", ("own_tasks",))
    assert [shard.bytes for shard in own.shards()] == [stream.BUCKET_BYTES] and own.identity() == {
        "shards": [["train"]]
    }
    bound = (
        "mixtures.modules = ('file_tasks',)",
        "mixtures.rates = {'all': {'file_texts': 1.0}}",
        "evaluation.sets = {}",
        "vocabulary.tasks = ('texts',)",
    )
    folder = run(sources, tmp_path / "data", *bound)
    assert json.loads((folder / "info.json").read_text())["sources"]["identity"]["file_texts"] == task.identity()


def test_a_vocabulary_is_trained_on_the_texts_of_all_tasks(sources, tmp_path):
    folder = run(sources, tmp_path / "data", tokenizer=None, vocab_size=300, split_identifiers=False)
    tokenizer = tokenizers.load(folder / "tokenizer")
    assert tokenizer.vocab_size == 300 and len(tokenizer.encode(["parse"])[0]) < 5


def test_short_texts_give_the_vocabulary_as_many_characters_as_long_ones(sources):
    task = bind(sources / "data.gin", data_root=str(sources)).tasks["pairs"]
    (shard,) = task.source.shards()
    windows = list(_windows(task, shard, Counts(), 1000, 0, random.Random(0)))
    assert 1000 <= sum(map(len, windows)) < 1000 + max(map(len, windows))


def test_texts_that_cannot_be_read_are_the_error_of_the_vocabulary_too(sources, tmp_path):
    with pytest.raises(
        ValueError, match=r"task 'texts': .*rows give no example \(bad rows .*no field 'body'; there are"
    ):
        run(sources, tmp_path / "data", "texts/task.columns = {'text': 'body'}", tokenizer=None, vocab_size=300)


def test_a_vocabulary_is_written_to_a_bucket(sources, bucket):
    folder = run(sources, f"{bucket}/trained", tokenizer=None, vocab_size=45)
    assert tokenizers.load(paths.path(folder) / "tokenizer").vocab_size == 45


def test_prepared_data_may_be_in_a_bucket(sources, data, bucket):
    folder = f"{bucket}/prepared/data"
    run(sources, folder)
    local, remote = Store(data / "tasks" / "texts"), Store(f"{folder}/tasks/texts")
    assert local.digest == remote.digest
    assert paths.path(f"{folder}/mixtures.json").read_text() == (data / "mixtures.json").read_text()
    assert not paths.path(f"{folder}/scratch").exists() and not paths.path(f"{folder}/plan.json").exists()


def test_processes_continue_an_interrupted_preparation_in_a_bucket(sources, data, bucket, monkeypatch):
    monkeypatch.setattr(runners, "SMALL", 0)
    folder = f"{bucket}/interrupted"
    assert killed([14], folder, sources) == ["file"]  # some shards are tokenized
    assert len(paths.entries(f"{folder}/scratch/texts")) > 1
    assert files(run(sources, folder, processes=2)) == files(data)
    assert not paths.entries(f"{folder}/scratch")


def test_workers_that_do_not_reach_the_folder_are_an_error(sources, tmp_path, monkeypatch):
    local = runners.run_locally

    def elsewhere(jobs, work, *rest):
        (tmp_path / "other" / "scratch").mkdir(parents=True)
        local(jobs, dataclasses.replace(work, scratch=str(tmp_path / "other" / "scratch")), *rest)

    monkeypatch.setattr(runners, "run_locally", elsewhere)
    with pytest.raises(ValueError, match=r"1 of 1 units of work left no marker, such as .*\.json: the workers may not"):
        run(sources, tmp_path / "data")


def test_a_store_whose_examples_are_not_those_that_were_tokenized_is_an_error(sources, tmp_path, monkeypatch):
    parts = stream.parts_of
    monkeypatch.setattr(stream, "parts_of", lambda *about: parts(*about)[:1])
    with pytest.raises(ValueError, match=r"task 'texts' has 30 examples in its store, but the counts say 120"):
        run(sources, tmp_path / "data")


@pytest.mark.parametrize(
    "binding, message",
    [
        (
            "task.query_lenth = 8",
            "unknown gin binding 'task.query_lenth'; the nearest valid one is 'task.query_length'",
        ),
        ("tasks.kind = 'text'", "unknown gin binding 'tasks.kind'; the nearest valid one is 'task.kind'"),
        ("pairs/files.path = 'x'", "unknown gin binding 'files.path'; the nearest valid one is 'files.paths'"),
        ("a_scope/task.query_length = 8", "unused gin binding 'a_scope/task.query_length'"),
        ("pairs/hub.id = 'x'", "unused gin binding 'pairs/hub.id'"),
        ("pairs/deeper/task.query_length = 8", "unused gin binding 'pairs/deeper/task.query_length'"),
        ("A_MACRO = 8", "unused gin binding 'A_MACRO'"),
        ("pairs/task.query_length = %A_MACRO", "task 'pairs': the macro %A_MACRO is not defined"),
        (
            "pairs/task.source = @fils()",
            "no source @fils(), only @files(), @hub(), @tfds(), @retrieval(), @conteb(), ",
        ),
        ("pairs/task.kind = 'pear'", "task 'pairs': task.kind='pear' must be one of text, distill, pair"),
        ("mixtures.rates = {'both': {'pairs': -1.0}}", "must be positive, got -1.0"),
        ("mixtures.rates = {'both': {'pears': 1.0}}", "no task 'pears': bind pears/task.source"),
        ("mixtures.rates = {'a': {'b': 1.0}, 'b': {'a': 1.0}}", "the mixture 'a' contains itself: a → b → a"),
        ("mixtures.rates = {'both': {'pairs': 1.0, 'texts': 1.0}}", "kinds: 'pairs' (pair) and 'texts' (text)"),
        ("mixtures.alpha = {'pear': 0.5}", "no mixture 'pear'"),
        ("mixtures.modules = ('no_such_module',)", "mixtures.modules: 'no_such_module' cannot be imported: No module"),
        ("mixtures.modules = 'json'", "mixtures.modules='json' must be a list, each item a text in quotes"),
        ("pairs/files.shard_bytes = 0", "task 'pairs': files.shard_bytes=0 must be a whole number of at least 1"),
        ("task.min_characters = 'x'", "task.min_characters='x' must be a whole number of at least 0"),
        ("hygiene.overlap = 'x'", "hygiene.overlap='x' must be between 0 and 1"),
        ("mixtures.unit = 'bytes'", "mixtures.unit='bytes' must be examples or tokens"),
        ("vocabulary.tasks = ('texts')", "vocabulary.tasks='texts' must be a list, each item a text in quotes"),
        ("mixtures.alpha = 0.3", "mixtures.alpha=0.3 must be a dictionary, each value a number"),
        ("pairs/task.language = ['en']", "task.language=['en'] must be a text in quotes"),
        ("pairs/files.paths = 5", "files.paths=5 must be a text in quotes or a list, each item a text in quotes"),
        ("pairs/task.columns = {'query': 0}", "task.columns={'query': 0} must be a dictionary, each value a text"),
        ("pairs/task.held_out_by = ('a', 'b')", "task.held_out_by=('a', 'b') must be a text in quotes"),
        ("pairs/task.languages = 'en'", "task.languages='en' must be a list, each item a text in quotes"),
        ("pairs/task.source = @files", "must be a source such as @files(), with ()"),
        ("pairs/task.kind = pair", "pairs/task.kind = pair: a text needs quotes"),
        ("pairs.task.kind = 'pair'", "'pairs.task' is unknown; in bindings a task's name has slashes"),
        ("mixtures.rates = {'pairs': {'pairs': 1.0}}", "'pairs' contains itself: a task needs a name of its own"),
        ("pairs/task.held_out = 0.1\nevaluation.sets = {}", "has held_out=0.2, but no evaluation set has what is held"),
        ("evaluation.sets = {'more': 'more'}", "evaluation.sets: 'more' must be SET/SPLIT"),
        ("evaluation.sets = {'../test': 'more'}", "evaluation.sets: '../test' must be SET/SPLIT"),
        ("evaluation.sets = {'own/test': 'pairs'}", "'own/test' would have the training examples of 'pairs', which"),
        ("more/deep/task.min_characters = 2\nmixtures.rates = {'both': {'more.dep': 1.0}}", "'more/deep/task.min_char"),
        ("own/pairs/task.kind = 'pair'\nmixtures.rates = {'both': {'own.pairs': 1.0}}", "bind own/pairs/task.source"),
        (
            "own/task.source = @files()\nown/pairs/task.kind = 'pair'\nmixtures.rates = {'both': {'own.pair': 1.0}}",
            "bind own/pair/task.kind, one of text, distill, pair, triplet, contextual, retrieval; the nearest",
        ),
        ("vocabulary.characters = 0", "vocabulary.characters must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_gin_bindings_are_refused_by_name(binding, message, sources):
    with pytest.raises(ValueError, match=re.escape(message)):
        bind(sources / "data.gin", [binding], data_root=str(sources))


@pytest.mark.parametrize(
    "binding, field",
    [
        ("evaluation.sets = {'own/test': 'own_pairs'}", "evaluation.sets"),
        ("vocabulary.tasks = ('own_pairs',)", "vocabulary.tasks"),
    ],
)
def test_a_task_that_only_seqio_knows_is_refused_where_texts_are_needed(binding, field, sources):
    with pytest.raises(ValueError, match=f"{field}: 'own_pairs' must be a task of the gin file, since tasks that only"):
        bind(sources / "data.gin", ["mixtures.modules = ('json',)", binding], data_root=str(sources))


def test_a_gin_file_that_needs_a_data_root_says_so(sources):
    with pytest.raises(
        ValueError, match=r"texts'?: .*\{data_root\}/texts.* needs --data_root=FOLDER|needs --data_root"
    ):
        bind(sources / "data.gin")


def test_the_name_of_a_task_fills_its_texts_and_its_scopes_are_shared(tmp_path):
    (tmp_path / "data.gin").write_text(
        """
mixtures.rates = {"diffusion": {"web.fra_Latn": 1.0, "web.rus_Cyrl": 1.0}}
web/task.source = @hub()
web/task.kind = "text"
web/task.language = "{name}"
web/hub.id = "owner/web"
web/hub.config = "{name}"
web/rus_Cyrl/hub.split = "test"
"""
    )
    tasks = settings.bind(tmp_path / "data.gin").tasks
    assert [(t.language, t.source.config, t.source.split) for t in tasks.values()] == [
        ("fra_Latn", "fra_Latn", "train"),
        ("rus_Cyrl", "rus_Cyrl", "test"),
    ]


def test_a_task_outside_all_mixtures_is_no_error(sources):
    outside = ("other/task.source = @hub()", "other/hub.id = 'x'", "other/task.kind = 'text'")
    assert "other" not in bind(sources / "data.gin", outside, data_root=str(sources)).tasks


def test_files_of_tasks_with_groups_are_not_divided(sources):
    grouped = ("pairs/task.group_by = 'query'", "pairs/files.shard_bytes = 10")
    tasks = bind(sources / "data.gin", grouped, data_root=str(sources)).tasks
    assert len(tasks["pairs"].source.shards()) == 1
    tasks = bind(sources / "data.gin", grouped[1:], data_root=str(sources)).tasks
    assert len(tasks["pairs"].source.shards()) > 1


TOKENS = """
import seqio
import tensorflow as tf

def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"tokens": [[1, 2], [3, 4]]})

feature = seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False, dtype=tf.int32)
seqio.TaskRegistry.add(
    "foreign_tokens",
    source=seqio.FunctionDataSource(source, splits=["train"]),
    preprocessors=[],
    output_features={"tokens": feature},
)
"""


def test_tokens_of_another_vocabulary_are_refused(sources, tmp_path, monkeypatch):
    (tmp_path / "token_tasks.py").write_text(TOKENS)
    monkeypatch.syspath_prepend(tmp_path)
    rates = "mixtures.rates = {'diffusion': {'foreign_tokens': 1.0}}"
    with pytest.raises(ValueError, match="task 'foreign_tokens': its feature 'tokens' has the vocabulary .* must be"):
        run(sources, tmp_path / "data", "mixtures.modules = ('token_tasks',)", rates, "evaluation.sets = {}")


def test_a_limit_holds_for_seqio_tasks_and_a_registered_store_is_no_source(sources, tmp_path, monkeypatch):
    from embed.preparation import seqio_tasks

    (tmp_path / "limited_tasks.py").write_text(OWN.replace("own_pairs", "limited_pairs"))
    monkeypatch.syspath_prepend(tmp_path)
    rates = "mixtures.rates = {'both': {'limited_pairs': 1.0}}"
    bound = ("mixtures.modules = ('limited_tasks',)", rates, "evaluation.sets = {}")
    folder = run(sources, tmp_path / "data", *bound, limit=1)
    assert decoded(Store(folder / "tasks" / "limited_pairs"), "query") == ["parse file"]
    seqio_tasks.register(folder)
    with pytest.raises(
        ValueError, match=r"the seqio task 'limited_pairs' is that of prepared data \(.*/tasks/limited_p"
    ):
        run(sources, tmp_path / "again", *bound)


def test_rows_of_a_source_without_whole_shards_are_not_grouped(sources):
    grouped = ("own/task.source = @python_docs()", "own/python_docs.records = 'functions'", "own/task.kind = 'text'")
    mixture = ("mixtures.rates = {'texts': {'own': 1.0}}", "own/task.group_by = 'module'")
    with pytest.raises(
        ValueError, match="task 'own': the rows of PythonDocs cannot be grouped: its shards divide them"
    ):
        bind(sources / "data.gin", [*grouped, *mixture], data_root=str(sources))


def test_training_on_the_queries_of_an_evaluation_set_is_refused(sources):
    retrieval = ("both/task.source = @retrieval()", "both/retrieval.path = '/beir'", "both/a/task.kind = 'pair'")
    named = ("both/b/task.kind = 'retrieval'", "mixtures.rates = {'m': {'both.a': 1.0}}")
    sets = "evaluation.sets = {'both/test': 'both.b'}"
    with pytest.raises(ValueError, match=r"'both\.a' trains on the queries of the evaluation set 'both/test': bind"):
        bind(sources / "data.gin", [*retrieval, *named, sets], data_root=str(sources))
    grouped = ["both/a/task.kind = 'contextual'", "both/a/task.group_sizes = (2,)", "both/a/retrieval.titles = False"]
    with pytest.raises(ValueError, match=r"'both\.a' trains on the queries of the evaluation set 'both/test': bind"):
        bind(sources / "data.gin", [*retrieval, *named, sets, *grouped], data_root=str(sources))
    made = bind(sources / "data.gin", [*retrieval, *named, sets, "both/a/retrieval.split = 'train'"], data_root="/")
    assert made.tasks["both.a"].source.split == "train"


@pytest.mark.parametrize(
    "bindings, message",
    [
        (["pairs/task.kind = 'retrieval'"], "the mixture 'both': the task '.*' is an evaluation set|several kinds"),
        (["mixtures.rates = {'m': {'pairs': 1.0}}", "pairs/task.kind = 'retrieval'"], "'pairs' is an evaluation set"),
        (["more/task.kind = 'triplet'", "mixtures.rates = {'m': {'pairs': 1.0}}"], "'more' is of kind triplet"),
        (
            ["more/task.kind = 'retrieval'", "more/task.columns = {}", "mixtures.rates = {'m': {'pairs': 1.0}}"],
            r"task 'more': the kind 'retrieval' needs a source @retrieval\(\) or @conteb\(\)",
        ),
        (["pairs/task.held_out = 0.1"], "the task 'pairs' has held_out=0.1, but no evaluation set has what is held"),
    ],
)
def test_tasks_that_cannot_be_used_where_they_are_named_are_refused(bindings, message, sources):
    with pytest.raises(ValueError, match=message):
        bind(sources / "data.gin", bindings, data_root=str(sources))


def test_data_of_a_function_that_has_changed_are_refused(sources, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rows.py").write_text("def rows(row):\n    yield row\n")
    run(sources, tmp_path / "data", "pairs/task.map = 'own_rows:rows'")
    (tmp_path / "own_rows.py").write_text("def rows(row):\n    yield {**row}\n")
    with pytest.raises(ValueError, match="was prepared with other arguments: modules.own_rows was"):
        run(sources, tmp_path / "data", "pairs/task.map = 'own_rows:rows'")


def test_a_source_that_hygiene_names_gets_the_data_root(sources):
    made = bind(
        sources / "data.gin",
        [
            "pairs/hygiene.evaluation_sets = (@tests/other/retrieval(),)",
            "tests/retrieval.path = '{data_root}/{name}'",
        ],
        data_root=str(sources),
    )
    assert made.hygiene["pairs"].evaluation_sets[0].path == f"{sources}/other"


def test_a_missing_gin_file_is_named():
    with pytest.raises(FileNotFoundError, match="no gin file configs/data/none.gin"):
        bind("configs/data/none.gin")


def test_a_runner_that_cannot_be_used_is_refused_before_any_work(sources, tmp_path):
    with pytest.raises(ValueError, match="--runner=DirectRunner would download another runner .* --runner=FnApiRunner"):
        run(sources, tmp_path / "data", runner="DirectRunner")
    assert not (tmp_path / "data").exists()


def test_a_limit_of_rows_makes_large_sources_small_work_without_processes(monkeypatch):
    ran = []
    jobs = [runners.Job(lambda work, name, progress: ran.append(name), (name,), 1 << 30, "") for name in "ab"]
    monkeypatch.setattr(runners, "ProcessPoolExecutor", None)
    runners.run_locally(jobs, SimpleNamespace(limit=60), 2, lambda *_: None)
    assert ran == ["a", "b"]
    with pytest.raises(TypeError, match="NoneType"):  # processes
        runners.run_locally(jobs, SimpleNamespace(limit=0), 2, lambda *_: None)


def test_a_worker_that_is_killed_is_an_error_not_a_wait(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "SMALL", 0)
    monkeypatch.setattr(runners, "_run", _die)
    with pytest.raises(ValueError, match="a worker process was killed"):
        run(sources, tmp_path / "data", processes=2)


def _die(job):
    os.kill(os.getpid(), signal.SIGKILL)
