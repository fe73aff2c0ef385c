"""Train one stage: --config=FILE.py:stage=pair --workdir=DIR; started again, it continues."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed train arguments`; returns the exit code."""
    from embed.cli import common

    parser = argparse.ArgumentParser("embed train", description=__doc__)
    common.add_config_arguments(parser)
    parser.add_argument(
        "--distributed", action="store_true", help="join the job's other processes: TPU pod, GKE, Slurm"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, for a run of several processes")
    parser.add_argument("--num_processes", type=int, help="how many processes train together")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--profile_steps", default="", help="A:B traces steps A to B-1 into STAGE/profile, for TensorBoard"
    )
    parser.add_argument("--wandb", default="", help="Weights & Biases project to log to as well")
    arguments, config = common.parse_config(parser, argv)
    if not arguments.num_processes and (arguments.coordinator or arguments.process_id is not None):
        raise ValueError("--coordinator and --process_id need --num_processes: this process would train alone")
    if arguments.distributed and arguments.num_processes:
        raise ValueError("--distributed finds the processes by itself: leave out --num_processes")
    profile_steps = common.parse_range("--profile_steps", arguments.profile_steps)
    if arguments.distributed or arguments.num_processes:
        import jax

        try:
            jax.distributed.initialize(
                arguments.coordinator, arguments.num_processes, arguments.process_id,
                heartbeat_timeout_seconds=60,  # so long after a process died the others end
            )  # fmt: skip
        except RuntimeError as error:  # the others are not there yet, or no more
            from embed.training.loop import PeerLostError

            raise PeerLostError(f"cannot join the other processes: {error}; the same command tries again") from error
    from embed import pipeline

    run = pipeline.Run(config, arguments.workdir, arguments.config)
    pipeline.train_stage(run, config.stage, profile_steps=profile_steps, wandb=arguments.wandb)
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
