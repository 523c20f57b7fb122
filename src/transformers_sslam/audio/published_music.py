"""Data sets of instruments as their authors distribute them, read into tables of files: NSynth, IRMAS, OpenMIC-2018.

We had no copy of them: files and columns are as their papers and pages describe them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import read_json
from .annotations import read_table
from .folders import AUDIO_SUFFIXES, import_datasets
from .labels import UNKNOWN_LABELS
from .paths import contents, files_below
from .published import first_names, tables_of_splits
from .text import read_text


if TYPE_CHECKING:
    from datasets import DatasetDict

# In the order of their official numbers.
NSYNTH_FAMILIES = ("bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal")
NSYNTH_FOLDERS = {"train": "nsynth-train", "validation": "nsynth-valid", "test": "nsynth-test"}
IRMAS_CLASSES = {
    **{"cel": "cello", "cla": "clarinet", "flu": "flute", "gac": "acoustic guitar", "gel": "electric guitar", "org": "organ"},
    **{"pia": "piano", "sax": "saxophone", "tru": "trumpet", "vio": "violin", "voi": "voice"},
}
IRMAS_GENRES = ("cou_fol", "cla", "pop_roc", "lat_sou", "jaz_blu")
IRMAS_TRAINING = "IRMAS-TrainingData"
OPENMIC_LABELS = "openmic-2018-aggregated-labels.csv"
RELEVANT = 0.5  # from it on, an instrument is taken to be in a clip of OpenMIC
EXPECTED_MUSIC = {
    "nsynth": "some of nsynth-train/, nsynth-valid/ and nsynth-test/ (json/wav), each with examples.json and audio/",
    "irmas": "IRMAS-TrainingData/{cel,cla,...,voi}/*.wav, or folders IRMAS-TestingData-* with CLIP.wav and CLIP.txt at any depth, or both",
    "openmic": f"the folder of audio/, class-map.json, {OPENMIC_LABELS} and partitions/split01_{{train,test}}.csv",
}


def open_nsynth(root: Path, subset: None) -> "DatasetDict":
    """NSynth (Engel et al., ICML 2017, arXiv 1704.01279): notes of 4 s of many instruments, 16 kHz.

    Splits are the folders that are there, of `nsynth-train`, `nsynth-valid` (validation) and `nsynth-test`. `label` is the family of the
    instrument; `instrument` its name, as `guitar_acoustic_010` (those of train are in no other split); `source` is acoustic, electronic or
    synthetic; `pitch` a MIDI number and `velocity` from 0 to 127.
    """
    datasets = import_datasets()
    features = {"label": datasets.ClassLabel(names=list(NSYNTH_FAMILIES))}
    features |= {name: datasets.Value("string") for name in ("instrument", "source")}
    features |= {name: datasets.Value("int64") for name in ("pitch", "velocity")}
    splits = {split: list(_notes(root / name)) for split, name in NSYNTH_FOLDERS.items() if (root / name).is_dir()}
    if not splits:
        raise UserError(f"{root} holds {contents(root)}, but expected are {EXPECTED_MUSIC['nsynth']}")
    return tables_of_splits(splits, features)


def _notes(folder: Path) -> Iterator[tuple[Path, str, str, str, int, int]]:
    """The clips of a split, sorted, with their values for each feature."""
    notes = _read_object(folder / "examples.json")
    clips = {Path(name).stem: folder / "audio" / name for name in files_below(folder / "audio", AUDIO_SUFFIXES)}
    _check_same(folder, "examples.json", notes, clips)
    for name in sorted(notes):
        try:
            family, instrument, source = (notes[name][key] for key in ("instrument_family_str", "instrument_str", "instrument_source_str"))
            pitch, velocity = (int(notes[name][key]) for key in ("pitch", "velocity"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'examples.json'} lacks {error} of the note {name}: download NSynth (json/wav) again") from error
        if family not in NSYNTH_FAMILIES:
            raise UserError(f"{folder / 'examples.json'} says that {name} is of the family {family!r}, which is none of NSynth's")
        yield clips[name], family, instrument, source, pitch, velocity


def _check_same(folder: Path, table: str, listed: Collection[str], clips: Collection[str]) -> None:
    """Raise a `UserError` unless a table lists the clips of a folder, no others and all of them."""
    if missing := set(listed) - set(clips):
        raise UserError(f"clips of {folder / table} that are not in {folder / 'audio'}: {first_names(missing)}; extract the archive again")
    if unlisted := set(clips) - set(listed):
        raise UserError(f"clips in {folder / 'audio'} that {table} does not list: {first_names(unlisted)}; remove them")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no {path}: extract the archive again")
    return read_json(path)


def open_irmas(root: Path, subset: None) -> "DatasetDict":
    """IRMAS (Bosch et al., ISMIR 2012; Zenodo 10.5281/zenodo.1290750): the predominant instruments of excerpts of music, 44.1 kHz.

    Training excerpts, of 3 s, lie in a folder for each of eleven instruments, and have one label. Their names, as
    `[cel][nod][cla]0058__1.wav`, say more: `genre`; `drums`, null where the name does not tell; and the number of the excerpt in its
    recording, without which the name, with its folder, is `recording`. Test excerpts, of 5 to 20 s, have one or more labels, the codes in
    the lines of `CLIP.txt`, and none of these. Either split may be missing. Instruments that are not predominant have no label.
    """
    splits: dict[str, list[tuple[Any, ...]]] = {}
    if training := sorted(path for path in (root, *root.rglob(IRMAS_TRAINING)) if path.name == IRMAS_TRAINING and path.is_dir()):
        splits["train"] = list(_irmas_training(training[0]))
    if test := list(_irmas_test(root)):
        splits["test"] = test
    if not splits:
        raise UserError(f"{root} holds {contents(root)}, but expected is {EXPECTED_MUSIC['irmas']}")
    datasets = import_datasets()
    text = datasets.Value("string")
    labels = datasets.List(datasets.ClassLabel(names=list(IRMAS_CLASSES.values())))
    return tables_of_splits(splits, {"labels": labels, "genre": text, "drums": datasets.Value("bool"), "recording": text})


def _irmas_training(folder: Path) -> Iterator[tuple[Path, list[str], str | None, bool | None, str]]:
    if found := {path.name for path in folder.iterdir() if path.is_dir()}.symmetric_difference(IRMAS_CLASSES):
        raise UserError(
            f"{folder} holds {contents(folder)}, but expected is a folder for each of {', '.join(IRMAS_CLASSES)}: {first_names(found)} "
            "differ; extract the archive again"
        )
    for code, instrument in IRMAS_CLASSES.items():
        names = sorted(files_below(folder / code, (".wav",)))
        if not names:
            raise UserError(f"{folder / code} has no excerpt: extract the archive again")
        for name in names:
            tags = re.findall(r"\[(\w+)\]", name)[1:]  # the first is the instrument, and `cla` may follow as a genre
            genre = next((tag for tag in tags if tag in IRMAS_GENRES), None)
            drums = {"dru": True, "nod": False}.get(next((tag for tag in tags if tag in ("dru", "nod")), ""))
            recording = re.sub(r"__\d+$", "", Path(name).stem)
            yield folder / code / name, [instrument], genre, drums, f"{code}/{recording}"


def _irmas_test(root: Path) -> Iterator[tuple[Path, list[str], None, None, None]]:
    """The excerpts outside of the training data, each with a text of its name."""
    for name in sorted(files_below(root, (".wav",))):
        clip = root / name
        if IRMAS_TRAINING in clip.parts:
            continue
        text = clip.with_suffix(".txt")
        if not text.is_file():
            raise UserError(f"{clip} has no {text.name} beside it with its instruments, but expected is {EXPECTED_MUSIC['irmas']}")
        codes = list(dict.fromkeys(read_text(text).split()))
        if not codes or not IRMAS_CLASSES.keys() >= set(codes):
            raise UserError(f"{text} holds {' '.join(codes)!r}, but a line for each instrument is expected, of {', '.join(IRMAS_CLASSES)}")
        yield clip, [IRMAS_CLASSES[code] for code in codes], None, None, None


def open_openmic(root: Path, subset: None) -> "DatasetDict":
    """OpenMIC-2018 (Humphrey, Durand and McFee, ISMIR 2018; Zenodo 10.5281/zenodo.1432913): excerpts of 10 s of music, each labelled for
    some of twenty instruments only.

    An instrument is in `labels` if its relevance is at least 0.5, as the authors' baseline has it, and in `unknown_labels` if the table of
    aggregated labels has no row for it. `recording` is the track of the Free Music Archive. Splits are those of `partitions/split01_*.csv`.
    The arrays of `openmic-2018.npz` hold the same labels, and are not read.
    """
    numbers = _read_object(root / "class-map.json")
    if not all(type(number) is int for number in numbers.values()) or len(set(numbers.values())) < len(numbers):
        raise UserError(f"{root / 'class-map.json'} must give each instrument a number of its own: extract the archive again")
    classes = sorted(numbers, key=numbers.__getitem__)
    relevance = _relevance(root / OPENMIC_LABELS, classes)
    clips = {Path(name).stem: root / "audio" / name for name in files_below(root / "audio", AUDIO_SUFFIXES)}
    _check_same(root, OPENMIC_LABELS, relevance, clips)
    keys = {split: _keys(root / "partitions" / f"split01_{split}.csv") for split in ("train", "test")}
    counts = Counter(key for listed in keys.values() for key in listed)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(f"the partitions of {root} list clips twice: {first_names(twice)}; extract the archive again")
    if wrong := counts.keys() ^ relevance.keys():
        raise UserError(f"clips that are either in the partitions of {root} or in its labels: {first_names(wrong)}; extract it again")
    rows = {
        split: [
            (
                clips[key],
                [name for name in classes if relevance[key].get(name, 0) >= RELEVANT],
                [name for name in classes if name not in relevance[key]],
                key.partition("_")[0],
            )
            for key in listed
        ]
        for split, listed in keys.items()
    }
    datasets = import_datasets()
    labels = datasets.List(datasets.ClassLabel(names=classes))
    return tables_of_splits(rows, {"labels": labels, UNKNOWN_LABELS: labels, "recording": datasets.Value("string")})


def _relevance(table: Path, classes: Collection[str]) -> dict[str, dict[str, float]]:
    """By clip, the relevance of each instrument for which it is known."""
    found: dict[str, dict[str, float]] = {}
    for place, (key, instrument, value) in read_table(table, ("sample_key", "instrument", "relevance")):
        if instrument not in classes:
            raise UserError(f"{place} has the instrument {instrument!r}, which is none of class-map.json: extract the archive again")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise UserError(f"{place} has the relevance {value!r}, but a number from 0 to 1 is expected: extract the archive again")
        if found.setdefault(key, {}).setdefault(instrument, number) != number:
            raise UserError(f"{place} has the instrument {instrument!r} of {key} again, with another relevance: extract the archive again")
    return found


def _keys(table: Path) -> list[str]:
    """The clips of a partition: a line each, without a header."""
    if not table.is_file():
        raise UserError(f"there is no {table}: extract the archive again")
    return [line.strip() for line in read_text(table).splitlines() if line.strip()]


# How to open each, and its subsets.
PUBLISHED_MUSIC: dict[str, tuple[Callable[..., "DatasetDict"], tuple[str | None, ...]]] = {
    "nsynth": (open_nsynth, (None,)),
    "irmas": (open_irmas, (None,)),
    "openmic": (open_openmic, (None,)),
}
