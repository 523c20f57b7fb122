"""How the tokens of a clip become one vector, and the vectors of all blocks one, because the last block is not always the most useful."""

import torch
from torch import nn


def pool_tokens(tokens: torch.Tensor, token_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """The CLS token (`"cls"`) or the mean of the patch tokens that are not masked: (batch, 1 + patches, width) -> (batch, width)."""
    if pooling == "cls":
        return tokens[:, 0]
    patches = tokens[:, 1:]
    if token_mask is None:
        return patches.mean(1)
    weights = token_mask[:, 1:, None].to(patches.dtype)
    return (patches * weights).sum(1) / weights.sum(1).clamp_min(1)


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


__all__ = ["SSLAMLayerPooling", "pool_tokens"]
