"""Evaluate a model on sets of local folders, without mteb."""

import json
from collections.abc import Sequence

import numpy as np

from embed import distributed
from embed.evaluation import judgments, records
from embed.evaluation.models import Candidate
from embed.evaluation.retrieval import Form
from embed.evaluation.sets import RetrievalSet


def evaluate(
    data: RetrievalSet,
    candidate: Candidate,
    forms: Sequence[Form],
    folder=None,
    *,
    subset: str = "default",
    split: str = "test",
    alone: bool = False,
    languages: Sequence[str] = (),
    metrics: Sequence[str] = (),
    corpus_sizes: Sequence[int] = (),
    trec: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Evaluate every form of a model on a set, also in parts of its corpus; returns the records, one per size.

    With a `folder`, what it has is not computed again, and the records are written there. `languages`: BM25 uses the
    first. `metrics` are computed in addition to `records.SUMMARIZED`. `trec`: texts of a query in a TREC run file.
    """
    metrics = list(dict.fromkeys([*records.SUMMARIZED, *metrics]))
    needed = np.unique(np.concatenate(data.relevant_rows)) if corpus_sizes else ()
    parts = {0: np.arange(len(data.corpus)), **judgments.nested(data.corpus_ids, needed, corpus_sizes)}
    digest = records.digest(data)
    before = {size: {} for size in parts}
    if folder:
        files = {size: records.path(folder, data.name, subset, split, size) for size in parts}
        before = {size: _read(file) for size, file in files.items()}
        for size, record in before.items():
            if record and record["digest"] != digest:
                raise ValueError(f"{files[size]} is of another content of {data.name}: choose another --output")
    missing = [form for form in forms if any(_lacks(record, form, metrics) for record in before.values())]
    if not missing and not trec:
        return list(before.values())
    counts: dict[str, int] = {}
    ranked = candidate.rank(
        data,
        forms if trec else missing,
        alone=alone,
        language=languages[0] if languages else "",
        depth=max(records.depth(metrics), trec),
        parts=parts,
        counts=counts,
        show_progress_bar=progress,
    )
    made = []
    about = {"task": data.name, "subset": subset, "split": split, "type": "Retrieval", "languages": list(languages)}
    for size, rankings in ranked.items():
        record = records.make(data, rankings, metrics, **about, digest=digest)
        record["counts"] |= counts | {"texts": len(parts[size])}
        record |= {"corpus_size": size} if size else {}
        made.append(records.merge(before[size], record))
        if folder and distributed.is_first():
            records.write(files[size], made[-1])
            if trec and not size:
                for form, ranking in rankings.items():
                    records.write_trec(folder, data, split, candidate.name, form, ranking[:, :trec])
    return made


def _read(file) -> dict:
    """The record of a file as process 0 sees it, {} if there is none."""
    text = file.read_text(encoding="utf-8") if distributed.is_first() and file.exists() else ""
    return json.loads(distributed.from_first(text) or "{}")


def _lacks(record: dict, form: Form, metrics: Sequence[str]) -> bool:
    """Whether a record does not have all metrics of a form."""
    return not set(metrics) <= set(record.get("values", {}).get(f"{form}", ()))
