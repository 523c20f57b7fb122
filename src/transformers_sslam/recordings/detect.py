"""Sound events of every recording of a folder or a list: which sounds, from when to when. Started again, a run is resumed.

```bash
sslam detect --model runs/detector --inputs recordings --output events.jsonl              # a line for each recording
sslam detect --model MODEL --inputs recordings --output events.csv --threshold 0.3        # a row for each event; also .parquet, .tsv
sslam detect --model MODEL --inputs recordings --output events.csv --threshold '{dog: 0.3}' --label_files audacity --plot pictures
sslam detect --model MODEL --inputs archive --output scores.parquet --per step --device cuda --dtype bfloat16
```

Scores of all time steps are kept in `events.parts`: another threshold, median filter or format needs no model. Recordings that cannot be
used are written with their cause, and tried again by the next run.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from ..audio.decode import read_blocks
from ..audio.paths import printable_path
from ..configuration_sslam import SSLAMConfig
from ..detection_sslam import StepScores
from ..errors import UserError, as_user_error
from ..evaluation.event_flags import EventFlags
from ..events_sslam import Event, EventDecoder, EventSettings, in_order
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..reports import write_csv
from ..settings import setting
from ..tasks_sslam import Detection
from ..windows_sslam import Windowing
from .formats import (
    DIGITS,
    LABEL_FILES,
    names_within,
    rounded,
    seconds,
    utf8,
    write_dcase,
    write_lines,
    write_rows,
    write_tables,
    write_unusable,
)
from .parts import Parts, values_of
from .plot import plot_events
from .processing import RecordingsSettings, Summary, process, report


STEP_COLUMNS = ("path", "start", "end")  # before those of the classes


@dataclass(kw_only=True)
class DetectSettings(EventFlags, RecordingsSettings):
    """Sound events of recordings"""

    per: Literal["event", "step"] = setting("events, or the scores of every class in each time step (.csv, .parquet)", "event")
    label_files: Literal["audacity", "raven"] | None = setting(
        "also a file for each recording, in a folder beside the output, which ends in .audacity (label tracks) or .raven (selections)",
        None,
    )
    plot: str | None = setting("folder for pictures of all recordings, which are drawn at the end; needs matplotlib", None)
    plot_seconds: float = setting("length of what a picture shows, about; longer recordings have several", 60.0)

    model_class: ClassVar = SSLAMForAudioFrameClassification
    suffixes: ClassVar = (".jsonl", ".csv", ".tsv", ".parquet")

    def __post_init__(self):
        super().__post_init__()
        suffix = Path(self.output).suffix
        if self.per == "step" and suffix not in (".csv", ".parquet"):
            raise UserError(f"per is 'step' and output {self.output!r}, but scores of time steps are written as .csv or .parquet")
        if not 1 <= self.plot_seconds <= 3600:
            raise UserError(f"plot_seconds is {self.plot_seconds:g}, but 1 to 3600 are expected")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise UserError('plot needs matplotlib, which is not installed: pip install "transformers-sslam[train]", or leave it out')
        if self.plot is not None:
            plot, output = Path(os.path.realpath(self.plot)), Path(self.output)
            others = [output, *(output.with_suffix(suffix) for suffix in (".parts", ".unusable.csv")), self.label_folder or output]
            for other, real in ((other, Path(os.path.realpath(other))) for other in others):
                if plot.is_relative_to(real) or real.is_relative_to(plot):
                    raise UserError(f"plot is {self.plot!r}, but {other} is written there too: give a folder of its own")

    @property
    def label_folder(self) -> Path | None:
        """Of the label files."""
        return Path(self.output).with_suffix(f".{self.label_files}") if self.label_files else None

    @property
    def outputs(self) -> list[Path]:
        return [Path(path) for path in (self.output, self.label_folder, self.plot) if path is not None]

    def task(self, config: SSLAMConfig, extractor: SSLAMFeatureExtractor) -> Detection:
        """Scores of each time step."""
        EventSettings.of(config, **self.event_options)  # a mistake is found before hours of work
        if self.per == "step" and (named := [name for name in config.class_names if name in STEP_COLUMNS]):
            raise UserError(f"a class is called {named[0]!r}, as a column of the output: rename it in id2label of the model's config.json")
        return Detection(config, extractor, Windowing.of_model(config, extractor, hop=self.hop, window=self.window, per="step"))


class Detected(NamedTuple):
    """A recording's events; or why there are none.

    Attributes:
        path: of the recording.
        steps: number of its time steps.
        duration: in seconds, until the end of the last step: at the end of a recording less than 25 ms may belong to none.
        events: by their starts, rounded as they are written.
        cause, error: why it cannot be used, or `None`.
    """

    path: str
    steps: int
    duration: float
    events: list[Event]
    cause: str | None
    error: str | None


def run(settings: DetectSettings) -> None:
    """Detect, and print the counts."""
    report(detect_files, settings)


def detect_files(settings: DetectSettings) -> Summary:
    """Events of all recordings of `settings.inputs`.

    A recording that cannot be read or scored is written with its error and counted. See [`process`] for what is raised.
    """

    def write(parts: Parts, paths: list[str], output: Path, task: Detection) -> None:
        decoding = EventSettings.of(task.config, **settings.event_options)

        def named() -> Iterator[tuple[str, Detected]]:
            """Recordings that can be used, with the names of what is written for each."""
            for name, recording in zip(names_within(paths), _detected(parts, paths, task, decoding)):
                if recording.error is None:
                    yield name, recording

        with parts.replace(output) as file:
            if settings.per == "step":
                _write_steps(file, output.suffix, parts, paths, task.config.class_names)
            elif output.suffix == ".tsv":
                write_dcase(file, ((name, recording.events) for name, recording in named()))
            elif output.suffix == ".jsonl":
                write_lines(file, map(_record, _detected(parts, paths, task, decoding)))
            else:
                write_rows(file, output.suffix, _rows(_detected(parts, paths, task, decoding)))
        if settings.per == "step" or output.suffix == ".tsv":  # which have no column for errors
            write_unusable(parts, output, paths)
        if settings.label_folder is not None:
            suffix, write_labels = LABEL_FILES[str(settings.label_files)]
            with parts.replace(settings.label_folder) as folder:
                folder.mkdir()
                for name, recording in named():
                    write_labels(_below(folder, name + suffix), recording.events, task.windowing.sampling_rate / 2)
        if settings.plot is not None:
            with parts.replace(Path(settings.plot)) as folder:
                folder.mkdir()
                for name, recording in named():
                    with as_user_error(f"the picture of {printable_path(recording.path)} cannot be drawn"):
                        _plot(_below(folder, name), utf8(name), recording, parts, task, settings.plot_seconds)

    return process(settings, write)


def _detected(parts: Parts, paths: list[str], task: Detection, settings: EventSettings) -> Iterator[Detected]:
    """Recordings of any length, in the memory of their events."""
    classes, step = task.config.class_names, task.config.frames_per_step / 100
    for path, entry, tables in parts.read(paths):
        if entry.error is not None:
            yield Detected(path, 0, 0.0, [], entry.cause, entry.error)
            continue
        decoder, events, duration = EventDecoder(classes, step, settings), [], 0.0
        for table in tables:
            events += decoder.push(values_of(table))
            duration = table["end"][-1].as_py()
        events = in_order(events + decoder.finish(duration), classes)
        yield Detected(path, entry.rows, duration, [rounded(event) for event in events], None, None)


def _record(recording: Detected) -> dict[str, Any]:
    """A line of a .jsonl."""
    if recording.error is not None:
        return {"path": recording.path, "error": recording.error, "cause": recording.cause}
    events = [event._asdict() for event in recording.events]
    return {"path": recording.path, "duration": seconds(recording.duration), "events": events}


def _rows(recordings: Iterable[Detected]) -> Iterator[tuple[Any, ...]]:
    """Of a .csv or .parquet: one for each event, or one without."""
    for path, _, duration, events, _, error in recordings:
        if error is not None:
            yield path, None, None, None, None, error
        elif not events:
            yield path, 0.0, seconds(duration), None, None, None
        for event in events:
            yield path, *event, None


def _write_steps(file: Path, suffix: str, parts: Parts, paths: list[str], classes: list[str]) -> None:
    """A row for each time step of the recordings that can be used, with a column for each class."""
    usable = ((path, table) for path, entry, tables in parts.read(paths) if entry.error is None for table in tables)
    if suffix == ".csv":
        rows = (
            (path, seconds(start), seconds(end), *(round(score, DIGITS) for score in scores))
            for path, table in usable
            for start, end, scores in zip(*(table[name].to_pylist() for name in ("start", "end", "values")))
        )
        write_csv(file, [*STEP_COLUMNS, *classes], rows)
        return
    numbers = [(name, pa.float64()) for name in ("start", "end")] + [(name, pa.float32()) for name in classes]
    schema = pa.schema([("path", pa.string()), *numbers])

    def wide(path: str, table: pa.Table) -> pa.Table:
        names = pa.repeat(pa.scalar(utf8(path)), len(table))
        return pa.Table.from_arrays([names, table["start"], table["end"], *map(pa.array, values_of(table).T.copy())], schema=schema)

    write_tables(file, schema, (wide(path, table) for path, table in usable), parts.rows_at_once)


def _plot(file: Path, title: str, recording: Detected, parts: Parts, task: Detection, length: float) -> None:
    """A picture of a recording, `file` with the suffix .png; or of parts of about `length` seconds, their numbers before the suffix."""
    step, rate, classes = task.config.frames_per_step / 100, task.windowing.sampling_rate, task.config.class_names
    count = max(1, round(recording.duration / length))
    starts = [round(i * recording.steps / count) for i in range(count)]
    found = parts.read([recording.path])  # which holds the file open
    _, _, tables = next(found)
    scores = cut_at(map(values_of, tables), starts[1:])
    waveforms = cut_at(read_blocks(recording.path, rate), [round(start * step * rate) for start in starts[1:]])
    for i, (start, steps, waveform) in enumerate(zip(starts, scores, waveforms, strict=True), 1):
        number = f".{i:0{len(str(count))}}-of-{count}" if count > 1 else ""
        result = StepScores(steps, step, len(waveform) / rate, classes)
        picture = file.with_name(f"{file.name}{number}.png")
        plot_events(result, recording.events, waveform, picture, title, start=start * step, sampling_rate=rate)


def cut_at(arrays: Iterable[np.ndarray], bounds: Sequence[int]) -> Iterator[np.ndarray]:
    """Successive arrays, joined along the first axis, cut into pieces at `bounds`, which rise."""
    held: list[np.ndarray] = []
    first, end, left = 0, 0, list(bounds)
    for array in arrays:
        held.append(array)
        end += len(array)
        while left and left[0] <= end:
            whole = np.concatenate(held)
            size = left.pop(0) - first
            yield whole[:size]
            held, first = [whole[size:]], first + size
    yield np.concatenate(held)


def _below(folder: Path, name: str) -> Path:
    """A place for a file, the folders of which are made."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
