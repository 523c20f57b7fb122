"""Labelled clips: an "audiofolder" read through `datasets`, its classes, and its waveforms, decoded once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..fbank import num_frames
from ..feature_extraction_sslam import LARGEST_PLAUSIBLE_AMPLITUDE
from .decoding import AudioDecodingError, load_waveform


try:
    import datasets
except ImportError as error:
    raise ImportError('reading a labelled data set needs datasets: pip install "transformers-sslam[train]"') from error


class DatasetError(ValueError):
    """A data set that does not hold what was asked of it. One sentence says it, so programs print it without a traceback."""


@dataclass(frozen=True)
class LabelledRows:
    """Clips that are still files, with the names of their labels.

    Attributes:
        sources: what `load_waveform` takes, one a clip.
        labels: names of each clip's classes; exactly one each, unless `multi_label`.
        multi_label: whether a clip may have several classes, or none.
        declared_classes: all class names in their order where the data set declares them (a `ClassLabel` column), else `None`.
    """

    sources: list[dict]
    labels: list[list[str]]
    multi_label: bool
    declared_classes: list[str] | None

    def __len__(self) -> int:
        return len(self.sources)


def load_audio_folder(data_dir: str | Path) -> datasets.DatasetDict:
    """The splits of a folder in the layout of `datasets`' "audiofolder": `train/` and `test/` folders or none, and labels as the names
    of class folders or as columns of `metadata.csv`, `.jsonl` or `.parquet` beside a column `file_name`. Nothing is decoded.

    Raises:
        DatasetError: (a `ValueError`) if there is no such folder, or no audio in it.
        ImportError: if torchcodec is missing, without which `datasets` reads no audio folder.
    """
    if not Path(data_dir).is_dir():
        raise DatasetError(f"data_dir is {data_dir}, but there is no such folder")
    try:
        splits = datasets.load_dataset("audiofolder", data_dir=str(data_dir))
    except ImportError as error:
        raise ImportError(f'reading an audio folder failed ({error}): pip install "transformers-sslam[train]"') from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"{data_dir} cannot be read as an audio folder ({error}): it must hold audio files, in folders named after their classes or "
            "with a metadata.csv"
        ) from error
    for name, rows in splits.items():
        if "audio" not in rows.column_names:
            raise DatasetError(
                f"{data_dir} has no audio column in its split {name}, only {', '.join(rows.column_names)}: put audio files there"
            )
    return splits.cast_column("audio", datasets.Audio(decode=False))


def select_split(splits: datasets.DatasetDict, name: str) -> datasets.Dataset:
    """One split, by name. `DatasetError` if there is none or it is empty."""
    if name not in splits:
        raise DatasetError(
            f"there is no split {name!r}, only {', '.join(splits)}: make folders train/ and test/, or choose rows by fold_column"
        )
    if len(splits[name]) == 0:
        raise DatasetError(f"the split {name!r} has no clip")
    return splits[name]


def select_folds(splits: datasets.DatasetDict, column: str, values: Sequence[int | str]) -> datasets.Dataset:
    """The rows of all splits whose `column` is one of `values`; 1 and "1" count as equal, for a file of text cannot tell them apart.

    Raises:
        DatasetError: if the column is missing, or a value selects no row.
    """
    rows = datasets.concatenate_datasets(list(splits.values()))
    _check_column(rows, column)
    folds = [str(fold) for fold in rows[column]]
    if not values:
        raise DatasetError(
            f"no fold of the column {column!r} was chosen, so there is no clip: give some of {', '.join(sorted(set(folds)))}"
        )
    for value in values:
        if str(value) not in folds:
            raise DatasetError(f"the column {column!r} has no fold {value}, only {', '.join(sorted(set(folds)))}")
    wanted = {str(value) for value in values}
    return rows.select([i for i, fold in enumerate(folds) if fold in wanted])


def read_rows(rows: datasets.Dataset, label_column: str, separator: str | None = None) -> LabelledRows:
    """Sources and label names.

    Args:
        rows: with an undecoded audio column.
        label_column: of `ClassLabel`s, text or integers: one class a clip; of lists of these, or of names joined by `separator`: several.
        separator: between the names in a column of text. Space around a name is dropped; an empty cell means no class.

    Raises:
        DatasetError: if the column is missing, or a clip has no label where it needs one.
    """
    _check_column(rows, label_column)
    feature = rows.features[label_column]
    is_list = isinstance(feature, (datasets.List, datasets.LargeList))
    item = feature.feature if is_list else feature
    declared = item.names if isinstance(item, datasets.ClassLabel) else None
    sources, labels = list(rows["audio"]), []
    for cell in rows[label_column]:
        if cell is None or cell == "":
            parts = []
        elif separator is not None and isinstance(cell, str):
            parts = [part.strip() for part in cell.split(separator) if part.strip()]
        else:
            parts = cell if is_list else [cell]
        labels.append([str(part if declared is None else declared[part]) for part in parts])
    multi_label = is_list or separator is not None
    if not multi_label and [] in labels:
        raise DatasetError(
            f"{source_name(sources[labels.index([])])} has no label in the column {label_column!r}: give it one or leave it out"
        )
    return LabelledRows(sources, labels, multi_label, declared)


def choose_classes(rows: LabelledRows) -> list[str]:
    """The classes that training rows define: those they declare, or else every label that occurs, sorted.

    Raises:
        DatasetError: if a declared class has no clip, or there are not two classes to tell apart.
    """
    occurring = {label for labels in rows.labels for label in labels}
    classes = rows.declared_classes or sorted(occurring)
    without = [name for name in classes if name not in occurring]
    if without:
        raise DatasetError(
            f"no training clip has the class {', '.join(without)}: add some, choose other rows, or take it off the list of classes"
        )
    if len(classes) < (1 if rows.multi_label else 2):
        raise DatasetError(
            f"the training clips have {len(classes)} class ({', '.join(classes) or 'none'}), but there must be two to tell apart"
        )
    return classes


def encode_labels(rows: LabelledRows, classes: Sequence[str]) -> torch.Tensor:
    """Class indices `(clips,)`, int64; or, where a clip may have several classes, `(clips, classes)`, float32, 0 or 1.

    Raises:
        DatasetError: if a clip's label is none of `classes`.
    """
    index = {name: i for i, name in enumerate(classes)}
    for source, labels in zip(rows.sources, rows.labels):
        for label in labels:
            if label not in index:
                raise DatasetError(
                    f"{source_name(source)} is labelled {label!r}, which is none of the {len(classes)} classes: {', '.join(classes)}"
                )
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

    Attributes:
        kept: `waveforms[i]` comes from `sources[kept[i]]`.
        unreadable: names of the other files, by cause.
    """

    def __init__(self, sources: Sequence[dict], sampling_rate: int, memory_gb: float = 4.0, description: str = "decoding"):
        self.sources, self.sampling_rate = sources, sampling_rate
        self.kept: list[int] = []
        self.unreadable: dict[str, list[str]] = defaultdict(list)
        self._decoded: list[np.ndarray | None] = []
        free = memory_gb * 1e9
        with ThreadPoolExecutor() as pool:  # decoders and resampler run outside Python's lock
            for i, outcome in enumerate(tqdm(pool.map(self._try, sources), total=len(sources), desc=description, unit="clip")):
                if isinstance(outcome, AudioDecodingError):
                    self.unreadable[outcome.cause].append(source_name(sources[i]))
                    continue
                self.kept.append(i)
                fits = outcome.nbytes <= free
                self._decoded.append(outcome if fits else None)
                free -= outcome.nbytes if fits else 0

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> np.ndarray:
        decoded = self._decoded[i]
        return self._decode(self.sources[self.kept[i]]) if decoded is None else decoded

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def check_unreadable(self, largest_share: float, what: str) -> None:
        """Raise `DatasetError` if more than this share of the files, or all, cannot be read; the message counts and names them."""
        names = [name for names in self.unreadable.values() for name in names]
        if len(names) > largest_share * len(self.sources) or not self.kept:
            counts = ", ".join(f"{len(names)} {cause}" for cause, names in self.unreadable.items())
            raise DatasetError(
                f"{len(names)} of {len(self.sources)} {what} clips cannot be used ({counts}), more than the share of {largest_share:g} "
                f"that is allowed: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )

    def _try(self, source: dict) -> np.ndarray | AudioDecodingError:
        try:
            return self._decode(source)
        except AudioDecodingError as error:
            return error

    def _decode(self, source: dict) -> np.ndarray:
        """Beyond decoding, refuse what the feature extractor would refuse, while the file's name is known."""
        waveform = load_waveform(source, self.sampling_rate)
        if num_frames(len(waveform), self.sampling_rate) == 0:
            raise AudioDecodingError("too short", f"{source_name(source)} has {len(waveform)} samples, less than one frame of 25 ms")
        if (peak := np.abs(waveform).max()) > LARGEST_PLAUSIBLE_AMPLITUDE:
            raise AudioDecodingError("out of scale", f"{source_name(source)} has a peak of {peak:g}, but samples lie in [-1, 1]")
        return waveform


def keep_rows(rows: LabelledRows, kept: Iterable[int]) -> LabelledRows:
    """The rows of these indices."""
    kept = list(kept)
    return LabelledRows([rows.sources[i] for i in kept], [rows.labels[i] for i in kept], rows.multi_label, rows.declared_classes)


def source_name(source: dict) -> str:
    """How an undecoded entry of an audio column is called in messages: its path, where it has one."""
    return str(source.get("path") or "an audio entry without a path")


def _check_column(rows: datasets.Dataset, column: str) -> None:
    if column not in rows.column_names:
        raise DatasetError(f"there is no column {column!r}, only {', '.join(rows.column_names)}: name another, or add it to the metadata")
