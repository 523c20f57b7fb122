"""Steps of a study: each is done once, found again when the study is started again, and its cost is written down."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import soundfile
from accelerate.state import AcceleratorState

from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import AudioColumn, all_rows, hash_audio
from transformers_sslam.checkpoints import checkpoints
from transformers_sslam.errors import UserError
from transformers_sslam.files import DamagedFileError, lock, read_json, write_folder_atomically, write_json
from transformers_sslam.pretraining.loop import PreTrainer
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.settings import read_settings, settings_dict


logger = logging.getLogger(__name__)


def copy_clips(data_dir: str | Path, output_dir: str | Path, sampling_rate: int = 16_000) -> Path:
    """An audio folder decoded once: mono WAV of floats at the model's rate, with its metadata, so that no run resamples it again. Its
    splits become one.

    Several processes may ask for the same copy at once: the first makes it, and the others wait for it.

    Args:
        data_dir: an audio folder of a single split, with a `metadata.csv`.
        output_dir: where the copy lies; one of the same folder is taken as it is.

    Raises:
        UserError: if a clip cannot be read, or what lies there is the copy of another folder, or of this one before it changed.
    """
    output = Path(output_dir)
    rows = all_rows(open_splits(data_dir))
    sources = AudioColumn(rows)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):  # of class folders, whose names the copy keeps as text
            names = datasets.Features({**rows.features, column: datasets.Value("string")})
            rows = rows.map(lambda row, column=column, feature=feature: {column: feature.int2str(row[column])}, features=names)
    said = json.dumps(rows.remove_columns("audio").to_list(), default=str)
    origin = f"{Path(data_dir).resolve()} {hash_audio(sources)}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    if _is_copy(output, origin):
        return output
    waveforms = Waveforms(sources, sampling_rate)
    waveforms.check_unreadable(0.0, "study")
    # Numbered, for files of several folders or formats may share a name.
    names = [f"{number:05d}-{Path(audio['path']).stem}.wav" for number, audio in enumerate(sources)]
    with lock(output, wait=True):
        if _is_copy(output, origin):  # another process was faster
            return output
        with write_folder_atomically(output) as unfinished:
            for name, waveform in zip(names, waveforms):
                soundfile.write(unfinished / name, waveform, sampling_rate, subtype="FLOAT")
            rows.remove_columns("audio").add_column("file_name", names).to_csv(unfinished / "metadata.csv", index=False)
            (unfinished / _ORIGIN).write_text(origin)
    return output


_ORIGIN = ".copied-from"  # hidden, so that `datasets` does not take it for a clip


def _is_copy(output: Path, origin: str) -> bool:
    """Whether the folder is there, and is a copy of `origin`."""
    if not output.exists():
        return False
    found = (output / _ORIGIN).read_text() if (output / _ORIGIN).is_file() else "something else"
    if found != origin:
        raise UserError(
            f"{output} was copied from {found}, not from {origin} (folder and state of its clips): delete it, or give another output_dir"
        )
    return True


def pretrain_once(settings: PreTrainingSettings) -> tuple[Path, float]:
    """Pre-train, unless this very run is finished. Returns the model's folder and the CPU seconds that the run took.

    The seconds are NaN where the run was interrupted, and those of its first part are lost. Several processes a device, or workers that
    read ahead, are not counted: studies have neither.
    """
    output = Path(settings.output_dir)
    done = _read_step(output / "step.json", settings)
    if done is None:
        start, interrupted = time.process_time(), bool(checkpoints(output))
        # A `Trainer` that ran before in this process left its own precision and device there, which would not do here.
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = PreTrainer(settings)
        trainer.run()
        if trainer.step < settings.max_steps:  # stopped by a signal: the study stops too, and resumes from its checkpoint
            raise KeyboardInterrupt
        done = {"cpu_seconds": None if interrupted else time.process_time() - start}
        _write_step(output / "step.json", settings, done)
    return output / "model", math.nan if done["cpu_seconds"] is None else done["cpu_seconds"]


def pretrain_both_stages(
    stage1: str | Path, stage2: str | Path, output: Path, changes: Mapping[str, Any], changes_stage2: Mapping[str, Any]
) -> Path:
    """[`pretrain_once`] by two recipes, the second from the model of the first. Returns the folder of the last model.

    Args:
        stage1, stage2: recipes of `sslam pretrain`.
        output: folder of both runs.
        changes: settings of both, by name.
        changes_stage2: further ones of the second.
    """
    first, _ = pretrain_once(read_settings(PreTrainingSettings, stage1, {**changes, "output_dir": str(output / "stage1")}))
    own = {**changes, **changes_stage2, "model": str(first), "output_dir": str(output / "stage2")}
    return pretrain_once(read_settings(PreTrainingSettings, stage2, own))[0]


def pretrain_on_folds(
    recipe: str | Path, clips: Path, folds: Sequence[int | str], output: Path, changes: Mapping[str, Any]
) -> tuple[Path, float]:
    """[`pretrain_once`] by a recipe, on these folds of an audio folder, without their labels.

    Args:
        recipe: of `sslam pretrain`, whose sources are replaced.
        clips: the audio folder, with a column `fold`.
        folds: values of that column to train on.
        output: of the run.
        changes: further settings, by name.
    """
    source = {"kind": "audiofolder", "path": str(clips), "keep": {"fold": list(folds)}}
    return pretrain_once(read_settings(PreTrainingSettings, recipe, {**changes, "data.sources": [source], "output_dir": str(output)}))


def _read_step(file: Path, settings: Any) -> dict[str, Any] | None:
    """What a step left, if it was done with the very same settings."""
    step = read_or_none(file)
    same = (
        step is not None and step.keys() == {"settings", "results"} and step["settings"] == json.loads(json.dumps(settings_dict(settings)))
    )
    return step["results"] if step and same and isinstance(step["results"], dict) else None


def read_or_none(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; `None`, with a warning, of a damaged one, so that what wrote it is done again."""
    try:
        return read_json(file) if file.is_file() else None
    except DamagedFileError as error:
        logger.warning("%s; it is written anew", error)
        return None


def _write_step(file: Path, settings: Any, results: dict[str, Any]) -> None:
    """Leave a step's results with its settings, for `_read_step`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": settings_dict(settings), "results": results}, sealed=True)


def read_records(files: Iterable[Path], settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The finished runs of a study, by the name of their folder: those whose `settings` are these, and the names of all others.

    A run that is asked for again finds its finished steps, and writes its record anew.
    """
    wanted = json.loads(json.dumps(settings))
    found = {file.parent.name: read_or_none(file) or {} for file in sorted(files)}
    records = {name: record for name, record in found.items() if record.get("settings") == wanted}
    return records, sorted(found.keys() - records.keys())


def epochs_of_equal_cost(epochs: float, cost: float, total: float) -> int:
    """How many epochs cost `total`, where `epochs` of them cost `cost`: rounded up, in favour of whoever is given them."""
    return math.ceil(epochs * total / cost)
