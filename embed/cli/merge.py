"""Merge two exported models on the sphere, tensor by tensor: --a=FOLDER --b=FOLDER --ratio=0.5 --output=FOLDER."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed merge arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed merge", description=__doc__)
    parser.add_argument("--a", required=True, help="an exported model; ratio 0 gives it back")
    parser.add_argument(
        "--b", required=True, help="another of the same architecture and tokenizer; ratio 1 gives it back"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="how far from a to b (default 0.5)")
    parser.add_argument("--output", required=True, help="folder to write")
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    from embed import inference
    from embed.checkpoints import export, merge

    if not 0 <= arguments.ratio <= 1:
        raise ValueError(f"--ratio={arguments.ratio} must be between 0 and 1")
    common.join(arguments, saves_at_sigterm=False)
    a, b = (inference.load(path, dtype="float32") for path in (arguments.a, arguments.b))
    if a.tokenizer.digest != b.tokenizer.digest:
        raise ValueError(
            f"{arguments.a} and {arguments.b} have different tokenizers: their vectors mean different things"
        )
    settings, other = (
        {"matryoshka": list(m.matryoshka), "separator": m.separator, "max_length": m.max_length} for m in (a, b)
    )
    for name, value in settings.items():
        if value != other[name]:
            raise ValueError(
                f"{name} is {value} in {arguments.a} and {other[name]} in {arguments.b}: they embed differently"
            )
    provenance = {"merged": [arguments.a, arguments.b], "ratio": arguments.ratio}
    merged = merge.slerp(a.params, b.params, arguments.ratio)
    print(export.export(arguments.output, merged, a.config, a.tokenizer, embedding=settings, provenance=provenance))
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
