"""The model that a pre-training run begins with, how it is compiled, and what of it is decayed."""

import inspect
from typing import Any

import torch

from ..configuration_sslam import ENCODER_FIELDS, PRETRAINING_STAGES, SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam_pretraining import SSLAMForPreTraining
from ..settings import check_names
from .normalization import normalization_fields
from .pretraining_settings import PreTrainingSettings


# What belongs to the number of clips on a device, and not to a model that is trained further on others.
NOT_TAKEN_OVER = {name: getattr(SSLAMConfig(), name) for name in ("global_loss_weight", "global_loss_reduction")}


def build_extractor(settings: PreTrainingSettings) -> SSLAMFeatureExtractor:
    """A new feature extractor, or that of the model to start from, with the fields that are set."""
    names = inspect.signature(SSLAMFeatureExtractor.__init__).parameters.keys() - {"self", "kwargs"}
    check_names(settings.features, names, "features.")
    with as_user_error("features"):
        try:
            brought = {} if settings.init_from is None else SSLAMFeatureExtractor.from_pretrained(settings.init_from).to_dict()
        except OSError:  # there is none beside the model
            brought = {}
        brought = {name: brought[name] for name in names & brought.keys()}
        return SSLAMFeatureExtractor(**{**brought, **normalization_fields(settings.normalization), **settings.features})


def build_model(settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor) -> SSLAMForPreTraining:
    """The model that the settings ask for, in float32, on the CPU."""
    fields: dict[str, Any] = {**PRETRAINING_STAGES[settings.stage], **settings.model}
    check_names(fields, {*inspect.get_annotations(SSLAMConfig), "attn_implementation"}, "model.")
    fields.setdefault("padding_value", extractor.scaled_padding_value)
    with as_user_error("model" if settings.init_from is None else f"init_from {settings.init_from}"):
        if settings.init_from is not None:
            model = _from_checkpoint(settings.init_from, fields)
        else:
            model = SSLAMForPreTraining(getattr(SSLAMConfig, settings.preset)(**fields))
    if extractor.num_mel_bins != model.config.num_mel_bins or extractor.max_length > model.config.max_length:
        raise UserError(
            f"features give {extractor.max_length} frames of {extractor.num_mel_bins} mel bins, but the model takes up to "
            f"{model.config.max_length} frames of {model.config.num_mel_bins}: change features or model"
        )
    # Now, and not behind the first clips: masks and spans must fit the clips' length.
    with as_user_error("model, with features.max_length"), torch.random.fork_rng(devices=()):
        clip = torch.zeros(1, extractor.max_length, extractor.num_mel_bins)
        model._masks(clip, None, None)
        model._spans(clip, None, None)
    return model


def _from_checkpoint(origin: str, fields: dict[str, Any]) -> SSLAMForPreTraining:
    """A model to start from keeps its encoder's sizes."""
    config = SSLAMConfig.from_pretrained(origin)
    for name in ENCODER_FIELDS & fields.keys():
        if fields[name] != getattr(config, name):
            raise UserError(f"model.{name} is {fields[name]}, but {origin} has {getattr(config, name)}: with init_from leave the sizes out")
    try:
        return SSLAMForPreTraining.from_pretrained(origin, dtype=torch.float32, **{**NOT_TAKEN_OVER, **fields})
    except RuntimeError as error:  # torch names every tensor that differs
        raise UserError(f"the weights of {origin} do not fit the sizes under `model`: leave the sizes out") from error


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


__all__ = ["build_extractor", "build_model", "compile_model", "parameter_groups"]
