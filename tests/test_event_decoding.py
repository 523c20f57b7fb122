"""From scores to events: median filter, thresholds, gaps, shortest lengths, for a recording as it arrives and for one that is whole."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_config
from scipy.ndimage import median_filter

from transformers_sslam.events_sslam import Event, EventDecoder, EventSettings, find_events


CLASSES = ["dog", "rain", "bell"]


def column(*scores: float) -> np.ndarray:
    """Scores of one class, `(steps, 1)`."""
    return np.array(scores)[:, None]


def spans(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.start, event.end) for event in events]


def expected_events(scores: np.ndarray, step: float, settings: dict[str, list[float]], duration: float) -> list[Event]:
    """What the settings say, step by step and class by class."""
    found = []
    for c, label in enumerate(CLASSES):
        threshold, onset, length, max_gap, shortest = (settings[name][c] for name in settings)
        size = 2 * math.floor(length / step / 2 + 1e-9) + 1
        filtered = median_filter(scores[:, c].astype(np.float64), size=size, mode="reflect")
        runs, start = [], None
        for i, score in enumerate([*filtered, -1.0]):
            if score > threshold and start is None:
                start = i
            elif score <= threshold and start is not None:
                runs.append((start, i))
                start = None
        merged: list[tuple[int, int]] = []
        for begin, end in (run for run in runs if filtered[slice(*run)].max() > onset):
            if merged and (begin - merged[-1][1]) * step <= max_gap + 1e-9:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        for begin, end in merged:
            times = (begin * step, min(end * step, duration))
            if times[1] - times[0] >= shortest - 1e-9:
                found.append(Event(*times, label, filtered[begin:end].mean()))
    return sorted(found, key=lambda event: (event.start, CLASSES.index(event.label)))


# --- one setting at a time


def test_a_step_is_active_if_its_score_is_above_the_threshold():
    scores = column(0.5, 0.6, 0.8, 0.5, 0.2, 0.51)
    (first, second) = find_events(scores, 0.16, ["dog"], EventSettings())
    assert first == Event(0.16, 0.48, "dog", pytest.approx(0.7, abs=1e-9))
    assert second == Event(0.8, 0.96, "dog", pytest.approx(0.51, abs=1e-9))


def test_with_hysteresis_an_event_needs_a_high_step_and_extends_over_low_ones():
    scores = column(0.4, 0.9, 0.4, 0.1, 0.4, 0.5, 0.1)
    assert spans(find_events(scores, 1.0, ["dog"], EventSettings(threshold=0.3, onset_threshold=0.7))) == [(0, 3)]
    assert spans(find_events(scores, 1.0, ["dog"], EventSettings(threshold=0.3))) == [(0, 3), (4, 6)]


def test_the_score_of_an_event_includes_the_gaps_that_were_closed():
    scores = column(0.9, 0.1, 0.8, 0.0, 0.0, 0.0, 0.7)
    events = find_events(scores, 0.16, ["dog"], EventSettings(max_gap=0.16))
    assert events == [Event(0.0, 0.48, "dog", pytest.approx(0.6, abs=1e-9)), Event(0.96, 1.12, "dog", pytest.approx(0.7, abs=1e-9))]


@pytest.mark.parametrize(("max_gap", "expected"), [(0.0, 3), (0.47, 3), (0.48, 2), (0.63, 2), (0.64, 1)])  # gaps of 3 and 4 steps
def test_gaps_up_to_the_longest_are_closed(max_gap, expected):
    scores = column(1, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert len(find_events(scores, 0.16, ["dog"], EventSettings(max_gap=max_gap))) == expected


def test_what_has_no_step_above_the_onset_closes_no_gap():
    """The low stretch in the middle is no event: the gap between those around it is 5 steps."""
    scores = column(0.9, 0, 0, 0.4, 0, 0, 0.9)
    settings = {"threshold": 0.3, "onset_threshold": 0.7}
    assert spans(find_events(scores, 1.0, ["dog"], EventSettings(**settings, max_gap=4.0))) == [(0, 1), (6, 7)]
    assert spans(find_events(scores, 1.0, ["dog"], EventSettings(**settings, max_gap=5.0))) == [(0, 7)]


def test_short_events_are_left_out_after_gaps_are_closed_and_by_their_length_within_the_recording():
    scores = column(1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1)
    settings = EventSettings(max_gap=1.0, min_duration=2.0)
    assert spans(find_events(scores, 1.0, ["dog"], settings)) == [(0, 3), (9, 11)]
    assert spans(find_events(scores, 1.0, ["dog"], settings, duration=10.9)) == [(0, 3)]
    assert spans(find_events(scores, 1.0, ["dog"], EventSettings(max_gap=1.0, min_duration=1.9), duration=10.9)) == [(0, 3), (9, 10.9)]


@pytest.mark.parametrize(("seconds", "steps"), [(0, 1), (0.2, 1), (0.32, 3), (0.48, 3), (0.63, 3), (0.64, 5), (0.8, 5), (1.12, 7)])
def test_the_median_filter_has_the_nearest_odd_number_of_steps(seconds, steps):
    """A lone run is kept by a filter that is shorter than twice its length."""
    for run in range(1, 5):
        scores = np.zeros((40, 1))
        scores[20 : 20 + run] = 1
        found = find_events(scores, 0.16, ["dog"], EventSettings(median_filter=seconds))
        assert len(found) == (2 * run > steps), (run, steps)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 30])
def test_scores_are_mirrored_beyond_the_ends_as_by_scipy(count):
    scores = np.random.default_rng(count).random((count, 1)).astype(np.float32)
    for size in (3, 7, 13):
        filtered = median_filter(scores[:, 0], size=size, mode="reflect")
        for threshold in np.unique(filtered)[:-1]:
            events = find_events(scores, 1.0, ["dog"], EventSettings(threshold=float(threshold), median_filter=float(size)))
            active = np.zeros(count, dtype=bool)
            for event in events:
                active[int(event.start) : int(event.end)] = True
            np.testing.assert_array_equal(active, filtered > threshold)


def test_no_event_ends_after_the_recording_and_steps_that_begin_after_it_are_ignored():
    scores = column(0, 1, 1, 1, 1)
    assert spans(find_events(scores, 0.16, ["dog"], EventSettings(), duration=0.4)) == [(0.16, 0.4)]
    assert spans(find_events(scores, 0.16, ["dog"], EventSettings(), duration=0.48)) == [(0.16, 0.48)]  # to the bit of a float
    assert spans(find_events(scores, 0.16, ["dog"], EventSettings(), duration=9.0)) == [(0.16, 0.8)]
    assert find_events(scores, 0.16, ["dog"], EventSettings(), duration=0.0) == []
    decoder = EventDecoder(["dog"], 0.16, EventSettings())
    decoder.push(scores)
    with pytest.raises(ValueError, match="duration is 0.4 s, but there are scores of 5 steps of 0.16 s"):
        decoder.finish(0.4)


def test_events_are_ordered_by_start_then_by_class():
    scores = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 1]])
    found = find_events(scores, 1.0, CLASSES, EventSettings())
    assert [(event.start, event.label) for event in found] == [(0, "rain"), (0, "bell"), (1, "dog"), (2, "bell")]
    assert find_events(np.zeros((0, 3)), 1.0, CLASSES, EventSettings(median_filter=5.0), duration=0.0) == []


# --- all together, in pieces


SETTINGS = {
    "none": {"threshold": 0.5, "onset_threshold": 0.5, "median_filter": 0.0, "max_gap": 0.0, "min_duration": 0.0},
    "all": {"threshold": 0.4, "onset_threshold": 0.8, "median_filter": 0.48, "max_gap": 0.32, "min_duration": 0.32},
    "by class": {
        **{"threshold": [0.3, 0.6, 0.45], "onset_threshold": [0.9, 0.6, 0.7], "median_filter": [0.0, 1.12, 0.48]},
        **{"max_gap": [0.32, 0.0, 0.8], "min_duration": [0.0, 0.48, 0.32]},
    },
}


def both(name: str) -> tuple[dict[str, list[float]], EventSettings]:
    """Settings as lists of values, and as the class takes them."""
    values = {key: value if isinstance(value, list) else [value] * 3 for key, value in SETTINGS[name].items()}
    given = {key: dict(zip(CLASSES, value)) if isinstance(value, list) else value for key, value in SETTINGS[name].items()}
    return values, EventSettings(**given)


def smooth_scores(steps: int, seed: int) -> np.ndarray:
    """Scores that rise and fall over a few steps."""
    rng = np.random.default_rng(seed)
    slow = np.repeat(rng.random((steps // 3 + 1, 3)), 3, axis=0)[:steps]
    return np.clip(0.7 * slow + 0.4 * rng.random((steps, 3)), 0, 1).astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 300])
def test_events_are_what_the_settings_say_whatever_the_pieces(name, steps):
    values, settings = both(name)
    duration = steps * 0.16 - 0.05
    for seed in range(10):
        rng, scores = np.random.default_rng(seed), smooth_scores(steps, seed)
        found = find_events(scores, 0.16, CLASSES, settings, duration)
        expected = expected_events(scores, 0.16, values, duration)
        assert [(e.start, e.end, e.label) for e in found] == [(pytest.approx(e.start), pytest.approx(e.end), e.label) for e in expected]
        assert [e.score for e in found] == pytest.approx([e.score for e in expected], abs=1e-9)
        assert steps < 300 or len(found) > 10
        orders = []
        for pieces in (1, 2, 7):
            decoder, events, first = EventDecoder(CLASSES, 0.16, settings), [], 0
            buffer = np.empty((pieces * 4, 3), dtype=np.float32)  # which the caller uses again
            while first < steps:
                count = int(rng.integers(0, pieces + 1)) if pieces > 1 else 1
                piece = buffer[: len(scores[first : first + count])]
                piece[:] = scores[first : first + count]
                events += decoder.push(piece if seed % 2 else torch.from_numpy(piece))
                first += count
            orders.append(events + decoder.finish(duration))
        whole = EventDecoder(CLASSES, 0.16, settings)
        orders.append(whole.push(scores) + whole.finish(duration))
        assert sorted(orders[0], key=lambda event: (event.start, CLASSES.index(event.label))) == found
        assert all(order == orders[0] for order in orders)


def test_long_recordings_are_decoded_in_blocks_as_if_in_one(monkeypatch):
    _, settings = both("by class")
    scores = smooth_scores(500, 0)
    expected = find_events(scores, 0.16, CLASSES, settings)
    monkeypatch.setattr("transformers_sslam.events_sslam.BLOCK", 40)
    assert find_events(scores, 0.16, CLASSES, settings) == expected


@pytest.mark.parametrize("name", ["none", "by class"])
def test_an_event_is_final_after_the_delay_and_not_earlier_without_need(name):
    values, settings = both(name)
    settings = EventSettings(threshold=settings.threshold, median_filter=settings.median_filter, max_gap=settings.max_gap)
    decoder, scores = EventDecoder(CLASSES, 0.16, settings), smooth_scores(400, 1)
    half, gap = (3, 5) if name == "by class" else (0, 0)  # steps
    assert decoder.delay == pytest.approx((half + gap + 1) * 0.16)
    waited = []
    for i in range(len(scores)):
        for event in decoder.push(scores[i : i + 1]):
            gap = math.floor(values["max_gap"][CLASSES.index(event.label)] / 0.16 + 1e-6)
            waited.append((i + 1) * 0.16 - event.end)
            assert waited[-1] == pytest.approx((half + gap + 1) * 0.16)
    assert len(waited) > 20
    assert max(waited) == pytest.approx(decoder.delay)


def test_a_low_stretch_within_the_gap_holds_an_event_back_until_it_ends():
    settings = EventSettings(threshold=0.3, onset_threshold=0.8, max_gap=1.0)
    decoder = EventDecoder(["dog"], 1.0, settings)
    assert decoder.push(column(0.9, 0.0, *[0.5] * 20)) == []
    assert spans(decoder.push(column(0.0))) == [(0, 1)]
    decoder = EventDecoder(["dog"], 1.0, settings)
    assert decoder.push(column(0.9, 0.0, *[0.5] * 20)) == []
    assert decoder.push(column(0.9, 0.0)) == []
    assert spans(decoder.push(column(0.0))) == [(0, 23)]


def test_what_is_held_does_not_grow_and_what_came_before_does_not_matter():
    settings = EventSettings(median_filter=1.0, max_gap=0.5, threshold={"dog": 0.05})
    decoder = EventDecoder(CLASSES, 0.16, settings)
    block = smooth_scores(1000, 2)
    block[:20], block[-20:] = 0, 0
    found, sizes = [], []
    for _ in range(100):
        found.append(decoder.push(block))
        held = decoder._filters._medians._held
        sizes.append((held.nbytes, held.base is None, len(decoder._runs), len(decoder._events)))
    assert set(sizes) == {sizes[0]}
    assert sizes[0][0] <= 6 * 3 * 8
    for i, events in enumerate(found):
        assert [e.score for e in events] == [e.score for e in found[0]]
        assert spans(events) == [(pytest.approx(a + i * 160), pytest.approx(b + i * 160)) for a, b in spans(found[0])]
    assert len(found[0]) > 20


# --- settings


def configured(**event_detection):
    return tiny_config(id2label=dict(enumerate(CLASSES)), event_detection=event_detection or None)


def test_the_models_settings_hold_unless_they_are_overridden():
    assert EventSettings.of(configured()) == EventSettings()
    config = configured(threshold={"dog": 0.2, "rain": 0.7}, median_filter=0.48)
    assert EventSettings.of(config, max_gap=None).by_class(CLASSES)["threshold"].tolist() == [0.2, 0.7, 0.5]
    assert EventSettings.of(config, threshold=0.4, max_gap=0.3) == EventSettings(threshold=0.4, median_filter=0.48, max_gap=0.3)
    some = EventSettings.of(config, threshold={"dog": 0.9}, median_filter={"bell": 0.16}).by_class(CLASSES)
    assert some["threshold"].tolist() == some["onset_threshold"].tolist() == [0.9, 0.7, 0.5]
    assert some["median_filter"].tolist() == [0.48, 0.48, 0.16]
    assert EventSettings.of(config, onset_threshold={"bell": 0.8}).by_class(CLASSES)["onset_threshold"].tolist() == [0.2, 0.7, 0.8]


def test_settings_are_kept_with_the_model(tmp_path):
    config = configured(threshold={"dog": 0.2}, median_filter=0.48)
    config.save_pretrained(tmp_path)
    assert EventSettings.of(type(config).from_pretrained(tmp_path)) == EventSettings.of(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"treshold": 0.5},
            "cannot have 'treshold': known are threshold, onset_threshold, median_filter, change_filter, max_gap, min_duration",
        ),
        ({"threshold": {"cat": 0.5}}, "threshold has a value for 'cat', which is none of the 3 classes: 'dog', 'rain', 'bell'"),
        ({"threshold": 1.5}, r"threshold is 1.5 for 'dog', but a number in \[0, 1\] is expected"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        ({"threshold": True}, "threshold is True"),
        ({"onset_threshold": {"rain": -0.1}}, "onset_threshold is -0.1 for 'rain'"),
        ({"threshold": 0.6, "onset_threshold": {"bell": 0.4}}, "onset_threshold is 0.4 for 'bell', below its threshold of 0.6"),
        ({"median_filter": -1.0}, "median_filter is -1.0 for 'dog', but a number of seconds from 0 to 86400"),
        ({"max_gap": math.inf}, "max_gap is inf"),
        ({"min_duration": {"dog": math.nan}}, "min_duration is nan for 'dog'"),
        ({"min_duration": {"dog": None}}, "min_duration is None for 'dog'"),
    ],
)
def test_settings_that_mean_nothing_are_rejected_in_the_model_and_as_overrides(settings, message):
    with pytest.raises(ValueError, match=message):
        EventSettings.of(configured(), **settings)
    with pytest.raises(ValueError, match=message):
        EventSettings.of(configured(**settings))
    if "treshold" not in settings:
        with pytest.raises(ValueError, match=message):
            EventDecoder(CLASSES, 0.16, EventSettings(**settings))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((4, 2)), r"scores has shape \(4, 2\), but \(steps, 3\) is expected"),
        (np.zeros(3), r"scores has shape \(3,\)"),
        (np.full((4, 3), 1.5), r"scores holds 1.5, but numbers in \[0, 1\] are expected"),
        (torch.full((4, 3), math.nan), "scores holds nan"),
        (np.ma.masked_array(np.zeros((4, 3)), mask=True), "scores is a masked array, but a plain array of real numbers is expected"),
        (np.zeros((4, 3), np.complex64), "scores is of type complex64"),
        (torch.zeros(4, 3, dtype=torch.complex64), "scores is of type complex64"),
        (np.full((4, 3), "0.5"), "scores is of type <U3"),
    ],
)
def test_scores_that_mean_nothing_are_rejected(scores, message):
    with pytest.raises(ValueError, match=message):
        EventDecoder(CLASSES, 0.16, EventSettings()).push(scores)


@pytest.mark.parametrize("step", [0, -0.16, math.inf, "0.16"])
def test_steps_have_a_length(step):
    with pytest.raises(ValueError, match="step is .* must be a positive number of seconds"):
        EventDecoder(CLASSES, step, EventSettings())


@pytest.mark.parametrize("duration", [-1.0, math.nan, math.inf])
def test_recordings_have_a_length(duration):
    with pytest.raises(ValueError, match="duration is .* must be a finite number of seconds that is not negative"):
        find_events(np.zeros((4, 3)), 0.16, CLASSES, EventSettings(), duration)
