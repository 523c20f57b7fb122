"""A benchmark of overlapping sounds, made of a labelled audio folder of single ones: parquet shards of FLAC, a table of sources, a card.

Training and test mixtures are made of different recordings, which is checked. The same sources, settings and versions of the libraries give
the same bytes.
"""

import csv
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import yaml
from tqdm.auto import tqdm

from .. import __version__
from ..audio.cache import Waveforms
from ..audio.layouts import open_splits
from ..audio.paths import decode_path, source_name
from ..audio.rows import AudioColumn, LabelledRows, all_rows, read_rows, select_folds, select_split
from ..errors import UserError
from ..files import write_folder_atomically
from ..reports import markdown_table
from ..settings import setting
from .render import Mixture, MixtureSettings, Sound, find_sound, plan_mixtures, render


SPLITS = ("train", "test")
CLIPS_PER_GROUP = 50  # rows of a parquet row group, and so what is in memory at once


@dataclass
class BenchmarkSettings:
    """Everything that decides what the benchmark holds.

    Raises:
        UserError: (a `ValueError`) if a value is out of range, or two settings contradict each other.
    """

    data_dir: str = setting("folder of the single sounds")
    output_dir: str = setting("folder of the benchmark; it must not be there yet")
    layout: str = setting("how they are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several", None)

    label_column: str = setting("column of the class, one a source", "label")
    group_column: str | None = setting("column of the recording a source is cut from; null: each is its own", None)
    fold_column: str | None = setting("column to choose sources by, whatever their split", None)
    train_folds: list[int | str] = setting("its values to make training mixtures of", [])
    test_folds: list[int | str] = setting("its values to make test mixtures of", [])
    test_share: float | None = setting("without folds: share of the recordings, drawn by seed, for the test", None)
    train_split: str = setting("with neither folds nor share: split of the training sources", "train")
    test_split: str = setting("with neither folds nor share: split of the test sources", "test")

    num_events: list[int] = setting("numbers of events of a mixture", list(range(1, 15)))
    train_clips: int = setting("training mixtures for each of these numbers", 100)
    test_clips: int = setting("test mixtures for each of these numbers", 50)
    mixing: MixtureSettings = setting("the rules of mixing", MixtureSettings())
    seed: int = setting("of everything that is random", 0)

    max_unreadable: float = setting("more than this share of unusable sources stops the program", 0.01)
    memory_gb: float = setting("memory for decoded sources; what does not fit is decoded each time", 4.0)
    clips_per_shard: int = setting("largest number of mixtures in a parquet file", 500)

    def __post_init__(self):
        if not self.num_events or min(self.num_events) < 1 or len(set(self.num_events)) < len(self.num_events):
            raise UserError(f"num_events is {self.num_events}, but must be different numbers of at least 1")
        for name, least in (("train_clips", 1), ("test_clips", 1), ("seed", 0), ("clips_per_shard", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise UserError(f"test_share is {self.test_share}, but must lie between 0 and 1")
        if self.test_share is not None and self.fold_column is not None:
            raise UserError(f"test_share is {self.test_share} and fold_column {self.fold_column!r}, but only one can choose: drop one")
        if self.fold_column is None and (self.train_folds or self.test_folds):
            raise UserError("there are train_folds or test_folds, but no fold_column that they are values of: give it")


@dataclass(frozen=True)
class Sources:
    """The single sounds that a split's mixtures are made of.

    Attributes:
        waveforms: those that can be read.
        sounds: those that are not silent; `sound.source` is an index of `waveforms` and of `table`.
        table: what is known of each: `file`, `label`, `recording`, `sha256` (of the file), and the other columns of its
            metadata.
    """

    waveforms: Waveforms
    sounds: list[Sound]
    table: list[dict[str, Any]]


def make_benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Write the benchmark: into a folder beside `output_dir`, which takes its name when everything is there.

    Returns:
        what the card says, mostly by split: `classes`, `clips`, `by_num_events`, `by_class`, `scaled` (mixtures scaled down to full scale),
        `sources`, `recordings`, `licenses`, `left_out` (names of sources that cannot be used, by cause), `bytes`, `files` (SHA-256).

    Raises:
        UserError: (a `ValueError`) if the sources do not fit the settings, splits share a recording, or `output_dir` is there already.
    """
    target = Path(settings.output_dir)
    if target.exists():
        raise UserError(f"output_dir is {target}, which is there already: choose another, or remove it")
    rows = select_sources(open_splits(settings.data_dir, settings.layout, subset=settings.subset), settings)
    recordings = {split: _recordings(rows[split], settings) for split in SPLITS}
    _check_apart(recordings, "recording")
    labelled = {split: read_rows(rows[split], settings.label_column) for split in SPLITS}  # of both, before anything is decoded
    sources = {split: read_sources(rows[split], labelled[split], recordings[split], split, settings) for split in SPLITS}
    _check_apart({split: [row["sha256"] for row in sources[split].table] for split in SPLITS}, "file (by its SHA-256)")
    classes = _common_classes(sources)
    plans = {split: _plan(sources[split].sounds, split, settings) for split in SPLITS}

    with write_folder_atomically(target) as unfinished:
        (unfinished / "data").mkdir()
        features = benchmark_features(classes, settings.mixing.sampling_rate)
        mixtures = {split: _write_split(unfinished / "data", split, sources[split], plans[split], features, settings) for split in SPLITS}
        _write_sources(unfinished / "sources.csv", sources, mixtures)
        report = _report(unfinished, classes, sources, plans, mixtures)
        (unfinished / "README.md").write_text(data_card(settings, report))
    return report


def select_sources(splits: datasets.DatasetDict, settings: BenchmarkSettings) -> dict[str, datasets.Dataset]:
    """The sources of `train` and of `test`, by folds, by share or by split.

    Raises:
        UserError: if the column is missing, or one of the two has no source.
    """
    if settings.fold_column is not None:
        folds = zip(SPLITS, (settings.train_folds, settings.test_folds))
        return {split: select_folds(splits, settings.fold_column, values) for split, values in folds}
    if settings.test_share is None:
        return {split: select_split(splits, name) for split, name in zip(SPLITS, (settings.train_split, settings.test_split))}
    rows = all_rows(splits)
    recordings = _recordings(rows, settings)
    shuffled = sorted(set(recordings), key=lambda name: hashlib.sha256(f"{settings.seed}/{name}".encode()).digest())
    test = set(shuffled[: round(settings.test_share * len(shuffled))])
    if not 0 < len(test) < len(shuffled):
        raise UserError(
            f"test_share is {settings.test_share:g}, but of {len(shuffled)} recordings that leaves one of the splits without any"
        )
    chosen = {"train": [name not in test for name in recordings], "test": [name in test for name in recordings]}
    return {split: rows.select(np.flatnonzero(chosen[split])) for split in SPLITS}


def read_sources(
    rows: datasets.Dataset, labelled: LabelledRows, recordings: Sequence[str], split: str, settings: BenchmarkSettings
) -> Sources:
    """Decode a split's sources and find where they sound.

    Raises:
        UserError: if a source has not exactly one label, or too many are silent or cannot be read.
    """
    names = _file_names(rows, settings)
    for name, labels in zip(names, labelled.labels):
        if len(labels) != 1:
            raise UserError(f"{name} has {len(labels)} labels, but a single sound has one: leave out what is a mixture already")
    waveforms = Waveforms(labelled.sources, settings.mixing.sampling_rate, settings.memory_gb, f"decoding {split} sources")
    called = {source_name(source): name for source, name in zip(labelled.sources, names) if source.get("path")}
    for cause, left_out in waveforms.unreadable.items():
        waveforms.unreadable[cause] = [called.get(name, name) for name in left_out]
    sounds, metadata = [], rows.remove_columns("audio")
    for i, (waveform, row) in enumerate(zip(waveforms, waveforms.kept)):
        sound = find_sound(waveform, i, labelled.labels[row][0], settings.mixing)
        if sound is None:
            waveforms.unreadable["silent"].append(names[row])
        else:
            sounds.append(sound)
    waveforms.check_unreadable(settings.max_unreadable, split)
    table = []
    for i in waveforms.kept:
        known = {"file": names[i], "label": labelled.labels[i][0], "recording": recordings[i], "sha256": _digest(labelled.sources[i])}
        table.append(known | {column: value for column, value in metadata[i].items() if column not in (*known, "split", "events")})
    return Sources(waveforms, sounds, table)


def benchmark_features(classes: Sequence[str], sampling_rate: int) -> datasets.Features:
    """The columns of a mixture."""
    label = datasets.ClassLabel(names=list(classes))
    number, seconds = datasets.Value("int32"), datasets.Value("float64")
    event = {
        "label": label,
        "onset": seconds,
        "offset": seconds,
        "source": datasets.Value("string"),
        "gain": datasets.Value("float64"),
        "level_db": datasets.Value("float64"),
        "onset_sample": number,
        "num_samples": number,
        "source_start_sample": number,
    }
    return datasets.Features(
        {
            "audio": datasets.Audio(sampling_rate=sampling_rate),
            "labels": datasets.List(label),
            "num_events": number,
            "max_overlap": number,
            "instant": seconds,
            "events": datasets.List(event),
        }
    )


def encode_row(
    name: str, waveform: np.ndarray, mixture: Mixture, files: Sequence[str], classes: Sequence[str], rate: int
) -> dict[str, Any]:
    """A mixture as the columns of `benchmark_features`; `files` are the names of its sources by index."""
    audio = io.BytesIO()
    soundfile.write(audio, waveform, rate, format="FLAC", subtype="PCM_16")
    return {
        "audio": {"bytes": audio.getvalue(), "path": f"{name}.flac"},
        "labels": [classes.index(label) for label in mixture.labels],
        "num_events": len(mixture.events),
        "max_overlap": mixture.max_overlap,
        "instant": None if mixture.instant is None else mixture.instant / rate,
        "events": [
            {
                "label": classes.index(event.label),
                "onset": event.onset / rate,
                "offset": event.offset / rate,
                "source": files[event.source],
                "gain": event.gain,
                "level_db": event.level_db,
                "onset_sample": event.onset,
                "num_samples": event.num_samples,
                "source_start_sample": event.source_start,
            }
            for event in mixture.events
        ],
    }


ONSETS = {
    "together": "Onsets are such that an instant, uniform in the clip, finds all its events sounding; `instant` says which.",
    "anywhere": "Onsets are uniform: fewer events than all may be under way at once, and `max_overlap` says how many.",
}
MEANS = {"clips": ".0f", "classes": ".1f", "overlap": ".1f"}  # columns of the card's first table

# No `configs:` here: file names tell the splits, and with it `datasets` takes a folder for any other of the same name that it has
# in its cache, and silently gives the rows of that one.
CARD = """---
license: other
license_name: of-each-source
license_link: sources.csv
task_categories:
- audio-classification
tags:
- audio
- polyphony
- sound-event-detection
---

# {title}

{clips} mixtures of {clip_seconds:g} s, {sampling_rate} Hz, mono, 16-bit FLAC, each of {fewest} to {most} single sounds.
Classes ({num_classes}): {classes}. Made by `scripts/make_polyphonic.py` of transformers-sslam {version}.

{by_num_events}

*Classes* and *overlap* are means over clips: of the different classes in a clip, and of the largest number of events under way at once.
{scaled} mixtures would have exceeded full scale and were scaled down, their gains with them.

{by_class}

## Columns

| column | |
|-|-|
| `audio` | the mixture |
| `labels` | the classes of its events, each once |
| `num_events` | number of events |
| `max_overlap` | the largest number of events that are under way at once, pauses within them included |
| `instant` | seconds; from then on all events sound for 10 ms (null where that was not asked for) |
| `events` | by onset: `label`; `onset` and `offset` in seconds; `source`, a file; `gain`; `level_db`; and three numbers of samples |

A mixture is the sum of its events, `gain * source[source_start_sample : source_start_sample + num_samples]` from `onset_sample` on, at
{sampling_rate} Hz (sources mixed down to mono and resampled by torchaudio), but for the rounding to 16 bits (1.6e-5).

## How it was made

- A frame of 10 ms of a source sounds if it is at most {sounding_db:g} dB below the source's loudest. An event reaches from the first
  such frame to the last, pauses included; of sounds longer than {event_seconds:g} s it is a random window of at most that length, which
  begins and ends sounding.
- Levels (RMS of an event's loudest 100 ms) are uniform in {level_low:g} to {level_high:g} dB of full scale, independent of each other:
  many events are louder than few. There are no fades and there is no background: where no event sounds there is digital silence.
- {onsets}
- The class of an event is uniform, and then its source among the class's. No source comes twice in a clip; classes {classes_repeat}.
- No recording, and no file, is in both splits: {recordings}.

The settings, besides where the sources are:

```yaml
{settings}```

The same sources and settings give the same bytes with the same versions: {versions}.

## Sources

`sources.csv` names every source with its metadata, its SHA-256 and the number of events made of it. A mixture is under the
licences of all its sources: {licenses}.
{left_out}
## SHA-256

```
{files}
```
"""


def data_card(settings: BenchmarkSettings, report: dict[str, Any]) -> str:
    """`README.md` of the benchmark. What it says of sources is by name, wherever they lie."""
    rules, by_number, by_class = settings.mixing, report["by_num_events"], report["by_class"]
    means = [
        [str(number), *(f"{by_number[split][number][key]:{form}}" for split in SPLITS for key, form in MEANS.items())]
        for number in sorted(settings.num_events)
    ]
    left_out = [f"- {split}, {cause}: {', '.join(names)}" for split in SPLITS for cause, names in report["left_out"][split].items()]
    kept = {name: value for name, value in asdict(settings).items() if name not in ("data_dir", "output_dir", "memory_gb")}
    return CARD.format(
        **{name: getattr(rules, name) for name in ("clip_seconds", "sampling_rate", "sounding_db", "event_seconds")},
        title=Path(settings.output_dir).name,
        clips=" and ".join(f"{report['clips'][split]} {split}" for split in SPLITS),
        fewest=min(settings.num_events),
        most=max(settings.num_events),
        num_classes=len(report["classes"]),
        classes=", ".join(report["classes"]),
        version=__version__,
        by_num_events=markdown_table(["events", *(f"{key}, {split}" for split in SPLITS for key in MEANS)], means),
        by_class=markdown_table(
            ["clips with", *SPLITS], [[name, *(str(by_class[split].get(name, 0)) for split in SPLITS)] for name in report["classes"]]
        ),
        scaled=sum(report["scaled"].values()),
        level_low=rules.level_db[0],
        level_high=rules.level_db[1],
        onsets=ONSETS[rules.overlap],
        classes_repeat="may repeat" if rules.repeat_classes else "do not repeat",
        recordings=", ".join(
            f"{report['sources'][split]} sounds of {report['recordings'][split]} recordings in {split}" for split in SPLITS
        ),
        settings=yaml.safe_dump(kept, sort_keys=False, allow_unicode=True),
        versions=", ".join(f"{module.__name__} {module.__version__}" for module in (datasets, np, pa, soundfile))
        + f", libsndfile {soundfile.__libsndfile_version__}, torch {torch.__version__}",
        licenses=", ".join(f"{name} ({count} sources)" for name, count in report["licenses"].items()),
        left_out="\nLeft out:\n\n" + "\n".join(left_out) + "\n" if left_out else "",
        files="\n".join(f"{digest}  {name}" for name, digest in report["files"].items()),
    )


def _plan(sounds: list[Sound], split: str, settings: BenchmarkSettings) -> list[Mixture]:
    try:
        return plan_mixtures(sounds, settings.mixing, settings.num_events, getattr(settings, f"{split}_clips"), settings.seed, split)
    except UserError as error:
        raise UserError(f"{split}: {error}") from error


def _write_split(
    folder: Path, split: str, sources: Sources, plan: list[Mixture], features: datasets.Features, settings: BenchmarkSettings
) -> list[Mixture]:
    """Render and write a split's shards. Returns the mixtures with the gains that they have."""
    rate, classes, size = settings.mixing.sampling_rate, features["labels"].feature.names, settings.clips_per_shard
    files = [row["file"] for row in sources.table]
    count = math.ceil(len(plan) / size)
    rendered: list[Mixture] = []
    with tqdm(total=len(plan), desc=f"mixing {split}", unit="clip") as progress:
        for shard in range(count):
            with pq.ParquetWriter(folder / f"{split}-{shard:05d}-of-{count:05d}.parquet", features.arrow_schema) as writer:
                end = min(len(plan), (shard + 1) * size)
                while len(rendered) < end:
                    group = plan[len(rendered) : min(end, len(rendered) + CLIPS_PER_GROUP)]
                    rows = []
                    for mixture in group:
                        waveform, mixture = render(mixture, sources.waveforms)
                        name = f"{split}_{len(mixture.events):02d}_events_{len(rendered) // len(settings.num_events):05d}"
                        rows.append(encode_row(name, waveform, mixture, files, classes, rate))
                        rendered.append(mixture)
                    writer.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema))
                    progress.update(len(group))
    return rendered


def _write_sources(file: Path, sources: dict[str, Sources], mixtures: dict[str, list[Mixture]]) -> None:
    """Every source with its attribution, and how many events are of it."""
    uses = {split: Counter(event.source for mixture in mixtures[split] for event in mixture.events) for split in SPLITS}
    rows = [{"split": split, **row, "events": uses[split][i]} for split in SPLITS for i, row in enumerate(sources[split].table)]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _report(
    folder: Path,
    classes: list[str],
    sources: dict[str, Sources],
    plans: dict[str, list[Mixture]],
    mixtures: dict[str, list[Mixture]],
) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "classes": classes,
        "clips": {split: len(mixtures[split]) for split in SPLITS},
        "by_num_events": {split: _by_num_events(mixtures[split]) for split in SPLITS},
        "by_class": {
            split: dict(sorted(Counter(label for mixture in mixtures[split] for label in mixture.labels).items())) for split in SPLITS
        },
        "scaled": {split: sum(plan != mixture for plan, mixture in zip(plans[split], mixtures[split])) for split in SPLITS},
        "sources": {split: len(sources[split].sounds) for split in SPLITS},
        "recordings": {split: len({row["recording"] for row in sources[split].table}) for split in SPLITS},
        "licenses": dict(
            Counter(str(row.get("license") or "not stated") for split in SPLITS for row in sources[split].table).most_common()
        ),
        "left_out": {split: dict(sources[split].waveforms.unreadable) for split in SPLITS},
        "bytes": sum(path.stat().st_size for path in files),
        "files": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def _by_num_events(mixtures: list[Mixture]) -> dict[int, dict[str, float]]:
    """By number of events: clips, and the means of their number of classes and of the largest overlap."""
    groups: dict[int, list[Mixture]] = {}
    for mixture in mixtures:
        groups.setdefault(len(mixture.events), []).append(mixture)
    return {
        number: {
            "clips": len(group),
            "classes": float(np.mean([len(mixture.labels) for mixture in group])),
            "overlap": float(np.mean([mixture.max_overlap for mixture in group])),
        }
        for number, group in sorted(groups.items())
    }


def _recordings(rows: datasets.Dataset, settings: BenchmarkSettings) -> list[str]:
    """The original recording of each source."""
    column = settings.group_column
    if column is None:
        return _file_names(rows, settings)
    if column not in rows.column_names:
        raise UserError(f"there is no column {column!r}, only {', '.join(rows.column_names)}: name another, or set group_column=null")
    for name, value in zip(_file_names(rows, settings), rows[column]):
        if value is None or value == "":
            raise UserError(f"{name} has nothing in the column {column!r}, so whose recording it is cannot be told: fill it in")
    return [str(value) for value in rows[column]]


def _file_names(rows: datasets.Dataset, settings: BenchmarkSettings) -> list[str]:
    """The sources' paths, seen from `data_dir`; of sources that lie in larger files, their names there, or else what they hold."""
    return [
        os.path.relpath(source["path"], settings.data_dir) if source.get("bytes") is None else source["path"] or _digest(source)
        for source in AudioColumn(rows)
    ]


def _digest(source: dict) -> str:
    held = source.get("bytes")
    return hashlib.sha256(Path(decode_path(source["path"])).read_bytes() if held is None else held).hexdigest()


def _check_apart(values: dict[str, list[str]], what: str) -> None:
    shared = sorted(set(values["train"]) & set(values["test"]))
    if shared:
        raise UserError(
            f"train and test share {len(shared)} {what}: {', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}: choose folds or "
            "splits that keep a recording's clips together"
        )


def _common_classes(sources: dict[str, Sources]) -> list[str]:
    """All classes, sorted, each of which must have a source in every split."""
    by_split = {split: {sound.label for sound in sources[split].sounds} for split in SPLITS}
    classes = sorted(set().union(*by_split.values()))
    for split in SPLITS:
        without = [name for name in classes if name not in by_split[split]]
        if without:
            raise UserError(f"no {split} source has the class {', '.join(without)}: add some, or choose others for the two splits")
    return classes
