"""The clips that a fine-tuning run trains and is evaluated on."""

from dataclasses import dataclass
from typing import Any

from ..audio.labels import LabelReader
from ..audio.layouts import open_splits
from ..audio.paths import printable_path
from ..audio.rows import (
    LabelledRows,
    check_apart,
    check_has_labels,
    choose_classes,
    hash_rows,
    read_rows,
    select_folds,
    select_split,
)
from ..audio.sources import Source
from ..errors import UserError
from .fine_tuning_settings import FineTuningSettings
from .labelled_stream import ColumnTargets, LabelledPart, TableTargets, keep_clips_per_class


@dataclass(frozen=True)
class TrainingData:
    """Both parts of the data.

    Attributes:
        train, evaluation: the second is `None` where nothing is evaluated.
        classes: their names.
        multi_label: whether a clip may have several of them.
        digest: of what the clips and their labels are; `None` of a stream.
    """

    train: LabelledPart
    evaluation: LabelledPart | None
    classes: list[str]
    multi_label: bool
    digest: str | None = None

    def names(self) -> list[str]:
        """The file of each clip of the evaluation, where it is a table."""
        if self.evaluation is None or self.evaluation.labels is None:
            return []
        return [printable_path(path) for path in self.evaluation.source.paths()]


def open_training_data(settings: FineTuningSettings) -> TrainingData:
    """Open both parts. Labels are read, audio is not.

    Raises:
        UserError: if the data do not hold what the settings ask for.
    """
    return _open_stream(settings) if settings.streaming else _open_tables(settings)


def select_rows(settings: FineTuningSettings) -> tuple[LabelledRows, LabelledRows | None]:
    """The rows to train and, unless nothing is evaluated, to evaluate on, by split or by fold."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)

    def select(split: str, folds: list[int | str]) -> LabelledRows:
        chosen = select_split(splits, split) if settings.fold_column is None else select_folds(splits, settings.fold_column, folds)
        return read_rows(chosen, settings.label_column, settings.label_separator)

    train = select(settings.train_split, settings.train_folds)
    if not settings.evaluate:
        return train, None
    evaluation = select(settings.eval_split, settings.eval_folds)
    check_apart({"the training clips": train.sources, "the evaluation": evaluation.sources})
    check_has_labels(evaluation.labels)
    return train, evaluation


def check_rows(settings: FineTuningSettings) -> None:
    """That the rows of a run can be had, and its evaluation has no other classes than its training. Nothing is decoded.

    Raises:
        UserError: if not.
    """
    train, evaluation = select_rows(settings)
    classes = choose_classes(train.labels)
    if evaluation is not None:
        evaluation.encode(classes)


def _open_tables(settings: FineTuningSettings) -> TrainingData:
    train, evaluation = select_rows(settings)
    digest = hash_rows(train, evaluation)
    if settings.clips_per_class is not None:
        train = train.select(keep_clips_per_class(train.labels, settings.clips_per_class, settings.seed))
    classes = choose_classes(train.labels)
    eval_part = None if evaluation is None else _table_part(evaluation, classes)
    return TrainingData(_table_part(train, classes), eval_part, classes, train.labels.multi_label, digest)


def _table_part(rows: LabelledRows, classes: list[str]) -> LabelledPart:
    labels = rows.encode(classes)
    return LabelledPart(Source(rows.sources.rows, "clips"), TableTargets(labels), labels)


def _open_stream(settings: FineTuningSettings) -> TrainingData:
    """Both parts as streams, whose classes the data set must declare."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset, streaming=True)
    train = select_split(splits, settings.train_split)
    reader = LabelReader.of(train, settings.label_column, settings.label_separator)
    if reader.classes is None:
        raise UserError(
            f"the column {settings.label_column!r} of {settings.data_dir} does not declare its classes (a ClassLabel does), and a stream "
            "cannot be searched for them: set streaming=false"
        )
    targets = ColumnTargets(reader, reader.classes)

    def part(rows: Any) -> LabelledPart:
        return LabelledPart(Source(rows, "clips", root=settings.data_dir), targets)

    evaluation = part(select_split(splits, settings.eval_split)) if settings.evaluate else None
    return TrainingData(part(train), evaluation, list(reader.classes), reader.multi_label)


__all__ = ["TrainingData", "check_rows", "open_training_data", "select_rows"]
