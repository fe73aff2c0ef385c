"""Retrieval figures of an exported model on a retrieval set: what the report shows, for a model and data of your own."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed evaluate arguments`; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from embed import inference, paths, runs
    from embed.cli import common
    from embed.evaluation import retrieval

    parser = common.Parser("evaluate", __doc__)
    common.add_model_argument(parser)
    parser.add_argument("--data", required=True, help="folder with corpus.jsonl, queries.jsonl and qrels.jsonl")
    parser.add_argument("--precision", nargs="+", default=["float32", "int8", "binary"], choices=inference.PRECISIONS)
    parser.add_argument("--alone", action="store_true", help="encode each chunk of a document by itself")
    parser.add_argument("--output", help="also write the figures as JSON")
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    common.check_output(arguments.output)
    data = retrieval.read_set(arguments.data)
    common.join(arguments, saves_at_sigterm=False)
    encoder = runs.load_encoder(arguments.model, arguments.step)
    figures = retrieval.evaluate_retrieval(encoder, data, arguments.precision, alone=arguments.alone)
    if not common.is_first():
        return 0
    table = Table("precision", *next(iter(figures.values())))
    for precision, row in figures.items():
        table.add_row(precision, *(f"{value:.4f}" for value in row.values()))
    Console().print(table)
    if arguments.output:
        paths.write_json(arguments.output, figures)
    return 0


if __name__ == "__main__":
    from embed.cli.common import end, run

    end(run, main)
