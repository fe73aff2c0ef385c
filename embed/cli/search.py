"""Find the texts of a corpus nearest to a query, by exact search."""

import json

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from embed import distributed, inference
from embed.cli import common
from embed.cli.encode import CORPUS
from embed.console import print_table
from embed.inference.corpus import read_corpus
from embed.inference.index import build


def main(argv: list[str] | None = None) -> int:
    """Run `embed search arguments`; returns the exit code."""
    parser = common.Parser("search", __doc__)
    common.add_encoder_arguments(parser)
    common.add_vector_arguments(parser)
    parser.set_defaults(precision=None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", help=CORPUS)
    source.add_argument("--index", help="folder that `embed index` wrote; it sets precision and truncate_dim")
    parser.add_argument("--query", required=True, action="append", help="a text (may be repeated)")
    parser.add_argument("--top", type=int, default=10, help="number of results (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per result: docs/search.md")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_texts("--query", args.query)
    if args.top < 1:
        raise ValueError(f"--top={args.top} must be positive")
    if args.index and (args.precision or args.truncate_dim):
        raise ValueError("--precision and --truncate_dim are set by --index: leave them out")
    common.join(args, saves_at_sigterm=False)
    if args.index:
        index = inference.Index.load(args.index)
        encoder = common.load_encoder(args)
        index.check_model(encoder)
    else:
        common.check_vectors(args.model, [args.precision or "float32"], args.truncate_dim)
        corpus = read_corpus(args.corpus)
        encoder = common.load_encoder(args)
        index = build(
            encoder,
            corpus,
            precision=args.precision or "float32",
            truncate_dim=args.truncate_dim,
            truncate=args.truncate,
            show_progress_bar=True,
        )
    queries = encoder.encode(
        args.query,
        precision=index.precision,
        truncate_dim=index.truncate_dim,
        truncate=args.truncate,
        names=[f"--query={query!r:.40}" for query in args.query],
    )
    scores, indices = index.search(queries, args.top)
    if not distributed.is_first():
        return 0
    for query, query_scores, query_indices in zip(args.query, scores, indices):
        if args.json:
            for line in json_lines(query, index, query_scores, query_indices):
                print(line)
        else:
            print_table(results_table(query, index, query_scores, query_indices))
    return 0


def json_lines(query: str, index: inference.Index, scores, indices) -> list[str]:
    """One JSON object per result, best first, in ASCII for every locale. `score` is that of `Index.search`."""
    rows = enumerate(zip(scores.tolist(), indices.tolist()), 1)
    texts = index.texts or [None] * len(index.ids)
    return [
        json.dumps({"query": query, "rank": rank, "id": index.ids[i], "score": score, "text": texts[i]})
        for rank, (score, i) in rows
    ]


def results_table(query: str, index: inference.Index, scores, indices) -> Table:
    """One line per result: rank, score, id and the beginning of the text."""
    table = Table(title=Text(query, "bold"), title_justify="left", box=SIMPLE_HEAD, expand=True)
    table.add_column("rank", justify="right")
    table.add_column("bits differing" if index.precision in ("binary", "ubinary") else "cosine", justify="right")
    table.add_column("id", overflow="fold", ratio=1)
    if index.texts:
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=3)
    for rank, (score, i) in enumerate(zip(scores.tolist(), indices.tolist()), 1):
        shown = f"{score:.3f}" if isinstance(score, float) else str(-score)
        text = [Text(" ".join(index.texts[i].split()))] if index.texts else []
        table.add_row(str(rank), shown, Text(index.ids[i]), *text)
    return table
