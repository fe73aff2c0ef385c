"""Loading a run's configuration: a Python file with get_config(arg), plus overrides from the command line."""

import ast
import difflib
import importlib.util
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from embed import paths


def parse_arg(arg: str, **defaults):
    """The text after `config.py:` as a ConfigDict: `runlocal,stage=pair` over typed defaults.

    A bare name is True. An unknown name or a value of another type than its default is an error.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown config argument {name!r}{nearest(name, defaults)}")
        kind = type(defaults[name])
        if kind is bool:
            if text not in ("", "True", "False"):
                raise ValueError(f"config argument {name}={text!r} must be True or False")
            values[name] = text != "False"
        else:
            try:
                values[name] = kind(text)
            except ValueError:
                raise ValueError(f"config argument {name}={text!r} must be of type {kind.__name__}") from None
    return ConfigDict(values)


def shipped() -> Path:
    """The folder of the configs that ship: beside embed/ in a clone, inside of it where the package is installed."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def find(name: str, config: str = "") -> Path:
    """A config or gin file, absolute: as named from the working directory, or from the folder of the file of `config`
    (FILE.py:argument) or one above it, or one of those that ship, configs/….

    FileNotFoundError names where it was looked for.
    """
    file = Path(paths.path(name))
    beside = [folder / name for folder in Path(paths.path(config.partition(":")[0])).parents] if config else []
    ships = [shipped().parent / name] if Path(name).parts[:1] == ("configs",) else []
    for found in (file, *beside, *ships):
        if found.is_file():
            return found
    where = [str(Path.cwd()), *(["the folder of the config or one above it"] if config else [])]
    raise FileNotFoundError(f"no file {name} in {', '.join(where)}, nor among those that ship in {shipped()}")


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `FILE.py` or `FILE.py:arg` with overrides `--config.optimizer.clip=1.0`.

    A key that the file does not define is an error that names the nearest one that it does; so is a value of
    another type than the file's.
    """
    name, _, arg = path.partition(":")
    if not name.endswith(".py"):
        raise ValueError(f"config {name} must be a Python file with get_config(arg), FILE.py or FILE.py:argument")
    if "configs" not in sys.modules:  # so that any config can build on those that ship: from configs import base
        sys.modules["configs"] = package = types.ModuleType("configs")
        package.__path__ = [str(shipped())]
    config = _call_get_config(find(name), arg).lock()
    known = dict(leaves(config))
    for item in overrides:
        name, equals, text = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            raise ValueError(f"unknown argument {item!r}; overrides have the form --config.key=value")
        if name not in known:
            raise ValueError(f"unknown config key {name!r}{nearest(name, known)}")
        try:
            value = text if isinstance(known[name], str) else ast.literal_eval(text)
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError, SyntaxError):
            kind = type(known[name]).__name__
            raise ValueError(f"config key {name!r} must be of type {kind} like {known[name]!r}, got {text!r}") from None
    return config


def _call_get_config(file: Path, arg: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("embed_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"config file {file} defines no get_config(arg)")
        return module.get_config(arg) if arg else module.get_config()
    except ValueError:
        raise
    except Exception as error:  # the file's own
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        lines = [error.lineno] if isinstance(error, SyntaxError) else lines
        said = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(
            f"config file {file}, line {lines[-1] if lines else 1}: {type(error).__name__}: {said}"
        ) from error


def leaves(config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key, value) of every field of a config, keys of nested ones joined with dots."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: Mapping, b: Mapping, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(key, left, right) of every leaf at which two nested dicts differ, keys joined with dots, in order."""
    for key in sorted({*a, *b}):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}", left, right


def nearest(name: str, known) -> str:
    """The end of an error about an unknown name: the known one that is most like it."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""
