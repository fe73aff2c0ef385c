"""Evaluate a model on a task of mteb: its own result files, and our records of every query."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mteb

from embed import distributed, paths
from embed.evaluation import records
from embed.evaluation.metrics import score_run
from embed.evaluation.models import Candidate
from embed.evaluation.mteb_model import Adapter, Cache, Lexical, Recorded, languages_of
from embed.evaluation.retrieval import Form

RETRIEVAL_SCORES = {name: name.replace("@", "_at_") for name in records.SUMMARIZED}


class DataError(ValueError):
    """The data of a task cannot be read."""


def evaluate(
    task,
    candidate: Candidate,
    forms: Sequence[Form],
    folder,
    *,
    alone: bool = False,
    foreign=None,
    progress: bool = True,
) -> list[dict]:
    """Evaluate every form of a model on a task; returns its records, which it also writes.

    What `folder` has is not computed again: subsets of a task are saved one by one. `foreign` is a model of mteb that
    is evaluated instead, in the one form that it has. All processes call this.
    """
    vectors = Cache()
    with tempfile.TemporaryDirectory(prefix="embed-results-") as other:
        # Only process 0 writes; the others need the same results, or they would wait for computations that it skips.
        cache = mteb.ResultCache(paths.path(folder) if distributed.is_first() else Path(other))
        made = []
        for form in forms:
            noted = _Noted(task)
            model = _model(candidate, form, vectors, alone, noted, foreign)
            meta = model.mteb_model_meta
            file = cache.get_task_result_path(task.metadata.name, meta)
            saved = distributed.from_first(file.read_text(encoding="utf-8") if file.exists() else "")
            if saved and not distributed.is_first():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(saved, encoding="utf-8")
            result = cache.load_task_result(task.metadata.name, meta)
            if result is None or result.get_missing_evaluations(task):
                _load(task)
            result = mteb.evaluate(
                model,
                task,
                cache=cache,
                co2_tracker=False,
                show_progress_bar=False,
                encode_kwargs={"batch_size": 256, "show_progress_bar": progress},
            ).task_results[0]
            noted.flush()
            made = _merge(folder, task, form, result, noted)
    vectors.clear()
    if task.data_loaded:
        task.unload_data()
    return made


def _load(task) -> None:
    if task.data_loaded or hasattr(task, "tasks"):  # an aggregate loads its parts
        return
    try:
        task.load_data()
    except Exception as error:  # each library has its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = task.metadata.dataset["path"]
        raise DataError(
            f"the data of {task.metadata.name}, {where}, cannot be read: {first:.300}. Without a network, name a "
            "folder with --data_root"
        ) from error


def _model(candidate: Candidate, form: Form, vectors: Cache, alone: bool, noted: "_Noted", foreign):
    if foreign is not None:
        return Recorded(foreign, noted)
    if candidate.model is None:
        return Lexical(candidate, alone=alone, on_results=noted)
    return Adapter(candidate, form, vectors, alone=alone, on_results=noted)


class _Noted:
    """nDCG@10 of each query, of the searches of a task. mteb may still drop texts from the results that it is given, so
    each result is scored when the next one comes."""

    def __init__(self, task):
        self._task, self._waiting, self.queries = task, None, {}

    def __call__(self, subset: str, split: str, results: dict) -> None:
        self.flush()
        self._waiting = subset, split, results

    def flush(self) -> None:
        if not self._waiting:
            return
        (subset, split, results), self._waiting = self._waiting, None
        if not isinstance(self._task.dataset, Mapping):  # a part of an aggregate
            return
        data = self._task.dataset[subset][split]
        judgments = {query: data["relevant_docs"][query] for query in results}
        values = score_run(results, judgments, [records.MAIN])[records.MAIN]
        self.queries[subset, split] = {
            "ids": list(results),
            "characters": _characters(data["corpus"], judgments),
            "values": [round(value, 6) for value in values.tolist()],
        }


def _characters(corpus, judgments: Mapping[str, Mapping[str, int]]) -> list[int]:
    """The length of the longest relevant text of each query."""
    wanted = {name for judged in judgments.values() for name, grade in judged.items() if grade > 0}
    rows = {name: row for row, name in enumerate(corpus["id"]) if name in wanted}
    texts = corpus.select(list(rows.values()))["text"] if rows else []
    length = {name: len(text) for name, text in zip(rows, texts)}
    return [
        max((length.get(name, 0) for name, grade in judged.items() if grade > 0), default=0)
        for judged in judgments.values()
    ]


def _merge(folder, task, form: Form, result, noted: _Noted) -> list[dict]:
    """Add the scores of a form to the records of a task; returns them."""
    main = task.metadata.main_score.replace("_at_", "@")
    found = []
    for split, scores in result.scores.items():
        for score in scores:
            subset = score["hf_subset"]
            file = records.path(folder, task.metadata.name, subset, split)
            record = paths.read_json(file) if file.exists() else {}
            names = {**(RETRIEVAL_SCORES if "ndcg_at_10" in score else {}), main: task.metadata.main_score}
            record |= {
                "task": task.metadata.name,
                "subset": subset,
                "split": split,
                "type": task.metadata.type,
                "languages": languages_of(task.metadata, subset),
                "main": main,
            }
            # Six digits, as in the files, so that a continued evaluation has the same values.
            values = {name: round(score[key], 6) for name, key in names.items() if score.get(key) is not None}
            record["values"] = record.get("values", {}) | {f"{form}": values}
            record.setdefault("counts", {})
            if queries := noted.queries.get((subset, split)):
                about = {key: queries[key] for key in ("ids", "characters")}
                record["queries"] = record.get("queries", {"values": {}}) | about
                record["queries"]["values"][f"{form}"] = queries["values"]
                record["counts"]["queries"] = len(queries["ids"])
            if distributed.is_first():
                records.write(file, record)
            found.append(record)
    return found


def foreign_model(source: str, candidate: Candidate):
    """A model of another library as mteb loads it, with its own prompts."""
    try:
        return mteb.get_model(source)
    except (KeyError, ValueError, OSError, NotImplementedError):
        return mteb.models.SentenceTransformerEncoderWrapper(candidate.model.model)


def only_float32(forms: Sequence[Form], candidate: Candidate) -> list[Form]:
    """[float32]. ValueError for other forms: mteb runs such a model in the one form that it has."""
    if other := [f"{form}" for form in forms if form != Form("float32")]:
        raise ValueError(f"{candidate.name} is evaluated on MTEB's tasks in float32 only, not in {', '.join(other)}")
    return list(forms)
