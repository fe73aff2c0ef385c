"""Train variants of a config with several seeds and compare them: --config=configs/ablations/NAME.py --workdir=DIR."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed ablate arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("ablate", __doc__)
    common.add_config_arguments(parser, prepares=True)
    common.add_distributed_arguments(parser)
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], help="names of variants; the others are left as they are"
    )
    parser.add_argument("--dry-run", action="store_true", help="print one command per variant, for several machines")
    parser.add_argument("--launcher", help="what --dry-run prints before the verb (embed); {variant} in it is replaced")
    arguments, config = common.parse_config(parser, argv)
    options = common.config_options(parser, argv)
    where = arguments.workdir, arguments.config
    if arguments.dry_run:
        from embed import ablation

        for line in ablation.commands(config, *where, arguments.only, options, arguments.launcher or "embed"):
            print(line)
        return 0
    if arguments.launcher:
        raise ValueError(f"--launcher={arguments.launcher!r} needs --dry-run: ablate itself trains on this machine")
    common.join(arguments)
    with common.keeps_work():
        from embed import ablation

        command = common.config_command("ablate", arguments.config, options)
        ablation.ablate(config, *where, arguments.only, command)
    return 0
