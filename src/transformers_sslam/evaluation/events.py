"""Metrics of sound event detection from scores over time: PSDS over all thresholds, collar-based and segment-based F1.

```python
scores = {"yard": np.array([[0.9], [0.8], [0.1], [0.1]])}  # recording -> (steps, classes)
result = segment_f1(scores, 0.5, ["dog"], {"yard": [(0.0, 1.2, "dog")]}, {"yard": 2.0}, threshold=0.5)
result.value  # 0.67: of the two segments of one second that hold a dog, the first is found
```

Step `j` of a recording covers `[j * step, min((j + 1) * step, duration)]` seconds. Scores are used as they are (no median filter), and a
step is active where its score is above the threshold. Adjacent active steps are one detection.

Times are rounded to microseconds and compared as integers, so an event that reaches a criterion exactly meets it. Ground-truth events of
one class that overlap or touch in a recording are merged into one, because no detector could tell them apart, and `merged_events` counts
by how many they have become fewer. (`sed_scores_eval`, the program of Ebbers et al., rejects them.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np

from .event_input import MICROSECONDS, Recordings
from .intervals import check_confidence, logit_interval, percentile_interval, proportion_interval
from .metrics import resampled_weights
from .psd_roc import area, changes_by_class


try:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching
except ImportError as error:
    raise ImportError('metrics need scipy: pip install "transformers-sslam[train]"') from error

GroundTruth = Mapping[str, Sequence[tuple[float, float, str]]]
Interval = tuple[float, float]
Threshold = float | Sequence[float] | Mapping[str, float]


@dataclass(frozen=True)
class EventMetric:
    """A metric of event detection, with bootstrap intervals over recordings.

    Attributes:
        value: PSDS, or F1 averaged over the classes that have ground-truth events (macro).
        by_class: of each class with ground-truth events.
        micro: F1 of the counts of all classes together, also those without ground-truth events; `None` for PSDS, which has none.
        interval, by_class_interval, micro_interval: `(low, high)`; `None` without `confidence`. A resample without ground truth of a class
            leaves this class out, one without any ground truth is left out itself. Where none is left, the bounds are NaN. Where every
            resample has the same value, 0 or 1, the interval is Wilson's, of as many trials as recordings hold events (of the class).
        counts: of each class, `true_positives`, `false_positives` and `false_negatives` at the threshold; `None` for PSDS.
        classes_without_events: for which the metric is undefined, so that they are in no mean over classes.
        merged_events: how many ground-truth events were merged into an earlier one of their class, which they overlap or touch.
    """

    value: float
    by_class: dict[str, float]
    micro: float | None = None
    interval: Interval | None = None
    by_class_interval: dict[str, Interval] | None = None
    micro_interval: Interval | None = None
    counts: dict[str, dict[str, int]] | None = None
    classes_without_events: tuple[str, ...] = ()
    merged_events: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def psds(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    *,
    dtc: float,
    gtc: float,
    cttc: float | None = None,
    alpha_ct: float = 0.0,
    alpha_st: float = 0.0,
    e_max: float = 100.0,
    confidence: float | None = 0.95,
    resamples: int = 100,
    seed: int = 0,
) -> EventMetric:
    """Polyphonic sound detection score over all thresholds (Bilen et al., ICASSP 2020; Ebbers, Serizel and Haeb-Umbach, ICASSP 2022).

    A detection counts if at least `dtc` of it lies in ground truth of its class, and is a false positive otherwise. A ground-truth event
    is found if the detections that count cover at least `gtc` of it. A false positive of which at least `cttc` lies in ground truth of
    another class is also a cross trigger for that class. The effective false-positive rate of a class is (false positives an hour) +
    `alpha_ct` * (mean, over the other classes with ground truth, of cross triggers in an hour of their ground truth). At each rate, the
    effective true-positive ratio is max(0, mean - `alpha_st` * standard deviation) over classes of the best ratio at no higher a rate.
    PSDS is the area below it up to `e_max`, divided by `e_max`; of a class, the area below its own ratio.

    The statistics are exact at every distinct score, in O(n log n) of the steps: each maximal run of steps with no score below that of its
    lowest step is one detection, which exists for thresholds from the highest score beside it to its own lowest one.

    Intervals are normal ones on the logit scale ([`intervals.logit_interval`]). Percentiles would lie too low: a resample holds fewer
    different events, so that classes differ more, which `alpha_st` subtracts. They are taken only where a value is within a standard error
    of 0 or 1.

    Args:
        scores: of each recording, `(steps, classes)`, finite; only their order within a class matters.
        step: seconds.
        classes: names, in the order of the scores' columns.
        ground_truth: of each recording, `(onset, offset, label)` in seconds; an empty list for a recording without events.
        durations: of each recording, seconds.
        dtc, gtc, cttc: detection tolerance, ground truth intersection and cross-trigger tolerance criterion, in (0, 1].
        alpha_ct, alpha_st: cost of cross triggers (with `cttc` alone) and of differences between classes.
        e_max: highest effective false-positive rate, an hour.
        confidence: of the intervals; `None` for none.
        resamples: of the bootstrap over recordings.
        seed: random seed for it.

    Raises:
        ValueError: if there is no recording, class or ground-truth event; names of recordings differ; scores have another shape or are not
            finite numbers; an event has an unknown label, no positive length, or lies outside its recording; a parameter is out of range.
    """
    for name, value in {"dtc": dtc, "gtc": gtc, "cttc": cttc}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, but must lie above 0 and at most at 1, for example 0.7")
    for name, value in {"alpha_ct": alpha_ct, "alpha_st": alpha_st}.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} is {value}, but must be finite and not negative: give 0 for no such cost")
    if not 0 < e_max < np.inf:
        raise ValueError(f"e_max is {e_max}, but must be a positive number of false positives an hour, for example 100")
    if (cttc is None) != (alpha_ct == 0):
        raise ValueError(f"cttc is {cttc} and alpha_ct {alpha_ct}, but cross triggers need both: give both, or neither")
    data = Recordings.of(scores, step, classes, ground_truth, durations)
    curves = changes_by_class(data, dtc, gtc, cttc)
    hours = data.ends / MICROSECONDS / 3600
    event_hours = data.event_time / MICROSECONDS / 3600

    def evaluate(weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """`weights: (resamples, recordings)` -> PSDS `(resamples,)`, by class `(resamples, classes)`."""
        values, by_class = np.full(len(weights), np.nan), np.full((len(weights), len(data.classes)), np.nan)
        for i, weight in enumerate(weights):
            totals, truth_hours = weight @ data.event_counts, weight @ event_hours
            present = np.flatnonzero(totals)
            if len(present):
                rates = np.zeros(1 + len(data.classes))  # what a false positive, or a cross trigger for each class, adds
                rates[0] = 1 / (weight @ hours)
                if alpha_ct and len(present) > 1:
                    rates[1 + present] = alpha_ct / (len(present) - 1) / truth_hours[present]
                rocs = [curves[c].roc(weight, rates, totals[c], e_max) for c in present.tolist()]
                by_class[i, present] = [area(*roc, e_max) for roc in rocs]
                grid = np.unique(np.concatenate([[0.0], *(rate for rate, _ in rocs)]))
                ratios = np.stack([np.append(0, ratio)[np.searchsorted(rate, grid, "right")] for rate, ratio in rocs])
                values[i] = area(grid, np.maximum(ratios.mean(0) - alpha_st * ratios.std(0), 0), e_max)
        return values, by_class

    return _result(data, evaluate, _logit_intervals, confidence, resamples, seed)


def collar_f1(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    threshold: Threshold,
    *,
    onset_collar: float = 0.2,
    offset_collar: float = 0.2,
    offset_collar_rate: float = 0.2,
    confidence: float | None = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> EventMetric:
    """Collar-based (event-based) F1 (Mesaros, Heittola and Virtanen, Applied Sciences 6, 2016, section 3.2).

    A detection matches a ground-truth event of its class if its onset lies within `onset_collar` seconds and its offset within
    max(`offset_collar` seconds, `offset_collar_rate` * length of the ground-truth event). Each is used once: of all such assignments the
    largest counts. F1 = 2 TP / (2 TP + FP + FN). Intervals are percentiles.

    Args:
        threshold: one, or one for each class, in their order or by name; other arguments and errors as of [`psds`].
    """
    for name, value in {"onset_collar": onset_collar, "offset_collar": offset_collar, "offset_collar_rate": offset_collar_rate}.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} is {value}, but must be finite and not negative, for example 0.2")
    data = Recordings.of(scores, step, classes, ground_truth, durations)
    thresholds = _thresholds(threshold, data.classes)
    counts = np.zeros((3, len(data.names), len(data.classes)), np.int64)
    for r, (values, bounds) in enumerate(zip(data.scores, data.bounds)):
        edges = np.diff(np.pad((values > thresholds).astype(np.int8), ((1, 1), (0, 0))), axis=0)
        counts[1, r] = (edges > 0).sum(0)
        for c in np.flatnonzero(data.event_counts[r]):
            onsets, offsets = data.events[r][c]
            starts, stops = bounds[edges[:, c] > 0], bounds[edges[:, c] < 0]
            near = within_collars(starts, stops, onsets, offsets, onset_collar, offset_collar, offset_collar_rate)
            found = largest_matching(near)
            counts[:, r, c] += found, -found, len(onsets) - found
    return _f1(data, counts, confidence, resamples, seed)


def segment_f1(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    threshold: Threshold,
    *,
    segment: float = 1.0,
    confidence: float | None = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> EventMetric:
    """Segment-based F1 (Mesaros, Heittola and Virtanen, Applied Sciences 6, 2016, section 3.1).

    A recording is cut into segments of `segment` seconds, the last of which may reach beyond its end. A class is active in a segment, in
    the ground truth or the detections, if an event overlaps it; one that only touches its border does not. F1 and intervals are those of
    [`collar_f1`].

    Args:
        segment: seconds.
        threshold: one, or one for each class, in their order or by name; other arguments and errors as of [`psds`].
    """
    if not 1 / MICROSECONDS <= segment < np.inf:
        raise ValueError(f"segment is {segment}, but must be a positive number of seconds, for example 1")
    data = Recordings.of(scores, step, classes, ground_truth, durations)
    thresholds, length = _thresholds(threshold, data.classes), round(segment * MICROSECONDS)
    counts = np.zeros((3, len(data.names), len(data.classes)), np.int64)
    for r, (values, bounds) in enumerate(zip(data.scores, data.bounds)):
        segments = -(-data.ends[r] // length)
        steps, columns = np.nonzero(values > thresholds)
        found = _active_segments(bounds[steps], bounds[steps + 1], columns, (segments, len(data.classes)), length)
        true = true_segments(data.events[r], segments, length)
        counts[:, r] = (found & true).sum(0), (found & ~true).sum(0), (~found & true).sum(0)
    return _f1(data, counts, confidence, resamples, seed)


def true_segments(events: Sequence[tuple[np.ndarray, np.ndarray]], segments: int, length: int) -> np.ndarray:
    """`(segments, classes)`: whether one of a class's `events` (onsets and offsets) overlaps a segment of this length."""
    columns = np.repeat(np.arange(len(events)), [len(onsets) for onsets, _ in events])
    onsets, offsets = (np.concatenate(times) for times in zip(*events))
    return _active_segments(onsets, offsets, columns, (segments, len(events)), length)


def _active_segments(onsets, offsets, columns, shape: tuple[int, int], length: int) -> np.ndarray:
    """`shape: (segments, classes)`: whether an event from `onsets` to `offsets` overlaps a segment in its column."""
    edges = np.zeros((shape[0] + 1, shape[1]), np.int64)
    np.add.at(edges, (onsets // length, columns), 1)
    np.add.at(edges, (-(-offsets // length), columns), -1)
    return np.cumsum(edges, axis=0)[:-1] > 0


def within_collars(
    starts: np.ndarray,
    stops: np.ndarray,
    onsets: np.ndarray,
    offsets: np.ndarray,
    onset_collar: float = 0.2,
    offset_collar: float = 0.2,
    offset_collar_rate: float = 0.2,
) -> np.ndarray:
    """`(detections, events)`: which detections, from `starts` to `stops`, match which events; see [`collar_f1`]. Times in microseconds."""
    collars = np.maximum(offset_collar * MICROSECONDS, offset_collar_rate * (offsets - onsets))
    near = np.rint(np.abs(starts[:, None] - onsets) - onset_collar * MICROSECONDS) <= 0
    return near & (np.rint(np.abs(stops[:, None] - offsets) - collars) <= 0)


def largest_matching(near: np.ndarray) -> int:
    """Size of the largest set of pairs of `near: (detections, events)` that share neither."""
    of_detection, of_event = near.sum(1), near.sum(0)
    if of_detection.max(initial=0) < 2:  # as most often, which tuning is faster for
        return int(np.count_nonzero(of_event))
    return int(np.count_nonzero(maximum_bipartite_matching(csr_array(near), perm_type="column") >= 0))


def _thresholds(threshold: Threshold, classes: Sequence[str]) -> np.ndarray:
    given = [threshold.get(name) for name in classes] if isinstance(threshold, Mapping) else threshold
    values = np.asarray(given, dtype=object)
    is_number = all(isinstance(value, Real) and not math.isnan(value) for value in values.flat)
    if not is_number or values.shape not in ((), (len(classes),)) or (isinstance(threshold, Mapping) and set(threshold) != set(classes)):
        raise ValueError(
            f"threshold is {threshold!r}, but one number, or one for each of {len(classes)} classes, is expected: {', '.join(classes[:5])}"
            + (" ..." if len(classes) > 5 else "")
        )
    return np.broadcast_to(values.astype(np.float64), (len(classes),))


def _f1(data: Recordings, counts: np.ndarray, confidence: float | None, resamples: int, seed: int) -> EventMetric:
    """`counts: (3, recordings, classes)`: true positives, false positives, false negatives."""

    def evaluate(weights: np.ndarray) -> tuple[np.ndarray, ...]:
        true, false, missed = weights @ counts
        with np.errstate(invalid="ignore"):  # 0 / 0 where undefined
            by_class = np.where(true + missed > 0, 2 * true / (2 * true + false + missed), np.nan)
            true, false, missed = (x.sum(1) for x in (true, false, missed))
            micro = np.where(true + missed > 0, 2 * true / (2 * true + false + missed), np.nan)
            macro = np.nansum(by_class, axis=1) / (~np.isnan(by_class)).sum(1)
        return macro, by_class, micro

    names = ("true_positives", "false_positives", "false_negatives")
    by_class = {name: dict(zip(names, totals.tolist())) for name, totals in zip(data.classes, counts.sum(1).T)}
    return _result(data, evaluate, _percentile_intervals, confidence, resamples, seed, by_class)


def _percentile_intervals(values: np.ndarray, replicates: np.ndarray, confidence: float) -> np.ndarray:
    """Of each statistic, `values: (n,)`, `replicates: (resamples, n)`: `(2, n)`, extended to the value. A resample lacks some classes where
    these have few events, so that most replicates can lie above it."""
    low, high, _ = percentile_interval(replicates, confidence)
    return np.stack((np.fmin(low, values), np.fmax(high, values)))


def _logit_intervals(values: np.ndarray, replicates: np.ndarray, confidence: float) -> np.ndarray:
    """As `_percentile_intervals`, but around the value. Within a standard error of 0 or 1 a logit interval would span nearly all from 0 to
    1, and at these ends there is none: there percentiles remain."""
    bounds = _percentile_intervals(values, replicates, confidence)
    inside = np.flatnonzero(np.minimum(values, 1 - values) > np.nanstd(replicates, axis=0, ddof=1))
    bounds[:, inside] = logit_interval(values[inside], replicates[:, inside], confidence)[:2]
    return bounds


def _result(
    data: Recordings,
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    interval: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    confidence: float | None,
    resamples: int,
    seed: int,
    counts: dict[str, dict[str, int]] | None = None,
) -> EventMetric:
    value, by_class, *micro = evaluate(np.ones((1, len(data.names)), np.int64))
    names = [data.classes[c] for c in data.with_events]
    fields: dict[str, Any] = {
        "counts": counts,
        "classes_without_events": tuple(name for name in data.classes if name not in names),
        "merged_events": data.merged_events,
    }
    if confidence is not None:
        check_confidence(confidence)
        blocks = [evaluate(weights) for weights in resampled_weights(len(data.names), resamples, seed)]
        replicates = [np.concatenate(parts) for parts in zip(*blocks)]
        columns, recordings = data.with_events, [int(data.event_counts.any(1).sum())]
        by_class_recordings = np.count_nonzero(data.event_counts[:, columns], axis=0).tolist()

        def intervals(values: np.ndarray, replicates: np.ndarray, trials: list[int]) -> list[Interval]:
            return [
                proportion_interval(round(one * count), count, confidence) if low == high == one and one in (0, 1) else (low, high)
                for one, count, (low, high) in zip(values.tolist(), trials, interval(values, replicates, confidence).T.tolist())
            ]

        fields["interval"] = intervals(value, replicates[0][:, None], recordings)[0]
        fields["by_class_interval"] = dict(zip(names, intervals(by_class[0, columns], replicates[1][:, columns], by_class_recordings)))
        fields["micro_interval"] = intervals(micro[0], replicates[2][:, None], recordings)[0] if micro else None
    scores_by_class = dict(zip(names, by_class[0, data.with_events].tolist()))
    return EventMetric(float(value[0]), scores_by_class, float(micro[0][0]) if micro else None, **fields)
