"""Labels of every recording of a folder or a list, of any length, rate and number of channels. Started again, a run is resumed.

```bash
sslam tag --model model_cards/sslam-tiny-esc10 --inputs recordings --output tags.jsonl    # one line for each recording
sslam tag --model MODEL --inputs recordings --output tags.csv --hop 2 --threshold 0.2     # one row for each window and label
sslam tag --model MODEL --inputs a.wav list.txt --output tags.jsonl --write_windows --device cuda --dtype bfloat16
```

A file that cannot be read is written with its cause, and tried again by the next run, as is a file that has changed: of several lines of a
path the last counts, and of a .csv's rows an error only if no others of its path follow. A recording without any label above the threshold
has one row, without a label. A cell that a spreadsheet would compute has an apostrophe in front.
"""

import csv
import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import transformers
from tqdm.auto import tqdm

from ..allocator import keep_freed_memory
from ..audio.decode import AUDIO_SUFFIXES, read_blocks
from ..audio.paths import files_below
from ..errors import AudioDecodingError, UserError, as_user_error
from ..evaluation.loading import best_device, hash_model, load_model
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..inference_sslam import ScoresOverTime
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import spreadsheet_cell
from ..settings import setting, settings_dict
from .journal import JournaledOutput, absolute_path, state_of, version_of


SETTINGS_WITHOUT_EFFECT = ("inputs", "output", "per_device_eval_batch_size", "device")  # on what is written of a recording
DIGITS = 4  # of scores
Item = TypeVar("Item")
Result = ScoresOverTime | ValueError
State = tuple[dict[str, Any], tuple[int, ...] | None]  # of a recording: its `state_of` and its `version_of`


@dataclass(kw_only=True)
class TagSettings:
    """Labels of recordings"""

    model: str = setting("classifier: a folder, a Hub id, or an official fine-tuned checkpoint")
    inputs: str | list[str] = setting(
        "folder (every audio file below it), audio file, or text file with one path on each line (relative to its folder); or several"
    )
    output: str = setting("file to write: .jsonl, one line for each recording, or .csv, one row for each window and label")
    top_k: int = setting("maximum number of labels of a recording and of a window", 5)
    threshold: float = setting("labels with a lower score are left out", 0.0)
    pool: Literal["max", "mean"] = setting("how the scores of windows become those of a recording (.jsonl)", "max")
    write_windows: bool = setting("write the labels of every window to .jsonl too", False)
    hop: float | None = setting("seconds from one window's start to the next one's; null: half a window", None)
    window: float | None = setting("length of a window in seconds, a multiple of 0.16; null: the feature extractor's", None)
    per_device_eval_batch_size: int = setting("windows in a forward pass", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the model", "float32")

    def __post_init__(self):
        if Path(self.output).suffix not in (".jsonl", ".csv"):
            raise UserError(f"output is {self.output!r}, but a file that ends in .jsonl or .csv is expected")
        if self.write_windows and self.output.endswith(".csv"):
            raise UserError("write_windows is true, but a .csv always has every window: leave it out")
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, but must be positive")
        if self.top_k < 1 or not 0 <= self.threshold <= 1:
            raise UserError(f"top_k is {self.top_k} and threshold {self.threshold:g}, but at least 1 and a score in [0, 1] are expected")


@dataclass
class TagSummary:
    """Of a run: recordings tagged, finished before, and unusable by cause; seconds of audio and of the run."""

    tagged: int = 0
    skipped: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    audio_seconds: float = 0.0
    run_seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Seconds of audio in a second."""
        return self.audio_seconds / max(self.run_seconds, 1e-9)

    def count(self, result: Result, run_seconds: float) -> None:
        """Add the result of a recording, `run_seconds` after the start."""
        self.run_seconds = run_seconds
        if isinstance(result, ScoresOverTime):
            self.tagged += 1
            self.audio_seconds += result.duration
        else:
            self.unusable[_cause(result)] += 1

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.unusable.items()))
        return (
            f"{self.tagged} recordings tagged ({self.audio_seconds / 3600:.2f} h, {self.speed:.0f} x real time), {self.skipped} finished "
            f"before, {sum(self.unusable.values())} not usable" + (f" ({causes})" if causes else "")
        )


def run(settings: TagSettings) -> None:
    """Tag, and print the counts."""
    transformers.logging.disable_progress_bar()
    if str(settings.device or best_device()) == "cpu":
        keep_freed_memory()
    print(tag_files(settings))


def tag_files(settings: TagSettings) -> TagSummary:
    """Tag all recordings of `settings.inputs` that the output does not hold yet.

    Audio is decoded ahead of the scoring. A recording that cannot be read or scored is written with its error and counted.

    Raises:
        UserError: if an input or the model is missing or unusable, or the output is from another model or other settings.
        FloatingPointError: if the model's scores are not finite.
    """
    paths = find_recordings(settings.inputs)
    model, extractor = load_model(SSLAMForAudioClassification, settings.model, settings.dtype, settings.device)
    batch_size = settings.per_device_eval_batch_size
    options: dict[str, Any] = {"hop": settings.hop, "window": settings.window, "batch_size": batch_size}
    with as_user_error("these settings do not fit the model"):
        next(model.score_windows(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor, **options))
    as_text = _csv_rows if settings.output.endswith(".csv") else _json_line
    summary, started = TagSummary(), time.monotonic()
    with JournaledOutput(Path(settings.output), _identity(settings, model, extractor)) as output:
        left = [path for path in paths if not output.holds(path)]
        summary.skipped = len(paths) - len(left)
        with tqdm(total=len(left), desc="tagging", unit="file") as progress:
            states: dict[str, State] = {}
            for path, items in groupby(_ahead(_decoded(left, extractor.sampling_rate, states)), key=itemgetter(0)):
                result: Result
                try:
                    result = model.score_over_time(_blocks(items), extractor, **options)
                except ValueError as error:  # the settings fit, so it is the audio
                    result = error
                # One that changed while it was read is tried again by the next run.
                state, version = states.pop(path)
                final = isinstance(result, ScoresOverTime) and version == version_of(path)
                output.write(path, state, as_text(path, result, settings), final)
                summary.count(result, time.monotonic() - started)
                progress.update()
                progress.set_postfix_str(f"{summary.speed:.0f} x real time")
    return summary


def find_recordings(inputs: str | Sequence[str]) -> list[str]:
    """Paths of all recordings, each once: those below folders sorted, those of lists in their order.

    Raises:
        UserError: if an input is missing, is not text, or holds no recording.
    """
    found: dict[str, str] = {}  # by absolute path
    for name in [inputs] if isinstance(inputs, str) else inputs:
        path = Path(name)
        with as_user_error(f"{name} is not a folder, audio file or list of paths"):
            if path.is_dir():
                here = sorted(str(path / below) for below in files_below(path, AUDIO_SUFFIXES))
            elif path.suffix.lower() in AUDIO_SUFFIXES:
                if "://" not in name and not path.is_file():
                    raise FileNotFoundError("there is no such file")
                here = [name]
            else:
                lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows puts a byte-order mark in front
                here = [_listed(line, path.parent) for line in lines if line.strip()]
        if not here:
            raise UserError(
                f"{name} holds no recording: expected are files with {', '.join(AUDIO_SUFFIXES)}, or a list with a path on each line"
            )
        for recording in here:
            found.setdefault(absolute_path(recording), recording)
    return list(found.values())


def _listed(line: str, folder: Path) -> str:
    """The recording that a line of a list names. Blanks around it are dropped, unless they belong to a file's name."""
    if "://" in line:
        return line.strip()
    return str(folder / (line if (folder / line).exists() else line.strip()))


def _identity(settings: TagSettings, model: SSLAMForAudioClassification, extractor: SSLAMFeatureExtractor) -> dict[str, Any]:
    """All that decides what is written of a recording; the model by its contents."""
    kept = {name: value for name, value in settings_dict(settings).items() if name not in SETTINGS_WITHOUT_EFFECT}
    digest = hash_model(model, extractor, id2label=model.config.id2label, problem_type=model.config.problem_type)
    return kept | {"model": f"sha256:{digest}"}


def _decoded(paths: Iterable[str], sampling_rate: int, states: dict[str, State]) -> Iterator[tuple[str, np.ndarray | AudioDecodingError]]:
    """Blocks of all recordings, or the error of one that cannot be read. `states` gets each one's before it is opened."""
    for path in paths:
        states[path] = state_of(path), version_of(path)
        try:
            for block in read_blocks(path, sampling_rate):
                yield path, block
        except AudioDecodingError as error:
            yield path, error


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made in the background while the one before is used."""
    with ThreadPoolExecutor(1) as background:
        upcoming = background.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = background.submit(next, items, None)
            yield item


def _blocks(items: Iterable[tuple[str, np.ndarray | AudioDecodingError]]) -> Iterator[np.ndarray]:
    for _, item in items:
        if isinstance(item, AudioDecodingError):
            raise item
        yield item


def _cause(error: ValueError) -> str:
    return error.cause if isinstance(error, AudioDecodingError) else "rejected"


def _json_line(path: str, result: Result, settings: TagSettings) -> str:
    if isinstance(result, ValueError):
        return json.dumps({"path": path, "error": str(result), "cause": _cause(result)}, ensure_ascii=False) + "\n"
    pooled = result.scores.max(0) if settings.pool == "max" else result.scores.mean(0)
    record = {"path": path, "duration": round(result.duration, 3), "tags": _tags(pooled, result.classes, settings)}
    if settings.write_windows:
        record["windows"] = [
            {"start": start, "end": end, "tags": _tags(scores, result.classes, settings)} for start, end, scores in _windows(result)
        ]
    return json.dumps(record, ensure_ascii=False) + "\n"


def _csv_rows(path: str, result: Result, settings: TagSettings) -> str:
    rows: list[Sequence[Any]] = [(path, "", "", "", "", str(result))]
    if isinstance(result, ScoresOverTime):
        rows = [
            (path, start, end, tag["label"], tag["score"], "")
            for start, end, scores in _windows(result)
            for tag in _tags(scores, result.classes, settings)
        ] or [(path, 0.0, round(result.duration, 3), "", "", "")]  # scored, and no label above the threshold
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(spreadsheet_cell, row) for row in rows)
    return text.getvalue()


def _windows(result: ScoresOverTime) -> Iterator[tuple[float, float, np.ndarray]]:
    """Start and end (seconds) and scores `(classes,)` of each window."""
    for start, scores in zip(result.starts.tolist(), result.scores):
        yield round(start, 3), round(min(start + result.window, result.duration), 3), scores


def _tags(scores: np.ndarray, classes: list[str], settings: TagSettings) -> list[dict[str, Any]]:
    """The labels with the highest scores, in falling order."""
    best = [i for i in np.argsort(-scores, kind="stable")[: settings.top_k] if scores[i] >= settings.threshold]
    return [{"label": classes[i], "score": round(float(scores[i]), DIGITS)} for i in best]
