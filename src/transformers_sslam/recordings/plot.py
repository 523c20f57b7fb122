"""A plot of a classifier's scores over a recording.

```python
waveform = load_waveform("street.wav")
result = model.score_over_time(waveform, extractor)  # result.scores.argmax(1): the likeliest class of each window
plot_scores(result, waveform, "street.png")
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..audio.labels import Event
from ..fbank import LOWEST_FREQUENCY, log_mel
from ..inference_sslam import ScoresOverTime


if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEL_TICKS = (100, 500, 1000, 2000, 4000, 7000)  # Hz
DYNAMIC_RANGE = 80  # dB below the loudest, which are shown
OUTLINE = "#d55e00"  # Okabe and Ito's vermilion: stands out from blues, also to colour-blind readers


def plot_scores(
    result: ScoresOverTime, waveform: np.ndarray, path: str | Path, title: str = "", truth: Sequence[Event] = (), most_classes: int = 12
) -> None:
    """Plot a recording's log-mel and, below it, the scores of the windows whose centres are nearest.

    Args:
        result: scores of the recording.
        waveform: `(samples,)`, the recording.
        path: file to write: PNG, PDF, ... by its suffix.
        title: of the figure.
        truth: sounds known to be there, which are outlined.
        most_classes: of more classes, those of `truth` and those with the highest scores are shown.

    Raises:
        ImportError: if matplotlib is not installed, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "transformers-sslam[train]"') from error

    known = {event.label for event in truth}
    ranked = sorted(range(len(result.classes)), key=lambda i: (result.classes[i] not in known, -result.scores[:, i].max()))
    shown = sorted(ranked[:most_classes])
    figure = Figure(figsize=(10, 3.2 + 0.28 * len(shown)), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2.6, 0.28 * len(shown)))
    figure.suptitle(title)
    _draw_log_mel(above, waveform, result)
    _draw_scores(below, result, shown, truth)
    figure.savefig(path, dpi=150)


def _draw_log_mel(axes: "Axes", waveform: np.ndarray, result: ScoresOverTime) -> None:
    decibels = 10 / np.log(10) * log_mel(torch.from_numpy(waveform - waveform.mean()), result.sampling_rate).T.numpy()
    bins, loudest = len(decibels), decibels.max()
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, result.duration, 0, bins),
        vmin=loudest - DYNAMIC_RANGE,
        vmax=loudest,
    )
    # The filters' peaks are evenly spaced in mel, from one step above the lowest frequency to one step below the highest.
    low, high = _mel(LOWEST_FREQUENCY), _mel(result.sampling_rate / 2)
    places = {frequency: (bins + 1) * (_mel(frequency) - low) / (high - low) - 0.5 for frequency in MEL_TICKS}
    ticks = {frequency: place for frequency, place in places.items() if place <= bins}
    axes.set_yticks(list(ticks.values()), [f"{frequency:,}" for frequency in ticks])
    axes.set_ylabel("frequency (Hz, mel scale)")
    axes.figure.colorbar(image, ax=axes, label="log-mel energy (dB)", pad=0.01)


def _draw_scores(axes: "Axes", result: ScoresOverTime, shown: list[int], truth: Sequence[Event]) -> None:
    image = axes.pcolormesh(
        result.edges, np.arange(len(shown) + 1), result.scores[:, shown].T, cmap="Blues", vmin=0, vmax=1, edgecolors="none"
    )
    names = [result.classes[i] for i in shown]
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(axis="y", length=0)
    axes.hlines(np.arange(1, len(names)), 0, result.duration, color="0.85", linewidth=0.5)
    axes.invert_yaxis()
    for event in truth:
        if event.label in names:
            span, row = (event.onset, event.offset - event.onset), (names.index(event.label) + 0.06, 0.88)
            axes.broken_barh([span], row, facecolors="none", edgecolors=OUTLINE, linewidth=1.6, clip_on=False)
    axes.set_xlim(0, result.duration)
    axes.set_xlabel(f"time (s); each column: a window of {result.window:.2f} s around it" + ("; outlined: known sounds" if truth else ""))
    axes.figure.colorbar(image, ax=axes, label="score", pad=0.01)


def _mel(frequency: float) -> float:
    return 1127 * float(np.log1p(frequency / 700))
