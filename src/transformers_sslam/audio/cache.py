"""Decoded clips in bounded memory."""

import logging
import mmap
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from tqdm.auto import tqdm

from ..errors import AudioDecodingError, UserError
from ..fbank import num_frames
from .ahead import map_ahead
from .decode import check_scale, load_waveform
from .paths import source_name


logger = logging.getLogger(__name__)


class WaveformCache:
    """Decoded recordings of a table, in memory that this process shares with those that it starts later.

    What does not fit is not kept, and nothing is displaced: epochs read all recordings equally often.

    Args:
        recordings: rows of the table.
        memory_gb: limit in 10^9 bytes. A minute of mono at 16 kHz takes 0.004.

    Raises:
        UserError: if the system does not give so much.
    """

    def __init__(self, recordings: int, memory_gb: float):
        self._arguments = recordings, memory_gb
        try:
            self._samples = _shared_zeros(int(memory_gb * 1e9) // 4, np.float32)
        except (OSError, OverflowError) as error:
            raise UserError(f"{memory_gb:g} GB for decoded clips cannot be reserved ({error}): set a smaller memory_gb") from error
        self._places = _shared_zeros(2 * recordings, np.int64).reshape(-1, 2)  # first sample, number of samples
        self._used = multiprocessing.Value("q", 0)

    def __reduce__(self):  # a process that does not share this memory has an empty cache
        return type(self), self._arguments

    def get(self, recording: int) -> np.ndarray | None:
        """`(samples,)` of a row's recording, read-only; `None` if it is not kept."""
        start, length = self._places[recording]
        if not length:
            return None
        samples = self._samples[start : start + length]
        samples.flags.writeable = False
        return samples

    def put(self, recording: int, waveform: np.ndarray) -> None:
        """Keep `(samples,)`, float32, if there is room."""
        with self._used.get_lock():
            start, end = self._used.value, self._used.value + len(waveform)
            if end > len(self._samples) or self._places[recording, 1]:
                return
            self._used.value = end
        self._samples[start:end] = waveform
        self._places[recording, 0] = start
        self._places[recording, 1] = len(waveform)  # last, for it makes the recording available


def _shared_zeros(count: int, dtype: type) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, count) * size), dtype)[:count]


class Waveforms(Sequence[np.ndarray]):
    """The waveforms of those sources that can be read. All are decoded now; those that do not fit into memory, again at each use.
    `waveforms[i]` is `(samples,)`, float32.

    Args:
        sources, sampling_rate: what `load_waveform` takes.
        memory_gb: memory for decoded clips, in 10^9 bytes.
        description: of the progress bar.

    Attributes:
        kept: `waveforms[i]` comes from `sources[kept[i]]`.
        unreadable: names of the other files, by cause.
    """

    def __init__(self, sources: Sequence[dict], sampling_rate: int, memory_gb: float = 4.0, description: str = "decoding"):
        self.sources, self.sampling_rate = sources, sampling_rate
        self.kept: list[int] = []
        self.unreadable: dict[str, list[str]] = defaultdict(list)
        self._cache = WaveformCache(len(sources), memory_gb)
        decoded = map_ahead(partial(decode_clip, sampling_rate=sampling_rate), sources)
        for i, decoding in enumerate(tqdm(decoded, total=len(sources), desc=description, unit="clip")):
            try:
                self._cache.put(i, decoding.result())
                self.kept.append(i)
            except AudioDecodingError as error:
                self.unreadable[error.cause].append(source_name(sources[i]))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i):
        decoded = self._cache.get(self.kept[i])
        return decode_clip(self.sources[self.kept[i]], self.sampling_rate) if decoded is None else decoded

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def check_unreadable(self, largest_fraction: float, what: str) -> None:
        """Raise a `UserError` if more than this fraction of the files, or all, cannot be read; warn of fewer."""
        names = [name for names in self.unreadable.values() for name in names]
        if len(names) > largest_fraction * len(self.sources) or not self.kept:
            counts = ", ".join(f"{len(names)} {cause}" for cause, names in self.unreadable.items())
            raise UserError(
                f"{len(names)} of {len(self.sources)} {what} clips cannot be used ({counts}), more than max_unreadable = "
                f"{largest_fraction:g}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: repair or remove them, or raise it"
            )
        for cause, names in self.unreadable.items():
            logger.warning(f"{len(names)} of {len(self.sources)} {what} clips are left out ({cause}): {', '.join(names)}")


def decode_clip(source: dict, sampling_rate: int) -> np.ndarray:
    """`load_waveform` with the checks of the feature extractor: `(samples,)`, float32.

    Raises:
        AudioDecodingError: as `load_waveform`, and with the cause "too short" (no frame of 25 ms) or "out of scale".
    """
    waveform = load_waveform(source, sampling_rate)
    if num_frames(len(waveform), sampling_rate) == 0:
        raise AudioDecodingError("too short", f"{source_name(source)} has {len(waveform)} samples, less than one frame of 25 ms")
    check_scale(waveform, source_name(source))
    return waveform
