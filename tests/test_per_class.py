"""Results of each class and the confusion matrix, against scikit-learn; what the picture shows."""

import json
import sys

import numpy as np
import pytest
import sklearn.metrics
from matplotlib.axes import Axes
from matplotlib.image import imread

from transformers_sslam.evaluation import per_class
from transformers_sslam.evaluation.metrics import mean_over_classes
from transformers_sslam.evaluation.per_class import (
    class_table,
    confusion_matrix,
    plot_confusion_matrix,
    pool_results,
    results_by_class,
    results_from_matrix,
    results_from_metrics,
)


CLASSES = ["cat", "dog", "rain", "wind"]


@pytest.fixture
def clips() -> tuple[np.ndarray, np.ndarray]:
    """200 references and predictions of four classes; the last is never predicted."""
    generator = np.random.default_rng(0)
    references = generator.integers(4, size=200)
    return np.where(generator.random(200) < 0.6, references, generator.integers(4, size=200)) % 3, references


def test_confusion_matrix_recall_and_precision_are_those_of_scikit_learn(clips):
    predictions, references = clips
    matrix = confusion_matrix(predictions, references, 4)
    assert matrix.tolist() == sklearn.metrics.confusion_matrix(references, predictions).tolist()
    results = results_from_matrix(matrix, CLASSES)
    expected = sklearn.metrics.precision_recall_fscore_support(references, predictions, zero_division=np.nan)
    precision, recall, _, support = (values.tolist() for values in expected)
    assert [result["clips"] for result in results.values()] == support
    assert [result["recall"] for result in results.values()] == pytest.approx(recall, abs=1e-12)
    assert [result["precision"] for result in results.values()][:3] == pytest.approx(precision[:3], abs=1e-12)
    assert results["wind"]["precision"] is results["wind"]["precision_interval"] is None
    assert results["wind"]["recall"] == 0


def test_a_class_without_an_error_is_not_certain():
    matrix = np.diag([20, 0, 3])
    matrix[2, 0] = 1
    results = results_from_matrix(matrix, ["a", "b", "c"])
    assert results["a"]["recall_interval"] == pytest.approx([0.8389, 1.0], abs=1e-4)  # Wilson's of 20 of 20
    assert results["a"]["precision_interval"] == pytest.approx([0.7733, 0.9915], abs=1e-4)  # of 20 of 21
    assert results["b"] == {"clips": 0, "recall": None, "recall_interval": None, "precision": None, "precision_interval": None}
    assert results_from_matrix(matrix, ["a", "b", "c"], None)["c"] == {"clips": 4, "recall": 0.75, "precision": 1.0}


@pytest.mark.parametrize(("predictions", "references"), [([0, 1], [0]), ([[0]], [[0]]), ([0, 4], [0, 0]), ([0, 0], [-1, 0])])
def test_indices_that_fit_no_class_are_an_error(predictions, references):
    with pytest.raises(ValueError, match="but"):
        confusion_matrix(np.array(predictions), np.array(references), 4)


def test_clips_with_several_labels_have_average_precision_by_class():
    scores = np.array([[3.0, 1, 0], [2, 2, 0], [1, 3, 0]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    metrics = mean_over_classes("average_precision", scores, targets, ["a", "b", "c"])
    results = results_from_metrics(metrics, targets, ["a", "b", "c"])
    assert [result["clips"] for result in results.values()] == [2, 2, 0]
    assert results["a"]["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert results["b"]["average_precision"] == 1.0
    assert results["b"]["average_precision_interval"] == pytest.approx([0.3424, 1.0], abs=1e-4)  # Wilson's of 2 of 2
    assert results["c"]["average_precision"] is None


def test_the_worst_classes_come_first_and_the_number_of_all_is_told():
    lines = class_table(results_from_matrix(np.array([[9, 1, 0], [5, 5, 0], [0, 0, 0]]), ["a", "b\nx", "c"])).splitlines()
    assert lines[0] == "| class | clips | recall | precision |"
    assert lines[2:] == [
        "| b x | 10 | 0.50 [0.24, 0.76] | 0.83 [0.44, 0.97] |",
        "| a | 10 | 0.90 [0.60, 0.98] | 0.64 [0.39, 0.84] |",
        "| c | 0 | - | - |",
    ]
    matrix = np.eye(30, dtype=int) * np.arange(10, 40)[:, None]
    matrix[7, 0] = 90
    lines = class_table(results_from_matrix(matrix, [f"class {i}" for i in range(30)], None)).splitlines()
    assert lines[0].startswith("| the worst 10 of 30 classes |")
    assert len(lines) == 12
    assert lines[2] == "| class 7 | 107 | 0.16 | 1.00 |"


def test_runs_are_pooled():
    matrices = [[[2, 1], [0, 3]], [[3, 0], [1, 2]]]
    runs = [
        {"classes": ["a", "b"], "per_class": results_from_matrix(np.array(matrix), ["a", "b"]), "confusion_matrix": matrix}
        for matrix in matrices
    ]
    assert pool_results(runs[:1]) == {"per_class": runs[0]["per_class"], "confusion_matrix": matrices[0]}
    pooled = pool_results(runs)
    assert pooled["confusion_matrix"] == [[5, 1], [1, 5]]
    assert pooled["per_class"]["a"] == {"clips": 6, "recall": 5 / 6, "precision": 5 / 6}
    tags = [
        {"classes": ["a"], "per_class": {"a": {"clips": clips, "average_precision": value}}}
        for clips, value in ((2, 0.5), (0, None), (4, 1.0))
    ]
    assert pool_results(tags) == {"per_class": {"a": {"clips": 6, "average_precision": 0.75}}}
    assert pool_results([runs[0], {**runs[1], "classes": ["a", "c"]}]) == {}
    assert pool_results([runs[0], {"classes": ["a", "b"]}]) == {}  # results of an earlier version


@pytest.mark.parametrize(("count", "has_counts"), [(2, True), (50, True), (100, False)])
def test_the_picture_has_counts_where_they_fit(count, has_counts, tmp_path, monkeypatch):
    written: list[tuple[int, int, str]] = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **style: written.append((y, x, s)) or text(self, x, y, s, **style))
    matrix = 3 * np.eye(count, dtype=int)
    matrix[0, 1] = 1
    plot_confusion_matrix(matrix, [f"class {i}" for i in range(count)]).savefig(tmp_path / "matrix.png", dpi=150, bbox_inches="tight")
    assert (len(written) == count + 1) == has_counts
    assert ((0, 1, "1") in written) == has_counts
    height, width = imread(tmp_path / "matrix.png").shape[:2]
    assert 500 < height < width < 3500


def test_any_name_of_a_class_can_be_drawn(tmp_path):
    names = [r"$\frac{", "a\nb", "<b>", "x" * 500]
    plot_confusion_matrix(np.eye(4, dtype=int), names).savefig(tmp_path / "matrix.png", dpi=150, bbox_inches="tight")
    assert max(imread(tmp_path / "matrix.png").shape) < 1500


def test_too_many_classes_are_not_drawn_and_no_earlier_picture_stays(tmp_path, monkeypatch):
    for classes, drawn in ((2, True), (121, False)):
        targets = np.eye(classes)
        results = results_by_class(targets, targets, [str(i) for i in range(classes)], {}, False, tmp_path)
        assert (tmp_path / per_class.PICTURE).exists() == drawn
        assert json.loads(json.dumps(results)) == results
    targets = np.eye(2)
    results_by_class(targets, targets, ["a", "b"], {}, False, tmp_path)
    metrics = {"average_precision": {}, "average_precision_interval": {}}
    assert set(results_by_class(targets, targets, ["a", "b"], metrics, True, tmp_path)) == {"per_class"}
    assert not (tmp_path / per_class.PICTURE).exists()


def test_without_matplotlib_results_are_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = results_by_class(np.eye(2), np.eye(2), ["a", "b"], {}, False, tmp_path)
    assert results["confusion_matrix"] == [[1, 0], [0, 1]]
    assert "plots need matplotlib" in caplog.text
    assert list(tmp_path.iterdir()) == []
