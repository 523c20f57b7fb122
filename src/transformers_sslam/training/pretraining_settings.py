"""Every setting of a pre-training run."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..audio.batches import DataSettings
from ..errors import UserError
from ..feature_extraction_sslam import NORMALIZATION_PRESETS
from ..settings import setting
from .normalization import check_normalization


@dataclass
class PreTrainingSettings:
    """Settings of `scripts/pretrain.py`. Defaults are stage 2 of the base model as published."""

    output_dir: str = setting("folder of checkpoints, logs and, at the end, the model")
    data: DataSettings = setting("sources of clips and how they are read")
    validation: DataSettings | None = setting("sources of the fixed set that the validation loss is taken on", None)
    validation_clips: int = setting("clips of that set", 96)

    stage: Literal[1, 2] = setting("1: unmixed clips only (EAT); 2: unmixed clips and partial mixtures (SSLAM)", 2)
    init_from: str | None = setting(
        "checkpoint or Hub id to start from, with its decoder and teacher if it has them; null: from scratch", None
    )
    preset: Literal["base", "large"] = setting("sizes of a model from scratch, which `model` may change", "base")
    model: dict[str, Any] = setting(
        "further fields of SSLAMConfig, over those of the stage, and of the preset or of init_from's model, whose weight and reduction of "
        "the global loss alone are not taken over",
        {},
    )
    features: dict[str, Any] = setting(
        "fields of SSLAMFeatureExtractor: mean, std, max_length (frames of a clip); over those of init_from's extractor, if it has one", {}
    )
    normalization: str | list[float] = setting(
        "mean and standard deviation of log-mels: 'model' (init_from's, or those of features, or AudioSet's), 'computed' (from the run's "
        f"own recordings), a preset ({', '.join(NORMALIZATION_PRESETS)}) with its length, or [mean, std]",
        "model",
    )
    mask_padding: bool = setting("never mix in the padding of short clips, which in the published runs is louder than quiet sound", False)

    total_updates: int = setting("updates of the whole run", 200_000)
    warmup_updates: int = setting("updates of the linear warm-up", 25_000)
    learning_rate: float = setting("peak learning rate", 5e-5)
    final_learning_rate: float = setting("learning rate at the end of the cosine", 0.0)
    batch_size: int = setting("clips of a device in one forward pass", 12)
    gradient_accumulation_steps: int = setting("forward passes of an update", 1)
    adam_beta1: float = setting("decay of AdamW's first moment", 0.9)
    adam_beta2: float = setting("decay of AdamW's second moment", 0.95)
    adam_epsilon: float = setting("added to the root of the second moment, before the bias correction", 1e-8)
    weight_decay: float = setting("decoupled weight decay", 0.05)
    decay_all_weights: bool = setting("decay biases, norms and CLS as well, as the published runs did", True)
    max_grad_norm: float = setting("gradients are clipped to this norm", 4.0)
    compile: bool = setting(
        "compile the model with torch.compile: a minute or more at the start, then faster in bf16; the random numbers stay the same", False
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting("autocast; null: as `accelerate launch` says", None)

    seed: int = setting("of everything that is random", 0)
    num_workers: int = setting("processes that read ahead, for each device", 4)
    save_every: int = setting("updates between checkpoints", 5_000)
    keep_last: int = setting("checkpoints that are kept", 2)
    keep_every: int | None = setting("checkpoints of every so many updates are kept for good; null: none", None)
    resume: bool = setting("go on from the latest whole checkpoint in output_dir; false: refuse a folder that has any", True)
    log_every: int = setting("updates between log lines", 100)
    validate_every: int = setting("updates between validations", 5_000)
    trackers: list[str] = setting("of Accelerate: tensorboard, wandb, trackio ...", ["tensorboard"])

    guard_after_updates: int = setting("the collapse guard watches from this update on", 5_000)
    min_target_std: float = setting("floor of the targets' standard deviation", 0.1)
    min_prediction_std: float = setting("floor of the predictions' standard deviation", 0.01)
    min_content_share: float = setting("floor of the targets' content share, which shows collapse to codes of positions", 0.1)
    max_skipped_in_a_row: int = setting("updates in a row with gradients that are not finite before the run stops", 10)

    def __post_init__(self):
        check_normalization(self.normalization)
        if self.normalization != "model" and (given := sorted({"mean", "std"} & self.features.keys())):
            raise UserError(f"normalization is {self.normalization!r}, but features has {', '.join(given)} too: leave one of them out")
        if self.data.last_batch == "keep":
            raise UserError("data.last_batch is 'keep', but updates need full batches: fill them from the next epoch, or drop them")
        for name, least in (
            *(("total_updates", 1), ("warmup_updates", 0), ("batch_size", 1), ("gradient_accumulation_steps", 1), ("num_workers", 0)),
            *(("save_every", 1), ("keep_last", 1), ("log_every", 1), ("validate_every", 1), ("validation_clips", 1)),
            *(("max_skipped_in_a_row", 1), ("seed", 0), ("final_learning_rate", 0), ("weight_decay", 0)),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but a finite number above 0 is expected")
        for name, limit in (("adam_beta1", 1), ("adam_beta2", 1), ("seed", 2**32)):
            if not 0 <= getattr(self, name) < limit:
                raise UserError(f"{name} is {getattr(self, name)}, but a number from 0 to under {limit} is expected")
        if self.warmup_updates >= self.total_updates:
            raise UserError(f"warmup_updates is {self.warmup_updates}, but must be less than total_updates, {self.total_updates}")
