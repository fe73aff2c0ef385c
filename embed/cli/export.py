"""Write a trained stage as a model that embed.inference loads: --workdir=DIR --checkpoint=triplet --output=FOLDER."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed export arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed export", description=__doc__)
    common.add_config_arguments(parser)
    parser.add_argument("--checkpoint", required=True, help="a stage of the config, or merged")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments, config = common.parse_config(parser, argv)
    from embed import pipeline

    run = pipeline.Run(config, arguments.workdir, arguments.config)
    print(pipeline.export_model(run, arguments.checkpoint, arguments.output))
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
