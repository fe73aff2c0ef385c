"""Encode a corpus into an index for `embed search --index`, make one of encoded vectors, or change one."""

from argparse import Namespace
from collections.abc import Iterator

from embed import distributed
from embed.cli import common
from embed.cli.encode import CORPUS
from embed.console import say
from embed.inference import candidates, index_files, index_writer, indexing, lexical, shards
from embed.inference.corpus import read_rows, refuse_empty
from embed.inference.index import Index
from embed.inference.segments import RECALL, Block, Settings

ANY = "any"  # --bm25 without a language


def main(argv: list[str] | None = None) -> int:
    """Run `embed index arguments`; returns the exit code."""
    parser = common.Parser("index", __doc__)
    common.add_encoder_arguments(parser, required=False)
    common.add_vector_arguments(parser)
    parser.set_defaults(precision=None)
    parser.add_argument("--corpus", help=CORPUS)
    parser.add_argument("--vectors", help="instead of --model and --corpus: the folder of `embed encode --input`")
    common.add_chunker_arguments(parser)
    common.add_output_arguments(parser, "the folder to write", required=False)
    parser.add_argument("--update", metavar="INDEX", help="instead of --output: an index to change, see docs/search.md")
    parser.add_argument(
        "--delete", metavar="ID", nargs="+", default=[], help="with --update: documents to delete first"
    )
    parser.add_argument("--compact", action="store_true", help="with --update: write it again as one segment")
    parser.add_argument(
        "--kind", choices=candidates.KINDS, help="how it is searched (default: chosen by the number of vectors)"
    )
    parser.add_argument(
        "--recall",
        type=common.finite,
        help=f"share of the ten nearest vectors to find, with --kind binary and ivf (default {RECALL:g})",
    )
    parser.add_argument(
        "--bm25",
        nargs="?",
        const=ANY,
        metavar="LANGUAGE",
        help="for `embed search --hybrid`; with an ISO 639-3 language, such as eng, words are stemmed",
    )
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    _check(args)
    common.join(args, saves_at_sigterm=False)
    args.overwrite, replaces = bool(args.update or args.overwrite), args.overwrite
    args.output = args.update or args.output
    with common.output(args, inputs=[args.model, args.corpus, args.vectors], is_ours=index_files.is_index):
        if args.update:
            old = Index.load(args.output)
            settings = _settings(args, old.segments[0].settings)
            if settings.bm25 != old.segments[0].settings.bm25 and not args.compact:
                was = f"--bm25={old.segments[0].settings.bm25 or ANY}" if old.segments[0].bm25 else "no --bm25"
                raise ValueError(f"{args.update} was made with {was}: --compact changes it for all rows")
            old.check_documents(args.delete)
            args.precision = args.precision or old.precision
            args.truncate_dim = args.truncate_dim or old.truncate_dim
        else:
            old, settings, args.precision = None, _settings(args, Settings()), args.precision or "float32"
        provenance, blocks = _vectors(args, old)
        if not distributed.is_first():
            return 0
        if args.update:
            how = dict(documents=args.delete, compact=args.compact, settings=settings)
            counts = index_writer.update(args.output, blocks=blocks, provenance=provenance, **how)
            if any(counts):
                deleted, added, replaced = (f"{count:,}" for count in counts)
                say(f"vectors: {deleted} deleted, {added} added, {replaced} replaced by these")
        else:
            index_writer.create(args.output, blocks, provenance, settings, overwrite=replaces)
        _report(Index.load(args.output, check=False), args.output)
    return 0


def _check(args: Namespace) -> None:
    """Refuse arguments that do not belong together, or that cannot work."""
    if bool(args.output) == bool(args.update):
        raise ValueError("expected --output=FOLDER, a new index, or --update=INDEX, one to change")
    if args.corpus and args.vectors:
        raise ValueError("--corpus and --vectors: expected one of them")
    if args.corpus and not args.model:
        raise ValueError("--corpus needs --model=MODEL")
    if args.output:
        common.refuse_given(args, ("delete", "compact"), "changes an index: it needs --update=INDEX, not --output")
        if not (args.corpus or args.vectors):
            raise ValueError("--output needs --corpus=FILE or --vectors=FOLDER")
    else:
        common.refuse_given(args, ("overwrite",), "is for --output")
        if not (args.corpus or args.vectors or args.delete or args.compact):
            raise ValueError("--update needs rows (--corpus or --vectors), --delete=ID or --compact")
    if not args.corpus:
        names = ("model", "step", "max_length", "rope_theta", "truncate", "precision", "truncate_dim", "chunker")
        why = (
            f"is for --corpus; --vectors={args.vectors} says how they were made" if args.vectors else "is for --corpus"
        )
        common.refuse_given(args, names, why)
        if not args.vectors and not args.compact:
            common.refuse_given(args, ("kind", "recall", "bm25"), "is for new rows or --compact")
    common.check_chunker(args)
    if args.recall is not None and not 0 < args.recall <= 1:
        raise ValueError(f"--recall={args.recall:g} must be above 0, and 1 at most")
    if args.bm25 not in (None, ANY):
        lexical.check_language(args.bm25)
    if args.kind and args.kind != "exact":
        candidates.faiss()
    if args.vectors:
        shards.read_info(args.vectors)


def _settings(args: Namespace, default: Settings) -> Settings:
    """How the index is searched: as the arguments say, or as it was."""
    given = {"kind": args.kind, "recall": args.recall, "bm25": "" if args.bm25 == ANY else args.bm25}
    return default._replace(**{name: value for name, value in given.items() if value is not None})


def _vectors(args: Namespace, old: Index | None) -> tuple:
    """(how the new vectors are made, vectors and rows), (None, None) without any."""
    if args.vectors:
        provenance, blocks = indexing.read(args.vectors)
    elif args.corpus:
        provenance, blocks = _encode(args)
    else:
        return None, None
    if old:
        index_writer.check_provenance(old.provenance, provenance, args.update)
    return provenance, blocks


def _encode(args: Namespace) -> tuple[index_files.Provenance, Iterator[Block]]:
    """What --corpus gives."""
    common.check_vectors(args.model, [args.precision], args.truncate_dim)
    rows = read_rows(args.corpus)
    refuse_empty(rows, args.corpus)
    encoder = common.load_encoder(args)
    chunker = common.make_chunker(args, encoder)
    settings = shards.Settings(args.precision, args.truncate_dim, chunker, args.truncate)
    return indexing.encode(encoder, rows, settings, progress=True)


def _report(result: Index, folder: str) -> None:
    """Say what an index has, and what can surprise."""
    size = sum(segment.vectors.nbytes for segment in result.segments)
    say(f"{len(result):,} {result.precision} vectors, {size / 1e6:.1f} MB, written to {folder}")
    for segment in result.segments:
        if found := segment.parameters:
            lists = f" in {found.nprobe:,} of {segment.num_lists:,} lists" if segment.kind == "ivf" else ""
            say(
                f"  {segment.kind}: finds {found.recall:.3f} of the ten nearest, {found.candidates:,} candidates{lists}"
            )
        for name, why in segment.description["unfiltered"].items():
            say(f"  the field {name!r:.80} cannot be filtered by: it has {why}")
    if hidden := sum(int((~segment.kept).sum()) for segment in result.segments):
        say(f"  {hidden:,} further vectors are never found: of texts without tokens, or deleted")
