"""Training steps of each stage beside the same model in PyTorch: tokens a second, MFU, peak memory.

    python benchmarks/train.py                                                      small, two CPU cores
    python benchmarks/train.py --config=configs/qwen3.py:size=0.6b --rows=8 --microbatches=4   one GPU
    python benchmarks/train.py --config=configs/qwen3.py:size=0.6b --stages diffusion --rows=8

Both sides run the stage of the config on the same random tokens, as long as the config's rows hold them without padding: ours
packs texts into rows, PyTorch (transformers' Qwen3, scaled-dot-product attention, fused AdamW, torch.compile on a GPU) gets
them as a batch of equal lengths. Objective, Matryoshka prefixes, int8 rounding, clipping and microbatches (gradient caching) are the same, but
for PyTorch's plain cross-entropy where ours masks false negatives. bfloat16 over float32 parameters on a GPU, float32 on CPU.
Each side and stage is a process of its own. Needs no TensorFlow, no seqio; without torch its rows are left out, and said so.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIDES = ("embed", "PyTorch")


class Texts:
    """What the contrastive loaders read: random examples of texts of one length."""

    def __init__(self, stage, length: int, vocabulary: int):
        self.stage, self.length, self.vocabulary = stage, length, vocabulary

    def __len__(self) -> int:
        return 1_000_000

    def read(self, indices: np.ndarray) -> list[dict]:
        return [self._example(np.random.default_rng(int(i))) for i in indices]

    def _example(self, rng) -> dict:
        batch, x = self.stage.batch, self.length

        def tokens(count):
            return rng.integers(5, self.vocabulary, count * x).astype(np.int32)

        if self.stage.kind == "contextual":
            c, q = batch.max_chunks, batch.max_queries_per_document
            return {
                "document": tokens(c), "chunk_lengths": np.full(c, x), "queries": tokens(q), "query_lengths": np.full(q, x),
                "positives": np.arange(q) % c,
            }  # fmt: skip
        k = batch.get("num_negatives", 0)
        return {"query": tokens(1), "document": tokens(1), "negatives": tokens(k), "negative_lengths": np.full(k, x)}


def pieces(stage) -> int:
    """Texts of an example, chunks counted one by one."""
    batch = stage.batch
    if stage.kind == "contextual":
        return batch.max_chunks + batch.max_queries_per_document
    return 2 + batch.get("num_negatives", 0)


def text_length(stage) -> int:
    """The longest texts that fill a group's rows and are not cut."""
    batch = stage.batch
    room = batch.rows_per_group * batch.length / (batch.group_size * pieces(stage))
    if stage.kind == "contextual":
        return min(
            int(0.8 * room), batch.length // batch.max_chunks
        )  # a document is in one row, and rows hold no parts of one
    return batch.length // -(-batch.length // int(room)) if room < batch.length else batch.length


def load_stage(arguments):
    """(config, stage, model config) with the batch made as small as the command line says."""
    import dataclasses

    from embed import config as configs
    from embed.models.transformer import TransformerConfig

    config = configs.load(arguments.config, arguments.overrides)
    stage = config.stages[arguments.measure[0]]
    with stage.unlocked():
        if arguments.rows and stage.kind == "diffusion":
            stage.batch.rows = arguments.rows
        elif arguments.rows:
            stage.batch.groups = max(1, arguments.rows * 4096 // (stage.batch.rows_per_group * stage.batch.length))
        if arguments.microbatches:
            stage.microbatches = arguments.microbatches
    fields = config.model.to_dict()
    model = TransformerConfig(**fields | {"vocab_size": fields["vocab_size"] or config.data.vocab_size})
    on_gpu = arguments.platform == "gpu"
    return config, stage, dataclasses.replace(model, dtype="bfloat16" if on_gpu else "float32")


def rows_of_tokens(stage, vocabulary: int) -> np.ndarray:
    """Full rows for the diffusion stage, int32 [R, L]."""
    return np.random.default_rng(0).integers(5, vocabulary, (stage.batch.rows, stage.batch.length)).astype(np.int32)


def measure_embed(arguments) -> dict:
    import jax

    from embed.models import transformer
    from embed.training import loop, optimizer, plan, sharding, stages

    config, stage, model = load_stage(arguments)
    if stage.kind == "diffusion":
        tokens = rows_of_tokens(stage, model.vocab_size - 1)
        positions = np.tile(np.arange(stage.batch.length, dtype=np.int32), (stage.batch.rows, 1))
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    else:
        stores = {"random": Texts(stage, text_length(stage), model.vocab_size - 1)}
        loader = stages.make_loader(stage, stores, [(1, {"random": 1.0})], seed=0, separator_id=None)
        batch = loader.batch(0)
        if batch.pop("stats")["cut"]:
            raise SystemExit(f"texts of {text_length(stage)} tokens do not fit the rows of stage {stage.kind}")
    count = int((batch["segment_ids"] > 0).sum())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loss = stages.make_loss(stage, model, mask_id=model.vocab_size - 1)
    tx = optimizer.make_optimizer(stage.optimizer, lambda step: 1e-4)
    abstract = transformer.abstract_params(model)
    where = sharding.parameter_shardings(mesh, abstract)
    where_state = sharding.state_shardings(mesh, jax.eval_shape(tx.init, abstract), where)
    params = jax.jit(transformer.init, static_argnums=0, out_shardings=where)(model, jax.random.key(0))
    state, batch = jax.jit(tx.init, out_shardings=where_state)(params), sharding.put_batch(mesh, batch)
    step = jax.jit(
        loop.make_train_step(loss, tx, 0, 100), donate_argnums=(0, 1), out_shardings=(where, where_state, None)
    )
    seconds = []
    for k in range(arguments.steps + 1):
        begun = time.perf_counter()
        with jax.set_mesh(mesh):
            params, state, metrics = step(params, state, batch, k)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": statistics.median(seconds[1:]), "tokens": count, "flops": plan.model_flops(stage, model),
        "memory": stats.get("peak_bytes_in_use", resident()), "loss": float(metrics["loss"]),
    }  # fmt: skip


def measure_pytorch(arguments) -> dict:
    import torch
    import transformers
    from torch.nn import functional as F

    config, stage, ours = load_stage(arguments)
    device = "cuda" if arguments.platform == "gpu" else "cpu"
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=ours.vocab_size, hidden_size=ours.hidden_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads, head_dim=ours.head_dim,
        intermediate_size=ours.intermediate_size, rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        is_causal=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.Qwen3Model(transformers.Qwen3Config(**sizes)).to(device).train()
    if ours.remat != "none":
        model.gradient_checkpointing_enable()
    settings = stage.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(settings.b1, settings.b2), eps=settings.eps,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    forward = torch.compile(model) if device == "cuda" else model

    def hidden(ids):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return forward(input_ids=ids).last_hidden_state

    def diffusion(ids):
        noise = torch.rand(ids.shape[0], 1, device=device).clamp(1e-3)
        masked = torch.rand(ids.shape, device=device) < noise
        parts = torch.arange(len(ids), device=device).chunk(stage.microbatches)
        for rows in parts:
            h = hidden(ids[rows].masked_fill(masked[rows], ours.vocab_size - 1))[masked[rows]]
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = F.linear(h, model.embed_tokens.weight)
            nll = F.cross_entropy(logits.float(), ids[rows][masked[rows]], reduction="none")
            loss = (nll / noise.expand_as(ids)[rows][masked[rows]]).sum() / ids.numel()
            loss.backward()
        return loss

    def pool(ids, x):
        """int8, straight through, of the mean of each x tokens: [n · pieces, D]."""
        h = hidden(ids).float()
        v = 127 * torch.tanh(h.view(-1, x, h.shape[-1]).mean(1))
        return v + (v.round() - v).detach()

    def contrast(tables):
        """Cross-entropy of each query against all documents and negatives, the mean over prefixes."""
        total = 0
        for p in stage.matryoshka:
            q, d, *others = (F.normalize(table[:, :p], dim=-1) for table in tables)
            scores = q @ torch.cat([d, *others]).T / stage.temperature
            total = total + F.cross_entropy(scores, torch.arange(len(q), device=device) % len(d))
        return total / len(stage.matryoshka)

    def contrastive(texts):
        x = text_length(stage)
        parts = [(name, part) for name, ids in texts for part in ids.chunk(stage.microbatches)]
        names = list(dict.fromkeys(name for name, _ in parts))

        def tables(found):
            return [torch.cat([e for (n, _), e in zip(parts, found) if n == name]) for name in names]

        if stage.microbatches == 1:
            loss = contrast(tables([pool(part, x) for _, part in parts]))
            loss.backward()
            return loss
        with torch.no_grad():
            cached = [pool(part, x) for _, part in parts]
        for table in cached:
            table.requires_grad_()
        loss = contrast(tables(cached))
        loss.backward()
        for (_, part), table in zip(parts, cached):
            (pool(part, x) * table.grad).sum().backward()
        return loss

    if stage.kind == "diffusion":
        data = torch.tensor(rows_of_tokens(stage, ours.vocab_size - 1), dtype=torch.int64, device=device)
        count, work = data.numel(), lambda: diffusion(data)
    else:
        batch, x, n = stage.batch, text_length(stage), stage.batch.groups * stage.batch.group_size
        shapes = {"queries": (n, x), "documents": (n, x)}
        if stage.kind == "triplet":
            shapes["negatives"] = (n * batch.num_negatives, x)
        if stage.kind == "contextual":
            shapes = {"queries": (n * batch.max_queries_per_document, x), "documents": (n, batch.max_chunks * x)}
        data = [(name, torch.randint(5, ours.vocab_size - 1, shape, device=device)) for name, shape in shapes.items()]
        count, work = sum(ids.numel() for _, ids in data), lambda: contrastive(data)

    def step():
        loss = work()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    seconds = []
    for _ in range(arguments.steps + 1):
        begun = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else resident()
    return {"seconds": statistics.median(seconds[1:]), "tokens": count, "memory": memory, "loss": loss}


def resident() -> int:
    """Largest resident size of this process so far, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_flops() -> tuple[float, str]:
    """FLOP/s of the device at its best, and where that figure is from."""
    import jax
    import jax.numpy as jnp

    from embed.training import plan

    if (known := plan.device_peak()) is not None:
        return known, "published"
    a = jnp.ones((2048, 2048))
    product, seconds = jax.jit(jnp.matmul), []
    for _ in range(8):
        begun = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * 2048**3 / min(seconds), "one 2048³ product"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--stages", nargs="*", default=["diffusion", "pair", "contextual", "triplet"])
    parser.add_argument(
        "--rows", type=int, default=0, help="rows of the batch; contrastive: of 4,096 tokens. 0 = the config's"
    )
    parser.add_argument("--microbatches", type=int, default=0, help="0 = the config's")
    parser.add_argument("--steps", type=int, default=5, help="timed, behind one that compiles")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--platform", help=argparse.SUPPRESS)
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.measure:
        measure = {"embed": measure_embed, "PyTorch": measure_pytorch}[arguments.measure[1]]
        print(json.dumps(measure(arguments)))
        return
    # The figures of the device in a process that ends: a GPU's memory is for those that are measured.
    about = [sys.executable, "-c", ABOUT]
    about = json.loads(
        subprocess.run(about, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1]
    )
    print(f"python {' '.join(sys.argv)}:\ncommit {about['commit']}, {about['machine']},")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    print(
        f"MFU against {about['peak'] / 1e12:.3g} TFLOP/s ({about['peak_source']}); medians of {arguments.steps} steps\n"
    )
    print("| stage | program | tokens a step | seconds | tokens/s | MFU | peak memory, GB | tokens/s to PyTorch's |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for stage in arguments.stages:
        found = {}
        for side in SIDES:
            if side == "PyTorch" and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
                print(f"| {stage} | {side} | torch and transformers are not installed | | | | | |")
                continue
            command = [sys.executable, *sys.argv, "--measure", stage, side, f"--platform={about['platform']}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(
                    f"| {stage} | {side} | failed: {done.stderr.strip().splitlines()[-1][:150]} | | | | | |", flush=True
                )
                continue
            found[side] = json.loads(done.stdout.splitlines()[-1])
        for side, one in found.items():
            speed = one["tokens"] / one["seconds"]
            flops = found.get("embed", one).get("flops")
            # The same model FLOPs a token for both.
            mfu = f"{flops / found['embed']['tokens'] * speed / about['peak']:.1%}" if flops else ""
            ratio = speed * found["PyTorch"]["seconds"] / found["PyTorch"]["tokens"] if "PyTorch" in found else None
            cells = [
                stage,
                side,
                f"{one['tokens']:,}",
                f"{one['seconds']:.3f}",
                f"{speed:,.0f}",
                mfu,
                f"{one['memory'] / 1e9:.2f}",
            ]
            print("| " + " | ".join([*cells, f"{ratio:.2f}" if ratio else ""]) + " |", flush=True)


ROOT = Path(__file__).parent.parent
ABOUT = """
import json, sys
sys.path.insert(0, "benchmarks")
import jax, train
from importlib.metadata import version, PackageNotFoundError
from embed import pipeline
source = pipeline.provenance()
for name in ("torch", "transformers"):
    try:
        source["versions"][name] = version(name)
    except PackageNotFoundError:
        pass
peak, peak_source = train.peak_flops()
print(json.dumps(source | {"machine": pipeline.machine(), "peak": peak, "peak_source": peak_source, "platform": jax.default_backend()}))
"""

if __name__ == "__main__":
    main()
