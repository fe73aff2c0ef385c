"""Prepare the data of a config: sources, tokenizer, tasks and evaluation sets.

An interrupted preparation continues with the same command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `embed prepare arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("prepare", __doc__)
    common.add_config_arguments(parser, prepares=True)
    parser.add_argument(
        "--check", action="store_true", help="only read a few rows of every source, and print what they give"
    )
    parser.add_argument("--processes", type=int, help="local worker processes (default: one per core)")
    common.add_runner_arguments(parser)
    arguments, config = common.parse_config(parser, argv)
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes={arguments.processes} must be at least 1")
    options = common.runner_options(arguments)
    from embed import nodes, runs

    run = runs.Run(config, arguments.workdir, arguments.config)
    if arguments.check:
        return 0 if nodes.check_preparation(run) else 2
    with common.keeps_work():
        nodes.prepare(run, processes=arguments.processes, runner=arguments.runner, runner_options=options)
    return 0
