"""One audio file, or its bytes, to a mono waveform at the model's sampling rate, whole or in blocks."""

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, groupby
from math import gcd
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import AudioDecodingError
from ..feature_extraction_sslam import LARGEST_PLAUSIBLE_AMPLITUDE
from .containers import LOST, Window, check_matroska, find_data_chunk, flac_seconds, mp4_seconds, ogg_links, truncated
from .frames import tag_length, walk_frames
from .paths import decode_path


# fmt: off
AUDIO_SUFFIXES = (
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".bwf",
    ".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm", ".weba", ".mka", ".amr", ".3gp", ".ape", ".wv", ".ac3", ".eac3", ".dts", ".mp2",
    ".tta", ".spx",
)
# fmt: on
# FFmpeg's other demuxers read playlists, which open further files and addresses, pictures and text.
_DEMUXERS = "aac,ac3,aiff,amr,ape,asf,au,caf,dts,dtshd,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,mp3,ogg,tta,w64,wav,wv"
_BY_SOUNDFILE = (b"OggS", b"RIFF", b"RF64", b"riff", b"FORM", b"fLaC", b".snd", b"caff")
_LOWEST_RATE = 1000  # Hz; under it a header is damaged, or what it describes is not sound
_LARGEST_FILTER = 2**25  # numbers; 44.1 to 16 kHz takes 2**16, 44,099 to 16,000 Hz would take 2**29, and several times that to compute
_LARGEST_READ = 2**20  # numbers decoded at a time, whatever a header claims
_FRAMES_AT_ONCE = 64  # of FFmpeg, mixed down together, for each costs as much as its samples
_TIMED = ("mov", "ogg", "matroska", "asf")  # FFmpeg's formats with time stamps that are not counted from what is decoded
_FULL_SCALE = {"u1": 2**7, "i2": 2**15, "i4": 2**31, "i8": 2**63}
Source = str | Path | bytes | dict


def check_scale(waveform: np.ndarray, name: str) -> None:
    """Raise an `AudioDecodingError` that names the clip if samples were never scaled to [-1, 1]."""
    if (peak := np.abs(waveform).max()) > LARGEST_PLAUSIBLE_AMPLITUDE:
        raise AudioDecodingError(
            "out of scale", f"{name} has a peak of {peak:g}, but samples lie in [-1, 1]: divide integers by their full scale"
        )


def load_waveform(source: Source, sampling_rate: int = 16_000) -> np.ndarray:
    """Decode (soundfile for WAV, FLAC and their like, FFmpeg by PyAV for the rest), mix down to mono, resample with torchaudio.

    Args:
        source: a path, a URL that fsspec opens ("hf://...", "s3://..."), the bytes of a file, or what `datasets` gives for an
            `Audio(decode=False)` column: `{"path": ..., "bytes": ...}`.
        sampling_rate: in Hz, of the result.

    Returns:
        `(samples,)`, float32. Full scale is 1; resampling may overshoot it a little.

    Raises:
        AudioDecodingError: (a `ValueError`) if the file is missing, empty, not readable as audio, cut off before its end, damaged, holds
            NaN or infinity, or has a rate from which nothing can be resampled. The message names the file.
        ImportError: if soundfile, PyAV or torchaudio is not installed, naming the extra that brings them.
    """
    parts = []
    with _opened(source) as file:
        for native_rate, pieces in groupby(_decoded(file, source), key=itemgetter(0)):
            _check_rate(native_rate, sampling_rate, source)
            mono = np.concatenate([piece for _, piece in pieces])
            parts.append(mono if native_rate == sampling_rate else _resample(_resampler(native_rate, sampling_rate), mono))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_blocks(source: Source, sampling_rate: int = 16_000, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """What `load_waveform` gives, in successive blocks, so that memory holds about one of them however long the recording is.

    Their concatenation equals the whole waveform, exactly, or, where it is resampled, up to rounding (1e-6). A file on a disk is
    read block after block; the bytes of what lies behind a URL are held.

    Args:
        source: as `load_waveform` takes it.
        sampling_rate: in Hz, of the result.
        seconds: length of a block, about; the last one is shorter.

    Yields:
        `(samples,)`, float32, never empty.

    Raises:
        ValueError: if `seconds` is not positive.
        AudioDecodingError: as `load_waveform`. What only decoding can tell (NaN, some ends that are missing) is told where it is met,
            after the blocks before it.
    """
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, but a block must have some length: give a positive number")
    with _opened(source) as file:
        for native_rate, pieces in groupby(_decoded(file, source, seconds), key=itemgetter(0)):
            _check_rate(native_rate, sampling_rate, source)
            blocks = _blocks((piece for _, piece in pieces), max(1, round(seconds * native_rate)))
            yield from blocks if native_rate == sampling_rate else _resampled(blocks, native_rate, sampling_rate)


def _blocks(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same samples, `length` at a time."""
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        while count + len(piece) >= length:
            head, piece = piece[: length - count], piece[length - count :]
            yield np.concatenate([*held, head])
            held, count = [], 0
        if len(piece):
            held.append(piece)
            count += len(piece)
    if held:
        yield np.concatenate(held)


def _decoded(file: BinaryIO, source: Source, seconds: float = 1e9) -> Iterator[tuple[int, np.ndarray]]:
    """Successive pieces of all the sound in a file, `(rate in Hz, (samples,))`, finite, and the errors of what is missing."""
    empty = True
    for rate, mono in _pieces(file, source, seconds):
        if not np.isfinite(mono).all():
            raise AudioDecodingError("not finite", f"{_name(source)} holds NaN or infinite samples: repair it or leave it out")
        if len(mono):
            empty = False
            yield rate, mono
    if empty:
        raise AudioDecodingError("empty", f"{_name(source)} holds no samples")


def _pieces(file: BinaryIO, source: Source, seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    name, size = _name(source), file.seek(0, io.SEEK_END)
    if size == 0:
        raise AudioDecodingError("empty", f"{name} holds no bytes")
    file.seek(0)
    kind = file.read(12)
    if kind[:3] == b"ID3" and 0 < (length := tag_length(kind, size)) < size:  # before a file of any format
        yield from _pieces(io.BufferedReader(Window(file, length, size), 2**16), source, seconds)
        return
    by_soundfile, declared, walked = kind[:4] in _BY_SOUNDFILE, None, False
    if (data := find_data_chunk(file, size, name)) is not None:
        declared = data.seconds
        if data.size == 0:  # nothing, or of a recorder that was not closed
            if data.closed:
                raise AudioDecodingError("empty", f"{name} holds no samples")
            by_soundfile = False
    elif kind[:4] == b"OggS" and len(links := ogg_links(file, size, name)) > 1:  # a chain, of which libsndfile reads the first stream alone
        for start, end in links:
            yield from _by_ffmpeg(io.BufferedReader(Window(file, start, end), 2**16), source)
        return
    elif kind[:4] == b"fLaC":
        declared = flac_seconds(file, size, name)
    elif kind[4:8] == b"ftyp":
        declared = mp4_seconds(file, size, name)
    elif kind[:4] == b"\x1aE\xdf\xa3":
        check_matroska(file, size, name)
    elif kind[0] == 0xFF and kind[1:2] > b"\xe1" and kind[1] & 6:
        walked, declared = True, walk_frames(file, size, False, name) or None
    file.seek(0)
    if by_soundfile:
        import soundfile

        try:
            # By its descriptor: of a file with a name, soundfile would take the suffix for the format.
            sound = soundfile.SoundFile(file.fileno() if isinstance(file, io.FileIO) else file, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError):
            sound = None  # such as ADPCM of a kind that only FFmpeg decodes
        # What libsndfile says of a FLAC written to a pipe is 2**63 - 1; and libmpg123 prints its warnings.
        if sound is not None and sound.frames < 2**62 and not sound.subtype.startswith("MPEG"):
            with sound:
                yield from _by_soundfile(sound, source, seconds, declared)
            return
        file.seek(0)
    yield from _by_ffmpeg(file, source, None if walked else size, declared)


def _by_soundfile(sound: Any, source: Source, seconds: float, declared: float | None) -> Iterator[tuple[int, np.ndarray]]:
    import soundfile

    _check_length(sound.frames / sound.samplerate, declared, _name(source))
    # Otherwise soundfile seeks after each read, which costs time and, in MP3, the state of the decoder.
    sound.seekable = lambda: False
    length = max(1, min(round(min(seconds, 1e6) * sound.samplerate), _LARGEST_READ // sound.channels))
    left = sound.frames
    while left:
        try:
            samples = sound.read(min(length, left), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            detail = getattr(error, "error_string", error)
            raise AudioDecodingError("damaged", f"{_name(source)} cannot be decoded to its end ({detail})") from error
        if not len(samples):
            raise truncated(_name(source))
        left -= len(samples)
        if sound.channels == 2:  # an eighth of the time of a mean over so short an axis
            yield sound.samplerate, (samples[:, 0] + samples[:, 1]) / 2
        else:
            yield sound.samplerate, samples[:, 0] if sound.channels == 1 else samples.mean(axis=1, dtype=np.float32)


def _check_length(seconds: float, declared: float | None, name: str, damaged: bool = True) -> None:
    if declared is not None and abs(declared - seconds) > LOST:
        cause = "damaged" if damaged or seconds > declared else "truncated"
        raise AudioDecodingError(cause, f"{name} gives {seconds:.2f} s of the {declared:.2f} s that it declares: copy it again")


def _by_ffmpeg(file: BinaryIO, source: Source, size: int | None = None, declared: float | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Decode one stream to its end and compare its length with what its time stamps and its container tell.

    `size` in bytes, if frames of MP3 or ADTS are still to be counted should FFmpeg find such.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('reading compressed audio needs PyAV: pip install "transformers-sslam[audio]"') from error
    name = _name(source)
    try:
        container = av.open(file, "r", metadata_errors="ignore", options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError) as error:
        raise AudioDecodingError("unreadable", f"{name} cannot be read as audio ({error.__class__.__name__})") from error
    with container:
        stream = next((stream for stream in container.streams.audio if stream.codec_context is not None), None)
        if stream is None:
            raise AudioDecodingError("unreadable", f"{name} has no audio stream that FFmpeg decodes")
        stream.codec_context.thread_count = 1
        form = container.format.name.split(",")[0]
        at_least = None
        if form in ("mov", "ogg", "ape", "tta", "wv") and stream.duration and stream.time_base:
            at_least = float(stream.duration * stream.time_base)
        elif form in ("matroska", "asf") and container.duration and not container.streams.video:
            at_least = container.duration / av.time_base
        elif form in ("mp3", "aac") and size:
            place = file.tell()
            declared = walk_frames(file, size, form == "aac", name) or None
            file.seek(place)
        done, read, lost = 0.0, 0, 0  # seconds; bytes of packets that could be decoded, and that could not
        start: float | None = None
        held: list[Any] = []

        def frames() -> Iterator[Any]:
            nonlocal read, lost
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except (av.FFmpegError, ValueError) as error:
                    raise AudioDecodingError("damaged", f"{name} cannot be read to its end ({error.__class__.__name__})") from error
                try:
                    yield from packet.decode()
                    read += packet.size
                except (av.FFmpegError, ValueError):
                    lost += packet.size

        def key(frame: Any) -> tuple[int, str, int]:
            return frame.sample_rate, frame.format.name, len(frame.layout.channels)

        for frame in chain(frames(), [None]):
            if held and (frame is None or len(held) == _FRAMES_AT_ONCE or key(frame) != key(held[0])):
                yield held[0].sample_rate, _mix_down(held)
                held = []
            if frame is None:
                break
            if frame.pts is not None and form in _TIMED:
                at = float(frame.pts * frame.time_base)
                start = at if start is None else start
                if abs(at - start - done) > LOST:
                    raise AudioDecodingError("damaged", f"{name} has a gap or a repeat of {abs(at - start - done):.2f} s at {done:.2f} s")
            done += frame.samples / frame.sample_rate
            held.append(frame)
        _check_length(done, declared, name, damaged=lost > 0)
        _check_length(done, None if at_least is None else max(done, at_least), name, damaged=lost > 0)
        if form not in _TIMED and declared is None and done * lost > LOST * read:  # such as AC3, whose frames are nowhere counted
            raise AudioDecodingError(
                "damaged", f"{name} has about {done * lost / max(read, 1):.2f} s that cannot be decoded: copy it again"
            )


def _mix_down(frames: list[Any]) -> np.ndarray:
    """Frames of one format, `(samples,)`, float32."""
    channels = len(frames[0].layout.channels)
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)  # (channels, samples), or (1, samples * channels)
    if not frames[0].format.is_planar:
        samples = samples.reshape(-1, channels).T
    if (scale := _FULL_SCALE.get(samples.dtype.str[1:])) is not None:
        samples = (samples.astype(np.float64) - (scale if samples.dtype == np.uint8 else 0)) / scale
    return samples.astype(np.float32, copy=False).mean(axis=0, dtype=np.float32)


def _resample(resampler: torch.nn.Module, samples: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return resampler(torch.from_numpy(samples)).numpy()


def _resampled(blocks: Iterable[np.ndarray], native_rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """What resampling the concatenation of all blocks gives.

    `old` samples become `new` ones, the rates' ratio in lowest terms, and the filter that makes them reads `width` samples on either
    side; so whole groups of `old` samples are resampled with as many groups around them as the filter reads, and these are cut off again.
    """
    resampler = _resampler(native_rate, sampling_rate)
    old, new = (rate // gcd(native_rate, sampling_rate) for rate in (native_rate, sampling_rate))
    around = -(-int(resampler.width) // old)  # type: ignore[arg-type]  # a number, not a module
    before = 0  # groups held that have been given out already
    held = np.zeros(0, dtype=np.float32)

    for block in blocks:
        held = np.concatenate((held, block))
        groups = len(held) // old - before - around
        if groups > 0:
            yield _resample(resampler, held[: (before + groups + around) * old])[before * new : (before + groups) * new]
            kept = max(0, before + groups - around)
            before, held = before + groups - kept, held[kept * old :]
    if len(rest := _resample(resampler, held)[before * new :]):
        yield rest


class _Bytes(io.BytesIO):
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """A damaged header may ask for a place before the first byte; an error would be printed by soundfile, not raised."""
        return super().seek(max(0, offset) if whence == io.SEEK_SET else offset, whence)


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """A file on a disk as it lies there, anything else as its bytes in memory."""
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise AudioDecodingError("missing", f"an audio entry has neither bytes nor a path (its keys: {sorted(source)})")
        place = source["bytes"] if source.get("bytes") is not None else decode_path(str(source["path"]))
    else:
        place = source
    if isinstance(place, bytes):
        yield _Bytes(place)
        return
    with _errors_as_causes(place):
        if "://" in str(place):
            import fsspec  # comes with torch

            with fsspec.open(str(place), "rb") as remote:
                file: BinaryIO = _Bytes(remote.read())
        else:
            # What is not a regular file may block whoever opens or reads it.
            if not stat.S_ISREG(os.stat(place).st_mode):
                raise AudioDecodingError("unreadable", f"{_name(place)} is not a regular file")
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = open(place, "rb", buffering=0, opener=lambda path, _: os.open(path, flags))  # type: ignore[assignment]  # noqa: SIM115
    with file:
        yield file


@contextmanager
def _errors_as_causes(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioDecodingError("missing", f"{_name(source)} is not there") from error
    except OSError as error:
        if "://" in str(source):
            raise  # a network that fails is no fault of the clip: it stops the run, which can be resumed
        raise AudioDecodingError("unreadable", f"{_name(source)} cannot be read ({error.strerror})") from error


def _name(source: Source) -> str:
    """For messages; bytes of a file name that are not UTF-8 are escaped, so that it can be printed anywhere."""
    if isinstance(source, bytes):
        return f"a file of {len(source)} bytes"
    name = (source.get("path") or "an audio entry without a path") if isinstance(source, dict) else source
    return str(name).encode("utf-8", "backslashreplace").decode()


def _check_rate(native_rate: int, sampling_rate: int, source: Source) -> None:
    """Reject rates whose ratio takes a filter that fills the memory, and those that sound does not have."""
    divisor = gcd(native_rate, sampling_rate)
    if native_rate < _LOWEST_RATE or native_rate // divisor * (sampling_rate // divisor) > _LARGEST_FILTER:
        raise AudioDecodingError(
            "unreadable", f"{_name(source)} has {native_rate} Hz, from which {sampling_rate} Hz cannot be made here: resample it before"
        )


@lru_cache
def _resampler(native_rate: int, sampling_rate: int) -> torch.nn.Module:
    """Kept, because building its filter takes longer than using it."""
    try:
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:
        raise ImportError(
            f"resampling {native_rate} Hz to {sampling_rate} Hz needs torchaudio, in the pair of versions of the audio extra: "
            'pip install "transformers-sslam[audio]"'
        ) from error
    with torch.inference_mode(False):
        return Resample(native_rate, sampling_rate)
