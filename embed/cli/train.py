"""Train one stage: --config=FILE.py:stage=pair --workdir=DIR. The same command continues an interrupted stage."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed train arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("train", __doc__)
    common.add_config_arguments(parser)
    common.add_distributed_arguments(parser)
    parser.add_argument(
        "--profile_steps", default="", help="A:B writes a trace of steps A to B-1 to STAGE/profile, for TensorBoard"
    )
    parser.add_argument("--wandb", default="", help="also log to this Weights & Biases project")
    arguments, config = common.parse_config(parser, argv)
    profile_steps = common.parse_range("--profile_steps", arguments.profile_steps)
    common.join(arguments)
    with common.keeps_work():
        from embed import graph, nodes, runs

        run = runs.Run(config, arguments.workdir, arguments.config)
        runs.check_stage(config, config.stage)
        if profile_steps.stop > run.steps(config.stage):
            raise ValueError(
                f"--profile_steps={arguments.profile_steps} must end at or before {run.steps(config.stage)}, the "
                f"number of steps of stage {config.stage}"
            )
        graph.check(config, whole=False)  # or the export after hours of training would be refused
        with run.compilation_cache():
            nodes.train_stage(run, config.stage, profile_steps=profile_steps, wandb=arguments.wandb)
    return 0
