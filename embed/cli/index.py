"""embed index: encode a corpus once and store it for `embed search --index`."""

from rich.console import Console

from embed import runs
from embed.cli import common
from embed.cli.encode import add_model_arguments
from embed.inference.index import build, read_corpus


def main(argv: list[str] | None = None) -> int:
    """Run `embed index arguments`; returns the exit code."""
    parser = common.Parser("index", __doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--corpus", required=True, help='JSONL rows {"_id", "text"} or {"_id", "chunks": […]} (embedded in context)'
    )
    parser.add_argument("--output", required=True, help="the folder to write")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)

    corpus = read_corpus(args.corpus)
    common.join(args, saves_at_sigterm=False)
    index = build(
        runs.load_encoder(args.model, args.step),
        corpus,
        precision=args.precision,
        truncate_dim=args.truncate_dim,
        show_progress_bar=True,
    )
    if not common.is_first():
        return 0
    index.save(args.output)
    size = f"{len(index):,} {index.precision} vectors, {index.vectors.nbytes / 1e6:.1f} MB"
    Console().print(f"{size}, written to {args.output}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    common.end(common.run, main)
