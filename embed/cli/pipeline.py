"""Run the whole graph of a config, skipping what is complete: --config=FILE.py --workdir=DIR."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed pipeline arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("pipeline", __doc__)
    common.add_config_arguments(parser, prepares=True)
    common.add_distributed_arguments(parser)
    arguments, config = common.parse_config(parser, argv)
    common.join(arguments)
    with common.keeps_work():
        from embed import graph, runs

        run = runs.Run(config, arguments.workdir, arguments.config)
        with run.compilation_cache():
            graph.walk(run, common.config_command("pipeline", arguments.config, common.config_options(parser, argv)))
    return 0
