"""The length of a FLAC by its last frame, whatever its header says."""

import re
from typing import BinaryIO

from .containers import damaged, is_padding, read_at, truncated, without_last_tags


# By their number in a frame; 0: as the stream's.
_RATES = (0, 88_200, 176_400, 192_000, 8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)  # Hz
_BITS = (0, 8, 12, 0, 16, 20, 24, 32)


def flac_frames(file: BinaryIO, size: int) -> int:
    """Where the frames of a FLAC begin, behind pictures and other metadata."""
    at, head = 4, b"\0"
    while at < size and not head[0] & 0x80:
        head = read_at(file, at, 4)
        at += 4 + int.from_bytes(head[1:], "big")
    return at


def flac_seconds(file: BinaryIO, size: int, name: str) -> float | None:
    """Length by the last frame; `None` if none is found. Raises "truncated" or "damaged" if the header declares another."""
    info = read_at(file, 8, 34)
    if len(info) < 34:
        raise truncated(name)
    packed = int.from_bytes(info[10:18], "big")  # 20 bits rate, 3 channels, 5 bits per sample, 36 samples
    total, largest = packed & (2**36 - 1), int.from_bytes(info[7:10], "big")
    end, begin, at = None, size, 0
    for window in (max(2**18, largest + 2**16), 2**22):  # the second one is for a cover behind the sound
        if end is None and begin > 0:
            begin = max(0, size - window)
            tail = read_at(file, begin, window)
            at = len(tail)
            while end is None and (at := tail.rfind(b"\xff", 0, at)) >= 0:
                end = _frame_end(tail[at : at + 16], info, packed)
    if total and end != total:
        if end is not None and end < total:
            raise truncated(name)
        raise damaged(name, "has a last frame that does not end where its header says")
    if end is not None and (longest := largest or 2**18) < without_last_tags(file, size) - begin - at:
        tags = re.compile(rb"ID3|APETAGEX|TAG|LYRICSBEGIN|\0{16}").finditer(tail, at, at + longest + 16)
        behind = (at + longest, *(tag.start() for tag in tags))
        if not any(is_padding(file, begin + start, size) for start in behind):
            raise damaged(name, "has more than a tag behind its sound")
    return None if end is None or not packed >> 44 else end / (packed >> 44)


def _frame_end(head: bytes, info: bytes, packed: int) -> int | None:
    """The sample behind the frame whose header this is; `None` if it is not one of this stream (RFC 9639, section 9.1)."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    block, rate, channels, bits = head[2] >> 4, head[2] & 15, head[3] >> 4, head[3] >> 1 & 7
    width = 8 - (head[4] ^ 0xFF).bit_length()  # bytes of the number, which is coded as UTF-8 is: 0 for a single one
    number, at = head[4] & (0x7F >> width), 4 + max(1, width)
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    if block in (6, 7):
        length = int.from_bytes(head[at : at + block - 5], "big") + 1
        at += block - 5
    else:
        length = 192 if block == 1 else 576 * 2 ** (block - 2) if block < 6 else 2**block
    if rate in (12, 13, 14):
        hertz = int.from_bytes(head[at : at + min(rate - 11, 2)], "big") * (1000, 1, 10)[rate - 12]
        at += min(rate - 11, 2)
    else:
        hertz = _RATES[rate] if rate < 12 else -1
    crc = 0
    for byte in head[:at]:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    of_this_stream = (
        hertz in (0, packed >> 44)
        and (2 if channels >= 8 else channels + 1) == (packed >> 41 & 7) + 1
        and _BITS[bits] in (0, (packed >> 36 & 31) + 1)
    )
    if block == 0 or channels > 10 or len(head) <= at or head[at] != crc or not of_this_stream:
        return None
    return (number if head[1] & 1 else number * int.from_bytes(info[2:4], "big")) + length
