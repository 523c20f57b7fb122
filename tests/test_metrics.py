"""Metrics: equal to scikit-learn's, honest about what is not defined, and there without a network."""

import socket

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score

from transformers_sslam.evaluation.metrics import Accuracy, MeanAveragePrecision, average_precision


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise OSError("a metric wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def random_tags(decimals: int, clips: int = 200, classes: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((clips, classes)).round(decimals)
    return scores, (generator.random((clips, classes)) < generator.uniform(0.05, 0.6, classes)).astype(np.int64)


@pytest.mark.parametrize("decimals", [12, 1, 0])  # 0: a handful of distinct scores, so nearly all are ties
def test_average_precision_equals_scikit_learns(decimals):
    scores, targets = random_tags(decimals)
    expected = [average_precision_score(targets[:, i], scores[:, i]) for i in range(targets.shape[1])]
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=0, atol=1e-12)
    result = MeanAveragePrecision().compute(predictions=scores, references=targets)
    assert result["mean_average_precision"] == pytest.approx(average_precision_score(targets, scores, average="macro"), abs=1e-12)
    assert result["classes_without_positives"] == []


def test_average_precision_of_a_ranking_worked_out_by_hand():
    # Right ones at ranks 1, 3 and 4: (1/1 + 2/3 + 3/4) / 3. In the second class all tie: every clip comes in at 2/4.
    scores = np.array([[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0]])
    targets = np.array([[1, 1], [0, 0], [1, 1], [1, 0]])
    np.testing.assert_allclose(average_precision(scores, targets), [29 / 36, 0.5], atol=1e-15)


def test_classes_without_positives_are_named_and_left_out_of_the_mean():
    scores, targets = random_tags(12, classes=3)
    targets[:, 1] = 0
    result = MeanAveragePrecision().compute(predictions=scores, references=targets, class_names=["dog", "cat", "rain"])
    assert result["classes_without_positives"] == ["cat"]
    assert set(result["average_precision"]) == {"dog", "rain"}
    expected = np.mean([average_precision_score(targets[:, i], scores[:, i]) for i in (0, 2)])
    assert result["mean_average_precision"] == pytest.approx(expected, abs=1e-12)


def test_accuracy_equals_scikit_learns_also_in_batches():
    predictions, references = np.random.default_rng(0).integers(0, 5, (2, 101))
    metric = Accuracy()
    for part in (slice(0, 40), slice(40, None)):
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute()["accuracy"] == pytest.approx(accuracy_score(references, predictions), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ([[0.1, np.nan]], [[0, 1]], "the score of clip 0 for class 1 is NaN"),
        ([[0.1, 0.2]], [[0, 2]], "targets hold 2, but must be 0 or 1"),
        ([[0.1, 0.2]], [[0, 0]], "no class has a positive clip"),
        ([[0.1, 0.2]], [[1]], r"scores have shape \(1, 2\) and targets \(1, 1\)"),
        ([], [], "no prediction to evaluate"),
    ],
)
def test_undefined_average_precision_is_an_error(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        MeanAveragePrecision().compute(predictions=scores, references=targets)


def test_accuracy_of_nothing_and_names_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="no prediction to evaluate"):
        Accuracy().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="there are 1 class names, but 2 classes"):
        MeanAveragePrecision().compute(predictions=[[0.1, 0.2]], references=[[0, 1]], class_names=["dog"])
