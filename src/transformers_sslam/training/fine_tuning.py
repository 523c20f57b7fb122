"""Fine-tune a SSLAM classifier, pre-trained or from scratch, on labelled clips, with Transformers' `Trainer`."""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import set_seed

from ..allocator import keep_freed_memory
from ..audio.batches import compute_normalization
from ..audio.cache import WaveformCache
from ..audio.clips import ReadStatistics
from ..audio.rows import hash_rows
from ..errors import UserError, as_user_error
from ..evaluation.scores import evaluate_predictions, save_scores
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import DamagedFileError, describe_files, lock, read_json, verify_files, write_json
from ..hub import add_remote_code
from ..model_cards import public_name, write_model_card
from ..settings import read_settings, write_settings
from .checkpoints import checkpoints, latest_whole_checkpoint, sweep_unsealed
from .fine_tuning_data import TrainingData, open_training_data, select_rows
from .fine_tuning_model import build_extractor, build_model, resolve_checkpoint
from .fine_tuning_settings import FineTuningSettings
from .labelled_stream import LabelledPart, LabelledStream
from .optimization import layer_decay_groups
from .stream_trainer import EpochBatches, StreamTrainer


logger = logging.getLogger(__name__)

# Settings that a run's result does not depend on.
SETTINGS_WITHOUT_EFFECT = {"output_dir", "overwrite", "memory_gb"}
RESULTS, SETTINGS = "results.json", "settings.yaml"
MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "scores.npz")


def fine_tune(settings: FineTuningSettings) -> dict[str, Any]:
    """Train, evaluate once at the end, and save the model with its feature extractor, code, card, settings, results and scores.

    A run that was interrupted resumes from its last whole checkpoint: the same run, bit for bit on a CPU. The last weights are kept,
    whatever the evaluation said on the way: choosing by it would flatter the result. Runs over several folds or seeds are
    `repeat_fine_tuning`'s.

    Returns:
        What `results.json` holds: metrics, class names, numbers of clips that could be read, the unreadable files by cause (of a stream:
        how often one was met), seconds. Beside it, `scores.npz` has
        `logits` and `targets`, `(clips, classes)`, of the evaluation, the `classes`, and the clips' `names` unless it was streamed.

    Raises:
        UserError: (a `ValueError`) if settings contradict each other, the data do not hold what they ask for, or another run uses the
            folder.
    """
    start = time.perf_counter()
    arguments = settings.training_arguments()
    if arguments.device.type == "cpu":  # asking for the device is also what makes this process known to the others of the run
        if arguments.fp16:
            raise UserError("trainer.fp16 is true, which needs a GPU: on a CPU use trainer.bf16")
        keep_freed_memory()
    with _folder_of(settings) as output:
        origin = resolve_checkpoint(settings)
        extractor = build_extractor(settings, origin)
        data = open_training_data(settings)
        if data.multi_label and settings.label_smoothing:
            raise UserError("label_smoothing is set, but it spreads a single label over all classes, and these clips have several")
        about = {"settings": _comparable(settings), "data": data.digest}
        resumed_from = _checkpoint_of_this_run(output, about)
        stream, open_evaluation = _open_streams(settings, data, extractor, arguments)

        set_seed(settings.seed)
        model = build_model(settings, extractor, data.classes, data.multi_label, origin)
        rate, layer_decay = settings.learning_rate, 1.0 if origin is None else settings.layer_decay
        groups = layer_decay_groups(model, rate, settings.weight_decay, layer_decay)
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        updates_per_epoch, arguments.max_steps = _updates(settings, data, arguments)
        trainer = StreamTrainer(
            model=model,
            args=arguments,
            loss=("binary_cross_entropy" if data.multi_label else "cross_entropy") if settings.loss == "auto" else settings.loss,
            train_batches=EpochBatches(stream, updates_per_epoch * arguments.gradient_accumulation_steps),
            open_evaluation=open_evaluation,
            about=about,
            compute_metrics=lambda p: _numbers(evaluate_predictions(p.predictions, p.label_ids, data.classes, data.multi_label, None)),
            optimizers=(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=arguments.adam_epsilon, fused=True), None),
        )
        if resumed_from is not None:
            logger.info(f"resuming from {resumed_from}")
            trainer.resume_from(resumed_from)
        ready, cpu_ready = time.perf_counter(), time.process_time()
        try:
            trainer.train(resume_from_checkpoint=None if resumed_from is None else str(resumed_from))
        finally:
            trainer.train_batches.close()
        trained, cpu_trained = time.perf_counter(), time.process_time()
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise UserError("the training has diverged, its weights are NaN or infinite, and nothing was saved: lower learning_rate")
        main = trainer.is_world_process_zero()
        if main:  # before the evaluation, so that nothing said there can cost the training
            model.save_pretrained(output)
            extractor.save_pretrained(output)
            add_remote_code(output)
            write_settings(replace(settings, overwrite=False), output / SETTINGS)  # `overwrite` is about the folder, not the run
        evaluated, evaluation = _evaluate(trainer, data, output) if open_evaluation else ({}, None)
        streams = {"training": stream} | ({"evaluation": evaluation} if evaluation else {})
        unreadable = {name: part.part.unreadable(sum(gather_object([part.statistics]), ReadStatistics())) for name, part in streams.items()}
        results = {
            "metrics": evaluated,
            "classes": data.classes,
            "data": data.digest,
            "clips": {name: _count(part.part, unreadable[name]) for name, part in streams.items()},
            "unreadable": unreadable,
            "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "steps": trainer.state.global_step,
            "parameters": model.num_parameters(),
            "resumed": resumed_from is not None,
            "seconds": {
                "training": round(trained - ready, 1),
                "training_cpu": round(cpu_trained - cpu_ready, 1),
                "total": round(time.perf_counter() - start, 1),
            },
        }
        if main:  # the results last: where they are, the run is finished
            write_model_card(output, describe_results(settings, results))
            results["files"] = describe_files(output, [name for name in MODEL_FILES if (output / name).exists()])
            write_json(output / RESULTS, results)
            for folder in checkpoints(output):
                shutil.rmtree(folder)
        return results


@contextmanager
def _folder_of(settings: FineTuningSettings) -> Iterator[Path]:
    """`output_dir`, locked. What a finished run left there stays, unless `overwrite` says otherwise; then all of it is deleted, so that
    nothing of one run ever stands beside another's."""
    output, main = Path(settings.output_dir), PartialState().is_main_process
    with as_user_error(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)
    with lock(output) if main else nullcontext():
        if main and (output / "config.json").exists():
            others, finished = differences(settings), _read_results(output) is not None
            if settings.overwrite and (finished or others):
                _clear(output)
            elif others or finished:
                raise UserError(
                    f"output_dir {output} holds a model already, of {'a run with other ' + others if others else 'this very run'}: choose "
                    "another folder, or set overwrite=true to replace it"
                )
        PartialState().wait_for_everyone()
        yield output


def _read_results(output: Path) -> dict[str, Any] | None:
    """Of the run in this folder; `None` if it is not finished, or the file is damaged: then its last part is done again."""
    try:
        return read_json(output / RESULTS) if (output / RESULTS).is_file() else None
    except DamagedFileError as error:
        logger.warning(f"{error}; the run counts as not finished")
        return None


def _clear(output: Path) -> None:
    (output / RESULTS).unlink(missing_ok=True)  # first: without it nothing else counts as finished
    for name in (*MODEL_FILES, SETTINGS, "README.md"):
        (output / name).unlink(missing_ok=True)
    for folder in checkpoints(output):
        shutil.rmtree(folder)


def differences(settings: FineTuningSettings) -> str:
    """What the run in `output_dir` has otherwise than these settings, in words; nothing where it is this very run, finished and whole, or
    saved but not finished."""
    output, wanted = Path(settings.output_dir), _comparable(settings)
    try:
        results = _read_results(output)
        there = _comparable(read_settings(FineTuningSettings, output / SETTINGS))
        if results is not None and (damaged := verify_files(output, results.get("files", {}))):
            raise DamagedFileError(damaged)
    except (OSError, UserError) as error:
        logger.warning(f"{output} holds no whole run ({error})")
        return "origin, or damaged files"
    names = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if names or settings.streaming or results is None:
        return ", ".join(names)
    return "" if results.get("data") == hash_rows(*select_rows(settings)) else "data"


def _comparable(settings: FineTuningSettings) -> dict[str, Any]:
    return {name: value for name, value in json.loads(json.dumps(asdict(settings))).items() if name not in SETTINGS_WITHOUT_EFFECT}


def _checkpoint_of_this_run(output: Path, about: dict[str, Any]) -> Path | None:
    """The last whole checkpoint; those that a killed run did not finish are deleted.

    Raises:
        UserError: if it is of a run with other settings or data.
    """
    found = None
    if PartialState().is_main_process:
        sweep_unsealed(output)
        with as_user_error("the run cannot be resumed"):
            found = latest_whole_checkpoint(output)
    (found,) = broadcast_object_list([found])
    if found is None:
        return None
    then = read_json(found / "run.json")
    if then != about:
        names = [name for name, value in about["settings"].items() if then.get("settings", {}).get(name) != value] or ["data"]
        raise UserError(
            f"output_dir {output} holds checkpoints of a run with other {', '.join(names)}: choose another folder, or delete {found.name} "
            "and its siblings"
        )
    return found


def _open_streams(settings: FineTuningSettings, data: TrainingData, extractor: SSLAMFeatureExtractor, arguments: Any):
    """The training stream, and what opens the evaluation's. A computed normalisation is written into the extractor before."""
    shared = {
        "rank": arguments.process_index,
        "world_size": arguments.world_size,
        "num_workers": arguments.dataloader_num_workers,
        "pin_memory": arguments.dataloader_pin_memory and arguments.device.type == "cuda",
    }
    train, evaluation = data.train, data.evaluation
    train_cache, eval_cache = _share_memory(settings.memory_gb, train, evaluation)
    options = {"features": settings.features, "device": arguments.device, "max_unreadable": settings.max_unreadable}
    stream = LabelledStream(
        train,
        extractor,
        batch_size=arguments.per_device_train_batch_size,
        augmentation=settings.augmentation,
        label_smoothing=settings.label_smoothing,
        balanced=settings.class_balanced,
        clips_per_epoch=settings.clips_per_epoch,
        last_batch="drop" if arguments.dataloader_drop_last else "fill",
        seed=settings.seed,
        cache=train_cache,
        **options,
        **shared,
    )
    if settings.normalization == "computed":
        extractor.mean, extractor.std = compute_normalization(
            stream.sources, stream.readers.windows, extractor, num_workers=stream.num_workers, cache=train_cache
        )
    if evaluation is None:
        return stream, None

    def open_evaluation() -> LabelledStream:
        return LabelledStream(
            evaluation,
            extractor,
            batch_size=arguments.per_device_eval_batch_size,
            last_batch="keep",
            shuffle_rows=1,
            epochs=1,
            cache=eval_cache,
            **options,
            **shared,
        )

    return stream, open_evaluation


def _share_memory(memory_gb: float, *parts: LabelledPart | None) -> list[WaveformCache | None]:
    """A cache for each part that is a table, as large as its fraction of the clips."""
    clips = [part.source.num_rows or 0 if part else 0 for part in parts]
    return [WaveformCache(count, memory_gb * count / sum(clips)) if count and memory_gb > 0 else None for count in clips]


def _count(part: LabelledPart, unreadable: dict[str, Any]) -> int | None:
    """The clips of a table that can be read, as far as they were met."""
    return None if part.labels is None else len(part.labels) - sum(map(len, unreadable.values()))


def _updates(settings: FineTuningSettings, data: TrainingData, arguments: Any) -> tuple[int, int]:
    """Updates of an epoch, to the nearest whole number, and of the run, as the `Trainer` counts them."""
    clips = settings.clips_per_epoch or data.train.source.num_rows
    if clips is None:  # of a stream, whose whole run counts as one epoch
        assert settings.total_updates is not None  # the settings see to it
        return settings.total_updates, settings.total_updates
    of_update = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    of_epoch = max(1, round(clips / of_update))
    return of_epoch, settings.total_updates or math.ceil(settings.epochs * of_epoch)


def _evaluate(trainer: StreamTrainer, data: TrainingData, output: Path) -> tuple[dict[str, Any], LabelledStream]:
    """Metrics of the clips held out; their scores are written beside the model."""
    evaluation = trainer.get_eval_dataloader()
    found = trainer.evaluation_loop(evaluation, "evaluation")
    logits, targets = np.asarray(found.predictions), np.asarray(found.label_ids)
    metrics = evaluate_predictions(logits, targets, data.classes, data.multi_label)
    if trainer.is_world_process_zero():
        names = data.names()
        save_scores(output, logits, targets, data.classes, [names[row] for row in trainer.evaluated_rows] if names else [])
    if silent := metrics.get("classes_without_positives"):
        logger.warning(f"no clip of the evaluation has {', '.join(silent)}: the mean average precision leaves these classes out")
    return {**metrics, "loss": (found.metrics or {})["eval_loss"]}, evaluation


def describe_results(settings: FineTuningSettings, results: dict[str, Any]) -> str:
    """What the run did and found, as Markdown for the model card."""
    # A folder of this machine by its name alone, for cards go to the Hub.
    name = settings.model and public_name(settings.model)
    origin = "trained from scratch" if name is None else f"fine-tuned from `{name}`"
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in _numbers(results["metrics"]).items())
    table = f"| evaluation | |\n|-|-|\n{rows}\n\n" if rows else ""
    trained, clips = results["clips"]["training"] or "streamed", results["clips"]
    evaluated = f"evaluated on {clips['evaluation'] or 'streamed'} others" if "evaluation" in clips else "not evaluated"
    found = [files for causes in results["unreadable"].values() for files in causes.values()]
    unreadable = sum(files if isinstance(files, int) else len(files) for files in found)  # of a stream: each time that one was met
    return (
        f"A SSLAM audio classifier, {origin} on {trained} clips of `{Path(settings.data_dir).resolve().name}`, and {evaluated}; "
        f"{unreadable} files could not be read and were left out{', each counted every time' if settings.streaming else ''}. One run, the "
        "weights after its last step. `settings.yaml` holds every setting, `results.json` the numbers in full.\n\n"
        f"{table}Classes: {', '.join(results['classes'])}."
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


__all__ = ["FineTuningSettings", "differences", "fine_tune"]
