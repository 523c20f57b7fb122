"""Scores and ground truth of event detection, verified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metrics import plain_array


MICROSECONDS = 1_000_000  # a second; times are compared as integers, so that sums of them are exact


@dataclass(frozen=True)
class Recordings:
    """Verified input; times are integers, in microseconds.

    Attributes:
        scores: of each recording, `(steps, classes)`, float64.
        bounds: of each recording, `(steps + 1,)`: where its steps begin, and the last ends.
        ends: `(recordings,)`, durations.
        events: of each recording and class, onsets and offsets.
        event_counts, event_time: `(recordings, classes)`, number and total length of ground-truth events.
        merged_events: by how many ground-truth events have become fewer.
    """

    names: list[str]
    classes: list[str]
    scores: list[np.ndarray]
    bounds: list[np.ndarray]
    ends: np.ndarray
    events: list[list[tuple[np.ndarray, np.ndarray]]]
    event_counts: np.ndarray
    event_time: np.ndarray
    merged_events: int

    @property
    def with_events(self) -> np.ndarray:
        """Indices of the classes that have ground truth."""
        return np.flatnonzero(self.event_counts.any(0))

    @classmethod
    def of(
        cls,
        scores: Mapping[str, np.ndarray],
        step: float,
        classes: Sequence[str],
        ground_truth: Mapping[str, Sequence[tuple[float, float, str]]],
        durations: Mapping[str, float],
    ) -> "Recordings":
        """Verifies the arguments of [`events.psds`], with the errors described there."""
        names, classes = list(scores), list(classes)
        if not names or not classes:
            raise ValueError(f"there are {len(names)} recordings and {len(classes)} classes, but at least one of each is expected")
        if twice := sorted({c for c in classes if classes.count(c) > 1}):
            raise ValueError(f"the class {twice[0]!r} stands twice in classes: make names differ")
        for title, given in (("ground_truth", ground_truth), ("durations", durations)):
            if different := sorted(set(names) ^ set(given)):
                where = "scores" if different[0] in given else title
                raise ValueError(f"recording {different[0]!r} is missing in {where}: give every recording in scores, ground_truth "
                                 "(an empty list if it has no events) and durations")  # fmt: skip
        if not _is_finite(step) or step < 1 / MICROSECONDS:
            raise ValueError(f"step is {step!r}, but must be a positive number of seconds, for example 0.16")
        arrays, bounds, events = [], [], []
        for name in names:
            arrays.append(_check_scores(scores[name], name, len(classes)))
            bounds.append(_step_bounds(len(arrays[-1]), step, durations[name], name))
            events.append(_check_events(ground_truth[name], name, classes, durations[name]))
        counts = np.array([[len(onsets) for onsets, _ in row] for row in events])
        if not counts.any():
            raise ValueError("ground_truth holds no event, so that the metric is undefined: give recordings with events")
        time = np.array([[int((offsets - onsets).sum()) for onsets, offsets in row] for row in events])
        ends = np.array([_microseconds(durations[name]) for name in names])
        merged = sum(len(ground_truth[name]) for name in names) - int(counts.sum())
        return cls(names, classes, arrays, bounds, ends, events, counts, time, merged)


def _is_finite(seconds: Any) -> bool:
    value = np.asarray(seconds)
    return value.ndim == 0 and value.dtype.kind in "iuf" and bool(np.isfinite(value))


def _microseconds(seconds: float) -> int:
    return round(float(seconds) * MICROSECONDS)


def _check_scores(values: Any, name: str, classes: int) -> np.ndarray:
    values = plain_array(values, f"scores of recording {name!r}")
    if values.ndim != 2 or values.shape[1] != classes:
        raise ValueError(f"scores of recording {name!r} have shape {values.shape}, but (steps, {classes}) is expected, a column a class")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"the score of recording {name!r} at step {row}, column {column}, is {values[row, column]}, but must be finite: "
            "check the model's output"
        )
    return values


def _step_bounds(steps: int, step: float, duration: float, name: str) -> np.ndarray:
    if not _is_finite(duration) or duration < 1 / MICROSECONDS:
        raise ValueError(f"the duration of recording {name!r} is {duration!r}, but must be a positive number of seconds")
    exact = duration / step
    if not exact - 1 - 1e-6 < steps or _microseconds((steps - 1) * step) >= _microseconds(duration):  # one step fewer: rounded down
        raise ValueError(
            f"recording {name!r} has {steps} steps of {step} s, but lasts {duration} s, "
            f"for which {int(np.ceil(exact - 1e-6))} are expected: "
            "check step and durations, and cut off padding"
        )
    return np.minimum(np.rint(np.arange(steps + 1) * step * MICROSECONDS).astype(np.int64), _microseconds(duration))


def _check_events(events: Any, name: str, classes: list[str], duration: float) -> list[tuple[np.ndarray, np.ndarray]]:
    by_class: dict[str, list[tuple[int, int]]] = {c: [] for c in classes}
    for event in events:
        if not hasattr(event, "__len__") or len(event) != 3:
            raise ValueError(f"an event of recording {name!r} is {event!r}, but (onset, offset, label) is expected")
        onset, offset, label = event
        if label not in by_class:
            raise ValueError(f"the event {event!r} of recording {name!r} has an unknown label: give one of classes, {classes[:5]} ...")
        if not (_is_finite(onset) and _is_finite(offset)) or _microseconds(offset) <= _microseconds(onset):
            raise ValueError(f"the event {event!r} of recording {name!r} must end after its onset, both in finite seconds: correct it")
        if onset < 0 or _microseconds(offset) > _microseconds(duration):
            raise ValueError(
                f"the event {event!r} lies outside recording {name!r}, from 0 to {duration} s: cut it off there, or correct the duration"
            )
        by_class[label].append((_microseconds(onset), _microseconds(offset)))
    return [_merge(np.array(sorted(times), np.int64).reshape(-1, 2)) for times in by_class.values()]


def _merge(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Onsets and offsets of the union of `times: (events, 2)`, sorted by onset."""
    reached = np.maximum.accumulate(times[:, 1])
    begins = np.append(True, times[1:, 0] > reached[:-1])[: len(times)]
    ends = np.append(begins[1:], True)[: len(times)]
    return times[begins, 0], reached[ends]
