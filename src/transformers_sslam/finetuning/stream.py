"""Streams of labelled clips: targets, augmentation, and how often each class is drawn."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..audio.clips import Clip, ReadStatistics, Windows
from ..audio.events import Event, EventTable
from ..audio.labels import LabelReader, Labels
from ..audio.paths import printable_path
from ..audio.readers import StreamSettings
from ..audio.sources import EpochOrder, Source, WeightedOrder, random_generator
from ..audio.stream import BatchStream
from ..errors import UserError, as_user_error
from ..fbank import check_frame_shift, frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .augmentation import AugmentationSettings, augment_batch, augment_waveform, smooth_targets
from .mixtures import Mixer


logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Targets = Callable[[Sequence[Clip]], np.ndarray]

INPUTS = ("input_values", "attention_mask", "labels", "clip_labels")  # of a model in training
MIN_RECORDINGS = 100  # before the fraction of unreadable ones is checked


@dataclass(frozen=True)
class TableTargets:
    """Targets of a table's clips: `(clips, classes)`, float32, 0 or 1, or -100 where unknown."""

    labels: Labels

    def __call__(self, clips: Sequence[Clip]) -> np.ndarray:
        return self.labels.one_hot(np.array([clip.row for clip in clips]))

    def of_mixture(self, events: Sequence[Event]) -> np.ndarray:
        """Of a mixture with these events, `(classes,)`."""
        present = {event.label for event in events}
        return np.array([name in present for name in self.labels.names], dtype=np.float32)


@dataclass(frozen=True)
class ColumnTargets:
    """Targets of a stream's clips, read from their columns: `(clips, classes)`, float32, 0 or 1, or -100 where unknown."""

    reader: LabelReader
    classes: Sequence[str]

    def __call__(self, clips: Sequence[Clip]) -> np.ndarray:
        labels = [self.reader.read_row({"audio": {"path": clip.name}, **clip.columns}) for clip in clips]
        return np.stack([(one if one.names == self.classes else one.encode(self.classes)).one_hot(0) for one in labels])


@dataclass(frozen=True)
class EventTargets:
    """Targets of time steps, for [`SSLAMForAudioFrameClassification`].

    Args:
        labels: of a table's clips.
        frames_per_step: of the model.
        steps: of its input.
        sampling_rate: of waveforms.
        hard: a target is 1 where an event covers at least half of a step, otherwise 0; not the fraction that it covers.
        reported: name of a clip of which a warning said that an event begins after its end.
    """

    labels: Labels
    frames_per_step: int
    steps: int
    sampling_rate: int
    hard: bool = False
    reported: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self):
        with as_user_error("task is 'events'"):
            check_frame_shift(self.sampling_rate)

    def __call__(
        self, clips: Sequence[Clip], mixed: Sequence[Sequence[Event] | None], shifts: Sequence[int], lengths: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """`labels (clips, steps, classes)` and `clip_labels (clips, classes)`, float32; -100 where times, or labels, are unknown.

        Args:
            clips: of the table.
            mixed: events of those that are mixtures instead.
            shifts: samples by which each was rotated.
            lengths: samples of each.
        """
        steps, tags = [], []
        for clip, events, shift, length in zip(clips, mixed, shifts, lengths):
            step, seconds = self.frames_per_step / 100, {"shift": shift / self.sampling_rate, "duration": length / self.sampling_rate}
            if events is None:
                self._check_ends(clip, seconds["duration"])
                steps.append(self.labels.step_targets(clip.row, step, self.steps, **seconds))
            else:
                classes = self.labels.names
                steps.append(EventTable.of_clip(events, classes).step_targets(step, self.steps, len(classes), **seconds))
            if events is not None or self.labels.has_times(clip.row):  # what lies outside of the model's input does not count
                tags.append((steps[-1].max(0) > 0).astype(np.float32))
            else:
                tags.append(self.labels.one_hot(clip.row))
        targets = np.stack(steps)
        if self.hard:
            targets = np.where(targets < 0, targets, (targets >= 0.5).astype(np.float32))
        return {"labels": targets, "clip_labels": np.stack(tags)}

    def _check_ends(self, clip: Clip, duration: float) -> None:
        """Warn, of the first one in this process, of an event that begins after its clip has ended: it cannot be a label."""
        if self.reported or not self.labels.has_times(clip.row):
            return
        for event in self.labels.events(clip.row):
            if event.onset >= duration:
                self.reported.append(clip.name)
                logger.warning(
                    f"{clip.name} has an event {event.label!r} from {event.onset:g} s on, but ends at {duration:g} s: such events are left "
                    "out, correct the table or restore the clip (others are not reported)"
                )
                return


@dataclass(frozen=True)
class LabelledPart:
    """One part of the data: its clips, what gives the targets of some of them, and, of a table, all labels."""

    source: Source
    targets: Targets
    labels: Labels | None = None

    @property
    def has_times(self) -> bool:
        """Whether it is known of all clips when their sounds begin and end."""
        return self.labels is not None and all(map(self.labels.has_times, range(len(self.labels))))

    def clip_names(self) -> list[str]:
        """The file of each clip of a table."""
        return [] if self.labels is None else [printable_path(path) for path in self.source.paths()]

    def unreadable(self, statistics: ReadStatistics) -> dict[str, Any]:
        """What could not be read, by cause: of a table the names of the files, each once; of a stream how many times."""
        if self.labels is None:
            return statistics.unreadable
        rows = sorted(statistics.rows)
        names = dict(zip(rows, self.source.names(rows)))
        return {cause: [names[row] for row in rows if statistics.rows[row] == cause] for cause in sorted(set(statistics.rows.values()))}

    def unreadable_classes(self, rows: Collection[int]) -> list[str]:
        """The classes all of whose clips are among these rows."""
        if self.labels is None or not rows:
            return []
        total = self.labels.counts()
        left = total - self.labels.select(sorted(rows)).counts()
        return [name for name, count, before in zip(self.labels.names, left, total) if before and not count]


@dataclass(frozen=True)
class Collate:
    """Makes a batch of clips, in the process that reads them.

    It has `input_values`, `(batch, frames, mel bins)`, or, without an extractor, `samples`, one clip behind the other, and their
    `lengths`; `labels`, `(batch, classes)`, in numpy, because a tensor would cost its receiver a file descriptor; `rows`, the clips'
    numbers in a table; and `keys`, which random draws follow. With events it has what [`EventTargets`] gives as labels, and, unless all
    clips fill it, an `attention_mask (batch, frames)`.

    Args:
        targets: gives the labels.
        extractor: computes the log-mels; `None`: they are computed on the device, and [`finish`] is called there.
        augmentation: of training clips; `None` for none.
        label_smoothing: fraction of each training target that is spread over all classes.
        events: gives the labels of time steps in place of `targets`; `None`: clips are classified.
        mixer: makes some of the training clips.
    """

    targets: Targets
    extractor: SSLAMFeatureExtractor | None
    augmentation: AugmentationSettings | None = None
    label_smoothing: float = 0.0
    events: EventTargets | None = None
    mixer: Mixer | None = None

    def __call__(self, clips: list[Clip]) -> Batch:
        waveforms, shifts = [clip.waveform for clip in clips], [0] * len(clips)
        mixed: list[Sequence[Event] | None] = [None] * len(clips)
        if self.augmentation is not None:
            for i, clip in enumerate(clips):
                generator = random_generator("augmentation", *clip.key)
                if self.mixer is not None and generator.random() < self.mixer.settings.fraction:
                    waveforms[i], mixed[i] = self.mixer(generator)
                waveforms[i], shifts[i] = augment_waveform(waveforms[i], self.augmentation, generator)
        batch: Batch = {"rows": [clip.row for clip in clips], "keys": [number for clip in clips for number in clip.key]}
        if self.events is None:
            batch["labels"] = self.targets(clips)
            for i, events in enumerate(mixed):
                if events is not None:
                    batch["labels"][i] = self.targets.of_mixture(events)  # type: ignore[attr-defined]  # of a table
        else:
            batch |= self.events(clips, mixed, shifts, [len(waveform) for waveform in waveforms])
        if self.extractor is None:
            return batch | {"samples": torch.from_numpy(np.concatenate(waveforms)), "lengths": [len(waveform) for waveform in waveforms]}
        labels = {name: torch.from_numpy(values) for name, values in batch.items() if name.endswith("labels")}
        batch = self.finish(batch | labels | self.features(self.extractor, waveforms))
        return batch | {name: batch[name].numpy() for name in labels}

    def features(self, extractor: SSLAMFeatureExtractor, waveforms: Sequence[Any], device: torch.device | None = None) -> Batch:
        """`input_values (batch, frames, mel bins)` and, for events, `attention_mask (batch, frames)` where there is padding."""
        options: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt", "device": device}
        found = dict(extractor(list(waveforms), return_attention_mask=self.events is not None, **options))
        if "attention_mask" in found and found["attention_mask"].all():
            del found["attention_mask"]  # attention is faster without
        return found

    def finish(self, batch: Batch) -> Batch:
        """Mix and mask the log-mels of a training batch, on their device, and smooth its targets."""
        if self.augmentation is not None:
            generator = random_generator("batch", *batch["keys"])
            batch |= augment_batch({name: batch[name] for name in INPUTS if name in batch}, self.augmentation, generator)
            batch["labels"] = smooth_targets(batch["labels"], self.label_smoothing)
        return batch


class LabelledStream(BatchStream):
    """Batches of labelled clips, see [`Collate`].

    Args:
        part: which clips.
        extractor: computes the log-mels.
        augmentation, label_smoothing: of training batches, see [`Collate`].
        balanced: draw clips, with replacement, so that all classes are equally frequent.
        clips_per_epoch: by default as many as there are.
        max_unreadable, last_batch, shuffle_rows: see `StreamSettings`. With 1 the rows of a shard keep their order.
        events, mixer: see [`Collate`].
        features: where log-mels are computed: `"worker"`, or `"device"`.
        device: which one.
        kwargs: of [`BatchStream`].
    """

    def __init__(
        self,
        part: LabelledPart,
        extractor: SSLAMFeatureExtractor,
        *,
        augmentation: AugmentationSettings | None = None,
        label_smoothing: float = 0.0,
        events: EventTargets | None = None,
        mixer: Mixer | None = None,
        balanced: bool = False,
        clips_per_epoch: int | None = None,
        max_unreadable: float = 0.01,
        last_batch: Any = "fill",
        shuffle_rows: int = 256,
        features: str = "worker",
        device: torch.device | None = None,
        seed: int = 0,
        **kwargs: Any,
    ):
        self.part, self.extractor, self.device = part, extractor, device if features == "device" else None
        self.collator = Collate(part.targets, None if self.device else extractor, augmentation, label_smoothing, events, mixer)
        source = part.source
        order: Callable[[int], np.ndarray] | None = None
        if balanced and part.labels is not None:
            order = WeightedOrder(part.labels.balanced_weights(), clips_per_epoch or len(part.labels), seed)
        elif clips_per_epoch is not None and part.labels is not None:
            order = EpochOrder([source.num_shards], [clips_per_epoch / len(part.labels)], seed)
        windows = Windows(extractor.sampling_rate, None, 0, "every", frame_geometry(extractor.sampling_rate)[0])
        least = min(MIN_RECORDINGS, (source.num_rows or MIN_RECORDINGS) // kwargs.get("world_size", 1) or 1)
        settings = StreamSettings(shuffle_rows=shuffle_rows, last_batch=last_batch, max_unreadable=max_unreadable, min_recordings=least)
        super().__init__([source], windows, self.collator, settings=settings, order=order, seed=seed, **kwargs)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            batch |= {name: torch.from_numpy(values) for name, values in batch.items() if name.endswith("labels")}
            if self.device is not None:
                moved = {name: batch[name].to(self.device, non_blocking=True) for name in ("samples", *INPUTS) if name in batch}
                waveforms = moved.pop("samples").split(batch.pop("lengths"))
                del batch["samples"]
                batch = self.collator.finish(batch | moved | self.collator.features(self.extractor, waveforms, self.device))
            yield batch


def keep_clips_per_class(labels: Labels, count: int, seed: int) -> np.ndarray:
    """Row numbers of `count` clips of each class, drawn by the seed, in ascending order.

    Raises:
        UserError: if rows may have several classes, or a class has fewer.
    """
    if labels.multi_label:
        raise UserError(f"clips_per_class is {count}, but these clips may have several classes, so there is no fixed number for each")
    generator, indices = np.random.default_rng(seed), labels.indices()
    chosen = []
    for number, name in sorted(enumerate(labels.names), key=lambda item: item[1]):
        rows = np.flatnonzero(indices == number)
        if len(rows) < count:
            raise UserError(f"clips_per_class is {count}, but the class {name} has only {len(rows)} of the training clips")
        chosen.append(generator.choice(rows, count, replace=False))
    return np.sort(np.concatenate(chosen))
