"""What `embed evaluate` writes.

    DIR/evaluation.json                   the model, how it was evaluated, versions
    DIR/records/TASK/SUBSET.SPLIT.json    a record: counts, every metric in every form, nDCG@10 of every query
    DIR/summary.json                      [{"task", "subset", "split", "precision", "dimensions", "metric", "value",
                                          "queries"}, …] of all records
    DIR/results/…                         MTEB's own files, of MTEB's tasks
    DIR/runs/…                            TREC run files

A record is written when its set is done, so a command that was interrupted does the rest. It is

    {"task", "subset", "split", "type", "languages", "main": the main metric, "digest": of the data, "counts": {…},
     "values": {form: {metric: value}},
     "queries": {"ids": […], "characters": [length of the longest relevant text, …], "values": {form: [nDCG@10, …]}}}

`queries` is there for retrieval. A form is a precision or, for a prefix, PRECISION-DIMENSIONS. A search in a part of a
corpus has `corpus_size`, and the subset SUBSET@SIZE in summary.json.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

import numpy as np

from embed import config as configs
from embed import paths
from embed.evaluation.metrics import METRICS, check_metrics, score_queries
from embed.evaluation.retrieval import MULTI, Form
from embed.evaluation.sets import RetrievalSet

ABOUT, SUMMARY, RECORDS = "evaluation.json", "summary.json", "records"
EVALUATED = "evaluated"  # the folder of a run with an evaluation per checkpoint
MAIN = "ndcg@10"
SUMMARIZED = (*METRICS, "map@100")


def is_evaluation(folder) -> bool:
    """Whether `embed evaluate` made a folder."""
    try:
        return "model" in paths.read_json(paths.path(folder) / ABOUT)
    except (OSError, ValueError, TypeError):
        return False


def read_about(folder) -> dict:
    """The content of evaluation.json."""
    return paths.read_json(paths.path(folder) / ABOUT)


def write_about(folder, name: str, dimensions: int | None, **about) -> None:
    """Write an evaluation.json."""
    paths.write_json(paths.path(folder) / ABOUT, {"model": {"name": name, "dimensions": dimensions, **about}})


def start(folder, about: Mapping) -> None:
    """Write evaluation.json, or check that an existing one has the same model and settings. ValueError if not."""
    file = paths.path(folder) / ABOUT
    if file.exists():
        kept = ("model", "settings")
        before, now = ({key: each.get(key) for key in kept} for each in (paths.read_json(file), about))
        if changes := [f"{n} was {was!r}, now {new!r}" for n, was, new in configs.differences(before, now)]:
            raise ValueError(f"{folder} holds another evaluation: {'; '.join(changes)}. Choose another --output")
    paths.write_json(file, dict(about))


def path(folder, task: str, subset: str, split: str, corpus_size: int = 0):
    """The file of a record; with `corpus_size`, of a search in a part of the corpus."""
    parts = [quote(subset, safe=""), quote(split, safe=""), *([f"{corpus_size}"] if corpus_size else [])]
    return paths.path(folder) / RECORDS / quote(task, safe="") / f"{'.'.join(parts)}.json"


def digest(data: RetrievalSet) -> str:
    """Identifies the content of a set."""
    hashed = hashlib.sha256()
    for part in (data.query_ids, data.queries, data.corpus_ids, data.corpus, data.judgments, data.documents):
        for value in part:
            hashed.update(f"{value!r}\n".encode())
        hashed.update(b"\0")
    return hashed.hexdigest()


def merge(before: Mapping, record: Mapping) -> dict:
    """A record with the values that an earlier one of the same set has in addition."""
    if not before:
        return dict(record)
    values = {form: {**before["values"].get(form, {}), **found} for form, found in record["values"].items()}
    merged = {**record, "values": {**before["values"], **values}, "counts": {**before["counts"], **record["counts"]}}
    if queries := record.get("queries") or before.get("queries"):
        of_forms = {**before.get("queries", {}).get("values", {}), **record.get("queries", {}).get("values", {})}
        merged["queries"] = {**queries, "values": of_forms}
    return merged


def make(data: RetrievalSet, rankings: Mapping[Form, np.ndarray], metrics: Sequence[str] = SUMMARIZED, **about) -> dict:
    """The record of a set from its rankings; `about` are further entries: task, subset, split, …"""
    values, of_queries = {}, {}
    for form, ranking in rankings.items():
        found = score_queries(ranking, data, metrics)
        values[f"{form}"] = {metric: float(each.mean()) for metric, each in found.items()}
        of_queries[f"{form}"] = [round(value, 6) for value in found[MAIN].tolist()]
    return {
        **about,
        "main": MAIN,
        "counts": dict(data.counts),
        "values": values,
        "queries": {"ids": data.query_ids, "characters": characters(data), "values": of_queries},
    }


def depth(metrics: Sequence[str]) -> int:
    """The ranks that metrics need."""
    return max(int(part[2]) for part in check_metrics(metrics).values())


def write_trec(folder, data: RetrievalSet, split: str, model: str, form: Form, ranking: np.ndarray) -> None:
    """Write a run file in the format of TREC: query, Q0, text, rank, score, tag, with tabs. The score is 1 / rank.

    Its name is as in BERGEN, which generates from existing run files: runs/run.retrieve.top_N.SET.SPLIT.MODEL.trec,
    with a set that is called QUERIES.DOCUMENTS, such as kilt_nq.kilt-100w.
    """
    name = f"{model.replace('/', '_')}-{form}"
    lines = [
        f"{query}\tQ0\t{data.corpus_ids[row]}\t{rank}\t{1 / rank}\t{name}\n"
        for query, rows in zip(data.query_ids, ranking.tolist())
        for rank, row in enumerate((row for row in rows if row >= 0), 1)
    ]
    file = f"run.retrieve.top_{ranking.shape[1]}.{data.name}.{split}.{name}.trec"
    paths.write(paths.path(folder) / "runs" / file, "".join(lines))


def characters(data: RetrievalSet) -> list[int]:
    """The length of the longest relevant text of each query in characters, 0 without one."""
    return [max((len(data.corpus[row]) for row in rows), default=0) for rows in data.relevant_rows]


def write(file, record: Mapping) -> None:
    """Write a record."""
    paths.write(file, json.dumps(record, ensure_ascii=False) + "\n")


def read(folder) -> list[dict]:
    """The records of an evaluation, by task, subset and split."""
    root = paths.path(folder) / RECORDS
    files = [file for name, file in paths.files(root).items() if name.endswith(".json")] if root.is_dir() else []
    return [paths.read_json(file) for file in files]


def rows(records: Sequence[Mapping], dimensions: int | None) -> Iterator[dict]:
    """The rows of summary.json; `dimensions` of the whole single vectors, None without any."""
    for record in records:
        for form, values in record["values"].items():
            precision, _, prefix = form.partition("-")
            whole = None if precision == MULTI else dimensions
            for metric, value in values.items():
                yield {
                    "task": record["task"],
                    "subset": shown_subset(record),
                    "split": record["split"],
                    "precision": precision,
                    "dimensions": int(prefix) if prefix else whole,
                    "metric": metric,
                    "value": value,
                    "queries": record["counts"].get("queries"),
                }


def shown_subset(record: Mapping) -> str:
    """The subset of a record, with the size of a part of its corpus."""
    return f"{record['subset']}@{record['corpus_size']}" if record.get("corpus_size") else record["subset"]


def summarize(folder, dimensions: int | None) -> list[dict]:
    """Write summary.json from the records; returns its rows."""
    found = list(rows(read(folder), dimensions))
    paths.write_json(paths.path(folder) / SUMMARY, found)
    return found
