"""Labelled clips as the `Trainer` takes them: held in memory or streamed, augmented, and in the mixture of classes that is asked for."""

import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..audio.labels import LabelledRows, LabelReader, Waveforms, decode_clip, encode_labels
from ..errors import CAUSES, AudioDecodingError, UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .augmentation import AugmentationSettings, augment_batch, augment_waveform, smooth_targets


logger = logging.getLogger(__name__)


@dataclass
class LabelledClips:
    """One part of the data: `waveforms[i]` belongs to row `i` of `rows`."""

    rows: LabelledRows
    waveforms: Waveforms


class EpochRows:
    """Which rows an epoch hears: all of them once, so many of them, or so many that all classes come as often.

    Args:
        targets: `(clips, classes)`, 0 or 1.
        class_balanced: draw with replacement, a clip with the weight of the sum over its classes of `1 / clips of the class` (as AST does,
            Gong et al., Interspeech 2021, arXiv 2104.01778).
        clips_per_epoch: rows of an epoch; as many as there are clips by default.
        seed: of the draws, which depend on it and the epoch alone.
    """

    def __init__(self, targets: torch.Tensor, class_balanced: bool = False, clips_per_epoch: int | None = None, seed: int = 0):
        self.clips, self.length = len(targets), clips_per_epoch or len(targets)
        self.weights = balanced_weights(targets) if class_balanced else None
        self.seed, self._epoch, self._rows = seed, -1, np.arange(self.clips)

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        """`(length,)`, indices of clips."""
        if epoch != self._epoch and (self.weights is not None or self.length != self.clips):
            generator = np.random.default_rng((self.seed, epoch))
            if self.weights is not None:
                self._rows = generator.choice(self.clips, self.length, p=self.weights)
            else:
                self._rows = np.resize(generator.permutation(self.clips), self.length)
            self._epoch = epoch
        return self._rows


def balanced_weights(targets: torch.Tensor) -> np.ndarray:
    """Probability of each clip, `(clips,)`, float64; a clip without any class is never drawn."""
    tagged = targets.double()
    weights = (tagged / tagged.sum(0).clamp(min=1)).sum(1).numpy()
    return weights / weights.sum()


class ClipDataset(torch.utils.data.Dataset):
    """Log-mels and targets `(classes,)`. Augmentation depends on the seed, the epoch and the place in it, not on the order or the worker.

    Args:
        clips: decoded.
        classes: their names, in the order of the targets.
        extractor: makes the log-mels.
        augmentation: of the waveforms; `None` also leaves batches as they are, see [`Collator`].
        epoch_rows: which clips an epoch hears; all by default.
        seed: of the augmentation.
    """

    def __init__(
        self,
        clips: LabelledClips,
        classes: Sequence[str],
        extractor: SSLAMFeatureExtractor,
        augmentation: AugmentationSettings | None = None,
        epoch_rows: EpochRows | None = None,
        seed: int = 0,
    ):
        self.waveforms, self.targets = clips.waveforms, make_targets(clips.rows, classes)
        self.extractor, self.augmentation, self.seed = extractor, augmentation, seed
        self.epoch_rows = EpochRows(self.targets) if epoch_rows is None else epoch_rows
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes that outlive an epoch see it too

    def __len__(self) -> int:
        return len(self.epoch_rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        epoch = int(self.epoch)
        row = self.epoch_rows(epoch)[place]
        return make_item(self.waveforms[row], self.targets[row], self.extractor, self.augmentation, (self.seed, epoch, place))


class StreamedClips(torch.utils.data.IterableDataset):
    """Clips of a data set that is read as it comes, in items like those of [`ClipDataset`]. The order depends on seed and epoch.

    Args:
        stream: of `datasets`, with an undecoded `audio` column.
        reader: of its labels.
        classes: all names.
        extractor, augmentation, seed: as for [`ClipDataset`].
        shuffle_buffer: clips to draw from at random; `None` keeps the order.
        max_unreadable: share of unreadable clips above which the run stops, looked at from 100 clips on and at the end of each pass, by
            each worker for itself.
    """

    def __init__(
        self,
        stream: Any,
        reader: LabelReader,
        classes: Sequence[str],
        extractor: SSLAMFeatureExtractor,
        augmentation: AugmentationSettings | None = None,
        seed: int = 0,
        shuffle_buffer: int | None = None,
        max_unreadable: float = 0.01,
    ):
        self.stream = stream if shuffle_buffer is None else stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.reader, self.classes, self.extractor = reader, list(classes), extractor
        self.augmentation, self.seed, self.max_unreadable = augmentation, seed, max_unreadable
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # both are shared with worker processes
        self._left_out = multiprocessing.Array("q", len(CAUSES))

    @property
    def unreadable(self) -> dict[str, int]:
        """How many clips were left out, by cause, in all passes and workers together."""
        return {cause: count for cause, count in zip(CAUSES, self._left_out[:]) if count}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, read, left_out = int(self.epoch), 0, 0
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        worker = torch.utils.data.get_worker_info()
        for read, row in enumerate(self.stream, 1):
            try:
                waveform = decode_clip(row["audio"], self.extractor.sampling_rate)
            except AudioDecodingError as error:
                left_out += 1
                with self._left_out.get_lock():
                    self._left_out[CAUSES.index(error.cause)] += 1
                logger.warning(f"left out: {error}")
                if read >= 100:
                    self._check(left_out, read)
                continue
            labels = LabelledRows([row["audio"]], [self.reader(row)], self.reader.multi_label, self.reader.declared_classes)
            key = (self.seed, epoch, worker.id if worker else 0, read)
            yield make_item(waveform, make_targets(labels, self.classes)[0], self.extractor, self.augmentation, key)
        self._check(left_out, read)
        if read == 0 and worker is None:  # of several workers some may have no shard to read
            raise UserError("the stream has no clip")

    def _check(self, left_out: int, read: int) -> None:
        if left_out > self.max_unreadable * read:
            raise UserError(
                f"{left_out} of {read} streamed clips cannot be used ({self.unreadable}), more than the share of "
                f"{self.max_unreadable:g} that max_unreadable allows"
            )


def make_targets(rows: LabelledRows, classes: Sequence[str]) -> torch.Tensor:
    """`(clips, classes)`, float32, 0 or 1: where every clip has one class a single 1 a row, because mixup shares it out."""
    labels = encode_labels(rows, classes)
    return labels if rows.multi_label else torch.nn.functional.one_hot(labels, len(classes)).float()


def make_item(
    waveform: np.ndarray,
    target: torch.Tensor,
    extractor: SSLAMFeatureExtractor,
    augmentation: AugmentationSettings | None,
    key: tuple[int, ...],
) -> dict[str, Any]:
    """`input_values: (frames, mel bins)`, `labels: (classes,)` and, where there is augmentation, `key`, which its randomness follows."""
    item: dict[str, Any] = {"labels": target}
    if augmentation is not None:
        waveform = augment_waveform(waveform, augmentation, np.random.default_rng(key))
        item["key"] = key
    item["input_values"] = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_values[0]
    return item


@dataclass(frozen=True)
class Collator:
    """Items to a batch: those of training are mixed, masked and their targets smoothed; those without a key stay as they are.

    Args:
        augmentation: of training batches.
        label_smoothing: share of each training target that is spread over all classes.
    """

    augmentation: AugmentationSettings
    label_smoothing: float = 0.0

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values, targets = (torch.stack([item[name] for item in items]) for name in ("input_values", "labels"))
        if "key" in items[0]:
            generator = np.random.default_rng([number for item in items for number in item["key"]])
            values, targets = augment_batch(values, targets, self.augmentation, generator)
            targets = smooth_targets(targets, self.label_smoothing)
        return {"input_values": values, "labels": targets}


class EpochCallback(TrainerCallback):
    """Tells the training clips which epoch it is, from 0. Counted here: of a stream, the Trainer's own number is a share of all updates."""

    def __init__(self, dataset: ClipDataset | StreamedClips):
        self.dataset, self._begun = dataset, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch.fill_(self._begun)
        self._begun += 1


def keep_clips_per_class(rows: LabelledRows, count: int, seed: int) -> list[int]:
    """Indices of `count` rows of each class, drawn by the seed, in their order.

    Raises:
        UserError: if rows may have several classes, or a class has fewer.
    """
    if rows.multi_label:
        raise UserError(f"clips_per_class is {count}, but these clips may have several classes, so there is no fixed number for each")
    generator, by_class = np.random.default_rng(seed), defaultdict[str, list[int]](list)
    for index, (label,) in enumerate(rows.labels):
        by_class[label].append(index)
    for label, indices in sorted(by_class.items()):
        if len(indices) < count:
            raise UserError(f"clips_per_class is {count}, but the class {label} has {len(indices)} training clips")
    return sorted(index for _, indices in sorted(by_class.items()) for index in generator.choice(indices, count, replace=False).tolist())


__all__ = [
    "ClipDataset",
    "Collator",
    "EpochCallback",
    "EpochRows",
    "LabelledClips",
    "StreamedClips",
    "balanced_weights",
    "keep_clips_per_class",
]
