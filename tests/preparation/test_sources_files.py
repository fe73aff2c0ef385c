"""Files of every format and compression, split into shards, on a disk and in buckets."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import socket
import tarfile

import aiohttp
import botocore.exceptions
import gcsfs
import gin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

import embed.preparation.settings  # noqa: F401 (it registers the names of sources)
from embed import paths
from embed.preparation.sources import (
    Conteb,
    Files,
    Hub,
    Parallel,
    Retrieval,
    Shard,
    SourceError,
    Tfds,
    UnreachableError,
    formats,
)
from embed.preparation.sources.base import Source, is_unreachable

COMPRESS = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
ROWS = [{"text": "naïve 日本\u2028語", "n": "1"}, {"text": "", "n": "2"}, {"text": 'a "b"\tc', "n": "3"}]


def encode(rows, format: str) -> bytes:
    """Rows as the content of a file of a format."""
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if format == "json":
        return json.dumps(rows, indent=1).encode()
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), out := io.BytesIO(), row_group_size=2)
        return out.getvalue()
    if format == "tsv":
        return "".join("\t".join(row) + "\n" for row in [rows[0], *(r.values() for r in rows)]).encode()
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read(source: Source):
    """All rows of a source, as (name of the file and line, value or error)."""
    rows = [row for shard in source.shards() for row in source.read(shard)]
    return [(row.location.rsplit("/", 1)[-1], row.value if row.error is None else row.error) for row in rows]


def values(source: Source, column: str | None = None):
    found = [value for _, value in read(source)]
    return [value[column] if column else {k: v for k, v in value.items() if k != "_file"} for value in found]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_and_compression_gives_the_rows_that_were_written(format, compression, tmp_path):
    rows = [{**row, "text": row["text"].replace("\t", " ")} for row in ROWS] if format == "tsv" else ROWS
    path = tmp_path / f"data.{format}{'.' + compression if compression else ''}"
    path.write_bytes(COMPRESS[compression](encode(rows, format)))
    source = Files(str(path))
    assert values(source) == rows and values(source, "_file") == [path.name] * 3
    numbers = {"json": "row 1", "parquet": "row 1", "jsonl": "1"}
    assert read(source)[0][0] == f"{path.name}:{numbers.get(format, '2')}"
    described = source.describe()
    assert described["columns"] == ["text", "n", "_file"] and described["bytes"] == path.stat().st_size
    assert described["rows"] == (3 if path.name == "data.parquet" else None)


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_is_one_row_per_line_and_a_document_is_one_row(compression, tmp_path):
    content = "\ufeffeins\r\n\r\nzwei\x0b\x85\ndrei".encode()
    for name in ("a.txt", "b.md"):
        suffix = f".{compression}" if compression else ""
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[compression](content))
    assert values(Files(f"{tmp_path}/a.*"), "text") == ["eins", "", "zwei\x0b\x85", "drei"]
    assert values(Files(f"{tmp_path}/b.*", text_column="page")) == [{"page": "eins\r\n\r\nzwei\x0b\x85\ndrei"}]
    assert values(Files(f"{tmp_path}/a.*", format="document"), "text") == ["eins\r\n\r\nzwei\x0b\x85\ndrei"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_members_of_an_archive_are_read_by_their_own_extension(compression, tmp_path):
    members = {
        "de/a.md": b"Text",
        "fr/b.md": b"\xff",
        "rows.jsonl.gz": gzip.compress(encode(ROWS, "jsonl")),
        "rows.parquet": encode(ROWS, "parquet"),
        "LICENSE": b"none",
        "de/._a.md": b"of a desktop",
    }
    path = tmp_path / f"all.tar{'.' + compression if compression else ''}"
    path.write_bytes(COMPRESS[compression](archive(members)))
    assert read(Files(str(path), members="*.md")) == [
        ("a.md:1", {"text": "Text", "_file": "de/a.md"}),
        ("b.md:1", "not UTF-8: byte 0 is 0xff"),
    ]
    source = Files(str(path), members=["rows.*"])
    assert values(source) == ROWS * 2
    assert next(source.read(source.shards()[0])).location == f"{path}!rows.jsonl.gz:1"
    with pytest.raises(SourceError, match="no member matches .*.rst"):
        read(Files(str(path), members="*.rst"))
    with pytest.raises(SourceError, match="the format of LICENSE is unknown: name it"):
        read(Files(str(path), members="LICENSE"))


def test_the_column_file_is_the_path_after_the_fixed_part_of_a_pattern(tmp_path, monkeypatch):
    for name in ("x/de/a.txt", "x/de/deep/b.txt", "x/fr/a.txt", "x/.DS_Store", "y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern, files in {
        "~/x/*/a.txt": ["de/a.txt", "fr/a.txt"],
        "~/x/**/*.txt": ["de/a.txt", "de/deep/b.txt", "fr/a.txt"],
        "~/x": ["de/a.txt", "de/deep/b.txt", "fr/a.txt"],
        "~/y.txt": ["y.txt"],
    }.items():
        source = Files(pattern)
        assert values(source, "_file") == files
        assert [text.endswith(file) for text, file in zip(values(source, "text"), files)] == [True] * len(files)
    several = Files([f"{tmp_path}/x/fr/*", f"{tmp_path}/y.txt", f"{tmp_path}/x/fr/a.txt"])
    assert values(several, "_file") == ["a.txt", "y.txt"]


@pytest.mark.parametrize(
    "source, message",
    [
        (Files("{}/none*.jsonl"), r"no file matches .*/none\*.jsonl"),
        (Files([]), "files.paths is empty"),
        (Files("{}/b.bin"), "the format of .*/b.bin is unknown: name it"),
        (Files("{}/b.bin", format="yaml"), "the format 'yaml' is unknown: expected auto, csv, "),
        (Files("{}/empty.txt"), "empty.txt is empty"),
        (Files("gs:/x"), "no file matches"),
        (Files("ftp://x/y"), "ftp://x/y is not a path"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(source, message, tmp_path):
    (tmp_path / "b.bin").write_bytes(b"1")
    (tmp_path / "empty.txt").write_bytes(b"")
    fill = source.paths.replace("{}", str(tmp_path)) if isinstance(source.paths, str) else source.paths
    with pytest.raises(ValueError, match=message):
        Files(fill, format=source.format).shards()


def test_a_bad_row_has_its_line_and_reason_and_the_others_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"a": 1}\n\n{"a": \n[1, 2]\n{"a": "\xff"}\n{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\r\n' + b"[" * 100_000
    )
    found = read(Files(f"{tmp_path}/a.jsonl"))
    assert found[0] == ("a.jsonl:1", {"a": 1, "_file": "a.jsonl"})
    assert found[1][0] == "a.jsonl:3" and found[1][1].startswith("not JSON: Expecting value")
    assert found[2:5] == [
        ("a.jsonl:4", "not a JSON object: [1, 2]"),
        ("a.jsonl:5", "not UTF-8: byte 7 is 0xff"),
        ("a.jsonl:6", "not Unicode: half a surrogate pair"),
    ]
    assert found[5] == ("a.jsonl:7", {"a": "😀", "_file": "a.jsonl"})
    assert found[6][0] == "a.jsonl:8" and found[6][1].startswith("not JSON")
    (tmp_path / "a.json").write_bytes(b' [{"a": 1}, 2]')
    assert read(Files(f"{tmp_path}/a.json"))[1] == ("a.json:row 2", "not a JSON object: 2")
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n"1\n\n2",3\n4\n\xff,5\n6,"x"y\n7,8\n9,"open\n')
    assert read(Files(f"{tmp_path}/a.csv")) == [
        ("a.csv:2", {"a": "1", "b": "2", "_file": "a.csv"}),
        ("a.csv:3", {"a": "1\n\n2", "b": "3", "_file": "a.csv"}),
        ("a.csv:6", "1 values for 2 columns"),
        ("a.csv:7", "not UTF-8"),
        ("a.csv:8", "not CSV: ',' expected after '\"'"),
        ("a.csv:9", {"a": "7", "b": "8", "_file": "a.csv"}),
        ("a.csv:10", "not CSV: unexpected end of data"),
    ]
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n"3,4\n5,6\n7,8\n')
    inside = "inside of the bad row in line 3"
    assert read(Files(f"{tmp_path}/a.csv"))[1:] == [
        ("a.csv:3", "not CSV: unexpected end of data"),
        ("a.csv:4", inside),
        ("a.csv:5", inside),
    ]
    (tmp_path / "a.tsv").write_bytes(b'a\tb\n"open\t2\n3\n')
    assert read(Files(f"{tmp_path}/a.tsv")) == [
        ("a.tsv:2", {"a": '"open', "b": "2", "_file": "a.tsv"}),
        ("a.tsv:3", "1 values for 2 columns"),
    ]
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    assert [value for _, value in read(Files(f"{tmp_path}/a.parquet"))] == [
        {"a": "a", "_file": "a.parquet"},
        "not UTF-8",
    ]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.tar", "a.json"]
)
def test_a_truncated_file_is_an_error_that_names_it(name, tmp_path):
    rows = [{"text": f"{i * 7919 % 1000:x}" * 5, "n": str(i)} for i in range(30_000)]
    if name == "a.tar":
        content = archive({"a.jsonl": encode(rows, "jsonl")})[:-20_000]
    else:
        content = COMPRESS[name.partition(".")[2].partition(".")[2]](encode(rows, name.split(".")[1]))
    (tmp_path / name).write_bytes(content[:-30])
    with pytest.raises(SourceError, match=re.escape(f"{tmp_path}/{name}")):
        read(Files(f"{tmp_path}/{name}"))
    if name == "a.jsonl.gz":
        with pytest.raises(SourceError, match=r"a.jsonl.gz cannot be read after .*/a.jsonl.gz:\d+: EOFError: "):
            read(Files(f"{tmp_path}/{name}"))
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 255
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(SourceError, match="a.jsonl.gz cannot be read"):
            read(Files(f"{tmp_path}/{name}"))


def test_a_file_that_is_not_of_its_format_is_an_error(tmp_path):
    for name in ("a.parquet", "a.csv", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"a,a\n1,2\n")
        with pytest.raises(SourceError, match=re.escape(f"{tmp_path}/{name}")):
            read(Files(f"{tmp_path}/{name}"))


LINES = st.lists(
    st.tuples(st.text(max_size=12).map(lambda s: re.sub(r"[\r\n]", "", s)), st.sampled_from(["\n", "\r\n"]))
)


@settings(max_examples=200, deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.data())
def test_ranges_of_any_size_give_every_line_once(pairs, bom, last, data):
    text = "".join(line + end for line, end in pairs)
    content = ("\ufeff" * bom + (text if last else text.rstrip("\r\n"))).encode()
    whole = list(formats.lines(io.BufferedReader(io.BytesIO(content))))
    expected = content.decode().removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    assert [line.decode() for line in whole] == (expected[:-1] if not expected[-1] else expected)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(content)]):
        if start < stop:
            parts += formats.lines(io.BufferedReader(io.BytesIO(content)), start, stop)
    assert parts == whole


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.sampled_from(["jsonl", "csv", "tsv", "txt", "parquet"]), st.integers(1, 30))
def test_shards_of_any_size_give_every_row_once_and_in_order(tmp_path_factory, shard_bytes, format, count):
    rows = [{"text": "é" * (i * i % 23), "n": str(i)} for i in range(count)]
    path = tmp_path_factory.mktemp("split") / f"a.{format}"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(count)) if format == "txt" else encode(rows, format))
    source = Files(str(path), shard_bytes=shard_bytes, multiline=False)
    assert values(source) == ([{"text": str(i)} for i in range(count)] if format == "txt" else rows)
    shards = source.shards()
    if format != "parquet":
        assert sum(shard.bytes for shard in shards) == path.stat().st_size
        assert max(shard.bytes for shard in shards) <= shard_bytes
    assert Shard(*json.loads(json.dumps(shards[-1]))) == shards[-1]


def test_a_row_of_a_later_shard_names_the_byte_and_the_line_after_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"0123456789\n" * 10 + b"\xff\n")
    source = Files(f"{tmp_path}/a.txt", shard_bytes=60)
    assert [shard[1:4] for shard in source.shards()] == [(0, 56, 56), (56, 112, 56)]
    assert read(source)[-1] == ("a.txt@byte 56:line 5", "not UTF-8: byte 0 is 0xff")


def test_what_cannot_be_split_is_one_shard(tmp_path):
    files = {
        "a.csv": encode(ROWS, "csv"),
        "a.json": encode(ROWS, "json"),
        "a.jsonl.gz": gzip.compress(encode(ROWS, "jsonl")),
        "a.md": b"x" * 50,
        "a.tar": archive({"a.txt": b"1\n2\n"}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    shards = Files(str(tmp_path), shard_bytes=8).shards()
    assert shards == [Shard(f"{tmp_path}/{n}", 0, None, len(content), n) for n, content in sorted(files.items())]


def test_rows_are_read_lazily(tmp_path):
    for name, write in {"a.jsonl.gz": gzip.compress, "a.jsonl": bytes}.items():
        (tmp_path / name).write_bytes(write(b'{"a": 1}\n' * 1_000_000))
        source, consumed = Files(f"{tmp_path}/{name}"), []
        opened = source.open

        class Counted(io.RawIOBase):
            def __init__(self, path):
                self.file = opened(path)  # noqa: B023

            def readable(self):
                return True

            def readinto(self, buffer):
                count = self.file.readinto(buffer)
                consumed.append(count)  # noqa: B023
                return count

        object.__setattr__(source, "open", Counted)
        rows = source.read(source.shards()[0])
        assert next(rows).value["a"] == 1 and sum(consumed) <= formats.BUFFER
        rows.close()


def test_only_named_columns_of_parquet_are_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(encode(ROWS, "parquet"))
    assert values(Files(f"{tmp_path}/a.parquet", columns=["n"])) == [{"n": row["n"]} for row in ROWS]
    with pytest.raises(SourceError, match="no column m: there are text, n"):
        read(Files(f"{tmp_path}/a.parquet", columns=["m"]))


def test_a_source_is_pickled_without_the_list_of_its_files_and_a_changed_file_changes_its_identity(tmp_path):
    (tmp_path / "a.txt").write_text("1\n")
    source = Files(f"{tmp_path}/*.txt")
    before, shards = source.identity(), source.shards()
    assert json.loads(json.dumps(before)) == before
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and not hasattr(copy, "__dict__") or "_inputs" not in copy.__dict__
    assert [row.value["text"] for row in copy.read(shards[0])] == ["1"]
    (tmp_path / "a.txt").write_text("1\n2\n")
    assert copy.identity() != before


def test_gin_makes_sources_by_their_short_names(tmp_path):
    (tmp_path / "a.txt").write_text("1\n")
    text = f"some/files.paths = ['{tmp_path}/*.txt']\nsome/files.text_column = 'line'\n"
    short = {"hub": Hub, "tfds": Tfds, "retrieval": Retrieval, "conteb": Conteb, "parallel": Parallel}
    with gin.unlock_config():
        gin.parse_config(text)
        try:
            with gin.config_scope("some"):
                source = gin.get_configurable("files")()
                others = {name: type(gin.get_configurable(name)()) for name in short}
        finally:
            gin.clear_config()
    assert source == Files([f"{tmp_path}/*.txt"], text_column="line") and type(source) is Files and others == short
    assert values(pickle.loads(pickle.dumps(source)), "line") == ["1"]


@pytest.mark.parametrize("kind", ["bucket", "s3"])
def test_files_in_a_bucket_are_read_as_on_a_disk(kind, request, tmp_path):
    url = f"{request.getfixturevalue(kind)}/sources"
    text = "".join(f"é{i}\n" for i in range(50)).encode()
    files = {
        "x/de/a.txt": text,
        "x/fr/a.jsonl.gz": gzip.compress(encode(ROWS, "jsonl")),
        "x/fr/a.parquet": encode(ROWS, "parquet"),
        "x/all.tar": archive({"b.md": b"# B"}),
    }
    for name, content in files.items():
        paths.write(f"{url}/{name}", content)
        paths.write(tmp_path / name, content)
    for pattern in ("x", "x/**", "x/*/*"):
        remote, local = (Files(f"{root}/{pattern}", shard_bytes=100) for root in (url, tmp_path))
        assert len(remote.shards()) > 3 and values(remote) == values(local)
        assert values(remote, "_file") == values(local, "_file")
    before = Files(f"{url}/x/de/a.txt").identity()
    assert before["files"][0][:2] == ["a.txt", len(text)] and before["files"][0][2]
    paths.write(f"{url}/x/de/a.txt", text.replace(b"0", b"1"))
    assert Files(f"{url}/x/de/a.txt").identity() != before
    with pytest.raises(SourceError, match="no file matches"):
        Files(f"{url}/none/*.txt").shards()
    with pytest.raises(SourceError, match="no-such-bucket"):
        Files(f"{url.partition('://')[0]}://no-such-bucket/x.txt").shards()


def test_a_bucket_that_cannot_be_reached_is_told_from_one_without_the_file(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UnreachableError, match="^s3://data/x.txt cannot be reached: "):
        Files("s3://data/x.txt").shards()
    with pytest.raises(UnreachableError, match="^s3://data/x.txt cannot be read: "):
        list(Files("s3://data/x.txt").read(Shard("s3://data/x.txt", 0, None)))
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "error, expected",
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (socket.gaierror(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (gcsfs.retry.HttpError({"code": 503}), True),
        (gcsfs.retry.HttpError({"code": 404}), False),
        (botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 500}}, "GetObject"), True),
        (botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject"), False),
        (EOFError(), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
    ],
)
def test_errors_of_connections_are_known(error, expected):
    assert is_unreachable(error) is expected
    outer = OSError()
    outer.__cause__ = error
    assert is_unreachable(outer) is expected
