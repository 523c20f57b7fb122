"""The log-mel of a recording of any length as a picture, made block by block."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..fbank import frame_geometry, log_mel, num_frames
from ..recordings.plot import DYNAMIC_RANGE


MOST_COLUMNS = 8192  # browsers draw pictures of up to 16,384 pixels
# Of matplotlib's "magma", which `recordings.plot` uses: dark to light in even steps, also for colour-blind eyes and without colours.
# fmt: off
COLOURS = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
    (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
)
# fmt: on


class LogMelPicture:
    """A picture with a column for each frame of 10 ms or, of a long recording, for the loudest of several.

    Args:
        duration: of the recording in seconds.
        sampling_rate: in Hz.
    """

    def __init__(self, duration: float, sampling_rate: int):
        self._rate = sampling_rate
        self._frames = math.ceil(num_frames(round(duration * sampling_rate), sampling_rate) / MOST_COLUMNS)  # of a column
        self._columns: list[np.ndarray] = []

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks, which are drawn on their way."""
        length, shift = frame_geometry(self._rate)
        held = np.zeros(0, dtype=np.float32)
        for block in blocks:
            held = np.concatenate((held, block))
            columns = num_frames(len(held), self._rate) // self._frames
            if columns:
                whole = columns * self._frames * shift
                self._draw(held[: whole - shift + length])
                held = held[whole:]
            yield block
        if num_frames(len(held), self._rate):
            self._draw(held)

    def save(self, file: Path) -> None:
        """Write the picture, low frequencies at the bottom."""
        decibels = np.concatenate(self._columns).T[::-1]
        loudest = decibels.max()
        levels = np.clip(255 * (1 + (decibels - loudest) / DYNAMIC_RANGE), 0, 255).astype(np.uint8)
        image = Image.fromarray(levels, mode="P")
        places = np.linspace(0, 255, len(COLOURS))
        palette = np.stack([np.interp(np.arange(256), places, channel) for channel in zip(*COLOURS)], axis=1)
        image.putpalette(np.rint(palette).astype(np.uint8).tobytes())
        image.save(file, "PNG")

    def _draw(self, samples: np.ndarray) -> None:
        decibels = 10 / math.log(10) * log_mel(torch.from_numpy(samples), self._rate).numpy()
        starts = np.arange(0, len(decibels), self._frames)
        self._columns.append(np.maximum.reduceat(decibels, starts, axis=0).astype(np.float16))
