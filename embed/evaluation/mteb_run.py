"""Evaluate a model on a task of mteb: its own result files, and our records of every query."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import mteb
from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining

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

    The subsets are done one after the other, each in all forms, so that the vectors of one are kept at a time. What
    `folder` has is not computed again. `foreign` is a model of mteb that is evaluated instead, in the one form that it
    has. All processes call this.
    """
    subsets, made = list(task.hf_subsets or []), {}
    # mteb evaluates the subsets of these together.
    whole = hasattr(task, "tasks") or isinstance(task, AbsTaskBitextMining)
    with _own_data(task) as digest, tempfile.TemporaryDirectory(prefix="embed-results-") as other:
        # Only process 0 writes; the others need the same results, or they would wait for computations that it skips.
        cache = mteb.ResultCache(paths.path(folder) if distributed.is_first() else Path(other))

        def score(form: Form, vectors: Cache) -> list[dict]:
            noted = _Noted(task)
            if foreign is not None:
                model = Recorded(foreign, noted)
            elif candidate.model is None:
                model = Lexical(candidate, on_results=noted)
            else:
                model = Adapter(candidate, form, vectors, alone=alone, on_results=noted)
            file = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
            if distributed.is_first():
                _drop_unrecorded(file, folder, task, form, digest)
            _share(file)
            result = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
            if result is None or result.get_missing_evaluations(task):
                _load(task, subsets)
            how = {"batch_size": 256, "show_progress_bar": progress}
            result = mteb.evaluate(
                model, task, cache=cache, co2_tracker=False, show_progress_bar=False, encode_kwargs=how
            ).task_results[0]
            noted.flush()
            return _record(folder, task, form, result, noted, digest, vectors.counts)

        for chosen in [subsets] if whole else [[subset] for subset in subsets]:
            task.hf_subsets, vectors = chosen, Cache()
            for form in forms:
                made |= {(record["subset"], record["split"]): record for record in score(form, vectors)}
        task.hf_subsets = subsets
        if task.data_loaded:
            task.unload_data()
    return list(made.values())


def _share(file: Path) -> None:
    """Give the other processes process 0's results of a task."""
    saved = distributed.from_first(file.read_text(encoding="utf-8") if distributed.is_first() and file.exists() else "")
    if saved and not distributed.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(saved, encoding="utf-8")


@contextlib.contextmanager
def _own_data(task) -> Iterator[str]:
    """The digest of a task's local data, "" for data of the hub.

    `datasets` knows a folder by its name and card, not by its content. So local data get a cache of their own, which
    ends with the block.
    """
    where = paths.path(task.metadata.dataset["path"]) if not hasattr(task, "tasks") else None
    if where is None or not where.is_dir():
        yield ""
        return
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="embed-datasets-") as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        try:
            yield paths.digest(where)
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def _drop_unrecorded(file, folder, task, form: Form, digest: str) -> None:
    """Remove the scores of subsets whose records were not written before an interruption, so that they are computed
    again. ValueError if a record is of other data."""
    if not file.exists() or hasattr(task, "tasks"):
        return
    document = paths.read_json(file)
    for split, scores in document["scores"].items():
        kept = []
        for score in scores:
            record_file = records.path(folder, task.metadata.name, score["hf_subset"], split)
            record = paths.read_json(record_file) if record_file.exists() else {}
            if record and record.get("digest", "") != digest:
                raise ValueError(f"{record_file} is of other data of {task.metadata.name}: choose another --output")
            if f"{form}" in record.get("values", {}):
                kept.append(score)
        document["scores"][split] = kept
    document["scores"] = {split: scores for split, scores in document["scores"].items() if scores}
    if document["scores"]:
        paths.write_json(file, document)
    else:
        file.unlink()


def _load(task, subsets: Sequence[str]) -> None:
    """Load the data of all `subsets` of a task."""
    if task.data_loaded or hasattr(task, "tasks"):  # an aggregate loads its parts
        return
    chosen, task.hf_subsets = task.hf_subsets, list(subsets)
    try:
        task.load_data()
    except Exception as error:  # each library has its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = task.metadata.dataset["path"]
        raise DataError(
            f"the data of {task.metadata.name}, {where}, cannot be read: {first:.300}. Without a network, name a "
            "folder with --data_root"
        ) from error
    finally:
        task.hf_subsets = chosen


class _Noted:
    """nDCG@10 of each query, of the searches of a task.

    mteb may still drop texts from the results that it is given, so each result is scored when the next one comes.
    """

    def __init__(self, task):
        self._task, self._waiting, self.queries = task, None, {}

    def __call__(self, subset: str, split: str, results: dict) -> None:
        self.flush()
        self._waiting = subset, split, results

    def flush(self) -> None:
        """Score the result that waits."""
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
    chosen = corpus.select(list(rows.values()))
    titles = chosen["title"] if "title" in chosen.column_names else [""] * len(rows)
    length = {name: len(f"{t or ''} {text}".strip()) for name, t, text in zip(rows, titles, chosen["text"])}
    return [
        max((length.get(name, 0) for name, grade in judged.items() if grade > 0), default=0)
        for judged in judgments.values()
    ]


def _record(folder, task, form: Form, result, noted: _Noted, digest: str, counts: Mapping[str, int]) -> list[dict]:
    """Add the scores of a form to the records of a task's subsets; returns them.

    `counts` are those of the splits of a subset together, {} if nothing was computed.
    """
    main, found = task.metadata.main_score.replace("_at_", "@"), []
    for split, scores in result.scores.items():
        for score in scores:
            subset = score["hf_subset"]
            if not hasattr(task, "tasks") and subset not in task.hf_subsets:
                continue
            names = {**(RETRIEVAL_SCORES if "ndcg_at_10" in score else {}), main: task.metadata.main_score}
            # Six digits, as in the files, so that a continued evaluation has the same values.
            values = {name: round(score[key], 6) for name, key in names.items() if score.get(key) is not None}
            record = {
                "task": task.metadata.name,
                "subset": subset,
                "split": split,
                "type": task.metadata.type,
                "languages": languages_of(task.metadata, subset),
                "main": main,
                "digest": digest,
                "values": {f"{form}": values},
                "counts": dict(counts),
            }
            if queries := noted.queries.get((subset, split)):
                about = {key: queries[key] for key in ("ids", "characters")}
                record["queries"] = about | {"values": {f"{form}": queries["values"]}}
                record["counts"]["queries"] = len(queries["ids"])
            file = records.path(folder, task.metadata.name, subset, split)
            record = records.merge(paths.read_json(file) if file.exists() else {}, record)
            if distributed.is_first():
                records.write(file, record)
            found.append(record)
    return found


def foreign_model(candidate: Candidate):
    """A model of another library as mteb loads it, with its own prompts."""
    try:
        return mteb.get_model(candidate.about["path"])
    # A name that mteb does not know; one that the hub does not; no hub; a folder.
    except (KeyError, ValueError, OSError, NotImplementedError):
        return mteb.models.SentenceTransformerEncoderWrapper(candidate.model.model)


def only_float32(forms: Sequence[Form], candidate: Candidate) -> list[Form]:
    """[float32]. ValueError for other forms: mteb runs such a model in the one form that it has."""
    if other := [f"{form}" for form in forms if form != Form("float32")]:
        raise ValueError(f"{candidate.name} is evaluated on MTEB's tasks in float32 only, not in {', '.join(other)}")
    return list(forms)
