"""Make an evaluation set of your own logs or corpora, judged without people: query2query and query2doc.

    embed judge --log=clicks.jsonl --output=sets/query2query
    embed judge --queries=queries.jsonl --corpus=corpus.jsonl --systems bm25 MODEL MODEL --output=sets/query2doc

--log has JSON lines {"query", "url"}: queries that led to the same URL are relevant to each other, and the corpus is
all queries. --systems rank the corpus for each query; the first --relevant texts of the reciprocal rank fusion of
their rankings are relevant. The set is a folder for `embed evaluate --data`, with --metrics and --corpus_sizes.
"""

import argparse


def main(argv: list[str] | None = None) -> int:
    """Run `embed judge arguments`; returns the exit code."""
    from embed import distributed, paths
    from embed.cli import common
    from embed.console import say
    from embed.evaluation import judgments
    from embed.inference.corpus import read_jsonl

    parser = common.Parser("judge", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--log", help='JSON lines {"query", "url"}, plain or in gzip')
    parser.add_argument("--max_per_url", type=int, default=100, help="a URL of more queries joins none (default 100)")
    parser.add_argument("--queries", help='JSON lines {"_id", "text"}')
    parser.add_argument("--corpus", help='JSON lines {"_id", "text"}; "title" goes before the text')
    parser.add_argument("--systems", nargs="+", default=[], help="models, as --model of embed evaluate, and bm25")
    parser.add_argument("--relevant", type=int, default=10, help="relevant texts per query (default 10)")
    parser.add_argument("--language", default="", help="of bm25 (ISO 639-3: eng)")
    parser.add_argument("--max_queries", type=int, default=0, help="of more, take a fixed sample (default: all)")
    common.add_output_arguments(parser, "folder of the set")
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    by_systems = bool(arguments.queries or arguments.corpus or arguments.systems)
    if bool(arguments.log) == by_systems:
        raise ValueError("give either --log, or --queries, --corpus and --systems")
    if by_systems and not (arguments.queries and arguments.corpus and len(arguments.systems) > 1):
        raise ValueError("query2doc needs --queries, --corpus and at least two --systems")
    for name, least in (("max_per_url", 1), ("relevant", 1), ("max_queries", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name}={getattr(arguments, name)} must be at least {least}")
    if repeated := {system for system in arguments.systems if arguments.systems.count(system) > 1}:
        raise ValueError(f"--systems names {sorted(repeated)[0]} twice: its ranking would count twice")
    common.join(arguments, saves_at_sigterm=False)
    with common.output(arguments, [arguments.log, arguments.queries, arguments.corpus], is_ours=is_set):
        if arguments.log:
            made = judgments.by_shared_urls(
                (_click(source, row) for source, row in read_jsonl(arguments.log)),
                max_queries=arguments.max_queries,
                max_per_url=arguments.max_per_url,
            )
        else:
            made = _by_systems(arguments)
        if not made.qrels:
            counted = ", ".join(f"{name} {count:,}" for name, count in made.counts.items())
            raise ValueError(f"no two queries have a URL in common, or no system finds a text ({counted})")
        if distributed.is_first():
            for name in ("corpus", "queries", "qrels"):
                _write(paths.path(arguments.output) / f"{name}.jsonl", getattr(made, name))
            paths.write_json(paths.path(arguments.output) / "judged.json", dict(made.counts) | _how(arguments))
    counts = ", ".join(f"{name} {count:,}" for name, count in made.counts.items())
    say(f"{counts}; {len(made.queries):,} queries, {len(made.qrels):,} judgments: {arguments.output}")
    return 0


def is_set(folder) -> bool:
    """Whether this verb made a folder."""
    from embed import paths

    return (paths.path(folder) / "judged.json").exists()


def _how(arguments: argparse.Namespace) -> dict:
    names = ("max_per_url",) if arguments.log else ("systems", "relevant", "language")
    return {name: getattr(arguments, name) for name in names}


def _click(source: str, row: dict) -> tuple[str, str]:
    query, url = row.get("query"), row.get("url")
    if not isinstance(query, str) or not isinstance(url, str) or not url:
        raise ValueError(f'{source}: "query" is {query!r:.80} and "url" is {url!r:.80}, expected strings')
    return query, url


def _by_systems(arguments: argparse.Namespace):
    import numpy as np

    from embed.evaluation import judgments, models, retrieval
    from embed.evaluation.sets import RetrievalSet
    from embed.inference.corpus import read_rows

    corpus, queries = read_rows(arguments.corpus), read_rows(arguments.queries, queries=True)
    if chunked := [row for row in corpus if "chunks" in row.fields]:
        raise ValueError(f'{chunked[0].source} has "chunks": query2doc ranks texts, expected "text"')
    texts = {row.id: row.chunks[0] for row in queries}
    asked = judgments.sample(list(texts), texts, arguments.max_queries)
    data = RetrievalSet(
        "judge",
        asked,
        [texts[name] for name in asked],
        [row.id for row in corpus],
        [row.chunks[0] for row in corpus],
        [np.array([row]) for row in range(len(corpus))],
        [{} for _ in asked],
    )
    rankings = []
    for system in arguments.systems:
        candidate = models.load(system)
        (form,) = candidate.forms(["float32"])
        how = dict(alone=True, language=arguments.language, depth=max(retrieval.DEPTH, arguments.relevant))
        ranked = candidate.rank(data, [form], **how, show_progress_bar=True)
        rankings.append(ranked[form])
    qrels = judgments.by_fusion(asked, data.corpus_ids, rankings, relevant=arguments.relevant)
    return judgments.Tables(
        [{"_id": row.id, "text": row.chunks[0]} for row in corpus],
        [{"_id": name, "text": texts[name]} for name in asked],
        qrels,
        {"texts": len(corpus), "systems": len(rankings)},
    )


def _write(file, rows: list[dict]) -> None:
    import json

    from embed import paths

    paths.write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
