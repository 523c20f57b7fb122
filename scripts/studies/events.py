"""Event detection on mixtures of single sounds: a pre-trained and a new network, sliding-window tagging, and log-mel statistics.

python scripts/studies/events.py --data_dir PATH/TO/esc --model runs/tiny/stage2/model --train_folds 1 2 3 --test_folds 4 \
    --classes dog cat --train_backgrounds '[{kind: folder, path: PATH/TO/backgrounds/train}]' \
    --test_backgrounds '[{kind: folder, path: PATH/TO/backgrounds/test}]'

All are trained on mixtures of the training folds, made anew in each epoch (statistics: on fixed ones), tuned on fixed mixtures of the same
folds for each metric by itself, once with median filters alone and once with change filters too, and tested on mixtures of the test folds:
PSDS, segment-based and collar-based F1 with bootstrap intervals over clips, also by the number of simultaneous sounds. Finished steps are
found again.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import LabelledRows, read_rows
from transformers_sslam.configuration_sslam import ENCODER_FIELDS
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.event_results import evaluate_events
from transformers_sslam.evaluation.event_tuning import CHANGE_LENGTHS, TunedMetric, tune_events
from transformers_sslam.evaluation.scored_events import ScoredEvents, score_events
from transformers_sslam.files import write_json
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import MixtureSettings
from transformers_sslam.polyphony.sounds import SourceSettings
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, read_settings, setting, settings_dict


NATIVE = 6.25  # steps in a second
TAGGING_WINDOWS = (0.64, 1.28, 2.56)  # seconds
CONTEXT = 3  # steps on each side, whose statistics the baseline has beside those of the step
METRICS = {"segment_f1": "segment F1", "collar_f1": "collar F1", "psds1": "PSDS1", "psds1_macro": "PSDS1 macro", "psds2": "PSDS2"}
TUNED_FOR: dict[str, TunedMetric] = {
    "segment_f1": "segment",
    "collar_f1": "collar",
    "psds1": "psds",
    "psds1_macro": "psds",
    "psds2": "psds",
}


@dataclass(kw_only=True)
class StudySettings(SourceSettings):
    """Study of event detection"""

    model: str = setting("pre-trained encoder, which has not seen the test folds")
    output_dir: str = setting("folder for all models and results", "runs/events")
    recipe: str = setting("recipe of the fine-tuning", "finetune_tiny_events")
    finetuning: dict[str, Any] = setting("changes to it, by name", {})
    scratch_learning_rate: float = setting("of the network that is not pre-trained, the same for all layers", 1e-3)
    steps_per_second: list[float] = setting("of the detectors", [6.25, 12.5, 25.0])
    num_events: list[int] = setting("numbers of events of a mixture", [1, 2, 3, 4])
    train_clips: int = setting("fixed training mixtures for each number of events; an epoch has as many", 400)
    test_clips: int = setting("test mixtures for each number of events", 60)
    clip_seconds: float = setting("length of a mixture: fills the model's input", 5.135)
    tuning_clips: int = setting("training mixtures on which thresholds and median filters are chosen", 400)


def make_mixtures(settings: StudySettings) -> Path:
    """Mixtures of the training folds and of the test folds."""
    output = Path(settings.output_dir) / "mixtures"
    if not output.exists():
        sources: dict[str, Any] = {name: getattr(settings, name) for name in SourceSettings.__dataclass_fields__}
        rules = MixtureSettings(clip_seconds=settings.clip_seconds, overlap="anywhere")
        clips: dict[str, Any] = {"train_clips": settings.train_clips, "test_clips": settings.test_clips, "num_events": settings.num_events}
        make_benchmark(BenchmarkSettings(**sources, **clips, output_dir=str(output), mixing=rules))
    return output


def fine_tuned(settings: StudySettings, mixtures: Path, name: str, **changes: Any) -> Path:
    """A model trained on mixtures that are made anew in each epoch."""
    keep = {settings.fold_column: settings.train_folds, settings.label_column: settings.classes}
    sounds = [{"kind": settings.layout, "path": settings.data_dir, "keep": {key: values for key, values in keep.items() if key and values}}]
    fixed = {
        "data_dir": str(mixtures),
        "layout": "parquet",
        "output_dir": str(Path(settings.output_dir) / name),
        "do_eval": False,
        "seed": settings.seed,
        "mixing.sounds": sounds,
        "mixing.label_column": settings.label_column,
        "mixing.backgrounds": [asdict(source) for source in settings.train_backgrounds],
        "mixing.num_events": [0, *settings.num_events],
    }
    run = read_settings(FineTuningSettings, settings.recipe, {**settings.finetuning, **fixed, **changes})
    fine_tune_once(run)
    return Path(run.output_dir)


def detector_scores(model: Path, rows: LabelledRows) -> ScoredEvents:
    """Scores of each time step, by the model itself."""
    network = SSLAMForAudioFrameClassification.from_pretrained(model)
    return score_events(network, SSLAMFeatureExtractor.from_pretrained(model), rows, batch_size=16).events


def tagging_scores(model: Path, rows: LabelledRows, window: float) -> ScoredEvents:
    """Scores of windows that slide by one native step; a step has those of the window whose centre is nearest."""
    network, extractor = SSLAMForAudioClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)

    def score(waveform: np.ndarray) -> np.ndarray:
        found = network.score_over_time(waveform, extractor, window=window, hop=1 / NATIVE, batch_size=32)
        steps = (np.arange(-(-len(waveform) // (extractor.sampling_rate / NATIVE))) + 0.5) / NATIVE
        return found.scores[np.searchsorted(found.edges[1:-1], steps)]

    return _scored(rows, network.config.class_names, score)


def statistics_scores(probe: Pipeline, extractor: SSLAMFeatureExtractor, rows: LabelledRows, classes: list[str]) -> ScoredEvents:
    """Scores of a linear probe on log-mel statistics of each native step."""
    return _scored(rows, classes, lambda waveform: probe.predict_proba(step_statistics(waveform, extractor)))


def fit_statistics(extractor: SSLAMFeatureExtractor, rows: LabelledRows, classes: list[str], most: int = 1000) -> Pipeline:
    """Logistic regression of each class on `step_statistics`; a step has a class that covers at least half of it."""
    labels, features, targets = rows.encode(classes), [], []
    chosen = np.random.default_rng(0).permutation(len(rows))[:most]
    waveforms = Waveforms(rows.sources.select(chosen), extractor.sampling_rate)
    waveforms.check_unreadable(0.0, "training")
    for i, waveform in zip(chosen, waveforms):
        features.append(step_statistics(waveform, extractor))
        targets.append(labels.step_targets(int(i), 1 / NATIVE, len(features[-1])) >= 0.5)
    probe = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.01, max_iter=300)))
    return probe.fit(np.concatenate(features), np.concatenate(targets).astype(int))


def step_statistics(waveform: np.ndarray, extractor: SSLAMFeatureExtractor) -> np.ndarray:
    """Mean and standard deviation over time of each mel bin, in a step and around it: `(steps, 4 * mel bins)`."""
    values = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"][0]
    frames = round(100 / NATIVE)
    steps = -(-len(waveform) // (extractor.sampling_rate * frames // 100))
    values = values[: len(values) // frames * frames].unflatten(0, (-1, frames))[:steps]
    padded = torch.cat((values[:1].expand(CONTEXT, -1, -1), values, values[-1:].expand(CONTEXT, -1, -1)))
    around = padded.unfold(0, 2 * CONTEXT + 1, 1).permute(0, 3, 1, 2).flatten(1, 2)
    return torch.cat((values.mean(1), values.std(1), around.mean(1), around.std(1)), dim=1).numpy()


def _scored(rows: LabelledRows, classes: list[str], score: Callable[[np.ndarray], np.ndarray]) -> ScoredEvents:
    waveforms = Waveforms(rows.sources, 16_000)
    waveforms.check_unreadable(0.0, "scored")
    names = [rows.name(i) for i in range(len(rows))]
    return ScoredEvents(
        scores={name: score(waveform) for name, waveform in zip(names, waveforms)},
        step=1 / NATIVE,
        classes=classes,
        ground_truth={name: [(e.onset, e.offset, e.label) for e in rows.labels.events(i)] for i, name in enumerate(names)},
        durations={name: len(waveform) / 16_000 for name, waveform in zip(names, waveforms)},
    )


def methods(settings: StudySettings, mixtures: Path, classes: list[str]) -> Iterator[tuple[str, Callable[[LabelledRows], ScoredEvents]]]:
    """Each method's name, and what gives its scores of mixtures."""
    config, given = SSLAMConfig.from_pretrained(settings.model), SSLAMFeatureExtractor.from_pretrained(settings.model)
    scratch: dict[str, Any] = {  # the same network and input
        "model_config": {name: getattr(config, name) for name in ENCODER_FIELDS},
        "max_length": given.max_length,
        "normalization": [given.mean, given.std],
        "learning_rate": settings.scratch_learning_rate,
    }
    for rate in settings.steps_per_second:
        for start, own in {"pre-trained": {"model": settings.model, "model_config": {}}, "from scratch": scratch}.items():
            folder = f"detector-{start.replace(' ', '-')}-{rate:g}"
            changes = {**own, "model_config": {**own["model_config"], "drop_path_rate": 0.1, "steps_per_second": rate}}
            yield f"detector, {start}, {1000 / rate:.0f} ms", partial(detector_scores, fine_tuned(settings, mixtures, folder, **changes))
    tagger = fine_tuned(
        settings,
        mixtures,
        "tagger",
        task="classification",
        label_column="labels",
        model=settings.model,
        model_config={"drop_path_rate": 0.1, "classifier_pooling": "mean"},
    )
    for window in TAGGING_WINDOWS:
        yield f"tagging, pre-trained, windows of {window:g} s", partial(tagging_scores, tagger, window=window)
    probe = fit_statistics(given, read_rows(open_splits(str(mixtures), "parquet")["train"], "events"), classes)
    yield "log-mel statistics, linear", partial(statistics_scores, probe, given, classes=classes)


def run(settings: StudySettings) -> str:
    """All methods, and a table."""
    mixtures, results = make_mixtures(settings), dict[str, Any]()
    splits = open_splits(str(mixtures), "parquet")
    train, test = (read_rows(splits[name], "events") for name in ("train", "test"))
    tuning = train.select(np.sort(np.random.default_rng(settings.seed).permutation(len(train))[: settings.tuning_clips]))
    for name, score in methods(settings, mixtures, sorted(train.labels.names)):
        scored = score(tuning), score(test)
        for filters, lengths in {"median filters": (), "median or change filters": CHANGE_LENGTHS}.items():
            found = results[f"{name}, {filters}"] = evaluate(*scored, lengths)
            write_json(Path(settings.output_dir) / "results.json", {"settings": settings_dict(settings), "methods": results})
            print(name, filters, json.dumps({metric: round(found["metrics"][metric], 3) for metric in METRICS}), flush=True)
    return tables(results)


def evaluate(tuning: ScoredEvents, test: ScoredEvents, change_lengths: Sequence[float] = ()) -> dict[str, Any]:
    """What [`evaluate_events`] gives, each metric with the filters and thresholds that were tuned for it."""
    found = {metric: tune_events(*tuning, change_lengths=change_lengths, metric=metric) for metric in sorted(set(TUNED_FOR.values()))}
    by_tuning = {metric: evaluate_events(*test, settings=settings) for metric, settings in found.items()}

    def chosen(*path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, metric in TUNED_FOR.items():
            source = reduce(getitem, path, by_tuning[metric])
            values |= {key: source[key] for key in (name, f"{name}_interval") if key in source}
        return values

    return {
        "event_detection": {metric: asdict(settings) for metric, settings in found.items()},
        "metrics": chosen("metrics"),
        "per_class": {label: chosen("per_class", label) for label in test.classes},
        "by_overlap": {
            number: {"recordings": group["recordings"], **chosen("by_overlap", number)}
            for number, group in by_tuning["segment"]["by_overlap"].items()
        },
    }


def tables(results: dict[str, Any]) -> str:
    """Every metric with its interval, and segment F1 by the number of simultaneous sounds."""

    def cell(values: dict[str, Any], metric: str) -> str:
        low, high = values[f"{metric}_interval"]
        return f"{values[metric]:.3f} [{low:.3f}, {high:.3f}]"

    rows = [[name, *(cell(found["metrics"], metric) for metric in METRICS)] for name, found in results.items()]
    overlaps = sorted({number for found in results.values() for number in found["by_overlap"]})
    by_overlap = [
        [name, *(cell(found["by_overlap"][number], "segment_f1") for number in overlaps if number in found["by_overlap"])]
        for name, found in results.items()
    ]
    titles = [f"segment F1, {number} at once" for number in overlaps]
    return markdown_table(["", *METRICS.values()], rows) + "\n\n" + markdown_table(["", *titles], by_overlap)


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        print(run(parse_settings(StudySettings, sys.argv[1:], prog="events.py", description=__doc__)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
