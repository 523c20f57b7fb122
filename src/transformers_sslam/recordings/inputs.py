"""Recordings to process: found below folders and in lists, divided among processes, read in windows."""

import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..audio.ahead import map_ahead
from ..audio.decode import AUDIO_SUFFIXES, check_scale, read_blocks
from ..audio.left_out import warn_of_repeats, warn_of_unread
from ..audio.paths import files_below, printable_path, stat_files
from ..batching_sslam import Span, Windows
from ..errors import AudioDecodingError, UserError, as_user_error
from ..fbank import num_frames
from ..tasks_sslam import Task


# A portion is finished as a whole, when the next one begins: a run that is killed does at most two of each process again.
PORTION_FILES = 64
PORTION_BYTES = 2**24
MOST_PORTIONS = 10_000  # beyond which they are larger
SECONDS_AHEAD = 60.0  # of each recording, decoded before it is its turn


class Recording(NamedTuple):
    """A file as it was when it was opened: what tells it from another that replaces it. `None`: it is missing, or behind a URL."""

    path: str
    size: int | None
    modified: int | None  # nanoseconds

    def __str__(self) -> str:
        return printable_path(self.path)


def absolute_path(path: str) -> str:
    """Also of what does not exist; a URL is left as it is."""
    return path if "://" in path else os.path.abspath(path)


def lists_among(inputs: str | Sequence[str]) -> list[str]:
    """The inputs that [`find_recordings`] reads as lists of paths: files that are not audio by their name."""
    names = [inputs] if isinstance(inputs, str) else inputs
    return [name for name in names if Path(name).is_file() and not _is_recording(Path(name))]


def _is_recording(path: Path) -> bool:
    """Whether an input that is not a folder is a recording and not a list of them: by its suffix, or because it is not text."""
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return True
    if not path.is_file():  # such as a pipe, which is read once
        return False
    with path.open("rb") as file:
        head = file.read(2**16)
    return b"\0" in head and not head.startswith((BOM_UTF16_LE, BOM_UTF16_BE))  # a list in UTF-16 is an error


def find_recordings(inputs: str | Sequence[str], warn: bool = True) -> list[str]:
    """Paths of all recordings, each file once by whatever name: those below folders sorted, those of lists in their order. A URL is one.

    `warn`: count what is left out, other names of files and files below folders whose suffix is not one of audio.

    Raises:
        UserError: if there is no input, or one is missing, is not text, or holds no recording.
    """
    if not inputs:
        raise UserError("inputs is empty: give a folder, an audio file, or a list of paths")
    found: list[str] = []
    for name in map(str, [inputs] if isinstance(inputs, (str, Path)) else inputs):
        path = Path(name)
        with as_user_error(f"{name} is not a folder, audio file or list of paths"):
            if "://" in name:
                here = [name]
            elif path.is_dir():
                names = list(files_below(path, ("",)))
                here = sorted(str(path / below) for below in names if below.lower().endswith(AUDIO_SUFFIXES))
                if warn:
                    warn_of_unread(path, names)
            elif _is_recording(path):
                if not path.is_file():
                    raise FileNotFoundError("there is no such file")
                here = [name]
            else:
                # Windows puts a byte-order mark in front; names of files need not be UTF-8, and may hold what `splitlines` splits at.
                text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
                if "\0" in text:
                    raise ValueError("it is binary, or text that is not UTF-8")
                folder = Path() if name.startswith("/dev/") else path.parent  # a list of another program, as `<(find ...)` gives it
                here = [_listed(line, folder) for line in text.split("\n") if line.strip()]
        if not here:
            raise UserError(
                f"{name} holds no recording: expected are files with {', '.join(AUDIO_SUFFIXES)}, or a list with a path on each line"
            )
        found += here
    first_names, repeats = _first_names(found)
    if warn:
        warn_of_repeats("among the inputs", repeats)
    return first_names


def _first_names(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The first name of each file, and the other names (links), each with the first one. Another spelling of a path is the same name."""
    files = [path for path in paths if "://" not in path]
    states = dict(zip(files, stat_files(files)))
    first: dict[tuple[int, int] | str, str] = {}
    repeats: dict[str, str] = {}
    for path in paths:
        state = states.get(path)
        known = first.setdefault((state.st_dev, state.st_ino) if state and state.st_ino else absolute_path(path), path)
        if absolute_path(known) != absolute_path(path):
            repeats[path] = known
    return list(first.values()), repeats


def _listed(line: str, folder: Path) -> str:
    """The recording that a line of a list names. Blanks around it are dropped, unless they belong to a file's name."""
    if "://" in line:
        return line.strip()
    return str(folder / (line if os.path.exists(folder / line) else line.strip()))


def current_state(paths: Sequence[str]) -> list[Recording]:
    """The recordings as they are now."""
    files = [path for path in paths if "://" not in path]
    found = dict(zip(files, stat_files(files)))
    states = map(found.get, paths)
    return [Recording(path, state and state.st_size, state and state.st_mtime_ns) for path, state in zip(paths, states)]


def cut_into_portions(recordings: Sequence[Recording]) -> list[list[Recording]]:
    """Successive recordings, a few files or megabytes together: the same portions for every number of processes."""
    files = max(PORTION_FILES, len(recordings) // MOST_PORTIONS)
    size = max(PORTION_BYTES, sum(recording.size or 0 for recording in recordings) // MOST_PORTIONS)
    portions: list[list[Recording]] = []
    left = 0
    for recording in recordings:
        if left <= 0 or len(portions[-1]) == files:
            portions.append([])
            left = size
        portions[-1].append(recording)
        left -= recording.size or 0
    return portions


def read_windows(task: Task, portions: Sequence[Sequence[Recording]]) -> Windows:
    """The windows of all recordings, which are decoded ahead; in place of one that cannot be used, its error. A portion ends a batch, so
    that its results do not depend on the others."""
    paths = [(number, recording.path) for number, portion in enumerate(portions) for recording in portion]
    former = 0
    for (number, _), opening in zip(paths, map_ahead(lambda item: _open(item[1], task.windowing.sampling_rate), paths)):
        if number != former:
            yield None
            former = number
        recording, blocks = opening.result()
        try:
            yield from task.windows(recording, blocks)
        except UserError:  # ends the run
            raise
        except ValueError as error:
            yield Span(recording, 0, 0), error


def _open(path: str, sampling_rate: int) -> tuple[Recording, Iterator]:
    """A recording's state before it was opened, and its blocks, the first ones decoded."""
    recording, version = current_state([path])[0], _version(path)

    def blocks() -> Iterator:
        samples, name = 0, printable_path(path)
        try:
            for block in read_blocks(path, sampling_rate):
                check_scale(block, name)
                samples += len(block)
                yield block
        except ImportError as error:  # of a file system behind a URL
            raise UserError(f"{name} cannot be opened: {error}") from error
        if num_frames(samples, sampling_rate) == 0:
            raise AudioDecodingError("too short", f"{name} has {samples} samples, less than one frame of 25 ms")
        if _version(path) != version:
            raise AudioDecodingError("changed", f"{name} was changed while it was read: it is tried again by the next run")

    return recording, _decoded_ahead(blocks(), int(SECONDS_AHEAD * sampling_rate))


def _decoded_ahead(blocks: Iterator, samples: int) -> Iterator:
    """The same blocks, so many samples of them decoded now."""
    first = []
    error: ValueError | None = None
    try:
        while samples > 0 and (block := next(blocks, None)) is not None:
            first.append(block)
            samples -= len(block)
    except UserError:
        raise
    except ValueError as raised:
        error = raised

    def following() -> Iterator:
        yield from first
        first.clear()
        if error is not None:
            raise error
        yield from blocks

    return following()


def _version(path: str) -> tuple[int, ...] | None:
    """Changes with every write, also of the same size and time, as by `rsync -t`; `None` if absent."""
    try:
        file = os.stat(path)
    except OSError:
        return None
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns
