"""Encode a corpus file or single texts to vectors, written as .npy or, with ids and texts, as .parquet."""

import io
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from embed import distributed, paths
from embed.cli import common
from embed.console import say
from embed.inference.corpus import Corpus, read_corpus

CORPUS = (
    'JSONL rows {"_id", "text"} or {"_id", "chunks": […]} (embedded in context), either with "title": docs/search.md'
)


OUTPUT = (
    "the file to write, one row per text or chunk, in order: vectors alone, or as FILE.parquet rows of _id, text and "
    "vector, such as a distill stage learns from"
)
ROWS = 1 << 14  # of a row group, the part of a file that one process of preparation reads
COLUMNS = ["_id", "text", "vector"]


def main(argv: list[str] | None = None) -> int:
    """Run `embed encode arguments`; returns the exit code."""
    parser = common.Parser("encode", __doc__)
    common.add_encoder_arguments(parser)
    common.add_vector_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", help=CORPUS)
    source.add_argument("--text", action="append", help="a text (may be repeated)")
    common.add_output_arguments(parser, OUTPUT)
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_texts("--text", args.text or [])
    if is_parquet(args.output) and not find_spec("pyarrow"):
        raise ValueError(f"--output={args.output} needs pyarrow: pip install -e '.[data]'")
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
        if is_parquet(args.output):
            content = parquet(corpus.ids, corpus.texts, vectors)
        else:
            opened = io.BytesIO()
            np.save(opened, vectors, allow_pickle=False)
            content = opened.getvalue()
        paths.write(args.output, content)
    say(f"{vectors.dtype}{list(vectors.shape)} written to {args.output}")
    return 0


def is_parquet(output: str) -> bool:
    return output.lower().endswith(".parquet")


def parquet(ids: Sequence[str], texts: Sequence[str], vectors: np.ndarray) -> bytes:
    """A Parquet file of rows {_id, text, vector}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])
    table = pa.table([pa.array(ids), pa.array(texts), lists], names=COLUMNS)
    content = io.BytesIO()
    pq.write_table(table, content, row_group_size=ROWS)
    return content.getvalue()


def are_vectors(file) -> bool:
    """Whether a file is what this verb writes: a .npy file, or a Parquet file of rows {_id, text, vector}."""
    if is_parquet(str(file)):
        import pyarrow as pa
        import pyarrow.parquet as pq

        with paths.path(file).open("rb") as opened:
            try:
                return pq.read_schema(opened).names == COLUMNS
            except pa.ArrowInvalid:
                return False
    with paths.path(file).open("rb") as opened:
        return opened.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
