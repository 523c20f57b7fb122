"""How weights come into a model: from checkpoints of any age, and from the authors' files."""

import importlib
import importlib.util
import os
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging


logger = logging.get_logger(__name__)
PATCH_PROJECTION = "patch_embeddings.projection.weight"  # a convolution in official files and older models, and here its matrix


class FlattenPatchProjection(ConversionOps):
    """Reads a patch projection that was saved as a convolution, (hidden_size, 1, patch, patch), as the linear layer that it is now.

    Its own reverse: a model that was loaded this way is saved as it is, and a weight of two axes is read as it is.
    """

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict[str, Any]:
        ((weight,),) = input_dict.values()
        return {target_patterns[0]: weight.flatten(1)}

    @property
    def reverse_op(self) -> "FlattenPatchProjection":
        return self


def flatten_patch_projection(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same before `load_state_dict`, by which Trainer and Accelerate resume: a hook of the patch embeddings."""
    name = prefix + PATCH_PROJECTION.partition(".")[2]
    if name in state_dict:
        state_dict[name] = state_dict[name].flatten(1)


def flatten_patch_projection_moments(optimizer: torch.optim.Optimizer) -> None:
    """The same for the moments of an optimiser: `optimizer.register_load_state_dict_post_hook` takes it."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if weight.dim() == 2 and torch.is_tensor(value) and value.dim() == 4:
                state[name] = value.flatten(1)


class SSLAMLoadingMixin(PreTrainedModel):
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Behind every `from_pretrained`, the last place where a conversion can be added. One that is registered with Transformers would
        # be taken for a format that models are saved in.
        if type(model).__name__ == "SSLAMForAudioClassification" and model.config.architectures == ["SSLAMForAudioFrameClassification"]:
            logger.warning(
                "this model detects events: as a classifier it has a new head, whose scores mean nothing before it is trained. For events "
                "and tags load it with AutoModelForAudioFrameClassification, and call `detect` or `score_over_time`"
            )
        flatten = WeightConverter(PATCH_PROJECTION, PATCH_PROJECTION, [FlattenPatchProjection()])
        load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), flatten])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @classmethod
    def from_official(cls, checkpoint: str | os.PathLike[str], **kwargs: Any) -> Self:
        """A model with the authors' weights. They are converted into the cache once, verified, and loaded from there.

        Args:
            checkpoint: a Hub id such as `"ta012/SSLAM_pretrain"`, or a fairseq file.
            kwargs: as of `from_pretrained`.

        Raises:
            ImportError: if this code runs from beside a model, where the package is not installed.
            ValueError: if the checkpoint is not one of SSLAM or EAT.
        """
        if importlib.util.find_spec("transformers_sslam") is None:
            raise ImportError("from_official converts checkpoints with the package: pip install transformers-sslam")
        # By its name, because Transformers copies the files of all relative imports beside a published model.
        conversion = importlib.import_module("transformers_sslam.publishing.conversion")
        return cls.from_pretrained(conversion.convert_to_cache(checkpoint), **kwargs)
