"""Streams of MPEG audio (MP3) and ADTS (AAC) frames, whose length no header tells for certain: walked from frame to frame."""

from collections.abc import Callable
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from ..errors import AudioDecodingError
from .containers import LOST


_MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by the header's version bits
_KBITS = {  # per second, by (MPEG-1 or not, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_ADTS_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8000, 7350)
_LONGEST_DELAY = 2304  # samples that an encoder adds at either end: two frames of MPEG-1


class _Frame(NamedTuple):
    """Of an MPEG or an ADTS stream: bytes and samples of a frame, and its rate in Hz."""

    length: int
    samples: int
    rate: int


@lru_cache(2**12)
def _mpeg_frame(head: bytes) -> _Frame | None:
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    kbits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or not 0 < kbits < 15 or rate == 3:
        return None
    hertz = _MPEG_RATES[version][rate]
    bits = _KBITS[version == 3, layer if version == 3 else min(layer, 2)][kbits - 1] * 1000
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    padding = head[2] >> 1 & 1
    return _Frame((12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding, samples, hertz)


def _adts_frame(head: bytes) -> _Frame | None:
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return _Frame(length, 1024 * (1 + (head[6] & 3)), _ADTS_RATES[head[2] >> 2 & 15]) if length > 7 else None


def tag_length(head: bytes, left: int) -> int:
    """Bytes of the ID3 or APE tag that begins here, 0 if none does."""
    if head[:3] == b"ID3" and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
        return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + 10 * (head[5] >> 4 & 1)
    if head[:3] == b"TAG" and left >= 128:
        return 128
    if head[:8] == b"APETAGEX" and len(head) >= 32:
        is_header = head[23] & 0x20
        return int.from_bytes(head[12:16], "little") + 32 if is_header else 32
    if head[:11] == b"LYRICSBEGIN":
        return left
    return 0


def walk_frames(file: BinaryIO, size: int, adts: bool, name: str) -> float:
    """Seconds of sound in a stream of MPEG audio or ADTS frames, by its Xing headers where these declare more.

    Raises:
        AudioDecodingError: "truncated" if there are fewer frames than Xing headers declare, "damaged" if bytes between frames amount to
            more than 0.1 s, if frames are too many beside such bytes, if no frame follows where that of a Xing header ends, so that bytes
            of the header are missing or too many, or if it declares more padding than an encoder adds.
    """
    data = _Buffered(file, size)
    parse: Callable[[bytes], _Frame | None] = _adts_frame if adts else _mpeg_frame
    width = 7 if adts else 3
    seconds = declared = counted = lost = padding = 0.0
    headers, at, junk, cut, behind_header = 0, 0, 0, False, False
    last: _Frame | None = None
    while at < size:
        head = data.at(at, 44)
        frame = parse(head[:width])
        has_xing = frame is not None and not adts and (b"Xing" in head or b"Info" in head)
        # Equal headers give the same object; what is of the same kind as the frame before needs no other proof.
        if frame is None or last is None or (frame is not last and (frame.rate, frame.samples) != (last.rate, last.samples)):
            if tag := tag_length(head, size - at):
                at += tag
                continue
            follows = at + (frame.length if frame else 0)
            next_head = data.at(follows, 44)
            is_followed = follows >= size or parse(next_head[:width]) is not None or tag_length(next_head, size - follows) > 0
            if frame is None or not (is_followed or has_xing):
                skipped = data.until(at + 1, b"\xff")
                at, junk = at + len(skipped), junk + len(skipped)
                continue
        frame_seconds = frame.samples / frame.rate
        if junk and behind_header:
            raise AudioDecodingError("damaged", f"{name} has a damaged Xing header: copy or download it again")
        lost, junk, behind_header = lost + junk * frame_seconds / frame.length, 0, False
        if has_xing and (claimed := _xing_frames(data.at(at, 200).ljust(200, b"\0"))) is not None:
            if max(claimed[1:]) > _LONGEST_DELAY:
                raise AudioDecodingError("damaged", f"{name} declares {max(claimed[1:])} samples of padding: copy or download it again")
            if headers == 0:
                padding = sum(claimed[1:]) / frame.rate
            else:  # of a file joined to another; a decoder makes a frame of silence of it, and leaves the padding
                seconds += frame_seconds
            headers, behind_header = headers + 1, True
            declared += claimed[0] * frame_seconds
        elif at + frame.length > size:
            cut = True
            break
        else:
            seconds += frame_seconds
            counted += frame_seconds if headers else 0.0
        at, last = at + frame.length, frame
    if last is not None and len(data.at(size - min(junk, 2**16), junk).strip(b"\0")) > 0:
        lost += junk * last.samples / last.rate / last.length  # behind the last frame, where zeros are padding
    if declared - counted > (1e-6 if cut else LOST / 2):
        raise AudioDecodingError("truncated", f"{name} has {counted:.2f} s of the {declared:.2f} s that its header declares: copy it again")
    if lost > LOST or (lost and headers and counted - declared > LOST / 2):
        raise AudioDecodingError("damaged", f"{name} has about {lost:.2f} s of what is not audio between its frames: copy it again")
    return seconds + max(0.0, declared - counted) - padding


def _xing_frames(head: bytes) -> tuple[int, int, int] | None:
    """Of a Xing or Info header that tells it, the number of frames behind it, and the samples that the encoder added before and after."""
    offset = max(head.find(b"Xing", 0, 44), head.find(b"Info", 0, 44))  # its place tells the version of MPEG and the channels
    if offset < 0 or not head[offset + 7] & 1:
        return None
    added = int.from_bytes(head[offset + 141 : offset + 144], "big") if head[offset + 120 : offset + 124].isalnum() else 0
    return int.from_bytes(head[offset + 8 : offset + 12], "big"), added >> 12, added & 4095


class _Buffered:
    """Bytes of a file by their place, from a buffer that moves forward."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._start, self._data = file, size, 0, b""

    def at(self, place: int, length: int) -> bytes:
        offset = place - self._start
        if offset < 0 or (offset + length > len(self._data) and self._start + len(self._data) < self._size):
            self._file.seek(place)
            self._start, self._data, offset = place, self._file.read(2**18), 0
        return self._data[offset : offset + length]

    def until(self, place: int, value: bytes) -> bytes:
        """The bytes from the one before `place` up to the next of this value, or as many as are held."""
        self.at(place - 1, 2)
        offset = place - self._start
        end = self._data.find(value, offset)
        return self._data[offset - 1 : end if end >= 0 else len(self._data)]
