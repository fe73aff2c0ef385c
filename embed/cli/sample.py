"""Fill the masks of a text with a checkpoint of a diffusion stage, most confident tokens first."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed sample arguments`; returns the exit code."""
    from embed.cli import common

    parser = common.Parser("sample", __doc__)
    common.add_config_arguments(parser)
    common.add_distributed_arguments(parser)
    parser.add_argument("--text", required=True, help="a text with <mask> for each token to fill in")
    parser.add_argument(
        "--checkpoint", default="diffusion", help="a diffusion stage of this run, or a stage folder (default diffusion)"
    )
    common.add_step_argument(parser)
    parser.add_argument("--tokens_per_step", type=int, default=1, help="tokens unmasked per step (default 1)")
    arguments, config = common.parse_config(parser, argv)
    common.check_texts("--text", [arguments.text])
    common.join(arguments, saves_at_sigterm=False)
    import numpy as np

    from embed import nodes, runs
    from embed.console import say
    from embed.inference import denoise

    run = runs.Run(config, arguments.workdir, arguments.config)
    tokenizer, mask = run.tokenizer, np.array([run.tokenizer.mask_id], np.int32)
    pieces = tokenizer.encode(arguments.text.split("<mask>"))
    tokens = np.concatenate([part for piece in pieces for part in (piece, mask)][:-1])
    if not (tokens == tokenizer.mask_id).any():
        raise ValueError(f"--text={arguments.text!r} has no <mask> to fill in")
    checkpoint = run.checkpoint(arguments.checkpoint, arguments.step)
    problems = [] if checkpoint.diffusion else ["only a diffusion stage predicts masked tokens"]
    if problems := problems + run.tokenizer_problems(checkpoint):
        raise ValueError(f"--checkpoint={arguments.checkpoint} cannot fill in a text: {'; '.join(problems)}")
    states = denoise.denoise(
        checkpoint.params(run.shardings(checkpoint.model)),
        checkpoint.model,
        tokens,
        mask_id=tokenizer.mask_id,
        tokens_per_step=arguments.tokens_per_step,
        left_shift=checkpoint.left_shift,
        length=-(-len(tokens) // 64) * 64,
    )
    for k, state in enumerate(states):
        say(f"{k:3} {nodes.show_masked(tokenizer, state)}")
    return 0
