"""The pre-training loop.

Nothing random is carried from step to step: masks, mixtures and noise follow from (seed, step, process), the order of clips from the
stream's position, rates and decays from the step. So a resumed run is the same run, bit for bit on a CPU.

No step waits for the device. Where gradients are not finite, the device itself skips the optimiser's step and the teacher's; such a step
counts, and changes nothing. What steps compute is read when a line is logged.
"""

import contextlib
import logging
import math
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..allocator import keep_freed_memory
from ..attention_sslam import CPU_HALF_PRECISION_ATTENTION
from ..checkpoints import checkpoint_folder, checkpoints, sweep_leftovers
from ..distributed import leave_process_group
from ..errors import UserError, as_user_error
from ..files import lock
from ..loading_sslam import flatten_patch_projection_moments
from ..publishing.conversion import resolve_model
from .checkpoints import RunCheckpoints
from .data import Batch, check_validation_batches, open_probe, open_training_clips, read_validation_clips
from .model import build_extractor, build_model, compile_model, parameter_groups
from .monitoring import LOSSES, STATISTICS, NonFiniteError, TrainingLog, check_collapse, matmul_peak, weighted_statistics
from .processes import StopSignals, build_accelerator
from .schedules import adam_epsilon, learning_rate
from .settings import PreTrainingSettings


logger = logging.getLogger(__name__)

DIVERGED = 10  # times the first loss, from which on a loss is warned about
# Where a run stands, as a checkpoint holds it. What was skipped is known up to the last line of the log.
COUNTERS = ("step", "skipped", "skipped_in_a_row", "clips_seen")


def run(settings: PreTrainingSettings) -> None:
    """The command `sslam pretrain`: pre-train, with a log on the console.

    Raises:
        SystemExit: if a signal stopped the run before its end, with the status that a shell expects (130 for Ctrl-C, 143 for SIGTERM), so
            that in `stage 1 && stage 2` the second does not start from half of the first.
        UserError, OSError: see [`PreTrainer`].
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING  # before Accelerate knows the ranks
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers.logging.disable_progress_bar()
    trainer = PreTrainer(settings)
    if trainer.accelerator.device.type == "cpu":
        keep_freed_memory()
    trainer.run()
    stopped_by = trainer.stop.received if trainer.step < settings.max_steps else None
    del trainer
    leave_process_group()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


class PreTrainer:
    """A pre-training run: build it, then `run()`.

    Args:
        settings: of the run.

    Raises:
        UserError: (a `ValueError`) if the settings contradict each other, the data cannot be opened or the model cannot be built.
    """

    def __init__(self, settings: PreTrainingSettings):
        self.settings, self.output_dir = settings, Path(settings.output_dir)
        self._check_output_dir()
        self.accelerator = build_accelerator(settings)
        set_seed(settings.seed)
        origin = None if settings.model is None else resolve_model(settings.model)
        self.extractor = build_extractor(settings, origin)
        self.clips = open_training_clips(settings, self.extractor, self.accelerator)
        in_half_on_cpu = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision == "bf16"
        self.model = build_model(settings, self.extractor, origin, CPU_HALF_PRECISION_ATTENTION if in_half_on_cpu else None)
        mixes_waveforms = self.model.config.use_mixtures and self.model.config.mixing_domain == "waveform"
        self.inputs = ("input_values", *["attention_mask"] * (settings.mask_padding or mixes_waveforms), *["waveforms"] * mixes_waveforms)
        self.clips.waveforms = mixes_waveforms
        self.validation_batches = read_validation_clips(settings, self.extractor, self.accelerator, self.inputs)
        check_validation_batches(self.validation_batches, self.model.config)
        self.probe = open_probe(settings, self.extractor, self.accelerator)
        if settings.per_device_train_batch_size == 1 and self.accelerator.is_main_process:
            logger.warning(
                "per_device_train_batch_size is 1: content_share cannot be measured, so the guard cannot detect targets that depend on "
                "positions only%s",
                ", and each clip is mixed with itself" if self.model.config.use_mixtures else "",
            )
        config = self.model.config
        if settings.max_steps < config.ema_anneal_end_step and config.ema_decay != config.ema_end_decay:
            logger.info(
                "max_steps is %d, but the teacher's decay rises until step %d (model_config.ema_anneal_end_step): it will not reach %g",
                *(settings.max_steps, config.ema_anneal_end_step, config.ema_end_decay),
            )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay, settings.decay_all_weights),
            lr=0.0,
            betas=(settings.adam_beta1, settings.adam_beta2),
            fused=True,
        )
        self.optimizer.register_load_state_dict_post_hook(flatten_patch_projection_moments)  # of runs that an earlier version began
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if settings.torch_compile:
            compile_model(self.model)
        # The model alone: Accelerate's wrapper of an optimiser would wait for the device, to know whether a step was skipped.
        self.wrapped = self.accelerator.prepare(self.model)
        self.checkpoints = RunCheckpoints(settings, self.accelerator, self.model, self.extractor, self.optimizer)
        self.log = TrainingLog(self.accelerator, self.output_dir / "metrics.jsonl", self.model.config, self.extractor.max_length)
        self.stop = StopSignals(self.accelerator.num_processes)
        self.step = self.skipped = self.skipped_in_a_row = self.clips_seen = 0
        self.first_loss: float | None = None  # mean over the steps of the first line since the start

    def _check_output_dir(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise UserError(f"output_dir {self.output_dir} cannot be written to ({error}): choose another") from error
        if not (found := checkpoints(self.output_dir)) and (self.output_dir / "model" / "config.json").exists():
            raise UserError(
                f"output_dir {self.output_dir} holds a finished model, and no checkpoint of its run any more: choose another folder, or "
                "move the model away"
            )
        if not self.settings.resume_from_checkpoint and found:
            raise UserError(
                f"resume_from_checkpoint is false, but output_dir {self.output_dir} holds checkpoints of another run ({found[-1].name}): "
                "choose another folder"
            )

    def run(self) -> Path:
        """Train to the last step, or to a SIGTERM or SIGINT, after which a checkpoint is written.

        Returns:
            The last checkpoint's folder. After the last step the model is also in `output_dir/model`.

        Raises:
            CollapseError: if targets or predictions collapse.
            NonFiniteError: if a line is logged after too many consecutive steps with gradients that are not finite.
            UserError: if another process runs in `output_dir`, or its checkpoint does not belong to this run.
            OSError: if a checkpoint cannot be written. Former ones stay as they are.
        """
        main = self.accelerator.is_main_process
        with lock(self.output_dir) if main else contextlib.nullcontext():
            if main:
                sweep_leftovers(self.output_dir)
            if self.probe is not None:  # before weights of a checkpoint are loaded, so that a resumed run has the same figures
                logger.info("Probing the first weights, on %d labelled clips", len(self.probe.task.targets))
                self.probed_at_start = self._probed()
            self._resume()
            self._start_logs()
            hidden = not main or not os.isatty(2)
            bar = tqdm(total=self.settings.max_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=hidden)
            with self.stop, bar, logging_redirect_tqdm(), self.log.open(self.step, self.clips_seen):
                if self.probe is not None:
                    if self.step == 0:
                        self.log.write_probe(0, self.probed_at_start, self.probed_at_start, self.probe.metric)
                    self.log.lap()  # the probe does not belong to the speed of training
                self._loop(bar)
            if main and self.step == self.settings.max_steps:
                logger.info("Finished: the model is in %s", self.checkpoints.save_model(self.step, self.clips_seen))
            self.accelerator.end_training()
        return checkpoint_folder(self.output_dir, self.step)

    def _loop(self, bar: tqdm) -> None:
        settings, stream = self.settings, iter(self.clips)
        while self.step < settings.max_steps:
            position = self.clips.state_dict()
            with self.log.waiting():
                # Nothing has waited for the device: it still computes the last step while the next clips are fetched.
                batches = self._fetch(stream)
            if self.stop.agreed():
                self._log()
                self._save(position)  # that of before: some process may have no batch to train on
                logger.warning("Stopped by a signal after step %d of %d; to resume, start again", self.step, settings.max_steps)
                return
            self._train(batches)
            bar.update()
            logs, validates, saves, probes = (
                every is not None and (self.step % every == 0 or self.step == settings.max_steps)
                for every in (settings.logging_steps, settings.eval_steps, settings.save_steps, settings.probe_every)
            )
            if logs or validates or saves or probes:  # a checkpoint knows what was skipped
                self._log()
            if validates:
                self._validate()
            if saves:
                self._save(self.clips.state_dict())
            if probes:
                self._probe()
            if validates or saves or probes:
                self.log.lap()  # none belongs to the speed of training

    def _fetch(self, stream: Iterator[Batch]) -> list[Batch]:
        """The batches of a step; none once a signal has arrived."""
        with as_user_error("data"):
            return self.stop.wait_for(lambda: [next(stream) for _ in range(self.settings.gradient_accumulation_steps)]) or []

    def _train(self, batches: list[Batch]) -> None:
        """One step. This process reads nothing of it from the device, which decides by itself whether the step is skipped."""
        settings, accelerator, step = self.settings, self.accelerator, self.step + 1
        rate = learning_rate(step, settings.learning_rate, settings.num_warmup_steps, settings.max_steps, settings.min_lr)
        for group in self.optimizer.param_groups:
            group.update(lr=rate, eps=adam_epsilon(step, settings.adam_epsilon, settings.adam_beta2))
        statistics = torch.zeros(2, len(STATISTICS), device=accelerator.device)
        self.wrapped.train()
        for i, batch in enumerate(batches):
            self._seed(self.step, i)
            with accelerator.no_sync(self.wrapped) if i < len(batches) - 1 else contextlib.nullcontext():
                output = self.wrapped(**self._on_device(batch))
                # The published loss divides sums over all devices by the masked patches of all devices. Batches are full and every clip has
                # equally many masked patches, so that is the mean over batches here, and over devices, which DDP takes.
                accelerator.backward(output.loss / len(batches))
            statistics += weighted_statistics(output, 1 / len(batches))
        scaler = accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)  # which also tells the scaler, on the device, of gradients that are not finite
        # By now gradients are the same in all processes, and so is what is skipped.
        skipped = ~nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm).isfinite()
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # where it is 1, a fused step changes nothing
        self.optimizer.step()
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        self.model.update_teacher(step, skipped)
        self.log.pending.append(statistics.masked_fill(skipped, 0))
        self.step = step
        self.clips_seen += accelerator.num_processes * len(batches) * settings.per_device_train_batch_size

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: batch[name].to(self.accelerator.device, non_blocking=True) for name in self.inputs}

    def _seed(self, *numbers: int) -> None:
        """Make everything random in the next forward pass follow from the seed, these numbers and the process."""
        entropy = [self.settings.seed, self.accelerator.process_index, *numbers]
        # Torch's own generator, of each device: compiled code takes no other.
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    @torch.no_grad()
    def _validate(self) -> None:
        """Losses on the validation clips, under the same masks and mixtures each time."""
        if not self.validation_batches:
            return
        self.model.eval()
        totals = torch.zeros(2, len(STATISTICS), dtype=torch.float64, device=self.accelerator.device)
        for i, batch in enumerate(self.validation_batches):
            self._seed(2**40, i)  # apart from all steps
            with self.accelerator.autocast():
                output = self.model(**self._on_device(batch))
            totals += weighted_statistics(output, len(batch["input_values"]))
        sums, weights = self.accelerator.reduce(totals, "sum").cpu()
        means = {f"validation_{name}": mean for name, mean in zip(LOSSES, (sums / weights).tolist())}  # losses come first in STATISTICS
        self.log.write_validation(self.step, means, round(weights[0].item()))

    def _probe(self) -> None:
        """Probe the student in the main process, while the others wait. A signal ends the probe, which then has no line."""
        if self.probe is not None and (found := self.stop.wait_for(self._probed)) is not None:
            self.log.write_probe(self.step, found, self.probed_at_start, self.probe.metric)
        self.accelerator.wait_for_everyone()

    def _probed(self) -> dict[str, float]:
        with self.accelerator.autocast():
            return self.probe(self.model.sslam)  # type: ignore[misc]  # of the main process

    def _start_logs(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        flat = {name: value for name, value in asdict(settings).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("sslam", config=flat)
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.log.peak = matmul_peak(accelerator.device, autocast)
        if accelerator.is_main_process:
            logger.info(
                "Pre-training, %s, on %d x %s: %.1f M parameters, %.3g FLOP per clip; matrix products reach %.3g FLOP/s",
                *(settings.stage_name, accelerator.num_processes, accelerator.device.type),
                *(self.model.num_parameters(only_trainable=True) / 1e6, self.log.flops_per_clip, self.log.peak),
            )
            logger.info("Each step is logged in %s%s", self.log.path, self._where_curves_are())

    def _where_curves_are(self) -> str:
        """How to see what TensorBoard has, if it is among the trackers."""
        if not any(tracker.name == "tensorboard" for tracker in self.accelerator.trackers):
            return ""
        return f"; curves of loss, speed and hours of audio seen: tensorboard --logdir {shlex.quote(str(self.output_dir))}"

    def _log(self) -> None:
        """Write a line about the steps since the last one, and check whether the run should stop."""
        if not self.log.pending:
            return
        settings = self.settings
        rate = self.optimizer.param_groups[0]["lr"]
        means, skipped = self.log.write(self.step, settings.max_steps, self.clips_seen, rate, self.skipped)
        for step, is_skipped in enumerate(skipped, self.step - len(skipped) + 1):
            self.skipped += is_skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
            if self.skipped_in_a_row >= settings.max_skipped_steps:
                raise NonFiniteError(
                    f"gradients were not finite {self.skipped_in_a_row} times in a row at step {step}: lower the learning rate, look for "
                    "clips with extreme values, or use bf16 rather than fp16; max_skipped_steps sets how often this may happen"
                )
        if any(skipped):
            logger.warning(
                "Gradients of %d of the last %d steps were not finite: these steps changed nothing (%d since the run began)",
                *(sum(skipped), len(skipped), self.skipped),
            )
        if self.first_loss is None or math.isnan(self.first_loss):  # NaN: all steps of the first line were skipped
            self.first_loss = means["loss"]
        elif means["loss"] > DIVERGED * self.first_loss and self.accelerator.is_main_process:
            logger.warning(
                "The mean loss since the last line is %.4g, more than %d times that of the first line, %.4g: if it stays so high, the run "
                "has diverged; start again with a lower learning_rate",
                *(means["loss"], DIVERGED, self.first_loss),
            )
        check_collapse(settings, self.step, means)

    def _save(self, position: dict[str, Any]) -> None:
        self.checkpoints.save({name: getattr(self, name) for name in COUNTERS}, position)

    def _resume(self) -> None:
        if (loaded := self.checkpoints.load()) is not None:
            counters, positions = loaded
            for name in COUNTERS:
                setattr(self, name, counters[name])
            with as_user_error(f"the run in {self.output_dir} cannot be resumed"):
                self.clips.load_state_dict(positions)
