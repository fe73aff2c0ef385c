"""Train variants of a config with several seeds and compare them: --config=configs/ablations/NAME.py --workdir=DIR."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed ablate arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("ablate", __doc__)
    common.add_config_arguments(parser, prepares=True)
    common.add_distributed_arguments(parser)
    parser.add_argument("--only", nargs="+", default=[], help="names of variants; the others are left as they are")
    parser.add_argument("--dry-run", action="store_true", help="print one command per variant, for several machines")
    parser.add_argument(
        "--launcher", default="embed", help="what --dry-run prints before the verb; {variant} in it is replaced"
    )
    arguments, config = common.parse_config(parser, argv)
    options = [f"--data_root={arguments.data_root}"] if arguments.data_root else []
    options += parser.parse_known_args(argv)[1]
    if arguments.dry_run:
        from embed import ablation

        for line in ablation.commands(config, arguments.workdir, arguments.config, options, arguments.launcher):
            print(line)
        return 0
    common.join(arguments)
    with common.keeps_work():
        from embed import ablation

        ablation.ablate(config, arguments.workdir, arguments.config, arguments.only, options)
    return 0
