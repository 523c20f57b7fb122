"""SSLAM, self-supervised audio transformers for overlapping sounds, in Transformers.

Importing the package registers its classes, so that `AutoModel`, `AutoFeatureExtractor`, `AutoModelForAudioClassification`,
`AutoModelForAudioFrameClassification`, `AutoModelForPreTraining` and `pipeline("audio-classification")` know what to do with a SSLAM
checkpoint.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForPreTraining,
)

from .configuration_sslam import PRETRAINING_STAGES, SSLAMConfig
from .feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
from .modeling_sslam_frames import SSLAMForAudioFrameClassification
from .modeling_sslam_pretraining import SSLAMForPreTraining


__version__ = "0.1.0"

AutoConfig.register(SSLAMConfig.model_type, SSLAMConfig)
AutoFeatureExtractor.register(SSLAMConfig, SSLAMFeatureExtractor)
AutoModel.register(SSLAMConfig, SSLAMModel)
AutoModelForAudioClassification.register(SSLAMConfig, SSLAMForAudioClassification)
AutoModelForAudioFrameClassification.register(SSLAMConfig, SSLAMForAudioFrameClassification)
AutoModelForPreTraining.register(SSLAMConfig, SSLAMForPreTraining)

__all__ = [
    "NORMALIZATION_PRESETS",
    "PRETRAINING_STAGES",
    "SSLAMConfig",
    "SSLAMFeatureExtractor",
    "SSLAMForAudioClassification",
    "SSLAMForAudioFrameClassification",
    "SSLAMForPreTraining",
    "SSLAMModel",
    "SSLAMPreTrainedModel",
]
