"""Labelled data sets as their authors distribute them, read into tables of files: ESC-50, Speech Commands, AudioSet, and those with strong
labels, each event with onset and offset in seconds: URBAN-SED, SPASS, IDMT-DESED-FL."""

import csv
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .folders import AUDIO_SUFFIXES, import_datasets, table_of_files
from .paths import contents, files_below


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
    "eval": {"test": ["eval"]},
}
URBAN_SED_CLASSES = (
    *("air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling"),
    *("engine_idling", "gun_shot", "jackhammer", "siren", "street_music"),
)
DESED_CLASSES = (
    *("Alarm_bell_ringing", "Blender", "Cat", "Dishes", "Dog"),
    *("Electric_shaver_toothbrush", "Frying", "Running_water", "Speech", "Vacuum_cleaner"),
)
SPASS_SCENES = ("Square", "Park", "Waterfront", "Street", "Market")
STRONG_LABELS = {  # Scaper's format, without a header, and DCASE's; a clip without sound has an empty file, or a row of its name alone
    "annotations": "audio/SPLIT/CLIP.wav with annotations/SPLIT/CLIP.txt (onset<TAB>offset<TAB>label)",
    "metadata": "audio/SPLIT/CLIP.wav with metadata/SPLIT.tsv (filename<TAB>onset<TAB>offset<TAB>event_label)",
}
SPLIT_NAMES = {"validate": "validation"}  # URBAN-SED's, and everyone else's
Events = dict[str, list[dict[str, Any]]]  # by name of the clip

_STRONG = f"either {' or '.join(STRONG_LABELS.values())}"
EXPECTED = {
    "esc50": "the folder of meta/esc50.csv and audio/; subset: null, or esc10",
    "speech_commands": "an extracted archive; subset: v1 (30 words), v2 (35), or v1_12, of two: speech_commands{,_test_set}_v0.01/",
    "audioset": "{eval,balanced_train,unbalanced_train}_segments.csv, class_labels_indices.csv, clips YTID.wav at any depth; subset: "
    + ", ".join(AUDIOSET_SEGMENTS),
    "spass": f"a folder for each scene, in it {_STRONG}; subset: {', '.join(SPASS_SCENES)}",
    "urban_sed": "URBAN-SED v2: audio/{train,validate,test}/ and annotations/{train,validate,test}/",
    "idmt_desed": f"DESED-FL: {_STRONG}",
}


def _read_table(table: Path, columns: Sequence[str], delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """Place of each row, for messages, and its text in these columns."""
    if not table.is_file():
        raise UserError(f"there is no {table}: extract the data set again")
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise UserError(f"{table} has the columns {', '.join(reader.fieldnames or ['none'])}, but needs {', '.join(columns)}")
        rows = [(f"line {reader.line_num} of {table}", [row[column] or "" for column in columns]) for row in reader]
    if not rows:
        raise UserError(f"{table} has no rows")
    return rows


def _first_names(names: Iterable[str]) -> str:
    """Their number and the first five, for messages."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _tables(splits: Mapping[str, Sequence[tuple[Any, ...]]], features: dict[str, Any]) -> "DatasetDict":
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
    for place, values in _read_table(table, columns):
        if short := [column for column, value in zip(columns, values) if not value]:
            raise UserError(f"{place} has nothing in {', '.join(short)}: download it again")
        try:
            rows.append((values[0], int(values[1]), int(values[2]), values[3], values[4]))
        except ValueError as error:
            raise UserError(f"{place} has a fold or a target that is not a whole number ({error}): download it again") from error
    listed, names = {row[0] for row in rows}, {row[2]: row[3] for row in rows}
    if missing := {name for name in listed if not (audio / name).is_file()}:
        raise UserError(f"clips of {table} that are not in {audio}: {_first_names(missing)}; download the data set again")
    if unlisted := set(files_below(audio, AUDIO_SUFFIXES)) - listed:
        raise UserError(f"clips in {audio} that {table} does not label: {_first_names(unlisted)}; remove them")
    for _, _, target, category, _ in rows:
        if names[target] != category:
            raise UserError(f"{table} calls target {target} both {category} and {names[target]}")
    kept = [row for row in rows if subset is None or row[4] == "True"]
    if not kept:
        raise UserError(f"no clip of {table} has True in the column esc10: download it again")
    datasets = import_datasets()
    classes = [names[target] for target in sorted({row[2] for row in kept})]
    features = {"label": datasets.ClassLabel(names=classes), "fold": datasets.Value("int64")}
    return _tables({"train": [(audio / name, category, fold) for name, fold, _, category, _ in kept]}, features)


def open_speech_commands(root: Path, subset: str) -> "DatasetDict":
    """Google's Speech Commands (Warden, arXiv 1804.03209): all 30 or 35 words, or the twelve classes of SUPERB's keyword spotting.

    The twelve: ten keywords; every other word is `_unknown_`; `_silence_` is, in training only, the whole recordings of
    `_background_noise_` (about a minute each, cut at random when they are used). The test clips have an archive of their own. SUPERB draws
    its training clips by class: use `class_balanced`.
    """
    if subset != "v1_12":
        words = WORDS_V1 if subset == "v1" else WORDS_V2
        return _tables(_speech_commands_splits(root, words), {"label": import_datasets().ClassLabel(names=sorted(words))})
    main, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    splits = _speech_commands_splits(main, WORDS_V1)
    clips = {name: [(clip, word if word in KEYWORDS else "_unknown_") for clip, word in splits[name]] for name in ("train", "validation")}
    background = sorted((main / "_background_noise_").glob("*.wav"))
    if not background:
        raise UserError(f"{main} has no recordings in _background_noise_: extract the archive again")
    clips["train"] += [(clip, "_silence_") for clip in background]
    clips["test"] = _class_folders(test, KEYWORD_CLASSES)
    return _tables(clips, {"label": import_datasets().ClassLabel(names=list(KEYWORD_CLASSES))})


def _speech_commands_splits(root: Path, words: Sequence[str]) -> dict[str, list[tuple[Path, str]]]:
    """The clips of an extracted archive with their words; what neither list names is for training."""
    clips = dict(_class_folders(root, words))
    splits: dict[str, list[tuple[Path, str]]] = {}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}: extract the archive again")
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        listed = list(dict.fromkeys(root / line.strip() for line in lines if line.strip()))
        if missing := {str(clip.relative_to(root)) for clip in listed if clip not in clips}:
            raise UserError(f"clips of {root / name} that are not there, or in both lists: {_first_names(missing)}; extract it again")
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
        raise UserError(f"class folders of {root} without a clip: {_first_names(empty)}; extract the archive again")
    return clips


def open_audioset(root: Path, subset: str) -> "DatasetDict":
    """AudioSet (Gemmeke et al., ICASSP 2017): Google's tables, and the clips that the user has.

    A clip is named after its video, `YTID` or `YYTID`, optionally followed by `_` and more. Segments without a file (deleted videos) are
    counted and left out.
    """
    classes = {mid: name for _, (mid, name) in _read_table(root / "class_labels_indices.csv", ("mid", "display_name"))}
    segments = {
        split: [segment for table in tables for segment in _audioset_segments(root / f"{table}_segments.csv", classes)]
        for split, tables in AUDIOSET_SEGMENTS[subset].items()
    }
    clips = _clips_by_video(root, {video for rows in segments.values() for video, _ in rows})
    splits = {}
    for split, rows in segments.items():
        splits[split] = [(clips[video], labels) for video, labels in rows if video in clips]
        if not splits[split]:
            raise UserError(f"none of the {len(rows)} clips of the split {split} is below {root}: expected is {EXPECTED['audioset']}")
        if missing := [video for video, _ in rows if video not in clips]:
            logger.warning(
                f"AudioSet, split {split}: {len(missing)} of {len(rows)} clips ({len(missing) / len(rows):.1%}) are not below {root} and "
                f"are left out, such as {', '.join(missing[:5])}"
            )
    datasets = import_datasets()
    return _tables(splits, {"labels": datasets.List(datasets.ClassLabel(names=list(classes.values())))})


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
                valid = 0 <= float(start) < float(end) < math.inf
            except ValueError as error:
                raise UserError(f'{place} is {row}, but must be YTID, start_seconds, end_seconds, "labels"') from error
            if not valid:
                raise UserError(f"{place} goes from {start} s to {end} s, but a segment starts before it ends")
            labels = mids.split(",")
            if unknown := [mid for mid in labels if mid not in classes]:
                raise UserError(f"{place} has the label {unknown[0]!r}, which is none of class_labels_indices.csv")
            yield video, [classes[mid] for mid in labels]


def _clips_by_video(root: Path, videos: set[str]) -> dict[str, Path]:
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


def open_strong_labels(root: Path, subset: str | None, classes: Sequence[str] | None = None) -> "DatasetDict":
    """A data set in one of the formats of `STRONG_LABELS`: `events` of each clip in the order of its annotation, and `labels`, each once.

    URBAN-SED v2 is of Salamon et al., WASPAA 2017; DESED-FL of Johnson et al., 2021, read without its federated clients; SPASS of
    Viveros-Muñoz et al., 2023. How the archives of the last two arrange their files is not known here: either format is accepted.

    Args:
        root: the folder of `audio/` and of either `annotations/` or `metadata/`.
        subset: of SPASS, the folder of the scene below `root`.
        classes: all labels that may occur; `None` for any.
    """
    if subset is not None:
        if not (root / subset).is_dir():
            raise UserError(f"{root} holds {contents(root)}, but a folder {subset} was expected, one for each scene of SPASS")
        root = root / subset
    formats = [name for name in STRONG_LABELS if (root / name).is_dir()]
    if len(formats) != 1 or not (root / "audio").is_dir():
        raise UserError(f"{root} holds {contents(root)}, but expected is {_STRONG}")
    folders = sorted(folder for folder in (root / "audio").iterdir() if folder.is_dir())
    if not folders:
        raise UserError(f"{root / 'audio'} holds {contents(root / 'audio')}, but expected is a folder for each split, as train/")
    for name, standard in SPLIT_NAMES.items():
        if {name, standard} <= {folder.name for folder in folders}:
            raise UserError(f"{root / 'audio'} has both {name}/ and {standard}/: keep one of them")
    read = _read_scaper if formats == ["annotations"] else _read_dcase
    splits = {SPLIT_NAMES.get(folder.name, folder.name): _pair(folder, read(root, folder.name, classes)) for folder in folders}
    order = classes or sorted({event["label"] for clips in splits.values() for _, events in clips for event in events})
    datasets = import_datasets()
    event = {"label": datasets.Value("string"), "onset": datasets.Value("float64"), "offset": datasets.Value("float64")}
    features = {"labels": datasets.List(datasets.ClassLabel(names=list(order))), "events": datasets.List(event)}
    rows = {
        name: [(path, sorted({event["label"] for event in events}, key=order.index), events) for path, events in clips]
        for name, clips in splits.items()
    }
    return _tables(rows, features)


def _pair(folder: Path, annotations: Events) -> list[tuple[Path, list[dict[str, Any]]]]:
    """The clips of a folder, sorted, with their events."""
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            if path.stem in clips:
                raise UserError(f"{path} and {clips[path.stem].name} are one clip twice: keep one of them")
            clips[path.stem] = path
    if not clips:
        raise UserError(f"{folder} has no audio file directly in it, only {contents(folder)}")
    if without := clips.keys() - annotations.keys():
        raise UserError(f"clips of {folder} without annotation: {_first_names(without)}; annotate or remove them")
    if without := annotations.keys() - clips.keys():
        raise UserError(f"annotations without a clip in {folder}: {_first_names(without)}; add the clips, or remove the annotations")
    return [(path, annotations[stem]) for stem, path in clips.items()]


def _read_scaper(root: Path, split: str, classes: Collection[str] | None) -> Events:
    folder = root / "annotations" / split
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, though there is audio/{split}: add it")
    annotations: Events = {}
    for path in folder.glob("[!.]*.txt"):
        annotations[path.stem] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            place, values = f"line {number} of {path}", line.split("\t")
            if len(values) != 3:
                raise UserError(f"{place} is {line!r}, but must be onset<TAB>offset<TAB>label")
            annotations[path.stem].append(_event(place, classes, *values))
    return annotations


def _read_dcase(root: Path, split: str, classes: Collection[str] | None) -> Events:
    annotations: Events = defaultdict(list)
    table = root / "metadata" / f"{split}.tsv"
    for place, (name, onset, offset, label) in _read_table(table, ("filename", "onset", "offset", "event_label"), "\t"):
        events = annotations[Path(name).stem]
        if onset or offset or label:
            events.append(_event(place, classes, onset, offset, label))
    return annotations


def _event(place: str, classes: Collection[str] | None, onset: str, offset: str, label: str) -> dict[str, Any]:
    if not label.strip():
        raise UserError(f"{place} has no label: name the sound")
    if classes is not None and label not in classes:
        raise UserError(f"{place} has the label {label!r}, which is none of the {len(classes)} classes: {', '.join(classes)}")
    try:
        start, end = float(onset), float(offset)
    except ValueError:
        start = end = math.nan
    if not 0 <= start <= end < math.inf:
        raise UserError(f"{place} goes from {onset!r} to {offset!r}, but an event has an onset, in seconds, and an offset not before it")
    return {"label": label, "onset": start, "offset": end}


# How to open each, and its subsets.
PUBLISHED: dict[str, tuple[Callable[..., "DatasetDict"], tuple[str | None, ...]]] = {
    "esc50": (open_esc50, (None, "esc10")),
    "speech_commands": (open_speech_commands, ("v1", "v2", "v1_12")),
    "audioset": (open_audioset, tuple(AUDIOSET_SEGMENTS)),
    "spass": (open_strong_labels, SPASS_SCENES),
    "urban_sed": (partial(open_strong_labels, classes=URBAN_SED_CLASSES), (None,)),
    "idmt_desed": (partial(open_strong_labels, classes=DESED_CLASSES), (None,)),
}
