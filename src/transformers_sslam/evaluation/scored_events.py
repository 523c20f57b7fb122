"""Scores over time of labelled clips beside what sounds in them: what every metric of event detection is computed from."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..audio.ahead import in_background
from ..audio.cache import Waveforms
from ..audio.rows import LabelledRows
from ..batching_sslam import compute_batches, prepare_batches
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import write_atomically
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..tasks_sslam import Detection
from ..windows_sslam import Windowing
from .event_input import MICROSECONDS


class ScoredEvents(NamedTuple):
    """Scores over time of labelled clips, as [`event_results.evaluate_events`] takes them: `evaluate_events(*scored, settings)`.

    Attributes:
        scores: of each clip, `(steps, classes)`, float32, in [0, 1].
        step: seconds.
        classes: their names.
        ground_truth: of each clip, `(onset, offset, label)`.
        durations: of each clip, seconds.
    """

    scores: dict[str, np.ndarray]
    step: float
    classes: list[str]
    ground_truth: dict[str, list[tuple[float, float, str]]]
    durations: dict[str, float]

    def save(self, file: str | Path) -> None:
        """Write a `.npz` that [`load`] reads."""
        names, columns = list(self.scores), {label: i for i, label in enumerate(self.classes)}
        events = [
            (clip, onset, offset, columns[label]) for clip, name in enumerate(names) for onset, offset, label in self.ground_truth[name]
        ]
        with write_atomically(file, "wb") as opened:
            np.savez(
                opened,
                scores=np.concatenate([self.scores[name] for name in names]),  # of all clips in a row
                steps=np.array([len(self.scores[name]) for name in names]),
                names=np.array(names),
                durations=np.array([self.durations[name] for name in names]),
                step=np.array(self.step),
                classes=np.array(self.classes),
                events=np.array(events, dtype=np.float64).reshape(-1, 4),  # clip, onset, offset, class
            )

    @classmethod
    def load(cls, file: str | Path) -> "ScoredEvents":
        """What [`save`] wrote."""
        with np.load(file) as found:
            names, classes = found["names"].tolist(), found["classes"].tolist()
            scores = np.split(found["scores"], np.cumsum(found["steps"])[:-1])
            truth: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names}
            for clip, onset, offset, label in found["events"].tolist():
                truth[names[int(clip)]].append((onset, offset, classes[int(label)]))
            durations = dict(zip(names, found["durations"].tolist()))
            return cls(dict(zip(names, scores)), float(found["step"]), classes, truth, durations)


class ScoredClips(NamedTuple):
    """What [`score_events`] returns.

    Attributes:
        events: scores and events of the clips that can be used.
        unreadable: names of the others, by cause.
        cut_events: number of events that reach beyond the end of their clip, and were cut off there.
    """

    events: ScoredEvents
    unreadable: dict[str, list[str]]
    cut_events: int


def score_events(
    model: SSLAMForAudioFrameClassification,
    feature_extractor: SSLAMFeatureExtractor,
    rows: LabelledRows,
    *,
    batch_size: int = 16,
    memory_gb: float = 4.0,
    max_unreadable: float = 0.01,
    dtype: str = "float32",
) -> ScoredClips:
    """Scores of whole clips, of any length, whose events have times.

    Events that reach beyond the end of their clip are cut off there. Clips in which one begins after the end count among those that cannot
    be used.

    Args:
        model, feature_extractor: of event detection.
        rows: clips and their events.
        batch_size: windows in a forward pass, of any clips.
        memory_gb: memory for decoded clips.
        max_unreadable: largest fraction of clips that cannot be used.
        dtype: precision of the encoder.

    Raises:
        UserError: if a label is none of the model's classes, too many clips cannot be used, or none has an event.
        FloatingPointError: if scores are not finite.
    """
    rows.encode(model.config.class_names)  # finds labels that do not fit before hours of decoding
    waveforms = Waveforms(rows.sources, feature_extractor.sampling_rate, memory_gb)
    truth, durations, cut = _ground_truth(rows, waveforms)
    waveforms.check_unreadable(max_unreadable, "evaluated")
    if not any(truth.values()):
        raise UserError("no clip of the evaluation has an event, so nothing can be measured: choose others")
    task = Detection(model.config, feature_extractor, Windowing.of_model(model.config, feature_extractor, per="step"))
    with torch.autocast(model.device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        scores = dict(zip(truth, _step_scores(model, task, waveforms, batch_size), strict=True))
    scored = ScoredEvents(scores, model.config.frames_per_step / 100, model.config.class_names, truth, durations)
    return ScoredClips(scored, dict(waveforms.unreadable), cut)


def _ground_truth(rows: LabelledRows, waveforms: Waveforms) -> tuple[dict[str, list[tuple[float, float, str]]], dict[str, float], int]:
    """Events and duration of each clip by name, and how many events were cut off. Clips with an event after their end become unreadable."""
    truth: dict[str, list[tuple[float, float, str]]] = {}
    durations: dict[str, float] = {}
    kept, cut = [], 0
    for place, i in enumerate(waveforms.kept):
        duration, name, events = len(waveforms[place]) / waveforms.sampling_rate, rows.name(i), rows.labels.events(i)
        if any(round(event.onset * MICROSECONDS) >= round(duration * MICROSECONDS) for event in events):
            waveforms.unreadable["with an event after their end"].append(name)
            continue
        kept.append(i)
        key = name if name not in truth else f"{name} (row {i})"  # a table may hold a file twice
        durations[key] = duration
        truth[key] = [(event.onset, min(event.offset, duration), event.label) for event in events]
        cut += sum(round((event.offset - duration) * MICROSECONDS) > 0 for event in events)
    waveforms.kept = kept
    return truth, durations, cut


def _step_scores(model: SSLAMForAudioFrameClassification, task: Detection, waveforms: Waveforms, batch_size: int) -> Iterator[np.ndarray]:
    """Of each clip, `(steps, classes)`, float32; a batch may hold windows of several."""
    windows = (window for i in range(len(waveforms)) for window in task.windows(i, waveforms[i]))
    batches = in_background(prepare_batches(windows, partial(task.features, device=model.device), batch_size))
    results = compute_batches(batches, partial(task.compute, model))
    for _, found in groupby(tqdm(results, desc="scoring", unit="window"), key=lambda result: result[0].recording):
        yield torch.cat([steps.values for steps in task.steps(found)]).numpy()
