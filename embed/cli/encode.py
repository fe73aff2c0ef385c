"""embed encode: turn a corpus file or single texts into vectors, written as .npy."""

import argparse
import io

import numpy as np
from rich.console import Console

from embed import inference, paths, runs
from embed.cli import common
from embed.inference.index import Corpus, read_corpus


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that encode, index and search share."""
    common.add_model_argument(parser)
    parser.add_argument("--precision", choices=inference.PRECISIONS, default="float32")
    parser.add_argument("--truncate_dim", type=int, help="keep this many dimensions (a Matryoshka prefix)")


def main(argv: list[str] | None = None) -> int:
    """Run `embed encode arguments`; returns the exit code."""
    parser = common.Parser("encode", __doc__)
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", help='JSONL rows {"_id", "text"} or {"_id", "chunks": […]} (embedded in context)')
    source.add_argument("--text", action="append", help="a text; may be repeated")
    parser.add_argument("--output", required=True, help="the .npy file to write, one row a text or chunk, in order")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_output(args.output)

    if args.corpus:
        corpus = read_corpus(args.corpus)
    else:
        corpus = Corpus([[text] for text in args.text], [str(i) for i in range(len(args.text))])
    common.join(args, saves_at_sigterm=False)
    vectors = np.concatenate(
        runs.load_encoder(args.model, args.step).encode_documents(
            corpus.documents, precision=args.precision, truncate_dim=args.truncate_dim, show_progress_bar=True
        )
    )
    if not common.is_first():
        return 0
    content = io.BytesIO()
    np.save(content, vectors, allow_pickle=False)
    paths.write(args.output, content.getvalue())
    Console().print(f"{vectors.dtype}{list(vectors.shape)} written to {args.output}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    common.end(common.run, main)
