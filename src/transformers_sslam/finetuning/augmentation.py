"""Augmentation of training clips, as in the published recipes: waveforms one by one, log-mels batch by batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from ..settings import setting


@dataclass
class AugmentationSettings:
    """Augmentation

    Defaults are those of the published fine-tuning recipes (SSLAM, arXiv 2506.12222).

    Raises:
        UserError: if a value is out of range.
    """

    roll: bool = setting("rotate the waveform by a random number of samples; for a clip that will be cut, this also chooses the part", True)
    gain: float = setting("multiply the waveform by 0.5 + a draw from Beta(gain, gain), so by about 1; 0 for none", 10.0)
    noise: float = setting("add uniform noise in [0, a) to the scaled log-mel, with `a` uniform in [0, noise); 0 for none", 0.0)
    mixup_alpha: float = setting("mix log-mels and targets of two clips, with a weight from Beta(alpha, alpha); 0 for none", 0.8)
    mixup_probability: float = setting("probability that a clip is mixed", 0.9)
    time_mask: float = setting("SpecAugment: largest fraction of the frames that is masked; 0 for none", 0.2)
    frequency_mask: float = setting("SpecAugment: largest fraction of the mel bins that is masked; 0 for none", 0.2)

    def __post_init__(self):
        for name in ("gain", "noise", "mixup_alpha"):
            if getattr(self, name) < 0:
                raise UserError(f"augmentation.{name} is {getattr(self, name):g}, but must be positive, or 0 for none")
        for name in ("mixup_probability", "time_mask", "frequency_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augmentation.{name} is {getattr(self, name):g}, but a fraction in [0, 1] is expected")


Batch = dict[str, torch.Tensor]
NO_AUGMENTATION = AugmentationSettings(roll=False, gain=0, noise=0, mixup_alpha=0, mixup_probability=0, time_mask=0, frequency_mask=0)


def augment_waveform(waveform: np.ndarray, settings: AugmentationSettings, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Random roll and gain: `(samples,)` -> `(samples,)`, in the dtype given, and by how many samples it was rolled. The input is not
    changed."""
    shift = 0
    if settings.roll:
        shift = int(generator.integers(len(waveform)))
        waveform = np.roll(waveform, shift)
    if settings.gain:
        waveform = waveform * waveform.dtype.type(0.5 + generator.beta(settings.gain, settings.gain))
    return waveform, shift


def augment_batch(batch: Mapping[str, torch.Tensor], settings: AugmentationSettings, generator: np.random.Generator) -> Batch:
    """Mixup, then noise and SpecAugment, which so mask both clips of a mixture.

    Args:
        batch: `input_values (batch, frames, mel bins)`, scaled log-mels; `labels (batch, classes)` or `(batch, steps, classes)`, in
            [0, 1]; and perhaps `clip_labels (batch, classes)` and `attention_mask (batch, frames)`. Labels of -100 are unknown.
        settings: which, and how much.
        generator: of all draws.

    Returns:
        The same, in the same shapes. The inputs are not changed. Where frames are masked, the labels of steps decrease in proportion.
    """
    batch = dict(batch)
    clips = len(batch["input_values"])
    if settings.mixup_alpha:
        chosen = generator.random(clips) < settings.mixup_probability
        weights = np.where(chosen, generator.beta(settings.mixup_alpha, settings.mixup_alpha, clips), 1.0)
        partners = generator.permutation(clips)
        batch = mixup(batch, torch.from_numpy(weights).float(), torch.from_numpy(partners))
    values = batch["input_values"]
    if settings.noise:
        strength = torch.from_numpy(generator.uniform(0, settings.noise, (clips, 1, 1)).astype(np.float32))
        values = values + strength * torch.from_numpy(generator.random(tuple(values.shape), dtype=np.float32))
    seed = int(generator.integers(2**63))
    batch["input_values"] = spec_augment(values, settings.time_mask, settings.frequency_mask, seed)
    if batch["labels"].ndim == 3 and settings.time_mask:
        frames = spec_augment(torch.ones_like(values), settings.time_mask, settings.frequency_mask, seed).amax(2)
        audible = frames.unflatten(1, (batch["labels"].shape[1], -1)).mean(2, keepdim=True).to(batch["labels"])
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] * audible)
    return batch


def mixup(batch: Mapping[str, torch.Tensor], weights: torch.Tensor, partners: torch.Tensor) -> Batch:
    """`weight * own + (1 - weight) * partner's`, of log-mels and of labels alike (Zhang et al., ICLR 2018, arXiv 1710.09412). A mixture
    has sound where one of its clips has, and labels that are known where both are.

    Args:
        batch: see [`augment_batch`].
        weights: `(batch,)`, of the clip itself; 1 leaves it as it is.
        partners: `(batch,)`, the row that each is mixed with.
    """
    mixed = {}
    for name, values in batch.items():
        own, other = weights.view(-1, *[1] * (values.ndim - 1)).to(values.device), values[partners]
        if name == "attention_mask":
            mixed[name] = torch.where(own < 1, torch.maximum(values, other), values)
        else:
            mixed[name] = own * values + (1 - own) * other
        if name.endswith("labels"):
            mixed[name] = torch.where((values < 0) | ((other < 0) & (own < 1)), -100.0, mixed[name])
    return mixed


def spec_augment(input_values: torch.Tensor, time_mask: float, frequency_mask: float, seed: int) -> torch.Tensor:
    """Mask one range of frames and one band of mel bins of each clip with 0, the mean of a scaled log-mel (SpecAugment, Park et al.,
    Interspeech 2019, arXiv 1904.08779), with torchaudio's masks.

    Args:
        input_values: `(batch, frames, mel bins)`.
        time_mask, frequency_mask: fraction of either axis, rounded to frames or bins; the width of a mask is uniform from 0 to one below.
        seed: of torch's own generator on the CPU, from which torchaudio draws; its state is put back.
    """
    from torchaudio.transforms import FrequencyMasking, TimeMasking

    spectrograms = input_values.transpose(1, 2).unsqueeze(1)  # (batch, channel, frequency, time)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed accelerators too, which nothing puts back
        for mask, fraction, axis in ((TimeMasking, time_mask, 3), (FrequencyMasking, frequency_mask, 2)):
            if width := round(fraction * spectrograms.shape[axis]):
                spectrograms = mask(width, iid_masks=True)(spectrograms)
    return spectrograms.squeeze(1).transpose(1, 2)


def smooth_targets(targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """`(1 - smoothing) * target + smoothing / classes`, as `torch.nn.CrossEntropyLoss(label_smoothing=)` does: `(batch, classes)`. Unknown
    ones (-100) stay so."""
    return torch.where(targets < 0, targets, targets * (1 - smoothing) + smoothing / targets.shape[-1]) if smoothing else targets
