"""embed mine: hard negatives for the queries of a retrieval set, ranked by a model.

Writes JSON lines {"query-id", "corpus-id": its positive, "negatives": [ids, best-ranked first]}.
"""

import json

import numpy as np
from rich.console import Console

from embed import paths, runs
from embed.cli import common
from embed.evaluation.retrieval import embed_set, read_set
from embed.mining import mine


def main(argv: list[str] | None = None) -> int:
    """Run `embed mine arguments`; returns the exit code."""
    parser = common.Parser("mine", __doc__)
    common.add_model_argument(parser)
    parser.add_argument("--data", required=True, help="folder with corpus.jsonl, queries.jsonl and qrels.jsonl")
    parser.add_argument("--output", required=True, help="the JSONL file to write")
    parser.add_argument("--num_negatives", type=int, default=7)
    parser.add_argument(
        "--rank_window", type=int, nargs=2, default=(0, 100), metavar=("LO", "HI"), help="ranks LO..HI-1, 0 = best"
    )
    parser.add_argument("--margin", type=float, default=0.05, help="negatives score this much less than the positive")
    parser.add_argument("--relative", action="store_true", help="the margin is a fraction of the positive's score")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        default="int8",
        help="of the vectors that are ranked; training compares int8",
    )
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    common.check_output(args.output)

    data = read_set(args.data)
    common.join(args, saves_at_sigterm=False)
    encoder = runs.load_encoder(args.model, args.step)
    queries, corpus = (encoder.quantize(x, args.precision) for x in embed_set(encoder, data, show_progress_bar=True))
    # A query with several positives stands once for each; its id keeps all of them out of its negatives.
    query_rows = np.repeat(np.arange(len(data.queries)), [len(r.indices) for r in data.relevant])
    positives = np.concatenate([r.indices for r in data.relevant])
    content = {text: i for i, text in enumerate(data.corpus)}
    negatives, counts = mine(
        queries[query_rows],
        corpus,
        positives,
        num_negatives=args.num_negatives,
        rank_window=tuple(args.rank_window),
        margin=args.margin,
        relative=args.relative,
        query_ids=query_rows,
        document_ids=np.array([content[text] for text in data.corpus]),
        mesh=encoder.mesh,
    )
    if not common.is_first():
        return 0
    lines = []
    for row, positive, found in zip(query_rows, positives, negatives):
        ids = [data.corpus_ids[i] for i in found if i >= 0]
        line = {"query-id": data.query_ids[row], "corpus-id": data.corpus_ids[positive], "negatives": ids}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    paths.write(args.output, "".join(lines))
    counted = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    Console().print(f"{counted}; written to {args.output}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    common.end(common.run, main)
