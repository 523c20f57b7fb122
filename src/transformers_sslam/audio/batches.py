"""Log-mel batches for pre-training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from ..errors import UserError
from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..settings import setting
from .clips import Clip, Windows
from .readers import StreamSettings
from .sources import Source, SourceSettings
from .stream import BatchStream


@dataclass
class DataSettings(StreamSettings):
    """What is read and how it is cut.

    Raises:
        UserError: if a value is out of range.
    """

    sources: list[SourceSettings] = setting("sources to mix: [{kind: folder, path: recordings}] is one folder", [])
    windows: Literal["every", "random"] = setting("windows of recordings longer than the model's input: every one or a random one", "every")
    roll: bool = setting(
        "rotate each clip by a random number of samples, which keeps a small set of short clips varied; not in the published pre-training",
        False,
    )
    min_seconds: float = setting("shorter recordings, and shorter ends of long ones, are left out and counted", 0.2)
    features: Literal["worker", "device"] = setting("where log-mels are computed, a batch at a time", "worker")
    columns: list[str] = setting("further columns of the sources that batches have, as lists", [])

    def __post_init__(self):
        super().__post_init__()
        self.sources = [SourceSettings.of(source) for source in self.sources]
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"sources are named {', '.join(map(str, names))}: give each another name, by which its clips are counted")
        for name, choices in (("windows", ("every", "random")), ("features", ("worker", "device"))):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        if not self.min_seconds >= 0.025:
            raise UserError(f"min_seconds is {self.min_seconds}, but must be at least 0.025, a frame")


class ClipStream(BatchStream):
    """Log-mel batches for the model: `{"input_values": (batch, frames, mel bins) float32, "attention_mask": (batch, frames) int32, "names":
    [...], "starts": [...]}`, and lists of the columns that the settings ask for.

    The mask is 0 in padding. `starts` are the clips' seconds in their recordings: one longer than `feature_extractor.max_length` frames is
    cut into windows, in which each of its frames stands once.

    Args:
        settings: sources and how they are read.
        feature_extractor: sampling rate, length and scale of the log-mels.
        device: where log-mels are computed, and stay, if `settings.features` is `"device"`.
        kwargs: of [`BatchStream`].

    Attributes:
        waveforms: whether batches also have the "waveforms" that log-mels are made of, `(batch, samples)`, each minus its mean, and zeros
            after its end. Set it before the first batch.
    """

    waveforms = False

    def __init__(
        self, settings: DataSettings, feature_extractor: SSLAMFeatureExtractor, *, device: str | torch.device | None = None, **kwargs
    ):
        if not settings.sources:
            raise UserError("sources is empty: name at least one, for example {kind: folder, path: /data/audio}")
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
        self._collate = _Collate(None if self.on_device else feature_extractor, settings.columns)
        super().__init__(sources, windows, self._collate, settings=settings, **kwargs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.waveforms:
            self.collate = replace(self._collate, samples=self.readers.windows.length)
        for batch in super().__iter__():
            if self.on_device:
                samples, lengths = batch.pop("samples"), batch.pop("lengths")
                batch |= _log_mels(self.extractor, list(samples.split(lengths)), self.device)
            yield batch


@dataclass(frozen=True)
class _Collate:
    """Clips to log-mels and masks or, without an extractor, to their concatenated samples; and to waveforms of so many `samples`."""

    extractor: SSLAMFeatureExtractor | None
    columns: Sequence[str]
    samples: int | None = None

    def __call__(self, clips: list[Clip]) -> dict[str, Any]:
        waveforms = [clip.waveform for clip in clips]
        batch: dict[str, Any] = {"names": [clip.name for clip in clips], "starts": [clip.start for clip in clips]}
        batch |= {column: [clip.columns[column] for clip in clips] for column in self.columns}
        if self.samples is not None:
            centred = [waveform - waveform.mean() for waveform in map(torch.from_numpy, waveforms)]  # as the extractor does
            batch["waveforms"] = torch.stack([torch.nn.functional.pad(waveform, (0, self.samples - len(waveform))) for waveform in centred])
        if self.extractor is not None:
            return batch | _log_mels(self.extractor, waveforms)
        return batch | {"samples": torch.from_numpy(np.concatenate(waveforms)), "lengths": [len(waveform) for waveform in waveforms]}


def _log_mels(
    extractor: SSLAMFeatureExtractor, waveforms: list[np.ndarray] | list[torch.Tensor], device: str | torch.device | None = None
) -> dict[str, torch.Tensor]:
    return dict(extractor(waveforms, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt", device=device))
