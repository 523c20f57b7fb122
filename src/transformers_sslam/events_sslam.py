"""From scores over time to events: filters, thresholds, gaps and shortest lengths, for a recording as it arrives."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple, Self, TypedDict

import numpy as np
import torch

from .configuration_sslam import SSLAMConfig
from .filters_sslam import UNIT, ChangeFilter, MedianFilter, filter_halves


BLOCK = 2**18  # scores that are decoded at a time
LONGEST = 86_400  # seconds of a filter, gap or event, far above any that is meant


class Event(NamedTuple):
    """A sound from `start` to `end`, in seconds; `score`, in [0, 1], is the mean of its steps."""

    start: float
    end: float
    label: str
    score: float


ByClass = float | Mapping[str, float]  # one for all classes, or one for each


class EventOptions(TypedDict, total=False):
    """Fields of [`EventSettings`] as keywords; `None` for the model's own."""

    threshold: ByClass | None
    onset_threshold: ByClass | None
    median_filter: ByClass | None
    change_filter: ByClass | None
    max_gap: ByClass | None
    min_duration: ByClass | None


@dataclass(frozen=True)
class EventSettings:
    """How scores over time become events. Each is a number, or a number for each label; classes that it leaves out have the default.

    Attributes:
        threshold: a step belongs to an event if its score is above it, after both filters.
        onset_threshold: hysteresis: an event needs a step above it, and extends over the steps around that are above `threshold`. `None`:
            `threshold`, so no hysteresis.
        median_filter: length in seconds, rounded to an odd number of steps; 0 for none.
        change_filter: length in seconds; 0 for none. Events begin and end where scores change most, compared over half the length on each
            side, and have one score, their mean ([`ChangeFilter`]); it follows the median filter.
        max_gap: events of a class with a shorter or equal gap between them, in seconds, are one.
        min_duration: shorter events, in seconds, are left out, after gaps are closed.
    """

    threshold: ByClass = 0.5
    onset_threshold: ByClass | None = None
    median_filter: ByClass = 0.0
    change_filter: ByClass = 0.0
    max_gap: ByClass = 0.0
    min_duration: ByClass = 0.0

    @classmethod
    def of(cls, config: SSLAMConfig, **overrides: Any) -> Self:
        """The settings in a model's `config.event_detection`, with `overrides` that are not `None`.

        An override for some labels leaves the other classes as they are in the model.

        Raises:
            ValueError: if a field or label is unknown, or a value out of range.
        """
        classes = config.class_names
        values: dict[str, Any] = {}
        for source, given in (("config.event_detection", config.event_detection or {}), ("the settings of events", overrides)):
            check_event_options(source, given, classes)
            for name, value in given.items():
                if isinstance(value, Mapping):
                    value = {**_by_label(values.get(name), classes), **value}
                if value is not None:
                    values[name] = value
        settings = cls(**values)
        settings.by_class(classes)
        return settings

    def by_class(self, classes: Sequence[str]) -> dict[str, np.ndarray]:
        """Each field's values `(classes,)`, float64.

        Raises:
            ValueError: if a label is unknown, or a value out of range.
        """
        values: dict[str, np.ndarray] = {}
        for field in fields(self):
            default = values["threshold"] if field.name == "onset_threshold" else np.full(len(classes), field.default)
            given = _by_label(getattr(self, field.name), classes)
            _check(field.name, given, classes)
            values[field.name] = np.array([given.get(label, other) for label, other in zip(classes, default)], dtype=np.float64)
        for label, onset, threshold in zip(classes, values["onset_threshold"], values["threshold"]):
            if onset < threshold:
                raise ValueError(
                    f"onset_threshold is {onset:g} for {label!r}, below its threshold of {threshold:g}, but an event's steps are all above "
                    "threshold: raise onset_threshold, or lower threshold"
                )
        return values


def check_event_options(source: str, given: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise a ValueError if a field of [`EventSettings`] is unknown, or a value out of range, whatever the labels."""
    known = [field.name for field in fields(EventSettings)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{source} cannot have {name!r}: known are {', '.join(known)}")
        values = _by_label(value, classes)
        _check(name, values, list(values))


def _by_label(value: ByClass | None, classes: Sequence[str]) -> dict[str, float]:
    """What is set for some classes or, by one number, for all."""
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else dict.fromkeys(classes, value)


def _check(name: str, values: dict[str, Any], classes: Sequence[str]) -> None:
    if unknown := values.keys() - set(classes):
        some = ", ".join(map(repr, classes[:5])) + (" ..." if len(classes) > 5 else "")
        raise ValueError(f"{name} has a value for {sorted(unknown, key=str)[0]!r}, which is none of the {len(classes)} classes: {some}")
    is_score = name.endswith("threshold")
    for label, value in values.items():
        if not _is_number(value) or not 0 <= value <= (1 if is_score else LONGEST):
            expected = "a number in [0, 1]" if is_score else f"a number of seconds from 0 to {LONGEST}"
            raise ValueError(f"{name} is {value!r} for {label!r}, but {expected} is expected")


@dataclass
class _Stretch:
    """Successive steps of a class.

    Attributes:
        start, end: the first step, and the one after the last.
        before, after: the class's totals up to there.
        final_at: how many steps have to be known until no later run can extend it.
    """

    start: int
    before: tuple[int, int]
    end: int = 0
    after: tuple[int, int] = (0, 0)
    final_at: float = math.inf


_Final = tuple[float, int, _Stretch]  # when it became final, its class


class _Filters:
    """The median filter, and after it the change filter."""

    def __init__(self, values: dict[str, np.ndarray], step: float):
        self._medians = MedianFilter(filter_halves(values["median_filter"], step))
        self._changes = ChangeFilter(filter_halves(values["change_filter"], step))
        self.delay = self._medians.delay + self._changes.delay

    def push(self, scores: np.ndarray) -> np.ndarray:
        return self._changes.push(self._medians.push(scores))

    def finish(self) -> np.ndarray:
        return np.concatenate((self._changes.push(self._medians.finish()), self._changes.finish()))


class EventDecoder:
    """Events of one recording, whose scores arrive piece by piece. Memory does not grow with its length.

    Events come in the order in which they become final, whatever the pieces: of those that the same step makes final the earlier ones
    first, then in the order of the classes.

    Args:
        classes: their names.
        step: length of a time step in seconds.
        settings: see [`EventSettings`].

    Attributes:
        delay: seconds after an event's end for which scores have to be known before it is final. With hysteresis and `max_gap` it may be
            longer: steps above `threshold` that follow within the gap may turn out to continue the event until they end.
    """

    def __init__(self, classes: Sequence[str], step: float, settings: EventSettings):
        if not _is_number(step) or not 0 < step < math.inf:
            raise ValueError(f"step is {step!r}, but must be a positive number of seconds")
        self.classes, self.step = list(classes), float(step)
        values = settings.by_class(self.classes)
        self._threshold, self._onset, self._shortest = values["threshold"], values["onset_threshold"], values["min_duration"]
        # In steps. A millionth of a step is added, because 0.48 / 0.16 may be a little less than 3.
        self._gaps = np.floor(values["max_gap"] / self.step + 1e-6)
        self._filters = _Filters(values, self.step)
        self.delay = float(self._filters.delay + self._gaps.max(initial=0) + 1) * self.step
        self._steps = 0  # that have passed the filters
        # Of those steps, for each class: the sum of scores in units of UNIT, and how many are above the onset threshold.
        self._totals = np.zeros((len(self.classes), 2), dtype=np.int64)
        self._runs: dict[int, _Stretch] = {}  # of each class that is active: its steps above the threshold so far
        self._events: dict[int, _Stretch] = {}  # of some classes: an event that a later run may still extend

    def push(self, scores: np.ndarray | torch.Tensor) -> list[Event]:
        """The events that the scores of the next steps, `(n, classes)`, make final."""
        scores = _checked_scores(scores, len(self.classes))
        rows = max(1, BLOCK // max(1, len(self.classes)))
        pieces = (scores[first : first + rows] for first in range(0, len(scores), rows))
        return [event for piece in pieces for event in self._as_events(self._decode(self._filters.push(piece)))]

    def finish(self, duration: float | None = None) -> list[Event]:
        """The remaining events, because the recording has ended; `duration`, in seconds, limits their ends.

        Raises:
            ValueError: if there are steps that begin after `duration`.
        """
        final = self._decode(self._filters.finish())
        if duration is not None and self._steps > steps_within(duration, self.step):
            raise ValueError(
                f"duration is {duration:g} s, but there are scores of {self._steps} steps of {self.step:g} s: leave out the steps that "
                "begin after the end of the recording"
            )
        for label in list(self._runs):
            self._end_run(label, self._steps, tuple(self._totals[label].tolist()), final)
        final += [(math.inf, label, event) for label, event in self._events.items()]
        self._events = {}
        return self._as_events(final, duration)

    def _decode(self, scores: np.ndarray) -> list[_Final]:
        """What the filtered scores of the next steps make final."""
        final: list[_Final] = []
        if not len(scores):
            return final
        active = scores > self._threshold
        # Totals are only ever subtracted from each other, so that a class without events needs none.
        labels = np.flatnonzero(active.any(0) | np.isin(np.arange(len(self.classes)), [*self._runs, *self._events]))
        scores, active = scores[:, labels].astype(np.float64), active[:, labels]
        counts = np.stack((np.rint(scores / UNIT).astype(np.int64), scores > self._onset[labels]), axis=-1)
        totals = np.cumsum(np.concatenate((self._totals[None, labels], counts)), axis=0)  # before each step, and at last after all
        before = np.isin(labels, list(self._runs))
        times, columns = (active ^ np.concatenate((before[None], active[:-1]))).nonzero()
        changes = (times, labels[columns], active[times, columns], totals[times, columns])
        for i, label, begins, so_far in zip(*(array.tolist() for array in changes)):
            if begins:
                self._runs[label] = _Stretch(self._steps + i, tuple(so_far))
            else:
                self._end_run(label, self._steps + i, tuple(so_far), final)
        self._steps += len(scores)
        self._totals[labels] = totals[-1]
        for label, event in list(self._events.items()):
            run = self._runs.get(label)
            if event.final_at <= self._steps and (run is None or run.start - event.end > self._gaps[label]):
                final.append((event.final_at, label, self._events.pop(label)))
        return final

    def _end_run(self, label: int, end: int, totals: tuple[int, int], final: list[_Final]) -> None:
        """A class is no longer active: its run is an event, extends one, or is neither."""
        run, event, gap = self._runs.pop(label), self._events.get(label), self._gaps[label]
        is_event = totals[1] > run.before[1]  # it has a step above the onset threshold
        if event is not None and run.start - event.end <= gap:
            if not is_event:
                event.final_at = max(event.final_at, end + 1)  # until the run ended, it might have extended the event
            run = event
        elif event is not None and is_event:
            final.append((event.final_at, label, event))
        if is_event:
            run.end, run.after, run.final_at = end, totals, end + gap + 1
            self._events[label] = run

    def _as_events(self, final: list[_Final], duration: float | None = None) -> list[Event]:
        events = []
        for _, label, found in sorted(final, key=lambda item: (item[0], item[2].start, item[1])):
            start, end = (round(steps * self.step, 9) for steps in (found.start, found.end))  # 0.48, not 0.48000000000000004
            end = end if duration is None else min(end, duration)
            if end - start >= self._shortest[label] - 1e-6 * self.step:
                score = (found.after[0] - found.before[0]) * UNIT / (found.end - found.start)
                events.append(Event(start, end, self.classes[label], score))
        return events


def filter_scores(
    scores: np.ndarray | torch.Tensor, step: float, classes: Sequence[str], settings: EventSettings, duration: float | None = None
) -> np.ndarray:
    """What [`find_events`] compares with the thresholds, `(steps, classes)`: the scores after both filters."""
    scores = _checked_scores(scores if duration is None else scores[: steps_within(duration, step)], len(classes))
    filters = _Filters(settings.by_class(classes), step)
    return np.concatenate((filters.push(scores), filters.finish()))


def find_events(
    scores: np.ndarray | torch.Tensor, step: float, classes: Sequence[str], settings: EventSettings, duration: float | None = None
) -> list[Event]:
    """Events of a recording, by their starts, then in the order of the classes.

    Args:
        scores: `(steps, classes)`, in [0, 1].
        step: length of a time step in seconds.
        classes: their names.
        settings: see [`EventSettings`].
        duration: of the recording in seconds: no event ends later, and steps that begin later are ignored.
    """
    decoder = EventDecoder(classes, step, settings)
    found = decoder.push(scores if duration is None else scores[: steps_within(duration, step)])
    return in_order(found + decoder.finish(duration), classes)


def in_order(events: Iterable[Event], classes: Sequence[str]) -> list[Event]:
    """By their starts, then in the order of the classes."""
    places = {label: i for i, label in enumerate(classes)}
    return sorted(events, key=lambda event: (event.start, places[event.label]))


def steps_within(duration: float, step: float) -> int:
    """How many steps begin before the end of a recording."""
    if not _is_number(duration) or not 0 <= duration < math.inf:
        raise ValueError(f"duration is {duration!r}, but must be a finite number of seconds that is not negative")
    return math.ceil(duration / step - 1e-6)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_scores(scores: np.ndarray | torch.Tensor, classes: int) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    is_masked, scores = np.ma.isMaskedArray(scores), np.asarray(scores)
    if is_masked or scores.dtype.kind not in "biufO":
        what = "a masked array" if is_masked else f"of type {scores.dtype}"
        raise ValueError(f"scores is {what}, but a plain array of real numbers is expected: replace what is masked, for example by 0")
    if scores.ndim != 2 or scores.shape[1] != classes:
        raise ValueError(f"scores has shape {scores.shape}, but (steps, {classes}) is expected, a column for each class")
    outside = ~((scores >= 0) & (scores <= 1))
    if outside.any():
        raise ValueError(f"scores holds {scores[outside][0]}, but numbers in [0, 1] are expected: apply the sigmoid to logits first")
    return scores if scores.dtype == np.float64 else scores.astype(np.float32, copy=False)
