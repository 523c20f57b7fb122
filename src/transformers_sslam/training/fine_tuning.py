"""Fine-tune a SSLAM classifier, pre-trained or from scratch, on labelled clips, with Transformers' `Trainer`."""

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from accelerate import PartialState
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification, Trainer, TrainerCallback, set_seed
from transformers.utils import cached_file

from ..allocator import keep_freed_memory
from ..audio.labels import (
    LabelledRows,
    LabelReader,
    Waveforms,
    are_files,
    check_apart,
    check_has_labels,
    choose_classes,
    encode_labels,
    hash_sources,
    keep_rows,
    read_rows,
    select_folds,
    select_split,
    source_name,
)
from ..audio.layouts import open_data_set
from ..configuration_sslam import ENCODER_FIELDS, SSLAMConfig
from ..conversion import ConversionError, convert_checkpoint
from ..errors import UserError, as_user_error
from ..evaluation.scores import evaluate_predictions, save_scores
from ..feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from ..hub import add_remote_code
from ..model_cards import public_name, write_model_card
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import write_json
from ..settings import write_settings
from .fine_tuning_settings import FineTuningSettings
from .labelled_clips import (
    ClipDataset,
    Collator,
    EpochCallback,
    EpochRows,
    LabelledClips,
    StreamedClips,
    keep_clips_per_class,
)
from .optimization import classification_loss, layer_decay_groups


logger = logging.getLogger(__name__)

# Settings that a run's result does not depend on.
SAME_RESULT = {"overwrite", "memory_gb", "check_clips"}


@dataclass
class TrainingData:
    """Both parts of the data, ready for the `Trainer`.

    Attributes:
        train, evaluation: items with `input_values` and `labels`; the second is `None` where nothing is evaluated.
        classes: their names.
        multi_label: whether a clip may have several of them.
        callbacks: what training must tell the clips.
        digest: of what the clips and their labels are, see [`hash_rows`]; `None` of a stream.
    """

    train: ClipDataset | StreamedClips
    evaluation: ClipDataset | StreamedClips | None
    classes: list[str]
    multi_label: bool
    callbacks: list[TrainerCallback]
    digest: str | None = None

    def counts(self) -> dict[str, Any]:
        """Clips of either part (of a stream they are not known), and those left out, by cause."""
        parts = {"training": self.train, "evaluation": self.evaluation}
        held = {name: part for name, part in parts.items() if isinstance(part, ClipDataset)}
        streamed = {name: dict(part.unreadable) for name, part in parts.items() if isinstance(part, StreamedClips)}
        return {
            "clips": {**{name: len(part.waveforms) for name, part in held.items()}, **dict.fromkeys(streamed)},
            "unreadable": {**{name: part.waveforms.unreadable for name, part in held.items()}, **streamed},
        }


class SoftTargetTrainer(Trainer):
    """A `Trainer` whose labels are `(batch, classes)`, as mixup and label smoothing leave them."""

    def __init__(self, *args, loss: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer divides it where it accumulates

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_values=inputs["input_values"])
        loss = classification_loss(outputs.logits, inputs["labels"], self.loss)
        return (loss, outputs) if return_outputs else loss


def fine_tune(settings: FineTuningSettings) -> dict[str, Any]:
    """Train, evaluate once at the end, and save the model with its feature extractor, code, card, settings, results and scores.

    The last weights are kept, whatever the evaluation said on the way: choosing by it would flatter the result. Runs over several folds
    or seeds are `repeat_fine_tuning`'s.

    Returns:
        What `results.json` holds: metrics, class names, numbers of clips, unreadable files by cause, seconds. Beside it, `scores.npz` has
        `logits` and `targets`, `(clips, classes)`, of the evaluation, the `classes`, and the clips' `names` unless it was streamed.

    Raises:
        UserError: (a `ValueError`) if settings contradict each other, or the data do not hold what they ask for.
    """
    start = time.perf_counter()
    output = Path(settings.output_dir)
    _take_folder(settings)
    arguments = settings.training_arguments()
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UserError("trainer.fp16 is true, which needs a GPU: on a CPU use trainer.bf16")
    if arguments.device.type == "cpu":
        keep_freed_memory()
    origin = resolve_checkpoint(settings)
    extractor = build_extractor(settings, origin)
    data = _stream(settings, extractor) if settings.streaming else _load(settings, extractor)
    if data.multi_label and settings.label_smoothing:
        raise UserError("label_smoothing is set, but it spreads a single label over all classes, and these clips have several")

    set_seed(settings.seed)
    model = build_model(settings, extractor, data.classes, data.multi_label, origin)
    rate, layer_decay = settings.learning_rate, 1.0 if origin is None else settings.layer_decay
    groups = layer_decay_groups(model, rate, settings.weight_decay, layer_decay)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    loss = ("binary_cross_entropy" if data.multi_label else "cross_entropy") if settings.loss == "auto" else settings.loss
    trainer = SoftTargetTrainer(
        model=model,
        args=arguments,
        loss=loss,
        data_collator=Collator(settings.augmentation, settings.label_smoothing),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        compute_metrics=lambda p: _numbers(evaluate_predictions(p.predictions, p.label_ids, data.classes, data.multi_label, None)),
        callbacks=data.callbacks,
        optimizers=(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=arguments.adam_epsilon, fused=True), None),
    )
    ready, cpu_ready = time.perf_counter(), time.process_time()
    trainer.train()
    trained, cpu_trained = time.perf_counter(), time.process_time()
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise UserError("the training has diverged, its weights are NaN or infinite, and nothing was saved: lower learning_rate")
    if trainer.is_world_process_zero():  # before the evaluation, so that nothing said there can cost the training
        model.save_pretrained(output)
        extractor.save_pretrained(output)
        add_remote_code(output)
        for of_another_run in ("results.json", "scores.npz", "README.md"):
            (output / of_another_run).unlink(missing_ok=True)
        write_settings(replace(settings, overwrite=False), output / "settings.yaml")  # `overwrite` is about the folder, not the run
    results = {
        "metrics": {} if data.evaluation is None else _evaluate(trainer, data, output),
        "classes": data.classes,
        "data": data.digest,
        **data.counts(),
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "seconds": {
            "training": round(trained - ready, 1),
            "training_cpu": round(cpu_trained - cpu_ready, 1),
            "total": round(time.perf_counter() - start, 1),
        },
    }
    if trainer.is_world_process_zero():
        write_json(output / "results.json", results)
        write_model_card(output, describe_results(settings, results))
    return results


def _take_folder(settings: FineTuningSettings) -> None:
    """Make `output_dir`. A model that it holds is left alone, unless `overwrite` says otherwise, or it is of this very run, stopped before
    its results were written."""
    output = Path(settings.output_dir)
    if (output / "config.json").exists() and not settings.overwrite:
        others = differences(settings)
        if others or (output / "results.json").exists():
            raise UserError(
                f"output_dir {output} holds a model already, of {'a run with other ' + others if others else 'this very run'}: choose "
                "another folder, or set overwrite=true to replace it"
            )
    with as_user_error(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)


def differences(settings: FineTuningSettings) -> str:
    """What the run in `output_dir` has otherwise than these settings, in words; nothing where it is this very run."""
    output, wanted = Path(settings.output_dir), json.loads(json.dumps(asdict(settings)))
    if not (output / "settings.yaml").is_file():
        return "origin"
    there = yaml.safe_load((output / "settings.yaml").read_text())
    names = sorted(name for name in wanted.keys() | there.keys() if name not in SAME_RESULT and wanted.get(name) != there.get(name))
    if names or settings.streaming or not (output / "results.json").is_file():
        return ", ".join(names)
    same_data = json.loads((output / "results.json").read_text()).get("data") == hash_rows(*select_rows(settings))
    return "" if same_data else "data"


def _evaluate(trainer: Trainer, data: TrainingData, output: Path) -> dict[str, Any]:
    """Metrics of the clips held out; their scores are written beside the model."""
    prediction = trainer.predict(data.evaluation)  # type: ignore[arg-type]
    logits, targets = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    metrics = evaluate_predictions(logits, targets, data.classes, data.multi_label)
    if trainer.is_world_process_zero():
        save_scores(output, logits, targets, data.classes, _names(data.evaluation))
    if silent := metrics.get("classes_without_positives"):
        logger.warning(f"no clip of the evaluation has {', '.join(silent)}: the mean average precision leaves these classes out")
    return {**metrics, "loss": (prediction.metrics or {})["test_loss"]}


def _names(clips: ClipDataset | StreamedClips | None) -> list[str]:
    """Of the files, or none of a stream."""
    return [source_name(clips.waveforms.sources[i]) for i in clips.waveforms.kept] if isinstance(clips, ClipDataset) else []


# --- data


def _load(settings: FineTuningSettings, extractor: SSLAMFeatureExtractor) -> TrainingData:
    """Both parts as tables of clips, decoded as far as memory reaches."""
    train_rows, eval_rows = select_rows(settings)
    digest = hash_rows(train_rows, eval_rows)
    if settings.clips_per_class is not None:
        train_rows = keep_rows(train_rows, keep_clips_per_class(train_rows, settings.clips_per_class, settings.seed))
    train = decode(train_rows, extractor.sampling_rate, settings, "training")
    classes = choose_classes(train.rows)
    if settings.normalization == "computed":
        extractor.mean, extractor.std = extractor.compute_normalization(train.waveforms)
    train_set = ClipDataset(train, classes, extractor, settings.augmentation, seed=settings.seed)
    train_set.epoch_rows = EpochRows(train_set.targets, settings.class_balanced, settings.clips_per_epoch, settings.seed)
    eval_set = None
    if eval_rows is not None:
        eval_set = ClipDataset(decode(eval_rows, extractor.sampling_rate, settings, "evaluation"), classes, extractor)
    return TrainingData(train_set, eval_set, classes, train.rows.multi_label, [EpochCallback(train_set)], digest)


def _stream(settings: FineTuningSettings, extractor: SSLAMFeatureExtractor) -> TrainingData:
    """Both parts as streams, whose classes the data set must declare."""
    splits = open_data_set(settings.data_dir, settings.layout, subset=settings.subset, streaming=True)
    train = select_split(splits, settings.train_split)
    reader = LabelReader.of(train, settings.label_column, settings.label_separator)
    if reader.declared_classes is None:
        raise UserError(
            f"the column {settings.label_column!r} of {settings.data_dir} does not declare its classes (a ClassLabel does), and a stream "
            "cannot be searched for them: set streaming=false"
        )
    common = (reader, reader.declared_classes, extractor)
    training = StreamedClips(
        train, *common, settings.augmentation, settings.seed, settings.shuffle_buffer, max_unreadable=settings.max_unreadable
    )
    evaluated = None
    if settings.evaluate:
        evaluated = StreamedClips(select_split(splits, settings.eval_split), *common, max_unreadable=settings.max_unreadable)
    return TrainingData(training, evaluated, reader.declared_classes, reader.multi_label, [EpochCallback(training)])


def select_rows(settings: FineTuningSettings) -> tuple[LabelledRows, LabelledRows | None]:
    """The rows to train and, unless nothing is evaluated, to evaluate on, by split or by fold."""
    splits: datasets.DatasetDict = open_data_set(settings.data_dir, settings.layout, subset=settings.subset)

    def select(split: str, folds: list[int | str]) -> LabelledRows:
        chosen = select_split(splits, split) if settings.fold_column is None else select_folds(splits, settings.fold_column, folds)
        return read_rows(chosen, settings.label_column, settings.label_separator)

    train = select(settings.train_split, settings.train_folds)
    if not settings.evaluate:
        return train, None
    evaluation = select(settings.eval_split, settings.eval_folds)
    if are_files(train.sources) and are_files(evaluation.sources):
        parts = ["the training clips"] * len(train) + ["the evaluation"] * len(evaluation)
        check_apart([*train.sources, *evaluation.sources], parts)
    check_has_labels(evaluation)
    return train, evaluation


def check_rows(settings: FineTuningSettings) -> None:
    """That the rows of a run can be had, and its evaluation has no other classes than its training. Nothing is decoded.

    Raises:
        UserError: if not.
    """
    train, evaluation = select_rows(settings)
    classes = choose_classes(train)
    if evaluation is not None:
        encode_labels(evaluation, classes)


def hash_rows(*parts: LabelledRows | None) -> str:
    """Of the labels and, where clips are files, of their names and sizes: whether a run had the same data. Other sound of the same size is
    not seen."""
    state = [None if rows is None else (hash_sources(rows.sources), rows.labels) for rows in parts]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def decode(rows: LabelledRows, sampling_rate: int, settings: FineTuningSettings, what: str) -> LabelledClips:
    """The rows that can be read, with their waveforms; those that cannot are reported, and stop the run where they are too many."""
    waveforms = Waveforms(rows.sources, sampling_rate, settings.memory_gb, f"decoding {what} clips", settings.check_clips)
    waveforms.check_unreadable(settings.max_unreadable, what)
    return LabelledClips(keep_rows(rows, waveforms.kept), waveforms)


# --- model


def resolve_checkpoint(settings: FineTuningSettings) -> str | None:
    """`settings.model`, or where it lies after conversion: official SSLAM and EAT checkpoints are converted, once, into
    `output_dir/start-...`, which is named after where they came from.

    Raises:
        UserError: if there is no such checkpoint, or it cannot be converted.
    """
    if settings.model is None or not _is_official(settings.model):
        return settings.model
    start = Path(settings.output_dir) / f"start-{hashlib.sha256(settings.model.encode()).hexdigest()[:8]}"
    with PartialState().main_process_first():
        if not (start / "config.json").is_file():
            try:
                convert_checkpoint(settings.model, start)
            except ConversionError as error:
                raise UserError(f"model {settings.model} is an official checkpoint that cannot be converted: {error}") from error
    return str(start)


def _is_official(model: str) -> bool:
    """Whether this is a file of fairseq, or a folder or Hub repository of the authors' remote code (`model_type` "eat")."""
    if Path(model).is_file():
        return True
    with as_user_error(f"model {model} cannot be read"):
        return json.loads(Path(str(cached_file(model, "config.json"))).read_text()).get("model_type") == "eat"


def build_extractor(settings: FineTuningSettings, origin: str | None = None) -> SSLAMFeatureExtractor:
    """The feature extractor of the checkpoint `origin`, or a new one that fits the model, with the length and statistics that are set."""
    with as_user_error("the feature extractor cannot be made"):
        if origin is None:
            config = SSLAMConfig(**settings.model_config)
            arguments: dict[str, Any] = {"num_mel_bins": config.num_mel_bins, "pad_to_multiple_of": config.patch_size}
        else:
            extractor = AutoFeatureExtractor.from_pretrained(origin)
            if not isinstance(extractor, SSLAMFeatureExtractor):
                raise UserError(f"{origin} has a {type(extractor).__name__}, so it is no SSLAM checkpoint: convert it first")
            arguments = extractor.to_dict()
        if isinstance(settings.normalization, list):
            arguments |= dict(zip(("mean", "std"), settings.normalization))
        else:
            arguments |= NORMALIZATION_PRESETS.get(settings.normalization, {})
        if settings.max_length is not None:
            arguments["max_length"] = settings.max_length
        config = SSLAMConfig(**settings.model_config) if origin is None else AutoConfig.from_pretrained(origin)
        longest = settings.model_config.get("max_length", config.max_length)
        extractor = SSLAMFeatureExtractor(**arguments)
        if extractor.max_length > longest:
            raise UserError(f"max_length is {extractor.max_length}, but the model's positions end at {longest} frames: take less")
        return extractor


def build_model(
    settings: FineTuningSettings, extractor: SSLAMFeatureExtractor, classes: list[str], multi_label: bool, origin: str | None = None
) -> SSLAMForAudioClassification:
    """A classifier for these classes, from the checkpoint `origin` or from scratch, in float32; what it takes for padding is the
    extractor's. A frozen encoder drops paths, patches and activations only where the settings say so, as the published linear protocol
    does: otherwise its features are always the same."""
    drops = ("drop_path_rate", "patch_drop_rate", "hidden_dropout_prob", "attention_probs_dropout_prob") if settings.freeze_encoder else ()
    changes = {
        **dict.fromkeys(drops, 0.0),
        **settings.model_config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
    }
    if settings.attn_implementation is not None:
        changes["attn_implementation"] = settings.attn_implementation
    with as_user_error("the model cannot be made"):
        if origin is None:
            model = SSLAMForAudioClassification(SSLAMConfig(**changes))
        else:
            config = AutoConfig.from_pretrained(origin)
            _check_architecture(settings, config)
            # A classifier of other classes gives its encoder, and its own head is replaced.
            model, loading = AutoModelForAudioClassification.from_pretrained(
                origin, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **changes
            )
            new = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
            if unfit := sorted(name for name in new if name.startswith(model.base_model_prefix)):
                raise UserError(f"{origin} does not fill the encoder ({unfit[0]} and {len(unfit) - 1} more): does model_config fit it?")
            if [config.id2label[i] for i in range(config.num_labels)] != classes:  # as many as before, and yet others
                torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
                torch.nn.init.zeros_(model.classifier.bias)
    model.config.padding_value = extractor.scaled_padding_value
    model.sslam.requires_grad_(not settings.freeze_encoder)
    return model


def _check_architecture(settings: FineTuningSettings, config: SSLAMConfig) -> None:
    """A recipe's sizes must not silently make another network of a checkpoint."""
    for name in ENCODER_FIELDS & settings.model_config.keys():
        if settings.model_config[name] != getattr(config, name, None):
            raise UserError(
                f"model_config.{name} is {settings.model_config[name]}, but {settings.model} has {getattr(config, name, None)}: with "
                "`model` leave the sizes out, for example by model_config={}"
            )


# --- results


def describe_results(settings: FineTuningSettings, results: dict[str, Any]) -> str:
    """What the run did and found, as Markdown for the model card."""
    # A folder of this machine by its name alone, for cards go to the Hub.
    name = settings.model and public_name(settings.model)
    origin = "trained from scratch" if name is None else f"fine-tuned from `{name}`"
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in _numbers(results["metrics"]).items())
    table = f"| evaluation | |\n|-|-|\n{rows}\n\n" if rows else ""
    trained, clips = results["clips"]["training"] or "streamed", results["clips"]
    evaluated = f"evaluated on {clips['evaluation'] or 'streamed'} others" if "evaluation" in clips else "not evaluated"
    left_out = sum(names if isinstance(names, int) else len(names) for part in results["unreadable"].values() for names in part.values())
    return (
        f"A SSLAM audio classifier, {origin} on {trained} clips of `{Path(settings.data_dir).resolve().name}`, and {evaluated}; {left_out} "
        "files could not be read and were left out. One run, the weights after its last step. `settings.yaml` holds every setting, "
        f"`results.json` the numbers in full.\n\n{table}Classes: {', '.join(results['classes'])}."
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


__all__ = ["FineTuningSettings", "build_extractor", "build_model", "fine_tune", "resolve_checkpoint", "select_rows"]
