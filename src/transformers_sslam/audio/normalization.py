"""Mean and standard deviation that log-mels are scaled by: the setting, and their computation."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ..errors import UserError
from ..feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from .cache import WaveformCache
from .clips import Windows
from .readers import StreamSettings
from .sources import Source
from .stream import BatchStream


CLIPS_FOR_NORMALIZATION = 10_000  # of 10 s each, 28 hours


def check_normalization(value: str | list[float]) -> None:
    """Raise a `UserError` unless this is `"model"`, `"computed"`, the name of a preset, or `[mean, std]`."""
    names = ("model", "computed", *NORMALIZATION_PRESETS)
    if isinstance(value, str) and value not in names:
        raise UserError(f"normalization is {value!r}, but one of {', '.join(names)} or [mean, std] is expected")
    if isinstance(value, list) and len(value) != 2:
        raise UserError(f"normalization is {value}, but a list must be [mean, std]")


def normalization_fields(value: str | list[float]) -> dict[str, Any]:
    """Fields of the feature extractor that the setting determines before any audio is read."""
    return dict(zip(("mean", "std"), value)) if isinstance(value, list) else dict(NORMALIZATION_PRESETS.get(value, {}))


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
        extractor: computes the log-mels.
        sources, windows, settings, seed, num_workers, cache: see [`BatchStream`].
    """
    settings = replace(settings or StreamSettings(), last_batch="keep")
    stream = BatchStream(sources, windows, list, batch_size=1, settings=settings, epochs=1, seed=seed, num_workers=num_workers, cache=cache)
    return extractor.compute_normalization(clip.waveform for (clip,) in islice(stream, CLIPS_FOR_NORMALIZATION))
