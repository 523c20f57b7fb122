"""The setting that says by which mean and standard deviation log-mels are scaled, of pre-training and fine-tuning alike."""

from typing import Any

from ..errors import UserError
from ..feature_extraction_sslam import NORMALIZATION_PRESETS


def check_normalization(value: str | list[float]) -> None:
    """Raise a `UserError` unless this is `"model"`, `"computed"`, the name of a preset, or `[mean, std]`."""
    names = ("model", "computed", *NORMALIZATION_PRESETS)
    if isinstance(value, str) and value not in names:
        raise UserError(f"normalization is {value!r}, but one of {', '.join(names)} or [mean, std] is expected")
    if isinstance(value, list) and len(value) != 2:
        raise UserError(f"normalization is {value}, but a list must be [mean, std]")


def normalization_fields(value: str | list[float]) -> dict[str, Any]:
    """The fields of the feature extractor that the setting decides at once; what is `"computed"` is known later."""
    return dict(zip(("mean", "std"), value)) if isinstance(value, list) else dict(NORMALIZATION_PRESETS.get(value, {}))


__all__ = ["check_normalization", "normalization_fields"]
