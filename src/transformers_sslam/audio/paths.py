"""Files below a folder, and their names as text that Arrow tables can hold."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np


FILES_AT_ONCE = 1000  # a task for each file would take longer than the answer


def encode_path(path: str) -> str:
    """A path as UTF-8, as Arrow needs it: each byte that is not becomes NUL, which no path holds, and two hex digits."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "".join(f"\0{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char for char in path)
    return path


def decode_path(text: str) -> str:
    """The path that [`encode_path`] wrote."""
    return re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text) if "\0" in text else text


def printable_path(text: str) -> str:
    """A path, encoded or not, for messages: bytes that are not UTF-8 as `\\xff`."""
    return encode_path(text).replace("\0", "\\x")


def source_name(source: dict) -> str:
    """Name of an undecoded entry of an audio column, for messages."""
    return printable_path(str(source.get("path") or "an audio entry without a path"))


def contents(folder: Path) -> str:
    """The first names in a folder, and their number, for messages."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{', '.join(names[:8])}{f', ... ({len(names)} in all)' if len(names) > 8 else ''}" or "nothing"


def confined_path(path: str, root: str | Path) -> str | None:
    """What to open for a path in a row of a data set; `None` if it lies outside, where it could be any file of this machine, or a request
    to any address.

    Args:
        path: absolute, relative to `root`, or on the Hub; within archives as `zip://a.wav::clips.zip`.
        root: the data set's folder, one of its files, or its id on the Hub.
    """
    *within, path = path.split("::")
    if not all(part.startswith("zip://") for part in within) or "\0" in path:
        return None
    if "://" in path:
        inside = re.match(rf"hf://datasets/{re.escape(str(root))}[@/]", path) and ".." not in path.split("/")
        return "::".join([*within, path]) if inside else None
    folder = os.path.realpath(root if os.path.isdir(root) else os.path.dirname(root))
    real = os.path.realpath(os.path.join(folder, path))
    return "::".join([*within, real]) if real.startswith(os.path.join(folder, "")) else None


def stat_files(paths: Sequence[str]) -> list[os.stat_result | None]:
    """`os.stat` of each file, `None` if it is missing; many at a time, since network file systems are slow to answer."""
    unique = list(dict.fromkeys(paths))
    pieces = [unique[start : start + FILES_AT_ONCE] for start in range(0, len(unique), FILES_AT_ONCE)]
    with ThreadPoolExecutor(16) as pool:
        states = dict(zip(unique, chain.from_iterable(pool.map(lambda piece: [_stat(path) for path in piece], pieces))))
    return [states[path] for path in paths]


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # the latter for NUL in a name
        return None


def files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to `root`. Links to folders are followed, each folder once. `._name`, which macOS adds to a file, is left out.
    `OSError` if a folder cannot be read."""
    return (name for name, _, _ in _walk(root, suffixes))


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """The names of [`files_below`], sorted, and those that are further names (links) of a file before them, with its first name.

    Listing a folder gives inodes, so only links and files with equal inodes cost a system call.
    """
    found = sorted(_walk(root, suffixes))
    names = [name for name, _, _ in found]
    devices = np.fromiter((device for _, device, _ in found), dtype=np.uint64, count=len(found))
    inodes = np.fromiter((inode for _, _, inode in found), dtype=np.uint64, count=len(found))
    del found
    order = np.lexsort((inodes, devices))  # stable: of equal files the first name stays first
    repeats = (np.diff(inodes[order]) == 0) & (np.diff(devices[order]) == 0) & (inodes[order][1:] != 0)
    first_names: dict[str, str] = {}
    for place in np.flatnonzero(repeats):
        first, other = (names[order[i]] for i in (place, place + 1))
        first = first_names.get(first, first)
        if os.path.samefile(root / first, root / other):  # some file systems list inodes that are not unique
            first_names[other] = first
    return names, first_names


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Name, device and inode (both 0 for a link that leads nowhere)."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        state = os.stat(os.path.join(root, folder))
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(os.path.join(root, folder)) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        folders += [os.path.join(folder, entry.name) for entry in reversed(entries) if _is_folder(entry)]
        for entry in entries:
            if entry.name.lower().endswith(suffixes) and not entry.name.startswith("._") and not _is_folder(entry):
                yield os.path.join(folder, entry.name), *_identity(entry, state.st_dev)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(entry: os.DirEntry, device: int) -> tuple[int, int]:
    if not entry.is_symlink():
        return device, entry.inode()
    target = _stat(entry.path)
    return (target.st_dev, target.st_ino) if target else (0, 0)
