"""Write synthetic queries for the documents of a corpus with a language model behind an endpoint.

Any OpenAI-compatible endpoint: for each document, the model chooses personas and writes the queries that each of them
would ask. Writes JSON lines {"query", "document", "document_id", "persona", …}; the same command continues
(docs/synthesize.md).
"""

import argparse
import json
import os
import re
import sys

from embed.cli import common


def main(argv: list[str] | None = None) -> int:
    """Run `embed synthesize arguments`; returns the exit code."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator of this machine belongs to the server of the model
    import asyncio

    import rich.progress

    from embed import paths
    from embed.console import make_console, print_table
    from embed.inference.corpus import read_corpus
    from embed.preparation import synthesis
    from embed.preparation.synthesis.prompts import Settings, read_personas

    args = _parse(argv)
    settings = Settings(
        personas=read_personas(paths.path(args.personas)) if args.personas else read_personas(),
        queries_per_document=args.queries_per_document,
        personas_per_document=args.personas_per_document,
        languages=tuple(args.languages),
        seed=args.seed,
        temperature=args.temperature,
        answer_tokens=args.max_tokens,
        document_characters=args.max_document_characters,
        query_characters=args.max_query_characters,
        request=args.request,
    )
    report = synthesis.Report()
    endpoint = synthesis.Endpoint(
        args.base_url,
        os.environ.get(args.api_key_variable or "OPENAI_API_KEY"),
        args.model,
        settings,
        report,
        timeout=args.timeout,
        retries=args.retries,
    )
    with common.output(args, inputs=[args.corpus, args.personas], is_our_file=synthesis.is_output, continues=True):
        corpus = read_corpus(args.corpus)
        documents = [synthesis.Document(*row) for row in zip(corpus.ids, corpus.texts, strict=True)]
        output = synthesis.Output(args.output and paths.resolve(args.output), args.model, settings)
        synthesis.check_texts(output, documents)
        documents = documents[: 1 if args.check else args.limit]
        work = synthesis.Synthesis(
            endpoint,
            output,
            report,
            concurrency=args.concurrency,
            reasks=args.reasks,
            max_tokens_total=args.max_tokens_total,
        )
        if args.check:
            endpoint.trace = lambda name, text: print(f"--- {name} ---\n{text}\n")
            output.show = lambda row: print(json.dumps(row, ensure_ascii=False))
        progress = rich.progress.Progress(
            rich.progress.TextColumn("documents"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=make_console(stderr=True),
            disable=args.check or not sys.stderr.isatty(),
        )
        bar = progress.add_task("", total=len(documents))

        def advance() -> None:
            progress.update(bar, advance=1, description=f"{report.written:,} queries, {report.usage.total:,} tokens")

        try:
            with common.keeps_work(), progress:
                stop = asyncio.run(work.run(documents, advance))
        finally:
            print_table(report.table(args.price_in, args.price_out))
    if args.output:
        log = f"; the documents without queries are in {args.output}.skipped" if output.log.exists() else ""
        print(f"written to {args.output}{log}")
    if stop:
        print(f"embed: {stop.sentence}", file=sys.stderr)
        return stop.code
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser("synthesize", __doc__)
    parser.add_argument(
        "--corpus", required=True, help='JSONL rows {"_id", "text"} or {"_id", "chunks"}: docs/search.md'
    )
    parser.add_argument("--output", help="the JSONL file to write or continue, on a disk")
    parser.add_argument("--base_url", required=True, help="of the endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument(
        "--api_key_variable", help="the environment variable with the key of the endpoint (default OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--check", action="store_true", help="ask for the first document only, print prompts and answers, write nothing"
    )
    parser.add_argument("--personas", help="text file with one persona per line (default: a list of 48)")
    parser.add_argument("--queries_per_document", type=int, default=5, help="(default 5)")
    parser.add_argument("--personas_per_document", type=int, default=5, help="personas that share them (default 5)")
    parser.add_argument(
        "--languages", nargs="+", default=[], help="ISO 639 codes of the queries (default: the document's language)"
    )
    parser.add_argument("--limit", type=int, help="only the first N documents of the corpus")
    parser.add_argument(
        "--max_tokens_total", type=int, help="budget in tokens, with those of earlier runs; exit code 3"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="most open requests (default 8)")
    parser.add_argument("--timeout", type=common.finite, default=120.0, help="seconds for an answer (default 120)")
    parser.add_argument("--retries", type=int, default=5, help="after 429, 5xx, timeouts, lost connections (default 5)")
    parser.add_argument("--reasks", type=int, default=2, help="after an answer that cannot be used (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of candidates, query types and requests (default 0)")
    parser.add_argument("--temperature", type=common.finite, default=0.7, help="(default 0.7)")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of an answer (default 1024)")
    parser.add_argument(
        "--max_document_characters", type=int, default=20_000, help="cut longer documents in the prompt (default 20000)"
    )
    parser.add_argument("--max_query_characters", type=int, default=400, help="refuse longer queries (default 400)")
    parser.add_argument(
        "--request", default="{}", help="JSON object of further parameters of each request; null removes one"
    )
    parser.add_argument("--price_in", type=common.finite, help="per million tokens of prompts, to print the cost")
    parser.add_argument("--price_out", type=common.finite, help="per million tokens of answers")
    args = parser.parse_args(argv)
    if not args.output and not args.check:
        raise ValueError("embed synthesize needs --output, or --check to write nothing")
    if args.check:
        args.output = None
    elif "://" in args.output and args.output.startswith(("gs:", "s3:")):
        raise ValueError(f"--output={args.output} must be on a disk: rows are appended to it")
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", args.base_url):
        raise ValueError("--base_url must be http://HOST/… or https://HOST/…, without a name or password in it")
    # A key instead of a name is not repeated in the message.
    if args.api_key_variable and not os.environ.get(args.api_key_variable):
        raise ValueError("--api_key_variable must be the name of an environment variable that is set")
    for name, least in (("limit", 1), ("max_tokens_total", 1), ("retries", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    if args.timeout <= 0:
        raise ValueError(f"--timeout={args.timeout:g} must be positive")
    for name in ("price_in", "price_out"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name}={getattr(args, name):g} must not be negative")
    try:
        request = json.loads(args.request)
    except ValueError as error:
        raise ValueError(f"--request={args.request} is not JSON ({error})") from None
    if not isinstance(request, dict):
        raise ValueError(f"--request={args.request} must be a JSON object")
    args.request = request
    return args
