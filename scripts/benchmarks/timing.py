"""Times that can be compared: runs of all candidates in turns, medians with their spread, and what the machine was."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Spread:
    """Median of several runs, with the smallest and the largest."""

    median: float
    smallest: float
    largest: float
    runs: int

    def scaled(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.smallest * factor, self.largest * factor, self.runs)

    def inverse(self, factor: float = 1.0) -> "Spread":
        """Of `factor / value`: rates from times."""
        return Spread(factor / self.median, factor / self.largest, factor / self.smallest, self.runs)

    def __str__(self) -> str:
        median, smallest, largest = (
            f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" for value in (self.median, self.smallest, self.largest)
        )
        return f"{median} ({smallest} - {largest})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Of runs that followed each other, pair by pair: what disturbed the machine for a while disturbed both."""
    return spread([time / other for time, other in zip(times, others)])


def interleave(candidates: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each candidate's runs, one run of each in turn.

    Args:
        candidates: what to run, by name.
        repeats: runs of each that are timed.
        warmup: runs of each before those.
        device: which is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warmup, repeats):
        for name, run in candidates.items():
            elapsed = timed(run, device)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, from a device that is idle to one that is idle again."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class MatrixProducts(TorchDispatchMode):
    """Times the matrix products, convolutions and attentions of all that runs inside, each where it is called, once: what is tried again
    would take memory that the update does not, and leave its own scattered.

    Their sum is the floor of a step on this device: what it would take if everything between them were free.
    """

    # PyTorch counts operations of all of these but of attention on a CPU.
    COUNTED = {str(operator) for operator in flop_registry} | {
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func.overloadpacket) not in self.COUNTED:
            return func(*args, **kwargs)
        outputs: list[Any] = []
        self.seconds += timed(lambda: outputs.append(func(*args, **kwargs)), self.device)
        return outputs[0]


def machine(device: torch.device) -> dict[str, Any]:
    """What figures were measured on: processor, cores, accelerator, versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
