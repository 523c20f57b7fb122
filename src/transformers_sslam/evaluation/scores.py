"""Scores of labelled clips: what they are worth, and the file that keeps them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from .metrics import Accuracy, MeanAveragePrecision, MeanRocAuc, d_prime


logger = logging.getLogger(__name__)


def evaluate_predictions(
    scores: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool, confidence: float | None = 0.95
) -> dict[str, Any]:
    """Accuracy, or mean average precision where a clip may have several classes.

    Args:
        scores: `(clips, classes)`, logits or what orders clips and classes as they do.
        targets: `(clips, classes)`, 0 or 1.
        classes: their names.
        multi_label: whether a clip may have several.
        confidence: of the bootstrap interval over clips; `None` for none.

    Raises:
        UserError: (a `ValueError`) if the scores are not finite.
    """
    if not np.isfinite(scores).all():
        raise UserError("the model's outputs are NaN or infinite, so the training has diverged: lower learning_rate")
    if multi_label:
        return MeanAveragePrecision().compute(
            predictions=scores, references=targets.astype(np.int64), class_names=classes, confidence=confidence
        )
    return Accuracy().compute(predictions=scores.argmax(-1), references=targets.argmax(-1), confidence=confidence)


def evaluate_tags(scores: np.ndarray, targets: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Mean average precision and, where a class has clips with and without it, mean ROC AUC and d-prime; see [`evaluate_predictions`]."""
    metrics = evaluate_predictions(scores, targets, classes, multi_label=True)
    if not (targets.any(0) & ~targets.all(0)).any():
        logger.warning("no class has clips with and without it, so there is no ROC AUC, and no d-prime")
        return metrics
    found = MeanRocAuc().compute(predictions=scores, references=targets.astype(np.int64), class_names=classes)
    of_auc = ("mean_roc_auc", "mean_roc_auc_interval", "roc_auc", "roc_auc_interval", "classes_without_negatives")
    metrics |= {name: found[name] for name in of_auc}
    for suffix in ("", "_interval"):  # an increasing function of the AUC, so of its bounds too: no second bootstrap
        metrics[f"d_prime{suffix}"] = d_prime(np.array(found[f"mean_roc_auc{suffix}"])).tolist()
    return metrics


def save_scores(folder: Path, logits: np.ndarray, targets: np.ndarray, classes: list[str], names: list[str]) -> None:
    """Write `scores.npz`: `logits` and `targets`, `(clips, classes)`, the `classes`, and the clips' `names`, where they are known."""
    with write_atomically(folder / "scores.npz", "wb") as file:
        np.savez(file, logits=logits, targets=targets, classes=classes, names=names)


__all__ = ["evaluate_predictions", "evaluate_tags", "save_scores"]
