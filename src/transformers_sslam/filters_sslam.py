"""Filters of scores over time, for recordings that arrive piece by piece: medians, and boxes between changes."""

import numpy as np


MEDIANS = 2**18  # scores of which medians are computed at a time
STRETCH = 4096  # time steps in which boxes are found at a time
MERGED = 0.5  # two boxes are one if the mean score between them is at least this fraction of the higher one's
# Sums of scores are kept as whole numbers of this unit: exact, so that a mean depends neither on what came before nor on the
# pieces. 64 bits last for years of a recording.
UNIT = 2.0**-32


def filter_halves(seconds: float | np.ndarray, step: float) -> np.ndarray:
    """How many time steps a filter of this length has on each side. A median filter has the middle step too, an odd number in all."""
    return np.floor(np.asarray(seconds) / step / 2 + 1e-6).astype(int)


class MedianFilter:
    """Medians over `2 * halves + 1` steps of each class, of steps that arrive piece by piece.

    Beyond the ends scores are mirrored, the first and last steps repeated, as by `scipy.ndimage.median_filter` (mode "reflect").

    Attributes:
        delay: steps that have to follow until a result is known.
    """

    def __init__(self, halves: np.ndarray):
        self.delay = self._half = int(halves.max(initial=0))
        self._classes = {int(half): np.flatnonzero(halves == half) for half in np.unique(halves)}
        self._held = np.zeros((0, len(halves)), dtype=np.float32)  # steps that later medians need
        self._started = False  # whether those before the first step are among them

    def push(self, scores: np.ndarray) -> np.ndarray:
        """Medians `(n, classes)` that are now known."""
        self._held = np.concatenate((self._held, scores))  # always a copy: a caller may use its buffer again
        if not self._started:
            if len(self._held) < max(1, self._half):
                return self._held[:0]
            self._held = np.concatenate((self._held[: self._half][::-1], self._held))
            self._started = True
        return self._medians()

    def finish(self) -> np.ndarray:
        """The medians of the last steps."""
        if len(self._held):
            before = 0 if self._started else self._half
            self._held = np.pad(self._held, ((before, self._half), (0, 0)), mode="symmetric")
        return self._medians()

    def _medians(self) -> np.ndarray:
        steps = max(0, len(self._held) - 2 * self._half)
        medians = np.empty((steps, self._held.shape[1]), dtype=self._held.dtype)
        for half, classes in self._classes.items():
            rows = max(1, MEDIANS // ((2 * half + 1) * len(classes)))
            for first in range(0, steps, rows):
                last = min(steps, first + rows)
                around = self._held[self._half - half + first : self._half + half + last, classes]
                windows = np.lib.stride_tricks.sliding_window_view(around, 2 * half + 1, axis=0)
                medians[first:last, classes] = np.partition(windows, half, axis=-1)[..., half]
        self._held = self._held[steps:].copy()
        return medians


class ChangeFilter:
    """Boxes in place of scores: from where a class's scores rise to where they fall, each step has their mean, and between boxes 0.

    So a threshold decides which events there are, but no longer where they begin and end. After "Sound Event Bounding Boxes" (Ebbers,
    Germain, Wichern and Le Roux, Interspeech 2024), which finds them by changes too. Here the change at a time is the mean of `halves`
    steps after it, less that of as many before it. While it is positive, one box begins where it is largest; while it is negative, one
    ends where it is lowest. Two boxes are one, from the first pair to the last, if what lies between them has a mean of at least `MERGED`
    of the higher one's; so are a box and what lies before the first or after the last one.

    Boxes are found in stretches of `STRETCH` steps from the beginning of the recording, so that neither delay nor memory grow with it. A
    box that continues beyond the end of a stretch is followed directly by one that begins there. Beyond the ends of the recording its first
    and last scores are repeated. A class whose number in `halves` is 0 keeps its scores.

    Attributes:
        delay: steps that have to follow until a result is known, at most.
    """

    def __init__(self, halves: np.ndarray):
        self._halves, self._half = halves.tolist(), int(halves.max(initial=0))
        self.delay = STRETCH + self._half - 1 if self._half else 0
        self._held = np.zeros((0, len(halves)), dtype=np.float32)  # steps of the next stretch, after those before it that it depends on

    def push(self, scores: np.ndarray) -> np.ndarray:
        """Scores `(n, classes)` that are now known."""
        if not self._half or not len(scores):
            return scores
        self._held = np.concatenate((self._held if len(self._held) else scores[:1].repeat(self._half, axis=0), scores))
        found = [self._held[:0]]
        while len(self._held) >= STRETCH + 2 * self._half:
            found.append(self._boxes(STRETCH))
        return np.concatenate(found)

    def finish(self) -> np.ndarray:
        """Those of the last steps."""
        if not len(self._held):
            return self._held
        self._held = np.concatenate((self._held, self._held[-1:].repeat(self._half, axis=0)))
        return self._boxes(len(self._held) - 2 * self._half)

    def _boxes(self, steps: int) -> np.ndarray:
        boxes = self._held[self._half : self._half + steps].copy()
        for c, half in enumerate(self._halves):
            if half:
                boxes[:, c] = _boxes(self._held[self._half - half : self._half + steps + half, c], half)
        self._held = self._held[steps:].copy()
        return boxes


def _boxes(scores: np.ndarray, half: int) -> np.ndarray:
    """Of a class's scores those but the `half` first and last ones, as boxes."""
    totals = np.cumsum(np.append(0, np.rint(scores.astype(np.float64) / UNIT).astype(np.int64)))
    change = totals[2 * half :] - 2 * totals[half:-half] + totals[: -2 * half]
    totals = totals[half:-half]  # before each step, and at last after all

    def mean(start: int, end: int) -> float:
        return (totals[end] - totals[start]) * UNIT / (end - start)

    steps, boxes = len(totals) - 1, list[tuple[int, int]]()
    edges = _turns(change) or [0]
    for start, end in zip(edges[::2], [*edges[1::2], steps]):
        if start == end:
            continue
        if boxes and mean(boxes[-1][1], start) >= MERGED * max(mean(*boxes[-1]), mean(start, end)):
            start = boxes.pop()[0]
        boxes.append((start, end))
    if boxes and (first := boxes[0])[0] and mean(0, first[0]) >= MERGED * mean(*first):
        boxes[0] = 0, first[1]
    if boxes and (last := boxes[-1])[1] < steps and mean(last[1], steps) >= MERGED * mean(*last):
        boxes[-1] = last[0], steps
    values = np.zeros(steps)
    for start, end in boxes:
        values[start:end] = mean(start, end)
    return values


def _turns(change: np.ndarray) -> list[int]:
    """Where a class begins, ends, begins ...: the largest change between two changes of its sign. Before a fall that is the first one, it
    begins at 0."""
    times = np.flatnonzero(change)
    if not len(times):
        return []
    size, rises = np.abs(change[times]), change[times] > 0
    firsts = np.flatnonzero(np.append(True, rises[1:] != rises[:-1]))
    runs = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(times)))
    steepest = np.flatnonzero(size == np.maximum.reduceat(size, firsts)[runs])
    turns = times[steepest[np.unique(runs[steepest], return_index=True)[1]]].tolist()
    return turns if rises[0] else [0, *turns]
