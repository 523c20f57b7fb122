"""ROC curves of event detection over all thresholds, for PSDS.

The counts of a recording are stored as changes: by how much each differs when the threshold falls below a score. Their sums, weighted by
how often a resample holds each recording, are the counts at every threshold (Ebbers, Serizel and Haeb-Umbach, ICASSP 2022).
"""

from dataclasses import dataclass

import numpy as np

from .event_input import Recordings


@dataclass(frozen=True)
class Changes:
    """How a class's counts change as the threshold falls below each score; sorted by falling score.

    Attributes:
        recording, true: `(changes,)`, of which recording, and by how much its found ground-truth events change.
        false: `(changes,)`, change of false positives (`kind` 0) or of cross triggers for class `kind - 1`.
        last: indices of the last change at each distinct score.
    """

    recording: np.ndarray
    true: np.ndarray
    false: np.ndarray
    kind: np.ndarray
    last: np.ndarray

    @classmethod
    def sorted(cls, parts: list[tuple[np.ndarray, ...]]) -> "Changes":
        score, *others = (np.concatenate(column) for column in zip(*parts))
        order = np.argsort(-score)
        order = order[: np.searchsorted(-score[order], np.inf)]  # without what vanishes at minus infinity, so never
        score = score[order]
        recording, true, false, kind = (x[order] for x in others)
        return cls(recording, true, false, kind, np.flatnonzero(np.append(score[1:] != score[:-1], True)[: len(score)]))

    def roc(self, weights: np.ndarray, rates: np.ndarray, total: int, e_max: float) -> tuple[np.ndarray, np.ndarray]:
        """Rising effective false-positive rates up to `e_max`, and the best true-positive ratio up to each, where it rises."""
        weight = weights[self.recording]
        rate = np.maximum(np.cumsum(self.false * weight * rates[self.kind])[self.last], 0)  # rounding may leave less than 0
        ratio = np.cumsum(self.true * weight)[self.last] / total
        inside = rate < e_max
        order = np.lexsort((ratio[inside], rate[inside]))
        rate, ratio = rate[inside][order], np.maximum.accumulate(ratio[inside][order])
        rises = np.diff(ratio, prepend=0) > 0
        return rate[rises], ratio[rises]


@dataclass(frozen=True)
class Detections:
    """All detections of one class at any threshold, in the order of time. `start` and `stop` index `Timeline.bounds`.

    Attributes:
        appears, vanishes: each exists at thresholds below the first score, down to the second.
    """

    recording: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    appears: np.ndarray
    vanishes: np.ndarray

    def at(self, rows: np.ndarray) -> "Detections":
        return Detections(self.recording[rows], self.start[rows], self.stop[rows], self.appears[rows], self.vanishes[rows])

    def changes(self, kind: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Score, recording, change of true and of false positives, and kind, where they appear and where they vanish."""
        one = np.ones_like(self.recording)
        return [(level, self.recording, 0 * one, sign * one, kind * one) for level, sign in ((self.appears, 1), (self.vanishes, -1))]


class Timeline:
    """The steps of all recordings in a row, a separator before, between and after them.

    Attributes:
        first: `(recordings,)`, index of each one's first step.
        bounds: of each recording, its steps' bounds from there on; the last one lies at the separator.
    """

    def __init__(self, data: Recordings):
        self.data = data
        lengths = np.array([len(values) + 1 for values in data.scores])
        self.first = 1 + np.cumsum(lengths) - lengths
        self.bounds = np.concatenate([[0], *data.bounds])

    def covered(self, c: int) -> np.ndarray:
        """At each bound, how much ground truth of class `c` lies before it in its recording."""
        total = np.zeros_like(self.bounds)
        for first, times, row in zip(self.first, self.data.bounds, self.data.events):
            for onset, offset in zip(*row[c]):
                total[first : first + len(times)] += np.clip(times, onset, offset) - onset
        return total

    def counts(self, c: int, found: Detections, dtc: float) -> np.ndarray:
        """Which detections of class `c` count: at least `dtc` of each lies in its ground truth."""
        covered = self.covered(c)
        return covered[found.stop] - covered[found.start] >= np.rint(dtc * (self.bounds[found.stop] - self.bounds[found.start]))

    def detections(self, c: int) -> Detections:
        flat = np.full(len(self.bounds), -np.inf)
        for first, values in zip(self.first, self.data.scores):
            flat[first : first + len(values)] = values[:, c]
        steps = np.flatnonzero(flat > -np.inf)
        sides = []
        for towards in (-1, 1):
            lower = np.arange(len(flat)) + towards  # becomes the nearest step with a lower score; none between is lower
            rows = steps
            while len(rows := rows[flat[lower[rows]] >= flat[rows]]):
                lower[rows] = lower[lower[rows]]
            sides.append(lower[steps])
        before, stop = sides
        _, rows = np.unique(before * len(flat) + stop, return_index=True)
        before, stop = before[rows], stop[rows]
        recording = np.searchsorted(self.first, before + 1, "right") - 1
        return Detections(recording, before + 1, stop, flat[steps[rows]], np.maximum(flat[before], flat[stop]))


def changes_by_class(data: Recordings, dtc: float, gtc: float, cttc: float | None) -> dict[int, Changes]:
    """Of each class with ground truth: the deltas of Ebbers et al. (2022), section 3."""
    timeline = Timeline(data)
    changes, wrong = {}, {}
    for c in data.with_events:
        found = timeline.detections(c)
        counts = timeline.counts(c, found, dtc)
        wrong[c] = found.at(np.flatnonzero(~counts))
        changes[c] = wrong[c].changes(0) + _true_changes(data, c, timeline.bounds, found.at(np.flatnonzero(counts)), gtc)
    for other in data.with_events if cttc is not None else ():
        covered = timeline.covered(other)
        for c, found in wrong.items():
            if c != other:
                needed = np.rint(cttc * (timeline.bounds[found.stop] - timeline.bounds[found.start]))
                changes[c] += found.at(np.flatnonzero(covered[found.stop] - covered[found.start] >= needed)).changes(1 + other)
    return {c: Changes.sorted(parts) for c, parts in changes.items()}


def _true_changes(data: Recordings, c: int, bounds: np.ndarray, found: Detections, gtc: float) -> list[tuple[np.ndarray, ...]]:
    """Where ground-truth events of class `c` become found or lost, given the detections that count."""
    parts: list[tuple[np.ndarray, ...]] = []
    start, stop = bounds[found.start], bounds[found.stop]
    for r in np.flatnonzero(data.event_counts[:, c]):
        rows = slice(*np.searchsorted(found.recording, (r, r + 1)))
        for onset, offset in zip(*data.events[r][c]):
            shared = np.minimum(stop[rows], offset) - np.maximum(start[rows], onset)
            some = shared > 0
            if some.any():
                level = np.concatenate((found.appears[rows][some], found.vanishes[rows][some]))
                order = np.argsort(-level)
                level, total = level[order], np.cumsum(np.concatenate((shared[some], -shared[some]))[order])
                last = np.append(level[1:] != level[:-1], True)
                change = np.diff(total[last] >= np.rint(gtc * (offset - onset)), prepend=False).nonzero()[0]
                sign = 1 - 2 * (np.arange(len(change)) % 2)  # found and lost in turn
                parts.append((level[last][change], np.full_like(sign, r), sign, 0 * sign, 0 * sign))
    return parts


def area(rate: np.ndarray, ratio: np.ndarray, e_max: float) -> float:
    """Mean height of the steps that begin at each `rate`, up to `e_max`."""
    return min(float(ratio @ np.diff(rate, append=e_max)) / e_max, 1.0)  # rounding may exceed it
