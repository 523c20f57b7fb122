"""A picture of what a classifier hears in a recording as time goes by.

```python
waveform = load_waveform("street.wav")
heard = model.score_over_time(waveform, extractor)  # inference.py
heard.scores.argmax(1)  # the likeliest class of each window
plot_scores(heard, waveform, "street.png")
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..fbank import LOWEST_FREQUENCY, log_mel
from ..inference import ScoresOverTime


if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEL_TICKS = (100, 500, 1000, 2000, 4000, 7000)  # Hz
DYNAMIC_RANGE = 80  # dB below the loudest, which a picture shows
OUTLINE = "#d55e00"  # Okabe and Ito's vermilion: stands out from blues to every kind of eye


class Event(NamedTuple):
    """A sound that is known to be in a recording from `start` to `end`, in seconds."""

    name: str
    start: float
    end: float


def plot_scores(
    heard: ScoresOverTime, waveform: np.ndarray, path: str | Path, title: str = "", truth: Sequence[Event] = (), most_classes: int = 12
) -> None:
    """Write a picture (PNG, PDF, ... as the path ends): the recording's log-mel above, the scores of its windows below.

    Each moment has the scores of the window whose centre is nearest.

    Args:
        heard: scores of the recording.
        waveform: `(samples,)`, the recording.
        path: file to write.
        title: above both.
        truth: sounds that are known to be there; they are outlined.
        most_classes: where there are more classes, those with the highest scores and those of `truth` are shown.

    Raises:
        ImportError: if matplotlib is not installed, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "transformers-sslam[train]"') from error

    known = {event.name for event in truth}
    ranked = sorted(range(len(heard.classes)), key=lambda i: (heard.classes[i] not in known, -heard.scores[:, i].max()))
    shown = sorted(ranked[:most_classes])
    figure = Figure(figsize=(10, 3.2 + 0.28 * len(shown)), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2.6, 0.28 * len(shown)))
    figure.suptitle(title)
    _draw_log_mel(above, waveform, heard)
    _draw_scores(below, heard, shown, truth)
    figure.savefig(path, dpi=150)


def _draw_log_mel(axes: "Axes", waveform: np.ndarray, heard: ScoresOverTime) -> None:
    decibels = 10 / np.log(10) * log_mel(torch.from_numpy(waveform - waveform.mean()), heard.sampling_rate).T.numpy()
    bins, loudest = len(decibels), decibels.max()
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, heard.duration, 0, bins),
        vmin=loudest - DYNAMIC_RANGE,
        vmax=loudest,
    )
    # The filters' peaks are evenly spaced in mel, from one step above the lowest frequency to one step below the highest.
    low, high = _mel(LOWEST_FREQUENCY), _mel(heard.sampling_rate / 2)
    places = {frequency: (bins + 1) * (_mel(frequency) - low) / (high - low) - 0.5 for frequency in MEL_TICKS}
    ticks = {frequency: place for frequency, place in places.items() if place <= bins}
    axes.set_yticks(list(ticks.values()), [f"{frequency:,}" for frequency in ticks])
    axes.set_ylabel("frequency (Hz, mel scale)")
    axes.figure.colorbar(image, ax=axes, label="log-mel energy (dB)", pad=0.01)


def _draw_scores(axes: "Axes", heard: ScoresOverTime, shown: list[int], truth: Sequence[Event]) -> None:
    image = axes.pcolormesh(
        heard.edges, np.arange(len(shown) + 1), heard.scores[:, shown].T, cmap="Blues", vmin=0, vmax=1, edgecolors="none"
    )
    names = [heard.classes[i] for i in shown]
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(axis="y", length=0)
    axes.hlines(np.arange(1, len(names)), 0, heard.duration, color="0.85", linewidth=0.5)
    axes.invert_yaxis()
    for event in truth:
        if event.name in names:
            span, row = (event.start, event.end - event.start), (names.index(event.name) + 0.06, 0.88)
            axes.broken_barh([span], row, facecolors="none", edgecolors=OUTLINE, linewidth=1.6, clip_on=False)
    axes.set_xlim(0, heard.duration)
    axes.set_xlabel(f"time (s); each column: a window of {heard.window:.2f} s around it" + ("; outlined: what is there" if truth else ""))
    axes.figure.colorbar(image, ax=axes, label="score", pad=0.01)


def _mel(frequency: float) -> float:
    return 1127 * float(np.log1p(frequency / 700))


__all__ = ["Event", "plot_scores"]
