"""Eight devices and two processes compute the same as one device.

With rows sharded over devices, each device runs the program for one device on fewer rows or as many. float32 may differ
in the last bit, because a matrix product of another height sums in another order. int8 and bits are rounded afterwards,
so a number close to a boundary could differ by one level; none here does.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
import small

from embed import cli, distributed
from embed.cli.common import run

ROOT = Path(__file__).parent.parent.parent
TEXTS = small.sentences(150, seed=5, longest=90)
VERBS = {
    "encode": ["--corpus={folder}/corpus.jsonl", "--precision=int8", "--output=encode"],
    "index": ["--corpus={folder}/corpus.jsonl", "--precision=binary", "--output=index"],
    "evaluate": ["--data={folder}", "--output=evaluate"],
    "mine": ["--data={folder}", "--num_negatives=3", "--margin=-2", "--output=mine"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an evaluation set, and the output of each verb on the one device of this process: FOLDER/one/VERB."""
    folder = tmp_path_factory.mktemp("devices")
    small.write_model(folder / "model")
    rows = {
        "corpus": [{"_id": f"c{i}", "text": text, "document": i // 3, "chunk": i % 3} for i, text in enumerate(TEXTS)],
        "queries": [{"_id": f"q{i}", "text": text} for i, text in enumerate(small.sentences(40, seed=6, longest=9))],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"c{7 * i % 150}", "score": 1} for i in range(40)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert jax.device_count() == 1
    (folder / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "one")
        for verb in VERBS:
            assert cli.main(arguments(verb, folder)) == 0
    return folder


def arguments(verb, folder):
    return [verb, f"--model={folder}/model", *(a.format(folder=folder) for a in VERBS[verb])]


def assert_same_files(one, other):
    assert sorted(path.name for path in other.iterdir()) == sorted(VERBS)
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        if file.name == "evaluation.json":  # with the id of the job
            continue
        assert (other / file).read_bytes() == (one / file).read_bytes(), file


EIGHT = textwrap.dedent(
    """
    import dataclasses, os, sys
    folder, tests, *commands = sys.argv[1:]
    sys.path.insert(0, tests)
    import jax, numpy as np, small
    from embed import cli, inference, mining
    from embed.inference import ranking
    from embed.models import sharding

    devices = jax.devices()
    assert len(devices) == 8
    texts, rng = small.sentences(200, seed=1, longest=90) + ["a list of a list " * 40], np.random.default_rng(0)
    documents = [texts[i : i + 3] for i in range(0, 60, 3)]

    def encoder(mesh=None, params=small.params(), config=small.config()):
        return inference.Encoder(params, config, small.tokenizer(), mesh=mesh)

    def assert_close(a, b):  # within 1e-6 of a vector's length
        assert (np.abs(a - b).max(-1) <= 1e-6 * np.linalg.norm(b, axis=-1)).all()

    one_device = sharding.make_mesh(devices=devices[:1])
    one, eight = encoder(one_device), encoder()
    assert eight.mesh.size == 8 and all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(eight.params))
    for precision in inference.PRECISIONS:
        for a, b in (
            (one.encode(texts, precision=precision), eight.encode(texts, precision=precision)),
            (one.encode(texts[:3], precision=precision), eight.encode(texts[:3], precision=precision)),
            *zip(*(e.encode_documents(documents, precision=precision) for e in (one, eight))),
        ):
            if precision == "float32":
                assert_close(b, a)
            else:
                np.testing.assert_array_equal(b, a, strict=True)
    late = dataclasses.replace(small.config(), token_dimensions=16)
    projected = small.params() | {"projection": np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)}
    token_vectors = [encoder(mesh, projected, late).encode_tokens_multi(texts[:40]) for mesh in (one_device, None)]
    for a, b in zip(*token_vectors, strict=True):
        assert np.abs(a - b).max() < 1e-5
    assert_close(eight.encode(texts, batch_tokens=1), one.encode(texts))

    # Parameters that are sharded as in training keep their shardings, in the dtype of the computation.
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.tree.map(jax.device_put, small.params(), sharding.parameter_shardings(mesh, small.params()))
    sharded = encoder(mesh, params)
    for dtype in ("float32", "bfloat16"):
        held = encoder(mesh, params, dataclasses.replace(small.config(), dtype=dtype)).params
        for x, y in zip(jax.tree.leaves(held), jax.tree.leaves(params), strict=True):
            assert x.dtype == dtype and x.sharding == y.sharding
    assert not sharded.params["layers"]["gate"].sharding.is_fully_replicated
    assert_close(sharded.encode(texts), one.encode(texts))
    assert_close(encoder(one_device, params).encode(texts[:9]), one.encode(texts[:9]))  # from one mesh to another

    # Blocks of queries, the last one short; some documents are equal.
    queries, vectors = rng.normal(size=(33, 16)).astype(np.float32), rng.normal(size=(90, 16)).astype(np.float32)
    vectors[40:50] = vectors[:10]
    ranking.BLOCK_QUERIES = 4
    ranking.BLOCK_VECTORS = 45
    mining.QUERIES, mining.DOCUMENTS, mining.TILE = 4, 17, 3

    def mine(mesh):
        return mining.mine(queries, vectors, np.arange(33), num_negatives=5, rank_window=(2, 30), margin=0.1, mesh=mesh)

    one_mined = mine(one_device)
    for mined in (mine(None), mine(sharding.make_mesh(devices=devices[:5]))):
        for x, y in zip(mined, one_mined):
            np.testing.assert_equal(x, y)
    assert (one_mined.negatives >= 0).any()
    stored = {p: (inference.quantize(queries, p), inference.quantize(vectors, p))
              for p in ("float32", "int8", "ubinary")}
    with_eight = {p: inference.search(q, v, 50, p) for p, (q, v) in stored.items()}
    jax.local_devices = lambda: devices[:1]
    for precision, (q, v) in stored.items():
        for x, y in zip(inference.search(q, v, 50, precision), with_eight[precision]):
            np.testing.assert_array_equal(y, x, strict=True)

    os.chdir(folder)
    for command in commands:
        assert cli.main(command.split()) == 0
    """
)


VERBS_ALONE = """
import os, sys
from embed import cli
os.chdir(sys.argv[1])
sys.exit(sum(cli.main(command.split()) for command in sys.argv[2:]))
"""


def test_eight_devices_give_the_results_of_one(folder):
    """With LLVM's optimizations: without them, rounding of the sums of a row depends on the size of the batch."""
    commands = [" ".join(arguments(verb, folder)) for verb in VERBS]
    programs = {"one-alone": (1, [VERBS_ALONE]), "eight": (8, [EIGHT])}
    for name, (devices, program) in programs.items():
        (folder / name).mkdir()
        given = [folder / name] if devices == 1 else [folder / name, ROOT / "tests"]
        done = subprocess.run(
            [sys.executable, "-c", *program, *given, *commands],
            capture_output=True,
            text=True,
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_files(folder / "one-alone", folder / "eight")


def test_two_processes_write_the_files_of_one_and_the_second_writes_and_prints_nothing(folder, tmp_path):
    for k in (0, 1):
        (tmp_path / f"process-{k}").mkdir()
    first, *others = (arguments(verb, folder) for verb in VERBS)
    embed = small.write_program(tmp_path / "embed", *others, folder=tmp_path / "process-{process}")
    done = subprocess.run(
        ["bash", ROOT / "launch" / "local.sh", "2", "--", *first],
        capture_output=True,
        text=True,
        env={**os.environ, "EMBED": str(embed), "LOGS": str(tmp_path / "logs")},
    )
    logs = [(tmp_path / "logs" / f"process-{k}.log").read_text() for k in (0, 1)]
    assert done.returncode == 0, logs
    for words in ("float32", *(f"written to {verb}" for verb in VERBS if verb != "evaluate")):
        assert words in logs[0] and words not in logs[1]
    assert "encode:" not in logs[1], logs
    assert_same_files(folder / "one", tmp_path / "process-0")
    assert not list((tmp_path / "process-1").iterdir())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--coordinator=h:1"], "--coordinator and --process_id need --num_processes"),
        (["--distributed", "--num_processes=2"], "leave out --num_processes"),
        (["--num_processes=2", "--process_id=1"], "--num_processes=2 needs --coordinator=HOST:PORT"),
        (["--num_processes=2", "--coordinator=h:1", "--process_id=2"], "--process_id from 0 to 1, not h:1 and 2"),
        (["--distributed"], "--distributed needs a TPU, GKE or Slurm job"),
    ],
)
def test_an_error_about_joining_processes_is_one_sentence(folder, tmp_path, monkeypatch, capsys, given, sentence):
    monkeypatch.setattr(jax.distributed, "initialize", _no_job)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments("encode", folder), *given]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def _no_job(*_, **__):
    raise ValueError("coordinator_address should be defined.")


def test_an_error_caused_by_a_lost_process_has_the_exit_code_for_a_retry(monkeypatch):
    with (
        pytest.raises(ValueError, match="Gloo"),
        distributed.translate_peer_errors(),
    ):  # a single process has no peers to lose
        raise ValueError("Gloo all-reduce failed")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        distributed.PeerLostError, match="process 0 of 2 cannot continue: Gloo all-reduce failed. "
    ) as lost:
        with distributed.translate_peer_errors():
            raise ValueError("Gloo all-reduce failed\nmore")
    assert lost.value.exit_code == 75


def test_no_process_ends_before_all_have_finished(monkeypatch):
    met = []
    monkeypatch.setattr(distributed, "barrier", lambda: met.append("barrier"))
    assert run(lambda argv: met.append("written") or 0) == 0 and met == ["written", "barrier"]
