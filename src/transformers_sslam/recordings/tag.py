"""Labels of every recording of a folder or a list, of any length, rate and number of channels. Started again, a run is resumed.

```bash
sslam tag --model model_cards/sslam-tiny-esc10 --inputs recordings --output tags.jsonl    # a line for each recording
sslam tag --model MODEL --inputs recordings --output tags.csv --threshold 0.3             # a row for each segment; also .parquet
sslam tag --model MODEL --inputs a.wav list.txt --output tags.jsonl --per window --device cuda --dtype bfloat16
accelerate launch --num_processes 4 -m transformers_sslam tag --model MODEL --inputs archive --output tags.parquet
```

Scores are kept in `tags.parts`: another threshold, `top_k`, `pool`, `per` or format needs no model. A file that cannot be read is written
with its cause, and tried again by the next run, as is a file that has changed. A cell of a .csv that a spreadsheet would compute has an
apostrophe in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError
from ..evaluation.loading import tagger_class
from ..events_sslam import Event
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..settings import setting
from ..tasks_sslam import Scoring
from ..windows_sslam import Windowing
from .formats import DIGITS, rounded, seconds, write_lines, write_rows
from .parts import Parts, values_of
from .processing import RecordingsSettings, Summary, process, report
from .segments import best_labels, join_windows


@dataclass(kw_only=True)
class TagSettings(RecordingsSettings):
    """Labels of recordings"""

    top_k: int = setting("maximum number of labels of a recording and of a window", 5)
    threshold: float = setting("labels with a lower score are left out", 0.1)
    pool: Literal["max", "mean"] = setting("how the scores of windows become those of a recording (.jsonl)", "max")
    per: Literal["segment", "window"] = setting("labels of segments, which are successive windows joined, or of each window", "segment")

    suffixes: ClassVar = (".jsonl", ".csv", ".parquet")

    def __post_init__(self):
        super().__post_init__()
        if self.top_k < 1 or not 0 <= self.threshold <= 1:
            raise UserError(f"top_k is {self.top_k} and threshold {self.threshold:g}, but at least 1 and a score in [0, 1] are expected")

    @property
    def model_class(self) -> type:  # type: ignore[override]  # which of two, the model tells
        """Classifier, or detector of events, which scores clips too."""
        return tagger_class(self.model)

    def task(self, config: SSLAMConfig, extractor: SSLAMFeatureExtractor) -> Scoring:
        """Scores of each window."""
        windowing = Windowing.of_model(config, extractor, hop=self.hop, window=self.window)
        return tagger_class(self.model).scoring(config, extractor, windowing)


@dataclass
class Scored:
    """A recording's scores: `starts` and `ends`, `(windows,)`, in seconds, `scores (windows, classes)`; or why there are none."""

    path: str
    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    cause: str | None
    error: str | None


def run(settings: TagSettings) -> None:
    """Tag, and print the counts."""
    report(tag_files, settings)


def tag_files(settings: TagSettings) -> Summary:
    """Tag all recordings of `settings.inputs`.

    A recording that cannot be read or scored is written with its error and counted. See [`process`] for what is raised.
    """

    def write(parts: Parts, paths: list[str], output: Path, task: Scoring) -> None:
        recordings = _scored(parts, paths)
        with parts.replace(output) as file:
            if output.suffix == ".jsonl":
                write_lines(file, (_record(recording, task.config.class_names, settings) for recording in recordings))
            else:
                write_rows(file, output.suffix, _rows(recordings, task.config.class_names, settings))

    return process(settings, write)


def _scored(parts: Parts, paths: list[str]) -> Iterator[Scored]:
    for path, entry, tables in parts.read(paths):
        table = pa.concat_tables(tables)
        starts, ends = (table[name].to_numpy() for name in ("start", "end"))
        yield Scored(path, starts, ends, values_of(table), entry.cause, entry.error)


def _record(recording: Scored, classes: list[str], settings: TagSettings) -> dict[str, Any]:
    """A line of a .jsonl."""
    if recording.error is not None:
        return {"path": recording.path, "error": recording.error, "cause": recording.cause}
    pooled = recording.scores.max(0) if settings.pool == "max" else recording.scores.mean(0)
    record = {"path": recording.path, "duration": seconds(recording.ends[-1]), "tags": _tags(pooled, classes, settings)}
    if settings.per == "segment":
        return record | {"segments": [segment._asdict() for segment in _segments(recording, classes, settings)]}
    return record | {"windows": _windows(recording, classes, settings)}


def _rows(recordings: Iterator[Scored], classes: list[str], settings: TagSettings) -> Iterator[tuple[Any, ...]]:
    """Of a .csv or .parquet: one for each segment or window and label, or one without."""
    for recording in recordings:
        if recording.error is not None:
            yield recording.path, None, None, None, None, recording.error
            continue
        if settings.per == "segment":
            found = [tuple(segment) for segment in _segments(recording, classes, settings)]
        else:
            found = [
                (window["start"], window["end"], tag["label"], tag["score"])
                for window in _windows(recording, classes, settings)
                for tag in window["tags"]
            ]
        for row in found or [(0.0, seconds(recording.ends[-1]), None, None)]:  # scored, and no label above the threshold
            yield recording.path, *row, None


def _segments(recording: Scored, classes: list[str], settings: TagSettings) -> list[Event]:
    found = join_windows(recording.starts, recording.ends, recording.scores, classes, settings.top_k, settings.threshold)
    return [rounded(segment) for segment in found]


def _windows(recording: Scored, classes: list[str], settings: TagSettings) -> list[dict[str, Any]]:
    windows = zip(recording.starts, recording.ends, recording.scores)
    return [{"start": seconds(start), "end": seconds(end), "tags": _tags(scores, classes, settings)} for start, end, scores in windows]


def _tags(scores: np.ndarray, classes: list[str], settings: TagSettings) -> list[dict[str, Any]]:
    best = best_labels(scores, settings.top_k, settings.threshold)
    return [{"label": classes[i], "score": round(float(scores[i]), DIGITS)} for i in best]
