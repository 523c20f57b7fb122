"""From a recording to clips: decode, cut into windows, and count whatever is left out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import AudioDecodingError
from .decode import check_scale, load_waveform
from .sources import Row


EXAMPLES_KEPT = 10


class Clip(NamedTuple):
    """A waveform `(samples,)`, float32, mono; its recording's name, where in it the clip begins (in seconds), and its other columns."""

    waveform: np.ndarray
    name: str
    start: float
    columns: dict[str, Any]


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
class Tally:
    """What was read and what was left out, exactly: it travels with the place in the stream, so neither workers nor resuming change it.

    Attributes:
        recordings: read so far, the ones that were left out included.
        clips: given out, for each source by name.
        samples: in those clips, without padding.
        too_short: recordings left out because they are shorter than the bound.
        short_ends: last windows of recordings left out because what was left is shorter than the bound.
        broken: recordings left out because they cannot be decoded, for each `AudioDecodingError.cause`.
        examples: what was wrong with the first ten of them.
    """

    recordings: int = 0
    clips: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    too_short: int = 0
    short_ends: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def count(self, source: str, clip: Clip) -> None:
        """A clip of this source is given out."""
        self.clips[source] = self.clips.get(source, 0) + 1
        self.samples += len(clip.waveform)

    @property
    def num_broken(self) -> int:
        return sum(self.broken.values())

    @property
    def num_clips(self) -> int:
        return sum(self.clips.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Tally":
        return cls(**{**values, **{name: dict(values[name]) for name in ("clips", "broken")}, "examples": list(values["examples"])})

    def as_dict(self) -> dict[str, Any]:
        """Plain and independent of this tally, fit for JSON."""
        return asdict(self)

    def __add__(self, other: "Tally") -> "Tally":
        def both(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
            return {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}

        return Tally(
            recordings=self.recordings + other.recordings,
            clips=both(self.clips, other.clips),
            samples=self.samples + other.samples,
            too_short=self.too_short + other.too_short,
            short_ends=self.short_ends + other.short_ends,
            broken=both(self.broken, other.broken),
            examples=(self.examples + other.examples)[:EXAMPLES_KEPT],
        )

    def __str__(self) -> str:
        text = f"{self.recordings} recordings gave {self.num_clips} clips"
        dropped = {**self.broken, "too short": self.too_short}
        if any(dropped.values()):
            text += "; left out: " + ", ".join(f"{count} {cause}" for cause, count in sorted(dropped.items()) if count)
        if self.short_ends:
            text += f"; {self.short_ends} ends of long recordings were too short"
        if self.examples:
            text += f". The first {len(self.examples)} that cannot be used:\n  " + "\n  ".join(self.examples)
        return text


def read_clips(row: Row, windows: Windows, generator: np.random.Generator, tally: Tally) -> list[Clip]:
    """Decode one recording and cut it. What cannot be used gives no clip, and is counted.

    Args:
        row: the recording.
        windows: how to cut it.
        generator: draws a random window, and how far it is rolled.
        tally: the recording and whatever is left out of it are added here; clips are counted by whoever gives them out.
    """
    tally.recordings += 1
    try:
        waveform = load_waveform(row.audio, windows.sampling_rate)
        check_scale(waveform, row.name)
    except AudioDecodingError as error:
        tally.broken[error.cause] = tally.broken.get(error.cause, 0) + 1
        if len(tally.examples) < EXAMPLES_KEPT:
            tally.examples.append(f"{row.name}: {error}" if row.name not in str(error) else str(error))
        return []
    if len(waveform) < windows.shortest:
        tally.too_short += 1
        return []
    clips = []
    for start in windows.starts(len(waveform), generator):
        window = waveform[start : None if windows.length is None else start + windows.length]
        if len(window) < windows.shortest:
            tally.short_ends += 1
            continue
        if windows.roll:
            window = np.roll(window, generator.integers(len(window)))
        clips.append(Clip(window, row.name, start / windows.sampling_rate, row.columns))
    return clips
