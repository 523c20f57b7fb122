"""The change filter: boxes in place of scores, by hand, against the definition step by step, in pieces, and in every command."""

import itertools

import numpy as np
import pytest
from conftest import tiny_config

from transformers_sslam import filters_sslam
from transformers_sslam.evaluation.event_results import evaluate_events
from transformers_sslam.evaluation.event_tuning import tune_events
from transformers_sslam.events_sslam import EventDecoder, EventSettings, filter_scores, find_events
from transformers_sslam.filters_sslam import ChangeFilter


STEP = 0.1  # seconds


def boxes(scores: list[float] | np.ndarray, half: int) -> np.ndarray:
    """Of one class."""
    found = ChangeFilter(np.array([half]))
    return np.concatenate((found.push(np.array(scores)[:, None]), found.finish()))[:, 0]


def defined(scores: np.ndarray, half: int) -> np.ndarray:
    """What `ChangeFilter` says, of a recording that is shorter than a stretch."""
    n, padded = len(scores), [scores[0]] * half + list(scores) + [scores[-1]] * half
    change = [np.mean(padded[t + half : t + 2 * half]) - np.mean(padded[t : t + half]) for t in range(n + 1)]
    signs = [(t, value > 0) for t, value in enumerate(change) if abs(value) > 1e-12]
    turns = [
        (max((t for t, _ in run), key=lambda t: abs(change[t])), rises) for rises, run in itertools.groupby(signs, lambda pair: pair[1])
    ]
    if not turns or not turns[0][1]:
        turns.insert(0, (0, True))
    if turns[-1][1]:
        turns.append((n, False))
    events = [(start, end) for (start, _), (end, _) in zip(turns[::2], turns[1::2]) if start < end]
    merged: list[tuple[int, int]] = []
    for start, end in events:
        if merged:
            before = merged[-1]
            if scores[before[1] : start].mean() >= 0.5 * max(scores[slice(*before)].mean(), scores[start:end].mean()):
                merged[-1] = (before[0], end)
                continue
        merged.append((start, end))
    if merged and merged[0][0] and scores[: merged[0][0]].mean() >= 0.5 * scores[slice(*merged[0])].mean():
        merged[0] = (0, merged[0][1])
    if merged and merged[-1][1] < n and scores[merged[-1][1] :].mean() >= 0.5 * scores[slice(*merged[-1])].mean():
        merged[-1] = (merged[-1][0], n)
    values = np.zeros(n)
    for start, end in merged:
        values[start:end] = scores[start:end].mean()
    return values


# --- the filter


def test_a_box_reaches_from_the_rise_to_the_fall_and_has_the_mean_score():
    scores = [0.1, 0.1, 0.2, 0.9, 0.7, 0.8, 0.1, 0.1, 0.1]
    assert boxes(scores, 2) == pytest.approx([0, 0, 0, 0.8, 0.8, 0.8, 0, 0, 0], abs=1e-9)


def test_two_boxes_are_one_if_the_scores_between_them_are_nearly_as_high():
    low, high, higher = [0.1] * 4, [0.8] * 4, [0.9] * 4
    # What lies between is a fall and a rise in either; 0.45 is half of 0.9, 0.44 is not.
    joined = boxes([*low, *high, 0.45, 0.45, *higher, *low], 2)
    assert joined == pytest.approx([0] * 4 + [(3.2 + 0.9 + 3.6) / 10] * 10 + [0] * 4, abs=1e-9)
    apart = boxes([*low, *high, 0.44, 0.44, *higher, *low], 2)
    assert apart == pytest.approx([0] * 4 + [0.8] * 4 + [0, 0] + [0.9] * 4 + [0] * 4, abs=1e-9)


def test_a_low_box_beside_a_high_one_stays_apart_from_it():
    scores = [0.01, 0.03, 0.03, 0.02, 0.02, 0.9, 0.9, 0.9, 0.9, 0.02, 0.02, 0.03, 0.03, 0.01]
    assert boxes(scores, 1)[4:10] == pytest.approx([0.9 * (4 < i < 9) for i in range(4, 10)], abs=0.05)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.7] * 6, [0.7] * 6),  # no change at all
        ([0.9, 0.9, 0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0, 0, 0]),  # sounds from the first step on
        ([0.1, 0.1, 0.1, 0.9, 0.9, 0.9], [0, 0, 0, 0.9, 0.9, 0.9]),  # up to the last one
        ([0.90, 0.89, 0.88, 0.87, 0.86, 0.85], [0.875] * 6),  # fades a little: what follows the fall belongs to it
        ([0.85, 0.86, 0.87, 0.88, 0.89, 0.90], [0.875] * 6),
        ([0.4], [0.4]),
        ([], []),
    ],
)
def test_at_the_ends_of_a_recording(scores, expected):
    assert boxes(scores, 2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("half", [1, 2, 5, 40])
def test_boxes_are_those_of_the_definition(half):
    generator = np.random.default_rng(half)
    for steps in (1, 2, 3, 30, 200):
        scores = generator.random(steps).astype(np.float32)
        assert boxes(scores, half) == pytest.approx(defined(scores.astype(np.float64), half), abs=1e-6)


def test_classes_without_the_filter_keep_their_scores_and_others_do_not_disturb_them():
    scores = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    settings = EventSettings(change_filter={"b": 0.6, "c": 2.0})
    filtered = filter_scores(scores, STEP, ["a", "b", "c"], settings)
    assert (filtered[:, 0] == scores[:, 0]).all()
    for c, half in ((1, 3), (2, 10)):
        assert filtered[:, c] == pytest.approx(boxes(scores[:, c], half))


def test_the_median_filter_comes_first():
    scores = np.random.default_rng(0).random((60, 1)).astype(np.float32)
    medians = filter_scores(scores, STEP, ["a"], EventSettings(median_filter=0.5))
    both = filter_scores(scores, STEP, ["a"], EventSettings(median_filter=0.5, change_filter=0.8))
    assert both[:, 0] == pytest.approx(boxes(medians[:, 0], 4))
    assert np.abs(both - medians).max() > 0.1


# --- recordings that arrive piece by piece


@pytest.mark.parametrize("piece", [1, 7, 16, 50, 500])
def test_events_do_not_depend_on_the_pieces(piece, monkeypatch):
    monkeypatch.setattr(filters_sslam, "STRETCH", 16)  # so that a recording has many
    scores = np.random.default_rng(1).random((300, 2)).astype(np.float32) ** 2
    settings = EventSettings(change_filter={"a": 0.6, "b": 1.2}, threshold=0.3)
    whole = filter_scores(scores, STEP, ["a", "b"], settings)
    decoder, found, known = EventDecoder(["a", "b"], STEP, settings), [], []
    assert decoder.delay == pytest.approx((16 + 6 - 1 + 1) * STEP)
    for first in range(0, len(scores), piece):
        new = decoder.push(scores[first : first + piece])
        known += [(event.end, min(len(scores), first + piece) * STEP) for event in new]
        found += new
    found += decoder.finish()
    assert sorted(found) == sorted(find_events(scores, STEP, ["a", "b"], settings))
    assert len(found) > 20
    assert (whole > 0.3).any(axis=0).all()
    if piece == 1:
        assert max(now - end for end, now in known) <= decoder.delay + 1e-9


def test_a_sound_beyond_the_end_of_a_stretch_is_one_event(monkeypatch):
    monkeypatch.setattr(filters_sslam, "STRETCH", 16)
    scores = np.full((64, 1), 0.1)
    scores[10:40] = 0.9  # over two ends of stretches
    (event,) = find_events(scores, STEP, ["a"], EventSettings(change_filter=0.8))
    assert (event.start, event.end, event.score) == (1.0, 4.0, pytest.approx(0.9, abs=1e-6))


# --- what it is for


def test_tuning_takes_the_change_filter_where_it_is_better_and_only_if_it_is_asked_to():
    # No threshold finds the whole event of the second recording without the background of the first one, which is louder than its dip.
    loud, soft = np.full((60, 1), 0.3), np.full((60, 1), 0.05)
    loud[20:50], soft[10:20], soft[20:30], soft[30:40] = 0.9, 0.4, 0.2, 0.4
    truth = {"loud": [(2.0, 5.0, "a")], "soft": [(1.0, 4.0, "a")]}
    clips = {"loud": loud, "soft": soft}, STEP, ["a"], truth, {"loud": 6.0, "soft": 6.0}
    options: dict = {"metric": "collar", "lengths": (0.0, 0.5)}
    without, tuned = tune_events(*clips, **options), tune_events(*clips, **options, change_lengths=(4.0,))
    assert without.change_filter == 0.0
    assert tuned.change_filter == {"a": 4.0}
    assert tuned.median_filter == {"a": 0.0}
    f1 = [evaluate_events(*clips, settings, confidence=None)["metrics"]["collar_f1"] for settings in (without, tuned)]
    assert f1 == [pytest.approx(2 / 3), 1.0]


def test_a_model_has_it_in_its_settings():
    config = tiny_config(num_labels=2, event_detection={"change_filter": 2.0, "threshold": 0.4})
    assert EventSettings.of(config).by_class(["LABEL_0", "LABEL_1"])["change_filter"].tolist() == [2.0, 2.0]
    assert EventSettings.of(config, change_filter=0.0).change_filter == 0.0
    with pytest.raises(ValueError, match="change_filter is -1 for 'LABEL_0', but a number of seconds from 0 to 86400 is expected"):
        EventSettings.of(config, change_filter=-1)
