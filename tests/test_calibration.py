"""Calibration: the temperature of the lowest log loss, what measures it, and that every user of a calibrated model has its scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from sklearn.metrics import log_loss
from test_classifier_evaluation import CLASSES, _own_cache, evaluation, expected_logits, write_clips, write_model  # noqa: F401  # fixture
from test_event_evaluation import evaluation as event_evaluation
from test_event_evaluation import waveform
from test_event_evaluation import write_clips as write_scenes
from test_event_evaluation import write_model as write_detector
from transformers import pipeline

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.calibration import as_logits, calibrated_thresholds, fit_temperature, measure_calibration
from transformers_sslam.evaluation.classifier import evaluate_classifier
from transformers_sslam.evaluation.detector import evaluate_detector, step_targets
from transformers_sslam.evaluation.event_tuning import tune_events
from transformers_sslam.evaluation.loading import hash_model
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.events_sslam import EventSettings
from transformers_sslam.finetuning.model import build_model
from transformers_sslam.finetuning.settings import FineTuningSettings


def problem(exclusive: bool, temperature: float, n: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(n, 5)` of scores that, divided by the temperature, are the frequencies of the targets."""
    random = np.random.default_rng(0)
    logits = random.normal(-0.5, 2.0, (n, 5))
    if exclusive:
        chances = softmax(logits / temperature, axis=1).cumsum(1)
        return logits, np.eye(5)[(random.random((n, 1)) > chances).sum(1).clip(max=4)]
    return logits, (random.random((n, 5)) < expit(logits / temperature)).astype(float)


def loss(logits: np.ndarray, targets: np.ndarray, exclusive: bool) -> float:
    """By scikit-learn."""
    if exclusive:
        return log_loss(targets, softmax(logits, axis=1))
    return log_loss(targets.ravel(), expit(logits).ravel())


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("true", [0.6, 1.0, 2.5])
def test_the_temperature_is_the_true_one_and_has_the_lowest_log_loss(exclusive, true):
    logits, targets = problem(exclusive, true)
    found = fit_temperature(logits, targets, exclusive)
    assert found == pytest.approx(true, rel=0.02)
    searched = minimize_scalar(lambda t: loss(logits / t, targets, exclusive), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(searched.x, rel=1e-5)
    before, after = (measure_calibration(logits / t, targets, exclusive) for t in (1.0, found))
    assert before["log_loss"] == pytest.approx(loss(logits, targets, exclusive), rel=1e-9)
    assert after["expected_calibration_error"] < 0.01
    if true != 1:
        assert before["expected_calibration_error"] > 0.05
        assert after["brier_score"] < before["brier_score"]
    again = fit_temperature(logits / found, targets, exclusive)
    assert again == pytest.approx(1, rel=1e-9)


def test_what_is_measured_by_hand():
    """Two clips with a confidence of 0.9, one of them right, and two with 0.6, both right."""
    scores = np.array([[0.9, 0.06, 0.04], [0.9, 0.06, 0.04], [0.3, 0.6, 0.1], [0.3, 0.6, 0.1]])
    targets = np.eye(3)[[0, 1, 1, 1]]
    found = measure_calibration(np.log(scores), targets, exclusive=True)
    assert found["expected_calibration_error"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    right, wrong, less = 0.1**2 + 0.06**2 + 0.04**2, 0.9**2 + 0.94**2 + 0.04**2, 0.3**2 + 0.4**2 + 0.1**2
    assert found["brier_score"] == pytest.approx((right + wrong + 2 * less) / 4)
    assert found["log_loss"] == pytest.approx(-(np.log(0.9) + np.log(0.06) + 2 * np.log(0.6)) / 4)
    filled = {i: one for i, one in enumerate(found["reliability"]) if one["count"]}
    assert len(found["reliability"]) == 15
    assert list(filled) == [8, 13]  # 0.6 closes the ninth bin, for bins hold their upper edge
    assert filled[8] == {"confidence": pytest.approx(0.6), "frequency": 1.0, "count": 2}
    assert found["reliability"][0] == {"confidence": None, "frequency": None, "count": 0}
    found = measure_calibration(np.log([[3.0, 1 / 3], [3.0, 3.0]]), np.array([[1.0, 0.5], [0.0, 0.25]]), exclusive=False)  # 3/4 and 1/4
    assert found["brier_score"] == pytest.approx((0.25**2 + 0.25**2 + 0.75**2 + 0.5**2) / 4)
    assert found["expected_calibration_error"] == pytest.approx((0.25 + abs(3 * 0.75 - 1.25)) / 4)


@pytest.mark.parametrize("exclusive", [True, False])
def test_scores_that_no_temperature_fits_are_rejected(exclusive):
    logits, targets = problem(exclusive, 1.0, n=50)
    with pytest.raises(UserError, match="no better than chance"):
        fit_temperature(-logits, targets, exclusive)
    with pytest.raises(UserError, match="separate these clips without an error"):
        fit_temperature(logits, np.eye(5)[logits.argmax(1)] if exclusive else logits > 0, exclusive)
    if exclusive:
        with pytest.raises(UserError, match="a softmax of one class is always 1, so no temperature changes it: leave calibrate out"):
            fit_temperature(logits[:, :1], np.ones((50, 1)), exclusive)


def test_thresholds_are_mapped_so_that_the_same_steps_are_above_them():
    before = {"threshold": {"cat": 0.3, "dog": 0.0, "owl": 1.0}, "onset_threshold": 0.9, "median_filter": {"cat": 0.5}}
    after = calibrated_thresholds(before, 2.0)
    assert after["median_filter"] == {"cat": 0.5}
    assert (after["threshold"]["dog"], after["threshold"]["owl"]) == (0, 1)
    logits = np.linspace(-8, 8, 1001)
    for old, new in ((0.3, after["threshold"]["cat"]), (0.9, after["onset_threshold"])):
        np.testing.assert_array_equal(expit(logits) > old, expit(logits / 2) > new)
    assert calibrated_thresholds({"threshold": 0.5, "onset_threshold": None}, 3.0) == {"threshold": 0.5, "onset_threshold": None}
    assert calibrated_thresholds(None, 3.0) is None


# The command


def classifier_problem(tmp_path: Path, problem_type: str) -> tuple[Path, Path]:
    """A model that is too sure, and clips most of which have the label that it finds; and one between two classes of a mistake."""
    model, clips = write_model(tmp_path / "model", problem_type), write_clips(tmp_path / "clips", ["cat"] * 12)
    network = SSLAMForAudioClassification.from_pretrained(model)
    with torch.no_grad():  # large weights, so that a random network tells sounds apart
        for weights in network.sslam.parameters():
            weights *= 20 if weights.ndim == 2 else 1
        network.save_pretrained(model)
        logits = expected_logits(model, clips)
        network.classifier.weight *= 6 / logits.std()
        network.classifier.bias.copy_(-6 / logits.std() * torch.from_numpy(logits.mean(0)))
    network.save_pretrained(model)
    found = expected_logits(model, clips).argsort(1)[:, ::-1]
    write_clips(clips, [CLASSES[found[i, int(i % 3 == 0)]] for i in range(12)])
    (model / "README.md").write_text("# A model\n\n## Calibration\n\nOf long ago.\n\n## Licence\n\nNone.\n")
    return model, clips


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_a_calibrated_classifier_has_its_scores_wherever_it_is_used(tmp_path, capsys, problem_type):
    model, clips = classifier_problem(tmp_path, problem_type)
    exclusive = problem_type.startswith("single")
    logits, before = expected_logits(model, clips), load_file(model / "model.safetensors")
    network, extractor = SSLAMForAudioClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    key = hash_model(network.sslam, extractor)
    arguments = [
        "evaluate",
        "--model",
        str(model),
        "--data_dir",
        str(clips),
        "--test_split",
        "train",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    assert "| calibration | value |" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main([*arguments, "--calibrate"]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["calibration"]
    targets = np.load(tmp_path / "out" / "scores.npz")["targets"]
    temperature = fit_temperature(logits, targets, exclusive)
    assert found["temperature"] == pytest.approx(temperature, rel=1e-4)
    assert temperature > 1.5
    assert found["before"] == plain["calibration"]
    assert found["log_loss"] < found["before"]["log_loss"]
    assert f"| expected calibration error | {found['before']['expected_calibration_error']:.4f} | " in printed
    assert f"written into {model / 'model.safetensors'}, and config.json there. These clips fitted it" in printed
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000
    after = load_file(model / "model.safetensors")
    for name, tensor in before.items():
        expected = tensor / found["temperature"] if name.startswith("classifier.") else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0)
    with safetensors.safe_open(model / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((model / "config.json").read_text())
    assert config["calibration"] == {"temperature": found["temperature"]}
    # Its own logits, the pipeline of Transformers, and windows of recordings.
    np.testing.assert_allclose(expected_logits(model, clips), logits / temperature, atol=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "scores.npz")["logits"], logits / temperature, atol=1e-4)
    network = SSLAMForAudioClassification.from_pretrained(model)
    scores = (softmax(logits[0] / temperature) if exclusive else expit(logits[0] / temperature)).astype(np.float32)
    classify = pipeline("audio-classification", model=network, feature_extractor=extractor, device="cpu")
    function = "softmax" if exclusive else "sigmoid"
    by_label = {one["label"]: one["score"] for one in classify(waveform(clips, 0), top_k=None, function_to_apply=function)}
    np.testing.assert_allclose([by_label[name] for name in CLASSES], scores, atol=1e-4)
    np.testing.assert_allclose(network.score_over_time(waveform(clips, 0), extractor).scores[0], scores, atol=1e-4)
    assert hash_model(network.sslam, extractor) == key  # features of the encoder are as they were
    card = (model / "README.md").read_text()
    assert card.startswith("# A model\n\n## Licence\n\nNone.\n\n## Calibration\n\nThe weights and the bias")
    assert f"temperature of {temperature:.4g}" in card
    assert "on 12 clips of `clips`" in card
    assert card.count("## Calibration") == 1
    # A second calibration changes nothing, and the record is of both.
    assert main([*arguments, "--calibrate"]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["calibration"]
    assert again["temperature"] == pytest.approx(1, abs=1e-5)
    assert again["before"]["brier_score"] == pytest.approx(found["brier_score"], abs=1e-6)
    config = json.loads((model / "config.json").read_text())
    assert config["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-4)


def test_weights_in_half_precision_stay_so(tmp_path):
    model, clips = classifier_problem(tmp_path, "multi_label_classification")
    save_file({name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}, model / "model.safetensors")
    found = evaluate_classifier(evaluation(model, clips, tmp_path / "out", calibrate=True))["calibration"]
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {torch.float16}
    after = evaluate_classifier(evaluation(model, clips, tmp_path / "out"))["calibration"]
    assert after["log_loss"] == pytest.approx(found["log_loss"], abs=1e-3)


def test_further_training_forgets_the_calibration(tmp_path):
    model, clips = classifier_problem(tmp_path, "single_label_classification")
    evaluate_classifier(evaluation(model, clips, tmp_path / "out", calibrate=True))
    settings = FineTuningSettings(data_dir=str(clips), model=str(model), use_cpu=True)
    assert build_model(settings, SSLAMFeatureExtractor.from_pretrained(model), CLASSES, False, str(model)).config.calibration is None


def detector_problem(tmp_path: Path, **config) -> tuple[Path, Path]:
    """A model that is too sure, and clips with the events that it finds, but in two of them, which have those of another.

    They are no longer than a window, in which scores are no means over windows.
    """
    model, scenes = write_detector(tmp_path / "model", **config), write_scenes(tmp_path / "scenes", [[]] * 5, seconds=0.6)
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    with torch.no_grad():
        for weights in network.sslam.parameters():
            weights *= 20 if weights.ndim == 2 else 1
        scores = np.concatenate([network.score_steps(waveform(scenes, i), extractor).scores for i in range(5)])
        logits = as_logits(scores)
        network.frame_classifier.weight *= 6 / logits.std()
        network.frame_classifier.bias.copy_(-6 / logits.std() * torch.from_numpy(logits.mean(0)))
    network.save_pretrained(model)
    found = [network.detect(waveform(scenes, i), extractor, threshold=0.5, onset_threshold=0.5) for i in (0, 2, 2, 3, 3)]
    rows = [[{"label": e.label, "onset": e.start, "offset": e.end} for e in events] for events in found]
    lines = [json.dumps({"file_name": f"{i:02}.wav", "events": row}) for i, row in enumerate(rows)]
    (scenes / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return model, scenes


def events_of(model: Path, scenes: Path, i: int) -> list[tuple]:
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    return [event[:3] for event in network.detect(waveform(scenes, i), extractor)]


def test_a_calibrated_detector_finds_the_events_that_it_found_before(tmp_path):
    model, scenes = detector_problem(tmp_path, event_detection={"threshold": {"cat": 0.6}, "onset_threshold": {"dog": 0.8}})
    before = [events_of(model, scenes, i) for i in range(5)]
    assert sum(map(len, before)) > 5
    evaluate_detector(event_evaluation(model, scenes, tmp_path / "plain"))
    scored = ScoredEvents.load(tmp_path / "plain" / "scores.npz")
    results = evaluate_detector(event_evaluation(model, scenes, tmp_path / "out", calibrate=True))
    found, plain = results["calibration"], json.loads((tmp_path / "plain" / "results.json").read_text())
    temperature = fit_temperature(as_logits(np.concatenate(list(scored.scores.values()))), step_targets(scored), exclusive=False)
    assert found["temperature"] == temperature
    assert abs(np.log(temperature)) > 0.3
    assert found["before"] == plain["calibration"]
    assert found["log_loss"] < found["before"]["log_loss"]
    after = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    for name, values in scored.scores.items():
        np.testing.assert_allclose(after.scores[name], expit(as_logits(values) / temperature), atol=1e-5)
    assert results["metrics"]["segment_f1"] == plain["metrics"]["segment_f1"]
    assert [events_of(model, scenes, i) for i in range(5)] == before
    config = json.loads((model / "config.json").read_text())
    assert config["event_detection"]["threshold"]["cat"] == pytest.approx(expit(np.log(0.6 / 0.4) / temperature))
    assert config["calibration"] == {"temperature": temperature}


def test_tuning_follows_the_calibration(tmp_path, capsys):
    model, scenes = detector_problem(tmp_path)
    arguments = ["evaluate", "--task", "events", "--model", str(model), "--data_dir", str(scenes), "--label_column", "events"]
    arguments += ["--test_split", "train", "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--calibrate", "--tune"]
    assert main(arguments) == 0
    assert "| calibration | before | after |" in capsys.readouterr().out
    scored = ScoredEvents.load(tmp_path / "out" / "scores.npz")
    config = json.loads((model / "config.json").read_text())
    assert EventSettings(**config["event_detection"]) == tune_events(*scored)
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    np.testing.assert_allclose(
        network.score_steps(waveform(scenes, 1), extractor).scores, list(scored.scores.values())[1], atol=1e-5
    )  # the thresholds are of these scores


def test_what_cannot_be_calibrated_is_rejected_before_anything_is_decoded(tmp_path, monkeypatch):
    model, clips = (
        write_model(tmp_path / "model", "single_label_classification"),
        write_clips(tmp_path / "clips", ["cat;dog", "dog", "owl"]),
    )
    detector, scenes = write_detector(tmp_path / "detector"), write_scenes(tmp_path / "scenes")
    monkeypatch.setattr("transformers_sslam.evaluation.settings.Waveforms", None)
    monkeypatch.setattr("transformers_sslam.evaluation.scored_events.Waveforms", None)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "config.json").write_text("{}")
    for changes, message in (
        ({"label_separator": ";"}, "clips have several labels, and the model's classes exclude each other"),
        ({"model": "someone/classifier"}, "someone/classifier is not a folder whose config.json could be changed"),
        ({"model": str(tmp_path / "sharded")}, "sharded is not a folder whose model.safetensors could be changed"),
        ({"model": str(detector)}, "has no classifier.weight"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_classifier(evaluation(model, clips, tmp_path / "out", calibrate=True, **changes))
    with pytest.raises(UserError, match="has no frame_classifier.weight"):
        evaluate_detector(event_evaluation(model, scenes, tmp_path / "out", calibrate=True))
