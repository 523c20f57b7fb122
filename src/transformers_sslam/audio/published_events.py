"""Data sets whose labels have times as their authors distribute them: URBAN-SED, SPASS, IDMT-DESED-FL, DESED, DCASE 2024 task 4, strongly
labelled AudioSet, MAESTRO, DCASE 2016 task 2.

Each is read into tables of files with `events`, `{"label", "onset", "offset"}`, in seconds, in the order of the annotation, and `labels`,
the classes of the clip, each once. An event without both times is a weak label: its class is in the clip at some time. Soft labels have a
`value` besides; those above one half count as labels of the clip. We had no copy of these data sets: files and columns are as their papers,
pages and programs describe them, and each function says what it assumes.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from ..errors import UserError
from .annotations import Event, Events, make_event, read_dcase, read_header, read_jams, read_table, read_texts
from .events import PRESENT
from .folders import AUDIO_SUFFIXES, import_datasets
from .paths import contents, files_below
from .published import clips_by_video, first_names, present_clips, tables_of_splits
from .text import read_text


if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

URBAN_SED_CLASSES = (
    *("air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling"),
    *("engine_idling", "gun_shot", "jackhammer", "siren", "street_music"),
)
DESED_CLASSES = (
    *("Alarm_bell_ringing", "Blender", "Cat", "Dishes", "Dog"),
    *("Electric_shaver_toothbrush", "Frying", "Running_water", "Speech", "Vacuum_cleaner"),
)
SPASS_SCENES = ("Square", "Park", "Waterfront", "Street", "Market")
STRONG_LABELS = {  # Scaper's formats, and DCASE's; a clip without sound has an empty file, or a row of its name alone
    "annotations": "audio/SPLIT/CLIP.wav with annotations/SPLIT/CLIP.txt (onset<TAB>offset<TAB>label) or CLIP.jams",
    "metadata": "audio/SPLIT/CLIP.wav with metadata/SPLIT.tsv (filename<TAB>onset<TAB>offset<TAB>event_label)",
}
SPLIT_NAMES = {"validate": "validation"}  # URBAN-SED's, and everyone else's
DESED_TABLES = {  # below metadata/; the last of these splits is of generated clips
    "train": ("train/weak.tsv", "train/audioset_strong.tsv", "train/synthetic*.tsv", "train/synthetic*/soundscapes.tsv"),
    "validation": ("validation/validation.tsv",),
    "test": ("eval/public.tsv",),
    "validation_synthetic": ("train/synthetic*validation/soundscapes.tsv",),
}
MAESTRO_TABLES = {"train": ("maestro_*_train.tsv",), "validation": ("maestro_*_validation.tsv",)}
AUDIOSET_STRONG_TABLES = {"train": "audioset_train_strong.tsv", "test": "audioset_eval_strong.tsv"}
DCASE2016_FOLDERS = {"train": "dcase2016_task2_train", "validation": "dcase2016_task2_dev", "test": "dcase2016_task2_test_public"}
_STRONG = f"either {' or '.join(STRONG_LABELS.values())}"
EXPECTED_EVENTS = {
    "spass": f"a folder for each scene, in it {_STRONG}; subset: {', '.join(SPASS_SCENES)}",
    "urban_sed": "URBAN-SED v2: audio/{train,validate,test}/ and annotations/{train,validate,test}/",
    "idmt_desed": f"DESED-FL: {_STRONG}",
    "desed": "DESED: audio/{train,validation,eval}/ and metadata/{train,validation,eval}/*.tsv; subset: null, strong, weak",
    "dcase2024_task4": "the baseline's dataset folder: audio/ and metadata/; subset: desed, strong, weak (parts of DESED), maestro",
    "audioset_strong": "audioset_{train,eval}_strong.tsv, perhaps mid_to_display_name.tsv, YTID.wav at any depth; subset: null, eval",
    "maestro": "MAESTRO Real: CLIP.wav, and CLIP.txt (onset<TAB>offset<TAB>label<TAB>value) in a folder named after soft labels",
    "dcase2016_task2": "dcase2016_task2_train/*.wav, and sound/*.wav with annotation/*.txt in dcase2016_task2_{dev,test_public}/",
}


def _tables_of_events(splits: Mapping[str, Sequence[tuple[Path, list[Event]]]], classes: Sequence[str] | None = None) -> "DatasetDict":
    """A table for each split, from the paths of its clips and their events. `classes`: all labels, in order; `None`: those that occur."""
    order = classes or sorted({event["label"] for clips in splits.values() for _, events in clips for event in events})
    number = {label: i for i, label in enumerate(order)}
    empty = [path.name for clips in splits.values() for path, events in clips if any(_is_empty(event) for event in events)]
    if empty:
        logger.warning(f"clips with events of no length, which are left out: {first_names(empty)}")
    rows = {}
    for split, clips in splits.items():
        kept = [(path, [event for event in events if not _is_empty(event)]) for path, events in clips]
        rows[split] = [
            (path, sorted({event["label"] for event in events if event.get("value", 1) > PRESENT}, key=number.__getitem__), events)
            for path, events in kept
        ]
    datasets = import_datasets()
    event = {"label": datasets.Value("string"), "onset": datasets.Value("float64"), "offset": datasets.Value("float64")}
    if any("value" in event for clips in splits.values() for _, events in clips for event in events):
        event["value"] = datasets.Value("float64")
    features = {"labels": datasets.List(datasets.ClassLabel(names=list(order))), "events": datasets.List(event)}
    return tables_of_splits(rows, features)


def _is_empty(event: Event) -> bool:
    return event["onset"] is not None and event["onset"] == event["offset"]


# --- a folder for each split: URBAN-SED, SPASS, IDMT-DESED-FL


def open_strong_labels(root: Path, subset: str | None, classes: Sequence[str] | None = None) -> "DatasetDict":
    """A data set in one of the formats of `STRONG_LABELS`.

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
    splits = {}
    for folder in folders:
        if formats == ["annotations"]:
            place = root / "annotations" / folder.name
            if not place.is_dir():
                raise UserError(f"{place} is missing, though there is audio/{folder.name}: add it")
            annotations = read_texts(place.glob("[!.]*.txt"), classes) or read_jams(place.glob("[!.]*.jams"), classes)
        else:
            annotations = read_dcase(root / "metadata" / f"{folder.name}.tsv", classes)
        splits[SPLIT_NAMES.get(folder.name, folder.name)] = _pair(folder, annotations)
    return _tables_of_events(splits, classes)


def _pair(folder: Path, annotations: Events) -> list[tuple[Path, list[Event]]]:
    """The clips of a folder, sorted, with their events."""
    clips = _clips(folder)
    if not clips:
        raise UserError(f"{folder} has no audio file directly in it, only {contents(folder)}")
    if without := clips.keys() - annotations.keys():
        raise UserError(f"clips of {folder} without annotation: {first_names(without)}; annotate or remove them")
    if without := annotations.keys() - clips.keys():
        raise UserError(f"annotations without a clip in {folder}: {first_names(without)}; add the clips, or remove the annotations")
    return [(path, annotations[stem]) for stem, path in clips.items()]


def _clips(folder: Path) -> dict[str, Path]:
    """The audio files directly in a folder, sorted, by name without suffix."""
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            if path.stem in clips:
                raise UserError(f"{path} and {clips[path.stem].name} are one clip twice: keep one of them")
            clips[path.stem] = path
    return clips


# --- DCASE task 4: DESED, MAESTRO


def open_dcase_task4(root: Path, subset: str | None) -> "DatasetDict":
    """DESED (Turpault et al., DCASE 2019; Serizel et al., ICASSP 2020), as its program and the baselines of DCASE task 4 arrange it, and
    the MAESTRO part of task 4 of 2024.

    A table `metadata/A/B.tsv` is of the clips in `audio/A/B/`, else in `audio/A/`, or in a folder of these names with `_16k` behind;
    `train/audioset_strong.tsv` is of those in `audio/train/strong_label_real/`. Splits are as in `DESED_TABLES` and `MAESTRO_TABLES`: the
    validation part is the recorded one, `validation_synthetic` the generated one. Clips that are listed but not there (deleted videos) are
    counted and left out, as are those that are not listed; a table none of whose clips is there is named and left out. The unlabelled clips
    have no table: open their folder by the layout `folder`. The tables of DCASE 2018 in `validation/` repeat clips and are not read. This
    arrangement could not be checked against the data: what differs from it is an error or a warning that names it.

    Args:
        root: the folder of `audio/` and `metadata/`.
        subset: `"strong"` or `"weak"`, tables with or without times; `None` or `"desed"`, both; `"maestro"`, soft labels. DESED and MAESTRO
            are apart because neither was annotated with the classes of the other.
    """
    metadata = root / "metadata"
    if not metadata.is_dir() or not (root / "audio").is_dir():
        raise UserError(f"{root} holds {contents(root)}, but expected is {EXPECTED_EVENTS['desed']}")
    maestro = subset == "maestro"
    splits: dict[str, list[tuple[Path, list[Event]]]] = {}
    tables = 0
    for split, patterns in (MAESTRO_TABLES if maestro else DESED_TABLES).items():
        for table in sorted({table for pattern in patterns for table in metadata.glob(pattern)}):
            if split == "train" and any("validation" in part for part in table.relative_to(metadata).parts):
                continue
            if (weak := "event_labels" in read_header(table)) != {"strong": False, "weak": True}.get(subset or "", weak):
                continue
            tables += 1
            if rows := _listed_clips(root, table, read_dcase(table, None if maestro else DESED_CLASSES)):
                splits.setdefault(split, []).extend(rows)
    if not splits:
        what = f"none of the clips of its {tables} tables is in {root / 'audio'}" if tables else f"there is no table for it in {metadata}"
        raise UserError(f"{root} has nothing of the subset {subset or 'null'}: {what}; expected is {EXPECTED_EVENTS['desed']}")
    return _tables_of_events(splits, None if maestro else DESED_CLASSES)


def _listed_clips(root: Path, table: Path, annotations: Events) -> list[tuple[Path, list[Event]]]:
    """The clips of a table that are there, with their events."""
    name = table.relative_to(root / "metadata").with_suffix("").as_posix().replace("train/audioset_strong", "train/strong_label_real")
    place = root / "audio" / name
    folders = [folder.with_name(folder.name + suffix) for folder in (place, place.parent) for suffix in ("", "_16k")]
    folder, clips = next(((folder, clips) for folder in folders if folder.is_dir() and (clips := _clips(folder))), (place, {}))
    if not clips.keys() & annotations.keys():
        logger.warning(f"{table}: none of its {len(annotations)} clips is in {folder}, so it is left out")
        return []
    if unlisted := clips.keys() - annotations.keys():
        logger.warning(f"clips in {folder} that {table} does not list, which are left out: {first_names(unlisted)}")
    return present_clips(str(table), folder, list(annotations.items()), clips)


def open_maestro(root: Path, subset: None) -> "DatasetDict":
    """MAESTRO Real (Martín-Morató and Mesaros, 2023; DCASE 2023 task 4B): one split, with soft labels of each second and `scene`.

    The value of a class in a second is the estimated proportion of annotators who marked it. Recordings and their annotations, in files of
    the same name, are found at any depth: annotations are those in a folder whose name contains `soft`, or in all folders if none does.
    `scene` is the name of the recording's folder. The official folds are not read: we had no copy of their files.
    """
    texts = [name for name in files_below(root, (".txt",)) if "read" not in Path(name).stem.lower()]
    soft = [name for name in texts if any("soft" in folder.lower() for folder in Path(name).parts[:-1])] or texts
    sounds = sorted(files_below(root, AUDIO_SUFFIXES))
    clips, annotations = ({Path(name).stem: root / name for name in names} for names in (sounds, soft))
    if len(clips) < len(sounds) or len(annotations) < len(soft):
        raise UserError(f"below {root} are {len(sounds)} recordings and {len(soft)} annotations, some with the same name: keep one of each")
    if not clips or clips.keys() != annotations.keys():
        raise UserError(
            f"below {root} are recordings without soft labels: {first_names(clips.keys() - annotations.keys())}, and annotations without "
            f"a recording: {first_names(annotations.keys() - clips.keys())}; expected is {EXPECTED_EVENTS['maestro']}"
        )
    events = read_texts(annotations.values(), soft=True)
    splits = _tables_of_events({"train": [(path, events[stem]) for stem, path in clips.items()]})
    splits["train"] = splits["train"].add_column("scene", [path.parent.name for path in clips.values()])
    return splits


# --- others


def open_audioset_strong(root: Path, subset: str | None) -> "DatasetDict":
    """Strong labels of AudioSet (Hershey et al., ICASSP 2021), of parts of its training and evaluation clips.

    The tables have the columns `segment_id` (`YTID_MILLISECONDS`), `start_time_seconds`, `end_time_seconds`, from the start of the clip,
    and `label`, an id as `/m/09x0r`, which `mid_to_display_name.tsv` (id<TAB>name, without header) turns into a name if it is there. Ids of
    one name stay apart, as `name (id)`. A row of a `segment_id` alone is a clip without events. Clips are named as for the layout
    `audioset`, and those that are not there are counted.

    Args:
        root: the folder of the tables, below which the clips are.
        subset: `None`, both parts; or `"eval"`.
    """
    names = _display_names(root / "mid_to_display_name.tsv")
    segments: dict[str, Events] = {}
    ids: dict[tuple[str, str], str] = {}
    for split, file in AUDIOSET_STRONG_TABLES.items():
        if subset == "eval" and split != "test":
            continue
        segments[split] = defaultdict(list)
        columns = ("segment_id", "start_time_seconds", "end_time_seconds", "label")
        for place, (segment, onset, offset, mid) in read_table(root / file, columns, "\t"):
            events = segments[split][segment[:11]]
            named = any(map(str.strip, (onset, offset, mid)))
            if named and names and mid not in names:
                raise UserError(f"{place} has the label {mid!r}, which is not in {root / 'mid_to_display_name.tsv'}: download both again")
            if ids.setdefault((split, segment[:11]), segment) != segment:
                raise UserError(f"{place} is of a second segment of the video {segment[:11]}, beside {ids[split, segment[:11]]}: keep one")
            if named:
                events.append(make_event(place, None, onset, offset, names.get(mid, mid)))
    clips = clips_by_video(root, {video for rows in segments.values() for video in rows})
    classes = sorted({event["label"] for rows in segments.values() for events in rows.values() for event in events})
    splits = {split: present_clips(f"AudioSet, strong, {split}", root, list(rows.items()), clips) for split, rows in segments.items()}
    return _tables_of_events(splits, classes)


def _display_names(table: Path) -> dict[str, str]:
    """Names by id; none if the table is missing."""
    if not table.is_file():
        return {}
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(table).splitlines(), start=1):
        mid, tab, name = line.partition("\t")
        if not (mid and tab and name.strip()):
            raise UserError(f"line {number} of {table} is {line!r}, but must be id<TAB>name")
        names[mid] = name.strip()
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    return {mid: f"{name} ({mid})" if name in repeated else name for mid, name in names.items()}


def open_dcase2016_task2(root: Path, subset: None) -> "DatasetDict":
    """DCASE 2016 task 2, sound events in synthetic office scenes (Lafay et al., 2016): isolated sounds to train on, scenes to test on.

    Found at any depth: `dcase2016_task2_train/`, recordings of one sound, named by class and number (`cough003.wav`), each taken for an
    event from its start to its end, so with any silence there is at its ends; `dcase2016_task2_dev/`, the split validation, and
    `dcase2016_task2_test_public/`, test, scenes with `sound/*.wav` and `annotation/*.txt` (`onset<TAB>offset<TAB>label`).
    """
    splits: dict[str, list[tuple[Path, list[Event]]]] = {}
    for split, name in DCASE2016_FOLDERS.items():
        folder = root if root.name == name else next(iter(sorted(root.rglob(name))), None)
        if folder is None:
            continue
        if split == "train":
            splits[split] = [(path, [_whole_event(path)]) for path in _clips(folder).values()]
            if not splits[split]:
                raise UserError(f"{folder} has no audio file directly in it, only {contents(folder)}")
        elif (folder / "sound").is_dir() and (folder / "annotation").is_dir():
            splits[split] = _pair(folder / "sound", read_texts((folder / "annotation").glob("[!.]*.txt")))
        else:
            raise UserError(f"{folder} holds {contents(folder)}, but expected are sound/ and annotation/")
    if not splits:
        raise UserError(f"{root} holds {contents(root)}, but expected is {EXPECTED_EVENTS['dcase2016_task2']}")
    return _tables_of_events(splits)


def _whole_event(path: Path) -> Event:
    """A recording of one sound as an event, labelled by the name of its file without the number."""
    try:
        duration = soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} cannot be read ({error}): extract the data set again") from error
    return {"label": path.stem.rstrip("0123456789"), "onset": 0.0, "offset": duration}


# How to open each, and its subsets.
PUBLISHED_EVENTS: dict[str, tuple[Callable[..., "DatasetDict"], tuple[str | None, ...]]] = {
    "spass": (open_strong_labels, SPASS_SCENES),
    "urban_sed": (partial(open_strong_labels, classes=URBAN_SED_CLASSES), (None,)),
    "idmt_desed": (partial(open_strong_labels, classes=DESED_CLASSES), (None,)),
    "desed": (open_dcase_task4, (None, "strong", "weak")),
    "dcase2024_task4": (open_dcase_task4, ("desed", "strong", "weak", "maestro")),
    "audioset_strong": (open_audioset_strong, (None, "eval")),
    "maestro": (open_maestro, (None,)),
    "dcase2016_task2": (open_dcase2016_task2, (None,)),
}
