"""Write a checkpoint as a model folder, or with --format=pplx or onnx for other programs."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed export arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed export", description=__doc__)
    common.add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", help="with --config and --workdir: a stage of the config, or a merge")
    parser.add_argument("--model", help="instead of a run: a model that exists, a folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--format", default="", help="pplx or onnx; without it the folder that every program here reads")
    parser.add_argument("--tanh", action="store_true", help="other programs get tanh(v) for a vector v, as int8 training saw it")
    parser.add_argument("--output", required=True, help="folder to write, on a disk or in a bucket")
    arguments, overrides = parser.parse_known_args(argv)
    run = [arguments.config, arguments.workdir, arguments.checkpoint]
    if not (all(run) and not arguments.model) and not (arguments.model and not any(run) and not overrides):
        parser.error("needs either --config, --workdir and --checkpoint, or --model alone")
    from embed.checkpoints import export

    export.check_replaceable(arguments.output)
    how = {"format": arguments.format, "tanh": arguments.tanh}
    if arguments.model:
        print(export_model(arguments.model, arguments.output, revision=arguments.revision, **how))
    else:
        from embed import config, pipeline

        resolved = config.load(arguments.config, overrides)
        run = pipeline.Run(resolved, arguments.workdir, arguments.config)
        print(pipeline.export_model(run, arguments.checkpoint, arguments.output, **how))
    return 0


def export_model(source: str, output: str, *, revision: str | None, format: str, tanh: bool):
    """Write a model that exists as another folder; its parameters are sharded over the devices on their way."""
    from embed import paths
    from embed.checkpoints import export, model_folder
    from embed.models import sharding
    from embed.models.transformer import abstract_params

    if paths.path(source) == paths.path(output):
        raise ValueError(f"--output={output} is the model itself; choose another folder")
    model = model_folder.open_model(source, revision)
    if model.causal:
        raise ValueError(f"{source} is a causal language model, not an encoder: it can be the `init` of a stage")
    shardings = sharding.parameter_shardings(sharding.make_mesh(data=1, fsdp=-1), abstract_params(model.config))
    # What made the model stays; where it was taken from comes beside it.
    taken = {"source": {"path": model.source, "revision": revision, "digest": model.digest}}
    return export.write(
        output, model.params(shardings), model.config, model.tokenizer(), embedding=model.embedding,
        provenance=model.provenance | taken, format=format, tanh=tanh,
    )  # fmt: skip


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
