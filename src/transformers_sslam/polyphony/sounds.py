"""The single sounds of a benchmark: chosen for each split, decoded, and kept apart by recording and by content."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..audio.cache import Waveforms
from ..audio.labelled_data import check_memory
from ..audio.layouts import open_splits
from ..audio.paths import decode_path, source_name
from ..audio.rows import AudioColumn, LabelledRows, all_rows, check_single, read_rows, select_folds, select_split
from ..audio.sources import SourceSettings as FileSource
from ..errors import UserError
from ..settings import setting
from .render import MixtureSettings, Sound, find_sound


SPLITS = ("train", "test")


@dataclass(kw_only=True)
class SourceSettings:
    """Single sounds

    Raises:
        UserError: if two settings contradict each other.
    """

    data_dir: str = setting("folder or Hub id of the single sounds")
    layout: str = setting("how they are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several", None)
    label_column: str = setting("column of the class, one for each sound", "label")
    classes: list[str] = setting("classes of the events; empty: all", [])
    group_column: str | None = setting("column of the recording that a sound is cut from; null: each is its own", None)
    fold_column: str | None = setting("column to choose sounds by, whatever their split", None)
    train_folds: list[int | str] = setting("its values for training mixtures", [])
    test_folds: list[int | str] = setting("its values for test mixtures", [])
    test_fraction: float | None = setting("without folds: fraction of the recordings for the test, drawn by seed", None)
    train_split: str = setting("with neither folds nor fraction: split of the training sounds", "train")
    test_split: str = setting("with neither folds nor fraction: split of the test sounds", "test")
    seed: int = setting("random seed for the split, the mixtures and their levels", 0)
    train_backgrounds: list[FileSource] = setting("recordings to lay below training mixtures, each with kind and path; empty: silence", [])
    test_backgrounds: list[FileSource] = setting("recordings to lay below test mixtures", [])
    max_unreadable: float = setting("largest fraction of sounds that may be unusable", 0.01)
    memory_gb: float = setting("memory for decoded sounds in GB; others are decoded again each time", 4.0)

    def __post_init__(self):
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(f"test_fraction is {self.test_fraction}, but must lie between 0 and 1")
        if self.test_fraction is not None and self.fold_column is not None:
            raise UserError(f"test_fraction is {self.test_fraction} and fold_column {self.fold_column!r}: give one of the two")
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f"max_unreadable is {self.max_unreadable:g}, but a fraction in [0, 1) is expected")
        check_memory(self.memory_gb)
        if self.fold_column is None and (self.train_folds or self.test_folds):
            raise UserError("there are train_folds or test_folds, but no fold_column that they are values of: give it")
        self.train_backgrounds, self.test_backgrounds = (
            [FileSource.of(source) for source in sources] for sources in (self.train_backgrounds, self.test_backgrounds)
        )
        if bool(self.train_backgrounds) != bool(self.test_backgrounds):
            raise UserError("train_backgrounds or test_backgrounds is empty, but not both: give other recordings for each, or none")

    @property
    def backgrounds(self) -> dict[str, list[FileSource]]:
        """By split."""
        return dict(zip(SPLITS, (self.train_backgrounds, self.test_backgrounds)))


@dataclass(frozen=True)
class Sources:
    """The single sounds of a split."""

    waveforms: Waveforms  # of those that can be read
    sounds: list[Sound]  # those that are not silent; `sound.source` is an index of `waveforms` and of `table`
    table: list[dict[str, Any]]  # `file`, `label`, `recording`, `sha256` (of the file), and the other columns of the metadata
    backgrounds: Waveforms  # recordings to lay below the events
    background_table: list[dict[str, Any]]  # of these, without a label


def open_table(source: FileSource) -> datasets.Dataset:
    """The rows of a source of files, by its split and what it keeps.

    Raises:
        UserError: if there are none, or it is a stream.
    """
    splits = open_splits(source.path, source.kind, subset=source.subset, revision=source.revision, audio_column=source.audio_column)
    rows = select_split(splits, source.split)
    for column, values in source.keep.items():
        rows = select_folds({source.split: rows}, column, values)
    return rows


def open_backgrounds(sources: Sequence[FileSource], sampling_rate: int, memory_gb: float, max_unreadable: float) -> Waveforms:
    """The recordings that are laid below mixtures. Raises `UserError` if too many cannot be read."""
    audio = [entry for source in sources for entry in AudioColumn(open_table(source))]
    waveforms = Waveforms(audio, sampling_rate, memory_gb, "decoding backgrounds")
    if audio:
        waveforms.check_unreadable(max_unreadable, "background")
    return waveforms


def open_sources(settings: SourceSettings, rules: MixtureSettings) -> dict[str, Sources]:
    """The sounds of `train` and of `test`, decoded, by what the rules of mixing count as sounding.

    Raises:
        UserError: if the sounds do not fit the settings, a sound has not exactly one label, too many cannot be used, or the splits share a
            recording or a file.
    """
    rows = _select(open_splits(settings.data_dir, settings.layout, subset=settings.subset), settings)
    recordings = {split: _recordings(rows[split], settings) for split in SPLITS}
    _check_apart(recordings, "recording")
    labelled = {split: read_rows(rows[split], settings.label_column) for split in SPLITS}  # of both, before anything is decoded
    for split in SPLITS if settings.classes else ():
        if absent := sorted({*settings.classes} - {*labelled[split].labels.names}):
            raise UserError(f"classes has {', '.join(absent)}, but no {split} source has such a label: correct it, or add some")
        kept = [i for i, names in enumerate(labelled[split].labels) if not {*names}.isdisjoint(settings.classes)]
        rows[split], labelled[split] = rows[split].select(kept), labelled[split].select(kept)
        recordings[split] = [recordings[split][i] for i in kept]
    sources = {split: _read(rows[split], labelled[split], recordings[split], split, settings, rules) for split in SPLITS}
    tables = {split: [*sources[split].table, *sources[split].background_table] for split in SPLITS}
    _check_apart({split: [row["sha256"] for row in tables[split]] for split in SPLITS}, "file (by its SHA-256)")
    return sources


def common_classes(sources: dict[str, Sources]) -> list[str]:
    """All classes, sorted. Raises `UserError` if one has no sound in a split."""
    by_split = {split: {sound.label for sound in sources[split].sounds} for split in SPLITS}
    classes = sorted(set().union(*by_split.values()))
    for split in SPLITS:
        if without := [name for name in classes if name not in by_split[split]]:
            raise UserError(f"no {split} source has the class {', '.join(without)}: add some, or split in another way")
    return classes


def _select(splits: datasets.DatasetDict, settings: SourceSettings) -> dict[str, datasets.Dataset]:
    """The rows of each split, by fold, fraction or split."""
    if settings.fold_column is not None:
        folds = zip(SPLITS, (settings.train_folds, settings.test_folds))
        return {split: select_folds(splits, settings.fold_column, values) for split, values in folds}
    if settings.test_fraction is None:
        return {split: select_split(splits, name) for split, name in zip(SPLITS, (settings.train_split, settings.test_split))}
    rows = all_rows(splits)
    recordings = _recordings(rows, settings)
    shuffled = sorted(set(recordings), key=lambda name: hashlib.sha256(f"{settings.seed}/{name}".encode()).digest())
    test = set(shuffled[: round(settings.test_fraction * len(shuffled))])
    if not 0 < len(test) < len(shuffled):
        raise UserError(f"test_fraction {settings.test_fraction:g} leaves one of the splits without any of {len(shuffled)} recordings")
    return {split: rows.select([i for i, name in enumerate(recordings) if (name in test) == (split == "test")]) for split in SPLITS}


def _read(
    rows: datasets.Dataset, labelled: LabelledRows, recordings: list[str], split: str, settings: SourceSettings, rules: MixtureSettings
) -> Sources:
    names = _file_names(rows, settings)
    check_single(labelled)
    waveforms = Waveforms(labelled.sources, rules.sampling_rate, settings.memory_gb, f"decoding {split} sources")
    called = {source_name(source): name for source, name in zip(labelled.sources, names) if source.get("path")}
    for cause, left_out in waveforms.unreadable.items():
        waveforms.unreadable[cause] = [called.get(name, name) for name in left_out]
    sounds = []
    for i, (waveform, row) in enumerate(zip(waveforms, waveforms.kept)):
        if sound := find_sound(waveform, i, labelled.labels[row][0], rules):
            sounds.append(sound)
        else:
            waveforms.unreadable["silent"].append(names[row])
    waveforms.check_unreadable(settings.max_unreadable, split)
    table, metadata = [], rows.remove_columns("audio")
    for i in waveforms.kept:
        known = {"file": names[i], "label": labelled.labels[i][0], "recording": recordings[i], "sha256": _digest(labelled.sources[i])}
        table.append(known | {column: value for column, value in metadata[i].items() if column not in (*known, "split", "events")})
    backgrounds, background_table = _read_backgrounds(settings, rules, split)
    return Sources(waveforms, sounds, table, backgrounds, background_table)


def _read_backgrounds(settings: SourceSettings, rules: MixtureSettings, split: str) -> tuple[Waveforms, list[dict[str, Any]]]:
    sources = settings.backgrounds[split]
    waveforms = open_backgrounds(sources, rules.sampling_rate, settings.memory_gb, settings.max_unreadable)
    table = []
    for source in sources:
        rows = open_table(source)
        metadata = rows.remove_columns("audio")
        for audio, values in zip(AudioColumn(rows), metadata if metadata.column_names else [{}] * len(rows)):
            name = os.path.join(source.name, _file_name(audio, source.path))
            known = {"file": name, "label": None, "recording": name, "sha256": _digest(audio)}
            table.append(known | {column: value for column, value in values.items() if column not in (*known, "split", "events")})
    return waveforms, [table[i] for i in waveforms.kept]


def _recordings(rows: datasets.Dataset, settings: SourceSettings) -> list[str]:
    """The recording that each sound is cut from."""
    names, column = _file_names(rows, settings), settings.group_column
    if column is None:
        return names
    if column not in rows.column_names:
        raise UserError(f"there is no column {column!r}, only {', '.join(rows.column_names)}: set group_column to one, or null")
    for name, value in zip(names, rows[column]):
        if value is None or value == "":
            raise UserError(f"{name} has no value in the column {column!r}, so its recording is unknown: fill it in")
    return [str(value) for value in rows[column]]


def _file_names(rows: datasets.Dataset, settings: SourceSettings) -> list[str]:
    return [_file_name(source, settings.data_dir) for source in AudioColumn(rows)]


def _file_name(source: dict, folder: str) -> str:
    """The path relative to a folder; of a sound in a larger file, its name there or the hash of its content."""
    if source.get("bytes") is None:
        return os.path.relpath(source["path"], folder)
    return source["path"] or _digest(source)


def _digest(source: dict) -> str:
    held = source.get("bytes")
    return hashlib.sha256(Path(decode_path(source["path"])).read_bytes() if held is None else held).hexdigest()


def _check_apart(values: dict[str, list[str]], what: str) -> None:
    if shared := sorted(set(values["train"]) & set(values["test"])):
        raise UserError(
            f"train and test share {len(shared)} {what}: {', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}: choose folds or "
            "splits that keep them apart"
        )
