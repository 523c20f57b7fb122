"""Transformers' `Trainer` on streams of labelled clips, whose runs resume where they were, bit for bit on a CPU."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..errors import UserError
from ..files import read_json, write_json, write_manifest
from .checkpoints import sweep
from .labelled_stream import Batch, LabelledStream
from .optimization import classification_loss


class EpochBatches:
    """An endless stream in epochs of so many batches, as the `Trainer` iterates over them.

    Args:
        stream: what is read.
        batches: of an epoch.
        done: batches of the run that were trained on before.
    """

    def __init__(self, stream: LabelledStream, batches: int, done: int = 0):
        self.stream, self.batches, self.done = stream, batches, done
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = self._iterator or iter(self.stream)
        for _ in range(self.batches - self.done % self.batches):
            batch = next(self._iterator)
            self.done += 1
            yield {name: batch[name] for name in ("input_values", "labels")}

    def close(self) -> None:
        """End the processes that read ahead."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()


class StreamTrainer(Trainer):
    """A `Trainer` whose labels are `(batch, classes)`, as mixup and label smoothing leave them.

    Args:
        loss: see `classification_loss`.
        train_batches: epochs of the training stream.
        open_evaluation: opens a stream that gives each clip of the evaluation once; `None` where nothing is evaluated.
        about: what a checkpoint says of the run, beside what resuming needs.
        kwargs: of `Trainer`.
    """

    def __init__(
        self,
        *,
        loss: str,
        train_batches: EpochBatches,
        open_evaluation: Callable[[], LabelledStream] | None = None,
        about: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs, eval_dataset=train_batches if open_evaluation else None)  # type: ignore[arg-type]  # only asked whether
        self.loss, self.train_batches, self.open_evaluation, self.about = loss, train_batches, open_evaluation, about or {}
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer divides it where it accumulates
        self.loss_sum = torch.zeros(2)  # of the micro-batches since the last log line, and their number
        # The Trainer would delete the last whole checkpoint before the new one is: `_Resumable` does it behind.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(_Resumable(self))
        self.add_callback(_AllClasses(self))

    def get_train_dataloader(self):
        return self.train_batches

    def get_eval_dataloader(self, eval_dataset=None):
        assert self.open_evaluation is not None  # whoever evaluates nothing asks for nothing
        return self.open_evaluation()

    get_test_dataloader = get_eval_dataloader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_values=inputs["input_values"])
        loss = classification_loss(outputs.logits, inputs["labels"], self.loss)
        self.loss_sum = self.loss_sum.to(loss.device)
        self.loss_sum += torch.stack((loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The mean loss since the last line, also where a resumed run has not computed all of it: the Trainer's own begins anew."""
        if "loss" in logs:
            total, count = self.accelerator.reduce(self.loss_sum, "sum").tolist()
            logs["loss"] = total / count
            self.loss_sum.zero_()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Logits and targets of every clip that can be read, in the order of their rows. Of the inputs, one batch is held at a time."""
        model: Any = self.model
        model.eval()
        found: list[tuple[list[int], np.ndarray, np.ndarray]] = []
        for batch in tqdm(dataloader, desc=description, unit="batch", disable=self.args.disable_tqdm or not self.is_local_process_zero()):
            with self.accelerator.autocast():
                logits = model(input_values=batch["input_values"].to(self.args.device)).logits
            found.append((batch["rows"], logits.float().cpu().numpy(), batch["labels"].cpu().numpy()))
        found = gather_object(found)
        order = np.argsort([row for rows, _, _ in found for row in rows], kind="stable")
        logits, targets = (np.concatenate([part[i] for part in found])[order] for i in (1, 2))
        loss = classification_loss(torch.from_numpy(logits), torch.from_numpy(targets), self.loss).item()
        metrics = self.compute_metrics(EvalPrediction(logits, targets)) if self.compute_metrics else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**metrics, "loss": loss}.items()}
        self.evaluated_rows = sorted(row for rows, _, _ in found for row in rows)
        return EvalLoopOutput(logits, targets, metrics, len(logits))

    def resume_from(self, folder: Path) -> None:
        """Put the stream and the sum of losses where a checkpoint has them; weights, optimiser and random states are the Trainer's part."""
        states = [read_json(file) for file in sorted(folder.glob("rank-*.json"))]
        self.train_batches.stream.load_state_dict([state["clips"] for state in states])
        self.train_batches.done = states[0]["batches"]
        if len(states) == self.args.world_size:
            self.loss_sum = torch.tensor(states[self.args.process_index]["loss_sum"])


class _Resumable(TrainerCallback):
    """Makes each of the Trainer's checkpoints one that the run can be resumed from exactly, and that shows whether it is whole."""

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer counts the steps of a resumed epoch from its own beginning.
        state.epoch = state.global_step * args.gradient_accumulation_steps / len(self.trainer.train_batches)

    def on_save(self, args, state, control, **kwargs):
        trainer, folder = self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        place = {
            "clips": trainer.train_batches.stream.state_dict(),
            "batches": trainer.train_batches.done,
            "loss_sum": trainer.loss_sum.tolist(),
        }
        write_json(folder / f"rank-{args.process_index:05d}.json", place)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            write_json(folder / "run.json", trainer.about)
            write_manifest(folder)
            if trainer.save_total_limit and trainer.save_total_limit > 0:
                sweep(folder.parent, state.global_step, trainer.save_total_limit, None)


class _AllClasses(TrainerCallback):
    """Ends a run as soon as it is known that no clip of a class can be read: its model would have a class that it never learnt."""

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        stream = self.trainer.train_batches.stream
        rows = {row for statistics in gather_object([stream.statistics]) for row in statistics.rows}
        if lost := stream.part.unreadable_classes(rows):
            raise UserError(
                f"no training clip of the class {', '.join(lost)} can be read: repair one, or take the class out of the data. "
                f"{stream.statistics}"
            )


__all__ = ["EpochBatches", "StreamTrainer"]
