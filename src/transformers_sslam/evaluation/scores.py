"""Scores of labelled clips: the metrics of an evaluation, and the file that keeps them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from .metrics import accuracy, d_prime, mean_over_classes


logger = logging.getLogger(__name__)


def evaluate_predictions(
    scores: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool, confidence: float | None = 0.95
) -> dict[str, Any]:
    """Accuracy, or mean average precision where a clip may have several classes (`multi_label`).

    Args:
        scores: `(clips, classes)`, logits or others, of which the order within and across clips matters.
        targets: `(clips, classes)`, 0 or 1, or, with `multi_label`, -100 where unknown.
        confidence: of the intervals over clips; `None` for none.

    Raises:
        UserError: if the scores are not finite.
    """
    if not np.isfinite(scores).all():
        raise UserError("the model's outputs are NaN or infinite, so the training has diverged: lower learning_rate")
    if multi_label:
        return mean_over_classes("average_precision", scores, targets, classes, confidence=confidence)
    return accuracy(scores.argmax(-1), targets.argmax(-1), confidence)


def evaluate_tags(scores: np.ndarray, targets: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Mean average precision and, if a class has clips with and without it, mean ROC AUC and d-prime; see [`evaluate_predictions`]."""
    metrics = evaluate_predictions(scores, targets, classes, multi_label=True)
    if not ((targets == 1).any(0) & (targets == 0).any(0)).any():
        logger.warning("no class has clips with and without it, so ROC AUC and d-prime are undefined")
        return metrics
    found = mean_over_classes("roc_auc", scores, targets, classes)
    of_auc = ("mean_roc_auc", "mean_roc_auc_interval", "roc_auc", "roc_auc_interval", "classes_without_negatives")
    metrics |= {name: found[name] for name in of_auc}
    for suffix in ("", "_interval"):  # d-prime increases with the AUC, so its bounds are those of the AUC's bounds
        metrics[f"d_prime{suffix}"] = d_prime(np.array(found[f"mean_roc_auc{suffix}"])).tolist()
    return metrics


def save_scores(folder: Path, logits: np.ndarray, targets: np.ndarray, classes: list[str], names: list[str]) -> None:
    """Write `scores.npz`: `logits` and `targets` (-100: unknown), `(clips, classes)`, `classes`, and the clips' `names`, where known."""
    with write_atomically(folder / "scores.npz", "wb") as file:
        np.savez(file, logits=logits, targets=targets, classes=classes, names=names)
