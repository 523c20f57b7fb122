"""Results of each class, and the confusion matrix of exclusive classes as numbers and as a picture.

```python
matrix = confusion_matrix(logits.argmax(1), labels, len(classes))  # (classes, classes): rows are true, columns predicted
print(class_table(results_from_matrix(matrix, classes)))
plot_confusion_matrix(matrix, classes).savefig("confusion_matrix.png")
```
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reports import markdown_table, new_figure, one_line, replace_picture
from .intervals import proportion_interval


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PICTURE = "confusion_matrix.png"
MOST_CLASSES_IN_PICTURE = 120  # of more, names would be too small to read
MOST_CLASSES_WITH_COUNTS = 60  # of more, counts would not fit into the cells
LONGEST_NAME = 24  # characters at an axis
TABLE_METRICS = {
    **{"recall": "recall", "precision": "precision", "average_precision": "average precision"},
    **{"segment_f1": "segment F1", "collar_f1": "collar F1", "psds1": "PSDS1", "psds2": "PSDS2"},
}
Results = dict[str, dict[str, Any]]


def results_by_class(
    scores: np.ndarray,
    targets: np.ndarray,
    classes: Sequence[str],
    metrics: dict[str, Any],
    multi_label: bool,
    folder: Path | None = None,
) -> dict[str, Any]:
    """What `results.json` says of each class: `per_class` and, of exclusive classes, `confusion_matrix`.

    Args:
        scores: `(clips, classes)`.
        targets: `(clips, classes)`, 0 or 1, or, with `multi_label`, -100 where unknown.
        classes: their names.
        metrics: of the same clips; those of several labels hold average precision by class.
        multi_label: whether a clip may have several classes.
        folder: for `confusion_matrix.png`; that of an earlier evaluation is deleted. `None`: no picture.
    """
    matrix = None if multi_label else confusion_matrix(scores.argmax(-1), targets.argmax(-1), len(classes))
    if folder is not None:
        replace_matrix(folder, matrix, classes)
    if matrix is None:
        return {"per_class": results_from_metrics(metrics, targets, classes)}
    return {"per_class": results_from_matrix(matrix, classes), "confusion_matrix": matrix.tolist()}


def replace_matrix(folder: Path, matrix: np.ndarray | None, classes: Sequence[str]) -> None:
    """Put `confusion_matrix.png` in place of that of an earlier evaluation, if there is a matrix, of no more than 120 classes."""
    if too_many := matrix is not None and len(classes) > MOST_CLASSES_IN_PICTURE:
        logger.info(f"{len(classes)} classes are too many for a picture of the confusion matrix: it is in results.json")
    draw = None if matrix is None or too_many else partial(plot_confusion_matrix, matrix, classes)
    replace_picture(folder / PICTURE, "picture of the confusion matrix", draw)


def confusion_matrix(predictions: np.ndarray, references: np.ndarray, num_classes: int) -> np.ndarray:
    """`(classes, classes)`: how many clips of each true class (row) were taken for each class (column).

    Args:
        predictions: `(clips,)`, class indices.
        references: `(clips,)`, class indices.
        num_classes: which bounds the indices.

    Raises:
        ValueError: if the two differ in shape, or an index is out of range.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1:
        raise ValueError(f"predictions have shape {predictions.shape} and references {references.shape}, but both must be (clips,)")
    for what, indices in (("prediction", predictions), ("reference", references)):
        if wrong := indices[(indices < 0) | (indices >= num_classes)].tolist():
            raise ValueError(f"a {what} is {wrong[0]}, but a class index from 0 to {num_classes - 1} is expected")
    return np.bincount(references * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def results_from_matrix(matrix: np.ndarray, classes: Sequence[str], confidence: float | None = 0.95) -> Results:
    """By class `clips`, `recall` and `precision`, with Wilson's intervals over clips (`confidence`; `None` for none).

    The recall of a class without clips, and the precision of one that was never predicted, are undefined: `None`.
    """
    results: Results = {}
    for i, name in enumerate(classes):
        correct, clips, predicted = int(matrix[i, i]), int(matrix[i].sum()), int(matrix[:, i].sum())
        results[name] = {"clips": clips}
        for metric, count in (("recall", clips), ("precision", predicted)):
            results[name][metric] = correct / count if count else None
            if confidence is not None:
                results[name][f"{metric}_interval"] = list(proportion_interval(correct, count, confidence)) if count else None
    return results


def results_from_metrics(metrics: dict[str, Any], targets: np.ndarray, classes: Sequence[str]) -> Results:
    """By class `clips`, `average_precision` and its interval, `None` where it is undefined; see `mean_over_classes`.

    Args:
        metrics: with `average_precision` and `average_precision_interval`, by class.
        targets: `(clips, classes)`, 0, 1, or -100 where unknown.
        classes: their names.
    """
    names = ("average_precision", "average_precision_interval")
    clips = (np.asarray(targets) > 0).sum(0).tolist()
    return {name: {"clips": count, **{key: metrics[key].get(name) for key in names}} for name, count in zip(classes, clips)}


def pool_results(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`per_class`, and `confusion_matrix` of exclusive classes, over several runs, such as the folds of a cross-validation.

    Confusion matrices are added. There are no intervals, because a clip counts once for each seed. Of several labels, and of events,
    a class's metrics are their means over the runs that have some of it.

    Args:
        runs: what `results.json` holds of each. Empty if they lack results by class, or their classes differ.
    """
    if not all(run.get("per_class") for run in runs) or any(run["classes"] != runs[0]["classes"] for run in runs):
        return {}
    if len(runs) == 1:
        return {name: runs[0][name] for name in ("per_class", "confusion_matrix") if name in runs[0]}
    classes = runs[0]["classes"]
    if all("confusion_matrix" in run for run in runs):
        matrix = np.sum([run["confusion_matrix"] for run in runs], axis=0)
        return {"per_class": results_from_matrix(matrix, classes, confidence=None), "confusion_matrix": matrix.tolist()}
    first = next(iter(runs[0]["per_class"].values()))
    metrics, count = [name for name in TABLE_METRICS if name in first], _counted(first)
    per_class: Results = {}
    for name in classes:
        found = [run["per_class"][name] for run in runs]
        per_class[name] = {count: sum(result[count] for result in found)}
        for metric in metrics:
            values = [result[metric] for result in found if result[metric] is not None]
            per_class[name][metric] = sum(values) / len(values) if values else None
    return {"per_class": per_class}


def class_table(per_class: Results, most: int = 10) -> str:
    """A Markdown table of the classes, the worst first; of more than `most` classes, the worst, and how many there are.

    Classes without clips or events come last, because nothing is known about them.
    """
    first = next(iter(per_class.values()), {})
    metrics = [name for name in TABLE_METRICS if name in first]
    count = _counted(first)

    def rank(name: str) -> tuple[bool, float]:
        value = per_class[name][metrics[0]]
        return value is None, value or 0.0

    def cell(result: dict[str, Any], metric: str) -> str:
        if (value := result[metric]) is None:
            return "-"
        interval = result.get(f"{metric}_interval")
        return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")

    shown = sorted(per_class, key=rank)[:most]
    title = "class" if len(shown) == len(per_class) else f"the worst {most} of {len(per_class)} classes"
    rows = [[one_line(name), str(per_class[name][count]), *(cell(per_class[name], metric) for metric in metrics)] for name in shown]
    return markdown_table([title, count, *(TABLE_METRICS[metric] for metric in metrics)], rows)


def _counted(result: dict[str, Any]) -> str:
    """What a class's result has a number of."""
    return "events" if "events" in result else "clips"


def plot_confusion_matrix(matrix: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Draw the matrix: colours are fractions of a row (of a true class), numbers are clips.

    Raises:
        ImportError: as [`new_figure`].
    """
    count = len(classes)
    size = 3.4 + max(2.4, count * (0.42 if count <= 20 else 0.21 if count <= MOST_CLASSES_WITH_COUNTS else 0.15))  # inches
    figure = new_figure(figsize=(size + 0.8, size))
    axes = figure.subplots()
    clips = matrix.sum(1, keepdims=True)
    image = axes.imshow(matrix / np.maximum(clips, 1), cmap="Blues", vmin=0, vmax=1)  # one hue: readable without colour vision
    names = [_shortened(one_line(name)) for name in classes]
    fontsize = 10 if count <= 20 else 7 if count <= MOST_CLASSES_WITH_COUNTS else 5
    axes.set_xticks(range(count), names, rotation=90, fontsize=fontsize, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=fontsize, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{int(np.trace(matrix))} of {int(matrix.sum())} clips correct")
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if count <= MOST_CLASSES_WITH_COUNTS:
        _write_counts(axes, matrix, clips[:, 0], fontsize)
    figure.colorbar(image, ax=axes, label="fraction of the true class's clips", shrink=0.7, pad=0.02, fraction=0.04)
    return figure


def _write_counts(axes: "Axes", matrix: np.ndarray, clips: np.ndarray, fontsize: float) -> None:
    """The number of clips in each cell that has any, small enough for the longest number to fit."""
    digits = len(str(int(matrix.max())))
    size = min(fontsize, 3 * fontsize / digits)
    for row, column in np.argwhere(matrix):
        value = matrix[row, column]
        colour = "white" if value > 0.5 * clips[row] else "black"  # on the darker half of the scale
        axes.text(column, row, str(value), ha="center", va="center", fontsize=size, color=colour)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}…{name[-8:]}"  # classes often differ at the end
