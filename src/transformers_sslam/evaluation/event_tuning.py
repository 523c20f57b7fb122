"""Median filters and thresholds of event detection, chosen for each class on validation clips.

```python
settings = tune_events(scores, step, classes, ground_truth, durations, metric="segment")
evaluate_events(other_scores, step, classes, other_ground_truth, other_durations, settings)
```

For each class and each length of the filter F1 is computed at every threshold that makes a difference, so that the result is the best one
there is on these clips. On them F1 is then too high: evaluate on others. PSDS, which is over all thresholds, depends on the filter alone:
it gains from longer ones than segments do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..events_sslam import EventSettings, filter_halves
from .event_input import MICROSECONDS, Recordings
from .event_results import SCENARIOS, filter_scores
from .events import GroundTruth, largest_matching, psds, true_segments, within_collars
from .psd_roc import Timeline


TunedMetric = Literal["segment", "collar", "psds"]
LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of median filters, in seconds


def tune_events(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    *,
    lengths: Sequence[float] = LENGTHS,
    metric: TunedMetric = "segment",
    before: EventSettings | None = None,
) -> EventSettings:
    """The length of the median filter and the threshold of each class that give it the highest F1; or the filter of the highest PSDS, and
    the threshold of the highest segment F1 with it. Nothing is random.

    The threshold lies between the lowest score that should count and the next lower one. Of equally good ones the highest is taken, and of
    equally good filters the shortest.

    Args:
        scores, step, classes, ground_truth, durations: as of [`event_results.evaluate_events`].
        lengths: of the filter, in seconds. Of those that are the same number of steps, the first is tried.
        metric: F1 of segments of 1 s, or of collars of 0.2 s ([`events.segment_f1`], [`events.collar_f1`]); `"psds"`: PSDS of scenario 1
            of the class, as systems of DCASE task 4 choose their filters.
        before: settings (by default those of `EventSettings`) of which classes keep filter and threshold if they have no ground-truth
            events, or no threshold finds one.

    Returns:
        Settings with `threshold` and `median_filter` by label, and neither hysteresis, gaps nor a shortest duration.

    Raises:
        ValueError: as of [`events.psds`], or if there is no length, one is out of range, or the metric is unknown.
    """
    if metric not in get_args(TunedMetric):
        raise ValueError(f"metric is {metric!r}, but one of {', '.join(get_args(TunedMetric))} is expected")
    if not lengths:
        raise ValueError("lengths is empty, but at least one length of the median filter, in seconds, is expected: give 0 for no filter")
    data = Recordings.of(scores, step, classes, ground_truth, durations)
    kept = (before or EventSettings()).by_class(data.classes)
    best = [_Choice(0.0, 0.0, kept["threshold"][c], kept["median_filter"][c]) for c in range(len(data.classes))]
    tried = filter_halves(np.array(sorted(lengths)), step)
    for length in np.array(sorted(lengths))[np.unique(tried, return_index=True)[1]].tolist():
        settings = EventSettings(median_filter=length)
        filtered = replace(data, scores=[filter_scores(values, step, data.classes, settings) for values in data.scores])
        areas = _psds_by_class(filtered, step, ground_truth, durations) if metric == "psds" else {}
        of_class = _CollarCounts(filtered) if metric == "collar" else _SegmentCounts(filtered)
        for c in data.with_events.tolist():
            found = _best_threshold(*of_class(c), areas.get(data.classes[c], 0.0), length)
            if (found.area, found.f1) > (best[c].area, best[c].f1):
                best[c] = found
    by_label = dict(zip(data.classes, best))
    return EventSettings(
        threshold={label: float(choice.threshold) for label, choice in by_label.items()},
        median_filter={label: float(choice.length) for label, choice in by_label.items()},
    )


@dataclass(frozen=True)
class _Choice:
    area: float  # PSDS, where that is asked for
    f1: float
    threshold: float
    length: float


def _psds_by_class(data: Recordings, step: float, ground_truth: GroundTruth, durations: Mapping[str, float]) -> dict[str, float]:
    """PSDS of scenario 1 of each class with events."""
    scores = dict(zip(data.names, data.scores))
    return psds(scores, step, data.classes, ground_truth, durations, **SCENARIOS["psds1_macro"], confidence=None).by_class


def _best_threshold(scores: np.ndarray, true: np.ndarray, found: np.ndarray, total: int, area: float, length: float) -> _Choice:
    """The threshold of the highest F1.

    Args:
        scores, true, found: `(n,)`; by how much true positives, and all positives, change where the threshold falls below each score.
        total: number of true positives that there could be.
        area, length: PSDS with this filter, and its length.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[: (scores > 0).sum()]  # no threshold is lower than 0
    if not len(order):
        return _Choice(0.0, 0.0, 0.5, length)
    scores, true, found = scores[order], np.cumsum(true[order]), np.cumsum(found[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    f1 = 2 * true[last] / (found[last] + total)
    i = int(f1.argmax())
    lower = scores[last[i + 1]] if i + 1 < len(last) else 0.0
    return _Choice(area, float(f1[i]), _between(float(lower), float(scores[last[i]])), length)


def _between(lower: float, upper: float) -> float:
    """A short decimal in the middle of `[lower, upper)`."""
    middle = (lower + upper) / 2
    return next((short for digits in range(2, 17) if lower <= (short := round(middle, digits)) < upper), lower)


class _SegmentCounts:
    """For [`events.segment_f1`] with segments of 1 s: by class, what [`_best_threshold`] takes."""

    def __init__(self, data: Recordings):
        self.data = data
        self.highest, self.true = [], []
        for values, bounds, end, events in zip(data.scores, data.bounds, data.ends.tolist(), data.events):
            shape = -(-end // MICROSECONDS), len(data.classes)
            self.true.append(true_segments(events, shape[0], MICROSECONDS))
            highest = np.full(shape, -np.inf)
            first, last = bounds[:-1] // MICROSECONDS, -(-bounds[1:] // MICROSECONDS) - 1
            for beyond in range(int((last - first).max(initial=0)) + 1):  # most steps lie in one segment, or in two
                steps = first + beyond <= last
                np.maximum.at(highest, first[steps] + beyond, values[steps])
            self.highest.append(highest)

    def __call__(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        highest, true = (np.concatenate([part[:, c] for part in parts]) for parts in (self.highest, self.true))
        return highest, true.astype(int), np.ones_like(highest, dtype=int), int(true.sum())


class _CollarCounts:
    """For [`events.collar_f1`]: by class, what [`_best_threshold`] takes.

    The pairs of a detection and an event within its collars are few, so the largest matching is computed wherever one of them changes.
    """

    def __init__(self, data: Recordings):
        self.data, self.timeline = data, Timeline(data)

    def __call__(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        detections, bounds = self.timeline.detections(c), self.timeline.bounds
        levels = [detections.appears, detections.vanishes]
        found = [np.ones(len(levels[0]), dtype=int), -np.ones(len(levels[0]), dtype=int)]
        true = [np.zeros(2 * len(levels[0]), dtype=int)]
        for r in np.flatnonzero(self.data.event_counts[:, c]).tolist():
            one = detections.at(np.arange(*np.searchsorted(detections.recording, (r, r + 1))))
            near = within_collars(bounds[one.start], bounds[one.stop], *self.data.events[r][c])
            rows = np.flatnonzero(near.any(axis=1))
            one, near = one.at(rows), near[rows]
            scores = np.unique(np.concatenate((one.appears, one.vanishes)))[::-1]
            counts = [largest_matching(near[(one.vanishes < score) & (score <= one.appears)]) for score in scores]
            levels.append(scores)
            true.append(np.diff(counts, prepend=0).astype(int))
            found.append(np.zeros(len(scores), dtype=int))
        return np.concatenate(levels), np.concatenate(true), np.concatenate(found), int(self.data.event_counts[:, c].sum())
