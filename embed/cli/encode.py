"""Encode a corpus file or single texts to vectors, written as .npy."""

import io

import numpy as np

from embed import distributed, paths
from embed.cli import common
from embed.console import say
from embed.inference.index import Corpus, read_corpus

CORPUS = (
    'JSONL rows {"_id", "text"} or {"_id", "chunks": […]} (embedded in context), either with "title": docs/search.md'
)


def main(argv: list[str] | None = None) -> int:
    """Run `embed encode arguments`; returns the exit code."""
    parser = common.Parser("encode", __doc__)
    common.add_encoder_arguments(parser)
    common.add_vector_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", help=CORPUS)
    source.add_argument("--text", action="append", help="a text (may be repeated)")
    common.add_output_arguments(parser, "the .npy file to write, one row per text or chunk, in order")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_texts("--text", args.text or [])
    common.join(args, saves_at_sigterm=False)
    with common.output(args, inputs=[args.model, args.corpus], is_our_file=are_vectors):
        common.check_vectors(args.model, [args.precision], args.truncate_dim)
        if args.corpus:
            corpus = read_corpus(args.corpus)
        else:
            names = [f"--text={text!r:.40}" for text in args.text]
            corpus = Corpus([[text] for text in args.text], [str(i) for i in range(len(args.text))], names)
        vectors = np.concatenate(
            common.load_encoder(args).encode_documents(
                corpus.documents,
                precision=args.precision,
                truncate_dim=args.truncate_dim,
                truncate=args.truncate,
                names=corpus.names,
                show_progress_bar=True,
            )
        )
        if not distributed.is_first():
            return 0
        content = io.BytesIO()
        np.save(content, vectors, allow_pickle=False)
        paths.write(args.output, content.getvalue())
    say(f"{vectors.dtype}{list(vectors.shape)} written to {args.output}")
    return 0


def are_vectors(file) -> bool:
    """Whether a file is a .npy file."""
    with paths.path(file).open("rb") as opened:
        return opened.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
