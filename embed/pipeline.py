"""The stage graph: the only place that knows the order of the stages.

    prepare ─ diffusion ─ pair ─┬─ contextual ─────────┬─ merge ─ export ─ report
                                └─ mine ─ triplet ─────┘

Each step leaves steps/NAME.json with its result and its seconds when it is complete; a run started again skips those.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from embed import config as configs
from embed import mining, tokenizers
from embed.checkpoints import converted, export, huggingface, merge, onnx, training_state
from embed.checkpoints.card import model_card
from embed.data.store import Store, Writer
from embed.evaluation import baselines, report, retrieval
from embed.inference import Encoder, denoise, load
from embed.inference.encoder import read_model
from embed.inference.index import Index
from embed.models import sharding, transformer
from embed.rows import content_ids
from embed.training import loop, plan, stages
from embed.training.metrics import MetricsWriter, progress_bar, read_metrics

PRECISIONS = ("float32", "int8", "binary")
console = Console(soft_wrap=True)


class Run:
    """A config and its workdir, with what the steps share."""

    def __init__(self, config: ConfigDict, workdir, config_path: str = ""):
        if "://" in str(workdir):
            raise ValueError(f"workdir {workdir} is a URL; it must be a folder, local or mounted")
        self.config, self.workdir, self.config_path = config, Path(workdir), config_path
        fields = {name: value for name, value in config.model.items() if name != "vocab_size" or value}
        for name, stage in config.stages.items():
            if stage.init and stage.init not in config.stages:
                if not converted.is_converted(stage.init):
                    raise FileNotFoundError(
                        f"config.stages.{name}.init={stage.init!r} is neither a stage ({', '.join(config.stages)}) nor a "
                        "folder that `embed convert` wrote"
                    )
                converted.check(stage.init, fields)
        self._claim()

    def _claim(self) -> None:
        """Write config.json, or check that the workdir is this config's."""
        resolved = resolve(self.config)
        file = self.workdir / "config.json"
        if file.exists():
            if difference := configs.first_difference(json.loads(file.read_text()), resolved):
                raise ValueError(
                    f"{self.workdir} was made by another config ({difference} now); use its config or another workdir"
                )
            return
        if self.workdir.exists() and any(self.workdir.iterdir()):
            raise ValueError(f"{self.workdir} is not empty and holds no run; use another workdir")
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(file, resolved)

    @property
    def data(self) -> Path:
        return self.workdir / "data"

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(self.data / "tokenizer")

    @cached_property
    def model(self) -> transformer.TransformerConfig:
        fields = self.config.model.to_dict()
        needed = max(self.tokenizer.vocab_size, self.tokenizer.mask_id + 1)
        if 0 < fields["vocab_size"] < needed:
            raise ValueError(
                f"config.model.vocab_size={fields['vocab_size']} is too small: tokenizer and mask need {needed} rows"
            )
        return transformer.TransformerConfig(**fields | {"vocab_size": fields["vocab_size"] or needed})

    @property
    def left_shift(self) -> bool:
        """Whether the diffusion stage predicts from the state before: as the config says, or as its source did."""
        stage = self.config.stages.diffusion
        if stage.left_shift != "auto":
            if stage.left_shift not in ("True", "False"):
                raise ValueError(f"config.stages.diffusion.left_shift={stage.left_shift!r} must be auto, True or False")
            return stage.left_shift == "True"
        return stage.init not in (*self.config.stages, "") and converted.read_info(stage.init)["source"]["causal"]

    @cached_property
    def mixtures(self) -> dict[str, dict[str, float]]:
        return json.loads((self.data / "mixtures.json").read_text()) | {"triplet": {"triplet": 1.0}}

    def store(self, task: str) -> Store:
        return Store(self.data / "tasks" / task)

    def ranking(self, checkpoint: str, benchmark: str) -> Path:
        """What `evaluate` found: {precision: best corpus rows of each query, int32 [Q, DEPTH]} as .npz."""
        return self.workdir / "rankings" / checkpoint.replace(" ", "_") / f"{benchmark}.npz"

    def encoder(self, params) -> Encoder:
        return Encoder(
            params, self.model, self.tokenizer,
            separator=self.config.export.separator, max_length=self.config.export.max_length or None,
        )  # fmt: skip

    def params(self, checkpoint: str, shardings=None):
        """The parameters of `random init`, of a trained stage, of `merged`, or of a folder that a stage starts from."""
        if checkpoint == "random init":
            make = jax.jit(transformer.init, static_argnums=0, out_shardings=shardings)
            return make(self.model, jax.random.key(self.config.seed))
        if checkpoint == "merged":
            a, b = self.params("contextual"), self.params("triplet")
            return merge.slerp(a, b, self.config.merge.ratio)
        folder = self.workdir / checkpoint
        if checkpoint not in self.config.stages:
            folder = Path(checkpoint)
            converted.check(folder, dataclasses.asdict(self.model), self.tokenizer)
        abstract = transformer.abstract_params(self.model)
        if shardings is not None:
            abstract = sharding.with_sharding(abstract, shardings)
        return training_state.load_params(folder / "checkpoints", abstract)


def resolve(config: ConfigDict) -> dict:
    """What makes a run what it is: the config and the text of its gin file, not which stage a process was asked for.

    Nor the mesh: a run may move to other machines.
    """
    resolved = json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k not in ("stage", "mesh")}))
    gin_file = Path(config.data.gin_file)
    if not gin_file.is_file():
        raise FileNotFoundError(f"no gin file {gin_file} (config.data.gin_file) in {Path.cwd()}")
    resolved["data"]["gin_digest"] = hashlib.sha256(gin_file.read_bytes()).hexdigest()[:12]
    return resolved


def write_json(path: Path, value) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".partial{os.getpid()}")  # several processes may write the same file
    temporary.write_text(json.dumps(value, indent=2, default=float) + "\n")
    temporary.replace(path)


def prepare(run: Run) -> dict:
    """Build the data that the config's gin file describes; TensorFlow is imported here and nowhere later."""
    if missing := [name for name in ("tensorflow", "tensorflow_datasets", "seqio") if not find_spec(name)]:
        raise ValueError(f"preparing data needs {', '.join(missing)}: pip install -e '.[data]'")
    from embed.preparation.prepare import prepare as prepare_data

    data = run.config.data
    prepare_data(
        run.data, gin_file=data.gin_file, gin_bindings=tuple(data.gin_bindings), vocab_size=data.vocab_size,
        split_identifiers=data.split_identifiers, seed=run.config.seed, limit=data.limit or None,
        tokenizer=tokenizers.load(huggingface.resolve(data.tokenizer, files=huggingface.TOKENIZER_FILES)) if data.tokenizer else None,
    )  # fmt: skip
    return json.loads((run.data / "info.json").read_text())


def train_stage(run: Run, name: str, *, profile_steps: range = range(0), wandb: str = "") -> dict:
    """Train stage `name` from the checkpoint that its config names, or continue it; other arguments as `embed train`'s."""
    config = run.config
    if name not in config.stages:
        raise ValueError(f"config.stage={name!r} must be one of {', '.join(config.stages)}")
    if not (run.data / "mixtures.json").exists():
        raise FileNotFoundError(f"{run.data} holds no prepared data; run `embed prepare` with this config and workdir")
    stage = config.stages[name]
    phases = []
    for steps, mixture in stage.curriculum:
        if mixture not in run.mixtures:
            raise ValueError(
                f"stage {name}: no mixture {mixture!r}; {config.data.gin_file} binds {', '.join(run.mixtures)}"
            )
        phases.append((steps, run.mixtures[mixture]))
    steps = sum(n for n, _ in phases)
    if not steps:
        raise ValueError(f"stage {name}: curriculum={stage.curriculum} has no steps")
    if stage.kind == "triplet" and not (run.data / "tasks" / "triplet" / "info.json").exists():
        if jax.process_count() > 1:
            raise FileNotFoundError(
                f"{run.data} holds no mined negatives: run a step of this stage, or the pipeline, with one process first"
            )
        mine(run)
    stores = {task: run.store(task) for _, rates in phases for task in rates}
    separator = run.tokenizer.separator_id if config.export.separator else None
    folder = run.workdir / name
    mesh = sharding.make_mesh(**config.mesh)
    about = {"stage": name, "tokenizer_digest": run.tokenizer.digest, "mesh": dict(mesh.shape)}
    write_json(folder / "run.json", provenance() | about)
    with progress_bar(name, steps) as update:
        loop.train(
            folder,
            stage=stage,
            loss=stages.make_loss(stage, run.model, run.tokenizer.mask_id, run.left_shift),
            loader=stages.make_loader(stage, stores, phases, seed=config.seed, separator_id=separator, mesh=mesh),
            steps=steps,
            initial_params=lambda shardings: run.params(stage.init or "random init", shardings),
            abstract_params=transformer.abstract_params(run.model),
            seed=config.seed,
            mesh=mesh,
            read_timeout=config.data.timeout or None,
            least_seconds=plan.least_seconds(stage, run.model),
            profile_steps=profile_steps,
            writer=functools.partial(MetricsWriter, wandb=wandb),
            progress=update,
            warn=lambda sentence: console.print(f"embed: warning: {sentence}", markup=False, highlight=False),
        )
    return {"steps": steps}


def evaluation_set(run: Run, name: str, split: str = "test") -> retrieval.RetrievalSet:
    """`functions` or `contextual`."""
    return retrieval.read_set(run.data / "evaluation" / name / split)


def benchmarks(run: Run) -> dict[str, tuple[retrieval.RetrievalSet, bool]]:
    """{name: (test set, whether chunks are encoded alone)}: the columns of the report's table."""
    functions, contextual = evaluation_set(run, "functions"), evaluation_set(run, "contextual")
    return {"functions": (functions, True), "contextual": (contextual, False), "contextual_alone": (contextual, True)}


def evaluate(run: Run, checkpoint: str) -> dict:
    """Retrieval of a checkpoint on the held-out packages, at every precision; rankings/ keeps what it found."""
    encoder = run.encoder(run.params(checkpoint))
    figures = {}
    for name, (data, alone) in benchmarks(run).items():
        rankings = retrieval.rank(encoder, data, PRECISIONS, alone=alone)
        path = run.ranking(checkpoint, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **rankings)
        figures[name] = {p: retrieval.score(ranking, data) for p, ranking in rankings.items()}
    return figures


def evaluate_baselines(run: Run) -> dict:
    """BM25, and BM25 fused by reciprocal rank with the two models that are exported."""
    rows: dict[str, dict] = {"BM25": {}, "BM25 + contextual": {}, "BM25 + merged": {}}
    for name, (data, alone) in benchmarks(run).items():
        words = baselines.bm25(data, context=not alone)
        rows["BM25"][name] = {"float32": retrieval.score(words, data)}
        for checkpoint in ("contextual", "merged"):
            rows[f"BM25 + {checkpoint}"][name] = {
                precision: retrieval.score(baselines.reciprocal_rank_fusion(words, ranking), data)
                for precision, ranking in np.load(run.ranking(checkpoint, name)).items()
            }
    return rows


def diffusion_report(run: Run) -> dict:
    """How well the diffusion stage denoises held-out text, and one text while it is denoised."""
    mask_id, left_shift = run.tokenizer.mask_id, run.left_shift
    params, length = run.params("diffusion"), run.config.stages.diffusion.batch.length
    flat = np.concatenate(run.tokenizer.encode(evaluation_set(run, "functions").corpus[:512]))
    windows = flat[: min(len(flat) // length, 64) * length].reshape(-1, length)
    levels = denoise.elbo_and_accuracy(params, run.model, windows, mask_id=mask_id, left_shift=left_shift)
    text = windows[0][: length // 2].copy()
    hidden = np.random.default_rng(run.config.seed).random(len(text)) < run.config.sample.mask_fraction
    hidden[0] = False
    original = run.tokenizer.decode(text)
    text[hidden] = mask_id
    states = denoise.denoise(
        params, run.model, text, mask_id=mask_id, tokens_per_step=run.config.sample.tokens_per_step,
        left_shift=left_shift, length=length,
    )  # fmt: skip
    shown = sorted({0, len(states) // 2, len(states) - 1})
    return {
        "elbo": levels.pop("elbo")["nll"],
        "diffusion": [{"t": float(t), **figures} for t, figures in levels.items()],
        "denoising": [{"step": k, "text": show_masked(run.tokenizer, states[k])} for k in shown]
        + [{"step": "original", "text": original}],
    }


def show_masked(tokenizer, tokens: np.ndarray) -> str:
    """Decoded text with an underscore for each masked token."""
    pieces, start = [], 0
    for i in [*np.flatnonzero(tokens == tokenizer.mask_id), len(tokens)]:
        if i > start:
            pieces.append(tokenizer.decode(tokens[start:i]))
        if i < len(tokens):
            pieces.append("_")
        start = i + 1
    return " ".join(pieces)


def mine(run: Run) -> dict:
    """Hard negatives for the triplet stage out of the pair checkpoint, as a store of their own."""
    config, target = run.config.mining, run.data / "tasks" / "triplet"
    if (target / "info.json").exists():  # `embed train` of the triplet stage was there before
        return json.loads((target / "info.json").read_text())["info"]["mined"]
    store = run.store(config.task)
    examples = store.read(np.arange(len(store)))
    encoder = run.encoder(run.params("pair"))
    queries, documents = ([example[side] for example in examples] for side in ("query", "document"))
    ids = content_ids(queries)
    # Stores are shuffled: the first so many are a fair sample. All examples that ask the same come along, or their
    # documents would be taken for negatives.
    rows = np.flatnonzero(np.isin(ids, ids[: config.queries or None]))
    chosen, counts = mining.mine(
        encoder.encode_tokens([queries[i] for i in rows]), encoder.encode_tokens(documents), rows,
        num_negatives=config.num_negatives, rank_window=tuple(config.rank_window), margin=config.margin,
        query_ids=ids[rows], document_ids=content_ids(documents),
    )  # fmt: skip
    writer = Writer(target, ["query", "document", "negatives", "negative_lengths"])
    none = np.zeros(0, np.int32)
    for example, row in zip((examples[i] for i in rows), chosen):
        negatives = [examples[j]["document"] for j in row if j >= 0]
        writer.append(
            {
                "query": example["query"],
                "document": example["document"],
                "negatives": np.concatenate(negatives) if negatives else none,
                "negative_lengths": np.array([len(n) for n in negatives], np.int32),
            }
        )
    mined = {"documents": len(examples), **counts}
    writer.close({"task": "triplet", "mined_by": "pair", "mining": config.to_dict(), "mined": mined})
    return mined


def merge_sweep(run: Run) -> dict:
    """nDCG@10 of slerp at each ratio on the development split."""
    a, b = run.params("contextual"), run.params("triplet")
    functions, contextual = (evaluation_set(run, name, "development") for name in ("functions", "contextual"))
    sweep = []
    for ratio in run.config.merge.sweep:
        encoder = run.encoder(merge.slerp(a, b, ratio))
        figures = {
            name: retrieval.evaluate_retrieval(encoder, data, ("float32",))["float32"]["ndcg@10"]
            for name, data in (("functions", functions), ("contextual", contextual))
        }
        sweep.append({"ratio": ratio, **figures})
    return {"slerp_ratio": run.config.merge.ratio, "slerp_sweep": sweep}


FORMATS = ("native", "sentence-transformers", "pplx", "onnx")


def export_model(run: Run, checkpoint: str, folder, layout: str = "native") -> Path:
    """Write a checkpoint of a run as a model, with a card: for embed.inference (native) or for other programs."""
    known = (*run.config.stages, "merged", "random init")
    if checkpoint not in known:
        raise ValueError(f"checkpoint {checkpoint!r} must be one of {', '.join(known)}")
    settings = {
        "matryoshka": list(run.config.stages.pair.matryoshka),
        "separator": run.config.export.separator,
        "max_length": run.config.export.max_length or None,
    }
    source = provenance() | {"checkpoint": checkpoint, "config": run.config.to_dict()}
    file = run.workdir / "steps" / f"evaluate {checkpoint}.json"
    if file.exists():
        source["figures"] = json.loads(file.read_text())["result"]
    return write_model(
        folder, run.params(checkpoint), run.model, run.tokenizer, embedding=settings, source=source, layout=layout
    )


def convert_model(model: str, folder, layout: str, *, revision: str | None = None) -> Path:
    """Write a model that embed.inference loads in another layout."""
    if Path(model).is_dir() and Path(model).resolve() == Path(folder).resolve():
        raise ValueError(f"--output={folder} is the model itself; choose another folder")
    params, config, tokenizer, embedding, about = read_model(model, revision=revision)
    # What made the model stays; where it was taken from comes beside it.
    taken = {"source": {"path": str(model), "revision": revision, "digest": about["digest"]}}
    source = provenance() | about["provenance"] | taken
    return write_model(folder, params, config, tokenizer, embedding=embedding, source=source, layout=layout)


def write_model(folder, params, config, tokenizer, *, embedding: dict, source: dict, layout: str) -> Path:
    """Write parameters as a model in one of FORMATS; `source` is its provenance, of which the card tells."""
    if layout not in FORMATS:
        raise ValueError(f"format {layout!r} must be one of {', '.join(FORMATS)}")
    card = model_card(config, embedding, source, layout=layout)
    common = dict(embedding=embedding, provenance=source, card=card)
    if layout == "native":
        return export.export(folder, params, config, tokenizer, **common)
    if layout == "onnx":
        return onnx.write(folder, params, config, tokenizer, **common)
    return huggingface.write(folder, params, config, tokenizer, layout=layout, **common)


def export_models(run: Run) -> dict:
    """export/embed (the merged model) and export/embed-context (the contextual one)."""
    names = {"embed": "merged", "embed-context": "contextual"}
    for name, checkpoint in names.items():
        export_model(run, checkpoint, run.workdir / "export" / name)
    return names


def provenance() -> dict:
    """The git commit and the versions of what computed, and the name that a launcher gave the run (EMBED_RUN_ID).

    Where there is no git, a launcher can tell the commit in EMBED_COMMIT.
    """
    root, commit = Path(__file__).parent.parent, ""
    if (root / ".git").exists() and shutil.which("git"):  # not that of a repository which holds this installation
        describe = ["git", "-C", root, "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "commit": commit or os.environ.get("EMBED_COMMIT") or "unknown",
        **({"run_id": os.environ["EMBED_RUN_ID"]} if os.environ.get("EMBED_RUN_ID") else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "device": jax.devices()[0].device_kind,
    }


def worked_search(run: Run) -> dict:
    """One query against the held-out functions with the exported model."""
    data, precision = evaluation_set(run, "functions"), "int8"
    encoder = load(run.workdir / "export" / "embed")
    index = Index(encoder.encode(data.corpus, precision=precision), precision)
    query = data.queries[0]
    scores, found = index.search(encoder.encode([query], precision=precision), 5)
    hits = [
        {
            "rank": k + 1,
            "score": float(scores[0, k]),
            "id": data.corpus_ids[i],
            "text": " ".join(data.corpus[i].split())[:80],
        }
        for k, i in enumerate(found[0])
    ]
    return {"query": query, "precision": precision, "hits": hits}


def machine() -> str:
    """What this computes on, in words."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}"


def steps_of(run: Run) -> list[tuple[str, Callable[[Run], dict]]]:
    """Every step in order."""

    def stage(name):
        return name, lambda run: train_stage(run, name)

    def evaluation(name):
        return f"evaluate {name}", lambda run: evaluate(run, name)

    return [
        ("prepare", prepare),
        evaluation("random init"),
        stage("diffusion"),
        ("denoise", diffusion_report),
        evaluation("diffusion"),
        stage("pair"),
        evaluation("pair"),
        stage("contextual"),
        evaluation("contextual"),
        ("mine", mine),
        stage("triplet"),
        evaluation("triplet"),
        ("merge", merge_sweep),
        evaluation("merged"),
        ("baselines", evaluate_baselines),
        ("export", export_models),
        ("search", worked_search),
    ]


def run(run: Run) -> dict:
    """Every step that is not yet complete, then the report; returns what results.json holds."""
    results, seconds, sources = {}, {}, []
    for name, step in steps_of(run):
        file = run.workdir / "steps" / f"{name}.json"
        if not file.exists():
            console.print(f"[bold]{name}[/bold]")
            start, source = time.perf_counter(), provenance()
            result = step(run)
            write_json(file, {"result": result, "seconds": time.perf_counter() - start, **source})
        saved = json.loads(file.read_text())
        results[name], seconds[name] = saved["result"], round(saved["seconds"], 1)
        sources.append({key: saved[key] for key in ("commit", "versions", "device")})
    checkpoints = {n.removeprefix("evaluate "): r for n, r in results.items() if n.startswith("evaluate ")}
    metrics = {name: run.workdir / name / "metrics.jsonl" for name in results if name in run.config.stages}
    total = {
        "command": f"embed pipeline --config={run.config_path}",
        "machine": machine(),
        # Of the first step; "commits" tells whether a run was continued by another state of the code.
        **sources[0],
        "commits": sorted({source["commit"] for source in sources}),
        "checkpoints": checkpoints | results["baselines"],
        **results["denoise"],
        **results["merge"],
        "search": results["search"],
        "seconds": seconds,
        "seconds_per_step": {name: read_metrics(path)[-1]["seconds_per_step"] for name, path in metrics.items()},
        "data": results["prepare"] | {f"mined: {name}": count for name, count in results["mine"].items()},
    }
    write_json(run.workdir / "results.json", total)
    path = report.write_report(run.workdir, total, metrics)
    console.print(report.render_table(total))
    search = total["search"]
    console.print(f"[bold]embed search[/bold]: {search['query']}")
    for hit in search["hits"]:
        console.print(f"  {hit['rank']}  {hit['score']:.3f}  {hit['id']}", markup=False, highlight=False)
    console.print(f"{sum(seconds.values()):.0f} s in all. Report: {path}; model: {run.workdir / 'export' / 'embed'}")
    return total
