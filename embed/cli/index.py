"""Encode a corpus once and store it for `embed search --index`."""

from embed import distributed
from embed.cli import common
from embed.cli.encode import CORPUS
from embed.console import say
from embed.inference.corpus import read_corpus
from embed.inference.index import build, is_index


def main(argv: list[str] | None = None) -> int:
    """Run `embed index arguments`; returns the exit code."""
    parser = common.Parser("index", __doc__)
    common.add_encoder_arguments(parser)
    common.add_vector_arguments(parser)
    parser.add_argument("--corpus", required=True, help=CORPUS)
    common.add_output_arguments(parser, "the folder to write")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.join(args, saves_at_sigterm=False)
    with common.output(args, inputs=[args.model, args.corpus], is_ours=is_index):
        common.check_vectors(args.model, [args.precision], args.truncate_dim)
        corpus = read_corpus(args.corpus)
        index = build(
            common.load_encoder(args),
            corpus,
            precision=args.precision,
            truncate_dim=args.truncate_dim,
            truncate=args.truncate,
            show_progress_bar=True,
        )
        if not distributed.is_first():
            return 0
        index.save(args.output, overwrite=args.overwrite)
    size = f"{len(index):,} {index.precision} vectors, {index.vectors.nbytes / 1e6:.1f} MB"
    say(f"{size}, written to {args.output}")
    return 0
