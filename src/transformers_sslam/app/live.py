"""Microphones that are listened to live: blocks of samples come in as they are recorded, and events are known a stated delay later."""

import binascii
import queue
import secrets
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..events_sslam import Event
from .listening import RECENT, Listener
from .wording import clock


BLOCK = 0.16  # seconds of sound that a browser sends at a time, at least
MOST = 10.0  # seconds at a time, at most: a browser that lags behind has that much to send, or ends
SILENT = 10.0  # seconds without a block, after which a browser is taken to be gone
FULL_SCALE = 2**15


class LiveState(NamedTuple):
    """What is known of a live source.

    Attributes:
        seconds: that were received.
        level: highest sample of the latest block, in [0, 1].
        events: of the last seconds, in the order in which they became known, each with its delay in seconds: from its end to its display.
        computing: seconds that the model took for the latest block.
    """

    seconds: float
    level: float
    events: list[tuple[Event, float]]
    computing: float


class LiveSession:
    """One microphone. The model reads its blocks in a thread, and asks for the next one when it is done with what came before."""

    def __init__(self, listener: Listener):
        self._listener, self._lock, self._samples = listener, threading.Lock(), 0
        self._blocks: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each block, and one at the end
        self._found: list[Event] = []
        self._delays: dict[Event, float] = {}
        self._error: str | None = None
        self.is_on, self.started = True, time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    def receive(self, block: np.ndarray) -> LiveState:
        """What is known after one more block `(samples,)`, as soon as the model has computed all that it can.

        Raises:
            UserError: if the session has ended, or failed.
        """
        with self._lock:
            if not self.is_on:
                raise UserError(self._error or "nothing was received for a while, so listening has ended: start it again")
            self._samples += len(block)
            return self._pass(block, float(np.abs(block).max(initial=0)))

    def stop(self) -> LiveState:
        """What is known at the end."""
        with self._lock:
            return self._pass(None, 0.0)

    def _pass(self, block: np.ndarray | None, level: float) -> LiveState:
        started = time.monotonic()
        if self.is_on:
            self._blocks.put(block)
            self._done.get()
        computing, seconds = time.monotonic() - started, self._samples / self._listener.rate
        if self._error is not None and block is not None:
            raise UserError(self._error)
        recent = [event for event in self._found if event.end > seconds - RECENT]
        self._delays = {event: self._delays.get(event, seconds - event.end + computing) for event in recent}
        return LiveState(seconds, level, list(self._delays.items()), computing)

    def _listen(self) -> None:
        try:
            for found in self._listener.live(self._arriving()):
                self._found = found
        except (ValueError, FloatingPointError, RuntimeError) as error:
            self._error = str(error)  # after `stop`: that there was less sound than the model needs
        finally:
            self.is_on = False
            self._done.put(None)  # so that a caller that still waits returns

    def _arriving(self) -> Iterator[np.ndarray]:
        try:
            while (block := self._blocks.get(timeout=SILENT)) is not None:
                yield block
                self._done.put(None)
        except queue.Empty:
            return


class LiveSessions:
    """The microphones of all visitors, of which only so many are listened to at a time as the settings allow."""

    def __init__(self, listener: Listener):
        self._listener, self._most = listener, listener.settings.live_at_once
        self._sessions: dict[str, LiveSession] = {}
        self._lock = threading.Lock()

    def start(self) -> str:
        """Begin to listen; the name of the session, which cannot be guessed.

        Raises:
            UserError: if too many others are on.
        """
        with self._lock:
            self._sessions = {name: session for name, session in self._sessions.items() if session.is_on}
            if len(self._sessions) >= self._most:
                raise UserError(f"{self._most} at a time can listen live, the limit of this page: try again in a while")
            name = secrets.token_urlsafe(24)
            self._sessions[name] = LiveSession(self._listener)
            return name

    def receive(self, name: str, encoded: str) -> LiveState:
        """What is known after one more block, of 16-bit samples in base 64.

        Raises:
            UserError: if there is no such session, the block is damaged or too long, or the time is up.
        """
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            raise UserError("listening has ended: start it again")
        rate, most = self._listener.rate, self._listener.settings.max_seconds
        try:
            samples = np.frombuffer(b64decode(encoded, validate=True), "<i2").astype(np.float32) / FULL_SCALE
        except (binascii.Error, ValueError) as error:
            raise UserError("a block of sound arrived damaged: start again") from error
        if len(samples) > MOST * rate:
            raise UserError(f"more than {MOST:g} s of sound arrived at once: start again")
        state = session.receive(samples)
        if max(state.seconds, time.monotonic() - session.started) > most:
            self.stop(name)
            raise UserError(f"{clock(most)} are over, the limit of this page: start again")
        return state

    def stop(self, name: str) -> LiveState | None:
        """End a session; what is known at its end, or `None` if there is none of this name."""
        with self._lock:
            session = self._sessions.pop(name, None)
        return None if session is None else session.stop()
