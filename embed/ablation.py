"""The work of `embed ablate`: variants of a config, each with several seeds, in one table.

    DIR/data/                 prepared data; data-DIGEST/ for variants that change them
    DIR/runs/VARIANT/SEED/    the run of a variant: its stages and its evaluation
    DIR/compiled/             jax's persistent compilation cache, of all runs
    DIR/ablation.json         [{"variant", "seed", "task", "metric", "value"}, …]
    DIR/ablation.md, .html    the table; DIR/plots/

config.ablation says what is compared. A run contains only what the compared checkpoint is made of. A stage that an
earlier run has with the same config is not trained again: the later run starts from its folder.
"""

import hashlib
import itertools
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

from ml_collections import ConfigDict

from embed import config as configs
from embed import distributed, fields, graph, nodes, paths
from embed.console import print_table, say
from embed.evaluation import ablated
from embed.runs import Run
from embed.training.metrics import FILE, read_metrics


class Variant(NamedTuple):
    """A run of an ablation."""

    name: str
    seed: int
    config: ConfigDict
    folder: object  # its workdir
    checkpoint: str  # what is evaluated: a name in the config, or the folder of a stage of an earlier run
    made_by: Mapping[str, str]  # {stage of the variant: the folder where it is}

    @property
    def parents(self) -> list[str]:
        """The folders of stages that earlier runs train."""
        return [folder for folder in self.made_by.values() if not folder.startswith(f"{self.folder}/")]


def variants(config: ConfigDict, workdir) -> list[Variant]:
    """The runs of an ablation, in order: the first seed of every variant, then the second. ValueError if it has none.

    Needs no data, and checks every config.
    """
    workdir, listed = paths.path(workdir), config.ablation.variants
    if not listed:
        raise ValueError("config.ablation.variants is empty: name variants, as the files of configs/ablations/ do")
    if not config.evaluations:
        raise ValueError("config.evaluations is empty: an ablation compares its variants in at least one evaluation")
    names = [name for name, _ in listed]
    if len({quote(name, safe="") for name in names}) < len(names):
        raise ValueError(f"config.ablation.variants has a name twice: {', '.join(names)}")
    made, found = {}, []
    data = {_digest(config.data.to_dict()): str(workdir / "data")}
    for seed in config.ablation.seeds:
        for name, changes in listed:
            changed = configs.changed(config, changes)
            changed.seed = seed
            checkpoint = changed.ablation.checkpoint
            _prune(changed, checkpoint)
            changed.data.directory = changed.data.directory or _data_folder(changed, workdir, data)
            folder = workdir / "runs" / quote(name, safe=" ,+") / f"{seed}"
            made_by = _share(changed, folder, made)
            if checkpoint not in (*changed.stages, *changed.merges):
                checkpoint = made_by[checkpoint]
            found.append(Variant(name, seed, changed, folder, checkpoint, made_by))
            fields.check(changed)
            graph.check(changed, whole=False)
            ablated.check_plot(config.ablation.plot, changed.evaluations)
    return found


def _prune(config: ConfigDict, checkpoint: str) -> None:
    """Keep the part of the graph that `checkpoint` is made of, and evaluate it in every evaluation."""
    if checkpoint not in (*config.stages, *config.merges):
        known = ", ".join([*config.stages, *config.merges])
        raise ValueError(f"config.ablation.checkpoint={checkpoint!r} must be one of {known}")
    kept: set[str] = set()
    left = [checkpoint]
    while left:
        name = left.pop()
        if name in kept:
            continue
        kept.add(name)
        if name in config.merges:
            left += config.merges[name].of
        elif name in config.stages:
            left.append(config.stages[name].init)
            left += nodes.mined_tasks(config, name)
        elif name in config.mining:
            left += [config.mining[name].checkpoint, config.mining[name].teacher]
    for part in ("stages", "merges", "mining"):
        for name in [name for name in config[part] if name not in kept]:
            del config[part][name]
    for each in config.merges.values():
        each.sweep = ()
    for each in config.evaluations.values():
        each.update(checkpoints=(checkpoint,), bm25=False)
    config.stage, config.exports = "", ConfigDict()
    config.report.update(denoise="", search="", fuse=(), baseline="")
    config.ablation.variants = ()


def _data_folder(config: ConfigDict, workdir, data: dict[str, str]) -> str:
    """The folder of a variant's data. `data` has those of the config and earlier variants, by what describes them."""
    key = _digest(config.data.to_dict())
    if key not in data:
        data[key] = str(workdir / f"data-{key[:8]}")
    return data[key]


def _share(config: ConfigDict, folder, made: dict[str, str]) -> dict[str, str]:
    """Replace the stages that earlier variants have by their folders; returns {stage: its folder}.

    `made` is {what a stage is made of: its folder} of all variants so far.
    """
    keys = {name: _key(config, name) for name in graph.order(config)}
    folders = {name: made.setdefault(key, str(folder / name)) for name, key in keys.items()}
    shared = {name: path for name, path in folders.items() if path != str(folder / name)}

    def moved(name: str) -> str:
        return shared.get(name, name)

    for name in shared:
        del config.stages[name]
    used = {task for name in config.stages for task in nodes.mined_tasks(config, name)}
    for name in [name for name in config.mining if name not in used]:
        del config.mining[name]
    for stage in config.stages.values():
        stage.init = moved(stage.init)
    for entry in config.mining.values():
        entry.update(checkpoint=moved(entry.checkpoint), teacher=moved(entry.teacher))
    for part, field in ((config.merges, "of"), (config.evaluations, "checkpoints")):
        for entry in part.values():
            entry[field] = tuple(moved(name) for name in entry[field])
    return folders


def _key(config: ConfigDict, name: str):
    """What a checkpoint is made of, as a digest. Anything outside the config is its own name."""
    if name in config.merges:
        entry = config.merges[name].to_dict()
        return _digest([entry | {"sweep": ()}, [_key(config, part) for part in entry["of"]]])
    if name not in config.stages:
        return name
    stage = config.stages[name].to_dict()
    mined = {task: config.mining[task].to_dict() for task in nodes.mined_tasks(config, name)}
    for entry in mined.values():
        entry.update({role: _key(config, entry[role]) for role in ("checkpoint", "teacher")})
    own = {field: value for field, value in stage.items() if field not in ("init", "execution")}
    parent = _key(config, stage["init"])
    return _digest([own, mined, parent, config.model.to_dict(), config.data.to_dict(), config.seed])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def ablate(config: ConfigDict, workdir, config_path: str, only: Sequence[str], command: str) -> None:
    """Run the variants of a config, or `only` those of some names, and write the table of all that are complete.

    `command` is shown in the table.
    """
    every = variants(config, workdir)
    chosen = _chosen(every, only)
    _check_parents(chosen, {str(variant.folder): variant for variant in every}, config_path)
    with Run(config, workdir, config_path).compilation_cache():
        for variant in chosen:
            say(f"{variant.name}, seed {variant.seed}")
            graph.walk(Run(variant.config, variant.folder, config_path), command)
            distributed.on_first_process(lambda: write(config, every, workdir, config_path, command))
    distributed.on_first_process(lambda: _show(config, every, workdir, config_path, command))


def _chosen(every: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """The variants of these names, by default all. ValueError if there is none of a name."""
    known = list(dict.fromkeys(variant.name for variant in every))
    if unknown := [name for name in only if name not in known]:
        near = configs.nearest(unknown[0], known)
        raise ValueError(f"--only={unknown[0]!r} must be one of {', '.join(map(repr, known))}{near}")
    return [variant for variant in every if not only or variant.name in only]


def _check_parents(chosen: Sequence[Variant], folders: Mapping[str, Variant], config_path: str) -> None:
    """ValueError if a chosen variant starts from a stage that is neither trained nor of a chosen variant."""
    running = {str(variant.folder) for variant in chosen}
    for variant in chosen:
        for folder in variant.parents:
            owner, _, stage = folder.rpartition("/")
            record = Run(folders[owner].config, owner, config_path).record(f"stage {stage}")
            if owner not in running and not record.exists():
                raise ValueError(
                    f"--only={variant.name!r} starts from the stage {stage!r} of {folders[owner].name!r} with seed "
                    f"{variant.seed}, which is not trained yet: add {folders[owner].name!r} to --only, or run it first"
                )


def commands(
    config: ConfigDict,
    workdir,
    config_path: str,
    only: Sequence[str] = (),
    options: Sequence[str] = (),
    launcher: str = "embed",
) -> Iterator[str]:
    """A command that prepares each folder of data, and one per variant, with a comment on which must end before it.

    `launcher` stands before the verb; {variant} in it is replaced by a name of letters, digits and dashes.
    """
    every = variants(config, workdir)
    where = [f"--config={config_path}", f"--workdir={workdir}", *options]
    chosen = _chosen(every, only)
    changes = dict(config.ablation.variants)
    prepared = {variant.config.data.directory: variant.name for variant in reversed(chosen)}
    for folder in dict.fromkeys(variant.config.data.directory for variant in chosen):
        if folder == str(paths.path(workdir) / "data"):
            yield f"embed prepare {shlex.join(where)}"
        elif folder != config.data.directory:  # the user's is prepared already
            own = [f"--config.{k}={v}" for k, v in changes[prepared[folder]].items() if k.startswith("data.")]
            yield f"embed prepare {shlex.join([*where, *own, f'--config.data.directory={folder}'])}"
    folders = {str(variant.folder): variant.name for variant in every}
    for name in dict.fromkeys(variant.name for variant in chosen):
        mine = [variant for variant in every if variant.name == name]
        parents = [folders[parent.rpartition("/")[0]] for variant in mine for parent in variant.parents]
        if earlier := [parent for parent in dict.fromkeys(parents) if parent != name]:
            yield f"# after {' and '.join(map(repr, earlier))}: the next command starts from stages of it"
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        yield f"{launcher.replace('{variant}', slug)} ablate {shlex.join([*where, f'--only={name}'])}"


def _show(config: ConfigDict, every: Sequence[Variant], workdir, config_path: str, command: str) -> None:
    results = write(config, every, workdir, config_path, command)
    if results:
        say(f"nDCG@10 in {ablated.FORM}")
        print_table(ablated.render(results, config.ablation.plot, [name for name, _ in config.ablation.variants]))
    say(f"Table: {paths.path(workdir) / 'ablation.html'}; {len(results)} of {len(every)} runs are complete")


def write(
    config: ConfigDict, every: Sequence[Variant], workdir, config_path: str, command: str
) -> list[ablated.Result]:
    """Write ablation.json and the table from the runs that are complete, and return their results."""
    found, names = [], {str(variant.folder): variant for variant in every}
    for variant in every:
        run = Run(variant.config, variant.folder, config_path)
        if all(graph.is_done(run, node) for node in graph.make_nodes(variant.config) if node.kind == "evaluate"):
            files = {task: nodes.record_file(run, variant.checkpoint, task) for task in variant.config.evaluations}
            records = {task: paths.read_json(file) for task, file in files.items()}
            found.append(ablated.Result(variant.name, variant.seed, records, _cost(variant, names, config_path)))
    missing = len(every) - len(found)
    with tempfile.TemporaryDirectory() as folder:
        order = [name for name, _ in config.ablation.variants]
        title = f"Ablation: {paths.path(config_path.partition(':')[0]).stem}"
        settings = dict(missing=missing, plot=config.ablation.plot, order=order, title=title)
        ablated.write(folder, found, command=command, **settings)
        for name, file in paths.files(folder).items():
            paths.copy_file(file, paths.path(workdir) / name)
    return found


def _cost(variant: Variant, folders: Mapping[str, Variant], config_path: str) -> dict[str, float]:
    """The seconds and the FLOPs of training a variant's stages, those of earlier runs included."""
    seconds, flops = 0.0, 0.0
    for folder in variant.made_by.values():
        owner, _, name = folder.rpartition("/")
        run = Run(folders[owner].config, owner, config_path)
        flops += paths.read_json(run.record(f"stage {name}"))["result"]["flops"]
        rows = list(read_metrics(paths.path(folder) / FILE))  # of all starts of the stage
        # The first step compiles, unless an earlier run has: the time of the next ones stands for it.
        seconds += min(rows[:2], key=lambda row: row["seconds_per_step"])["seconds_per_step"] * rows[0]["step"]
        for before, row in itertools.pairwise(rows):
            seconds += row["seconds_per_step"] * (row["step"] - before["step"])
    return {"seconds": seconds, "pflop": flops / 1e15}
