"""Results of sound event detection: every metric from scores over time and settings, of each class, and by number of simultaneous sounds.

```python
results = evaluate_events(scores, 0.16, classes, ground_truth, durations, EventSettings(threshold=0.4, median_filter=0.5))
results["metrics"]["psds1"], results["per_class"]["dog"]["segment_f1"]
```

PSDS is of the scores after the filters, over all thresholds. F1 is of the events that `find_events` finds with these settings, which
are those of `sslam detect`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..events_sslam import EventSettings, filter_scores, find_events
from .event_input import MICROSECONDS, Recordings
from .events import EventMetric, GroundTruth, collar_f1, psds, segment_f1
from .false_alarms import count_false_alarms


# DESED's scenarios in DCASE task 4. The macro variant has no penalty for differences between classes, as PretrainedSED reports.
SCENARIOS: dict[str, dict[str, Any]] = {
    "psds1": {"dtc": 0.7, "gtc": 0.7, "alpha_st": 1.0},
    "psds1_macro": {"dtc": 0.7, "gtc": 0.7},
    "psds2": {"dtc": 0.1, "gtc": 0.1, "cttc": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0},
}
F1: dict[str, Callable[..., EventMetric]] = {"segment_f1": segment_f1, "collar_f1": collar_f1}
EVENT_METRICS = ("segment_f1", "collar_f1", "psds1", "psds2")  # of a class, for which psds1_macro is psds1


def evaluate_events(
    scores: Mapping[str, np.ndarray],
    step: float,
    classes: Sequence[str],
    ground_truth: GroundTruth,
    durations: Mapping[str, float],
    settings: EventSettings,
    *,
    confidence: float | None = 0.95,
) -> dict[str, Any]:
    """All metrics of event detection, with bootstrap intervals over recordings.

    Args:
        scores: of each recording, `(steps, classes)` in [0, 1], before the filters.
        step, classes, ground_truth, durations: as of [`events.psds`].
        settings: how scores become events.
        confidence: of the intervals; `None` for none.

    Returns:
        `metrics`: PSDS of scenarios 1 and 2, and of 1 without the penalty for differences between classes (`psds1_macro`); macro and micro
        F1 of segments of 1 s and of collars of 0.2 s; each with its `_interval`. `classes_without_events` are in no mean.

        `per_class`: the same of each class, `None` where it has no ground-truth events, and `events`, their number.

        `by_overlap`: `recordings` and the metrics of those with 1, 2, ... simultaneous ground-truth events at most, after merging;
        recordings without events are in none. Empty if all recordings with events have the same number.

        `false_alarms`: of the events that these settings find, those of which less than a tenth lies in ground truth of their class:
        `per_hour`, `hours` of all recordings, and `by_class` their number.

        `merged_events`: how many ground-truth events were merged into another of their class, which they overlap or touch.

    Raises:
        ValueError: as of [`events.psds`], and if the settings do not fit.
    """
    filtered = {name: filter_scores(values, step, classes, settings) for name, values in scores.items()}
    activity = event_activity(scores, step, classes, settings, durations)

    def evaluate(names: Sequence[str]) -> dict[str, EventMetric]:
        chosen: list[Any] = [{name: values[name] for name in names} for values in (filtered, activity, ground_truth, durations)]
        about = step, classes, *chosen[2:]
        found = {name: psds(chosen[0], *about, **options, confidence=confidence) for name, options in SCENARIOS.items()}
        return found | {name: metric(chosen[1], *about, 0.5, confidence=confidence) for name, metric in F1.items()}

    found = evaluate(list(scores))
    groups: dict[int, list[str]] = {}
    for name in scores:
        groups.setdefault(max_overlap(ground_truth[name]), []).append(name)
    groups.pop(0, None)
    by_overlap = {
        str(number): {"recordings": len(groups[number]), **_flat(evaluate(groups[number]))} for number in sorted(groups) if len(groups) > 1
    }
    return {
        "metrics": _flat(found) | {"classes_without_events": list(found["psds1"].classes_without_events)},
        "per_class": {label: _of_class(found, label) for label in classes},
        "by_overlap": by_overlap,
        "false_alarms": count_false_alarms(Recordings.of(activity, step, classes, ground_truth, durations), 0.5),
        "merged_events": found["psds1"].merged_events,
    }


def event_activity(
    scores: Mapping[str, np.ndarray], step: float, classes: Sequence[str], settings: EventSettings, durations: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Of each recording, `(steps, classes)`: 1.0 where `find_events` has an event, otherwise 0.0. With a threshold of 0.5 they have the F1
    of these events, gaps that were closed and events that were left out included."""
    columns, activity = {label: i for i, label in enumerate(classes)}, {}
    for name, values in scores.items():
        activity[name] = np.zeros(np.shape(values))
        for event in find_events(values, step, classes, settings, durations[name]):
            activity[name][round(event.start / step) : int(np.ceil(event.end / step - 1e-6)), columns[event.label]] = 1
    return activity


def max_overlap(events: Sequence[tuple[float, float, str]]) -> int:
    """The largest number of classes that sound at one time; those that only touch do not. Events of one class that overlap are one sound,
    as for every metric."""
    active: Counter[str] = Counter()
    most = 0
    changes = [
        (round(time * MICROSECONDS), change, label) for onset, offset, label in events for time, change in ((onset, 1), (offset, -1))
    ]
    for _, change, label in sorted(changes):  # at one time, ends come first
        active[label] += change
        most = max(most, sum(count > 0 for count in active.values()))
    return most


def _flat(found: Mapping[str, EventMetric]) -> dict[str, Any]:
    """Values by name, each followed by its interval."""
    values: dict[str, Any] = {}
    for name, metric in found.items():
        values |= {name: metric.value, f"{name}_interval": metric.interval}
        if metric.micro is not None:
            values |= {f"{name}_micro": metric.micro, f"{name}_micro_interval": metric.micro_interval}
    return values


def _of_class(found: Mapping[str, EventMetric], label: str) -> dict[str, Any]:
    counts = found["collar_f1"].counts or {}
    result: dict[str, Any] = {"events": counts[label]["true_positives"] + counts[label]["false_negatives"]}
    for name in EVENT_METRICS:
        metric = found[name]
        result |= {name: metric.by_class.get(label), f"{name}_interval": (metric.by_class_interval or {}).get(label)}
        if metric.counts is not None:
            result[f"{name}_counts"] = metric.counts[label]
    return result
