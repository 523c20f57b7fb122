"""Learning rates by layer, and the loss for soft targets."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from ..losses_sslam import known_binary_cross_entropy


def layer_index(name: str, num_layers: int) -> int:
    """The layer of a classifier's parameter: 0 in the embeddings, 1 to `num_layers` in the blocks, one more in the head."""
    if block := re.search(r"\.layers\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if ".embeddings." in name else num_layers + 1


def layer_decay_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float, encoder_learning_rate: float | None = None
) -> list[dict]:
    """Parameter groups for an optimiser: the learning rate decreases from the head to the embeddings, and tensors with one axis (biases,
    norms) have no weight decay (BEiT, arXiv 2106.08254; fine-tuning recipes of SSLAM).

    The rate of layer `i` of `n` is `learning_rate * layer_decay ** (n + 1 - i)`: the head's is `learning_rate`, that of patch embedding,
    CLS and first norm `layer_decay ** (n + 1)` of it. Adapters (LoRA) have the rate of their block.

    Args:
        model: only parameters that require a gradient are taken.
        learning_rate: of the head.
        weight_decay: of tensors with more than one axis.
        layer_decay: ratio of the rate of a layer to that of the layer above it.
        encoder_learning_rate: in place of `learning_rate`, in the formula for layers below the head.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and, for information, `layer`.
    """
    num_layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_index(name, num_layers), parameter.ndim > 1
        peak = learning_rate if layer > num_layers or encoder_learning_rate is None else encoder_learning_rate
        rate = peak * layer_decay ** (num_layers + 1 - layer)
        empty = {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "layer": layer}
        groups.setdefault((layer, decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def classification_loss(logits: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean over clips of the loss against targets that may be mixtures.

    Args:
        logits: `(batch, classes)`, or `(batch, steps, classes)`.
        targets: of the same shape, in [0, 1], or -100 where unknown.
        kind: `"cross_entropy"`, of targets that are all known; or `"binary_cross_entropy"`, see [`known_binary_cross_entropy`].
    """
    if kind == "cross_entropy":
        return nn.functional.cross_entropy(logits.float(), targets)
    return known_binary_cross_entropy(logits, targets)
