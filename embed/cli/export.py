"""Write a checkpoint as a model for inference, here or elsewhere: --format=native, sentence-transformers, pplx or onnx."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed export arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed export", description=__doc__)
    common.add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", help="with --config and --workdir: a stage of the config, or merged")
    parser.add_argument("--model", help="instead of a run: a model that exists, a folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--format", default="native", help="native (the default), sentence-transformers, pplx, onnx")
    parser.add_argument("--output", required=True, help="folder to write")
    common.add_distributed_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    run = [arguments.config, arguments.workdir, arguments.checkpoint]
    if not (all(run) and not arguments.model) and not (arguments.model and not any(run) and not overrides):
        parser.error("needs either --config, --workdir and --checkpoint, or --model alone")
    from embed import config, pipeline

    common.join(arguments, saves_at_sigterm=False)
    if arguments.model:
        path = pipeline.convert_model(
            arguments.model, arguments.output, arguments.format, revision=arguments.revision
        )  # fmt: skip
    else:
        resolved = config.load(arguments.config, overrides)
        run = pipeline.Run(resolved, arguments.workdir, arguments.config)
        path = pipeline.export_model(run, arguments.checkpoint, arguments.output, arguments.format)
    print(path)
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
