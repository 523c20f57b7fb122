"""A benchmark of overlapping sounds, made of a labelled data set of single ones: Parquet shards of FLAC, a table of sources, a card.

The same sources, settings and versions of the libraries give the same bytes.
"""

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from ..errors import UserError
from ..files import check_free, hash_file, write_folder_atomically
from ..publishing.cards import as_text
from ..reports import markdown_table, write_csv
from ..settings import setting, settings_dict
from .render import Mixture, MixtureSettings, plan_background, plan_mixtures, render
from .sounds import SPLITS, Sources, SourceSettings, common_classes, open_sources


CLIPS_PER_GROUP = 50  # rows of a Parquet row group, in memory at once


@dataclass(kw_only=True)
class BenchmarkSettings(SourceSettings):
    """Benchmark

    Raises:
        UserError: if a value is out of range, or two settings contradict each other.
    """

    output_dir: str = setting("folder of the benchmark, new or empty")
    num_events: list[int] = setting("numbers of events of a mixture", list(range(1, 15)))
    train_clips: int = setting("training mixtures for each of these numbers", 100)
    test_clips: int = setting("test mixtures for each of these numbers", 50)
    mixing: MixtureSettings = setting("the rules of mixing", MixtureSettings())
    clips_per_shard: int = setting("largest number of mixtures in a Parquet file", 500)

    def __post_init__(self):
        super().__post_init__()
        if not self.num_events or min(self.num_events) < 1 or len(set(self.num_events)) < len(self.num_events):
            raise UserError(f"num_events is {self.num_events}, but must be different numbers of at least 1")
        for name, least in (("train_clips", 1), ("test_clips", 1), ("seed", 0), ("clips_per_shard", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least {least}")


def run(settings: BenchmarkSettings) -> None:
    """Make the benchmark, and print its size and what was left out."""
    report = make_benchmark(settings)
    for split, causes in report["left_out"].items():
        for cause, names in causes.items():
            print(f"left out of {split}, {cause}: {', '.join(names)}")
    clips = ", ".join(f"{count} {split}" for split, count in report["clips"].items())
    print(f"{clips} mixtures of {len(report['classes'])} classes, {report['bytes'] / 1e6:.0f} MB, in {settings.output_dir}")


def make_benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Write the benchmark, whole or not at all.

    Returns:
        The content of the card, mostly by split: `classes`, `clips`, `by_num_events`, `by_class`, `scaled` (mixtures scaled down to full
        scale), `sources`, `recordings`, `licenses`, `left_out` (names of unusable sources, by cause), `bytes`, `files` (SHA-256).

    Raises:
        UserError: if the sources do not fit the settings, splits share a recording, or `output_dir` is not free.
    """
    target = check_free(settings.output_dir)
    sources = open_sources(settings, settings.mixing)
    classes = common_classes(sources)
    plans = {split: _plan(sources[split], split, settings) for split in SPLITS}
    with write_folder_atomically(target) as unfinished:
        (unfinished / "data").mkdir()
        features = benchmark_features(classes, settings.mixing.sampling_rate)
        mixtures = {split: _write_split(unfinished / "data", split, sources[split], plans[split], features, settings) for split in SPLITS}
        _write_sources(unfinished / "sources.csv", sources, mixtures)
        report = _report(unfinished, classes, sources, plans, mixtures)
        (unfinished / "README.md").write_text(data_card(settings, report), encoding="utf-8")
    return report


def _plan(sources: Sources, split: str, settings: BenchmarkSettings) -> list[Mixture]:
    clips = settings.train_clips if split == "train" else settings.test_clips
    try:
        plans = plan_mixtures(sources.sounds, settings.mixing, settings.num_events, clips, settings.seed, split)
        if not len(sources.backgrounds):
            return plans
        generators = (np.random.default_rng([settings.seed, *split.encode(), number]) for number in range(len(plans)))
        found = [plan_background(sources.backgrounds, settings.mixing, generator) for generator in generators]
        return [replace(plan, background=background) for plan, background in zip(plans, found)]
    except UserError as error:
        raise UserError(f"{split}: {error}") from error


def benchmark_features(classes: Sequence[str], sampling_rate: int) -> datasets.Features:
    """The columns of a mixture."""
    label = datasets.ClassLabel(names=list(classes))
    number, real, text = datasets.Value("int32"), datasets.Value("float64"), datasets.Value("string")
    event = {
        **{"label": label, "onset": real, "offset": real, "source": text, "gain": real, "level_db": real},
        **{"onset_sample": number, "num_samples": number, "source_start_sample": number},
    }
    return datasets.Features(
        {
            **{"audio": datasets.Audio(sampling_rate=sampling_rate), "labels": datasets.List(label)},
            **{"num_events": number, "max_overlap": number, "instant": real, "events": datasets.List(event)},
            **{"background": text, "background_start_sample": number, "background_gain": real, "background_db": real},
        }
    )


def encode_row(name: str, waveform: np.ndarray, mixture: Mixture, sources: Sources, classes: Sequence[str], rate: int) -> dict[str, Any]:
    """A row of `benchmark_features`."""
    audio, below = io.BytesIO(), mixture.background
    soundfile.write(audio, waveform, rate, format="FLAC", subtype="PCM_16")
    return {
        "audio": {"bytes": audio.getvalue(), "path": f"{name}.flac"},
        "labels": [classes.index(label) for label in mixture.labels],
        "num_events": len(mixture.events),
        "max_overlap": mixture.max_overlap,
        "instant": None if mixture.instant is None else mixture.instant / rate,
        "events": [
            {
                **{"label": classes.index(event.label), "onset": event.onset / rate, "offset": event.offset / rate},
                **{"source": sources.table[event.source]["file"], "gain": event.gain, "level_db": event.level_db},
                **{"onset_sample": event.onset, "num_samples": event.num_samples, "source_start_sample": event.source_start},
            }
            for event in mixture.events
        ],
        "background": below and sources.background_table[below.source]["file"],
        "background_start_sample": below and below.start,
        "background_gain": below and below.gain,
        "background_db": below and below.level_db,
    }


def _write_split(
    folder: Path, split: str, sources: Sources, plan: list[Mixture], features: datasets.Features, settings: BenchmarkSettings
) -> list[Mixture]:
    """Render and write a split. Returns the mixtures with their final gains."""
    rate, classes = settings.mixing.sampling_rate, features["labels"].feature.names
    rendered: list[Mixture] = []

    def rows(group: Sequence[Mixture]) -> Iterator[dict[str, Any]]:
        for planned in group:
            waveform, mixture = render(planned, sources.waveforms, sources.backgrounds)
            name = f"{split}_{len(mixture.events):02d}_events_{len(rendered) // len(settings.num_events):05d}"
            rendered.append(mixture)
            yield encode_row(name, waveform, mixture, sources, classes, rate)

    count = math.ceil(len(plan) / settings.clips_per_shard)
    with tqdm(total=len(plan), desc=f"mixing {split}", unit="clip") as progress:
        for shard in range(count):
            clips = plan[shard * settings.clips_per_shard :][: settings.clips_per_shard]
            with pq.ParquetWriter(folder / f"{split}-{shard:05d}-of-{count:05d}.parquet", features.arrow_schema) as writer:
                for start in range(0, len(clips), CLIPS_PER_GROUP):
                    group = clips[start : start + CLIPS_PER_GROUP]
                    writer.write_table(pa.Table.from_pylist(list(rows(group)), schema=features.arrow_schema))
                    progress.update(len(group))
    return rendered


def _write_sources(file: Path, sources: dict[str, Sources], mixtures: dict[str, list[Mixture]]) -> None:
    """Every source with its metadata and its number of events."""
    rows = []
    for split in SPLITS:
        uses = Counter(event.source for mixture in mixtures[split] for event in mixture.events)
        for i, row in enumerate(sources[split].table):
            rows.append({"split": split, **row, "events": uses[i]})
        below = Counter(mixture.background.source for mixture in mixtures[split] if mixture.background)
        for i, row in enumerate(sources[split].background_table):
            rows.append({"split": split, **row, "backgrounds": below[i]})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(file, columns, ([row.get(name) for name in columns] for row in rows))


def _report(
    folder: Path, classes: list[str], sources: dict[str, Sources], plans: dict[str, list[Mixture]], mixtures: dict[str, list[Mixture]]
) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    tables = [row for split in SPLITS for row in (*sources[split].table, *sources[split].background_table)]
    licenses = Counter(str(row.get("license") or "not stated") for row in tables)
    return {
        "classes": classes,
        "clips": {split: len(mixtures[split]) for split in SPLITS},
        "by_num_events": {split: _by_num_events(mixtures[split]) for split in SPLITS},
        "by_class": {split: dict(Counter(sorted(label for mixture in mixtures[split] for label in mixture.labels))) for split in SPLITS},
        "scaled": {split: sum(plan != mixture for plan, mixture in zip(plans[split], mixtures[split])) for split in SPLITS},
        "sources": {split: len(sources[split].sounds) for split in SPLITS},
        "recordings": {split: len({row["recording"] for row in sources[split].table}) for split in SPLITS},
        "licenses": dict(licenses.most_common()),
        "left_out": {split: dict(sources[split].waveforms.unreadable) for split in SPLITS},
        "bytes": sum(path.stat().st_size for path in files),
        "files": {str(path.relative_to(folder)): hash_file(path) for path in files},
    }


def _by_num_events(mixtures: list[Mixture]) -> dict[int, dict[str, float]]:
    """By number of events: clips, and the means of their numbers of classes and largest overlaps."""
    means = {}
    for number in sorted({len(mixture.events) for mixture in mixtures}):
        group = [mixture for mixture in mixtures if len(mixture.events) == number]
        classes, overlap = np.mean([(len(mixture.labels), mixture.max_overlap) for mixture in group], axis=0).tolist()
        means[number] = {"clips": len(group), "classes": classes, "overlap": overlap}
    return means


ONSETS = {
    "together": "Onsets are such that at an instant, uniform in the clip, all its events sound; `instant` is its time.",
    "anywhere": "Onsets are uniform: the events need not overlap, and `max_overlap` is the largest number that do.",
}
SILENCE = "There is no background: where no event sounds there is digital silence."
BACKGROUND = (
    "Below the events lies a part of a recording, uniform among recordings and within one; its RMS is uniform in {:g} to {:g} dB of full "
    "scale. One that is shorter than the clip is repeated. What sounds in it has no labels."
)
MEANS = {"clips": ".0f", "classes": ".1f", "overlap": ".1f"}  # columns of the card's first table

# No `configs:` here: the names of the files tell the splits, and with `configs` the library datasets silently takes the rows of another
# folder of the same name from its cache.
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
Classes ({num_classes}): {classes}. Made by `sslam mix` of transformers-sslam {version}.

{by_num_events}

*Classes* and *overlap* are means over clips: of the number of classes in a clip, and of the largest number of simultaneous events.
{scaled} mixtures would have exceeded full scale and were scaled down, their gains with them.

{by_class}

## Columns

| column | |
|-|-|
| `audio` | the mixture |
| `labels` | the classes of its events, each once |
| `num_events` | number of events |
| `max_overlap` | the largest number of simultaneous events, pauses within them included |
| `instant` | time in seconds from which all events sound for 10 ms (null where that was not asked for) |
| `background`, `background_*` | the recording below the events, if there is one: its file, first sample, gain and level |
| `events` | by onset: `label`; `onset` and `offset` in seconds; `source`, a file; `gain`; `level_db`; and three numbers of samples |

A mixture is the sum of its background and its events,
`gain * source[source_start_sample : source_start_sample + num_samples]` from `onset_sample` on, at
{sampling_rate} Hz (sources mixed down to mono and resampled by torchaudio), but for the rounding to 16 bits (1.6e-5).

## How it was made

- A frame of 10 ms of a source sounds if it is at most {sounding_db:g} dB below the source's loudest. An event lasts from the first
  such frame to the last, pauses included; of sounds longer than {event_seconds:g} s it is a random window of at most that length, which
  begins and ends with a sounding frame.
- Levels (RMS of an event's loudest 100 ms) are uniform in {level_low:g} to {level_high:g} dB of full scale, independent of each other:
  many events are louder than few. There are no fades.
- {background}
- {onsets}
- The class of an event is uniform, and then its source among those of the class. No source comes twice in a clip; classes {classes_repeat}.
- No recording, and no file, is in both splits: {recordings}.

The settings, without the place of the sources:

```yaml
{settings}```

The same sources and settings give the same bytes with the same versions: {versions}.

## Sources

`sources.csv` names every source with its metadata, its SHA-256 and the number of its events. A mixture is under the
licences of all its sources: {licenses}.
{left_out}
## SHA-256

```
{files}
```
"""


def data_card(settings: BenchmarkSettings, report: dict[str, Any]) -> str:
    """`README.md`. It names sources, but not their place on this machine."""
    rules, by_number, by_class = settings.mixing, report["by_num_events"], report["by_class"]
    means = [
        [str(number), *(f"{by_number[split][number][key]:{form}}" for split in SPLITS for key, form in MEANS.items())]
        for number in sorted(settings.num_events)
    ]
    clips_with = [[as_text(name), *(str(by_class[split].get(name, 0)) for split in SPLITS)] for name in report["classes"]]
    sizes = (f"{report['sources'][split]} sounds of {report['recordings'][split]} recordings in {split}" for split in SPLITS)
    causes = ((split, cause, names) for split in SPLITS for cause, names in report["left_out"][split].items())
    left_out = [f"- {split}, {cause}: {', '.join(map(as_text, names))}" for split, cause, names in causes]
    kept = {name: value for name, value in settings_dict(settings).items() if name not in ("data_dir", "output_dir", "memory_gb")}
    for group in ("train_backgrounds", "test_backgrounds"):
        kept[group] = [{name: value for name, value in source.items() if name != "path"} for source in kept[group]]
    versions = [f"{module.__name__} {module.__version__}" for module in (datasets, np, pa, soundfile, torch)]
    return CARD.format(
        **{name: getattr(rules, name) for name in ("clip_seconds", "sampling_rate", "sounding_db")},
        event_seconds=rules.longest_event,
        background=BACKGROUND.format(*rules.background_db) if settings.train_backgrounds else SILENCE,
        title=as_text(Path(settings.output_dir).resolve().name),
        clips=" and ".join(f"{report['clips'][split]} {split}" for split in SPLITS),
        fewest=min(settings.num_events),
        most=max(settings.num_events),
        num_classes=len(report["classes"]),
        classes=", ".join(map(as_text, report["classes"])),
        version=__version__,
        by_num_events=markdown_table(["events", *(f"{key}, {split}" for split in SPLITS for key in MEANS)], means),
        by_class=markdown_table(["clips with", *SPLITS], clips_with),
        scaled=sum(report["scaled"].values()),
        level_low=rules.level_db[0],
        level_high=rules.level_db[1],
        onsets=ONSETS[rules.overlap],
        classes_repeat="may repeat" if rules.repeat_classes else "do not repeat",
        recordings=", ".join(sizes),
        settings=yaml.safe_dump(kept, sort_keys=False, allow_unicode=True),
        versions=", ".join([*versions, f"libsndfile {soundfile.__libsndfile_version__}"]),
        licenses=", ".join(f"{as_text(name)} ({count} sources)" for name, count in report["licenses"].items()),
        left_out="\nLeft out:\n\n" + "\n".join(left_out) + "\n" if left_out else "",
        files="\n".join(f"{digest}  {name}" for name, digest in report["files"].items()),
    )
