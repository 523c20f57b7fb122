"""Windows over a recording, which is one array or arrives in blocks: cut in memory that does not grow with its length."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from typing import Literal, Self

import numpy as np
import torch

from .configuration_sslam import SSLAMConfig
from .fbank import frame_geometry, num_frames
from .feature_extraction_sslam import SSLAMFeatureExtractor, as_float_samples, check_peak


Samples = np.ndarray | torch.Tensor
Audio = Samples | Iterable[Samples]
LARGEST_BLOCK = 2**18  # samples; longer blocks are handed on in parts, so that checks and copies take little memory


@dataclass(frozen=True)
class Windowing:
    """How windows lie over a recording, in samples.

    Attributes:
        length: of a window.
        hop: from one window's start to the next one's.
        frames: of a window's log-mel.
        grid: all windows begin on its multiples, so that the last one may reach beyond the recording; `None`: the last one ends with it.
        sampling_rate: in Hz.
    """

    length: int
    hop: int
    frames: int
    grid: int | None
    sampling_rate: int

    @classmethod
    def of_model(
        cls,
        config: SSLAMConfig,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        per: Literal["clip", "window", "step"] = "window",
    ) -> Self:
        """The windows that a user asks for, checked.

        Args:
            config, feature_extractor: the model's.
            hop: seconds; by default half a window, and of a whole clip a window.
            window: seconds; by default the extractor's `max_length`.
            per: what there is a result for: each window, each time step of the model (160 ms), or the whole clip, which is then cut into
                windows that do not overlap.
        """
        rate, size = feature_extractor.sampling_rate, config.patch_size
        frame, shift = frame_geometry(rate)
        step, frames = size * shift, feature_extractor.max_length
        for name, seconds in (("hop", hop), ("window", window)):
            is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
            if seconds is not None and not (is_number and math.isfinite(seconds) and round(seconds * rate) >= 1):
                raise ValueError(f"{name} is {seconds!r} s, but must be a number of at least one sample, {1 / rate:.2g} s")
        if window is not None:
            frames = round(window * rate / step) * size
            if frames < size or abs(frames * shift - window * rate) > 1:
                raise ValueError(f"window is {window} s, but must be a positive multiple of {step / rate:g} s, the model's time step")
        name = "the feature extractor's max_length" if window is None else f"a window of {window:g} s"
        check_frames(config, feature_extractor, frames, name)
        length = (frames - 1) * shift + frame
        if per == "clip":
            if hop is not None:
                raise ValueError(f"hop is {hop} s, but windows of a whole clip do not overlap: leave it out")
            return cls(length, frames * shift, frames, frames * shift, rate)
        hop = max(1, frames // size // 2) * step / rate if hop is None else hop
        if per == "step" and (round(hop * rate) % step or round(hop * rate) > frames * shift):
            raise ValueError(
                f"hop is {hop} s, but for time steps it must be a multiple of {step / rate:g} s, the length of one, and no longer than a "
                f"window, {frames * shift / rate:g} s"
            )
        return cls(length, round(hop * rate), frames, step if per == "step" else None, rate)

    def last_start(self, samples: int) -> int:
        """Where the last window begins: so that it ends where the recording does, or, on the grid, so that it holds the last frame."""
        if self.grid is None:
            return max(0, samples - self.length)
        shift = frame_geometry(self.sampling_rate)[1]
        left = num_frames(samples, self.sampling_rate) - self.frames
        return max(0, -(-left * shift // self.grid) * self.grid)

    def starts(self, samples: int) -> list[int]:
        """Where the windows of a recording of so many samples begin: every `hop`, and the last one."""
        last = self.last_start(samples)
        return [*range(0, last, self.hop), last]


def check_frames(config: SSLAMConfig, feature_extractor: SSLAMFeatureExtractor, frames: int, name: str) -> None:
    """Raise a ValueError unless inputs of so many frames fit the model and the extractor."""
    size, most = config.patch_size, config.max_length
    if not 0 < frames <= most or frames % size or frames % feature_extractor.pad_to_multiple_of:
        raise ValueError(
            f"{name} gives {frames} frames (10 ms each), but a positive multiple of {size} up to {most}, {most / 100:g} s, is expected by "
            "this model: set the extractor's max_length, or give windows another length"
        )


def checked_blocks(audio: Audio, sampling_rate: int) -> Iterator[torch.Tensor]:
    """The blocks of a recording, checked, as float32 tensors of their own, because a producer may use its buffer again."""
    if isinstance(audio, str | bytes | PathLike):
        raise ValueError(f"the audio is the path {str(audio)!r}, not a waveform: read the file with transformers_sslam.audio.read_blocks")
    if isinstance(audio, Mapping) or not isinstance(audio, Samples | Iterable):
        raise ValueError(
            f"the audio is a {type(audio).__name__}, but a 1-D array of samples, or an iterable of such arrays, is expected"
            + (': of an example of a data set give its "array"' if isinstance(audio, Mapping) else "")
        )
    if isinstance(audio, Sequence):  # clips, as other models take them, or blocks: it cannot be told
        raise ValueError(
            f"the audio is a {type(audio).__name__} of {len(audio)}, but one recording is expected: call this for each waveform, and give "
            "blocks of one recording by an iterator, such as iter(blocks)"
        )
    begin = 0
    for block in (audio,) if isinstance(audio, Samples) else audio:
        if not isinstance(block, Samples) or block.ndim != 1:
            shape = f"an array of shape {tuple(block.shape)}" if hasattr(block, "shape") else f"a {type(block).__name__}"
            raise ValueError(
                f"the audio, or a block of it, is {shape}, but a 1-D array of samples or an iterable of such arrays is expected: mix "
                "several channels down to one first"
            )
        for first in range(0, len(block), LARGEST_BLOCK):
            part = block[first : first + LARGEST_BLOCK]
            end = begin + len(part)
            name = f"the audio between {begin / sampling_rate:.2f} and {end / sampling_rate:.2f} s"
            samples = as_float_samples(part, name).clone()
            check_peak(samples, name)
            yield samples
            begin = end


def cut_into_windows(blocks: Iterable[torch.Tensor], windowing: Windowing) -> Iterator[tuple[int, torch.Tensor]]:
    """Windows: where each begins, and its samples, as soon as they are there.

    Held are the samples from the earliest window that may still come to the end of the last block.
    """
    held: list[torch.Tensor] = []
    first = samples = start = 0  # of what is held; of the recording so far; of the next window
    for block in blocks:
        held.append(block)
        samples += len(block)
        if start >= windowing.last_start(samples):
            continue
        held = [torch.cat(held)]
        while start < windowing.last_start(samples):
            yield start, held[0][start - first : start - first + windowing.length]
            start += windowing.hop
        # The last window may begin before the next regular one, wherever the recording ends.
        kept = min(start, windowing.last_start(samples))
        held, first = [held[0][kept - first :]], kept
    if num_frames(samples, windowing.sampling_rate) == 0:
        least = frame_geometry(windowing.sampling_rate)[0]
        raise ValueError(f"the audio has {samples} samples, but one frame takes {least} (25 ms): leave it out, or pad it with zeros")
    start = windowing.last_start(samples)
    # On the grid it may be longer by less than a frame's shift, which adds no frame: so it ends where the recording does.
    yield start, torch.cat(held)[start - first :]


class MergedSteps:
    """Means of time steps over all windows that hold them, from the first step that a later window may still add to."""

    def __init__(self) -> None:
        self.first = 0  # step of the first row
        self.latest = 0  # step at which the latest window begins
        self.sums = self.weights = torch.zeros(0, 1, dtype=torch.float32, device="cpu")  # as all results are, whatever the defaults

    def add(self, start: int, steps: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """A window's `(steps, width)`, the first of which is the recording's step `start`; `weights (steps,)` are 1 by default."""
        missing = max(0, start + len(steps) - self.first - len(self.weights))
        self.sums = torch.cat((self.sums.view(-1, steps.shape[1]), steps.new_zeros(missing, steps.shape[1])))
        self.weights = torch.cat((self.weights, steps.new_zeros(missing, 1)))
        rows = slice(start - self.first, start - self.first + len(steps))
        factors = 1.0 if weights is None else weights[:, None]
        self.sums[rows] += steps * factors
        self.weights[rows] += factors
        self.latest = start

    def take(self, all_of_them: bool) -> torch.Tensor:
        """`(steps, width)`, the means that are final, which are then no longer held."""
        final = len(self.sums) if all_of_them else self.latest + 1 - self.first  # a later window begins at least a step later
        means = self.sums[:final] / self.weights[:final]
        self.sums, self.weights, self.first = self.sums[final:], self.weights[final:], self.first + final
        return means
