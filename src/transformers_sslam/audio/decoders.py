"""Decode an open file: the decoder is chosen by the first bytes, and its result compared with the container."""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate, groupby, islice
from typing import Any, BinaryIO

import numpy as np

from ..errors import AudioDecodingError
from .containers import (
    LOST,
    Window,
    check_asf,
    check_matroska,
    check_mp4,
    damaged,
    find_data_chunk,
    is_padding,
    joined,
    occurs_again,
    ogg_links,
    read_at,
    tag_length,
    truncated,
    without_last_zeros,
)
from .flac import flac_frames, flac_seconds
from .frames import FIRST_FRAME, FrameReader


# FFmpeg's other demuxers read playlists, which open further files and addresses, pictures and text.
_DEMUXERS = "aac,ac3,aiff,amr,ape,asf,au,caf,dts,dtshd,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,mp3,ogg,tta,w64,wav,wv"
_BY_SOUNDFILE = (b"OggS", b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"fLaC", b".snd", b"caff")
_BY_MOVIES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # the first box of MP4 or QuickTime
_ONCE = (b"fLaC", b"#!AM", b"TTA1", b"MAC ")  # FLAC, AMR, TTA, APE: what they begin with stands nowhere else in them
_LARGEST_READ = 2**20  # samples of all channels decoded at a time, whatever a header claims
_FRAMES_AT_ONCE = 64  # of FFmpeg, mixed down together
_TIMED = ("mov", "ogg", "matroska", "asf")  # FFmpeg's formats whose time stamps are not counted from what is decoded
_SAMPLE_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # of FFmpeg, in NumPy


Piece = tuple[int, np.ndarray]  # rate in Hz; `(samples,)`, mono, float32


def decode_pieces(file: BinaryIO, name: str, seconds: float = 1e9) -> Iterator[Piece]:
    """Successive pieces of the sound, finite. Raises what `load_waveform` does."""
    empty = True
    for rate, mono in _pieces(file, name, seconds):
        if not np.isfinite(mono).all():
            raise AudioDecodingError("not finite", f"{name} holds NaN or infinite samples: repair it or leave it out")
        if len(mono):
            empty = False
            yield rate, mono
    if empty:
        raise AudioDecodingError("empty", f"{name} holds no samples")


def _pieces(file: BinaryIO, name: str, seconds: float) -> Iterator[Piece]:
    size = file.seek(0, io.SEEK_END)
    if size == 0:
        raise AudioDecodingError("empty", f"{name} holds no bytes")
    head, start = read_at(file, 0, 12), 0
    while head[:3] == b"ID3" and 0 < (length := tag_length(head, size - start)) < size - start:  # before a file of any format
        if FIRST_FRAME.search(read_at(file, start, min(length, 2**22))):
            raise damaged(name, "has an ID3 tag that reaches into its sound")
        start += length
        head = read_at(file, start, 12)
    if start:
        file, size = _part(file, start, size), size - start
    if head[0] == 0xFF and head[1:2] > b"\xe1" and (head[1] & 6 or head[1] & 0xF6 == 0xF0):
        yield from _by_frames(FrameReader(file, size, not head[1] & 6, name), name)
        return
    if head[:4] in _ONCE and occurs_again(file, size, head[:6], flac_frames(file, size) if head[:4] == b"fLaC" else 1):
        raise joined(name)
    by_soundfile, declared, is_exact = head[:4] in _BY_SOUNDFILE, None, True
    if head[:4] == b"OggS":
        if len(links := ogg_links(file, size, name)) > 1:  # of which libsndfile reads the first stream alone
            for start, end in links:
                yield from _decode(_part(file, start, end), end - start, name, seconds, by_soundfile)
            return
    elif head[:4] == b"fLaC":
        declared = flac_seconds(file, size, name)
    elif head[4:8] in _BY_MOVIES:
        is_exact = not check_mp4(file, size, name)
    elif head[:4] == b"\x1aE\xdf\xa3":
        check_matroska(file, size, name)
    elif head[:4] == b"\x30\x26\xb2\x75":
        size, first, is_exact = check_asf(file, size, name)
        file = _part(file, 0, size, first)
    elif head[:4] == b"#!AM":  # in which FFmpeg takes a zero for a frame; none holds 32 of them
        size = without_last_zeros(file, size, 32)
        file = _part(file, 0, size)
    elif (data := find_data_chunk(file, size, name)) is not None:
        declared = data.seconds
        if not data.size and head[:4] in (b"RF64", b"BW64"):  # without a size of 64 bits it is read as a WAV of unknown size
            file = _part(file, 0, size, b"RIFF")
        if data.size == 0:  # empty, or of a recorder that was not closed
            if data.closed:
                raise AudioDecodingError("empty", f"{name} holds no samples")
            by_soundfile = False
    yield from _decode(file, size, name, seconds, by_soundfile, declared, is_exact)


def _decode(
    file: BinaryIO, size: int, name: str, seconds: float, by_soundfile: bool, declared: float | None = None, is_exact: bool = True
) -> Iterator[Piece]:
    file.seek(0)
    if by_soundfile:
        import soundfile

        try:
            # By its descriptor: soundfile would take the suffix of a file with a name for the format.
            sound = soundfile.SoundFile(file.fileno() if isinstance(file, io.FileIO) else file, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError):
            sound = None  # such as ADPCM of a kind that only FFmpeg decodes
        # libsndfile reports 2**63 - 1 for a FLAC written to a pipe, and libmpg123 prints its warnings.
        if sound is not None and sound.frames < 2**62 and not sound.subtype.startswith("MPEG"):
            with sound:
                yield from _by_soundfile(sound, name, seconds, declared)
            return
        file.seek(0)
    yield from _by_ffmpeg(file, size, name, declared, is_exact)


def _part(file: BinaryIO, start: int, end: int, head: bytes = b"") -> BinaryIO:
    return io.BufferedReader(Window(file, start, end, head), 2**16)


def _by_soundfile(sound: Any, name: str, seconds: float, declared: float | None) -> Iterator[Piece]:
    import soundfile

    if declared is not None:
        _check_length(sound.frames / sound.samplerate, name, declared, declared)
    sound.seekable = lambda: False  # otherwise soundfile seeks after each read, which costs time
    length = max(1, min(round(min(seconds, 1e6) * sound.samplerate), _LARGEST_READ // sound.channels))
    left = sound.frames
    while left:
        try:
            samples = sound.read(min(length, left), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            detail = getattr(error, "error_string", error)
            raise damaged(name, f"cannot be decoded to its end ({detail})") from error
        if not len(samples):
            raise truncated(name)
        left -= len(samples)
        yield sound.samplerate, _mono(samples)


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of `(samples, channels)`, float32; of two channels, in an eighth of the time of a mean over so short an axis."""
    if samples.shape[1] == 2:
        return (samples[:, 0] + samples[:, 1]) / 2
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def _check_length(seconds: float, name: str, least: float, most: float, short: Callable[..., AudioDecodingError] = damaged) -> None:
    """Raise "damaged", or `short` if the sound is shorter. `least`, `most`: declared, in seconds."""
    if not least - LOST <= seconds <= most + LOST:
        error, declared = (damaged, most) if seconds > most else (short, least)
        raise error(name, f"gives {seconds:.2f} s of the {declared:.2f} s that it declares")


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading compressed audio needs PyAV: pip install "transformers-sslam[audio]"') from error
    return av


def _by_frames(reader: FrameReader, name: str) -> Iterator[Piece]:
    """Decode MPEG audio or ADTS frame by frame: FFmpeg's demuxer costs more time than its decoder and skips what is damaged."""
    av = _import_av()
    codec = av.CodecContext.create("aac" if reader.adts else "mp3float", "r")
    codec.thread_count = 1
    done = 0.0

    def frames() -> Iterator[Any]:
        nonlocal done
        for data, lengths in reader:
            for frame in _decode_run(codec, data, lengths):
                done += frame.samples / frame.sample_rate
                yield frame

    skipped, tail, tail_rate = 0, np.zeros(0, dtype=np.float32), 0
    for rate, mono in _mixed(frames()):
        if rate != tail_rate:  # of a file joined to another
            yield tail_rate, tail
            tail, tail_rate = tail[:0], rate
        skip = min(max(0, reader.trim[0] - skipped), len(mono))
        skipped, mono = skipped + skip, mono[skip:]
        from_tail = max(0, min(len(tail), len(tail) + len(mono) - reader.trim[1]))
        from_mono = max(0, len(mono) - reader.trim[1])
        yield rate, tail[:from_tail]
        yield rate, mono[:from_mono]
        tail = np.concatenate((tail[from_tail:], mono[from_mono:]))
    _check_length(done, name, reader.seconds, reader.seconds)


def _decode_run(codec: Any, data: bytes, lengths: list[int]) -> list[Any]:
    """The frames that FFmpeg decodes: what is missing is noticed by the length."""
    import av

    with suppress(av.FFmpegError, ValueError):
        return codec.decode(av.Packet(data))
    codec.flush_buffers()
    frames = []
    for end, length in zip(accumulate(lengths), lengths):
        with suppress(av.FFmpegError, ValueError):
            frames += codec.decode(av.Packet(data[end - length : end]))
    return frames


def _reason(error: Exception) -> str:
    """What FFmpeg says, without numbers and names of its own."""
    return getattr(error, "strerror", None) or str(error)


def _by_ffmpeg(file: BinaryIO, size: int, name: str, declared: float | None = None, is_exact: bool = True) -> Iterator[Piece]:
    """Decode one stream and compare its length with its time stamps and its container.

    `declared`: seconds, if known. `is_exact`: whether the duration in the header of an MP4 or ASF is that of the whole file.
    """
    av = _import_av()
    from av.stream import Disposition

    try:
        container = av.open(file, "r", metadata_errors="ignore", options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError) as error:
        raise AudioDecodingError("unreadable", f"{name} cannot be read as audio ({_reason(error)})") from error
    with container:
        stream = next((stream for stream in container.streams.audio if stream.codec_context is not None), None)
        if stream is None:
            raise AudioDecodingError("unreadable", f"{name} has no audio stream that FFmpeg decodes")
        form = container.format.name.split(",")[0]
        if form in ("mp3", "aac"):
            yield from _by_frames(FrameReader(file, size, form == "aac", name), name)
            return
        stream.codec_context.thread_count = 1
        at_least = declared
        if form in ("mov", "ogg", "ape", "tta", "wv") and stream.duration and stream.time_base:
            at_least = float(stream.duration * stream.time_base)
        # The container's duration is that of its longest stream; a cover is none.
        others = [other for other in container.streams if other is not stream and not other.disposition & Disposition.attached_pic]
        if form in ("mov", "matroska", "asf") and container.duration and not others and (form != "asf" or is_exact):
            begin = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
            whole = container.duration / av.time_base
            at_least = max(at_least or 0.0, whole - max(0.0, begin))  # silence before the first frame may count, or not
            declared = whole if form == "mov" and is_exact else declared
        # Seconds; bytes of packets that could be decoded, that could not, and of these since the last frame; the last packet's end.
        done, read, lost, last_lost, end = 0.0, 0, 0, 0, 0
        start: float | None = None

        def frames() -> Iterator[Any]:
            nonlocal done, read, lost, last_lost, end, start
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except (av.FFmpegError, ValueError) as error:
                    raise damaged(name, f"cannot be read to its end ({_reason(error)})") from error
                end = end if packet.pos is None else packet.pos + packet.size
                try:
                    decoded = packet.decode()
                    read += packet.size
                except (av.FFmpegError, ValueError):
                    lost += packet.size
                    last_lost += packet.size
                    continue
                for frame in decoded:
                    last_lost = 0
                    if frame.pts is not None and form in _TIMED:
                        at = float(frame.pts * frame.time_base)
                        start = at if start is None else start
                        if abs(gap := at - start - done) > LOST:
                            raise damaged(name, f"has a gap or a repeat of {abs(gap):.2f} s at {done:.2f} s")
                    done += frame.samples / frame.sample_rate
                    yield frame

        yield from _mixed(frames())
        if form == "tta" and not is_padding(file, end, size):
            raise damaged(name, f"has {size - end} bytes behind the sound that its header declares")
        _check_length(done, name, at_least or 0.0, math.inf if declared is None else declared, damaged if lost else truncated)
        lost = last_lost if form in _TIMED else lost  # gaps between time stamps are found above
        if declared is None and done * lost > LOST * read:  # such as AC3, whose frames are nowhere counted
            raise damaged(name, f"has about {done * lost / max(read, 1):.2f} s that cannot be decoded")


def _mixed(frames: Iterable[Any]) -> Iterator[Piece]:
    """Frames of FFmpeg mixed down, some at a time: one costs as much as many."""
    for (rate, kind, channels), group in groupby(frames, lambda frame: (frame.sample_rate, frame.format.name, frame.layout.nb_channels)):
        is_planar, dtype = kind.endswith("p"), np.dtype(_SAMPLE_TYPES[kind.removesuffix("p")])
        while held := list(islice(group, _FRAMES_AT_ONCE)):
            planes = [frame.planes for frame in held]
            counts = [frame.samples if is_planar else frame.samples * channels for frame in held]
            parts = [
                np.concatenate([np.frombuffer(plane[i], dtype, count) for plane, count in zip(planes, counts)])
                for i in range(len(planes[0]))
            ]
            samples = np.stack(parts).T if len(parts) > 1 else parts[0].reshape(-1, channels)
            if dtype.kind != "f":
                scale = 2.0 ** (8 * dtype.itemsize - 1)
                samples = (samples - (scale if dtype.kind == "u" else 0.0)) / scale
            yield rate, _mono(samples.astype(np.float32, copy=False))
