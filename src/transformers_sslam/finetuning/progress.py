"""What a fine-tuning run shows while it trains: a bar with the time left, and a table of losses, metrics and learning rate."""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback


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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
