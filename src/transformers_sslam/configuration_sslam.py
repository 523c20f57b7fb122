"""SSLAMConfig: every size and setting of the model."""

import math
import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .classes_sslam import LABEL_FIELDS, check_classes, chosen_labels, names_by_number, ordered_names


if TYPE_CHECKING:  # so that Transformers, which saves a model's code with all that it imports, saves the code of every class
    from .modeling_sslam_frames import SSLAMForAudioFrameClassification  # noqa: F401
    from .modeling_sslam_pretraining import SSLAMForPreTraining  # noqa: F401

# The two stages of the published pre-training: EAT's on unmixed audio, then SSLAM's on unmixed audio and partial mixtures. For a new
# configuration, `SSLAMConfig.base(**PRETRAINING_STAGES[1])`, and for stage 2 from stage 1's checkpoint,
# `SSLAMForPreTraining.from_pretrained(path, **PRETRAINING_STAGES[2])`.
PRETRAINING_STAGES: dict[int, dict[str, Any]] = {
    1: {"use_mixtures": False, "num_views": 16, "global_target_layers": None},
    2: {"use_mixtures": True, "num_views": 8, "global_target_layers": 1},
}

# How the tokens of a clip become one vector; `pooling_sslam.POOLINGS` says of which parts.
ClipPooling = Literal["cls", "mean", "mean_and_std", "max_by_frequency", "mean_and_max_by_frequency"]

# Far above every model of this kind. A table or filter bank of a mistaken size would fill the memory before anything else failed.
LARGEST_SIZES = {
    **{"hidden_size": 65_536, "intermediate_size": 262_144, "decoder_hidden_size": 65_536},
    **{"num_hidden_layers": 1024, "decoder_num_hidden_layers": 1024, "decoder_kernel_size": 1023},
    **{"patch_size": 1024, "num_mel_bins": 1024, "max_length": 1_048_576, "num_views": 1024},
}

PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
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
            Fraction of each clip's patches that training leaves out, at random (Patchout, Koutini et al., arXiv 2110.05069). A step costs
            less in proportion, and small data sets are overfitted less. Evaluation uses all patches.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new linear weights.
        patch_embedding_gain (`float`, defaults to 1.0):
            Factor on the patch projection's new weights. Small models pre-trained on little audio collapse less easily with 2.0 (and 0.5
            below), which gives content more weight against position.
        position_embedding_scale (`float`, defaults to 1.0): Factor on a new position table; a checkpoint's table is loaded as it is.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer norm of the encoder and the classifier.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have biases.
        patch_size (`int`, defaults to 16): Side of a square patch, in frames and in mel bins. Patches do not overlap.
        num_mel_bins (`int`, defaults to 128): Mel bins of the input; a multiple of `patch_size`.
        max_length (`int`, defaults to 12288):
            Frames (10 ms each) that the position table covers, hence the longest input; a multiple of `patch_size`. Shorter inputs use
            its first rows, whatever its length.
        padding_value (`float`, defaults to 0.46706):
            Replaces masked frames in patches that also hold sound: the feature extractor's padding after scaling, `(0 - mean) / (2 * std)`.
            The default belongs to AudioSet's mean and standard deviation.
        classifier_pooling (`str`, defaults to `"cls"`):
            What is `pooler_output`, and what a classifier of clips reads: `"cls"`, the CLS token (as published); or, of the patch tokens
            that are not masked, the `"mean"`; `"mean_and_std"`, mean and standard deviation; `"max_by_frequency"`, the maximum over time
            of each channel for each patch along frequency; `"mean_and_max_by_frequency"`, mean and maximum, the same way. The last two
            need all patches (`patch_drop_rate` of 0). Widths are 1, 1, 2, 8 and 16 times `hidden_size`, for 8 patches along frequency.
            A detector of events, whose clip scores are those of its steps, does not read it.
        layer_pooling (`str`, *optional*):
            What a classifier of clips reads: by default the pooled output of the last block, as published; a `"weighted_sum"` of all
            blocks' pooled outputs, whose learned weights are the same for all clips; or a `"gated"` one, whose weights depend on the clip.
        classifier_dropout (`float`, defaults to 0.0): Dropout before the classifier's linear layer.
        frame_pooling (`str`, defaults to `"mean"`):
            How the patches of a time step become one vector in event detection: their `"mean"`, a weighted mean by learned `"attention"`
            over frequency, or one after the other (`"patches"`), so that the head knows at which frequencies a sound is.
        steps_per_second (`float`, defaults to 6.25):
            Time steps of event detection: 6.25, a step for each patch of 160 ms, or 12.5 or 25, between which it interpolates.
        clip_loss_weight (`float`, defaults to 1.0): Weight of the clips' labels in the loss of event detection, beside that of the steps'.
        clip_weighting (`bool`, defaults to `False`):
            Whether the score of a step in event detection is the geometric mean of its own and that of its clip (or window).
        event_detection (`dict`, *optional*): How scores become events: fields of `events_sslam.EventSettings`, by class where tuned.
        calibration (`dict`, *optional*): For information: the `temperature` that the head's weights were divided by.
        decoder_hidden_size (`int`, defaults to 768): Width of the convolutional decoder used in pre-training.
        decoder_num_hidden_layers (`int`, defaults to 6): Convolutions of that decoder.
        decoder_kernel_size (`int`, defaults to 3): Their kernel, odd, in patches.
        decoder_num_groups (`int`, defaults to 16): Their groups.
        use_mixtures (`bool`, defaults to `True`):
            Whether pre-training uses partial mixtures: stage 2, SSLAM. `PRETRAINING_STAGES` has the settings that differ in stage 1, EAT.
        use_unmixed (`bool`, defaults to `True`):
            Whether pre-training with mixtures uses the unmixed clips too. Without them (the paper's ablation MB-PMA) source retention is
            undefined, and its weight must be 0.
        num_views (`int`, defaults to 8): Masks per clip in a step; stage 1 uses 16.
        mask_ratio (`float`, defaults to 0.8): Fraction of the patches that each mask hides.
        mask_ratio_adjust (`float`, defaults to 0.07): Added to the visible fraction when counting the blocks to keep.
        mask_block_size (`int`, defaults to 5): Side of the visible blocks, in patches.
        mask_noise_std (`float`, defaults to 0.01): Standard deviation of the noise that replaces masked patches in the decoder.
        objective (`str`, defaults to `"sslam"`):
            What the sources of mixtures are for: `"sslam"`, source retention, or `"mixture_invariant"`, a baseline in its place after MixIT
            (Wisdom et al., arXiv 2006.12701): see [`objective_sslam.mixture_invariant_loss`].
        num_latent_sources (`int`, defaults to 4): Outputs of the decoder for each patch of a mixture in that baseline, 2 to 10.
        num_sources (`int` or `list[int]`, defaults to 2):
            Clips that each mixture has, the clip itself among them; `[least, most]`: drawn for each mixture. At most the clips of a batch.
        mixing_partners (`str`, defaults to `"neighbour"`):
            Which clips are mixed in: those before it in the batch, as published, or others of the `"batch"`, drawn without replacement.
        mixing_domain (`str`, defaults to `"log_mel"`):
            How: by the elementwise maximum of log-mels, as published; by the sum of energies (`"mel"`); or as sums of waveforms
            (`"waveform"`), which is exact, and for which the model also takes waveforms.
        gain_db (`list[float]`, *optional*):
            `[lowest, highest]` gain in dB, drawn for each clip that is mixed in. By default they keep their level, as the clip itself does.
        log_mel_mean (`float`, defaults to -4.268): The feature extractor's `mean`, needed for gains, energies and waveforms.
        log_mel_std (`float`, defaults to 4.569): Its `std`, likewise.
        sampling_rate (`int`, defaults to 16000): Its rate in Hz, needed to mix waveforms.
        num_unmixed_spans (`int`, defaults to 2): Spans of each mixture in which nothing is mixed in.
        unmixed_span_length (`int`, defaults to 240): Their length in frames, a multiple of `patch_size`.
        unmixed_spans_per_clip (`bool`, defaults to `False`):
            Whether each clip has its own spans. In the published runs one draw serves the whole batch of a device.
        unmixed_span_placement (`str`, defaults to `"published"`):
            `"published"`, which places spans often around the middle and never at the end, where every mixture is mixed; or `"uniform"`,
            every placement equally likely.
        local_target_layers (`int`, *optional*): Top blocks of the teacher whose average is the target of patches; all by default.
        global_target_layers (`int`, *optional*, defaults to 1): Those for the target of CLS; `None` for all, as in stage 1.
        target_normalization (`str`, defaults to `"instance"`):
            How each block's outputs are normalised before the targets average them: over each clip's patches (`"instance"`, as published),
            which makes every channel's mean over a clip 0, so that the target of CLS, the mean over patches, says little about the clip; or
            by `"running"` statistics over clips, a mean for each position (up to `max_length`) and a variance, which keep what clips differ
            in, and take away what follows from the position. Small models on little audio learn more with these.
        global_loss_weight (`float`, defaults to 1.0): Weight of the global (CLS) loss.
        global_loss_reduction (`str`, defaults to `"sum"`):
            `"sum"`, over views, so that the weight of the global loss grows with the batch, as published, or `"mean"`.
        source_retention_loss_weight (`float`, defaults to 2.0):
            Weight of the source retention loss, which only the mixed half has, but which is divided by the masked patches of both; likewise
            of the mixture-invariant loss.
        ema_decay (`float`, defaults to 0.9998): Decay of the teacher's moving average at the start.
        ema_end_decay (`float`, defaults to 0.99999): Decay at the end of a linear ramp.
        ema_anneal_end_step (`int`, defaults to 100000): Update at which that ramp ends.

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
    classifier_pooling: ClipPooling = "cls"
    layer_pooling: Literal["weighted_sum", "gated"] | None = None
    classifier_dropout: float | int = 0.0
    frame_pooling: Literal["mean", "attention", "patches"] = "mean"
    steps_per_second: float | int = 6.25
    clip_loss_weight: float | int = 1.0
    clip_weighting: bool = False
    event_detection: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
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
    objective: Literal["sslam", "mixture_invariant"] = "sslam"
    num_latent_sources: int = 4
    num_sources: int | list[int] = 2
    mixing_partners: Literal["neighbour", "batch"] = "neighbour"
    mixing_domain: Literal["log_mel", "mel", "waveform"] = "log_mel"
    gain_db: list[float | int] | None = None
    log_mel_mean: float | int = -4.268
    log_mel_std: float | int = 4.569
    sampling_rate: int = 16_000
    num_unmixed_spans: int = 2
    unmixed_span_length: int = 240
    unmixed_spans_per_clip: bool = False
    unmixed_span_placement: Literal["published", "uniform"] = "published"
    local_target_layers: int | None = None
    global_target_layers: int | None = 1
    target_normalization: Literal["instance", "running"] = "instance"
    global_loss_weight: float | int = 1.0
    global_loss_reduction: Literal["sum", "mean"] = "sum"
    source_retention_loss_weight: float | int = 2.0
    ema_decay: float | int = 0.9998
    ema_end_decay: float | int = 0.99999
    ema_anneal_end_step: int = 100_000

    def __post_init__(self, **kwargs):
        check_classes(kwargs.get("num_labels"), self.id2label)
        if self.label2id and not self.id2label:  # Transformers would name the classes LABEL_0, LABEL_1, ...
            self.id2label = names_by_number(self.label2id, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        # `@strict` checks again whenever it validates, but wraps what it finds in an error of its own. Here a wrong value is a ValueError.
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

    @property
    def most_sources(self) -> int:
        """The largest number of sources that a mixture may have."""
        return self.num_sources if isinstance(self.num_sources, int) else self.num_sources[1]

    @property
    def frames_per_step(self) -> int:
        """Frames (10 ms) of a time step in event detection: 16 for 6.25 steps per second."""
        return round(100 / self.steps_per_second)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their scores. Raises a ValueError if not each class from 0 on has a name."""
        return ordered_names(self.id2label or {})

    def normalize_labels(self) -> None:
        """Give `id2label` and `label2id` the same classes, numbered from 0 in their order. Raises as `class_names`, or if there is none."""
        check_classes(self.num_labels, self.id2label)
        self.id2label = dict(enumerate(self.class_names))
        self.label2id = {name: index for index, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """As saved, without `auto_map` unless Transformers itself copies the code: a copy that is saved elsewhere has no code beside it.
        (`publishing.hub.add_remote_code` writes both.)"""
        values = super().to_dict()
        if self._auto_class is None:
            values.pop("auto_map", None)
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "SSLAMConfig":
        """As in Transformers; but names of classes replace all saved ones, values are checked, and other classes have no thresholds yet."""
        given = {name: kwargs.pop(name) for name in LABEL_FIELDS if name in kwargs}
        others = {name: value for name, value in config_dict.items() if name not in LABEL_FIELDS}
        loaded = super().from_dict(others | chosen_labels(config_dict, given), **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        former = {str(i): name for i, name in (config_dict.get("id2label") or {}).items()}
        if former and former != {str(i): name for i, name in (config.id2label or {}).items()}:
            vars(config).update(dict.fromkeys({"event_detection", "calibration"} - kwargs.keys()))
        config.validate_architecture()
        return loaded

    def validate_architecture(self):
        super().validate_architecture()
        pretraining_counts = ("num_views", "mask_block_size", "num_unmixed_spans", "unmixed_span_length", "ema_anneal_end_step")
        heads_and_groups = ("num_attention_heads", "decoder_num_groups")
        self._require((*LARGEST_SIZES, *heads_and_groups, *pretraining_counts), lambda value: value >= 1, "be at least 1")
        for name, largest in LARGEST_SIZES.items():
            self._require([name], partial(operator.ge, largest), f"be at most {largest}")
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
        self._require(["hidden_size"], lambda value: value % 4 == 0, "be a multiple of 4: sine and cosine of time and of frequency")
        self._require(["decoder_kernel_size"], lambda value: value % 2 == 1, "be odd, for 'same' padding")
        self._require(["layer_norm_eps"], lambda value: 0 < value < math.inf, "be a finite number above 0")
        self._require(["problem_type"], PROBLEM_TYPES.__contains__, f"be one of {', '.join(map(str, PROBLEM_TYPES))}")
        self._require(["hidden_act"], ACT2FN.__contains__, f"be one of {', '.join(ACT2FN)}")
        self._require(["padding_value"], math.isfinite, "be finite: it replaces what a mask excludes")
        dropped = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate", "classifier_dropout")
        self._require(dropped, lambda value: 0 <= value < 1, "lie in [0, 1): it is a probability to drop")
        if self.patch_drop_rate and "by_frequency" in self.classifier_pooling:
            raise ValueError(
                f"classifier_pooling is {self.classifier_pooling!r} and patch_drop_rate {self.patch_drop_rate:g}, but this pooling needs "
                "all patches of each frequency: set patch_drop_rate to 0, or pool by 'mean_and_std'"
            )
        self._require(
            ["steps_per_second"], lambda rate: 0 < rate <= 100 and 100 % rate == 0, "give steps of whole frames: 6.25, 12.5 or 25"
        )
        scales = ("initializer_range", "patch_embedding_gain", "position_embedding_scale", "mask_noise_std")
        weights = ("global_loss_weight", "source_retention_loss_weight", "clip_loss_weight")
        self._require((*scales, *weights), lambda value: 0 <= value < math.inf, "be a finite number that is not negative")
        # Of pre-training ranges only. What must fit the encoder or the input is checked there, so that every encoder can be loaded.
        layers = ("local_target_layers", "global_target_layers")
        self._require(layers, lambda value: value is None or value >= 1, "be at least 1, or None for all layers")
        self._require(("ema_decay", "ema_end_decay"), lambda value: 0 <= value <= 1, "lie in [0, 1]")
        self._require(["mask_ratio"], lambda value: 0 < value < 1, "lie between 0 and 1")
        visible = 1 - self.mask_ratio
        self._require(["mask_ratio_adjust"], lambda value: 0 <= visible + value <= 1, f"lie between {-visible:g} and {1 - visible:g}")
        self._validate_mixtures()
        if self.event_detection:  # whatever its labels: classes may be renamed one after the other
            from .events_sslam import check_event_options  # which itself imports this module

            check_event_options("config.event_detection", self.event_detection, list((self.id2label or {}).values()))

    def _validate_mixtures(self) -> None:
        self._require(["num_latent_sources"], lambda value: 2 <= value <= 10, "be 2 to 10, because all 2 ** num_latent_sources are tried")
        if self.objective == "mixture_invariant" and not (self.use_mixtures and self.source_retention_loss_weight):
            raise ValueError(
                f"objective is 'mixture_invariant', use_mixtures {self.use_mixtures} and source_retention_loss_weight "
                f"{self.source_retention_loss_weight:g}, but its loss needs mixtures, and that weight above 0"
            )
        self._require(["num_sources"], _is_count_or_range, "be a whole number of at least 2, or two such, [least, most]")
        self._require(["gain_db"], _is_range_or_none, "be [lowest, highest] in dB, or None for no gains")
        self._require(["log_mel_mean"], math.isfinite, "be finite")
        self._require(["log_mel_std"], lambda value: 0 < value < math.inf, "be a finite number above 0")
        self._require(["sampling_rate"], lambda value: value >= 1000, "be at least 1000 Hz")
        if not self.use_unmixed and (not self.use_mixtures or self.source_retention_loss_weight):
            raise ValueError(
                f"use_unmixed is False, use_mixtures {self.use_mixtures} and source_retention_loss_weight "
                f"{self.source_retention_loss_weight:g}, but mixtures alone need use_mixtures=True and a weight of 0"
            )

    def _require(self, names: Iterable[str], holds: Callable[[Any], bool], expected: str) -> None:
        for name in names:
            if not holds(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must {expected}")


def _is_count_or_range(value: int | list[int]) -> bool:
    least, *most = [value] if isinstance(value, int) else value or [0]
    return least >= 2 and (isinstance(value, int) or (len(most) == 1 and most[0] >= least))


def _is_range_or_none(value: list[float | int] | None) -> bool:
    return value is None or (len(value) == 2 and all(map(math.isfinite, value)) and value[0] <= value[1])


__all__ = ["ENCODER_FIELDS", "PRETRAINING_STAGES", "ClipPooling", "SSLAMConfig"]
