"""Files and folders on a disk or in a bucket (gs://, s3://), by etils.epath: written whole, locked by one process.

On a disk, a file or folder appears by a rename. In a bucket, an object appears whole by itself; a folder is complete
when its marker, one named file, is there, which is written last.
"""

import contextlib
import datetime
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise epath imports TensorFlow if it is installed

from etils import epath  # noqa: E402
from etils.epath import backend  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

PARTIAL = ".embed.partial"  # in a folder that is written file by file, until it is complete
# Files that file systems and desktops leave in folders, and locks and interrupted writes of this module.
IGNORED = re.compile(r"lost\+found|Thumbs\.db|\.DS_Store|\._.*|\.snapshots?|\.nfs.*|\.Trash.*|\..*\.(lock|partial|old)")
BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # the package that reads and writes each kind of bucket
LEASE_SECONDS = 180.0  # a lease in a bucket expires after this time without a renewal
RENEW_SECONDS = 30.0
RELEASE_SECONDS = 10.0  # time limit for releasing a lease; a lease that is not released expires


class BusyError(ValueError):
    """Another process holds the lock of the folder."""


class LeaseLostError(RuntimeError):
    """The lease of a folder in a bucket expired, because this process could not renew it. Another one may have it."""

    exit_code = 75  # the same command tries again


def path(name) -> epath.Path:
    """The path of a name or URL. A local path is absolute, with the home folder for a leading ~.

    A shell does not expand ~ after the = of an option or in a config. ValueError for an empty name, for a URL that is
    not in a bucket, and for a bucket whose package is not installed.
    """
    text = os.fspath(name)
    if not text:
        raise ValueError("a path is empty: expected a file or folder")
    if is_bucket(text):
        scheme = text.partition("://")[0]
        if not (package := BUCKETS.get(scheme)) or len(text) == len(scheme) + 3:
            hub_id = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
            hint = f"; the hub id of this model is {hub_id[1]}" if hub_id else ""
            raise ValueError(f"{text} is not a path: expected a local path, gs://BUCKET/… or s3://BUCKET/…{hint}")
        if not importlib.util.find_spec(package):
            raise ValueError(f"{text} needs the package {package}: pip install {package}")
        return epath.Path(name)
    return epath.Path(os.path.abspath(os.path.expanduser(text)))


def resolve(name) -> epath.Path:
    """`path` with symbolic links resolved. ValueError for a link that leads back to itself."""
    result = path(name)
    if is_bucket(result):
        return result
    result = path(os.path.realpath(result))
    if os.path.islink(result):
        raise ValueError(f"{name} is a symbolic link that leads back to itself")
    return result


def parents(name) -> list[epath.Path]:
    """The folders that contain a path, symbolic links resolved, nearest first, up to the root or the bucket."""
    target = resolve(name)
    count = len(target.parents) - 2 if is_bucket(target) else len(target.parents)  # those of gs://b/x: gs://b, gs://, /
    return list(target.parents)[:count]


def is_bucket(name) -> bool:
    """Whether a path is a URL, which `path` allows only of a bucket."""
    return "://" in os.fspath(name)


def kvstore(name) -> str | dict:
    """The TensorStore name of a folder: a URL, or a spec for s3:// on the server of AWS_ENDPOINT_URL."""
    folder = path(name)
    url = (os.fspath(folder) if is_bucket(folder) else Path(folder).as_uri()).rstrip("/") + "/"
    if url.startswith("s3://") and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return {"driver": "s3", "bucket": bucket, "path": key, "endpoint": endpoint, "aws_region": region}
    return url


def write(file, content: str | bytes) -> None:
    """Write a file whole, or leave it unchanged. A symbolic link stays, and its target gets the content."""
    target, content = resolve(file), content.encode() if isinstance(content, str) else content
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_bucket(target):
        target.write_bytes(content)
        return
    aside = None
    with whole(file, "an existing file is unchanged"):
        try:
            handle, aside = tempfile.mkstemp(**_aside(target))  # unique: several processes may write the same file
            with open(handle, "wb") as opened:
                opened.write(content)
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, target)
        except BaseException:
            if aside:
                os.unlink(aside)
            raise


def write_tensors(file, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write a local safetensors file {name: array}. A disk that cannot take it is an OSError, as in other writes."""
    import safetensors.numpy

    try:
        safetensors.numpy.save_file(dict(tensors), file, metadata=metadata)
    except safetensors.SafetensorError as error:
        if not (code := re.search(r"(?:code: |os error )(\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextlib.contextmanager
def whole(target, kept: str) -> Iterator[None]:
    """Make an OSError in the block name only `target`, not the temporary files next to it, and say what is `kept`."""
    try:
        yield
    except OSError as error:
        about = [error.filename, error.filename2, *getattr(error, "__notes__", [])]
        temporary = (f"/.{resolve(target).name}.", "/.embed-")
        is_temporary = any(part in f"{text}" for text in about for part in temporary)
        named = OSError(error.errno, error.strerror) if is_temporary and error.errno else error
        named.add_note(f"{target} was not written; {kept}")
        raise named from error.__cause__


def write_json(file, value) -> None:
    """`write` a value as JSON."""
    write(file, json.dumps(value, indent=2, default=float) + "\n")


def read_json(file):
    """Read what `write_json` wrote. ValueError names a file that is not JSON."""
    try:
        return json.loads(path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, IsADirectoryError) as error:  # also not UTF-8, or nested too deep
        raise ValueError(f"{file} is not JSON ({error})") from None


def has_format(file, name: str) -> bool:
    """Whether a file is a JSON object whose "format" is `name`."""
    try:
        return read_json(file)["format"] == name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_empty(folder) -> bool:
    """Whether a path does not exist, or is a folder without files other than `IGNORED`."""
    folder = path(folder)
    try:
        return not folder.exists() or (folder.is_dir() and all(IGNORED.fullmatch(e.name) for e in folder.iterdir()))
    except FileNotFoundError:  # another process has just moved it away
        return True


def entries(folder) -> list[epath.Path]:
    """The files and folders in a folder, none if it does not exist, including those that other processes just wrote.

    Clients of buckets cache listings, in which such files would be missing also when they are read.
    """
    folder = path(folder)
    if is_bucket(folder):
        backend.fsspec_backend.fs(folder).invalidate_cache()
    return list(folder.iterdir()) if folder.exists() else []


def files(folder) -> dict[str, epath.Path]:
    """{path relative to the folder, with slashes: file} of all files in it except `IGNORED`, sorted."""
    result, folders = {}, [("", path(folder))]
    while folders:
        prefix, current = folders.pop()
        for entry in current.iterdir():
            if IGNORED.fullmatch(entry.name):
                continue
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                result[prefix + entry.name] = entry
    return dict(sorted(result.items()))


def file_digest(file) -> str:
    """The sha256 (hex) of a file."""
    with path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(folder) -> str:
    """The sha256 (hex) over the names and contents of the `files` of a folder."""
    return hashlib.sha256(json.dumps({n: file_digest(f) for n, f in files(folder).items()}).encode()).hexdigest()


def is_partial(folder) -> bool:
    """Whether `replace_folder` was interrupted while it wrote into a folder, which is therefore incomplete."""
    return (path(folder) / PARTIAL).exists()


def check_output(
    target, *, is_ours: Callable | None = None, is_our_file: Callable | None = None, overwrite: bool = True
) -> None:
    """Refuse a file, or with `is_ours` a folder, that cannot be written. Call it before the work.

    An existing target may be replaced only with `overwrite`, and only if `is_ours(folder)` or, if given,
    `is_our_file(file)` is true; they may also raise a ValueError. The folder of a file must exist; the parents of a
    folder are created when it is written.
    """
    try:
        _check_output(target, is_ours, is_our_file, overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PermissionError(f"{target} cannot be written: {error.strerror or error}") from None


def _check_output(target, is_ours: Callable | None, is_our_file: Callable | None, overwrite: bool) -> None:
    resolved = resolve(target)
    if is_ours is None:
        if resolved.is_dir() or not (is_bucket(resolved) or resolved.parent.is_dir()):
            raise ValueError(f"{target} must be a file in a folder that exists")
        exists = resolved.exists()
        if exists and not is_bucket(resolved) and not os.path.isfile(resolved):  # epath takes a device for a file
            raise ValueError(f"{target} is neither a file nor a folder: choose another path")
        is_theirs = exists and is_our_file is not None and not is_our_file(resolved)
    else:
        if resolved.is_file() if is_bucket(resolved) else os.path.isfile(resolved):
            raise ValueError(f"{target} must be a folder, but it is a file")
        exists = not is_empty(resolved)
        is_theirs = exists and not is_partial(resolved) and not is_ours(resolved)
    if is_theirs:
        raise ValueError(f"{target} exists and was not written by this command: remove it or choose another path")
    if exists and not overwrite:
        raise ValueError(f"{target} exists: choose another path, or replace it with --overwrite")
    if not is_bucket(resolved):
        parent = next(folder for folder in resolved.parents if folder.exists())
        with tempfile.NamedTemporaryFile(**_aside(resolved) | {"dir": parent}):
            pass


def _aside(target, suffix: str = ".partial") -> dict:
    """Arguments of tempfile for a file or folder next to `target`, before it replaces the target."""
    return {"prefix": f".{target.name}.", "suffix": suffix, "dir": target.parent}


@contextlib.contextmanager
def replace_folder(folder, *, is_ours: Callable, marker: str, overwrite: bool = True) -> Iterator[Path]:
    """Yield a new local folder whose content replaces `folder` when the block ends without an error.

    `check_output` decides what may be replaced. An interrupted block leaves `folder` unchanged. A symbolic link stays.

    In a bucket, on a mount point, and in a folder with `IGNORED` files, no rename is possible. There the files are
    copied one by one: the file `marker` is removed first and written last. Until then the folder is `is_partial`, also
    after an interruption, and may be replaced.
    """
    check_output(folder, is_ours=is_ours, overwrite=overwrite)
    target = resolve(folder)
    bucket = is_bucket(target)
    if bucket or not _can_be_renamed(target):
        with (
            whole(folder, "it may be incomplete"),
            tempfile.TemporaryDirectory(
                prefix=".embed-", suffix=".partial", dir=None if bucket else Path(target)
            ) as aside,
        ):
            yield Path(aside)
            old, new = files(target) if target.exists() else {}, files(aside)
            write(target / PARTIAL, "")
            if marker in old:
                old.pop(marker).unlink()
            for name in sorted(new, key=lambda name: name == marker):
                copy_file(new[name], target / name)
            for name in old.keys() - new.keys() - {PARTIAL}:
                old[name].unlink()
            (target / PARTIAL).unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder, "an existing folder is unchanged"):
        aside = Path(tempfile.mkdtemp(**_aside(target)))
        try:
            os.chmod(aside, 0o777 & ~_umask())
            yield aside
            for file in files(aside).values():
                share(file)
            check_output(folder, is_ours=is_ours, overwrite=overwrite)  # again: it may have changed meanwhile
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _can_be_renamed(folder) -> bool:
    """Whether a folder is neither a mount point nor holds `IGNORED` files, which must stay."""
    try:
        return not os.path.ismount(folder) and not any(IGNORED.fullmatch(entry.name) for entry in folder.iterdir())
    except FileNotFoundError:  # there is none, or another process has just moved it away
        return True


def _swap(aside, target) -> None:
    """Rename a folder to `target` and remove the old one. With several writers at once, the last one stays, whole."""
    replaced = []
    try:
        while True:
            try:
                os.rename(aside, target)  # works if the target is missing or empty
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            old = tempfile.mkdtemp(**_aside(target, ".old"))
            replaced.append(old)
            with contextlib.suppress(FileNotFoundError):  # another process has just moved it away
                os.rename(target, old)
    except BaseException:
        if replaced and not target.exists():
            os.rename(replaced.pop(), target)
        raise
    finally:
        for old in replaced:
            shutil.rmtree(old, ignore_errors=True)


def copy_file(source, target) -> None:
    """Copy a file, on a disk or in a bucket, in blocks."""
    path(target).parent.mkdir(parents=True, exist_ok=True)
    with path(source).open("rb") as read, path(target).open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 24)


@contextlib.contextmanager
def local(folder, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A local folder with the content of `folder`: the folder itself, or for a bucket a copy during the block."""
    folder = path(folder)
    if not is_bucket(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="embed-") as copy:
        for name, file in files(folder).items():
            if wanted(name):
                copy_file(file, Path(copy, name))
        yield Path(copy)


def share(file) -> None:
    """Give a local file the permissions of a new file: safetensors makes files that only their owner can read."""
    os.chmod(file, 0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- one process at a time ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder) -> Iterator[Callable[[], None]]:
    """Lock a folder or file for this process; BusyError if another process holds it.

    The lock ends with the process, in whatever way that ends. Yields a function to call before each write: it raises
    LeaseLostError if the lock has expired or another process has taken over the folder.

    On a disk the lock is a flock. In a bucket it is a lease that is renewed: the lease of a process that died expires
    after LEASE_SECONDS, or at once for a restart of the same run (EMBED_RUN_ID, set by a launcher).
    """
    folder = resolve(folder)
    if is_bucket(folder):
        with _lease(folder) as check:
            yield check
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder.with_name(f".{folder.name}.lock"))  # next to the folder, which may itself be replaced
    try:
        held.acquire(timeout=0)
    except NotImplementedError:
        warnings.warn(f"{folder.parent} has no file locks: two commands may write {folder.name} at once", stacklevel=3)
    except Timeout:
        raise BusyError(f"{folder} is in use by another process: wait for it, or choose another folder") from None
    try:
        yield lambda: None
    finally:
        if held.is_locked:
            with contextlib.suppress(OSError):  # before the release: afterwards it may be another process's lock
                os.unlink(held.lock_file)
        held.release()


@contextlib.contextmanager
def _lease(folder) -> Iterator[Callable[[], None]]:
    import tensorstore as ts

    store, key = ts.KvStore.open(kvstore(folder.parent)).result(), f".{folder.name}.lock"
    holder = {"host": socket.gethostname(), "process": os.getpid(), "run": os.environ.get("EMBED_RUN_ID", "")}

    def put(generation) -> bytes | None:
        """Write the lease over `generation`; None if another process was faster."""
        content = json.dumps(holder | {"time": time.time()}).encode()
        return store.write(key, content, if_equal=generation).result().generation or None

    current = store.read(key).result()
    if current.state == "value":
        other = json.loads(current.value)
        ends = other["time"] + LEASE_SECONDS
        if time.time() < ends and not (holder["run"] and holder["run"] == other["run"]):
            until = datetime.datetime.fromtimestamp(ends, datetime.UTC).strftime("%H:%M:%S")
            raise BusyError(
                f"{folder} is in use by process {other['process']} on {other['host']}; "
                f"if that process has died, the folder is free at {until} UTC"
            )
    renewed = time.time()
    state = {"generation": put(current.stamp.generation), "renewed": renewed}
    if state["generation"] is None:
        raise BusyError(f"{folder} is in use by another process: wait for it, or choose another folder")
    over = threading.Event()

    def renew():
        while not over.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # tried again at the next renewal
                current = store.read(key).result()
                if current.state != "value" or not holder.items() <= json.loads(current.value).items():
                    state["generation"] = None  # another process took it over
                    return
                renewed = time.time()
                if generation := put(current.stamp.generation):
                    state.update(generation=generation, renewed=renewed)

    def check():
        if state["generation"] is None:
            raise LeaseLostError(
                f"{folder} was taken over by another process while this one could not reach the bucket"
            )
        if (age := time.time() - state["renewed"]) > LEASE_SECONDS:  # this process was suspended, or has no network
            raise LeaseLostError(f"the lock of {folder} expired: it was last renewed {age:.0f} s ago")

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join(RELEASE_SECONDS)  # a bucket that does not answer must not block the end of the process
        with contextlib.suppress(Exception):  # the lease expires anyway
            if state["generation"] is not None:
                store.write(key, None, if_equal=state["generation"]).result(RELEASE_SECONDS)
