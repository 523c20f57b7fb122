"""What a fine-tuning run shows: warnings of too few updates or clips, a bar with the time left, a table of losses and metrics, an end."""

import logging
import math
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from ..audio.labels import Labels
from ..errors import UserError


logger = logging.getLogger(__name__)

FEW_UPDATES, FEW_CLIPS = 100, 5  # fewer updates of a run, or training clips of a class, are warned about

TITLES = {"mean_average_precision": "mAP"}


class ProgressTable(ProgressCallback):
    """A progress bar, and above it a row of a table for each line of the log: `Trainer`'s own prints dictionaries.

    The loss of the training clips, which is logged before an evaluation, stands in the evaluation's row.

    Args:
        part: what is evaluated during training: "validation" or "test".
        metric: of the evaluation, beside its loss.
    """

    def __init__(self, part: str, metric: str):
        super().__init__()
        self.training_bar: Any  # as ProgressCallback leaves it, once training has begun
        self.part, self.metric = part, metric
        self.columns: dict[str, int] = {}  # titles and their widths
        self.logged: dict[str, float] = {}  # waits for the evaluation
        self.began = (0.0, 0)  # time and step

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step, self.began = state.global_step, (time.perf_counter(), state.global_step)
        if not state.is_world_process_zero:
            return
        # `None` shows no bar where the output is a file: there the table tells the time left.
        self.training_bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=args.disable_tqdm or None
        )
        titles = ["epoch", "step", "training loss"]
        if args.eval_strategy != "no":
            titles += [f"{self.part} loss", TITLES.get(self.metric, self.metric)]
        self.columns = {title: max(8, len(title)) for title in [*titles, "learning rate", "time left"]}
        self._write({title: title for title in self.columns})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        logs = logs or {}
        if "loss" in logs:
            self.logged = logs
        if "eval_loss" in logs or ("loss" in logs and not control.should_evaluate):
            self._write(self._row(state, {**self.logged, **logs}))
            self.logged = {}

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _row(self, state: Any, logs: dict[str, float]) -> dict[str, str]:
        start, first = self.began
        steps = state.global_step - first
        left = (time.perf_counter() - start) / steps * (state.max_steps - state.global_step) if steps else None
        values = {
            "epoch": f"{logs['epoch']:.4g}/{state.num_train_epochs:.4g}",
            "step": f"{state.global_step}/{state.max_steps}",
            "training loss": _number(logs.get("loss")),
            f"{self.part} loss": _number(logs.get("eval_loss")),
            TITLES.get(self.metric, self.metric): _number(logs.get(f"eval_{self.metric}")),
            "learning rate": f"{logs['learning_rate']:.2e}" if "learning_rate" in logs else "",
            "time left": "" if left is None else tqdm.format_interval(left),
        }
        return {title: values[title] for title in self.columns}

    def _write(self, row: dict[str, str]) -> None:
        self.training_bar.write("  ".join(f"{row[title]:>{width}}" for title, width in self.columns.items()))


def warn_of_little(trainer: Any, labels: Labels | None) -> None:
    """Warn of a run of few updates and, where `labels` of the training clips are given, of classes with few clips."""
    arguments, updates, steps = trainer.args, _updates_per_epoch(trainer), _count_updates(trainer)
    if steps < FEW_UPDATES:
        logger.warning(
            f"the run has only {steps} updates, {updates} an epoch: for more, lower per_device_train_batch_size "
            f"({arguments.per_device_train_batch_size}), or raise num_train_epochs ({arguments.num_train_epochs:g})"
        )
    if labels is not None and (few := [name for name, count in zip(labels.names, labels.counts()) if count < FEW_CLIPS]):
        logger.warning(f"these classes have fewer than {FEW_CLIPS} training clips, and will hardly be learnt: {', '.join(few)}")


def check_warmup(trainer: Any) -> None:
    """Raise a `UserError` if the run ends before its warm-up, so that it would never reach its learning rate."""
    warms_up = trainer.args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy")
    if warms_up and trainer.args.warmup_steps >= max(1, steps := _count_updates(trainer)):
        raise UserError(
            f"warmup_steps is {trainer.args.warmup_steps:g}, but the run has only {steps} updates: give fewer, or a fraction of all below 1"
        )


def report_best(trainer: Any) -> None:
    """Log which epoch's weights are kept, where the best ones are."""
    state, updates = trainer.state, _updates_per_epoch(trainer)
    if trainer.args.load_best_model_at_end and state.best_global_step:
        ended = "stopped early" if state.global_step < state.max_steps else "ended"
        logger.info(
            f"{ended} after epoch {state.global_step / updates:.4g}; the weights are those after epoch "
            f"{state.best_global_step / updates:.4g}, with the best {trainer.args.metric_for_best_model}"
        )


def _count_updates(trainer: Any) -> int:
    """Of the whole run."""
    arguments = trainer.args
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * _updates_per_epoch(trainer))


def _updates_per_epoch(trainer: Any) -> int:
    return len(trainer.train_batches) // trainer.args.gradient_accumulation_steps


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
