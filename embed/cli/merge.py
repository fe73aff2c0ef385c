"""Merge two models by spherical or linear interpolation: --a=FOLDER --b=FOLDER --ratio=0.5 --output=FOLDER."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed merge arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("merge", __doc__)
    common.add_distributed_arguments(parser)
    parser.add_argument("--a", required=True, help="a model folder, hub id or stage folder; ratio 0 returns it")
    parser.add_argument(
        "--b", required=True, help="another one with the same architecture and tokenizer; ratio 1 returns it"
    )
    common.add_step_argument(parser, "--step_a")
    common.add_step_argument(parser, "--step_b")
    parser.add_argument("--ratio", type=common.finite, default=0.5, help="0 is a, 1 is b (default 0.5)")
    parser.add_argument("--method", default="slerp", choices=["slerp", "linear"], help="default slerp")
    common.add_output_arguments(parser, "folder to write")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.ratio <= 1:
        raise ValueError(f"--ratio={arguments.ratio} must be between 0 and 1")
    common.join(arguments, saves_at_sigterm=False)
    from embed import exports
    from embed.checkpoints import settings
    from embed.console import say

    a, b = (arguments.a, arguments.step_a), (arguments.b, arguments.step_b)
    with common.output(arguments, inputs=[arguments.a, arguments.b], is_ours=settings.is_export):
        path = exports.merge_sources(a, b, arguments.ratio, arguments.output, arguments.method)
    say(str(path))
    return 0
