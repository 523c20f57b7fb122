"""One audio file, or its bytes, to a mono waveform at the rate that the model hears."""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


class AudioDecodingError(ValueError):
    """Why one clip cannot be used. `cause` is a short, countable kind: "missing", "empty", "unreadable" or "not finite"."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):  # the default would pickle the message alone, and worker processes send these home
        return type(self), (self.cause, str(self))


def load_waveform(source: str | Path | bytes | dict, sampling_rate: int = 16_000) -> np.ndarray:
    """Decode with soundfile (WAV, FLAC, MP3, Ogg Vorbis, Opus), mix down to mono, resample with torchaudio.

    Args:
        source: a path, the bytes of a file, or what `datasets` gives for an `Audio(decode=False)` column: `{"path": ..., "bytes": ...}`.
        sampling_rate: in Hz, of the result.

    Returns:
        `(samples,)`, float32. Full scale is 1; resampling may overshoot it a little.

    Raises:
        AudioDecodingError: (a `ValueError`) if the file is missing, empty, not readable as audio, or holds NaN or infinity. The message names
            the file.
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
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise AudioDecodingError("missing", f"an audio entry has neither bytes nor a path (its keys: {sorted(source)})")
        data = source["bytes"] if source.get("bytes") is not None else source["path"]
    else:
        data = source
    try:
        samples, rate = soundfile.read(io.BytesIO(data) if isinstance(data, bytes) else data, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        missing = not isinstance(data, bytes) and not Path(data).is_file()
        detail = "is not there" if missing else f"cannot be read as audio ({getattr(error, 'error_string', error)})"
        raise AudioDecodingError("missing" if missing else "unreadable", f"{_name(source)} {detail}") from error
    if len(samples) == 0:
        raise AudioDecodingError("empty", f"{_name(source)} holds no samples")
    return samples, rate


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
            f'resampling {native_rate} Hz to {sampling_rate} Hz needs torchaudio, in the pair of versions of the train extra: pip install "transformers-sslam[train]"'
        ) from error
    with torch.inference_mode(False):
        return Resample(native_rate, sampling_rate)
