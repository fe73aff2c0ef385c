import json
import re

import pytest
from rich.console import Console

from embed.evaluation import plots, report
from embed.training.stages import KINDS

BENCHMARKS = ("functions", "contextual", "contextual_alone")


def figures(*precisions, start):
    def row(i, j):
        return {"ndcg@10": start + 0.1 * i - 0.01 * j, "recall@10": start + 0.2, "mrr@10": 0}

    return {b: {p: row(i, j) for j, p in enumerate(precisions)} for i, b in enumerate(BENCHMARKS)}


@pytest.fixture
def results():
    pair, merged = (figures("float32", "int8", "binary", start=start) for start in (0.31, 0.42))
    return {"checkpoints": {"pair": pair, "merged": merged, "BM25": figures("float32", start=0.5)}}


@pytest.fixture
def metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "loss": 5 / s}) + "\n" for s in range(1, 50)) + '{"step": 50, "lo')
    return {"pair": file}


def test_the_terminal_table_has_a_row_per_model_and_precision_and_fits_80_columns(results):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(report.render_table(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split() for line in text.splitlines() if "merged" in line] == [
        ["merged", "0.420", "0.620", "0.520", "0.620", "0.620", "0.620"],
        ["merged", "0.410", "0.620", "0.510", "0.620", "0.610", "0.620"],
        ["merged", "0.400", "0.620", "0.500", "0.620", "0.600", "0.620"],
    ]
    assert len(re.findall("BM25", text)) == 1


def test_the_markdown_table_marks_the_best_of_each_column_and_precision(results):
    lines = report.markdown_table(results).splitlines()
    assert lines[0].startswith("| precision | model | functions<br>nDCG@10 | functions<br>recall@10 | contextual<br>")
    assert {line.count("|") for line in lines} == {9}
    assert lines[2] == "| float32 | pair | 0.310 | 0.510 | 0.410 | 0.510 | 0.510 | 0.510 |"
    assert lines[4] == "|  | BM25 | **0.500** | **0.700** | **0.600** | **0.700** | **0.700** | **0.700** |"
    assert lines[5].startswith("| int8 | pair | 0.300 |") and lines[6].startswith("|  | merged | **0.410** |")
    assert len(lines) == 2 + 3 + 2 + 2


def test_a_figure_that_was_not_measured_is_a_dash(results):
    del results["checkpoints"]["merged"]["contextual"]
    line = report.markdown_table(results).splitlines()[3]
    assert line == "|  | merged | 0.420 | 0.620 | – | – | 0.620 | 0.620 |"


def test_results_without_checkpoints_are_refused():
    with pytest.raises(ValueError, match="results have no checkpoints"):
        report.markdown_table({"checkpoints": {}})


def test_a_report_of_only_checkpoints_has_the_table_and_its_plot(tmp_path, results):
    path = report.write_report(tmp_path / "run", results, {})
    assert path == tmp_path / "run" / "report.md"
    assert re.findall(r"^## (.*)", path.read_text(), re.M) == [report.TITLE]
    assert [f.name for f in (tmp_path / "run" / "plots").iterdir()] == ["ndcg.png"]


def test_the_report_has_every_section_of_the_results(tmp_path, results, metrics):
    results |= {
        "command": "embed pipeline",
        "commit": "abc123",
        "machine": "2 cores",
        "merges": {
            "merged": {
                "ratio": 0.5,
                "method": "slerp",
                "of": ["a", "c"],
                "sets": {"functions": "functions/development", "b": "sets/b"},
                "sweep": [{"ratio": r, "functions": 0.3 + r / 10, "b": 0.5} for r in (0, 0.5, 1)],
            },
            "other": {
                "ratio": 1,
                "method": "linear",
                "of": ["a", "c"],
                "sets": {"functions": "f"},
                "sweep": [{"ratio": r, "functions": 0.6} for r in (0, 1)],
            },
        },
        "elbo": 3.25,
        "diffusion": [{"t": 0.1, "accuracy": 0.4, "nll": 2.5}],
        "denoising": [{"step": 0, "text": "_ the _"}, {"step": "original", "text": "```in the end"}],
        "search": {"query": "a|b", "hits": [{"rank": 1, "score": 0.5, "id": "f", "text": "def f():\n  pass"}]},
        "seconds": {"prepare": 10.0, "stage pair": 90.26},
        "seconds_per_step": {"stage pair": 0.25},
        "data": {
            "pairs": 12345,
            "counts": {
                "texts": {
                    "examples": 1000,
                    "tokens": {"query": 20, "document": 3000},
                    "dropped": {"short": 7, "long": 0},
                    "read": {"rows": {"used": 1007}},
                },
                "evaluation/set/test": {"queries": 5},
            },
            "packages": [f"a{k}==1" for k in range(150)],
            "seconds": {f"part {k}": 1.0 for k in range(150)},
        },
        "versions": {"jax": "0.10"},
    }
    text = report.write_report(tmp_path / "run", results, metrics).read_text()
    for expected in (
        "command: `embed pipeline`",
        "![Training loss of each stage](plots/loss.png)",
        "## Merging: the ratio of merged (slerp)\n\n| ratio | functions nDCG@10 | b nDCG@10 |",
        "| 0.5 (merged) | 0.350 | 0.500 |",
        "0 is a, 1 is c; functions: functions/development; b: sets/b",
        "## Merging: the ratio of other (linear)\n\n| ratio | functions nDCG@10 |",
        "| 1 (merged) | 0.600 |",
        "ELBO: 3.250 nats per token.",
        "| 0.1 | 0.400 | 2.500 |",
        "Step 0:\n\n```text\n_ the _\n```",
        "Original:\n\n````text\n```in the end\n````",
        "Query: **a\\|b**",
        "| 1 | 0.500 | `f` | def f(): pass |",
        "| prepare | 10.0 | – |",
        "| stage pair | 90.3 | 0.250 |",
        "| all | 100.3 | – |",
        "| pairs | 12,345 |",
        "| task or evaluation set | examples | tokens | dropped | queries |",
        "| texts | 1,000 | 3,020 | 7 | – |",
        "| evaluation/set/test | – | – | – | 5 |",
        "jax 0.10",
    ):
        assert expected in text, expected
    assert "a7==1" not in text and "part 7" not in text and "long" not in text and len(text.splitlines()) < 120
    for image in re.findall(r"\]\((plots/.*?)\)", text):
        assert (tmp_path / "run" / image).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\]\(plots/", text)) == 3


def test_the_running_mean_keeps_a_straight_line_and_smooths_a_zigzag():
    line = [3.0 * k for k in range(50)]
    assert plots.running_mean(line) == pytest.approx(line)
    assert plots.running_mean([0.0, 3.0, 0.0, 3.0]) == pytest.approx([0, 1, 2, 3])
    assert plots.running_mean([]) == []


def test_the_losses_have_a_row_per_stage_and_name_the_file_with_every_row(tmp_path, results, metrics):
    results["stages"] = {"pair": {"kind": "pair", "init": "diffusion"}}
    text = report.write_report(tmp_path / "run", results, metrics | {"none": tmp_path / "nothing.jsonl"}).read_text()
    table = text.partition("| stage | objective |")[2].partition("\n\n")[0].splitlines()
    mean = plots.running_mean([5 / step for step in range(1, 50)])
    course = " | ".join(f"{mean[k]:.3f}" for k in (0, 12, 24, 36, 48))
    assert table[2:] == [f"| pair | pair | 49 | {course} |", "| none | – | – | – | – | – | – | – |"]
    assert "STAGE/metrics.jsonl has every logged row." in text


STAGES = {
    "first": {"kind": "diffusion", "init": ""},
    "second": {"kind": "contextual", "init": "first"},
    "third": {"kind": "triplet", "init": "second"},
}


def test_the_report_explains_its_rows_by_objective_and_nothing_else(tmp_path, results, metrics):
    """Stages may have any name."""
    (file,) = metrics.values()
    rows = {name: figures("float32", "int8", start=0.1) for name in ("first", "second", "third")}
    explained = results | {"checkpoints": rows, "stages": STAGES}
    text = report.write_report(tmp_path / "explained", explained, dict.fromkeys(STAGES, file)).read_text()
    for sentence in (
        "- float32, int8 are the same vectors",
        "- first: masked diffusion trains the state of each token",
        "such a checkpoint may rank below random init",
        "- first (diffusion): the bound",
        "- second (contextual): a weighted sum of three cross-entropies",
        "- third (triplet): cross-entropy of finding a query's document among the documents of the batch and the mined",
        "- The loss of a stage that starts from a trained checkpoint may rise first",
    ):
        assert sentence in text, sentence
    assert "BM25" not in text.replace("(BM25)", "") and "random init is" not in text and "(pair)" not in text
    plain = report.write_report(
        tmp_path / "plain", results | {"stages": {"a": {"kind": "pair", "init": ""}}}, {"a": file}
    )
    assert "masked diffusion" not in plain.read_text() and "starts from a trained" not in plain.read_text()
    assert "- BM25 is the lexical baseline" in plain.read_text()


def test_every_objective_has_an_explanation_of_its_loss():
    assert set(report.LOSSES) == set(KINDS)
