"""How the tokens of a clip become one vector, and the vectors of all blocks one, because the last block is not always the most useful."""

import torch
from torch import nn

from .configuration_sslam import ClipPooling, SSLAMConfig


# By name: the parts whose vectors are concatenated. A standard deviation stands with its mean, from which parts of a clip are merged.
POOLINGS: dict[ClipPooling, tuple[str, ...]] = {
    "cls": ("cls",),
    "mean": ("mean",),
    "mean_and_std": ("mean", "std"),
    "max_by_frequency": ("max_by_frequency",),
    "mean_and_max_by_frequency": ("mean_by_frequency", "max_by_frequency"),
}


def pool_tokens(tokens: torch.Tensor, token_mask: torch.Tensor | None, pooling: ClipPooling, num_frequency_patches: int) -> torch.Tensor:
    """(batch, 1 + patches, width) -> (batch, pooled width): the parts of the pooling, concatenated.

    Args:
        tokens: CLS first, then the patches, patch `num_frequency_patches * time + frequency`.
        token_mask: `(batch, 1 + patches)`, boolean; `False` for what shall not count. What lies there has no influence.
        pooling: of `POOLINGS`.
        num_frequency_patches: patches at one time.
    """
    parts = [pool_part(tokens, token_mask, part, num_frequency_patches) for part in POOLINGS[pooling]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def pool_part(tokens: torch.Tensor, token_mask: torch.Tensor | None, part: str, num_frequency_patches: int) -> torch.Tensor:
    """One part of `POOLINGS`, computed in float32 at least and returned in the tokens' dtype. Where nothing counts it is 0."""
    if part == "cls":
        return tokens[:, 0]
    patches, mask = tokens[:, 1:], None if token_mask is None else token_mask[:, 1:, None]
    if part.endswith("by_frequency"):
        grid = (-1, num_frequency_patches)
        patches, mask = patches.unflatten(1, grid), None if mask is None else mask.unflatten(1, grid)
    pool = {"mean": masked_mean, "std": masked_std, "max": masked_max}[part.removesuffix("_by_frequency")]
    return pool(patches.to(torch.promote_types(patches.dtype, torch.float32)), mask).flatten(1).to(tokens.dtype)


def part_width(part: str, config: SSLAMConfig) -> int:
    """Of a part of `POOLINGS`."""
    return config.hidden_size * (config.num_frequency_patches if part.endswith("by_frequency") else 1)


def pooled_width(pooling: ClipPooling, config: SSLAMConfig) -> int:
    """Of what [`pool_tokens`] returns."""
    return sum(part_width(part, config) for part in POOLINGS[pooling])


def sounding_tokens(attention_mask: torch.Tensor, patch_size: int, num_frequency_patches: int) -> torch.Tensor:
    """A boolean mask over frames, `(batch, frames)`, as one over tokens, `(batch, 1 + patches)`: CLS, and patches that hold any sound."""
    sounding = attention_mask.unflatten(1, (-1, patch_size)).any(-1).repeat_interleave(num_frequency_patches, dim=1)
    return nn.functional.pad(sounding, (1, 0), value=True)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over positions: (batch, positions, ..., width) -> (batch, ..., width).

    Args:
        values: of which those that are masked may be NaN.
        mask: boolean, of their shape but for a width of 1, `False` for what does not count; or `None`.
    """
    if mask is None:
        return values.mean(1)
    return values.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)


def masked_std(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Standard deviation over positions, divided by their number, as [`masked_mean`]. Its gradient is 0, not NaN, where it is 0."""
    deviations = values - masked_mean(values, mask).unsqueeze(1)
    if mask is None:
        return torch.linalg.vector_norm(deviations, dim=1) / values.shape[1] ** 0.5
    return torch.linalg.vector_norm(deviations.masked_fill(~mask, 0), dim=1) / mask.sum(1).clamp_min(1).to(values.dtype) ** 0.5


def masked_max(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Maximum over positions, as [`masked_mean`]."""
    if mask is None:
        return values.amax(1)
    return values.masked_fill(~mask, -torch.inf).amax(1).masked_fill(~mask.any(1), 0)


def merge_pooled(first: torch.Tensor, second: torch.Tensor, fraction: float, pooling: ClipPooling, config: SSLAMConfig) -> torch.Tensor:
    """What [`pool_tokens`] would give of two parts of a clip together, from what it gave of each, `(..., pooled width)`.

    The CLS token, of which each part has its own, is averaged.

    Args:
        fraction: of the second part in both.
    """
    names = POOLINGS[pooling]
    widths = [part_width(name, config) for name in names]
    one, other = (dict(zip(names, vectors.split(widths, dim=-1))) for vectors in (first, second))
    merged = []
    for name in names:
        if name == "max_by_frequency":
            merged.append(torch.maximum(one[name], other[name]))
        elif name == "std":
            within = torch.lerp(one[name] ** 2, other[name] ** 2, fraction)
            merged.append((within + fraction * (1 - fraction) * (other["mean"] - one["mean"]) ** 2).sqrt())
        else:
            merged.append(torch.lerp(one[name], other[name], fraction))
    return torch.cat(merged, dim=-1)


class SSLAMLayerPooling(nn.Module):
    """Sum over blocks, weighted by a learned softmax: (batch, blocks, width) -> (batch, width).

    Without gates the weights are the same for all clips (SUPERB, arXiv 2105.01051). With gates each block has a learned vector, and its
    product with the block's own output is added to the block's score: each clip has weights of its own. At first all blocks weigh the same.
    """

    def __init__(self, num_layers: int, width: int, gated: bool):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_layers))
        self.gates = nn.Parameter(torch.zeros(num_layers, width)) if gated else None

    def weights(self, pooled: torch.Tensor) -> torch.Tensor:
        """(batch, blocks, width) -> (batch, blocks), of which each row sums to 1."""
        scores = self.scores.expand(pooled.shape[:2])
        if self.gates is not None:
            # Scaled as in attention: Adam moves all channels of a gate alike, and a few steps would leave each clip a single block.
            scores = scores + (pooled * self.gates).sum(-1) * self.gates.shape[1] ** -0.5
        return scores.softmax(-1)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return (self.weights(pooled).unsqueeze(-1) * pooled).sum(1)
