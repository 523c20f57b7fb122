"""The model to ship, sslam-small-everyday: tags and events of everyday sounds, from clips whose licences allow it.

python scripts/studies/everyday.py --data_dir PATH/TO/esc --encoder PATH/TO/MODEL             # of recordings without labels
python scripts/studies/everyday.py --data_dir PATH/TO/esc --free_dir PATH/TO/free             # with pre-training of each model

A model is trained without each fold, and tested on it: event detection, of mixtures that are made anew in each epoch and of the clips
themselves. Clips of other classes, and the sounds of `others`, such as speech and tunes of scripts/studies/sets.py, are learnt to be none
of the classes. The temperature of the scores and the thresholds and filters of each class are chosen by scores of the other models, each on
the fold that it has not learnt: on what a model has learnt they would be too low. (These models have learnt the fold that is tested, so the
choice is not wholly independent of it; with a model for each pair of folds it would be, at twice the cost.) Then the model itself is
trained on all folds, with those that all of them choose together. Without `encoder` each model is first pre-trained in both stages, on its
folds and on the recordings of `free_dir`.

Finished steps are found again, so that other limits of false alarms cost no training.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import transformers
from events import evaluate as evaluate_tuned
from everyday_scores import (
    audio_column,
    calibrated,
    false_alarms,
    join_scores,
    load,
    measure,
    score_without_events,
    table_of_windows,
    tables,
    tag_scores,
    window_scores,
)
from steps import pretrain_both_stages

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import AudioColumn, read_rows
from transformers_sslam.audio.sources import SourceSettings
from transformers_sslam.errors import UserError, as_user_error
from transformers_sslam.evaluation.calibration import (
    describe_calibration,
    fit_temperature,
    replace_diagram,
    scale_head,
    write_calibration,
)
from transformers_sslam.evaluation.detector import HEAD, step_logits, step_targets, write_event_detection
from transformers_sslam.evaluation.event_results import evaluate_events
from transformers_sslam.evaluation.event_tuning import CHANGE_LENGTHS, check_limit, tune_events
from transformers_sslam.evaluation.scored_events import ScoredEvents, score_events
from transformers_sslam.events_sslam import EventSettings
from transformers_sslam.files import read_json, write_folder_atomically, write_json
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import FRAMES_PER_SECOND, MixtureSettings, find_sound
from transformers_sslam.polyphony.sounds import open_table
from transformers_sslam.publishing.hub import RECORDS
from transformers_sslam.settings import parse_settings, read_settings, setting, settings_dict


NO_LIMIT = "none"
NATIVE_STEP = 0.16  # seconds, of the encoder's patches
# In a folder that another run has begun.
MAY_CHANGE = {"output_dir", "folds", "max_false_alarms", "seed", "test_others", "subsets", "windows"}


@dataclass
class StudySettings:
    """The model to ship"""

    data_dir: str = setting("audio folder of the labelled clips, with the columns label, fold, recording and license")
    free_dir: str | None = setting("audio folder of further recordings, for pre-training", None)
    encoder: str | None = setting("model to fine-tune, pre-trained without the labelled clips; null: pre-train one for each model", None)
    output_dir: str = setting("folder for all models and results", "runs/everyday")
    folds: list[int | str] = setting("folds that are held out in turn", [1, 2, 3, 4])
    max_false_alarms: list[float] = setting(
        "limits of false alarms an hour, in mixtures, clips of other classes and `others` together; the last is the model's", []
    )
    seed: int = setting("random seed of the whole run", 0)
    licenses: list[str] = setting("licences of clips that are trained on", ["CC0", "CC-BY"])
    clips_of_a_class: int = setting("clips of each class that is learnt; those of other classes are learnt to be none of them", 32)
    other_classes: int = setting("number of classes that sounds of others share, so that mixtures have as many of them", 4)
    backgrounds: list[dict[str, Any]] = setting("recordings to lay below mixtures, without the sounds that are learnt", [])
    test_backgrounds: list[dict[str, Any]] = setting("others, to lay below mixtures of the held-out folds", [])
    others: list[str] = setting("audio folders of further sounds, with label, fold and recording, that are learnt to be none of them", [])
    test_others: list[dict[str, Any]] = setting("recordings without the learnt sounds, in which events are false alarms", [])
    subsets: list[str] = setting("columns that are True for clips of some classes, which are also compared among themselves", ["esc10"])
    num_events: list[int] = setting("numbers of sounds of a mixture to test on", [1, 2, 3, 4])
    mixtures: int = setting("mixtures of a held-out fold for each of them", 150)
    clip_seconds: float = setting("their length", 5.135)
    windows: list[float] = setting(
        "seconds of windows whose tags, one window for each time step of the encoder, events are compared with", []
    )
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage", "pretrain_tiny_stage2")
    finetuning_recipe: str = setting("recipe of the fine-tuning", "finetune_everyday")
    pretraining: dict[str, Any] = setting("changes to both recipes of pre-training, by name", {})
    pretraining_stage2: dict[str, Any] = setting("further changes to that of the second stage", {})
    finetuning: dict[str, Any] = setting("changes to the recipe of fine-tuning, by name", {})

    def __post_init__(self):
        if len(set(map(str, self.folds))) < 2:
            raise UserError(f"folds are {self.folds}, but thresholds for one are chosen on the others: give two or more")
        if (self.encoder is None) == (self.free_dir is None):
            raise UserError(f"encoder is {self.encoder} and free_dir {self.free_dir}: give one, a model or recordings to pre-train on")
        if bool(self.backgrounds) != bool(self.test_backgrounds):
            raise UserError("backgrounds or test_backgrounds is empty, but not both: give other recordings for each, or none")
        with as_user_error("max_false_alarms"):
            for limit in self.max_false_alarms:
                check_limit(limit)
        if short := [window for window in self.windows if not window >= NATIVE_STEP]:
            raise UserError(f"windows has {short[0]:g}, but numbers of seconds of at least {NATIVE_STEP:g} are expected")
        further = [Path(folder).resolve().name for folder in self.others]
        for option, names in (("others", further), ("test_others", [SourceSettings.of(source).name for source in self.test_others])):
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{option} has two folders of the name {twice[0]}: give each a name of its own")


def read_table(folder: str | Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """`metadata.csv` of an audio folder. Raises a `UserError` if there is none, or it lacks one of these columns."""
    if not (Path(folder) / "metadata.csv").is_file():
        raise UserError(f"{folder} has no metadata.csv: give an audio folder of labelled clips")
    table = pd.read_csv(Path(folder) / "metadata.csv", dtype=str, keep_default_na=False)
    if absent := [name for name in ("file_name", *columns) if name not in table]:
        raise UserError(f"{folder} has no column {absent[0]}, only {', '.join(table)}")
    return table


def check_data(settings: StudySettings) -> None:
    """Raise a `UserError` if clips lack a column or a fold, or `output_dir` holds what was made by other settings."""
    table = read_table(settings.data_dir, ("label", "fold", "recording", "license", *settings.subsets))
    for folder in settings.others:
        further = read_table(folder, ("label", "fold", "recording"))
        if known := sorted(set(further["label"]) & set(table["label"])):
            raise UserError(f"others have {known[0]} too ({folder}), which {settings.data_dir} has: give sounds of other labels")
        if not set(further["fold"]) & set(table["fold"]):
            raise UserError(f"{folder} has no clip in the folds of {settings.data_dir}, {', '.join(sorted(set(table['fold'])))}")
    if absent := sorted(set(map(str, settings.folds)) - set(table["fold"])):
        raise UserError(f"{settings.data_dir} has no fold {absent[0]}, only {', '.join(sorted(set(table['fold'])))}")
    record = Path(settings.output_dir) / "settings.json"
    mine = json.loads(json.dumps({name: value for name, value in settings_dict(settings).items() if name not in MAY_CHANGE}))
    if record.exists():
        former = read_json(record)
        if different := sorted(name for name in mine if former.get(name) != mine[name]):
            name = different[0]
            raise UserError(
                f"{settings.output_dir} was made with {name} {former.get(name)!r}, not {mine[name]!r}: delete it, or choose another folder"
            )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)


def copy_sounds(settings: StudySettings) -> Path:
    """The clips that may be trained on, with the events in them: each from where it first sounds to where it last does."""
    output, folder = Path(settings.output_dir) / "sounds", Path(settings.data_dir)
    if output.exists():
        return output
    table = read_table(folder)
    numbers, folds = Counter(table["label"]), set(table["fold"])
    parts = [table[table["license"].isin(settings.licenses)].assign(file=lambda rows: [folder / name for name in rows["file_name"]])]
    for other in (Path(folder).resolve() for folder in settings.others):
        further = read_table(other)
        further = further[further["fold"].isin(folds)]
        files = [other / name for name in further["file_name"]]
        parts.append(further.assign(file=files, file_name=f"{other.name}/" + further["file_name"]))
    table = pd.concat(parts, ignore_index=True).fillna("")
    files = table.pop("file")
    if (twice := table["file_name"].duplicated()).any():
        raise UserError(f"data_dir and others have two files {table['file_name'][twice].iloc[0]}: rename a folder of others")
    waveforms = Waveforms(audio_column(Path(), files), 16_000)
    waveforms.check_unreadable(0.0, "training")
    rules, events, sounds = MixtureSettings(), [], []
    for i, waveform in enumerate(waveforms):
        sound = find_sound(waveform, i, table["label"][i], rules)
        label, found = table["label"][i], []
        if sound is not None and numbers[label] == settings.clips_of_a_class:
            onset = sound.start / 16_000
            found.append({"onset": onset, "offset": onset + len(sound.power) / FRAMES_PER_SECOND, "label": label})
        events.append(json.dumps(found))
        sounds.append(label if found else f"other {i % settings.other_classes}")
    with write_folder_atomically(output) as unfinished:
        for file, name in zip(files, table["file_name"]):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, unfinished / name)
        table.assign(events=events, sound=sounds).to_csv(unfinished / "metadata.csv", index=False)
    return output


def train(settings: StudySettings, held_out: int | str | None) -> Path:
    """A model that has learnt all folds but one, or all. Returns its folder."""
    sounds = copy_sounds(settings)
    output = Path(settings.output_dir) / f"without-{'none' if held_out is None else held_out}-seed-{settings.seed}"
    folds = sorted(set(read_table(sounds)["fold"]) - {str(held_out)})
    clips = {"kind": "audiofolder", "path": str(sounds), "keep": {"fold": folds}}
    run = read_settings(
        FineTuningSettings,
        settings.finetuning_recipe,
        {
            "data_dir": str(sounds),
            "model": settings.encoder or str(pretrain(settings, clips, output)),
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


def pretrain(settings: StudySettings, clips: dict[str, Any], output: Path) -> Path:
    """Both stages, of `clips` and the further recordings. Returns the encoder's folder."""
    fixed = {"data.sources": [clips, {"kind": "audiofolder", "path": settings.free_dir}], "seed": settings.seed, **settings.pretraining}
    return pretrain_both_stages(settings.stage1, settings.stage2, output, fixed, settings.pretraining_stage2)


class HeldOut(NamedTuple):
    """A model that has not learnt a fold, and its scores there, before any calibration: of mixtures, and of clips without learnt sounds."""

    model: Path
    mixtures: ScoredEvents
    others: ScoredEvents
    windows: dict[str, ScoredEvents]  # of mixtures, by windows whose clip scores they are


def score_held_out(settings: StudySettings, fold: int | str) -> HeldOut:
    """Train without a fold, and score what is of it."""
    model = train(settings, fold)
    sounds, network, extractor = copy_sounds(settings), *load(model)
    output = Path(settings.output_dir) / f"mixtures-{fold}"
    table = read_table(sounds)
    if not output.exists():
        options: dict[str, Any] = {"data_dir": str(sounds), "fold_column": "fold", "train_folds": sorted(set(table["fold"]) - {str(fold)})}
        options |= {"test_folds": [fold], "classes": network.config.class_names, "group_column": "recording", "train_clips": 1}
        options |= {"train_backgrounds": settings.backgrounds, "test_backgrounds": settings.test_backgrounds}
        # Another seed for each fold: otherwise the mixtures of all folds would have the same excerpts of the backgrounds.
        options |= {"num_events": settings.num_events, "test_clips": settings.mixtures, "seed": sorted(set(table["fold"])).index(str(fold))}
        rules = MixtureSettings(clip_seconds=settings.clip_seconds, overlap="anywhere")
        make_benchmark(BenchmarkSettings(**options, output_dir=str(output), mixing=rules))
    rows = read_rows(open_splits(str(output), "parquet")["test"], "events")
    others = table["file_name"][(table["fold"] == str(fold)) & (table["events"] == "[]")].tolist()
    unlearnt = score_without_events(network, extractor, audio_column(sounds, others))
    windows = {f"{window:g}": window_scores(network, extractor, rows, window, NATIVE_STEP) for window in settings.windows}
    return HeldOut(model, score_events(network, extractor, rows).events, unlearnt, windows)


def join_mixtures(folds: Mapping[str, HeldOut]) -> ScoredEvents:
    """Those of all these folds, each scored by the model that has not learnt it."""
    return join_scores({f"mixtures of fold {fold}": own.mixtures for fold, own in folds.items()})


def choose(settings: StudySettings, folds: Mapping[str, HeldOut]) -> tuple[float, dict[str, EventSettings]]:
    """The temperature that fits scores to frequencies in the mixtures of these folds; and by limit of false alarms the thresholds and
    filters of the highest mean segment F1, of the calibrated scores of mixtures and of the clips without learnt sounds."""
    mixtures = join_mixtures(folds)
    temperature = fit_temperature(step_logits(mixtures), step_targets(mixtures), exclusive=False)
    others = {f"others of fold {fold}": own.others for fold, own in folds.items()}
    scored = calibrated(join_scores({"all": mixtures, **others}), temperature)
    limits = {NO_LIMIT: None, **{f"{limit:g}": limit for limit in settings.max_false_alarms}}
    return temperature, {
        name: tune_events(*scored, change_lengths=CHANGE_LENGTHS, max_false_alarms=limit) for name, limit in limits.items()
    }


def evaluate(settings: StudySettings, own: HeldOut, fold: int | str, others: Mapping[str, HeldOut]) -> dict[str, Any]:
    """A model on the fold that it has not learnt, with the temperature, thresholds and filters that the other folds choose."""
    temperature, chosen = choose(settings, others)
    network, extractor = load(own.model)
    scale_head(network, HEAD, temperature)
    mixtures = calibrated(own.mixtures, temperature)
    unlearnt = {"clips of other classes": calibrated(own.others, temperature)}
    for source in map(SourceSettings.of, settings.test_others):
        unlearnt[source.name] = score_without_events(network, extractor, AudioColumn(open_table(source)))
    return {
        "calibration": measure(own.mixtures, temperature),
        "tags": evaluate_tags(settings, network, extractor, fold),
        "events": {
            limit: {
                "event_detection": asdict(found),
                **evaluate_events(*mixtures, found, confidence=None),
                "false_alarms_of_others": {name: false_alarms(scored, found) for name, scored in unlearnt.items() if scored.scores},
            }
            for limit, found in chosen.items()
        },
        "windows": evaluate_windows(own, others) if settings.windows else {},
    }


def evaluate_windows(own: HeldOut, others: Mapping[str, HeldOut]) -> dict[str, Any]:
    """The detector, and the same network as a tagger of sliding windows: each metric with the thresholds and filters that have its highest
    mean over classes in the mixtures of the other folds, without a limit."""
    compared = {"detector": (own.mixtures, {fold: other.mixtures for fold, other in others.items()})}
    for window, mixtures in own.windows.items():
        compared[f"windows of {window} s"] = mixtures, {fold: other.windows[window] for fold, other in others.items()}
    return {name: evaluate_tuned(join_scores(tuning), mixtures, CHANGE_LENGTHS) for name, (mixtures, tuning) in compared.items()}


def evaluate_tags(
    settings: StudySettings, network: SSLAMForAudioFrameClassification, extractor: SSLAMFeatureExtractor, fold: int | str
) -> dict[str, Any]:
    """Accuracy on the clips of the learnt classes in a fold, under any licence; what is taken for what; other clips' scores."""
    every = read_table(settings.data_dir)
    table, classes = every[every["fold"] == str(fold)].reset_index(drop=True), network.config.class_names
    scores = tag_scores(network, extractor, Path(settings.data_dir), table["file_name"])
    learnt = table["label"].isin(classes).to_numpy()
    truth = np.array([classes.index(label) for label in table["label"][learnt]])
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (truth, scores[learnt].argmax(1)), 1)
    found: dict[str, Any] = {"clips": len(truth), "accuracy": float(np.mean(scores[learnt].argmax(1) == truth))}
    for column in settings.subsets:  # classes among themselves
        members = [i for i, name in enumerate(classes) if (every[column][every["label"] == name] == "True").any()]
        inside = np.isin(truth, members)
        chosen = np.array(members)[scores[learnt][inside][:, members].argmax(1)]
        found[column] = {"clips": int(inside.sum()), "accuracy": float(np.mean(chosen == truth[inside]))}
    others = scores[~learnt].max(1) if (~learnt).any() else np.zeros(0)
    return {**found, "classes": classes, "confusion": confusion.tolist(), "highest_scores_of_others": np.sort(others).tolist()}


def run(settings: StudySettings) -> dict[str, Any]:
    """The results by fold; then the model of all folds, calibrated and with thresholds, in `model-seed-*`."""
    check_data(settings)
    folds = {str(fold): score_held_out(settings, fold) for fold in settings.folds}
    results = {fold: evaluate(settings, own, fold, {k: v for k, v in folds.items() if k != fold}) for fold, own in folds.items()}
    write_json(Path(settings.output_dir) / f"results-seed-{settings.seed}.json", {"settings": settings_dict(settings), "folds": results})
    temperature, chosen = choose(settings, folds)
    mixtures = join_mixtures(folds)
    calibration = measure(mixtures, temperature)
    trained = train(settings, None)
    with write_folder_atomically(Path(settings.output_dir) / f"model-seed-{settings.seed}") as model:
        for file in trained.iterdir():
            if file.is_file() and file.name not in RECORDS:  # they are of the weights before the calibration
                shutil.copy(file, model)
        replace_diagram(model, calibration)
        description = describe_calibration(calibration, len(mixtures.scores), "mixtures of held-out folds")
        write_calibration(model, HEAD, temperature, description)
        write_event_detection(model, list(chosen.values())[-1])
    return results


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="everyday.py", description=__doc__)
        results = run(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(tables(results))
    if settings.windows:
        print("\n" + table_of_windows(results))


if __name__ == "__main__":
    main()
