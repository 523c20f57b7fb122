"""One audio file, or its bytes, to a mono waveform at the model's sampling rate, whole or in blocks."""

import io
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from numbers import Integral
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import AudioDecodingError
from ..feature_extraction_sslam import LARGEST_PLAUSIBLE_AMPLITUDE
from .decoders import decode_pieces
from .paths import decode_path, printable_path, source_name


# fmt: off
AUDIO_SUFFIXES = (
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".bwf",
    ".m4a", ".m4b", ".m4r", ".mp4", ".aac", ".adts", ".wma", ".asf", ".webm", ".weba", ".mka", ".amr", ".awb", ".3gp", ".3gpp", ".3ga",
    ".3g2", ".ape", ".wv", ".ac3", ".eac3", ".ec3", ".dts", ".dtshd", ".mp1", ".mp2", ".m2a", ".mpa", ".mpga", ".tta", ".spx", ".ogx",
    ".mkv", ".mov", ".qt", ".m4v", ".f4v", ".f4a", ".ogv", ".wmv",  # of video, whose sound is read
)
# fmt: on
LOWEST_RATE = 1000  # Hz; below it a header is damaged, or what it describes is not sound
_LARGEST_FILTER = 2**25  # coefficients; 44,100 to 16,000 Hz takes 2**16, 44,099 to 16,000 Hz would take 2**29
_MISSING = (404, 410)  # of the answers of a web server
Source = str | Path | bytes | bytearray | memoryview | dict


def check_scale(waveform: np.ndarray, name: str) -> None:
    """Raise an `AudioDecodingError` that names the clip if samples were never scaled to [-1, 1]."""
    if (peak := np.abs(waveform).max()) > LARGEST_PLAUSIBLE_AMPLITUDE:
        raise AudioDecodingError(
            "out of scale", f"{name} has a peak of {peak:g}, but samples lie in [-1, 1]: divide integers by their full scale"
        )


def load_waveform(source: Source, sampling_rate: int = 16_000) -> np.ndarray:
    """Decode a file (soundfile or, for compressed formats, FFmpeg by PyAV), mix it down to mono and resample it (torchaudio).

    Args:
        source: a path, a URL that fsspec opens ("hf://...", "s3://..."), the bytes of a file, or an undecoded entry of a column of
            `datasets.Audio`: `{"path": ..., "bytes": ...}`.
        sampling_rate: of the result, in Hz.

    Returns:
        `(samples,)`, float32. Full scale is 1; resampling may overshoot it a little.

    Raises:
        AudioDecodingError: (a `ValueError`) if the file is missing, empty, not readable as audio, truncated, damaged, holds NaN or
            infinity, or has a sampling rate that cannot be resampled.
        ValueError: if `sampling_rate` is not a positive whole number.
        OSError: if what is behind a URL cannot be read, though it may be there.
        ImportError: if soundfile, PyAV or torchaudio is not installed.
    """
    _check_whole(sampling_rate)
    parts = []
    with _open(source) as file:
        for native_rate, pieces in groupby(decode_pieces(file, _name(source)), key=itemgetter(0)):
            _check_rate(native_rate, sampling_rate, source)
            mono = np.concatenate([piece for _, piece in pieces])
            parts.append(mono if native_rate == sampling_rate else _resample(_resampler(native_rate, sampling_rate), mono))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_blocks(source: Source, sampling_rate: int = 16_000, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """The result of `load_waveform` in successive blocks, in the memory of about one block (and the bytes behind a URL).

    Together they equal the whole waveform, exactly or, if it is resampled, up to rounding (1e-6).

    Args:
        source, sampling_rate: see `load_waveform`.
        seconds: approximate length of a block; the last one is shorter.

    Yields:
        `(samples,)`, float32, never empty.

    Raises:
        ValueError: if `seconds` is not positive and finite; and as `load_waveform`.
        AudioDecodingError: as `load_waveform`. What only decoding can tell (NaN, some truncated ends) is raised after the blocks before it.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}: give a positive number")
    _check_whole(sampling_rate)
    with _open(source) as file:
        for native_rate, pieces in groupby(decode_pieces(file, _name(source), seconds), key=itemgetter(0)):
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


def _resample(resampler: torch.nn.Module, samples: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return resampler(torch.from_numpy(samples)).numpy()


def _resampled(blocks: Iterable[np.ndarray], native_rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """The resampled concatenation of all blocks.

    `old` samples become `new` ones, and the filter reads `width` samples on either side of each. So groups of `old` samples are resampled
    together with as many groups around them as the filter reads, whose results are cut off.
    """
    resampler = _resampler(native_rate, sampling_rate)
    old, new = (rate // math.gcd(native_rate, sampling_rate) for rate in (native_rate, sampling_rate))
    around = -(-int(resampler.width) // old)  # type: ignore[arg-type]  # a number, not a module
    before = 0  # groups held whose results were yielded
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
        """A damaged header may refer to a position before the first byte; soundfile would print the error, not raise it."""
        return super().seek(max(0, offset) if whence == io.SEEK_SET else offset, whence)


def _open(source: Source) -> BinaryIO:
    """A file on a disk, or anything else as bytes in memory."""
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise AudioDecodingError("missing", f"an audio entry has neither bytes nor a path (its keys: {sorted(source)})")
        place = source["bytes"] if source.get("bytes") is not None else decode_path(str(source["path"]))
    else:
        place = source
    if isinstance(place, (bytes, bytearray, memoryview)):
        return _Bytes(place)
    try:
        if "\0" in str(place):  # which no path holds
            raise FileNotFoundError
        if "://" in str(place):
            return _Bytes(_read_remote(str(place)))
        # What is not a regular file may block whoever opens or reads it.
        if not stat.S_ISREG(os.stat(place).st_mode):
            raise AudioDecodingError("unreadable", f"{_name(place)} is not a regular file")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return open(place, "rb", buffering=0, opener=lambda path, _: os.open(path, flags))  # type: ignore[return-value]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioDecodingError("missing", f"{_name(place)} is not there") from error
    except OSError as error:
        if "://" in str(place) and not isinstance(error, IsADirectoryError):
            raise  # a network that fails stops the run, which can be resumed
        raise AudioDecodingError("unreadable", f"{_name(place)} cannot be read ({error.strerror})") from error


def _read_remote(url: str) -> bytes:
    """The bytes behind a URL. `FileNotFoundError` or `IsADirectoryError` if there is no file, `OSError` if that is not known."""
    import fsspec  # comes with torch

    try:
        with fsspec.open(url, "rb") as remote:
            return remote.read()
    except (ImportError, ValueError, IsADirectoryError):
        raise
    except Exception as error:  # libraries of network file systems have errors of their own
        cause: BaseException = error
        if re.search(r"(^|::)https?://", url):  # where, for fsspec, whatever failed is a file that was not found
            while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
                cause = cause.__cause__
        if isinstance(cause, (FileNotFoundError, NotADirectoryError)) or getattr(cause, "status", None) in _MISSING:
            raise FileNotFoundError(url) from error
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise OSError(f"{_name(url)} cannot be read ({said}): check the address, the network and the login, then try again") from error


def _name(source: Source) -> str:
    """For messages, which can be printed anywhere."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a file of {memoryview(source).nbytes} bytes"
    return source_name(source) if isinstance(source, dict) else printable_path(str(source))


def _check_whole(sampling_rate: int) -> None:
    if not (isinstance(sampling_rate, Integral) and sampling_rate > 0):
        raise ValueError(f"sampling_rate is {sampling_rate!r}: give a positive whole number, in Hz")


def _check_rate(native_rate: int, sampling_rate: int, source: Source) -> None:
    divisor = math.gcd(native_rate, sampling_rate)
    if native_rate < LOWEST_RATE or native_rate // divisor * (sampling_rate // divisor) > _LARGEST_FILTER:
        raise AudioDecodingError(
            "unreadable", f"{_name(source)} has {native_rate} Hz, which cannot be resampled to {sampling_rate} Hz: convert it before"
        )


@lru_cache
def _resampler(native_rate: int, sampling_rate: int) -> torch.nn.Module:
    """Cached, because computing its filter takes longer than using it."""
    try:
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:
        raise ImportError(
            f'resampling {native_rate} Hz to {sampling_rate} Hz needs torchaudio that fits torch: pip install "transformers-sslam[audio]"'
        ) from error
    with torch.inference_mode(False):
        return Resample(native_rate, sampling_rate)
