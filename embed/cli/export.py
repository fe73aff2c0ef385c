"""Export a checkpoint as a model folder, or for other programs: --format=pplx or onnx."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed export arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("export", __doc__)
    common.add_config_arguments(parser, required=False)
    common.add_distributed_arguments(parser)
    parser.add_argument("--checkpoint", help="with --config and --workdir: a stage or merge of the config")
    parser.add_argument("--model", help="instead of these: a model folder, hub id, or stage folder of any run")
    common.add_step_argument(parser)
    parser.add_argument("--format", default="", help="pplx or onnx (default: a model folder)")
    parser.add_argument("--tanh", action="store_true", help="add a module after pooling: float32 vectors are tanh(v)")
    parser.add_argument(
        "--contextual", action="store_true", help="with a stage folder as --model: export a contextual model"
    )
    common.add_output_arguments(parser, "folder to write")
    arguments, overrides = parser.parse_known_args(argv)
    of_run = [arguments.config, arguments.workdir, arguments.checkpoint]
    if not (all(of_run) and not arguments.model) and not (arguments.model and not any(of_run) and not overrides):
        parser.error("needs either --config, --workdir and --checkpoint, or only --model")
    if arguments.contextual and not arguments.model:
        parser.error("--contextual is for --model; with --config, set exports.NAME.contextual")
    common.join(arguments, saves_at_sigterm=False)
    from embed import config, exports, runs
    from embed.checkpoints import settings
    from embed.console import say

    options = dict(step=arguments.step, format=arguments.format, tanh=arguments.tanh)
    with common.output(arguments, inputs=[arguments.model], is_ours=settings.is_export):
        if arguments.model:
            path = exports.export_source(arguments.model, arguments.output, contextual=arguments.contextual, **options)
        else:
            resolved = config.load(arguments.config, overrides)
            run = runs.Run(resolved, arguments.workdir, arguments.config)
            path = exports.export_model(run, arguments.checkpoint, arguments.output, **options)
    say(str(path))
    return 0
