"""The feature extractor and the classifier that a fine-tuning run begins with."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor

from ..audio.normalization import normalization_fields
from ..configuration_sslam import ENCODER_FIELDS, SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from .lora import add_adapters
from .settings import FineTuningSettings


logger = logging.getLogger(__name__)

Classifier = SSLAMForAudioClassification | SSLAMForAudioFrameClassification
CLASSIFIERS: dict[str, type[Classifier]] = {"classification": SSLAMForAudioClassification, "events": SSLAMForAudioFrameClassification}


def build_extractor(settings: FineTuningSettings, origin: str | None = None) -> SSLAMFeatureExtractor:
    """The feature extractor of the checkpoint `origin`, or a new one that fits the model, with the length and statistics that are set."""
    with as_user_error("the feature extractor cannot be made" if origin is None else f"model {settings.model} cannot be read"):
        if origin is None:
            config = SSLAMConfig(**settings.model_config)
            fields: dict[str, Any] = {"num_mel_bins": config.num_mel_bins, "pad_to_multiple_of": config.patch_size}
        else:
            config, extractor = AutoConfig.from_pretrained(origin), AutoFeatureExtractor.from_pretrained(origin)
            if not isinstance(extractor, SSLAMFeatureExtractor):
                raise UserError(f"{origin} has a {type(extractor).__name__}, so it is not a SSLAM checkpoint")
            fields = extractor.to_dict()
        fields |= normalization_fields(settings.normalization)
        fields |= {} if settings.max_length is None else {"max_length": settings.max_length}
        extractor = SSLAMFeatureExtractor(**fields)
    if extractor.max_length > (longest := settings.model_config.get("max_length", config.max_length)):
        raise UserError(f"max_length is {extractor.max_length}, but the model's positions end at {longest} frames: take less")
    return extractor


def frames_per_step(settings: FineTuningSettings, origin: str | None = None) -> int:
    """Frames of a time step of the model that [`build_model`] will make."""
    with as_user_error("model_config cannot be used" if origin is None else f"model {settings.model} cannot be read"):
        config = SSLAMConfig() if origin is None else AutoConfig.from_pretrained(origin)
        return SSLAMConfig(steps_per_second=settings.model_config.get("steps_per_second", config.steps_per_second)).frames_per_step


def build_model(
    settings: FineTuningSettings, extractor: SSLAMFeatureExtractor, classes: list[str], multi_label: bool, origin: str | None = None
) -> Classifier:
    """A classifier for these classes, from the checkpoint `origin` or with random weights, in float32, with the extractor's padding value.
    For the task `events` it is one of time steps, which drops no patches, and whose thresholds are not tuned yet.

    A frozen encoder drops paths, patches and activations only where `model_config` says so, as the published linear protocol does:
    otherwise its features are always the same. A classifier of other classes gives its encoder, and its head is replaced. With `lora.r`
    the model is behind a `peft.PeftModel`, see [`add_adapters`].

    Raises:
        UserError: if the checkpoint does not fit `model_config`.
    """
    drops = ("drop_path_rate", "patch_drop_rate", "hidden_dropout_prob", "attention_probs_dropout_prob") if settings.freeze_encoder else ()
    changes = {
        **dict.fromkeys(drops, 0.0),
        "return_dict": True,
        **settings.model_config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
        "event_detection": None,
        "calibration": None,  # training ends it
    }
    if settings.task == "events":
        changes["patch_drop_rate"] = 0.0
    if settings.attn_implementation is not None:
        changes["attn_implementation"] = settings.attn_implementation
    with as_user_error("the model cannot be made" if origin is None else f"model {settings.model} cannot be read"):
        model = CLASSIFIERS[settings.task](SSLAMConfig(**changes)) if origin is None else _load(settings, origin, classes, changes)
    model.config.padding_value = extractor.scaled_padding_value
    model.sslam.requires_grad_(not settings.freeze_encoder)
    return add_adapters(model, settings.lora, str(settings.model)) if settings.lora.r else model


def _load(settings: FineTuningSettings, origin: str, classes: list[str], changes: dict[str, Any]) -> Classifier:
    config = AutoConfig.from_pretrained(origin)
    for name in ENCODER_FIELDS & settings.model_config.keys():  # a recipe's sizes must not silently make another network of a checkpoint
        if settings.model_config[name] != getattr(config, name, None):
            raise UserError(
                f"model_config.{name} is {settings.model_config[name]}, but {settings.model} has {getattr(config, name, None)}: with "
                "`model` leave the sizes out, for example by --model_config {}"
            )
    with _without_report():
        loaded: Any = CLASSIFIERS[settings.task].from_pretrained(
            origin, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **changes
        )
    model, loading = loaded
    new = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if missing := sorted(name for name in new if name.startswith(model.base_model_prefix)):
        raise UserError(f"{origin} does not fill the encoder ({missing[0]} and {len(missing) - 1} more): does model_config fit it?")
    if [config.id2label[i] for i in range(config.num_labels)] != classes:  # as many as before, but not the same
        for head in (module for module in model.children() if isinstance(module, torch.nn.Linear)):
            torch.nn.init.normal_(head.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(head.bias)
        logger.info(f"the head is new: {len(classes)} classes, other than the checkpoint's; the encoder is the checkpoint's")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Without Transformers' report of weights that are missing or have another shape: it looks like an error where a head is replaced by
    design, and what else is missing is an error here."""
    reports = logging.getLogger("transformers.modeling_utils")

    def passes(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reports.addFilter(passes)
    try:
        yield
    finally:
        reports.removeFilter(passes)
