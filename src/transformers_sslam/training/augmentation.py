"""What the published recipes change about a clip before the model hears it. Training only."""

from dataclasses import dataclass

import numpy as np

from .settings import SettingsError, setting


@dataclass
class AugmentationSettings:
    roll: bool = setting("rotate the waveform by a random number of samples; of a clip that will be cut, this also chooses the part", True)
    gain: float = setting("multiply the waveform by 0.5 + a draw from Beta(gain, gain), so by about 1; 0 for none", 10.0)

    def __post_init__(self):
        if self.gain < 0:
            raise SettingsError(f"augmentation.gain is {self.gain:g}, but must be positive, or 0 for none")


def augment_waveform(waveform: np.ndarray, settings: AugmentationSettings, generator: np.random.Generator) -> np.ndarray:
    """Random roll and gain: `(samples,)` -> `(samples,)`, in the dtype given. The input is not changed."""
    if settings.roll:
        waveform = np.roll(waveform, generator.integers(len(waveform)))
    if settings.gain:
        waveform = waveform * waveform.dtype.type(0.5 + generator.beta(settings.gain, settings.gain))
    return waveform
