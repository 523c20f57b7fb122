"""Steps of a study: each is done once, found again when the study is started again, and its cost is written down."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soundfile
import yaml

from ..data.labelled import Waveforms, load_audio_folder
from .checkpoints import checkpoints
from .fine_tuning import fine_tune
from .fine_tuning_settings import FineTuningSettings
from .pretraining import PreTrainer
from .pretraining_settings import PreTrainingSettings
from .settings import read_settings


def copy_clips(data_dir: str | Path, output_dir: str | Path, sampling_rate: int = 16_000) -> Path:
    """An audio folder decoded once: mono WAV of floats at the model's rate, with its metadata, so that no run resamples it again.

    Args:
        data_dir: an audio folder of a single split, with a `metadata.csv`.
        output_dir: where the copy lies; if it is whole, it is taken as it is.

    Raises:
        DatasetError: if a clip cannot be read.
    """
    output = Path(output_dir)
    if (output / "metadata.csv").is_file():  # written last
        return output
    (rows,) = load_audio_folder(data_dir).values()
    waveforms = Waveforms(rows["audio"], sampling_rate)
    waveforms.check_unreadable(0.0, "study")
    output.mkdir(parents=True, exist_ok=True)
    names = [f"{Path(audio['path']).stem}.wav" for audio in rows["audio"]]
    for name, waveform in zip(names, waveforms):
        soundfile.write(output / name, waveform, sampling_rate, subtype="FLOAT")
    table = rows.remove_columns("audio").add_column("file_name", names)
    table.to_csv(output / "metadata.csv", index=False)
    return output


def pretrain_once(settings: PreTrainingSettings) -> tuple[Path, float]:
    """Pre-train, unless this very run is finished. Returns the model's folder and the CPU seconds that the run took.

    The seconds are NaN where the run was interrupted, and those of its first part are lost. Several processes a device, or workers that
    read ahead, are not counted: studies have neither.
    """
    output = Path(settings.output_dir)
    done = _read_step(output / "step.json", settings)
    if done is None:
        start, interrupted = time.process_time(), settings.resume and bool(checkpoints(output))
        trainer = PreTrainer(settings)
        trainer.run()
        if trainer.update < settings.total_updates:  # stopped by a signal: the study stops too, and goes on from its checkpoint
            raise KeyboardInterrupt
        done = {"cpu_seconds": None if interrupted else time.process_time() - start}
        _write_step(output / "step.json", settings, done)
    return output / "model", math.nan if done["cpu_seconds"] is None else done["cpu_seconds"]


def pretrain_on_folds(
    recipe: str | Path, clips: Path, folds: Sequence[int | str], output: Path, changes: Sequence[str]
) -> tuple[Path, float]:
    """[`pretrain_once`] by a recipe, on these folds of an audio folder, without their labels.

    Args:
        recipe: of `scripts/pretrain.py`, whose sources are replaced.
        clips: the audio folder, with a column `fold`.
        folds: what is heard of it.
        output: of the run.
        changes: further `key=value`.
    """
    source = {"kind": "audiofolder", "path": str(clips), "keep": {"fold": list(folds)}}
    return pretrain_once(
        read_settings(PreTrainingSettings, recipe, [f"data.sources={json.dumps([source])}", *changes, f"output_dir={output}"])
    )


def fine_tune_once(settings: FineTuningSettings) -> dict[str, Any]:
    """The results of [`fine_tune`], unless this very run is finished: then those that it left."""
    folder = Path(settings.output_dir)
    finished = (folder / "results.json").is_file() and (folder / "settings.yaml").is_file() and not settings.overwrite
    if finished and yaml.safe_load((folder / "settings.yaml").read_text()) == json.loads(json.dumps(asdict(settings))):
        return json.loads((folder / "results.json").read_text())
    return fine_tune(settings)


def _read_step(file: Path, settings: Any) -> dict[str, Any] | None:
    """What a step left, if it was done with the very same settings."""
    if not file.is_file():
        return None
    step = json.loads(file.read_text())
    return step["results"] if step["settings"] == json.loads(json.dumps(asdict(settings))) else None


def _write_step(file: Path, settings: Any, results: dict[str, Any]) -> None:
    """Leave a step's results with its settings, for `read_step`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": asdict(settings), "results": results}, indent=2) + "\n")


def epochs_of_equal_cost(epochs: float, cost: float, total: float) -> int:
    """How many epochs cost `total`, where `epochs` of them cost `cost`: rounded up, in favour of whoever is given them."""
    return math.ceil(epochs * total / cost)


__all__ = ["copy_clips", "epochs_of_equal_cost", "fine_tune_once", "pretrain_on_folds", "pretrain_once"]
