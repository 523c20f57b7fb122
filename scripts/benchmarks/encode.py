"""Clips a second through the encoder, against Transformers' AST (arXiv 2104.01778) on clips of the same length in the same precision."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from step import SIZES, Precision
from timing import interleave, ratio, spread
from transformers import ASTConfig, ASTModel

from transformers_sslam.allocator import keep_freed_memory
from transformers_sslam.modeling_sslam import SSLAMModel


@torch.inference_mode()
def measure_encoder(
    size: str = "base",
    batch_sizes: Sequence[int] = (1, 4, 16),
    *,
    frames: int = 1024,
    precision: Precision = "float32",
    compile: bool = False,
    device: str = "cpu",
    repeats: int = 5,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Both encoders, of the same width and depth, in turns: log-mels in, hidden states out.

    AST's patches overlap (a stride of 10), so it has 2.4 times as many tokens for the same 10 s; that is part of the comparison.

    Args:
        size: "tiny", "base" or "large".
        batch_sizes: one row each.
        frames: of a clip, 10 ms each.
        precision: of weights and inputs.
        compile: whether both are compiled.
    """
    keep_freed_memory()
    where, dtype = torch.device(device), getattr(torch, precision)
    config = SIZES[size]()
    ours = SSLAMModel(config)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_mel_bins")
    ast = ASTModel(ASTConfig(**{name: getattr(config, name) for name in names}, max_length=frames))
    encoders = {"SSLAM": ours, "AST": ast}
    for model in encoders.values():
        model.to(where, dtype).eval()  # type: ignore[arg-type]  # as Transformers wraps it
        if compile:
            model.compile()
    rows = []
    for batch_size in batch_sizes:
        inputs = torch.randn(batch_size, frames, config.num_mel_bins, device=where, dtype=dtype)
        runs = {name: partial(model, inputs) for name, model in encoders.items()}
        seconds = interleave(runs, repeats, warmup, where)
        rates = {name: spread(values).inverse(batch_size) for name, values in seconds.items()}
        rows.append({"batch_size": batch_size, "clips_per_second": rates, "speedup": ratio(seconds["AST"], seconds["SSLAM"])})
    return rows
