"""Datasets that TensorFlow Datasets has prepared."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from embed.preparation.sources import SourceError, Tfds


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Twenty examples of text, of a number, and of nested and ragged features."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "pair": {"score": np.float32, "answers": tfds.features.Sequence(tfds.features.Text())},
            "passages": tfds.features.Sequence(
                {"title": tfds.features.Text(), "ids": tfds.features.Sequence(np.int32)}
            ),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            passages = [{"title": f"p{k}", "ids": list(range(k))} for k in range(i % 3)]
            pair = {"score": i / 2, "answers": [f"a{k}" for k in range(i % 4)]}
            text = b"\xff" if i == 7 else f"naïve {i}"
            yield i, {"text": text, "label": i % 2, "pair": pair, "passages": passages}


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def data_dir(request, tmp_path_factory):
    """A folder with the dataset in four shards."""
    folder = tmp_path_factory.mktemp(request.param)
    builder = Tiny(data_dir=str(folder), file_format=request.param)
    config = tfds.download.DownloadConfig(num_shards=4)
    builder.download_and_prepare(download_config=config)
    return str(folder)


def rows(source):
    return [row for shard in source.shards() for row in source.read(shard)]


def test_examples_are_rows_with_plain_values(data_dir):
    source = Tfds("tiny", data_dir=data_dir)
    found = rows(source)
    assert len(found) == 20 and sorted(row.location for row in found) == sorted(
        f"tiny/train:row {i + 1}" for i in range(20)
    )
    assert [row.error for row in found if row.error] == ["text is not UTF-8"]
    by_score = {row.value["pair/score"]: row.value for row in found if row.value}
    assert by_score[2.5] == {
        "text": "naïve 5",
        "label": 1,
        "pair/score": 2.5,
        "pair/answers": ["a0"],
        "passages/title": ["p0", "p1"],
        "passages/ids": [[], [0]],
    }
    described = source.describe()
    assert described["rows"] == 20 and described["columns"] == sorted(by_score[2.5]) and described["files"] == 4
    assert source.identity()["name"] == "tiny/1.0.0" and sum(source.identity()["shards"]) == 20


def test_shards_along_the_files_give_every_example_once_and_in_order(data_dir):
    source = Tfds("tiny", data_dir=data_dir)
    whole = rows(source)
    assert len(source.shards()) == 1
    source = Tfds("tiny", data_dir=data_dir, shard_bytes=1)
    assert len(source.undivided().shards()) == 1
    shards = source.shards()
    assert [shard.stop - shard.start for shard in shards] == source.identity()["shards"] and len(shards) == 4
    assert rows(source) == whole


def test_a_split_without_a_recorded_size_has_that_of_its_files(data_dir, tmp_path):
    import shutil

    shutil.copytree(data_dir, tmp_path / "copy")
    (recorded,) = (tmp_path / "copy").rglob("dataset_info.json")
    about = json.loads(recorded.read_text())
    del about["splits"][0]["numBytes"]
    recorded.write_text(json.dumps(about))
    source = Tfds("tiny", data_dir=str(tmp_path / "copy"))
    assert not source.identity()["bytes"]
    files = [f for f in recorded.parent.iterdir() if "-of-" in f.name]
    assert len(files) == 4 and sum(s.bytes for s in source.shards()) == sum(f.stat().st_size for f in files)


def test_a_dataset_that_is_not_there_is_one_sentence(data_dir):
    for source, message in [
        (Tfds("none", data_dir=data_dir), "tfds.name 'none' cannot be opened: "),
        (Tfds("tiny", split="test", data_dir=data_dir), "tiny has no split 'test': there are train"),
    ]:
        with pytest.raises(SourceError, match=message) as raised:
            source.shards()
        assert "\n" not in f"{raised.value}"
