"""Every setting of a fine-tuning run: those of `transformers.TrainingArguments`, and those of the data, the model and the recipe."""

import inspect
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments, get_scheduler

from ..attention_sslam import CPU_HALF_PRECISION_ATTENTION
from ..audio.labelled_data import LabelledDataSettings, check_memory
from ..audio.normalization import check_normalization
from ..audio.rows import as_folds
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import NORMALIZATION_PRESETS
from ..settings import check_names, setting, settings_dict
from .augmentation import AugmentationSettings
from .lora import LoraSettings, check_peft
from .mixtures import MixingSettings


MIN_LR = {"min_lr": 1e-6}
OWN_LOADER = "clips come from a stream of their own, which resumes exactly"
OWN_EVALUATION = "metrics are computed from the float32 scores of all clips"
LANGUAGE = "it is made for language models"
# Arguments that other code here decides, and why. An argument that would be ignored is rejected.
UNSUPPORTED = {
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"), OWN_LOADER),
    **dict.fromkeys(("dataloader_in_order", "accelerator_config", "ignore_data_skip"), OWN_LOADER),
    **dict.fromkeys(("group_by_length", "train_sampling_strategy"), f"{OWN_LOADER}; class_balanced and clips_per_epoch change its order"),
    "auto_find_batch_size": "a run whose batch size changes cannot be resumed exactly; lower per_device_train_batch_size",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed from",
    "enable_jit_checkpoint": "a run that is stopped resumes from the checkpoint before; lower save_steps",
    "save_on_each_node": "all processes of a run write to one output_dir",
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "include_for_metrics", "eval_accumulation_steps"), OWN_EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "bf16_full_eval", "fp16_full_eval"), OWN_EVALUATION),
    "optim_args": "the optimizer has settings of its own, such as adam_beta2 and weight_decay",
    "optim_target_modules": "the weights of each layer have a learning rate of their own; set layer_decay",
    **dict.fromkeys(("label_names", "length_column_name"), "the column of the labels is label_column"),
    **dict.fromkeys(("neftune_noise_alpha", "use_liger_kernel", "include_num_input_tokens_seen"), LANGUAGE),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "every device holds the whole model; run more processes"),
    "do_predict": "the scores of the test part are always written to scores.npz",
}
# Settings of a machine, its logs, or an account on it: neither saved nor compared with those of another run.
MACHINE_SETTINGS = {
    *("use_cpu", "tf32", "local_rank", "dataloader_pin_memory", "torch_empty_cache_steps", "skip_memory_metrics", "debug"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
    *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_dir"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
    *("overwrite_output_dir", "resume_from_checkpoint"),
}


CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")  # of torch.utils.checkpoint
COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
# Fields of the configuration that follow from the extractor, or that training ends.
DECIDED = {"padding_value", "event_detection", "calibration"}
DEFAULTS = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TrainingArguments)}


@dataclass(kw_only=True)
class TrainingDataSettings(LabelledDataSettings):
    """Task, and parts of the labelled clips"""

    task: Literal["classification", "events"] = setting(
        "classification: labels of clips; events: labels of time steps, from a column of events with onset and offset, or of clips alone",
        "classification",
    )
    mixing: MixingSettings = setting("training clips that are mixed anew in each epoch; labels must be lists, or events", MixingSettings())
    hard_labels: bool = setting(
        "with task events: a step has a label if an event covers at least half of it; otherwise the fraction that it covers", False
    )
    streaming: bool = setting("read clips when they are needed, without listing them first; needs max_steps and declared classes", False)
    train_split: str = setting("split to train on, unless fold_column is set", "train")
    validation_split: str | None = setting("split to validate on during training; null: none", None)
    train_folds: list[int | str] = setting("values of fold_column to train on", [])
    validation_folds: list[int | str] = setting("values of fold_column to validate on during training", [])
    cross_validate: bool = setting("hold out each value of fold_column in turn, or each of test_folds, and train on all others", False)
    clips_per_class: int | None = setting("number of training clips of each class, drawn by the seed; null: all", None)


@dataclass(kw_only=True)
class ModelSettings:
    """Model and its input"""

    model: str | None = setting(
        "checkpoint to start from: a folder, a Hub id, or an official SSLAM or EAT checkpoint; null: random weights", None
    )
    model_config: dict[str, Any] = setting("fields of SSLAMConfig to change, over the checkpoint's or the base model's", {})
    attn_implementation: str | None = setting("sdpa, eager, flash_attention_2 ...; null: the fastest for device and precision", None)
    freeze_encoder: bool = setting(
        "train only the classifier's norm and linear layer; the encoder then drops only what model_config says", False
    )
    lora: LoraSettings = setting("low-rank adapters, trained in place of the encoder's weights", LoraSettings())
    max_length: int | None = setting(
        "frames (10 ms) that a clip is padded or cut to, a multiple of 16; null: the feature extractor's", None
    )
    normalization: str | list[float] = setting(
        "mean and standard deviation of log-mels: 'model' (the checkpoint's, or AudioSet's), 'computed' (from the training clips), "
        f"a preset ({', '.join(NORMALIZATION_PRESETS)}) with its length, or [mean, std]",
        "model",
    )
    features: Literal["worker", "device"] = setting("where log-mels are computed, a batch at a time", "worker")


@dataclass(kw_only=True, repr=False)
class RecipeArguments(TrainingArguments):
    """Training, with defaults of the published recipes"""

    output_dir: str = setting("folder for the model, its settings and its results", "runs/finetune")
    overwrite_output_dir: bool = setting("whether to replace a model that output_dir holds already", False)
    resume_from_checkpoint: bool | str = setting(  # type: ignore[assignment]
        "true: resume from the latest whole checkpoint in output_dir, if there is one; false: there must be none; or a checkpoint's folder",
        True,
    )
    do_train: bool = setting("always true: to evaluate an existing model use `sslam evaluate`", True)
    do_eval: bool = setting("whether to evaluate the test part at the end; without, it is not needed", True)
    eval_strategy: str | None = setting(  # type: ignore[assignment]
        "when to evaluate the validation part during training: epoch, steps or no; null: each epoch, if there is one", None
    )
    early_stopping_patience: int | None = setting(
        "stop after so many evaluations of the validation part without a better metric_for_best_model; null: never", None
    )
    seed: int = setting("random seed for weights, order of clips, augmentation and drop path", 0)
    seeds: list[int] = setting("one run for each of these seeds; empty: one run with `seed`", [])
    augmentation: AugmentationSettings = setting("augmentation of training clips", AugmentationSettings())
    class_balanced: bool = setting("draw training clips, with replacement, so that all classes are equally frequent", False)
    clips_per_epoch: int | None = setting("number of clips in an epoch; null: as many as there are", None)
    num_train_epochs: float = setting("passes over the training clips, unless max_steps is set", 20.0)
    per_device_train_batch_size: int = setting("clips per device in a forward pass of training", 48)
    per_device_eval_batch_size: int = setting("clips per device in a forward pass of evaluation", 48)
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy"] = setting(
        "auto: binary cross-entropy where a clip may have several classes, cross-entropy otherwise", "auto"
    )
    learning_rate: float = setting("peak learning rate", 5e-5)
    warmup_steps: float = setting("steps of the linear warm-up, or below 1 a fraction of all steps", 0.1)
    lr_scheduler_type: str = setting("schedule of the learning rate", "cosine_with_min_lr")
    lr_scheduler_kwargs: dict[str, Any] = setting("arguments of the schedule; min_lr: learning rate at its end", MIN_LR)
    layer_decay: float = setting("ratio of each block's learning rate to that of the block above it; needs `model`", 0.65)
    ema_decay: float | None = setting(
        "decay of an exponential moving average of the weights, which is evaluated and saved in place of the last ones; it rises to it "
        "as (1 + step) / (10 + step); null: no average",
        None,
    )
    weight_decay: float = setting("of AdamW, on all weights but those with one axis (biases and norms)", 0.05)
    adam_beta2: float = setting("decay of AdamW's second moment", 0.95)
    bf16: bool | None = setting("autocast to bfloat16; null: if the GPU supports it, unless fp16 or use_cpu is set", None)  # type: ignore[assignment]
    save_steps: float = setting("steps between checkpoints, or below 1 a fraction of all steps", 0.05)
    save_total_limit: int | None = setting("number of checkpoints to keep, the latest ones and the best; null: all", 2)
    logging_strategy: str = setting("when to log the training loss: epoch, steps or no", "epoch")
    logging_nan_inf_filter: bool = setting("whether to log a loss of NaN as 0", False)
    report_to: str | list[str] = setting("trackers: tensorboard, wandb ..., or none", "none")
    hub_strategy: str = setting("when to push, with push_to_hub: end, every_save, checkpoint or all_checkpoints", "end")


@dataclass(kw_only=True, repr=False)
class FineTuningSettings(TrainingDataSettings, ModelSettings, RecipeArguments):
    """Fine-tuning

    All settings of a fine-tuning run, as they were given. Defaults are those of the published recipes (SSLAM, arXiv 2506.12222).

    Raises:
        UserError: if a value is out of range, two settings contradict each other, or one has no effect here.
    """

    def __post_init__(self):
        """Values stay as they were given, so that they can be saved and compared; [`training_arguments`] resolves them."""
        self._check_ranges()
        self._check_data()
        self._check_model()
        self._check_training()

    def training_arguments(self) -> "FineTuningSettings":
        """A copy for `Trainer`, with everything that depends on other values or on this machine filled in."""
        arguments = object.__new__(type(self))
        arguments.__dict__.update(self.__dict__)
        if self.bf16 is None:
            arguments.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if getattr(self, "activation_checkpointing", False) is None:  # the newer name: the older one alone gives a warning
            arguments.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.lora.r:
            check_peft()
            arguments.ddp_find_unused_parameters = bool(self.ddp_find_unused_parameters)  # null: of PEFT's models Trainer would ask for it
        if self.eval_strategy is None:
            arguments.eval_strategy = "epoch" if "validation" in self.parts else "no"
        if self.load_best_model_at_end and self.save_strategy == DEFAULTS["save_strategy"] and arguments.eval_strategy == "epoch":
            arguments.save_strategy = "epoch"  # the best model must have been saved when it was evaluated
        arguments.ignore_data_skip = True  # the stream itself resumes at its position
        arguments.restore_callback_states_from_checkpoint = True  # early stopping resumes its count
        if self.lr_scheduler_kwargs == MIN_LR and not self.lr_scheduler_type.endswith("with_min_lr"):
            arguments.lr_scheduler_kwargs = {}  # the default is that of the default schedule
        with as_user_error("TrainingArguments rejects these settings"):
            TrainingArguments.__post_init__(arguments)
        if self.attn_implementation is None and arguments.bf16 and arguments.device.type == "cpu":
            arguments.attn_implementation = CPU_HALF_PRECISION_ATTENTION
        with as_user_error(f"lr_scheduler_type is {self.lr_scheduler_type!r}, which cannot be used with lr_scheduler_kwargs"):
            unused = torch.optim.SGD([torch.zeros(1)])
            get_scheduler(arguments.lr_scheduler_type, unused, 0, 1, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs)
        return arguments

    def to_save(self) -> dict[str, Any]:
        """The settings that define a run, for a file beside its model: without `MACHINE_SETTINGS`, and with those arguments of
        `TrainingArguments` alone that differ from its defaults, or have other defaults here, so that other versions of Transformers can
        read the file."""
        own = {name for cls in type(self).__mro__[:-1] if cls is not TrainingArguments for name in inspect.get_annotations(cls)}
        return {
            name: value
            for name, value in settings_dict(self).items()
            if name not in MACHINE_SETTINGS and (name in own or value != DEFAULTS[name])
        }

    def to_dict(self) -> dict[str, Any]:
        """As [`TrainingArguments.to_dict`], for trackers."""
        groups = {"augmentation": asdict(self.augmentation), "mixing": asdict(self.mixing), "lora": asdict(self.lora)}
        return {**super().to_dict(), **groups}

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: `Trainer` pickles its arguments beside every checkpoint, and pushes them."""
        return {**self.__dict__, "hub_token": None}

    @property
    def parts(self) -> dict[str, Any]:
        """What each part of the data is selected by: `"training"` and, where there are any, `"validation"` and `"test"`, to their split
        or, with `fold_column`, the values of it."""
        by = "split" if self.fold_column is None else "folds"
        validation = getattr(self, f"validation_{by}")
        parts = {"training": getattr(self, f"train_{by}")} | ({"validation": validation} if validation else {})
        return parts | ({"test": getattr(self, f"test_{by}")} if self.do_eval else {})

    def _check_data(self) -> None:
        self.train_folds, self.validation_folds, self.test_folds = map(as_folds, (self.train_folds, self.validation_folds, self.test_folds))
        if self.fold_column is None and (self.train_folds or self.validation_folds or self.test_folds or self.cross_validate):
            raise UserError("folds or cross_validate are set, but fold_column, which they choose from, is not")
        if self.fold_column is not None and self.validation_split is not None:
            raise UserError("validation_split and fold_column are both set: choose the validation part by validation_folds")
        if self.cross_validate and self.train_folds:
            raise UserError("train_folds and cross_validate are both set, but cross-validation trains on every fold not held out")
        owner: dict[str, str] = {}
        for part, chosen in self.parts.items():
            for value in [chosen] if isinstance(chosen, str) else map(str, chosen):
                if (other := owner.setdefault(value, part)) != part:
                    raise UserError(f"{value!r} is both in the {other} and in the {part} part: keep them apart")
        if len(set(self.test_folds)) < len(self.test_folds):
            raise UserError(f"test_folds is {self.test_folds}, but a fold given twice is one fold: give each once")
        if self.streaming:
            self._check_stream()
        self._check_task()

    def _check_task(self) -> None:
        if self.task == "classification":
            if self.hard_labels:
                raise UserError("hard_labels is set, but task is 'classification', where it has no effect: set task to events")
            if self.streaming and self.mixing.sounds:
                raise UserError("streaming is true, but mixing.sounds replace clips of a table: set it to false")
            return
        for name, value in (("label_smoothing_factor", self.label_smoothing_factor), ("clips_per_class", self.clips_per_class)):
            if value:
                raise UserError(f"{name} is {value!r}, but task is 'events', where a clip may have several labels: leave it out")
        if self.model_config.get("patch_drop_rate"):
            raise UserError("model_config.patch_drop_rate is set, but task is 'events', where each step needs its patches: leave it out")
        if (pooling := self.model_config.get("classifier_pooling", "cls")) not in ("cls", "mean"):  # which some shared recipes have
            raise UserError(
                f"model_config.classifier_pooling is {pooling!r}, but task is 'events', whose scores of a clip are those of its steps: "
                "leave it out"
            )
        if self.loss == "cross_entropy":
            raise UserError("loss is 'cross_entropy', but task is 'events', where labels overlap: leave it out")
        if self.streaming:
            raise UserError("streaming is true, but task is 'events', which needs the table of all events: set it to false")

    def _check_stream(self) -> None:
        if self.max_steps < 1:
            raise UserError(f"max_steps is {self.max_steps}, but a stream, whose clips are not known in advance, needs a positive number")
        for name in ("fold_column", "class_balanced", "clips_per_epoch", "clips_per_class"):
            if value := getattr(self, name):
                raise UserError(f"{name} is {value!r}, but the clips of a stream are not known in advance: leave one of them out")
        if self.normalization == "computed":
            raise UserError("normalization is 'computed', but the clips of a stream are not known in advance: give mean and std")

    def _check_model(self) -> None:
        check_normalization(self.normalization)
        check_names(self.model_config, inspect.get_annotations(SSLAMConfig).keys() - DECIDED, "model_config.")
        if self.freeze_encoder and self.model is None:
            raise UserError("freeze_encoder is true, but model is null: random weights are not useful features, give a checkpoint")
        self._check_lora()

    def _check_lora(self) -> None:
        if not self.lora.r:
            if self.lora != LoraSettings():
                raise UserError("lora is set, but lora.r is 0, so that there are no adapters: set lora.r, or leave lora out")
            return
        if self.model is None:
            raise UserError(f"lora.r is {self.lora.r}, but model is null: adapters need a pre-trained encoder, give a checkpoint")
        if self.freeze_encoder:
            raise UserError(f"freeze_encoder is true, but lora.r is {self.lora.r}, which trains adapters in the encoder: leave one out")
        if self.push_to_hub and not self.lora.merge:
            raise UserError("push_to_hub is true, but lora.merge is false, so that there is no whole model to push: leave one out")

    def _check_training(self) -> None:
        for name, why in UNSUPPORTED.items():
            if (value := getattr(self, name, None)) not in (DEFAULTS.get(name), None):
                raise UserError(f"{name} is {value!r}, but cannot be set here: {why}")
        check_names(self.gradient_checkpointing_kwargs or {}, CHECKPOINTING, "gradient_checkpointing_kwargs.")
        if self.torch_compile_mode not in COMPILE_MODES:
            raise UserError(
                f"torch_compile_mode is {self.torch_compile_mode!r}, but one of {', '.join(map(str, COMPILE_MODES))} is expected"
            )
        if not self.do_train:
            raise UserError("do_train is false, but this command trains: to evaluate an existing model use `sslam evaluate`")
        if not self.do_eval and self.eval_strategy not in ("no", None) and "validation" not in self.parts:
            raise UserError(f"do_eval is false, but eval_strategy is {self.eval_strategy!r}: leave one out, or give a validation part")
        if not self.do_eval and (self.test_folds or self.cross_validate):
            raise UserError("do_eval is false, but test_folds or cross_validate are set, which choose what to evaluate on")
        deciding: dict[str, list[Any]] = {
            "load_best_model_at_end": [True],
            "save_strategy": ["best"],
            "lr_scheduler_type": ["reduce_lr_on_plateau", "greedy"],
        }
        for name, values in deciding.items():
            if getattr(self, name) in values and "validation" not in self.parts:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, but there is no validation part to decide by (by the test part the result would "
                    "be too good): set validation_split or validation_folds"
                )
        if "validation" in self.parts and self.eval_strategy == "no":
            raise UserError(
                "a validation part is chosen, but eval_strategy is 'no', so that nothing would use it: set eval_strategy to epoch or "
                "steps, or leave validation_split and validation_folds out"
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise UserError(
                f"early_stopping_patience is {self.early_stopping_patience}, but load_best_model_at_end is false: set it, with "
                "eval_strategy and a validation part"
            )
        if self.label_smoothing_factor and self.label_separator:
            raise UserError("label_smoothing_factor is set, but it spreads one label over all classes, and label_separator gives several")

    def _check_ranges(self) -> None:
        positive = (
            *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "clips_per_epoch", "clips_per_class", "early_stopping_patience"),
        )
        for name in (*positive, *("save_steps", "eval_steps", "logging_steps")):
            value = getattr(self, name)
            if value is not None and not value > 0 and (name, value) != ("max_steps", -1):
                raise UserError(f"{name} is {value:g}, but must be positive")
        min_lr = self.lr_scheduler_kwargs.get("min_lr", 0.0)
        if isinstance(min_lr, bool) or not isinstance(min_lr, (int, float)):
            raise UserError(f"lr_scheduler_kwargs.min_lr is {min_lr!r}, but a number is expected")
        if not self.learning_rate >= min_lr >= 0 or not self.learning_rate:
            raise UserError(
                f"learning_rate is {self.learning_rate:g} and lr_scheduler_kwargs.min_lr {min_lr:g}, but the schedule falls from "
                "the first, which must be positive, to the second, which must not be negative"
            )
        if self.weight_decay < 0:
            raise UserError(f"weight_decay is {self.weight_decay:g}, but must be positive, or 0 for none")
        if wrong := [seed for seed in (self.seed, *self.seeds) if not 0 <= seed < 2**32]:
            raise UserError(f"seed or one of seeds is {wrong[0]}, but a number from 0 to 2**32 - 1 is expected")
        if self.dataloader_num_workers < 0:
            raise UserError(f"dataloader_num_workers is {self.dataloader_num_workers}, but a number from 0 is expected")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}, but a seed given twice is one run: give each once")
        for name in ("max_unreadable", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name):g}, but a fraction in [0, 1) is expected")
        check_memory(self.memory_gb)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay:g}, but a fraction in [0, 1) is expected, or null for no average")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay:g}, but a ratio in (0, 1] is expected, 1 for equal rates")
