"""Find the texts of a corpus nearest to a query."""

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from embed import distributed, inference
from embed.cli import common
from embed.cli.encode import CORPUS
from embed.console import print_table
from embed.inference import indexing, shards
from embed.inference.corpus import read_rows, refuse_empty
from embed.inference.index import Hit, Index
from embed.inference.index_writer import create
from embed.inference.segments import Settings

MORE = 10  # rows that are looked at per document, at first


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
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only rows with this value of a field; repeated: any of the values of a field, and all fields",
    )
    parser.add_argument("--hybrid", action="store_true", help="fuse the ranking by vectors with that of BM25")
    parser.add_argument(
        "--by_document", action="store_true", help="results are documents, with the chunks found in each"
    )
    parser.add_argument(
        "--exact", action="store_true", help="compare with every vector, whatever the kind of the index"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per result: docs/search.md")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_texts("--query", args.query)
    filters = _filters(args.filter)
    if args.top < 1:
        raise ValueError(f"--top={args.top} must be positive")
    if args.index and (args.precision or args.truncate_dim):
        raise ValueError("--precision and --truncate_dim are set by --index: leave them out")
    common.join(args, saves_at_sigterm=False)
    with tempfile.TemporaryDirectory(prefix="embed-") as folder:
        if args.index:
            index = inference.Index.load(args.index)
            if args.hybrid:
                index.check_bm25()
            encoder = common.load_encoder(args)
            index.check_model(encoder)
        else:
            settings = shards.Settings(args.precision or "float32", args.truncate_dim, truncate=args.truncate)
            common.check_vectors(args.model, [settings.precision], args.truncate_dim)
            rows = read_rows(args.corpus)
            refuse_empty(rows, args.corpus)
            encoder = common.load_encoder(args)
            made, blocks = indexing.encode(encoder, rows, settings, progress=True)
            how = Settings(kind="exact", bm25="" if args.hybrid else None)
            index = create(Path(folder, "index"), blocks, made, how)
        vectors = encoder.encode(
            args.query,
            precision=index.precision,
            truncate_dim=index.truncate_dim,
            truncate=args.truncate,
            names=[f"--query={query!r:.40}" for query in args.query],
        )
        if not distributed.is_first():
            return 0
        for query, vector in zip(args.query, vectors):
            find = functools.partial(_find, index, query, vector[None], args, filters)
            found = _documents(find, args.top) if args.by_document else [(hit.id, [hit]) for hit in find(args.top)]
            if args.json:
                for line in json_lines(query, found, args):
                    print(line)
            else:
                print_table(results_table(query, found, index.precision, args))
    return 0


def _filters(filters: Sequence[str]) -> dict[str, list[str]]:
    """{field: allowed values} of --filter=FIELD=VALUE."""
    result: dict[str, list[str]] = {}
    for each in filters:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise ValueError(f"--filter={each} must be FIELD=VALUE")
        result.setdefault(name, []).append(value)
    return result


def _find(index: Index, query: str, vector: np.ndarray, args, filters: dict, k: int) -> list[Hit]:
    """The k best rows of a query."""
    if args.hybrid:
        scores, rows, shares = index.search_hybrid(vector, [query], k, filters=filters, exact=args.exact)
        return index.hits(scores[0], rows[0], shares[0])
    scores, rows = index.search(vector, k, filters=filters, exact=args.exact)
    return index.hits(scores[0], rows[0])


def _documents(find: Callable[[int], list[Hit]], k: int) -> list[tuple[str, list[Hit]]]:
    """(document, its rows that were found) of the k documents with the best rows, of as many rows as that takes."""
    count = MORE * k
    while True:
        hits, found = find(count), {}
        for hit in hits:
            found.setdefault(hit.document, []).append(hit)
        if len(found) >= k or len(hits) < count:
            return list(found.items())[:k]
        count *= 4


def json_lines(query: str, found: Sequence[tuple[str, list[Hit]]], args) -> list[str]:
    """One JSON object per result, best first, in ASCII for every locale."""

    def about(hit: Hit) -> dict:
        shares = {} if hit.shares is None else {"shares": dict(zip(("vectors", "bm25"), hit.shares))}
        return (
            {"id": hit.id, "score": hit.score, "text": None}
            | shares
            | {name: value for name, value in hit.content.items() if name != "_id"}
        )

    lines = []
    for rank, (name, hits) in enumerate(found, 1):
        start = {"query": query, "rank": rank}
        of_document = {"document": name, "score": hits[0].score, "chunks": list(map(about, hits))}
        lines.append(json.dumps(start | (of_document if args.by_document else about(hits[0]))))
    return lines


def results_table(query: str, found: Sequence[tuple[str, list[Hit]]], precision: str, args) -> Table:
    """One line per result: rank, score, id and the beginning of the text; documents have a line per chunk."""
    table = Table(title=Text(query, "bold"), title_justify="left", box=SIMPLE_HEAD, expand=True)
    table.add_column("rank", justify="right")
    bits = precision in ("binary", "ubinary")
    table.add_column("score" if args.hybrid else "bits differing" if bits else "cosine", justify="right")
    if args.hybrid:
        table.add_column("vectors", justify="right")
    table.add_column("id", overflow="fold", ratio=1)
    has_texts = any("text" in hit.content for _, hits in found for hit in hits)
    if has_texts:
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=3)
    for rank, (_, hits) in enumerate(found, 1):
        for number, hit in enumerate(hits):
            shown = f"{hit.score:.4f}" if args.hybrid else f"{hit.score:.3f}" if not bits else str(-hit.score)
            cells = ["" if number else str(rank), shown]
            if args.hybrid:
                cells.append(f"{hit.shares[0] / sum(hit.shares):.0%}")
            text = [Text(" ".join(hit.content.get("text", "").split()))] if has_texts else []
            table.add_row(*cells, Text(hit.id), *text)
    return table
