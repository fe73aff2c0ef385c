"""Mine hard negatives for the queries of an evaluation set with a model.

Writes JSON lines {"query-id", "corpus-id": its positive, "negatives": [ids, best rank first]}.

A cross-encoder, or any other judge, can decide which candidates are negatives. First, --candidates writes the pairs to
judge, {"query-id", "corpus-id", "rank": from 0, or null for a relevant text, "score": the cosine}. Then --scores reads
the judge's {"query-id", "corpus-id", "score"}, and the margin compares these scores.
"""

import json
import math
from collections.abc import Iterator

import numpy as np

from embed import distributed, paths
from embed.cli import common
from embed.console import say
from embed.evaluation.retrieval import embed_corpus, embed_queries
from embed.evaluation.sets import RetrievalSet, files, read_set
from embed.inference.corpus import check_id, read_jsonl
from embed.mining import Judge, Mined, check_window, mine, summary

KEYS = ("query-id", "corpus-id", "negatives")
CANDIDATE_KEYS = ("query-id", "corpus-id", "rank", "score")


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
        help="negatives score this much less than the positive (default 0.05; -2 keeps all cosines)",
    )
    parser.add_argument("--relative", action="store_true", help="the margin is a fraction of the positive's score")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        default="int8",
        help="of the ranked vectors; training compares int8 (default int8)",
    )
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument("--candidates", action="store_true", help="write the pairs of the window, for a judge")
    judged.add_argument("--scores", help="JSONL file of a judge; a candidate without a score is not a negative")
    common.add_distributed_arguments(parser)
    args = parser.parse_args(argv)
    check_window(args.num_negatives, tuple(args.rank_window))
    common.join(args, saves_at_sigterm=False)
    with common.output(args, inputs=[args.model, args.scores, *files(args.data)], is_our_file=is_our_file):
        data = read_set(args.data)
        scores = _read_scores(args.scores, data) if args.scores else {}
        encoder = common.load_encoder(args)
        queries = embed_queries(encoder, data, progress="queries", truncate=args.truncate)
        corpus = embed_corpus(encoder, data, progress="corpus", truncate=args.truncate)
        texts = np.flatnonzero(corpus.any(1))  # an empty text is never a negative
        relevant = data.relevant_rows
        if empty := sorted(set(np.concatenate(relevant)) - set(texts)):
            raise ValueError(f"{data.corpus_names[empty[0]]} is relevant to a query but has no text")
        queries, corpus = (encoder.quantize(v, args.precision) for v in (queries, corpus[texts]))
        # A query has one row per positive; its id keeps all its positives out of its negatives.
        query_rows = np.repeat(np.arange(len(data.queries)), [len(rows) for rows in relevant])
        positives = np.searchsorted(texts, np.concatenate(relevant))
        content = {text: i for i, text in enumerate(data.corpus)}
        low, high = args.rank_window
        mined = mine(
            queries[query_rows],
            corpus,
            positives,
            num_negatives=max(1, min(high, len(texts)) - low) if args.candidates else args.num_negatives,
            rank_window=(low, high),
            margin=None if args.candidates else args.margin,
            relative=args.relative,
            query_ids=query_rows,
            document_ids=np.array([content[data.corpus[row]] for row in texts]),
            judge=_judge(scores, query_rows, texts) if args.scores else None,
            mesh=encoder.mesh,
            progress="rank",
        )
        if not distributed.is_first():
            return 0
        write = _candidates if args.candidates else _negatives
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n"
            for row in write(data, query_rows, texts[positives], texts, mined)
        ]
        paths.write(args.output, "".join(lines))
    what = f"{len(lines):,} pairs" if args.candidates else summary(mined.counts)
    say(f"{what}; written to {args.output}")
    return 0


def _negatives(
    data: RetrievalSet, query_rows: np.ndarray, positives: np.ndarray, texts: np.ndarray, mined: Mined
) -> Iterator[dict]:
    """The lines of the output: one per query and positive, corpus rows int[n] each."""
    for query, positive, negatives in zip(query_rows, positives, mined.negatives):
        ids = [data.corpus_ids[texts[i]] for i in negatives if i >= 0]
        yield dict(zip(KEYS, (data.query_ids[query], data.corpus_ids[positive], ids), strict=True))


def _candidates(
    data: RetrievalSet, query_rows: np.ndarray, positives: np.ndarray, texts: np.ndarray, mined: Mined
) -> Iterator[dict]:
    """The lines of --candidates: after the relevant texts of a query, its candidates, best rank first."""
    for row, (query, positive) in enumerate(zip(query_rows, positives)):
        pairs = [(positive, None, mined.positive_scores[row])]
        if row + 1 == len(query_rows) or query_rows[row + 1] != query:  # its rows have the same candidates
            found = mined.negatives[row] >= 0
            chosen = texts[mined.negatives[row][found]]
            pairs += zip(chosen, mined.ranks[row][found].tolist(), mined.scores[row][found])
        for text, rank, score in pairs:
            values = data.query_ids[query], data.corpus_ids[text], rank, round(float(score), 6)
            yield dict(zip(CANDIDATE_KEYS, values, strict=True))


def _read_scores(path: str, data: RetrievalSet) -> dict[tuple[int, int], float]:
    """{(query, corpus row): score} of a file for --scores. ValueError unless every relevant text has a score."""
    query_of, row_of = ({name: i for i, name in enumerate(ids)} for ids in (data.query_ids, data.corpus_ids))
    scores: dict[tuple[int, int], float] = {}
    for source, row in read_jsonl(path):
        query, text, score = check_id(source, row, "query-id"), check_id(source, row, "corpus-id"), row.get("score")
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if query not in query_of or text not in row_of or not is_number:
            raise ValueError(
                f"{source}: query-id {query!r}, corpus-id {text!r}, score {score!r}: expected ids of the queries and "
                "the corpus of --data, and a finite number"
            )
        pair = query_of[query], row_of[text]
        if scores.setdefault(pair, score) != score:
            raise ValueError(f"{source}: {text!r} has score {score!r} for {query!r}, and {scores[pair]!r} before")
    needed = [(query, row) for query, rows in enumerate(data.relevant_rows) for row in rows.tolist()]
    if missing := [pair for pair in needed if pair not in scores]:
        query, row = missing[0]
        raise ValueError(
            f"{path} has no score for {len(missing):,} of the {len(needed):,} relevant texts, first for query "
            f"{data.query_ids[query]!r} and text {data.corpus_ids[row]!r}: score the pairs that --candidates writes"
        )
    return scores


def _judge(scores: dict[tuple[int, int], float], query_rows: np.ndarray, texts: np.ndarray) -> Judge:
    """The judge of `mine` that has these scores; it gets rows of `query_rows` and of `texts`."""
    count = texts.max() + 1
    keys = np.array([query * count + row for query, row in scores], np.int64)
    order = np.argsort(keys)
    keys, values = keys[order], np.array(list(scores.values()), np.float32)[order]

    def judge(rows: np.ndarray, documents: np.ndarray) -> np.ndarray:
        wanted = query_rows[rows, None] * count + texts[documents]
        index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[index] == wanted, values[index], np.nan).astype(np.float32)

    return judge


def is_our_file(file) -> bool:
    """Whether a file has the content that this verb writes: lines with the keys KEYS, or all with CANDIDATE_KEYS."""
    try:
        rows = read_jsonl(file)
    except ValueError:
        return False
    return bool(rows) and any(all(row.keys() == set(keys) for _, row in rows) for keys in (KEYS, CANDIDATE_KEYS))
