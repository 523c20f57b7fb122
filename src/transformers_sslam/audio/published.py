"""Labelled data sets as their authors distribute them, each read into tables of files: ESC-50, Speech Commands, AudioSet, and those with
strong labels (see `event_layouts`)."""

import csv
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .event_layouts import (
    DESED_CLASSES,
    SPASS_SCENES,
    URBAN_SED_CLASSES,
    AnnotatedClip,
    first_names,
    read_idmt_desed,
    read_spass,
    read_urban_sed,
)
from .folders import AUDIO_SUFFIXES, import_datasets, table_of_files
from .paths import files_below


if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

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

_STRONG_LABELS = "audio/SPLIT/ with annotations/SPLIT/CLIP.txt or metadata/SPLIT.tsv"
EXPECTED = {
    "esc50": "the folder of meta/esc50.csv and audio/; subset: null, or esc10",
    "speech_commands": "an extracted archive; subset: v1 (30 words), v2 (35), or v1_12, of speech_commands_v0.01/ beside "
    "speech_commands_test_set_v0.01/",
    "audioset": "{eval,balanced_train,unbalanced_train}_segments.csv, class_labels_indices.csv, clips YTID.wav at any depth; subset: "
    + ", ".join(AUDIOSET_SEGMENTS),
    "spass": f"a folder for each scene, in it {_STRONG_LABELS}; subset: {', '.join(SPASS_SCENES)}",
    "urban_sed": "URBAN-SED v2: audio/{train,validate,test}/ and annotations/{train,validate,test}/",
    "idmt_desed": f"DESED-FL: {_STRONG_LABELS}",
}


def open_esc50(root: Path, subset: str | None) -> "DatasetDict":
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
        raise UserError(f"{table} has a fold or a target that is not a whole number ({error}): download it again") from error
    for row in rows:
        if names[int(row["target"])] != row["category"]:
            raise UserError(f"{table} calls target {row['target']} both {row['category']} and {names[int(row['target'])]}")
    kept = [i for i, row in enumerate(rows) if subset is None or row["esc10"] == "True"]
    if not kept:
        raise UserError(f"no clip of {table} belongs to {subset}: its column esc10 says True nowhere")
    present = {int(rows[i]["target"]) for i in kept}
    columns: dict[str, list] = {"label": [rows[i]["category"] for i in kept], "fold": [folds[i] for i in kept]}
    datasets = import_datasets()
    features = {"label": datasets.ClassLabel(names=[names[target] for target in sorted(present)]), "fold": datasets.Value("int64")}
    return datasets.DatasetDict(train=table_of_files([audio / rows[i]["filename"] for i in kept], columns, features))


def open_speech_commands(root: Path, subset: str) -> "DatasetDict":
    """Google's Speech Commands (Warden, arXiv 1804.03209): all 30 or 35 words, or the twelve classes of SUPERB's keyword spotting.

    The twelve: ten keywords; every other word is `_unknown_`; `_silence_` is, in training only, the recordings of `_background_noise_`,
    each whole (about a minute, of which a random roll chooses the part that is used). The test clips are those of the archive made for it,
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
        raise UserError(f"there is no folder {root}: expected is {EXPECTED['speech_commands']}")
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


def open_audioset(root: Path, subset: str) -> "DatasetDict":
    """AudioSet (Gemmeke et al., ICASSP 2017): its tables as Google publishes them, and whatever clips one still has.

    A clip is called after its video, `YTID` or `YYTID`, perhaps followed by `_` and more, such as its start. Segments without a file,
    those of videos that were deleted, are counted and left out; clips of other segments are not read.
    """
    classes = {row["mid"]: row["display_name"] for row in _read_csv(root / "class_labels_indices.csv", ("index", "mid", "display_name"))}
    segments = {
        split: [segment for table in tables for segment in _audioset_segments(root / f"{table}_segments.csv", classes)]
        for split, tables in AUDIOSET_SEGMENTS[subset].items()
    }
    datasets, clips = import_datasets(), _clips_by_video(root, {video for rows in segments.values() for video, _ in rows})
    splits = {}
    for split, rows in segments.items():
        found = [(clips[video], labels) for video, labels in rows if video in clips]
        if not found:
            raise UserError(f"none of the {len(rows)} clips of the split {split} is below {root}: expected is {EXPECTED['audioset']}")
        if len(found) < len(rows):
            missing = [video for video, _ in rows if video not in clips]
            logger.warning(
                f"AudioSet, split {split}: {len(missing)} of {len(rows)} clips ({len(missing) / len(rows):.1%}) are not below {root} and "
                f"are left out, such as {', '.join(missing[:5])}: results differ from those of others by that much data"
            )
        splits[split] = table_of_files(
            [clip for clip, _ in found],
            {"labels": [labels for _, labels in found]},
            {"labels": datasets.List(datasets.ClassLabel(names=list(classes.values())))},
        )
    return datasets.DatasetDict(splits)


def _audioset_segments(table: Path, classes: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Video and class names of each line: three lines of comments, then `YTID, start_seconds, end_seconds, "mid,mid,..."`."""
    if not table.is_file():
        raise UserError(f"there is no {table}: expected is {EXPECTED['audioset']}")
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


def open_urban_sed(root: Path, subset: None) -> "DatasetDict":
    return _polyphonic(read_urban_sed(root), URBAN_SED_CLASSES)


def open_idmt_desed(root: Path, subset: None) -> "DatasetDict":
    return _polyphonic(read_idmt_desed(root), DESED_CLASSES)


def open_spass(root: Path, subset: str) -> "DatasetDict":
    splits = read_spass(root, subset)
    return _polyphonic(splits, sorted({event.label for clips in splits.values() for clip in clips for event in clip.events}))


def _polyphonic(splits: dict[str, list[AnnotatedClip]], classes: Sequence[str]) -> "DatasetDict":
    """The events, and their labels once each."""
    datasets, order = import_datasets(), {name: number for number, name in enumerate(classes)}
    event = {"label": datasets.Value("string"), "onset": datasets.Value("float64"), "offset": datasets.Value("float64")}
    features = {"labels": datasets.List(datasets.ClassLabel(names=list(classes))), "events": datasets.List(event)}
    tables = {}
    for name, clips in splits.items():
        columns = {
            "labels": [sorted({event.label for event in clip.events}, key=order.__getitem__) for clip in clips],
            "events": [[event._asdict() for event in clip.events] for clip in clips],
        }
        tables[name] = table_of_files([clip.path for clip in clips], columns, features)
    return datasets.DatasetDict(tables)


def _labelled_paths(splits: dict[str, list[tuple[Path, str]]], classes: Sequence[str]) -> "DatasetDict":
    datasets = import_datasets()
    features = {"label": datasets.ClassLabel(names=list(classes))}
    return datasets.DatasetDict(
        {
            name: table_of_files([clip for clip, _ in clips], {"label": [label for _, label in clips]}, features)
            for name, clips in splits.items()
        }
    )


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


# How each is opened, and the subsets that it has.
PUBLISHED: dict[str, tuple[Callable[..., "DatasetDict"], tuple[str | None, ...]]] = {
    "esc50": (open_esc50, (None, "esc10")),
    "speech_commands": (open_speech_commands, ("v1", "v2", "v1_12")),
    "audioset": (open_audioset, tuple(AUDIOSET_SEGMENTS)),
    "spass": (open_spass, SPASS_SCENES),
    "urban_sed": (open_urban_sed, (None,)),
    "idmt_desed": (open_idmt_desed, (None,)),
}
