"""One page that compares evaluations and runs: by task, language, length, size of the vectors; training curves.

    embed report results/a results/b runs/quickstart --output=report

Arguments are folders of `embed evaluate` and workdirs. Writes report.html, which needs no other file, report.md and
plots/.
"""

import argparse


def main(argv: list[str] | None = None) -> int:
    """Run `embed report arguments`; returns the exit code."""
    import tempfile

    from embed import paths
    from embed.cli import common
    from embed.console import say
    from embed.evaluation import compare, page

    parser = common.Parser("report", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_RESULTS", help="a workdir, or a folder of embed evaluate")
    parser.add_argument(
        "--baseline", default="", help="the model that others are compared with (default: BM25, or the first)"
    )
    common.add_output_arguments(parser, "folder of the report")
    arguments = parser.parse_args(argv)
    with common.output(arguments, [], is_ours=is_report):
        models, curves = compare.read(arguments.sources)
        labels = [model.label for model in models]
        if arguments.baseline and arguments.baseline not in labels:
            raise ValueError(f"--baseline={arguments.baseline!r} must be one of {', '.join(labels)}")
        with tempfile.TemporaryDirectory(prefix="embed-report-") as folder:
            page.write(folder, compare.sections(folder, models, curves, arguments.baseline))
            for name, file in paths.files(folder).items():
                paths.copy_file(file, paths.path(arguments.output) / name)
    say(f"{len(models):,} models, {len(curves):,} training curves: {paths.path(arguments.output) / 'report.html'}")
    return 0


def is_report(folder) -> bool:
    """Whether a folder has what this verb writes."""
    from embed import paths

    found = set(paths.files(folder))
    return {"report.html", "report.md"} <= found and "results.json" not in found  # which is a run with its own report
