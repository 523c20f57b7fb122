"""What a run says of itself: speed against the hardware, and whether its targets still mean anything."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configuration_sslam import SSLAMConfig
from ..masking import num_visible_patches


class CollapseError(RuntimeError):
    """The teacher's targets or the student's predictions have collapsed: training on would waste the machine."""


@dataclass
class CollapseGuard:
    """Floors for what shows a collapse, looked at after `after_updates` updates.

    The deviations fall when targets or predictions become constant. A collapse to codes of the patches' positions leaves them high; that
    one shows in the content share. See `SSLAMForPreTrainingOutput`.
    """

    min_target_std: float
    min_prediction_std: float
    min_content_share: float
    after_updates: int

    def check(self, update: int, target_std: float, prediction_std: float, content_share: float) -> None:
        """Raise a `CollapseError` if a value lies under its floor. A share that is not a number (batches of one clip) is no evidence."""
        if update < self.after_updates:
            return
        for name, value, floor in (
            ("target_std", target_std, self.min_target_std),
            ("prediction_std", prediction_std, self.min_prediction_std),
            ("content_share", content_share, self.min_content_share),
        ):
            if value < floor:
                raise CollapseError(
                    f"at update {update} {name} is {value:.4g}, under its floor of {floor:g}: the representation has collapsed. Go back to "
                    "an earlier checkpoint with a lower learning rate, a slower warm-up or another EMA decay; small models stayed healthy "
                    "with a stronger patch embedding at the start (patch_embedding_gain, position_embedding_scale)"
                )


def training_flops_per_clip(config: SSLAMConfig, frames: int) -> float:
    """Floating-point operations of one update for one clip: matrix products and convolutions, backward counted twice the forward.

    ViT-B on 1024 frames: 1.23e12 in stage 2, 1.08e12 in stage 1.
    """
    width, depth, hidden = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    patches = frames // config.patch_size * config.num_frequency_patches
    visible = num_visible_patches(patches, config.mask_ratio)
    halves = config.use_mixtures + config.use_unmixed

    def encoder(tokens: int) -> float:
        return depth * (2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width)

    def patch_embedding(clips: int) -> float:
        return clips * patches * 2 * config.patch_size**2 * width

    inner, kernel = config.decoder_hidden_size, config.decoder_kernel_size**2 / config.decoder_num_groups
    layers = [width] + [inner] * (config.decoder_num_hidden_layers - 1)
    decoder = sum(2 * patches * channels * inner * kernel for channels in layers) + 2 * (patches - visible) * inner * width
    student = halves * config.num_views * (encoder(1 + visible) + decoder) + patch_embedding(halves)
    teacher = halves * encoder(1 + patches) + patch_embedding(halves)
    if config.use_mixtures and config.source_retention_loss_weight:
        foreign = patches - config.num_unmixed_spans * config.unmixed_span_length // config.patch_size * config.num_frequency_patches
        teacher += encoder(1 + foreign)
    return 3 * student + teacher


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of square matrix products that this device shows now, in FLOP/s: the yardstick of utilisation."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)

    def run() -> float:
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        return 2 * size**3 / (time.perf_counter() - start)

    run()
    end, best = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < end:
        best = max(best, run())
    return best


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where the other figure begins with that of the process that started this one
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds since the last lap, and how many of them were spent waiting."""

    def __init__(self):
        self.started, self.waited = time.perf_counter(), 0.0

    def lap(self) -> tuple[float, float]:
        """Both numbers, and a new start."""
        elapsed, waited = time.perf_counter() - self.started, self.waited
        self.started, self.waited = time.perf_counter(), 0.0
        return elapsed, waited

    def wait_for(self, function):
        """Call `function`, count the time it takes as waiting, and return what it returns."""
        start = time.perf_counter()
        result = function()
        self.waited += time.perf_counter() - start
        return result
