"""Transformers' `Trainer` on streams of labelled clips, whose runs resume exactly: bit for bit on a CPU."""

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..checkpoints import sweep
from ..errors import UserError
from ..files import read_json, write_json, write_manifest
from ..publishing.hub import add_remote_code
from .averaging import WeightAverage
from .optimization import classification_loss
from .stream import INPUTS, Batch, LabelledPart, LabelledStream


class EpochBatches:
    """An endless stream in epochs of a fixed number of batches, as `Trainer` iterates over them.

    Args:
        stream: what is read.
        batches: number of batches in an epoch.

    Attributes:
        done: number of batches that the run was trained on.
    """

    def __init__(self, stream: LabelledStream, batches: int):
        self.stream, self.batches, self.done = stream, batches, 0
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = self._iterator or iter(self.stream)
        for _ in range(self.batches - self.done % self.batches):
            batch = next(self._iterator)
            self.done += 1
            yield {name: batch[name] for name in INPUTS if name in batch}

    def close(self) -> None:
        """End the processes that read ahead."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()


class StreamTrainer(Trainer):
    """A `Trainer` whose labels are `(batch, classes)`, as mixup and label smoothing leave them, or those of time steps.

    Args:
        loss: see `classification_loss`.
        train_batches: epochs of the training stream.
        open_stream: opens a stream that gives each clip of a part once.
        about: what identifies the run; every checkpoint holds it.
        ema_decay: of the average of the weights, which is evaluated and saved in their place; `None` for none.
        kwargs: of `Trainer`; `eval_dataset` is a [`LabelledPart`].
    """

    def __init__(
        self,
        *,
        loss: str,
        train_batches: EpochBatches,
        open_stream: Callable[[LabelledPart], LabelledStream],
        about: dict[str, Any],
        ema_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.loss, self.train_batches, self.open_stream, self.about = loss, train_batches, open_stream, about
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it where it accumulates
        self.average = None if ema_decay is None else WeightAverage(self.model, ema_decay)  # type: ignore[arg-type]
        self.loss_sum = torch.zeros(2)  # of the batches since the last log line, and their number
        # Trainer would delete the last whole checkpoint before the new one is whole: `_RunState` deletes it afterwards.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(_RunState(self))

    def train(self, *args, **kwargs):
        """As Trainer's. Behind it the model has the average, if there is one: the last one, or that of the best checkpoint."""
        output = super().train(*args, **kwargs)
        if self.average is not None and not self.args.load_best_model_at_end:  # the best checkpoint's model is its average
            self.average.exchange()
        self.average = None
        return output

    def _averaged(self):
        """The model has the average in here, if there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def get_train_dataloader(self):
        return self.train_batches

    def get_eval_dataloader(self, eval_dataset=None):
        part: Any = eval_dataset or self.eval_dataset
        return self.open_stream(part)

    get_test_dataloader = get_eval_dataloader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs["labels"].ndim == 3:  # of time steps: the model has the loss of steps and clips
            outputs = model(**inputs)
            loss = outputs.loss
        else:
            outputs = model(input_values=inputs["input_values"])
            loss = classification_loss(outputs.logits, inputs["labels"], self.loss)
        self.loss_sum = self.loss_sum.to(loss.device)
        self.loss_sum += torch.stack((loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)))
        return (loss, outputs) if return_outputs else loss

    def _get_learning_rate(self) -> float:
        """The highest rate of all parameter groups, that of the head: Trainer's own is the first group's, the lowest layer's."""
        scheduler: Any = self.lr_scheduler
        return max(scheduler.get_last_lr())

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The mean loss since the last line, also where a resumed run has not computed all of it: Trainer's own starts again at 0."""
        if "loss" in logs:
            total, count = self.accelerator.reduce(self.loss_sum, "sum").tolist()
            logs["loss"] = total / count
            self.loss_sum.zero_()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As [`_evaluation_loop`], with the average of the weights, if there is one."""
        with self._averaged():
            return self._evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def _evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Logits and targets of every clip that can be read, in the order of their rows, and their metrics. One batch is held at a time.

        They are those of time steps where the labels have times, and of clips otherwise.
        """
        model: Any = self.model
        model.eval()
        found: list[tuple[list[int], np.ndarray, np.ndarray]] = []
        weak = dataloader.collator.events is not None and not dataloader.part.has_times
        clips = dataloader.part.source.num_rows
        bar = tqdm(
            desc=description,
            total=clips and -(-clips // self.args.world_size),
            unit="clip",
            leave=False,
            dynamic_ncols=True,
            disable=self.args.disable_tqdm or not self.is_local_process_zero() or None,  # `None`: unless the output is a file
        )
        with bar:
            for batch in dataloader:
                inputs = {name: batch[name].to(self.args.device) for name in ("input_values", "attention_mask") if name in batch}
                with self.accelerator.autocast():
                    outputs = model(**inputs)
                logits, labels = outputs.logits, batch["labels"]
                if weak:
                    logits, labels = outputs.clip_logits, batch["clip_labels"]
                elif "attention_mask" in batch:  # where there is no sound, the labels of time steps are unknown
                    sounding = batch["attention_mask"].unflatten(1, (labels.shape[1], -1)).any(-1)
                    labels = labels.masked_fill(~sounding.unsqueeze(-1), -100.0)
                found.append((batch["rows"], logits.float().cpu().numpy(), labels.cpu().numpy()))
                bar.update(len(batch["rows"]))
        found = gather_object(found)
        rows = [row for rows, _, _ in found for row in rows]
        order = np.argsort(rows, kind="stable")
        logits, targets = (np.concatenate([part[i] for part in found])[order] for i in (1, 2))
        metrics = {"loss": classification_loss(torch.from_numpy(logits), torch.from_numpy(targets), self.loss).item()}
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(logits, targets))
        chosen = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if chosen not in metrics:
            raise UserError(f"metric_for_best_model is {chosen!r}, but the evaluation has {', '.join(sorted(metrics))}")
        self.evaluated_rows = sorted(rows)
        return EvalLoopOutput(logits, targets, {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}, len(logits))

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As Trainer's, with one sentence where the Hub cannot be reached: before the training, which would be lost."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except (HTTPError, OfflineModeIsEnabled, OSError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"push_to_hub is true, but the Hub cannot be used ({said}): train without it, then `sslam publish`") from error

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: `fine_tune` writes the card, before the model is pushed."""

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Every folder that is saved is a model for use, with its code, or an adapter (LoRA); `settings.yaml` takes the place of Trainer's
        pickle."""
        with self._averaged():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink()
            if isinstance(self.model, PreTrainedModel):
                add_remote_code(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def resume_from(self, folder: Path) -> None:
        """Set the stream and the sum of losses to a checkpoint's; Trainer itself loads weights, optimiser and random states."""
        states = [read_json(file) for file in sorted(folder.glob("rank-*.json"))]
        self.train_batches.stream.load_state_dict([state["clips"] for state in states])
        self.train_batches.done = states[0]["batches"]
        if len(states) == self.args.world_size:
            self.loss_sum = torch.tensor(states[self.args.process_index]["loss_sum"])
        state = read_json(folder / "trainer_state.json")
        for name in ("logging_steps", "eval_steps", "save_steps"):  # a fraction of all steps; the state has the steps, and Trainer compares
            if 0 < (getattr(self.args, name) or 0) < 1:
                setattr(self.args, name, state[name])
        if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:  # stopped early, but not saved yet
            self.args.max_steps = state["global_step"]


class _RunState(TrainerCallback):
    """Makes each checkpoint one that the run can be resumed from exactly, and that shows whether it is whole.

    Ends a run whose model would have a class that it has never seen, because none of its clips can be read.
    """

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # Trainer counts the steps of a resumed epoch from 0.
        state.epoch = state.global_step * args.gradient_accumulation_steps / len(self.trainer.train_batches)
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        trainer, folder = self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        position = {
            "clips": trainer.train_batches.stream.state_dict(),
            "batches": trainer.train_batches.done,
            "loss_sum": trainer.loss_sum.tolist(),
        }
        write_json(folder / f"rank-{args.process_index:05d}.json", position)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            if trainer.average is not None:
                trainer.average.save(folder)
            write_json(folder / "run.json", trainer.about)
            write_manifest(folder)
            if trainer.save_total_limit and trainer.save_total_limit > 0:
                best = args.load_best_model_at_end and state.best_model_checkpoint
                sweep(folder.parent, state.global_step, trainer.save_total_limit, keep=[Path(best)] if best else [])

    def on_epoch_end(self, args, state, control, **kwargs):
        stream = self.trainer.train_batches.stream
        rows = {row for statistics in gather_object([stream.statistics]) for row in statistics.rows}
        if lost := stream.part.unreadable_classes(rows):
            raise UserError(
                f"no training clip of the class {', '.join(lost)} can be read: repair one, or take the class out of the data. "
                f"{stream.statistics}"
            )
