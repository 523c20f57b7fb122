"""A long recording tagged: how many times faster than it plays, and the memory that takes, which its length must not change."""

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from step import SIZES, Precision

from transformers_sslam.allocator import keep_freed_memory
from transformers_sslam.feature_extraction_sslam import SSLAMFeatureExtractor
from transformers_sslam.modeling_sslam import SSLAMForAudioClassification
from transformers_sslam.pretraining.monitoring import peak_memory


RATE = 16_000


def blocks(minutes: float, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """Noise, a block at a time, as a decoder gives a file."""
    generator = np.random.default_rng(0)
    left = round(minutes * 60 * RATE)
    while left > 0:
        block = generator.standard_normal(min(left, round(block_seconds * RATE)), dtype=np.float32)
        left -= len(block)
        yield 0.1 * block


def tag(size: str, minutes: float, hop: float, batch_size: int, precision: Precision, device: str, threads: int) -> dict[str, float]:
    """Seconds and the peak of memory, in bytes, of one recording, in a process that has held nothing else."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    where = torch.device(device)
    model = SSLAMForAudioClassification(SIZES[size](num_labels=527, problem_type="multi_label_classification"))
    model.to(where, getattr(torch, precision))  # type: ignore[arg-type]  # as Transformers wraps it
    extractor = SSLAMFeatureExtractor()
    start, windows = time.perf_counter(), 0
    for scored in model.score_windows(blocks(minutes), extractor, hop=hop, batch_size=batch_size):
        windows += len(scored.starts)
    return {"windows": windows, "seconds": time.perf_counter() - start, "memory": peak_memory(where)}


def measure_recording(
    size: str = "base",
    minutes: float = 60.0,
    *,
    hop: float = 10.24,
    batch_size: int = 8,
    precision: Precision = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """A recording and a quarter of it, each in a process of its own.

    Args:
        size: of the classifier, with AudioSet's 527 tags: "tiny", "base" or "large".
        minutes: of the recording.
        hop: seconds from window to window; by default they lie side by side.
        batch_size: windows at a time.
    """
    options = (hop, batch_size, precision, device, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        quarter, whole = (pool.apply(tag, (size, length, *options)) for length in (minutes / 4, minutes))
    return {
        "minutes": minutes,
        "windows": whole["windows"],
        "seconds": round(whole["seconds"], 1),
        "times as fast as it plays": round(minutes * 60 / whole["seconds"], 1),
        "peak memory, GiB": round(whole["memory"] / 2**30, 3),
        "of a quarter of it, GiB": round(quarter["memory"] / 2**30, 3),
    }
