"""Evaluation of event detection from scores, tuning, and the command on a model and labelled clips."""

import json
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from scipy.ndimage import median_filter

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.classifier import evaluate_classifier
from transformers_sslam.evaluation.detector import detector_table, evaluate_detector
from transformers_sslam.evaluation.event_input import Recordings
from transformers_sslam.evaluation.event_results import evaluate_events, event_activity, max_overlap
from transformers_sslam.evaluation.event_tuning import CHANGE_LENGTHS, tune_events
from transformers_sslam.evaluation.events import collar_f1, psds, segment_f1
from transformers_sslam.evaluation.false_alarms import Choice, choose_within, count_false_alarms, front
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.evaluation.settings import EvaluationSettings
from transformers_sslam.events_sslam import EventSettings, filter_scores, find_events


CLASSES = ["cat", "dog", "owl"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 128}
F1 = {"segment": segment_f1, "collar": collar_f1}


def random_problem(seed, step=0.16, recordings=12, classes=CLASSES):
    """Scores that rise where there are events, with noise, rounded so that many tie."""
    random = np.random.default_rng(seed)
    scores, truth, durations = {}, {}, {}
    for name in map(str, range(recordings)):
        duration = float(random.uniform(4, 10))
        steps = int(np.ceil(duration / step))
        values = random.normal(0, 1, (steps, len(classes)))
        truth[name] = []
        for c, label in enumerate(classes):
            for onset in random.uniform(0, duration - 1, random.integers(0, 3)):
                offset = float(min(duration, onset + random.uniform(0.3, 3)))
                truth[name].append((float(onset), offset, label))
                values[int(onset / step) : int(np.ceil(offset / step)), c] += 1.5
        scores[name] = np.round(1 / (1 + np.exp(-values)), 2).astype(np.float32)
        durations[name] = duration
    return scores, step, classes, truth, durations


def test_metrics_are_those_of_the_filtered_scores_and_of_the_events_that_are_found():
    scores, step, classes, truth, durations = data = random_problem(0)
    settings = EventSettings(threshold={"cat": 0.4, "dog": 0.6}, median_filter={"cat": 0.5, "owl": 0.9})  # 3, 1 and 5 steps
    results = evaluate_events(*data, settings, confidence=None)
    filtered = {
        name: np.stack([median_filter(values[:, c], size=size, mode="reflect") for c, size in enumerate((3, 1, 5))], axis=1)
        for name, values in scores.items()
    }
    rest = step, classes, truth, durations
    metrics = results["metrics"]
    assert metrics["psds1"] == psds(filtered, *rest, dtc=0.7, gtc=0.7, alpha_st=1, confidence=None).value
    assert metrics["psds1_macro"] == psds(filtered, *rest, dtc=0.7, gtc=0.7, confidence=None).value
    scenario_2 = psds(filtered, *rest, dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5, alpha_st=1, confidence=None)
    assert metrics["psds2"] == scenario_2.value
    for name, metric in F1.items():
        expected = metric(filtered, *rest, [0.4, 0.6, 0.5], confidence=None)
        assert (metrics[f"{name}_f1"], metrics[f"{name}_f1_micro"]) == (expected.value, expected.micro)
        for label, counts in expected.counts.items():
            found = results["per_class"][label]
            assert found[f"{name}_f1_counts"] == counts
            assert found[f"{name}_f1"] == expected.by_class[label]
    assert results["per_class"]["owl"]["psds2"] == scenario_2.by_class["owl"]
    assert sum(one["events"] for one in results["per_class"].values()) + results["merged_events"] == sum(map(len, truth.values()))


def test_f1_takes_gaps_hysteresis_and_shortest_durations_into_account():
    """Steps of 1 s. One event with a gap is found whole; a peak that is too short, and one that never reaches the onset, are not."""
    values = [0.7, 0.9, 0.1, 0.8, 0.1, 0.1, 0.1, 0.95, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6]
    scores = {"a": np.array(values, dtype=np.float32)[:, None]}
    data = scores, 1.0, ["dog"], {"a": [(0.0, 4.0, "dog")]}, {"a": 15.0}
    settings = EventSettings(threshold=0.5, onset_threshold=0.75, max_gap=1.0, min_duration=2.0)
    assert event_activity(scores, 1.0, ["dog"], settings, {"a": 15.0})["a"][:, 0].tolist() == [1] * 4 + [0] * 11
    assert evaluate_events(*data, settings, confidence=None)["metrics"]["collar_f1"] == 1
    plain = evaluate_events(*data, EventSettings(), confidence=None)
    assert plain["per_class"]["dog"]["collar_f1_counts"] == {"true_positives": 0, "false_positives": 4, "false_negatives": 1}


@pytest.mark.parametrize("step", [0.04, 0.08, 0.16])
def test_filtered_scores_above_the_threshold_are_the_events_of_the_decoder(step):
    scores, _, classes, _, durations = random_problem(1, step)
    settings = EventSettings(threshold=0.555, median_filter={"cat": 0.3, "dog": 1.0, "owl": 40.0})  # the last longer than a recording
    for name, values in scores.items():
        active = filter_scores(values, step, classes, settings) > 0.555
        np.testing.assert_array_equal(event_activity({name: values}, step, classes, settings, durations)[name], active)
        assert active.any(0)[:2].all()
        events = find_events(values, step, classes, settings, durations[name])
        assert sum(event.end - event.start for event in events) == pytest.approx(
            sum(min((j + 1) * step, durations[name]) - j * step for j, _ in zip(*active.nonzero()))
        )


def test_results_by_number_of_simultaneous_sounds():
    assert max_overlap([]) == 0
    assert max_overlap([(0, 1, "a"), (1, 2, "a"), (2, 3, "b")]) == 1  # they touch
    assert max_overlap([(0, 5, "a"), (1, 2, "b"), (1.5, 3, "c"), (2, 4, "b")]) == 3
    assert max_overlap([(0, 2, "a"), (1, 3, "a"), (1, 2, "a"), (2.5, 4, "b")]) == 2  # of one class they are one sound
    assert max_overlap([(0, 0.1 + 0.2, "a"), (0.3, 1, "b")]) == 1
    data = list(random_problem(2))
    overlaps = {name: max_overlap(events) for name, events in data[3].items()}
    results = evaluate_events(*data, EventSettings(median_filter=0.5))
    assert set(results["by_overlap"]) == {str(number) for number in set(overlaps.values()) - {0}}
    assert len(results["by_overlap"]) > 1
    for number, found in results["by_overlap"].items():
        names = [name for name, overlap in overlaps.items() if overlap == int(number)]
        parts = [{name: values[name] for name in names} for values in (data[0], data[3], data[4])]
        alone = evaluate_events(parts[0], *data[1:3], *parts[1:], EventSettings(median_filter=0.5))
        assert found["recordings"] == len(names)
        for name in ("psds1", "psds2", "segment_f1", "collar_f1"):
            assert found[name] == alone["metrics"][name]
            np.testing.assert_array_equal(found[f"{name}_interval"], alone["metrics"][f"{name}_interval"])
        assert alone["by_overlap"] == {}  # all have the same number


def test_intervals_contain_their_values():
    results = evaluate_events(*random_problem(3, recordings=40), EventSettings(threshold=0.6, median_filter=0.5))
    for name in ("psds1", "psds1_macro", "psds2", "segment_f1", "segment_f1_micro", "collar_f1", "collar_f1_micro"):
        low, high = results["metrics"][f"{name}_interval"]
        assert low < results["metrics"][name] < high
    assert results["per_class"]["cat"]["segment_f1_interval"][0] < results["per_class"]["cat"]["segment_f1"]


@pytest.mark.parametrize(("metric", "seed", "step"), [*product(F1, (0,), (0.16,)), ("segment", 3, 0.04), ("collar", 3, 0.08)])
def test_tuning_finds_the_highest_f1_of_all_thresholds_and_filters(metric, seed, step):
    data = random_problem(seed, step)
    lengths = (0, 0.5, 1.0)
    tuned = tune_events(*data, lengths=lengths, metric=metric)
    found = evaluate_events(*data, tuned, confidence=None)["per_class"]
    candidates = np.arange(0.005, 1, 0.01)  # between scores, which are multiples of 0.01, as are medians of odd numbers of them
    for label in CLASSES:
        best, first = 0.0, None
        for length in lengths:
            filtered = {name: filter_scores(values, step, CLASSES, EventSettings(median_filter=length)) for name, values in data[0].items()}
            f1 = [F1[metric](filtered, *data[1:], threshold, confidence=None).by_class[label] for threshold in candidates]
            if max(f1) > best:
                best, first = max(f1), length
        assert found[label][f"{metric}_f1"] == pytest.approx(best, abs=1e-12)
        assert tuned.median_filter[label] == first  # the shortest of equally good ones
    assert tune_events(*data, lengths=lengths[::-1], metric=metric) == tuned


def test_tuning_for_psds_takes_the_filter_of_the_largest_area_and_then_the_best_threshold():
    data = random_problem(0, 0.16)
    lengths = (0, 0.5, 1.0, 1.5, 2)
    tuned = tune_events(*data, lengths=lengths, metric="psds")
    areas = {}
    for length in lengths:
        filtered = {name: filter_scores(values, 0.16, CLASSES, EventSettings(median_filter=length)) for name, values in data[0].items()}
        areas[length] = psds(filtered, *data[1:], dtc=0.7, gtc=0.7, confidence=None).by_class
    for label in CLASSES:
        area, length = max((areas[length][label], -length) for length in lengths)  # the shortest of equally good ones
        assert area > 0
        assert tuned.median_filter[label] == -length
        alone = tune_events(*data, lengths=[-length], metric="segment")
        assert tuned.threshold[label] == alone.threshold[label]
    assert tuned.median_filter != tune_events(*data, lengths=lengths, metric="segment").median_filter


def test_a_threshold_by_hand():
    """Segments of 1 s: 0.9 and 0.6 are dogs, 0.3 is not: F1 is 1 from 0.3 to 0.6, and the threshold lies in the middle."""
    data = {"a": np.array([[0.9, 0.2], [0.6, 0.2], [0.3, 0.2]])}, 1.0, ["dog", "owl"], {"a": [(0.0, 2.0, "dog")]}, {"a": 3.0}
    tuned = tune_events(*data, lengths=(0,), before=EventSettings(threshold={"owl": 0.7}, median_filter=0.4))
    assert tuned == EventSettings(threshold={"dog": 0.45, "owl": 0.7}, median_filter={"dog": 0.0, "owl": 0.4})  # there is no owl
    silent, loud = (({"a": np.full((3, 2), score)}, *data[1:]) for score in (0.0, 0.9))
    assert tune_events(*silent, lengths=(0, 3)) == EventSettings(threshold={"dog": 0.5, "owl": 0.5}, median_filter={"dog": 0, "owl": 0})
    assert tune_events(*loud, lengths=(0, 3)).median_filter["dog"] == 0  # the longer one is not better
    close = {"a": np.array([[0.5], [np.nextafter(0.5, 0)]])}, 1.0, ["dog"], {"a": [(0.0, 1.0, "dog")]}, {"a": 2.0}
    threshold = tune_events(*close, lengths=(0,)).threshold["dog"]
    assert np.nextafter(0.5, 0) <= threshold < 0.5
    with pytest.raises(ValueError, match="metric is 'f1', but one of segment, collar, psds"):
        tune_events(*data, metric="f1")
    with pytest.raises(ValueError, match="lengths is empty"):
        tune_events(*data, lengths=())
    with pytest.raises(ValueError, match="median_filter is -1"):
        tune_events(*data, lengths=(0, -1))


def test_filters_help_where_scores_flicker():
    """A long event with a hole in its scores, and a short false peak: only a filter of 3 steps finds the one without the other."""
    values = [0.1, 0.9, 0.9, 0.2, 0.9, 0.9, 0.1, 0.1, 0.95, 0.1, 0.1]
    data = {"a": np.array(values)[:, None]}, 1.0, ["dog"], {"a": [(1.0, 6.0, "dog")]}, {"a": 11.0}
    for metric in F1:
        tuned = tune_events(*data, lengths=(0, 3, 5), metric=metric)
        assert tuned.median_filter == {"dog": 3}
        assert evaluate_events(*data, tuned, confidence=None)["metrics"][f"{metric}_f1"] == 1


# False alarms


def peaks(length, **seconds):
    """Scores of 0.1 but for single steps of 1 s: `_3=0.8` is 0.8 at 3 s."""
    values = np.full(length, 0.1)
    for name, score in seconds.items():
        values[int(name[1:])] = score
    return values


def test_false_alarms_by_hand():
    """A tenth of an event in ground truth of its class is enough; what is of another class, or in a recording without events, is not."""
    dog, cat = np.zeros((3, 11)), np.zeros((3, 11))
    dog[0, 1:11] = 0.9  # 1 s of 10 s is true
    cat[0, 0:2] = 0.9  # there is a dog
    dog[1] = 0.9  # 1 s of 11 s is true
    dog[2, [0, 2, 3]] = 0.9  # two events where there is none
    scores = {name: np.stack(columns, axis=1) for name, columns in zip("abc", zip(dog, cat))}
    truth = {"a": [(0.0, 2.0, "dog")], "b": [(4.0, 5.0, "dog")], "c": []}
    data = scores, 1.0, ["dog", "cat"], truth, dict.fromkeys("abc", 11.0)
    found = evaluate_events(*data, EventSettings(), confidence=None)["false_alarms"]
    assert found == {"per_hour": pytest.approx(4 / 33 * 3600), "hours": pytest.approx(33 / 3600), "by_class": {"dog": 3, "cat": 1}}
    joined = evaluate_events(*data, EventSettings(max_gap=1.0, min_duration={"cat": 3.0}), confidence=None)["false_alarms"]
    assert joined["by_class"] == {"dog": 2, "cat": 0}  # of the events that the settings lead to


def test_thresholds_within_a_number_of_false_alarms_by_hand():
    """In 20 s one false alarm is 180 an hour. Dogs: F1 2/3 without, 4/5 with one. Cats: nothing without, 4/5 with one. No owls."""
    dog, cat, owl = peaks(20, _0=0.9, _2=0.8, _4=0.6), peaks(20, _8=0.9, _10=0.7, _12=0.7), peaks(20, _15=0.6)
    truth = [(0.0, 1.0, "dog"), (4.0, 5.0, "dog"), (10.0, 11.0, "cat"), (12.0, 13.0, "cat")]
    data = {"a": np.stack([dog, cat, owl], axis=1)}, 1.0, ["dog", "cat", "owl"], {"a": truth}, {"a": 20.0}
    for limit, thresholds, alarms in (
        (None, {"dog": 0.35, "cat": 0.4, "owl": 0.5}, {"dog": 1, "cat": 1, "owl": 1}),
        (720, {"dog": 0.35, "cat": 0.4, "owl": 0.8}, {"dog": 1, "cat": 1, "owl": 0}),
        (359, {"dog": 0.85, "cat": 0.4, "owl": 0.8}, {"dog": 0, "cat": 1, "owl": 0}),
        (0, {"dog": 0.85, "cat": 0.95, "owl": 0.8}, {"dog": 0, "cat": 0, "owl": 0}),
    ):
        tuned = tune_events(*data, lengths=(0,), max_false_alarms=limit)
        assert tuned.threshold == thresholds
        assert evaluate_events(*data, tuned, confidence=None)["false_alarms"]["by_class"] == alarms
    before = EventSettings(threshold={"cat": 0.97, "owl": 0.3}, median_filter={"owl": 3.0})  # which leaves 0.1 of the owl's peak
    tuned = tune_events(*data, lengths=(0,), max_false_alarms=0, before=before)
    assert (tuned.threshold["cat"], tuned.threshold["owl"], tuned.median_filter["owl"]) == (0.97, 0.3, 3.0)
    certain = {"a": np.where(data[0]["a"] == 0.9, 1.0, data[0]["a"])}, *data[1:]
    assert tune_events(*certain, lengths=(0,), max_false_alarms=0).threshold["cat"] == 1.0
    with pytest.raises(ValueError, match="max_false_alarms is -1, but a number an hour that is not negative"):
        tune_events(*data, max_false_alarms=-1)


@pytest.mark.parametrize("metric", F1)
@pytest.mark.parametrize("alarms", [0, 3, 10])
def test_no_thresholds_have_a_higher_mean_f1_with_as_few_false_alarms(metric, alarms):
    """Against all combinations of a grid that lies between all scores, without thresholds below the best ones."""
    data = random_problem(5)
    limit = alarms / (sum(data[4].values()) / 3600)
    f1, counts = [], []
    for threshold in np.arange(0.005, 1, 0.01):
        found = F1[metric](*data, threshold, confidence=None).by_class
        number = count_false_alarms(Recordings.of(*data), threshold)["by_class"]
        f1.append([found[label] for label in CLASSES])
        counts.append([number[label] for label in CLASSES])
    lower = np.arange(100)[:, None] < 99 - np.argmax(f1[::-1], axis=0)  # than the highest of the best ones without a limit
    (a, b, c), (i, j, k) = np.transpose(np.where(lower, 0, f1)), np.transpose(counts)
    together = i[:, None, None] + j[:, None] + k <= alarms
    best = np.where(together, a[:, None, None] + b[:, None] + c, 0).max() / 3
    results = evaluate_events(*data, tune_events(*data, lengths=(0,), metric=metric, max_false_alarms=limit), confidence=None)
    assert results["metrics"][f"{metric}_f1"] == pytest.approx(best, abs=1e-12)
    assert results["false_alarms"]["per_hour"] <= limit + 1e-9
    free = evaluate_events(*data, tune_events(*data, lengths=(0,), metric=metric), confidence=None)
    assert results["metrics"][f"{metric}_f1"] < free["metrics"][f"{metric}_f1"]  # the limit has an effect
    assert free == evaluate_events(*data, tune_events(*data, lengths=(0,), metric=metric, max_false_alarms=1e6), confidence=None)


def test_choices_within_a_budget_are_the_best_of_all():
    random = np.random.default_rng(0)
    for _ in range(20):
        every = [
            [Choice(0.0, float(f1), int(alarms), 0.5, 0.0) for f1, alarms in zip(random.random(6), random.integers(0, 8, 6))]
            for _ in range(4)
        ]
        fronts = {c: front(choices) for c, choices in enumerate(every)}
        for budget in (0, 1, 5, 12, 50):
            chosen = choose_within(fronts, budget)
            nothing = Choice(0.0, 0.0, 0, 1.0, 0.0)
            best = max(
                sum(one.f1 for one in some) for some in product(*([nothing, *choices] for choices in every))
                if sum(one.alarms for one in some) <= budget
            )  # fmt: skip
            assert sum(choice.alarms for choice in chosen.values()) <= budget
            assert sum(choice.f1 for choice in chosen.values()) == pytest.approx(best)


# The command


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


EVENTS = [
    [{"label": "cat", "onset": 0.1, "offset": 0.8}],
    [{"label": "dog", "onset": 0.0, "offset": 1.1}, {"label": "cat", "onset": 0.5, "offset": 0.9}],
    [],
    [{"label": "dog", "onset": 1.0, "offset": 2.0}],
    [{"label": "cat", "onset": 0.2, "offset": 1.3}, {"label": "dog", "onset": 1.3, "offset": 1.5}],
]


def write_clips(folder: Path, events=None, seconds=1.6) -> Path:
    """An audio folder of noise, each clip with its events and longer than the one before, the last longer than a window."""
    folder.mkdir()
    lines = []
    for i, found in enumerate(EVENTS if events is None else events):
        soundfile.write(folder / f"{i:02}.wav", noise(seconds + 0.15 * i, seed=i), 16_000)
        lines.append(json.dumps({"file_name": f"{i:02}.wav", "events": found}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_model(folder: Path, **config) -> Path:
    config = SSLAMConfig(**TINY, id2label=dict(enumerate(CLASSES)), **config)
    model = SSLAMForAudioFrameClassification(config)
    torch.nn.init.normal_(model.frame_classifier.weight)
    model.save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=TINY["max_length"]).save_pretrained(folder)
    return folder


def evaluation(model: Path, clips: Path, output: Path, /, **changes) -> EvaluationSettings:
    common = {"model": str(model), "data_dir": str(clips), "output_dir": str(output), "test_split": "train", "label_column": "events"}
    return EvaluationSettings(**{**common, "task": "events", "per_device_eval_batch_size": 4, "device": "cpu", **changes})


def waveform(clips: Path, i: int) -> np.ndarray:
    return soundfile.read(clips / f"{i:02}.wav", dtype="float32")[0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_are_those_of_score_steps(tmp_path, batch_size):
    clips, model = write_clips(tmp_path / "clips"), write_model(tmp_path / "model", steps_per_second=12.5)
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    settings = evaluation(model, clips, tmp_path / "out", threshold={"cat": 0.45}, median_filter=0.3, per_device_eval_batch_size=batch_size)
    results = evaluate_detector(settings)
    scored = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    assert (scored.step, scored.classes, results["clips"], results["cut_events"]) == (0.08, CLASSES, 5, 0)
    for i, (name, scores) in enumerate(scored.scores.items()):
        alone = network.score_steps(waveform(clips, i), extractor)
        assert Path(name).name == f"{i:02}.wav"
        np.testing.assert_allclose(scores, alone.scores, atol=1e-5)
        assert scored.durations[name] == alone.duration
        assert scored.ground_truth[name] == [(event["onset"], event["offset"], event["label"]) for event in EVENTS[i]]
    expected = evaluate_events(*scored, EventSettings(threshold={"cat": 0.45}, median_filter=0.3))
    assert expected.pop("merged_events") == 0
    assert "merged_events" not in results  # events are joined when they are read
    assert {name: results[name] for name in expected} == expected
    assert results["event_detection"]["threshold"]["cat"] == 0.45
    assert results["event_detection"]["median_filter"] == 0.3
    assert results["metrics"]["classes_without_events"] == ["owl"]
    assert results["false_alarms"]["hours"] == pytest.approx(sum(scored.durations.values()) / 3600)  # of clips without events too
    assert set(results["by_overlap"]) == {"1", "2"}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["metrics"]["psds1"] == results["metrics"]["psds1"]
    low, high = results["metrics"]["segment_f1_interval"]
    assert f"| segment F1, macro | {results['metrics']['segment_f1']:.4f} [{low:.4f}, {high:.4f}] |" in detector_table(results)


def test_tuning_is_written_into_the_model_and_used_by_it(tmp_path, capsys):
    clips, model = (
        write_clips(tmp_path / "clips"),
        write_model(tmp_path / "model", event_detection={"max_gap": 1.0, "threshold": {"owl": 0.7}}),
    )
    before = json.loads((model / "config.json").read_text())
    arguments = ["evaluate", "--task", "events", "--model", str(model), "--data_dir", str(clips), "--label_column", "events"]
    arguments += ["--test_split", "train", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--tune"]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    after = json.loads((model / "config.json").read_text())
    tuned = after.pop("event_detection")
    assert before.pop("event_detection") == {"max_gap": 1.0, "threshold": {"owl": 0.7}}
    assert after == before
    assert set(tuned) == {"threshold", "median_filter"}
    assert set(tuned["threshold"]) == set(tuned["median_filter"]) == set(CLASSES)
    assert tuned["threshold"]["owl"] == 0.7  # there is none, so it keeps what it had
    scored = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    assert EventSettings(**tuned) == tune_events(*scored, before=EventSettings(threshold={"owl": 0.7}))
    tuning, overlap = results["tuning"], results["by_overlap"]["2"]
    assert f"\n| 2 | {overlap['recordings']} | {overlap['segment_f1']:.2f} [{overlap['segment_f1_interval'][0]:.2f}, " in printed
    assert all(tuning["after"][label] > tuning["before"][label] for label in ("cat", "dog"))
    assert tuning["after"] == {label: results["per_class"][label]["segment_f1"] for label in ("cat", "dog")}
    assert f"| dog | {tuning['before']['dog']:.3f} | {tuning['after']['dog']:.3f} | {tuned['threshold']['dog']:.6g} |" in printed
    assert f"written into {model / 'config.json'}. These clips chose them, so they are no longer a test" in printed
    assert main(arguments) == 0  # the model's own settings are now the tuned ones
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert "tuning" not in again
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    name = next(iter(scored.scores))
    expected = find_events(scored.scores[name], scored.step, CLASSES, EventSettings(**tuned), scored.durations[name])
    assert [event[:3] for event in network.detect(waveform(clips, 0), extractor)] == [event[:3] for event in expected]
    limit = results["false_alarms"]["per_hour"] * 0.9
    assert limit > 0
    assert main([*arguments, "--tune", "--max_false_alarms", str(limit)]) == 0
    alarms = json.loads((tmp_path / "out" / "results.json").read_text())["false_alarms"]
    assert alarms["per_hour"] <= limit
    total, hours = sum(alarms["by_class"].values()), alarms["hours"]
    assert f"false alarms: {total / hours:.1f} an hour ({total} in {hours:.3g} h" in capsys.readouterr().out


def test_change_filters_are_tuned_on_request_and_used_by_the_model(tmp_path, capsys, monkeypatch):
    chosen = EventSettings(**{name: dict.fromkeys(CLASSES, value) for name, value in {"threshold": 0.3, "change_filter": 1.0}.items()})
    asked = []

    def choose(*scored, change_lengths, **options):
        asked.append(change_lengths)
        return chosen

    monkeypatch.setattr("transformers_sslam.evaluation.detector.tune_events", choose)
    clips, model = write_clips(tmp_path / "clips"), write_model(tmp_path / "model")
    arguments = ["evaluate", "--task", "events", "--model", str(model), "--data_dir", str(clips), "--label_column", "events"]
    arguments += ["--test_split", "train", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--tune", "--tune_for", "collar", "--tune_change_filter"]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    tuned = json.loads((model / "config.json").read_text())["event_detection"]
    scored = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    assert asked == [CHANGE_LENGTHS]
    assert EventSettings(**tuned) == chosen
    assert "| threshold | change filter (s) |" in printed
    assert main(arguments) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    name = next(iter(scored.scores))
    expected = find_events(scored.scores[name], scored.step, CLASSES, EventSettings(**tuned), scored.durations[name])
    assert [event[:3] for event in network.detect(waveform(clips, 0), extractor)] == [event[:3] for event in expected]


@pytest.mark.parametrize(("seconds", "onset"), [(1.6, 5.0), (1.6000625, 1.7500619)])  # the second clip ends 0.6 microseconds later
def test_events_beyond_the_end_of_a_clip(tmp_path, seconds, onset):
    events = [[{"label": "cat", "onset": 0.1, "offset": 9.0}], [{"label": "dog", "onset": onset, "offset": 6.0}], EVENTS[1], EVENTS[3]]
    clips, model = write_clips(tmp_path / "clips", events, seconds), write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"1 of 4 evaluated clips cannot be used \(1 with an event after their end\).*01.wav"):
        evaluate_detector(evaluation(model, clips, tmp_path / "out"))
    results = evaluate_detector(evaluation(model, clips, tmp_path / "out", max_unreadable=0.5))
    assert (results["clips"], results["cut_events"]) == (3, 1)
    assert [Path(name).name for name in results["unreadable"]["with an event after their end"]] == ["01.wav"]
    scored = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    assert next(iter(scored.ground_truth.values())) == [(0.1, seconds, "cat")]
    assert [Path(name).name for name in scored.scores] == ["00.wav", "02.wav", "03.wav"]


def test_clips_without_times_are_left_out(tmp_path, caplog):
    weak = [{"label": "dog", "onset": None, "offset": None}]
    clips, model = write_clips(tmp_path / "clips", [EVENTS[0], weak, EVENTS[1]]), write_model(tmp_path / "model")
    results = evaluate_detector(evaluation(model, clips, tmp_path / "out"))
    assert (results["clips"], results["clips_without_times"]) == (2, 1)
    assert "1 of 3 clips are left out, because the times of their events are not known" in caplog.text


def test_what_cannot_be_evaluated_is_rejected_before_anything_is_decoded(tmp_path, monkeypatch):
    clips, model = write_clips(tmp_path / "clips"), write_model(tmp_path / "model")
    wolves = write_clips(tmp_path / "wolves", [[{"label": "wolf", "onset": 0.0, "offset": 1.0}]])
    weak = write_clips(tmp_path / "weak", [[{"label": "dog", "onset": None, "offset": None}]])
    classifier = tmp_path / "classifier"
    SSLAMForAudioClassification(SSLAMConfig(**TINY, id2label=dict(enumerate(CLASSES)))).save_pretrained(classifier)
    SSLAMFeatureExtractor(max_length=128).save_pretrained(classifier)
    wrong = write_model(tmp_path / "wrong", event_detection={"threshold": {"wolf": 0.3}})
    monkeypatch.setattr("transformers_sslam.evaluation.scored_events.Waveforms", None)
    for changes, message in (
        ({"data_dir": str(wolves)}, "00.wav is labelled 'wolf', which is none of the 3 classes: cat, dog, owl"),
        ({"label_column": "file_name"}, "label_column is 'file_name', but task is 'events', .* in another column: set it to events"),
        ({"label_column": "label"}, "label_column is 'label', but task is 'events', .* in another column: set it to events"),
        ({"data_dir": str(weak)}, "column 'events' has no events with onset and offset"),
        (
            {"model": str(classifier)},
            "is a classifier of clips, but a detector of events is needed: give one that was fine-tuned with --task events",
        ),
        ({"model": str(wrong)}, "the model cannot be evaluated: threshold has a value for 'wolf'"),
        ({"threshold": {"wolf": 0.5}}, "the model cannot be evaluated: threshold has a value for 'wolf'"),
        ({"median_filter": -1.0}, "the model cannot be evaluated: median_filter is -1"),
        ({"output_dir": str(model)}, "holds a model or its run"),
        ({"model": "someone/detector", "tune": True}, "someone/detector is not a folder whose config.json could be changed"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_detector(evaluation(model, clips, tmp_path / "out", **changes))
    assert not any((tmp_path / "out").iterdir())
    with pytest.raises(
        UserError, match="is a detector of events, but a classifier of clips is needed: .* or use sslam detect, or sslam evaluate --task"
    ):
        evaluate_classifier(evaluation(model, clips, tmp_path / "out", task="classification"))
    for changes, message in (
        ({"task": "classification", "threshold": 0.4}, "threshold is set, but task is 'classification'"),
        ({"task": "classification", "tune": True}, "tune is set, but task is 'classification'"),
        ({"tune_for": "psds"}, "tune_for is 'psds', but has no effect without tune"),
        ({"max_false_alarms": 6.0}, "max_false_alarms is 6, but has no effect without tune"),
        ({"tune": True, "max_false_alarms": -1.0}, "max_false_alarms is -1.0, but a number an hour that is not negative"),
        ({"tune_change_filter": True}, "tune_change_filter is set, but has no effect without tune"),
        ({"tune": True, "max_gap": 0.5}, "max_gap is set, but tune chooses thresholds and filters anew"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation(model, clips, tmp_path / "out", **changes)


def test_a_damaged_model_has_no_result(tmp_path):
    clips, model = write_clips(tmp_path / "clips"), write_model(tmp_path / "model")
    damaged = SSLAMForAudioFrameClassification.from_pretrained(model)
    torch.nn.init.constant_(damaged.frame_classifier.bias, float("nan"))
    damaged.save_pretrained(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate_detector(evaluation(model, clips, tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())


def test_a_run_that_fails_after_scoring_leaves_no_earlier_results(tmp_path, monkeypatch):
    clips, model = write_clips(tmp_path / "clips"), write_model(tmp_path / "model")
    evaluate_detector(evaluation(model, clips, tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr("transformers_sslam.evaluation.detector.evaluate_events", None)
    with pytest.raises(TypeError):
        evaluate_detector(evaluation(model, clips, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["reliability.png", "scores.npz"]
