"""From a recording to clips: decode, cut into windows, count what is left out."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import AudioDecodingError
from .cache import WaveformCache
from .decode import check_scale, load_waveform
from .sources import Row, random_generator


EXAMPLES_KEPT = 10
ROWS_KEPT = 10_000  # they are written with each checkpoint


class Clip(NamedTuple):
    """A recording, or a window of it."""

    waveform: np.ndarray  # `(samples,)`, float32, mono
    name: str  # of the recording
    source: str  # its name
    row: int  # number of its shard in the source; of a table, of its row
    start: float  # seconds from the start of the recording
    columns: dict[str, Any]  # the others of the source
    key: tuple[int, ...]  # seed of the random draws for this use of the clip, unique in the run


@dataclass(frozen=True)
class Windows:
    """How a recording is cut."""

    sampling_rate: int  # Hz
    length: int | None  # samples of a window; `None` leaves recordings whole
    hop: int  # samples from one window's start to the next one's
    choose: Literal["every", "random"]  # every window, of which the last may be shorter, or one
    shortest: int  # samples below which a recording or a last window is left out
    roll: bool = False  # rotate each window by a random number of samples

    def starts(self, samples: int, generator: np.random.Generator) -> list[int]:
        """First sample of each window of a recording, the last one even if it is too short."""
        if self.length is None or samples <= self.length:
            return [0]
        if self.choose == "random":
            return [int(generator.integers(samples - self.length + 1))]
        # Another window begins only where the last one, which may overlap it, left samples.
        return [0, *range(self.hop, samples - self.length + self.hop, self.hop)]


@dataclass
class ReadStatistics:
    """What was read and what was left out. Sums share their parts."""

    recordings: int = 0  # including those left out
    clips: dict[str, int] = field(default_factory=dict)  # by source
    samples: int = 0  # in those clips, without padding
    too_short: int = 0  # recordings
    short_ends: int = 0  # last windows that are too short
    unreadable: dict[str, int] = field(default_factory=dict)  # recordings, by `AudioDecodingError.cause`
    examples: list[str] = field(default_factory=list)  # messages of the first of them
    rows: dict[int, str] = field(default_factory=dict)  # causes of a table's first unusable rows; for streams of one source

    def count(self, clip: Clip) -> None:
        self.clips[clip.source] = self.clips.get(clip.source, 0) + 1
        self.samples += len(clip.waveform)

    def count_unreadable(self, row: Row, error: AudioDecodingError) -> None:
        self.note(row, error.cause)
        self.unreadable[error.cause] = self.unreadable.get(error.cause, 0) + 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{row.name}: {error}" if row.name not in str(error) else str(error))

    def note(self, row: Row, cause: str) -> None:
        if row.in_table and len(self.rows) < ROWS_KEPT:
            self.rows[row.shard] = cause

    def take(self) -> "ReadStatistics":
        """The counts so far; this object starts again at zero."""
        taken = replace(self)
        vars(self).update(vars(ReadStatistics()))
        return taken

    @property
    def num_unreadable(self) -> int:
        return sum(self.unreadable.values())

    @property
    def num_clips(self) -> int:
        return sum(self.clips.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReadStatistics":
        rows = {int(row): cause for row, cause in values.get("rows", {}).items()}  # JSON has no numbers as keys
        return cls(**copy.deepcopy({**values, "rows": rows}))

    def as_dict(self) -> dict[str, Any]:
        """For JSON, independent of this object."""
        return asdict(self) | {"rows": {str(row): cause for row, cause in self.rows.items()}}

    def __add__(self, other: "ReadStatistics") -> "ReadStatistics":
        return ReadStatistics(
            recordings=self.recordings + other.recordings,
            clips=dict(Counter(self.clips) + Counter(other.clips)),
            samples=self.samples + other.samples,
            too_short=self.too_short + other.too_short,
            short_ends=self.short_ends + other.short_ends,
            unreadable=dict(Counter(self.unreadable) + Counter(other.unreadable)),
            examples=list(dict.fromkeys(self.examples + other.examples))[:EXAMPLES_KEPT] if other.examples else self.examples,
            rows=self.rows if other.rows.keys() <= self.rows.keys() or len(self.rows) >= ROWS_KEPT else self.rows | other.rows,
        )

    def __str__(self) -> str:
        text = f"{self.recordings} recordings gave {self.num_clips} clips"
        left_out = self.unreadable | ({"too short": self.too_short} if self.too_short else {})
        if left_out:
            text += "; left out: " + ", ".join(f"{count} {cause}" for cause, count in sorted(left_out.items()))
        if self.short_ends:
            text += f"; {self.short_ends} ends of long recordings were too short"
        if self.examples:
            text += f". The first {len(self.examples)} that cannot be used:\n  " + "\n  ".join(self.examples)
        return text


def read_clips(
    row: Row, windows: Windows, key: tuple[int, ...], statistics: ReadStatistics, cache: WaveformCache | None = None
) -> list[Clip]:
    """Decode one recording and cut it. One that cannot be used gives no clip.

    Args:
        row: the recording.
        windows: how to cut it.
        key: seed of its random draws.
        statistics: counts the recording and what is left out; clips are counted when they are sent.
        cache: keeps its samples if there is room.
    """
    statistics.recordings += 1
    try:
        waveform = cache.get(row.shard) if cache else None
        if waveform is None:
            if isinstance(row.audio, AudioDecodingError):
                raise row.audio
            waveform = load_waveform(row.audio, windows.sampling_rate)
            check_scale(waveform, row.name)
            if cache:
                cache.put(row.shard, waveform)
    except AudioDecodingError as error:
        statistics.count_unreadable(row, error)
        return []
    if len(waveform) < windows.shortest:
        statistics.too_short += 1
        statistics.note(row, "too short")
        return []
    clips, generator = [], random_generator("window", *key)
    for number, start in enumerate(windows.starts(len(waveform), generator)):
        window = waveform[start : None if windows.length is None else start + windows.length]
        if len(window) < windows.shortest:
            statistics.short_ends += 1
            continue
        if windows.roll:
            window = np.roll(window, generator.integers(len(window)))
        clips.append(Clip(window, row.name, row.source, row.shard, start / windows.sampling_rate, row.columns, (*key, number)))
    return clips
