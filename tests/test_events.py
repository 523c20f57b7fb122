import json
from functools import partial
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from transformers_sslam.evaluation.evaluate_metrics import CollarF1, PolyphonicSoundDetectionScore, SegmentF1
from transformers_sslam.evaluation.events import collar_f1, largest_matching, psds, segment_f1


SCENARIOS = {
    "scenario_1": {"dtc": 0.7, "gtc": 0.7, "alpha_st": 1.0},
    "scenario_1_macro": {"dtc": 0.7, "gtc": 0.7},
    "scenario_2": {"dtc": 0.1, "gtc": 0.1, "cttc": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0},
}
psds_1 = partial(psds, dtc=0.7, gtc=0.7, confidence=None)
F1 = {"collar": collar_f1, "segment": segment_f1}


@pytest.fixture(params=["small", "larger"])
def problem(request, reference):
    expected = json.loads((reference / "events" / f"{request.param}.json").read_text())
    scores = dict(np.load(reference / "events" / f"{request.param}.npz"))
    return (scores, expected["step"], expected["classes"], expected["ground_truth"], expected["durations"]), expected["results"]


def one_class(scores, events, duration=None, step=1.0):
    """The arguments of a metric for one recording of one class."""
    scores = np.array(scores, dtype=float)[:, None]
    return {"a": scores}, step, ["x"], {"a": [(*event, "x") for event in events]}, {"a": duration or len(scores) * step}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_psds_equals_the_reference(problem, scenario):
    data, results = problem
    result, expected = psds(*data, **SCENARIOS[scenario], confidence=None), results["psds"][scenario]
    assert result.value == pytest.approx(expected["psds"], abs=1e-6)
    assert result.by_class == pytest.approx(expected["by_class"], abs=1e-6)
    assert result.micro is None


@pytest.mark.parametrize("metric", F1)
def test_f1_equals_the_reference(problem, metric):
    data, results = problem
    for threshold, expected in results[metric].items():
        result, by_class = F1[metric](*data, float(threshold), confidence=None), dict(expected["f"])
        assert result.value == pytest.approx(by_class.pop("macro_average"), abs=1e-9)
        assert result.micro == pytest.approx(by_class.pop("micro_average"), abs=1e-9)
        assert result.by_class == pytest.approx(by_class, abs=1e-9)
        for name, counts in expected["counts"].items():
            assert result.counts[name]["true_positives"] == counts["tps"]
            assert result.counts[name]["false_positives"] == counts["fps"]
            assert result.counts[name]["false_negatives"] == counts["n_ref"] - counts["tps"]


def test_psds_by_hand():
    """Half an hour; as the threshold falls: one event found, a false positive (2 an hour), the other event found."""
    scores = np.zeros(1800)
    scores[[100, 500, 900]] = 0.9, 0.8, 0.7
    result = psds_1(*one_class(scores, [(100, 101), (900, 901)]), e_max=10)
    assert result.value == result.by_class["x"] == pytest.approx((2 * 0.5 + 8 * 1) / 10)


def test_psds_subtracts_the_standard_deviation_over_classes_and_is_not_below_zero():
    """Ratios of the classes are 1, 0, 0: mean 1/3, standard deviation sqrt(2)/3; and 1, 1, 0: 2/3 less sqrt(2)/3."""
    truth = [(0.0, 1.0, "x"), (1.0, 2.0, "y"), (2.0, 3.0, "z")]
    for found, mean in ((1, 1 / 3), (2, 2 / 3)):
        data = {"a": np.diag([1.0 if i < found else -1.0 for i in range(3)])}, 1.0, list("xyz"), {"a": truth}, {"a": 3.0}
        assert psds_1(*data).value == pytest.approx(mean)
        assert psds_1(*data, alpha_st=1).value == pytest.approx(max(0, mean - 2**0.5 / 3))


def test_a_cross_trigger_raises_the_false_positive_rate():
    """An hour. Class x has a false positive inside y's event of 36 s: 1 an hour, and 0.5 * 100 cross triggers an hour of y."""
    scores = np.zeros((3600, 2))
    scores[200:220, 0], scores[100, 0], scores[200:236, 1] = 0.9, 0.8, 0.9
    data = {"a": scores}, 1.0, ["x", "y"], {"a": [(100, 101, "x"), (200, 236, "y")]}, {"a": 3600.0}
    without, with_cost = psds_1(*data), psds_1(*data, cttc=0.3, alpha_ct=0.5)
    assert without.by_class == pytest.approx({"x": 0.99, "y": 1})
    assert with_cost.by_class == pytest.approx({"x": 0.49, "y": 1})
    assert psds_1(*data, cttc=1, alpha_ct=0.5).by_class["x"] == pytest.approx(0.49)  # all of it lies in y


def test_a_detection_and_an_event_that_reach_a_criterion_exactly_meet_it():
    on_time = one_class([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], [(0.5, 1.2)], step=0.1)  # 0.7 of 1.0 s
    assert psds_1(*on_time).value == 1
    assert psds(*on_time, dtc=0.71, gtc=0.7, confidence=None).value == 0
    too_short = one_class([1] * 7 + [0] * 13, [(0, 1)], step=0.1)
    assert psds_1(*too_short).value == 1
    assert psds(*too_short, dtc=0.7, gtc=0.71, confidence=None).value == 0


def test_equal_scores_are_one_threshold():
    """Both detections appear at once, the false positive with the true one."""
    scores = np.zeros(3600)
    scores[[10, 20]] = 0.5
    assert psds_1(*one_class(scores, [(10, 11)])).value == pytest.approx(0.99)


def _shared(onset, offset, events, label):
    return sum(max(0, min(offset, end) - max(onset, begin)) for begin, end, other in events if other == label)


def test_psds_equals_counting_at_every_threshold():
    """All thresholds one by one, with detections, criteria and rates as the definition has them."""
    generator = np.random.default_rng(3)
    scores = {name: generator.integers(0, 12, (40, 3)) / 12 for name in "abc"}
    truth = {
        "a": [(0.3, 2.1, "x"), (2.5, 3.0, "x"), (1.0, 3.7, "y"), (2.2, 2.9, "z")],
        "b": [],
        "c": [(0.0, 4.0, "z"), (1.1, 1.9, "x"), (3.1, 3.95, "y")],
    }
    options = {"dtc": 0.5, "gtc": 0.4, "cttc": 0.05, "alpha_ct": 0.3, "alpha_st": 0.5, "e_max": 3000.0}
    hours, curves = 12 / 3600, []
    length = {c: sum(off - on for events in truth.values() for on, off, label in events if label == c) / 3600 for c in "xyz"}
    for c, label in enumerate("xyz"):
        points = [(0.0, 0.0)]
        for threshold in np.arange(13) / 12 - 1 / 24:
            rate = found = 0.0
            for name, values in scores.items():
                edges = np.diff(np.pad((values[:, c] > threshold).astype(int), 1))
                detections = list(zip(np.flatnonzero(edges > 0) / 10, np.flatnonzero(edges < 0) / 10))
                right = [d for d in detections if _shared(*d, truth[name], label) >= 0.5 * (d[1] - d[0]) - 1e-9]
                rate += (len(detections) - len(right)) / hours
                for other in set("xyz") - {label}:
                    crossed = sum(_shared(*d, truth[name], other) >= 0.05 * (d[1] - d[0]) - 1e-9 for d in detections if d not in right)
                    rate += 0.3 / 2 * crossed / length[other]
                for begin, end, kind in truth[name]:
                    overlap = sum(max(0, min(d[1], end) - max(d[0], begin)) for d in right)
                    found += kind == label and overlap >= 0.4 * (end - begin) - 1e-9
            points.append((rate, found / sum(kind == label for events in truth.values() for *_, kind in events)))
        curves.append(points)
    grid = np.unique([rate for points in curves for rate, _ in points if rate < 3000] + [0])
    best = np.array([[max(ratio for rate, ratio in points if rate <= x + 1e-9) for x in grid] for points in curves])
    height = np.maximum(best.mean(0) - 0.5 * best.std(0), 0)
    expected = height @ np.diff(grid, append=3000) / 3000
    assert 0.1 < expected < 0.9
    assert psds(scores, 0.1, list("xyz"), truth, dict.fromkeys("abc", 4.0), **options, confidence=None).value == pytest.approx(expected)


def test_collar_f1_by_hand():
    """Steps of 0.1 s. An event matches at exactly 0.2 s from its onset, not at 0.3 s; a long one's offset may be off by 20 %."""
    scores = np.zeros(100)
    scores[12:20] = scores[43:50] = scores[60:88] = 1
    data = one_class(scores, [(1.0, 2.0), (4.0, 5.0), (6.0, 8.4)], step=0.1)
    result = collar_f1(*data, 0.5, confidence=None)
    assert result.counts["x"] == {"true_positives": 2, "false_positives": 1, "false_negatives": 1}
    assert result.value == result.micro == pytest.approx(2 / 3)
    assert collar_f1(*data, 0.5, offset_collar_rate=0.1, confidence=None).counts["x"]["true_positives"] == 1
    assert collar_f1(*data, 0.5, onset_collar=0.3, confidence=None).value == 1


def test_of_all_assignments_the_largest_counts():
    """The first detection fits both events, the second the first one alone: in order of time it would be left over."""
    scores = np.zeros(130)
    scores[10:102] = scores[105:119] = 1
    data = one_class(scores, [(0.0, 10.0), (10.1, 10.3)], step=0.1)
    counts = collar_f1(*data, 0.5, onset_collar=11, confidence=None).counts["x"]
    assert counts == {"true_positives": 2, "false_positives": 0, "false_negatives": 0}


def test_the_largest_assignment_of_few_is_that_of_all_orders_and_of_many_is_found():
    generator = np.random.default_rng(0)
    for density in np.linspace(0, 1, 60):
        near = generator.random((5, 4)) < density
        brute_force = max(near[list(rows), range(4)].sum() for rows in permutations(range(5), 4))
        assert largest_matching(near) == largest_matching(near.T) == brute_force
    assert largest_matching(np.zeros((0, 3), bool)) == largest_matching(np.zeros((3, 0), bool)) == 0
    chain = np.eye(1100, dtype=bool) | np.eye(1100, k=1, dtype=bool)  # the last detection moves all others
    chain[-1, [0, -1]] = True, False
    assert largest_matching(chain) == 1100


def test_segment_f1_by_hand():
    """Segments of 1 s: truth in 0, 1 and 3 (touching 2 is not enough), detections in 1, 2 and 3."""
    scores = [0, 0, 0, 1, 1, 0, 1]
    result = segment_f1(*one_class(scores, [(0.2, 2.0), (3.4, 3.5)], step=0.5), 0.5, confidence=None)
    assert result.counts["x"] == {"true_positives": 2, "false_positives": 1, "false_negatives": 1}
    assert result.value == pytest.approx(2 / 3)
    assert segment_f1(*one_class(scores, [(0.2, 2.0)], step=0.5), 0.5, segment=3.5, confidence=None).value == 1


def test_a_step_is_active_above_its_threshold():
    data = one_class([0.5, 0.0], [(0, 1)])
    assert segment_f1(*data, 0.5, confidence=None).value == 0
    assert segment_f1(*data, [0.49], confidence=None).value == 1


@pytest.mark.parametrize("metric", [psds_1, partial(collar_f1, threshold=0.5), partial(segment_f1, threshold=0.5)])
def test_classes_without_events_are_in_no_mean(metric):
    scores = {"a": np.array([[1.0, 1.0], [0.0, 0.0]]), "empty": np.zeros((2, 2))}
    truth = {"a": [(0.0, 1.0, "x")], "empty": []}
    result = metric(scores, 1.0, ["x", "y"], truth, {"a": 2.0, "empty": 2.0})
    assert (result.value, result.by_class, result.classes_without_events) == (1, {"x": 1}, ("y",))
    if result.micro is not None:
        assert result.micro == pytest.approx(2 / 3)  # the detection of y is a false positive
    nothing = metric({"a": np.zeros((2, 1))}, 1.0, ["x"], {"a": [(0.0, 0.5, "x")]}, {"a": 2.0}, confidence=0.9)
    assert nothing.value == 0


def test_psds_is_zero_where_no_event_is_found_and_nothing_is_wrong():
    """At every threshold the detection lies in the event, but covers too little of it."""
    assert psds_1(*one_class([1], [(0, 1.9)], duration=1.9)).value == 0


def test_a_recording_may_end_within_its_last_step_or_just_after_it():
    """The last step is cut off at the end, also of an hour of short steps; a rest shorter than a step may have no score."""
    assert psds_1(*one_class([0, 1], [(1.0, 1.2)], duration=1.2)).value == 1
    assert psds_1(*one_class([0, 1], [(1.0, 1.2)], duration=2.0, step=1.0)).value == 0
    hour = np.zeros(90_001)
    hour[-1] = 1
    assert psds_1(*one_class(hour, [(3600.0, 3600.001)], duration=3600.001, step=0.04)).value == 1
    assert segment_f1(*one_class([0, 1], [(1.0, 2.0)], duration=2.9), 0.5, confidence=None).value == 1
    assert segment_f1(*one_class(np.zeros(0), [(0.0, 0.5)], duration=0.9), 0.5, confidence=None).value == 0
    assert psds_1(*one_class(np.zeros(0), [(0.0, 0.5)], duration=0.9)).value == 0


def test_events_of_one_class_that_overlap_or_touch_are_merged_and_counted():
    scores = [1, 1, 1, 0]
    apart, merged = one_class(scores, [(0, 3)]), one_class(scores, [(2, 3), (0, 1.5), (1.2, 2), (0.5, 1)])
    for metric in (psds_1, partial(collar_f1, threshold=0.5), partial(segment_f1, threshold=0.5)):
        assert metric(*merged).merged_events == 3
        assert metric(*merged).by_class == metric(*apart).by_class == {"x": 1}


def test_intervals_are_over_recordings_and_reproducible():
    generator = np.random.default_rng(0)
    names = [f"{i}" for i in range(30)]
    truth = {name: [(1.0, 3.0, "x"), (4.0, 6.0, "y")] for name in names}
    scores = {}
    for name in names:
        scores[name] = generator.normal(size=(8, 2))
        scores[name][1:3, 0] += 2
        scores[name][4:6, 1] += 2
    data = scores, 1.0, ["x", "y"], truth, dict.fromkeys(names, 8.0)
    for metric in (partial(psds, dtc=0.7, gtc=0.7, alpha_st=1, e_max=500), partial(segment_f1, threshold=1.0)):
        result = metric(*data, resamples=200)
        low, high = result.interval
        assert low < result.value < high
        assert 0.03 < high - low < 0.5
        assert result == metric(*data, resamples=200) != metric(*data, resamples=200, seed=1)
        narrow = metric(*data, resamples=200, confidence=0.5)
        assert narrow.interval[1] - narrow.interval[0] < high - low
        assert set(result.by_class_interval) == {"x", "y"}
        assert metric(*data, confidence=None).interval is None
    copies = dict.fromkeys(names, scores["0"])
    low, high = segment_f1(copies, *data[1:], threshold=1.0).interval
    assert low == high  # recordings that are all alike leave no doubt


def test_the_interval_of_an_f1_of_rare_classes_holds_the_value():
    """60 classes of one event each: a resample lacks a third of them, so that nearly all have a higher F1 than all recordings together."""
    classes = [f"{c}" for c in range(60)]
    generator = np.random.default_rng(0)
    scores = {name: np.zeros((1, 60)) for name in classes}
    for c, values in enumerate(scores.values()):
        values[0, [c, *generator.choice(60, 3, replace=False)]] = 1
    truth = {name: [(0.0, 1.0, name)] for name in classes}
    found = segment_f1(scores, 1.0, classes, truth, dict.fromkeys(classes, 1.0), threshold=0.5)
    low, high = found.interval
    assert low == found.value < high
    assert all(low <= found.by_class[label] <= high for label, (low, high) in found.by_class_interval.items())


@pytest.mark.parametrize("value", [0, 1])
def test_detection_without_an_error_or_a_hit_is_not_certain(value):
    """20 recordings hold the first class, 5 of them the second: Wilson's intervals of so many trials, and of one of a single recording."""
    names = [f"{i}" for i in range(20)]
    scores = {name: np.array([[value, value * (i < 5)], [0, 0]]) for i, name in enumerate(names)}
    truth = {name: [(0.0, 1.0, "x"), (0.0, 1.0, "y")][: 1 + (i < 5)] for i, name in enumerate(names)}
    data = scores, 1.0, ["x", "y"], truth, dict.fromkeys(names, 2.0)
    of_20, of_5, of_1 = (stats.binomtest(n * value, n).proportion_ci(method="wilson") for n in (20, 5, 1))
    for metric in (partial(psds, dtc=0.7, gtc=0.7, alpha_st=1), partial(segment_f1, threshold=0.5), partial(collar_f1, threshold=0.5)):
        found = metric(*data, resamples=50)
        assert found.value == value
        assert found.interval == pytest.approx(of_20)
        assert found.by_class_interval == {"x": pytest.approx(of_20), "y": pytest.approx(of_5)}
        assert found.micro is None or found.micro_interval == pytest.approx(of_20)
        one = metric(*({"0": part["0"]} if isinstance(part, dict) else part for part in data), resamples=50)
        assert (one.value, one.interval) == (value, pytest.approx(of_1))
    assert of_1 == pytest.approx((0.2065, 1) if value else (0, 0.7935), abs=1e-4)


def test_the_interval_of_a_psds_near_0_does_not_span_everything():
    """Four classes, from found always to found by chance: their mean is just above the penalty for their differences."""
    generator = np.random.default_rng(39)
    names, classes, strengths = [f"{i}" for i in range(30)], list("abcd"), (1, 0.55, 0.2, 0)
    scores = {name: generator.uniform(0, 1, size=(8, 4)) for name in names}
    truth = {}
    for name in names:
        onsets = generator.integers(8, size=4)
        truth[name] = [(float(onset), onset + 1.0, label) for onset, label in zip(onsets, classes)]
        scores[name][onsets, range(4)] += strengths
    found = psds(scores, 1.0, classes, truth, dict.fromkeys(names, 8.0), dtc=0.7, gtc=0.7, alpha_st=1, e_max=50.0, resamples=100)
    low, high = found.interval
    assert 0.001 < found.value < 0.002
    assert 0 <= low <= found.value
    assert 0.01 < high < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"a": np.zeros((4, 2))}}, r"'a' have shape \(4, 2\), but \(steps, 1\)"),
        ({"scores": {"a": np.zeros(4)}}, r"'a' have shape \(4,\)"),
        ({"scores": {"a": np.array([[0], [np.nan], [0], [0]])}}, "recording 'a' at step 1, column 0, is nan"),
        ({"scores": {"a": np.ma.masked_array(np.ones((4, 1)), mask=True)}}, "scores of recording 'a' are a masked array"),
        ({"scores": {"a": np.zeros((4, 1), complex)}}, "scores of recording 'a' are of type complex128, but real numbers"),
        ({"scores": {"a": np.full((4, 1), "0.9")}}, "scores of recording 'a' are of type <U3"),
        ({"scores": {"a": np.zeros((5, 1))}}, "5 steps of 1.0 s, but lasts 4.0 s, for which 4"),
        ({"scores": {"a": np.zeros((2, 1))}}, "2 steps of 1.0 s"),
        ({"scores": {}}, "0 recordings"),
        ({"scores": {"b": np.zeros((4, 1))}}, "'a' is missing in scores"),
        ({"ground_truth": {}}, "'a' is missing in ground_truth"),
        ({"durations": {"a": 4.0, "b": 1.0}}, "'b' is missing in scores"),
        ({"durations": {"a": float("nan")}}, "duration of recording 'a' is nan"),
        ({"durations": {"a": "4"}}, "duration of recording 'a' is '4'"),
        ({"step": 0.0}, "step is 0.0"),
        ({"step": "1"}, "step is '1'"),
        ({"classes": []}, "0 classes"),
        ({"classes": ["x", "x"], "scores": {"a": np.zeros((4, 2))}}, "'x' stands twice"),
        ({"ground_truth": {"a": []}}, "holds no event"),
        ({"ground_truth": {"a": [(1.0, 4.5, "x")]}}, "4.5.* outside recording 'a', from 0 to 4.0 s"),
        ({"ground_truth": {"a": [(-0.5, 1.0, "x")]}}, "-0.5.* outside"),
        ({"ground_truth": {"a": [(2.0, 1.0, "x")]}}, "must end after its onset"),
        ({"ground_truth": {"a": [(2.0, 2.0, "x")]}}, "must end after its onset"),
        ({"ground_truth": {"a": [(float("nan"), 2.0, "x")]}}, "finite seconds"),
        ({"ground_truth": {"a": [(None, None, "x")]}}, r"the event \(None, None, 'x'\).* finite seconds"),
        ({"ground_truth": {"a": [("1.0", "2.0", "x")]}}, "finite seconds"),
        ({"ground_truth": {"a": [None]}}, r"an event of recording 'a' is None, but \(onset, offset, label\)"),
        ({"ground_truth": {"a": [(1.0, 2.0, "z")]}}, "'z'.* unknown label"),
        ({"ground_truth": {"a": [(1.0, 2.0)]}}, r"\(onset, offset, label\) is expected"),
        ({"confidence": 1.5}, "confidence is 1.5"),
    ],
)
@pytest.mark.parametrize("metric", [partial(psds, dtc=0.7, gtc=0.7), partial(collar_f1, threshold=0.5), partial(segment_f1, threshold=0.5)])
def test_bad_input_is_rejected(metric, change, message):
    data = dict(zip(("scores", "step", "classes", "ground_truth", "durations"), one_class([0, 1, 0, 0], [(1, 2)])))
    with pytest.raises(ValueError, match=message):
        metric(**{**data, **change})


@pytest.mark.parametrize("metric", F1.values(), ids=F1)
def test_thresholds_may_be_given_by_name(metric):
    scores = {"a": np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.4]])}
    data = (scores, 1.0, ["x", "y"], {"a": [(0.0, 2.0, "x"), (1.0, 3.0, "y")]}, {"a": 3.0})
    assert metric(*data, {"y": 0.5, "x": 0.3}) == metric(*data, [0.3, 0.5])
    assert metric(*data, [0.3, 0.5]) != metric(*data, [0.5, 0.3])


def test_bad_settings_are_rejected():
    data = one_class([0, 1], [(1, 2)])
    for options, message in (
        ({"dtc": 0}, "dtc is 0"),
        ({"gtc": 1.1}, "gtc is 1.1"),
        ({"cttc": 0.3}, "cttc is 0.3 and alpha_ct 0.0"),
        ({"alpha_ct": 0.3}, "cttc is None and alpha_ct 0.3"),
        ({"alpha_st": -1}, "alpha_st is -1"),
        ({"e_max": 0}, "e_max is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            psds_1(*data, **options)
    for metric in F1.values():
        for threshold in ([0.5, 0.5], "a", None, float("nan"), {"y": 0.5}, {"x": 0.5, "y": 0.5}, {"x": None}):
            with pytest.raises(ValueError, match=r"threshold is .*, but one number, or one for each of 1 classes, is expected: x$"):
                metric(*data, threshold)
    with pytest.raises(ValueError, match="onset_collar is -1"):
        collar_f1(*data, 0.5, onset_collar=-1)
    with pytest.raises(ValueError, match="segment is 0"):
        segment_f1(*data, 0.5, segment=0)


def test_metrics_of_the_library_evaluate_give_the_same():
    scores, step, classes, truth, durations = data = one_class([0, 0.9, 0.2, 0.8], [(1, 2), (2.5, 3)])
    references = [[{"onset": onset, "offset": offset, "label": label} for onset, offset, label in truth["a"]]]
    shared = {"step": step, "classes": classes, "durations": [durations["a"]], "confidence": None}
    for metric, function, options in (
        (PolyphonicSoundDetectionScore(), psds, {"dtc": 0.1, "gtc": 0.1}),
        (CollarF1(), collar_f1, {"threshold": 0.5}),
        (SegmentF1(), segment_f1, {"threshold": 0.5}),
    ):
        given = metric.compute(predictions=[scores["a"].tolist()], references=references, **shared, **options)
        assert given == function(*data, **options, confidence=None).to_dict()
