"""Mixtures of single sounds: planned first, from a seed alone, and then rendered.

```python
sounds = [sound for i, (waveform, label) in enumerate(zip(waveforms, labels)) if (sound := find_sound(waveform, i, label, settings))]
for mixture in plan_mixtures(sounds, settings, num_events=[1, 4, 14], clips=100, seed=0, split="train"):
    waveform, mixture = render(mixture, waveforms)  # and mixture.labels, mixture.events[0].onset ...
```

The rules, in frames of 10 ms:

- A frame of a source *sounds* if it is at most `sounding_db` below the source's loudest frame. A *sound* lasts from the first such frame
  to the last, pauses included.
- An *event* is one whole sound or, of one longer than `event_seconds`, a window that begins with a sounding frame, uniform among those
  that leave room for the window, and is trimmed at its end. It is added without fades, times a constant gain.
- Gains: the level of each event, the RMS of its loudest 100 ms, is uniform in `level_db`, in dB of full scale. (Over the whole event,
  ticks with pauses would count as faint.) A mixture that exceeds full scale is scaled down, its gains and levels with it.
- Onsets, `overlap: together`: an instant is uniform in the clip, and each event is placed so that one of its sounding frames, uniform
  among those with which the whole event lies in the clip, begins at that instant.
  `overlap: anywhere`: the onset of each event is uniform among those with which it lies in the clip.
- Background, if there is one: a random part of a recording, at a level (RMS of all of it) that is uniform in `background_db`.
- Sounds: the class of an event is uniform among the classes, its sound uniform among those of the class; no sound comes twice in a
  mixture, and no class does if `repeat_classes` is false.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..errors import UserError
from ..settings import setting


Overlap = Literal["together", "anywhere"]
Recordings = Sequence[np.ndarray] | Mapping[int, np.ndarray]

FRAMES_PER_SECOND = 100
LEVEL_FRAMES = 10  # length of the window whose largest RMS is the level of an event
SILENT_DB = -60.0  # of full scale: a source whose loudest frame is below it is silent
SILENT_BACKGROUND_DB = -100.0  # of full scale: raised to the level of a background, it would be rounding noise alone
FULL_SCALE = 1 - 2**-15  # the largest sample of 16 bits


@dataclass(frozen=True, kw_only=True)
class MixingRules:
    """Rules of mixing that hold for clips of any length.

    Raises:
        UserError: if a value is out of range.
    """

    event_seconds: float | None = setting(
        "longest event in seconds, at most half of a clip, to which longer sounds are cut; null: half of a clip", None
    )
    sounding_db: float = setting("largest difference in dB of a sounding frame from the loudest of its source", 40.0)
    level_db: list[float] = setting("range of an event's level, the RMS of its loudest 100 ms, in dB of full scale", [-35.0, -25.0])
    background_db: list[float] = setting("range of the background's level, its RMS, in dB of full scale", [-60.0, -45.0])
    overlap: Overlap = setting("together: at one instant all events sound; anywhere: their onsets are independent", "together")
    repeat_classes: bool = setting("whether a mixture may have several events of a class", True)

    def __post_init__(self):
        if not 0 < self.sounding_db < math.inf:
            raise UserError(f"sounding_db is {self.sounding_db}, but must be a number of dB above 0")
        for name in ("level_db", "background_db"):
            level = getattr(self, name)
            if len(level) != 2 or not -math.inf < level[0] <= level[1] <= 0:
                raise UserError(f"{name} is {level}, but must be [lowest, highest] in dB of full scale, not above 0")
        if self.overlap not in get_args(Overlap):
            raise UserError(f"overlap is {self.overlap!r}, but must be one of {', '.join(get_args(Overlap))}")


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(MixingRules):
    """Rules of mixing.

    Raises:
        UserError: if a value is out of range.
    """

    sampling_rate: int = setting("sampling rate in Hz; sources at other rates are resampled", 16_000)
    clip_seconds: float = setting("length of a mixture in seconds", 10.0)

    def __post_init__(self):
        super().__post_init__()
        if not 1000 <= self.sampling_rate <= 655_350:  # which FLAC can hold
            raise UserError(f"sampling_rate is {self.sampling_rate}, but must be 1000 to 655350 Hz")
        if not self.clip_seconds <= 3600:
            raise UserError(f"clip_seconds is {self.clip_seconds:g}, but must be at most 3600: a mixture is made in memory")
        if not 1 / FRAMES_PER_SECOND <= self.longest_event <= self.clip_seconds / 2 < math.inf:
            raise UserError(
                f"event_seconds is {self.longest_event:g}, but must lie between 0.01 and half of clip_seconds, {self.clip_seconds / 2:g}"
            )

    @property
    def longest_event(self) -> float:
        """Seconds."""
        return self.clip_seconds / 2 if self.event_seconds is None else self.event_seconds

    @property
    def num_samples(self) -> int:
        return round(self.clip_seconds * self.sampling_rate)

    @property
    def frame(self) -> int:
        """Samples of a frame."""
        return round(self.sampling_rate / FRAMES_PER_SECOND)


@dataclass(frozen=True)
class Sound:
    """A single sound within its source."""

    source: int  # index of its waveform
    label: str  # its class
    start: int  # its first sample in the source
    power: np.ndarray  # `(frames,)`, mean square of each frame
    sounding: np.ndarray  # `(frames,)`, bool; true at both ends


@dataclass(frozen=True)
class Event:
    """A part of a source in a mixture: `gain * waveforms[source][source_start : source_start + num_samples]`, added from `onset` on."""

    source: int
    label: str  # its class
    source_start: int
    num_samples: int
    onset: int
    gain: float
    level_db: float  # RMS of its loudest 100 ms in the mixture, in dB of full scale

    @property
    def offset(self) -> int:
        """The sample of the mixture after its last."""
        return self.onset + self.num_samples


@dataclass(frozen=True)
class Background:
    """A part of a recording below a whole clip, from sample `start` on, times `gain`; one that is too short begins again."""

    source: int
    start: int
    gain: float
    level_db: float  # RMS in the mixture, in dB of full scale


@dataclass(frozen=True)
class Mixture:
    """A planned clip."""

    num_samples: int
    events: tuple[Event, ...]  # by onset
    instant: int | None  # sample from which all events sound for a frame; `None` with `overlap: anywhere`
    background: Background | None = None

    @property
    def labels(self) -> list[str]:
        """The classes of the events, each once, sorted."""
        return sorted({event.label for event in self.events})

    @property
    def max_overlap(self) -> int:
        """The largest number of simultaneous events, pauses within them included."""
        return max((sum(event.onset <= latest.onset < event.offset for event in self.events) for latest in self.events), default=0)


def find_sound(waveform: np.ndarray, source: int, label: str, settings: MixtureSettings) -> Sound | None:
    """The sound of a source, `(samples,)`, or `None` if it is silent: shorter than a frame, or never above -60 dB of full scale.

    Args:
        waveform: at `settings.sampling_rate`.
        source: its index in the waveforms that [`render`] takes.
        label: its class.
        settings: the threshold of a sounding frame.
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
    """`clips` mixtures for each number of events, those numbers in turn. Other mixtures do not change one.

    Raises:
        UserError: if there are fewer sounds than events or, where no class may repeat, fewer classes.
    """
    return [
        plan_mixture(sounds, settings, events, np.random.default_rng([seed, events, index, *split.encode()]))
        for index in range(clips)
        for events in num_events
    ]


def plan_mixture(sounds: Sequence[Sound], settings: MixtureSettings, num_events: int, generator: np.random.Generator) -> Mixture:
    """One mixture, by the rules above. Raises as `plan_mixtures`."""
    length = settings.num_samples
    instant = int(generator.integers(length - settings.frame + 1)) if settings.overlap == "together" else None
    events = [_place(sound, instant, settings, generator) for sound in _choose(sounds, num_events, settings.repeat_classes, generator)]
    return Mixture(length, tuple(sorted(events, key=lambda event: (event.onset, event.source))), instant)


def plan_background(backgrounds: Recordings, settings: MixtureSettings, generator: np.random.Generator) -> Background:
    """A random part of a random recording, by the rules above. Of a silent part the gain is 1."""
    source = int(generator.integers(len(backgrounds)))
    start = int(generator.integers(max(0, len(backgrounds[source]) - settings.num_samples) + 1))
    lowest, highest = settings.background_db
    level = float(generator.uniform(lowest, highest))
    power = float(np.square(_cut(backgrounds[source], start, settings.num_samples), dtype=np.float64).mean())
    if power < _power(SILENT_BACKGROUND_DB):
        return Background(source, start, 1.0, 10 * math.log10(power) if power else -math.inf)
    return Background(source, start, math.sqrt(_power(level) / power), level)


def render(mixture: Mixture, waveforms: Recordings, backgrounds: Recordings = ()) -> tuple[np.ndarray, Mixture]:
    """The sum of the events and the background.

    Args:
        mixture: as planned.
        waveforms: `waveforms[event.source]` is `(samples,)`.
        backgrounds: likewise of the background's source.

    Returns:
        `(samples,)`, float32, and the mixture with its final gains: all smaller by one factor if the sum would have exceeded full scale.
    """
    total, background = np.zeros(mixture.num_samples), mixture.background
    if background is not None:
        total += background.gain * _cut(backgrounds[background.source], background.start, mixture.num_samples)
    for event in mixture.events:
        part = waveforms[event.source][event.source_start : event.source_start + event.num_samples]
        total[event.onset : event.offset] += event.gain * part.astype(np.float64)
    peak = np.abs(total).max()
    if peak > FULL_SCALE:
        factor = float(FULL_SCALE / peak)
        events = (replace(e, gain=e.gain * factor, level_db=e.level_db + 20 * math.log10(factor)) for e in mixture.events)
        if background is not None:
            background = replace(background, gain=background.gain * factor, level_db=background.level_db + 20 * math.log10(factor))
        total, mixture = total * factor, replace(mixture, events=tuple(events), background=background)
    return total.astype(np.float32), mixture


def _cut(waveform: np.ndarray, start: int, samples: int) -> np.ndarray:
    return np.resize(waveform[start : start + samples], samples)


def _choose(sounds: Sequence[Sound], count: int, repeat_classes: bool, generator: np.random.Generator) -> list[Sound]:
    """Different sounds: each time a class, uniform among those that have one left, and one of its sounds."""
    classes = {sound.label for sound in sounds}
    if count < 0:
        raise UserError(f"a mixture of {count} events is not possible: num_events must be at least 1, or 0 for a background alone")
    if count > len(sounds):
        raise UserError(f"a mixture of {count} events needs as many different sounds, but there are {len(sounds)}: lower num_events")
    if not repeat_classes and count > len(classes):
        raise UserError(
            f"a mixture of {count} events of different classes needs as many classes, but there are {len(classes)}: set repeat_classes, "
            "or lower num_events"
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


def _place(sound: Sound, instant: int | None, settings: MixtureSettings, generator: np.random.Generator) -> Event:
    """An event of a sound, or of a window of it, at a random onset and level."""
    frame = settings.frame
    longest = int(settings.longest_event * settings.sampling_rate) // frame
    first, end = 0, len(sound.sounding)
    if end > longest:
        first = int(generator.choice(np.flatnonzero(sound.sounding[: end - longest + 1])))
        end = first + int(np.flatnonzero(sound.sounding[first : first + longest])[-1]) + 1
    sounding = np.flatnonzero(sound.sounding[first:end])
    length = (end - first) * frame
    latest = settings.num_samples - length
    if instant is None:
        onset = int(generator.integers(latest + 1))
    else:  # never empty: an event lasts at most half a clip, so its first or last frame can begin at the instant
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
