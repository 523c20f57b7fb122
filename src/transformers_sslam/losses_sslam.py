"""Losses of labels that may be soft, and of which some may be unknown."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from .configuration_sslam import SSLAMConfig


UNKNOWN = -100  # a label that has no part in the loss
ROUNDING = 1e-2  # labels that were mixed may be above 1 by the rounding of bfloat16


def known_binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, known: torch.Tensor | None = None, name: str = "labels"
) -> torch.Tensor:
    """The mean binary cross-entropy over the known labels, in float32; 0 if there are none.

    Args:
        logits: of any shape.
        labels: of the same shape, in [0, 1], or -100 where unknown.
        known: which of them have a part at all, of a shape that can be broadcast to theirs.
        name: of the labels, in errors.

    Raises:
        ValueError: if shapes differ, or a label is neither in [0, 1] nor unknown. (The second is looked for on the CPU alone: elsewhere
            the processor would have to wait for the device.)
    """
    if labels.shape != logits.shape:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, but {tuple(logits.shape)} is expected, one for each logit")
    known = labels != UNKNOWN if known is None else (labels != UNKNOWN) & known
    targets = torch.where(known, labels, 0).float()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(targets, name)
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return torch.where(known, losses, 0).sum() / known.sum().clamp_min(1)


def _check_range(targets: torch.Tensor, name: str) -> None:
    wrong = ~((targets >= -ROUNDING) & (targets <= 1 + ROUNDING))  # NaN too
    try:
        found = bool(wrong.any())
    except RuntimeError:  # under torch.func, and of fake tensors, there are no values to look at
        return
    if found:
        raise ValueError(
            f"{name} has {targets[wrong][0]:g}, but numbers from 0 (absent) to 1 (present) are expected, and -100 where it is not known"
        )


def labelled_loss(loss_function: Callable, labels: torch.Tensor, logits: torch.Tensor, config: SSLAMConfig, **kwargs: Any) -> torch.Tensor:
    """Of clips: Transformers' own loss, but for tags, `(batch, num_labels)`, that of the known ones; or what the user set in its place.

    `config.problem_type` decides; where it is `None`, the labels, and it is set by them.
    """
    labels = labels.to(logits.device)
    if loss_function is not ForSequenceClassificationLoss:
        return loss_function(labels, logits, config, **kwargs)
    if config.problem_type is None and logits.shape[1] > 1 and labels.shape == logits.shape:
        config.problem_type = "multi_label_classification"
    if config.problem_type == "multi_label_classification":
        return known_binary_cross_entropy(logits, labels)
    return loss_function(labels if labels.is_floating_point() else labels.long(), logits, config, **kwargs)
