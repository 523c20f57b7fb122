"""An output file to which recordings are appended, and its journal, with which a run that was killed is resumed.

The journal's first line has the model and settings, each further one a recording: path, size and time, the text of the output, and a hash
of all lines so far. It is written before the text is appended to the output, which is therefore always the beginning of the journal's
texts: what is missing is appended, and an output that was changed otherwise is rejected.
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

from ..errors import UserError, as_user_error
from ..files import lock


CSV_HEADER = ("path", "start", "end", "label", "score", "error")


def absolute_path(path: str) -> str:
    """Also of what does not exist; a URL is left as it is."""
    return path if "://" in path else os.path.abspath(path)


def state_of(path: str) -> dict[str, Any]:
    """What tells a recording from another that replaces it."""
    try:
        file = os.stat(path)
    except OSError:  # missing, or a URL
        return {"at": absolute_path(path), "size": None, "modified": None}
    return {"at": absolute_path(path), "size": file.st_size, "modified": file.st_mtime_ns}


def version_of(path: str) -> tuple[int, ...] | None:
    """Changes with every write, also of the same size and time, as by `rsync -t`; `None` if absent."""
    try:
        file = os.stat(path)
    except OSError:
        return None
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


class JournaledOutput:
    """The output and its journal, locked while they are open: `with JournaledOutput(path, identity) as output: output.write(...)`.

    Args:
        path: of the output; the journal is `PATH.journal`.
        identity: model and settings, which must be the same in all runs that append to the output.

    Raises:
        UserError: on entering, if another process writes to the output, it or its journal cannot be read or written, was changed by others,
            or has another identity.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        self.journal = path.with_name(path.name + ".journal")
        self._finished: dict[str, dict[str, Any]] = {}  # states of the recordings that are, by path
        self._failures: dict[str, str] = {}  # texts of the others
        self._digest = hashlib.sha256()  # of the lines of the journal so far
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with as_user_error(f"{self.path} cannot be written, or its journal {self.journal.name} be read"), ExitStack() as stack:
            stack.enter_context(lock(self.path))
            lines = self.journal.read_bytes().splitlines(keepends=True) if self.journal.exists() else []
            if lines and not lines[-1].endswith(b"\n"):  # a killed run was writing it
                lines.pop()
            content = self.path.read_bytes() if self.path.exists() else b""
            if not lines and content:
                raise UserError(f"{self.path} exists without its journal {self.journal.name}, so it cannot be resumed: give another output")
            missing = self._missing(content, self._read(lines))
            self._output, self._journal = stack.enter_context(self.path.open("ab")), stack.enter_context(self.journal.open("ab"))
            self._journal.truncate(sum(map(len, lines)))
            if not lines:
                self._append(self._journal, self._line(self.identity))
            self._append(self._output, missing)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def holds(self, path: str) -> bool:
        """Whether the recording is finished, and unchanged since."""
        return self._finished.get(absolute_path(path)) == state_of(path)

    def write(self, path: str, state: dict[str, Any], text: str, final: bool) -> None:
        """Append a recording in its `state` to the journal, then its text to the output.

        What is not final is tried again by the next run, and written again if the text is another.
        """
        if final or self._failures.get(state["at"]) != text:
            self._append(self._journal, self._line({**state, "final": final, "text": text}))
            self._append(self._output, _encode(text))

    def _read(self, lines: list[bytes]) -> list[bytes]:
        """Take in the journal's lines, and return the output's parts in them."""
        parts = [_encode(",".join(CSV_HEADER) + "\n")] if self.path.suffix == ".csv" else []
        for number, line in enumerate(lines):
            values = json.loads(line)
            if not isinstance(values, dict) or self._line({name: values[name] for name in values if name != "sha256"}) != line:
                raise ValueError(f"line {number + 1} of the journal is damaged, or not of this program")
            if number == 0:
                self._check_identity(values)
                continue
            parts.append(_encode(values["text"]))
            if values["final"]:
                self._finished[values["at"]] = {name: values[name] for name in ("at", "size", "modified")}
            else:
                self._failures[values["at"]] = values["text"]
        return parts

    def _missing(self, content: bytes, parts: list[bytes]) -> bytes:
        """What the output lacks behind its present content."""
        start = equal = 0
        while equal < len(parts) and content.startswith(parts[equal], start):
            start, equal = start + len(parts[equal]), equal + 1
        rest = b"".join(parts[equal:])
        if not rest.startswith(content[start:]):
            raise UserError(
                f"{self.path} was changed since it was written (line ends?): behind byte {start} it differs from its journal "
                f"{self.journal.name}. Restore it, or give another output"
            )
        return rest[len(content) - start :]

    def _check_identity(self, before: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if before.get(name) != value:
                was = f"{name}={before.get(name)!r}"
                raise UserError(f"{self.path} was written with {was}, but {name} is {value!r} now: give the same, or another output")

    def _line(self, values: dict[str, Any]) -> bytes:
        """A line of the journal."""
        self._digest.update(json.dumps(values).encode())
        return json.dumps({**values, "sha256": self._digest.hexdigest()}).encode() + b"\n"

    @staticmethod
    def _append(file: BinaryIO, content: bytes) -> None:
        file.write(content)
        file.flush()


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # file names need not be UTF-8
