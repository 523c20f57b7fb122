"""Filters and thresholds of event detection, chosen for each class on validation clips.

```python
settings = tune_events(scores, step, classes, ground_truth, durations, metric="segment", max_false_alarms=6)
evaluate_events(other_scores, step, classes, other_ground_truth, other_durations, settings)
```

For each class and each filter F1 is computed at every threshold that makes a difference, so that the result is the best one
there is on these clips. On them F1 is then too high: evaluate on others. PSDS, which is over all thresholds, depends on the filter alone:
it gains from longer ones than segments do, and most from change filters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from ..events_sslam import EventSettings, filter_scores
from ..filters_sslam import filter_halves
from .event_input import MICROSECONDS, Recordings
from .event_results import SCENARIOS
from .events import GroundTruth, largest_matching, psds, true_segments, within_collars
from .false_alarms import Choice, choose_within, front, hours_of, wrong_detections
from .psd_roc import Detections, Timeline


TunedMetric = Literal["segment", "collar", "psds"]
LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of median filters, in seconds
CHANGE_LENGTHS = (1.0, 2.0, 3.0, 4.0, 5.0)  # of change filters


def tune_events(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    *,
    lengths: Sequence[float] = LENGTHS,
    change_lengths: Sequence[float] = (),
    metric: TunedMetric = "segment",
    max_false_alarms: float | None = None,
    before: EventSettings | None = None,
) -> EventSettings:
    """The filter and the threshold of each class that give it the highest F1; or the filter of the highest PSDS, and
    the threshold of the highest segment F1 with it. Nothing is random.

    The threshold lies between the lowest score that should count and the next lower one. Of equally good ones the highest is taken, and of
    equally good filters the shortest.

    With `max_false_alarms` those of all classes are chosen together: the highest mean F1 with no more false alarms
    ([`false_alarms.choose_within`]), of thresholds that are not lower than the best ones without a limit for the same filter. Of equally
    good ones of a class, those of the fewest false alarms are taken. A class that finds nothing within the
    limit, or has no ground-truth events, has no false alarms: its filter stays as before, and so does its threshold unless a score is
    above it, when it is raised above the highest.

    Args:
        scores, step, classes, ground_truth, durations: as of [`event_results.evaluate_events`].
        lengths: of the median filter, in seconds. Of those that are the same number of steps, the first is tried.
        change_lengths: of the change filter, which are tried after them, without a median filter.
        metric: F1 of segments of 1 s, or of collars of 0.2 s ([`events.segment_f1`], [`events.collar_f1`]); `"psds"`: PSDS of scenario 1
            of the class, as systems of DCASE task 4 choose their filters.
        max_false_alarms: an hour, of all classes together, on these recordings: see the module `false_alarms`. `None`: any number.
        before: settings (by default those of `EventSettings`) of which classes keep filter and threshold if they have no ground-truth
            events, or no threshold finds one.

    Returns:
        Settings with `threshold`, `median_filter` and, if one is used, `change_filter` by label, and neither hysteresis, gaps nor a
        shortest duration.

    Raises:
        ValueError: as of [`events.psds`], or if there is no length, one is out of range, the metric is unknown, or the limit negative.
    """
    if metric not in get_args(TunedMetric):
        raise ValueError(f"metric is {metric!r}, but one of {', '.join(get_args(TunedMetric))} is expected")
    if not lengths:
        raise ValueError("lengths is empty, but at least one length of the median filter, in seconds, is expected: give 0 for no filter")
    check_limit(max_false_alarms)
    data, limited = Recordings.of(scores, step, classes, ground_truth, durations), max_false_alarms is not None
    kept = (before or EventSettings()).by_class(data.classes)
    found: dict[int, list[Choice]] = {c: [] for c in data.with_events.tolist()}
    filters = [(length, 0.0) for length in _different(lengths, step)]
    filters += [(0.0, length) for length in _different(change_lengths, step) if filter_halves(length, step)]
    for median, change in filters:
        filtered = _filtered(data, step, EventSettings(median_filter=median, change_filter=change))
        areas = _psds_by_class(filtered, step, ground_truth, durations) if metric == "psds" else {}
        of_class = _CollarCounts(filtered) if metric == "collar" else _SegmentCounts(filtered)
        timeline = Timeline(filtered)
        for c, choices in found.items():
            wrong = wrong_detections(timeline, c) if limited else None
            area = areas.get(data.classes[c], 0.0)
            if choices and area > choices[0].area:
                choices.clear()
            if not choices or area == choices[0].area:
                choices += _choices(*of_class(c), wrong, area, (median, change))
    fronts = {c: front(choices) for c, choices in found.items()}
    if max_false_alarms is None:
        chosen = {c: choices[-1] for c, choices in fronts.items() if choices}
    else:
        chosen = choose_within(fronts, int(max_false_alarms * hours_of(data) + 1e-9))
        highest = np.max([values.max(0) for values in _filtered(data, step, before or EventSettings()).scores], axis=0)
        silent = [_between(value, 1.0) if value < 1 else 1.0 for value in highest.tolist()]
        kept["threshold"] = np.where(kept["threshold"] >= highest, kept["threshold"], silent)
    by_label: dict[str, dict[str, float]] = {"threshold": {}, "median_filter": {}, "change_filter": {}}
    for c, label in enumerate(data.classes):
        found_here = (chosen[c].threshold, *chosen[c].filters) if c in chosen else (float(kept[name][c]) for name in by_label)
        for values, value in zip(by_label.values(), found_here):
            values[label] = value
    if not any(by_label["change_filter"].values()):
        del by_label["change_filter"]
    return EventSettings(**by_label)


def _different(lengths: Sequence[float], step: float) -> list[float]:
    """In their order, of those that are the same number of steps the first."""
    ordered = np.array(sorted(lengths))
    return ordered[np.unique(filter_halves(ordered, step), return_index=True)[1]].tolist()


def check_limit(max_false_alarms: float | None) -> None:
    """`ValueError` unless it is a number of false alarms an hour, or `None`."""
    if max_false_alarms is not None and not 0 <= max_false_alarms < np.inf:
        raise ValueError(f"max_false_alarms is {max_false_alarms}, but a number an hour that is not negative is expected, for example 6")


def _filtered(data: Recordings, step: float, settings: EventSettings) -> Recordings:
    return replace(data, scores=[filter_scores(values, step, data.classes, settings) for values in data.scores])


def _psds_by_class(data: Recordings, step: float, ground_truth: GroundTruth, durations: Mapping[str, float]) -> dict[str, float]:
    """PSDS of scenario 1 of each class with events."""
    scores = dict(zip(data.names, data.scores))
    return psds(scores, step, data.classes, ground_truth, durations, **SCENARIOS["psds1_macro"], confidence=None).by_class


def _choices(
    scores: np.ndarray, true: np.ndarray, found: np.ndarray, total: int, wrong: Detections | None, area: float, filters: tuple[float, float]
) -> list[Choice]:
    """The thresholds, from that of the highest F1 upwards, of which no other one has as high an F1 with as few false alarms; of equal ones
    the highest. Lower ones are left out, because where a class is found nearly all the time, false alarms are few, but long.

    Args:
        scores, true, found: `(n,)`; by how much true positives, and all positives, change where the threshold falls below each score.
        total: number of true positives that there could be.
        wrong: false alarms, if they count.
        area, filters: PSDS with these filters, and their lengths.
    """
    alarms = np.zeros_like(true)
    if wrong is not None:
        one = np.ones(len(wrong.appears), dtype=int)
        scores = np.concatenate((scores, wrong.appears, wrong.vanishes))
        alarms = np.concatenate((alarms, one, -one))
        true, found = (np.append(counts, np.zeros(2 * len(one), dtype=int)) for counts in (true, found))
    order = np.argsort(-scores, kind="stable")
    order = order[: (scores > 0).sum()]  # no threshold is lower than 0
    if not len(order):
        return []
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    true, found, alarms = (np.cumsum(counts[order])[last] for counts in (true, found, alarms))
    f1, scores = 2 * true / (found + total), np.append(scores[last], 0.0)
    f1, alarms = (values[: f1.argmax() + 1] for values in (f1, alarms))
    by_alarms = np.lexsort((-f1, alarms))
    best = by_alarms[np.diff(np.maximum.accumulate(f1[by_alarms]), prepend=0.0) > 0]
    return [Choice(area, float(f1[i]), int(alarms[i]), _between(float(scores[i + 1]), float(scores[i])), filters) for i in best.tolist()]


def _between(lower: float, upper: float) -> float:
    """A short decimal in the middle of `[lower, upper)`."""
    middle = (lower + upper) / 2
    return next((short for digits in range(2, 17) if lower <= (short := round(middle, digits)) < upper), lower)


class _SegmentCounts:
    """For [`events.segment_f1`] with segments of 1 s: by class, what [`_choices`] takes."""

    def __init__(self, data: Recordings):
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
    """For [`events.collar_f1`]: by class, what [`_choices`] takes.

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
