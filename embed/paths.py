"""Files and folders on a disk or in a bucket (gs://, s3://), by etils.epath: written whole, held by one process at a time.

A file appears by a rename on a disk; in a bucket an object appears whole by itself. A folder appears by a rename on a disk;
in a bucket it counts once its marker, one named file, has been written last.
"""

import contextlib
import datetime
import errno
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("EPATH_USE_TF", "false")  # or epath would import TensorFlow where it is installed

from etils import epath  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

PARTIAL = ".embed.partial"  # in a folder that is written file by file, until all of it is there
# What file systems and desktops leave in folders, and what locks and interrupted writes of this module are called.
FOREIGN = re.compile(r"lost\+found|Thumbs\.db|\.DS_Store|\._.*|\.snapshots?|\.nfs.*|\.Trash.*|\..*\.(lock|partial|old)")
LEASE_SECONDS = 180.0  # a lease in a bucket that was not renewed for so long is over
RENEW_SECONDS = 30.0
RELEASE_SECONDS = 10.0  # for giving a lease back; one that is not given back ends by itself


class BusyError(ValueError):
    """Another process holds the folder."""


class LeaseLostError(RuntimeError):
    """Another process took over a folder in a bucket while this one could not renew its lease."""

    exit_code = 75  # the same command tries again


def path(name) -> epath.Path:
    """The file or folder of a name or URL; a local one is absolute, and a ~ at its beginning is the home folder.

    A shell expands that ~ itself, but not after the = of an option, nor in a config.
    """
    found = epath.Path(name)
    return found if is_bucket(found) else epath.Path(os.path.abspath(os.path.expanduser(found)))


def resolve(name) -> epath.Path:
    """`path`, but what a symbolic link leads to. ValueError for a link that leads back to itself."""
    found = path(name)
    if is_bucket(found):
        return found
    found = path(os.path.realpath(found))
    if os.path.islink(found):
        raise ValueError(f"{name} is a symbolic link that leads back to itself")
    return found


def is_bucket(name) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(name)


def kvstore(name) -> str | dict:
    """A folder as TensorStore names it: a URL; for s3:// with AWS_ENDPOINT_URL, another server than Amazon's, its spec."""
    found = path(name)
    url = (os.fspath(found) if is_bucket(found) else Path(found).as_uri()).rstrip("/") + "/"
    if url.startswith("s3://") and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        bucket, _, folder = url.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return {"driver": "s3", "bucket": bucket, "path": folder, "endpoint": endpoint, "aws_region": region}
    return url


def write(file, content: str | bytes) -> None:
    """Write a file; it appears whole or stays as it was. A symbolic link stays one, and its target gets the content."""
    target, content = resolve(file), content.encode() if isinstance(content, str) else content
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_bucket(target):
        target.write_bytes(content)
        return
    aside = None
    try:
        handle, aside = tempfile.mkstemp(**_aside(target))  # a name of its own: several may write the same file at once
        with open(handle, "wb") as opened:
            opened.write(content)
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException as error:
        if aside:
            os.unlink(aside)
        if isinstance(error, OSError):
            error.add_note(f"{file} was not written, and what was there is unchanged")
        raise


def write_json(file, value) -> None:
    """`write` of a value as JSON."""
    write(file, json.dumps(value, indent=2, default=float) + "\n")


def read_json(file):
    """What `write_json` wrote. ValueError names a file that is not JSON."""
    try:
        return json.loads(path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, IsADirectoryError) as error:  # or not UTF-8, or nested without end
        raise ValueError(f"{file} is not JSON ({error})") from None


def is_empty(folder) -> bool:
    """Whether nothing is there, or a folder without content of its own (`FOREIGN`)."""
    folder = path(folder)
    try:
        return not folder.exists() or (folder.is_dir() and all(FOREIGN.fullmatch(e.name) for e in folder.iterdir()))
    except FileNotFoundError:  # another process has just moved it away
        return True


def files(folder) -> dict[str, epath.Path]:
    """{path below the folder, with slashes: file} of all files below it that are its own (`FOREIGN`), in order."""
    found, folders = {}, [("", path(folder))]
    while folders:
        prefix, current = folders.pop()
        for entry in current.iterdir():
            if FOREIGN.fullmatch(entry.name):
                continue
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                found[prefix + entry.name] = entry
    return dict(sorted(found.items()))


def is_partial(folder) -> bool:
    """Whether `replace_folder` was interrupted while it wrote into a folder: what is there is no whole."""
    return (path(folder) / PARTIAL).exists()


def check_output(target, *, is_ours: Callable | None = None, overwrite: bool = True) -> None:
    """Refuse a file, or with `is_ours` a folder, that could not be written: for before the work, not after it.

    What is there already may be replaced only with `overwrite`, and a folder only if `is_ours(folder)` holds, which
    may also raise a ValueError of its own. The folder of a file must exist; the parents of a folder are made when it
    is written.
    """
    try:
        _check_output(target, is_ours, overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PermissionError(f"{target} cannot be written: {error.strerror or error}") from None


def _check_output(target, is_ours: Callable | None, overwrite: bool) -> None:
    found = resolve(target)
    if is_ours is None:
        if found.is_dir() or not (is_bucket(found) or found.parent.is_dir()):
            raise ValueError(f"{target} must be a file in a folder that exists")
        occupied = found.exists()
        if occupied and not is_bucket(found) and not os.path.isfile(found):  # epath takes a device for a file
            raise ValueError(f"{target} is neither a file nor a folder: choose another path")
    else:
        if found.is_file() if is_bucket(found) else os.path.isfile(found):
            raise ValueError(f"{target} must be a folder, but it is a file")
        occupied = not is_empty(found)
        if occupied and not is_partial(found) and not is_ours(found):
            raise ValueError(f"{target} exists and was not written by this command; remove it or choose another path")
    if occupied and not overwrite:
        raise ValueError(f"{target} exists: choose another path, or replace it with --overwrite")
    if not is_bucket(found):
        parent = next(folder for folder in found.parents if folder.exists())
        with tempfile.NamedTemporaryFile(**_aside(found) | {"dir": parent}):
            pass


def _aside(target, suffix: str = ".partial") -> dict:
    """How tempfile names what stands beside a file or folder until it takes its place."""
    return {"prefix": f".{target.name}.", "suffix": suffix, "dir": target.parent}


@contextlib.contextmanager
def replace_folder(folder, *, is_ours: Callable, marker: str, overwrite: bool = True) -> Iterator[Path]:
    """A new local folder to write into, whose content becomes `folder` when the block ends without an error.

    `check_output` says what may be replaced. A block that is interrupted leaves it as it was. A symbolic link stays one.

    A folder that cannot be renamed (in a bucket, or where a disk is mounted) and one that also holds files of the system
    (`FOREIGN`) get the files one by one: the file `marker` is removed first and written last. Meanwhile, and for good if
    that is interrupted, the folder is `is_partial` and may be replaced.
    """
    check_output(folder, is_ours=is_ours, overwrite=overwrite)
    target = resolve(folder)
    bucket = is_bucket(target)
    if bucket or (
        target.exists()
        and (os.path.ismount(target) or any(FOREIGN.fullmatch(entry.name) for entry in target.iterdir()))
    ):
        with tempfile.TemporaryDirectory(
            prefix=".embed-", suffix=".partial", dir=None if bucket else Path(target)
        ) as aside:
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
    aside = Path(tempfile.mkdtemp(**_aside(target)))
    try:
        os.chmod(aside, 0o777 & ~_umask())
        yield aside
        check_output(folder, is_ours=is_ours, overwrite=overwrite)  # what is there now
        _swap(aside, target)
    except OSError as error:
        error.add_note(f"{folder} was not written, and what was there is unchanged")
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(aside, target) -> None:
    """Rename a folder to `target` and remove what was there. Of several at once the last one stays, whole."""
    replaced = []
    try:
        while True:
            try:
                os.rename(aside, target)  # over an empty folder or nothing
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            old = tempfile.mkdtemp(**_aside(target, ".old"))
            replaced.append(old)
            with contextlib.suppress(FileNotFoundError):  # another one has just moved it away
                os.rename(target, old)
    except BaseException:
        if replaced and not target.exists():
            os.rename(replaced.pop(), target)
        raise
    finally:
        for old in replaced:
            shutil.rmtree(old, ignore_errors=True)


def copy_file(source, target) -> None:
    """Copy a file between any two places, in pieces."""
    path(target).parent.mkdir(parents=True, exist_ok=True)
    with path(source).open("rb") as read, path(target).open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 24)


@contextlib.contextmanager
def local(folder, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A local folder with the content of `folder`: itself on a disk, out of a bucket a copy that ends with the block."""
    folder = path(folder)
    if not is_bucket(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="embed-") as copy:
        for name, file in files(folder).items():
            if wanted(name):
                copy_file(file, Path(copy, name))
        yield Path(copy)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- one process at a time ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder) -> Iterator[Callable[[], None]]:
    """Hold a folder or file for this process; BusyError where another holds it.

    It is free again when the process ends, however it does.

    Yields a function to be called before something is written: LeaseLostError where the folder is another's by now.

    On a disk by flock. In a bucket by a lease that is renewed: one that was left by a process that died ends after
    LEASE_SECONDS, or at once for the run that a launcher named (EMBED_RUN_ID), which starts it again.
    """
    folder = resolve(folder)
    if is_bucket(folder):
        with _lease(folder) as check:
            yield check
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder.with_name(f".{folder.name}.lock"))  # beside it: the folder itself may be replaced
    try:
        held.acquire(timeout=0)
    except NotImplementedError:
        warnings.warn(
            f"{folder.parent} has no file locks: nothing keeps two commands from writing {folder.name}", stacklevel=3
        )
    except Timeout:
        raise BusyError(f"{folder} is in use by another process: wait for it, or choose another folder") from None
    try:
        yield lambda: None
    finally:
        if held.is_locked:
            with contextlib.suppress(OSError):  # while it is held: nobody holds a lock on a file that is gone
                os.unlink(held.lock_file)
        held.release()


@contextlib.contextmanager
def _lease(folder) -> Iterator[Callable[[], None]]:
    import tensorstore as ts

    store, key = ts.KvStore.open(kvstore(folder.parent)).result(), f".{folder.name}.lock"
    holder = {"host": socket.gethostname(), "process": os.getpid(), "run": os.environ.get("EMBED_RUN_ID", "")}

    def put(generation) -> bytes | None:
        """Write the lease over `generation`; None if somebody else was faster."""
        content = json.dumps(holder | {"time": time.time()}).encode()
        return store.write(key, content, if_equal=generation).result().generation or None

    found = store.read(key).result()
    if found.state == "value":
        other = json.loads(found.value)
        ends = other["time"] + LEASE_SECONDS
        if time.time() < ends and not (holder["run"] and holder["run"] == other["run"]):
            until = datetime.datetime.fromtimestamp(ends, datetime.UTC).strftime("%H:%M:%S")
            raise BusyError(
                f"{folder} is in use by process {other['process']} on {other['host']}; if that is gone, it is free at {until} UTC"
            )
    state = {"generation": put(found.stamp.generation)}
    if state["generation"] is None:
        raise BusyError(f"{folder} is in use by another process: wait for it, or choose another folder")
    over = threading.Event()

    def renew():
        while not over.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # the next time
                found = store.read(key).result()
                if found.state != "value" or not holder.items() <= json.loads(found.value).items():
                    state["generation"] = None  # another's
                    return
                state["generation"] = put(found.stamp.generation) or state["generation"]

    def check():
        if state["generation"] is None:
            raise LeaseLostError(f"{folder} was taken over by another process while the bucket could not be reached")

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join(RELEASE_SECONDS)  # a bucket that does not answer must not keep a process that is done
        with contextlib.suppress(Exception):  # it ends by itself
            if state["generation"] is not None:
                store.write(key, None, if_equal=state["generation"]).result(RELEASE_SECONDS)
