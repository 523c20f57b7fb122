"""The length of the sound as container formats tell it, by which a decoder's result is known to be the whole file."""

import io
import struct
import zlib
from typing import BinaryIO, Literal, NamedTuple

from ..errors import AudioDecodingError


LOST = 0.1  # seconds that may be missing, or too many
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PCM_TAGS = (1, 3, 6, 7, 0xFE)  # low bytes of a WAV's format tag: PCM, float, A-law, mu-law, extensible
_COMMON_RATES = {8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000}
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675  # of Matroska
_BESIDE_SEGMENT = (_SEGMENT, 0x1A45DFA3, 0xEC, 0xBF)  # another one, the header of another file, padding, a checksum
_ASF_DATA, _ASF_PROPERTIES = bytes.fromhex("3626b2758e66cf11"), bytes.fromhex("a1dcab8c47a9cf11")
_BESIDE_SOUND = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"cart", b"axml")  # chunks of WAV, some of mistaken sizes
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample, by the encoding
_AIFC_BYTES = {b"fl32": 4, b"fl64": 8, b"in24": 3, b"in32": 4, b"alaw": 1, b"ulaw": 1}  # of a sample; others by the header
_LEAST_RATE = 1000  # bytes a second, where the header of compressed sound does not tell
_FILES = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"riff", b"caff", b"wvpk")  # how files begin, and chunks do not


class Window(io.RawIOBase):
    """Bytes `start` to `end` of a file, as a file. `head` is read in place of its first bytes."""

    def __init__(self, file: BinaryIO, start: int, end: int, head: bytes = b""):
        self._file, self._start, self._size, self._head, self._at = file, start, end - start, head, 0

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
        data = self._head[self._at :][: len(data)] + data[max(0, len(self._head) - self._at) :]
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
            follows them, if there are several such chunks, or if the header contradicts itself.
    """
    head = read_at(file, 0, 40)
    kind = head[:4]
    order: Literal["little", "big"] = "little"
    found: DataChunk | None = None
    long, rate, seconds = 0, 0.0, None  # `rate` in bytes a second
    at = width = count = align = own = 0
    if kind == b".snd" and len(head) >= 24:
        start, length, encoding, hertz, channels = struct.unpack(">5I", head[4:24])
        found, rate = DataChunk(start, _known(length), None, False), hertz * channels * _AU_BYTES.get(encoding, 0)
        at = size if found.size is None else start + length
    elif kind == b"riff" and head[24:28] == b"wave":
        at, width, count, align, own = 40, 16, 8, 8, 24
    elif kind in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        at, width, count, align, own, order = 12, 4, 4, 2, 0, "big" if kind == b"RIFX" else "little"
    elif kind == b"FORM" and head[8:11] == b"AIF":
        at, width, count, align, own, order = 12, 4, 4, 2, 0, "big"
    elif kind == b"caff":
        at, width, count, align, own, order = 8, 4, 8, 1, 0, "big"
    else:
        return None
    while kind != b".snd" and at + width + count <= size:
        chunk = read_at(file, at, width + count + 24)
        identity, body, start = chunk[:4], chunk[width + count :], at + width + count
        length = int.from_bytes(chunk[width : width + count], order) - own
        is_chunk = all(32 <= byte < 127 for byte in identity) and identity not in _FILES and start + length <= size
        if found is not None and not is_chunk and identity not in _BESIDE_SOUND:
            break  # more sound, or another file
        if identity == b"ds64":  # of RF64: the size in 64 bits
            long = int.from_bytes(body[8:16], "little")
        elif identity == b"fmt " and len(body) >= 16:
            tag, channels, sampling_rate, rate, frame, bits = struct.unpack("<>"[order == "big"] + "HHIIHH", body[:16])
            # Some programs write a wrong byte rate. But if it belongs to another common sampling rate, either may be damaged.
            if tag & 255 in _PCM_TAGS and rate != sampling_rate * frame:
                is_common = sampling_rate in _COMMON_RATES and rate not in {common * frame for common in _COMMON_RATES}
                if not is_common or frame != channels * bits / 8:
                    raise damaged(name, "has a header whose rates contradict each other")
                rate = sampling_rate * frame
        elif identity == b"COMM" and len(body) >= 18:
            coding = b"NONE" if head[8:12] == b"AIFF" else body[18:22]
            sample = _AIFC_BYTES.get(coding.lower(), -(-int.from_bytes(body[6:8], "big") // 8))
            exponent = int.from_bytes(body[8:10], "big") & 0x7FFF  # of an 80-bit float
            hertz = int.from_bytes(body[10:18], "big") * 2.0 ** (min(exponent, 16_500) - 16_446)
            if hertz and (coding in (b"NONE", b"twos", b"sowt", b"raw ") or coding.lower() in _AIFC_BYTES):
                rate, seconds = hertz * int.from_bytes(body[:2], "big") * sample, int.from_bytes(body[2:6], "big") / hertz or None
        elif identity == b"desc" and len(body) >= 24:  # of CAF
            hertz, packet, frames = struct.unpack(">d8xII", body[:24])
            rate = hertz * packet / frames if frames else 0.0
        elif identity in (b"data", b"SSND"):
            if found is not None:
                raise damaged(name, "has more than one chunk of sound")
            length = long if length == 2**32 - 1 and long else length
            known = None if length >= 2**62 else length if count == 8 or length == long else _known(length)
            found = DataChunk(start, known, None, False)
            if known is None:
                at = size
                break
        at = start + max(0, length) + -length % align
        if align == 2 and length % 2 and at <= size and read_at(file, at - 1, 1) > b"\0":
            at -= 1  # some writers leave the padding out
    if found is None:
        return None
    if found.size and (size - at) / (rate or _LEAST_RATE) > LOST and not is_padding(file, at, size):
        if read_at(file, at, 4) in (kind, *_FILES):
            raise joined(name)
        raise damaged(name, f"has {size - at} bytes behind the sound that its header declares")
    if seconds is None and rate:
        seconds = (found.size or size - found.start) / rate
    if found.size is not None and found.start + found.size > size:
        raise truncated(name)
    return found._replace(seconds=seconds, closed=at >= size)


def is_padding(file: BinaryIO, at: int, size: int) -> bool:
    """Whether only tags and zeros lie from here to the end."""
    while tag := tag_length(read_at(file, at, 44), size - at):
        at += tag
    size = without_last_tags(file, size)
    while at < size:
        if read_at(file, at, min(2**18, size - at)).strip(b"\0"):
            return False
        at += 2**18
    return True


def without_last_tags(file: BinaryIO, size: int) -> int:
    """The size of the file without the ID3v1 and the APE tag at its end."""
    if read_at(file, max(0, size - 128), 3) == b"TAG":
        size -= 128
    foot = read_at(file, max(0, size - 32), 32)
    if foot[:8] == b"APETAGEX" and len(foot) == 32:
        size -= int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 0x80 else 0)
    return size


def tag_length(head: bytes, left: int) -> int:
    """Bytes of the ID3, APE or Lyrics3 tag that starts with `head`, of `left` ones; 0 if it is not a tag."""
    if head[:3] == b"ID3" and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
        return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + 10 * (head[5] >> 4 & 1)
    if head[:3] == b"TAG" and left >= 128:
        return 128
    if head[:8] == b"APETAGEX" and len(head) >= 32:
        return 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0)  # a header, or only the footer
    return left if head[:11] == b"LYRICSBEGIN" else 0


def occurs_again(file: BinaryIO, size: int, first: bytes, at: int = 1) -> bool:
    """Whether the first bytes of a file stand at another place in it, too, from `at` on."""
    found = -1
    while at < size and found < 0:
        found = read_at(file, at, 2**20 + len(first)).find(first)
        at += 2**20
    return found >= 0


def _known(size: int) -> int | None:
    """A header written to a pipe holds the largest number instead of its size: FFmpeg 2**32 - 1, SoX almost 2**31."""
    return None if 2**31 - 4096 <= size < 2**31 or size >= 2**32 - 4096 else size


def truncated(name: str, problem: str = "ends before its header says") -> AudioDecodingError:
    return AudioDecodingError("truncated", f"{name} {problem}: copy or download it again")


def damaged(name: str, problem: str) -> AudioDecodingError:
    return AudioDecodingError("damaged", f"{name} {problem}: copy or download it again")


def joined(name: str) -> AudioDecodingError:
    return AudioDecodingError("damaged", f"{name} is made of files joined together, of which the first alone would be read: split it")


def read_at(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    return file.read(length)


def without_last_zeros(file: BinaryIO, size: int, kept: int) -> int:
    """The size of the file without the zeros at its end, but for `kept` of them."""
    end = size
    while end > 0:
        block = read_at(file, start := max(0, end - 2**18), end - start)
        if held := len(block.rstrip(b"\0")):
            return min(size, start + held + kept)
        end = start
    return size


def check_mp4(file: BinaryIO, size: int, name: str) -> bool:
    """Whether the file has fragments.

    Raises:
        AudioDecodingError: "truncated" if a box ends behind the file or the movie header, often the last box, is missing; "damaged" if
            there are several, of which FFmpeg reads the first.
    """
    at, length, headers = 0, 0, b""  # "moov" of movies, and "moof" of fragments
    while at + 8 <= size:
        head = read_at(file, at, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if at + length > size and is_padding(file, at, size):
            break
        headers += head[4:8] if head[4:7] == b"moo" else b""
        at = size if length == 0 else at + max(length, 8)
    if at > size or b"moov" not in headers:
        raise truncated(name)
    # A box of length 0 reaches to the end, over what is joined to it.
    if headers.count(b"moov") > 1 or (length == 0 and occurs_again(file, size, read_at(file, 0, 12))):
        raise joined(name)
    return b"moof" in headers


def check_asf(file: BinaryIO, size: int, name: str) -> tuple[int, bytes, bool]:
    """The size without tags behind the last object; the first bytes of the file with that size in them, and whether it is not live.

    The header holds the size too, which taggers leave as it was. Where they differ FFmpeg does not believe the header's duration.

    Raises:
        AudioDecodingError: "truncated" if an object ends behind the file, "damaged" if another file follows.
    """
    at, kind = 0, read_at(file, 0, 16)
    while at + 24 <= size:
        head = read_at(file, at, 24)
        if at and head[:16] == kind:
            raise joined(name)
        length = int.from_bytes(head[16:], "little")
        if head[:8] == _ASF_DATA and not 50 < length < 2**63:  # of a live stream, or written to a pipe
            return size, b"", False
        if not 24 <= length <= size - at:
            if not is_padding(file, at, size):
                raise truncated(name)
            size = at
        at += length
    at, end = 30, int.from_bytes(read_at(file, 16, 8), "little")
    while at < end and (head := read_at(file, at, 24))[:8] != _ASF_PROPERTIES:
        at += max(24, int.from_bytes(head[16:], "little"))
    return size, read_at(file, 0, at + 40) + size.to_bytes(8, "little") if at < end else b"", True


def check_matroska(file: BinaryIO, size: int, name: str) -> None:
    """Raise "truncated" if an element ends behind the file, "damaged" if something else follows.

    Elements of unknown size, of live streams, are looked into.
    """
    at, beside = 0, False  # behind a segment of known size
    while at + 2 <= size:
        head = read_at(file, at, 12)
        width = 9 - head[0].bit_length()  # of the identity, then of the size: bytes
        identity = int.from_bytes(head[:width], "big")
        if beside and identity not in _BESIDE_SEGMENT:
            if not is_padding(file, at, size):
                raise damaged(name, f"has {size - at} bytes behind its sound")
            return
        if width > 4 or len(head) <= width or (count := 9 - head[width].bit_length()) > 8:
            return
        length = int.from_bytes(head[width : width + count], "big") & (1 << 7 * count) - 1
        at += width + count
        if length == (1 << 7 * count) - 1:
            if identity not in (_SEGMENT, _CLUSTER):
                return
        elif (at := at + length) > size:
            raise truncated(name)
        else:
            beside = beside or identity == _SEGMENT


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
