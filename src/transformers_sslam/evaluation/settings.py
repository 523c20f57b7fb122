"""Settings of `sslam evaluate`, and what the evaluations of classifiers and of detectors have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..audio.cache import Waveforms
from ..audio.labelled_data import LabelledDataSettings
from ..audio.labels import event_columns
from ..audio.layouts import open_splits
from ..audio.rows import LabelledRows, check_has_labels, read_rows, select_folds, select_split
from ..errors import UserError, as_user_error
from ..settings import setting
from .event_flags import EventFlags
from .event_tuning import TunedMetric, check_limit


@dataclass(kw_only=True)
class EventEvaluationSettings(EventFlags):
    """Event detection, with task events"""

    tune: bool = setting(
        "choose threshold and filter for each class on these clips, and write them into the model's config.json; the clips are then "
        "no longer a test of it",
        False,
    )
    tune_for: TunedMetric = setting(
        "what tuning maximizes: F1 of segments of 1 s, or of collars of 0.2 s around onset and offset; or PSDS by the filters, and then "
        "segment F1 by the thresholds",
        "segment",
    )
    tune_change_filter: bool = setting("try change filters too, as if each event had one score; not for live sources", False)
    max_false_alarms: float | None = setting("most false alarms an hour, of all classes together, on the clips that tune; null: any", None)


@dataclass(kw_only=True)
class CalibrationSettings:
    """Calibration"""

    calibrate: bool = setting(
        "fit a temperature to these clips, by which the weights of the model's last layer are divided in its folder, before tune; the "
        "clips are then no longer a test of it",
        False,
    )


@dataclass(kw_only=True)
class EvaluationSettings(EventEvaluationSettings, CalibrationSettings, LabelledDataSettings):
    """Evaluation of a model"""

    task: Literal["classification", "events"] = setting(
        "classification: labels of clips; events: a model of event detection, on a column of events with onset and offset", "classification"
    )
    model: str = setting("model: a folder, a Hub id, or an official fine-tuned checkpoint")
    per_device_eval_batch_size: int = setting("clips, or windows of event detection, in a forward pass", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "precision of the encoder; weights and the classifier's head stay in float32, because rounded logits tie", "float32"
    )
    output_dir: str = setting("folder for results.json, scores.npz and pictures, replaced by the next run", "runs/evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, but must be positive")
        options = [name for name, value in self.event_options.items() if value is not None]
        given = [*options, *(["tune"] if self.tune else [])]
        if given and self.task != "events":
            raise UserError(f"{given[0]} is set, but task is {self.task!r}, where it has no effect: set task to events")
        if self.tune_for != "segment" and not self.tune:
            raise UserError(f"tune_for is {self.tune_for!r}, but has no effect without tune: add --tune true, or leave it out")
        if self.max_false_alarms is not None and not self.tune:
            raise UserError(
                f"max_false_alarms is {self.max_false_alarms:g}, but has no effect without tune: add --tune true, or leave it out"
            )
        if self.tune_change_filter and not self.tune:
            raise UserError("tune_change_filter is set, but has no effect without tune: add --tune true, or leave it out")
        with as_user_error("tune"):
            check_limit(self.max_false_alarms)
        if self.tune and options:
            raise UserError(
                f"{given[0]} is set, but tune chooses thresholds and filters anew, without the others: leave one of the two out"
            )


def make_folder(output_dir: str) -> Path:
    """The folder of the results. `UserError` if it cannot be written to, or holds a model."""
    output = Path(output_dir)
    if any((output / name).exists() for name in ("config.json", "settings.yaml")):
        raise UserError(f"output_dir {output} holds a model or its run, whose results would be replaced: choose another folder")
    with as_user_error(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)
    return output


def class_names(model: Any, source: str) -> list[str]:
    """The model's classes. `UserError` if two have one name."""
    classes = model.config.class_names
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise UserError(f"{source} has two classes called {twice[0]!r}: give each a name of its own in its config.json")
    return classes


def select_rows(settings: LabelledDataSettings, *, events: bool = False) -> LabelledRows:
    """The clips to evaluate on; with `events`, on which event detection is evaluated."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        chosen = select_split(splits, settings.test_split)
    else:
        chosen = select_folds(splits, settings.fold_column, settings.test_folds)
    columns = event_columns(chosen)
    if events and columns and settings.label_column not in columns:
        raise UserError(
            f"label_column is {settings.label_column!r}, but task is 'events', and the events of these clips are in another column: set it "
            f"to {' or '.join(columns)}"
        )
    return read_rows(chosen, settings.label_column, settings.label_separator)


def open_labelled(
    rows: LabelledRows, settings: LabelledDataSettings, classes: Sequence[str], sampling_rate: int
) -> tuple[LabelledRows, Waveforms, np.ndarray]:
    """The clips that can be read, their waveforms, and targets of these classes, `(clips, classes)`.

    Raises:
        UserError: if a label is none of the classes, too many clips cannot be read, or none that can has a label.
    """
    check_has_labels(rows.labels)
    rows.encode(classes)  # finds labels that do not fit before hours of decoding
    waveforms = Waveforms(rows.sources, sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "evaluated")
    rows = rows.select(waveforms.kept)
    check_has_labels(rows.labels)
    return rows, waveforms, rows.encode(classes).one_hot(range(len(rows)))
