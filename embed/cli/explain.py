"""Show what each token of a text contributes to the score of its chunk for a query: a heat map, .html or .png."""

import io

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from embed import paths
from embed.cli import common
from embed.console import print_table, say
from embed.inference.explain import explain, page, picture

PNG = b"\x89PNG"
SHOWN = 5  # tokens of a line of the table


def main(argv: list[str] | None = None) -> int:
    """Run `embed explain arguments`; returns the exit code."""
    parser = common.Parser("explain", __doc__)
    common.add_encoder_arguments(parser, truncate=False)
    parser.add_argument("--query", required=True, help="a text")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text to explain")
    source.add_argument("--file", help="a file in UTF-8 with the text to explain")
    common.add_chunker_arguments(parser)
    parser.add_argument("--top", type=int, default=0, help="only so many chunks, the best (default: all, in order)")
    common.add_output_arguments(parser, "a file to write, .html or .png", required=False)
    args = parser.parse_args(argv)
    common.check_chunker(args)
    common.check_texts("--query", [args.query])
    if args.text is not None:
        common.check_texts("--text", [args.text])
    if args.top < 0:
        raise ValueError(f"--top={args.top} must be positive, or 0 for all")
    ending = (args.output or "").lower().rpartition(".")[2]
    if args.output and ending not in ("html", "png"):
        raise ValueError(f"--output={args.output} must end in .html or .png")
    with common.output(args, inputs=[args.model, args.file], is_our_file=is_heat_map):
        text = args.text or read_utf8(args.file)
        encoder = common.load_encoder(args)
        chunker = common.make_chunker(args, encoder)
        chunks = explain(encoder, args.query, text, chunker)
        if args.top:
            chunks = sorted(chunks, key=lambda chunk: -chunk.score)[: args.top]
        print_table(table(args.query, text, chunks))
        if ending == "html":
            paths.write(args.output, page(args.query, text, chunks).encode())
        elif args.output:
            content = io.BytesIO()
            picture(args.query, text, chunks, content)
            paths.write(args.output, content.getvalue())
    if args.output:
        say(f"written to {args.output}")
    return 0


def read_utf8(file: str) -> str:
    """The text of a file; ValueError unless it is UTF-8 and not blank."""
    path = paths.path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {file}: expected a text")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}: convert it") from None
    if not text.strip():
        raise ValueError(f"{file} is blank: expected a text")
    return text


def is_heat_map(file) -> bool:
    """Whether a file is what this verb writes."""
    start = paths.path(file).read_bytes()[:64]
    return start.startswith(PNG if str(file).lower().endswith(".png") else b"<!doctype html>")


def table(query: str, text: str, chunks) -> Table:
    """A line per chunk: its score, the tokens that contribute most, and its beginning."""
    result = Table(title=Text(query, "bold"), title_justify="left", box=SIMPLE_HEAD, expand=True)
    result.add_column("cosine", justify="right")
    result.add_column("characters", justify="right")
    result.add_column("tokens that contribute most", ratio=2)
    result.add_column("text", no_wrap=True, overflow="ellipsis", ratio=2)
    for chunk in chunks:
        best = sorted(zip(chunk.contributions.tolist(), chunk.offsets.tolist()), reverse=True)[:SHOWN]
        most = ", ".join(f"{text[a:b].strip()} {value:+.3f}" for value, (a, b) in best)
        shown = " ".join(text[chunk.start : chunk.end].split())
        result.add_row(f"{chunk.score:.3f}", f"{chunk.start}–{chunk.end}", Text(most), Text(shown))
    return result
