import json
import re

import numpy as np
import pytest

from embed import cli
from embed.evaluation import compare, page, records


def write(folder, name, tasks, *, dimensions=64, forms=("float32", "int8", "binary", "float32-16"), queries=40):
    """An evaluation whose queries score `tasks[task]` on average."""
    records.write_about(folder, name, dimensions)
    for seed, (task, level) in enumerate(tasks.items()):
        subset, language = ("default", "eng") if task != "many" else (name[-1], "deu")
        values = np.random.default_rng(seed).uniform(level - 0.1, level + 0.1, queries)
        found = {form: (values - 0.01 * k).tolist() for k, form in enumerate(forms)}
        record = {
            "task": task,
            "subset": "default",
            "split": "test",
            "type": "Retrieval",
            "languages": [language],
            "main": "ndcg@10",
            "counts": {"queries": queries},
            "values": {form: {"ndcg@10": float(np.mean(each))} for form, each in found.items()},
            "queries": {
                "ids": [f"q{i}" for i in range(queries)],
                "characters": [100 * (i + 1) for i in range(queries)],
                "values": found,
            },
        }
        records.write(records.path(folder, task, subset, "test"), record)
    return folder


@pytest.fixture
def evaluations(tmp_path):
    a = write(tmp_path / "a", "owner/a", {"one": 0.5, "many": 0.4})
    b = write(tmp_path / "b", "local/b", {"one": 0.55, "many": 0.4, "other": 0.3})
    return [a, b]


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_report_compares_models_by_task_language_length_and_size(tmp_path, evaluations):
    models, curves = compare.read(evaluations)
    assert [model.label for model in models] == ["owner/a", "b"] and curves == []
    text = page.write(tmp_path, compare.sections(tmp_path, models, curves))[0].read_text()
    overview = section(text, "Models")
    assert "mean of 2 tasks" in overview and "Left out: 1 sets" in overview
    assert re.search(r"\| b \| float32 \| 256 \| \*\*0\.4\d\d\*\* \|", overview)
    assert "| owner/a | binary | 8 |" in overview and "| owner/a | float32-16 | 64 |" in overview
    assert re.search(r"\| other \| nDCG@10 \| 1 \| 40 \| – \| \*\*0.3\d\d\*\* \|", section(text, "Tasks"))
    languages = section(text, "Languages")
    assert "| deu | 1 |" in languages and "| eng | 1 |" in languages
    assert section(text, "Length of the text").count("| one | ") == compare.LENGTHS
    assert "| one | 100 to 1,000 | 550 | 10 |" in section(text, "Length of the text")
    assert "| b | int8 | 64 | 15,625,000 |" in section(text, "Size of the vectors")
    for plot in ("lengths", "sizes"):
        assert (tmp_path / "plots" / f"{plot}.svg").read_text().lstrip().startswith("<?xml")


def test_differences_have_an_interval_and_a_verdict(tmp_path, evaluations):
    models, _ = compare.read(evaluations)
    text = section("\n\n".join(compare.sections(tmp_path, models, [])), "Differences from owner/a")
    assert "Of 2 differences, 1 are better and 0 are worse" in text
    one = next(line for line in text.splitlines() if line.startswith("| one | b | better | 40 |"))
    difference, low, high = map(float, re.findall(r"[+-]\d\.\d+", one))
    assert low == difference == high == 0.05  # every query gained the same
    same = next(line for line in text.splitlines() if line.startswith("| many | b |"))
    assert "| many | b |  | 40 | +0.0000 |" in same
    reverse = section("\n\n".join(compare.sections(tmp_path, models, [], baseline="b")), "Differences from b")
    assert "| one | owner/a | worse | 40 | -0.0500 |" in reverse


def test_the_interval_of_the_bootstrap_is_that_of_the_mean():
    differences = np.random.default_rng(0).normal(0.02, 0.3, 500)
    low, high = compare.bootstrap(differences, samples=4000)
    half = 1.96 * differences.std() / np.sqrt(500)
    assert low == pytest.approx(differences.mean() - half, abs=0.002)
    assert high == pytest.approx(differences.mean() + half, abs=0.002)
    assert compare.bootstrap(differences) == compare.bootstrap(differences)  # the same at every call


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write(tmp_path / name, "local/m", {"one": 0.5}) for name in ("x", "y")]
    assert [model.label for model in compare.read(folders)[0]] == ["m (x)", "m (y)"]
    folders = [write(tmp_path / name / "results", "local/m", {"one": 0.5}) for name in ("x", "y")]
    assert [model.label for model in compare.read(folders)[0]] == [f"m ({folder})" for folder in folders]


def test_a_run_gives_its_checkpoints_and_training_curves(tmp_path):
    run = tmp_path / "run"
    for name in ("merged", "pair"):
        write(run / records.EVALUATED / name, name, {"one": 0.5})
    write(run / records.EVALUATED / "pair", "pair", {"gone": 0.5})  # of an evaluation that the config no longer has
    results = {"checkpoints": {"pair": {}, "merged": {}}, "evaluations": {"one": "a set"}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "pair").mkdir()
    rows = [{"step": s, "loss": 5 / s, "seconds_per_step": 36.0} for s in range(1, 30)]
    (run / "pair" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models, curves = compare.read([run])
    assert [model.label for model in models] == ["pair", "merged"]  # as in results.json
    assert [key[0] for key in models[0].records] == ["one"]
    assert [(curve.label, len(curve.rows)) for curve in curves] == [("pair", 29)]
    assert [model.label for model in compare.read([run, write(tmp_path / "e", "o/e", {"one": 0.5})])[0]] == [
        "run: pair",
        "run: merged",
        "o/e",
    ]
    text = "\n\n".join(compare.sections(tmp_path, models, curves))
    assert "plots/training.svg" in text and (tmp_path / "plots" / "training.svg").exists()


def test_models_without_a_common_form_and_models_without_vectors_are_shown(tmp_path):
    """BM25 has one form, which stands beside any other, and is the baseline."""
    bm25 = write(tmp_path / "bm25", "embed/bm25", {"one": 0.5}, dimensions=None, forms=("float32",))
    model = write(tmp_path / "model", "o/m", {"one": 0.6}, forms=("int8", "binary"))
    models, _ = compare.read([model, bm25])
    text = page.write(tmp_path, compare.sections(tmp_path, models, []))[0].read_text()
    assert "Vectors in int8." in text
    assert re.search(r"\| one \| nDCG@10 \| 1 \| 40 \| \*\*0.6\d\d\*\* \| 0.5\d\d \|", section(text, "Tasks"))
    assert "| one | o/m | better |" in section(text, "Differences from embed/bm25")


def test_a_folder_without_a_result_and_the_folder_of_runs_are_refused(tmp_path):
    records.write_about(tmp_path / "started", "o/m", 64)
    with pytest.raises(ValueError, match="started has no result yet"):
        compare.read([tmp_path / "started"])
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        compare.read([tmp_path / "nowhere"])
    (tmp_path / "runs" / "run" / "pair").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "pair" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    with pytest.raises(ValueError, match="neither a folder"):
        compare.read([tmp_path / "runs"])


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder of `embed evaluate` nor of a run"):
        compare.read([tmp_path])


def test_the_page_needs_no_other_file_and_its_tables_sort(tmp_path, evaluations):
    output = tmp_path / "report"
    assert cli.main(["report", *map(str, evaluations), f"--output={output}", "--baseline=b"]) == 0
    text = (output / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert text.count('<img src="data:image/svg+xml;base64,') == 2
    assert text.count("<table>") == (output / "report.md").read_text().count("\n| ---")
    assert 'addEventListener("click"' in text and "<h2 id=" in text
    assert cli.main(["report", *map(str, evaluations), f"--output={output}"]) == 2  # without --overwrite
    assert cli.main(["report", *map(str, evaluations), f"--output={output}", "--overwrite"]) == 0
    assert cli.main(["report", str(evaluations[0]), f"--output={tmp_path / 'r'}", "--baseline=z"]) == 2
    (output / "results.json").write_text("{}")  # the report of a run is its own
    assert cli.main(["report", *map(str, evaluations), f"--output={output}", "--overwrite"]) == 2


def test_text_of_a_page_is_escaped(tmp_path):
    image = page.to_html("![logo](logo.png) ![x](http://x.example/a.png) ![y](../plots/a.svg)", tmp_path)
    assert "<img" not in image and "![logo](logo.png)" in image
    text = page.to_html("# A\n\n| a<b | <script>alert(1)</script> |\n| --- | --- |\n| x<br>y | **1** |\n", tmp_path)
    assert "<script>alert" not in text and "a&lt;b" in text and "x<br>y" in text and "<strong>1</strong>" in text
