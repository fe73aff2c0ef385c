"""`hub`: the data files of a dataset on the Hugging Face hub. Loading scripts are never run."""

import contextlib
import dataclasses
import functools
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from embed.preparation.sources import formats
from embed.preparation.sources.base import (
    SourceError,
    UnreachableError,
    cached,
    first_line,
    is_unreachable,
    source_error,
)
from embed.preparation.sources.files import FileReader, Input, open_file

TIMEOUT = 10.0  # seconds for the first answer of the hub, for which its library would wait forever
FORGOTTEN = 60.0  # seconds after which a hub that could not be reached is tried again
ATTEMPTS, BACKOFF = 5, 1.0  # to download a file that the server fails to send, and seconds after the first
CONVERTED = "refs/convert/parquet"  # branch with the Parquet files that the hub makes of a dataset
# Words in a path that tell its split, in a repository without a list of its configs; as in the library `datasets`.
SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev|development",
    "test": "test|testing|eval|evaluation",
}


@dataclass(frozen=True)
class Hub(FileReader):
    """A dataset of the Hugging Face hub.

    id: "owner/name".
    config, split: as in the card's list of configs; without a list, splits are told by the files' paths. An empty
        config is the default one or the only one, an empty split is all of them.
    revision: a branch, tag or commit; it is resolved to a commit, which `identity` records and `pinned` reads again.
    files: globs of files to read, relative to the repository (`*` does not match a slash, `**` does); with them,
        config and split are not used.
    streaming: read from the hub, and not by way of the local cache.

    With HF_HUB_OFFLINE=1 the files are those in the cache. HF_TOKEN opens gated and private datasets.
    """

    id: str = ""
    config: str = ""
    split: str = "train"
    revision: str = ""
    files: str | Sequence[str] = ()
    streaming: bool = False

    def inputs(self) -> list[Input]:
        sizes, configs, commit = self.listing
        if self.files:
            patterns = [self.files] if isinstance(self.files, str) else self.files
            chosen = [name for name in sizes if any(_matches(name, pattern) for pattern in patterns)]
            if not chosen:
                raise SourceError(f"no file of {self.id} matches {', '.join(patterns)}: there are {_some(sizes)}")
        elif self._has_only_a_script:
            try:
                sizes, commit = self._list(CONVERTED)
            except SourceError as error:
                if "has no revision" not in f"{error}":
                    raise
                raise SourceError(
                    f"{self.id} has only a loading script, which is never run, and no converted Parquet files: "
                    "choose its data files by hub.files"
                ) from error
            chosen = choose(self.id, sizes, _converted(sizes), self.config, self.split)
        else:
            chosen = choose(self.id, sizes, configs, self.config, self.split)
        return [Input(f"hf://datasets/{self.id}@{commit}/{name}", name, sizes[name], commit) for name in chosen]

    @cached
    def listing(self) -> tuple[dict[str, int], list[dict], str]:
        """({file: size}, the card's configs, commit)."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", self.id):
            raise SourceError(f"hub.id is {self.id!r}: expected the id of a dataset, owner/name")
        sizes, commit = self._list(self.revision or "main")
        configs = self.card.get("configs") or []
        if not configs and self.revision.startswith("refs/convert/"):
            configs = _converted(sizes)
        return sizes, configs, commit

    @cached
    def card(self) -> dict:
        """The metadata of the dataset's card, {} if it has none."""
        readme = self._snapshot(self.revision or "main") / "README.md"
        return read_card(readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else "")

    @property
    def _has_only_a_script(self) -> bool:
        sizes, configs, _ = self.listing
        return not configs and f"{self.id.split('/')[-1]}.py" in sizes

    def _list(self, revision: str) -> tuple[dict[str, int], str]:
        from huggingface_hub import errors, get_cached_repo_tree

        folder = self._snapshot(revision)
        try:
            tree = get_cached_repo_tree(self.id, repo_type="dataset", revision=folder.name)
            sizes = {file.path: file.size for file in tree}
        except errors.CachedRepoTreeNotFoundError:  # another program has filled the cache
            files = (path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return dict(sorted(sizes.items())), folder.name

    def _snapshot(self, revision: str) -> Path:
        """The folder of a revision in the cache; its name is the commit. It has at least the card."""
        import huggingface_hub

        if revision in self._snapshots:
            return self._snapshots[revision]
        commit = self._commits.get(revision, revision)
        huggingface_hub.utils.disable_progress_bars()
        with self._one_sentence(commit):
            # It also stores the list of files, and without a network it returns what an earlier call stored.
            folder = huggingface_hub.snapshot_download(
                self.id,
                repo_type="dataset",
                revision=commit,
                allow_patterns=["README.md", ".gitattributes"],
                local_files_only=not _can_be_reached(self.id, commit),
            )
        return self._snapshots.setdefault(revision, Path(folder))

    def pinned(self, identity: dict) -> "Hub":
        result = dataclasses.replace(self)
        result.__dict__["_commits"] = dict(identity.get("commits", {}))
        return result

    @functools.cached_property
    def _commits(self) -> dict[str, str]:
        """{revision: the commit to read for it}, of `pinned`."""
        return {}

    @functools.cached_property
    def _snapshots(self) -> dict[str, Path]:
        """{revision: its folder}, so that a source has one commit even if the dataset changes meanwhile."""
        return {}

    @contextlib.contextmanager
    def _one_sentence(self, revision: str, subject: str = "") -> Iterator[None]:
        """Turns the many errors of the hub's library into one SourceError with one sentence."""
        from huggingface_hub import constants, errors

        url = f"{constants.ENDPOINT}/datasets/{self.id}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise SourceError(f"{self.id} is gated: accept its terms at {url} and set HF_TOKEN") from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(f"{self.id} is not on the hub, or it is private and HF_TOKEN does not open it") from error
        except errors.RevisionNotFoundError as error:
            raise SourceError(f"{self.id} has no revision {revision!r}") from error
        except errors.IncompleteSnapshotError as error:
            kind = SourceError if constants.HF_HUB_OFFLINE else UnreachableError
            raise kind(f"{self.id} is not complete in the local cache, and the hub cannot be reached") from error
        except errors.LocalEntryNotFoundError as error:
            missing = f"{subject or self.id} is not in the local cache"
            if constants.HF_HUB_OFFLINE:
                raise SourceError(f"{missing}, and HF_HUB_OFFLINE is set") from error
            raise UnreachableError(f"{missing}, and {url} cannot be reached") from error
        except Exception as error:  # of the network, the disk, the server
            raise source_error(f"{self.id} cannot be read from {url}: {first_line(error)}", error) from error

    def can_split(self) -> bool:
        return self.streaming

    def location(self, path: str) -> str:
        return re.sub(r"@[^/]+/", "/", path, count=1)

    def open(self, path: str) -> BinaryIO:
        commit, name = path.removeprefix(f"hf://datasets/{self.id}@").split("/", 1)
        import huggingface_hub

        with self._one_sentence(commit, "the file"):  # which `read` names
            if self.streaming:
                return open_file(path)
            huggingface_hub.utils.disable_progress_bars()
            return open_file(self._download(name, commit))

    def _download(self, name: str, commit: str) -> str:
        """The path of a file in the cache. The hub's library tries again after all errors but those of the server."""
        from huggingface_hub import errors, hf_hub_download

        for attempt in range(ATTEMPTS):
            try:
                return hf_hub_download(self.id, name, repo_type="dataset", revision=commit)
            except errors.HfHubHTTPError as error:
                if not is_unreachable(error) or attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(BACKOFF * 2**attempt)

    def preview(self) -> "Hub":
        """The same files, streamed: a few rows are no reason to download a whole file. Offline, this source."""
        from huggingface_hub import constants

        if self.streaming or constants.HF_HUB_OFFLINE:
            return self
        result = dataclasses.replace(self, streaming=True)
        result.__dict__.update(listing=self.listing, card=self.card, _inputs=self._inputs, _snapshots=self._snapshots)
        return result

    def describe(self) -> dict:
        named = self.card.get("license")
        described = super(Hub, self.preview()).describe()
        return {**described, "license": ", ".join(named) if isinstance(named, list) else named}

    def identity(self) -> dict:
        files = [[file.name, file.size] for file in self._inputs]
        commits = {revision: folder.name for revision, folder in sorted(self._snapshots.items())}
        return {"id": self.id, "commit": self._inputs[0].version, "commits": commits, "files": files}


_asking = threading.Lock()
_answers: dict[str, tuple[bool, float]] = {}  # {endpoint: (whether it answered, when)}


def _can_be_reached(id: str, revision: str) -> bool:
    """Whether the hub answers, whatever it answers. It is asked once per process, and again if it did not answer."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    with _asking:
        answered, when = _answers.get(constants.ENDPOINT, (False, -FORGOTTEN))
        if constants.HF_HUB_OFFLINE or answered or time.monotonic() - when < FORGOTTEN:
            return answered
        try:
            huggingface_hub.HfApi().dataset_info(id, revision=revision, timeout=TIMEOUT)
            answered = True
        except errors.HfHubHTTPError:  # an answer, such as that there is no such dataset
            answered = True
        except Exception:  # of the connection
            answered = False
        _answers[constants.ENDPOINT] = answered, time.monotonic()
        return answered


def read_card(text: str) -> dict:
    """The metadata at the top of a dataset's card, {} without any."""
    import yaml

    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        card = {}
    return card if isinstance(card, dict) else {}


def choose(source: str, names: Iterable[str], configs: Sequence[Mapping], config: str, split: str) -> list[str]:
    """The data files of a config and split, in order. SourceError names those that there are.

    source: the name for errors. names: all files. configs: the list of the card, or [] to tell splits by the paths.
    """
    splits = config_splits(source, names, configs, config)
    if not any(splits.values()):
        raise SourceError(f"{source} has no data files of config {config!r}: there are {_some(names)}")
    if not split:
        chosen = {name for files in splits.values() for name in files}
    elif split not in splits:
        of = f"config {config!r} of {source}" if config else source
        raise SourceError(f"{of} has no split {split!r}: there are {_some(splits)}")
    else:
        chosen = set(splits[split])
    if not chosen:
        raise SourceError(
            f"{source} has no data file of config {config!r} and split {split!r}: there are {_some(names)}"
        )
    return sorted(chosen)


def config_splits(source: str, names: Iterable[str], configs: Sequence[Mapping], config: str) -> dict[str, list[str]]:
    """{split: files} of a config; the arguments are those of `choose`."""
    if not configs:
        if config not in ("", "default"):
            raise SourceError(f"{source} has no list of configs: choose its files by a glob, and leave config empty")
        return _by_path(names)
    named = {f"{c.get('config_name', 'default')}": c for c in configs}
    if config in named:
        chosen = named[config]
    elif config:
        raise SourceError(f"{source} has no config {config!r}: there are {_some(named)}")
    else:
        first = [c for c in configs if c.get("default")] or [c for name, c in named.items() if name == "default"]
        if not first and len(named) > 1:
            raise SourceError(f"{source} has several configs: choose one of {_some(named)}")
        chosen = (first or list(named.values()))[0]
    folder = f"{chosen.get('data_dir') or ''}".strip("./")
    below = {name: name[len(folder) :].lstrip("/") for name in names if not folder or name.startswith(f"{folder}/")}
    if not (data := chosen.get("data_files")):
        return _by_path(below)
    if isinstance(data, Mapping):
        data = [{"split": split, "path": path} for split, path in data.items()]
    elif isinstance(data, str) or all(isinstance(part, str) for part in data):
        data = [{"split": "train", "path": data}]
    splits = {}
    for part in data:
        patterns = [part["path"]] if isinstance(part["path"], str) else part["path"]
        matches = [name for name, inner in below.items() if any(_matches(inner, pattern) for pattern in patterns)]
        splits.setdefault(f"{part.get('split', 'train')}", []).extend(matches)
    return splits


def _by_path(names: Iterable[str]) -> dict[str, list[str]]:
    """{split: files}, told by words in the paths. Without any such word, all files are of the split train."""
    data = [name for name in names if formats.kind(name).format not in (None, "document")]
    splits: dict[str, list[str]] = {}
    for name in data:
        if match := re.match(r"data/([^/]+?)-\d{5}-of-\d{5}", name):
            splits.setdefault(match[1], []).append(name)
            continue
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[/._ \d-])(?:{words})(?:$|[/._ \d-])", name):
                splits.setdefault(split, []).append(name)
                break
    return splits or ({"train": data} if data else {})


def _converted(names: Iterable[str]) -> list[dict]:
    """Configs of the branch of converted files: config/split/0000.parquet.

    The hub converts only the first gigabytes of a large split, and calls that part partial-SPLIT: so it is named here.
    """
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        if name.endswith(".parquet") and name.count("/") == 2:
            config, split, _ = name.split("/")
            configs.setdefault(config, {}).setdefault(split, []).append(name)
    return [{"config_name": config, "data_files": splits} for config, splits in configs.items()]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or _regex(pattern.removeprefix("./")).fullmatch(name) is not None


@functools.lru_cache
def _regex(pattern: str) -> re.Pattern:
    import fsspec.utils

    return re.compile(fsspec.utils.glob_translate(pattern))


def _some(names: Iterable[str], count: int = 20) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more
