"""Walks the stage graph of a config in order and skips complete nodes.

    prepare ─ stages, each after its parent and what is mined for it ─ merges ─ evaluations ─ exports ─ report

Every node writes steps/NODE.json with its result, its seconds and what the result depends on. If that has changed, an
evaluation, merge or export is done again; a stage or mined negatives are refused.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from embed import distributed, exports, nodes, paths, runs
from embed.checkpoints import model_folder
from embed.checkpoints.provenance import made_with
from embed.config import differences
from embed.console import make_console, print_table, say
from embed.data.store import read_header
from embed.runs import Run
from embed.training.metrics import FILE, read_metrics


class Node(NamedTuple):
    """One step of a pipeline."""

    kind: str  # prepare, stage, mine, denoise, evaluate, merge, baselines, export or search
    of: str  # the name of its stage, merge, …; empty if a graph has at most one node of this kind
    work: Callable[[Run], dict]

    @property
    def name(self) -> str:
        """The kind and the name: distinct, and the same whatever else the graph contains."""
        return f"{self.kind} {self.of}" if self.of else self.kind


def order(config: ConfigDict) -> list[str]:
    """The stages, each after those that it starts from or is mined by. ValueError if they wait for each other."""
    waits = {
        stage: (runs.parents(config, stage) - {stage}).union(
            *(
                runs.parents(config, checkpoint)
                for task in nodes.mined_tasks(config, stage)
                for checkpoint in (config.mining[task].checkpoint, config.mining[task].teacher)
            )
        )
        for stage in config.stages
    }
    ordered: list[str] = []
    while len(ordered) < len(waits):
        ready = [stage for stage in waits if stage not in ordered and waits[stage] <= set(ordered)]
        if not ready:
            left = {stage: sorted(waits[stage] - set(ordered)) for stage in waits if stage not in ordered}
            raise ValueError(f"these stages wait for each other: {left}")
        ordered.append(ready[0])
    return ordered


def make_nodes(config: ConfigDict) -> Iterator[Node]:
    """Every node of a config's graph, in order."""

    def evaluation(name: str) -> Iterator[Node]:
        if any(name in e.checkpoints for e in config.evaluations.values()):
            yield Node("evaluate", name, lambda run: nodes.evaluate(run, name))

    yield Node("prepare", "", nodes.prepare)
    trained = {*config.stages, *config.merges}
    named = dict.fromkeys(name for e in config.evaluations.values() for name in e.checkpoints if name not in trained)
    for name in named:  # random init, and models that exist already
        yield from evaluation(name)
    mined: set[str] = set()
    for stage in order(config):
        for task in nodes.mined_tasks(config, stage):
            if task not in mined:
                yield Node("mine", task, functools.partial(nodes.mine, name=task))
            mined.add(task)
        yield Node("stage", stage, functools.partial(nodes.train_stage, name=stage))
        if stage == config.report.denoise:
            yield Node("denoise", stage, functools.partial(nodes.denoising, name=stage))
        yield from evaluation(stage)
    for name, entry in config.merges.items():
        if entry.sweep:
            yield Node("merge", name, functools.partial(nodes.merge_sweep, name=name))
        yield from evaluation(name)
    if any(e.bm25 for e in config.evaluations.values()):
        yield Node("baselines", "", nodes.evaluate_baselines)
    if config.exports:
        yield Node("export", "", exports.export_models)
    if config.report.search:
        yield Node("search", config.report.search, nodes.worked_search)


def inputs(run: Run, node: Node) -> dict:
    """What a node's result depends on. If it changes, the node is done again."""
    config, report_ = run.config, run.config.report

    def identity(name: str) -> dict:
        return run.checkpoint(name).identity

    if node.kind == "stage":
        return run.identity(node.of)
    result: dict = {"prepared": _prepared(run)}
    if node.kind == "mine":
        target = run.store_path(node.of)
        recorded = read_header(target)["info"]["inputs"] if (target / "info.json").exists() else None
        result |= nodes.mining_inputs(run, node.of, recorded)
    elif node.kind == "denoise":
        result |= {
            "checkpoint": identity(node.of),
            "report": [report_.texts, report_.mask_fraction, report_.tokens_per_step],
        }
        result |= _outside(run, [report_.texts])
    elif node.kind == "evaluate":
        evaluations = {
            name: [e.data, e.alone, e.rope_theta, e.truncate_dim, e.needle_tokens]
            for name, e in config.evaluations.items()
            if node.of in e.checkpoints
        }
        result |= {"evaluations": evaluations, "checkpoint": identity(node.of)}
        result |= _outside(run, [data for data, *_ in evaluations.values()])
    elif node.kind == "merge":
        entry = config.merges[node.of]
        result |= {"merge": entry.to_dict(), "of": [identity(name) for name in entry.of]}
        result |= _outside(run, entry.sweep_on)
    elif node.kind == "baselines":
        evaluations = {name: [e.data, e.alone, e.bm25] for name, e in config.evaluations.items()}
        result |= {"evaluations": evaluations, "fuse": {name: identity(name) for name in report_.fuse}}
        result |= _outside(run, [data for data, *_ in evaluations.values()])
    elif node.kind == "export":
        result |= {"exports": {name: [e.to_dict(), identity(e.checkpoint)] for name, e in config.exports.items()}}
        result |= {"card": config.card.to_dict(), "separator": config.data.separator, "evaluated": _evaluated(run)}
    elif node.kind == "search":
        entry = config.exports[report_.search]
        result |= {"export": [entry.to_dict(), identity(entry.checkpoint)], "texts": report_.texts}
        result |= _outside(run, [report_.texts])
    return json.loads(json.dumps(result))


def _outside(run: Run, names: Iterable[str]) -> dict:
    """What identifies the evaluation sets that are not in the prepared data."""
    found = nodes.outside(run, names)
    return {"sets": found} if found else {}


def _evaluated(run: Run) -> dict:
    """The inputs of the evaluations whose figures go into the cards of config.exports."""
    files = {e.checkpoint: run.record(f"evaluate {e.checkpoint}") for e in run.config.exports.values()}
    return {name: paths.read_json(file)["inputs"] for name, file in files.items() if file.exists()}


def _prepared(run: Run) -> str:
    """What identifies the prepared data."""
    info = run.data / "info.json"
    return json.dumps(paths.read_json(info)["arguments"], sort_keys=True) if info.exists() else ""


def check(config: ConfigDict, *, whole: bool = True) -> None:
    """ValueError before the work, if the graph names something that does not exist.

    Without `whole`, for one stage, paths may name folders that another command will write.
    """
    runs.check_names(config)
    nodes.check_mined(config, config.stages)
    order(config)
    named = set(config.stages) | set(config.merges) | {runs.RANDOM}
    for field, names in (
        *((f"stages.{n}.init", (s.init or runs.RANDOM,)) for n, s in config.stages.items()),
        *((f"merges.{n}.of", m.of) for n, m in config.merges.items()),
        *((f"exports.{n}.checkpoint", (e.checkpoint,)) for n, e in config.exports.items()),
        *((f"mining.{n}.checkpoint", (m.checkpoint,)) for n, m in config.mining.items()),
        *((f"mining.{n}.teacher", (m.teacher,)) for n, m in config.mining.items() if m.teacher),
        *((f"evaluations.{n}.checkpoints", e.checkpoints) for n, e in config.evaluations.items()),
    ):
        for name in names:
            if name not in named and not (not whole and "/" in name) and not _elsewhere(name):
                raise ValueError(
                    f"config.{field}={name!r} must be one of {', '.join(sorted(named))}, a folder or a hub id"
                )
    ranked = {name for e in config.evaluations.values() if e.bm25 for name in e.checkpoints}
    for name in config.report.fuse:
        if not all(name in e.checkpoints for e in config.evaluations.values() if e.bm25):
            raise ValueError(
                f"config.report.fuse={name!r} must be in the checkpoints of every evaluation with bm25; "
                f"evaluations have {', '.join(sorted(ranked)) or 'none'}"
            )
    if (name := config.report.baseline) and not any(name in e.checkpoints for e in config.evaluations.values()):
        raise ValueError(f"config.report.baseline={name!r} must be in the checkpoints of an evaluation")
    diffusion = [name for name, stage in config.stages.items() if stage.kind == "diffusion"]
    for field, what, group in (("denoise", "diffusion stage", diffusion), ("search", "export", config.exports)):
        if (name := config.report[field]) and name not in group:
            allowed = f"one of {', '.join(group)}" if group else f"empty, because the config has no {what}"
            raise ValueError(f"config.report.{field}={name!r} must be {allowed}")


def _elsewhere(name: str) -> bool:
    if not name:
        return False
    return runs.is_stage(name) or model_folder.is_model(name) or bool(model_folder.HUB_ID.fullmatch(name))


def is_done(run: Run, node: Node) -> bool:
    """Whether a node is complete: its steps/NODE.json has the present inputs, and what it wrote is there."""
    saved = _read_record(run, node)
    if saved is None:
        return False
    if not all(file.exists() for file in outputs(run, node)):
        return False
    if node.kind == "prepare":
        nodes.prepare(run)  # refuses data of another config
        return True
    if node.kind == "stage":
        return run.is_complete(node.of, run.identity(node.of))
    return runs.portable(saved["inputs"]) == runs.portable(inputs(run, node))


def outputs(run: Run, node: Node) -> list:
    """The files and folders besides its record that a node writes and later nodes or a user read."""
    if node.kind == "prepare":
        return [run.data / "info.json"]
    if node.kind == "mine":
        return [run.store_path(node.of) / "info.json"]
    if node.kind == "evaluate":
        names = [name for name, e in run.config.evaluations.items() if node.of in e.checkpoints]
        return [file(run, node.of, name) for name in names for file in (nodes.ranking, nodes.record_file)]
    if node.kind == "baselines":
        fused = [f"BM25 + {name}" for name in run.config.report.fuse]
        names = [name for name, e in run.config.evaluations.items() if e.bm25]
        return [nodes.record_file(run, baseline, name) for baseline in ("BM25", *fused) for name in names]
    if node.kind == "export":
        return [run.workdir / "export" / name for name in run.config.exports]
    return []


def outcome(run: Run, node: Node):
    """The path of a node's result."""
    return {
        "prepare": run.data,
        "stage": run.folder(node.of),
        "mine": run.store_path(node.of),
        "export": run.workdir / "export",
    }.get(node.kind, run.record(node.name))


def _why_again(run: Run, node: Node) -> str:
    """The end of a node's log line: why it is done again, and what it replaces."""
    saved = _read_record(run, node)
    folders = outputs(run, node) if node.kind == "export" else []
    replaced = [str(folder) for folder in folders if folder.exists()]
    why = ""
    if saved is not None and node.kind not in ("stage", "mine"):  # these are continued or refused
        changed = [name for name, *_ in differences(runs.portable(saved["inputs"]), runs.portable(inputs(run, node)))]
        why = f" again, since {', '.join(changed)} changed" if changed else " again, since its result is gone"
        replaced = replaced or [str(outcome(run, node))] * bool(changed)
    return f"{why}{': replaces ' if replaced else ''}{', '.join(replaced)}"


def walk(run: Run, command: str) -> None:
    """Do every node that is not yet complete, then write results.json and the report, with the command of the run.

    Process 0 alone reads and writes the records of the nodes and decides what is complete.
    """
    check(run.config)
    is_new = False
    with distributed.hold(run.workdir / "pipeline"):
        for node in make_nodes(run.config):
            if not distributed.on_first_process(functools.partial(_announce, run, node)):
                is_new = True
                start = time.perf_counter()
                result = node.work(run)
                taken = time.perf_counter() - start
                distributed.on_first_process(functools.partial(_write_record, run, node, result, taken))
            if node.kind == "prepare":
                nodes.check_data(run, run.config.stages)
                nodes.check_sets(run)
        distributed.on_first_process(functools.partial(_report, run, is_new, command))


def _announce(run: Run, node: Node) -> bool:
    """`is_done`, after a line about it in the log."""
    if is_done(run, node):
        say(f"{node.name} is complete: {outcome(run, node)}")
        return True
    say(f"{node.name}{_why_again(run, node)}")
    return False


def _write_record(run: Run, node: Node, result: Mapping, seconds: float) -> None:
    record = {"result": result, "seconds": seconds, "inputs": inputs(run, node), **made_with()}
    paths.write_json(run.record(node.name), record)


def _read_record(run: Run, node: Node) -> dict | None:
    file = run.record(node.name)
    return paths.read_json(file) if file.exists() else None


def _total(run: Run, machine: str, command: str) -> dict:
    """The content of results.json."""
    all_nodes = list(make_nodes(run.config))
    records = {node.name: _read_record(run, node) for node in all_nodes}
    sources, results = list(records.values()), {name: record["result"] for name, record in records.items()}

    def of(kind: str) -> dict:
        return {node.of: results[node.name] for node in all_nodes if node.kind == kind}

    data = dict(results["prepare"])
    for task, counts in of("mine").items():
        data |= {f"mined ({task}): {name}": count for name, count in counts.items()}
    total = {
        "command": command,
        "machine": machine,
        # Of the first node; "commits" shows whether another state of the code continued the run.
        **{key: sources[0][key] for key in ("commit", "versions", "device")},
        "commits": sorted({source["commit"] for source in sources}),
        "checkpoints": of("evaluate") | results.get("baselines", {}),
        "evaluations": {name: _about_evaluation(e) for name, e in run.config.evaluations.items()},
    }
    for part in of("denoise").values():
        total |= part
    if merges := of("merge"):
        total["merges"] = merges
    for part in of("search").values():
        total["search"] = part
    logged = {stage: read_metrics(run.folder(stage) / FILE) for stage in of("stage")}
    return total | {
        "stages": {
            name: {"kind": run.config.stages[name].kind, "init": run.config.stages[name].init} for name in logged
        },
        "seconds": {name: round(record["seconds"], 1) for name, record in records.items()},
        "seconds_per_step": {f"stage {name}": rows[-1]["seconds_per_step"] for name, rows in logged.items() if rows},
        "data": data,
    }


def _about_evaluation(entry: ConfigDict) -> str:
    """What an evaluation measures, in words."""
    how = "each chunk encoded by itself" if entry.alone else "chunks encoded in their document"
    if entry.needle_tokens:
        how = f"hidden in texts of {entry.needle_tokens:,} tokens"
    parts = [entry.data, how]
    parts += [f"{entry.truncate_dim} dimensions"] if entry.truncate_dim else []
    return ", ".join(parts + ([f"RoPE base {entry.rope_theta:g}"] if entry.rope_theta else []))


def _report(run: Run, is_new: bool, command: str) -> None:
    """Write and print the results. The speed of the machine is measured only if something was computed (`is_new`)."""
    from embed.evaluation import compare, report

    console, file = make_console(), run.workdir / "results.json"
    here = machine() if is_new or not file.exists() else paths.read_json(file)["machine"]
    total, baseline = _total(run, here, command), ""
    paths.write_json(file, total)
    if total["checkpoints"]:
        metrics = {node.of: run.folder(node.of) / FILE for node in make_nodes(run.config) if node.kind == "stage"}
        with tempfile.TemporaryDirectory() as folder:
            models = [model for model in compare.read([run.workdir])[0] if model.label in total["checkpoints"]]
            if baseline := run.config.report.baseline:
                total["differences"] = compare.differences(models, baseline)
                paths.write_json(file, total)
            report.write_report(folder, total, metrics, models, baseline)
            for name, made in paths.files(folder).items():
                paths.copy_file(made, run.workdir / name)
        print_table(report.render_table(total))
        for name, merge in total.get("merges", {}).items() if baseline else ():
            say(f"{name}: nDCG@10 in float32 at each ratio; {report.about_sweep(merge)}")
            print_table(report.render_sweep(merge))
        if baseline:
            say(f"nDCG@10 in {total['differences']['form']} against the baseline {baseline}, with 95% intervals")
            print_table(report.render_differences(total["differences"]))
    if search := total.get("search"):
        console.print(f"[bold]embed search[/bold]: {search['query']}")
        for hit in search["hits"]:
            line = f"  {hit['rank']}  {hit['score']:.3f}  {hit['id']}  {hit['text']}"
            console.print(line, markup=False, highlight=False)
    exported = ", ".join(str(run.workdir / "export" / name) for name in run.config.exports)
    summary = f"{sum(total['seconds'].values()):.0f} s in total on {total['machine']}."
    summary += f" Report: {run.workdir / 'report.html'}" + (f"; models: {exported}" if exported else "")
    console.print(summary)


def machine() -> str:
    """The devices and cores of this machine, in words; of CPUs also their speed, which seconds depend on."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return (
            f"{os.cpu_count()} CPU cores, {os.uname().machine}, {product_rate():.0f} GFLOP/s in a 2048³ float32 product"
        )
    return f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores, {os.uname().machine}"


@functools.cache
def product_rate(size: int = 2048) -> float:
    """GFLOP/s of a float32 product of two square matrices of `size`, the fastest of five."""
    matrix, product, seconds = jnp.ones((size, size)), jax.jit(jnp.matmul), []
    product(matrix, matrix).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9
