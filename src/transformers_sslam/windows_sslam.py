"""Windows that slide over a recording, which is one array or arrives in blocks: cut in memory that does not grow with its length."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Self

import numpy as np
import torch

from .configuration_sslam import SSLAMConfig
from .fbank import frame_geometry, num_frames
from .feature_extraction_sslam import SSLAMFeatureExtractor, as_float_samples


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
        step: of the grid of frame embeddings (160 ms), on which all windows then begin; `None`: the last one begins anywhere.
        sampling_rate: in Hz.
    """

    length: int
    hop: int
    frames: int
    step: int | None
    sampling_rate: int

    @classmethod
    def of_model(
        cls, config: SSLAMConfig, feature_extractor: SSLAMFeatureExtractor, hop: float | None, window: float | None, embeddings: bool
    ) -> Self:
        """The windows that `score_windows` is asked for, checked."""
        rate, size = feature_extractor.sampling_rate, config.patch_size
        frame, shift = frame_geometry(rate)
        step, frames = size * shift, feature_extractor.max_length
        for name, seconds in (("hop", hop), ("window", window)):
            if seconds is not None and not (isinstance(seconds, Real) and math.isfinite(seconds) and round(seconds * rate) >= 1):
                raise ValueError(f"{name} is {seconds!r} s, but must be a number of at least one sample, {1 / rate:.2g} s")
        if window is not None:
            frames = round(window * rate / step) * size
            if frames < size or abs(frames * shift - window * rate) > 1:
                raise ValueError(f"window is {window} s, but must be a positive multiple of {step / rate:g} s, the model's time step")
        check_frames(
            config, feature_extractor, frames, "the feature extractor's max_length" if window is None else f"a window of {window:g} s"
        )
        hop = max(1, frames // size // 2) * step / rate if hop is None else hop
        if embeddings and (round(hop * rate) % step or round(hop * rate) > frames * shift):
            raise ValueError(
                f"hop is {hop} s, but with frame embeddings it must be a multiple of {step / rate:g} s, the time from one to the next, and "
                f"no longer than a window, {frames * shift / rate:g} s"
            )
        return cls((frames - 1) * shift + frame, round(hop * rate), frames, step if embeddings else None, rate)

    def last_start(self, samples: int) -> int:
        """Where the last window begins: so that it ends where the recording does, or, on the grid, so that it holds the last frame."""
        if self.step is None:
            return max(0, samples - self.length)
        shift = frame_geometry(self.sampling_rate)[1]
        left = num_frames(samples, self.sampling_rate) - self.frames
        return max(0, -(-left * shift // self.step) * self.step)

    def starts(self, samples: int, first: int = 0) -> list[int]:
        """Where the windows of a recording of so many samples begin, from the one at `first` on: every `hop`, and the last one."""
        last = self.last_start(samples)
        return [*range(first, last, self.hop), last]


def check_frames(config: SSLAMConfig, feature_extractor: SSLAMFeatureExtractor, frames: int, name: str) -> None:
    """Raise a ValueError unless inputs of so many frames fit the model and the extractor."""
    size, most = config.patch_size, config.max_length
    if not 0 < frames <= most or frames % size or frames % feature_extractor.pad_to_multiple_of:
        raise ValueError(
            f"{name} gives {frames} frames (10 ms each), but a positive multiple of {size} up to {most} is expected by this model: set the "
            "extractor's max_length, or give windows another length"
        )


def checked_blocks(audio: Audio, sampling_rate: int) -> Iterator[torch.Tensor]:
    """The blocks of a recording, checked, as float32 tensors of their own, because a producer may use its buffer again."""
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
            yield as_float_samples(part, f"the audio between {begin / sampling_rate:.2f} and {end / sampling_rate:.2f} s").clone()
            begin = end


def cut_into_windows(
    blocks: Iterable[torch.Tensor], windowing: Windowing, batch_size: int
) -> Iterator[tuple[list[int], list[torch.Tensor], bool]]:
    """Batches of windows: where they begin, their samples, and whether a batch is the last, as soon as a batch's samples are there.

    Held are the samples from the earliest window that may still come to the end of the last block.
    """
    held: list[torch.Tensor] = []
    first = samples = start = 0  # of what is held; of the recording so far; of the next window
    span = batch_size * windowing.hop

    def batch(starts: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        held[:] = [torch.cat(held)]
        return starts, [held[0][s - first : s - first + windowing.length] for s in starts]

    for block in blocks:
        held.append(block)
        samples += len(block)
        while start + span - windowing.hop < windowing.last_start(samples):
            yield *batch([*range(start, start + span, windowing.hop)]), False
            start += span
            # The last window may begin before the next regular one, wherever the recording ends.
            kept = min(start, windowing.last_start(samples))
            held, first = [held[0][kept - first :]], kept
    if samples == 0:
        raise ValueError("the audio is empty: give at least one frame, 25 ms")
    yield *batch(windowing.starts(samples, start)), True


class MergedSteps:
    """Means of frame embeddings over all windows that hold them, from the first step that a later window may still add to."""

    def __init__(self, hidden_size: int):
        self.first = 0  # step of the first row
        self.latest = 0  # step at which the latest window begins
        self.sums, self.counts = np.zeros((0, hidden_size), dtype=np.float32), np.zeros((0, 1), dtype=np.float32)

    def add(self, start: int, steps: np.ndarray) -> None:
        """A window's `(steps, hidden_size)`, the first of which is the recording's step `start`."""
        missing = max(0, start + len(steps) - self.first - len(self.sums))
        self.sums, self.counts = (np.pad(array, ((0, missing), (0, 0))) for array in (self.sums, self.counts))
        rows = slice(start - self.first, start - self.first + len(steps))
        self.sums[rows] += steps
        self.counts[rows] += 1
        self.latest = start

    def take(self, all_of_them: bool) -> np.ndarray:
        """`(steps, hidden_size)`, the means that are final, which are then no longer held."""
        final = len(self.sums) if all_of_them else self.latest + 1 - self.first  # windows begin in order, each at least a step later
        means = self.sums[:final] / self.counts[:final]
        self.sums, self.counts, self.first = self.sums[final:], self.counts[final:], self.first + final
        return means


__all__ = ["Audio", "MergedSteps", "Samples", "Windowing", "check_frames", "checked_blocks", "cut_into_windows"]
