"""Windows joined into segments: examples computed by hand."""

import numpy as np
import pytest

from transformers_sslam.events_sslam import Event
from transformers_sslam.recordings.segments import best_labels, join_windows


CLASSES = ["dog", "rain", "sea"]


def joined(windows: list[tuple[float, float]], *scores: list[float], top_k: int = 3, threshold: float = 0.5) -> list[Event]:
    """Segments of windows `(start, end)` with the scores of each class."""
    starts, ends = np.array(windows, dtype=np.float64).T
    by_class = np.zeros((len(windows), len(CLASSES)), dtype=np.float32)
    by_class[:, : len(scores)] = np.array(scores).T
    return join_windows(starts, ends, by_class, CLASSES, top_k, threshold)


def rounded(segments: list[Event]) -> list[tuple]:
    return [(*segment[:3], round(segment.score, 5)) for segment in segments]


OVERLAPPING = [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5)]


@pytest.mark.parametrize(
    ("windows", "dog", "expected"),
    [
        (OVERLAPPING, [0.9, 0.6, 0.7, 0.8], [(0, 2.5, "dog", 0.75)]),  # the mean of four windows
        ([(0, 1), (1, 2), (2, 2.5)], [0.9, 0.5, 0.7], [(0, 2.5, "dog", 0.7)]),  # they touch
        ([(0, 1), (1.25, 2.25), (2.5, 3.5)], [0.9, 0.6, 0.7], [(0, 1, "dog", 0.9), (1.25, 2.25, "dog", 0.6), (2.5, 3.5, "dog", 0.7)]),
        ([(0, 1), (1, 2), (2.5, 3.5)], [0.9, 0.6, 0.7], [(0, 2, "dog", 0.75), (2.5, 3.5, "dog", 0.7)]),  # one gap
        (OVERLAPPING, [0.9, 0.6, 0.4, 0.8], [(0, 1.5, "dog", 0.75), (1.5, 2.5, "dog", 0.8)]),  # it goes, and comes again
        (OVERLAPPING, [0.9, 0.4, 0.8, 0.4], [(0, 1, "dog", 0.9), (1, 2, "dog", 0.8)]),  # although windows 1 and 3 touch
        (OVERLAPPING, [0.4, 0.5, 0.4, 0.4], [(0.5, 1.5, "dog", 0.5)]),  # the threshold itself counts
        (OVERLAPPING, [0.4, 0.3, 0.2, 0.1], []),
        ([(0, 0.3)], [0.7], [(0, 0.3, "dog", 0.7)]),
    ],
)
def test_successive_windows_with_a_label_are_one_segment(windows, dog, expected):
    assert rounded(joined(windows, dog)) == expected


def test_labels_do_not_end_each_other():
    segments = joined(OVERLAPPING, [0.9, 0.7, 0.1, 0.1], [0.1, 0.6, 0.8, 0.1], [0.1, 0.1, 0.1, 0.9])
    assert rounded(segments) == [(0, 1.5, "dog", 0.8), (0.5, 2, "rain", 0.7), (1.5, 2.5, "sea", 0.9)]


def test_segments_that_begin_together_are_ordered_by_their_score():
    segments = joined(OVERLAPPING, [0.9, 0.5, 0.1, 0.1], [0.8, 0.8, 0.8, 0.1], [0.95, 0.1, 0.1, 0.1])
    assert rounded(segments) == [(0, 1, "sea", 0.95), (0, 2, "rain", 0.8), (0, 1.5, "dog", 0.7)]


def test_a_label_that_others_surpass_in_a_window_ends_there():
    scores = [0.9, 0.6, 0.9, 0.1], [0.7, 0.8, 0.7, 0.1]
    assert rounded(joined(OVERLAPPING, *scores, top_k=2)) == [(0, 2, "dog", 0.8), (0, 2, "rain", 0.73333)]
    assert rounded(joined(OVERLAPPING, *scores, top_k=1)) == [(0, 1, "dog", 0.9), (0.5, 1.5, "rain", 0.8), (1, 2, "dog", 0.9)]


def test_the_best_labels_of_a_window():
    scores = np.array([0.2, 0.8, 0.5, 0.8], dtype=np.float32)
    assert best_labels(scores, 4, 0) == [1, 3, 2, 0]  # of equal scores the first class is the first
    assert best_labels(scores, 1, 0) == [1]
    assert best_labels(scores, 4, 0.5) == [1, 3, 2]
    assert best_labels(scores, 2, 0.9) == []
