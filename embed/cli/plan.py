"""Plan the time and memory of a training step on a TPU topology, without TPUs: --config=… --topology=v5p:4x4x8."""

import dataclasses
import itertools
import os


def main(argv: list[str] | None = None) -> int:
    """Run `embed plan arguments`; returns the exit code, 1 if the step does not fit."""
    from embed.cli import common

    parser = common.Parser("plan", __doc__)
    parser.add_argument("--config", required=True, help="config file and stage: FILE.py:stage=diffusion")
    parser.add_argument("--topology", required=True, help="chip and topology: v6e:8x8, v5p:4x4x8")
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        help="number of slices of that topology, joined along data by the network (default 1)",
    )
    parser.add_argument(
        "--mfu",
        type=common.finite,
        default=0.4,
        help="model FLOPs utilization, for the duration of the schedule (default 0.4)",
    )
    parser.add_argument("--dollars_per_chip_hour", type=common.finite, help="price, for the cost of the schedule")
    parser.add_argument("--parameters", action="store_true", help="also print the sharding of each parameter")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="try microbatches and rematerialization, and print the fastest plan that fits",
    )
    parser.epilog = "Set single fields of the config with --config.key.key=value."
    arguments, overrides = parser.parse_known_args(argv)
    # The step is compiled for other machines, so it needs no accelerator of this one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at the same time
    # libtpu warns about missing chips and metadata servers; errors of the compiler are raised as exceptions.
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from embed import config as configs
    from embed import fields, runs
    from embed.models import sharding, transformer
    from embed.training import plan, stages

    config = configs.load(arguments.config, overrides)
    fields.check(config)
    runs.check_stage(config, config.stage)
    stage, axes = config.stages[config.stage], config.execution.mesh.to_dict()
    model = transformer.from_config(config.model, config.execution, config.data.vocab_size)
    model = stages.stage_model(stage, model)
    _, chips = plan.parse_topology(arguments.topology)
    data, fsdp, _ = sharding.mesh_sizes(**axes, devices=chips * arguments.slices)
    if arguments.parameters:
        print(plan.parameter_table(model, arguments.topology, axes, arguments.slices))
    variants = [(stage.execution.microbatches, model.remat)]
    if arguments.fit:
        rows, _ = stages.abstract_batch(stage)["tokens"][0]
        parts = (
            data * fsdp if stage.kind == "diffusion" else 1
        )  # of each microbatch, every device has the same number of rows
        variants = [
            (m, remat)
            for m, remat in itertools.product((1, 2, 4, 8), transformer.REMAT_POLICIES)
            if rows % (m * parts) == 0
        ] or variants  # whose error says why nothing fits
    best = None
    for microbatches, remat in variants:
        stage.execution.microbatches = microbatches
        try:
            tried = plan.make_plan(
                stage, dataclasses.replace(model, remat=remat), arguments.topology, axes, slices=arguments.slices
            )
        except plan.DoesNotFitError as error:
            if not arguments.fit:
                raise
            print(f"microbatches {microbatches}, remat {remat}: {error}", flush=True)
            continue
        if arguments.fit:
            fits = "fits" if tried.fits else "does not fit"
            print(
                f"microbatches {microbatches}, remat {remat}: {tried.peak / 1e9:.1f} GB, {fits}, "
                f"at least {max(tried.bounds.values()):.3f} s",
                flush=True,
            )
        if best is None or (tried.fits, -max(tried.bounds.values())) > (best[0].fits, -max(best[0].bounds.values())):
            best = tried, microbatches, remat
    if best is None:
        raise plan.DoesNotFitError(f"none of these {len(variants)} plans fits on {arguments.topology}")
    chosen, microbatches, remat = best
    steps = sum(n for n, _ in stage.curriculum)
    topology = f"{arguments.slices} x {arguments.topology}" if arguments.slices > 1 else arguments.topology
    print(f"{arguments.config} on {topology}, microbatches {microbatches}, remat {remat}")
    print(plan.describe(chosen, stage, model, steps, arguments.mfu, arguments.dollars_per_chip_hour))
    return 0 if chosen.fits else 1
