"""Data sets of overlapping sounds with strong labels, each event with its onset and offset: URBAN-SED, SPASS, IDMT-DESED-FL.

Strong labels come in two formats that leave nothing to guess, and only these are read:

```
audio/train/CLIP.wav        annotations/train/CLIP.txt     Scaper's: a file a clip, no header; onset<TAB>offset<TAB>label a line
audio/train/CLIP.wav        metadata/train.tsv             DCASE's: a table a split; filename<TAB>onset<TAB>offset<TAB>event_label
```

and the same for each other split. Times are in seconds. A clip in which nothing sounds has an empty file, or a row of its file name alone.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .folders import AUDIO_SUFFIXES
from .labels import Event


URBAN_SED_CLASSES = (
    *("air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling"),
    *("engine_idling", "gun_shot", "jackhammer", "siren", "street_music"),
)
DESED_CLASSES = (
    *("Alarm_bell_ringing", "Blender", "Cat", "Dishes", "Dog"),
    *("Electric_shaver_toothbrush", "Frying", "Running_water", "Speech", "Vacuum_cleaner"),
)
SPASS_SCENES = ("Square", "Park", "Waterfront", "Street", "Market")
FORMATS = {
    "annotations": "audio/SPLIT/CLIP.wav with annotations/SPLIT/CLIP.txt (onset<TAB>offset<TAB>label)",
    "metadata": "audio/SPLIT/CLIP.wav with metadata/SPLIT.tsv (filename<TAB>onset<TAB>offset<TAB>event_label)",
}
TABLE_COLUMNS = ("filename", "onset", "offset", "event_label")
# URBAN-SED says "validate" where the rest of the world, and the Hub, says "validation".
SPLIT_NAMES = {"validate": "validation"}


class AnnotatedClip(NamedTuple):
    """An audio file and what sounds in it, in the order of the annotation."""

    path: Path
    events: list[Event]


def read_urban_sed(root: Path) -> dict[str, list[AnnotatedClip]]:
    """URBAN-SED v2.0.0 (Salamon et al., WASPAA 2017), extracted: 10 s clips, 6,000 to train, 2,000 to validate, 2,000 to test.

    Its `.txt` annotations are read; the `.jams` beside them hold the same events, more about each, and the background.

    Args:
        root: the folder with `audio/{train,validate,test}/` and `annotations/{train,validate,test}/`.

    Returns:
        Clips by split: `train`, `validation`, `test`, as far as they are there.

    Raises:
        UserError: as `read_strong_labels`.
    """
    return read_strong_labels(root, URBAN_SED_CLASSES)


def read_idmt_desed(root: Path) -> dict[str, list[AnnotatedClip]]:
    """DESED-FL of Fraunhofer IDMT (Johnson et al., 2021): clips mixed from the DESED sound bank, with DESED's 10 classes.

    How its archive arranges the files was not at hand when this was written. Either format of this module is accepted; nothing is guessed
    from another one, and the division into clients for federated learning is not read.

    Raises:
        UserError: as `read_strong_labels`.
    """
    return read_strong_labels(root, DESED_CLASSES)


def read_spass(root: Path, scene: str) -> dict[str, list[AnnotatedClip]]:
    """One scene of SPASS (Viveros-Muñoz et al., 2023): synthetic urban soundscapes of 10 s, 22 to 29 classes a scene.

    How its archives arrange the files, and which clips the published results were trained and tested on, was not at hand when this was
    written. Either format of this module is accepted, in a folder named after the scene; nothing is guessed from another one.

    Args:
        root: the folder that holds `Square/`, `Park/`, `Waterfront/`, `Street/`, `Market/`, or those of them that are used.
        scene: which one.

    Raises:
        UserError: if there is no such folder, and as `read_strong_labels`.
    """
    folder = root / scene
    if not folder.is_dir():
        raise UserError(f"{root} holds {contents(root)}, but a folder {scene} was expected, one for each scene of SPASS")
    return read_strong_labels(folder)


def read_strong_labels(root: Path, classes: Collection[str] | None = None) -> dict[str, list[AnnotatedClip]]:
    """Clips by split, in the order of their names, of a folder in one of the two formats of this module.

    Args:
        root: the folder of `audio/` and of either `annotations/` or `metadata/`.
        classes: all labels that may occur; `None` for any.

    Raises:
        UserError: if the folder has another layout, a split is without clips, a clip without annotation, an annotation without a clip,
            or an annotation cannot be right: a label that is no class, a time that is no number, an onset after the offset.
    """
    formats = [name for name in FORMATS if (root / name).is_dir()]
    if len(formats) != 1 or not (root / "audio").is_dir():
        raise UserError(f"{root} holds {contents(root)}, but expected is either {' or '.join(FORMATS.values())}")
    splits = sorted(folder.name for folder in (root / "audio").iterdir() if folder.is_dir())
    if not splits:
        raise UserError(f"{root / 'audio'} holds {contents(root / 'audio')}, but a folder for each split was expected, as train/, test/")
    if twice := [name for name in SPLIT_NAMES if {name, SPLIT_NAMES[name]} <= set(splits)]:
        raise UserError(f"{root / 'audio'} has both {twice[0]}/ and {SPLIT_NAMES[twice[0]]}/, which mean the same: keep one of them")
    read = _read_scaper if formats == ["annotations"] else _read_dcase
    return {SPLIT_NAMES.get(split, split): _read_split(root, split, read, classes) for split in splits}


def contents(folder: Path) -> str:
    """What a folder holds, in a few words for a message: the first names, and how many there are."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{', '.join(names[:8])}{f', ... ({len(names)} in all)' if len(names) > 8 else ''}" or "nothing"


def first_names(names: Iterable[str]) -> str:
    """How many, and the first five, for a message."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _read_split(root: Path, split: str, read, classes: Collection[str] | None) -> list[AnnotatedClip]:
    folder = root / "audio" / split
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            if path.stem in clips:
                raise UserError(f"{path} and {clips[path.stem].name} are one clip twice: keep one of them")
            clips[path.stem] = path
    if not clips:
        raise UserError(f"{folder} has no audio file directly in it, only {contents(folder)}")
    annotations: dict[str, list[Event]] = read(root, split, classes)
    if without := clips.keys() - annotations.keys():
        raise UserError(f"clips of {folder} without annotation: {first_names(without)}; add them, or take the clips away")
    if without := annotations.keys() - clips.keys():
        raise UserError(f"annotations without a clip in {folder}: {first_names(without)}; add the clips, or take the annotations away")
    return [AnnotatedClip(path, annotations[stem]) for stem, path in clips.items()]


def _read_scaper(root: Path, split: str, classes: Collection[str] | None) -> dict[str, list[Event]]:
    folder = root / "annotations" / split
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, though there is audio/{split}: expected is {FORMATS['annotations']}")
    return {path.stem: _read_scaper_file(path, classes) for path in folder.glob("*.txt") if not path.name.startswith(".")}


def _read_scaper_file(path: Path, classes: Collection[str] | None) -> list[Event]:
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        values = line.split("\t")
        if len(values) != 3:
            raise UserError(f"line {number} of {path} is {line!r}, but must be onset<TAB>offset<TAB>label")
        events.append(_event(values[2], values[0], values[1], f"line {number} of {path}", classes))
    return events


def _read_dcase(root: Path, split: str, classes: Collection[str] | None) -> dict[str, list[Event]]:
    path = root / "metadata" / f"{split}.tsv"
    if not path.is_file():
        raise UserError(f"{path} is missing, though there is audio/{split}: expected is {FORMATS['metadata']}")
    annotations: dict[str, list[Event]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        if table.fieldnames is None or not set(TABLE_COLUMNS) <= set(table.fieldnames):
            raise UserError(f"{path} has the columns {', '.join(table.fieldnames or ['none'])}, but needs {', '.join(TABLE_COLUMNS)}")
        for row in table:
            name, onset, offset, label = (row[column] or "" for column in TABLE_COLUMNS)
            events = annotations[Path(name).stem]
            if onset or offset or label:
                events.append(_event(label, onset, offset, f"line {table.line_num} of {path}", classes))
    return annotations


def _event(label: str, onset: str, offset: str, place: str, classes: Collection[str] | None) -> Event:
    """Check and convert what stands at a place."""
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
    return Event(label, start, end)
