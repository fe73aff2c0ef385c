"""Datasets of the hub, by the hub's own library against a server on loopback."""

import dataclasses
import gzip
import hashlib
import http.server
import json
import pickle
import re
import threading
import urllib.parse

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import close_session

from embed.preparation.sources import Files, Hub, Parallel, Retrieval, SourceError, UnreachableError
from embed.preparation.sources.hub import choose, read_card

CARD = """---
license: odc-by
configs:
- config_name: rus_Cyrl
  data_files:
  - split: train
    path: data/rus_Cyrl/train/*
  - split: test
    path: data/rus_Cyrl/test/a.jsonl
- config_name: deu_Latn
  data_files: data/deu_Latn/**
---
# Text
"""


def parquet(rows) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), out := pa.BufferOutputStream(), row_group_size=2)
    return out.getvalue().to_pybytes()


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


REPOSITORIES = {
    ("org/text", "main"): {
        "README.md": CARD.encode(),
        "data/rus_Cyrl/train/0.parquet": parquet([{"text": f"r{i}"} for i in range(5)]),
        "data/rus_Cyrl/train/1.parquet": parquet([{"text": "r5"}]),
        "data/rus_Cyrl/test/a.jsonl": jsonl([{"text": "test"}]),
        "data/deu_Latn/x/a.jsonl.gz": gzip.compress(jsonl([{"text": "ü"}])),
    },
    ("org/text", "old"): {"train.jsonl": jsonl([{"text": "old"}])},
    ("org/plain", "main"): {
        "data/train-00000-of-00001.parquet": parquet([{"n": 1}]),
        "data/test-00000-of-00001.parquet": parquet([{"n": 2}]),
        "data/extra-00000-of-00001.parquet": parquet([{"n": 3}]),
    },
    ("org/script", "main"): {"script.py": b"raise SystemExit", "README.md": b"# none"},
    ("org/script", "refs/convert/parquet"): {
        "en/train/0000.parquet": parquet([{"n": 1}]),
        "en/partial-dev/0000.parquet": parquet([{"n": 2}]),
    },
    ("org/onlyscript", "main"): {"onlyscript.py": b""},
    ("org/set", "main"): {
        "corpus/corpus-00000-of-00001.parquet": parquet([{"_id": "d", "title": "T", "text": "D"}]),
        "queries/queries-00000-of-00001.parquet": parquet([{"_id": "q", "text": "Q"}]),
        "data/test-00000-of-00001.parquet": parquet([{"query-id": "q", "corpus-id": "d", "score": 1.0}]),
    },
}


BRANCHES: dict[tuple[str, str], str] = {}  # {(repository, branch): its new name, after a push}


class Server(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that reading needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: bytes = b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), f"{value}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        is_api = parts[0] == "api"
        name, verb, revision, *path = ["/".join(parts[1 + is_api : 3 + is_api]), *parts[3 + is_api :]]
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if not any(name == other for other, _ in REPOSITORIES):
            return self.answer(401, X_Error_Code="RepoNotFound")
        commits = {commit(*key): files for key, files in REPOSITORIES.items() if key[0] == name}
        sha = revision if revision in commits else commit(name, BRANCHES.get((name, revision), revision))
        if sha not in commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files, path = commits[sha], "/".join(path)
        if verb == "revision":
            content = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files], "tags": []}
            return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        listed = [{"type": "file", "path": f, "size": len(c), "oid": commit(f, "")} for f, c in files.items()]
        if verb == "tree":
            found = [entry for entry in listed if not path or entry["path"].startswith(f"{path}/")]
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if verb == "paths-info":
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            found = [entry for entry in listed if entry["path"] in wanted]
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.command == "GET" and self.server.failures:
            self.server.failures -= 1
            return self.answer(503)
        content, headers = files[path], {"ETag": f'"{commit(path, "")}"', "X_Repo_Commit": sha}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            span = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            return self.answer(206, content[start:stop], Content_Range=span, **headers)
        return self.answer(200, content, **headers)

    do_HEAD = do_POST = do_GET


def commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests, server.failures = [], 0  # the next GETs of files that fail
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as the hub, with an empty cache. Returns its list of requests."""
    constants, url = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.requests.clear()
    close_session()
    yield server.requests
    close_session()


def rows(source):
    return [row for shard in source.shards() for row in source.read(shard)]


def column(source, name="text"):
    return [row.value[name] for row in rows(source)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_config_and_split_of_the_card_are_read_at_one_commit(streaming, hub):
    source = Hub("org/text", config="rus_Cyrl", streaming=streaming, shard_bytes=60)
    assert column(source) == [f"r{i}" for i in range(6)]
    sha = commit("org/text", "main")
    assert rows(source)[0].location == "hf://datasets/org/text/data/rus_Cyrl/train/0.parquet:row 1"
    assert rows(source)[0].value["_file"] == "data/rus_Cyrl/train/0.parquet"
    assert len(source.shards()) == (4 if streaming else 2)  # what is not at hand is not split
    assert source.identity()["commit"] == sha and source.shards()[0].path.startswith(f"hf://datasets/org/text@{sha}/")
    described = source.describe()
    assert described["license"] == "odc-by" and described["columns"] == ["text", "_file"] and described["files"] == 2
    assert described["rows"] == 6
    hub.clear()
    copy = pickle.loads(pickle.dumps(source))
    assert [row.value["text"] for row in copy.read(source.shards()[-1])] == ["r5"]
    assert not any("/tree/" in request or "/revision/" in request for request in hub)
    assert column(Hub("org/text", config="rus_Cyrl", split="test", streaming=streaming)) == ["test"]
    assert column(Hub("org/text", config="deu_Latn", streaming=streaming)) == ["ü"]
    assert sorted(column(Hub("org/text", config="rus_Cyrl", split="", streaming=streaming)))[-1] == "test"


def test_only_the_chosen_files_are_downloaded(hub):
    rows(Hub("org/text", config="deu_Latn"))
    downloaded = {request.rsplit("/", 1)[-1] for request in hub if "/resolve/" in request}
    assert downloaded == {"README.md", "a.jsonl.gz"}


def test_a_few_rows_and_a_description_are_had_without_a_download(hub):
    source = Hub("org/text", config="rus_Cyrl")
    assert [row.value["text"] for row in source.sample(2)] == ["r0", "r1"] and source.describe()["rows"] == 6
    downloaded = list(huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos)[0]
    assert [file.file_name for revision in downloaded.revisions for file in revision.files] == ["README.md"]


def test_a_revision_and_files_can_be_named(hub):
    assert column(Hub("org/text", revision="old")) == ["old"]
    assert column(Hub("org/text", revision=commit("org/text", "old"))) == ["old"]
    assert column(Hub("org/text", files=["data/*/test/*", "**/1.parquet"])) == ["test", "r5"]


def test_without_a_card_splits_are_told_by_paths(hub):
    assert [column(Hub("org/plain", split=split), "n") for split in ("train", "test", "extra")] == [[1], [2], [3]]


def test_a_loading_script_is_not_run_and_the_converted_files_are_read(hub):
    assert column(Hub("org/script", config="en"), "n") == [1]
    assert column(Hub("org/script", split="partial-dev"), "n") == [2]
    assert column(Hub("org/script", config="en", revision="refs/convert/parquet"), "n") == [1]
    with pytest.raises(SourceError, match="org/script has no split 'dev': there are partial-dev, train"):
        Hub("org/script", split="dev").shards()  # which would be only the beginning of it
    with pytest.raises(SourceError, match="org/script has no config 'fr': there are en"):
        Hub("org/script", config="fr").shards()
    with pytest.raises(SourceError, match="org/onlyscript has only a loading script, which is never run"):
        Hub("org/onlyscript").shards()


@pytest.mark.parametrize(
    "source, message",
    [
        (Hub("org/none"), "^org/none is not on the hub, or it is private and HF_TOKEN does not open it$"),
        (Hub("org/gated"), "^org/gated is gated: accept its terms at http://.*/datasets/org/gated and set HF_TOKEN$"),
        (Hub("org/text", revision="v9"), "^org/text has no revision 'v9'$"),
        (Hub("org/text"), "^org/text has several configs: choose one of deu_Latn, rus_Cyrl$"),
        (Hub("org/text", config="rus"), "^org/text has no config 'rus': there are deu_Latn, rus_Cyrl$"),
        (
            Hub("org/text", config="rus_Cyrl", split="dev"),
            "^config 'rus_Cyrl' of org/text has no split 'dev': there are test, train$",
        ),
        (Hub("org/plain", config="en"), "^org/plain has no list of configs: choose its files by a glob"),
        (Hub("org/plain", files=["*.csv"]), r"^no file of org/plain matches \*.csv: there are data/extra-"),
        (Hub("a/b/c"), "^hub.id is 'a/b/c': expected the id of a dataset, owner/name$"),
    ],
)
def test_every_failure_is_one_sentence(source, message, hub):
    with pytest.raises(SourceError, match=message):
        source.shards()


def test_offline_the_cache_is_read_and_what_is_not_there_is_named(hub, monkeypatch):
    source = Hub("org/text", config="rus_Cyrl")
    first, second = source.shards()
    assert len(list(source.read(first))) == 5
    hub.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    offline = Hub("org/text", config="rus_Cyrl")
    assert offline.shards() == [first, second] and offline.identity() == source.identity()
    assert [row.value["text"] for row in offline.read(first)] == [f"r{i}" for i in range(5)]
    with pytest.raises(SourceError, match=r"1\.parquet: the file is not in the local cache, and HF_HUB_OFFLINE is set"):
        list(offline.read(second))
    with pytest.raises(SourceError, match="^org/plain is not in the local cache, and HF_HUB_OFFLINE is set$"):
        Hub("org/plain").shards()
    assert not hub


def test_without_a_network_the_cache_is_read(hub, monkeypatch):
    source = Hub("org/plain")
    expected = rows(source)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    close_session()
    assert rows(Hub("org/plain")) == expected
    with pytest.raises(SourceError, match="^org/text is not in the local cache, and http://127.0.0.1:9/.* cannot be"):
        Hub("org/text").shards()


def test_errors_of_the_connection_and_of_the_server_are_told_apart(hub, server, monkeypatch):
    monkeypatch.setattr("embed.preparation.sources.hub.BACKOFF", 0.0)  # no waiting between attempts
    source = Hub("org/text", config="rus_Cyrl")
    first, second = source.shards()
    monkeypatch.setattr(server, "failures", 3)
    assert len(list(source.read(first))) == 5 and server.failures == 0
    monkeypatch.setattr(server, "failures", 9)
    with pytest.raises(UnreachableError, match="1.parquet: org/text cannot be read from .*503"):
        list(source.read(second))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    close_session()
    with pytest.raises(
        UnreachableError, match="^org/plain is not in the local cache, and http://127.0.0.1:9/.* cannot"
    ):
        Hub("org/plain").shards()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for wrong in (Hub("org/plain"), Hub("org/text", config="rus")):
        with pytest.raises(SourceError) as raised:
            wrong.shards()
        assert raised.type is SourceError


def test_a_retrieval_set_of_the_hub_is_joined(hub, tmp_path):
    source = Retrieval(id="org/set", split="test")
    source.build(tmp_path / "scratch")
    (row,) = rows(source)
    assert (row.value["query"], row.value["title"], row.value["document"]) == ("Q", "T", "T D")
    assert source.identity()["corpus"]["commit"] == commit("org/set", "main")
    pinned = source.with_parts()
    assert {part.revision for part in pinned.parts().values()} == {commit("org/set", "main")}
    assert [list(rows) for rows in pinned.evaluation_set()] == [list(rows) for rows in source.evaluation_set()]


def test_a_pinned_source_keeps_its_commit_when_the_dataset_changes(hub, tmp_path, monkeypatch):
    for source in (
        Hub("org/moved", revision="branch"),
        Hub("org/moved", revision="branch", files=["*.jsonl"], streaming=True),
        Parallel(source=Hub("org/moved", revision="branch"), languages=["text"]),
    ):
        monkeypatch.setitem(BRANCHES, ("org/moved", "branch"), "one")
        monkeypatch.setitem(REPOSITORIES, ("org/moved", "one"), {"first.jsonl": jsonl([{"text": "first"}])})
        identity, shards = json.loads(json.dumps(source.identity())), source.shards()
        monkeypatch.setitem(REPOSITORIES, ("org/moved", "two"), {"second.jsonl": jsonl([{"text": "second"}])})
        monkeypatch.setitem(BRANCHES, ("org/moved", "branch"), "two")
        again = dataclasses.replace(source)
        assert again.identity() != identity and column(again) == ["second"]
        pinned = again.pinned(identity)
        assert pinned.identity() == identity and pinned.shards() == shards and column(pinned) == ["first"]


def test_a_pinned_source_keeps_the_commits_of_the_card_and_of_the_converted_files(hub, monkeypatch):
    identity = Hub("org/script", config="en").identity()
    assert identity["commit"] == identity["commits"]["refs/convert/parquet"]
    monkeypatch.setitem(BRANCHES, ("org/script", "main"), "new")
    monkeypatch.setitem(BRANCHES, ("org/script", "refs/convert/parquet"), "new")
    monkeypatch.setitem(REPOSITORIES, ("org/script", "new"), {"train.jsonl": jsonl([{"n": 9}])})
    pinned = Hub("org/script", config="en").pinned(identity)
    assert pinned.identity() == identity and column(pinned, "n") == [1]
    with pytest.raises(SourceError, match="org/script has no list of configs"):
        Hub("org/script", config="en").identity()


def test_a_pinned_retrieval_set_is_joined_once(hub, tmp_path, monkeypatch):
    source = Retrieval(id="org/set", split="test")
    source.build(tmp_path)
    monkeypatch.setitem(BRANCHES, ("org/set", "main"), "new")
    files = REPOSITORIES["org/set", "main"]
    monkeypatch.setitem(REPOSITORIES, ("org/set", "new"), {"README.md": b"# new", **files})
    other, pinned = Retrieval(id="org/set", split="test"), Retrieval(id="org/set", split="test")
    assert other.identity() != source.identity()
    pinned = pinned.pinned(source.identity())
    pinned.build(tmp_path)
    assert pinned.identity() == source.identity() and pinned.shards() == source.shards()
    assert len(list(tmp_path.glob("retrieval-*"))) == 1


def test_splits_of_a_config_are_those_of_its_folder():
    listed = "- config_name: a\n  data_dir: ./x\n- config_name: b\n  default: true\n  data_files: [y/1.csv, y/2.csv]"
    configs = read_card(f"---\nconfigs:\n{listed}\n---\n")["configs"]
    names = ["x/train.jsonl", "x/dev.jsonl", "xy/train.jsonl", "y/1.csv", "y/2.csv", "y/3.csv", "x/README.md"]
    assert choose("s", names, configs, "a", "train") == ["x/train.jsonl"]
    assert choose("s", names, configs, "a", "validation") == ["x/dev.jsonl"]
    assert choose("s", names, configs, "", "train") == ["y/1.csv", "y/2.csv"]
    assert choose("s", ["1.parquet", "LICENSE"], [], "", "train") == ["1.parquet"]
    assert read_card("no card") == read_card("---\n[\n---\n") == {}


def test_the_hub_reads_files_as_files_does(hub, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(REPOSITORIES["org/text", "main"]["data/rus_Cyrl/test/a.jsonl"])
    assert column(Files(f"{tmp_path}/a.jsonl")) == column(Hub("org/text", config="rus_Cyrl", split="test"))
