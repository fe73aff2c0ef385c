"""What a gin file says: tasks, mixtures, vocabulary, evaluation sets and hygiene. Only this module parses gin.

The scope of a binding is the name of its task, "a/b" for the task "a.b"; what is bound in the scope a holds for every
a.*, and what is bound without a scope for all. In a text, {name} stands for the last part of the task's name and
{data_root} for the folder of --data_root:

    fineweb2/task.source = @hub()
    fineweb2/hub.id = "HuggingFaceFW/fineweb-2"
    fineweb2/hub.config = "{name}"
    mixtures.rates = {"diffusion": {"fineweb2.rus_Cyrl": 1.0, "fineweb2.fra_Latn": 1.0}}
"""

import collections.abc
import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gin

from embed.preparation import languages, numbers, sources
from embed.preparation.hygiene import Hygiene
from embed.preparation.python_docs import PythonDocs
from embed.preparation.tasks import KINDS, Task


@dataclasses.dataclass(frozen=True)
class Mixtures:
    """The mixtures of tasks, and of other mixtures. Tasks outside all mixtures and evaluation sets are not prepared.

    rates: {mixture: {task or mixture: relative rate}}. alpha: {mixture: α}: the rates of a mixture are multiplied by
    size^α. modules: Python modules that register seqio tasks, whose names `rates` may use.

    unit: "examples" or "tokens", of sizes and of rates. Rates of texts are shares of tokens with either unit, since
    diffusion draws rows of tokens; only the sizes of their tasks are then in examples or in tokens.
    """

    rates: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    alpha: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "examples"
    modules: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Texts that a vocabulary is trained on: `characters` in total, of `tasks` (by default those of kind text)."""

    characters: int = 4_000_000
    tasks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """sets: {"SET/SPLIT": task}. A set has the examples that the task holds out, or all, or it is a retrieval set.
    Several sets of one task divide what it holds out into equal parts.

    max_queries: per set; those with the smallest digests stay.
    """

    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_queries: int = 3000


class Settings(NamedTuple):
    """What a gin file binds. `tasks` has an entry for each name in mixtures and evaluation sets that it defines."""

    tasks: dict[str, Task]
    mixtures: Mixtures
    vocabulary: Vocabulary
    evaluation: Evaluation
    registered: tuple[str, ...]  # names that must be seqio tasks
    # Python modules of the user's functions and seqio tasks: what they do is part of what is prepared.
    modules: tuple[str, ...] = ()
    hygiene: dict[str, Hygiene] = {}  # of the tasks in mixtures that drop or count something

    def members(self, mixture: str) -> list[str]:
        """The names of the tasks of a mixture and of those that it contains, sorted."""
        return sorted(set(_members(self.mixtures.rates, mixture)))

    def trained(self) -> list[str]:
        """The names of the tasks in mixtures, sorted."""
        return sorted({name for mixture in self.mixtures.rates for name in self.members(mixture)})


CONFIGURABLES = {
    "mixtures": Mixtures,
    "vocabulary": Vocabulary,
    "hygiene": Hygiene,
    "evaluation": Evaluation,
    "task": Task,
    "files": sources.Files,
    "hub": sources.Hub,
    "tfds": sources.Tfds,
    "retrieval": sources.Retrieval,
    "conteb": sources.Conteb,
    "parallel": sources.Parallel,
    "python_docs": PythonDocs,
}


def _fits(value, hint) -> bool:
    """Whether a bound value is of the type of its field. Numbers and sources are checked by their classes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if origin in (collections.abc.Sequence, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    return hint is not sources.Source or isinstance(value, sources.Source)


def _expected(hint) -> str:
    """What a type means for a reader."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(each) for each in arguments if each is not type(None))
    if origin in (collections.abc.Sequence, tuple):
        return f"a list, each item {_expected(arguments[0])}"
    if origin is collections.abc.Mapping:
        return f"a dictionary, each value {_expected(arguments[1])}"
    names = {str: "a text in quotes", bool: "True or False", sources.Source: "a source such as @files(), with ()"}
    return names.get(hint, "a number")


def _register(name: str, kind: type) -> None:
    """Tells gin of a class. A function, since gin would make subclasses, which cannot be pickled."""

    hints = typing.get_type_hints(kind)

    def make(**fields):
        for field, value in fields.items():
            if field in hints and not _fits(value, hints[field]):
                raise ValueError(f"{name}.{field}={value!r:.60} must be {_expected(hints[field])}")
        return kind(**fields)

    gin.external_configurable(make, name=name, module="embed")


for _name, _kind in CONFIGURABLES.items():
    _register(_name, _kind)


def bind(
    gin_file: str | Path, gin_bindings: Sequence[str] = (), *, data_root: str = "", limit: int | None = None
) -> Settings:
    """The settings of a gin file. ValueError for unknown and unused bindings, which names the nearest valid one."""
    if not Path(gin_file).is_file():
        raise FileNotFoundError(f"no gin file {gin_file}")
    text = Path(gin_file).read_text(encoding="utf-8") + "\n" + "\n".join(gin_bindings)
    try:
        bound = list(_bindings(text))
        valid = [f"{name}.{f.name}" for name, kind in CONFIGURABLES.items() for f in dataclasses.fields(kind) if f.init]
        for _, _, key in bound:
            if key and key not in valid:
                raise ValueError(f"unknown gin binding {key!r}{nearest(key, valid)}")
        gin.clear_config()
        try:
            result = _read(text, bound, data_root, limit)
            _check_used(bound, valid)
        finally:
            gin.clear_config()
        _check_kinds(result)
        _check_sets(result)
        _check_hygiene(result)
    except ValueError as error:
        raise ValueError(f"{gin_file}: {error}") from None
    return result


def _read(text: str, bound: Sequence[tuple[str, str, str]], data_root: str, limit: int | None) -> Settings:
    """The settings of a gin text, whose bindings are `bound`."""
    try:
        gin.parse_config(text)
        values = _values(text)
        mixtures, vocabulary, evaluation = (
            gin.get_configurable(name)() for name in ("mixtures", "vocabulary", "evaluation")
        )
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        raise ValueError(_first(error)) from None
    _check_rates(mixtures)
    _check_numbers(vocabulary, evaluation)
    for module in mixtures.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"mixtures.modules: {module!r} cannot be imported: {error}") from None
    trained = {name for members in mixtures.rates.values() for name in members} - set(mixtures.rates)
    defined = {scope for scope, name, _ in bound if scope and name.partition(".")[0] == "task"}
    registered, tasks, hygiene = [], {}, {}
    for scope in sorted(_referred(list(values.values()))):
        _fill(values, scope, data_root)
    for name in sorted(trained | {*evaluation.sets.values(), *vocabulary.tasks}):
        if not any(_within(_scope(name), other) for other in defined):
            registered.append(name)
            continue
        try:
            tasks[name], cleaned = _read_task(name, values, data_root, limit)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"task {name!r}: {_first(error)}") from None
        if cleaned.is_on and name in trained:
            hygiene[name] = cleaned
    if registered and not mixtures.modules:
        name, known = registered[0], {*mixtures.rates, *(scope.replace("/", ".") for scope in defined)}
        raise ValueError(
            f"no task {name!r}: bind {_scope(name)}/task.source and task.kind, or name the module that registers it in "
            f"mixtures.modules{nearest(name, known)}"
        )
    for field, used in (("evaluation.sets", evaluation.sets.values()), ("vocabulary.tasks", vocabulary.tasks)):
        if unusable := [name for name in registered if name in used]:
            raise ValueError(
                f"{field}: {unusable[0]!r} must be a task of the gin file, since tasks that only seqio knows are for "
                f"training only{nearest(unusable[0], tasks)}"
            )
    modules = {*mixtures.modules, *(task.map.partition(":")[0] for task in tasks.values() if task.map)}
    return Settings(tasks, mixtures, vocabulary, evaluation, tuple(registered), tuple(sorted(modules)), hygiene)


def _read_task(
    name: str, values: Mapping[tuple[str, str], object], data_root: str, limit: int | None
) -> tuple[Task, Hygiene]:
    """A task, once gin has parsed the text that `values` are from."""
    scope = _scope(name)
    _fill(values, scope, data_root)
    for field in ("kind", "source"):
        if not any(key == f"task.{field}" and _within(scope, bound) for bound, key in values):
            defined = {bound.replace("/", ".") for bound, key in values if bound and key.startswith("task.")}
            allowed = f", one of {', '.join(KINDS)}" if field == "kind" else ", such as @files()"
            raise ValueError(f"bind {scope}/task.{field}{allowed}{nearest(name, defined)}")
    with gin.config_scope(scope):
        task = gin.get_configurable("task")()
        hygiene = gin.get_configurable("hygiene")()
    source = task.source.limited(limit) if limit else task.source
    return dataclasses.replace(task, source=source.undivided() if task.groups else source), hygiene


def _scope(task: str) -> str:
    return task.replace(".", "/")


def _fill(values: Mapping[tuple[str, str], object], scope: str, data_root: str) -> None:
    """Replace {data_root} and {name} in what holds in a task's scope, of `_values`."""
    name = scope.rpartition("/")[2]

    def replaced(value):
        if isinstance(value, str):
            if "{data_root}" in value and not data_root:
                raise ValueError(f"{value!r} needs --data_root=FOLDER")
            return value.replace("{name}", name).replace("{data_root}", data_root.rstrip("/"))
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(item) for item in value)
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        return value

    # Outer scopes first: the innermost binding counts.
    for key, value in {key: value for (bound, key), value in values.items() if _within(scope, bound)}.items():
        if "{name}" in repr(value) or "{data_root}" in repr(value):
            gin.bind_parameter(f"{scope}/{key}", replaced(value))


def _referred(value) -> Iterator[str]:
    """The scopes of references in a value, such as a/b of @a/b/retrieval()."""
    if isinstance(value, gin.config.ConfigurableReference):
        if not value.selector.endswith("macro"):
            yield from filter(None, ["/".join(value.scopes)])
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _referred(item)


def _values(text: str) -> dict[tuple[str, str], object]:
    """{(scope, "configurable.parameter"): value} of a gin text, outer scopes first; of equal ones the last."""
    statements = gin.config_parser.ConfigParser(text, gin.config.ParserDelegate())
    bound = [s for s in statements if isinstance(s, gin.config_parser.BindingStatement) and s.arg_name]
    return dict(sorted({(s.scope or "", f"{s.selector}.{s.arg_name}"): s.value for s in bound}.items()))


def _check_rates(mixtures: Mixtures) -> None:
    rates = mixtures.rates
    if not rates:
        raise ValueError(f"mixtures.rates must be {{mixture: {{task: rate}}}}, got {rates!r}")
    for mixture, members in rates.items():
        if not isinstance(members, dict) or not members:
            raise ValueError(f"mixture {mixture!r} must be {{task: rate}} with at least one task, got {members!r}")
        for task, rate in members.items():
            if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"the rate of {task!r} in {mixture!r} must be positive, got {rate!r}")
    for mixture, alpha in mixtures.alpha.items():
        if mixture not in rates:
            raise ValueError(f"mixtures.alpha: no mixture {mixture!r}{nearest(mixture, rates)}")
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"mixtures.alpha of {mixture!r} must be between 0 and 1, got {alpha!r}")
    if mixtures.unit not in ("examples", "tokens"):
        raise ValueError(f"mixtures.unit={mixtures.unit!r} must be examples or tokens")
    for mixture in rates:
        _check_cycles(mixture, rates, ())


def _check_cycles(mixture: str, rates: Mapping, above: tuple) -> None:
    if above == (mixture,):
        raise ValueError(f"the mixture {mixture!r} contains itself: a task needs a name of its own")
    if mixture in above:
        raise ValueError(f"the mixture {mixture!r} contains itself: {' → '.join((*above, mixture))}")
    for member in rates[mixture]:
        if member in rates:
            _check_cycles(member, rates, (*above, mixture))


def _check_numbers(vocabulary: Vocabulary, evaluation: Evaluation) -> None:
    for name, kind, field in (("vocabulary", vocabulary, "characters"), ("evaluation", evaluation, "max_queries")):
        if not numbers.is_whole(value := getattr(kind, field), 1):
            raise ValueError(f"{name}.{field} must be a whole number of at least 1, got {value!r}")


def _check_kinds(settings: Settings) -> None:
    """ValueError for tasks of kinds that cannot be used where they are named."""
    for mixture in settings.mixtures.rates:
        kinds = {settings.tasks[name].kind: name for name in settings.members(mixture) if name in settings.tasks}
        if len(kinds) > 1:  # whose examples have other columns
            named = " and ".join(f"{name!r} ({kind})" for kind, name in sorted(kinds.items()))
            raise ValueError(f"the mixture {mixture!r} has tasks of several kinds: {named}")
        if "retrieval" in kinds:
            raise ValueError(f"the mixture {mixture!r}: the task {kinds['retrieval']!r} is an evaluation set")
    for set_name, name in settings.evaluation.sets.items():
        task = settings.tasks[name]
        if task.kind not in ("pair", "contextual", "retrieval"):
            raise ValueError(
                f"evaluation.sets: {set_name!r} must have a pair, contextual or retrieval task, {name!r} is of kind "
                f"{task.kind}"
            )
        if task.kind == "retrieval" and not hasattr(task.source, "evaluation_set"):
            raise ValueError(
                f"task {name!r}: the kind 'retrieval' needs a source @retrieval() or @conteb(); examples of another "
                "one are an evaluation set as pair or contextual"
            )


def _check_sets(settings: Settings) -> None:
    """ValueError if a task trains on an evaluation set, or holds out what no set has."""
    tasks, sets = settings.tasks, settings.evaluation.sets
    trained = [name for name in settings.trained() if name in tasks]
    for set_name, name in sets.items():
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", set_name) or ".." in set_name:
            raise ValueError(f"evaluation.sets: {set_name!r} must be SET/SPLIT, such as 'own/test'")
        for other in trained if tasks[name].kind == "retrieval" else ():
            if _content(tasks[other].source, QUERIES) == _content(tasks[name].source, QUERIES):
                raise ValueError(
                    f"the task {other!r} trains on the queries of the evaluation set {set_name!r}: bind another split "
                    f"or other queries, such as {_scope(other)}/retrieval.split = 'train'"
                )
        if name in trained and not tasks[name].held_out:
            raise ValueError(
                f"evaluation.sets: {set_name!r} would have the training examples of {name!r}, which holds none out: "
                "bind its task.held_out, or name another task"
            )
    covered = [_content(tasks[name].source) for name in sets.values() if tasks[name].held_out]
    for name in trained:
        if tasks[name].held_out and _content(tasks[name].source) not in covered:
            raise ValueError(
                f"the task {name!r} has held_out={tasks[name].held_out}, but no evaluation set has what is held out: "
                "name it, or a task of the same source, in evaluation.sets"
            )


# The fields of a source that choose its queries.
QUERIES = ("path", "id", "config", "split", "queries", "qrels")


def _content(source: sources.Source, names: Sequence[str] = ()) -> tuple:
    """What a source reads, by its fields of these names, or by all but those that say only how."""
    values = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    names = names or [name for name in values if name not in ("shard_bytes", "streaming")]
    return type(source), *((name, values[name]) for name in names if name in values)


def _check_hygiene(settings: Settings) -> None:
    similarity: dict[str, tuple[str, float]] = {}
    for name, about in settings.hygiene.items():
        task = settings.tasks[name]
        if about.language:
            try:
                languages.accepted(tuple(filter(None, [task.language])) or tuple(task.languages))
            except ValueError as error:
                raise ValueError(
                    f"task {name!r}: hygiene.language=True: task.language {error}; bind hygiene.language = False for "
                    "tasks of no or many languages"
                ) from None
        if about.near_duplicates and task.group_sizes:
            raise ValueError(
                f"task {name!r}: hygiene.near_duplicates compares no documents of task.group_sizes: bind "
                f"{_scope(name)}/hygiene.near_duplicates = 0.0"
            )
        if about.near_duplicates and about.compare_with:
            other, value = similarity.setdefault(about.compare_with, (name, about.near_duplicates))
            if value != about.near_duplicates:
                raise ValueError(
                    "hygiene.near_duplicates must be the same for tasks compared with each other: it is "
                    f"{value!r} for {other!r} and {about.near_duplicates!r} for {name!r}"
                )


def _members(rates: Mapping[str, Mapping], mixture: str) -> Iterator[str]:
    for member in rates[mixture]:
        yield from _members(rates, member) if member in rates else [member]


def _bindings(text: str) -> Iterator[tuple[str, str, str]]:
    """(scope, configurable or macro, "configurable.parameter" or "") of a gin text."""
    try:
        statements = list(gin.config_parser.ConfigParser(text, gin.config.ParserDelegate()))
    except (SyntaxError, ValueError) as error:
        for number, line in enumerate(text.splitlines(), 1) if "malformed" in str(error) else ():
            if re.match(r"\s*[\w./]+\s*=\s*(?!(?:True|False|None)\b)(?:[^\W\d]|\{[a-z_]+\})", line):
                raise ValueError(f"line {number}: {line.strip()}: a text needs quotes") from None
        raise ValueError(_first(error)) from None
    for s in statements:
        if isinstance(s, gin.config_parser.BindingStatement):
            name = s.selector.rpartition(".")[2] if s.arg_name else s.selector
            yield s.scope or "", name, f"{name}.{s.arg_name}" if s.arg_name else ""
        else:
            raise ValueError(f"only bindings are allowed, got {type(s).__name__}")


def _check_used(bound: Sequence[tuple[str, str, str]], valid: Sequence[str]) -> None:
    """ValueError if a binding had no effect, unless it is of a task outside all mixtures.

    gin reports neither unused scopes nor unused macros.
    """
    used = list(_bindings(gin.operative_config_str()))
    prepared = {scope for scope, name, _ in used if name == "task"}
    defined = {scope for scope, _, key in bound if key in ("task.kind", "task.source") and scope}
    outside = [scope for scope in defined if not any(_within(task, scope) for task in prepared)]
    for scope, name, key in bound:
        if key and any(_within(scope, task) or _within(task, scope) for task in outside):
            continue
        for other, used_name, used_key in used:
            if (name, key) == (used_name, used_key) and _within(other, scope):
                break
        else:
            full = f"{scope}/{key or name}" if scope else key or name
            known = {*valid, *(f"{s}/{k}" if s else k for s, _, k in bound if k and (s, k) != (scope, key))}
            raise ValueError(f"unused gin binding {full!r}{nearest(full, known)}")


def _within(scope: str, outer: str) -> bool:
    """Whether what is bound in `outer` holds in `scope`."""
    return not outer or f"{scope}/".startswith(f"{outer}/")


def nearest(name: str, valid) -> str:
    """The end of an error about an unknown name: the most similar valid one, if any is similar."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; the nearest valid one is {close[0]!r}" if close and close[0] != name else ""


def _first(error: Exception) -> str:
    """An error of gin in one line."""
    if unknown := re.match(r"No configurable matching reference '@(?:[\w/.]*/)?(\w+)", str(error)):
        known = [name for name, kind in CONFIGURABLES.items() if issubclass(kind, sources.Source)]
        return f"no source @{unknown[1]}(), only {', '.join(f'@{name}()' for name in known)}"
    if dotted := re.match(r"No configurable matching '([\w./]+)\.(\w+)'", str(error)):
        return (
            f"{dotted[0].partition(chr(39))[2][:-1]!r} is unknown; in bindings a task's name has slashes: own/task.kind"
        )
    if undefined := re.search(r"macro\(\) missing .* in scope '([\w/]+)'", str(error), re.S):
        return f"the macro %{undefined[1].rpartition('/')[2]} is not defined"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def bindings(gin_file: str | Path, gin_bindings: Sequence[str] = ()) -> dict[str, str]:
    """{"scope/name.parameter": value as text} of a gin file and more bindings, of which the last one counts."""
    text = Path(gin_file).read_text(encoding="utf-8") + "\n" + "\n".join(gin_bindings)
    statements = gin.config_parser.ConfigParser(text, gin.config.ParserDelegate())
    result = {}
    for s in statements:
        if isinstance(s, gin.config_parser.BindingStatement):
            name = f"{s.scope}/{s.selector}" if s.scope else s.selector
            result[f"{name}.{s.arg_name}" if s.arg_name else name] = repr(s.value)
    return dict(sorted(result.items()))
