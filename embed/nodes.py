"""The work of each kind of node: prepare, train, mine, evaluate, denoise, sweep a merge, search."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import quote

import jax
import numpy as np
from ml_collections import ConfigDict

from embed import config as configs
from embed import distributed, mining, paths, runs, tokenizers
from embed.checkpoints import model_folder, training_state
from embed.checkpoints.names import TOKENIZER_FILES
from embed.checkpoints.provenance import made_with
from embed.console import say
from embed.data.loader import COLUMNS
from embed.data.store import Store, Writer, read_header
from embed.evaluation import baselines, needles, records, retrieval
from embed.evaluation.metrics import METRICS
from embed.evaluation.sets import RetrievalSet, has_set, read_set, set_name
from embed.inference import denoise, load
from embed.inference.lexical import reciprocal_rank_fusion
from embed.inference.ranking import search
from embed.models import sharding
from embed.rows import content_ids
from embed.runs import Run
from embed.training import flops, loop, stages
from embed.training.metrics import MetricsWriter, progress_bar
from embed.training.step import make_step

READ = 4096  # examples that mining reads at once, per shard of a batch; no result depends on it
HOOK_METRIC = "ndcg@10"  # of the evaluation in the training loop


def prepare(run: Run, *, processes: int | None = None, runner: str = "", runner_options: Sequence[str] = ()) -> dict:
    """Build the data that the config's gin file describes. TensorFlow is imported here and nowhere later.

    The other arguments are those of `embed.preparation.prepare`. Existing data are only checked, without a lock: any
    number of runs may read them.
    """
    done = (run.data / "info.json").exists()
    if jax.process_count() > 1 and not done:
        raise FileNotFoundError(
            f"{run.data} holds no prepared data: run `embed prepare` with this config, in one process, first"
        )
    described = _described_data(run, needs_libraries=not done)
    run.check_sources()
    if not done:
        check_described(run, described)
    from embed.preparation.prepare import prepare as prepare_data

    with contextlib.nullcontext() if done else distributed.hold(run.data):
        prepare_data(
            run.data,
            **described,
            tokenizer=_given_tokenizer(run),
            vocab_size=run.config.data.vocab_size,
            split_identifiers=run.config.data.split_identifiers,
            seed=run.config.data.seed,
            processes=processes,
            runner=runner,
            runner_options=runner_options,
        )
    return paths.read_json(run.data / "info.json")


def check_preparation(run: Run) -> bool:
    """Read a few rows of every source and print what `prepare` would make of them; whether all could be read."""
    described = _described_data(run)
    check_described(run, described)
    from embed.preparation.check import check

    try:
        tokenizer = _given_tokenizer(run)
    except (ValueError, OSError) as error:
        say(f"embed: warning: lengths are in characters, since the tokenizer cannot be read: {error}")
        tokenizer = None
    return check(**described, tokenizer=tokenizer)


def _described_data(run: Run, needs_libraries: bool = True) -> dict:
    """The arguments of `prepare` and `check` that say what the data are."""
    data = run.config.data
    if not data.gin_file:
        raise ValueError("config.data.gin_file is empty: name the file that binds the mixtures of this config")
    if needs_libraries and data.root and not paths.is_bucket(data.root) and not paths.path(data.root).is_dir():
        raise ValueError(f"--data_root={data.root} is not a folder")
    missing = [name for name in ("tensorflow", "tensorflow_datasets", "seqio", "pyarrow") if not find_spec(name)]
    if missing and needs_libraries:
        raise ValueError(f"preparing data needs {', '.join(missing)}: pip install -e '.[data]'")
    return {
        "gin_file": configs.find(data.gin_file, run.config_path),
        "gin_bindings": tuple(data.gin_bindings),
        "data_root": data.root,
        "limit": data.limit or None,
    }


def check_described(run: Run, described: Mapping) -> None:
    """ValueError if the config names mixtures, tasks or sets that its gin file does not describe."""
    from embed.preparation import settings
    from embed.preparation.examples import STAGES

    bound = settings.bind(**described)
    columns = {name: COLUMNS[STAGES[task.kind]] for name, task in bound.tasks.items() if task.kind in STAGES}
    data = _Data(
        mixtures={name: dict.fromkeys(bound.members(name), 1.0) for name in bound.mixtures.rates},
        # Those of a task that only seqio knows are read when it is prepared.
        columns={name: columns.get(name, list(itertools.chain(*COLUMNS.values()))) for name in bound.trained()}.get,
        sets=sorted(bound.evaluation.sets),
        described=f"the evaluation.sets of {described['gin_file']}",
    )
    check_data(run, run.config.stages, data)
    check_sets(run, data)


def _given_tokenizer(run: Run) -> tokenizers.Tokenizer | None:
    """The tokenizer that the config names; None if a vocabulary is to be trained."""
    data = run.config.data
    if not data.tokenizer:
        return None
    bucket = paths.is_bucket(data.tokenizer)
    folder = data.tokenizer if bucket else model_folder.resolve(data.tokenizer, files=TOKENIZER_FILES)
    return tokenizers.load(folder, mask_id=None if data.mask_id < 0 else data.mask_id)


def train_stage(run: Run, name: str, *, profile_steps: range = range(0), wandb: str = "") -> dict:
    """Train stage `name`, or continue it. The other arguments are those of `embed train`.

    Hard negatives for the stage are mined first. Its folder belongs to the config of its first checkpoint; until there
    is one, any config may use it.
    """
    runs.check_stage(run.config, name)
    stage, folder, steps = run.config.stages[name], run.folder(name), run.steps(name)
    check_data(run, [name])
    for task in mined_tasks(run.config, name):
        mine(run, task)
    if distributed.on_first_process(
        lambda: run.is_complete(name, run.identity(name)) and training_state.is_finished(folder / "checkpoints")
    ):
        say(f"{name} is complete: {folder}, step {steps}")
        return _trained(run, name)
    evaluate_params, sets = None, {}
    if stage.execution.evaluate_every:
        sets = hook_sets(run, stage.execution.evaluate_on)
        evaluate_params = functools.partial(hook, run, name, sets)
    evaluated_on = " ".join(sets)
    with distributed.hold(folder) as check_held, progress_bar(name, steps) as update:
        identity = run.identity(name)
        # Another process has trained it meanwhile, or its end was interrupted.
        if distributed.on_first_process(lambda: run.is_complete(name, identity)):
            training_state.finish(folder / "checkpoints", evaluated_on)
            say(f"{name} is complete: {folder}, step {steps}")
            return _trained(run, name)
        step, loader = _stage_parts(run, name, identity)
        if step.stage != stage:
            say(f"{name}: batch.rows_per_group={step.stage.batch.rows_per_group}, chosen from the lengths of the data")
        if distributed.is_first():
            about = {"parent": identity["parent"], "mesh": dict(run.mesh.shape)}
            paths.write_json(folder / "config.json", identity)
            paths.write_json(folder / "run.json", made_with() | about)
            run.tokenizer.save(folder / "tokenizer")
        loop.train(
            folder,
            step=step,
            loader=loader,
            initial_params=functools.partial(_initial_params, run, name),
            evaluate=evaluate_params,
            evaluated_on=evaluated_on,
            check_held=check_held,
            read_timeout=run.config.execution.read_timeout or None,
            readers=run.config.execution.readers,
            profile_steps=profile_steps,
            writer=functools.partial(MetricsWriter, wandb=wandb),
            progress=update,
            warn=lambda sentence: say(f"embed: warning: {sentence}"),
            log=lambda sentence: say(f"{name} {sentence}"),
        )
    return _trained(run, name)


def _trained(run: Run, name: str) -> dict:
    """The result of a complete stage: its steps, and the model FLOPs of all of them by formula, for full rows."""
    stage, *_ = _batches(run, name)
    model = stages.stage_model(stage, run.model)
    return {"steps": run.steps(name), "flops": flops.model_flops(stage, model) * run.steps(name)}


def _batches(run: Run, name: str):
    """(the config of a stage with the rows of its groups, its stores, phases, separator) for its loader."""
    stage, phases = run.config.stages[name], run.phases(name)
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    separator = run.tokenizer.separator_id if run.config.data.separator else None
    return stages.with_rows(stage, stores, phases, separator_id=separator), stores, phases, separator


def _stage_parts(run: Run, name: str, identity: Mapping):
    """(Step, loader) of a stage."""
    (stage, stores, phases, separator), mesh = _batches(run, name), run.mesh
    step = make_step(
        stage,
        run.model,
        mesh,
        steps=run.steps(name),
        seed=run.config.seed,
        mask_id=run.tokenizer.mask_id,
        left_shift=identity.get("left_shift", False),
    )
    return step, stages.make_loader(stage, stores, phases, seed=run.config.seed, separator_id=separator, mesh=mesh)


def _initial_params(run: Run, name: str, shardings) -> dict:
    stage = run.config.stages[name]
    params = run.checkpoint(stage.init, stage.init_step).params(shardings)
    params = {part: x for part, x in params.items() if part in shardings}  # without a head or projection of the parent
    if "projection" in shardings and "projection" not in params:
        params["projection"] = run.random_projection(name, shardings["projection"])
    return params


def hook_sets(run: Run, names: Sequence[str]) -> dict[str, RetrievalSet]:
    """The sets that a stage is evaluated on while it trains: those named, or all development sets of the data."""
    chosen = list(names) or development_sets(_prepared_data(run))
    return {name: evaluation_set(run, name) for name in chosen}


def hook(run: Run, stage: str, sets: Mapping[str, RetrievalSet], params) -> dict[str, float]:
    """{set: nDCG@10} of parameters in training, computed by all devices of all processes together.

    In int8, or of a late-interaction stage by MaxSim.
    """
    config = run.config.stages[stage]
    model, pooling = stages.stage_model(config, run.model), config.get("pooling", "mean")
    checkpoint = dataclasses.replace(run.checkpoint(runs.RANDOM), name=stage, model=model, pooling=pooling)
    encoder = run.encoder(checkpoint, params)
    form = retrieval.Form(retrieval.MULTI if encoder.token_dimensions else "int8")
    return {
        name: retrieval.evaluate_retrieval(encoder, data, (form,))[form][HOOK_METRIC] for name, data in sets.items()
    }


def mine(run: Run, name: str) -> dict:
    """Mine the hard negatives of config.mining.NAME with a checkpoint and store them in the run: mining/NAME.

    Memory: READ examples per shard of a batch, a few numbers per example, and what `mining.mine` needs. Vectors are in
    files of a temporary folder of each process (TMPDIR): with int8, a byte per dimension of each text; those of a
    teacher are float32.
    """
    target = run.store_path(name)
    is_mined = functools.partial(distributed.on_first_process, (target / "info.json").exists)
    if is_mined():
        return _mined(run, name, read_header(target)["info"])
    with distributed.hold(target):
        if is_mined():  # another process mined them meanwhile
            return _mined(run, name, read_header(target)["info"])
        config = run.config.mining[name]
        checkpoint = run.checkpoint(config.checkpoint, config.step)
        if problems := run.tokenizer_problems(checkpoint):
            raise ValueError(
                f"config.mining.{name}.checkpoint={config.checkpoint!r} cannot rank these data: {'; '.join(problems)}"
            )
        examples = _Examples([run.store(task) for task in config.tasks])
        bounds = examples.bounds if config.pool == "own" else [(0, len(examples))]
        if empty := [task for task, (start, stop) in zip(config.tasks, examples.bounds) if start == stop]:
            raise ValueError(f"config.mining.{name}.tasks: the task {empty[0]!r} has no examples")
        query_ids, document_ids = _content_ids(run, examples)
        # Stores are shuffled, so the first examples of a task are a random sample. All examples with one of their
        # queries are added, or their documents would count as negatives.
        is_used = np.zeros(len(examples), bool)
        for start, stop in bounds:
            firsts = [query_ids[a : min(a + (config.queries or b), b)] for a, b in examples.bounds if start <= a < stop]
            is_used[start:stop] = np.isin(query_ids[start:stop], np.concatenate(firsts))
        rows = np.flatnonzero(is_used)
        # Each document is embedded and ranked once, however many queries it answers: the window counts documents.
        is_first = np.zeros(len(examples), bool)
        for start, stop in bounds:
            is_first[start + np.unique(document_ids[start:stop], return_index=True)[1]] = True
        firsts = np.flatnonzero(is_first)
        counts = Counter(read=len(examples), unsampled=len(examples) - len(rows), documents=len(firsts))
        writer = Writer(target, COLUMNS["triplet"]) if distributed.is_first() else None
        with tempfile.TemporaryDirectory(prefix="embed-mining-") as folder:
            chosen = is_used, is_first
            vectors = _embed(run, examples, *chosen, checkpoint, config.precision, f"{folder}/miner")
            if config.teacher:
                judges = _embed(run, examples, *chosen, run.checkpoint(config.teacher), "float32", f"{folder}/teacher")
            for start, stop in bounds:
                used, pool = (slice(*np.searchsorted(among, (start, stop))) for among in (rows, firsts))
                ids = document_ids[firsts[pool]]
                order = np.argsort(ids)
                mined = mining.mine(
                    vectors[0][used],
                    vectors[1][pool],
                    order[np.searchsorted(ids, document_ids[rows[used]], sorter=order)],
                    num_negatives=config.num_negatives,
                    rank_window=tuple(config.rank_window),
                    margin=config.margin,
                    relative=config.relative,
                    query_ids=query_ids[rows[used]],
                    document_ids=ids,
                    judge=mining.judge_by(judges[0][used], judges[1][pool]) if config.teacher else None,
                    mesh=run.mesh,
                    progress=f"{name}: rank",
                )
                counts.update(mined.counts)
                if writer:
                    negatives = np.where(mined.negatives < 0, -1, firsts[pool][mined.negatives])
                    _write_mined(writer, examples, rows[used], negatives)
        if writer:
            writer.close({"task": name, "inputs": mining_inputs(run, name), "mined": dict(counts)})
        read = " ".join(f"{key} {counts[key]:,}" for key in ("read", "unsampled"))
        say(f"{name}: {read}, {mining.summary(counts)}")
    return dict(counts)


class _Examples:
    """The examples of several stores as one sequence; `bounds` are the (first, last + 1) of each store."""

    def __init__(self, stores: list[Store]):
        self._stores, self._first = stores, np.cumsum([0, *map(len, stores)])
        self.bounds = list(itertools.pairwise(self._first.tolist()))

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The examples at `indices`, which are sorted."""
        cuts = np.searchsorted(indices, self._first)
        return [
            example
            for store, first, a, b in zip(self._stores, self._first, cuts, cuts[1:])
            for example in store.read(indices[a:b] - first)
        ]

    def blocks(self, run: Run) -> Iterator[tuple[np.ndarray, list[dict[str, np.ndarray]]]]:
        """(indices, examples) of all examples, in blocks that the devices of a run can share."""
        size = READ * sharding.batch_shards(run.mesh)
        for start in range(0, len(self), size):
            indices = np.arange(start, min(start + size, len(self)))
            yield indices, self.read(indices)


def _content_ids(run: Run, examples: _Examples) -> tuple[np.ndarray, np.ndarray]:
    """The content ids of the query and of the document of each example, int32[n] each."""
    ids = [
        [content_ids([example[side] for example in block]) for side in ("query", "document")]
        for _, block in examples.blocks(run)
    ]
    return tuple(map(np.concatenate, zip(*ids)))


def _embed(
    run: Run,
    examples: _Examples,
    is_used: np.ndarray,
    is_first: np.ndarray,
    checkpoint: runs.Checkpoint,
    precision: str,
    path: str,
) -> list[np.ndarray]:
    """The vectors of the used queries and of the first of equal documents, as np.memmap of new files.

    Their names begin with `path`.
    The model may have a tokenizer of its own; then it gets the decoded texts, cut to its longest text.
    """
    encoder, has_own_tokenizer = run.encoder(checkpoint), bool(run.tokenizer_problems(checkpoint))

    def encode(tokens: list[np.ndarray]) -> np.ndarray:
        if has_own_tokenizer:
            tokens = encoder.tokenizer.encode([run.tokenizer.decode(each) for each in tokens])
            tokens = [each[: encoder.max_length] for each in tokens]
        return encoder.encode_tokens(tokens, precision=precision)

    with (
        open(f"{path}.query", "wb") as queries,
        open(f"{path}.document", "wb") as documents,
        mining.progress_bar(f"encode with {checkpoint.name}", len(examples), "example") as bar,
    ):
        for indices, block in examples.blocks(run):
            vectors = encode([e["document"] for e, first in zip(block, is_first[indices]) if first])
            documents.write(vectors.tobytes())
            queries.write(encode([e["query"] for e, used in zip(block, is_used[indices]) if used]).tobytes())
            bar.update(len(block))
    shape = (-1, encoder.dimensions)
    return [np.memmap(f"{path}.{side}", vectors.dtype, "r").reshape(shape) for side in ("query", "document")]


def mining_inputs(run: Run, name: str, recorded: Mapping | None = None) -> dict:
    """What mined negatives depend on. If a checkpoint is gone, its `recorded` identity is used."""
    config = run.config.mining[name]

    def identity(role: str, checkpoint: str, step: int = 0) -> dict:
        try:
            return run.checkpoint(checkpoint, step).identity
        except FileNotFoundError:
            if not recorded or not recorded.get(role) or not run.matches(checkpoint, step, recorded[role]):
                raise
            return recorded[role]

    fields = config.to_dict()
    inputs = {
        "mining": {key: value for key, value in fields.items() if key not in ("checkpoint", "step", "teacher")},
        "checkpoint": identity("checkpoint", config.checkpoint, config.step),
        "teacher": identity("teacher", config.teacher) if config.teacher else {},
        "data": {task: read_header(run.store_path(task))["digest"] for task in config.tasks},
    }
    return json.loads(json.dumps(inputs))


def _mined(run: Run, name: str, info: Mapping) -> dict:
    """The counts of an existing store. ValueError if it was mined from other inputs."""
    now = mining_inputs(run, name, info["inputs"])
    if changes := list(configs.differences(runs.portable(info["inputs"]), runs.portable(now))):
        named = "; ".join(f"{key} was {was!r}, now {value!r}" for key, was, value in changes)
        raise ValueError(f"{run.store_path(name)} was mined with other inputs: {named}. Remove it, or use another name")
    return info["mined"]


def _write_mined(writer: Writer, examples: _Examples, rows: np.ndarray, negatives: np.ndarray) -> None:
    """Append the examples at `rows` with their negatives int[n, k] (-1 = none) to a store."""
    size = max(1, READ // (1 + negatives.shape[1]))
    for part in (slice(start, start + size) for start in range(0, len(rows), size)):
        needed = np.union1d(rows[part], negatives[part])
        needed = needed[needed >= 0]
        block = dict(zip(needed.tolist(), examples.read(needed)))
        for i, row in zip(rows[part].tolist(), negatives[part].tolist()):
            chosen = [block[j]["document"] for j in row if j >= 0]
            writer.append(
                {
                    "query": block[i]["query"],
                    "document": block[i]["document"],
                    "negatives": np.concatenate(chosen) if chosen else np.zeros(0, np.int32),
                    "negative_lengths": np.array([len(tokens) for tokens in chosen], np.int32),
                }
            )


def evaluation_set(run: Run, name: str) -> RetrievalSet:
    """The evaluation set SET/SPLIT of the prepared data, or that of a folder anywhere else."""
    return read_set(evaluation_folder(run, name), name=name)


def evaluation_folder(run: Run, name: str):
    """The folder of `evaluation_set`."""
    folder = run.data / "evaluation" / name
    return folder if folder.is_dir() else paths.path(name)


def outside(run: Run, names: Iterable[str]) -> dict[str, str]:
    """{set: digest of its folder} of those evaluation sets that are not in the prepared data."""
    folders = {name: evaluation_folder(run, name) for name in names}
    prepared = run.data / "evaluation"
    return {n: paths.digest(f) for n, f in folders.items() if n and prepared not in f.parents and f.is_dir()}


def short_names(run: Run, names: Sequence[str]) -> dict[str, str]:
    """{evaluation set: its name without the split or the folders above}; the whole name where two would be equal."""
    short = {name: set_name(evaluation_folder(run, name)) for name in names}
    return {name: name if [*short.values()].count(title) > 1 else title for name, title in short.items()}


def ranking(run: Run, checkpoint: str, evaluation: str):
    """The file where `evaluate` keeps {precision: best corpus rows of each query, int32 [Q, DEPTH]}, as .npz."""
    return run.workdir / "rankings" / evaluation / f"{quote(checkpoint, safe='')}.npz"  # it may be a path or hub id


def evaluated(run: Run, checkpoint: str):
    """The folder with the records of a checkpoint or baseline, as `embed evaluate` writes them."""
    return run.workdir / records.EVALUATED / quote(checkpoint, safe="")


def record_file(run: Run, checkpoint: str, evaluation: str):
    """The file of one of these records."""
    return records.path(evaluated(run, checkpoint), evaluation, "default", "test")


def _record(
    run: Run,
    checkpoint: str,
    evaluation: str,
    data: RetrievalSet,
    rankings: Mapping[str, np.ndarray],
    counts: Mapping[str, int] = {},
) -> dict:
    """Write the record of rankings {precision: ranking}; returns {precision: metrics}."""
    about = {"task": evaluation, "subset": "default", "split": "test", "type": "Retrieval", "languages": []}
    forms = {retrieval.Form(precision): ranking for precision, ranking in rankings.items()}
    record = records.make(data, forms, METRICS, **about)
    record["counts"] |= counts
    records.write(record_file(run, checkpoint, evaluation), record)
    return record["values"]


def evaluate(run: Run, name: str) -> dict:
    """Evaluate a checkpoint in every evaluation that names it, at every precision.

    rankings/ and evaluated/ keep the results.
    """
    original = run.encoder(run.checkpoint(name))
    figures, queries = {}, {}
    if jax.process_index() == 0:
        records.write_about(evaluated(run, name), name, original.dimensions, digest=original.digest)
    for evaluation, config in run.config.evaluations.items():
        if name not in config.checkpoints:
            continue
        data = evaluation_set(run, config.data)
        encoder = original.with_rope_theta(config.rope_theta) if config.rope_theta else original
        if config.needle_tokens:
            data = needles.hide(data, config.needle_tokens, encoder.tokenizer)
        key = config.data, config.rope_theta, config.needle_tokens
        if key not in queries:  # of evaluations with and without context they are the same
            queries[key] = retrieval.embed_queries(encoder, data)
        forms, counts = retrieval.forms(encoder, config.truncate_dim), {}
        ranked = retrieval.rank(encoder, data, forms, alone=config.alone, queries=queries[key], counts=counts)
        rankings = {form.precision: ranking for form, ranking in ranked.items()}
        if jax.process_index() == 0:
            buffer = io.BytesIO()
            np.savez(buffer, **rankings)
            paths.write(ranking(run, name, evaluation), buffer.getvalue())
            figures[evaluation] = _record(run, name, evaluation, data, rankings, counts)
    return figures


def evaluate_baselines(run: Run) -> dict:
    """BM25, and BM25 fused by reciprocal rank with the checkpoints of config.report.fuse."""
    rows: dict[str, dict] = {"BM25": {}}
    for evaluation, config in run.config.evaluations.items():
        if not config.bm25:
            continue
        data = evaluation_set(run, config.data)
        words = baselines.bm25(data, context=not config.alone)
        ranked = {"BM25": {"float32": words}}
        for name in run.config.report.fuse:
            with ranking(run, name, evaluation).open("rb") as file:
                found = dict(np.load(io.BytesIO(file.read())))
            fuse = functools.partial(reciprocal_rank_fusion, words, depth=retrieval.DEPTH)
            fused = {precision: fuse(each)[0] for precision, each in found.items()}
            ranked[f"BM25 + {name}"] = fused
        for name, rankings in ranked.items():
            if jax.process_index() == 0:
                records.write_about(evaluated(run, name), name, None)
                rows.setdefault(name, {})[evaluation] = _record(run, name, evaluation, data, rankings)
    return {name: row for name, row in rows.items() if row}


def denoising(run: Run, name: str) -> dict:
    """How well a diffusion stage denoises held-out text, with one text as an example."""
    checkpoint, mask_id, texts = run.checkpoint(name), run.tokenizer.mask_id, run.config.report.texts
    params, model = checkpoint.params(run.shardings(checkpoint.model)), checkpoint.model
    options = dict(mask_id=mask_id, left_shift=checkpoint.left_shift)
    flat = np.concatenate(run.tokenizer.encode(evaluation_set(run, texts).corpus[:512]))
    if len(flat) < 2:
        raise ValueError(f"config.report.texts={texts!r} has {len(flat)} tokens: at least 2 are needed to denoise")
    length = min(run.config.stages[name].batch.length, len(flat))
    windows = flat[: min(len(flat) // length, 64) * length].reshape(-1, length)
    levels, elbo = denoise.elbo_and_accuracy(params, model, windows, **options)
    text = windows[0][: length // 2].copy()
    hidden = np.random.default_rng(run.config.seed).random(len(text)) < run.config.report.mask_fraction
    hidden[0] = False
    original = run.tokenizer.decode(text)
    text[hidden] = mask_id
    states = denoise.denoise(
        params, model, text, tokens_per_step=run.config.report.tokens_per_step, length=length, **options
    )
    shown = sorted({0, len(states) // 2, len(states) - 1})
    return {
        "elbo": elbo,
        "diffusion": [{"t": float(t), **figures} for t, figures in levels.items()],
        "denoising": [{"step": k, "text": show_masked(run.tokenizer, states[k])} for k in shown]
        + [{"step": "original", "text": original}],
    }


def show_masked(tokenizer, tokens: np.ndarray) -> str:
    """The decoded text, with an underscore for each masked token."""
    pieces, start = [], 0
    for i in [*np.flatnonzero(tokens == tokenizer.mask_id), len(tokens)]:
        if i > start:
            pieces.append(tokenizer.decode(tokens[start:i]))
        if i < len(tokens):
            pieces.append("_")
        start = i + 1
    return " ".join(pieces)


def merge_sweep(run: Run, name: str) -> dict:
    """nDCG@10 of a merge at each ratio of its sweep."""
    config = run.config.merges[name]
    a, b = (run.checkpoint(part) for part in config.of)
    titles = short_names(run, config.sweep_on)
    sets = {title: evaluation_set(run, data) for data, title in titles.items()}
    sweep, form = [], retrieval.Form("float32")
    for ratio in config.sweep:
        encoder = run.encoder(runs.merged(name, a, b, ratio, config.method))
        figures = {
            title: retrieval.evaluate_retrieval(encoder, data, (form,), alone=config.alone)[form]["ndcg@10"]
            for title, data in sets.items()
        }
        sweep.append({"ratio": ratio, **figures})
    about = {"ratio": config.ratio, "method": config.method, "of": list(config.of)}
    return about | {"sets": {t: n for n, t in titles.items()}, "sweep": sweep}


def worked_search(run: Run) -> dict:
    """One query against the texts of an evaluation set, with an exported model."""
    data = evaluation_set(run, run.config.report.texts)
    encoder, precision = load(run.workdir / "export" / run.config.report.search), "int8"
    corpus = encoder.encode(data.corpus, precision=precision)
    query = data.queries[0]
    scores, matches = search(encoder.encode([query], precision=precision), corpus, 5, precision)
    hits = [
        {
            "rank": k + 1,
            "score": float(scores[0, k]),
            "id": data.corpus_ids[i],
            "text": " ".join(data.corpus[i].split())[:80],
        }
        for k, i in enumerate(matches[0])
    ]
    return {"query": query, "precision": precision, "hits": hits}


def mined_tasks(config: ConfigDict, stage: str) -> list[str]:
    """The entries of config.mining that a stage's curriculum names."""
    named = [
        m
        for _, mixture in config.stages[stage].curriculum
        for m in ([mixture] if isinstance(mixture, str) else mixture)
    ]
    return sorted({name for name in named if name in config.mining})


def check_mined(config: ConfigDict, names: Iterable[str]) -> None:
    """ValueError if stages name mined tasks that their kind cannot train on. Needs no data."""
    for name in names:
        for entry in mined_tasks(config, name):
            check_columns(f"stages.{name}.curriculum", entry, config.stages[name].kind, COLUMNS["triplet"])


def check_columns(field: str, task: str, kind: str, columns: Iterable[str]) -> None:
    """ValueError unless a task with `columns` has those that `kind` needs. `field` of the config names the task."""
    if missing := [column for column in COLUMNS[kind] if column not in columns]:
        raise ValueError(
            f"config.{field}: the task {task!r} has the columns {', '.join(columns)}, but {kind} batches need also "
            f"{', '.join(missing)}"
        )


class _Data(NamedTuple):
    """What a config may name of data: those that are prepared, or those that its gin file describes."""

    mixtures: Mapping[str, Mapping[str, float]]
    columns: Callable[[str], Sequence[str] | None]  # of a task; None if there is no such task
    sets: Sequence[str]  # SET/SPLIT
    described: str  # where the sets are


def _prepared_data(run: Run) -> _Data:
    def columns(task: str) -> Sequence[str] | None:
        folder = run.store_path(task)
        return read_header(folder)["columns"] if (folder / "info.json").exists() else None

    sets = run.data / "evaluation"
    names = (
        {name.rpartition("/")[0] for name in paths.files(sets) if name.endswith("/corpus.jsonl")}
        if sets.is_dir()
        else ()
    )
    return _Data(run.mixtures, columns, sorted(names), f"{sets}")


def development_sets(data: _Data) -> list[str]:
    """The sets of the split "development"."""
    return [name for name in data.sets if name.endswith("/development")]


def check_data(run: Run, names: Iterable[str], data: _Data | None = None) -> None:
    """ValueError if stages name mixtures, tasks or sets that the data do not have, or tasks of another kind.

    `data`: by default the prepared data.
    """
    config, data = run.config, data or _prepared_data(run)
    tasks = sorted({task for rates in data.mixtures.values() for task in rates})

    def check(field: str, task: str, kind: str) -> None:
        if (columns := data.columns(task)) is None:
            raise ValueError(f"config.{field}={task!r} must be one of {', '.join(tasks)}")
        check_columns(field, task, kind, columns)

    check_mined(config, names)
    for name in names:
        for task in sorted(
            {task for _, rates in run.phases(name, data.mixtures) for task, rate in rates.items() if rate}
            - set(config.mining)
        ):
            check(f"stages.{name}.curriculum", task, config.stages[name].kind)
        for entry in mined_tasks(config, name):
            if entry in data.mixtures:
                raise ValueError(f"config.mining.{entry}: a mixture of the data has the same name")
            for task in config.mining[entry].tasks:
                check(f"mining.{entry}.tasks", task, "pair")
        if config.stages[name].execution.evaluate_every:
            field, chosen = f"stages.{name}.execution.evaluate_on", config.stages[name].execution.evaluate_on
            if not chosen and not development_sets(data):
                raise ValueError(f"config.{field} is empty, and {data.described} has no SET/development: name a set")
            for tried in chosen:
                _check_set(data, field, tried)


def _check_set(data: _Data, field: str, name: str) -> None:
    if name not in data.sets and not has_set(name):
        raise ValueError(
            f"config.{field}={name!r} must be a SET/SPLIT in {data.described}, or a folder with an evaluation set"
        )


def check_sets(run: Run, data: _Data | None = None) -> None:
    """ValueError if evaluations, sweeps or the report name sets that neither the data have nor a folder."""
    data = data or _prepared_data(run)
    for name, entry in run.config.evaluations.items():
        _check_set(data, f"evaluations.{name}.data", entry.data)
    for name, entry in run.config.merges.items():
        for tried in entry.sweep_on if entry.sweep else ():
            _check_set(data, f"merges.{name}.sweep_on", tried)
    if run.config.report.denoise or run.config.report.search:
        _check_set(data, "report.texts", run.config.report.texts)
