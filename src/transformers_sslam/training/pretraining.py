"""The pre-training loop: streamed clips in, checkpoints that can be trusted out.

Nothing random is carried from update to update: masks, mixtures and noise follow from (seed, update, rank), the order of clips from the
stream's position, rates and decays from the update. So a resumed run is the same run, bit for bit on a CPU.

No update waits for the device. Where gradients are not finite, the step and the teacher's average are skipped there: such an update counts,
and changes nothing. Statistics are read when a line is logged.
"""

import contextlib
import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast_object_list, gather_object, set_seed
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..allocator import keep_freed_memory
from ..audio.batches import ClipStream, DataSettings, compute_normalization
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, read_json
from ..hub import add_remote_code
from ..model_cards import public_name, write_model_card
from ..modeling_sslam_pretraining import SSLAMForPreTraining
from ..settings import write_settings
from .checkpoints import (
    begin_checkpoint,
    checkpoint_folder,
    checkpoints,
    finish_checkpoint,
    latest_whole_checkpoint,
    sweep,
    sweep_leftovers,
    unfinished_folder,
)
from .monitoring import LOSSES, STATISTICS, CollapseGuard, NonFiniteError, TrainingLog, matmul_peak
from .pretraining_model import build_extractor, build_model, compile_model, parameter_groups
from .pretraining_settings import PreTrainingSettings
from .schedules import adam_epsilon, learning_rate


logger = logging.getLogger(__name__)

# Where a run stands, as a checkpoint holds it.
COUNTERS = ("update", "skipped", "skipped_in_a_row", "clips_seen")
STAGE_NAMES = {1: "stage 1 (EAT)", 2: "stage 2 (SSLAM)"}
Batch = dict[str, torch.Tensor]


class _AskedToStop(BaseException):
    """A signal came while the run waited for data. No `Exception`: nothing on the way to the loop may take it for a broken file."""


class PreTrainer:
    """A pre-training run: build it, then `run()`.

    Args:
        settings: of the run.

    Raises:
        UserError: (a `ValueError`) if the settings contradict each other, the data cannot be opened or the model not be built.
    """

    def __init__(self, settings: PreTrainingSettings):
        self.settings = settings
        self.output_dir = Path(settings.output_dir)
        # Positions, the only buffers, never change: nothing to broadcast before each forward pass.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self._take_folder()
        with as_user_error("trackers or mixed_precision"):
            self.accelerator = Accelerator(
                mixed_precision=settings.mixed_precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever a launcher says: the loop does it itself
                log_with=settings.trackers or None,
                project_dir=settings.output_dir,
                kwargs_handlers=[ddp],
            )
        self._check_launch()
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        set_seed(settings.seed)
        self.extractor = build_extractor(settings)
        self.clips = self._stream(settings.data, settings.num_workers)
        if settings.normalization == "computed":
            self._compute_normalization()
        self.model = build_model(settings, self.extractor)
        self.inputs = ["input_values", "attention_mask"] if settings.mask_padding else ["input_values"]  # of all that the stream says
        self.validation_set = self._validation_set()
        if settings.batch_size == 1 and self.accelerator.is_main_process:
            logger.warning(
                "batch_size is 1: the content share of the targets cannot be measured, so the guard cannot see a collapse to positions%s",
                ", and each clip is mixed with itself" if self.model.config.use_mixtures else "",
            )

        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay, settings.decay_all_weights),
            lr=0.0,
            betas=(settings.adam_beta1, settings.adam_beta2),
            fused=True,
        )
        if settings.compile:
            compile_model(self.model)
        # The model alone: Accelerate's wrapper of an optimiser would wait for the device, to know whether a step was skipped.
        self.wrapped = self.accelerator.prepare(self.model)
        self.guard = CollapseGuard(
            settings.min_target_std, settings.min_prediction_std, settings.min_content_share, settings.guard_after_updates
        )
        self.log = TrainingLog(self.accelerator, self.output_dir / "metrics.jsonl", self.model.config, self.extractor.max_length)

        # Where the run stands; what was skipped is known up to the last line of the log.
        self.update = self.skipped = self.skipped_in_a_row = self.clips_seen = 0
        self.stop_signal: int | None = None
        self.waits_for_data = False
        # Whether to stop is agreed upon over CPU tensors: the answer of NCCL would have to be read from the device.
        self.cpu_group: Any = torch.distributed.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None

    def _take_folder(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise UserError(f"output_dir {self.output_dir} cannot be written to ({error}): choose another") from error
        if not self.settings.resume and (found := checkpoints(self.output_dir)):
            raise UserError(
                f"resume is false, but output_dir {self.output_dir} holds checkpoints of another run ({found[-1].name}): choose another "
                "folder"
            )

    def _compute_normalization(self) -> None:
        """Mean and standard deviation of the run's own recordings: those that its checkpoint has, or else computed."""
        if (found := self._latest_checkpoint()) is not None:
            self.extractor.mean, self.extractor.std = (
                getattr(SSLAMFeatureExtractor.from_pretrained(found), name) for name in ("mean", "std")
            )
            return
        clips, settings = self.clips, self.settings
        with as_user_error("data"):
            self.extractor.mean, self.extractor.std = compute_normalization(
                clips.sources,
                clips.readers.windows,
                self.extractor,
                settings=settings.data,
                seed=settings.seed,
                num_workers=settings.num_workers,
            )

    def _check_launch(self) -> None:
        accelerator = self.accelerator
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise UserError("mixed_precision is fp16, which needs a GPU: on a CPU use bf16 or no")
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise UserError(
                f"Accelerate was set to {accelerator.distributed_type.value}, but each process here holds the whole model (6 GB of "
                "weights, gradients and moments for the large one): choose data-parallel training, as in scripts/launch"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != accelerator.num_processes:  # they would not know of each other, and write over each other's files
            raise UserError(
                f"{started} processes were started, but Accelerate sees {accelerator.num_processes}: on CPUs set ACCELERATE_USE_CPU=true"
            )

    # --- the loop

    def run(self) -> Path:
        """Train to the last update, or to a SIGTERM or SIGINT, behind which a checkpoint is written.

        Returns:
            The last checkpoint's folder. After the last update the model also lies in `output_dir/model`.

        Raises:
            CollapseError: if targets or predictions collapse.
            NonFiniteError: if a line is logged after too many updates in a row with gradients that are not finite.
            OSError: if a checkpoint cannot be written. Former ones stay as they are.
        """
        with lock(self.output_dir) if self.accelerator.is_main_process else contextlib.nullcontext():
            return self._run()

    def _run(self) -> Path:
        settings = self.settings
        if self.accelerator.is_main_process:
            sweep_leftovers(self.output_dir)
        self._resume()
        self._start_logs()
        batches, watch = self._batches(), self.log.watch
        bar = tqdm(total=settings.total_updates, initial=self.update, unit="update", disable=not self._shows_bar(), dynamic_ncols=True)
        with _signals_to(self._ask_to_stop), bar, logging_redirect_tqdm(), self.log.open(self.update, self.clips_seen):
            while self.update < settings.total_updates:
                position = self.clips.state_dict()
                micro_batches = watch.wait_for(lambda: self._next(batches))
                if self._is_asked_to_stop():
                    if self.log.pending:
                        self._log()
                    self._save(position)  # that of before: some rank may have no batch to train on
                    logger.warning("Stopped by a signal at update %d of %d; to resume, start again", self.update, settings.total_updates)
                    break
                self._train(micro_batches)
                bar.update()
                ends = self.update == settings.total_updates
                validates, saves = (ends or self.update % every == 0 for every in (settings.validate_every, settings.save_every))
                if validates or saves or self.update % settings.log_every == 0:
                    self._log()
                if validates and self.validation_set:
                    self._log_validation()
                if saves:
                    self._save(self.clips.state_dict())
                if validates or saves:
                    watch.lap()  # neither belongs to the speed of training
        if self.update == settings.total_updates and self.accelerator.is_main_process:
            self._save_model()
            logger.info("Finished: the model lies in %s", self.output_dir / "model")
        self.accelerator.end_training()
        return checkpoint_folder(self.output_dir, self.update)

    def _train(self, micro_batches: list[Batch]) -> None:
        """One update. The host reads nothing of it from the device, which decides by itself whether the step is skipped."""
        settings, update = self.settings, self.update + 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                update, settings.learning_rate, settings.warmup_updates, settings.total_updates, settings.final_learning_rate
            )
            group["eps"] = adam_epsilon(update, settings.adam_epsilon, settings.adam_beta2)
        # Batches are full, so every rank has as many clips.
        clips = self.accelerator.num_processes * sum(len(batch["input_values"]) for batch in micro_batches)
        statistics = torch.zeros(2, len(STATISTICS), device=self.accelerator.device)  # weighted sums, and the weights
        self.wrapped.train()
        for i, batch in enumerate(micro_batches):
            self._seed(self.update, i)
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                output = self.wrapped(**self._on_device(batch))
                # The published reduction divides sums over all devices by the masked patches of all devices. As every clip has equally
                # many, that is this weight; DDP then takes the mean over devices, hence their number.
                weight = len(batch["input_values"]) / clips
                self.accelerator.backward(output.loss * weight * self.accelerator.num_processes)
            values = torch.stack([_detached(output.get(name), output.loss) for name in STATISTICS])
            unknown = values.isnan()  # as the content share of a batch of one clip is
            statistics += weight * torch.stack((values.masked_fill(unknown, 0), (~unknown).to(values.dtype)))
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)  # which also tells the scaler, on the device, of gradients that are not finite
        # Gradients are the same on all ranks by now, and so is what is skipped.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        skipped = ~norm.isfinite()
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # where it is 1, a fused step changes nothing
        self.optimizer.step()
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        self.model.update_teacher(update, skipped)
        self.log.pending.append(statistics.masked_fill(skipped, 0))
        self.update, self.clips_seen = update, self.clips_seen + clips

    def _batches(self) -> Iterator[Batch]:
        """What the model takes of this rank's clips, epoch after epoch."""
        with as_user_error("data"):
            for batch in self.clips:
                yield {name: batch[name] for name in self.inputs}

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """The batches of an update; none if the run was asked to stop, which ends the wait for data that may never come."""
        self.waits_for_data = True
        try:
            if self.stop_signal is not None:
                return []
            return [next(batches) for _ in range(self.settings.gradient_accumulation_steps)]
        except _AskedToStop:
            return []
        finally:
            self.waits_for_data = False

    def _on_device(self, batch: Batch) -> Batch:
        return {name: values.to(self.accelerator.device, non_blocking=True) for name, values in batch.items()}

    def _seed(self, *numbers: int) -> None:
        """Make all that is random in the next forward pass follow from the seed, these numbers and the rank."""
        entropy = [self.settings.seed, self.accelerator.process_index, *numbers]
        # Torch's own generator, of each device: compiled code takes no other.
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _is_asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all stop after the same update."""
        if self.cpu_group is None:
            return self.stop_signal is not None
        asked = torch.tensor(int(self.stop_signal is not None))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.cpu_group)
        return bool(asked)

    def _ask_to_stop(self, number: int) -> None:
        self.stop_signal = number
        if self.waits_for_data:
            raise _AskedToStop

    # --- logs

    def _start_logs(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        flat = {name: value for name, value in asdict(settings).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("sslam", config=flat)
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.log.peak = matmul_peak(accelerator.device, autocast)
        if accelerator.is_main_process:
            logger.info(
                "Pre-training, %s, on %d x %s: %.1f M parameters, %.3g FLOP a clip; matrix products reach %.3g FLOP/s",
                *(STAGE_NAMES[settings.stage], accelerator.num_processes, accelerator.device.type),
                *(self.model.num_parameters(only_trainable=True) / 1e6, self.log.flops_per_clip, self.log.peak),
            )

    def _shows_bar(self) -> bool:
        return self.accelerator.is_main_process and os.isatty(2)

    def _log(self) -> None:
        """Write a line about the updates since the last one, and look at what should stop the run."""
        settings = self.settings
        rate = self.optimizer.param_groups[0]["lr"]
        means, skipped = self.log.write(self.update, settings.total_updates, self.clips_seen, rate, self.skipped)
        for update, is_skipped in enumerate(skipped, self.update - len(skipped) + 1):
            self.skipped += is_skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
            if self.skipped_in_a_row >= settings.max_skipped_in_a_row:
                raise NonFiniteError(
                    f"gradients were not finite {self.skipped_in_a_row} times in a row at update {update}: lower the learning rate, look "
                    "for clips with extreme values, or use bf16 rather than fp16; max_skipped_in_a_row sets how often this may happen"
                )
        if any(skipped):
            logger.warning(
                "Gradients of %d of the last %d updates were not finite: these updates changed nothing (%d since the run began)",
                *(sum(skipped), len(skipped), self.skipped),
            )
        self.guard.check(self.update, means["target_std"], means["prediction_std"], means["content_share"])

    # --- validation

    def _validation_set(self) -> list[Batch]:
        """This rank's share of the fixed clips that the validation loss is taken on."""
        if self.settings.validation is None:
            return []
        share = -(-self.settings.validation_clips // self.accelerator.num_processes)
        stream = self._stream(self.settings.validation, num_workers=0, name="validation", epochs=1)
        batches, found = [], 0
        with as_user_error("validation"):
            for batch in stream:
                batches.append({name: batch[name][: share - found] for name in self.inputs})
                found += len(batches[-1]["input_values"])
                if found >= share:
                    break
        if not found:
            raise UserError(f"validation: there is no clip for rank {self.accelerator.process_index}: give more, or use fewer devices")
        return batches

    @torch.no_grad()
    def _log_validation(self) -> None:
        """Losses on the fixed clips under the same masks and mixtures each time."""
        self.model.eval()
        totals = torch.zeros(1 + len(LOSSES), dtype=torch.float64, device=self.accelerator.device)
        for i, batch in enumerate(self.validation_set):
            self._seed(2**40, i)  # apart from all updates
            with self.accelerator.autocast():
                output = self.model(**self._on_device(batch))
            losses = torch.stack([_detached(output.get(name), output.loss) for name in LOSSES]).double()
            totals += len(batch["input_values"]) * torch.cat((torch.ones(1, device=losses.device), losses))
        count, *sums = self.accelerator.reduce(totals, "sum").tolist()
        means = {f"validation_{name}": total / count for name, total in zip(LOSSES, sums)}
        self.log.write_validation(self.update, means, round(count))

    # --- checkpoints

    def _save(self, position: dict[str, Any]) -> None:
        """Write a checkpoint, all ranks together; if any of them cannot, none is left, and all raise the same error."""
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        problem = None
        try:
            if main:
                begin_checkpoint(self.output_dir, self.update)
        except OSError as error:
            problem = str(error)
        accelerator.wait_for_everyone()
        folder = unfinished_folder(self.output_dir, self.update)
        try:
            if main and problem is None:
                self.model.save_pretrained(folder)
                self.extractor.save_pretrained(folder)
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, folder / "optimizer.pt")
                (folder / "run.json").write_text(json.dumps({**self._place(), "settings": asdict(self.settings)}, indent=1))
            if problem is None:
                (folder / f"rank-{accelerator.process_index:05d}.json").write_text(json.dumps({"clips": position}))
        except (OSError, RuntimeError, SafetensorError) as error:  # as which torch.save and safetensors tell of a full disk
            problem = str(error)
        problems = [text for text in gather_object([problem]) if text is not None]
        if main and not problems:
            try:
                finish_checkpoint(folder)
                sweep(self.output_dir, self.update, self.settings.keep_last, self.settings.keep_every)
            except OSError as error:
                problems = [str(error)]
        problems = broadcast_object_list([problems])[0]
        if problems:
            if main:
                sweep_leftovers(self.output_dir)
            raise OSError(
                f"the checkpoint of update {self.update} could not be written ({problems[0]}): make room in {self.output_dir} and start "
                "again; former checkpoints are as they were"
            )

    def _save_model(self) -> None:
        """The finished model in `output_dir/model`, with its feature extractor, code and card."""
        folder, settings = self.output_dir / "model", self.settings
        self.model.save_pretrained(folder)
        self.extractor.save_pretrained(folder)
        write_settings(settings, folder / "settings.yaml")
        sources = ", ".join(f"`{source.name}`" for source in settings.data.sources)
        hours = self.clips_seen * self.extractor.max_length / 360_000
        start = "from scratch" if settings.init_from is None else f"from `{public_name(settings.init_from)}`"
        what = f"{self.update} updates, {self.clips_seen} clips, {hours:.1f} hours of input"
        text = f"Pre-trained {start} on {sources}, {STAGE_NAMES[settings.stage]}: {what}. `settings.yaml` holds every setting. "
        write_model_card(folder, text + "Student, decoder and teacher are kept.")
        add_remote_code(folder)

    def _place(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTERS} | {"world_size": self.accelerator.num_processes}

    def _resume(self) -> None:
        """Go to where the latest whole checkpoint stands, if there is one."""
        accelerator, folder = self.accelerator, self._latest_checkpoint()
        if folder is None:
            return
        run = read_json(folder / "run.json")
        if run["settings"]["stage"] != self.settings.stage or run["update"] > self.settings.total_updates:
            raise UserError(
                f"{folder} is of stage {run['settings']['stage']} and update {run['update']}, but stage {self.settings.stage} and "
                f"{self.settings.total_updates} updates are asked for: choose another output_dir"
            )
        for name in COUNTERS:
            setattr(self, name, run[name])
        try:
            self.model.load_state_dict(SSLAMForPreTraining.from_pretrained(folder).state_dict())
        except RuntimeError as error:  # torch names every tensor that differs
            raise UserError(
                f"{folder} holds a model of other sizes than `preset` and `model` ask for: leave them as they were, or choose another "
                "output_dir"
            ) from error
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)  # goes to the parameters' device below
        self._load_optimizer(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        with as_user_error(f"the run in {self.output_dir} cannot be resumed"):
            self.clips.load_state_dict([read_json(folder / f"rank-{rank:05d}.json")["clips"] for rank in range(run["world_size"])])
        if accelerator.is_main_process:
            self._report_resuming(folder, run)

    def _latest_checkpoint(self) -> Path | None:
        """The latest whole checkpoint, if there is one: what the main process finds, told to all."""
        with as_user_error("the run cannot be resumed"):
            found = latest_whole_checkpoint(self.output_dir) if self.settings.resume and self.accelerator.is_main_process else None
        return broadcast_object_list([found])[0]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """The moments are the checkpoint's, the settings this run's."""
        settings = [{name: group[name] for name in ("weight_decay", "betas")} for group in self.optimizer.param_groups]
        with as_user_error("decay_all_weights is another one than when the run began: leave it as it was"):
            self.optimizer.load_state_dict(state)
        for group, values in zip(self.optimizer.param_groups, settings):
            group.update(values)

    def _report_resuming(self, folder: Path, run: dict) -> None:
        logger.info("Resuming from %s: update %d of %d", folder, self.update, self.settings.total_updates)
        if run["world_size"] != self.accelerator.num_processes:
            logger.warning(
                "The run had %d processes and now has %d: weights, optimiser and teacher are as they were, and each clip of the epoch "
                "still comes once, but the size of an update's batch, its clips and the masks are others, so the run is another one",
                *(run["world_size"], self.accelerator.num_processes),
            )
        now = json.loads(json.dumps(asdict(self.settings)))
        then = {**now, **run["settings"]}  # without the settings that did not exist then
        changed = [f"{name} ({then[name]} then, {now[name]} now)" for name in now if then[name] != now[name]]
        if changed:
            logger.warning("Settings have changed since that checkpoint: %s", "; ".join(changed))

    def _stream(self, data: DataSettings, num_workers: int, name: str = "data", epochs: int | None = None) -> ClipStream:
        with as_user_error(name):
            return ClipStream(
                data,
                self.extractor,
                device=self.accelerator.device,
                batch_size=self.settings.batch_size,
                seed=self.settings.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                num_workers=num_workers,
                pin_memory=self.accelerator.device.type == "cuda" and num_workers > 0,
                epochs=epochs,
            )


def _detached(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if value is None else value.detach().to(like.dtype)


@contextlib.contextmanager
def _signals_to(handler) -> Iterator[None]:
    """Hand SIGTERM and SIGINT to `handler`. A second Ctrl-C does what it always does; SIGTERM may come twice where it was sent once, for a
    launcher hands on to its processes what a scheduler sent to all."""

    def handle(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        handler(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


__all__ = ["PreTrainer"]
