"""SSLAM, self-supervised audio transformers for overlapping sounds, in Transformers.

Importing the package registers its classes, so that `AutoModel`, `AutoFeatureExtractor`, `AutoModelForAudioClassification` and
`pipeline("audio-classification")` know what to do with a SSLAM checkpoint.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register(SSLAMConfig.model_type, SSLAMConfig)
AutoFeatureExtractor.register(SSLAMConfig, SSLAMFeatureExtractor)
AutoModel.register(SSLAMConfig, SSLAMModel)
AutoModelForAudioClassification.register(SSLAMConfig, SSLAMForAudioClassification)

__all__ = [
    "NORMALIZATION_PRESETS",
    "SSLAMConfig",
    "SSLAMFeatureExtractor",
    "SSLAMForAudioClassification",
    "SSLAMModel",
    "SSLAMPreTrainedModel",
]
