"""Tasks by name: those of mteb, and ConTEB, which mteb lacks.

find(tasks=["SciFact"], data_root="sets")               one task, from the folder sets/scifact
find(benchmark="MTEB(Multilingual, v2)", types=["Retrieval"])
find(benchmark="ConTEB")
"""

import difflib
import logging
from collections.abc import Iterator, Sequence

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from embed import paths
from embed.config import brief
from embed.evaluation.sets import RetrievalSet, read_set, read_source
from embed.preparation.sources import Conteb

logging.getLogger("mteb").setLevel(logging.ERROR)  # what matters is in the table

# The eight sets of ConTEB (Conti et al. 2025): repository of illuin-conteb, split, and what it is about.
CONTEB = {
    "ConTEBCovidQA": ("covid-qa", "train", "questions about research on COVID-19"),
    "ConTEBESGReports": ("esg-reports", "test", "questions about reports of companies in the restaurant business"),
    "ConTEBFootball": ("football", "train", "passages about football players, whose name only their page says"),
    "ConTEBGeography": ("geography", "train", "passages about cities, whose name only their page says"),
    "ConTEBInsurance": ("insurance", "train", "passages of a report about countries, which only headings name"),
    "ConTEBMLDR": ("mldr-conteb-eval", "test", "questions about passages of long documents"),
    "ConTEBNarrativeQA": ("narrative-qa", "test", "questions about passages of stories"),
    "ConTEBSQuAD": ("squad-conteb-eval", "validation", "questions about passages of Wikipedia"),
}
PAPER = "https://arxiv.org/abs/2505.24782"


class ContextualTask(AbsTaskRetrieval):
    """A set in the layout of ConTEB. Its corpus has the columns `document` and `chunk`."""

    def load_data(self, num_proc: int | None = None, **keywords) -> None:
        """Read the set from its folder or from the hub."""
        if self.data_loaded:
            return
        where, split = self.metadata.dataset["path"], self.metadata.eval_splits[0]
        if paths.path(where).is_dir():
            data = read_set(where, split=split, name=self.metadata.name)
        else:
            source = Conteb(id=where, revision=self.metadata.dataset["revision"], split=split)
            data = read_source(source, self.metadata.name)
        self.dataset, self.data_loaded = {"default": {split: tables(data)}}, True


def tables(data: RetrievalSet) -> dict:
    """A set of ours as the data of a retrieval task of mteb."""
    places = sorted((row, d, c) for d, rows in enumerate(data.documents) for c, row in enumerate(rows.tolist()))
    corpus = {
        "id": data.corpus_ids,
        "text": data.corpus,
        "document": [f"{document}" for _, document, _ in places],
        "chunk": [chunk for *_, chunk in places],
    }
    queries = {"id": data.query_ids, "text": data.queries}
    return {
        "corpus": datasets.Dataset.from_dict(corpus),
        "queries": datasets.Dataset.from_dict(queries),
        "relevant_docs": {query: dict(judged) for query, judged in zip(data.query_ids, data.judgments)},
        "top_ranked": None,
    }


def contextual_task(name: str, path: str, split: str, description: str, revision: str = "main") -> ContextualTask:
    """A task for a folder or repository in the layout of ConTEB."""
    metadata = TaskMetadata(
        name=name,
        dataset={"path": path, "revision": revision},
        description=f"ConTEB: {description}.",
        reference=PAPER,
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )
    return type(name, (ContextualTask,), {"metadata": metadata})()


def find(
    *,
    tasks: Sequence[str] = (),
    benchmark: str = "",
    languages: Sequence[str] = (),
    types: Sequence[str] = (),
    splits: Sequence[str] = (),
    data_root: str = "",
) -> list:
    """The tasks of these names, or of a benchmark, for the `languages` (ISO 639-3) and `types` (as Retrieval).

    With `data_root`, each task reads the folder of it that is named like the task's repository. ValueError for a name
    that does not exist, and if the choice leaves nothing.
    """
    chosen = list(_named(tasks)) + (_benchmark(benchmark) if benchmark else [])
    if types:
        known = sorted({task.metadata.type for task in mteb.get_tasks()})
        if wrong := sorted(set(types) - set(known)):
            raise ValueError(f"--types={wrong[0]} must be one of {', '.join(known)}")
        chosen = [task for task in chosen if task.metadata.type in types]
    if languages:
        chosen = [task for task in chosen if _speaks(task, languages)]
    if splits:
        known = sorted({split for task in chosen for split in task.metadata.eval_splits})
        if wrong := sorted(set(splits) - set(known)):
            raise ValueError(f"--splits={wrong[0]}: the tasks have the splits {brief(known)}")
        chosen = [task.filter_eval_splits([s for s in task.metadata.eval_splits if s in splits]) for task in chosen]
        chosen = [task for task in chosen if set(task.eval_splits) <= set(splits)]
    if not chosen:
        limits = {"languages": languages, "types": types, "splits": splits}
        given = ", ".join(f"--{name}={' '.join(values)}" for name, values in limits.items() if values)
        codes = "; languages are ISO 639-3, such as eng or eng-Latn" if languages else ""
        raise ValueError(f"no task is left by {given}{codes}")
    for task in chosen:
        modalities = set(task.metadata.modalities) - {"text"}
        if modalities:
            raise ValueError(
                f"the task {task.metadata.name} needs {', '.join(sorted(modalities))}: models are for text"
            )
    return _from_folders(chosen, data_root) if data_root else chosen


def folder_name(task) -> str:
    """The folder of a task in a --data_root: its repository without the owner."""
    return task.metadata.dataset["path"].rstrip("/").rpartition("/")[2]


def _named(names: Sequence[str]) -> Iterator:
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)} | set(CONTEB)
    for name in names:
        if name in CONTEB:
            repository, split, description = CONTEB[name]
            yield contextual_task(name, f"illuin-conteb/{repository}", split, description)
            continue
        try:
            yield mteb.get_task(name)
        except KeyError:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            raise ValueError(
                f"there is no task {name!r}{': did you mean ' + ' or '.join(near) + '?' if near else ''} "
                f"(mteb {mteb.__version__}, and ConTEB's {len(CONTEB)})"
            ) from None


def _benchmark(name: str) -> list:
    if name == "ConTEB":
        return list(_named(list(CONTEB)))
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        known = [benchmark.name for benchmark in mteb.get_benchmarks()] + ["ConTEB"]
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ValueError(f"there is no benchmark {name!r}: did you mean {' or '.join(near or known)}?") from None


def _speaks(task, languages: Sequence[str]) -> bool:
    """Whether a task has one of the languages; a task in several is reduced to them."""
    try:
        task.filter_languages(list(languages))
    except ValueError:  # no subset is left
        return False
    if task.metadata.is_multilingual:
        return bool(task.hf_subsets)
    return bool({name.split("-")[0] for name in task.metadata.languages} & {name.split("-")[0] for name in languages})


def _from_folders(tasks: list, root: str) -> list:
    """The tasks, reading from folders of `root`. ValueError names all that are missing, before any work."""
    if not paths.path(root).is_dir():
        raise ValueError(f"--data_root={root} is not a folder")
    parts = [part for task in tasks for part in getattr(task, "tasks", [task])]
    missing = [part for part in parts if not (paths.path(root) / folder_name(part)).is_dir()]
    if missing:
        named = brief([f"{folder_name(part)} for {part.metadata.name}" for part in missing])
        raise ValueError(f"--data_root={root} has no folder {named}")
    for part in parts:
        local = {**part.metadata.dataset, "path": f"{paths.path(root) / folder_name(part)}"}
        part.metadata = part.metadata.model_copy(update={"dataset": local})
    return tasks
