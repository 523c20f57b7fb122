"""A classifier as programs load it, for scoring: with everything that can be wrong said in one sentence."""

from typing import Any

import torch
from transformers import AutoFeatureExtractor

from ..allocator import keep_freed_memory
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification
from .pooling import best_device


def load_classifier(
    model: str, dtype: str = "float32", device: str | None = None
) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """A classifier, on its device, and its feature extractor.

    Args:
        model: folder or Hub id.
        dtype: of the weights.
        device: the accelerator of this machine, or else its CPU, where freed memory is then kept (`allocator`), by default.

    Raises:
        UserError: (a `ValueError`) if they cannot be loaded, the classifier was never trained, or the device cannot be used.
    """
    refused = f"{model} cannot be loaded as a SSLAM classifier with its feature extractor"
    with as_user_error(refused):
        extractor = AutoFeatureExtractor.from_pretrained(model)
        if not isinstance(extractor, SSLAMFeatureExtractor):
            raise UserError(f"{refused}: it has a {type(extractor).__name__}")
        try:
            loaded: Any = SSLAMForAudioClassification.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        except RuntimeError as error:  # weights of other sizes than the configuration's
            raise UserError(f"{refused}: {error}") from error
    classifier, loading = loaded
    if loading["missing_keys"]:
        raise UserError(f"{model} holds no classifier ({min(loading['missing_keys'])} is missing): give one that was fine-tuned")
    place = device or best_device()
    if str(place) == "cpu":
        keep_freed_memory()
    try:
        return classifier.to(place), extractor
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch was built without it
        raise UserError(f"device is {device!r}, which cannot be used: {error}") from error


__all__ = ["load_classifier"]
