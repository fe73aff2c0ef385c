import json

import numpy as np
import pytest
from evaluation_sets import judged

from embed.evaluation import records
from embed.evaluation.retrieval import Form

ABOUT = {"task": "set", "subset": "de", "split": "test", "type": "Retrieval", "languages": ["deu"]}


def record():
    data = judged({0: 1}, {1: 1, 12: 1})
    rankings = {
        Form("float32"): np.array([[0, 1], [1, 0]], np.int32),
        Form("binary", 16): np.array([[1, 0], [0, 2]], np.int32),
    }
    return records.make(data, rankings, **ABOUT)


def test_a_record_has_means_and_the_value_and_length_of_every_query():
    made = record()
    assert made["values"]["float32"]["recall@10"] == 0.75 and made["values"]["binary-16"]["mrr@10"] == 0.25
    assert made["queries"]["ids"] == ["q0", "q1"] and made["queries"]["characters"] == [6, 7]  # "text 0", "text 12"
    assert made["queries"]["values"]["float32"][0] == 1
    for form, values in made["queries"]["values"].items():
        assert np.mean(values) == pytest.approx(made["values"][form]["ndcg@10"], abs=1e-6)


def test_the_summary_has_a_row_per_set_form_and_metric(tmp_path):
    records.write(records.path(tmp_path, "a/b", "de", "test"), record())
    rows = records.summarize(tmp_path, 32)
    assert rows == json.loads((tmp_path / "summary.json").read_text())
    assert len(rows) == 2 * len(records.SUMMARIZED)
    assert {(row["precision"], row["dimensions"]) for row in rows} == {("float32", 32), ("binary", 16)}
    assert set(rows[0]) == {"task", "subset", "split", "precision", "dimensions", "metric", "value", "queries"}
    assert (rows[0]["task"], rows[0]["subset"], rows[0]["queries"]) == ("set", "de", len(record()["counts"]) or None)


def test_a_folder_of_another_model_or_settings_is_refused(tmp_path):
    about = {"model": {"name": "a/b", "revision": "1"}, "settings": {"alone": False}, "commit": "x"}
    assert not records.is_evaluation(tmp_path)
    records.start(tmp_path, about)
    records.start(tmp_path, about | {"commit": "y"})
    assert records.is_evaluation(tmp_path)
    with pytest.raises(
        ValueError, match="another evaluation: model.revision was '1', now '2'. Choose another --output"
    ):
        records.start(tmp_path, about | {"model": {"name": "a/b", "revision": "2"}})
    with pytest.raises(ValueError, match="settings.alone was False, now True"):
        records.start(tmp_path, about | {"settings": {"alone": True}})


def test_the_digest_changes_with_each_part_of_a_set():
    data = judged({0: 1}, {1: 1})
    changed = [
        data,
        data._replace(queries=["query 0", "other"]),
        data._replace(corpus=["x", *data.corpus[1:]]),
        data._replace(judgments=[{"c00": 2}, {"c01": 1}]),
        data._replace(documents=[np.array([0, 1]), *data.documents[2:]]),
    ]
    assert len({records.digest(each) for each in changed}) == len(changed)
    assert records.digest(data._replace(name="other")) == records.digest(data)
