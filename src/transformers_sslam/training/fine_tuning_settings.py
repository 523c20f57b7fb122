"""Every setting of a fine-tuning run."""

import inspect
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import NORMALIZATION_PRESETS
from ..settings import check_names, setting
from .augmentation import AugmentationSettings
from .normalization import check_normalization


@dataclass
class FineTuningSettings:
    """Settings of `scripts/finetune.py`. Optimisation defaults are what the published recipes share (SSLAM, arXiv 2506.12222)."""

    data_dir: str = setting("folder of the clips, or, with layout=hub, id of a data set")
    layout: str = setting("how the clips are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several: configuration on the Hub, scene of SPASS", None)
    streaming: bool = setting("read clips as they are asked for, without holding them; needs total_updates and classes declared", False)
    output_dir: str = setting("folder for the model, its settings and its results", "runs/finetune")
    overwrite: bool = setting("whether to replace a model that output_dir holds already", False)

    label_column: str = setting("column of the labels; 'label' is also what class folders are read into", "label")
    label_separator: str | None = setting(
        "between the labels of a clip that has several; makes the task multi-label, as a column of lists does", None
    )
    train_split: str = setting("split to train on, unless fold_column is set", "train")
    eval_split: str = setting("split to evaluate on, unless fold_column is set", "test")
    fold_column: str | None = setting("column to choose rows by, whatever their split", None)
    train_folds: list[int | str] = setting("its values to train on", [])
    eval_folds: list[int | str] = setting("its values to evaluate on", [])
    evaluate: bool = setting("whether to evaluate at the end; without, all that is needed are clips to train on", True)
    cross_validate: bool = setting("hold out each value of fold_column in turn, or each of eval_folds, and train on all others", False)
    seeds: list[int] = setting("one run for each of these; empty: one run with `seed`", [])
    clips_per_class: int | None = setting("train on so many clips of each class, drawn by the seed; null: on all", None)
    max_unreadable: float = setting(
        "fraction of unreadable files, of either part, above which the run stops; fewer are left out and reported", 0.01
    )
    features: Literal["worker", "device"] = setting("where log-mels are computed, a batch at a time", "worker")
    memory_gb: float = setting("memory for decoded clips; what does not fit is decoded each time, 0 for none", 4.0)

    model: str | None = setting(
        "checkpoint to start from, a folder or Hub id, or an official SSLAM or EAT checkpoint, which is converted; null: from scratch", None
    )
    model_config: dict[str, Any] = setting("arguments of SSLAMConfig that differ from the checkpoint's, or from the base model's", {})
    attn_implementation: str | None = setting(
        "sdpa, eager, flash_attention_2 ...; null: Transformers' choice. For small models on a CPU in bf16 eager is the faster", None
    )
    freeze_encoder: bool = setting(
        "train only the classifier's norm and linear layer; the encoder then drops nothing but what model_config says", False
    )
    max_length: int | None = setting(
        "frames (10 ms) that a clip is padded or cut to, a multiple of 16; null: the feature extractor's", None
    )
    normalization: str | list[float] = setting(
        "mean and deviation of log-mels: 'model' (the checkpoint's, or AudioSet's), 'computed' (from the training clips), a preset "
        f"({', '.join(NORMALIZATION_PRESETS)}) with its length, or [mean, std]",
        "model",
    )
    augmentation: AugmentationSettings = setting("of the training clips", AugmentationSettings())

    class_balanced: bool = setting("draw training clips, with replacement, so that rare classes come as often as common ones", False)
    clips_per_epoch: int | None = setting("clips of an epoch; null: as many as there are", None)
    epochs: float = setting("passes over the training clips", 20.0)
    total_updates: int | None = setting("updates of the run, in place of epochs", None)
    batch_size: int = setting("clips a step, on each device", 48)
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy"] = setting(
        "auto: binary cross-entropy where a clip may have several classes, cross-entropy otherwise", "auto"
    )
    label_smoothing: float = setting("share of each target that is spread evenly over all classes", 0.0)
    learning_rate: float = setting("peak of the schedule, a linear warm-up and a cosine", 5e-5)
    min_learning_rate: float = setting("end of the cosine", 1e-6)
    warmup_share: float = setting("share of the steps spent on the warm-up", 0.1)
    layer_decay: float = setting("ratio of each block's learning rate to that of the block above it; used only with `model`", 0.65)
    weight_decay: float = setting("of AdamW, on all weights but those with one axis (biases and norms)", 0.05)
    seed: int = setting("of weights, order of clips, augmentation, drop path", 0)
    trainer: dict[str, Any] = setting(
        "any other argument of transformers.TrainingArguments, such as bf16, dataloader_num_workers, or max_grad_norm (1.0 there; what was "
        "published names none)",
        {},
    )

    def __post_init__(self):
        self._check_data()
        check_normalization(self.normalization)
        for name in ("epochs", "total_updates", "batch_size", "clips_per_epoch", "clips_per_class"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} is {value:g}, but must be positive")
        if not self.learning_rate >= self.min_learning_rate >= 0 or not self.learning_rate:
            raise UserError(
                f"learning_rate is {self.learning_rate:g} and min_learning_rate {self.min_learning_rate:g}, but the cosine falls from the "
                "first, which must be positive, to the second, which must not be negative"
            )
        if self.weight_decay < 0:
            raise UserError(f"weight_decay is {self.weight_decay:g}, but must be positive, or 0 for none")
        if (lowest := min([self.seed, *self.seeds])) < 0:
            raise UserError(f"seed or one of seeds is {lowest}, but random generators take none below 0")
        for name in ("max_unreadable", "warmup_share", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name):g}, but a share lies in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay:g}, but a ratio of learning rates lies in (0, 1], 1 for equal rates")
        if self.freeze_encoder and self.model is None:
            raise UserError("freeze_encoder is true, but model is null: an encoder that nothing has trained is not worth freezing")
        check_names(self.model_config, inspect.get_annotations(SSLAMConfig).keys() - {"padding_value"}, "model_config.")
        check_names(self.trainer, [f.name for f in fields(TrainingArguments) if f.init], "trainer.")
        if taken := sorted(self.trainer.keys() & self.own_trainer_arguments().keys()):
            raise UserError(f"trainer.{taken[0]} cannot be set there, because the program or a setting of its own decides it: see --help")
        if not self.evaluate and self.trainer.get("eval_strategy", "no") not in ("no", False):
            raise UserError(f"evaluate is false, but trainer.eval_strategy is {self.trainer['eval_strategy']!r}: leave one of them out")

    def _check_data(self) -> None:
        if self.fold_column is None and (self.train_folds or self.eval_folds or self.cross_validate):
            raise UserError("train_folds, eval_folds or cross_validate are set, but fold_column, which they choose from, is not")
        if not self.evaluate and (self.eval_folds or self.cross_validate):
            raise UserError("evaluate is false, but eval_folds or cross_validate are set, which choose what to evaluate on")
        for name, values in (("seeds", self.seeds), ("eval_folds", self.eval_folds)):
            if len({str(value) for value in values}) < len(values):
                raise UserError(f"{name} is {values}, but the same twice is one run, or one fold: give each once")
        if self.fold_column is None and self.evaluate and self.train_split == self.eval_split:
            raise UserError(
                f"train_split and eval_split are both {self.train_split!r}: evaluate on clips that training has not seen, choose by "
                "fold_column, or set evaluate=false"
            )
        if self.cross_validate and self.train_folds:
            raise UserError("train_folds is set, but with cross_validate a run trains on every fold that it does not evaluate on")
        if both := {str(fold) for fold in self.train_folds} & {str(fold) for fold in self.eval_folds}:
            raise UserError(
                f"fold {', '.join(sorted(both))} is both in train_folds and in eval_folds: evaluate on clips that training has not seen"
            )
        if self.streaming:
            refused = {
                "total_updates": self.total_updates is None,
                "fold_column": self.fold_column is not None,
                "class_balanced": self.class_balanced,
                "clips_per_epoch": self.clips_per_epoch is not None,
                "clips_per_class": self.clips_per_class is not None,
                "normalization": self.normalization == "computed",
            }
            for name in (name for name, wrong in refused.items() if wrong):
                wanted = "must be set" if name == "total_updates" else "cannot be had"
                raise UserError(f"{name} is {getattr(self, name)!r}, but of a stream, whose clips are not known before, it {wanted}")

    def own_trainer_arguments(self) -> dict[str, Any]:
        """The arguments of `TrainingArguments` that settings of other names, or the program itself, decide."""
        return {
            "output_dir": self.output_dir,
            "num_train_epochs": self.epochs,
            "max_steps": -1 if self.total_updates is None else self.total_updates,
            "ignore_data_skip": True,  # the stream resumes where it was by itself
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": self.min_learning_rate},
            "warmup_steps": self.warmup_share,
            "weight_decay": self.weight_decay,
            "label_smoothing_factor": 0.0,
            "seed": self.seed,
            "remove_unused_columns": False,
            "optim": "adamw_torch_fused",
            "resume_from_checkpoint": None,
            "load_best_model_at_end": False,  # by the clips that the result is told of, which would flatter it
        }

    def training_arguments(self) -> TrainingArguments:
        """What `Trainer` takes; `trainer` may override the defaults here."""
        defaults = {
            "adam_beta2": 0.95,
            "save_strategy": "steps",
            "save_steps": 0.05,  # of the run
            "save_total_limit": 2,
            "bf16": not {"fp16", "use_cpu"} & {name for name, value in self.trainer.items() if value}
            and torch.cuda.is_available()
            and torch.cuda.is_bf16_supported(),
            "logging_strategy": "epoch",
            "logging_nan_inf_filter": False,  # which would report a loss of NaN as 0
            "report_to": "none",
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        with as_user_error("TrainingArguments refuses these settings"):
            return TrainingArguments(**{**defaults, **self.trainer, **self.own_trainer_arguments()})


__all__ = ["FineTuningSettings"]
