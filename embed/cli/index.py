"""Encode a corpus into an index for `embed search --index`, make one of encoded vectors, or change one."""

from collections.abc import Iterator

from embed import distributed
from embed.cli import common
from embed.cli.encode import CORPUS
from embed.console import say
from embed.inference import index, indexing, lexical, shards
from embed.inference.candidates import KINDS
from embed.inference.corpus import read_rows, refuse_empty
from embed.inference.index import Index, Made
from embed.inference.segments import Block

ANY = "any"  # --words without a language


def main(argv: list[str] | None = None) -> int:
    """Run `embed index arguments`; returns the exit code."""
    parser = common.Parser("index", __doc__)
    common.add_encoder_arguments(parser, required=False)
    common.add_vector_arguments(parser)
    parser.add_argument("--corpus", help=CORPUS)
    parser.add_argument("--vectors", help="instead of --model and --corpus: the folder of `embed encode --input`")
    common.add_chunker_arguments(parser)
    common.add_output_arguments(parser, "the folder to write", required=False)
    parser.add_argument("--update", metavar="INDEX", help="instead of --output: an index to change, see docs/search.md")
    parser.add_argument("--delete", metavar="ID", nargs="+", default=[], help="with --update: documents to delete")
    parser.add_argument("--compact", action="store_true", help="with --update: write it again as one segment")
    parser.add_argument("--kind", choices=KINDS, help="how it is searched (default: chosen by the number of vectors)")
    parser.add_argument(
        "--recall",
        type=common.finite,
        default=0.95,
        help="share of the ten nearest vectors to find, with --kind binary and ivf (default 0.95)",
    )
    parser.add_argument(
        "--words",
        nargs="?",
        const=ANY,
        metavar="LANGUAGE",
        help="count words too, for `embed search --hybrid`; with an ISO 639-3 language, such as eng, stem them",
    )
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    _check(args)
    common.join(args, saves_at_sigterm=False)
    args.overwrite |= bool(args.update)
    args.output = args.update or args.output
    with common.output(args, inputs=[args.model, args.corpus, args.vectors], is_ours=index.is_index):
        how = {"kind": args.kind, "recall": args.recall}
        if args.words is not None:
            how |= {"words": True, "language": "" if args.words == ANY else args.words}
        if args.update:
            return _change(args, how)
        made, blocks = _vectors(args)
        if not distributed.is_first():
            return 0
        result = index.create(args.output, blocks, made, overwrite=args.overwrite, **how)
    _report(result, args.output)
    return 0


def _check(args) -> None:
    """Refuse arguments that do not belong together."""
    if bool(args.output) == bool(args.update):
        raise ValueError("expected --output=FOLDER, a new index, or --update=INDEX, one to change")
    if args.corpus and args.vectors:
        raise ValueError("--corpus and --vectors: expected one of them")
    if args.vectors and args.model:
        raise ValueError(f"--vectors={args.vectors} says which model made them: leave out --model")
    if args.corpus and not args.model:
        raise ValueError("--corpus needs --model=MODEL")
    has_rows = bool(args.corpus or args.vectors)
    if args.output and not has_rows:
        raise ValueError("--output needs --corpus=FILE or --vectors=FOLDER")
    if args.output and (args.delete or args.compact):
        raise ValueError("--delete and --compact change an index: they need --update=INDEX, not --output")
    if args.update and not (has_rows or args.delete or args.compact):
        raise ValueError("--update needs rows (--corpus or --vectors), --delete=ID or --compact")
    if not 0 < args.recall <= 1:
        raise ValueError(f"--recall={args.recall:g} must be above 0, and 1 at most")
    if args.words not in (None, ANY):
        lexical.check_language(args.words)


def _vectors(args) -> tuple[Made, Iterator[Block]]:
    """(how the vectors are made, vectors and rows)."""
    if args.vectors:
        return indexing.read(args.vectors)
    common.check_vectors(args.model, [args.precision], args.truncate_dim)
    rows = read_rows(args.corpus)
    refuse_empty(rows, args.corpus)
    encoder = common.load_encoder(args)
    chunker = common.make_chunker(args, encoder) if args.chunker else None
    settings = shards.Settings(args.precision, args.truncate_dim, chunker, args.truncate)
    return indexing.encode(encoder, rows, settings, progress=True)


def _change(args, how: dict) -> int:
    """Add, delete and compact, in this order."""
    old = Index.load(args.update)
    if args.corpus or args.vectors:
        made, blocks = _vectors(args)
        index.check_made(old.made, made, args.update)
        if distributed.is_first():
            added, hidden = index.add(args.update, blocks, made, **how)
            say(f"{added:,} vectors added; {hidden:,} of the same documents were replaced")
    if distributed.is_first():
        if args.delete:
            say(f"{index.delete(args.update, args.delete):,} vectors deleted")
        if args.compact:
            index.compact(args.update, **how)
        _report(Index.load(args.update), args.update)
    return 0


def _report(result: Index, folder: str) -> None:
    size = sum(segment.vectors.nbytes for segment in result.segments)
    say(f"{len(result):,} {result.precision} vectors, {size / 1e6:.1f} MB, written to {folder}")
    for segment in result.segments:
        if segment.effort:
            depth, probes, recall = segment.effort.depth, segment.effort.probes, segment.effort.recall
            lists = f" in {probes:,} of {segment.num_lists:,} lists" if segment.kind == "ivf" else ""
            say(f"  {segment.kind}: recall {recall:.3f} of the ten nearest, with {depth:,} candidates{lists}")
