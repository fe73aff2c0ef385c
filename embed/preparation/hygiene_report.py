"""The hygiene report of prepared data: what each task read, used and dropped, and what was found in it.

DATA/hygiene.json   all figures
DATA/hygiene.md     the same as tables, for readers
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping

from embed import paths
from embed.preparation import stream
from embed.preparation.counts import Counts
from embed.preparation.hygiene import Findings, Hygiene
from embed.preparation.stream import Work

MAX_TEXTS = 50  # evaluation texts of a set and a task that are named
MAX_GROUPS = 20  # of near duplicates
MAX_LANGUAGES = 12  # of a task, in the tables


def write(directory, work: Work, counts: Mapping[str, Mapping]) -> None:
    """Writes the report from the scratch folder of `work`. `counts`: of each task, as in info.json."""
    report = make(work, counts)
    paths.write_json(paths.path(directory) / "hygiene.json", report)
    paths.write(paths.path(directory) / "hygiene.md", "\n".join(_markdown(report)) + "\n")


def make(work: Work, counts: Mapping[str, Mapping]) -> dict:
    """The report as a JSON-able dictionary."""
    return {
        "tasks": {name: _task(work, name, counts[name]) for name in work.tasks},
        "near duplicates": {group: _near(work, group) for group in work.near_groups()},
    }


def _task(work: Work, name: str, count: Mapping) -> dict:
    read = Counts.from_json(count["read"])
    dropped = {reason: number for reason, number in read.dropped.items() if number}
    result = {
        "rows": {"read": read.rows_read, **read.rows},
        "texts": {"made": read.made, "dropped": dropped, "kept": read.made - sum(dropped.values())},
        "examples": {"made": read.examples, **count["after"], "stored": count["examples"]},
    }
    if name in work.hygiene:
        findings = Findings()
        for marker in stream.markers(work, "map_shard", name):
            findings.add(Findings.from_json(marker["hygiene"]))
        result["hygiene"] = {f.name: getattr(work.hygiene[name], f.name) for f in dataclasses.fields(Hygiene)}
        result["hygiene"]["evaluation_sets"] = [str(item) for item in work.hygiene[name].evaluation_sets]
        if findings.languages:
            result["languages"] = dict(findings.languages.most_common())
            result["dropped languages"] = dict(findings.other.most_common())
        if work.hygiene[name].evaluation_sets:
            result["evaluation sets"] = _hits(work, name, findings)
    return result


def _hits(work: Work, name: str, findings: Findings) -> dict:
    """{set: what was found of it} of a task."""
    texts = paths.read_json(paths.path(work.index(name)) / "texts.json")
    located = findings.locations
    sets = {of: {"texts": Counter(), "found": Counter(), "examples of": []} for of, _, _ in texts}
    for of, part, _ in texts:
        sets[of]["texts"][part] += 1
    # Those with a location first.
    for owner, examples in sorted(findings.hits.items(), key=lambda hit: (hit[0] not in located, hit[0])):
        of, part, text = texts[owner]
        sets[of]["found"][part] += 1
        if len(named := sets[of]["examples of"]) < MAX_TEXTS:
            named.append({"part": part, "id": text, "examples": examples, "locations": located.get(owner, [])})
    return {of: {**about, "texts": dict(about["texts"]), "found": dict(about["found"])} for of, about in sets.items()}


def _near(work: Work, group: str) -> dict:
    """The tasks of a group of tasks, and some groups of near duplicates; the first of each stayed."""
    found = {}
    for marker in stream.markers(work, "map_near", group):
        for members in marker["groups"]:
            found.setdefault(tuple(members[0]), members)
    chosen = [found[first] for first in sorted(found, key=lambda first: first[2])[:MAX_GROUPS]]
    groups = [
        [{"task": task, "location": work.location(task, shard, number)} for task, shard, number in members]
        for members in chosen
    ]
    return {"tasks": work.near_groups()[group], "groups": groups}


def _markdown(report: Mapping) -> Iterator[str]:
    yield from ("# Hygiene of prepared data", "")
    yield "Rows are read from the source and make texts; texts make examples of tokens, a long document several."
    yield ""
    rows = []
    for name, task in report["tasks"].items():
        rows.append((name, "rows read", task["rows"]["read"]))
        rows += [("", what, number) for what, number in task["rows"].items() if number and what != "read"]
        rows.append(("", "**texts made**", task["texts"]["made"]))
        rows += [("", f"- {reason}", number) for reason, number in task["texts"]["dropped"].items()]
        rows.append(("", "**examples made**", task["examples"]["made"]))
        for reason, number in task["examples"].items():
            if number and reason not in ("made", "stored"):
                rows.append(("", f"{'+' if reason == stream.REPEATED else '-'} {reason}", number))
        rows.append(("", "**examples stored**", task["examples"]["stored"]))
    yield from _table(("task", "", "number"), rows)
    yield from ("## Evaluation sets", "")
    tasks = report["tasks"].items()
    found = [(name, of, about) for name, task in tasks for of, about in task.get("evaluation sets", {}).items()]
    if found:
        parts = ("queries", "corpus")
        yield from ("How many texts of each set occur in training examples, which were dropped.", "")
        rows = [
            (name, of, *(f"{about['found'].get(p, 0):,} of {about['texts'].get(p, 0):,}" for p in parts))
            for name, of, about in found
        ]
        yield from _table(("task", "set", *parts), rows)
        rows = [
            (name, of, f"{text['part']} {text['id']}", text["examples"], "; ".join(text["locations"]))
            for name, of, about in found
            for text in about["examples of"]
        ]
        yield from _table(("task", "set", "text", "examples", "where"), rows)
    else:
        yield from ("Not compared: `hygiene.evaluation_sets` is empty.", "")
    yield from ("## Near duplicates", "")
    if not report["near duplicates"]:
        yield from ("Not searched: `hygiene.near_duplicates` is 0.", "")
    for about in report["near duplicates"].values():
        tasks = ", ".join(about["tasks"])
        number = sum(report["tasks"][name]["examples"].get(stream.NEAR, 0) for name in about["tasks"])
        some = " Some groups, first the one that the others repeat:" if about["groups"] else ""
        yield from (f"{number:,} examples of {tasks} were dropped.{some}", "")
        for members in about["groups"]:
            yield "- " + "; ".join(f"{member['task']} {member['location']}" for member in members)
        yield ""
    yield from ("## Languages", "")
    rows = []
    for name, task in report["tasks"].items():
        if "languages" in task:
            first = list(task["languages"].items())
            shown = ", ".join(f"{language} {number:,}" for language, number in first[:MAX_LANGUAGES])
            rest = sum(number for _, number in first[MAX_LANGUAGES:])
            dropped = ", ".join(f"{language} {number:,}" for language, number in task["dropped languages"].items())
            rows.append((name, shown + (f", others {rest:,}" if rest else ""), dropped))
    if rows:
        yield from _table(("task", "identified", "dropped"), rows)
    else:
        yield from ("Not identified: `hygiene.language` is False.", "")


def _table(header: tuple, rows: list[tuple]) -> Iterator[str]:
    if not rows:
        return
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else _cell(cell) for cell in row) + " |"
    yield ""


def _cell(text: str) -> str:
    return f"{text}".replace("|", "\\|").replace("\n", " ")
