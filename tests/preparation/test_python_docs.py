"""The source `python_docs` and its gin file, on a small tree of generated packages."""

import dataclasses
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from embed import tokenizers
from embed.data.store import Store
from embed.preparation import copies
from embed.preparation.prepare import prepare
from embed.preparation.python_sources import Packages, Reading

GIN = "configs/data/python_docs.gin"
PACKAGES = ("alpha", "beta", "gamma", "delta")
VERBS = "read write open close merge split count find sort filter".split()


SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo zu".split()


def nonsense(seed, count=12):
    """Random words, so that the vocabulary has enough pieces to learn."""
    rng = np.random.default_rng(list(seed.encode()))
    return " ".join("".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(count))


def function(package, verb, indent=""):
    source = f'''
    def {verb}_{package}(path, limit):
        """{verb.capitalize()}s the {package} records of a file in order.

        Stops early when the limit is met by {package}.

        Args:
          path: where the {package} records are.
          limit: how many to {verb} at most.
        """
        # {nonsense(package + verb)}
        records = open(path).readlines()[: limit * {len(package) + len(verb)}]
        return [record.{verb}("{package}") for record in records]
    '''
    return textwrap.indent(textwrap.dedent(source), indent)


def module(package, part):
    methods = "".join(function(f"{package}{part}", verb, "    ") for verb in VERBS)
    summary = f'"""Everything about {package} {part}, in one place."""'
    header = f'class {package.capitalize()}Store{part}:\n    """Keeps {package} values together."""'
    return f"{summary}\n\n\n{header}\n{methods}\n"


COPIED = function("held", "copy")  # in a training package and in a held-out package


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        (root / package / "tests").mkdir(parents=True)
        for part in range(3):
            (root / package / f"part{part}.py").write_text(module(package, part))
        (root / package / "tests" / "test_x.py").write_text(function(package, "never"))
    (root / "alpha" / "copied.py").write_text(COPIED)
    (root / "delta" / "original.py").write_text(COPIED)
    (root / "alpha" / "broken.py").write_text("def broken(:\n")
    return Packages(train=("alpha", "beta", "absent"), development=("gamma",), test=("delta",), path=(str(root),))


def bindings(packages):
    return [f"python_docs.{field.name} = {getattr(packages, field.name)!r}" for field in dataclasses.fields(packages)]


@pytest.fixture(scope="session")
def data(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(folder, gin_file=GIN, gin_bindings=bindings(packages), vocab_size=200)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_task_of_the_mixtures_is_a_store_with_tokens(data):
    mixtures = json.loads((data / "mixtures.json").read_text())
    assert set(mixtures) == {"diffusion", "pairs", "summaries", "contextual"}
    assert mixtures["summaries"] == {"python_docs.summaries": 1.0}
    assert mixtures["pairs"]["python_docs.classes"] == 0.5 and mixtures["pairs"]["python_docs.summaries"] == 4.0
    tokenizer = tokenizers.load(data / "tokenizer")
    for name in {task for rates in mixtures.values() for task in rates}:
        store = Store(data / "tasks" / name)
        assert len(store) > 0 and store.info["vocabulary"] == tokenizer.digest
        for example in store.read(range(len(store))):
            assert all(values.max(initial=0) < tokenizer.vocab_size for values in example.values())


def test_training_has_no_text_of_a_held_out_function(data):
    tokenizer = tokenizers.load(data / "tokenizer")
    text = Store(data / "tasks" / "python_docs.text")
    training = copies.normalize(tokenizer.decode(text.window(0, text.num_values())[0]))
    corpus = [
        row["text"]
        for split in ("development", "test")
        for row in rows(data / f"evaluation/functions/{split}/corpus.jsonl")
    ]
    assert len(corpus) > 50
    for code in corpus:
        seen = tokenizer.decode(tokenizer.encode([code])[0])
        assert copies.normalize(seen) not in training
    # The check can match: it finds a training function.
    known = tokenizer.decode(tokenizer.encode(["records = open(path).readlines()[: limit * 10]"])[0])
    assert copies.normalize(known) in training


def test_dropped_items_are_counted_by_reason(data):
    report = json.loads((data / "info.json").read_text())["sources"]["reports"]["python_docs.text"]
    assert report["packages"] == {p: f"{p}==0" for p in PACKAGES} and report["packages not installed"] == ["absent"]
    assert report["dropped"]["train: modules with held-out text"] == 1
    assert report["dropped"]["train: held-out functions"] == 1
    assert [path.rpartition("/")[2] for path in report["unreadable files"]] == ["broken.py"]


def test_function_queries_are_summaries_that_their_documents_do_not_contain(data):
    folder = data / "evaluation" / "functions" / "test"
    corpus = {row["_id"]: row["text"] for row in rows(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in rows(folder / "queries.jsonl")}
    qrels = rows(folder / "qrels.jsonl")
    assert len(corpus) == len(queries) == len(qrels) == 31  # 3 modules of 10 functions, and the copied function
    for row in qrels:
        query, code = queries[row["query-id"]], corpus[row["corpus-id"]]
        verb = query.split()[0].lower().removesuffix("s")
        assert f"def {verb}" in code and query not in code and '"""' not in code


def test_contextual_queries_name_the_owner_but_their_chunks_do_not(data):
    folder = data / "evaluation" / "contextual" / "test"
    corpus = {row["_id"]: row for row in rows(folder / "corpus.jsonl")}
    first = {row["document"]: row["text"] for row in corpus.values() if row["chunk"] == 0}
    queries = {row["_id"]: row["text"] for row in rows(folder / "queries.jsonl")}
    for row in rows(folder / "qrels.jsonl"):
        query, chunk = queries[row["query-id"]], corpus[row["corpus-id"]]
        assert query.startswith("delta ") and "Store" not in chunk["text"]
        assert first[chunk["document"]].startswith("delta.")
    chunks = [row["chunk"] for row in corpus.values()]
    assert all(b in (0, a + 1) for a, b in zip(chunks, chunks[1:]))  # rows of a document are adjacent and in order


def test_contextual_examples_are_whole_documents_with_their_queries(data):
    store = Store(data / "tasks" / "python_docs.modules")
    for example in store.read(range(len(store))):
        assert example["chunk_lengths"].sum() == len(example["document"])
        assert example["query_lengths"].sum() == len(example["queries"])
        assert len(example["query_lengths"]) == len(example["positives"]) > 0
        assert example["positives"].max() < len(example["chunk_lengths"]) <= 16
        assert example["chunk_lengths"].max() <= 64


def test_preparing_again_does_nothing_and_other_arguments_are_refused_by_name(data, packages):
    before = (data / "info.json").stat().st_mtime_ns
    prepare(data, gin_file=GIN, vocab_size=200, gin_bindings=bindings(packages))
    assert (data / "info.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="vocab_size was 200, now 201"):
        prepare(data, gin_file=GIN, vocab_size=201, gin_bindings=bindings(packages))


def test_preparing_another_directory_gives_the_same_tokens_in_the_same_order(data, packages, tmp_path):
    prepare(tmp_path / "data", gin_file=GIN, vocab_size=200, gin_bindings=bindings(packages))
    for name in ("python_docs.summaries", "python_docs.modules"):
        one, two = Store(data / "tasks" / name), Store(tmp_path / "data" / "tasks" / name)
        for a, b in zip(one.read(range(len(one))), two.read(range(len(two)))):
            assert all(np.array_equal(a[column], b[column]) for column in a)


def test_a_split_without_packages_is_an_error(packages, tmp_path):
    incomplete = Packages(train=packages.train, development=("absent",), test=packages.test, path=packages.path)
    with pytest.raises(ValueError, match="split 'development' of python_docs is empty"):
        prepare(tmp_path / "data", gin_file=GIN, vocab_size=200, gin_bindings=bindings(incomplete))


def test_a_vocabulary_size_that_the_texts_do_not_allow_is_refused(packages, tmp_path):
    with pytest.raises(ValueError, match=r"^config.data.vocab_size=30 must be at least \d+: "):
        prepare(tmp_path / "data", gin_file=GIN, vocab_size=30, gin_bindings=bindings(packages))
    prepare(tmp_path / "data", gin_file=GIN, vocab_size=200, gin_bindings=bindings(packages))  # the folder is usable


def test_no_process_still_reads_sources_after_an_error(packages):
    with pytest.raises(ImportError), Reading(packages, processes=2) as reading:
        raise ImportError("as of tensorflow")
    assert all(worker.returncode is not None for worker in reading._workers)
    assert not Path(reading._folder.name).exists()
