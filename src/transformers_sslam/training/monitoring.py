"""The log of a run: losses and statistics, speed against the hardware, and whether training is still of use."""

import contextlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator

from ..configuration_sslam import SSLAMConfig
from ..files import write_text
from ..masking import num_visible_patches


logger = logging.getLogger(__name__)

LOSSES = ("loss", "local_loss", "global_loss", "source_retention_loss")
STATISTICS = (*LOSSES, "target_std", "prediction_std", "content_share")


class NonFiniteError(RuntimeError):
    """Gradients were not finite for too many updates in a row."""


class CollapseError(RuntimeError):
    """The teacher's targets or the student's predictions have collapsed: training on would waste the machine."""


@dataclass
class CollapseGuard:
    """Floors for what shows a collapse, looked at after `after_updates` updates.

    The standard deviations fall when targets or predictions become constant. A collapse to codes of the patches' positions leaves them
    high; that one shows in the content share. See `SSLAMForPreTrainingOutput`.
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


class TrainingLog:
    """Statistics of updates, in the log, in `metrics.jsonl` (a line an update) and in Accelerate's trackers.

    Until a line is written they stay on the device, where nothing has to wait for them. The main process writes; `frames` of a clip are
    10 ms each.
    """

    def __init__(self, accelerator: Accelerator, path: Path, config: SSLAMConfig, frames: int):
        self.accelerator, self.path = accelerator, path
        self.flops_per_clip, self.hours_per_clip = training_flops_per_clip(config, frames), frames / 360_000
        self.peak = math.nan  # FLOP/s of matrix products
        self.watch = Stopwatch()
        self.clips_logged = 0
        # Of each update (2, statistics): sums over this device's clips, and the weights of what was known; all 0 where it was skipped.
        self.pending: list[torch.Tensor] = []
        self.file: TextIO | None = None

    @contextlib.contextmanager
    def open(self, update: int, clips_seen: int) -> Iterator[None]:
        """Continue `metrics.jsonl` after an update. Lines of later ones, which a run wrote before it was interrupted, are dropped."""
        self.clips_logged = clips_seen
        if not self.accelerator.is_main_process:
            yield
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # the last line of a killed run may be torn
                if json.loads(line)["update"] <= update:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        with open(self.path, "a") as self.file:
            yield

    def write(
        self, update: int, total_updates: int, clips_seen: int, learning_rate: float, skipped_before: int
    ) -> tuple[dict[str, float], list[bool]]:
        """Write what is pending, up to `update`. All ranks call it: here alone the host reads what updates have computed.

        Returns:
            Means over the updates that were not skipped (NaN if there are none), and for each update whether it was skipped.
        """
        sums = self.accelerator.reduce(torch.stack(self.pending).double(), "sum").cpu()
        self.pending = []
        seconds, waited = self.watch.lap()
        skipped = (sums[:, 1] == 0).all(1).tolist()
        rows = (sums[:, 0] / sums[:, 1]).tolist()  # NaN where nothing is known
        means = dict(zip(STATISTICS, (sums[:, 0].sum(0) / sums[:, 1].sum(0)).tolist()))
        rate, self.clips_logged = (clips_seen - self.clips_logged) / seconds, clips_seen
        speed = {
            "learning_rate": learning_rate,
            "clips_per_second": rate,
            "hours_of_audio": clips_seen * self.hours_per_clip,
            "flops_utilisation": rate * self.flops_per_clip / (self.peak * self.accelerator.num_processes),
            "memory_gib": peak_memory(self.accelerator.device) / 2**30,
            "data_wait_share": waited / seconds,
            "skipped_updates": skipped_before + sum(skipped),
        }
        self.accelerator.log({**means, **speed}, step=update)
        for number, row in enumerate(rows, update - len(rows) + 1):
            self._write_line(number, {name: value if math.isfinite(value) else None for name, value in zip(STATISTICS, row)})
        if self.accelerator.is_main_process:
            logger.info(
                f"update {update}/{total_updates}  loss {means['loss']:.4f} (local {means['local_loss']:.4f}, global "
                f"{means['global_loss']:.4f}, retention {means['source_retention_loss']:.4f})  targets: standard deviation "
                f"{means['target_std']:.3f}, content share {means['content_share']:.3f}  {rate:.1f} clips/s, "
                f"{speed['hours_of_audio']:.1f} h of audio, {speed['flops_utilisation']:.0%} of the matrix peak, "
                f"{speed['memory_gib']:.1f} GiB, waited {speed['data_wait_share']:.0%} for data"
            )
        return means, skipped

    def write_validation(self, update: int, means: dict[str, float], clips: int) -> None:
        """Write the losses on the validation set after an update."""
        self.accelerator.log(means, step=update)
        self._write_line(update, means)
        if self.accelerator.is_main_process:
            logger.info("update %d  validation loss %.4f on %d clips", update, means["validation_loss"], clips)

    def _write_line(self, update: int, values: Mapping[str, float | None]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"update": update, **values}) + "\n")
            self.file.flush()
