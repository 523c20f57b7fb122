"""Scores of models on sounds that they have not learnt, and what follows from them: of events, of tags, of false alarms."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import expit

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.rows import AudioColumn, LabelledRows
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.calibration import as_logits, measure_calibration
from transformers_sslam.evaluation.detector import step_logits, step_targets
from transformers_sslam.evaluation.intervals import format_summary, proportion_interval, summarize, widen_by_clips
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.events_sslam import EventSettings, find_events
from transformers_sslam.reports import markdown_table


def audio_column(folder: Path, names: Iterable[str]) -> AudioColumn:
    """Files of a folder, undecoded."""
    column = datasets.Features({"audio": datasets.Audio(decode=False)})
    return AudioColumn(datasets.Dataset.from_dict({"audio": [str(folder / name) for name in names]}, features=column))


def load(model: Path) -> tuple[SSLAMForAudioFrameClassification, SSLAMFeatureExtractor]:
    """A model and its feature extractor."""
    return SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)


def score_without_events(network: SSLAMForAudioFrameClassification, extractor: SSLAMFeatureExtractor, audio: AudioColumn) -> ScoredEvents:
    """Scores of recordings in which nothing that the model knows sounds."""
    waveforms = Waveforms(audio, extractor.sampling_rate)
    if len(audio):  # a fold may have no such clips
        waveforms.check_unreadable(0.0, "evaluation")
    found = [network.score_steps(waveform, extractor) for waveform in waveforms]
    scores, durations = {str(i): one.scores for i, one in enumerate(found)}, {str(i): one.duration for i, one in enumerate(found)}
    classes = network.config.class_names
    return ScoredEvents(scores, network.config.frames_per_step / 100, classes, {name: [] for name in scores}, durations)


def calibrated(scored: ScoredEvents, temperature: float) -> ScoredEvents:
    """The scores of a model whose head is divided by the temperature: exact where windows do not overlap, and clips do not weight steps."""
    return scored._replace(
        scores={name: expit(as_logits(values) / temperature).astype(np.float32) for name, values in scored.scores.items()}
    )


def join_scores(parts: Mapping[str, ScoredEvents]) -> ScoredEvents:
    """The recordings of all parts, whose names begin with that of the part."""
    first = next(iter(parts.values()))
    if different := [name for name, part in parts.items() if (part.step, part.classes) != (first.step, first.classes)]:
        raise UserError(f"{different[0]} have other classes or time steps than {next(iter(parts))}: give folds with the same classes")

    def joined(field: str) -> dict[str, Any]:
        return {f"{name}/{recording}": value for name, part in parts.items() for recording, value in getattr(part, field).items()}

    return ScoredEvents(joined("scores"), first.step, first.classes, joined("ground_truth"), joined("durations"))


def measure(scored: ScoredEvents, temperature: float) -> dict[str, Any]:
    """How well calibrated scores agree with frequencies, and uncalibrated ones (`before`): of all time steps."""
    targets = step_targets(scored)
    found, before = (measure_calibration(step_logits(part), targets, exclusive=False) for part in (calibrated(scored, temperature), scored))
    return {"temperature": temperature, **found, "before": before}


def false_alarms(scored: ScoredEvents, settings: EventSettings) -> dict[str, Any]:
    """Events that these settings find in recordings without any: `per_hour`, `hours` of all recordings, and `by_class` their number."""
    by_class: Counter[str] = Counter()
    for name, values in scored.scores.items():
        events = find_events(values, scored.step, scored.classes, settings, scored.durations[name])
        by_class.update(event.label for event in events)
    hours = sum(scored.durations.values()) / 3600
    return {"per_hour": by_class.total() / hours, "hours": hours, "by_class": dict(by_class.most_common())}


@torch.inference_mode()
def tag_scores(
    network: SSLAMForAudioFrameClassification, extractor: SSLAMFeatureExtractor, folder: Path, names: Iterable[str]
) -> np.ndarray:
    """Scores of whole clips: `(clips, classes)`."""
    waveforms, scores = Waveforms(audio_column(folder, names), extractor.sampling_rate), []
    waveforms.check_unreadable(0.0, "evaluation")
    for start in range(0, len(waveforms), 16):
        clips = [waveforms[i] for i in range(start, min(start + 16, len(waveforms)))]
        inputs = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=True)
        scores.append(network(**inputs).clip_logits.sigmoid())
    return torch.cat(scores).numpy()


@torch.inference_mode()
def window_scores(
    network: SSLAMForAudioFrameClassification, extractor: SSLAMFeatureExtractor, rows: LabelledRows, window: float, hop: float
) -> ScoredEvents:
    """What a tagger gives in place of a detector: in a step of `hop` seconds the clip scores of the window around its middle, which is cut
    where the recording begins or ends."""
    rate = extractor.sampling_rate
    waveforms = Waveforms(rows.sources, rate)
    waveforms.check_unreadable(0.0, "evaluation")
    scores, durations = {}, {}
    for i, waveform in enumerate(waveforms):
        middles = np.arange(0.5 * hop, len(waveform) / rate, hop)
        cuts = np.clip(np.rint(rate * (middles[:, None] + [-window / 2, window / 2])).astype(int), 0, len(waveform))
        pieces = [waveform[start:end] for start, end in cuts]
        inputs = extractor(pieces, sampling_rate=rate, padding="longest", return_tensors="pt", return_attention_mask=True)
        scores[rows.name(i)] = network(**inputs).clip_logits.sigmoid().numpy()
        durations[rows.name(i)] = len(waveform) / rate
    events = {rows.name(i): [(one.onset, one.offset, one.label) for one in rows.labels.events(i)] for i in range(len(rows))}
    return ScoredEvents(scores, hop, network.config.class_names, events, durations)


def tables(results: Mapping[str, dict[str, Any]]) -> str:
    """Figures by fold and, with their intervals over folds, in the mean; then those of events by limit of false alarms."""

    def row(title: str, values: list[float], scale: float = 1, decimals: int = 3) -> list[str]:
        known = [value for value in values if not np.isnan(value)]
        texts = ["-" if np.isnan(value) else f"{scale * value:.{decimals}f}" for value in values]
        return [title, *texts, format_summary(summarize(known), scale, decimals)]

    def accuracy(title: str, found: list[dict[str, Any]]) -> list[str]:  # folds may agree by chance: at least the interval over clips
        values = [one["accuracy"] for one in found]
        over_clips = [proportion_interval(round(one["accuracy"] * one["clips"]), one["clips"]) for one in found]
        interval = widen_by_clips(summarize(values), values, over_clips, list(results))
        return [title, *(f"{100 * value:.1f}" for value in values), format_summary(interval)]

    folds = list(results.values())
    subsets = [name for name, found in folds[0]["tags"].items() if isinstance(found, dict)]
    rows = [accuracy("accuracy, %", [found["tags"] for found in folds])]
    rows += [accuracy(f"accuracy, {name}, %", [found["tags"][name] for found in folds]) for name in subsets]
    rows.append(row("temperature", [found["calibration"]["temperature"] for found in folds], 1, 2))
    for title, calibrations in (("before", [found["calibration"]["before"] for found in folds]), ("", [f["calibration"] for f in folds])):
        rows.append(row(f"calibration error {title}".rstrip(), [one["expected_calibration_error"] for one in calibrations]))
    for limit in folds[0]["events"]:
        events = [found["events"][limit] for found in folds]
        about = f"limit {limit}"
        for metric in ("segment_f1", "collar_f1", "psds1", "psds1_macro", "psds2"):
            rows.append(row(f"{about}: {metric}", [found["metrics"][metric] for found in events]))
        rows.append(row(f"{about}: false alarms an hour, mixtures", [found["false_alarms"]["per_hour"] for found in events], 1, 0))
        for name in dict.fromkeys(name for one in events for name in one["false_alarms_of_others"]):  # a fold may have no such clips
            of_others = [one["false_alarms_of_others"].get(name, {"per_hour": np.nan})["per_hour"] for one in events]
            rows.append(row(f"{about}: false alarms an hour, {name}", of_others, 1, 0))
    return markdown_table(["", *(f"fold {fold}" for fold in results), "mean ± standard deviation [95 %]"], rows)


def table_of_windows(results: Mapping[str, dict[str, Any]]) -> str:
    """The detector, sliding windows, and the detector's gain over them fold by fold: mean over folds [95 %] of each metric in all mixtures,
    and in those with 1, 2, ... sounds at once."""
    folds = [found["windows"] for found in results.values()]
    numbers = [number for number in folds[0]["detector"]["by_overlap"] if all(number in found["detector"]["by_overlap"] for found in folds)]

    def values(name: str, metric: str, number: str | None) -> np.ndarray:
        return np.array([(found[name]["by_overlap"][number] if number else found[name]["metrics"])[metric] for found in folds])

    def cell(differences: np.ndarray) -> str:
        known = differences[~np.isnan(differences)]
        return format_summary(summarize(known), 1, 3) if len(known) else "-"

    rows = []
    for metric in ("segment_f1", "collar_f1", "psds1", "psds1_macro", "psds2"):
        for name in folds[0]:
            rows.append([f"{metric}, {name}", *(cell(values(name, metric, number)) for number in (None, *numbers))])
        for name in list(folds[0])[1:]:
            gains = (cell(values("detector", metric, number) - values(name, metric, number)) for number in (None, *numbers))
            rows.append([f"{metric}, gain over {name}", *gains])
    return markdown_table(["", "all", *(f"{number} at once" for number in numbers)], rows)
