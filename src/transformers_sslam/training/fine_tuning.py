"""Fine-tune a SSLAM classifier, pre-trained or from scratch, on a labelled folder of audio, with Transformers' `Trainer`."""

import inspect
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from ..configuration_sslam import SSLAMConfig
from ..data.labelled import (
    LabelledRows,
    Waveforms,
    choose_classes,
    encode_labels,
    keep_rows,
    load_audio_folder,
    read_rows,
    select_folds,
    select_split,
)
from ..evaluation.metrics import Accuracy, MeanAveragePrecision
from ..feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from ..hub import add_remote_code, write_model_card
from ..modeling_sslam import SSLAMForAudioClassification
from .augmentation import AugmentationSettings, augment_waveform
from .settings import SettingsError, check_names, refusals_as_settings_errors, setting, write_settings


logger = logging.get_logger(__name__)

# What a checkpoint decides and a recipe cannot change. (Its position table is loaded, so `max_length` belongs here too.)
ARCHITECTURE = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps", "qkv_bias"),
    *("patch_size", "num_mel_bins", "max_length"),
}


@dataclass
class FineTuningSettings:
    """Everything a fine-tuning run depends on. Optimisation defaults are the published ones (SSLAM, arXiv 2506.12222)."""

    data_dir: str = setting("folder of the clips, an 'audiofolder' of the datasets library")
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
    max_unreadable: float = setting(
        "share of unreadable files, of either part, above which the run stops; fewer are left out and reported", 0.01
    )
    memory_gb: float = setting("memory for decoded clips; what does not fit is decoded each time", 4.0)

    model: str | None = setting("checkpoint to start from, a folder or Hub id; null: from scratch", None)
    model_config: dict[str, Any] = setting("arguments of SSLAMConfig that differ from the checkpoint's, or from the base model's", {})
    max_length: int | None = setting(
        "frames (10 ms) that a clip is padded or cut to, a multiple of 16; null: the feature extractor's", None
    )
    normalization: str | list[float] = setting(
        "mean and deviation of log-mels: 'model' (the checkpoint's, or AudioSet's), 'computed' (from the training clips), a preset "
        f"({', '.join(NORMALIZATION_PRESETS)}) with its length, or [mean, std]",
        "model",
    )
    augmentation: AugmentationSettings = setting("of the training clips", AugmentationSettings())

    epochs: float = setting("passes over the training clips", 20.0)
    batch_size: int = setting("clips a step, on each device", 48)
    learning_rate: float = setting("peak of the schedule, a linear warm-up and a cosine", 5e-5)
    min_learning_rate: float = setting("end of the cosine", 1e-6)
    warmup_share: float = setting("share of the steps spent on the warm-up", 0.1)
    weight_decay: float = setting("of AdamW, on all weights but biases and norms", 0.05)
    seed: int = setting("of weights, order of clips, augmentation, drop path", 0)
    trainer: dict[str, Any] = setting("any other argument of transformers.TrainingArguments, such as bf16 or dataloader_num_workers", {})

    def __post_init__(self):
        presets = ("model", "computed", *NORMALIZATION_PRESETS)
        if isinstance(self.normalization, str) and self.normalization not in presets:
            raise SettingsError(f"normalization is {self.normalization!r}, but one of {', '.join(presets)} or [mean, std] is expected")
        if isinstance(self.normalization, list) and len(self.normalization) != 2:
            raise SettingsError(f"normalization is {self.normalization}, but a list must be [mean, std]")
        if self.fold_column is None and (self.train_folds or self.eval_folds):
            raise SettingsError("train_folds or eval_folds are set, but fold_column, which they choose from, is not")
        if both := {str(fold) for fold in self.train_folds} & {str(fold) for fold in self.eval_folds}:
            raise SettingsError(
                f"fold {', '.join(sorted(both))} is both in train_folds and in eval_folds: evaluate on clips that training has not seen"
            )
        if self.batch_size < 1 or not self.epochs > 0:
            raise SettingsError(f"batch_size is {self.batch_size} and epochs {self.epochs:g}, but both must be positive")
        for name in ("max_unreadable", "warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name):g}, but a share lies in [0, 1)")
        check_names(self.model_config, inspect.get_annotations(SSLAMConfig).keys() - {"padding_value"}, "model_config.")
        check_names(self.trainer, [f.name for f in fields(TrainingArguments) if f.init], "trainer.")
        if taken := sorted(self.trainer.keys() & self.own_trainer_arguments().keys()):
            raise SettingsError(f"trainer.{taken[0]} cannot be set there, because a setting of its own decides it: see --help")

    def own_trainer_arguments(self) -> dict[str, Any]:
        """The arguments of `TrainingArguments` that settings of other names decide."""
        return {
            "output_dir": self.output_dir,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": self.min_learning_rate},
            "warmup_steps": self.warmup_share,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "remove_unused_columns": False,
        }

    def training_arguments(self) -> TrainingArguments:
        """What `Trainer` takes; `trainer` may override the defaults here."""
        defaults = {
            "adam_beta2": 0.95,
            "save_strategy": "no",
            "logging_strategy": "epoch",
            "report_to": "none",
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        with refusals_as_settings_errors("TrainingArguments refuses these settings"):
            return TrainingArguments(**{**defaults, **self.trainer, **self.own_trainer_arguments()})


@dataclass
class LabelledClips:
    """One part of the data, decoded: `waveforms[i]` belongs to row `i` of `rows`."""

    rows: LabelledRows
    waveforms: Waveforms


class ClipDataset(torch.utils.data.Dataset):
    """Log-mels and targets. Augmentation depends on the seed, the epoch and the row alone, not on the order or the worker."""

    def __init__(
        self,
        clips: LabelledClips,
        classes: list[str],
        extractor: SSLAMFeatureExtractor,
        augmentation: AugmentationSettings | None = None,
        seed: int = 0,
    ):
        self.waveforms, self.targets = clips.waveforms, encode_labels(clips.rows, classes)
        self.extractor, self.augmentation, self.seed = extractor, augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes that outlive an epoch see it too

    def __len__(self) -> int:
        return len(self.waveforms)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        waveform = self.waveforms[row]
        if self.augmentation is not None:
            generator = np.random.default_rng((self.seed, int(self.epoch), row))
            waveform = augment_waveform(waveform, self.augmentation, generator)
        features = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return {"input_values": features.input_values[0], "labels": self.targets[row]}


class EpochCallback(TrainerCallback):
    """Tells the training clips which epoch it is."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch.fill_(int(state.epoch))


def fine_tune(settings: FineTuningSettings) -> dict[str, Any]:
    """Train, evaluate once at the end, and save the model with its feature extractor, code, card, settings and results.

    The last weights are kept, whatever the evaluation said on the way: choosing by it would flatter the result.

    Returns:
        What `results.json` holds: metrics, class names, numbers of clips, unreadable files by cause, seconds.

    Raises:
        SettingsError, DatasetError: (both are `ValueError`s) if settings contradict each other, or the data do not hold what they ask for.
    """
    start = time.perf_counter()
    output = Path(settings.output_dir)
    if (output / "config.json").exists() and not settings.overwrite:
        raise SettingsError(f"output_dir {output} holds a model already: choose another folder, or set overwrite=true to replace it")
    arguments = settings.training_arguments()

    train_rows, eval_rows = select_rows(settings)
    extractor = build_extractor(settings)
    train = decode(train_rows, extractor.sampling_rate, settings, "training")
    evaluation = decode(eval_rows, extractor.sampling_rate, settings, "evaluation")
    classes = choose_classes(train.rows)
    if train.rows.multi_label and arguments.label_smoothing_factor:
        raise SettingsError("trainer.label_smoothing_factor is set, but Trainer smooths single labels only, and these clips have several")
    if settings.normalization == "computed":
        extractor.mean, extractor.std = extractor.compute_normalization(train.waveforms)

    set_seed(settings.seed)
    model = build_model(settings, extractor, classes, train.rows.multi_label)
    train_set = ClipDataset(train, classes, extractor, settings.augmentation, settings.seed)
    eval_set = ClipDataset(evaluation, classes, extractor)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        compute_metrics=lambda prediction: _numbers(evaluate_predictions(prediction, classes)),
        callbacks=[EpochCallback(train_set)],
    )
    ready = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    if trainer.is_world_process_zero():  # before the evaluation, so that nothing said there can cost the training
        model.save_pretrained(output)
        extractor.save_pretrained(output)
        add_remote_code(output)
        write_settings(settings, output / "settings.yaml")
    prediction = trainer.predict(eval_set)
    results = {
        "metrics": {**evaluate_predictions(prediction, classes), "loss": (prediction.metrics or {})["test_loss"]},
        "classes": classes,
        "clips": {"training": len(train_set), "evaluation": len(eval_set)},
        "unreadable": {"training": train.waveforms.unreadable, "evaluation": evaluation.waveforms.unreadable},
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "seconds": {"training": round(trained - ready, 1), "total": round(time.perf_counter() - start, 1)},
    }
    if trainer.is_world_process_zero():
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        write_model_card(output, describe_results(settings, results))
    return results


def select_rows(settings: FineTuningSettings) -> tuple[LabelledRows, LabelledRows]:
    """The rows to train and to evaluate on, by split or by fold."""
    splits = load_audio_folder(settings.data_dir)
    if settings.fold_column is None:
        chosen = [select_split(splits, name) for name in (settings.train_split, settings.eval_split)]
    else:
        chosen = [select_folds(splits, settings.fold_column, folds) for folds in (settings.train_folds, settings.eval_folds)]
    train, evaluation = (read_rows(rows, settings.label_column, settings.label_separator) for rows in chosen)
    return train, evaluation


def decode(rows: LabelledRows, sampling_rate: int, settings: FineTuningSettings, what: str) -> LabelledClips:
    """The rows that can be read, with their waveforms; those that cannot are reported, and stop the run where they are too many."""
    waveforms = Waveforms(rows.sources, sampling_rate, settings.memory_gb, description=f"decoding {what} clips")
    waveforms.check_unreadable(settings.max_unreadable, what)
    for cause, names in waveforms.unreadable.items():
        logger.warning(f"{len(names)} of {len(rows)} {what} clips are left out ({cause}): {', '.join(names)}")
    return LabelledClips(keep_rows(rows, waveforms.kept), waveforms)


def build_extractor(settings: FineTuningSettings) -> SSLAMFeatureExtractor:
    """The checkpoint's feature extractor, or a new one that fits the model, with the length and the statistics that are set."""
    with refusals_as_settings_errors("the feature extractor cannot be made"):
        if settings.model is None:
            config = SSLAMConfig(**settings.model_config)
            arguments: dict[str, Any] = {"num_mel_bins": config.num_mel_bins, "pad_to_multiple_of": config.patch_size}
        else:
            extractor = AutoFeatureExtractor.from_pretrained(settings.model)
            if not isinstance(extractor, SSLAMFeatureExtractor):
                raise SettingsError(f"{settings.model} has a {type(extractor).__name__}, so it is no SSLAM checkpoint: convert it first")
            arguments = extractor.to_dict()
        if isinstance(settings.normalization, list):
            arguments |= dict(zip(("mean", "std"), settings.normalization))
        else:
            arguments |= NORMALIZATION_PRESETS.get(settings.normalization, {})
        if settings.max_length is not None:
            arguments["max_length"] = settings.max_length
        return SSLAMFeatureExtractor(**arguments)


def build_model(
    settings: FineTuningSettings, extractor: SSLAMFeatureExtractor, classes: list[str], multi_label: bool
) -> SSLAMForAudioClassification:
    """A classifier for these classes, from the checkpoint or from scratch, in float32; what it takes for padding is the extractor's."""
    changes = {
        **settings.model_config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
    }
    with refusals_as_settings_errors("the model cannot be made"):
        if settings.model is None:
            model = SSLAMForAudioClassification(SSLAMConfig(**changes))
        else:
            _check_architecture(settings, AutoConfig.from_pretrained(settings.model))
            # A classifier of other classes gives its encoder, and its own head is replaced.
            model, loading = AutoModelForAudioClassification.from_pretrained(
                settings.model, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **changes
            )
            new = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
            if unfit := sorted(name for name in new if name.startswith(model.base_model_prefix)):
                raise SettingsError(
                    f"{settings.model} does not fill the encoder ({unfit[0]} and {len(unfit) - 1} more): does model_config fit it?"
                )
    silence = extractor.padding_value
    model.config.padding_value = (silence - extractor.mean) / (2 * extractor.std) if extractor.do_normalize else silence
    return model


def _check_architecture(settings: FineTuningSettings, config: SSLAMConfig) -> None:
    """A recipe's sizes must not silently make another network of a checkpoint."""
    for name in ARCHITECTURE & settings.model_config.keys():
        if settings.model_config[name] != getattr(config, name, None):
            raise SettingsError(
                f"model_config.{name} is {settings.model_config[name]}, but {settings.model} has {getattr(config, name, None)}: with "
                "`model` leave the sizes out, for example by model_config={}"
            )


def evaluate_predictions(prediction: EvalPrediction | PredictionOutput, classes: list[str]) -> dict[str, Any]:
    """Accuracy, or mean average precision where a clip may have several classes.

    Args:
        prediction: `predictions: (clips, classes)`, logits; `label_ids: (clips,)`, class indices, or `(clips, classes)`, 0 or 1.
        classes: their names.

    Raises:
        ValueError: if the logits are not finite.
    """
    logits, targets = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if not np.isfinite(logits).all():
        raise ValueError("the model's outputs are NaN or infinite, so the training has diverged: lower learning_rate")
    if targets.ndim == 2:
        return MeanAveragePrecision().compute(predictions=logits, references=targets.astype(np.int64), class_names=classes)
    return Accuracy().compute(predictions=logits.argmax(-1), references=targets)


def describe_results(settings: FineTuningSettings, results: dict[str, Any]) -> str:
    """What the run did and found, as Markdown for the model card."""
    origin = "trained from scratch" if settings.model is None else f"fine-tuned from `{settings.model}`"
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in _numbers(results["metrics"]).items())
    clips, left_out = results["clips"], sum(len(names) for part in results["unreadable"].values() for names in part.values())
    return (
        f"A SSLAM audio classifier, {origin} on {clips['training']} clips of `{Path(settings.data_dir).resolve().name}`, and evaluated on "
        f"{clips['evaluation']} others; {left_out} files could not be read and were left out. One run, the weights after its last step. "
        "`settings.yaml` holds every setting, `results.json` the numbers in full.\n\n"
        f"| evaluation | |\n|-|-|\n{metrics}\n\nClasses: {', '.join(results['classes'])}."
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}
