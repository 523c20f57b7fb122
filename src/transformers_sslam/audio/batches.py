"""Log-mel batches for pre-training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from ..errors import UserError
from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .cache import WaveformCache
from .clips import Clip, Windows
from .readers import StreamSettings
from .sources import Source, SourceSettings
from .stream import BatchStream


@dataclass
class DataSettings(StreamSettings):
    """What is read and how it is cut: the `data` section of a recipe.

    Args:
        sources: the mixture, such as `[{kind: folder, path: recordings}]`; keys are those of [`SourceSettings`] (weight, name, split,
            subset, keep ...). An epoch has each clip of a source `weight` times; with weights of 1, each clip exactly once.
        windows: `"every"` window of a recording longer than the model's input, or one `"random"` window, another each time.
        roll: rotate each clip by a random number of samples, another each time: no epoch then cuts the same sound into the same patches,
            which keeps a small set of short clips fresh. Not part of the published pre-training.
        min_seconds: recordings, and ends of long ones, that are shorter are left out and counted.
        features: where log-mels are computed, a batch at a time: by the `"worker"`, or on the `"device"`.
        columns: further columns of the sources that batches carry, as lists.
        shuffle_rows, shard_readers, last_batch, max_unreadable, min_recordings: see [`StreamSettings`].

    Raises:
        UserError: if a value is out of range, or there is no source.
    """

    sources: list[SourceSettings] = field(default_factory=list)
    windows: Literal["every", "random"] = "every"
    roll: bool = False
    min_seconds: float = 0.2
    features: Literal["worker", "device"] = "worker"
    columns: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.sources = [source if isinstance(source, SourceSettings) else SourceSettings.from_dict(source) for source in self.sources]
        if not self.sources:
            raise UserError("sources is empty: name at least one, for example {kind: folder, path: /data/audio}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"sources are named {', '.join(map(str, names))}, but clips are counted by name: give each a name of its own")
        for name, choices in (("windows", ("every", "random")), ("features", ("worker", "device"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")
        if not self.min_seconds >= 0.025:
            raise UserError(f"min_seconds is {self.min_seconds}, but must be at least 0.025, a frame")


class ClipStream(BatchStream):
    """Log-mel batches for the model: `{"input_values": (batch, frames, mel bins) float32, "attention_mask": (batch, frames) int32, "names":
    [...], "starts": [...]}`.

    The mask is 1 where there is sound and 0 in padding. `names` and `starts` (seconds) say which clips they are; the columns that the
    settings ask for are lists beside them. A recording that is longer than `feature_extractor.max_length` frames is cut into windows that
    lie frame beside frame, none of them lost.

    Args:
        settings: sources and how they are read.
        feature_extractor: its sampling rate, length and scale.
        device: where log-mels are computed if `settings.features` is `"device"`; the batches then lie there.
        kwargs: of [`BatchStream`]: `batch_size`, `epochs`, `seed`, `rank`, `world_size`, `num_workers`, `pin_memory`.
    """

    def __init__(
        self, settings: DataSettings, feature_extractor: SSLAMFeatureExtractor, *, device: str | torch.device | None = None, **kwargs
    ):
        rate = feature_extractor.sampling_rate
        length, shift = frame_geometry(rate)
        frames = feature_extractor.max_length
        shortest = max(length, round(settings.min_seconds * rate))
        windows = Windows(rate, (frames - 1) * shift + length, frames * shift, settings.windows, shortest, settings.roll)
        sources = [Source.open(source) for source in settings.sources]
        for source in sources:
            if missing := ", ".join(column for column in settings.columns if column not in source.features):
                raise UserError(f"the source {source.name} has no column {missing}, only {', '.join(source.features) or 'audio'}")
        self.extractor, self.device = feature_extractor, device
        self.on_device = settings.features == "device"
        collate = _Collate(None if self.on_device else feature_extractor, settings.columns)
        super().__init__(sources, windows, collate, settings=settings, **kwargs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if self.on_device:
                samples, lengths = batch.pop("samples"), batch.pop("lengths")
                batch |= _log_mels(self.extractor, list(samples.split(lengths)), self.device)
            else:
                batch["attention_mask"] = torch.from_numpy(batch["attention_mask"])
            yield batch


# Clips that mean and standard deviation are computed from: of 10 s each, 28 hours.
CLIPS_FOR_NORMALIZATION = 10_000


def compute_normalization(
    sources: Sequence[Source],
    windows: Windows,
    extractor: SSLAMFeatureExtractor,
    *,
    settings: StreamSettings | None = None,
    seed: int = 0,
    num_workers: int = 0,
    cache: WaveformCache | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation of the log-mels of an epoch's first 10,000 clips, without padding: the same in every process of a run.

    Args:
        sources, windows, settings, seed, num_workers, cache: of the stream to read, see [`BatchStream`].
        extractor: how log-mels are made.
    """
    settings = replace(settings or StreamSettings(), last_batch="keep")
    stream = BatchStream(
        sources, windows, _waveforms, batch_size=1, settings=settings, epochs=1, seed=seed, num_workers=num_workers, cache=cache
    )
    return extractor.compute_normalization(islice((clip for batch in stream for clip in batch), CLIPS_FOR_NORMALIZATION))


def _waveforms(clips: list[Clip]) -> list[np.ndarray]:
    return [clip.waveform for clip in clips]


@dataclass(frozen=True)
class _Collate:
    """Clips to log-mels and their masks or, without an extractor, to their samples one behind the other."""

    extractor: SSLAMFeatureExtractor | None
    columns: Sequence[str]

    def __call__(self, clips: list[Clip]) -> dict[str, Any]:
        waveforms = [clip.waveform for clip in clips]
        batch: dict[str, Any] = {"names": [clip.name for clip in clips], "starts": [clip.start for clip in clips]}
        batch |= {column: [clip.columns[column] for clip in clips] for column in self.columns}
        if self.extractor is not None:
            batch |= _log_mels(self.extractor, waveforms)
            # A small array travels in the worker's message; a tensor would cost its receiver a file descriptor, half a millisecond.
            return batch | {"attention_mask": batch["attention_mask"].numpy()}
        return batch | {"samples": torch.from_numpy(np.concatenate(waveforms)), "lengths": [len(waveform) for waveform in waveforms]}


def _log_mels(
    extractor: SSLAMFeatureExtractor, waveforms: list[np.ndarray] | list[torch.Tensor], device: str | torch.device | None = None
) -> dict[str, torch.Tensor]:
    return dict(extractor(waveforms, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt", device=device))
