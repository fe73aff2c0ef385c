"""Corpora larger than memory: read part by part, encoded to shards, resumed, shared by processes (docs/search.md)."""

import datetime
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small

from embed import cli, paths
from embed.inference import corpus, shards

ROOT = Path(__file__).parent.parent.parent
ROWS = [
    {"_id": f"r{i}", "chunks": [text, "the file", "", "open"], "title": "Trees"}
    if i % 4 == 3
    else {"_id": f"r{i}", "text": text, "n": i, "tags": ["ä", None]}
    for i, text in enumerate(small.sentences(23))
]
SIZE = 5  # rows of a shard


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(file, rows):
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def write_parquet(file, rows):
    names = {name: None for row in rows for name in row}
    pq.write_table(pa.Table.from_pylist([names | row for row in rows]), file, row_group_size=7)


FORMS = {"jsonl": write_jsonl, "jsonl.gz": write_gzip, "parquet": write_parquet}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and the same rows in every form."""
    folder = tmp_path_factory.mktemp("inputs")
    small.write_model(folder / "model")
    for form, write in FORMS.items():
        write(folder / f"c.{form}", ROWS)
    return folder


def encode(inputs, output, *more, files=("c.jsonl",), size=SIZE):
    given = [f"--input={inputs / file}" for file in files]
    return cli.main(["encode", f"--model={inputs}/model", *given, f"--output={output}", f"--shard_rows={size}", *more])


def refused(capsys, *arguments, **how):
    capsys.readouterr()
    assert encode(*arguments, **how) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embed:")]
    return line


def read(folder):
    info, tables = shards.read_shards(folder)
    return info, pa.concat_tables(tables)


def vectors(table):
    return np.array(table["vector"].to_pylist())


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    """The shards of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("written") / "out"
    assert encode(inputs, folder) == 0
    return folder


def content(folder):
    return {name: file.read_bytes() for name, file in paths.files(folder).items()}


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, precision", zip(FORMS, ["float32", "int8", "ubinary"]))
def test_shards_hold_what_encode_gives_for_the_whole_corpus(form, precision, inputs, tmp_path):
    assert encode(inputs, tmp_path / "out", f"--precision={precision}", files=[f"c.{form}"]) == 0
    assert sorted(paths.files(tmp_path / "out")) == [f"c.{form}.{k:05d}.parquet" for k in range(5)] + ["encode.json"]
    info, table = read(tmp_path / "out")
    one = [f"--model={inputs}/model", f"--corpus={inputs}/c.jsonl", f"--precision={precision}"]
    assert cli.main(["encode", *one, f"--output={tmp_path}/one.parquet"]) == 0
    whole = pq.read_table(tmp_path / "one.parquet")
    assert table.schema == whole.schema and table.drop_columns("vector") == whole.drop_columns("vector")
    dtype = {"float32": "float", "int8": "int8", "ubinary": "uint8"}[precision]
    width = 4 if precision == "ubinary" else 32
    assert str(table.schema.field("vector").type) == f"fixed_size_list<element: {dtype}>[{width}]"
    np.testing.assert_allclose(vectors(table), vectors(whole), atol=1e-6)
    assert info["precision"] == precision and info["inputs"] == [f"c.{form}"] and info["shard_rows"] == SIZE


def test_a_row_of_a_shard_says_what_it_is_of(written):
    rows = {row["_id"]: row for row in read(written)[1].to_pylist()}
    assert list(rows)[:5] == ["r0", "r1", "r2", "r3#0", "r3#1"] and len(rows) == 18 + 5 * 4
    text, chunk, empty = rows["r1"], rows["r3#0"], rows["r3#2"]
    assert text["document"] == "r1" and text["text"] == ROWS[1]["text"] and (text["start"], text["end"]) == (None, None)
    assert json.loads(text["fields"]) == {"n": 1, "tags": ["ä", None]} and chunk["fields"] == "{}"
    assert chunk["document"] == "r3" and chunk["text"] == f"Trees {ROWS[3]['chunks'][0]}"
    assert empty["text"] == "" and not any(empty["vector"])


def test_a_chunker_divides_texts_and_its_offsets_give_their_chunks(inputs, tmp_path):
    encoder = small.encoder()
    with_title = [{"_id": "t", "title": "Trees", "text": ROWS[0]["text"]}, *ROWS]
    write_jsonl(tmp_path / "c.jsonl", with_title)
    (tmp_path / "model").symlink_to(inputs / "model")
    assert encode(tmp_path, tmp_path / "out", "--chunker=tokens", "--chunk_tokens=6", "--overlap=2") == 0
    info, table = read(tmp_path / "out")
    assert info["chunker"] == {"chunker": "tokens", "chunk_tokens": 6, "overlap": 2, "language": None}
    texts = {row.id: row.chunks[0] for row in corpus.read_rows(tmp_path / "c.jsonl") if not row.is_document}
    assert texts["t"].startswith("Trees ")
    divided = [row for row in table.to_pylist() if row["document"] in texts]
    assert [row for row in divided if row["start"] is None] == [] and len(divided) > 2 * len(texts)
    assert all(texts[row["document"]][row["start"] : row["end"]] == row["text"] for row in divided)
    chunks = encoder.encode_long(texts["r1"], corpus_chunker(encoder))
    mine = [row for row in divided if row["document"] == "r1"]
    assert [row["_id"] for row in mine] == [f"r1#{k}" for k in range(len(chunks.texts))]
    np.testing.assert_allclose([row["vector"] for row in mine], chunks.vectors, atol=1e-6)
    documents = [row for row in table.to_pylist() if row["document"] == "r3"]
    assert [row["text"] for row in documents][1:] == ROWS[3]["chunks"][1:] and documents[0]["start"] is None


def corpus_chunker(encoder):
    from embed.inference import chunkers

    return chunkers.tokens(encoder.tokenizer, 6, 2)


def test_read_shards_refuses_a_folder_that_lacks_a_shard_or_has_a_damaged_one(written, tmp_path):
    def changed(change):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(written, tmp_path / "out")
        change(tmp_path / "out")
        return tmp_path / "out"

    for number in (0, 2, 4):
        shard = f"c.jsonl.{number:05d}.parquet"
        with pytest.raises(ValueError, match=f"is incomplete: {shard} is missing"):
            read(changed(lambda folder, shard=shard: (folder / shard).unlink()))
    with pytest.raises(ValueError, match="c.jsonl.00001.parquet is damaged, not a shard"):
        read(changed(lambda folder: (folder / "c.jsonl.00001.parquet").write_bytes(b"PAR1")))
    with pytest.raises(ValueError, match="holds d.jsonl.00000.parquet, which encode.json does not know"):
        read(changed(lambda folder: (folder / "c.jsonl.00000.parquet").rename(folder / "d.jsonl.00000.parquet")))
    with pytest.raises(ValueError, match="holds notes.txt, which is not a shard"):
        read(changed(lambda folder: (folder / "notes.txt").write_text("mine")))
    with pytest.raises(FileNotFoundError, match="expected a folder with encode.json"):
        read(tmp_path)


# --- runs that continue -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 1)])
def test_an_interrupted_run_continues_with_the_bytes_of_an_uninterrupted_one(
    error, code, inputs, written, tmp_path, monkeypatch, capsys
):
    write, left = paths.write, [3]  # encode.json and two shards

    def fails(file, content):
        if not left[0]:
            raise error
        left[0] -= 1
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(paths, "write", fails)
        assert encode(inputs, tmp_path / "out") == code
    assert len(content(tmp_path / "out")) == 3
    capsys.readouterr()
    assert encode(inputs, tmp_path / "out") == 0
    assert f"3 shards written to {tmp_path}/out, 2 were there: 23 rows, 38 vectors\n" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(written)


def test_a_run_writes_again_what_is_missing_damaged_or_of_rows_that_have_changed(inputs, tmp_path, capsys):
    (tmp_path / "model").symlink_to(inputs / "model")

    def run(rows, sentence):
        write_jsonl(tmp_path / "c.jsonl", rows)
        before = content(tmp_path / "out") if (tmp_path / "out").exists() else {}
        capsys.readouterr()
        assert encode(tmp_path, tmp_path / "out") == 0
        assert sentence in capsys.readouterr().out
        after = content(tmp_path / "out")
        return sorted(int(name[-13:-8]) for name in after if name != "encode.json" and after[name] != before.get(name))

    rows = ROWS[:20]
    assert run(rows, "4 shards written") == [0, 1, 2, 3]
    assert run(rows, "0 shards written") == []
    rows[7] = rows[7] | {"title": "Other"}
    assert run(rows, "1 shards written again, because their rows had changed") == [1]
    (tmp_path / "out" / "c.jsonl.00002.parquet").write_bytes(b"PAR1 and no more")
    assert run(rows, "1 shards written") == [2]
    # Part 3 has the same rows, but is no longer the last: read_shards must know the last shard of a file.
    assert run(ROWS[:7] + rows[7:8] + ROWS[8:22], "2 shards written") == [3, 4]
    assert run(rows[:10], "3 shards removed, because their files are shorter now") == [1]
    assert sorted(content(tmp_path / "out")) == ["c.jsonl.00000.parquet", "c.jsonl.00001.parquet", "encode.json"]
    assert read(tmp_path / "out")[1]["document"].unique().to_pylist() == [f"r{i}" for i in range(10)]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--precision=int8"], 'was made with precision "float32", not "int8": choose another folder'),
        (["--truncate_dim=8"], "was made with truncate_dim null, not 8"),
        (["--max_length=99"], "was made with max_length null, not 99"),
        (["--chunker=tokens"], 'was made with chunker null, not {"chunker": "tokens", "chunk_tokens": 256'),
        (["--shard_rows=4"], "was made with shard_rows 5, not 4"),
        (["--rope_theta=1e5"], "was made with the model at"),
        (["--overwrite"], "--overwrite is not for --input"),
    ],
)
def test_a_rerun_with_another_value_is_refused_and_changes_nothing(more, sentence, inputs, written, capsys):
    before = content(written)
    assert sentence in refused(capsys, inputs, written, *more)
    assert content(written) == before


def test_a_rerun_with_another_model_or_without_a_file_is_refused_and_one_with_more_files_goes_on(
    inputs, tmp_path, capsys
):
    for name, rows in (("a.jsonl", ROWS[:6]), ("b.jsonl", ROWS[6:9])):
        write_jsonl(tmp_path / name, rows)
    small.write_model(tmp_path / "model")
    assert encode(tmp_path, tmp_path / "out", files=["a.jsonl"]) == 0
    assert encode(tmp_path, tmp_path / "out", files=["b.jsonl", "a.jsonl"]) == 0
    assert "1 shards written" in capsys.readouterr().out.splitlines()[-1]
    assert read(tmp_path / "out")[1]["document"].unique().to_pylist() == [f"r{i}" for i in range(9)]
    message = refused(capsys, tmp_path, tmp_path / "out", files=["b.jsonl"])
    assert "has vectors of a.jsonl, which is not an input (1 of 2 files are not)" in message
    shutil.rmtree(tmp_path / "model")
    small.write_model(tmp_path / "model", small.random_params(small.config(), 1))
    message = refused(capsys, tmp_path, tmp_path / "out", files=["?.jsonl"])
    assert f"was made with the model at {tmp_path}/model (digest " in message and "not with the one at" in message


def test_a_folder_with_other_files_is_refused(inputs, written, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes").write_text("theirs")
    assert "exists and was not written by this command" in refused(capsys, inputs, tmp_path / "theirs")
    shutil.copytree(written, tmp_path / "ours")
    (tmp_path / "ours" / "notes").write_text("mine")
    assert "holds notes, which is not a shard" in refused(capsys, inputs, tmp_path / "ours")
    assert "is inside" in refused(capsys, inputs, written / "in") and "a folder of vectors" in refused(
        capsys, inputs, written / "in"
    )


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, processes", [(1, 3), (2, 4), (3, 2), (4, 2), (5, 5)])
def test_each_part_belongs_to_one_share(files, processes, tmp_path):
    found, opened = Counter(), Counter()
    for f in range(files):
        write_jsonl(tmp_path / f"{f}.jsonl", ROWS[: 3 * f + 7])
    given = corpus.find([str(tmp_path / "*.jsonl")])
    for k in range(processes):
        mine = [(name, part.start.number) for name, part in
                shards.missing(tmp_path / "out", given, 3, Counter(), (k, processes))]  # fmt: skip
        found.update(mine)
        opened.update({name for name, _ in mine})
    every = {(f"{f}.jsonl", number) for f in range(files) for number in range(-(-(3 * f + 7) // 3))}
    assert found == dict.fromkeys(every, 1)
    if files % processes == 0:
        assert set(opened.values()) == {1}


def test_processes_that_know_nothing_of_each_other_share_the_work(inputs, written, tmp_path, capsys):
    for k, mine in {1: 2, 0: 3}.items():
        assert encode(inputs, tmp_path / "out", "--num_processes=2", f"--process_id={k}") == 0
        assert f"process {k} of 2: {mine} shards written" in capsys.readouterr().out
        with paths.lock(f"{tmp_path}/out.{k}-of-2"):
            message = refused(capsys, inputs, tmp_path / "out", "--num_processes=2", f"--process_id={k}")
            assert "is in use by another process" in message
    assert content(tmp_path / "out") == content(written)
    (tmp_path / "out" / "c.jsonl.00003.parquet").unlink()  # that of a process that died
    assert encode(inputs, tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(written)


def test_processes_that_joined_share_the_work_and_the_first_prints_the_sum(inputs, written, tmp_path):
    program = small.write_program(tmp_path / "embed", folder=tmp_path)
    command = ["encode", f"--model={inputs}/model", f"--input={inputs}/c.jsonl", "--output=out", f"--shard_rows={SIZE}"]
    done = subprocess.run(
        ["bash", ROOT / "launch" / "local.sh", "2", "--", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "EMBED": str(program), "LOGS": str(tmp_path / "logs")},
    )
    logs = [(tmp_path / "logs" / f"process-{k}.log").read_text() for k in (0, 1)]
    assert done.returncode == 0, logs
    assert "5 shards written to out, 0 were there: 23 rows, 38 vectors" in logs[0] and "written" not in logs[1]
    assert content(tmp_path / "out") == content(written)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_files_of_one_name_in_several_folders_have_shards_of_their_own(inputs, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_jsonl(tmp_path / "a" / "c.jsonl", ROWS[:6])
    write_parquet(tmp_path / "b" / "c.jsonl", ROWS[6:9])  # its content says what it is
    (tmp_path / "a" / "._c.jsonl").write_text("of a desktop")
    (tmp_path / "model").symlink_to(inputs / "model")
    assert encode(tmp_path, tmp_path / "out", files=["*/c.jsonl"]) == 0
    assert sorted(content(tmp_path / "out")) == [
        "a/c.jsonl.00000.parquet",
        "a/c.jsonl.00001.parquet",
        "b/c.jsonl.00000.parquet",
        "encode.json",
    ]
    assert read(tmp_path / "out")[1]["document"].unique().to_pylist() == [f"r{i}" for i in range(9)]
    message = refused(capsys, tmp_path, tmp_path / "other", files=["a/c.jsonl", "b/c.jsonl"])
    assert f"{tmp_path}/a/c.jsonl and {tmp_path}/b/c.jsonl would both be c.jsonl" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("*.json", "no file matches {0}/*.json: expected JSON lines or Parquet"),
        ("none.jsonl", "no file matches {0}/none.jsonl"),
        ("model", "perhaps {0}/model/*: it is a folder"),
        ("**/c.jsonl", "has **: write * for each folder"),
        ("model/model.safetensors", ", line 1: not UTF-8 at byte "),
    ],
)
def test_an_input_that_is_no_corpus_is_refused(file, sentence, inputs, tmp_path, capsys):
    assert sentence.format(inputs) in refused(capsys, inputs, tmp_path / "out", files=[file])


def test_an_output_that_contains_an_input_is_refused(inputs, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "c.jsonl", ROWS)
    (tmp_path / "model").symlink_to(inputs / "model")
    assert encode(tmp_path, tmp_path / "in" / "out", files=["in/*.jsonl"]) == 0
    message = refused(capsys, tmp_path, tmp_path / "in" / "out", files=["in/*/*.parquet"])
    assert f"which is inside --output={tmp_path}/in/out" in message


def test_a_row_without_text_is_an_error_or_left_out_and_counted(inputs, tmp_path, capsys):
    rows = [*ROWS[:6], {"_id": "e", "text": " "}, {"_id": "f", "chunks": ["", " "]}, *ROWS[6:8]]
    write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "model").symlink_to(inputs / "model")
    files = ["c.jsonl", "none.jsonl"]
    message = refused(capsys, tmp_path, tmp_path / "out", files=files)
    assert f"{tmp_path}/c.jsonl, line 7 (_id 'e') has no text; 2 of the 5 rows of part 1 of" in message
    assert encode(tmp_path, tmp_path / "out", "--skip_empty", files=files) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 shards written") and "1 were there: 10 rows" in last
    assert last.endswith("2 rows without text left out")
    assert read(tmp_path / "out")[1]["document"].unique().to_pylist() == [f"r{i}" for i in range(8)]
    assert pq.read_table(tmp_path / "out" / "none.jsonl.00000.parquet").num_rows == 0


def test_texts_that_are_too_long_are_an_error_or_cut_and_counted(inputs, tmp_path, capsys):
    message = refused(capsys, inputs, tmp_path / "out", "--max_length=30")
    assert "tokens, max_length (--max_length) is 30" in message
    assert encode(inputs, tmp_path / "out", "--max_length=30", "--truncate") == 0
    long = sum(len(ids) > 30 for ids in small.tokenizer().encode([row["text"] for row in ROWS if "text" in row]))
    (cut,) = [int(part.split()[0]) for part in capsys.readouterr().out.split(", ") if "cut to the longest text" in part]
    assert cut >= long > 3


def test_the_parts_before_a_damage_are_encoded(inputs, tmp_path, capsys):
    (tmp_path / "model").symlink_to(inputs / "model")
    lines = [json.dumps(row) for row in ROWS[:12]] + ["{oops"]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert "c.jsonl, line 13: invalid JSON" in refused(capsys, tmp_path, tmp_path / "out")
    assert {"c.jsonl.00000.parquet", "c.jsonl.00001.parquet"} == content(tmp_path / "out").keys() - {"encode.json"}
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:12], json.dumps(ROWS[0])]))
    assert "line 13 (_id 'r0')" not in refused(capsys, inputs, tmp_path / "out", "--precision=int8")
    assert encode(tmp_path, tmp_path / "out") == 0  # ids are compared within a part


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--text=a", "--shard_rows=3"], "--shard_rows is for --input"),
        (["--text=a", "--skip_empty"], "--skip_empty is for --input"),
        (["--text=a", "--runner=FnApiRunner"], "--runner is for --input"),
        (["--input=c", "--runner_options=a"], "--runner_options needs --runner"),
        (["--input=c", "--shard_rows=0"], "--shard_rows=0 must be at least 1"),
        (["--input=c", "--runner=FnApiRunner", "--num_processes=2"], "--runner has its own workers"),
        (["--input=c", "--num_processes=2"], "--num_processes=2 needs --coordinator=HOST:PORT and --process_id from 0"),
        (["--input=http://h/c"], "http://h/c is not a path"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(more, sentence, inputs, tmp_path, capsys):
    assert cli.main(["encode", f"--model={inputs}/model", f"--output={tmp_path}/out", *more]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_pyarrow_the_error_says_what_to_install(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "--input needs pyarrow: pip install pyarrow, or '.[search]'" in refused(capsys, inputs, tmp_path / "out")


# --- parts of a file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_the_parts_of_a_file_are_its_rows_and_can_be_read_alone(form, size, inputs):
    file = inputs / f"c.{form}"
    parts = list(corpus.read_parts(file, size))
    assert [row.id for part in parts for row in part.rows()] == [row["_id"] for row in ROWS]
    assert [row.fields for part in parts for row in part.rows()] == ROWS
    assert [len(part.lines) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in parts:
        assert next(corpus.read_parts(file, size, start=part.start)) == part
    wanted = list(corpus.read_parts(file, size, lambda number: number % 2 == 1))
    assert [part.start for part in wanted] == [part.start for part in parts]
    assert [part.lines for part in wanted] == [part.lines if k % 2 else None for k, part in enumerate(parts)]


def test_a_file_is_read_no_further_than_the_part_that_is_asked_for(inputs, tmp_path):
    content = gzip.compress(
        b"".join(b'{"_id": "%d", "text": "%s"}\n' % (i, os.urandom(99).hex().encode()) for i in range(5000))
    )
    (tmp_path / "c").write_bytes(content[:-9])
    parts = corpus.read_parts(tmp_path / "c", 1000)
    assert [next(parts).start.number for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="c is damaged or truncated: its gzip data end after line"):
        list(parts)


def test_values_of_parquet_become_json(tmp_path):
    day = datetime.datetime(2024, 5, 6, 7, 8)
    pq.write_table(pa.table({"_id": ["a"], "text": ["x"], "day": [day], "none": [None]}), tmp_path / "c")
    (part,) = corpus.read_parts(tmp_path / "c", 9)
    assert part.rows()[0].fields == {"_id": "a", "text": "x", "day": "2024-05-06T07:08:00"}
    for value in (b"x", float("nan")):
        pq.write_table(pa.table({"_id": ["a", "b"], "text": ["x", "y"], "more": [None, value]}), tmp_path / "c")
        with pytest.raises(ValueError, match="c, row 2 has a value that JSON does not have"):
            list(corpus.read_parts(tmp_path / "c", 9))
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-20])
    with pytest.raises(ValueError, match="c is damaged, not Parquet"):
        list(corpus.read_parts(tmp_path / "c", 9))
