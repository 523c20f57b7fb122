"""Every setting of a pre-training run."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..audio.batches import DataSettings
from ..audio.labelled_data import LabelledDataSettings
from ..audio.normalization import check_normalization
from ..audio.sources import SourceSettings
from ..errors import UserError
from ..feature_extraction_sslam import NORMALIZATION_PRESETS
from ..settings import check_names, setting


@dataclass(kw_only=True)
class ModelSettings:
    """What is trained"""

    stage: Literal[1, 2] = setting("1: unmixed clips only (EAT); 2: unmixed clips and partial mixtures (SSLAM)", 2)
    model: str | None = setting(
        "folder, Hub id or official checkpoint to start from, with decoder and teacher if it has them; null: from scratch", None
    )
    preset: Literal["base", "large"] = setting("sizes of a model from scratch, which model_config may change", "base")
    model_config: dict[str, Any] = setting(
        "fields of SSLAMConfig to change, over those of the stage, and of the preset or of the model to start from; of the latter, weight "
        "and reduction of the global loss are not taken over",
        {},
    )
    feature_extractor: dict[str, Any] = setting(
        "fields of SSLAMFeatureExtractor to change: mean, std, max_length (frames of a clip); over those of the model to start from", {}
    )
    normalization: str | list[float] = setting(
        "mean and standard deviation of log-mels: 'model' (of the model to start from, of feature_extractor, or AudioSet's), 'computed' "
        f"(from the run's recordings), a preset ({', '.join(NORMALIZATION_PRESETS)}) with its length, or [mean, std]",
        "model",
    )
    mask_padding: bool = setting("never mix in the padding of short clips, which in the published runs is louder than quiet sound", False)


@dataclass(kw_only=True)
class OptimizationSettings:
    """Optimisation"""

    max_steps: int = setting("optimiser steps of the whole run", 200_000)
    warmup_steps: float = setting("steps of the linear warm-up, or below 1 a fraction of max_steps", 25_000)
    learning_rate: float = setting("peak learning rate", 5e-5)
    lr_scheduler_kwargs: dict[str, float] = setting("min_lr: learning rate at the end of the cosine", {"min_lr": 0.0})
    per_device_train_batch_size: int = setting("clips per device in a forward pass", 12)
    gradient_accumulation_steps: int = setting("forward passes per step", 1)
    adam_beta1: float = setting("decay of AdamW's first moment", 0.9)
    adam_beta2: float = setting("decay of AdamW's second moment", 0.95)
    adam_epsilon: float = setting("added to the root of the second moment, before the bias correction", 1e-8)
    weight_decay: float = setting("decoupled weight decay", 0.05)
    decay_all_weights: bool = setting("also decay biases, norms and CLS, as the published runs did", True)
    max_grad_norm: float = setting("norm to which gradients are clipped", 4.0)


@dataclass(kw_only=True)
class SpeedSettings:
    """Speed and memory"""

    bf16: bool = setting("autocast to bfloat16; neither bf16 nor fp16: as `accelerate launch` says", False)
    fp16: bool = setting("autocast to float16, on a GPU", False)
    torch_compile: bool = setting("compile the model: a minute or more at the start, then faster in bf16; the same random numbers", False)
    gradient_checkpointing: bool = setting("recompute activations in the backward pass: less memory, more time, the same losses", False)
    dataloader_num_workers: int = setting("processes per device that read ahead", 4)


@dataclass(kw_only=True)
class RunSettings:
    """Checkpoints and logs"""

    save_steps: int = setting("steps between checkpoints", 5_000)
    save_total_limit: int | None = setting("number of checkpoints to keep, the latest ones; null: all", 2)
    keep_steps: int | None = setting("keep the checkpoints of every so many steps for good; null: none", None)
    resume_from_checkpoint: bool | str = setting(
        "true: resume from the latest whole checkpoint in output_dir, if there is one; false: output_dir must hold none; or the folder of "
        "a checkpoint",
        True,
    )
    logging_steps: int = setting("steps between log lines", 100)
    eval_steps: int = setting("steps between validations", 5_000)
    report_to: str | list[str] = setting("trackers of Accelerate: tensorboard, wandb, trackio ..., or none", "tensorboard")


@dataclass(kw_only=True)
class GuardSettings:
    """Collapse guard"""

    guard_after_steps: int = setting("first step at which the floors apply", 5_000)
    min_target_std: float = setting("floor of the targets' standard deviation", 0.1)
    min_prediction_std: float = setting("floor of the predictions' standard deviation", 0.01)
    min_content_share: float = setting("floor of content_share: near 0, targets depend only on the position of a patch", 0.1)
    max_skipped_steps: int = setting("consecutive steps with gradients that are not finite after which the run stops", 10)


@dataclass(kw_only=True)
class StudentProbeSettings(LabelledDataSettings):
    """Labelled clips of the probe"""

    fold_column: str | None = setting("column whose values are held out in turn; null: train_split against test_split", "fold")
    test_folds: list[int | str] = setting("values of fold_column to hold out in turn; empty: each", [])
    train_split: str = setting("split to train on, unless fold_column is set", "train")
    per_device_eval_batch_size: int = setting("clips in a forward pass", 16)
    inverse_regularization: float = setting("inverse of the L2 regularization of logistic regressions (C of scikit-learn)", 1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_eval_batch_size < 1 or not self.inverse_regularization > 0:
            raise UserError(
                f"probe.per_device_eval_batch_size is {self.per_device_eval_batch_size} and probe.inverse_regularization "
                f"{self.inverse_regularization:g}, but both must be positive"
            )


@dataclass(kw_only=True)
class PreTrainingSettings(ModelSettings, OptimizationSettings, SpeedSettings, RunSettings, GuardSettings):
    """Data and output

    All settings of a pre-training run. Defaults are those of stage 2 of the published base model (SSLAM, arXiv 2506.12222).

    Raises:
        UserError: if a value is out of range, or two settings contradict each other.
    """

    output_dir: str = setting("folder for checkpoints, logs and, at the end, the model")
    data_dir: str | None = setting("folder of recordings, in place of data.sources: every audio file below it", None)
    data: DataSettings = setting("recordings to train on, and how they are read", DataSettings())
    validation: DataSettings | None = setting("recordings of the validation loss", None)
    validation_clips: int = setting("number of validation clips: the first ones", 96)
    probe: StudentProbeSettings | None = setting("labelled clips on which the frozen student is probed during the run", None)
    probe_every: int | None = setting("steps between linear probes of the student; null: never", None)
    seed: int = setting("random seed for weights, masks, mixtures and the order of clips", 0)

    def __post_init__(self):
        if self.data_dir is not None:
            self.data = replace(self.data, sources=[SourceSettings("folder", self.data_dir)])
        if not self.data.sources:
            raise UserError("there is nothing to train on: give a folder of recordings as data_dir, or list data.sources in a recipe")
        if self.data.last_batch == "keep":
            raise UserError("data.last_batch is 'keep', but steps need full batches: choose another value")
        if self.probe_every is not None and self.probe is None:
            raise UserError(
                f"probe_every is {self.probe_every}, but there are no labelled clips to probe on: set probe.data_dir, or leave it out"
            )
        check_normalization(self.normalization)
        if self.normalization != "model" and (given := sorted({"mean", "std"} & self.feature_extractor.keys())):
            raise UserError(
                f"normalization is {self.normalization!r}, but feature_extractor has {', '.join(given)} too: leave one of them out"
            )
        if self.bf16 and self.fp16:
            raise UserError("bf16 and fp16 are both true: choose one")
        check_names(self.lr_scheduler_kwargs, ["min_lr"], "lr_scheduler_kwargs.")
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self.report_to = [name for name in trackers if name != "none"]
        self._check_ranges()

    def _check_ranges(self) -> None:
        counts = (
            *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "validation_clips"),
            *("save_steps", "save_total_limit", "keep_steps", "logging_steps", "eval_steps", "probe_every", "max_skipped_steps"),
        )
        limits: dict[str, tuple[float, float]] = {
            **dict.fromkeys(counts, (1, math.inf)),
            **dict.fromkeys(("warmup_steps", "weight_decay", "dataloader_num_workers"), (0, math.inf)),
            **{"adam_beta1": (0, 1), "adam_beta2": (0, 1), "seed": (0, 2**32)},
        }
        for name, (least, limit) in limits.items():
            if (value := getattr(self, name)) is not None and not least <= value < limit:
                below = f" and less than {limit}" if limit < math.inf else ""
                raise UserError(f"{name} is {value}, but must be at least {least}{below}")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but a finite number above 0 is expected")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise UserError(f"lr_scheduler_kwargs.min_lr is {self.min_lr}, but must lie between 0 and learning_rate, {self.learning_rate}")
        if self.num_warmup_steps >= self.max_steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps:g}, but must be less than max_steps, {self.max_steps}: set it too, for example "
                "--warmup_steps 0.1, a tenth of all steps"
            )

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up, as `TrainingArguments` counts them."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.max_steps * self.warmup_steps)

    @property
    def min_lr(self) -> float:
        """Learning rate at the end of the cosine."""
        return self.lr_scheduler_kwargs.get("min_lr", 0.0)

    @property
    def stage_name(self) -> str:
        """The stage, for logs and cards."""
        return {1: "stage 1 (EAT)", 2: "stage 2 (SSLAM)"}[self.stage]
