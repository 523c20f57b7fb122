"""Decoded clips in bounded memory."""

import logging
import mmap
import multiprocessing
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm.auto import tqdm

from ..errors import AudioDecodingError, UserError
from ..fbank import num_frames
from .decode import check_scale, load_waveform
from .paths import source_name


logger = logging.getLogger(__name__)

CLIPS_AHEAD = 2  # a thread, decoded and not yet asked for


class WaveformCache:
    """The samples of some recordings of a table, in memory that processes started later share, as far as it reaches.

    Memory is taken as it is filled. What does not fit is not kept, and nothing is ever displaced: epochs visit all recordings alike.

    Args:
        recordings: of the table.
        memory_gb: the most that samples take, in 10^9 bytes. A minute of mono at 16 kHz takes 0.004.
    """

    def __init__(self, recordings: int, memory_gb: float):
        self._arguments = recordings, memory_gb
        self._samples = _shared_zeros(int(memory_gb * 1e9) // 4, np.float32)
        self._places = _shared_zeros(2 * recordings, np.int64).reshape(-1, 2)  # first sample, number of samples
        self._used = multiprocessing.Value("q", 0)

    def __reduce__(self):  # a process that does not share this one's memory begins with nothing
        return type(self), self._arguments

    def get(self, recording: int) -> np.ndarray | None:
        """The samples of a recording by its number, `(samples,)`, read-only; `None` if they are not there."""
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
        self._places[recording, 1] = len(waveform)  # last, for with it the recording is there


def _shared_zeros(count: int, dtype: type) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, count) * size), dtype)[:count]


class Waveforms:
    """The waveforms of a list of sources that can be read, each decoded once and kept as far as `memory_gb` reaches; the others are
    decoded again whenever they are asked for. `waveforms[i]` is `(samples,)`, float32.

    Args:
        sources: what `load_waveform` takes.
        sampling_rate: in Hz.
        memory_gb: memory for decoded clips, in 10^9 bytes. A minute of mono at 16 kHz takes 0.004.
        description: of the progress bar.
        check: decode every clip now. Without, all count as kept, and one that cannot be read raises where it is asked for.

    Attributes:
        kept: `waveforms[i]` comes from `sources[kept[i]]`.
        unreadable: names of the other files, by cause.
    """

    def __init__(
        self,
        sources: Sequence[dict],
        sampling_rate: int,
        memory_gb: float = 4.0,
        description: str = "decoding",
        check: bool = True,
    ):
        self.sources, self.sampling_rate = sources, sampling_rate
        self.kept = [] if check else list(range(len(sources)))
        self.unreadable: dict[str, list[str]] = defaultdict(list)
        self._cache = WaveformCache(len(sources), memory_gb)
        if check:
            self._decode_all(description)

    def _decode_all(self, description: str) -> None:
        for i, outcome in enumerate(tqdm(self._outcomes(), total=len(self.sources), desc=description, unit="clip")):
            if isinstance(outcome, AudioDecodingError):
                self.unreadable[outcome.cause].append(source_name(self.sources[i]))
                continue
            self.kept.append(i)
            self._cache.put(i, outcome)

    def _outcomes(self) -> Iterator[np.ndarray | AudioDecodingError]:
        """Of all sources, in their order. `Executor.map` would decode them all while the first is waited for."""
        threads = min(32, (os.cpu_count() or 1) + 1)
        ahead: deque[Future] = deque()
        with ThreadPoolExecutor(threads) as pool:  # decoders and resampler run outside Python's lock
            for i in range(len(self.sources)):
                ahead.append(pool.submit(self._try, i))
                if len(ahead) >= CLIPS_AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> np.ndarray:
        decoded = self._cache.get(self.kept[i])
        return decode_clip(self.sources[self.kept[i]], self.sampling_rate) if decoded is None else decoded

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def check_unreadable(self, largest_fraction: float, what: str) -> None:
        """Raise `UserError` if more than this fraction of the files, or all, cannot be read, warn of fewer, and count and name them."""
        names = [name for names in self.unreadable.values() for name in names]
        if len(names) > largest_fraction * len(self.sources) or not self.kept:
            counts = ", ".join(f"{len(names)} {cause}" for cause, names in self.unreadable.items())
            raise UserError(
                f"{len(names)} of {len(self.sources)} {what} clips cannot be used ({counts}), more than the fraction {largest_fraction:g} "
                f"that is allowed: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: repair or remove them, or allow more "
                "(max_unreadable)"
            )
        for cause, names in self.unreadable.items():
            logger.warning(f"{len(names)} of {len(self.sources)} {what} clips are left out ({cause}): {', '.join(names)}")

    def _try(self, i: int) -> np.ndarray | AudioDecodingError:
        try:
            return decode_clip(self.sources[i], self.sampling_rate)
        except AudioDecodingError as error:
            return error


def decode_clip(source: dict, sampling_rate: int) -> np.ndarray:
    """`load_waveform`, and beyond it refuse what the feature extractor would refuse, while the file's name is known: `(samples,)`, float32.

    Raises:
        AudioDecodingError: as `load_waveform`, and with the cause "too short" (no frame of 25 ms) or "out of scale".
    """
    waveform = load_waveform(source, sampling_rate)
    if num_frames(len(waveform), sampling_rate) == 0:
        raise AudioDecodingError("too short", f"{source_name(source)} has {len(waveform)} samples, less than one frame of 25 ms")
    check_scale(waveform, source_name(source))
    return waveform
