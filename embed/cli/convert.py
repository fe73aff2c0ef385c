"""Make a checkpoint to train from out of a Hugging Face one: embed convert SOURCE OUTPUT."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run `embed convert arguments`; returns the exit code."""
    parser = argparse.ArgumentParser("embed convert", description=__doc__)
    parser.add_argument("source", help="a folder or hub id: Qwen3, or pplx-embed")
    parser.add_argument("output", help="the folder to write: set stages.STAGE.init to it")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored parameters")
    parser.add_argument(
        "--mask_id", type=int, help="token of the diffusion mask; by default the first id behind the vocabulary"
    )
    arguments = parser.parse_args(argv)

    from embed import tokenizers
    from embed.checkpoints import converted, huggingface
    from embed.checkpoints.export import check_replaceable
    from embed.models import sharding
    from embed.models.transformer import abstract_params, count_params

    check_replaceable(arguments.output, is_ours=converted.is_converted)
    folder = huggingface.resolve(arguments.source, arguments.revision)
    checkpoint, tokenizer = huggingface.open_checkpoint(folder), tokenizers.load(folder, mask_id=arguments.mask_id)
    if max(tokenizer.mask_id, tokenizer.vocab_size - 1) >= checkpoint.config.vocab_size:
        raise ValueError(
            f"mask_id={tokenizer.mask_id} is behind the {checkpoint.config.vocab_size} rows of the embedding table; "
            "choose with --mask_id a token that texts do not use"
        )
    # One process; over all of its devices, whatever their number.
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    shardings = sharding.parameter_shardings(mesh, abstract_params(checkpoint.config))
    params = checkpoint.params(shardings, arguments.dtype)
    source = {"path": arguments.source, "revision": arguments.revision, "digest": checkpoint.digest}
    converted.write(
        arguments.output, params, checkpoint.config, tokenizer, embedding=checkpoint.embedding,
        source=source | {"causal": checkpoint.causal},
    )  # fmt: skip
    kind = "causal" if checkpoint.causal else "bidirectional"
    total, without_table = count_params(params)
    print(f"{total:,} parameters ({without_table:,} without the embedding table), {arguments.dtype}, {kind}")
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    from embed.cli.common import run

    sys.exit(run(main))
