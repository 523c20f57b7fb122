"""The model and the feature extractor that a pre-training run starts with, how the model is compiled, and its parameter groups."""

import inspect
from typing import Any

import torch

from ..audio.normalization import normalization_fields
from ..configuration_sslam import ENCODER_FIELDS, PRETRAINING_STAGES, SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam_pretraining import SSLAMForPreTraining
from ..settings import check_names
from .settings import PreTrainingSettings


# Fields that depend on the number of clips per device, so a run does not take them over from the model that it starts from.
NOT_TAKEN_OVER = {name: getattr(SSLAMConfig(), name) for name in ("global_loss_weight", "global_loss_reduction")}


def build_extractor(settings: PreTrainingSettings, origin: str | None = None) -> SSLAMFeatureExtractor:
    """A new feature extractor, or that of the model `origin` to start from, with the fields that the settings change."""
    names = inspect.signature(SSLAMFeatureExtractor.__init__).parameters.keys() - {"self", "kwargs"}
    check_names(settings.feature_extractor, names, "feature_extractor.")
    with as_user_error("feature_extractor"):
        try:
            inherited = {} if origin is None else SSLAMFeatureExtractor.from_pretrained(origin).to_dict()
        except OSError:  # there is none beside the model
            inherited = {}
        inherited = {name: inherited[name] for name in names & inherited.keys()}
        return SSLAMFeatureExtractor(**{**inherited, **normalization_fields(settings.normalization), **settings.feature_extractor})


def build_model(
    settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor, origin: str | None = None, attn_implementation: str | None = None
) -> SSLAMForPreTraining:
    """The model that the settings ask for, from `origin` or from scratch, in float32, on the CPU; with this attention unless model_config
    names another.

    Raises:
        UserError: if a field is unknown or out of range, or model, feature extractor and weights do not fit together.
    """
    stage = PRETRAINING_STAGES[settings.stage]
    fields: dict[str, Any] = {"attn_implementation": attn_implementation, **stage, **settings.model_config}
    check_names(fields, {*inspect.get_annotations(SSLAMConfig), "attn_implementation"}, "model_config.")
    mean, std = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
    scale = {"log_mel_mean": mean, "log_mel_std": std, "sampling_rate": extractor.sampling_rate}
    fields = {"padding_value": extractor.scaled_padding_value, **scale, **fields}
    with as_user_error("model_config" if origin is None else f"model {origin}"):
        if origin is not None:
            model = _from_checkpoint(origin, fields)
        else:
            model = SSLAMForPreTraining(getattr(SSLAMConfig, settings.preset)(**fields))
    if extractor.num_mel_bins != model.config.num_mel_bins or extractor.max_length > model.config.max_length:
        raise UserError(
            f"feature_extractor makes {extractor.max_length} frames of {extractor.num_mel_bins} mel bins, but the model takes up to "
            f"{model.config.max_length} frames of {model.config.num_mel_bins}: change feature_extractor or model_config"
        )
    clips, sources = settings.per_device_train_batch_size, model.config.most_sources
    if model.config.use_mixtures and clips < sources > 2:
        raise UserError(
            f"model_config.num_sources is {model.config.num_sources}, but per_device_train_batch_size {clips}, "
            "and no mixture takes a clip twice: raise the batch size, or lower num_sources"
        )
    # Masks and spans must fit the clips' length: checked now, not after the first clips are read.
    with as_user_error("model_config, with feature_extractor.max_length"), torch.random.fork_rng(devices=()):
        clip = torch.zeros(1, extractor.max_length, extractor.num_mel_bins)
        model._masks(clip, None, None)
        model._spans(clip, None, None)
    return model


def _from_checkpoint(origin: str, fields: dict[str, Any]) -> SSLAMForPreTraining:
    """The model to start from, whose encoder keeps its sizes."""
    config = SSLAMConfig.from_pretrained(origin)
    for name in ENCODER_FIELDS & fields.keys():
        if fields[name] != getattr(config, name):
            raise UserError(f"model_config.{name} is {fields[name]}, but {origin} has {getattr(config, name)}: leave the sizes out")
    try:
        return SSLAMForPreTraining.from_pretrained(origin, dtype=torch.float32, return_dict=True, **{**NOT_TAKEN_OVER, **fields})
    except RuntimeError as error:  # torch names every tensor that differs
        raise UserError(f"the weights of {origin} do not fit the sizes in model_config: leave the sizes out") from error


def compile_model(model: SSLAMForPreTraining, fullgraph: bool = False) -> None:
    """Compile the model in place, for batches of one shape; another shape is compiled for itself.

    Random numbers stay those of PyTorch's own generator, so that a compiled run draws the masks, mixtures and noise of one that is not. The
    compiler's would be others, and take six times as long on a CPU.
    """
    model.compile(fullgraph=fullgraph, dynamic=False, options={"fallback_random": True})


def parameter_groups(model: SSLAMForPreTraining, weight_decay: float, decay_all_weights: bool) -> list[dict[str, Any]]:
    """Trained parameters, in groups with and without weight decay: without are CLS and those with one axis (biases, norms)."""
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            has_decay = decay_all_weights or (parameter.dim() > 1 and parameter is not model.sslam.embeddings.cls_token)
            (decay if has_decay else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
