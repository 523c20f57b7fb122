"""SSLAMConfig: every size and setting of the model."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SSLAMConfig(PreTrainedConfig):
    r"""
    Configuration of [`SSLAMModel`] and the models built on it. The defaults are those of the published base model (SSLAM,
    arXiv 2506.12222, and EAT, arXiv 2401.03497): ViT-B over a log-mel of 128 bins.

    Args:
        hidden_size (`int`, defaults to 768): Width of the encoder; a multiple of 4 (for the position table) and of the heads.
        num_hidden_layers (`int`, defaults to 12): Blocks of the encoder.
        num_attention_heads (`int`, defaults to 12): Heads of each attention layer.
        intermediate_size (`int`, defaults to 3072): Width of each block's MLP.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs; `"gelu"` is the exact (erf) form, as published.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after the embeddings, each attention and each MLP.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of the attention probabilities.
        drop_path_rate (`float`, defaults to 0.0):
            Probability to skip a residual branch of the last block, growing linearly from 0 in the first. Fine-tuning uses 0.1.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the linear weights at the start.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer norm of the encoder and the classifier.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have biases.
        patch_size (`int`, defaults to 16): Side of a square patch, in frames and in mel bins. Patches do not overlap.
        num_mel_bins (`int`, defaults to 128): Mel bins of the input; a multiple of `patch_size`.
        max_length (`int`, defaults to 12288):
            Frames (10 ms each) that the position table covers, hence the longest input; a multiple of `patch_size`. Shorter
            inputs use the first rows, so the table's length changes nothing for them.
        padding_value (`float`, defaults to 0.46706):
            What masked frames are replaced by where they share a patch with sounding ones: the feature extractor's padding after
            scaling, `(0 - mean) / (2 * std)`. The default belongs to AudioSet's mean and deviation.
        classifier_pooling (`str`, defaults to `"cls"`):
            `pooler_output`, from which [`SSLAMForAudioClassification`] classifies: `"cls"`, the CLS token (as published), or
            `"mean"`, the mean of the patch tokens that are not masked.
        classifier_dropout (`float`, defaults to 0.0): Dropout before the classifier's linear layer.
        decoder_hidden_size (`int`, defaults to 768): Width of the convolutional decoder used in pre-training.
        decoder_num_hidden_layers (`int`, defaults to 6): Convolutions of that decoder.
        decoder_kernel_size (`int`, defaults to 3): Their kernel, odd, in patches.
        decoder_num_groups (`int`, defaults to 16): Their groups.

    Raises:
        ValueError: if sizes contradict each other. The message names the values.

    Example:

    ```python
    >>> from transformers_sslam import SSLAMConfig, SSLAMModel

    >>> model = SSLAMModel(SSLAMConfig.base())
    >>> model.config.num_frequency_patches
    8
    ```
    """

    model_type = "sslam"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    patch_size: int = 16
    num_mel_bins: int = 128
    max_length: int = 12288
    padding_value: float | int = 0.46706
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: float | int = 0.0
    decoder_hidden_size: int = 768
    decoder_num_hidden_layers: int = 6
    decoder_kernel_size: int = 3
    decoder_num_groups: int = 16

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # `@strict` checks again whenever it validates (on saving, for one), but wraps what it finds in an error that is no
        # ValueError; here, at construction, a wrong value is the plain ValueError that it should be.
        self.validate_architecture()

    @classmethod
    def base(cls, **kwargs) -> "SSLAMConfig":
        """ViT-B, 86 M parameters: SSLAM and EAT base, the defaults of this class."""
        return cls(**kwargs)

    @classmethod
    def large(cls, **kwargs) -> "SSLAMConfig":
        """ViT-L, 303 M parameters: EAT large."""
        sizes = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "decoder_hidden_size": 1024,
            "decoder_num_hidden_layers": 3,
        }
        return cls(**{**sizes, **kwargs})

    @property
    def num_frequency_patches(self) -> int:
        """Patches along the frequency axis: 8 for 128 mel bins."""
        return self.num_mel_bins // self.patch_size

    def validate_architecture(self):
        super().validate_architecture()
        for name in (
            "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size num_mel_bins max_length "
            "decoder_hidden_size decoder_num_hidden_layers decoder_kernel_size decoder_num_groups"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name, divisor in (
            ("hidden_size", "num_attention_heads"),
            ("num_mel_bins", "patch_size"),
            ("max_length", "patch_size"),
            ("decoder_hidden_size", "decoder_num_groups"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and {divisor} is {getattr(self, divisor)}, but {name} must be a multiple of "
                    f"{divisor}: change one of them"
                )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but the position table needs a multiple of 4 (sine and cosine of time and frequency)"
            )
        if self.decoder_kernel_size % 2 == 0:
            raise ValueError(f"decoder_kernel_size is {self.decoder_kernel_size}, but 'same' padding needs an odd kernel")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps}, but must be above 0")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a probability to drop must lie in [0, 1)")


__all__ = ["SSLAMConfig"]
