"""One audio file, or its bytes, to a mono waveform at the rate that the model hears, whole or in blocks."""

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import AudioDecodingError
from ..feature_extraction_sslam import LARGEST_PLAUSIBLE_AMPLITUDE


if TYPE_CHECKING:
    from soundfile import SoundFile

# libsndfile tells in its log when a file ends before its header says: WAV and CAF ("data"), AIFF ("SSND"), AU, W64, RF64.
_LENGTH_IN_LOG = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# A header written to a pipe cannot know its length and holds the largest number instead: FFmpeg writes 2**32 - 1, SoX almost 2**31.
_LENGTH_UNKNOWN = 2**31 - 4096
_FRAMES_UNKNOWN = 2**62  # of a FLAC written to a pipe libsndfile says 2**63 - 1, and then cannot find its way in it
_LOWEST_RATE = 1000  # Hz; under it a header is damaged, or what it describes no sound
_LARGEST_FILTER = 2**25  # numbers; 44.1 to 16 kHz takes 2**16, 44,099 to 16,000 Hz would take 2**29, and several times that to compute
_LONGEST_OGG_PAGE = 27 + 255 + 255 * 255  # bytes: header, table of segments, segments


def check_scale(waveform: np.ndarray, name: str) -> None:
    """Raise an `AudioDecodingError` that names the clip if samples were never scaled to [-1, 1]."""
    if (peak := np.abs(waveform).max()) > LARGEST_PLAUSIBLE_AMPLITUDE:
        raise AudioDecodingError(
            "out of scale", f"{name} has a peak of {peak:g}, but samples lie in [-1, 1]: divide integers by their full scale"
        )


def load_waveform(source: str | Path | bytes | dict, sampling_rate: int = 16_000) -> np.ndarray:
    """Decode with soundfile (WAV, FLAC, MP3, Ogg Vorbis, Opus), mix down to mono, resample with torchaudio.

    Args:
        source: a path, a URL that fsspec opens ("hf://...", "s3://..."), the bytes of a file, or what `datasets` gives for an
            `Audio(decode=False)` column: `{"path": ..., "bytes": ...}`.
        sampling_rate: in Hz, of the result.

    Returns:
        `(samples,)`, float32. Full scale is 1; resampling may overshoot it a little.

    Raises:
        AudioDecodingError: (a `ValueError`) if the file is missing, empty, not readable as audio, cut off before its end, holds NaN or
            infinity, or has a rate from which nothing can be resampled. The message names the file.
        ImportError: if soundfile or torchaudio is not installed, naming the extra that brings them.
    """
    with _opened(source) as file:
        native_rate = file.samplerate
        _check_rate(native_rate, sampling_rate, source)
        mono = next(_mono_blocks(file, source, file.frames))
    if native_rate == sampling_rate:
        return mono
    with torch.inference_mode():
        return _resampler(native_rate, sampling_rate)(torch.from_numpy(mono)).numpy()


def read_blocks(source: str | Path | bytes | dict, sampling_rate: int = 16_000, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """What `load_waveform` gives, in successive blocks, so that memory holds about one of them however long the recording is.

    Their concatenation equals the whole waveform, exactly, or, where it is resampled or MP3, up to rounding (1e-6). A file on a disk is
    read as it goes on; the bytes of what lies behind a URL are held.

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
        _check_rate(file.samplerate, sampling_rate, source)
        blocks = _mono_blocks(file, source, max(1, round(seconds * file.samplerate)))
        yield from blocks if file.samplerate == sampling_rate else _resampled(blocks, file.samplerate, sampling_rate)


@contextmanager
def _opened(source: str | Path | bytes | dict) -> Iterator["SoundFile"]:
    """The file, open and known to hold samples and, as far as can be told without decoding it, its end."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError('reading audio files needs soundfile: pip install "transformers-sslam[audio]"') from error
    with _open_bytes(source) as data:
        size = data.seek(0, io.SEEK_END)
        if size == 0:
            raise AudioDecodingError("empty", f"{_name(source)} holds no bytes")
        data.seek(max(0, size - _LONGEST_OGG_PAGE))
        tail = data.read()
        data.seek(0)
        with _errors_as_unreadable(source):
            # By its descriptor: of a file with a name, soundfile would take the suffix for the format.
            file = soundfile.SoundFile(data if isinstance(data, io.BytesIO) else data.fileno(), closefd=False)
        with file:
            if _ends_early(file, tail):
                raise _truncated(source)
            if file.frames == 0:
                raise AudioDecodingError("empty", f"{_name(source)} holds no samples")
            if file.frames >= _FRAMES_UNKNOWN:
                raise AudioDecodingError(
                    "unreadable", f"{_name(source)} does not say how long it is, as if written to a pipe: write it again, to a file"
                )
            yield file


def _mono_blocks(file: "SoundFile", source: str | Path | bytes | dict, length: int) -> Iterator[np.ndarray]:
    """The mean of all channels, `(samples,)`, float32, `length` samples at a time."""
    expected, read = file.frames, 0
    while read < expected:
        wanted = min(length, expected - read)
        with _errors_as_unreadable(source):
            samples = file.read(wanted, dtype="float32", always_2d=True)
        if len(samples) < wanted:
            raise _truncated(source)
        read += wanted
        mono = samples.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioDecodingError("not finite", f"{_name(source)} holds NaN or infinite samples: repair it or leave it out")
        yield mono


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

    def resample(samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return resampler(torch.from_numpy(samples)).numpy()

    for block in blocks:
        held = np.concatenate((held, block))
        groups = len(held) // old - before - around
        if groups > 0:
            yield resample(held[: (before + groups + around) * old])[before * new : (before + groups) * new]
            kept = max(0, before + groups - around)
            before, held = before + groups - kept, held[kept * old :]
    if len(rest := resample(held)[before * new :]):
        yield rest


@contextmanager
def _open_bytes(source: str | Path | bytes | dict) -> Iterator[io.BytesIO | io.FileIO]:
    """A file on a disk as it lies there, anything else as its bytes in memory."""
    if isinstance(source, dict) and source.get("bytes") is None and source.get("path") is not None:
        source = source["path"]
    if isinstance(source, (bytes, dict)) or "://" in str(source):
        yield io.BytesIO(_read(source))
        return
    with _errors_as_causes(source):
        file = Path(source).open("rb", buffering=0)  # noqa: SIM115  # errors of whoever reads it are not those of opening
    with file:
        yield file


@contextmanager
def _errors_as_unreadable(source: str | Path | bytes | dict) -> Iterator[None]:
    import soundfile

    try:
        yield
    except (soundfile.LibsndfileError, RuntimeError) as error:
        detail = getattr(error, "error_string", error)
        raise AudioDecodingError("unreadable", f"{_name(source)} cannot be read as audio ({detail})") from error


@contextmanager
def _errors_as_causes(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioDecodingError("missing", f"{source} is not there") from error
    except OSError as error:
        if "://" in str(source):
            raise  # a network that fails is no fault of the clip: it stops the run, which can be resumed
        raise AudioDecodingError("unreadable", f"{source} cannot be read ({error.strerror})") from error


def _truncated(source: str | Path | bytes | dict) -> AudioDecodingError:
    return AudioDecodingError("truncated", f"{_name(source)} ends before its header says: copy or download it again")


def _read(source: str | Path | bytes | dict) -> bytes:
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise AudioDecodingError("missing", f"an audio entry has neither bytes nor a path (its keys: {sorted(source)})")
        return _read(source["bytes"] if source.get("bytes") is not None else source["path"])
    if isinstance(source, bytes):
        return source
    with _errors_as_causes(source):
        if "://" not in str(source):
            return Path(source).read_bytes()
        import fsspec  # comes with torch

        with fsspec.open(str(source), "rb") as file:
            return file.read()


def _ends_early(file: "SoundFile", tail: bytes) -> bool:
    """Whether the file was cut off. libsndfile decodes what is left of a WAV or an Ogg without a word; FLAC it refuses by itself."""
    if file.format == "OGG":
        page = tail[max(0, tail.rfind(b"OggS")) :]
        segments = page[27 : 27 + page[26]] if len(page) > 27 else b""
        whole = page.startswith(b"OggS") and len(page) > 27 and len(page) >= 27 + len(segments) + sum(segments)
        return not (whole and page[5] & 4)  # bit 2: the last page of its stream
    declared = [(int(a), int(b)) for a, b in _LENGTH_IN_LOG.findall(file.extra_info)]
    return any(there < says < _LENGTH_UNKNOWN for says, there in declared)


def _name(source: str | Path | bytes | dict) -> str:
    if isinstance(source, dict):
        return str(source.get("path") or "an audio entry without a path")
    return f"a file of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _check_rate(native_rate: int, sampling_rate: int, source: str | Path | bytes | dict) -> None:
    """Refuse rates whose ratio takes a filter that fills the memory, and those that no sound has."""
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
