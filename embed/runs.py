"""A workdir: its stages, their identities, and the checkpoints that something can start from.

    RUN/STAGE/config.json    what the stage's result depends on, with its parent's folder, step and digest
    RUN/STAGE/run.json       how it was computed: commit, versions, mesh
    RUN/STAGE/checkpoints/   and metrics.jsonl, tensorboard/
    RUN/mining/NAME/         a store of mined negatives
    RUN/data/                prepared data, unless config.data.directory names another folder
    RUN/compiled/            jax's persistent compilation cache

A stage owns its folder from its first checkpoint on. Any run may start from it, given its path.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from urllib.parse import quote

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from embed import config as configs
from embed import fields, inference, paths, tokenizers
from embed.checkpoints import merge, model_folder, training_state
from embed.data.store import Store, read_header
from embed.inference import Encoder
from embed.models import sharding, transformer
from embed.training import stages

RANDOM = "random init"
# Names in a workdir that no stage may have.
RESERVED = ("data", "mining", "export", "rankings", "steps", "plots", "pipeline", "compiled", RANDOM)
# Fields of a stage's config that parent and phases stand for, or that do not change the result.
NOT_IDENTITY = ("init", "init_step", "curriculum", "execution")
# Without the fields that say how to compute, and without those that stages decide (`stages.stage_model`).
OF_STAGES = ("tied", "token_dimensions", "causal")
ARCHITECTURE = [
    field.name
    for field in dataclasses.fields(transformer.TransformerConfig)
    if field.name not in ("attention", "dtype", "remat", "unroll", "dense_barrier", *OF_STAGES)
]


class MissingCheckpointError(FileNotFoundError):
    """A named checkpoint does not exist."""


class UnfinishedError(ValueError):
    """The stage to start from has not reached its last step."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters to start from, and what identifies them."""

    name: str  # as in the config or on the command line
    # Folder, step and digest. A random init has its seed, a merge the identities of its two parents and the ratio.
    identity: dict
    model: transformer.TransformerConfig
    load: Callable  # shardings -> parameters
    load_tokenizer: Callable  # () -> its tokenizer
    tokenizer: dict  # the known fields of `tokenizer_identity`
    separator: bool  # whether a separator token stands between the chunks of a document
    max_length: int | None = None  # tokens of the longest text
    context_length: int | None = None  # tokens of the longest document in training
    contextual: bool = False  # whether it is made for chunks in their document
    tanh: bool = False  # whether its float32 vectors are tanh(v)
    pooling: str = "mean"  # of `pool_spans`
    language_model: bool = False  # whether it is a causal language model, not an encoder
    diffusion: bool = False  # whether it is of a diffusion stage, which predicts masked tokens
    left_shift: bool = False  # whether a token is predicted from the state before it
    matryoshka: tuple[int, ...] = ()  # prefixes trained
    of: tuple[str, ...] = ()  # the two names of a merge
    provenance: dict | None = None  # of a model folder, as in its card
    not_exported: tuple[str, ...] = ()  # settings that an export leaves out

    def check_encoder(self) -> None:
        """ValueError for a causal language model: its vectors mean nothing."""
        if self.language_model:
            raise ValueError(f"{self.name} is a causal language model, not an encoder: a stage can start from it")

    def params(self, shardings=None) -> dict:
        """The parameters, laid out by `shardings`; without it, on the first local device.

        An output layer that is missing in `shardings` is laid out like the embedding table, a projection like a norm.
        """
        if shardings is not None:
            like = {"head": "embedding", "projection": "norm"}
            own = transformer.abstract_params(self.model)
            shardings = {name: shardings[name if name in shardings else like[name]] for name in own}
        return self.load(shardings)


class Run:
    """A config and its workdir. The constructor writes nothing."""

    def __init__(self, config: ConfigDict, workdir, config_path: str = ""):
        if str(workdir).startswith("s3://"):
            raise ValueError(f"workdir {workdir} must be a folder or gs://: checkpoints are not written to s3://")
        self.config, self.workdir, self.config_path = config, paths.path(workdir), config_path
        check_folder(f"--workdir={workdir}", workdir)
        self._checkpoints: dict[tuple[str, int], Checkpoint] = {}
        fields.check(config)
        check_names(config)
        if config.data.directory:
            check_folder(f"config.data.directory={config.data.directory!r}", config.data.directory)

    @property
    def data(self):
        """The folder with the prepared data."""
        return paths.path(self.config.data.directory) if self.config.data.directory else self.workdir / "data"

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer of the prepared data."""
        self._check_prepared()
        return tokenizers.load(self.data / "tokenizer")

    def _check_prepared(self) -> None:
        if not (self.data / "mixtures.json").exists():
            raise FileNotFoundError(
                f"{self.data} holds no prepared data: run `embed prepare` with this config and workdir"
            )

    @cached_property
    def model(self) -> transformer.TransformerConfig:
        """The run's model. In contrastive stages it has no output layer (`stages.stage_model`)."""
        needed = max(self.tokenizer.vocab_size, self.tokenizer.mask_id + 1)
        masks = any(stage.kind == "diffusion" for stage in self.config.stages.values())  # other stages see no mask
        least = needed if masks else self.tokenizer.vocab_size
        if 0 < self.config.model.vocab_size < least:
            raise ValueError(
                f"config.model.vocab_size={self.config.model.vocab_size} is too small: "
                f"tokenizer{' and mask' * masks} need {least} rows"
            )
        return transformer.from_config(self.config.model, self.config.execution, needed)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(**self.config.execution.mesh)

    def shardings(self, model: transformer.TransformerConfig):
        """The shardings of a model's parameters over the run's mesh."""
        return sharding.parameter_shardings(self.mesh, transformer.abstract_params(model))

    @cached_property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """{mixture: {task: rate}} of the prepared data."""
        self._check_prepared()
        return paths.read_json(self.data / "mixtures.json")

    def folder(self, stage: str):
        """The folder of a stage of this run."""
        return self.workdir / stage

    def record(self, node: str):
        """The file with the result of a node of the graph; the name may contain a path or hub id."""
        return self.workdir / "steps" / f"{quote(node, safe=' ')}.json"

    def store_path(self, task: str):
        """The folder with the prepared or mined examples of a task."""
        return self.workdir / "mining" / task if task in self.config.mining else self.data / "tasks" / task

    def store(self, task: str) -> Store:
        """The prepared or mined examples of a task."""
        return Store(self.store_path(task), self.config.execution.cache_bytes)

    def phases(self, stage: str, mixtures: Mapping[str, Mapping] | None = None) -> list[tuple[int, dict[str, float]]]:
        """[(steps, {task: rate}), …] of a stage's curriculum; by default with the mixtures of the prepared data."""
        phases, mixtures = [], self.mixtures if mixtures is None else mixtures
        for steps, mixture in self.config.stages[stage].curriculum:
            if isinstance(mixture, str):
                rates = {mixture: 1.0} if mixture in self.config.mining else mixtures.get(mixture)
            else:
                rates = dict(mixture)
            if not rates:
                known = ", ".join([*mixtures, *self.config.mining])
                raise ValueError(f"stage {stage}: mixture {mixture!r} must be one of {known}")
            phases.append((int(steps), rates))
        return phases

    def steps(self, stage: str) -> int:
        """The steps in a stage's curriculum."""
        return sum(int(steps) for steps, _ in self.config.stages[stage].curriculum)

    @contextlib.contextmanager
    def compilation_cache(self) -> Iterator[None]:
        """Keep compiled programs in RUN/compiled during the block, unless jax's cache has a folder already.

        The next start of the run loads what took more than a second to compile. jax's key of a program includes the
        features of the CPU, so a run may move to another machine.
        """
        if jax.config.jax_compilation_cache_dir:
            yield
            return
        settings = {"jax_compilation_cache_dir": os.fspath(self.workdir / "compiled")}
        if paths.is_bucket(self.workdir):
            # XLA itself, which would keep a cache of GPU kernels in the same folder, reads no bucket.
            settings["jax_persistent_cache_enable_xla_caches"] = "none"
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # a process that has compiled something would not look at the folder
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()

    def encoder(self, checkpoint: "Checkpoint", params=None) -> Encoder:
        """A checkpoint as an encoder over the run's mesh; `params` are its parameters if the mesh has them already."""
        return make_encoder(checkpoint, self.mesh, params)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str, step: int = 0) -> Checkpoint:
        """`random init`, a merge or stage of this run, a stage folder of another run, a model folder or a hub id.

        UnfinishedError if a stage has not reached its last step, unless `step` names one of its checkpoints.
        """
        if step and (name in (RANDOM, "", *self.config.merges)):
            raise ValueError(f"step {step} of {name or RANDOM}: only a stage has steps")
        if name in (RANDOM, ""):
            return Checkpoint(
                RANDOM,
                {"random init": self.config.seed},
                self.model,
                self._random_params,
                lambda: self.tokenizer,
                tokenizer_identity(self.tokenizer),
                self.config.data.separator,
            )
        if name in self.config.merges:
            return self._merged(name)
        if name in self.config.stages:
            return stage_checkpoint(self.folder(name), step, self.config.execution, name)
        key = name, step
        if key not in self._checkpoints:  # a model folder is read, checked and copied once
            others = [RANDOM, *self.config.stages, *self.config.merges]
            self._checkpoints[key] = find(name, step, self.config.execution, others)
        return self._checkpoints[key]

    def random_projection(self, stage: str, sharding) -> jax.Array:
        """The projection of a stage whose parent has none: that of random parameters of its model."""
        model = stages.stage_model(self.config.stages[stage], self.model)
        make = jax.jit(lambda key: transformer.init(model, key)["projection"], out_shardings=sharding)
        return make(jax.random.key(self.config.seed))

    def _random_params(self, shardings):
        make = jax.jit(transformer.init, static_argnums=0, out_shardings=shardings)
        return make(self.model, jax.random.key(self.config.seed))

    def _merged(self, name: str) -> Checkpoint:
        config = self.config.merges[name]
        a, b = (self.checkpoint(part) for part in config.of)
        return merged(name, a, b, config.ratio, config.method)

    def check_start(self, stage: str, parent: Checkpoint) -> None:
        """ValueError that lists how the model or tokenizer of a stage differ from those of its parent."""
        if parent.name == RANDOM:
            return
        problems = model_problems(self.config.stages[stage], self.model, parent.model)
        problems += self.tokenizer_problems(parent)
        if problems:
            raise ValueError(f"stage {stage} cannot start from {parent.name}: " + "; ".join(problems))

    def tokenizer_problems(self, checkpoint: Checkpoint) -> list[str]:
        """How the tokenizer of the run's data differs from that of a checkpoint, as sentences."""
        mine = tokenizer_identity(self.tokenizer)
        return [
            f"the run's tokenizer has {name} {mine[name]}, the checkpoint's {value}"
            for name, value in checkpoint.tokenizer.items()
            if mine[name] != value
        ]

    def check_sources(self) -> None:
        """The part of `check_start` that needs no data: the sizes of model folders and hub ids."""
        internal = ("", RANDOM, *self.config.stages, *self.config.merges)
        for name, stage in self.config.stages.items():
            if stage.init in internal or is_stage(stage.init):
                continue
            theirs = model_folder.read_architecture(stage.init)
            vocab_size = self.config.model.vocab_size or theirs.vocab_size  # 0: that of the data
            ours = transformer.from_config(self.config.model, self.config.execution, vocab_size)
            if problems := model_problems(stage, ours, theirs):
                raise ValueError(f"stage {name} cannot start from {stage.init}: " + "; ".join(problems))

    # --- what a stage's result depends on ----------------------------------------------------------------------------

    def identity(self, stage: str) -> dict:
        """config.json of a stage: what its result depends on.

        If the parent is gone, a stage that began from it keeps the parent's identity from its own config.json.
        """
        config, folder = self.config.stages[stage], self.folder(stage)
        try:
            parent = self.checkpoint(config.init, config.init_step)
            self.check_start(stage, parent)
            origin, shifted = parent.identity, parent.left_shift
        except FileNotFoundError:
            if not training_state.steps(folder / "checkpoints"):
                raise
            recorded = paths.read_json(folder / "config.json")
            if not self.matches(config.init, config.init_step, recorded["parent"]):
                raise
            origin, shifted = recorded["parent"], recorded.get("left_shift", False)
        phases = self.phases(stage)
        identity = {
            "stage": {name: value for name, value in config.to_dict().items() if name not in NOT_IDENTITY},
            "phases": phases,
            "model": {
                name: getattr(stages.stage_model(config, self.model), name)
                for name in [*ARCHITECTURE, *OF_STAGES, "dtype"]
            },
            "seed": self.config.seed,
            "data": {task: read_header(self.store_path(task))["digest"] for _, rates in phases for task in rates},
            "tokenizer": tokenizer_identity(self.tokenizer),
            "separator": self.config.data.separator,
            "parent": origin,
        }
        if config.kind == "diffusion":
            identity["left_shift"] = self._left_shift(stage, shifted)
        return json.loads(json.dumps(identity))

    def _left_shift(self, stage: str, of_parent: bool) -> bool:
        """Whether a diffusion stage predicts a token from the state before it, as its config or its parent says."""
        value = self.config.stages[stage].left_shift
        return of_parent if value == "auto" else value == "True"

    def matches(self, name: str, step: int, identity: Mapping) -> bool:
        """Whether an identity is that of `name` and `step`. The checkpoint itself may be gone."""
        if name in self.config.merges:
            config, parts = self.config.merges[name], identity.get("merge", ())
            same = len(parts) == 2 and all(self.matches(part, 0, one) for part, one in zip(config.of, parts))
            return same and (identity["ratio"], identity["method"]) == (config.ratio, config.method)
        folder = self.folder(name) if name in self.config.stages else name
        return identity.get("folder") in (str(folder), str(paths.path(folder))) and step in (0, identity["step"])

    def is_complete(self, stage: str, identity: Mapping) -> bool:
        """Whether a stage has reached its last step. ValueError if its folder belongs to another config."""
        folder = self.folder(stage)
        done = training_state.steps(folder / "checkpoints")
        if done:
            check_identity(folder, stage, identity)
        return self.steps(stage) in done


def model_problems(stage, ours: transformer.TransformerConfig, theirs: transformer.TransformerConfig) -> list[str]:
    """How the run's model differs from that of a checkpoint that starts a stage, as sentences."""
    # Only stages that predict tokens keep the output layer of their parent, and only late interaction its projection.
    problems = [
        f"config.model.{name} is {getattr(ours, name)!r}, the checkpoint's {getattr(theirs, name)!r}"
        for name in ARCHITECTURE + ["tied"] * (stage.kind in stages.TEXT)
        if getattr(ours, name) != getattr(theirs, name)
    ]
    wanted = stage.get("token_dimensions", 0)
    if wanted and theirs.token_dimensions not in (0, wanted):
        problems.append(f"its token_dimensions is {wanted}, the checkpoint's {theirs.token_dimensions}")
    return problems


def check_folder(option: str, folder) -> None:
    """ValueError if a file has the path of a folder, or of one above it; `option` says who names the folder."""
    if paths.is_bucket(folder):
        return
    folder = paths.path(folder)
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a link that leads nowhere"
        raise ValueError(f"{option} must be a folder, but {existing} is {what}")


def check_names(config: ConfigDict) -> None:
    """ValueError if a name in the graph is reserved, used twice or unknown, or if a stage starts from itself."""
    for part in ("stages", "mining", "merges", "exports", "evaluations"):
        for name in config[part]:
            if not isinstance(name, str) or not name.isprintable() or not name.strip() or "/" in name or name[0] == ".":
                raise ValueError(f"config.{part} has the name {name!r}: it must have no slash and start with no dot")
    groups = {part: list(config[part]) for part in ("stages", "mining", "merges")}
    for part, names in groups.items():
        for name in names:
            others = [p for p in groups if p != part and name in groups[p]]
            if name in RESERVED:
                raise ValueError(f"config.{part}.{name}: the name must be none of {', '.join(RESERVED)}")
            if others:
                raise ValueError(f"config.{part}.{name}: config.{others[0]} has the same name")
    if config.stage:
        check_stage(config, config.stage)
    for name in (*config.stages, *config.merges):
        parents(config, name)


def check_stage(config: ConfigDict, name: str) -> None:
    """ValueError unless the config has a stage of this name."""
    if not config.stages:
        raise ValueError(f"config.stage={name!r}: the config has no stage; add one, as configs/quickstart.py does")
    if not name:
        names = ", ".join(config.stages)
        raise ValueError(f"config.stage is empty: set it to one of {names}, with FILE.py:stage=NAME or --config.stage")
    if name not in config.stages:
        raise ValueError(f"config.stage={name!r} must be one of {', '.join(config.stages)}")


def parents(config: ConfigDict, name: str, seen: tuple[str, ...] = ()) -> set[str]:
    """The stages that a checkpoint is made of, including itself. ValueError if one is made of itself."""
    if name in seen:
        raise ValueError(f"{name!r} is made of itself: {' <- '.join([*seen, name])}")
    if name in config.merges:
        return set().union(*(parents(config, part, (*seen, name)) for part in config.merges[name].of))
    if name in config.stages:
        return {name} | parents(config, config.stages[name].init, (*seen, name))
    return set()


def is_stage(folder) -> bool:
    """Whether a folder belongs to a stage."""
    folder = paths.path(folder)
    try:
        return "phases" in paths.read_json(folder / "config.json") and (folder / "checkpoints").exists()
    except (OSError, ValueError, TypeError):
        return False


def contents(folder) -> str:
    """What a folder is, in words: a stage, a model, an index, vectors, data or examples; "" for any other folder."""
    folder = paths.path(folder)

    def has(name: str, *keys: str) -> bool:
        try:
            document = paths.read_json(folder / name)
        except (OSError, ValueError):
            return False
        return isinstance(document, dict) and all(key in document for key in keys)

    if has("config.json", "phases", "stage"):
        return "a stage folder"
    if has("config.json", "model_type") or has("embed.json", "embedding", "files"):
        return "a model folder"
    if has("index.json", "format", "format_version"):
        return "an index"
    if has("encode.json", "format", "format_version"):
        return "a folder of vectors"
    if has("mixtures.json") and has("info.json", "arguments"):
        return "prepared data"
    return "a folder of examples" if has("info.json", "columns", "digest") else ""


def find(source: str, step: int = 0, execution: Mapping | None = None, others=()) -> Checkpoint:
    """A stage folder, model folder or hub id as a checkpoint; errors also list the valid names `others`."""
    if is_stage(source):
        return stage_checkpoint(paths.path(source), step, execution, source)
    if model_folder.is_model(source) or model_folder.HUB_ID.fullmatch(source):
        if step:
            raise ValueError(f"step {step} of {source}: a model folder has no steps")
        return model_checkpoint(source, execution)
    expected = ", ".join([*others, "a stage folder", "a model folder", "a hub id owner/name"])
    raise MissingCheckpointError(f"{source!r} is not a checkpoint: expected one of {expected}")


def stage_checkpoint(folder, step: int, execution, name: str = "") -> Checkpoint:
    """The checkpoint of `step` in a stage folder, or the last one for step 0; see `Run.checkpoint`."""
    name, done = name or str(folder), training_state.steps(folder / "checkpoints")
    if not done:
        raise MissingCheckpointError(f"{folder} holds no checkpoint: train stage {name} first")
    config = paths.read_json(folder / "config.json")
    total = sum(steps for steps, _ in config["phases"])
    if step and step not in done:
        raise MissingCheckpointError(f"{name} has no checkpoint of step {step}, only of {', '.join(map(str, done))}")
    if not step and total not in done:
        raise UnfinishedError(
            f"{name} has not finished: its last checkpoint is step {done[-1]} of {total}. "
            f"Train it to the end, or name a step (init_step or --step): {', '.join(map(str, done))}"
        )
    step = step or total
    model = transformer.from_config(config["model"], execution)

    def load(shardings):
        abstract = transformer.abstract_params(model)
        if shardings is not None:
            abstract = sharding.with_sharding(abstract, shardings)
        return training_state.load_params(folder / "checkpoints", step, abstract)

    return Checkpoint(
        name,
        {"folder": str(folder), "step": step, "digest": training_state.digest(folder / "checkpoints", step)},
        model,
        load,
        lambda: tokenizers.load(folder / "tokenizer"),
        config["tokenizer"],
        config["separator"],
        context_length=config["stage"]["batch"]["length"] if config["stage"]["kind"] == "contextual" else None,
        contextual=config["stage"]["kind"] == "contextual",
        diffusion=config["stage"]["kind"] == "diffusion",
        left_shift=config.get("left_shift", config["stage"]["kind"] == "causal"),
        language_model=config["stage"]["kind"] == "causal",
        pooling=config["stage"].get("pooling", "mean"),
        matryoshka=tuple(config["stage"].get("matryoshka", ())),
    )


def model_checkpoint(source: str, execution) -> Checkpoint:
    """A model folder or hub id as a checkpoint, whose weights go directly into their shards."""
    opened = model_folder.open_model(source)
    model, embedding = transformer.from_config(dataclasses.asdict(opened.config), execution), opened.embedding
    return Checkpoint(
        source,
        {"folder": str(source), "step": 0, "digest": opened.digest},
        model,
        opened.params,
        opened.tokenizer,
        # Without the ids of mask and separator: the run may choose others.
        {"digest": opened.tokenizer().digest},
        separator=embedding["separator"],
        max_length=embedding.get("max_length"),
        context_length=embedding.get("context_length"),
        contextual=embedding.get("contextual", False),
        tanh=embedding["tanh"],
        pooling=embedding["pooling"],
        language_model=opened.language_model,
        left_shift=opened.language_model,
        matryoshka=tuple(embedding.get("matryoshka", ())),
        provenance=opened.provenance,
        not_exported=opened.not_exported,
    )


def merged(name: str, a: Checkpoint, b: Checkpoint, ratio: float, method: str = "slerp") -> Checkpoint:
    """The mixture of two checkpoints by a method of `merge`, leaf by leaf, so that memory never holds a third tree.

    ValueError lists the differences that would change vectors.
    """
    if not 0 <= ratio <= 1:  # also not a number
        raise ValueError(f"ratio={ratio} must be between 0 and 1")
    a.check_encoder(), b.check_encoder()
    merge.check_method(method)
    a, b = _like(a, b), _like(b, a)
    names = [*ARCHITECTURE, "token_dimensions", "causal"]
    compared = {n: (getattr(a.model, n), getattr(b.model, n)) for n in names}
    compared |= {f"tokenizer {n}": (a.tokenizer[n], b.tokenizer[n]) for n in a.tokenizer.keys() & b.tokenizer.keys()}
    compared |= {n: (getattr(a, n), getattr(b, n)) for n in ("separator", "max_length", "tanh", "pooling")}
    if problems := [f"{what} is {left!r} and {right!r}" for what, (left, right) in compared.items() if left != right]:
        raise ValueError(f"cannot merge {a.name} and {b.name}, because they embed differently: " + "; ".join(problems))

    def load(shardings):
        left, right = (transformer.encoder_only(x.model, x.params(shardings))[1] for x in (a, b))
        return merge.merge_params(left, right, ratio, shardings or jax.tree.map(lambda x: x.sharding, left), method)

    return dataclasses.replace(
        a,
        name=name,
        identity={"merge": [a.identity, b.identity], "ratio": ratio, "method": method},
        load=load,
        of=(a.name, b.name),
        context_length=min((c.context_length for c in (a, b) if c.context_length), default=None),
        model=dataclasses.replace(a.model, tied=True),
        tokenizer=a.tokenizer | b.tokenizer,
        contextual=a.contextual and b.contextual,
        diffusion=False,
        left_shift=False,
        provenance=None,
        not_exported=tuple(dict.fromkeys(a.not_exported + b.not_exported)),
        matryoshka=tuple(p for p in a.matryoshka if p in b.matryoshka),
    )


def _like(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A stage has no longest text and no tanh of its own: merged with a model folder, it gets those of the folder."""
    if checkpoint.provenance is not None or other.provenance is None:
        return checkpoint
    return dataclasses.replace(checkpoint, max_length=other.max_length, tanh=other.tanh)


def over_all_devices(model: transformer.TransformerConfig):
    """Shardings of a model's parameters over all devices of all processes. No device holds a whole array."""
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    return sharding.parameter_shardings(mesh, transformer.abstract_params(model))


def make_encoder(checkpoint: Checkpoint, mesh, params=None) -> Encoder:
    """A checkpoint as an encoder over a mesh, with its own tokenizer and settings. ValueError for a causal model.

    `params`, which must be on the mesh already, replace the checkpoint's own; then the encoder has no digest.
    """
    checkpoint.check_encoder()
    model, tokenizer, digest = dataclasses.replace(checkpoint.model, tied=True), checkpoint.load_tokenizer(), None
    if params is None:
        digest = _vectors_digest(checkpoint, tokenizer)
        params = checkpoint.params(sharding.parameter_shardings(mesh, transformer.abstract_params(model)))
    return Encoder(
        transformer.encoder_only(model, params)[1],
        model,
        tokenizer,
        separator=checkpoint.separator,
        max_length=checkpoint.max_length,
        context_length=checkpoint.context_length,
        tanh=checkpoint.tanh,
        pooling=checkpoint.pooling,
        matryoshka=checkpoint.matryoshka,
        mesh=mesh,
        path=checkpoint.name,
        digest=digest,
    )


def _vectors_digest(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer) -> str:
    """sha256 (hex) over everything that changes a checkpoint's vectors: parameters, tokenizer and settings."""
    if checkpoint.provenance is not None:  # a model folder has a digest over all its files
        return checkpoint.identity["digest"]
    settings = [checkpoint.separator, checkpoint.max_length, checkpoint.context_length, checkpoint.tanh]
    settings.append(checkpoint.pooling)
    model = {name: getattr(checkpoint.model, name) for name in [*ARCHITECTURE, "causal"]}
    parts = [portable(checkpoint.identity), model, tokenizer_identity(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def vector_size(source: str) -> int:
    """D of a model folder, hub id or stage folder, from its config.json, before anything is loaded."""
    if is_stage(source):
        return paths.read_json(paths.path(source) / "config.json")["model"]["hidden_size"]
    return model_folder.read_architecture(source).hidden_size


def load_encoder(
    source: str,
    step: int = 0,
    revision: str | None = None,
    max_length: int | None = None,
    rope_theta: float | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Encoder:
    """A model folder, hub id (at a `revision`) or stage folder as an encoder over `mesh`, by default all devices.

    See `Run.checkpoint` for `step`. `max_length` replaces the longest text of the model by a shorter one, `rope_theta`
    its base of the rotary angles.
    """
    if rope_theta is not None and rope_theta <= 0:
        raise ValueError(f"--rope_theta={rope_theta} must be positive")
    if max_length is not None and max_length < 1:
        raise ValueError(f"--max_length={max_length} must be positive")
    if is_stage(source):
        checkpoint = stage_checkpoint(paths.path(source), step, None, source)
        if jax.default_backend() == "cpu":
            model = dataclasses.replace(checkpoint.model, dtype="float32")
            checkpoint = dataclasses.replace(checkpoint, model=model)
        encoder = make_encoder(checkpoint, mesh or sharding.make_mesh())
    elif step:
        raise ValueError(f"step {step} of {source}: only a stage folder has steps")
    else:
        encoder = inference.load(source, revision=revision, mesh=mesh)
    if max_length and encoder.max_length and max_length > encoder.max_length:
        raise ValueError(f"--max_length={max_length} must be at most {encoder.max_length}, the max_length of {source}")
    encoder.max_length = max_length or encoder.max_length
    return encoder.with_rope_theta(rope_theta) if rope_theta else encoder


def tokenizer_identity(tokenizer: tokenizers.Tokenizer) -> dict:
    """What identifies a tokenizer and its control tokens."""
    return {"digest": tokenizer.digest, "mask_id": tokenizer.mask_id, "separator_id": tokenizer.separator_id}


def portable(value):
    """A JSON value without the folders of identities: they give a location, not what it contains."""

    def without(x: dict) -> dict:
        return {k: v for k, v in x.items() if k != "folder"} if {"folder", "step", "digest"} <= x.keys() else x

    return json.loads(json.dumps(value), object_hook=without)


def check_identity(folder, stage: str, identity: Mapping) -> None:
    """ValueError that names every field, with both values, in which a stage's folder and a config differ.

    The location of its parent does not count: step and digest identify it.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds checkpoints but no config.json: use another workdir, or remove it")
    changes = [
        f"{re.sub('^stage[.]', f'stages.{stage}.', name)} was {was!r}, now {now!r}"
        for name, was, now in configs.differences(portable(paths.read_json(file)), portable(identity))
    ]
    if changes:
        raise ValueError(
            f"{folder} was trained with another config: {'; '.join(changes)}. Use its config, another workdir or "
            "another name"
        )


def lineage(checkpoint: Checkpoint) -> list[dict]:
    """The stages that made a checkpoint, the first one first: name, kind, steps, mixtures and parent of each.

    It ends at a folder that is gone; the identity of the next stage's parent still names it.
    """
    rows = []

    def visit(identity: Mapping, name: str = ""):
        for parent in identity.get("merge", ()):
            visit(parent)
        folder = identity.get("folder")
        if not folder or not is_stage(folder):
            return
        config = paths.read_json(paths.path(folder) / "config.json")
        visit(config["parent"])
        row = {
            "name": name or paths.path(folder).name,
            "folder": folder,
            "kind": config["stage"]["kind"],
            "phases": config["phases"],
            "step": identity["step"],
            "digest": identity["digest"],
            "parent": config["parent"],
        }
        if row["folder"] not in [other["folder"] for other in rows]:
            rows.append(row)

    visit(checkpoint.identity)
    return rows
