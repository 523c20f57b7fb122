"""Augmentation of training clips, as in the published recipes: waveforms one by one, log-mels batch by batch."""

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


NO_AUGMENTATION = AugmentationSettings(roll=False, gain=0, noise=0, mixup_alpha=0, mixup_probability=0, time_mask=0, frequency_mask=0)


def augment_waveform(waveform: np.ndarray, settings: AugmentationSettings, generator: np.random.Generator) -> np.ndarray:
    """Random roll and gain: `(samples,)` -> `(samples,)`, in the dtype given. The input is not changed."""
    if settings.roll:
        waveform = np.roll(waveform, generator.integers(len(waveform)))
    if settings.gain:
        waveform = waveform * waveform.dtype.type(0.5 + generator.beta(settings.gain, settings.gain))
    return waveform


def augment_batch(
    input_values: torch.Tensor, targets: torch.Tensor, settings: AugmentationSettings, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup, then noise and SpecAugment, which so mask both clips of a mixture.

    Args:
        input_values: `(batch, frames, mel bins)`, scaled log-mels.
        targets: `(batch, classes)`, in [0, 1].
        settings: which, and how much.
        generator: of all draws.

    Returns:
        Both, in the same shapes. The inputs are not changed.
    """
    if settings.mixup_alpha:
        chosen = generator.random(len(targets)) < settings.mixup_probability
        weights = np.where(chosen, generator.beta(settings.mixup_alpha, settings.mixup_alpha, len(targets)), 1.0)
        partners = generator.permutation(len(targets))
        input_values, targets = mixup(input_values, targets, torch.from_numpy(weights).float(), torch.from_numpy(partners))
    if settings.noise:
        strength = torch.from_numpy(generator.uniform(0, settings.noise, (len(targets), 1, 1)).astype(np.float32))
        uniform = torch.from_numpy(generator.random(tuple(input_values.shape), dtype=np.float32))
        input_values = input_values + strength * uniform
    return spec_augment(input_values, settings.time_mask, settings.frequency_mask, int(generator.integers(2**63))), targets


def mixup(
    input_values: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, partners: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * own + (1 - weight) * partner's`, of log-mels and of targets alike (Zhang et al., ICLR 2018, arXiv 1710.09412).

    Args:
        input_values: `(batch, frames, mel bins)`.
        targets: `(batch, classes)`.
        weights: `(batch,)`, of the clip itself; 1 leaves it as it is.
        partners: `(batch,)`, the row that each is mixed with.
    """
    own, rest = weights.view(-1, 1, 1), (1 - weights).view(-1, 1, 1)
    mixed = own * input_values + rest * input_values[partners]
    return mixed, own[:, 0] * targets + rest[:, 0] * targets[partners]


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
    """`(1 - smoothing) * target + smoothing / classes`, as `torch.nn.CrossEntropyLoss(label_smoothing=)` does: `(batch, classes)`."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1] if smoothing else targets
