"""Merge two models on the sphere, weight by weight: --a=FOLDER --b=FOLDER --ratio=0.5 --output=FOLDER."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed merge arguments`; returns the exit code."""
    parser = argparse.ArgumentParser("embed merge", description=__doc__)
    parser.add_argument("--a", required=True, help="a model: a folder or hub id; ratio 0 gives it back")
    parser.add_argument(
        "--b", required=True, help="another of the same architecture and tokenizer; ratio 1 gives it back"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="how far from a to b (default 0.5)")
    parser.add_argument("--tanh", action="store_true", help="other programs get tanh(v) for a vector v, as int8 training saw it")
    parser.add_argument("--output", required=True, help="folder to write, on a disk or in a bucket")
    arguments = parser.parse_args(argv)
    from embed.checkpoints import export, merge, model_folder
    from embed.models import sharding
    from embed.models.transformer import abstract_params, encoder_only

    if not 0 <= arguments.ratio <= 1:
        raise ValueError(f"--ratio={arguments.ratio} must be between 0 and 1")
    export.check_replaceable(arguments.output)
    a, b = (model_folder.open_model(path) for path in (arguments.a, arguments.b))
    config = check_alike(a, b)
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    shardings = sharding.parameter_shardings(mesh, abstract_params(config))
    params = [encoder_only(m.config, m.params(shardings))[1] for m in (a, b)]
    merged = merge.merge_params(*params, arguments.ratio, shardings)
    provenance = {
        "checkpoint": "merged",
        "merge": {"of": [a.source, b.source], "ratio": arguments.ratio},
        "parents": [{"name": n, "folder": m.source, "digest": m.digest} for n, m in (("a", a), ("b", b))],
    }
    embedding = a.embedding | {"contextual": a.embedding["contextual"] and b.embedding["contextual"]}
    print(
        export.write(
            arguments.output, merged, config, a.tokenizer(), embedding=embedding, provenance=provenance,
            tanh=arguments.tanh,
        )
    )  # fmt: skip
    return 0


def check_alike(a, b):
    """The TransformerConfig of two models that can be merged. ValueError lists what differs."""
    from embed.models.transformer import encoder_only

    for model in (a, b):
        if model.causal:
            raise ValueError(f"{model.source} is a causal language model: only encoders are merged")
    (config, _), (other, _) = (encoder_only(model.config, {}) for model in (a, b))
    problems = [] if config == other else [f"{config} in {a.source} and {other} in {b.source}"]
    if a.tokenizer().digest != b.tokenizer().digest:
        problems.append("different tokenizers")
    for name in ("matryoshka", "separator", "max_length"):
        if a.embedding[name] != b.embedding[name]:
            problems.append(f"{name} is {a.embedding[name]} in {a.source} and {b.embedding[name]} in {b.source}")
    if problems:
        raise ValueError(f"{a.source} and {b.source} embed differently and cannot be merged: " + "; ".join(problems))
    return config


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
