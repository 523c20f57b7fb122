"""From a recording to clips: decode, cut into windows, and count whatever is left out."""

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
ROWS_KEPT = 10_000  # they travel with each checkpoint


class Clip(NamedTuple):
    """A part of a recording, or all of it.

    Attributes:
        waveform: `(samples,)`, float32, mono.
        name: of the recording.
        source: name of the source that it is from.
        row: number of its shard there; of a table of files, of its row.
        start: seconds from the recording's beginning.
        columns: what else the source knows of the recording.
        key: numbers that tell this use of the clip from all others of the run, to draw random numbers from.
    """

    waveform: np.ndarray
    name: str
    source: str
    row: int
    start: float
    columns: dict[str, Any]
    key: tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """How a recording is cut.

    Args:
        sampling_rate: in Hz.
        length: samples of a window; `None` leaves recordings whole.
        hop: samples from one window's start to the next one's.
        choose: `"every"` window, the last one as long as what is left, or one `"random"` window, drawn anew each time.
        shortest: samples below which a recording, or what is left of it for the last window, is left out.
        roll: rotate each window by a random number of samples, drawn anew each time.
    """

    sampling_rate: int
    length: int | None
    hop: int
    choose: Literal["every", "random"]
    shortest: int
    roll: bool = False

    def starts(self, samples: int, generator: np.random.Generator) -> list[int]:
        """Where the windows of a recording of so many samples begin; a last one that is too short is among them."""
        if self.length is None or samples <= self.length:
            return [0]
        if self.choose == "random":
            return [int(generator.integers(samples - self.length + 1))]
        # Windows overlap where `hop` is the shorter; one more begins only where the last has left something.
        return [0, *range(self.hop, samples - self.length + self.hop, self.hop)]


@dataclass
class ReadStatistics:
    """What was read and what was left out, exactly: it travels with the batches, so neither workers nor resuming change it.

    Attributes:
        recordings: read so far, the ones that were left out included.
        clips: given out, for each source by name.
        samples: in those clips, without padding.
        too_short: recordings left out because they are shorter than the bound.
        short_ends: last windows of recordings left out because what was left is shorter than the bound.
        unreadable: recordings left out because they cannot be decoded, for each `AudioDecodingError.cause`.
        examples: what was wrong with the first ten of them.
        rows: cause by row, of the first 10,000 rows of a table that cannot be used, each once. Only of streams of one source.
    """

    recordings: int = 0
    clips: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    too_short: int = 0
    short_ends: int = 0
    unreadable: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    rows: dict[int, str] = field(default_factory=dict)

    def count(self, clip: Clip) -> None:
        """A clip is given out."""
        self.clips[clip.source] = self.clips.get(clip.source, 0) + 1
        self.samples += len(clip.waveform)

    def count_unreadable(self, row: Row, error: AudioDecodingError) -> None:
        """A recording cannot be used."""
        self.note(row, error.cause)
        self.unreadable[error.cause] = self.unreadable.get(error.cause, 0) + 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{row.name}: {error}" if row.name not in str(error) else str(error))

    def note(self, row: Row, cause: str) -> None:
        """Keep which row of a table was left out."""
        if row.in_table and len(self.rows) < ROWS_KEPT:
            self.rows[row.shard] = cause

    def take(self) -> "ReadStatistics":
        """What was counted, to begin again from nothing."""
        taken = replace(self)
        vars(self).update(vars(ReadStatistics()))
        return taken

    @property
    def num_unreadable(self) -> int:
        return sum(self.unreadable.values())

    @property
    def num_left_out(self) -> int:
        return self.num_unreadable + self.too_short + self.short_ends

    @property
    def num_clips(self) -> int:
        return sum(self.clips.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReadStatistics":
        changes: dict[str, Any] = {name: dict(values[name]) for name in ("clips", "unreadable")}
        rows = {int(row): cause for row, cause in values.get("rows", {}).items()}  # JSON has no numbers as keys
        return cls(**{**values, **changes, "examples": list(values["examples"]), "rows": rows})

    def as_dict(self) -> dict[str, Any]:
        """Plain and independent of this object, fit for JSON."""
        return asdict(self) | {"rows": {str(row): cause for row, cause in self.rows.items()}}

    def __add__(self, other: "ReadStatistics") -> "ReadStatistics":
        return ReadStatistics(
            recordings=self.recordings + other.recordings,
            clips=dict(Counter(self.clips) + Counter(other.clips)),
            samples=self.samples + other.samples,
            too_short=self.too_short + other.too_short,
            short_ends=self.short_ends + other.short_ends,
            unreadable=dict(Counter(self.unreadable) + Counter(other.unreadable)),
            examples=list(dict.fromkeys(self.examples + other.examples))[:EXAMPLES_KEPT],  # each once, in however many epochs
            rows=self.rows if other.rows.keys() <= self.rows.keys() or len(self.rows) >= ROWS_KEPT else self.rows | other.rows,
        )

    def __str__(self) -> str:
        text = f"{self.recordings} recordings gave {self.num_clips} clips"
        dropped = Counter(self.unreadable) + Counter({"too short": self.too_short})
        if dropped:
            text += "; left out: " + ", ".join(f"{count} {cause}" for cause, count in sorted(dropped.items()))
        if self.short_ends:
            text += f"; {self.short_ends} ends of long recordings were too short"
        if self.examples:
            text += f". The first {len(self.examples)} that cannot be used:\n  " + "\n  ".join(self.examples)
        return text


def read_clips(
    row: Row, windows: Windows, key: tuple[int, ...], statistics: ReadStatistics, cache: WaveformCache | None = None
) -> list[Clip]:
    """Decode one recording and cut it. What cannot be used gives no clip, and is counted.

    Args:
        row: the recording.
        windows: how to cut it.
        key: what the draws follow from: of a random window, of how far it is rolled, and of whatever becomes of the clip later.
        statistics: the recording and whatever is left out of it are added here; clips are counted by whoever gives them out.
        cache: where its samples may be, and are kept if there is room.
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
