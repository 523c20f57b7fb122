"""Labelled data sets as their authors distribute them, opened as they lie and never decoded here.

```python
splits = open_data_set("ESC-50-master", "esc50")
splits["train"][0]  # {"audio": {"path": "ESC-50-master/audio/1-100032-A-0.wav", "bytes": None}, "label": 0, "fold": 1}
```
"""

import csv
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, List, Value
from pyarrow import ArrowException

from ..errors import UserError
from .event_layouts import (
    DESED_CLASSES,
    SPASS_SCENES,
    URBAN_SED_CLASSES,
    AnnotatedClip,
    contents,
    first_names,
    read_idmt_desed,
    read_spass,
    read_urban_sed,
)
from .labels import load_audio_folder
from .sources import AUDIO_SUFFIXES, files_below


logger = logging.getLogger(__name__)

# Pieces that ranks and workers may share out, of a data set that is streamed although it is a table of files.
STREAM_SHARDS = 1024

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
KEYWORD_CLASSES = (*KEYWORDS, "_unknown_", "_silence_")
WORDS_V1 = (
    *KEYWORDS,
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("bed", "bird", "cat", "dog", "happy", "house", "marvin", "sheila", "tree", "wow"),
)
WORDS_V2 = (*WORDS_V1, "backward", "follow", "forward", "learn", "visual")

AUDIOSET_SEGMENTS = {
    "20k": {"train": ["balanced_train"], "test": ["eval"]},
    "2m": {"train": ["balanced_train", "unbalanced_train"], "test": ["eval"]},
    "eval": {"test": ["eval"]},  # all that it takes to evaluate a model
}


def open_data_set(path: str, layout: str, *, subset: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """The splits of a labelled data set, with an undecoded column `audio` and columns of labels.

    Args:
        path: its folder; for the layout `"hub"` also an id on the Hub.
        layout: how it is arranged, one of `LAYOUTS`.
        subset: which part of it, where a layout has several; `LAYOUTS` names them. The configuration name of a Hub data set.
        streaming: rows as they are asked for. What lies on the Hub or in parquet files is then not copied into a cache first.

    Returns:
        Splits by name. Single labels are in `label`; several at once in `labels`, with `events` (`label`, and `onset` and `offset` in
        seconds) where they are known; `fold` where there are folds. "audiofolder", "parquet" and "hub" keep the columns they have.

    Raises:
        UserError: (a `ValueError`) if the layout is unknown or has no such subset, or what is found is not what it expects.
    """
    if layout not in _LAYOUTS:
        raise UserError(f"layout is {layout!r}, but one of {', '.join(LAYOUTS)} is expected")
    _, open_layout, subsets = _LAYOUTS[layout]
    if subsets is not None and subset not in subsets:
        allowed = ", ".join("null" if name is None else name for name in subsets)
        raise UserError(f"subset is {'null' if subset is None else repr(subset)}, but the layout {layout} has {allowed}")
    root = Path(path).expanduser()
    if layout != "hub" and not root.is_dir():
        raise UserError(f"there is no folder {path}, but the layout {layout} expects {LAYOUTS[layout]}")
    splits = open_layout(root, subset, streaming)
    if not streaming or isinstance(splits, IterableDatasetDict):
        return splits
    return IterableDatasetDict({name: rows.to_iterable_dataset(min(len(rows), STREAM_SHARDS)) for name, rows in splits.items()})


def _open_audio_folder(root: Path, subset: None, streaming: bool) -> DatasetDict:
    return load_audio_folder(root)


def _open_parquet(root: Path, subset: None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """`datasets` would find splits by itself, but leaves files out of whose names it makes nothing. Here each file has a split."""
    files: dict[str, list[str]] = {}
    for name in sorted(files_below(root, (".parquet",))):
        *folders, file = Path(name).parts
        folders = [folder for folder in folders if folder != "data"]  # as on the Hub: data/train-00000-of-00001.parquet
        split = folders[0] if folders else re.split(r"[-.]", file)[0]
        if not re.fullmatch(r"\w+", split):
            raise UserError(f"{root / name} does not tell its split: name it train-00000.parquet, say, or put it into a folder train/")
        files.setdefault("train" if split in ("shard", "data") else split, []).append(str(root / name))
    if not files:
        raise UserError(f"{root} holds {contents(root)}, but the layout parquet expects {LAYOUTS['parquet']}")
    return _load("parquet", root, data_files=files, streaming=streaming)


def _open_hub(root: Path, subset: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    if not root.is_dir():
        return _load(str(root), root, name=subset, streaming=streaming)
    # Of a local folder whose card has `configs:`, `datasets` would give the rows that it has kept of another one of the same name, or of
    # this one before it changed.
    found = [(name, (root / name).stat()) for name in sorted(files_below(root, ("",)))]
    state = [str(root.resolve()), *((name, file.st_size, file.st_mtime_ns) for name, file in found)]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    cache_dir = str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest}")
    return _load(str(root), root, name=subset, streaming=streaming, cache_dir=cache_dir)


def _load(builder: str, path: Path, **arguments) -> DatasetDict | IterableDatasetDict:
    """`datasets.load_dataset`, whose many errors become one that names the data set; its column of audio is called `audio`, undecoded."""
    try:
        splits = datasets.load_dataset(builder, **arguments)
    except (ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, LookupError, StopIteration) as error:
        raise UserError(f"the data set {path} cannot be opened: {type(error).__name__}: {error}") from error
    for name, rows in splits.items():
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:  # audio that was written without `datasets`
                rows = rows.cast_column(column, datasets.Audio(decode=False))
        columns = [column for column, feature in (rows.features or {}).items() if isinstance(feature, datasets.Audio)]
        if len(columns) != 1:
            found = f"columns {', '.join(rows.features)}" if rows.features else "no description of its columns"
            raise UserError(f"the split {name} of {path} has {len(columns)} columns of type Audio ({found}), but must have one")
        if columns != ["audio"]:
            rows = rows.rename_column(columns[0], "audio")
        splits[name] = rows.cast_column("audio", datasets.Audio(decode=False))
    return splits


def _open_esc50(root: Path, subset: str | None, streaming: bool) -> DatasetDict:
    """One split, for the five folds choose. Classes are in the order of their numbers; ESC-10's are those ten that the table marks."""
    table, audio = root / "meta" / "esc50.csv", root / "audio"
    rows = _read_csv(table, ("filename", "fold", "target", "category", "esc10"))
    if missing := {row["filename"] for row in rows if not (audio / row["filename"]).is_file()}:
        raise UserError(f"clips of {table} that are not in {audio}: {first_names(missing)}; download the data set again")
    if unlisted := set(files_below(audio, AUDIO_SUFFIXES)) - {row["filename"] for row in rows}:
        raise UserError(f"clips in {audio} that {table} does not label: {first_names(unlisted)}; take them away")
    try:
        names = {int(row["target"]): row["category"] for row in rows}
        folds = [int(row["fold"]) for row in rows]
    except ValueError as error:
        raise UserError(f"{table} has a fold or a target that is no whole number ({error}): download it again") from error
    for row in rows:
        if names[int(row["target"])] != row["category"]:
            raise UserError(f"{table} calls target {row['target']} both {row['category']} and {names[int(row['target'])]}")
    kept = [i for i, row in enumerate(rows) if subset is None or row["esc10"] == "True"]
    if not kept:
        raise UserError(f"no clip of {table} belongs to {subset}: its column esc10 says True nowhere")
    present = {int(rows[i]["target"]) for i in kept}
    columns: dict[str, list] = {"label": [rows[i]["category"] for i in kept], "fold": [folds[i] for i in kept]}
    features = {"label": ClassLabel(names=[names[target] for target in sorted(present)]), "fold": Value("int64")}
    return DatasetDict(train=_rows([audio / rows[i]["filename"] for i in kept], columns, features))


def _open_speech_commands(root: Path, subset: str, streaming: bool) -> DatasetDict:
    """Google's Speech Commands (Warden, arXiv 1804.03209): all 30 or 35 words, or the twelve classes of SUPERB's keyword spotting.

    The twelve: ten keywords; every other word is `_unknown_`; `_silence_` is, in training only, the recordings of `_background_noise_`,
    each whole (about a minute, of which a random roll chooses the part that is heard). The test clips are those of the archive made for it,
    which holds all twelve. SUPERB draws its training clips by class, so use `class_balanced`.
    """
    if subset != "v1_12":
        words = WORDS_V1 if subset == "v1" else WORDS_V2
        return _labelled_paths(_speech_commands_splits(root, words), sorted(words))
    main, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    splits = _speech_commands_splits(main, WORDS_V1)
    clips = {
        name: [(clip, label if label in KEYWORDS else "_unknown_") for clip, label in splits[name]] for name in ("train", "validation")
    }
    background = sorted((main / "_background_noise_").glob("*.wav"))
    if not background:
        raise UserError(f"{main} has no recordings in _background_noise_, which are the class _silence_: extract the archive again")
    clips["train"] += [(clip, "_silence_") for clip in background]
    clips["test"] = _class_folders(test, KEYWORD_CLASSES)
    return _labelled_paths(clips, KEYWORD_CLASSES)


def _speech_commands_splits(root: Path, words: Sequence[str]) -> dict[str, list[tuple[Path, str]]]:
    """The clips of an extracted archive with their words; what neither list names is for training."""
    clips = dict(_class_folders(root, words))
    splits: dict[str, list[tuple[Path, str]]] = {"train": []}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}, which tells the clips of the split {split}: extract the archive again")
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        listed = list(dict.fromkeys(root / line.strip() for line in lines if line.strip()))
        if missing := {str(clip.relative_to(root)) for clip in listed if clip not in clips}:
            raise UserError(f"clips of {root / name} that are not there, or in both lists: {first_names(missing)}; extract it again")
        splits[split] = [(clip, clips.pop(clip)) for clip in listed]
    splits["train"] = list(clips.items())
    return splits


def _class_folders(root: Path, classes: Sequence[str]) -> list[tuple[Path, str]]:
    """The clips below folders named after classes, and after these alone, which would otherwise be another task."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: expected is {LAYOUTS['speech_commands']}")
    found = {folder.name for folder in root.iterdir() if folder.is_dir()} - ({"_background_noise_"} - set(classes))
    if wrong := found.symmetric_difference(classes):
        raise UserError(
            f"the class folders of {root} are not the {len(classes)} expected: {len(wrong)} differ, {', '.join(sorted(wrong)[:5])} among "
            "them; is it another version, or not extracted to its end?"
        )
    clips = [(clip, label) for label in sorted(classes) for clip in sorted((root / label).glob("*.wav"))]
    if empty := set(classes) - {label for _, label in clips}:
        raise UserError(f"class folders of {root} without a clip: {first_names(empty)}; extract the archive again")
    return clips


def _open_audioset(root: Path, subset: str, streaming: bool) -> DatasetDict:
    """AudioSet (Gemmeke et al., ICASSP 2017): its tables as Google publishes them, and whatever clips one still has.

    A clip is called after its video, `YTID` or `YYTID`, perhaps followed by `_` and more, such as its start. Segments without a file,
    those of videos that were deleted, are counted and left out; clips of other segments are not read.
    """
    classes = {row["mid"]: row["display_name"] for row in _read_csv(root / "class_labels_indices.csv", ("index", "mid", "display_name"))}
    segments = {
        split: [segment for table in tables for segment in _audioset_segments(root / f"{table}_segments.csv", classes)]
        for split, tables in AUDIOSET_SEGMENTS[subset].items()
    }
    clips = _clips_by_video(root, {video for rows in segments.values() for video, _ in rows})
    splits = {}
    for split, rows in segments.items():
        found = [(clips[video], labels) for video, labels in rows if video in clips]
        if not found:
            raise UserError(f"none of the {len(rows)} clips of the split {split} is below {root}: expected is {LAYOUTS['audioset']}")
        if len(found) < len(rows):
            missing = [video for video, _ in rows if video not in clips]
            logger.warning(
                f"AudioSet, split {split}: {len(missing)} of {len(rows)} clips ({len(missing) / len(rows):.1%}) are not below {root} and "
                f"are left out, such as {', '.join(missing[:5])}: results differ from those of others by that much data"
            )
        splits[split] = _rows(
            [clip for clip, _ in found],
            {"labels": [labels for _, labels in found]},
            {"labels": List(ClassLabel(names=list(classes.values())))},
        )
    return DatasetDict(splits)


def _audioset_segments(table: Path, classes: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Video and class names of each line: three lines of comments, then `YTID, start_seconds, end_seconds, "mid,mid,..."`."""
    if not table.is_file():
        raise UserError(f"there is no {table}: expected is {LAYOUTS['audioset']}")
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        for row in reader:
            if not row or row[0].startswith("#"):
                continue
            place = f"line {reader.line_num} of {table}"
            try:
                video, start, end, mids = row
                backwards = not 0 <= float(start) < float(end) < math.inf
            except ValueError as error:
                raise UserError(f'{place} is {row}, but must be YTID, start_seconds, end_seconds, "labels"') from error
            if backwards:
                raise UserError(f"{place} goes from {start} s to {end} s, but a segment starts before it ends")
            labels = mids.split(",")
            if unknown := [mid for mid in labels if mid not in classes]:
                raise UserError(f"{place} has the label {unknown[0]!r}, which is none of the {len(classes)} of class_labels_indices.csv")
            yield video, [classes[mid] for mid in labels]


def _clips_by_video(root: Path, videos: set[str]) -> dict[str, Path]:
    clips: dict[str, Path] = {}
    for name in files_below(root, AUDIO_SUFFIXES):
        stem = Path(name).stem
        # An id has 11 characters, and may itself begin with a Y or hold a _: what it is, the tables decide.
        named = {stem[begin : begin + 11] for begin in (0, 1) if stem[:begin] in ("", "Y") and stem[begin + 11 : begin + 12] in ("", "_")}
        for video in named & videos:
            if video in clips:
                raise UserError(f"{root / name} and {clips[video]} are the same clip of AudioSet: keep one of them")
            clips[video] = root / name
    return clips


def _open_urban_sed(root: Path, subset: None, streaming: bool) -> DatasetDict:
    return _polyphonic(read_urban_sed(root), URBAN_SED_CLASSES)


def _open_idmt_desed(root: Path, subset: None, streaming: bool) -> DatasetDict:
    return _polyphonic(read_idmt_desed(root), DESED_CLASSES)


def _open_spass(root: Path, subset: str, streaming: bool) -> DatasetDict:
    splits = read_spass(root, subset)
    return _polyphonic(splits, sorted({event.label for clips in splits.values() for clip in clips for event in clip.events}))


def _polyphonic(splits: dict[str, list[AnnotatedClip]], classes: Sequence[str]) -> DatasetDict:
    """The events, and their labels once each."""
    event = {"label": Value("string"), "onset": Value("float64"), "offset": Value("float64")}
    features = {"labels": List(ClassLabel(names=list(classes))), "events": List(event)}
    return DatasetDict(
        {
            name: _rows(
                [clip.path for clip in clips],
                {
                    "labels": [sorted({event.label for event in clip.events}, key=list(classes).index) for clip in clips],
                    "events": [[event._asdict() for event in clip.events] for clip in clips],
                },
                features,
            )
            for name, clips in splits.items()
        }
    )


def _labelled_paths(splits: dict[str, list[tuple[Path, str]]], classes: Sequence[str]) -> DatasetDict:
    features = {"label": ClassLabel(names=list(classes))}
    return DatasetDict(
        {name: _rows([clip for clip, _ in clips], {"label": [label for _, label in clips]}, features) for name, clips in splits.items()}
    )


def _rows(clips: list[Path], columns: dict[str, list], features: dict) -> Dataset:
    """A table of files, in memory; labels are given by name."""
    features = datasets.Features({"audio": datasets.Audio(decode=False), **features})
    return Dataset.from_dict({"audio": [str(clip) for clip in clips], **columns}, features=features)


def _read_csv(table: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    if not table.is_file():
        raise UserError(f"there is no {table}, which should tell the labels")
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if lacking := [column for column in needed if column not in (reader.fieldnames or ())]:
            raise UserError(f"{table} has no column {', '.join(lacking)}, only {', '.join(reader.fieldnames or ['none'])}")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if short := [column for column in needed if not row[column]]:
            raise UserError(f"line {number} of {table} has nothing in {', '.join(short)}: download the table again")
    if not rows:
        raise UserError(f"{table} has no rows")
    return rows


class _Layout(NamedTuple):
    expects: str
    open: Callable[..., DatasetDict | IterableDatasetDict]
    subsets: tuple[str | None, ...] | None = (None,)  # that it has; `None` for any


_STRONG_LABELS = "audio/SPLIT/ with annotations/SPLIT/CLIP.txt or metadata/SPLIT.tsv"
_LAYOUTS = {
    "audiofolder": _Layout(
        "a folder of `datasets`' audiofolder: class folders or a metadata.csv, in train/ and test/ or not", _open_audio_folder
    ),
    "parquet": _Layout(
        "parquet files named SPLIT-*.parquet or SPLIT/*.parquet (shard-*, data-*: train), with a column of Audio", _open_parquet
    ),
    "hub": _Layout("the id of a data set on the Hub, or its folder, without a loading script; subset: its configuration", _open_hub, None),
    "esc50": _Layout("the folder of meta/esc50.csv and audio/; subset: null, or esc10", _open_esc50, (None, "esc10")),
    "speech_commands": _Layout(
        "an extracted archive; subset: v1 (30 words), v2 (35), or v1_12, of speech_commands_v0.01/ beside speech_commands_test_set_v0.01/",
        _open_speech_commands,
        ("v1", "v2", "v1_12"),
    ),
    "audioset": _Layout(
        "{eval,balanced_train,unbalanced_train}_segments.csv, class_labels_indices.csv, clips YTID.wav at any depth; subset: "
        f"{', '.join(AUDIOSET_SEGMENTS)}",
        _open_audioset,
        tuple(AUDIOSET_SEGMENTS),
    ),
    "spass": _Layout(f"a folder for each scene, in it {_STRONG_LABELS}; subset: {', '.join(SPASS_SCENES)}", _open_spass, SPASS_SCENES),
    "urban_sed": _Layout("URBAN-SED v2: audio/{train,validate,test}/ and annotations/{train,validate,test}/", _open_urban_sed),
    "idmt_desed": _Layout(f"DESED-FL: {_STRONG_LABELS}", _open_idmt_desed),
}

LAYOUTS: dict[str, str] = {name: layout.expects for name, layout in _LAYOUTS.items()}
"""Name of each layout, and what it expects to find, in one line."""
