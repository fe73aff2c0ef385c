"""Train one stage: --config=FILE.py:stage=pair --workdir=DIR; started again, it continues."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed train arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed train", description=__doc__)
    common.add_config_arguments(parser)
    parser.add_argument("--coordinator", help="host:port of process 0, for a run of several processes")
    parser.add_argument("--num_processes", type=int, help="how many processes train together")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    arguments, config = common.parse_config(parser, argv)
    if not arguments.num_processes and (arguments.coordinator or arguments.process_id is not None):
        raise ValueError("--coordinator and --process_id need --num_processes: this process would train alone")
    if arguments.num_processes:
        import jax

        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    from embed import pipeline

    pipeline.train_stage(pipeline.Run(config, arguments.workdir, arguments.config), config.stage)
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
