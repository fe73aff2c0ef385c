"""Retrieval metrics of a model on an evaluation set of your own, as in the report of a run."""


def main(argv: list[str] | None = None) -> int:
    """Run `embed evaluate arguments`; returns the exit code."""
    from rich.table import Table

    from embed import distributed, inference, paths
    from embed.cli import common
    from embed.console import print_table
    from embed.evaluation import retrieval

    parser = common.Parser("evaluate", __doc__)
    common.add_encoder_arguments(parser)
    parser.add_argument("--data", required=True, help="folder with corpus.jsonl, queries.jsonl and qrels.jsonl")
    parser.add_argument("--precision", nargs="+", default=list(retrieval.PRECISIONS), choices=inference.PRECISIONS)
    parser.add_argument("--alone", action="store_true", help="encode each chunk of a document by itself")
    common.add_output_arguments(parser, "also write the metrics to this file, as JSON", required=False)
    common.add_distributed_arguments(parser)
    arguments = parser.parse_args(argv)
    common.join(arguments, saves_at_sigterm=False)
    inputs = [arguments.model, *retrieval.files(arguments.data)]
    with common.output(arguments, inputs, is_our_file=are_figures):
        common.check_vectors(arguments.model, arguments.precision)
        data = retrieval.read_set(arguments.data)
        figures = retrieval.evaluate_retrieval(
            common.load_encoder(arguments),
            data,
            arguments.precision,
            alone=arguments.alone,
            truncate=arguments.truncate,
        )
        if not distributed.is_first():
            return 0
        table = Table("precision", *next(iter(figures.values())))
        for precision, row in figures.items():
            table.add_row(precision, *(f"{value:.4f}" for value in row.values()))
        print_table(table)
        if arguments.output:
            paths.write_json(arguments.output, figures)
    return 0


def are_figures(file) -> bool:
    """Whether a file has the content that this verb writes: {precision: {metric: value}}."""
    from embed import inference, paths

    try:
        figures = paths.read_json(file)
    except ValueError:
        return False
    return isinstance(figures, dict) and bool(figures) and figures.keys() <= set(inference.PRECISIONS)
