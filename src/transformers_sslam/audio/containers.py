"""The length of the sound as container formats tell it, by which a decoder's result is known to be the whole file."""

import io
import struct
import zlib
from typing import BinaryIO, Literal, NamedTuple

from ..errors import AudioDecodingError


LOST = 0.1  # seconds that may be missing, or too many
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PCM_TAGS = (1, 3, 6, 7, 0xFE)  # low bytes of a WAV's format tag: PCM, float, A-law, mu-law, extensible
_FLAC_RATES = (0, 88_200, 176_400, 192_000, 8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
_COMMON_RATES = {*_FLAC_RATES[1:], 11_025, 12_000}
_FLAC_BITS = (0, 8, 12, 0, 16, 20, 24, 32)
_MASTERS = (0x18538067, 0x1F43B675)  # Matroska's segment and cluster


class Window(io.RawIOBase):
    """Bytes `start` to `end` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._file, self._start, self._size, self._at = file, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class DataChunk(NamedTuple):
    """The samples of an uncompressed file."""

    start: int
    size: int | None  # bytes; `None` if the header leaves it open
    seconds: float | None  # by other fields of the header
    closed: bool  # whether chunks follow up to the end of the file


def find_data_chunk(file: BinaryIO, size: int, name: str) -> DataChunk | None:
    """The samples of a WAV, RF64, W64, AIFF, CAF or AU file of `size` bytes; `None` for another format or where no such chunk is found.

    Raises:
        AudioDecodingError: "truncated" if they end behind the file, "damaged" if over 0.1 s of what is not a chunk, a tag or zeros
            follows them, or if the header contradicts itself.
    """
    head = read_at(file, 0, 40)
    kind = head[:4]
    order: Literal["little", "big"] = "little"
    if kind == b".snd":
        return _within(DataChunk(int.from_bytes(head[4:8], "big"), _known(int.from_bytes(head[8:12], "big")), None, False), size, name)
    if kind == b"riff" and head[24:28] == b"wave":
        at, width, count, align, own = 40, 16, 8, 8, 24
    elif kind in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        at, width, count, align, own = 12, 4, 4, 2, 0
    elif kind == b"FORM" and head[8:11] == b"AIF":
        at, width, count, align, own, order = 12, 4, 4, 2, 0, "big"
    elif kind == b"caff":
        at, width, count, align, own, order = 8, 4, 8, 1, 0, "big"
    else:
        return None
    found: DataChunk | None = None
    long, rate, seconds = 0, 0.0, None  # `rate` in bytes a second
    while at + width + count <= size:
        chunk = read_at(file, at, width + count + 24)
        identity, body, start = chunk[:4], chunk[width + count :], at + width + count
        length = int.from_bytes(chunk[width : width + count], order) - own
        if found is not None and (not all(32 <= byte < 127 for byte in identity) or identity in (b"RIFF", b"RF64", b"FORM")):
            break  # not a chunk: more sound, or another file
        if identity == b"ds64":  # of RF64: the size in 64 bits
            long = int.from_bytes(body[8:16], "little")
        elif identity == b"fmt " and len(body) >= 16:
            channels, sampling_rate, rate, frame, bits = struct.unpack("<HIIHH", body[2:16])
            # Some programs write a wrong byte rate. But if it belongs to another common sampling rate, either may be damaged.
            if body[0] in _PCM_TAGS and rate != sampling_rate * frame:
                is_common = sampling_rate in _COMMON_RATES and rate not in {common * frame for common in _COMMON_RATES}
                if not is_common or frame != channels * bits / 8:
                    raise damaged(name, "has a header whose rates contradict each other")
                rate = sampling_rate * frame
        elif identity == b"COMM" and head[8:12] == b"AIFF" and len(body) >= 18:  # AIFF is always PCM
            frame = int.from_bytes(body[:2], "big") * -(-int.from_bytes(body[6:8], "big") // 8)
            exponent = int.from_bytes(body[8:10], "big") & 0x7FFF  # of an 80-bit float
            hertz = int.from_bytes(body[10:18], "big") * 2.0 ** (min(exponent, 16_500) - 16_446)
            rate, seconds = hertz * frame, int.from_bytes(body[2:6], "big") / hertz if hertz else None
        elif identity in (b"data", b"SSND") and found is None:
            length = long if length == 2**32 - 1 and long else length
            known = None if count == 8 and length >= 2**62 else length if count == 8 or length == long else _known(length)
            found = DataChunk(start, known, None, False)
            if known is None:
                at = size
                break
        at = start + max(0, length) + -length % align
        if align == 2 and length % 2 and read_at(file, at - 1, 1) > b"\0":
            at -= 1  # some writers leave the padding out
    if found is None:
        return None
    if found.size and rate and (size - at) / rate > LOST and not _is_padding(file, at):
        raise damaged(name, f"has {size - at} bytes behind the sound that its header declares")
    if seconds is None and rate:
        seconds = (found.size or size - found.start) / rate
    return _within(found._replace(seconds=seconds, closed=at >= size), size, name)


def _is_padding(file: BinaryIO, at: int) -> bool:
    """Whether only a tag or zeros lie from here to the end."""
    block = read_at(file, at, 2**18)
    if block.startswith((b"ID3", b"APETAGEX")):
        return True
    while block and not block.strip(b"\0"):
        block = file.read(2**18)
    return not block


def _within(found: DataChunk, size: int, name: str) -> DataChunk:
    if found.size is not None and found.start + found.size > size:
        raise truncated(name)
    return found


def _known(size: int) -> int | None:
    """A header written to a pipe holds the largest number instead of its size: FFmpeg 2**32 - 1, SoX almost 2**31."""
    return None if 2**31 - 4096 <= size < 2**31 or size >= 2**32 - 4096 else size


def truncated(name: str, problem: str = "ends before its header says") -> AudioDecodingError:
    return AudioDecodingError("truncated", f"{name} {problem}: copy or download it again")


def damaged(name: str, problem: str) -> AudioDecodingError:
    return AudioDecodingError("damaged", f"{name} {problem}: copy or download it again")


def read_at(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    return file.read(length)


def flac_seconds(file: BinaryIO, size: int, name: str) -> float | None:
    """Length by the last frame; `None` if none is found. Raises "truncated" or "damaged" if the header declares another."""
    info = read_at(file, 8, 34)
    if len(info) < 34:
        raise truncated(name)
    packed = int.from_bytes(info[10:18], "big")  # 20 bits rate, 3 channels, 5 bits per sample, 36 samples
    total, largest = packed & (2**36 - 1), int.from_bytes(info[7:10], "big")
    tail = read_at(file, max(0, size - max(2**18, largest + 2**16)), size)
    end, at = None, len(tail)
    while end is None and (at := tail.rfind(b"\xff", 0, at)) >= 0:
        end = _flac_frame_end(tail[at : at + 16], info, packed)
    if total and end != total:
        if end is not None and end < total:
            raise truncated(name)
        raise damaged(name, "has a last frame that does not end where its header says")
    return None if end is None or not packed >> 44 else end / (packed >> 44)


def _flac_frame_end(head: bytes, info: bytes, packed: int) -> int | None:
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
        hertz = _FLAC_RATES[rate] if rate < 12 else -1
    crc = 0
    for byte in head[:at]:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    of_this_stream = (
        hertz in (0, packed >> 44)
        and (2 if channels >= 8 else channels + 1) == (packed >> 41 & 7) + 1
        and _FLAC_BITS[bits] in (0, (packed >> 36 & 31) + 1)
    )
    if block == 0 or channels > 10 or len(head) <= at or head[at] != crc or not of_this_stream:
        return None
    return (number if head[1] & 1 else number * int.from_bytes(info[2:4], "big")) + length


def check_mp4(file: BinaryIO, size: int, name: str) -> bool:
    """Whether the file has fragments. Raises "truncated" if a box ends behind it or the movie header, often the last box, is missing."""
    at, kinds = 0, []
    while at + 8 <= size:
        head = read_at(file, at, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        kinds.append(head[4:8])
        at = size if length == 0 else at + max(length, 8)
    if at > size or b"moov" not in kinds:
        raise truncated(name)
    return b"moof" in kinds


def check_matroska(file: BinaryIO, size: int, name: str) -> None:
    """Raise "truncated" if an element ends behind the file; those of unknown size, of live streams, are looked into."""
    at = 0
    while at + 2 <= size:
        head = read_at(file, at, 12)
        width = 9 - head[0].bit_length()  # of the identity, then of the size: bytes
        if width > 4 or len(head) <= width or (count := 9 - head[width].bit_length()) > 8:
            return
        length = int.from_bytes(head[width : width + count], "big") & (1 << 7 * count) - 1
        at += width + count
        if length == (1 << 7 * count) - 1:
            if int.from_bytes(head[:width], "big") not in _MASTERS:
                return
        elif (at := at + length) > size:
            raise truncated(name)


def ogg_links(file: BinaryIO, size: int, name: str) -> list[tuple[int, int]]:
    """Where the streams of an Ogg file, one after the other, begin and end (RFC 3533).

    Raises:
        AudioDecodingError: "damaged" if a page has a wrong checksum or number, "truncated" if a stream has no last page.
    """
    starts: list[int] = []
    numbers: dict[bytes, int] = {}
    unfinished: set[bytes] = set()
    before_first = False
    at = 0
    while at < size:
        head = read_at(file, at, 27 + 255)
        segments = head[27 : 27 + head[26]] if len(head) >= 27 else b""
        length = 27 + len(segments) + sum(segments)
        if head[:4] != b"OggS":
            if (head.startswith(b"TAG") and size - at == 128) or not (head.strip(b"\0") or unfinished):
                break  # ID3v1, or padding
            raise damaged(name, f"has no Ogg page at byte {at}, where one is expected")
        if len(head) < 27 or len(segments) < head[26] or at + length > size:
            raise truncated(name, "ends within an Ogg page")
        page = read_at(file, at, length)
        # Ogg's CRC-32 is zlib's with the bits of every byte in reverse, and neither start nor end inverted.
        crc = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        serial, number = page[14:18], int.from_bytes(page[18:22], "little")
        first, last = page[5] & 2, page[5] & 4
        if page[22:26].translate(_REVERSED) != crc.to_bytes(4, "big") or (not first and numbers.get(serial) != number - 1):
            raise damaged(name, f"has a damaged or a missing Ogg page at byte {at}")
        if first and not before_first:
            if unfinished:
                break
            starts.append(at)
        before_first = bool(first)
        numbers[serial] = number
        (unfinished.discard if last else unfinished.add)(serial)
        at += length
    if unfinished:
        raise truncated(name, "has an Ogg stream without its last page")
    return list(zip(starts, [*starts[1:], size]))
