"""A recording through a model, and what is kept of it for a page: scores over time, the sound that plays, and a picture of the log-mel."""

import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import soundfile

from ..audio.decode import read_blocks
from ..audio.paths import printable_path
from ..errors import UserError, as_user_error
from ..evaluation.loading import load_model, tagger_class
from ..events_sslam import Event, EventSettings, filter_scores, find_events
from ..fbank import frame_geometry
from ..modeling_sslam import SSLAMForAudioClassification, SSLAMLayer
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..publishing.folders import check_model_folder
from ..recordings.formats import rounded, seconds, utf8, write_audacity, write_rows, write_tables
from ..recordings.segments import join_windows
from ..recordings.tag import TagSettings
from ..windows_sslam import Windowing
from .picture import LogMelPicture
from .recording import EMBEDDINGS, LABELS, PICTURE, SOUND, TABLE, Found, Recording, Slider
from .settings import AppSettings
from .wording import clock


ROWS_AT_ONCE = 2**12  # of the embeddings
LONGEST_SECONDS = 5.0  # of a slider, unless the model has more
LIVE_WINDOW, LIVE_HOP = 1.92, 0.32  # seconds, unless the settings say otherwise
SILENT = 2.0**-15  # less than a step of 16 bits
RECENT = 30.0  # seconds before the latest event of a live source, of which earlier ones are kept
REASON = re.compile(r"(?<=cannot be read as audio) \(.*\)$")  # as a library says it
Progress = Callable[[float, str], None]  # a fraction in [0, 1], and what is done


class StoppedError(Exception):
    """Nobody waits any more for what is computed."""


class _Run(NamedTuple):
    """What is computed in a thread: of which recording, until when, and what ends it."""

    name: str
    deadline: float
    ended: threading.Event


class Listener(ABC):
    """A model, for one recording at a time; threads may share it. See [`open_listener`].

    Attributes:
        live_options: `window` and `hop` of the live mode, in seconds.
    """

    model_class: ClassVar[type]
    finds: ClassVar[str]  # what the model finds, for people
    kinds: ClassVar[str]  # its classes, for people
    job: ClassVar[str]  # what kind of model it is
    sliders: tuple[Slider, ...]

    def __init__(self, settings: AppSettings):
        loaded: Any = load_model(self.model_class, settings.model, settings.dtype, settings.device)
        self.model, self.extractor = loaded[0].eval(), loaded[1]
        self.settings, self.classes, self.rate = settings, self.model.config.class_names, self.extractor.sampling_rate
        self._options = {"hop": settings.hop, "window": settings.window, "batch_size": settings.per_device_eval_batch_size}
        with as_user_error("window or hop"):
            self.delay(settings.window, settings.hop)
        window, hop = settings.live_window, settings.live_hop
        window = min(LIVE_WINDOW, self.extractor.max_length / 100) if window is None else window
        self._thread = threading.local()  # what is computed in this thread, if anything
        for layer in self.model.modules():
            if isinstance(layer, SSLAMLayer):
                layer.register_forward_pre_hook(self._check)
        self.live_options: dict[str, Any] = {"window": window, "hop": min(LIVE_HOP, window) if hop is None else hop}

    @abstractmethod
    def find(self, recording: Recording, positions: Sequence[float]) -> Found:
        """What the kept scores say with these positions of the sliders."""

    @abstractmethod
    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        """The events of the last seconds of a source that arrives in blocks, as they are written, whenever there are others. The settings
        are the model's own, but without a change filter, which would wait for minutes."""

    def live_delay(self) -> float:
        """Seconds of sound after the end of an event until [`live`] has it, at most; the length of a block is to be added."""
        return self.delay(**self.live_options)

    @abstractmethod
    def delay(self, window: float | None, hop: float | None) -> float:
        """That of these windows, in seconds.

        Raises:
            ValueError: if the model cannot have them.
        """

    @abstractmethod
    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Edges, scores, starts and ends, see [`Recording`]."""

    def listen(self, file: Path, name: str, folder: Path, progress: Progress, ended: threading.Event | None = None) -> Recording:
        """Everything that the page shows of a file. Memory holds its scores and one batch, not its samples.

        Args:
            file: in any format.
            name: what a person calls it.
            folder: empty, for what is kept.
            progress: is told how much is done.
            ended: when it is set, nothing more is computed.

        Raises:
            StoppedError: as soon as `ended` is set.
            ValueError: if it cannot be used, or is longer or takes longer than the settings allow; the message is meant for the visitor.
        """
        self._thread.run = _Run(name, time.monotonic() + self.settings.max_compute_seconds, ended or threading.Event())
        try:
            duration = self._keep_sound(file, folder / SOUND)
            picture = LogMelPicture(duration, self.rate)
            blocks = self._watched(read_blocks(file, self.rate), duration, progress)
            edges, scores, starts, ends = self._score(picture.watch(blocks))
            self._check()
        except ValueError as error:  # it may name a file of this machine, or what a library said, which tells visitors little
            message = str(error).replace(printable_path(str(file)), printable_path(name))
            message = REASON.sub(": choose a file that holds sound, and is whole", message)
            raise ValueError(message if ": " in message else f"{message}: choose another file") from error
        finally:
            self._thread.run = None
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

    def _keep_sound(self, file: Path, sound: Path) -> float:
        """Write what the model receives, in a format that every browser plays; how long it is in seconds.

        24 bits, so that embeddings can be made of it as of the original.
        """
        samples, peak, name = 0, 0.0, printable_path(str(file))
        with soundfile.SoundFile(sound, "w", self.rate, 1, subtype="PCM_24", format="FLAC") as output:
            for block in read_blocks(file, self.rate):
                samples += len(block)
                if samples > self.settings.max_seconds * self.rate:
                    raise UserError(f"{name} is longer than {clock(self.settings.max_seconds)}, the limit of this page: give a part of it")
                self._check()
                output.write(block.clip(-1, 1))  # resampling may overshoot
                peak = max(peak, float(np.abs(block).max()))
        if samples < (least := frame_geometry(self.rate)[0]):
            raise UserError(f"{name} lasts {samples / self.rate:.3f} s, but {least / self.rate:g} s are needed: choose a longer recording")
        if peak < SILENT:
            raise UserError(f"{name} holds nothing but silence: choose another recording, or check the microphone that made it")
        return samples / self.rate

    def _watched(self, blocks: Iterable[np.ndarray], duration: float, progress: Progress) -> Iterator[np.ndarray]:
        """Blocks of a recording: the model reads the next one when it is done with the windows before."""
        samples = 0
        for block in blocks:
            self._check()
            progress(samples / self.rate / duration, f"{samples / self.rate:.0f} of {duration:.0f} s")
            samples += len(block)
            yield block

    def _check(self, *_: Any) -> None:
        """Before each layer too: a batch of windows may take half a minute."""
        run: _Run | None = getattr(self._thread, "run", None)
        if run is None:
            return
        if run.ended.is_set():
            raise StoppedError
        if time.monotonic() > run.deadline:
            most = clock(self.settings.max_compute_seconds)
            raise UserError(f"{printable_path(run.name)} takes more than {most} of computing, the limit of this page: give a part of it")


SECONDS_SLIDERS = (  # fields of `EventSettings` in seconds, with label and explanation
    (
        "median_filter",
        "Smooth the scores over (median filter, seconds)",
        "A longer one removes short events and closes short gaps; 0 switches it off.",
    ),
    (
        "change_filter",
        "Compare the scores over (change filter, seconds)",
        "Events then begin and end where scores change most, and each has one score; 0 switches it off, as while listening live.",
    ),
    (
        "max_gap",
        "Join events with a gap of up to (seconds)",
        "Two events of the same kind become one if the pause between them is not longer.",
    ),
)


class DetectorListener(Listener):
    """A model of event detection, as `sslam detect` uses it."""

    model_class = SSLAMForAudioFrameClassification
    finds, kinds, job = "events", "kinds of sounds", "detector of sound events, from when to when"

    def __init__(self, settings: AppSettings):
        super().__init__(settings)
        with as_user_error("config.event_detection"):
            own = EventSettings.of(self.model.config)
        self._own = own.by_class(self.classes)
        self._step = self.model.config.frames_per_step / 100
        self.sliders = (self._threshold_slider(), *(self._seconds_slider(*slider) for slider in SECONDS_SLIDERS))

    def find(self, recording: Recording, positions: Sequence[float]) -> Found:
        settings = self._settings(positions)
        limits = settings.by_class(self.classes)
        scores = filter_scores(recording.scores, self._step, self.classes, settings, recording.duration)
        found = find_events(scores, self._step, self.classes, replace(settings, median_filter=0.0, change_filter=0.0), recording.duration)
        return Found([rounded(event) for event in found], scores, limits["threshold"], limits["onset_threshold"])

    def _threshold_slider(self) -> Slider:
        own = self._own["threshold"]
        about = "The score that a sound needs, from 0 to 1: lower it to find more, raise it to find less."
        if not np.ptp(own):
            return Slider("threshold", "How sure must the model be? (threshold)", about, 0, 1, 0.01, round(float(own[0]), 2))
        about += f" Each kind of sound has a threshold of its own, from {own.min():g} to {own.max():g}; this is added to all."
        return Slider("threshold", "How sure must the model be? (added to all thresholds)", about, -1, 1, 0.01, 0)

    def _seconds_slider(self, setting: str, label: str, about: str) -> Slider:
        own = self._own[setting]
        if np.ptp(own):
            about += f" Until it is moved, each kind of sound has its own, from {own.min():g} to {own.max():g}."
        largest = max(LONGEST_SECONDS, float(own.max(initial=0)))
        return Slider(setting, label, about, 0, largest, self._step, float(np.median(own)))

    def _settings(self, positions: Sequence[float]) -> EventSettings:
        """The model's own, but for sliders that were moved. Onset thresholds move with the thresholds: a lower threshold lowers them by
        the same factor, to 0 at 0, and a higher one brings them nearer to 1 by the same factor. So a lower threshold always finds more."""
        given: dict[str, Any] = {}
        first, *others = self.sliders
        if positions[0] != first.value:
            own, onset = self._own["threshold"], self._own["onset_threshold"]
            level = ((own if np.ptp(own) else np.zeros_like(own)) + positions[0]).clip(0, 1)
            with np.errstate(divide="ignore", invalid="ignore"):  # what is not a number is not the larger one below
                moved = np.where(level < own, onset * level / own, 1 - (1 - onset) * (1 - level) / (1 - own))
            values = {"threshold": level.round(4), "onset_threshold": np.fmax(moved, level).round(4)}
            given = {name: dict(zip(self.classes, column.tolist())) for name, column in values.items()}
        moves = zip(others, positions[1:])
        return EventSettings.of(self.model.config, **given, **{slider.name: value for slider, value in moves if value != slider.value})

    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        recent: list[Event] = []
        for event in self.model.detect_stream(blocks, self.extractor, change_filter=0.0, **self.live_options):
            recent = [*(known for known in recent if known.end > event.end - RECENT), rounded(event)]
            yield recent

    def delay(self, window: float | None, hop: float | None) -> float:
        return self.model.detection_delay(self.extractor, window=window, hop=hop, change_filter=0.0)

    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        result = self.model.score_steps(blocks, self.extractor, **self._options)
        edges = np.minimum(result.step * np.arange(len(result.scores) + 1), result.duration)
        return edges, result.scores, edges[:-1], edges[1:]


class ClassifierListener(Listener):
    """A classifier of clips, as `sslam tag` uses it: labels of windows, and successive windows of a label joined."""

    model_class = SSLAMForAudioClassification
    finds, kinds, job = "labels", "labels", "classifier of pieces of a recording"

    def __init__(self, settings: AppSettings):
        super().__init__(settings)
        tagging = TagSettings(model=settings.model, inputs=[], output="tags.csv")  # for its defaults
        threshold, top_k = tagging.threshold, tagging.top_k
        most = len(self.classes)
        length = self._windowing(settings.window, settings.hop).length / self.rate
        sure = f"The score that a label needs, from 0 to 1, in a piece of {length:.3g} s (window): lower it for more labels."
        self.sliders = (
            Slider("threshold", "How sure must the model be? (threshold)", sure, 0, 1, 0.01, threshold),
            Slider("top_k", "Labels of a piece, at most (top k)", "Those with the highest scores.", 1, min(20, most), 1, min(top_k, most)),
        )

    def find(self, recording: Recording, positions: Sequence[float]) -> Found:
        threshold, top_k = positions
        found = join_windows(recording.starts, recording.ends, recording.scores, self.classes, int(top_k), threshold)
        limits = np.full(len(self.classes), threshold)
        return Found([rounded(segment) for segment in found], recording.scores, limits, limits)

    def live(self, blocks: Iterable[np.ndarray]) -> Iterator[list[Event]]:
        """Segments of the windows of the last seconds: one that began before that begins with the first of these."""
        length = self._windowing(**self.live_options).length / self.rate
        recent: deque[tuple[float, np.ndarray]] = deque()
        for batch in self.model.score_windows(blocks, self.extractor, batch_size=1, **self.live_options):
            recent.append((batch.starts[0], batch.scores[0]))
            while recent[0][0] < batch.starts[0] - RECENT:
                recent.popleft()
            starts, scores = (np.array(column) for column in zip(*recent))
            found = join_windows(starts, starts + length, scores, self.classes, int(self.sliders[1].value), self.sliders[0].value)
            yield [rounded(segment) for segment in found]

    def delay(self, window: float | None, hop: float | None) -> float:
        """A window that holds a sound's end ends at most a hop after it, and is known when one more sample has arrived."""
        return (self._windowing(window, hop).hop + 1) / self.rate

    def _windowing(self, window: float | None, hop: float | None) -> Windowing:
        return Windowing.of_model(self.model.config, self.extractor, window=window, hop=hop)

    def _score(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        result = self.model.score_over_time(blocks, self.extractor, **self._options)
        return result.edges, result.scores, result.starts, np.minimum(result.starts + result.window, result.duration)


def open_listener(settings: AppSettings) -> Listener:
    """A listener of the kind that the model needs.

    Raises:
        UserError: if the model cannot be loaded, or neither detects nor classifies, or cannot have the windows of `settings`.
    """
    check_model_folder(settings.model)
    kind = DetectorListener if tagger_class(settings.model) is SSLAMForAudioFrameClassification else ClassifierListener
    listener = kind(settings)
    if settings.live_at_once:
        with as_user_error("the live mode (live_window, live_hop; live_at_once 0 for none)"):
            listener.live_delay()
    return listener
