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

from ..errors import UserError
from .recording import Recording


# Two equal files, uploaded by two visitors, are one file of the server, so that neither may delete it for the other. What a visitor has
# uploaded is claimed at once; what is older than this is not waited for any more.
GRACE = 60.0  # seconds
SWEEP = 15.0  # seconds between looks for what is old


@dataclass
class _Session:
    """Of one open page."""

    folder: Path
    upload: tuple[Path, str] | None = None  # a file that waits for its turn, and its name
    recording: Recording | None = None
    used: float = field(default_factory=time.monotonic)


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
        shutil.rmtree(self._root, ignore_errors=True)

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
        folder = self.begin(session)
        upload = folder / f"upload{source.suffix}"
        os.link(source, upload)
        with self._lock:
            self._sessions[session].upload = upload, source.name

    def upload(self, session: str) -> tuple[Path, str, Path] | None:
        """The file that waits for its turn, its name, and where to keep what is made of it; whoever asks deletes the file."""
        with self._lock:
            known = self._sessions.get(session)
            if known is None or known.upload is None:
                return None
            (file, name), known.upload = known.upload, None
            return file, name, known.folder

    def keep(self, session: str, recording: Recording) -> None:
        """Remember a recording, unless its page was closed in the meantime."""
        with self._lock:
            known = self._sessions.get(session)
            if known is not None and known.folder == recording.folder:
                known.recording, known.used = recording, time.monotonic()
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
        """Delete everything of a page."""
        with self._lock:
            known = self._sessions.pop(session or "", None)
        if known is not None:
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


__all__ = ["Sessions"]
