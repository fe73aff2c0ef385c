"""Serve the vectors of one or more models over HTTP, as OpenAI's and Perplexity's APIs do: docs/serve.md."""

import dataclasses
import os
from pathlib import PurePosixPath

from embed import inference
from embed.cli import common
from embed.inference.precision import check_count


def main(argv: list[str] | None = None) -> int:
    """Run `embed serve arguments`; returns the exit code."""
    parser = common.Parser("serve", __doc__)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="[NAME=]PATH, a model folder, bucket or hub id (may be repeated); NAME is what requests call it, by "
        "default the last part of PATH",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine; 0.0.0.0: all networks")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 is a free one")
    try:
        import uvicorn

        from embed.inference.server import Limits, make_app
    except ImportError as error:
        raise ValueError(f"embed serve needs more packages ({error}): pip install -e '.[serve]'") from error
    default = Limits()
    about = {
        "texts": "texts or documents of a request",
        "chunks": "chunks of a request",
        "tokens": "tokens of a request",
        "body": "bytes of a request",
        "batch_tokens": "tokens of a batch; default: 1,024 on CPU, 65,536 per device otherwise",
        "waiting_tokens": "tokens that may wait, of all requests; more are refused with status 429",
    }
    for name, text in about.items():
        value = getattr(default, name)
        shown = f" (default {value:,})" if value else ""
        parser.add_argument(f"--{name}", type=int, default=value, help=text + shown)
    args = parser.parse_args(argv)
    limits = Limits(**{name: getattr(args, name) for name in about})
    for name, value in dataclasses.asdict(limits).items():
        if value is not None:
            check_count(f"--{name}", value)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port={args.port} must be from 0 to 65535")
    folders = _folders(args.model)
    encoders = {name: inference.load(path, dtype=args.dtype) for name, path in folders.items()}
    app = make_app(encoders, limits, os.environ.get("EMBED_API_KEY") or None)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)
    return 0


def _folders(given: list[str]) -> dict[str, str]:
    """{name: path} of the arguments --model."""
    folders = {}
    for argument in given:
        name, separator, path = argument.partition("=")
        if not separator:
            name, path = PurePosixPath(argument.rstrip("/")).name, argument
        if not argument.strip():
            raise ValueError(f"--model={argument!r} is empty: expected a value")
        if not name or not path:
            raise ValueError(f"--model={argument} must be [NAME=]PATH")
        if name in folders:
            raise ValueError(f"two models are called {name!r}: --model=NAME=PATH gives one another name")
        folders[name] = path
    return folders
