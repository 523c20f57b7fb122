"""A recording through a model, and what is kept of it for a page: scores over time, the sound that plays, and a picture of the log-mel."""

import os
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import soundfile

from ..audio.decode import read_blocks
from ..audio.paths import printable_path
from ..errors import UserError, as_user_error
from ..evaluation.loading import load_model, tagger_class
from ..events_sslam import Event, EventSettings, find_events
from ..modeling_sslam import SSLAMForAudioClassification
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..recordings.formats import rounded, seconds, utf8, write_audacity, write_rows, write_tables
from ..recordings.segments import join_windows
from ..recordings.tag import TagSettings
from ..windows_sslam import Windowing
from .picture import LogMelPicture
from .settings import AppSettings


SOUND, PICTURE = "sound.flac", "log_mel.png"
TABLE, LABELS, EMBEDDINGS = ".csv", ".labels.txt", ".parquet"  # behind the name of a recording
ROWS_AT_ONCE = 2**12  # of the embeddings
LIVE_WINDOW, LIVE_HOP = 1.92, 0.32  # seconds, unless the settings say otherwise
RECENT = 30.0  # seconds before the latest event of a live source, of which earlier ones are kept
EXCEPTION = re.compile(r" \(\w+Error\)")  # as messages about files of some kinds name it
Progress = Callable[[float, str], None]  # a fraction in [0, 1], and what is done


class Slider(NamedTuple):
    """A setting that acts on kept scores."""

    label: str
    info: str
    least: float
    largest: float
    step: float
    value: float


@dataclass(frozen=True)
class Recording:
    """What is kept of a recording.

    Attributes:
        name: as its owner called it.
        folder: of its files.
        duration: in seconds.
        edges: `(n + 1,)`, in seconds: row `i` of the scores is drawn between `edges[i]` and `edges[i + 1]`.
        scores: `(n, classes)`, of time steps or windows.
        starts, ends: `(n,)`, in seconds: what each row covers. Windows overlap.
    """

    name: str
    folder: Path
    duration: float
    edges: np.ndarray
    scores: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def file(self, ending: str) -> Path:
        """For download: browsers save it under this name, which has nothing but letters, digits, hyphens and underscores."""
        return self.folder / (re.sub(r"[^\w-]+", "_", Path(self.name).stem)[:80] + ending)


class Listener(ABC):
    """A model, for one recording at a time; threads may share it. See [`open_listener`].

    Attributes:
        live_options: `window` and `hop` of the live mode, in seconds.
    """

    model_class: ClassVar[type]
    finds: ClassVar[str]  # what the model finds, for people
    sliders: tuple[Slider, Slider]

    def __init__(self, settings: AppSettings):
        loaded: Any = load_model(self.model_class, settings.model, settings.dtype, settings.device)
        self.model, self.extractor = loaded[0].eval(), loaded[1]
        self.settings, self.classes, self.rate = settings, self.model.config.class_names, self.extractor.sampling_rate
        self._options = {"hop": settings.hop, "window": settings.window, "batch_size": settings.per_device_eval_batch_size}
        window, hop = settings.live_window, settings.live_hop
        window = min(LIVE_WINDOW, self.extractor.max_length / 100) if window is None else window
        self.live_options: dict[str, Any] = {"window": window, "hop": min(LIVE_HOP, window) if hop is None else hop}

    @abstractmethod
    def events(self, recording: Recording, threshold: float, second: float) -> list[Event]:
        """What the kept scores say with these positions of the sliders, as it is written."""

    @abstractmethod
    def thresholds(self, threshold: float) -> np.ndarray:
        """`(classes,)`, with this position of the first slider."""

    @abstractmethod
    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        """The events of the last seconds of a source that arrives in blocks, as they are written, whenever there are others. The settings
        are the model's own."""

    @abstractmethod
    def live_delay(self) -> float:
        """Seconds of sound after the end of an event until [`live`] has it, at most; the length of a block is to be added."""

    @abstractmethod
    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Edges, scores, starts and ends, see [`Recording`]."""

    def listen(self, file: Path, name: str, folder: Path, progress: Progress) -> Recording:
        """Everything that the page shows of a file. Memory holds its scores and one batch, not its samples.

        Args:
            file: in any format.
            name: what a person calls it.
            folder: empty, for what is kept.
            progress: is told how much is done.

        Raises:
            ValueError: if it cannot be used, or is longer or takes longer than the settings allow; the message is meant for the visitor.
        """
        deadline = time.monotonic() + self.settings.max_compute_seconds
        try:
            duration = self._keep_sound(file, folder / SOUND, deadline)
            picture = LogMelPicture(duration, self.rate)
            blocks = self._watched(read_blocks(file, self.rate), duration, deadline, progress)
            edges, scores, starts, ends = self._score(picture.watch(blocks))
        except ValueError as error:  # it may name a file of this machine, or an exception's class, which tells visitors nothing
            message = str(error).replace(printable_path(str(file)), printable_path(name))
            raise ValueError(EXCEPTION.sub(": choose a file that holds sound, and is whole", message)) from error
        picture.save(folder / PICTURE)
        return Recording(name, folder, duration, edges, scores, starts, ends)

    def embed(self, recording: Recording) -> Path:
        """A vector for each window of a recording, as a file that `sslam embed --per window` would write of the sound that plays."""
        file = recording.file(EMBEDDINGS)
        if not file.exists():
            blocks = read_blocks(recording.folder / SOUND, self.rate)
            (found,) = self.model.base_model.encode([blocks], self.extractor, per="window", **self._options)
            width = found.vectors.shape[1]
            types = {"path": pa.string(), "start": pa.float64(), "end": pa.float64(), "vector": pa.list_(pa.float32(), width)}
            schema = pa.schema(list(types.items()))
            vectors = pa.FixedSizeListArray.from_arrays(found.vectors.numpy().ravel(), width)
            names = pa.repeat(pa.scalar(utf8(recording.name)), len(vectors))
            table = pa.Table.from_arrays([names, pa.array(found.starts), pa.array(found.ends), vectors], schema=schema)
            unfinished = file.with_suffix(".unfinished")
            write_tables(unfinished, schema, [table], ROWS_AT_ONCE)
            os.replace(unfinished, file)
        return file

    def write(self, recording: Recording, events: list[Event]) -> None:
        """The table and the label track of a recording, in its folder."""
        rows = [(recording.name, *event, None) for event in events]
        empty = [(recording.name, 0.0, seconds(recording.duration), None, None, None)]
        write_rows(recording.file(TABLE), ".csv", iter(rows or empty))
        write_audacity(recording.file(LABELS), events, self.rate / 2)

    def _keep_sound(self, file: Path, sound: Path, deadline: float) -> float:
        """Write what the model receives, in a format that every browser plays; how long it is in seconds.

        24 bits, so that embeddings can be made of it as of the original.
        """
        samples = 0
        with soundfile.SoundFile(sound, "w", self.rate, 1, subtype="PCM_24", format="FLAC") as output:
            for block in read_blocks(file, self.rate):
                samples += len(block)
                if samples > self.settings.max_seconds * self.rate:
                    longest = f"{self.settings.max_seconds:g} s"
                    raise UserError(f"{printable_path(str(file))} is longer than {longest}, the limit of this page: give a part of it")
                self._check(deadline)
                output.write(block.clip(-1, 1))  # resampling may overshoot
        return samples / self.rate

    def _watched(self, blocks: Iterable[np.ndarray], duration: float, deadline: float, progress: Progress) -> Iterator[np.ndarray]:
        """Blocks of a recording: the model reads the next one when it is done with the windows before."""
        samples = 0
        for block in blocks:
            self._check(deadline)
            progress(samples / self.rate / duration, f"{samples / self.rate:.0f} of {duration:.0f} s")
            samples += len(block)
            yield block

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise UserError(
                f"this recording takes more than {self.settings.max_compute_seconds:g} s, the limit of this page: give a part of it"
            )


class DetectorListener(Listener):
    """A model of event detection, as `sslam detect` uses it."""

    model_class = SSLAMForAudioFrameClassification
    finds = "events"

    def __init__(self, settings: AppSettings):
        super().__init__(settings)
        with as_user_error("config.event_detection"):
            own = EventSettings.of(self.model.config)
        self._own = own.by_class(self.classes)
        step = self.model.config.frames_per_step / 100
        threshold, median = (float(np.median(self._own[name])) for name in ("threshold", "median_filter"))
        above = f"Steps of {step * 1000:.0f} ms with a higher score belong to an event."
        shorter = "Removes shorter events and closes shorter gaps; 0: no filter."
        self._shifts = bool(np.ptp(self._own["threshold"]))
        first = Slider("Threshold", above, 0, 1, 0.01, round(threshold, 2))
        if self._shifts:
            added = f"Each class has a threshold of its own, from {{:g}} to {{:g}}; this is added to all. {above}"
            first = Slider("Shift of all thresholds", added.format(*_range(self._own["threshold"])), -1, 1, 0.01, 0)
        if np.ptp(self._own["median_filter"]):
            shorter += " Until it is moved, each class has its own, from {:g} to {:g}.".format(*_range(self._own["median_filter"]))
        self.sliders = (first, Slider("Median filter (seconds)", shorter, 0, 3, step, median))

    def events(self, recording: Recording, threshold: float, second: float) -> list[Event]:
        settings = self._settings(threshold, second)
        step = self.model.config.frames_per_step / 100
        found = find_events(recording.scores, step, self.classes, settings, recording.duration)
        return [rounded(event) for event in found]

    def thresholds(self, threshold: float) -> np.ndarray:
        return self._settings(threshold, self.sliders[1].value).by_class(self.classes)["threshold"]

    def _settings(self, threshold: float, median: float) -> EventSettings:
        """The model's own, but for sliders that were moved."""
        given: dict[str, Any] = {}
        if threshold != self.sliders[0].value:
            levels, onsets = np.full(len(self.classes), threshold), self._own["onset_threshold"]
            if self._shifts:
                levels, onsets = ((self._own[name] + threshold).clip(0, 1).round(4) for name in ("threshold", "onset_threshold"))
            values = {"threshold": levels, "onset_threshold": np.maximum(onsets, levels)}  # where it is lower, there is no hysteresis
            given = {name: dict(zip(self.classes, column.tolist())) for name, column in values.items()}
        if median != self.sliders[1].value:
            given["median_filter"] = median
        return EventSettings.of(self.model.config, **given)

    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        recent: list[Event] = []
        for event in self.model.detect_stream(blocks, self.extractor, **self.live_options):
            recent = [*(known for known in recent if known.end > event.end - RECENT), rounded(event)]
            yield recent

    def live_delay(self) -> float:
        return self.model.detection_delay(self.extractor, **self.live_options)

    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        result = self.model.score_steps(blocks, self.extractor, **self._options)
        edges = np.minimum(result.step * np.arange(len(result.scores) + 1), result.duration)
        return edges, result.scores, edges[:-1], edges[1:]


class ClassifierListener(Listener):
    """A classifier of clips, as `sslam tag` uses it: labels of windows, and successive windows of a label joined."""

    model_class = SSLAMForAudioClassification
    finds = "segments"

    def __init__(self, settings: AppSettings):
        super().__init__(settings)
        defaults = {field.name: field.default_factory for field in fields(TagSettings) if field.name in ("threshold", "top_k")}
        threshold, top_k = (defaults[name]() for name in ("threshold", "top_k"))  # type: ignore[operator]  # `setting` gives a factory
        most = len(self.classes)
        self.sliders = (
            Slider("Threshold", "Windows with at least this score have the label.", 0, 1, 0.01, threshold),
            Slider("Labels of a window", "At most; those with the highest scores.", 1, min(20, most), 1, min(top_k, most)),
        )

    def events(self, recording: Recording, threshold: float, second: float) -> list[Event]:
        found = join_windows(recording.starts, recording.ends, recording.scores, self.classes, int(second), threshold)
        return [rounded(segment) for segment in found]

    def thresholds(self, threshold: float) -> np.ndarray:
        return np.full(len(self.classes), threshold)

    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        """Segments of the windows of the last seconds: one that began before that begins with the first of these."""
        length = Windowing.of_model(self.model.config, self.extractor, **self.live_options).length / self.rate
        recent: deque[tuple[float, np.ndarray]] = deque()
        for batch in self.model.score_windows(blocks, self.extractor, batch_size=1, **self.live_options):
            recent.append((batch.starts[0], batch.scores[0]))
            while recent[0][0] < batch.starts[0] - RECENT:
                recent.popleft()
            starts, scores = (np.array(column) for column in zip(*recent))
            found = join_windows(starts, starts + length, scores, self.classes, int(self.sliders[1].value), self.sliders[0].value)
            yield [rounded(segment) for segment in found]

    def live_delay(self) -> float:
        """A window that holds a sound's end ends at most a hop after it, and is known when one more sample has arrived."""
        windowing = Windowing.of_model(self.model.config, self.extractor, **self.live_options)
        return (windowing.hop + 1) / self.rate

    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        result = self.model.score_over_time(blocks, self.extractor, **self._options)
        return result.edges, result.scores, result.starts, np.minimum(result.starts + result.window, result.duration)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def open_listener(settings: AppSettings) -> Listener:
    """A listener of the kind that the model needs.

    Raises:
        UserError: if the model cannot be loaded, or neither detects nor classifies, or its live mode cannot have the windows of `settings`.
    """
    kind = DetectorListener if tagger_class(settings.model) is SSLAMForAudioFrameClassification else ClassifierListener
    listener = kind(settings)
    if settings.live_at_once:
        with as_user_error("the live mode (live_window, live_hop; live_at_once 0 for none)"):
            listener.live_delay()
    return listener


__all__ = ["ClassifierListener", "DetectorListener", "Listener", "Recording", "Slider", "open_listener"]
