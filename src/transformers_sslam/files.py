"""Files and folders that are written whole or not at all, manifests that verify them, and locks."""

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
    """A file does not hold what this package writes there."""


@contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A temporary file beside `path`, open for UTF-8 text (`"w"`) or bytes (`"wb"`), which gets this name once it is on the disk, or is
    deleted after an error."""
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
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)  # mkstemp's is readable by its owner alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text with [`write_atomically`]."""
    with write_atomically(path) as file:
        file.write(text)


def write_json(path: str | Path, values: Any, indent: int | None = 2, sort_keys: bool = False, sealed: bool = False) -> None:
    """Write JSON with [`write_atomically`], with null for NaN and infinity. `sealed` adds a hash that [`read_json`] checks and removes."""
    values = _with_null(values)
    if sealed:
        values = {**values, SEAL: _hash_values(json.loads(json.dumps(values)))}  # as it is read back: keys are text
    write_text(path, json.dumps(values, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n")


def _hash_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _with_null(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _with_null(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_with_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedFileError: if it is not JSON in UTF-8, changed though it is sealed, or holds something else.
        OSError: if it is missing or the disk fails.
    """
    try:
        values: Any = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is not JSON in UTF-8 ({error}). Restore it, or delete it to start again") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} is damaged: it holds a {type(values).__name__}, but an object is expected. Restore it")
    if SEAL in values and values.pop(SEAL) != _hash_values(values):
        raise DamagedFileError(f"{path} is damaged: it was changed since it was written. Restore it, or delete it to start again")
    return values


def check_free(folder: str | Path) -> Path:
    """The absolute path of a folder. `UserError` if it exists and is not empty."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another place")
    return folder


@contextmanager
def write_folder_atomically(path: str | Path, manifest: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` to write into, which gets this name once every file in it is on the disk, replacing one of that name,
    or is deleted after an error.

    Parents are created. `manifest` adds what [`verify`] reads.
    """
    path = Path(path)
    unfinished = name_unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        finish_folder(unfinished, path, manifest)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def name_unfinished(path: Path) -> Path:
    """A name beside `path` for what this process writes before it takes that name. Parents are created, and what killed processes of this
    machine have left under such names is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.iterdir():  # not `glob`: a name may hold its wildcards
        pid = leftover.name.removeprefix(mine).removesuffix(UNFINISHED)
        if leftover.name == f"{mine}{pid}{UNFINISHED}" and pid.isdecimal() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f"{mine}{os.getpid()}{UNFINISHED}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def finish_folder(unfinished: Path, path: Path, manifest: bool = False) -> None:
    """Flush all files of `unfinished` to the disk, a manifest if wanted, and rename it to `path`, replacing what is there."""
    if manifest:
        write_manifest(unfinished)
    for file in (*unfinished.rglob("*"), unfinished):
        flush(file)
    if path.exists():
        discard(path)
    os.rename(unfinished, path)
    flush(path.parent)


def discard(folder: Path) -> None:
    """Delete a folder, renamed before, so that a part is never taken for the whole."""
    unnamed = folder.with_name(folder.name + DISCARDED)
    shutil.rmtree(unnamed, ignore_errors=True)
    os.rename(folder, unnamed)
    shutil.rmtree(unnamed)


def write_manifest(folder: Path) -> None:
    """Add the `manifest.json` that [`verify`] reads to a finished folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    for file in files:
        flush(file)
    write_json(folder / MANIFEST, describe_files(folder, [str(file.relative_to(folder)) for file in files]), indent=1)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of these files, for [`verify_files`]."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names}


def verify(folder: str | Path) -> str | None:
    """What is wrong with a folder by its manifest, or with that; `None` if nothing is. `OSError` if the disk fails."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return verify_files(folder, manifest)


def verify_files(folder: Path, described: Any) -> str | None:
    """What differs from what [`describe_files`] returned; `None` if nothing does."""
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


def plain_paths(values: Any, name: str = "") -> Any:
    """Settings, for comparison, with one spelling of each path: `sounds/` and `./sounds` are `sounds`."""
    if isinstance(values, dict):
        return {key: plain_paths(value, key) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain_paths(value, name) for value in values]
    return str(Path(values)) if name in ("data_dir", "model", "path") and isinstance(values, str) else values


@contextmanager
def lock(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a file or folder by a lock on `.NAME.lock` beside it, which the system releases when a process dies.

    In a distributed run only the main process takes it. If another has it, wait, or raise a `UserError`. Parents are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(path))  # one folder under two names (links) has one lock
    holder = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        holder.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"another process writes to {path}: wait for it, or choose another output") from None
    try:
        yield
    finally:
        holder.release()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
