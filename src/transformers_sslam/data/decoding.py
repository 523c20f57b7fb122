"""One audio file, or its bytes, to a mono waveform at the rate that the model hears."""

import io
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


# libsndfile tells in its log when a file ends before its header says: WAV and CAF ("data"), AIFF ("SSND"), AU, W64, RF64.
_LENGTH_IN_LOG = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# A header written to a pipe cannot know its length and holds the largest number instead: FFmpeg writes 2**32 - 1, SoX almost 2**31.
_LENGTH_UNKNOWN = 2**31 - 4096


class AudioDecodingError(ValueError):
    """Why one clip cannot be used. `cause` is a short, countable kind: "missing", "empty", "unreadable", "truncated" or "not finite"."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):  # the default would pickle the message alone, and worker processes send these home
        return type(self), (self.cause, str(self))


def load_waveform(source: str | Path | bytes | dict, sampling_rate: int = 16_000) -> np.ndarray:
    """Decode with soundfile (WAV, FLAC, MP3, Ogg Vorbis, Opus), mix down to mono, resample with torchaudio.

    Args:
        source: a path, a URL that fsspec opens ("hf://...", "s3://..."), the bytes of a file, or what `datasets` gives for an
            `Audio(decode=False)` column: `{"path": ..., "bytes": ...}`.
        sampling_rate: in Hz, of the result.

    Returns:
        `(samples,)`, float32. Full scale is 1; resampling may overshoot it a little.

    Raises:
        AudioDecodingError: (a `ValueError`) if the file is missing, empty, not readable as audio, cut off before its end, or holds NaN or
            infinity. The message names the file.
        ImportError: if soundfile or torchaudio is not installed, naming the extra that brings them.
    """
    samples, native_rate = _decode(source)
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioDecodingError("not finite", f"{_name(source)} holds NaN or infinite samples: repair it or leave it out")
    if native_rate == sampling_rate:
        return mono
    with torch.inference_mode():
        return _resampler(native_rate, sampling_rate)(torch.from_numpy(mono)).numpy()


def _decode(source: str | Path | bytes | dict) -> tuple[np.ndarray, int]:
    """Samples (samples, channels), float32, and their rate in Hz."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError('reading audio files needs soundfile: pip install "transformers-sslam[train]"') from error
    data = _read(source)
    if not data:
        raise AudioDecodingError("empty", f"{_name(source)} holds no bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            samples, rate, expected, log = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames, file.extra_info
    except (soundfile.LibsndfileError, RuntimeError) as error:
        detail = getattr(error, "error_string", error)
        raise AudioDecodingError("unreadable", f"{_name(source)} cannot be read as audio ({detail})") from error
    if len(samples) < expected or _ends_early(data, log):
        raise AudioDecodingError("truncated", f"{_name(source)} ends before its header says: copy or download it again")
    if len(samples) == 0:
        raise AudioDecodingError("empty", f"{_name(source)} holds no samples")
    return samples, rate


def _read(source: str | Path | bytes | dict) -> bytes:
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise AudioDecodingError("missing", f"an audio entry has neither bytes nor a path (its keys: {sorted(source)})")
        return _read(source["bytes"] if source.get("bytes") is not None else source["path"])
    if isinstance(source, bytes):
        return source
    is_url = "://" in str(source)
    try:
        if is_url:
            import fsspec  # comes with torch

            with fsspec.open(str(source), "rb") as file:
                return file.read()
        return Path(source).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioDecodingError("missing", f"{source} is not there") from error
    except OSError as error:
        if is_url:
            raise  # a network that fails is no fault of the clip: it stops the run, which can be resumed
        raise AudioDecodingError("unreadable", f"{source} cannot be read ({error.strerror})") from error


def _ends_early(data: bytes, log: str) -> bool:
    """Whether the file was cut off. libsndfile decodes what is left of a WAV or an Ogg without a word; FLAC it refuses by itself."""
    if data.startswith(b"OggS"):
        page = data[data.rindex(b"OggS") :]
        segments = page[27 : 27 + page[26]] if len(page) > 27 else b""
        whole = len(page) > 27 and len(page) >= 27 + len(segments) + sum(segments)
        return not (whole and page[5] & 4)  # bit 2: the last page of its stream
    declared = [(int(a), int(b)) for a, b in _LENGTH_IN_LOG.findall(log)]
    return any(there < says < _LENGTH_UNKNOWN for says, there in declared)


def _name(source: str | Path | bytes | dict) -> str:
    if isinstance(source, dict):
        return str(source.get("path") or "an audio entry without a path")
    return f"a file of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@lru_cache
def _resampler(native_rate: int, sampling_rate: int) -> torch.nn.Module:
    """Kept, because building its filter takes longer than using it."""
    try:
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:
        raise ImportError(
            f"resampling {native_rate} Hz to {sampling_rate} Hz needs torchaudio, in the pair of versions of the train extra: "
            'pip install "transformers-sslam[train]"'
        ) from error
    with torch.inference_mode(False):
        return Resample(native_rate, sampling_rate)
