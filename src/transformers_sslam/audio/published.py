"""Data sets with labels of clips as their authors distribute them, read into tables of files: ESC-50, Speech Commands, Free Spoken Digit
Dataset, AudioSet."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .annotations import read_table
from .folders import AUDIO_SUFFIXES, import_datasets, table_of_files
from .paths import contents, files_below
from .text import read_cells, read_text


if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
KEYWORD_CLASSES = (*KEYWORDS, "_unknown_", "_silence_")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS_V1 = (
    *KEYWORDS,
    *DIGITS,
    *("bed", "bird", "cat", "dog", "happy", "house", "marvin", "sheila", "tree", "wow"),
)
WORDS_V2 = (*WORDS_V1, "backward", "follow", "forward", "learn", "visual")
TEST_TAKES = 5  # of the Free Spoken Digit Dataset: recordings 0 to 4 of each digit of each speaker are the official test

AUDIOSET_SEGMENTS = {
    "20k": {"train": ["balanced_train"], "test": ["eval"]},
    "2m": {"train": ["balanced_train", "unbalanced_train"], "test": ["eval"]},
    "eval": {"test": ["eval"]},
}

EXPECTED = {
    "esc50": "the folder of meta/esc50.csv and audio/; subset: null, or esc10",
    "speech_commands": "an extracted archive; subset: v1 (30 words), v2 (35), v1_digits, v2_digits, or v1_12, of two: "
    "speech_commands{,_test_set}_v0.01/",
    "fsdd": "the Free Spoken Digit Dataset: recordings/DIGIT_SPEAKER_INDEX.wav",
    "audioset": "{eval,balanced_train,unbalanced_train}_segments.csv, class_labels_indices.csv, clips YTID.wav at any depth; subset: "
    + ", ".join(AUDIOSET_SEGMENTS),
}


def first_names(names: Iterable[str]) -> str:
    """Their number and the first five, for messages."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def tables_of_splits(splits: Mapping[str, Sequence[tuple[Any, ...]]], features: dict[str, Any]) -> "DatasetDict":
    """A table for each split; each clip is given as its path and its value for each feature."""
    tables = {
        name: table_of_files(
            [path for path, *_ in clips], {column: [clip[i] for clip in clips] for i, column in enumerate(features, start=1)}, features
        )
        for name, clips in splits.items()
    }
    return import_datasets().DatasetDict(tables)


def open_esc50(root: Path, subset: str | None) -> "DatasetDict":
    """One split with five folds. Classes are in the order of their numbers."""
    table, audio = root / "meta" / "esc50.csv", root / "audio"
    columns = ("filename", "fold", "target", "category", "esc10")
    rows: list[tuple[str, int, int, str, str]] = []
    for place, values in read_table(table, columns):
        if short := [column for column, value in zip(columns, values) if not value]:
            raise UserError(f"{place} has nothing in {', '.join(short)}: download it again")
        try:
            rows.append((values[0], int(values[1]), int(values[2]), values[3], values[4]))
        except ValueError as error:
            raise UserError(f"{place} has a fold or a target that is not a whole number ({error}): download it again") from error
    listed, names = {row[0] for row in rows}, {row[2]: row[3] for row in rows}
    if missing := {name for name in listed if not (audio / name).is_file()}:
        raise UserError(f"clips of {table} that are not in {audio}: {first_names(missing)}; download the data set again")
    if unlisted := set(files_below(audio, AUDIO_SUFFIXES)) - listed:
        raise UserError(f"clips in {audio} that {table} does not label: {first_names(unlisted)}; remove them")
    for _, _, target, category, _ in rows:
        if names[target] != category:
            raise UserError(f"{table} calls target {target} both {category} and {names[target]}")
    kept = [row for row in rows if subset is None or row[4] == "True"]
    if not kept:
        raise UserError(f"no clip of {table} has True in the column esc10: download it again")
    datasets = import_datasets()
    classes = [names[target] for target in sorted({row[2] for row in kept})]
    features = {"label": datasets.ClassLabel(names=classes), "fold": datasets.Value("int64")}
    return tables_of_splits({"train": [(audio / name, category, fold) for name, fold, _, category, _ in kept]}, features)


def open_speech_commands(root: Path, subset: str) -> "DatasetDict":
    """Google's Speech Commands (Warden, arXiv 1804.03209): all 30 or 35 words, the ten digits of either version, or the twelve classes of
    SUPERB's keyword spotting.

    `speaker` is the part of a clip's name before `_nohash_`, which the authors made of the speaker: no speaker is in two splits.

    The twelve: ten keywords; every other word is `_unknown_`; `_silence_` is, in training only, the whole recordings of
    `_background_noise_` (about a minute each, cut at random when they are used). The test clips have an archive of their own. SUPERB draws
    its training clips by class: use `class_balanced`.
    """
    if subset != "v1_12":
        words = WORDS_V1 if subset.startswith("v1") else WORDS_V2
        chosen = DIGITS if subset.endswith("_digits") else words
        found = _speech_commands_splits(root, words)
        rows = {split: [(clip, word, _speaker(clip)) for clip, word in clips if word in chosen] for split, clips in found.items()}
        datasets = import_datasets()
        return tables_of_splits(rows, {"label": datasets.ClassLabel(names=sorted(chosen)), "speaker": datasets.Value("string")})
    main, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    splits = _speech_commands_splits(main, WORDS_V1)
    clips = {name: [(clip, word if word in KEYWORDS else "_unknown_") for clip, word in splits[name]] for name in ("train", "validation")}
    background = sorted((main / "_background_noise_").glob("*.wav"))
    if not background:
        raise UserError(f"{main} has no recordings in _background_noise_: extract the archive again")
    clips["train"] += [(clip, "_silence_") for clip in background]
    clips["test"] = _class_folders(test, KEYWORD_CLASSES)
    return tables_of_splits(clips, {"label": import_datasets().ClassLabel(names=list(KEYWORD_CLASSES))})


def _speaker(clip: Path) -> str:
    speaker, mark, _ = clip.name.partition("_nohash_")
    if not (speaker and mark):
        raise UserError(f"{clip} does not tell its speaker, as SPEAKER_nohash_0.wav does: extract the archive again")
    return speaker


def _speech_commands_splits(root: Path, words: Sequence[str]) -> dict[str, list[tuple[Path, str]]]:
    """The clips of an extracted archive with their words; what neither list names is for training."""
    clips = dict(_class_folders(root, words))
    splits: dict[str, list[tuple[Path, str]]] = {}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}: extract the archive again")
        lines = read_text(root / name).splitlines()
        listed = list(dict.fromkeys(root / line.strip() for line in lines if line.strip()))
        if missing := {str(clip.relative_to(root)) for clip in listed if clip not in clips}:
            raise UserError(f"clips of {root / name} that are not there, or in both lists: {first_names(missing)}; extract it again")
        splits[split] = [(clip, clips.pop(clip)) for clip in listed]
    return {"train": list(clips.items()), **splits}


def _class_folders(root: Path, classes: Sequence[str]) -> list[tuple[Path, str]]:
    """The clips below folders named after classes. Other folders are an error: they belong to another task."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: expected is {EXPECTED['speech_commands']}")
    found = {folder.name for folder in root.iterdir() if folder.is_dir()} - ({"_background_noise_"} - set(classes))
    if wrong := found.symmetric_difference(classes):
        raise UserError(
            f"the class folders of {root} are not the {len(classes)} expected: {len(wrong)} differ, {', '.join(sorted(wrong)[:5])} among "
            "them; check the version, or extract the archive again"
        )
    clips = [(clip, label) for label in sorted(classes) for clip in sorted((root / label).glob("*.wav"))]
    if empty := set(classes) - {label for _, label in clips}:
        raise UserError(f"class folders of {root} without a clip: {first_names(empty)}; extract the archive again")
    return clips


def open_fsdd(root: Path, subset: None) -> "DatasetDict":
    """Free Spoken Digit Dataset (Jackson et al., github.com/Jakobovski/free-spoken-digit-dataset, Zenodo 10.5281/zenodo.1342401): digits
    by a few speakers, 8 kHz.

    Clips are `recordings/DIGIT_SPEAKER_INDEX.wav`; those of index 0 to 4 are the split test, the others train, as its page says. So every
    speaker is in both. `label` is the digit, `speaker` the name.
    """
    folder = root / "recordings"
    names = sorted(files_below(folder, AUDIO_SUFFIXES)) if folder.is_dir() else []
    if not names:
        found = f"{folder} is empty" if folder.is_dir() else f"{root} holds {contents(root)}"
        raise UserError(f"{found}, but expected is {EXPECTED['fsdd']}")
    parts = {name: re.fullmatch(r"([0-9])_([^_/]+)_([0-9]+)\.wav", name) for name in names}
    if wrong := [name for name, part in parts.items() if part is None]:
        raise UserError(f"clips in {folder} that are not named DIGIT_SPEAKER_INDEX.wav: {first_names(wrong)}; remove them")
    splits: dict[str, list[tuple[Path, str, str]]] = {"train": [], "test": []}
    for name, (digit, speaker, index) in sorted((name, part.groups()) for name, part in parts.items() if part):
        splits["test" if int(index) < TEST_TAKES else "train"].append((folder / name, digit, speaker))
    datasets = import_datasets()
    return tables_of_splits(splits, {"label": datasets.ClassLabel(names=list("0123456789")), "speaker": datasets.Value("string")})


def open_audioset(root: Path, subset: str) -> "DatasetDict":
    """AudioSet (Gemmeke et al., ICASSP 2017): Google's tables, and the clips that the user has.

    A clip is named after its video, `YTID` or `YYTID`, optionally followed by `_` and more. Segments without a file (deleted videos) are
    counted and left out.
    """
    table = root / "class_labels_indices.csv"
    classes = {mid: name for _, (mid, name) in read_table(table, ("mid", "display_name"))}
    if repeated := [name for name, count in Counter(classes.values()).items() if count > 1]:
        raise UserError(f"{table} gives several ids the name {repeated[0]!r}: download it again")
    segments = {
        split: [segment for table in tables for segment in _audioset_segments(root / f"{table}_segments.csv", classes)]
        for split, tables in AUDIOSET_SEGMENTS[subset].items()
    }
    clips = clips_by_video(root, {video for rows in segments.values() for video, _ in rows})
    splits = {split: present_clips(f"AudioSet, split {split}", root, rows, clips) for split, rows in segments.items()}
    datasets = import_datasets()
    return tables_of_splits(splits, {"labels": datasets.List(datasets.ClassLabel(names=list(classes.values())))})


def _audioset_segments(table: Path, classes: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Video and class names of each line: three lines of comments, then `YTID, start_seconds, end_seconds, "mid,mid,..."`."""
    if not table.is_file():
        raise UserError(f"there is no {table}: expected is {EXPECTED['audioset']}")
    for line, row in read_cells(table, skip_blanks=True):
        if not row or row[0].startswith("#"):
            continue
        place = f"line {line} of {table}"
        try:
            video, start, end, mids = row
            valid = 0 <= float(start) < float(end) < math.inf
        except ValueError as error:
            raise UserError(f'{place} is {row}, but must be YTID, start_seconds, end_seconds, "labels"') from error
        if not valid:
            raise UserError(f"{place} goes from {start} s to {end} s, but a segment starts before it ends")
        labels = mids.split(",")
        if unknown := [mid for mid in labels if mid not in classes]:
            raise UserError(f"{place} has the label {unknown[0]!r}, which is none of class_labels_indices.csv")
        yield video, [classes[mid] for mid in labels]


def present_clips(name: str, root: Path, rows: Sequence[tuple[str, Any]], clips: Mapping[str, Path]) -> list[tuple[Path, Any]]:
    """The path and the annotation of each row, which has its key in `clips`. Rows without a clip are counted; all of them: `UserError`."""
    missing = [key for key, _ in rows if key not in clips]
    if len(missing) == len(rows):
        raise UserError(f"{name}: none of the {len(rows)} clips is below {root}, such as {', '.join(missing[:5])}: put them there")
    if missing:
        logger.warning(
            f"{name}: {len(missing)} of {len(rows)} clips ({len(missing) / len(rows):.1%}) are not below {root} and are left out, such as "
            f"{', '.join(missing[:5])}"
        )
    return [(clips[key], annotation) for key, annotation in rows if key in clips]


def clips_by_video(root: Path, videos: set[str]) -> dict[str, Path]:
    clips: dict[str, Path] = {}
    for name in files_below(root, AUDIO_SUFFIXES):
        stem = Path(name).stem
        # An id has 11 characters, which may begin with Y or contain _: the tables decide.
        named = {stem[begin : begin + 11] for begin in (0, 1) if stem[:begin] in ("", "Y") and stem[begin + 11 : begin + 12] in ("", "_")}
        for video in named & videos:
            if video in clips:
                raise UserError(f"{root / name} and {clips[video]} are the same clip of AudioSet: keep one of them")
            clips[video] = root / name
    return clips


# How to open each, and its subsets.
PUBLISHED: dict[str, tuple[Callable[..., "DatasetDict"], tuple[str | None, ...]]] = {
    "esc50": (open_esc50, (None, "esc10")),
    "speech_commands": (open_speech_commands, ("v1", "v2", "v1_digits", "v2_digits", "v1_12")),
    "fsdd": (open_fsdd, (None,)),
    "audioset": (open_audioset, tuple(AUDIOSET_SEGMENTS)),
}
