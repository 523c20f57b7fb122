"""The clips of a fine-tuning run, in up to three parts: training, validation and test."""

import logging
from dataclasses import dataclass
from typing import Any

from ..audio.labels import UNKNOWN_LABELS, LabelReader
from ..audio.layouts import open_splits
from ..audio.rows import (
    LabelledRows,
    check_apart,
    check_has_labels,
    choose_classes,
    hash_held,
    hash_rows,
    read_rows,
    select_folds,
    select_split,
)
from ..audio.sources import Source
from ..errors import UserError
from .mixtures import hash_mixing, mixed_audio
from .settings import FineTuningSettings
from .stream import ColumnTargets, LabelledPart, TableTargets, keep_clips_per_class


logger = logging.getLogger(__name__)

HELD = "+"  # before the hash of audio that a data set holds itself


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        parts: `"training"`, and `"validation"` and `"test"` where the settings have them.
        classes: their names.
        multi_label: whether a clip may have several of them.
        digest: hash of the clips and their labels; `None` for a stream.
    """

    parts: dict[str, LabelledPart]
    classes: list[str]
    multi_label: bool
    digest: str | None = None


def open_training_data(settings: FineTuningSettings) -> TrainingData:
    """Open all parts. Labels are read, audio is not.

    Raises:
        UserError: if the data do not hold what the settings ask for.
    """
    if settings.streaming:
        return _open_stream(settings)
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None and settings.validation_split is None and "validation" in splits:
        logger.info("the split 'validation' is not used: with --validation_split validation it is evaluated after each epoch")
    rows = select_rows(settings, splits)
    digest = hash_data(settings, rows)
    if settings.clips_per_class is not None:
        chosen = keep_clips_per_class(rows["training"].labels, settings.clips_per_class, settings.seed)
        rows["training"] = rows["training"].select(chosen)
    classes = choose_classes(rows["training"].labels)
    encoded = {name: part.encode(classes) for name, part in rows.items()}
    parts = {name: LabelledPart(Source(rows[name].sources.rows, "clips"), TableTargets(labels), labels) for name, labels in encoded.items()}
    return TrainingData(parts, classes, rows["training"].labels.multi_label or settings.task == "events", digest)


def select_rows(settings: FineTuningSettings, splits: dict[str, Any] | None = None) -> dict[str, LabelledRows]:
    """The rows of each part, by split or by fold; of `splits`, if they are open already."""
    splits = splits or open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    rows = {}
    for name, chosen in settings.parts.items():
        column = settings.fold_column
        part = select_split(splits, chosen) if column is None else select_folds(splits, column, chosen)
        rows[name] = read_rows(part, settings.label_column, settings.label_separator)
        _check_loss(settings, partly_labelled=rows[name].labels.num_partly_labelled > 0)
        if name != "training":
            check_has_labels(rows[name].labels)
    check_apart({f"the {name} part": part.sources for name, part in rows.items()})
    held_out = {f"the {name} part": part.sources for name, part in rows.items() if name != "training"}
    for name, sources in mixed_audio(settings.mixing):
        check_apart({name: sources, **held_out})
    return rows


def _check_loss(settings: FineTuningSettings, *, partly_labelled: bool) -> None:
    if partly_labelled and settings.loss == "cross_entropy":
        raise UserError(
            f"loss is 'cross_entropy', which needs every label of a clip, but clips have unknown ones (column {UNKNOWN_LABELS}): leave it "
            "out, and binary cross-entropy of the known ones is taken"
        )


def hash_data(settings: FineTuningSettings, rows: dict[str, LabelledRows] | None = None) -> str:
    """A hash of all clips and labels of a run, and of what is mixed."""
    parts = (rows or select_rows(settings)).values()
    held = hash_held([*(part.sources for part in parts), *(audio for _, audio in mixed_audio(settings.mixing))])
    mixed = f"-{hash_mixing(settings.mixing)}" if settings.mixing.sounds else ""
    return f"{hash_rows(*parts)}{mixed}" + (f"{HELD}{held}" if held else "")


def are_same_data(then: str | None, now: str | None) -> bool:
    """Whether two hashes are of the same data; earlier versions did not hash the audio that a data set holds itself."""
    return then == now or (now is not None and then == now.partition(HELD)[0])


def check_rows(settings: FineTuningSettings) -> bool:
    """Check that the rows of a run can be selected, and that no part has classes that training lacks. Nothing is decoded.

    Returns:
        Whether the times of events are evaluated, and not only labels of clips: those of all test clips are known.

    Raises:
        UserError: if not.
    """
    rows = select_rows(settings)
    for part in rows.values():
        part.encode(choose_classes(rows["training"].labels))
    labels = rows["test"].labels if settings.task == "events" and "test" in rows else None
    return labels is not None and all(map(labels.has_times, range(len(labels))))


def _open_stream(settings: FineTuningSettings) -> TrainingData:
    """All parts as streams, whose classes the data set must declare."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset, streaming=True)
    reader = LabelReader.of(select_split(splits, settings.train_split), settings.label_column, settings.label_separator)
    if reader.classes is None:
        raise UserError(
            f"the column {settings.label_column!r} of {settings.data_dir} does not declare its classes (a ClassLabel does), and a stream "
            "cannot be searched for them: set streaming to false"
        )
    _check_loss(settings, partly_labelled=reader.unknown is not None)
    targets = ColumnTargets(reader, reader.classes)
    chosen: dict[str, Any] = {name: select_split(splits, split) for name, split in settings.parts.items()}
    parts = {name: LabelledPart(Source(rows, "clips", root=settings.data_dir), targets) for name, rows in chosen.items()}
    return TrainingData(parts, list(reader.classes), reader.multi_label)
