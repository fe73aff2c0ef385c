"""Prepare the data of a config: sources, tokenizer, tasks and evaluation sets."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed prepare arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("prepare", __doc__)
    common.add_config_arguments(parser)
    arguments, config = common.parse_config(parser, argv)
    from embed import nodes, runs

    nodes.prepare(runs.Run(config, arguments.workdir, arguments.config))
    return 0
