"""Tags of every recording of a folder or a list, written as they are found, so that a run that is stopped can be resumed (see
`evaluation.journal`).
"""

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ..audio.decode import AUDIO_SUFFIXES, read_blocks
from ..audio.paths import files_below
from ..errors import AudioDecodingError, UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..inference import ScoresOverTime
from ..modeling_sslam import SSLAMForAudioClassification
from ..settings import setting
from .features import hash_model
from .journal import JournaledOutput, place_of, state_of, version_of
from .loading import load_classifier


SETTINGS_WITHOUT_EFFECT = ("inputs", "output", "batch_size", "device")  # on what is written of a recording
DIGITS = 4  # of scores
Item = TypeVar("Item")
State = tuple[dict[str, Any], tuple[int, ...] | None]  # of a recording: what the journal tells of it, and its `version_of` it


@dataclass
class TagSettings:
    """Settings of `scripts/tag.py`."""

    model: str = setting("folder or Hub id of a SSLAM classifier")
    inputs: str | list[str] = setting(
        "a folder (every audio file below it), an audio file, or a text file with one path a line (relative ones start at its folder); or "
        "a list of these"
    )
    output: str = setting("file to write: .jsonl, one line a recording, or .csv, one row for each window and label")
    top_k: int = setting("labels at most of a recording and of a window", 5)
    threshold: float = setting("least score of a label", 0.0)
    pool: Literal["max", "mean"] = setting("over windows, for a recording's scores in .jsonl", "max")
    windows: bool = setting("whether .jsonl has every window's labels too", False)
    hop: float | None = setting("seconds from one window's start to the next one's; null: half a window", None)
    window: float | None = setting("seconds, a multiple of 0.16; null: the feature extractor's length", None)
    batch_size: int = setting("windows at a time", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: the accelerator of this machine, or else its CPU", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("of the model", "float32")

    def __post_init__(self):
        if Path(self.output).suffix not in (".jsonl", ".csv"):
            raise UserError(f"output is {self.output!r}, but a file that ends in .jsonl or .csv is expected")
        if self.windows and self.output.endswith(".csv"):
            raise UserError("windows is true, but a .csv has every window as it is: leave it out")
        if self.top_k < 1 or not 0 <= self.threshold <= 1:
            raise UserError(f"top_k is {self.top_k} and threshold {self.threshold:g}, but at least 1 and a score in [0, 1] are expected")


@dataclass
class TagSummary:
    """What a run did: recordings tagged, skipped because they were finished before, and not usable by cause; seconds of audio and of the
    run."""

    tagged: int = 0
    skipped: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    audio_seconds: float = 0.0
    run_seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Seconds of audio in a second."""
        return self.audio_seconds / max(self.run_seconds, 1e-9)

    def count(self, heard: ScoresOverTime | ValueError, run_seconds: float) -> None:
        """One more recording was tagged, or could not be, `run_seconds` after the start."""
        self.run_seconds = run_seconds
        if isinstance(heard, ScoresOverTime):
            self.tagged += 1
            self.audio_seconds += heard.duration
        else:
            self.unusable[_cause(heard)] = self.unusable.get(_cause(heard), 0) + 1

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.unusable.items()))
        return (
            f"{self.tagged} recordings tagged ({self.audio_seconds / 3600:.2f} h, {self.speed:.0f} x real time), {self.skipped} finished "
            f"before, {sum(self.unusable.values())} not usable" + (f" ({causes})" if causes else "")
        )


def tag_files(settings: TagSettings) -> TagSummary:
    """Tag all recordings of `settings.inputs` that the output does not hold yet.

    The next seconds of audio are decoded while a batch is scored. A recording that cannot be read or scored (broken, too short, out of
    scale) is written with its error and counted, and the run goes on; the next run tries it again.

    Raises:
        UserError: if an input or the model is not there or not usable, or the output is from another model or other settings.
        FloatingPointError: if the model's scores are not finite.
    """
    paths = find_recordings(settings.inputs)
    model, extractor = load_classifier(settings.model, settings.dtype, settings.device)
    options: dict[str, Any] = {"hop": settings.hop, "window": settings.window, "batch_size": settings.batch_size}
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
                heard: ScoresOverTime | ValueError
                try:
                    heard = model.score_over_time(_blocks(items), extractor, **options)
                except ValueError as error:  # the settings fit, so it is the audio
                    heard = error
                # One that was replaced, deleted or still written to while it was read is tried again by the next run.
                state, version = states.pop(path)
                final = isinstance(heard, ScoresOverTime) and version == version_of(path)
                output.write(path, state, as_text(path, heard, settings), final)
                summary.count(heard, time.monotonic() - started)
                progress.update()
                progress.set_postfix_str(f"{summary.speed:.0f} x real time")
    return summary


def find_recordings(inputs: str | Sequence[str]) -> list[str]:
    """Paths of all recordings, each once, by whatever way it is named: those below folders sorted, those of lists in their order.

    Raises:
        UserError: if an input is not there, is not text, or holds no recording.
    """
    found: dict[str, str] = {}  # by where they lie
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
            raise UserError(f"{name} holds no recording: a folder's are known by {', '.join(AUDIO_SUFFIXES)}, a list has one path a line")
        for recording in here:
            found.setdefault(place_of(recording), recording)
    return list(found.values())


def _listed(line: str, folder: Path) -> str:
    """The recording that a line of a list names. Blanks around it are of no account, unless a file is called so."""
    if "://" in line:
        return line.strip()
    return str(folder / (line if (folder / line).exists() else line.strip()))


def _identity(settings: TagSettings, model: SSLAMForAudioClassification, extractor: SSLAMFeatureExtractor) -> dict[str, Any]:
    """All that decides what is written of a recording; the model by its contents, wherever it lies."""
    kept = {name: value for name, value in asdict(settings).items() if name not in SETTINGS_WITHOUT_EFFECT}
    digest = hash_model(model, extractor, id2label=model.config.id2label, problem_type=model.config.problem_type)
    return kept | {"model": f"sha256:{digest}"}


def _decoded(paths: Iterable[str], sampling_rate: int, states: dict[str, State]) -> Iterator[tuple[str, np.ndarray | AudioDecodingError]]:
    """All blocks of all recordings; where one cannot be read, the error in their place. `states` gets each one's before it is opened."""
    for path in paths:
        states[path] = state_of(path), version_of(path)
        try:
            for block in read_blocks(path, sampling_rate):
                yield path, block
        except AudioDecodingError as error:
            yield path, error


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in the background while the one before is used."""
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
    return error.cause if isinstance(error, AudioDecodingError) else "refused"


def _json_line(path: str, heard: ScoresOverTime | ValueError, settings: TagSettings) -> str:
    if isinstance(heard, ValueError):
        return json.dumps({"path": path, "error": str(heard), "cause": _cause(heard)}, ensure_ascii=False) + "\n"
    pooled = heard.scores.max(0) if settings.pool == "max" else heard.scores.mean(0)
    record = {"path": path, "duration": round(heard.duration, 3), "tags": _tags(pooled, heard.classes, settings)}
    if settings.windows:
        record["windows"] = [
            {"start": start, "end": end, "tags": _tags(scores, heard.classes, settings)} for start, end, scores in _windows(heard)
        ]
    return json.dumps(record, ensure_ascii=False) + "\n"


def _csv_rows(path: str, heard: ScoresOverTime | ValueError, settings: TagSettings) -> str:
    rows: list[Sequence[Any]] = [(path, "", "", "", "", heard)]
    if isinstance(heard, ScoresOverTime):
        rows = [
            (path, start, end, tag["label"], tag["score"], "")
            for start, end, scores in _windows(heard)
            for tag in _tags(scores, heard.classes, settings)
        ] or [(path, 0.0, round(heard.duration, 3), "", "", "")]  # heard, and nothing found
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _windows(heard: ScoresOverTime) -> Iterator[tuple[float, float, np.ndarray]]:
    """Start and end of each window in seconds, and its scores `(classes,)`."""
    for start, scores in zip(heard.starts.tolist(), heard.scores):
        yield round(start, 3), round(min(start + heard.window, heard.duration), 3), scores


def _tags(scores: np.ndarray, classes: list[str], settings: TagSettings) -> list[dict[str, Any]]:
    """The likeliest labels with their scores, the highest first."""
    best = [i for i in np.argsort(-scores, kind="stable")[: settings.top_k] if scores[i] >= settings.threshold]
    return [{"label": classes[i], "score": round(float(scores[i]), DIGITS)} for i in best]


__all__ = ["TagSettings", "TagSummary", "find_recordings", "tag_files"]
