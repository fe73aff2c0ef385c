"""Load the config of a run: a Python file with get_config(arg), plus overrides from the command line."""

import ast
import difflib
import importlib.util
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from embed import paths


def parse_arg(arg: str, **defaults):
    """Parse the text after `config.py:`, such as `runlocal,stage=pair`, into a ConfigDict over typed `defaults`.

    A name without a value is True. A name whose default is a tuple may occur several times: each adds a text to it.
    ValueError for an unknown name, or a value whose type differs from its default's.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown config argument {name!r}{nearest(name, defaults)}")
        kind = type(defaults[name])
        if kind is tuple:
            values[name] = *values[name], text
        elif kind is bool:
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
    """The folder of the configs that ship: next to embed/ in a clone, inside it in an installed package."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def base():
    """The module configs/base.py. After this call any config can say `from configs import base`."""
    if "configs" not in sys.modules:
        sys.modules["configs"] = package = types.ModuleType("configs")
        package.__path__ = [str(shipped())]
    return importlib.import_module("configs.base")


def find(name: str, config: str = "") -> Path:
    """The absolute path of a config or gin file; FileNotFoundError names the folders that were searched.

    They are, in order: the working directory, the folder of `config` (FILE.py:argument) and those above it, and the
    configs that ship, named configs/….
    """
    file = Path(paths.path(name))
    beside = [folder / name for folder in Path(paths.path(config.partition(":")[0])).parents] if config else []
    ships = [shipped().parent / name] if Path(name).parts[:1] == ("configs",) else []
    for candidate in (file, *beside, *ships):
        if candidate.is_file():
            return candidate
    folders = [str(Path.cwd()), *(["the folder of the config or one above it"] if config else []), str(shipped())]
    raise FileNotFoundError(f"no file {name}; searched in {', '.join(folders)}")


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load `FILE.py` or `FILE.py:arg` with overrides such as `--config.optimizer.clip=1.0`, as a locked config.

    ValueError for a key that the file does not define, which names the nearest key, and for a value of another type.
    """
    name, _, arg = path.partition(":")
    if not name.endswith(".py"):
        raise ValueError(f"config {name} must be a Python file with get_config(arg): FILE.py or FILE.py:argument")
    base()
    file = find(name)
    config = _call_get_config(file, arg)
    _check_complete(file, config)
    known = dict(leaves(config.lock()))
    for item in overrides:
        name, equals, text = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            raise ValueError(f"unknown argument {item!r}: overrides have the form --config.key=value")
        if name not in known:
            raise ValueError(f"unknown config key {name!r}{nearest(name, known)}")
        try:
            value = text if isinstance(known[name], str) else ast.literal_eval(text)
            if value is None or isinstance(value, bool) and not isinstance(known[name], bool):
                raise TypeError("None and True have a type that ml_collections takes for any, or for a number")
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
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
    except Exception as error:  # raised by the file itself
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        lines = [error.lineno] if isinstance(error, SyntaxError) else lines
        message = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(
            f"config file {file}, line {lines[-1] if lines else 1}: {type(error).__name__}: {message}"
        ) from error


def _check_complete(file: Path, config) -> None:
    """ValueError unless a config has every field of configs/base.py, and its graph has entries of the kinds there."""
    if not isinstance(config, ConfigDict):
        raise ValueError(f"config file {file}: get_config returns {config!r:.40}, expected a config of configs/base.py")
    defaults = base()
    expected = dict(leaves(defaults.get_config()))
    make = {part: getattr(defaults, part.removesuffix("s")) for part in ("mining", "merges", "exports", "evaluations")}
    for part in ("stages", *make):
        for name, entry in (config.get(part) or {}).items():
            if not isinstance(entry, ConfigDict):
                raise ValueError(
                    f"config file {file}: config.{part}.{name} is {entry!r:.40}, expected an entry of base"
                )
            fresh = defaults.stage(entry.get("kind", "")) if part == "stages" else make[part]()
            expected |= {f"{part}.{name}.{key}": value for key, value in leaves(fresh)}
    present = {key for key, _ in leaves(config)}
    if missing := [key for key in expected if key not in present]:
        raise ValueError(
            f"config file {file} lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)}: build it on configs/base.py"
        )


def changed(config: ConfigDict, changes: Mapping) -> ConfigDict:
    """A copy of a config in which the fields named in `changes`, {"key.key": value}, have other values.

    ValueError for a key that the config does not have, which names the nearest key, and for a value of another type.
    """
    new = config.copy_and_resolve_references().lock()
    known = dict(leaves(new))
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"unknown config key {name!r}{nearest(name, known)}")
        try:
            new.update_from_flattened_dict({name: value})
        except TypeError:
            kind = type(known[name]).__name__
            raise ValueError(
                f"config key {name!r} must be of type {kind} like {known[name]!r}, got {value!r}"
            ) from None
    return new.unlock()


def leaves(config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key, value) of every field of a config; nested keys are joined with dots."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: Mapping, b: Mapping, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(key, left, right) of every leaf that differs between two nested dicts, sorted; nested keys joined with dots."""
    for key in sorted({*a, *b}):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}", left, right


def brief(items: Iterable[str], limit: int = 8, separator: str = "; ") -> str:
    """The items in one string: all of them, or the first `limit` and how many more there are."""
    items = list(items)
    shown = items if len(items) <= limit else [*items[:limit], f"and {len(items) - limit} more"]
    return separator.join(shown)


def nearest(name: str, known) -> str:
    """The end of an error about an unknown name: the most similar known name, if any is similar."""
    bare = {other.lstrip("-"): other for other in known}  # the dashes of options are no similarity
    match = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.7)
    return f"; did you mean {bare[match[0]]!r}?" if match else ""
