import pytest

from embed.evaluation import published


def test_published_scores_have_sources_and_are_in_range():
    scores = published.read()
    assert len(scores) > 1000 and all(0 <= score.value <= 1 and score.source for score in scores)
    keys = [(s.model, s.revision, s.task, s.split, s.subset, s.precision) for s in scores]
    assert len(set(keys)) == len(keys)


def test_the_means_of_the_papers_tables_are_those_of_their_rows():
    """Table 1's code average of MTEB's result files; Table 3's average of its eight sets."""
    code = (
        "AppsRetrieval CodeEditSearchRetrieval CodeFeedbackMT CodeFeedbackST CodeSearchNetCCRetrieval "
        "CodeSearchNetRetrieval CodeTransOceanContest CodeTransOceanDL CosQA COIRCodeSearchNetRetrieval "
        "StackOverflowQA SyntheticText2SQL"
    ).split()
    for model in ("pplx-embed-v1-0.6b", "pplx-embed-v1-4b"):
        scores = published.scores_of(model)
        whole = {s.task: s.value for s in scores if s.subset == "default" or s.subset.startswith("(mean of")}
        stated = next(s.value for s in scores if s.task == "MTEB(Code, v1)" and s.precision == "int8")
        assert sum(whole[task] for task in code) / len(code) == pytest.approx(stated, abs=6e-5)
    context = published.scores_of("pplx-embed-context-v1-4b")
    rows = [s.value for s in context if s.task.startswith("ConTEB") and s.subset == "default"]
    stated = next(s.value for s in context if s.task == "ConTEB" and s.precision == "int8")
    assert len(rows) == 8 and sum(rows) / 8 == pytest.approx(stated, abs=6e-5)


def test_the_mean_over_a_benchmark_is_compared_if_all_its_tasks_are_there():
    stated = published.Score("m", "", "ConTEB", "", "(mean)", "binary", 0.6, "Table 3")
    records = [
        record(task, "default", "test", k / 10, form="binary") for k, task in enumerate(published.BENCHMARKS["ConTEB"])
    ]
    (comparison,) = published.compare([stated], records)
    assert comparison.ours == pytest.approx(0.35)
    assert published.compare([stated], records[:-1]) == []
    assert published.tasks_of([stated]) == sorted(published.BENCHMARKS["ConTEB"])


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no published scores of 'pplx': .*perplexity-ai/pplx-embed-v1-0.6b"):
        published.scores_of("pplx")


def record(task, subset, split, value, form="int8"):
    return {"task": task, "subset": subset, "split": split, "main": "ndcg@10", "values": {form: {"ndcg@10": value}}}


def score(task, split, subset, value):
    return published.Score("m", "", task, split, subset, "int8", value, "mteb 2")


def test_scores_are_compared_by_split_subset_and_precision():
    scores = [
        score("A", "test", "default", 0.5),
        score("B", "dev", "de", 0.6),
        score("B", "dev", "(mean of 2)", 0.7),
        score("B", "dev", "(mean of 3)", 0.7),
        score("C", "test", "default", 0.7),
        score("D", "", "default", 0.9),
    ]
    records = [
        record("A", "default", "test", 0.51),
        record("A", "default", "test", 0.1, form="int8-16"),
        record("B", "de", "dev", 0.6),
        record("B", "fr", "dev", 0.7),
        record("D", "default", "validation", 0.8),
    ]
    found = {(each.published.task, each.published.subset): each for each in published.compare(scores, records)}
    assert found["A", "default"].difference == pytest.approx(0.01)
    assert found["B", "de"].difference == 0
    assert found["B", "(mean of 2)"].difference == pytest.approx(-0.05)
    assert found["B", "(mean of 3)"].ours is None and found["B", "(mean of 3)"].difference is None
    assert ("C", "default") not in found
    assert found["D", "default"].difference == pytest.approx(-0.1)
