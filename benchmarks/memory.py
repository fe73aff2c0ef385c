"""The peak memory of loading and exporting a checkpoint of the 0.6B size, and of encoding one long text.

    python benchmarks/memory.py

Weights are random. Each line is the largest resident size of a separate process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from header import header

from embed.checkpoints import model_folder, names
from embed.cli.export import main as run_export
from embed.models import transformer

LENGTHS = (8192, 32768)


def write_checkpoint(folder: Path, size: str, files: int) -> None:
    """A causal Qwen3 of a named size in bfloat16, with a tokenizer of two words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1}, unk_token="[UNK]"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}), encoding="utf-8")
    config = transformer.make_config(size, 151936)
    shapes = names.shapes(config, "model.")
    rng, tensors, weight_map = np.random.default_rng(0), list(shapes), {}
    for i in range(files):
        in_file = tensors[i::files]
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        arrays = {n: rng.random(shapes[n], np.float32).astype(ml_dtypes.bfloat16) for n in in_file}
        safetensors.numpy.save_file(arrays, folder / file)
        weight_map |= dict.fromkeys(in_file, file)
    (folder / names.INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    fields = {theirs: getattr(config, ours) for ours, theirs in names.FIELDS.items()}
    fields |= {"model_type": "qwen3", "rope_theta": config.rope_theta, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def peak() -> float:
    """Largest resident size of this process so far, in GB. getrusage would include the parent's."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / 1e9


def load(folder: str, dtype: str) -> float:
    """Peak of loading a checkpoint, in GB, less the peak before it."""
    checkpoint = model_folder.open_model(folder)
    before = peak()
    params = checkpoint.params(dtype=dtype)
    assert params["norm"].is_ready()
    return peak() - before


def export(folder: str) -> float:
    """Peak of `embed export`, which loads and writes float32, in GB, less the peak before it."""
    before = peak()
    with tempfile.TemporaryDirectory() as scratch:
        assert run_export([f"--model={folder}", f"--output={scratch}/out"]) == 0
    return peak() - before


def encode(length: str, size: str) -> float:
    """Peak of encoding one text of `length` tokens with a model of a named size, in GB."""
    import jax

    from embed.inference import Encoder

    class Tokenizer:  # unused: the text is given as tokens
        vocab_size = 8192

    config = transformer.make_config(size, 8192)
    encoder = Encoder(transformer.init(config, jax.random.key(0)), config, Tokenizer())
    tokens = np.random.default_rng(0).integers(0, 8192, int(length)).astype(np.int32)
    assert np.isfinite(encoder.encode_tokens([tokens])).all()
    return peak()


def measure(*arguments: str) -> float:
    """The result of load, export or encode in a new process."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="*", help=argparse.SUPPRESS)  # what a process started by `measure` computes
    parser.add_argument("--files", type=int, default=2, help="number of safetensors files of the checkpoint")
    arguments = parser.parse_args()
    if arguments.measure:
        name, *rest = arguments.measure
        print({"load": load, "export": export, "encode": encode}[name](*rest))
        return
    print(header() + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder, "0.6b", arguments.files)
        largest = max(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        print("0.6B from bfloat16 files, GB; load is ModelFolder.params, export is `embed export` with its writing:\n")
        print("| | parameters | model | largest file | peak above that before | (peak − model) / largest file |")
        print("|---|---|---|---|---|---|")
        for dtype, width in (("float32", 4), ("bfloat16", 2)):
            model = 596_049_920 * width / 1e9
            for name in ("load", "export") if dtype == "float32" else ("load",):
                used = measure(name, scratch, *([dtype] if name == "load" else []))
                excess = (used - model) / largest
                print(f"| {name} | {dtype} | {model:.2f} | {largest:.2f} | {used:.2f} | {excess:.2f} |", flush=True)
    print("\nEncoding one text with the tiny size, float32, GB:\n\n| tokens | peak of the whole process |\n|---|---|")
    for length in LENGTHS:
        print(f"| {length} | {measure('encode', str(length), 'tiny'):.2f} |", flush=True)


if __name__ == "__main__":
    main()
