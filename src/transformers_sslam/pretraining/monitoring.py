"""The log of a run: losses and statistics, speed compared with the hardware's, and a guard against collapse."""

import contextlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils import ModelOutput

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError
from ..files import write_text
from ..masking import num_visible_patches
from .settings import PreTrainingSettings


logger = logging.getLogger(__name__)

TRACKED = {  # the group of each curve that is not a loss
    **dict.fromkeys(("target_std", "prediction_std", "content_share"), "targets"),
    **dict.fromkeys(("learning_rate", "hours_of_audio_seen", "skipped_steps"), "progress"),
    **dict.fromkeys(("probe_last_block", "probe_first_block", "probe_log_mel"), "probe"),
    **dict.fromkeys(("clips_per_second", "flops_utilisation", "memory_gib", "data_wait_fraction"), "speed"),
}

LOSSES = ("loss", "local_loss", "global_loss", "source_retention_loss")
STATISTICS = (*LOSSES, "target_std", "prediction_std", "content_share")


class NonFiniteError(UserError):
    """Gradients were not finite in too many consecutive steps."""


class CollapseError(UserError):
    """The teacher's targets or the student's predictions have collapsed, so further training is useless."""


def check_collapse(settings: PreTrainingSettings, step: int, means: Mapping[str, float]) -> None:
    """Compare the means over the last steps with the guard's floors. NaN, as `content_share` is in batches of one clip, is not below any.

    Standard deviations fall when targets or predictions become constant. They stay high when targets come to depend on the patches'
    positions only, which `content_share` shows. See `SSLAMForPreTrainingOutput`.

    Raises:
        CollapseError: if one is below its floor at step `guard_after_steps` or later.
    """
    for name in ("target_std", "prediction_std", "content_share") if step >= settings.guard_after_steps else ():
        floor = getattr(settings, f"min_{name}")
        if means[name] < floor:
            raise CollapseError(
                f"at step {step} {name} is {means[name]:.4g}, below its floor of {floor:g}: the representation has collapsed. Resume from "
                "an earlier checkpoint with a lower learning rate, a longer warm-up or another EMA decay; small models did not collapse "
                "with a larger patch embedding at the start (patch_embedding_gain, position_embedding_scale)"
            )


def weighted_statistics(output: ModelOutput, weight: float) -> torch.Tensor:
    """(2, statistics): `STATISTICS` of a forward pass times a weight, and that weight, or 0 where a value is NaN; on the model's device.

    A loss that the model does not have is 0.
    """
    absent = output["loss"].new_zeros(())
    values = (output.get(name) for name in STATISTICS)
    known = torch.stack([absent if value is None else value.detach().to(absent.dtype) for value in values])
    unknown = known.isnan()  # content_share of a batch of one clip
    return weight * torch.stack((known.masked_fill(unknown, 0), (~unknown).to(known.dtype)))


def training_flops_per_clip(config: SSLAMConfig, frames: int) -> float:
    """Floating-point operations of one step for one clip: matrix products and convolutions, backward counted twice the forward.

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
    if config.objective == "mixture_invariant":
        student += config.num_views * 2 * (patches - visible) * inner * config.num_latent_sources * width
    if config.use_mixtures and config.source_retention_loss_weight:
        foreign = patches - config.num_unmixed_spans * config.unmixed_span_length // config.patch_size * config.num_frequency_patches
        others = config.most_sources - 1
        if config.objective == "mixture_invariant":
            teacher += encoder(1 + foreign)
            if others > 1:  # the first of the two mixtures is not the clip alone
                teacher += encoder(1 + patches) + patch_embedding(1)
            if others > 1 or config.gain_db is not None:
                teacher += patch_embedding(1)
        elif config.gain_db is not None:
            teacher += others * (encoder(1 + foreign) + patch_embedding(1))
        else:  # where spans are those of the whole batch, a clip is the same source in every mixture
            teacher += encoder(1 + foreign) * (others if config.unmixed_spans_per_clip else 1)
    return 3 * student + teacher


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The highest rate of square matrix products that this device reaches now, in FLOP/s: what utilisation is measured against."""
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
    """The peak of allocated memory so far, in bytes: of the accelerator or, on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss begins with that of the parent process
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TrainingLog:
    """Statistics of steps, written to the log, to `metrics.jsonl` (a line per step) and to Accelerate's trackers, by the main process.

    Until a line is logged they stay on the device, so that no step waits for them. `config` is the model's, and `frames` (of 10 ms) are
    those of a clip: they give operations and hours.
    """

    def __init__(self, accelerator: Accelerator, path: Path, config: SSLAMConfig, frames: int):
        self.accelerator, self.path = accelerator, path
        self.flops_per_clip, self.hours_per_clip = training_flops_per_clip(config, frames), frames / 360_000
        self.peak = math.nan  # FLOP/s of matrix products
        self.clips_logged = 0
        self.started, self.waited = time.perf_counter(), 0.0  # the present lap, and seconds of it spent waiting for data
        # Of each step what `weighted_statistics` gives, the sum over this device's clips; 0 where it was skipped.
        self.pending: list[torch.Tensor] = []
        self.file: TextIO | None = None

    @contextlib.contextmanager
    def open(self, step: int, clips_seen: int) -> Iterator[None]:
        """Continue `metrics.jsonl` after a step. Lines of later ones, which a run wrote before it was interrupted, are dropped."""
        self.clips_logged = clips_seen
        if not self.accelerator.is_main_process:
            yield
            return
        kept = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # a killed run may leave a torn line
                line = json.loads(text)
                line = {"step": line.pop("step" if "step" in line else "update"), **line}  # "update" is of earlier versions
                if line["step"] <= step:
                    kept.append(json.dumps(line) + "\n")
        write_text(self.path, "".join(kept))
        with open(self.path, "a") as self.file:
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in here as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were spent waiting; starts a new one."""
        elapsed, waited = time.perf_counter() - self.started, self.waited
        self.started, self.waited = time.perf_counter(), 0.0
        return elapsed, waited

    def write(
        self, step: int, max_steps: int, clips_seen: int, learning_rate: float, skipped_before: int
    ) -> tuple[dict[str, float], list[bool]]:
        """Write what is pending, up to `step`. All processes call this; here alone they read what steps have computed.

        Returns:
            Means over the steps that were not skipped (NaN if there are none), and for each step whether it was skipped.
        """
        sums = self.accelerator.reduce(torch.stack(self.pending).double(), "sum").cpu()
        self.pending = []
        seconds, waited = self.lap()
        skipped = (sums[:, 1] == 0).all(1).tolist()
        rows = (sums[:, 0] / sums[:, 1]).tolist()  # NaN where nothing is known
        means = dict(zip(STATISTICS, (sums[:, 0].sum(0) / sums[:, 1].sum(0)).tolist()))
        rate, self.clips_logged = (clips_seen - self.clips_logged) / seconds, clips_seen
        speed = {
            "learning_rate": learning_rate,
            "clips_per_second": rate,
            "hours_of_audio_seen": clips_seen * self.hours_per_clip,
            "flops_utilisation": rate * self.flops_per_clip / (self.peak * self.accelerator.num_processes),
            "memory_gib": peak_memory(self.accelerator.device) / 2**30,
            "data_wait_fraction": waited / seconds,
            "skipped_steps": skipped_before + sum(skipped),
        }
        self._track({**means, **speed}, step)
        for number, row in enumerate(rows, step - len(rows) + 1):
            self._write_line(number, {name: value if math.isfinite(value) else None for name, value in zip(STATISTICS, row)})
        if self.accelerator.is_main_process:
            left = tqdm.format_interval((max_steps - step) * seconds / len(rows))  # at the speed since the last line
            logger.info(
                f"step {step}/{max_steps}, {left} left  loss {means['loss']:.4f} (local {means['local_loss']:.4f}, global "
                f"{means['global_loss']:.4f}, retention {means['source_retention_loss']:.4f})  target_std {means['target_std']:.3f}, "
                f"content_share {means['content_share']:.3f}  {rate:.1f} clips/s, {speed['hours_of_audio_seen']:.2f} h of audio seen, "
                f"{speed['flops_utilisation']:.0%} of the matrix peak, {speed['memory_gib']:.1f} GiB, waited "
                f"{speed['data_wait_fraction']:.0%} for data"
            )
        return means, skipped

    def write_validation(self, step: int, means: dict[str, float], clips: int) -> None:
        """Write the losses on the validation clips after a step."""
        self._track(means, step)
        self._write_line(step, means)
        if self.accelerator.is_main_process:
            logger.info("step %d  validation loss %.4f on %d clips", step, means["validation_loss"], clips)

    def write_probe(self, step: int, values: dict[str, float], at_start: dict[str, float], metric: str) -> None:
        """Write the probe's figures after a step, beside those of the run's first weights; by the main process alone."""
        self._track(values, step)
        self._write_line(step, values)
        last, first, log_mel = (f"{values[f'probe_{name}']:.1%}" for name in ("last_block", "first_block", "log_mel"))
        then = [f" (at the start {at_start[f'probe_{name}']:.1%})" if step else "" for name in ("last_block", "first_block")]
        found = f"{last} of the last block{then[0]}, {first} of the first{then[1]}, {log_mel} of log-mel statistics"
        logger.info(f"step {step}  probe: {metric} {found}")

    def _track(self, values: Mapping[str, float], step: int) -> None:
        """Give them to the trackers, in groups: curves that belong together are drawn together."""
        self.accelerator.log({f"{TRACKED.get(name, 'loss')}/{name}": value for name, value in values.items()}, step=step)

    def _write_line(self, step: int, values: Mapping[str, float | None]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
