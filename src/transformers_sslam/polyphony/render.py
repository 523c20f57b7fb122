"""Mixtures of single sounds: who is mixed where and how loud is planned first, from a seed alone, and then rendered.

```python
sounds = [sound for i, (waveform, label) in enumerate(zip(waveforms, labels)) if (sound := find_sound(waveform, i, label, settings))]
for mixture in plan_mixtures(sounds, settings, num_events=[1, 4, 14], clips=100, seed=0, split="train"):
    waveform, mixture = render(mixture, waveforms)  # and mixture.labels, mixture.events[0].onset ...
```

The rules, in frames of 10 ms:

- A frame of a source *sounds* if it is at most `sounding_db` below the source's loudest frame. Its *sound* reaches from the first such
  frame to the last, pauses included; what lies before and after, and a last incomplete frame, is left out.
- An *event* is one whole sound or, of one longer than `event_seconds`, a window that begins with a sounding frame, uniform among those
  that leave room for the window, and is trimmed at its end. It enters the mixture as it is, without fades, times a constant gain.
- Gains: each event's level is uniform in `level_db`, in dB of full scale. The level is the RMS of the event's loudest 100 ms (of all of a
  shorter one), about what a sound level meter shows at its fast setting: over the whole event, ticks with pauses would count as faint.
  So many events are louder than few, as they are in life. A mixture that exceeds full scale is scaled down as a whole, and its gains
  and levels with it.
- Onsets, `overlap: together`: an instant is uniform in the clip, and each event is laid so that one of its sounding frames, uniform among
  those with which the whole event lies in the clip, begins at that instant. For 10 ms all events sound at once. `overlap: anywhere`: each
  event's onset is uniform among those with which it lies in the clip.
- Sounds: an event's class is uniform among the classes, its sound uniform among the class's; no sound comes twice in a mixture, and no
  class does if `repeat_classes` is false.
- The clip is digitally silent where no event sounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..audio.cache import Waveforms
from ..errors import UserError
from ..settings import setting


Overlap = Literal["together", "anywhere"]

FRAMES_PER_SECOND = 100
LEVEL_FRAMES = 10  # of the window whose loudest place is an event's level
SILENT_DB = -60.0  # of full scale: a source whose loudest frame is fainter is taken for silence
FULL_SCALE = 1 - 2**-15  # the largest sample of 16 bits


@dataclass(frozen=True)
class MixtureSettings:
    """The rules of mixing.

    Raises:
        UserError: (a `ValueError`) if a value is out of range.
    """

    sampling_rate: int = setting("in Hz; sources at other rates are resampled", 16_000)
    clip_seconds: float = setting("length of a mixture", 10.0)
    event_seconds: float = setting("of longer sounds a window of this length is taken; at most half a clip", 5.0)
    sounding_db: float = setting("a frame sounds if it is at most so far below its source's loudest", 40.0)
    level_db: list[float] = setting("range of an event's level, the RMS of its loudest 100 ms, in dB of full scale", [-35.0, -25.0])
    overlap: Overlap = setting("whether there is an instant at which all events sound, or any onset will do", "together")
    repeat_classes: bool = setting("whether a mixture may have several events of a class", True)

    def __post_init__(self):
        if self.sampling_rate < 1000:
            raise UserError(f"sampling_rate is {self.sampling_rate}, but must be at least 1000 Hz")
        if not 1 / FRAMES_PER_SECOND <= self.event_seconds <= self.clip_seconds / 2 < math.inf:
            raise UserError(
                f"event_seconds is {self.event_seconds:g}, but must lie between 0.01 and half of clip_seconds, {self.clip_seconds / 2:g}: "
                "only then any instant of the clip can be common to all events"
            )
        if not 0 < self.sounding_db < math.inf:
            raise UserError(f"sounding_db is {self.sounding_db}, but must be a number of dB above 0")
        if len(self.level_db) != 2 or not -math.inf < self.level_db[0] <= self.level_db[1] <= 0:
            raise UserError(f"level_db is {self.level_db}, but must be [lowest, highest] in dB of full scale, not above 0")
        if self.overlap not in get_args(Overlap):
            raise UserError(f"overlap is {self.overlap!r}, but must be one of {', '.join(get_args(Overlap))}")

    @property
    def num_samples(self) -> int:
        return round(self.clip_seconds * self.sampling_rate)

    @property
    def frame(self) -> int:
        """Samples of a frame."""
        return round(self.sampling_rate / FRAMES_PER_SECOND)


@dataclass(frozen=True)
class Sound:
    """A single sound within its source.

    Attributes:
        source: index of its waveform.
        label: its class.
        start: sample of the source with which it begins.
        power: `(frames,)`, mean square of each frame.
        sounding: `(frames,)`, bool; true at both ends.
    """

    source: int
    label: str
    start: int
    power: np.ndarray
    sounding: np.ndarray


@dataclass(frozen=True)
class Event:
    """A stretch of a source in a mixture: `gain * waveforms[source][source_start : source_start + num_samples]`, added from `onset` on.

    Attributes:
        source: index of its waveform.
        label: its class.
        source_start: sample of the source with which it begins.
        num_samples: its length.
        onset: sample of the mixture with which it begins.
        gain: factor.
        level_db: RMS of its loudest 100 ms in the mixture, in dB of full scale.
    """

    source: int
    label: str
    source_start: int
    num_samples: int
    onset: int
    gain: float
    level_db: float

    @property
    def offset(self) -> int:
        """The sample of the mixture behind its last."""
        return self.onset + self.num_samples


@dataclass(frozen=True)
class Mixture:
    """A clip to be rendered.

    Attributes:
        num_samples: its length.
        events: by onset.
        instant: sample from which on all events sound for a frame; `None` where such an instant was not asked for.
    """

    num_samples: int
    events: tuple[Event, ...]
    instant: int | None

    @property
    def labels(self) -> list[str]:
        """The classes of the events, each once, sorted."""
        return sorted({event.label for event in self.events})

    @property
    def max_overlap(self) -> int:
        """The largest number of events that are under way at once, pauses within them included."""
        return max(sum(event.onset <= start < event.offset for event in self.events) for start in (event.onset for event in self.events))


def find_sound(waveform: np.ndarray, source: int, label: str, settings: MixtureSettings) -> Sound | None:
    """Where a source sounds, or `None` if it is silent: shorter than a frame, or never louder than -60 dB of full scale.

    Args:
        waveform: `(samples,)`, at `settings.sampling_rate`.
        source: the index by which `render` will find it.
        label: its class.
        settings: what counts as sounding.
    """
    frame = settings.frame
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    if len(power) == 0 or power.max() < _power(SILENT_DB):
        return None
    sounding = power >= power.max() * _power(-settings.sounding_db)
    first, last = np.flatnonzero(sounding)[[0, -1]]
    return Sound(source, label, int(first) * frame, power[first : last + 1], sounding[first : last + 1])


def plan_mixtures(
    sounds: Sequence[Sound], settings: MixtureSettings, num_events: Sequence[int], clips: int, seed: int, split: str
) -> list[Mixture]:
    """`clips` mixtures for each number of events, those numbers in turn.

    A mixture follows from the sounds, the rules, the seed, the split's name, its number of events and its own number alone: to ask for more
    clips, or for other numbers of events, changes none of the others.

    Raises:
        UserError: if there are fewer sounds than events or, where no class may repeat, fewer classes.
    """
    return [
        plan_mixture(sounds, settings, events, np.random.default_rng([seed, events, index, *split.encode()]))
        for index in range(clips)
        for events in num_events
    ]


def plan_mixture(sounds: Sequence[Sound], settings: MixtureSettings, num_events: int, generator: np.random.Generator) -> Mixture:
    """One mixture, by the rules above.

    Raises:
        UserError: as `plan_mixtures`.
    """
    length = settings.num_samples
    instant = int(generator.integers(length - settings.frame + 1)) if settings.overlap == "together" else None
    events = [_lay(sound, instant, settings, generator) for sound in _choose(sounds, num_events, settings.repeat_classes, generator)]
    return Mixture(length, tuple(sorted(events, key=lambda event: (event.onset, event.source))), instant)


def render(mixture: Mixture, waveforms: Sequence[np.ndarray] | Mapping[int, np.ndarray] | Waveforms) -> tuple[np.ndarray, Mixture]:
    """The sum of the events.

    Args:
        mixture: as planned.
        waveforms: `waveforms[event.source]` is `(samples,)`; a list, a dictionary or `Waveforms`.

    Returns:
        `(samples,)`, float32, and the mixture with the gains that it has: those planned, all of them smaller by one factor if the sum
        would have exceeded full scale.
    """
    total = np.zeros(mixture.num_samples)
    for event in mixture.events:
        stretch = waveforms[event.source][event.source_start : event.source_start + event.num_samples]
        total[event.onset : event.offset] += event.gain * stretch.astype(np.float64)
    peak = np.abs(total).max()
    if peak > FULL_SCALE:
        factor = float(FULL_SCALE / peak)
        events = (replace(e, gain=e.gain * factor, level_db=e.level_db + 20 * math.log10(factor)) for e in mixture.events)
        total, mixture = total * factor, replace(mixture, events=tuple(events))
    return total.astype(np.float32), mixture


def _choose(sounds: Sequence[Sound], count: int, repeat_classes: bool, generator: np.random.Generator) -> list[Sound]:
    """Different sounds: each time a class, uniform among those that have one left, and one of its sounds."""
    classes = {sound.label for sound in sounds}
    if count < 1:
        raise UserError(f"a mixture of {count} events was asked for, but it has at least 1")
    if count > len(sounds):
        raise UserError(
            f"a mixture of {count} events needs as many different sounds, but there are {len(sounds)}: add some, or mix fewer (num_events)"
        )
    if not repeat_classes and count > len(classes):
        raise UserError(
            f"a mixture of {count} events of different classes was asked for, but there are {len(classes)} classes: allow repeat_classes, "
            "or mix fewer (num_events)"
        )
    left: dict[str, list[Sound]] = {label: [] for label in sorted(classes)}
    for sound in sounds:
        left[sound.label].append(sound)
    chosen = []
    for _ in range(count):
        label = list(left)[generator.integers(len(left))]
        chosen.append(left[label].pop(generator.integers(len(left[label]))))
        if not left[label] or not repeat_classes:
            del left[label]
    return chosen


def _lay(sound: Sound, instant: int | None, settings: MixtureSettings, generator: np.random.Generator) -> Event:
    """A sound, or a window of it, somewhere in the clip."""
    frame = settings.frame
    longest = int(settings.event_seconds * settings.sampling_rate) // frame
    first, end = 0, len(sound.sounding)
    if end > longest:
        first = int(generator.choice(np.flatnonzero(sound.sounding[: end - longest + 1])))
        end = first + int(np.flatnonzero(sound.sounding[first : first + longest])[-1]) + 1
    sounding = np.flatnonzero(sound.sounding[first:end])
    length = (end - first) * frame
    latest = settings.num_samples - length
    if instant is None:
        onset = int(generator.integers(latest + 1))
    else:  # not empty: as no event is longer than half a clip, its first or its last frame can always begin at the instant
        onsets = instant - frame * sounding
        onset = int(generator.choice(onsets[(onsets >= 0) & (onsets <= latest)]))
    lowest, highest = settings.level_db
    level = float(generator.uniform(lowest, highest))
    power = sound.power[first:end]
    window = min(LEVEL_FRAMES, len(power))
    loudest = np.convolve(power, np.ones(window) / window, mode="valid").max()
    return Event(sound.source, sound.label, sound.start + first * frame, length, onset, math.sqrt(_power(level) / loudest), level)


def _power(db: float) -> float:
    return 10 ** (db / 10)
