"""Labelled clips: an "audiofolder" read through `datasets`, its classes, and its waveforms, decoded once."""

import difflib
import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import AudioDecodingError, UserError
from ..fbank import num_frames
from .decode import check_scale, load_waveform
from .sources import AUDIO_SUFFIXES, audio_folder_splits, files_below, fold_names


try:
    import datasets
except ImportError as error:
    raise ImportError('reading a labelled data set needs datasets: pip install "transformers-sslam[train]"') from error


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledRows:
    """Clips that are still files, with the names of their labels.

    Attributes:
        sources: what `load_waveform` takes, one a clip.
        labels: names of each clip's classes; exactly one each, unless `multi_label`.
        multi_label: whether a clip may have several classes, or none.
        declared_classes: all class names in their order where the data set declares them (a `ClassLabel` column), else `None`.
    """

    sources: Sequence[dict]
    labels: list[list[str]]
    multi_label: bool
    declared_classes: list[str] | None

    def __len__(self) -> int:
        return len(self.sources)


def load_audio_folder(data_dir: str | Path) -> datasets.DatasetDict:
    """The splits of a folder in the layout of `datasets`' "audiofolder": `train/`, `validation/` and `test/` at its top or none, and labels
    as the names of class folders or as columns of `metadata.csv`, `.jsonl` or `.parquet` beside a column `file_name`. Nothing is decoded.

    Raises:
        UserError: (a `ValueError`) if there is no such folder, or no audio in it.
        ImportError: if torchcodec is missing, without which `datasets` reads no audio folder.
    """
    if not Path(data_dir).is_dir():
        raise UserError(f"data_dir is {data_dir}, but there is no such folder")
    try:
        splits = datasets.load_dataset("audiofolder", data_files=audio_folder_splits(Path(data_dir)))
    except ImportError as error:
        raise ImportError(f'reading an audio folder failed ({error}): pip install "transformers-sslam[train]"') from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{data_dir} cannot be read as an audio folder ({error}): it must hold audio files, in folders named after their classes or "
            "with a metadata.csv"
        ) from error
    for name, rows in splits.items():
        if "audio" not in rows.column_names:
            raise UserError(
                f"{data_dir} has no audio column in its split {name}, only {', '.join(rows.column_names)}: put audio files there"
            )
    read, found = sum(map(len, splits.values())), sum(1 for _ in files_below(Path(data_dir), AUDIO_SUFFIXES))
    if read < found:
        logger.warning(f"{found - read} of {found} audio files below {data_dir} are not listed in its metadata, and are left out")
    return splits.cast_column("audio", datasets.Audio(decode=False))


def select_split(splits: datasets.DatasetDict | datasets.IterableDatasetDict, name: str) -> datasets.Dataset | datasets.IterableDataset:
    """One split, by name. `UserError` if there is none or, unless it is a stream, whose length is not known, it is empty."""
    if name not in splits:
        raise UserError(
            f"there is no split {name!r}, only {', '.join(splits)}: make folders train/ and test/, name others (train_split, eval_split), "
            "or choose rows by a column of folds (fold_column); to fine-tune on all clips, without an evaluation, set evaluate=false"
        )
    if isinstance(splits[name], datasets.Dataset) and len(splits[name]) == 0:
        raise UserError(f"the split {name!r} has no clip")
    return splits[name]


def select_folds(splits: datasets.DatasetDict, column: str, values: Sequence[int | str]) -> datasets.Dataset:
    """The rows of all splits whose `column` is one of `values`; 1 and "1" count as equal, for a file of text cannot tell them apart.

    Raises:
        UserError: if the column is missing, or a value selects no row.
    """
    rows = datasets.concatenate_datasets(list(splits.values()))
    _check_column(rows, column)
    folds = fold_names(rows[column])
    known = sorted({fold for fold in folds if fold is not None})
    if not values:
        raise UserError(
            f"no fold of the column {column!r} was chosen, so there is no clip: give some of {', '.join(known)} as eval_folds='[...]' "
            "and, to train, train_folds='[...]', or leave fold_column out (fold_column=null)"
        )
    wanted = set(fold_names(values))
    if absent := [fold for fold in fold_names(values) if fold not in known]:
        raise UserError(f"the column {column!r} has no fold {absent[0]}, only {', '.join(known)}")
    return rows.select([i for i, fold in enumerate(folds) if fold in wanted])


@dataclass(frozen=True)
class LabelReader:
    """Reads the names of a row's classes out of its label column.

    Args:
        column: of `ClassLabel`s, text or integers: one class a clip; of lists of these, or of names joined by `separator`: several.
        separator: between the names in a column of text. Space around a name is dropped; an empty cell means no class.
        is_list: whether the column holds lists.
        declared_classes: all class names in their order where the data set declares them, else `None`.
    """

    column: str
    separator: str | None
    is_list: bool
    declared_classes: list[str] | None

    @classmethod
    def of(cls, rows: datasets.Dataset | datasets.IterableDataset, column: str, separator: str | None = None) -> "LabelReader":
        """For the column of a data set. `UserError` if there is none of this name."""
        _check_column(rows, column)
        feature = rows.features[column]
        is_list = isinstance(feature, (datasets.List, datasets.LargeList))
        item = feature.feature if is_list else feature
        if separator == "":
            raise UserError("label_separator is empty: give what stands between two labels, or leave it out")
        if separator is not None and (is_list or isinstance(item, datasets.ClassLabel)):
            kind = "lists" if is_list else "classes"
            raise UserError(f"label_separator is {separator!r}, but the column {column!r} holds {kind}, no text to divide: leave it out")
        return cls(column, separator, is_list, item.names if isinstance(item, datasets.ClassLabel) else None)

    @property
    def multi_label(self) -> bool:
        """Whether a clip may have several classes, or none."""
        return self.is_list or self.separator is not None

    def __call__(self, row: dict) -> list[str]:
        """Names of the classes of a row with an `audio` column. `UserError` if it lacks one that it needs, or has one not declared."""
        cell: Any = row[self.column]
        parts: Sequence[Any]
        if cell is None or cell == "":
            parts = []
        elif self.separator is not None and isinstance(cell, str):
            parts = [part for part in cell.split(self.separator) if part.strip()]
        else:
            parts = cell if self.is_list else [cell]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        if any(part is None for part in parts):
            raise UserError(f"{source_name(row['audio'])} has an empty label in the column {self.column!r}: take it out of its list")
        if not parts and not self.multi_label:
            raise UserError(
                f"{source_name(row['audio'])} has no label in the column {self.column!r} (of a CSV file, NA, None and the like are read as "
                "nothing): give it one or leave it out"
            )
        if self.declared_classes is None:  # beside an empty cell, a CSV file's whole numbers come as floats
            return [str(int(part) if isinstance(part, float) and part.is_integer() else part) for part in parts]
        for part in parts:
            if not 0 <= part < len(self.declared_classes):  # `datasets` marks clips without a label by -1
                raise UserError(
                    f"{source_name(row['audio'])} has {part} in the column {self.column!r}, but the numbers of its classes are 0 to "
                    f"{len(self.declared_classes) - 1}: leave it out"
                )
        return [self.declared_classes[part] for part in parts]


def fold_values(splits: datasets.DatasetDict, column: str) -> list[int | str]:
    """The values of a column of folds, over all splits, sorted. `UserError` if there is no such column, a clip has no fold, or there are
    fewer than two."""
    rows = datasets.concatenate_datasets(list(splits.values()))
    _check_column(rows, column)
    found: set[Any] = set(rows[column])
    if None in found or any(value != value for value in found):
        raise UserError(f"the column {column!r} has rows without a value: give each clip its fold, or leave the clip out")
    values: list[int | str] = sorted({int(fold) if isinstance(fold, float) and fold.is_integer() else fold for fold in found})
    if len(values) < 2:
        raise UserError(f"the column {column!r} holds {values}, but to hold out each fold in turn takes at least two")
    return values


def read_rows(rows: datasets.Dataset, label_column: str, separator: str | None = None) -> LabelledRows:
    """Sources, which stay in their files, and label names, see [`LabelReader`].

    Args:
        rows: with an undecoded audio column.

    Raises:
        UserError: if the column is missing, or a clip has no label where it needs one.
    """
    reader, sources = LabelReader.of(rows, label_column, separator), rows["audio"]
    labels = [reader({"audio": source, label_column: cell}) for source, cell in zip(sources, rows[label_column])]
    if separator is not None and not any(isinstance(cell, str) and separator in cell for cell in rows[label_column]):
        logger.warning(f"the separator {separator!r} is in none of the {len(labels)} labels of the column {label_column!r}")
    return LabelledRows(sources, labels, reader.multi_label, reader.declared_classes)


def choose_classes(rows: LabelledRows) -> list[str]:
    """The classes that training rows define: those they declare, or else every label that occurs, sorted.

    Raises:
        UserError: if a declared class has no clip, or there are not two classes to tell apart.
    """
    occurring = {label for labels in rows.labels for label in labels}
    classes = rows.declared_classes or sorted(occurring)
    without = [name for name in classes if name not in occurring]
    if without:
        raise UserError(
            f"no training clip has the class {', '.join(without)}: add some, choose other rows, or take it off the list of classes"
        )
    if len(classes) < (1 if rows.multi_label else 2):
        raise UserError(
            f"the training clips have {len(classes)} class ({', '.join(classes) or 'none'}), but there must be two to tell apart"
        )
    return classes


def check_has_labels(rows: LabelledRows) -> None:
    """That a clip of the evaluation has a label at all: of several classes each may be missing. `UserError` if not."""
    if not any(rows.labels):
        raise UserError("no clip of the evaluation has a label, so nothing can be measured on them: choose others")


def check_apart(sources: Sequence[dict], parts: Sequence[str]) -> None:
    """That no file is in two parts of the data. Where entries hold their audio themselves, they are not compared.

    Args:
        sources: what `load_waveform` takes.
        parts: the name of each one's part.

    Raises:
        UserError: if a file is in two.
    """
    if not are_files(sources):
        return
    part_of: dict[str, str] = {}
    for path, part in zip((source["path"] for source in sources), parts, strict=True):
        if part_of.setdefault(path, part) != part:
            raise UserError(f"{path} is both in {part_of[path]} and in {part}: what is evaluated on must not be trained on")


def are_files(sources: Sequence[dict]) -> bool:
    """Whether sources are files on their own, not held in those of the data set, where looking at them all would read all of it."""
    return len(sources) > 0 and sources[0]["bytes"] is None


def hash_sources(sources: Sequence[dict]) -> str:
    """Of the names and sizes of files; of nothing where the data set holds the audio itself."""
    paths = [source["path"] for source in sources] if are_files(sources) else []
    sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in paths]
    return hashlib.sha256(json.dumps([paths, sizes]).encode()).hexdigest()[:16]


def encode_labels(rows: LabelledRows, classes: Sequence[str]) -> torch.Tensor:
    """Class indices `(clips,)`, int64; or, where a clip may have several classes, `(clips, classes)`, float32, 0 or 1.

    Raises:
        UserError: if a clip's label is none of `classes`.
    """
    index = {name: i for i, name in enumerate(classes)}
    for number, labels in enumerate(rows.labels):
        for label in labels:
            if label not in index:
                name = source_name(rows.sources[number])
                shown = classes if len(classes) <= 20 else [*difflib.get_close_matches(label, classes, n=5), *classes[:5], "..."]
                raise UserError(f"{name} is labelled {label!r}, which is none of the {len(classes)} classes: {', '.join(shown)}")
    if not rows.multi_label:
        return torch.tensor([index[label] for (label,) in rows.labels])
    targets = torch.zeros(len(rows), len(classes))
    for target, labels in zip(targets, rows.labels):
        target[[index[label] for label in labels]] = 1
    return targets


class Waveforms:
    """The waveforms of a list of sources that can be read, each decoded once and kept as far as `memory_gb` reaches; the others are
    decoded again whenever they are asked for. `waveforms[i]` is `(samples,)`, float32.

    Args:
        sources: what `load_waveform` takes.
        sampling_rate: in Hz.
        memory_gb: memory for decoded clips, in 10^9 bytes. A minute of mono at 16 kHz takes 0.004.
        description: of the progress bar.
        check: decode every clip now. Without, all count as kept, and one that cannot be read raises where it is asked for.

    Attributes:
        kept: `waveforms[i]` comes from `sources[kept[i]]`.
        unreadable: names of the other files, by cause.
    """

    def __init__(
        self,
        sources: Sequence[dict],
        sampling_rate: int,
        memory_gb: float = 4.0,
        description: str = "decoding",
        check: bool = True,
    ):
        self.sources, self.sampling_rate = sources, sampling_rate
        self.kept = [] if check else list(range(len(sources)))
        self.unreadable: dict[str, list[str]] = defaultdict(list)
        self._decoded: list[np.ndarray | None] = [] if check else [None] * len(sources)
        if check:
            self._decode_all(memory_gb * 1e9, description)

    def _decode_all(self, free: float, description: str) -> None:
        numbers = range(len(self.sources))  # not the sources themselves: a pool would fetch them all at once
        with ThreadPoolExecutor() as pool:  # decoders and resampler run outside Python's lock
            for i, outcome in enumerate(tqdm(pool.map(self._try, numbers), total=len(numbers), desc=description, unit="clip")):
                if isinstance(outcome, AudioDecodingError):
                    self.unreadable[outcome.cause].append(source_name(self.sources[i]))
                    continue
                self.kept.append(i)
                fits = outcome.nbytes <= free
                self._decoded.append(outcome if fits else None)
                free -= outcome.nbytes if fits else 0

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> np.ndarray:
        decoded = self._decoded[i]
        return decode_clip(self.sources[self.kept[i]], self.sampling_rate) if decoded is None else decoded

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def check_unreadable(self, largest_share: float, what: str) -> None:
        """Raise `UserError` if more than this share of the files, or all, cannot be read, warn of fewer, and count and name them."""
        names = [name for names in self.unreadable.values() for name in names]
        if len(names) > largest_share * len(self.sources) or not self.kept:
            counts = ", ".join(f"{len(names)} {cause}" for cause, names in self.unreadable.items())
            raise UserError(
                f"{len(names)} of {len(self.sources)} {what} clips cannot be used ({counts}), more than the share of {largest_share:g} "
                f"that is allowed: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: repair or remove them, or allow more "
                "(max_unreadable)"
            )
        for cause, names in self.unreadable.items():
            logger.warning(f"{len(names)} of {len(self.sources)} {what} clips are left out ({cause}): {', '.join(names)}")

    def _try(self, i: int) -> np.ndarray | AudioDecodingError:
        try:
            return decode_clip(self.sources[i], self.sampling_rate)
        except AudioDecodingError as error:
            return error


def decode_clip(source: dict, sampling_rate: int) -> np.ndarray:
    """`load_waveform`, and beyond it refuse what the feature extractor would refuse, while the file's name is known: `(samples,)`, float32.

    Raises:
        AudioDecodingError: as `load_waveform`, and with the cause "too short" (no frame of 25 ms) or "out of scale".
    """
    waveform = load_waveform(source, sampling_rate)
    if num_frames(len(waveform), sampling_rate) == 0:
        raise AudioDecodingError("too short", f"{source_name(source)} has {len(waveform)} samples, less than one frame of 25 ms")
    check_scale(waveform, source_name(source))
    return waveform


def keep_rows(rows: LabelledRows, kept: Iterable[int]) -> LabelledRows:
    """The rows of these indices."""
    kept = list(kept)
    return LabelledRows(_Chosen(rows.sources, kept), [rows.labels[i] for i in kept], rows.multi_label, rows.declared_classes)


class _Chosen(Sequence[dict]):
    """Some of the sources, read from where they are when they are asked for: those of a parquet hold whole files."""

    def __init__(self, sources: Sequence[dict], chosen: list[int]):
        self.sources, self.chosen = sources, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i):
        return self.sources[self.chosen[i]]


def source_name(source: dict) -> str:
    """How an undecoded entry of an audio column is called in messages: its path, where it has one."""
    return str(source.get("path") or "an audio entry without a path")


def _check_column(rows: datasets.Dataset, column: str) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"there is no column {column!r}, only {', '.join(rows.column_names)}: name another, or add it to metadata.csv; labels "
            "come from folders named after classes too, and splits take the place of folds with fold_column=null, train_folds=[] "
            "and eval_folds=[]"
        )
