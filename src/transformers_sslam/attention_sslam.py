"""Attention written out, where it is faster than the fused one, the check of attention masks, and heads outside autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Unpack

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import TransformersKwargs


# Measured with 52, 103, 129 and 513 tokens on a processor with bfloat16 matrix instructions.
MAX_TOKENS_WRITTEN_OUT = 256


def as_boolean(attention_mask: torch.Tensor) -> torch.Tensor:
    """The mask with `True` where there is sound.

    Raises:
        ValueError: if it is not a tensor, or holds NaN, complex numbers, or negative ones: in a mask that is added to attention scores 0
            means the opposite. (Whole numbers, as the feature extractor gives, are not looked at: a processor would wait for its device.)
    """
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is of type {type(attention_mask).__name__}, but a tensor is expected, as of input_values")
    if attention_mask.is_complex() or _has_negative(attention_mask):
        raise ValueError(
            "attention_mask holds negative values, NaN or complex numbers, but 1 (sound) and 0 (padding) are expected: give the mask that "
            "the feature extractor returns"
        )
    return attention_mask.to(torch.bool)


def _has_negative(mask: torch.Tensor) -> bool:
    if not mask.is_floating_point() or torch.compiler.is_compiling():
        return False
    try:
        return not (mask >= 0).all()  # NaN too
    except RuntimeError:  # fake tensors have no values to look at
        return False


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, tokens, head size) -> (batch, tokens, heads, head size), and the weights, (batch, heads, tokens, tokens)."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def cpu_half_precision_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """SDPA, except where gradients are needed for few tokens without a mask: there attention is written out.

    In half precision on a CPU the backward pass of SDPA takes three to five times as long for as few tokens as a pre-training student
    receives; for 513 tokens it is faster. Elsewhere `attn_implementation="sdpa"`, the default, is faster for any number.
    """
    if attention_mask is None and query.requires_grad and query.shape[2] <= MAX_TOKENS_WRITTEN_OUT:
        return eager_attention_forward(module, query, key, value, None, scaling, dropout)[0], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def without_autocast(head: Callable) -> Callable:
    """Run a head's method in the weights' own dtype, under autocast too: bfloat16 keeps 8 significant bits, and ties distort rankings."""

    @wraps(head)
    def run(self: Any, features: torch.Tensor, *args: Any) -> Any:
        device_type = features.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return head(self, features.to(self.layernorm.weight.dtype), *args)
        return head(self, features, *args)

    return run


CPU_HALF_PRECISION_ATTENTION = "sslam_cpu_half_precision"  # the `attn_implementation`
AttentionInterface.register(CPU_HALF_PRECISION_ATTENTION, cpu_half_precision_attention_forward)
AttentionMaskInterface.register(CPU_HALF_PRECISION_ATTENTION, sdpa_mask)
