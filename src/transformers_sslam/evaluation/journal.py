"""A file that recordings are written to one after the other, and its journal.

The journal tells which model and settings it is from, and for each recording, before it is written, how long the output
will be with it, the SHA-256 of all of it and of the journal, and the text itself, which stands there until the next one is announced. So
what a killed run has half written is completed, and an output that somebody else changed is rejected. Recordings are known by their place,
size and time, because a file may be replaced by another of its name.
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

from ..errors import UserError, as_user_error
from ..files import lock


CSV_HEADER = ("path", "start", "end", "label", "score", "error")


def place_of(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def state_of(path: str) -> dict[str, Any]:
    """What tells a recording from another one of its name."""
    try:
        file = os.stat(path)
    except OSError:  # not there, or an address
        return {"at": place_of(path), "size": None, "modified": None}
    return {"at": place_of(path), "size": file.st_size, "modified": file.st_mtime_ns}


def version_of(path: str) -> tuple[int, ...] | None:
    """Changes with every write and replacement, also by a file of the same size and time, as `rsync -t` leaves; `None` if absent."""
    try:
        file = os.stat(path)
    except OSError:
        return None
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


class JournaledOutput:
    """The file that is written and its journal. A recording counts once the journal announces it."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        self.journal = path.with_name(path.name + ".journal")
        self._finished: dict[str, dict[str, Any]] = {}  # states of the recordings that are, by where they lie
        self._failures: dict[str, str] = {}  # what was written of the others
        self._digest = hashlib.sha256()  # of the output and the entries of its journal as they are
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with as_user_error(f"{self.path} cannot be written, or its journal {self.journal.name} be read"):
            self._stack.enter_context(lock(self.path))
            try:
                self._open()
            except BaseException:
                self._stack.close()
                raise
        return self

    def _open(self) -> None:
        lines = self.journal.read_bytes().splitlines(keepends=True) if self.journal.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        content = self.path.read_bytes() if self.path.exists() else b""
        if not whole and content:
            raise UserError(f"{self.path} is there, but not its journal {self.journal.name}, so nothing can be added: give another output")
        if fresh := not whole:
            whole = [_line(self.identity)]
        identity, *entries = map(json.loads, whole)
        announced = entries.pop() if entries and isinstance(entries[-1], str) else ""
        if not isinstance(identity, dict) or not all(map(_is_entry, entries)):
            raise ValueError("it is not a journal of this program, or it is damaged")
        self._check_identity(identity)
        entries, written, missing = self._compare(content, entries, _encode(announced))
        for entry in entries:
            if "failure" in entry:
                self._failures[entry["at"]] = entry["failure"]
            else:
                self._finished[entry["at"]] = {name: entry.get(name) for name in ("at", "size", "modified")}
        self._output, self._journal = self.path.open("ab"), self.journal.open("ab")
        if fresh:
            self._journal.truncate(0)
            self._append(self._journal, whole[0])
        self._settled = sum(map(len, whole[: 1 + len(entries)]))
        self._output.truncate(written)
        self._output.seek(0, os.SEEK_END)  # `tell` would give the end before it was cut
        self._append(self._output, missing)

    def __exit__(self, *exception) -> None:
        self._output.close()
        self._journal.close()
        self._stack.close()

    def holds(self, path: str) -> bool:
        """Whether the recording is finished, and still the one that it was."""
        return self._finished.get(place_of(path)) == state_of(path)

    def _compare(self, content: bytes, entries: list[dict[str, Any]], announced: bytes) -> tuple[list[dict[str, Any]], int, bytes]:
        """Compare the output with its journal, whose last entry is of the text `announced`.

        Returns:
            The entries of the recordings that are written; up to where the output is as it should be; and what is missing behind that.
        """
        header = _encode(",".join(CSV_HEADER) + "\n") if self.path.suffix == ".csv" else b""
        self._digest.update(header)
        if len(content) < len(header) and header.startswith(content):
            return [], len(content), header[len(content) :]
        if not content.startswith(header):
            self._reject(0)
        length = len(header)
        # Versions that wrote no hashes wrote a recording's entry behind it: a killed run may have left a part of the next one.
        hashed = any("sha256" in entry for entry in entries)
        for number, entry in enumerate(entries):
            tail = text = content[length : entry["length"]]
            if entry is entries[-1] and len(tail) < len(announced) and announced.startswith(tail):  # a killed run was writing it
                text = announced
            elif length + len(tail) < entry["length"]:  # the output is shorter than it was
                if tail and hashed:
                    self._reject(length)
                return entries[:number], length, b""
            if self._digest_with(entry, text) != entry.get("sha256") if hashed else not text.endswith(b"\n"):
                self._reject(length)
            if len(text) > len(tail):
                return entries, length + len(tail), text[len(tail) :]
            length = entry["length"]
        if len(content) > length and (hashed or not entries):
            self._reject(length)
        return entries, length, b""

    def _digest_with(self, entry: dict[str, Any], content: bytes) -> str:
        """The hash of the output and its journal up to this entry, and the text that it announces."""
        self._digest.update(_line({name: value for name, value in entry.items() if name != "sha256"}) + content)
        return self._digest.hexdigest()

    def _reject(self, length: int) -> NoReturn:
        raise UserError(
            f"{self.path} was changed since it was written (other line ends, lines added or removed?): behind byte {length} it is not what "
            f"its journal {self.journal.name} tells. Restore it, or give another output"
        )

    def write(self, path: str, state: dict[str, Any], text: str, final: bool) -> None:
        """Announce a recording in its `state` in the journal, then write it.

        What is not final is tried again by the next run, and written again only if that says something else: of several lines of a path the
        last counts, and of a .csv's rows an error only if no others of its path follow.
        """
        if not final and self._failures.get(state["at"]) == text:
            return
        content = _encode(text)
        entry = {**state, "length": self._output.tell() + len(content)} | ({} if final else {"failure": text})
        line = _line(entry | {"sha256": self._digest_with(entry, content)})
        self._journal.truncate(self._settled)  # without the text of the recording before, which is written
        self._append(self._journal, line + _line(text))
        self._settled += len(line)
        self._append(self._output, content)

    def _check_identity(self, before: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.path} was written with {name}={before.get(name)!r}, but {name} is {value!r} now: give the same model and "
                    "settings, or another output"
                )

    @staticmethod
    def _append(file: BinaryIO, content: bytes) -> None:
        file.write(content)
        file.flush()


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("at"), str)
        and type(entry.get("length")) is int
        and all(isinstance(entry.get(name, ""), str) for name in ("sha256", "failure"))
    )


def _line(values: dict[str, Any] | str) -> bytes:
    return _encode(json.dumps(values) + "\n")


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of files need not be UTF-8


__all__ = ["JournaledOutput", "place_of", "state_of", "version_of"]
