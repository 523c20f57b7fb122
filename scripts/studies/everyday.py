"""The model to ship, sslam-small-everyday: tags and events of everyday sounds, from clips whose licences allow it.

python scripts/studies/everyday.py --data_dir PATH/TO/esc --free_dir PATH/TO/free --test_folds 4      # evaluate: fold 4 held out
python scripts/studies/everyday.py --data_dir PATH/TO/esc --free_dir PATH/TO/free --test_folds '[]'   # the model itself, of all folds
python scripts/studies/everyday.py --data_dir PATH/TO/esc --free_dir PATH/TO/free --test_folds '[]' --tuning_folds 1 2 3 4  # its thresholds

Pre-training in both stages without labels, of the training folds and the further recordings; then event detection, of mixtures that are
made anew in each epoch and of the clips themselves. Nothing of the held-out folds is in either. Finished steps are found again.

Thresholds that are tuned on what a model has learnt are too low for what it has not. With `tuning_folds` a further model is trained without
each of them, on the mixtures of which it then gives scores; thresholds are tuned on these of all folds together, and go into the model.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from events import detector_scores
from events import evaluate as evaluate_events_of
from steps import pretrain_once

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import AudioColumn, read_rows
from transformers_sslam.audio.sources import SourceSettings
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.detector import write_event_detection
from transformers_sslam.evaluation.event_results import evaluate_events
from transformers_sslam.evaluation.event_tuning import CHANGE_LENGTHS, tune_events
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.events_sslam import EventSettings
from transformers_sslam.files import write_folder_atomically, write_json
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import FRAMES_PER_SECOND, MixtureSettings, find_sound
from transformers_sslam.polyphony.sounds import open_table
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.settings import parse_settings, read_settings, setting, settings_dict


OTHERS = 4  # classes that sounds of other kinds share, so that they are about a fifth of the events of mixtures, but without labels


@dataclass
class StudySettings:
    """The model to ship"""

    data_dir: str = setting("audio folder of the labelled clips, with the columns label, fold, recording and license")
    free_dir: str = setting("audio folder of further recordings, for pre-training")
    output_dir: str = setting("folder for all models and results", "runs/everyday")
    test_folds: list[int | str] = setting("folds that are held out; empty: none", [])
    tuning_folds: list[int | str] = setting("folds to tune thresholds on, each by a model without it; empty: on mixtures of all", [])
    max_false_alarms: float | None = setting("most false alarms an hour, in mixtures of tuning_folds and in others; null: any", None)
    tune_change_filter: bool = setting("on mixtures of tuning_folds try change filters too", False)
    seed: int = setting("random seed of the whole run", 0)
    licenses: list[str] = setting("licences of clips that are trained on", ["CC0", "CC-BY"])
    clips_of_a_class: int = setting("clips of each class that is learnt; those of other classes are learnt to be none of them", 32)
    backgrounds: list[dict[str, Any]] = setting("recordings to lay below mixtures, without the sounds that are learnt", [])
    test_backgrounds: list[dict[str, Any]] = setting("others, to lay below mixtures of the held-out folds", [])
    others: list[dict[str, Any]] = setting("recordings without the learnt sounds, in which events are false alarms", [])
    subsets: list[str] = setting("columns that are True for clips of some classes, which are also compared among themselves", ["esc10"])
    num_events: list[int] = setting("numbers of sounds of a mixture to test on", [1, 2, 3, 4])
    mixtures: int = setting("mixtures for each of them, and as many to tune thresholds on", 150)
    clip_seconds: float = setting("their length", 5.135)
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage", "pretrain_tiny_stage2")
    finetuning_recipe: str = setting("recipe of the fine-tuning", "finetune_everyday")
    pretraining: dict[str, Any] = setting("changes to both recipes of pre-training, by name", {})
    pretraining_stage2: dict[str, Any] = setting("further changes to that of the second stage", {})
    finetuning: dict[str, Any] = setting("changes to the recipe of fine-tuning, by name", {})

    def __post_init__(self):
        if both := sorted(set(map(str, self.tuning_folds)) & set(map(str, self.test_folds))):
            raise UserError(f"the fold {both[0]} is in tuning_folds and in test_folds: thresholds must not be tuned on what tests them")
        if self.max_false_alarms is not None and not self.tuning_folds:
            raise UserError(f"max_false_alarms is {self.max_false_alarms:g}, but has no effect without tuning_folds: set both, or neither")
        if self.tune_change_filter and not self.tuning_folds:
            raise UserError("tune_change_filter is set, but has no effect without tuning_folds: set both, or neither")


def copy_sounds(settings: StudySettings) -> Path:
    """The clips that may be trained on, with the events in them: each from where it first sounds to where it last does."""
    output, folder = Path(settings.output_dir) / "sounds", Path(settings.data_dir)
    if output.exists():
        return output
    table = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False)
    numbers = Counter(table["label"])
    table = table[table["license"].isin(settings.licenses)].reset_index(drop=True)
    waveforms = Waveforms(AudioColumn(_audio(folder, table["file_name"])), 16_000)
    waveforms.check_unreadable(0.0, "training")
    rules, events, sounds = MixtureSettings(), [], []
    for i, waveform in enumerate(waveforms):
        sound = find_sound(waveform, i, table["label"][i], rules)
        label, found = table["label"][i], []
        if sound is not None and numbers[label] == settings.clips_of_a_class:
            onset = sound.start / 16_000
            found.append({"onset": onset, "offset": onset + len(sound.power) / FRAMES_PER_SECOND, "label": label})
        events.append(json.dumps(found))
        sounds.append(label if found else f"other {i % OTHERS}")
    with write_folder_atomically(output) as unfinished:
        for name in table["file_name"]:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, unfinished / name)
        table.assign(events=events, sound=sounds).to_csv(unfinished / "metadata.csv", index=False)
    return output


def _audio(folder: Path, names: Any) -> datasets.Dataset:
    column = datasets.Features({"audio": datasets.Audio(decode=False)})
    return datasets.Dataset.from_dict({"audio": [str(folder / name) for name in names]}, features=column)


def train(settings: StudySettings) -> Path:
    """Both stages of pre-training and the fine-tuning. Returns the model's folder."""
    sounds = copy_sounds(settings)
    name = "-".join(map(str, settings.test_folds)) or "none"
    output = Path(settings.output_dir) / f"without-{name}-seed-{settings.seed}"
    folds = sorted(set(pd.read_csv(sounds / "metadata.csv", dtype=str)["fold"]) - set(map(str, settings.test_folds)))
    clips = {"kind": "audiofolder", "path": str(sounds), "keep": {"fold": folds}}
    fixed = {"data.sources": [clips, {"kind": "audiofolder", "path": settings.free_dir}], "seed": settings.seed, **settings.pretraining}
    first, _ = pretrain_once(read_settings(PreTrainingSettings, settings.stage1, {**fixed, "output_dir": str(output / "stage1")}))
    own = {**settings.pretraining_stage2, "model": str(first), "output_dir": str(output / "stage2")}
    second, _ = pretrain_once(read_settings(PreTrainingSettings, settings.stage2, {**fixed, **own}))
    run = read_settings(
        FineTuningSettings,
        settings.finetuning_recipe,
        {
            "data_dir": str(sounds),
            "model": str(second),
            "output_dir": str(output / "model"),
            "fold_column": "fold",
            "train_folds": folds,
            "do_eval": False,
            "seed": settings.seed,
            "mixing.sounds": [clips],
            "mixing.label_column": "sound",
            "mixing.backgrounds": settings.backgrounds,
            **settings.finetuning,
        },
    )
    fine_tune_once(run)
    return Path(run.output_dir)


@torch.inference_mode()
def tag_scores(model: Path, folder: Path, names: Sequence[str]) -> np.ndarray:
    """Scores of whole clips: `(clips, classes)`."""
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    waveforms, scores = Waveforms(AudioColumn(_audio(folder, names)), extractor.sampling_rate), []
    for start in range(0, len(names), 16):
        clips = [waveforms[i] for i in range(start, min(start + 16, len(names)))]
        inputs = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=True)
        scores.append(network(**inputs).clip_logits.sigmoid())
    return torch.cat(scores).numpy()


def evaluate_tags(settings: StudySettings, model: Path) -> dict[str, Any]:
    """Accuracy on the clips of the learnt classes in the held-out folds, under any licence; what is taken for what; other clips' scores."""
    table = pd.read_csv(Path(settings.data_dir) / "metadata.csv", dtype=str, keep_default_na=False)
    table["learnt"] = table["label"].map(table["label"].value_counts()) == settings.clips_of_a_class
    table = table[table["fold"].isin(list(map(str, settings.test_folds)))].reset_index(drop=True)
    classes = SSLAMForAudioFrameClassification.from_pretrained(model).config.class_names
    scores = tag_scores(model, Path(settings.data_dir), table["file_name"])
    learnt = table["learnt"].to_numpy()
    truth = np.array([classes.index(label) for label in table["label"][learnt]])
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (truth, scores[learnt].argmax(1)), 1)
    found: dict[str, Any] = {"clips": len(truth), "accuracy": float(np.mean(scores[learnt].argmax(1) == truth))}
    for column in settings.subsets:  # classes among themselves
        members = [i for i, name in enumerate(classes) if (table[column][learnt & (table["label"] == name)] == "True").any()]
        inside = np.isin(truth, members)
        chosen = np.array(members)[scores[learnt][inside][:, members].argmax(1)]
        found[column] = {"clips": int(inside.sum()), "accuracy": float(np.mean(chosen == truth[inside]))}
    others = scores[~learnt].max(1) if (~learnt).any() else np.zeros(0)
    return {**found, "classes": classes, "confusion": confusion.tolist(), "highest_scores_of_others": np.sort(others).tolist()}


def mixture_scores(settings: StudySettings, model: Path, split: str) -> ScoredEvents:
    """Scores of a model on mixtures of the held-out folds (`split` test), or of the others (train)."""
    sounds = Path(settings.output_dir) / "sounds"
    classes = SSLAMForAudioFrameClassification.from_pretrained(model).config.class_names
    output = Path(settings.output_dir) / f"mixtures-{'-'.join(map(str, settings.test_folds))}"
    if not output.exists():
        folds = sorted(set(pd.read_csv(sounds / "metadata.csv", dtype=str)["fold"]) - set(map(str, settings.test_folds)))
        options: dict[str, Any] = {"data_dir": str(sounds), "fold_column": "fold", "train_folds": folds, "classes": classes}
        options |= {"test_folds": settings.test_folds, "group_column": "recording", "train_backgrounds": settings.backgrounds}
        options |= {"test_backgrounds": settings.test_backgrounds, "num_events": settings.num_events, "train_clips": settings.mixtures}
        options |= {"test_clips": settings.mixtures}
        rules = MixtureSettings(clip_seconds=settings.clip_seconds, overlap="anywhere")
        make_benchmark(BenchmarkSettings(**options, output_dir=str(output), mixing=rules))
    return detector_scores(model, read_rows(open_splits(str(output), "parquet")[split], "events"))


def tune_by_cross_validation(settings: StudySettings) -> EventSettings:
    """Thresholds and filters of the highest mean segment F1, with at most `max_false_alarms` an hour, on scores of all `tuning_folds`.

    Each fold's scores are of a model that has learnt from neither this fold nor the test folds: of mixtures of the fold, and of `others`,
    in which every event is a false alarm.
    """
    parts: dict[str, ScoredEvents] = {}
    alone = replace(settings, tuning_folds=[], max_false_alarms=None, tune_change_filter=False)
    for fold in settings.tuning_folds:
        model = train(replace(alone, test_folds=[*settings.test_folds, fold]))
        parts[f"mixtures of fold {fold}"] = mixture_scores(replace(alone, test_folds=[fold]), model, "test")
        parts[f"others without fold {fold}"] = other_scores(settings, model)
    changes = CHANGE_LENGTHS if settings.tune_change_filter else ()
    return tune_events(*join_scores(parts), change_lengths=changes, max_false_alarms=settings.max_false_alarms)


def join_scores(parts: Mapping[str, ScoredEvents]) -> ScoredEvents:
    """The recordings of all parts, whose names begin with that of the part."""
    first = next(iter(parts.values()))
    if different := [name for name, part in parts.items() if (part.step, part.classes) != (first.step, first.classes)]:
        raise UserError(f"{different[0]} have other classes or time steps than {next(iter(parts))}: give folds with the same classes")

    def joined(field: str) -> dict[str, Any]:
        return {f"{name}/{recording}": value for name, part in parts.items() for recording, value in getattr(part, field).items()}

    return ScoredEvents(joined("scores"), first.step, first.classes, joined("ground_truth"), joined("durations"))


def other_scores(settings: StudySettings, model: Path) -> ScoredEvents:
    """Scores of a model on all recordings of `others`, without events."""
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    scores: dict[str, np.ndarray] = {}
    durations: dict[str, float] = {}
    for source in map(SourceSettings.of, settings.others):
        waveforms = Waveforms(AudioColumn(open_table(source)), extractor.sampling_rate)
        waveforms.check_unreadable(0.0, "evaluation")
        for i, waveform in enumerate(waveforms):
            found = network.score_steps(waveform, extractor)
            scores[f"{source.name} {i}"], durations[f"{source.name} {i}"] = found.scores, found.duration
    return ScoredEvents(scores, network.config.frames_per_step / 100, network.config.class_names, {name: [] for name in scores}, durations)


def count_false_alarms(settings: StudySettings, model: Path, event_detection: dict[str, Any]) -> dict[str, Any]:
    """Events that are detected, with these settings, in recordings without the learnt sounds: in an hour, and by class in all."""
    network, extractor = SSLAMForAudioFrameClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    found: dict[str, Any] = {}
    for source in map(SourceSettings.of, settings.others):
        waveforms = Waveforms(AudioColumn(open_table(source)), extractor.sampling_rate)
        waveforms.check_unreadable(0.0, "evaluation")
        events = Counter(event.label for waveform in waveforms for event in network.detect(waveform, extractor, **event_detection))
        hours = sum(len(waveform) for waveform in waveforms) / extractor.sampling_rate / 3600
        found[source.name] = {"hours": hours, "an_hour": events.total() / hours, "by_class": dict(events.most_common())}
    return found


def run(settings: StudySettings) -> dict[str, Any]:
    """The model and, of held-out folds, its results."""
    model = train(settings)
    tuned = tune_by_cross_validation(settings) if settings.tuning_folds else None
    if not settings.test_folds:
        if tuned is not None:
            write_event_detection(model, tuned)
        return {}
    test = mixture_scores(settings, model, "test")
    results: dict[str, Any] = {"tags": evaluate_tags(settings, model)}
    if tuned is None:  # filters and thresholds of mixtures of the folds that the model has learnt
        results["events"] = evaluate_events_of(mixture_scores(settings, model, "train"), test)
        chosen = results["events"]["event_detection"]["segment"]
    else:
        chosen = asdict(tuned)
        results["events"] = {"event_detection": {"segment": chosen}, **evaluate_events(*test, tuned)}
    results["false_alarms"] = count_false_alarms(settings, model, chosen)
    write_json(model.parent / "results.json", {"settings": settings_dict(settings), **results})
    return results


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="everyday.py", description=__doc__)
        results = run(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    if results:
        tags, alarms = results["tags"], results["false_alarms"]
        print(f"{100 * tags['accuracy']:.1f} % of {tags['clips']} clips; {results['events']['metrics']}")
        print("false alarms an hour:", {name: round(found["an_hour"], 1) for name, found in alarms.items()})


if __name__ == "__main__":
    main()
