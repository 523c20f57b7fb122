"""Checkpoints of a pre-training run: everything that resuming it needs.

A checkpoint is a model that Transformers loads, with its feature extractor, and beside it `optimizer.pt` (moments, scale of the loss),
`run.json` (counters and settings) and `rank-N.json` (position in the data) of each process.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from ..checkpoints import begin_checkpoint, finish_checkpoint, latest_whole_checkpoint, sweep, sweep_leftovers, unfinished_folder
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import read_json, verify
from ..modeling_sslam_pretraining import SSLAMForPreTraining
from ..publishing.cards import describe_origin, public_name, write_model_card
from ..publishing.hub import add_remote_code
from ..settings import write_settings
from .settings import PreTrainingSettings


logger = logging.getLogger(__name__)

# Settings and counters that had other names in the `run.json` of earlier versions.
RENAMED = {
    **{"update": "step", "total_updates": "max_steps", "warmup_updates": "warmup_steps", "batch_size": "per_device_train_batch_size"},
    **{"compile": "torch_compile", "num_workers": "dataloader_num_workers", "save_every": "save_steps", "keep_last": "save_total_limit"},
    **{"keep_every": "keep_steps", "log_every": "logging_steps", "validate_every": "eval_steps", "trackers": "report_to"},
    **{"guard_after_updates": "guard_after_steps", "max_skipped_in_a_row": "max_skipped_steps", "init_from": "model"},
    **{"model": "model_config", "features": "feature_extractor", "resume": "resume_from_checkpoint"},
}


def find_checkpoint(settings: PreTrainingSettings, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, if there is one: what the main process finds, told to all.

    Raises:
        UserError: if none is whole, or not the one that `resume_from_checkpoint` names.
    """
    found, resume = None, settings.resume_from_checkpoint
    if accelerator.is_main_process and isinstance(resume, str):
        if (problem := verify(resume)) is not None:
            raise UserError(f"resume_from_checkpoint is {resume}, which is not a whole checkpoint of this program: {problem}")
        found = Path(resume)
    elif accelerator.is_main_process and resume:
        found = latest_whole_checkpoint(Path(settings.output_dir))
    return broadcast_object_list([found])[0]


@dataclass
class RunCheckpoints:
    """Writes and reads the checkpoints of a run. All processes call `save` and `load` together. The model is the unwrapped one."""

    settings: PreTrainingSettings
    accelerator: Accelerator
    model: SSLAMForPreTraining
    extractor: SSLAMFeatureExtractor
    optimizer: torch.optim.Optimizer

    def __post_init__(self):
        self.output_dir = Path(self.settings.output_dir)

    def save(self, counters: dict[str, int], position: dict[str, Any]) -> None:
        """Write a checkpoint, and delete those that are no longer to be kept.

        Args:
            counters: where the run stands; `step` among them names the checkpoint.
            position: of this process in the data.

        Raises:
            OSError: in all processes if any of them cannot write. No part of the checkpoint is left, and former ones are as they were.
        """
        settings, step, main = self.settings, counters["step"], self.accelerator.is_main_process
        folder = unfinished_folder(self.output_dir, step)

        def begin() -> None:
            if main:
                begin_checkpoint(self.output_dir, step)

        def write() -> None:
            if main:
                self.model.save_pretrained(folder)
                self.extractor.save_pretrained(folder)
                scaler = self.accelerator.scaler
                state = {"optimizer": self.optimizer.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
                torch.save(state, folder / "optimizer.pt")
                run = {**counters, "world_size": self.accelerator.num_processes, "settings": asdict(settings)}
                (folder / "run.json").write_text(json.dumps(run, indent=1))
            (folder / f"rank-{self.accelerator.process_index:05d}.json").write_text(json.dumps({"clips": position}))

        def finish() -> None:
            if main:
                finish_checkpoint(folder)
                if settings.save_total_limit is not None:
                    sweep(self.output_dir, step, settings.save_total_limit, settings.keep_steps)

        for work in (begin, write, finish):
            self._do_together(work, step)

    def _do_together(self, work: Callable[[], None], step: int) -> None:
        problem = None
        try:
            work()
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what torch.save and safetensors raise on a full disk
            problem = str(error)
        problems = [text for text in gather_object([problem]) if text is not None]
        if problems:
            if self.accelerator.is_main_process:
                sweep_leftovers(self.output_dir)
            raise OSError(
                f"the checkpoint of step {step} could not be written ({problems[0]}): make room in {self.output_dir} and start again; "
                "former checkpoints are as they were"
            )

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Load model, optimiser and scaler from the checkpoint to resume from.

        Returns:
            `run.json` with its counters, and the position in the data of each process that the run then had; `None` without a checkpoint.

        Raises:
            UserError: if it is of another stage or a later step, or the model or the parameter groups do not fit.
        """
        folder, settings = find_checkpoint(self.settings, self.accelerator), self.settings
        if folder is None:
            return None
        run = read_json(folder / "run.json")
        if "update" in run:
            run = _with_current_names(run)
        if run["settings"]["stage"] != settings.stage or run["step"] > settings.max_steps:
            raise UserError(
                f"{folder} is of stage {run['settings']['stage']} and step {run['step']}, but stage {settings.stage} and "
                f"{settings.max_steps} steps are asked for: choose another output_dir"
            )
        try:
            self.model.load_state_dict(SSLAMForPreTraining.from_pretrained(folder).state_dict())
        except RuntimeError as error:  # torch names every tensor that differs
            raise UserError(
                f"{folder} holds a model of other sizes than preset and model_config ask for: leave them as they were, or choose another "
                "output_dir"
            ) from error
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)  # below, moments move to the parameters' device
        present = [{name: group[name] for name in ("weight_decay", "betas")} for group in self.optimizer.param_groups]
        with as_user_error("decay_all_weights is not what it was when the run began: leave it as it was"):
            self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, present):
            group.update(values)  # the moments are the checkpoint's, the settings this run's
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            self._report(folder, run)
        return run, [read_json(folder / f"rank-{rank:05d}.json")["clips"] for rank in range(run["world_size"])]

    def _report(self, folder: Path, run: dict[str, Any]) -> None:
        logger.info("Resuming from %s: step %d of %d", folder, run["step"], self.settings.max_steps)
        if run["world_size"] != self.accelerator.num_processes:
            logger.warning(
                "The run had %d processes and now has %d: weights, optimiser and teacher are as they were, and each clip of the epoch "
                "still comes once, but batches, their size and the masks differ, so the run continues differently",
                *(run["world_size"], self.accelerator.num_processes),
            )
        now, then = (dict(_leaves(values)) for values in (json.loads(json.dumps(asdict(self.settings))), run["settings"]))
        changed = [f"{name} ({then[name]} then, {now[name]} now)" for name in now if name in then and then[name] != now[name]]
        if changed:
            logger.warning("Settings have changed since that checkpoint: %s", "; ".join(changed))

    def save_model(self, steps: int, clips_seen: int) -> Path:
        """Write the finished model to `output_dir/model`, with its feature extractor, code and card. The main process alone calls this."""
        folder, settings = self.output_dir / "model", self.settings
        self.model.save_pretrained(folder)
        self.extractor.save_pretrained(folder)
        write_settings(settings, folder / "settings.yaml")
        names = [public_name(source.name) for source in settings.data.sources]
        sources = ", ".join(f"`{name}`" for name in names)
        hours = clips_seen * self.extractor.max_length / 360_000  # frames of 10 ms
        start = "from scratch" if settings.model is None else f"from `{public_name(settings.model)}`"
        text = (
            f"Pre-trained {start} on {sources}, {settings.stage_name}: {steps} steps, {clips_seen} clips, {hours:.1f} hours of audio seen. "
        )
        text += "`settings.yaml` holds every setting. Student, decoder and teacher are kept."
        write_model_card(folder, text, origin=describe_origin(settings.model, names))
        add_remote_code(folder)
        return folder


def _with_current_names(run: dict[str, Any]) -> dict[str, Any]:
    """A `run.json` of an earlier version, with the names that this one has."""
    run, settings = ({RENAMED.get(name, name): value for name, value in values.items()} for values in (run, run["settings"]))
    precision = settings.pop("mixed_precision", None)
    settings |= {name: precision == name for name in ("bf16", "fp16")}
    settings["lr_scheduler_kwargs"] = {"min_lr": settings.pop("final_learning_rate", 0.0)}
    return {**run, "settings": settings}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of all groups, by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
