"""The one way to write: files and folders that are whole or not there, manifests to verify them by, and locks."""

import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock, Timeout

from .errors import UserError


MANIFEST = "manifest.json"
SEAL = "sha256_of_the_rest"
UNFINISHED, DISCARDED = ".unfinished", ".discarded"


class DamagedFileError(UserError):
    """A file does not hold what this package writes there: it is empty, torn, or of another kind."""


@contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A handle (`"w"`: UTF-8 text, `"wb"`: bytes) to a temporary file beside `path`, which takes its name once it is on the disk.

    After an error `path` is as it was, and the temporary file is deleted.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=UNFINISHED, dir=path.parent)
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
        with open(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)  # mkstemp's are the owner's alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text by [`write_atomically`]."""
    with write_atomically(path) as file:
        file.write(text)


def write_json(path: str | Path, values: Any, indent: int | None = 2, sort_keys: bool = False, sealed: bool = False) -> None:
    """Write JSON by [`write_atomically`], with null for NaN and infinity, which JSON does not have.

    With `sealed` the object has its own hash among its entries, which [`read_json`] checks and leaves out.
    """
    values = _with_null(values)
    if sealed:
        values = {**values, SEAL: _hash_values(json.loads(json.dumps(values)))}  # as it will be read: keys are text
    write_text(path, json.dumps(values, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n")


def _hash_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _with_null(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _with_null(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_with_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json(path: str | Path, kind: type[Any] = dict) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedFileError: if it is empty, torn, not UTF-8, nested too deeply, changed though it is sealed, or does not hold a `kind`.
        OSError: if it is missing or the disk fails.
    """
    try:
        values: Any = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is not JSON in UTF-8 ({error}). Restore it, or delete it to begin anew") from error
    if not isinstance(values, kind):
        raise DamagedFileError(
            f"{path} is damaged: it holds a {type(values).__name__}, but a {kind.__name__} is expected. Restore it, or delete it"
        )
    if isinstance(values, dict) and SEAL in values and values.pop(SEAL) != _hash_values(values):
        raise DamagedFileError(f"{path} is damaged: it was changed since it was written. Restore it, or delete it to begin anew")
    return values


@contextmanager
def write_folder_atomically(path: str | Path, manifest: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` to write into; it takes the name once every file in it is on the disk.

    A folder of that name is replaced only then. After an error it is as it was, and the temporary one is deleted; those that killed
    processes of this machine left are deleted first.

    Args:
        path: the folder; its parents are created.
        manifest: whether to add `manifest.json`, by which [`verify`] finds damage.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.iterdir():  # not `glob`: a name may hold its wildcards
        pid = leftover.name.removeprefix(mine).removesuffix(UNFINISHED)
        if leftover.name == f"{mine}{pid}{UNFINISHED}" and pid.isdecimal() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = path.with_name(f"{mine}{os.getpid()}{UNFINISHED}")
    unfinished.mkdir()
    try:
        yield unfinished
        finish_folder(unfinished, path, manifest)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def finish_folder(unfinished: Path, path: Path, manifest: bool = False) -> None:
    """Flush all files of `unfinished` to the disk, add a manifest where asked for, and rename it to `path`, replacing what is there."""
    if manifest:
        write_manifest(unfinished)
    for file in (*unfinished.rglob("*"), unfinished):
        flush(file)
    if path.exists():
        discard(path)
    os.rename(unfinished, path)
    flush(path.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that no part of it can be taken for a whole one: it loses its name first."""
    unnamed = folder.with_name(folder.name + DISCARDED)
    shutil.rmtree(unnamed, ignore_errors=True)
    os.rename(folder, unnamed)
    shutil.rmtree(unnamed)


def write_manifest(folder: Path) -> None:
    """Add `manifest.json`, by which [`verify`] finds damage, to a folder whose files are all written."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    for file in files:
        flush(file)
    write_json(folder / MANIFEST, describe_files(folder, [str(file.relative_to(folder)) for file in files]), indent=1)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What [`verify_files`] compares with later: size in bytes and SHA-256 of each of these files of a folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names}


def verify(folder: str | Path) -> str | None:
    """What is wrong with a folder, compared with its manifest, which may itself be damaged; `None` if nothing is.

    Raises:
        OSError: if the disk fails, from which nothing may be concluded.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return verify_files(folder, manifest)


def verify_files(folder: Path, described: Any) -> str | None:
    """What is wrong with the files of a folder, compared with what [`describe_files`] gave, as read back; `None` if nothing is."""
    if not isinstance(described, dict) or not described:
        return f"the list of its files is {described!r}, but must name some"
    for name, expected in described.items():
        inside = PurePosixPath(name)
        if not name or "\0" in name or inside.is_absolute() or ".." in inside.parts:
            return f"the list of its files names {name!r}, which is not a file below the folder"
        if not isinstance(expected, dict) or type(expected.get("bytes")) is not int or not isinstance(expected.get("sha256"), str):
            return f"the list of its files has no bytes and sha256 for {name}"
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
        except (OSError, ValueError) as error:  # a damaged name may be too long, or not a name at all
            return f"the list of its files names {name!r} ({error})"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if hash_file(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


@contextmanager
def lock(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a file or folder, by a lock on `.NAME.lock` beside it, which the system releases when a process dies.

    In a distributed run the main process alone takes it.

    Args:
        path: the file or folder; its parents are created.
        wait: whether to wait for the other process.

    Raises:
        UserError: if another process has the lock, at once; never where `wait` is true.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name behind all links, so that one folder under two names has one lock.
    real = Path(os.path.realpath(path))
    holder = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        holder.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"another process writes to {path}: wait for it, or give another place") from None
    try:
        yield
    finally:
        holder.release()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal, read a block at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    *("MANIFEST", "SEAL", "DamagedFileError", "describe_files", "discard", "finish_folder", "flush", "hash_file", "lock", "read_json"),
    *("verify", "verify_files", "write_atomically", "write_folder_atomically", "write_json", "write_manifest", "write_text"),
]
