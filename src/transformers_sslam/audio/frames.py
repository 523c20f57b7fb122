"""Streams of MPEG audio (MP3) or ADTS (AAC) frames, walked one by one: no header says reliably how many there are."""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from ..errors import AudioDecodingError
from .containers import LOST, damaged, tag_length, truncated


_MPEG_RATES = (44_100, 48_000, 32_000)  # Hz; half of it in MPEG-2, a quarter in MPEG-2.5
_KBITS = {  # per second, by (is it MPEG-1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_ADTS_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8000, 7350)
FIRST_FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb].{7,38}(?:Xing|Info)", re.DOTALL)  # of an MP3 with a Xing header
_LONGEST_PADDING = 2304  # samples that an encoder adds at either end: two frames of MPEG-1
_DECODER_DELAY = 529  # samples by which every MP3 decoder is late
_READ = 2**18  # bytes at a time
_RUN = 32  # frames in a run; each call of a decoder costs half as much as decoding a frame


class _Frame(NamedTuple):
    length: int  # bytes
    samples: int
    rate: int  # Hz


@lru_cache(2**12)
def _mpeg_frame(head: bytes) -> _Frame | None:
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    kbits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or not 0 < kbits < 15 or rate == 3:
        return None
    is_mpeg_1 = version == 3
    hertz = _MPEG_RATES[rate] // (1 if is_mpeg_1 else 2 if version == 2 else 4)
    bits = _KBITS[is_mpeg_1, layer if is_mpeg_1 else min(layer, 2)][kbits - 1] * 1000
    samples = 384 if layer == 1 else 576 if layer == 3 and not is_mpeg_1 else 1152
    padding = head[2] >> 1 & 1
    return _Frame((12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding, samples, hertz)


def _adts_frame(head: bytes) -> _Frame | None:
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return _Frame(length, 1024 * (1 + (head[6] & 3)), _ADTS_RATES[head[2] >> 2 & 15]) if length > 7 else None


class FrameReader:
    """Iterates over runs of successive whole frames, without tags and the first Xing header: the bytes of each, the lengths of its frames.

    Args:
        file, size, name: the stream, its bytes, and its name for messages.
        adts: whether it holds ADTS frames, otherwise MPEG audio.

    Attributes:
        trim: samples that encoder and decoder added at the start and at the end. Known from the first frame on.
        seconds: of the frames so far.

    Raises:
        AudioDecodingError: behind the last frame: "unreadable" if there was none, "truncated" if there were fewer than Xing headers
            declare, "damaged" if over 0.1 s between them are not frames. Sooner, "damaged", if a Xing header contradicts what follows.
    """

    def __init__(self, file: BinaryIO, size: int, adts: bool, name: str):
        self._file, self._size, self._name, self.adts = file, size, name, adts
        self._start, self._data, self._last_xing = 0, b"", -1
        self.trim, self.seconds = (0, 0), 0.0

    def __iter__(self) -> Iterator[tuple[bytes, list[int]]]:
        parse: Callable[[bytes], _Frame | None] = _adts_frame if self.adts else _mpeg_frame
        width, size, bytes_at = 7 if self.adts else 3, self._size, self._bytes_at
        declared = counted = lost = 0.0  # seconds: by Xing headers, of frames behind them, of what is not a frame
        headers, at, junk, cut, behind_header = 0, 0, 0, False, False
        last: _Frame | None = None
        run, run_end = list[int](), 0
        while at < size:
            if run and (at != run_end or len(run) == _RUN):
                yield bytes_at(run_end - sum(run), sum(run)), run
                run = []
            head = bytes_at(at, 44)
            frame = parse(head[:width])
            has_xing = at <= self._last_xing and frame is not None and (b"Xing" in head or b"Info" in head)
            # Equal headers give the same object. A frame of the same kind as the last one needs no other proof.
            if frame is None or last is None or (frame is not last and frame[1:] != last[1:]):
                if tag := tag_length(head, size - at):
                    at += tag
                    continue
                follows = at + (frame.length if frame else 0)
                next_head = bytes_at(follows, 44)
                is_followed = follows >= size or parse(next_head[:width]) is not None or tag_length(next_head, size - follows) > 0
                if frame is None or not (is_followed or has_xing):
                    skipped = self._bytes_until(at + 1, b"\xff")
                    at, junk = at + skipped, junk + skipped
                    continue
            frame_seconds = frame.samples / frame.rate
            if junk:
                if behind_header:
                    raise damaged(self._name, "has a Xing header of another length than it declares")
                lost, junk = lost + junk * frame_seconds / frame.length, 0
            behind_header = False
            if has_xing and (claimed := _xing_header(bytes_at(at, 200).ljust(200, b"\0"))) is not None:
                frames, *added = claimed
                if max(added) > _LONGEST_PADDING:
                    raise damaged(self._name, f"declares {max(added)} samples of padding")
                if headers == 0 and added != [0, 0]:
                    self.trim = added[0] + _DECODER_DELAY, max(0, added[1] - _DECODER_DELAY)
                headers, behind_header = headers + 1, True
                declared += frames * frame_seconds
                is_sound = headers > 1 and at + frame.length <= size  # in a file joined to another: a frame of silence
                if is_sound:
                    counted -= frame_seconds
            elif at + frame.length > size:
                cut = True
                break
            else:
                is_sound = True
            at, last = at + frame.length, frame
            if is_sound:
                before = len(run)
                run.append(frame.length)
                if at > self._last_xing:  # the usual frames: like this one, in the buffer, without a Xing header
                    data, offset = self._data, at - self._start
                    while (
                        len(run) < _RUN
                        and (following := parse(data[offset : offset + width])) is not None
                        and following[1:] == frame[1:]
                        and offset + following.length <= len(data)
                    ):
                        run.append(following.length)
                        offset += following.length
                        behind_header = False
                    at = self._start + offset
                frame_seconds *= len(run) - before
                self.seconds += frame_seconds
                counted += frame_seconds if headers else 0.0
                run_end = at
        if run:
            yield bytes_at(run_end - sum(run), sum(run)), run
        if last is None:
            raise AudioDecodingError("unreadable", f"{self._name} has no frame of MPEG audio or AAC")
        if bytes_at(size - min(junk, 2**16), junk).strip(b"\0"):
            lost += junk * last.samples / last.rate / last.length  # behind the last frame, where zeros are padding
        if declared - counted > (1e-6 if cut else LOST / 2):
            raise truncated(self._name, f"has {counted:.2f} s of the {declared:.2f} s that its header declares")
        if lost > LOST or (lost and headers and counted - declared > LOST / 2):
            raise damaged(self._name, f"has about {lost:.2f} s of what is not audio between its frames")

    def _bytes_at(self, place: int, length: int) -> bytes:
        """Bytes of the file from a buffer that moves forward."""
        offset = place - self._start
        if offset < 0 or (offset + length > len(self._data) and self._start + len(self._data) < self._size):
            self._file.seek(place)
            self._start, self._data, offset = place, self._file.read(_READ), 0
            found = -1 if self.adts else max(self._data.rfind(b"Xing"), self._data.rfind(b"Info"))
            self._last_xing = self._start + found if found >= 0 else -1
        return self._data[offset : offset + length]

    def _bytes_until(self, place: int, value: bytes) -> int:
        """Bytes from the one before `place` up to the next of this value, or to the end of the buffer."""
        self._bytes_at(place - 1, 2)
        offset = place - self._start
        end = self._data.find(value, offset)
        return (end if end >= 0 else len(self._data)) - offset + 1


def _xing_header(head: bytes) -> tuple[int, int, int] | None:
    """Frames behind a Xing or Info header, and samples that the encoder added at the start and the end; `None` if it does not tell."""
    offset = max(head.find(b"Xing", 0, 44), head.find(b"Info", 0, 44))  # its place depends on the version of MPEG and the channels
    if offset < 0 or not head[offset + 7] & 1:
        return None
    added = int.from_bytes(head[offset + 141 : offset + 144], "big") if head[offset + 120 : offset + 124].isalnum() else 0
    return int.from_bytes(head[offset + 8 : offset + 12], "big"), added >> 12, added & 4095
