"""What a classifier hears in a recording as time goes by: scores of windows that slide over it, and a picture of them.

```python
waveform = load_waveform("street.wav")
heard = score_over_time(model, extractor, waveform)
heard.scores.argmax(1)  # the likeliest class of each window
plot_scores(heard, waveform, "street.png")
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..fbank import LOWEST_FREQUENCY, frame_geometry, log_mel
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification


if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEL_TICKS = (100, 500, 1000, 2000, 4000, 7000)  # Hz
DYNAMIC_RANGE = 80  # dB below the loudest, which a picture shows
OUTLINE = "#d55e00"  # Okabe and Ito's vermilion: stands out from blues to every kind of eye


@dataclass(frozen=True)
class ScoresOverTime:
    """Scores of windows that slide over a recording.

    Attributes:
        scores: `(windows, classes)` in [0, 1]: sigmoid of tags, otherwise softmax over classes.
        starts: `(windows,)`, where each begins, in seconds.
        window: length of a window in seconds. A recording that is shorter has one, padded.
        duration: of the recording in seconds.
        sampling_rate: of the recording in Hz.
        classes: their names.
    """

    scores: np.ndarray
    starts: np.ndarray
    window: float
    duration: float
    sampling_rate: int
    classes: list[str]

    @property
    def edges(self) -> np.ndarray:
        """`(windows + 1,)`, in seconds: between `edges[i]` and `edges[i + 1]` the centre of window `i` is the nearest one."""
        centres = self.starts + self.window / 2
        return np.concatenate(([0.0], (centres[1:] + centres[:-1]) / 2, [self.duration]))


class Event(NamedTuple):
    """A sound that is known to be in a recording from `start` to `end`, in seconds."""

    name: str
    start: float
    end: float


def window_starts(samples: int, length: int, hop: int) -> list[int]:
    """Where windows of `length` samples begin: every `hop`, and the last one so that it ends where the recording does."""
    last = max(0, samples - length)
    return [*range(0, last, hop), last]


@torch.inference_mode()
def score_over_time(
    model: SSLAMForAudioClassification,
    extractor: SSLAMFeatureExtractor,
    waveform: np.ndarray,
    hop: float = 1.0,
    batch_size: int = 8,
) -> ScoresOverTime:
    """Score windows of as many frames as the extractor gives, each as if it were a clip of its own.

    Args:
        model: the classifier, which is put into eval mode.
        extractor: its feature extractor.
        waveform: `(samples,)`, mono, in [-1, 1], at the extractor's rate.
        hop: seconds from one window's start to the next one's.
        batch_size: windows at a time.

    Raises:
        ValueError: if `hop` is shorter than one sample, or the extractor refuses the waveform (too short, out of scale, not finite).
    """
    rate = extractor.sampling_rate
    if not round(hop * rate) >= 1:
        raise ValueError(f"hop is {hop} s, but must be at least one sample, {1 / rate:.2g} s")
    frame, shift = frame_geometry(rate)
    length = (extractor.max_length - 1) * shift + frame
    starts = window_starts(len(waveform), length, round(hop * rate))
    model.eval()
    batches = []
    for first in range(0, len(starts), batch_size):
        windows = [waveform[start : start + length] for start in starts[first : first + batch_size]]
        inputs = extractor(windows, sampling_rate=rate, return_tensors="pt", device=model.device)
        logits = model(**inputs).logits.float()
        tags = model.config.problem_type == "multi_label_classification"
        batches.append((logits.sigmoid() if tags else logits.softmax(1)).cpu().numpy())
    classes = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
    return ScoresOverTime(np.concatenate(batches), np.array(starts) / rate, length / rate, len(waveform) / rate, rate, classes)


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


__all__ = ["Event", "ScoresOverTime", "plot_scores", "score_over_time", "window_starts"]
