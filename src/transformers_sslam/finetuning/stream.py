"""Streams of labelled clips: targets, augmentation, and how often each class is drawn."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..audio.clips import Clip, ReadStatistics, Windows
from ..audio.labels import Labels
from ..audio.paths import printable_path
from ..audio.readers import StreamSettings
from ..audio.sources import EpochOrder, Source, WeightedOrder, random_generator
from ..audio.stream import BatchStream
from ..errors import UserError
from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .augmentation import AugmentationSettings, augment_batch, augment_waveform, smooth_targets


Batch = dict[str, Any]
Targets = Callable[[Sequence[Clip]], np.ndarray]

MIN_RECORDINGS = 100  # before the fraction of unreadable ones is checked


@dataclass(frozen=True)
class TableTargets:
    """Targets of a table's clips: `(clips, classes)`, float32, 0 or 1."""

    labels: Labels

    def __call__(self, clips: Sequence[Clip]) -> np.ndarray:
        return self.labels.one_hot(np.array([clip.row for clip in clips]))


@dataclass(frozen=True)
class ColumnTargets:
    """Targets of a stream's clips, read from their columns: `(clips, classes)`, float32, 0 or 1."""

    read: Callable[[dict[str, Any]], list[str]]
    classes: Sequence[str]

    def __call__(self, clips: Sequence[Clip]) -> np.ndarray:
        targets = np.zeros((len(clips), len(self.classes)), np.float32)
        for target, clip in zip(targets, clips):
            target[[self.classes.index(label) for label in self.read({"audio": {"path": clip.name}, **clip.columns})]] = 1
        return targets


@dataclass(frozen=True)
class LabelledPart:
    """One part of the data: its clips, what gives the targets of some of them, and, of a table, all labels."""

    source: Source
    targets: Targets
    labels: Labels | None = None

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
    numbers in a table; and `keys`, which random draws follow.

    Args:
        targets: gives the labels.
        extractor: computes the log-mels; `None`: they are computed on the device, and [`finish`] is called there.
        augmentation: of training clips; `None` for none.
        label_smoothing: fraction of each training target that is spread over all classes.
    """

    targets: Targets
    extractor: SSLAMFeatureExtractor | None
    augmentation: AugmentationSettings | None = None
    label_smoothing: float = 0.0

    def __call__(self, clips: list[Clip]) -> Batch:
        waveforms = [clip.waveform for clip in clips]
        if self.augmentation is not None:
            waveforms = [augment_waveform(clip.waveform, self.augmentation, random_generator("augmentation", *clip.key)) for clip in clips]
        batch: Batch = {
            "labels": self.targets(clips),
            "rows": [clip.row for clip in clips],
            "keys": [number for clip in clips for number in clip.key],
        }
        if self.extractor is None:
            return batch | {"samples": torch.from_numpy(np.concatenate(waveforms)), "lengths": [len(waveform) for waveform in waveforms]}
        batch = self.finish(batch | {"input_values": log_mels(self.extractor, waveforms), "labels": torch.from_numpy(batch["labels"])})
        return batch | {"labels": batch["labels"].numpy()}

    def finish(self, batch: Batch) -> Batch:
        """Mix and mask the log-mels of a training batch, on their device, and smooth its targets."""
        if self.augmentation is not None:
            generator = random_generator("batch", *batch["keys"])
            values, targets = augment_batch(batch["input_values"], batch["labels"], self.augmentation, generator)
            batch |= {"input_values": values, "labels": smooth_targets(targets, self.label_smoothing)}
        return batch


def log_mels(extractor: SSLAMFeatureExtractor, waveforms: Sequence[Any], device: torch.device | None = None) -> torch.Tensor:
    """`(batch, frames, mel bins)`."""
    return extractor(list(waveforms), sampling_rate=extractor.sampling_rate, return_tensors="pt", device=device)["input_values"]


class LabelledStream(BatchStream):
    """Batches of labelled clips, see [`Collate`].

    Args:
        part: which clips.
        extractor: computes the log-mels.
        augmentation, label_smoothing: of training batches, see [`Collate`].
        balanced: draw clips, with replacement, so that all classes are equally frequent.
        clips_per_epoch: by default as many as there are.
        max_unreadable, last_batch, shuffle_rows: see `StreamSettings`. With 1 the rows of a shard keep their order.
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
        self.finish = Collate(part.targets, None if self.device else extractor, augmentation, label_smoothing)
        source = part.source
        order: Callable[[int], np.ndarray] | None = None
        if balanced and part.labels is not None:
            order = WeightedOrder(part.labels.balanced_weights(), clips_per_epoch or len(part.labels), seed)
        elif clips_per_epoch is not None and part.labels is not None:
            order = EpochOrder([source.num_shards], [clips_per_epoch / len(part.labels)], seed)
        windows = Windows(extractor.sampling_rate, None, 0, "every", frame_geometry(extractor.sampling_rate)[0])
        least = min(MIN_RECORDINGS, (source.num_rows or MIN_RECORDINGS) // kwargs.get("world_size", 1) or 1)
        settings = StreamSettings(shuffle_rows=shuffle_rows, last_batch=last_batch, max_unreadable=max_unreadable, min_recordings=least)
        super().__init__([source], windows, self.finish, settings=settings, order=order, seed=seed, **kwargs)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            batch["labels"] = torch.from_numpy(batch["labels"])
            if self.device is not None:
                samples = batch.pop("samples").to(self.device, non_blocking=True)
                batch["labels"] = batch["labels"].to(self.device, non_blocking=True)
                batch["input_values"] = log_mels(self.extractor, samples.split(batch.pop("lengths")), self.device)
                batch = self.finish.finish(batch)
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
            raise UserError(f"clips_per_class is {count}, but the class {name} has {len(rows)} training clips")
        chosen.append(generator.choice(rows, count, replace=False))
    return np.sort(np.concatenate(chosen))


__all__ = ["Collate", "ColumnTargets", "LabelledPart", "LabelledStream", "TableTargets", "keep_clips_per_class", "log_mels"]
