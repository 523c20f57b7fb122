"""Files of those who use the page: an uploaded file is deleted when it has been used, what is kept of it when its page is closed."""

import os
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .recording import Recording


# Two equal files, uploaded by two visitors, are one file of the server, so that neither may delete it for the other. What a visitor has
# uploaded is claimed at once; what is older than this is not waited for any more.
GRACE = 60.0  # seconds
SWEEP = 15.0  # seconds between looks for what is old
PATIENCE = 5.0  # seconds in which everything is deleted at the end


@dataclass
class _Session:
    """Of one open page."""

    folder: Path
    waiting: tuple[Path, str] | None = None  # a file that waits for its turn, and its name
    recording: Recording | None = None
    pending: bool = False  # whether a recording was given, and is not there yet
    used: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)


class Turn(NamedTuple):
    """A file whose turn has come.

    Attributes:
        file, name: the file, and what its owner calls it.
        folder: where to keep what is made of it.
        ended: set as soon as nobody waits for it any more: it was stopped or replaced, or its page was closed.
    """

    file: Path
    name: str
    folder: Path
    ended: threading.Event


class Sessions:
    """Of all open pages. As a context it sweeps in the background, and deletes everything at its end.

    Args:
        keep_seconds: after which a recording is deleted that nobody has looked at.

    Attributes:
        uploads: where the server writes what visitors send.
        kept: of folders with names that cannot be guessed, one for each recording.
    """

    def __init__(self, keep_seconds: float):
        self._root = Path(tempfile.mkdtemp(prefix="sslam-app-")).resolve()
        self.uploads, self.kept = self._root / "uploads", self._root / "kept"
        for folder in (self.uploads, self.kept):
            folder.mkdir()
        self._keep_seconds = keep_seconds
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Sessions":
        threading.Thread(target=self._sweep_for_ever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        deadline = time.monotonic() + PATIENCE
        # Uploads that still arrive could fill a folder faster than it is emptied: under another name no path leads to it.
        renamed = self._root.with_name(f"{self._root.name}-ended")
        while (self._root.exists() or renamed.exists()) and time.monotonic() < deadline:
            with suppress(OSError):  # there was no time to empty the renamed one, or the system does not rename open folders
                self._root.rename(renamed)
            for folder in (renamed, self._root):
                shutil.rmtree(folder, ignore_errors=True)

    def __contains__(self, session: str) -> bool:
        """Whether anything is kept of a page, or waits."""
        with self._lock:
            return session in self._sessions

    def begin(self, session: str) -> Path:
        """A new folder for what is made of a recording, in place of the former one."""
        self.end(session)
        folder = self.kept / secrets.token_urlsafe(24)
        folder.mkdir()
        with self._lock:
            self._sessions[session] = _Session(folder)
        return folder

    def claim(self, session: str, file: str) -> None:
        """Take what a visitor has uploaded, in place of what was there.

        Raises:
            UserError: if it is not an upload.
        """
        source = Path(file).resolve()
        if not source.is_relative_to(self.uploads):
            raise UserError(f"{source.name} was not uploaded to this page: choose it again")
        upload = self.begin(session) / f"upload{source.suffix}"
        os.link(source, upload)
        self._wait(session, upload, source.name)

    def choose(self, session: str, file: Path, name: str) -> None:
        """Take a file of this machine, in place of what was there."""
        self.begin(session)
        self._wait(session, file, name)

    def _wait(self, session: str, file: Path, name: str) -> None:
        with self._lock:
            known = self._sessions[session]
            known.waiting, known.pending = (file, name), True

    def is_pending(self, session: str) -> bool:
        """Whether a recording of a page was given, and is not there yet."""
        with self._lock:
            known = self._sessions.get(session)
            return known is not None and known.pending

    def take(self, session: str) -> Turn | None:
        """The file that waits for its turn; an upload, which lies in the turn's folder, is deleted by the caller."""
        with self._lock:
            known = self._sessions.get(session)
            if known is None or known.waiting is None:
                return None
            waiting, known.waiting = known.waiting, None
            return Turn(*waiting, known.folder, known.ended)

    def keep(self, session: str, recording: Recording) -> None:
        """Remember a recording, unless its page was closed in the meantime."""
        with self._lock:
            known = self._sessions.get(session)
            if known is not None and known.folder == recording.folder:
                known.recording, known.pending, known.used = recording, False, time.monotonic()
                return
        shutil.rmtree(recording.folder, ignore_errors=True)

    def recording(self, session: str | None) -> Recording | None:
        """That a page shows; `None` if there is none, or none any more."""
        with self._lock:
            known = self._sessions.get(session or "")
            if known is None:
                return None
            known.used = time.monotonic()
            return known.recording

    def end(self, session: str | None) -> None:
        """Delete everything of a page, and let nothing more be computed for it."""
        with self._lock:
            known = self._sessions.pop(session or "", None)
        if known is not None:
            known.ended.set()
            shutil.rmtree(known.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what is old."""
        now = time.monotonic()
        with self._lock:
            old = [name for name, session in self._sessions.items() if now - session.used > self._keep_seconds]
        for name in old:
            self.end(name)
        for path in list(self.uploads.rglob("*")):
            with suppress(OSError):  # a folder with something in it; or another thread was faster
                if time.time() - path.stat().st_ctime > GRACE:
                    path.rmdir() if path.is_dir() else path.unlink()

    def _sweep_for_ever(self) -> None:
        while not self._ended.wait(SWEEP):
            self.sweep()
