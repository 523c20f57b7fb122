"""The model that a pre-training run begins with, how it is compiled, and what of it is decayed."""

from typing import Any

import torch

from ..configuration_sslam import PRETRAINING_STAGES, SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam_pretraining import SSLAMForPreTraining
from .pretraining_settings import PreTrainingSettings
from .settings import SettingsError, refusals_as_settings_errors


def build_model(settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor) -> SSLAMForPreTraining:
    """The model that the settings ask for, in float32, on the CPU."""
    fields: dict[str, Any] = {**PRETRAINING_STAGES[settings.stage], **settings.model}
    unknown = [name for name in fields if name != "attn_implementation" and not hasattr(SSLAMConfig(), name)]
    if unknown:
        raise SettingsError(f"model: SSLAMConfig has no field {', '.join(unknown)}")
    fields.setdefault("padding_value", (extractor.padding_value - extractor.mean) / (2 * extractor.std))
    with refusals_as_settings_errors("model" if settings.init_from is None else f"init_from {settings.init_from}"):
        if settings.init_from is not None:
            model = SSLAMForPreTraining.from_pretrained(settings.init_from, dtype=torch.float32, **fields)
        else:
            model = SSLAMForPreTraining(getattr(SSLAMConfig, settings.preset)(**fields))
    if extractor.num_mel_bins != model.config.num_mel_bins or extractor.max_length > model.config.max_length:
        raise SettingsError(
            f"features give {extractor.max_length} frames of {extractor.num_mel_bins} mel bins, but the model takes up to "
            f"{model.config.max_length} frames of {model.config.num_mel_bins}: change features or model"
        )
    return model


def compile_model(model: SSLAMForPreTraining, fullgraph: bool = False) -> None:
    """Compile the model in place, for batches of one shape; another shape is compiled for itself.

    Random numbers stay those of PyTorch's own generator, so that a compiled run draws the masks, mixtures and noise of one that is not. The
    compiler's would be others, and take six times as long on a CPU.
    """
    model.compile(fullgraph=fullgraph, dynamic=False, options={"fallback_random": True})


def parameter_groups(model: SSLAMForPreTraining, weight_decay: float, decay_all_weights: bool) -> list[dict]:
    """Trained parameters, in groups with and without weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spared = [
        parameter
        for parameter in trained
        if not decay_all_weights and (parameter.dim() == 1 or parameter is model.sslam.embeddings.cls_token)
    ]
    ids = {id(parameter) for parameter in spared}
    groups = [
        {"params": [parameter for parameter in trained if id(parameter) not in ids], "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


__all__ = ["build_model", "compile_model", "parameter_groups"]
