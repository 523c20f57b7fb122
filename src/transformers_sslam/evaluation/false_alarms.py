"""False alarms of event detection: how often it finds a sound that is not there.

A false alarm is an event of which less than a tenth lies in ground truth of its class: the detection criterion of PSDS with the tolerance
of scenario 2. So an event with wrong ends is not one, but a sound taken for another is; and recordings without events count too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .event_input import MICROSECONDS, Recordings
from .psd_roc import Detections, Timeline


TOLERANCE = 0.1  # the fraction of an event that must lie in ground truth of its class


@dataclass(frozen=True)
class Choice:
    """A threshold and filters of a class, and what they lead to.

    Attributes:
        area: PSDS of the class, where that is asked for.
        f1: of the class.
        alarms: number of false alarms.
        threshold: of the class.
        filters: lengths of the median filter and of the change filter, in seconds.
    """

    area: float
    f1: float
    alarms: int
    threshold: float
    filters: tuple[float, float]


def wrong_detections(timeline: Timeline, c: int) -> Detections:
    """Those of class `c`, at any threshold, that are false alarms."""
    found = timeline.detections(c)
    return found.at(np.flatnonzero(~timeline.counts(c, found, TOLERANCE)))


def count_false_alarms(data: Recordings, threshold: float) -> dict[str, Any]:
    """False alarms of the events that are above a threshold: `per_hour` of all recordings, `hours`, and `by_class` their number."""
    timeline, by_class = Timeline(data), {}
    for c, label in enumerate(data.classes):
        wrong = wrong_detections(timeline, c)
        by_class[label] = int(((wrong.vanishes <= threshold) & (threshold < wrong.appears)).sum())
    hours = hours_of(data)
    return {"per_hour": sum(by_class.values()) / hours, "hours": hours, "by_class": by_class}


def hours_of(data: Recordings) -> float:
    """Of all recordings."""
    return int(data.ends.sum()) / MICROSECONDS / 3600


def front(choices: Sequence[Choice]) -> list[Choice]:
    """The choices of a class that no other one equals or beats in both F1 and false alarms, by rising F1; of equal ones the first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.alarms, -choice.f1)):
        if choice.f1 > (kept[-1].f1 if kept else 0):
            kept.append(choice)
    return kept


def choose_within(fronts: Mapping[int, Sequence[Choice]], budget: int) -> dict[int, Choice]:
    """One choice of each class: those of the highest mean F1 that have at most `budget` false alarms together.

    They are the best ones there are: false alarms are whole numbers, so that the best mean for each number of them follows, class by
    class, from that of the classes before (a multiple-choice knapsack). A Lagrange multiplier would only find those on the convex hull.

    Args:
        fronts: of each class, see [`front`].

    Returns:
        The choices by class; a class for which nothing is left is missing.
    """
    capacity = min(budget, sum(choices[-1].alarms for choices in fronts.values() if choices))
    best = np.zeros(capacity + 1)  # sum of F1 with at most so many false alarms
    taken = {}
    for c, choices in fronts.items():
        before, best = best, best.copy()
        taken[c] = np.full(capacity + 1, -1, dtype=np.int32)
        for k, choice in enumerate(choices):
            if choice.alarms > capacity:
                break
            value = before[: capacity + 1 - choice.alarms] + choice.f1
            better = np.flatnonzero(value > best[choice.alarms :]) + choice.alarms
            best[better], taken[c][better] = value[better - choice.alarms], k
    chosen, left = {}, capacity
    for c, choices in reversed(list(fronts.items())):
        if (k := int(taken[c][left])) >= 0:
            chosen[c] = choices[k]
            left -= choices[k].alarms
    return chosen
