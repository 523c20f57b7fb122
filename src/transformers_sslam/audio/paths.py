"""Files below a folder, and their names as text that Arrow tables can hold."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def encode_path(path: str) -> str:
    """A path as valid UTF-8 text, as Arrow strings must be: each byte of a file name that is not UTF-8 becomes NUL and two hex digits.

    No path holds a NUL, so all other paths stay as they are and [`decode_path`] gives back each one exactly.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return "".join(f"\0{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char for char in path)
    return path


def decode_path(text: str) -> str:
    """What `open` takes for the path that [`encode_path`] wrote as text."""
    return re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text) if "\0" in text else text


def printable_path(text: str) -> str:
    """A path, encoded or not, for messages: bytes that are not UTF-8 are shown as `\\xff`."""
    return encode_path(text).replace("\0", "\\x")


def source_name(source: dict) -> str:
    """How an undecoded entry of an audio column is called in messages: its path, where it has one."""
    return printable_path(str(source.get("path") or "an audio entry without a path"))


def confined_path(path: str, root: str | Path) -> str | None:
    """What to open for a path in a row of a data set, if it lies below the data set; `None` if it lies elsewhere: opened all the same, it
    could be any file of this machine, or a request to any address.

    Args:
        path: absolute, or relative to `root`; or on the Hub. Within archives, as fsspec chains them: `zip://a.wav::clips.zip`.
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


def files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to `root`. Links to folders are followed, each folder once, so that a ring of links ends. `._name`, which macOS keeps
    beside a file on other systems' disks, is left out.

    Raises:
        OSError: if a folder cannot be read, whose files would otherwise be missing silently.
    """
    return (name for name, _, _ in _walk(root, suffixes))


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """The names of [`files_below`], sorted, and those that are other names (links) of a file named before, with its first name.

    Listing a folder tells the inode of each file, so only links and files with equal inodes are looked at on their own.
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
        if os.path.samefile(root / first, root / other):  # the inodes that some file systems list are not unique
            first_names[other] = first
    return names, first_names


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Name, device and inode; both are 0 for a link that leads nowhere."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        state = os.stat(os.path.join(root, folder))
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(os.path.join(root, folder)) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        below = [os.path.join(folder, entry.name) for entry in entries if entry.is_dir()]
        folders.extend(reversed(below))
        for entry in entries:
            if entry.name.lower().endswith(suffixes) and not entry.name.startswith("._") and not entry.is_dir():
                yield os.path.join(folder, entry.name), *_identity(entry, state.st_dev)


def _identity(entry: os.DirEntry, device: int) -> tuple[int, int]:
    if not entry.is_symlink():
        return device, entry.inode()
    try:
        return (target := os.stat(entry.path)).st_dev, target.st_ino
    except OSError:
        return 0, 0
