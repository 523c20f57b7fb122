"""Accuracy and mean average precision as `evaluate` metrics that live here: instantiate the class, nothing is downloaded."""

from collections.abc import Sequence

import numpy as np


try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('metrics need evaluate and datasets: pip install "transformers-sslam[train]"') from error


class PackagedMetric(evaluate.Metric):
    """A metric that ships with this package. Predictions stay in memory unless several processes share them (`num_process`)."""

    inputs: datasets.Features
    description: str

    def __init__(self, config_name: str | None = None, num_process: int = 1, **kwargs):
        super().__init__(config_name, num_process=num_process, **{"keep_in_memory": num_process == 1, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.description, citation="", inputs_description=self.description, features=self.inputs)


class Accuracy(PackagedMetric):
    """Share of clips whose predicted class is the right one.

    `compute(predictions=, references=)`: both `(clips,)`, class indices. Returns `{"accuracy": float}`.

    Raises:
        ValueError: if there is no clip, or the two differ in length.
    """

    description = "Share of clips whose predicted class is the right one."
    inputs = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})

    def _compute(self, predictions, references) -> dict[str, float]:
        _check_not_empty(predictions)
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MeanAveragePrecision(PackagedMetric):
    """Average precision of each class, and their mean over the classes that have positives (macro mAP).

    `compute(predictions=, references=, class_names=None)`: predictions are `(clips, classes)` scores, of which only the order within a
    class matters; references `(clips, classes)` are 0 or 1. Returns `mean_average_precision`; `average_precision`, by class name (or index)
    for the classes that have positives; and `classes_without_positives`, for which it is not defined and which the mean leaves out.

    Raises:
        ValueError: if there is no clip, no positive at all, a score that is NaN, a reference other than 0 and 1, or shapes that differ.
    """

    description = "Average precision of each class, and their mean over the classes that have positives."
    inputs = datasets.Features(
        {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.List(datasets.Value("int64"))}
    )

    def _compute(self, predictions, references, class_names: Sequence[str] | None = None) -> dict:
        _check_not_empty(predictions)
        precision = average_precision(np.asarray(predictions), np.asarray(references))
        names = [str(i) for i in range(len(precision))] if class_names is None else list(class_names)
        if len(names) != len(precision):
            raise ValueError(f"there are {len(names)} class names, but {len(precision)} classes: give one name each")
        by_class = {name: float(value) for name, value in zip(names, precision) if not np.isnan(value)}
        if not by_class:
            raise ValueError("no class has a positive clip, so there is no average precision: check the references")
        return {
            "mean_average_precision": float(np.mean(list(by_class.values()))),
            "average_precision": by_class,
            "classes_without_positives": [name for name in names if name not in by_class],
        }


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under each class's precision-recall steps, without interpolation, as in scikit-learn: the mean, over a class's positive clips,
    of the precision among all clips that score at least as high.

    Args:
        scores: `(clips, classes)`.
        targets: `(clips, classes)`, 0 or 1.

    Returns:
        `(classes,)`, float64, NaN for a class without positives.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or a target is neither 0 nor 1.
    """
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores have shape {scores.shape} and targets {targets.shape}, but both must be (clips, classes)")
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"the score of clip {row} for class {column} is NaN: has the training diverged?")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError(f"targets hold {targets[~np.isin(targets, (0, 1))][0]}, but must be 0 or 1")
    clips = len(scores)
    order = np.argsort(-scores, axis=0, kind="stable")
    scores, targets = np.take_along_axis(scores, order, 0), np.take_along_axis(targets, order, 0)
    precision = targets.cumsum(0) / np.arange(1, clips + 1)[:, None]
    # Clips of equal score come in together: each has the precision at the last of its group.
    ends_group = np.vstack((scores[1:] != scores[:-1], np.ones((1, scores.shape[1]), bool)))
    last = np.where(ends_group, np.arange(clips)[:, None], clips)
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
    positives = targets.sum(0)
    with np.errstate(invalid="ignore"):
        return (targets * np.take_along_axis(precision, last, 0)).sum(0) / positives


def _check_not_empty(predictions) -> None:
    if len(predictions) == 0:
        raise ValueError("there is no prediction to evaluate: give at least one clip")


__all__ = ["Accuracy", "MeanAveragePrecision", "average_precision"]
