"""SSLAMConfig: every size and setting of the model."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


# The two stages of the published pre-training: EAT's on unmixed audio, then SSLAM's on unmixed audio and partial mixtures. For a new
# configuration, `SSLAMConfig.base(**PRETRAINING_STAGES[1])`, and for stage 2 from stage 1's checkpoint,
# `SSLAMForPreTraining.from_pretrained(path, **PRETRAINING_STAGES[2])`.
PRETRAINING_STAGES: dict[int, dict[str, Any]] = {
    1: {"use_mixtures": False, "num_views": 16, "global_target_layers": None},
    2: {"use_mixtures": True, "num_views": 8, "global_target_layers": 1},
}

# Far above every model of this kind. A table or filter bank of a mistaken size would fill the memory before anything else failed.
LARGEST_SIZES = {
    **{"hidden_size": 65_536, "intermediate_size": 262_144, "decoder_hidden_size": 65_536},
    **{"num_hidden_layers": 1024, "decoder_num_hidden_layers": 1024, "decoder_kernel_size": 1023},
    **{"patch_size": 1024, "num_mel_bins": 1024, "max_length": 1_048_576, "num_views": 1024},
}

# Without these an encoder's weights mean nothing, or something else. (Positions are among them, hence `max_length`.)
ENCODER_FIELDS = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps", "qkv_bias"),
    *("patch_size", "num_mel_bins", "max_length"),
}


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
        patch_drop_rate (`float`, defaults to 0.0):
            Share of each clip's patches that training leaves out, at random (Patchout, Koutini et al., arXiv 2110.05069): a step costs
            that much less, and small data sets are overfitted less. None in evaluation.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the linear weights at the start.
        patch_embedding_gain (`float`, defaults to 1.0):
            Factor on the patch projection's weights at the start. Small models that are pre-trained on little audio collapse less
            easily with 2.0 (and 0.5 below): what is heard then weighs more against where it is.
        position_embedding_scale (`float`, defaults to 1.0):
            Factor on the table of positions at the start; a checkpoint's table is loaded as it is.
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
        use_mixtures (`bool`, defaults to `True`):
            Whether pre-training sees partial mixtures beside the unmixed clips: stage 2, SSLAM. Without, it is stage 1, EAT. See
            `PRETRAINING_STAGES` for the settings that differ.
        use_unmixed (`bool`, defaults to `True`):
            Whether pre-training with mixtures sees the unmixed clips as well. Without, there is no source retention, whose weight must
            be 0: the paper's ablation on mixtures alone (MB-PMA).
        num_views (`int`, defaults to 8): Masks under which each clip is seen in a step; stage 1 uses 16.
        mask_ratio (`float`, defaults to 0.8): Share of the patches that each mask hides.
        mask_ratio_adjust (`float`, defaults to 0.07): Added to the visible share when counting the blocks to keep.
        mask_block_size (`int`, defaults to 5): Side of the visible blocks, in patches.
        mask_noise_std (`float`, defaults to 0.01): Standard deviation of the noise that stands in for masked patches in the decoder.
        num_unmixed_spans (`int`, defaults to 2): Spans of each mixture in which nothing is mixed in.
        unmixed_span_length (`int`, defaults to 240): Their length in frames, a multiple of `patch_size`.
        unmixed_spans_per_clip (`bool`, defaults to `False`):
            Whether each clip has its own spans. In the published runs one draw serves the whole batch of a device.
        unmixed_span_placement (`str`, defaults to `"published"`):
            `"published"`, which places spans often around the middle and never at the end, where every mixture is mixed; or `"uniform"`,
            every placement equally likely.
        local_target_layers (`int`, *optional*): Top blocks of the teacher whose average is the target of patches; all by default.
        global_target_layers (`int`, *optional*, defaults to 1): Those for the target of CLS; `None` for all, as in stage 1.
        global_loss_weight (`float`, defaults to 1.0): Weight of the global (CLS) loss.
        global_loss_reduction (`str`, defaults to `"sum"`):
            `"sum"`, over views, so that the weight of the global loss grows with the batch, as published, or `"mean"`.
        source_retention_loss_weight (`float`, defaults to 2.0):
            Weight of the source retention loss. It is divided by the masked patches of both halves, though only the mixed half has it:
            hence the published 2.
        ema_decay (`float`, defaults to 0.9998): Decay of the teacher's moving average at the start.
        ema_end_decay (`float`, defaults to 0.99999): Decay at the end of a linear ramp.
        ema_anneal_end_step (`int`, defaults to 100000): Update with which that ramp ends.

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
    patch_drop_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    patch_embedding_gain: float | int = 1.0
    position_embedding_scale: float | int = 1.0
    layer_norm_eps: float | int = 1e-6
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
    use_mixtures: bool = True
    use_unmixed: bool = True
    num_views: int = 8
    mask_ratio: float | int = 0.8
    mask_ratio_adjust: float | int = 0.07
    mask_block_size: int = 5
    mask_noise_std: float | int = 0.01
    num_unmixed_spans: int = 2
    unmixed_span_length: int = 240
    unmixed_spans_per_clip: bool = False
    unmixed_span_placement: Literal["published", "uniform"] = "published"
    local_target_layers: int | None = None
    global_target_layers: int | None = 1
    global_loss_weight: float | int = 1.0
    global_loss_reduction: Literal["sum", "mean"] = "sum"
    source_retention_loss_weight: float | int = 2.0
    ema_decay: float | int = 0.9998
    ema_end_decay: float | int = 0.99999
    ema_anneal_end_step: int = 100_000

    def __post_init__(self, **kwargs):
        if self.label2id and not self.id2label:  # Transformers would name the classes LABEL_0, LABEL_1, ...
            self.id2label = dict(sorted((int(i), name) for name, i in self.label2id.items()))
            if list(self.id2label) != list(range(kwargs.get("num_labels") or len(self.label2id))):
                raise ValueError(
                    f"label2id is {self.label2id} and num_labels {kwargs.get('num_labels')}, but each class from 0 on needs one name: "
                    "leave num_labels out, or mend label2id"
                )
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
            "ema_anneal_end_step": 150_000,
        }
        return cls(**{**sizes, **kwargs})

    @property
    def num_frequency_patches(self) -> int:
        """Patches along the frequency axis: 8 for 128 mel bins."""
        return self.num_mel_bins // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """As saved, without `auto_map`: a copy that is saved elsewhere has no code beside it, unless Transformers itself copies it along.
        (`transformers_sslam.hub.add_remote_code` puts both there.)"""
        values = super().to_dict()
        if self._auto_class is None:
            values.pop("auto_map", None)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "SSLAMConfig":
        """As in Transformers; but a `label2id` that is given replaces `id2label` too, and sizes that are given are checked."""
        if kwargs.get("label2id") and not kwargs.get("id2label"):
            saved = {name: value for name, value in config_dict.items() if name not in ("id2label", "num_labels")}
            config_dict = {**saved, "label2id": kwargs.pop("label2id")}
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).validate_architecture()
        return loaded

    def validate_architecture(self):
        super().validate_architecture()
        for name in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_mel_bins", "max_length"),
            *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_kernel_size", "decoder_num_groups"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name, largest in LARGEST_SIZES.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at most {largest}")
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
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps}, but must be a finite number above 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, but must be one of {', '.join(ACT2FN)}")
        for name in ("initializer_range", "patch_embedding_gain", "position_embedding_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a finite number that is not negative")
        if not math.isfinite(self.padding_value):
            raise ValueError(f"padding_value is {self.padding_value}, but must be finite: it stands where a mask says padding")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a probability to drop must lie in [0, 1)")
        self._validate_pretraining()

    def _validate_pretraining(self):
        """Ranges only. What must fit the encoder or the input is checked where pre-training meets it, so that no encoder is refused."""
        for name in ("num_views", "mask_block_size", "num_unmixed_spans", "unmixed_span_length", "ema_anneal_end_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("local_target_layers", "global_target_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1, or None for all layers")
        for name in ("mask_noise_std", "global_loss_weight", "source_retention_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a finite number that is not negative")
        for name in ("ema_decay", "ema_end_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a decay must lie in [0, 1]")
        if not self.use_unmixed and (not self.use_mixtures or self.source_retention_loss_weight):
            raise ValueError(
                f"use_unmixed is False, use_mixtures {self.use_mixtures} and source_retention_loss_weight "
                f"{self.source_retention_loss_weight:g}, but mixtures alone need use_mixtures=True and a weight of 0"
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}, but must lie between 0 and 1")
        if not 0 <= 1 - self.mask_ratio + self.mask_ratio_adjust <= 1:
            raise ValueError(
                f"mask_ratio_adjust is {self.mask_ratio_adjust}, but the visible share that it is added to, {1 - self.mask_ratio:g}, must "
                "stay between 0 and 1"
            )


__all__ = ["ENCODER_FIELDS", "PRETRAINING_STAGES", "SSLAMConfig"]
