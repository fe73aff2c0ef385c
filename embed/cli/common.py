"""Code that the verbs share: errors as one sentence, common arguments, output, and other processes of a job."""

import argparse
import atexit
import contextlib
import ctypes
import errno
import math
import os
import shlex
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from embed import distributed, paths
from embed.config import nearest

WRONG_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

# Their errors, for example about missing credentials, are not OSErrors.
BUCKET_LIBRARIES = ("botocore", "aiobotocore", "gcsfs", "google.auth", "aiohttp")

# Time limit for the exit functions of libraries, which remove temporary folders and disconnect from other processes.
LAST_SECONDS = 30.0


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Run a verb; an error that a user can fix ends in one sentence and an exit code.

    0: done. 2: wrong input. 1: a fault of the machine, such as a full disk or no access to a bucket. 3: a budget is
    spent. 75: try the same command again, for example because another process of the run died. 130: interrupted, in
    training after a checkpoint. 143: ended by SIGTERM after a checkpoint. With EMBED_TRACEBACK=1, errors show their
    traceback.
    """
    keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = main(argv) or 0
        distributed.barrier()  # no process ends before process 0 has written
        return code
    except BrokenPipeError:  # of `embed … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # like SIGPIPE: the reader has gone, so the run is not done
    except Exception as error:
        code, sentence = _describe(error)
        if not code or os.environ.get("EMBED_TRACEBACK"):
            raise
        saved = code in (130, 143)
        kind = "" if saved else "error: "
        print(f"embed: {kind}{'; '.join([sentence, *getattr(error, '__notes__', [])])}", file=sys.stderr)
        if code == 75 or (not saved and distributed.is_joined()):
            _leave(code)
        return code
    except KeyboardInterrupt as error:
        print(f"embed: {'; '.join(['interrupted', *getattr(error, '__notes__', [])])}", file=sys.stderr)
        if distributed.is_joined():
            _leave(130)
        return 130


def _describe(error: Exception) -> tuple[int, str]:
    """(exit code, sentence) of an error that a user can fix; code 0 for a fault of the program."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 2, f"{error.filename or 'a path'!s:.60}… is too long for the name of a file"
    if type(error).__module__.startswith(BUCKET_LIBRARIES) and not isinstance(error, OSError):
        return 1, f"the bucket cannot be used: {' '.join(str(error).split())}"
    default = 2 if isinstance(error, WRONG_INPUT) else 1 if isinstance(error, OSError) else 0
    return getattr(error, "exit_code", default), str(error)


@contextlib.contextmanager
def keeps_work() -> Iterator[None]:
    """For verbs that continue: Ctrl-C in the block tells that the same command does the rest."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note("completed work is kept, and the same command does the rest")
        raise


def end(main: Callable[..., int], *arguments) -> NoReturn:
    """Run `main(*arguments)` and end the process with the returned code; only for the outermost call of a process.

    A hanging thread, such as a reader, a save or a library, does not keep the process alive. Characters that the locale
    cannot print are printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = main(*arguments)
    except SystemExit as ended:  # of --help
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1

    def give_up():
        time.sleep(LAST_SECONDS)
        _leave(code)

    threading.Thread(target=give_up, name="end", daemon=True).start()
    # The exit functions, as at the end of the interpreter, but without waiting for threads that are not daemons.
    atexit._run_exitfuncs()
    _leave(code)


def _show_warning(message, category, *_) -> None:
    """Print a warning on one line, in process 0."""
    if not distributed.is_joined() or distributed.is_first():
        print(f"embed: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """End at once: runtime threads may be running, and jax would wait for a process that is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone
            code = code or 141
    os._exit(code)


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory instead of returning it to the kernel; False without glibc.

    XLA on CPU allocates its temporary buffers again at every step. malloc maps and unmaps each buffer above 32 MB, and
    the kernel zeroes its pages every time. The cost depends on the machine (ARCHITECTURE.md, "Speed").
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
    # One arena: further arenas consist of mapped heaps of 64 MB.
    return all(
        libc.mallopt(name, value) for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    )


def add_output_arguments(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """Add --output and --overwrite, the arguments of `output`."""
    parser.add_argument("--output", required=required, help=what)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing --output, if it holds what this verb writes",
    )


@contextlib.contextmanager
def output(
    arguments: argparse.Namespace,
    inputs: Sequence[str | None] = (),
    *,
    is_ours: Callable | None = None,
    is_our_file: Callable | None = None,
    continues: bool = False,
    share: str = "",
) -> Iterator[None]:
    """Lock --output, if given, for this command until the block ends: a folder (`is_ours`) or file (`is_our_file`).

    An output that cannot be written is refused before the work (`paths.check_output`). So is one that another command
    is writing, one of the `inputs` (files, model folders), a path inside a stage, model, index or prepared data
    (`runs.contents`), and a folder that contains an input. With `continues`, the verb continues its own output, and
    there is no --overwrite. With `share`, it locks only a part of this name. All processes call it, after `join`.
    """
    from embed import runs

    def refuse():
        for given in filter(None, inputs):
            written, read = paths.resolve(arguments.output), paths.resolve(given)
            is_inside = read in written.parents and (read / "config.json").exists()  # of a model or stage
            if read.exists() and (written == read or is_inside or written in read.parents):
                how = "is" if written == read else "is inside" if is_inside else "contains"
                raise ValueError(
                    f"--output={arguments.output} {how} {given}, which this command reads: choose another path"
                )
        for folder in paths.parents(arguments.output):
            if what := runs.contents(folder):
                raise ValueError(f"--output={arguments.output} is inside {folder}, {what}: choose another path")
        overwrite = continues or arguments.overwrite
        paths.check_output(arguments.output, is_ours=is_ours, is_our_file=is_our_file, overwrite=overwrite)

    if not arguments.output:
        yield
        return
    locked = f"{arguments.output.rstrip('/')}{share}" if share else arguments.output
    with distributed.hold(locked, refuse):
        yield


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Refuse texts of argument `name` that are blank, or contain bytes that are not UTF-8."""
    for text in texts:
        if not text.strip():
            raise ValueError(f"{name}={text!r} is blank: expected a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}={text!r:.80} is not UTF-8 at character {error.start}") from None


def parse_range(name: str, text: str) -> range:
    """range(A, B) for the text "A:B"; an empty range for an empty text."""
    if not text:
        return range(0)
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise ValueError(f"{name}={text} must be A:B with whole numbers A < B")
    return range(int(start), int(stop))


def finite(text: str) -> float:
    """The type of arguments that are finite numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one sentence; for an unknown option, it names the nearest one.

    Options cannot be abbreviated. A value cannot be empty, as from an unset shell variable, unless that is its default.
    `parse_known_args` returns options --config.key=value unparsed, for `config.load`.
    """

    def __init__(self, verb: str, description: str):
        super().__init__(f"embed {verb}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; {self.prog} --help lists the options")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for before, argument in zip(["", *args], args):  # before argparse, which would name missing options first
            name = argument.partition("=")[0]
            if argument == "--":
                break
            if name.startswith("--") and name not in self._option_string_actions and not name.startswith("--config."):
                self._refuse(argument, before)
        namespace, remaining = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            values = value if isinstance(value, list) and action.nargs == "+" else [value]
            if value != action.default and (empty := [v for v in values if isinstance(v, str) and not v.strip()]):
                name = f"{action.option_strings[0]}={empty[0]}" if action.option_strings else action.metavar
                raise ValueError(f"{self.prog}: {name} is empty: expected a value")
        for argument in remaining:
            if not argument.startswith("--config."):
                self._refuse(argument)
        return namespace, remaining

    def parse_args(self, args=None, namespace=None):
        namespace, remaining = self.parse_known_args(args, namespace)
        if remaining:
            self._refuse(remaining[0])
        return namespace

    def _refuse(self, argument: str, before: str = "") -> NoReturn:
        """Refuse an argument; `before` is the one before it, which may be an option that has it as its value."""
        name, option = argument.partition("=")[0], self._option_string_actions.get(before)
        near = nearest(name, self._option_string_actions) if name.startswith("--") else "; options are --name=value"
        if option and option.nargs != 0:
            near = f"; if it is the value of {before}, write {shlex.quote(f'{before}={argument}')}"
        raise ValueError(f"{self.prog}: unknown argument {name!r}{near}")


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True, prepares: bool = False) -> None:
    """Add --config=FILE.py[:arg] and --workdir; `parse_config` also reads --config.key=value.

    `prepares`: the verb may prepare data, so add --data_root.
    """
    parser.add_argument("--config", required=required, help="config file, FILE.py or FILE.py:argument,name=value")
    parser.add_argument("--workdir", required=required, help="folder of the run; the same command continues it")
    if prepares:
        parser.add_argument("--data_root", help="the folder that {data_root} in the gin file stands for")
    parser.epilog = "Set single fields of the config with --config.key.key=value."


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None):
    """(arguments, config) of a verb with `add_config_arguments`."""
    from embed import config

    arguments, overrides = parser.parse_known_args(argv)
    if getattr(arguments, "data_root", None):
        overrides = [*overrides, f"--config.data.root={arguments.data_root}"]
    return arguments, config.load(arguments.config, overrides)


def config_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """The options that changed the config: --data_root and --config.key=value."""
    arguments, overrides = parser.parse_known_args(argv)
    return [f"--data_root={arguments.data_root}"] * bool(arguments.data_root) + overrides


def config_command(verb: str, config: str, options: Sequence[str]) -> str:
    """The command of a verb that gives the same results, in any workdir."""
    return shlex.join(["embed", verb, f"--config={config}", *options])


def add_encoder_arguments(
    parser: argparse.ArgumentParser,
    what: str = "a model folder, a hub id owner/name, or a stage folder of a run",
    truncate: bool = True,
    required: bool = True,
) -> None:
    """Add --model, --step, --max_length, --rope_theta and --truncate: an encoder (`load_encoder`) and long texts."""
    parser.add_argument("--model", required=required, help=what)
    add_step_argument(parser)
    parser.add_argument("--max_length", type=int, help="most tokens of a text or document (default: that of the model)")
    parser.add_argument("--rope_theta", type=finite, help="base of the rotary angles (default: that of the model)")
    if truncate:
        parser.add_argument(
            "--truncate",
            action="store_true",
            help="cut longer texts, with a warning; otherwise a longer text is an error",
        )


def add_step_argument(parser: argparse.ArgumentParser, name: str = "--step") -> None:
    """Add --step, the step of `runs.Run.checkpoint`."""
    parser.add_argument(
        name, type=int, default=0, help="step of an unfinished stage (default: the last step of a finished one)"
    )


def add_vector_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --precision and --truncate_dim, which `check_vectors` checks."""
    from embed import inference

    parser.add_argument("--precision", choices=inference.PRECISIONS, default="float32")
    parser.add_argument("--truncate_dim", type=int, help="keep this many dimensions (a Matryoshka prefix)")


def add_chunker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --chunker, --chunk_tokens, --overlap and --language, for `check_chunker` and `make_chunker`."""
    from embed.inference import chunkers

    parser.add_argument("--chunker", choices=chunkers.NAMES, help="divide texts into chunks (default: they are one)")
    parser.add_argument("--chunk_tokens", type=int, help="most tokens of a chunk (default 256)")
    parser.add_argument("--overlap", type=int, help="tokens shared by chunks of --chunker=tokens (default 0)")
    parser.add_argument("--language", help="of sentences (default en), or of code (default python)")


def check_chunker(arguments: argparse.Namespace) -> None:
    """Refuse the other arguments of a chunker without --chunker; with it, set their defaults."""
    if not arguments.chunker:
        refuse_given(arguments, ("chunk_tokens", "overlap", "language"), "is for --chunker")
        return
    for name, default in (("chunk_tokens", 256), ("overlap", 0)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def refuse_given(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """ValueError for the first argument of these that was given: they are None, False or empty by default."""
    for name in names:
        if getattr(arguments, name):
            raise ValueError(f"--{name} {why}")


def make_chunker(arguments: argparse.Namespace, encoder):
    """The chunker that the arguments name, None without --chunker."""
    from embed.inference import chunkers

    if not arguments.chunker:
        return None
    how = dict(size=arguments.chunk_tokens, overlap=arguments.overlap, language=arguments.language)
    return chunkers.make(arguments.chunker, encoder, **how)


def check_vectors(model: str, precisions: Sequence[str], truncate_dim: int | None = None) -> None:
    """Refuse precisions and a prefix that a model's vectors do not have; reads only its config.json."""
    from embed import runs
    from embed.inference.precision import check_precision

    size = runs.vector_size(model)
    for precision in precisions:
        check_precision(precision, size, truncate_dim)


def load_encoder(arguments: argparse.Namespace, mesh=None):
    """Load the encoder of --model and --step, with --max_length and --rope_theta, over `mesh` or all devices."""
    from embed import runs

    how = dict(max_length=arguments.max_length, rope_theta=arguments.rope_theta, mesh=mesh)
    encoder = runs.load_encoder(arguments.model, arguments.step, **how)
    if encoder.token_dimensions:
        warnings.warn(
            f"{arguments.model} is a late-interaction model: this command uses one vector per text, which its last "
            "stage did not train",
            stacklevel=2,
        )
    return encoder


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --runner and --runner_options, which `runner_options` reads."""
    parser.add_argument("--runner", default="", help="a runner of Apache Beam, such as FnApiRunner or DataflowRunner")
    parser.add_argument(
        "--runner_options",
        nargs="*",
        default=(),
        metavar="NAME=VALUE",
        help="options of the runner, without dashes, such as direct_num_workers=2",
    )


def runner_options(arguments: argparse.Namespace) -> list[str]:
    """The options of the runner, with dashes."""
    if arguments.runner_options and not arguments.runner:
        raise ValueError("--runner_options needs --runner")
    return [f"--{option.lstrip('-')}" for option in arguments.runner_options]


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --distributed, or --coordinator, --num_processes and --process_id, the arguments of `join`."""
    parser.add_argument(
        "--distributed", action="store_true", help="join the other processes of a TPU pod, GKE or Slurm job"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, for several processes")
    parser.add_argument("--num_processes", type=int, help="number of processes that work together")
    parser.add_argument("--process_id", type=int, help="index of this process, from 0")


def join(arguments: argparse.Namespace, *, saves_at_sigterm: bool = True, alone: bool = False) -> None:
    """Join the other processes if the arguments say so; call it before anything is computed (`distributed.join`).

    With `alone`, processes may share the work without --coordinator: then this one joins no other.
    """
    several = arguments.num_processes is not None
    if not several and (arguments.coordinator or arguments.process_id is not None):
        raise ValueError("--coordinator and --process_id need --num_processes")
    if arguments.distributed and several:
        raise ValueError("--distributed finds the processes by itself: leave out --num_processes")
    if alone and several and not arguments.coordinator and arguments.process_id in range(arguments.num_processes):
        return
    if several and (not arguments.coordinator or arguments.process_id not in range(arguments.num_processes)):
        raise ValueError(
            f"--num_processes={arguments.num_processes} needs --coordinator=HOST:PORT and --process_id from 0 to "
            f"{arguments.num_processes - 1}, not {arguments.coordinator} and {arguments.process_id}"
        )
    if arguments.distributed or several:
        distributed.join(
            arguments.coordinator, arguments.num_processes, arguments.process_id, saves_at_sigterm=saves_at_sigterm
        )
