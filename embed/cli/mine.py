"""Mine hard negatives for the queries of an evaluation set with a model.

Writes JSON lines {"query-id", "corpus-id": its positive, "negatives": [ids, best rank first]}.
"""

import json

import numpy as np

from embed import distributed, paths
from embed.cli import common
from embed.console import say
from embed.evaluation.retrieval import embed_set, files, read_set
from embed.inference.index import read_jsonl
from embed.mining import check_window, mine

KEYS = ("query-id", "corpus-id", "negatives")


def main(argv: list[str] | None = None) -> int:
    """Run `embed mine arguments`; returns the exit code."""
    parser = common.Parser("mine", __doc__)
    common.add_encoder_arguments(parser)
    parser.add_argument("--data", required=True, help="folder with corpus.jsonl, queries.jsonl and qrels.jsonl")
    common.add_output_arguments(parser, "the JSONL file to write")
    parser.add_argument("--num_negatives", type=int, default=7, help="negatives per positive (default 7)")
    parser.add_argument(
        "--rank_window",
        type=int,
        nargs=2,
        default=(0, 100),
        metavar=("LO", "HI"),
        help="ranks LO..HI-1, 0 is the best (default 0 100)",
    )
    parser.add_argument(
        "--margin",
        type=common.finite,
        default=0.05,
        help="negatives score this much less than the positive (default 0.05)",
    )
    parser.add_argument("--relative", action="store_true", help="the margin is a fraction of the positive's score")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        default="int8",
        help="of the ranked vectors; training compares int8 (default int8)",
    )
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    check_window(args.num_negatives, tuple(args.rank_window))
    common.join(args, saves_at_sigterm=False)
    with common.output(args, inputs=[args.model, *files(args.data)], is_our_file=are_negatives):
        data = read_set(args.data)
        encoder = common.load_encoder(args)
        queries, corpus = embed_set(encoder, data, show_progress_bar=True, truncate=args.truncate)
        texts = np.flatnonzero(corpus.any(1))  # an empty text is never a negative
        for relevant in data.relevant:
            if missing := sorted(set(relevant.indices) - set(texts)):
                raise ValueError(f"{data.corpus_names[missing[0]]} is relevant to a query but has no text")
        queries, corpus = (encoder.quantize(v, args.precision) for v in (queries, corpus[texts]))
        # A query has one row per positive; its id keeps all its positives out of its negatives.
        query_rows = np.repeat(np.arange(len(data.queries)), [len(r.indices) for r in data.relevant])
        positives = np.concatenate([r.indices for r in data.relevant])
        content = {text: i for i, text in enumerate(data.corpus)}
        negatives, counts = mine(
            queries[query_rows],
            corpus,
            np.searchsorted(texts, positives),
            num_negatives=args.num_negatives,
            rank_window=tuple(args.rank_window),
            margin=args.margin,
            relative=args.relative,
            query_ids=query_rows,
            document_ids=np.array([content[data.corpus[row]] for row in texts]),
            mesh=encoder.mesh,
        )
        if not distributed.is_first():
            return 0
        lines = []
        for row, positive, chosen in zip(query_rows, positives, negatives):
            ids = [data.corpus_ids[texts[i]] for i in chosen if i >= 0]
            line = dict(zip(KEYS, (data.query_ids[row], data.corpus_ids[positive], ids), strict=True))
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        paths.write(args.output, "".join(lines))
    summary = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    say(f"{summary}; written to {args.output}")
    return 0


def are_negatives(file) -> bool:
    """Whether a file has the content that this verb writes: lines with the keys KEYS."""
    try:
        rows = read_jsonl(file)
    except ValueError:
        return False
    return bool(rows) and all(row.keys() == set(KEYS) for _, row in rows)
