"""`prepare` and `encode` on Apache Beam give what local processes give.

`make test-beam` runs this in an environment of its own.
"""

import gzip
import json
import random
import string
from pathlib import Path

import pytest
import small

from embed import cli
from embed.preparation import stream
from embed.preparation.prepare import prepare

LETTERS = string.ascii_lowercase + " "

GIN = """
mixtures.rates = {"diffusion": {"texts": 1.0}, "both": {"pairs": 1.0}}
texts/task.source = @files()
texts/files.paths = "{data_root}/?.jsonl"
texts/task.kind = "text"
texts/task.buckets = 2
pairs/task.source = @files()
pairs/files.paths = "{data_root}/pairs-*.jsonl"
pairs/task.kind = "pair"
pairs/task.buckets = 2
pairs/task.held_out = 0.2
pairs/hygiene.near_duplicates = 0.75
evaluation.sets = {"pairs/test": "pairs"}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in small.sentences(30, seed=part)]
        (root / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    texts = ["".join(random.Random(i).choices(LETTERS, k=200)) for i in range(40)]
    for part in range(2):  # the second file has nearly the pairs of the first
        rows = [{"query": f"{text[:90]}{'.' * part}", "document": text + " more" * part} for text in texts]
        (root / f"pairs-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data.gin").write_text(GIN)
    return root


def files(folder):
    content = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}
    content["info.json"] = json.loads(content["info.json"]) | {"seconds": None}
    return content


@pytest.mark.parametrize(
    "options",
    [("--direct_running_mode=in_memory",), ("--direct_running_mode=multi_processing", "--direct_num_workers=2")],
)
def test_beam_writes_the_bytes_that_local_processes_write(options, sources, tmp_path):
    common = dict(gin_file=sources / "data.gin", data_root=str(sources), tokenizer=small.tokenizer())
    prepare(tmp_path / "local", **common, processes=1)
    prepare(tmp_path / "beam", **common, runner="FnApiRunner", runner_options=options)
    beam, local = files(tmp_path / "beam"), files(tmp_path / "local")
    assert beam == local
    pairs = beam["info.json"]["counts"]["pairs"]
    assert pairs["after"][stream.NEAR] > 20 and pairs["examples"] + pairs["after"][stream.NEAR] > 50
    assert beam["info.json"]["counts"]["evaluation/pairs/test"]["queries"] > 5


def test_bad_rows_end_a_beam_pipeline_in_one_sentence(sources, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text("{\n")
    small.tokenizer().save(tmp_path / "tokenizer")
    config = tmp_path / "config.py"
    config.write_text(
        f"""
from configs import base

def get_config(arg=""):
    config = base.get_config()
    config.data.gin_file = "{sources}/data.gin"
    config.data.tokenizer = "{tmp_path}/tokenizer"
    config.stages.diffusion = base.stage("diffusion", curriculum=((1, "diffusion"),))
    return config
"""
    )
    arguments = ["prepare", f"--config={config}", f"--workdir={tmp_path}/run", f"--data_root={sources}"]
    bindings = f'--config.data.gin_bindings=(\'texts/files.paths=("{sources}/0.jsonl", "{tmp_path}/bad.jsonl")\',)'
    assert cli.main([*arguments, bindings, "--runner=FnApiRunner", "--runner_options", "direct_running_mode=in_memory"])
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("embed: error: task 'texts': 1 of 31 rows are bad") and "bad.jsonl:1" in last


@pytest.mark.parametrize("form", ["c.jsonl", "c.jsonl.gz"])
def test_encode_on_beam_writes_the_shards_of_one_process_and_only_those_that_are_missing(form, tmp_path, capfd):
    content = "".join(json.dumps({"_id": f"{i}", "text": text}) + "\n" for i, text in enumerate(small.sentences(20)))
    (tmp_path / form).write_bytes(gzip.compress(content.encode()) if form.endswith("gz") else content.encode())
    command = [
        "encode",
        f"--model={small.write_model(tmp_path / 'model')}",
        f"--input={tmp_path}/c.*",
        "--shard_rows=6",
    ]
    beam = ["--runner=FnApiRunner", "--runner_options", "direct_running_mode=in_memory"]
    assert cli.main([*command, f"--output={tmp_path}/local"]) == 0
    assert cli.main([*command, f"--output={tmp_path}/beam", *beam]) == 0
    local, written = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("local", "beam"))
    assert len(local) == 5 and written == local
    (tmp_path / "beam" / f"{form}.00002.parquet").unlink()
    capfd.readouterr()
    assert cli.main([*command, f"--output={tmp_path}/beam", *beam]) == 0
    assert "1 shards written" in (last := capfd.readouterr().out.splitlines()[-1]) and "3 were there: 20 rows" in last
    assert {f.name: f.read_bytes() for f in (tmp_path / "beam").iterdir()} == local


def test_a_row_without_text_ends_encode_on_beam_in_one_sentence_and_the_other_shards_are_written(tmp_path, capfd):
    rows = [{"_id": f"{i}", "text": "" if i == 7 else "parse the file"} for i in range(9)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["encode", f"--model={small.write_model(tmp_path / 'model')}", f"--input={tmp_path}/c.jsonl"]
    beam = ["--runner=FnApiRunner", "--runner_options", "direct_running_mode=in_memory"]
    assert cli.main([*command, "--shard_rows=3", f"--output={tmp_path}/out", *beam]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"embed: error: {tmp_path}/c.jsonl, line 8 (_id '7') has no text; 1 of the 3 rows")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "c.jsonl.00000.parquet",
        "c.jsonl.00001.parquet",
        "encode.json",
    ]
