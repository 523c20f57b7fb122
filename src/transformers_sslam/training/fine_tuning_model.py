"""The feature extractor and the classifier that a fine-tuning run begins with."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification
from transformers.utils import cached_file

from ..configuration_sslam import ENCODER_FIELDS, SSLAMConfig
from ..conversion import ConversionError, convert_checkpoint
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification
from .fine_tuning_settings import FineTuningSettings
from .normalization import normalization_fields


def resolve_checkpoint(settings: FineTuningSettings) -> str | None:
    """`settings.model`, or where it lies after conversion: official SSLAM and EAT checkpoints are converted, once, into
    `output_dir/start-...`, which is named after where they came from.

    Raises:
        UserError: if there is no such checkpoint, or it cannot be converted.
    """
    if settings.model is None or not _is_official(settings.model):
        return settings.model
    start = Path(settings.output_dir) / f"start-{hashlib.sha256(settings.model.encode()).hexdigest()[:8]}"
    with PartialState().main_process_first():
        if not (start / "config.json").is_file():
            try:
                convert_checkpoint(settings.model, start)
            except ConversionError as error:
                raise UserError(f"model {settings.model} is an official checkpoint that cannot be converted: {error}") from error
    return str(start)


def _is_official(model: str) -> bool:
    """Whether this is a file of fairseq, or a folder or Hub repository of the authors' remote code (`model_type` "eat")."""
    if Path(model).is_file():
        return True
    with as_user_error(f"model {model} cannot be read"):
        return json.loads(Path(str(cached_file(model, "config.json"))).read_text()).get("model_type") == "eat"


def build_extractor(settings: FineTuningSettings, origin: str | None = None) -> SSLAMFeatureExtractor:
    """The feature extractor of the checkpoint `origin`, or a new one that fits the model, with the length and statistics that are set."""
    with as_user_error("the feature extractor cannot be made"):
        if origin is None:
            config = SSLAMConfig(**settings.model_config)
            arguments: dict[str, Any] = {"num_mel_bins": config.num_mel_bins, "pad_to_multiple_of": config.patch_size}
        else:
            extractor = AutoFeatureExtractor.from_pretrained(origin)
            if not isinstance(extractor, SSLAMFeatureExtractor):
                raise UserError(f"{origin} has a {type(extractor).__name__}, so it is not a SSLAM checkpoint: convert it first")
            arguments = extractor.to_dict()
        arguments |= normalization_fields(settings.normalization)
        if settings.max_length is not None:
            arguments["max_length"] = settings.max_length
        config = SSLAMConfig(**settings.model_config) if origin is None else AutoConfig.from_pretrained(origin)
        longest = settings.model_config.get("max_length", config.max_length)
        extractor = SSLAMFeatureExtractor(**arguments)
        if extractor.max_length > longest:
            raise UserError(f"max_length is {extractor.max_length}, but the model's positions end at {longest} frames: take less")
        return extractor


def build_model(
    settings: FineTuningSettings, extractor: SSLAMFeatureExtractor, classes: list[str], multi_label: bool, origin: str | None = None
) -> SSLAMForAudioClassification:
    """A classifier for these classes, from the checkpoint `origin` or from scratch, in float32; what it takes for padding is the
    extractor's. A frozen encoder drops paths, patches and activations only where the settings say so, as the published linear protocol
    does: otherwise its features are always the same."""
    drops = ("drop_path_rate", "patch_drop_rate", "hidden_dropout_prob", "attention_probs_dropout_prob") if settings.freeze_encoder else ()
    changes = {
        **dict.fromkeys(drops, 0.0),
        **settings.model_config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
    }
    if settings.attn_implementation is not None:
        changes["attn_implementation"] = settings.attn_implementation
    with as_user_error("the model cannot be made"):
        if origin is None:
            model = SSLAMForAudioClassification(SSLAMConfig(**changes))
        else:
            config = AutoConfig.from_pretrained(origin)
            _check_architecture(settings, config)
            # A classifier of other classes gives its encoder, and its own head is replaced.
            model, loading = AutoModelForAudioClassification.from_pretrained(
                origin, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **changes
            )
            new = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
            if unfit := sorted(name for name in new if name.startswith(model.base_model_prefix)):
                raise UserError(f"{origin} does not fill the encoder ({unfit[0]} and {len(unfit) - 1} more): does model_config fit it?")
            if [config.id2label[i] for i in range(config.num_labels)] != classes:  # as many as before, and yet others
                torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
                torch.nn.init.zeros_(model.classifier.bias)
    model.config.padding_value = extractor.scaled_padding_value
    model.sslam.requires_grad_(not settings.freeze_encoder)
    return model


def _check_architecture(settings: FineTuningSettings, config: SSLAMConfig) -> None:
    """A recipe's sizes must not silently make another network of a checkpoint."""
    for name in ENCODER_FIELDS & settings.model_config.keys():
        if settings.model_config[name] != getattr(config, name, None):
            raise UserError(
                f"model_config.{name} is {settings.model_config[name]}, but {settings.model} has {getattr(config, name, None)}: with "
                "`model` leave the sizes out, for example by model_config={}"
            )


__all__ = ["build_extractor", "build_model", "resolve_checkpoint"]
