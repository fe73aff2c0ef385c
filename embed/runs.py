"""A workdir: its stages, what identifies them, and the checkpoints that something can start from.

    RUN/STAGE/config.json    what the stage's result depends on, with its parent's folder, step and digest
    RUN/STAGE/run.json       what computed it: commit, versions, mesh
    RUN/STAGE/checkpoints/   and metrics.jsonl, tensorboard/
    RUN/mining/NAME/         a store of mined negatives
    RUN/data/                prepared data, unless config.data.directory names another folder

A stage owns its folder from its first checkpoint on. Any run may start from it by its path.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from embed import config as configs
from embed import inference, paths, tokenizers
from embed.checkpoints import merge, model_folder, training_state
from embed.data.store import Store, read_header
from embed.inference import Encoder
from embed.models import sharding, transformer
from embed.training import stages

RANDOM = "random init"
RESERVED = ("data", "mining", "export", "rankings", "steps", "plots", RANDOM)  # names in a workdir that no stage may have
NOT_IDENTITY = ("init", "init_step", "curriculum", "execution")  # of a stage's config: said by parent and phases, or no matter
# How to compute is the reader's choice; the output layer is the diffusion stage's alone.
ARCHITECTURE = [
    field.name
    for field in dataclasses.fields(transformer.TransformerConfig)
    if field.name not in ("attention", "dtype", "remat", "unroll", "dense_barrier", "tied")
]


class UnfinishedError(ValueError):
    """A stage that something would start from has not reached its last step."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters that something starts from, and what identifies them."""

    name: str  # as the config or the command line has it
    identity: dict  # folder, step and digest; of a random init its seed; of a merge those of its two parents and the ratio
    model: transformer.TransformerConfig
    load: Callable  # shardings -> parameters
    tokenizer: dict | None = None  # `tokenizer_identity`; None fits any
    left_shift: bool = False  # whether a token is predicted from the state before it
    separator: bool | None = None  # whether a separator stands between chunks; None: not said
    matryoshka: tuple[int, ...] = ()  # prefixes trained
    of: tuple[str, ...] = ()  # of a merge: the names of the two
    config: dict = dataclasses.field(default_factory=dict)  # of a stage: its config.json
    load_tokenizer: Callable | None = None  # of a stage folder or model folder: the tokenizer that stands in it
    settings: dict = dataclasses.field(default_factory=dict)  # of a model folder: separator, contextual, max_length
    provenance: dict = dataclasses.field(default_factory=dict)  # of a model folder: what its card tells

    def params(self, shardings=None) -> dict:
        """The parameters, laid out by `shardings`, on the first local device without.

        An output layer that `shardings` does not know lies as the embedding table does.
        """
        if shardings is not None and not self.model.tied and "head" not in shardings:
            shardings = shardings | {"head": shardings["embedding"]}
        return self.load(shardings)


class Run:
    """A config and its workdir. Making one writes nothing."""

    def __init__(self, config: ConfigDict, workdir, config_path: str = ""):
        if str(workdir).startswith("s3://"):
            raise ValueError(f"workdir {workdir} must be a folder or gs://: checkpoints are not written to s3://")
        self.config, self.workdir, self.config_path = config, paths.path(workdir), config_path
        check_names(config)

    @property
    def data(self):
        """The folder of the prepared data."""
        return paths.path(self.config.data.directory) if self.config.data.directory else self.workdir / "data"

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Of the prepared data."""
        self._check_prepared()
        return tokenizers.load(self.data / "tokenizer")

    def _check_prepared(self) -> None:
        if not (self.data / "mixtures.json").exists():
            raise FileNotFoundError(f"{self.data} holds no prepared data; run `embed prepare` with this config and workdir")

    @cached_property
    def model(self) -> transformer.TransformerConfig:
        """The run's model; a contrastive stage's has no output layer (`stages.stage_model`)."""
        needed = max(self.tokenizer.vocab_size, self.tokenizer.mask_id + 1)
        if 0 < self.config.model.vocab_size < needed:
            raise ValueError(
                f"config.model.vocab_size={self.config.model.vocab_size} is too small: tokenizer and mask need {needed} rows"
            )
        return transformer.from_config(self.config.model, self.config.execution, needed)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(**self.config.execution.mesh)

    def shardings(self, model: transformer.TransformerConfig):
        """Of a model's parameters over the run's mesh."""
        return sharding.parameter_shardings(self.mesh, transformer.abstract_params(model))

    @cached_property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """{mixture: {task: rate}} of the prepared data."""
        self._check_prepared()
        return paths.read_json(self.data / "mixtures.json")

    def folder(self, stage: str):
        """The folder of a stage of this run."""
        return self.workdir / stage

    def store_path(self, task: str):
        """The folder of the prepared examples of a task, or of mined ones."""
        return self.workdir / "mining" / task if task in self.config.mining else self.data / "tasks" / task

    def store(self, task: str) -> Store:
        """The prepared examples of a task, or mined ones."""
        return Store(self.store_path(task))

    def phases(self, stage: str) -> list[tuple[int, dict[str, float]]]:
        """[(steps, {task: rate}), …] of a stage's curriculum."""
        phases = []
        for steps, mixture in self.config.stages[stage].curriculum:
            if isinstance(mixture, str):
                rates = {mixture: 1.0} if mixture in self.config.mining else self.mixtures.get(mixture)
            else:
                rates = dict(mixture)
            if not rates:
                known = ", ".join([*self.mixtures, *self.config.mining])
                raise ValueError(f"stage {stage}: no mixture {mixture!r}; there are {known}")
            phases.append((int(steps), rates))
        if not sum(steps for steps, _ in phases):
            raise ValueError(f"stage {stage}: curriculum={self.config.stages[stage].curriculum} has no steps")
        return phases

    def steps(self, stage: str) -> int:
        """Of a stage's curriculum."""
        return sum(int(steps) for steps, _ in self.config.stages[stage].curriculum)

    def encoder(self, checkpoint: "Checkpoint", *, params=None, max_length: int = 0) -> Encoder:
        """A checkpoint as an encoder over all devices; `params` are its parameters where they lie on the run's mesh already."""
        model = dataclasses.replace(checkpoint.model, tied=True)
        params = checkpoint.params(self.shardings(model)) if params is None else params
        return Encoder(
            transformer.encoder_only(model, params)[1], model, self.tokenizer, separator=self.config.data.separator,
            max_length=max_length or None, mesh=self.mesh,
        )  # fmt: skip

    # --- checkpoints ---------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str, step: int = 0) -> Checkpoint:
        """`random init`, a merge or stage of this run, a stage folder of another, a model folder or a hub id.

        UnfinishedError for a stage that has not reached its last step, unless `step` names one of its checkpoints.
        """
        if step and (name in (RANDOM, "", *self.config.merges)):
            raise ValueError(f"step {step} of {name or RANDOM}: only a stage has steps")
        if name in (RANDOM, ""):
            return Checkpoint(RANDOM, {"random init": self.config.seed}, self.model, self._random_params)
        if name in self.config.merges:
            return self._merged(name)
        if name in self.config.stages:
            return stage_checkpoint(self.folder(name), step, self.config.execution, name)
        return find(name, step, self.config.execution, [RANDOM, *self.config.stages, *self.config.merges])

    def _random_params(self, shardings):
        make = jax.jit(transformer.init, static_argnums=0, out_shardings=shardings)
        return make(self.model, jax.random.key(self.config.seed))

    def _merged(self, name: str) -> Checkpoint:
        config = self.config.merges[name]
        a, b = (self.checkpoint(part) for part in config.of)
        return merged(name, a, b, config.ratio)

    def check_start(self, stage: str, parent: Checkpoint) -> None:
        """Raise a ValueError that lists how a stage's model or tokenizer differ from those of what it starts from."""
        if parent.name == RANDOM:
            return
        ours = stages.stage_model(self.config.stages[stage].kind, self.model)
        problems = [
            f"config.model.{name} is {getattr(ours, name)!r}, the checkpoint's {getattr(parent.model, name)!r}"
            for name in ARCHITECTURE
            if getattr(ours, name) != getattr(parent.model, name)
        ]
        # An output layer that is not needed is left behind.
        if self.config.stages[stage].kind == "diffusion" and ours.tied != parent.model.tied:
            problems.append(f"config.model.tied is {ours.tied}, the checkpoint's {parent.model.tied}")
        if parent.tokenizer:
            mine = tokenizer_identity(self.tokenizer)
            problems += [
                f"the run's tokenizer has {name} {mine[name]}, the checkpoint's {value}"
                for name, value in parent.tokenizer.items()
                if mine[name] != value
            ]
        if problems:
            raise ValueError(f"stage {stage} cannot start from {parent.name}: " + "; ".join(problems))

    def check_sources(self) -> None:
        """`check_start` as far as it goes before there are data: the model folders and hub ids that stages start from."""
        for name, stage in self.config.stages.items():
            if not stage.init or stage.init in (RANDOM, *self.config.stages, *self.config.merges) or is_stage(stage.init):
                continue
            found, model = model_folder.open_model(stage.init), self.config.model
            fields = [n for n in ARCHITECTURE if n != "vocab_size" or model.vocab_size] + ["tied"] * (stage.kind == "diffusion")
            problems = [
                f"config.model.{n} is {model[n]!r}, the checkpoint's {getattr(found.config, n)!r}"
                for n in fields
                if model[n] != getattr(found.config, n)
            ]
            if problems:
                raise ValueError(f"stage {name} cannot start from {stage.init}: " + "; ".join(problems))

    # --- what a stage's result depends on ------------------------------------------------------------------------------

    def identity(self, stage: str) -> dict:
        """config.json of a stage: what its result depends on.

        A stage that has begun keeps its parent on record when that is gone.
        """
        config, folder = self.config.stages[stage], self.folder(stage)
        begun = bool(training_state.steps(folder / "checkpoints"))
        try:
            parent = self.checkpoint(config.init, config.init_step)
            self.check_start(stage, parent)
            origin, shifted = parent.identity, parent.left_shift
        except FileNotFoundError:
            if not begun:
                raise
            recorded = paths.read_json(folder / "config.json")
            origin, shifted = recorded["parent"], recorded.get("left_shift", False)
        phases = self.phases(stage)
        found = {
            "stage": {name: value for name, value in config.to_dict().items() if name not in NOT_IDENTITY},
            "phases": phases,
            "model": {
                name: getattr(stages.stage_model(config.kind, self.model), name) for name in [*ARCHITECTURE, "tied", "dtype"]
            },
            "seed": self.config.seed,
            "data": {task: read_header(self.store_path(task))["digest"] for task in sorted({task for _, rates in phases for task in rates})},
            "tokenizer": tokenizer_identity(self.tokenizer),
            "separator": self.config.data.separator,
            "parent": origin,
        }
        if config.kind == "diffusion":
            found["left_shift"] = self._left_shift(stage, shifted)
        return json.loads(json.dumps(found))

    def _left_shift(self, stage: str, of_parent: bool) -> bool:
        """Whether a diffusion stage predicts from the state before: as the config says, or as its parent did."""
        asked = self.config.stages[stage].left_shift
        if asked not in ("auto", "True", "False"):
            raise ValueError(f"config.stages.{stage}.left_shift={asked!r} must be auto, True or False")
        return of_parent if asked == "auto" else asked == "True"

    def is_complete(self, stage: str, identity: Mapping) -> bool:
        """Whether a stage has reached its last step. ValueError where its folder is another config's."""
        folder = self.folder(stage)
        done = training_state.steps(folder / "checkpoints")
        if done:
            check_identity(folder, stage, identity)
        return self.steps(stage) in done


def check_names(config: ConfigDict) -> None:
    """Refuse a graph with a name that is taken or unknown, or in which a stage starts from itself."""
    groups = {part: list(config[part]) for part in ("stages", "mining", "merges")}
    for part, names in groups.items():
        for name in names:
            others = [p for p in groups if p != part and name in groups[p]]
            if name in RESERVED or "/" in name or name.startswith("."):
                raise ValueError(f"config.{part}.{name}: the name must have no slash and be none of {', '.join(RESERVED)}")
            if others:
                raise ValueError(f"config.{part}.{name}: config.{others[0]} has that name too")
    if config.stage and config.stage not in config.stages:
        raise ValueError(f"config.stage={config.stage!r} must be one of {', '.join(config.stages)}")
    for name in config.stages:
        seen, current = [name], config.stages[name].init
        while current in config.stages:
            if current in seen:
                raise ValueError(f"config.stages.{name}.init leads back to {current!r}: {' <- '.join([*seen, current])}")
            seen.append(current)
            current = config.stages[current].init


def is_stage(folder) -> bool:
    """Whether a folder is that of a stage."""
    folder = paths.path(folder)
    try:
        return "phases" in paths.read_json(folder / "config.json") and (folder / "checkpoints").exists()
    except (OSError, ValueError, TypeError):
        return False


def find(source: str, step: int = 0, execution: Mapping | None = None, others=()) -> Checkpoint:
    """A stage folder, model folder or hub id as a checkpoint; `others` are names that would have been right as well."""
    if is_stage(source):
        return stage_checkpoint(paths.path(source), step, execution, source)
    if model_folder.is_model(source) or model_folder.HUB_ID.fullmatch(source):
        if step:
            raise ValueError(f"step {step} of {source}: a model folder has no steps")
        return model_checkpoint(source, execution)
    expected = ", ".join([*others, "a stage folder", "a model folder", "a hub id owner/name"])
    raise FileNotFoundError(f"{source!r} is no checkpoint: expected one of {expected}")


def stage_checkpoint(folder, step: int, execution, name: str = "") -> Checkpoint:
    """The checkpoint of `step` in a stage folder, the last one for 0; see `Run.checkpoint`."""
    name, done = name or str(folder), training_state.steps(folder / "checkpoints")
    if not done:
        raise FileNotFoundError(f"{folder} holds no checkpoint: train stage {name} first")
    config = paths.read_json(folder / "config.json")
    total = sum(steps for steps, _ in config["phases"])
    if step and step not in done:
        raise ValueError(f"{name} has no checkpoint of step {step}; there are {', '.join(map(str, done))}")
    if not step and total not in done:
        raise UnfinishedError(
            f"{name} has not finished: its last checkpoint is step {done[-1]} of {total}. Train it to the end, or name a step "
            f"(init_step or --step): {', '.join(map(str, done))}"
        )
    step = step or total
    model = transformer.from_config(config["model"], execution)

    def load(shardings):
        abstract = transformer.abstract_params(model)
        if shardings is not None:
            abstract = sharding.with_sharding(abstract, shardings)
        return training_state.load_params(folder / "checkpoints", step, abstract)

    return Checkpoint(
        name, {"folder": str(folder), "step": step, "digest": training_state.digest(folder / "checkpoints", step)}, model, load,
        tokenizer=config["tokenizer"], left_shift=config.get("left_shift", False), separator=config["separator"],
        matryoshka=tuple(config["stage"].get("matryoshka", ())), config=config,
        load_tokenizer=lambda: tokenizers.load(folder / "tokenizer"),
    )  # fmt: skip


def model_checkpoint(source: str, execution) -> Checkpoint:
    """A model folder or hub id as a checkpoint; its weights go straight into their shards."""
    found = model_folder.open_model(source)
    model = transformer.from_config(dataclasses.asdict(found.config), execution)
    return Checkpoint(
        source, {"folder": str(source), "step": 0, "digest": found.digest}, model, found.params,
        # Which id is the mask is the run's choice where the folder does not say it.
        tokenizer={"digest": found.tokenizer().digest}, left_shift=found.causal,
        separator=None if found.causal else found.embedding["separator"], matryoshka=tuple(found.embedding["matryoshka"]),
        load_tokenizer=found.tokenizer, provenance=found.provenance,
        settings={} if found.causal else {n: found.embedding[n] for n in ("separator", "contextual", "max_length")},
    )  # fmt: skip


def merged(name: str, a: Checkpoint, b: Checkpoint, ratio: float) -> Checkpoint:
    """The slerp of two checkpoints, made leaf by leaf: beside the two no third tree is held."""
    problems = [
        f"{what} {left!r} and {right!r}"
        for what, left, right in configs.differences(
            {**{n: getattr(a.model, n) for n in ARCHITECTURE}, "tokenizer": a.tokenizer},
            {**{n: getattr(b.model, n) for n in ARCHITECTURE}, "tokenizer": b.tokenizer},
        )
    ]
    if problems:
        raise ValueError(f"cannot merge {a.name} and {b.name}: " + "; ".join(problems))

    def load(shardings):
        left, right = (transformer.encoder_only(x.model, x.params(shardings))[1] for x in (a, b))
        return merge.merge_params(left, right, ratio, shardings or jax.tree.map(lambda x: x.sharding, left))

    model = dataclasses.replace(a.model, tied=True)
    prefixes = a.matryoshka if a.matryoshka == b.matryoshka else tuple(p for p in a.matryoshka if p in b.matryoshka)
    return Checkpoint(
        name, {"merge": [a.identity, b.identity], "ratio": ratio}, model, load, tokenizer=a.tokenizer,
        separator=a.separator, matryoshka=prefixes, of=(a.name, b.name),
    )  # fmt: skip


def over_all_devices(model: transformer.TransformerConfig):
    """Shardings of a model's parameters over all devices of all processes: none holds a whole one."""
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    return sharding.parameter_shardings(mesh, transformer.abstract_params(model))


def load_encoder(source: str, step: int = 0) -> Encoder:
    """A model folder, hub id or stage folder as an encoder over all devices; see `Run.checkpoint` for `step`."""
    if not is_stage(source):
        if step:
            raise ValueError(f"step {step} of {source}: only a stage folder has steps")
        return inference.load(source)
    found = stage_checkpoint(paths.path(source), step, None, source)
    model = dataclasses.replace(found.model, tied=True)
    if jax.default_backend() == "cpu":
        model = dataclasses.replace(model, dtype="float32")
    mesh = sharding.make_mesh()
    params = found.params(sharding.parameter_shardings(mesh, transformer.abstract_params(model)))
    return Encoder(
        transformer.encoder_only(model, params)[1], model, found.load_tokenizer(), separator=found.separator, mesh=mesh,
        matryoshka=found.matryoshka, path=source, digest=found.identity["digest"],
    )  # fmt: skip


def tokenizer_identity(tokenizer: tokenizers.Tokenizer) -> dict:
    """What tells a tokenizer and its control tokens from others."""
    return {"digest": tokenizer.digest, "mask_id": tokenizer.mask_id, "separator_id": tokenizer.separator_id}


def check_identity(folder, stage: str, identity: Mapping) -> None:
    """ValueError that names every field, with both values, in which a stage's folder and a config differ.

    Where its parent lies is no difference: step and digest tell what it is.
    """

    def comparable(found):
        return json.loads(json.dumps(found), object_hook=lambda x: {k: v for k, v in x.items() if k != "folder"})

    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds checkpoints but no config.json: use another workdir, or remove it")
    found = list(configs.differences(comparable(paths.read_json(file)), comparable(identity)))
    if found:
        named = "; ".join(
            f"{name.replace('stage.', f'stages.{stage}.', 1) if name.startswith('stage.') else name} was {was!r}, now {now!r}"
            for name, was, now in found
        )
        raise ValueError(f"{folder} was trained with another config: {named}. Use its config, another workdir or another name")


@contextlib.contextmanager
def hold(folder) -> Iterator[None]:
    """`paths.lock` of process 0, for all processes of the job."""
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(paths.lock(folder))
            except paths.BusyError as caught:
                error = caught
        if jax.process_count() > 1 and multihost_utils.process_allgather(error is not None).any():
            error = error or paths.BusyError(f"{folder} is in use by another process")
        if error:
            raise error
        yield


def agreed(flag: bool) -> bool:
    """The flag of process 0: what one process sees in a folder another may see a moment later."""
    return bool(multihost_utils.broadcast_one_to_all(flag)) if jax.process_count() > 1 else flag


def write_json(file, value) -> None:
    """`paths.write_json`, by process 0 alone."""
    if jax.process_index() == 0:
        paths.write_json(file, value)


def lineage(checkpoint: Checkpoint) -> list[dict]:
    """The stages that made a checkpoint, the first one first: name, kind, steps, mixtures, and parent of each.

    It ends where a folder is gone, which its parent's identity still names.
    """
    found = []

    def visit(identity: Mapping, name: str = ""):
        for parent in identity.get("merge", ()):
            visit(parent)
        folder = identity.get("folder")
        if not folder or not is_stage(folder):
            return
        config = paths.read_json(paths.path(folder) / "config.json")
        visit(config["parent"])
        row = {
            "name": name or paths.path(folder).name, "folder": folder, "kind": config["stage"]["kind"],
            "phases": config["phases"], "step": identity["step"], "digest": identity["digest"], "parent": config["parent"],
        }  # fmt: skip
        if row["folder"] not in [other["folder"] for other in found]:
            found.append(row)

    visit(checkpoint.identity)
    return found
