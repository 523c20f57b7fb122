"""One fine-tuning run: a SSLAM classifier, pre-trained or from scratch, trained on labelled clips with Transformers' `Trainer`."""

import logging
import math
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..audio.cache import WaveformCache
from ..audio.clips import ReadStatistics
from ..audio.normalization import compute_normalization
from ..audio.rows import AudioColumn, LabelledRows
from ..checkpoints import checkpoints
from ..errors import UserError, as_user_error
from ..evaluation.event_results import evaluate_events
from ..evaluation.per_class import results_by_class
from ..evaluation.scored_events import score_events
from ..evaluation.scores import evaluate_predictions, save_scores
from ..events_sslam import EventSettings
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import describe_files, verify, write_json
from ..loading_sslam import flatten_patch_projection_moments
from ..publishing.cards import ReportedResult, as_text, describe_origin, public_name, write_model_card
from ..publishing.conversion import resolve_model
from .data import TrainingData, open_training_data
from .lora import ADAPTER, count_parameters, merge_adapters
from .mixtures import Mixer
from .model import build_extractor, build_model, frames_per_step
from .optimization import layer_decay_groups
from .output import MODEL_FILES, RESULTS, SETTINGS, comparable, find_checkpoint, hash_origin, locked_folder, save_settings
from .progress import ProgressTable, check_warmup, report_best, warn_of_little
from .settings import FineTuningSettings
from .stream import EventTargets, LabelledPart, LabelledStream
from .trainer import EpochBatches, StreamTrainer


logger = logging.getLogger(__name__)


def fine_tune(settings: FineTuningSettings) -> dict[str, Any]:
    """Train, evaluate the test part once at the end, and save the model with its feature extractor, code, card, settings and results.

    A run that was interrupted resumes from its last whole checkpoint: the same run, bit for bit on a CPU. The last weights are kept or,
    with `load_best_model_at_end`, those that were best on the validation part; with `ema_decay`, their average. Runs over several folds or
    seeds are `repeat_fine_tuning`'s.

    Returns:
        What `results.json` holds: metrics of the test part, those of the validation part at each evaluation, class names, numbers of
        clips that could be read, the unreadable files by cause (of a stream: how often one was read), seconds, and of the test part the
        results by class and the confusion matrix (see [`results_by_class`]). Beside it, `scores.npz` has `logits` and `targets`,
        `(clips, classes)`, of the test part, the `classes`, and the clips' `names` unless it was streamed.

    Raises:
        UserError: (a `ValueError`) if settings contradict each other, the data do not hold what they ask for, or another run uses the
            folder.
    """
    start = time.perf_counter()
    arguments = settings.training_arguments()
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UserError("fp16 is true, which needs a GPU: on a CPU set bf16 and use_cpu")
    with locked_folder(settings) as output:
        origin = None if settings.model is None else resolve_model(settings.model)
        extractor = build_extractor(settings, origin)
        data = open_training_data(settings)
        if settings.mixing.sounds and not data.multi_label:
            raise UserError(
                f"mixing.sounds is set, but the column {settings.label_column!r} gives a clip one label, and a mixture has several: set "
                "label_column to one of lists, or of events"
            )
        if data.multi_label and settings.label_smoothing_factor:
            raise UserError("label_smoothing_factor is set, but it spreads one label over all classes, and these clips have several")
        about = {"settings": comparable(settings), "data": data.digest, "origin": hash_origin(origin)}
        resumed_from = find_checkpoint(settings, about)
        if arguments.process_index == 0:
            save_settings(settings, output / SETTINGS)
        streams = _Streams(settings, arguments, data, extractor, frames_per_step(settings, origin))
        set_seed(settings.seed)
        model = build_model(arguments, extractor, data.classes, data.multi_label, origin)
        layer_decay = 1.0 if origin is None else settings.layer_decay
        trainer = _build_trainer(settings, arguments, data, streams, model, about, layer_decay)
        trained, parameters = count_parameters(model)
        _announce(settings, arguments, data, f"{trained:,} of {parameters:,} parameters are trained")
        warn_of_little(trainer, None if settings.mixing.sounds else data.parts["training"].labels)
        if resumed_from is not None:
            logger.info(f"resuming from {resumed_from}")
            trainer.resume_from(resumed_from)
        ready, cpu_ready = time.perf_counter(), time.process_time()
        try:
            trainer.train(resume_from_checkpoint=None if resumed_from is None else str(resumed_from))
        finally:
            trainer.train_batches.close()
        seconds = {
            "training": round(time.perf_counter() - ready, 1),
            "training_cpu": round(time.process_time() - cpu_ready, 1),
        }
        _check_weights(trainer)
        report_best(trainer)
        if settings.lora.r:
            trainer.model = merge_adapters(model, output / ADAPTER if trainer.is_world_process_zero() else None)
        trainer.save_model(_internal_call=True)  # before the evaluation, so that an error there does not cost the training
        if not settings.lora.merge and trainer.is_world_process_zero():
            (output / "model.safetensors").unlink()  # configuration and feature extractor stay: the adapter needs them
        metrics, by_class, unreadable = _test(trainer, data, settings, output)
        read = {name: sum(gather_object([stream.statistics]), ReadStatistics()) for name, stream in streams.opened.items()}
        unreadable = {name: data.parts[name].unreadable(statistics) for name, statistics in read.items()} | unreadable
        history = trainer.state.log_history
        results = {
            "metrics": metrics,
            "validation": [entry for entry in history if "eval_loss" in entry] if "validation" in data.parts else [],
            "best_step": trainer.state.best_global_step if arguments.load_best_model_at_end else None,
            "classes": data.classes,
            "data": data.digest,
            "origin": about["origin"],
            "clips": {name: _count(data.parts[name], unreadable[name]) for name in unreadable},
            "unreadable": unreadable,
            "training_loss": [entry["loss"] for entry in history if "loss" in entry],
            "steps": trainer.state.global_step,
            "parameters": parameters,
            "trained_parameters": trained,
            "resumed": resumed_from is not None,
            "seconds": {**seconds, "total": round(time.perf_counter() - start, 1)},
            **by_class,
        }
        if trainer.is_world_process_zero():  # the results last: where they are, the run is finished
            if settings.lora.merge:  # an adapter is not loaded as a card says
                write_model_card(
                    output,
                    describe_results(settings, results),
                    results=reported_results(settings, results),
                    origin=describe_origin(settings.model, [settings.data_dir]),
                )
            results["files"] = describe_files(output, [name for name in MODEL_FILES if (output / name).exists()])
            write_json(output / RESULTS, results, sealed=True)
            for folder in checkpoints(output):
                shutil.rmtree(folder)
        if arguments.push_to_hub:
            trainer.push_to_hub()
        return results


class _Streams:
    """Opens the stream of each part of the data; a computed normalisation is written into the extractor first.

    Attributes:
        opened: the last stream of each part.
    """

    def __init__(
        self,
        settings: FineTuningSettings,
        arguments: FineTuningSettings,
        data: TrainingData,
        extractor: SSLAMFeatureExtractor,
        frames_per_step: int,
    ):
        clips = {name: part.source.num_rows or 0 for name, part in data.parts.items()}
        memory = {name: settings.memory_gb * count / max(1, sum(clips.values())) for name, count in clips.items()}
        self.caches = {name: WaveformCache(clips[name], memory[name]) if memory[name] else None for name in clips}
        self.data, self.arguments, self.opened = data, arguments, dict[str, LabelledStream]()
        self.options: dict[str, Any] = {
            "extractor": extractor,
            "features": settings.features,
            "device": arguments.device,
            "max_unreadable": settings.max_unreadable,
            "rank": arguments.process_index,
            "world_size": arguments.world_size,
            "num_workers": arguments.dataloader_num_workers,
            "pin_memory": arguments.dataloader_pin_memory and arguments.device.type == "cuda",
        }
        self.events: dict[str, EventTargets] = {}
        if settings.task == "events":
            self.events = {
                name: EventTargets(
                    part.labels,  # type: ignore[arg-type]  # of a table
                    frames_per_step,
                    extractor.max_length // frames_per_step,
                    extractor.sampling_rate,
                    settings.hard_labels,
                )
                for name, part in data.parts.items()
            }
        training = self._open(
            "training",
            batch_size=arguments.per_device_train_batch_size,
            augmentation=settings.augmentation,
            label_smoothing=settings.label_smoothing_factor,
            mixer=Mixer(settings.mixing, extractor, settings.max_unreadable, data.classes) if settings.mixing.sounds else None,
            balanced=settings.class_balanced,
            clips_per_epoch=settings.clips_per_epoch,
            last_batch="drop" if arguments.dataloader_drop_last else "fill",
            seed=settings.seed if settings.data_seed is None else settings.data_seed,
        )
        if settings.normalization == "computed":
            extractor.mean, extractor.std = compute_normalization(
                training.sources, training.readers.windows, extractor, num_workers=training.num_workers, cache=self.caches["training"]
            )

    def _open(self, name: str, **options: Any) -> LabelledStream:
        part, cache, events = self.data.parts[name], self.caches[name], self.events.get(name)
        self.opened[name] = LabelledStream(part, cache=cache, events=events, **self.options, **options)
        return self.opened[name]

    def evaluation(self, part: LabelledPart) -> LabelledStream:
        """Each clip of a part once, in the order of its shards."""
        name = next(name for name, other in self.data.parts.items() if other is part)
        batch_size = self.arguments.per_device_eval_batch_size
        return self._open(name, batch_size=batch_size, last_batch="keep", shuffle_rows=1, epochs=1)


def _build_trainer(
    settings: FineTuningSettings,
    arguments: FineTuningSettings,
    data: TrainingData,
    streams: _Streams,
    model: Any,
    about: dict[str, Any],
    layer_decay: float,
) -> StreamTrainer:
    def compute_metrics(found: Any) -> dict[str, float]:
        logits, targets = found.predictions, found.label_ids
        if logits.ndim == 3:  # of time steps: those whose labels are known
            known = (targets >= 0).all(-1)
            logits, targets = logits[known], targets[known] >= 0.5
            if not targets.any():
                raise UserError(
                    f"no event of the evaluation covers half of a time step, {1 / model.config.steps_per_second:g} s, so no metric is "
                    "defined: set model_config.steps_per_second to 12.5 or 25, or evaluate on other clips"
                )
        metrics = evaluate_predictions(logits, targets, data.classes, data.multi_label, None)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    groups = layer_decay_groups(model, settings.learning_rate, settings.weight_decay, layer_decay, settings.lora.learning_rate)
    with as_user_error(f"optim is {settings.optim!r}, which cannot be used"):
        optimizer_class, options = StreamTrainer.get_optimizer_cls_and_kwargs(arguments, model)
        optimizer = optimizer_class(groups, **options)
    optimizer.register_load_state_dict_post_hook(flatten_patch_projection_moments)  # of runs that an earlier version began
    # The clips of an epoch, to the nearest whole number of updates; a whole run on a stream counts as one epoch.
    clips = settings.clips_per_epoch or data.parts["training"].source.num_rows
    update = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    updates = settings.max_steps if clips is None else max(1, round(clips / update))
    patience = settings.early_stopping_patience
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"report_to is {settings.report_to!r}, which cannot be used: {error}") from error
    with as_user_error("Trainer rejects these settings"):
        trainer = StreamTrainer(
            model=model,
            args=arguments,
            loss=("binary_cross_entropy" if data.multi_label else "cross_entropy") if settings.loss == "auto" else settings.loss,
            train_batches=EpochBatches(streams.opened["training"], updates * arguments.gradient_accumulation_steps),
            open_stream=streams.evaluation,
            about=about,
            ema_decay=settings.ema_decay,
            eval_dataset=data.parts.get("validation", data.parts.get("test")),
            processing_class=streams.options["extractor"],
            compute_metrics=compute_metrics,
            callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
            optimizers=(optimizer, None),
        )
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    metric = "mean_average_precision" if data.multi_label else "accuracy"
    trainer.add_callback(ProgressTable("validation" if "validation" in data.parts else "test", metric))
    check_warmup(trainer)
    return trainer


def _announce(settings: FineTuningSettings, arguments: FineTuningSettings, data: TrainingData, parameters: str) -> None:
    """Log what is trained on, and where curves can be seen."""
    clips = ", ".join(f"{'streamed' if part.labels is None else len(part.labels)} {name} clips" for name, part in data.parts.items())
    start = "from random weights" if settings.model is None else f"from {settings.model}"
    what = "a detector" if settings.task == "events" else "a classifier"
    logger.info(f"{what} of {len(data.classes)} classes, {start}, on {arguments.device.type}: {clips}; {parameters}")
    if "tensorboard" in arguments.report_to:
        logger.info(f"curves of losses, metrics and learning rate: tensorboard --logdir {shlex.quote(settings.output_dir)}")


def _check_weights(trainer: Any) -> None:
    """Check that training has not diverged and, where the best weights are wanted, that they were loaded."""
    if trainer.args.load_best_model_at_end:
        best = trainer.state.best_model_checkpoint
        if best is None or (problem := verify(best)):
            raise UserError(
                "load_best_model_at_end is true, but "
                + (f"{best} is damaged: {problem}" if best else "no checkpoint was evaluated: change eval_steps or eval_delay")
            )
    if not all(weights.isfinite().all() for weights in trainer.model.parameters()):
        raise UserError("the training has diverged, its weights are NaN or infinite, and nothing was saved: lower learning_rate")


def _count(part: LabelledPart, unreadable: dict[str, Any]) -> int | None:
    """Number of clips of a table without those that could not be read."""
    return None if part.labels is None else len(part.labels) - sum(map(len, unreadable.values()))


def _test(trainer: StreamTrainer, data: TrainingData, settings: FineTuningSettings, output: Path) -> tuple[dict, dict, dict]:
    """Metrics of the test part, its results by class, and, of events, its unreadable files; nothing without a test part."""
    part = data.parts.get("test")
    if part is None:
        return {}, {}, {}
    logger.info(f"evaluating {'streamed' if part.labels is None else len(part.labels)} test clips")
    if settings.task == "classification" or not part.has_times:
        return *_evaluate(trainer, data, output), {}
    if not trainer.is_world_process_zero():  # events are of whole clips, which one process scores
        return {}, {}, {"test": {}}
    rows = LabelledRows(AudioColumn(part.source.table), part.labels)  # type: ignore[arg-type]  # of a table
    scored = score_events(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,  # type: ignore[arg-type]
        rows,
        batch_size=settings.per_device_eval_batch_size,
        memory_gb=settings.memory_gb,
        max_unreadable=settings.max_unreadable,
    )
    scored.events.save(output / "scores.npz")
    results = evaluate_events(*scored.events, EventSettings())
    del results["merged_events"]  # these are joined, and counted in a warning, when they are read
    metrics = results.pop("metrics") | {"cut_events": scored.cut_events}
    return metrics, results, {"test": scored.unreadable}


def _evaluate(trainer: StreamTrainer, data: TrainingData, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the test part, and its results by class; scores and confusion matrix are written beside the model."""
    found: Any = trainer.predict(data.parts["test"])  # type: ignore[arg-type]
    metrics = evaluate_predictions(found.predictions, found.label_ids, data.classes, data.multi_label)
    if trainer.is_world_process_zero():
        names = data.parts["test"].clip_names()
        rows = trainer.evaluated_rows if names else []
        save_scores(output, found.predictions, found.label_ids, data.classes, [names[row] for row in rows])
    drawn = output if trainer.is_world_process_zero() else None
    by_class = results_by_class(found.predictions, found.label_ids, data.classes, metrics, data.multi_label, drawn)
    if silent := metrics.get("classes_without_positives"):
        logger.warning(f"no test clip has {', '.join(silent)}: the mean average precision leaves these classes out")
    return {**metrics, "loss": found.metrics["test_loss"]}, by_class


def describe_results(settings: FineTuningSettings, results: dict[str, Any]) -> str:
    """What the run did and found, as Markdown for the model card."""
    name = settings.model and public_name(settings.model)  # a folder of this machine by its name alone, for cards go to the Hub
    what = "A SSLAM model of sound event detection" if settings.task == "events" else "A SSLAM audio classifier"
    origin = "trained from scratch" if name is None else f"fine-tuned from `{name}`"
    if settings.lora.r:
        origin += f" by LoRA (rank {settings.lora.r}, {results['trained_parameters']:,} of {results['parameters']:,} parameters)"
    clips = {part: count or "streamed" for part, count in results["clips"].items()}
    tested = f"tested on {clips['test']} others" if "test" in clips else "not tested"
    validated = f"validated on {clips['validation']}, " if "validation" in clips else ""
    found = [files for causes in results["unreadable"].values() for files in causes.values()]
    unreadable = sum(files if isinstance(files, int) else len(files) for files in found)  # of a stream: each time that one was met
    best = results["best_step"]
    weights = "the weights after its last step" if best is None else f"the weights after step {best}, the best on the validation clips"
    if settings.ema_decay is not None:
        weights = f"the exponential moving average (decay {settings.ema_decay:g}) of {weights}"
    return (
        f"{what}, {origin} on {clips['training']} clips of `{public_name(settings.data_dir)}`, {validated}and "
        f"{tested}; {unreadable} files could not be read and were left out{', counted each time' if settings.streaming else ''}. One run, "
        f"{weights}. `settings.yaml` holds its settings, `results.json` the numbers in full.\n\n"
        f"Classes: {', '.join(map(as_text, results['classes']))}."
    )


def reported_results(settings: FineTuningSettings, results: dict[str, Any]) -> list[ReportedResult]:
    """Accuracy, or mean average precision, on the test part, for the card's `model-index` and its table."""
    kinds = {
        "accuracy": ("accuracy", "accuracy"),
        "mean_average_precision": ("mAP", "mean average precision"),
        "segment_f1": ("f1", "segment-based F1 (1 s, macro)"),
        "psds1": ("psds1", "PSDS, scenario 1"),
    }
    part = settings.test_split if settings.fold_column is None else f"{settings.fold_column} {', '.join(map(str, settings.test_folds))}"
    return [
        ReportedResult(
            task_type="audio-classification",
            dataset_type=settings.layout,
            dataset_name=public_name(settings.data_dir),
            dataset_split=part,
            metric_type=kind,
            metric_name=title,
            metric_value=round(results["metrics"][name], 4),
            interval=[round(end, 4) for end in interval] if all(map(math.isfinite, interval)) else None,
            note=f"one run, {results['clips']['test'] or 'streamed'} clips",
        )
        for name, (kind, title) in kinds.items()
        if (interval := results["metrics"].get(f"{name}_interval"))
    ]
