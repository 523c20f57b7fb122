"""Pictures of a recording: its log-mel, and below it the scores of windows, or events over the scores of time steps.

```python
waveform = load_waveform("street.wav")
result = model.score_over_time(waveform, extractor)  # result.scores.argmax(1): the likeliest class of each window
plot_scores(result, waveform, "street.png")

scores = detector.score_steps(waveform, extractor)
events = find_events(scores.scores, scores.step, scores.classes, EventSettings.of(detector.config))
plot_events(scores, events, waveform, "events.png")
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..audio.labels import Event
from ..detection_sslam import StepScores
from ..events_sslam import Event as DetectedEvent
from ..fbank import LOWEST_FREQUENCY, log_mel
from ..inference_sslam import ScoresOverTime
from ..reports import new_figure


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEL_TICKS = (100, 500, 1000, 2000, 4000, 7000)  # Hz
DYNAMIC_RANGE = 80  # dB below the loudest, which are shown
# Okabe and Ito's vermilion and blue, which colour-blind readers tell apart; the former stands out from blues. On paper without colours one
# is an outline, the other an area.
OUTLINE, DETECTED = "#d55e00", "#0072b2"
WINDOW_LANE, STEP_LANE = 0.28, 0.42  # height of a class in inches


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
    shown = _classes_to_show(result, {event.label for event in truth}, set(), most_classes)
    figure, above, below = _figure(title, WINDOW_LANE * len(shown), 3.2)
    _draw_log_mel(above, waveform, result.sampling_rate, 0.0)
    _draw_scores(below, result, shown, truth)
    figure.savefig(path, dpi=150)


def plot_events(
    scores: StepScores,
    events: Sequence[DetectedEvent],
    waveform: np.ndarray,
    path: str | Path,
    title: str = "",
    truth: Sequence[Event] = (),
    most_classes: int = 12,
    *,
    start: float = 0.0,
    sampling_rate: int = 16_000,
) -> None:
    """Plot a recording's log-mel and, below it, events over the scores of time steps, a lane for each class.

    Args:
        scores: of the recording, see [`SSLAMDetectionMixin.score_steps`].
        events: that follow from them; those of other times are left out.
        waveform: `(samples,)`, the recording.
        path: file to write: PNG, PDF, ... by its suffix.
        title: of the figure.
        truth: sounds known to be there, which are outlined.
        most_classes: of more classes, those of `truth`, then those of `events`, then those with the highest scores are shown.
        start: where `scores` and `waveform` begin, in seconds, if they are part of a longer recording.
        sampling_rate: of the waveform in Hz.

    Raises:
        ImportError: as [`plot_scores`].
    """
    end = start + scores.duration
    events = [event for event in events if event.start < end and event.end > start]
    truth = [event for event in truth if event.onset < end and event.offset > start]
    shown = _classes_to_show(scores, {event.label for event in truth}, {event.label for event in events}, most_classes)
    figure, above, below = _figure(title, STEP_LANE * len(shown), 3.6)
    _draw_log_mel(above, waveform, sampling_rate, start)
    _draw_events(below, scores, events, shown, truth, start)
    figure.legend(handles=_legend(bool(truth)), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _classes_to_show(result: ScoresOverTime | StepScores, known: set[str], found: set[str], most: int) -> list[int]:
    """Numbers of the classes, in their order."""
    names, highest = result.classes, result.scores.max(0)
    ranked = sorted(range(len(names)), key=lambda i: (names[i] not in known, names[i] not in found, -highest[i]))
    return sorted(ranked[:most])


def _figure(title: str, lanes: float, rest: float) -> tuple["Figure", "Axes", "Axes"]:
    """A figure with axes above and below; heights are in inches."""
    figure = new_figure(figsize=(10, rest + lanes))
    above, below = figure.subplots(2, sharex=True, height_ratios=(2.6, lanes))
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    return figure, above, below


def _draw_log_mel(axes: "Axes", waveform: np.ndarray, sampling_rate: int, start: float) -> None:
    decibels = 10 / np.log(10) * log_mel(torch.from_numpy(waveform - waveform.mean()), sampling_rate).T.numpy()
    bins, loudest = len(decibels), decibels.max()
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(start, start + len(waveform) / sampling_rate, 0, bins),
        vmin=loudest - DYNAMIC_RANGE,
        vmax=loudest,
    )
    # The filters' peaks are evenly spaced in mel, from one step above the lowest frequency to one step below the highest.
    low, high = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    places = {frequency: (bins + 1) * (mel(frequency) - low) / (high - low) - 0.5 for frequency in MEL_TICKS}
    ticks = {frequency: place for frequency, place in places.items() if place <= bins}
    axes.set_yticks(list(ticks.values()), [f"{frequency:,}" for frequency in ticks])
    axes.set_ylabel("frequency (Hz, mel scale)")
    axes.figure.colorbar(image, ax=axes, label="log-mel energy (dB)", pad=0.01)


def _draw_scores(axes: "Axes", result: ScoresOverTime, shown: list[int], truth: Sequence[Event]) -> None:
    image = axes.pcolormesh(
        result.edges, np.arange(len(shown) + 1), result.scores[:, shown].T, cmap="Blues", vmin=0, vmax=1, edgecolors="none"
    )
    _draw_lanes(axes, [result.classes[i] for i in shown], truth, 0.0, result.duration)
    axes.set_xlabel(f"time (s); each column: a window of {result.window:.2f} s around it" + ("; outlined: known sounds" if truth else ""))
    axes.figure.colorbar(image, ax=axes, label="score", pad=0.01)


def _draw_events(
    axes: "Axes", result: StepScores, events: Sequence[DetectedEvent], shown: list[int], truth: Sequence[Event], start: float
) -> None:
    names = [result.classes[i] for i in shown]
    edges = start + np.minimum(result.step * np.arange(len(result.scores) + 1), result.duration)
    for lane, i in enumerate(shown):
        bars = [(event.start, event.end - event.start) for event in events if event.label == names[lane]]
        axes.broken_barh(bars, (lane + 0.06, 0.88), facecolors=DETECTED, alpha=0.45)
        axes.stairs(lane + 0.94 - 0.88 * result.scores[:, i], edges, baseline=None, color="black", linewidth=0.8)
    _draw_lanes(axes, names, truth, start, start + result.duration)
    axes.set_xlabel("time (s)")


def _draw_lanes(axes: "Axes", names: list[str], truth: Sequence[Event], start: float, end: float) -> None:
    """Names of classes, lines between them, and outlines of known sounds."""
    axes.set_yticks(np.arange(len(names)) + 0.5, names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.hlines(np.arange(1, len(names)), start, end, color="0.85", linewidth=0.5)
    axes.set_ylim(len(names), 0)
    for event in truth:
        if event.label in names:
            first, last = max(event.onset, start), min(event.offset, end)
            row = (names.index(event.label) + 0.06, 0.88)
            axes.broken_barh([(first, last - first)], row, facecolors="none", edgecolors=OUTLINE, linewidth=1.6, clip_on=False)
    axes.set_xlim(start, end)


def _legend(has_truth: bool) -> list["Artist"]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        Line2D([], [], color="black", linewidth=0.8, label="score: 0 at the foot of a lane, 1 at its top"),
        Patch(facecolor=DETECTED, alpha=0.45, label="detected"),
    ]
    return [*handles, Patch(facecolor="none", edgecolor=OUTLINE, linewidth=1.6, label="known")] if has_truth else handles


def mel(frequency: float) -> float:
    """Place of a frequency in Hz on Kaldi's mel scale."""
    return 1127 * float(np.log1p(frequency / 700))
