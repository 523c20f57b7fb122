"""Windows that overlap, joined into segments for a person to read."""

from collections.abc import Sequence

import numpy as np

from ..events_sslam import Event


def best_labels(scores: np.ndarray, top_k: int, threshold: float) -> list[int]:
    """The labels with the highest of the scores `(classes,)`, in falling order: at most `top_k`, each of at least `threshold`."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[:top_k] if scores[i] >= threshold]


def join_windows(
    starts: np.ndarray, ends: np.ndarray, scores: np.ndarray, classes: Sequence[str], top_k: int, threshold: float
) -> list[Event]:
    """Segments of a recording: successive windows that overlap or touch, and have the same label, are one.

    Args:
        starts, ends: `(windows,)`, in seconds, rising.
        scores: `(windows, classes)`.
        classes: their names.
        top_k, threshold: which labels a window has, see [`best_labels`].

    Returns:
        Segments, whose scores are the means of their windows, by start; those of equal starts by their score, the highest first.
    """
    open_segments: dict[int, list[int]] = {}  # the windows of each label
    segments = []

    def close(label: int) -> None:
        windows = open_segments.pop(label)
        score = float(scores[windows, label].mean())
        segments.append(Event(float(starts[windows[0]]), float(ends[windows[-1]]), classes[label], score))

    for window in range(len(starts)):
        found = best_labels(scores[window], top_k, threshold)
        for label in [label for label in open_segments if label not in found or starts[window] > ends[open_segments[label][-1]]]:
            close(label)
        for label in found:
            open_segments.setdefault(label, []).append(window)
    for label in list(open_segments):
        close(label)
    return sorted(segments, key=lambda segment: (segment.start, -segment.score))
