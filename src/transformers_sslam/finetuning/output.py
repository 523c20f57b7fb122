"""The folder of a fine-tuning run: which run it holds, whether it is finished, and what can be resumed there."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from ..checkpoints import checkpoints, latest_whole_checkpoint, sweep_leftovers, sweep_unsealed
from ..errors import UserError, as_user_error
from ..evaluation.per_class import PICTURE
from ..files import DamagedFileError, hash_file, lock, plain_paths, read_json, verify, verify_files, write_text
from ..publishing.conversion import resolve_model
from ..settings import dump_yaml, read_settings
from .data import are_same_data, hash_data
from .lora import ADAPTER_FILES
from .settings import MACHINE_SETTINGS, FineTuningSettings


logger = logging.getLogger(__name__)

# Settings that the result of a run does not depend on.
SETTINGS_WITHOUT_EFFECT = MACHINE_SETTINGS | {"output_dir", "memory_gb", "max_unreadable", "do_train", "save_total_limit"}
RESULTS, SETTINGS = "results.json", "settings.yaml"
MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "scores.npz", *ADAPTER_FILES)


@contextmanager
def locked_folder(settings: FineTuningSettings) -> Iterator[Path]:
    """`output_dir`, locked. The model of a finished run is kept, unless `overwrite_output_dir` is true; then all of that run is deleted,
    so that files of two runs never lie beside each other."""
    output, main = Path(settings.output_dir), PartialState().is_main_process
    with as_user_error(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)
    with lock(output) if main else nullcontext():
        if main and (output / "config.json").exists():
            others, finished = differences(settings), read_results(output) is not None
            if settings.overwrite_output_dir and (finished or others):
                deleted = [folder.resolve() for folder in (output, *checkpoints(output))]
                for name in ("model", "resume_from_checkpoint"):
                    if isinstance(start := getattr(settings, name), str) and Path(start).resolve() in deleted:
                        raise UserError(f"{name} is {start!r}, which overwrite_output_dir would delete first: choose another output_dir")
                (output / RESULTS).unlink(missing_ok=True)  # first: without it the run counts as not finished
                for name in (*MODEL_FILES, SETTINGS, PICTURE, "README.md"):
                    (output / name).unlink(missing_ok=True)
                for folder in checkpoints(output):
                    shutil.rmtree(folder)
            elif others or finished:
                raise UserError(
                    f"output_dir {output} holds a model already, of {'a run with other ' + others if others else 'the same run'}: choose "
                    f"another folder, or set overwrite_output_dir to replace it. To train this model further, give --model {output} and "
                    "another output_dir"
                )
        PartialState().wait_for_everyone()
        yield output


def read_results(output: Path) -> dict[str, Any] | None:
    """The results of the run in this folder; `None` if it is not finished, or the file is damaged: then its last part is done again."""
    try:
        return read_json(output / RESULTS) if (output / RESULTS).is_file() else None
    except DamagedFileError as error:
        logger.warning(f"{error}; the run counts as not finished")
        return None


def differences(settings: FineTuningSettings) -> str:
    """What differs between the run in `output_dir` and one with these settings, in words; empty if it is the same run,
    finished and undamaged, or saved but not finished."""
    output = Path(settings.output_dir)
    try:
        results = read_results(output)
        names = _different(comparable(settings), comparable(read_settings(FineTuningSettings, output / SETTINGS)))
        if results is not None and (damaged := verify_files(output, results.get("files", {}))):
            raise DamagedFileError(damaged)
    except (OSError, UserError) as error:
        logger.warning(f"{output} does not hold a whole run ({error})")
        return "origin, or damaged files"
    if not names and results is not None and _are_others(results.get("origin"), _hash_model(settings.model)):
        return f"weights in {settings.model}"
    if names or settings.streaming or results is None:
        return ", ".join(names)
    return "" if are_same_data(results.get("data"), hash_data(settings)) else "data"


def hash_origin(origin: str | None) -> str | None:
    """A hash of the weights in a folder or on the Hub that a run starts from; `None` if there are none."""
    if origin is None:
        return None
    try:
        hashes = [hash_file(file) for file in _weight_files(origin)]
    except (OSError, UserError):  # loading them will say why
        return None
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else None


def _hash_model(model: str | None) -> str | None:
    try:
        return None if model is None else hash_origin(resolve_model(model))
    except UserError:
        return None


def _weight_files(origin: str) -> list[str]:
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = cached_file(origin, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and name.endswith(".json"):
            return [str(cached_file(origin, shard)) for shard in sorted(set(read_json(file)["weight_map"].values()))]
        if file is not None:
            return [file]
    return []


def _are_others(one: str | None, other: str | None) -> bool:
    """Whether two hashes of weights differ, where both are known: earlier versions did not tell, and a model may be gone."""
    return None not in (one, other) and one != other


def save_settings(settings: FineTuningSettings, file: Path) -> None:
    """Write the settings that a run consists of, as YAML that `read_settings` reads back."""
    write_text(file, dump_yaml(settings.to_save()))


def comparable(settings: FineTuningSettings) -> dict[str, Any]:
    """The settings that the result of a run depends on."""
    return {name: value for name, value in settings.to_save().items() if name not in SETTINGS_WITHOUT_EFFECT}


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    one, other = plain_paths(one), plain_paths(other)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def find_checkpoint(settings: FineTuningSettings, about: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from: the one that the settings name, or the latest whole one in `output_dir`, or `None`. Those that a
    killed run did not finish are deleted.

    Args:
        settings: of the run.
        about: `settings`, `data` and `origin` of the run, which those of the checkpoint must equal.

    Raises:
        UserError: if it is of a run with other settings or data, is damaged, or should not be there.
    """
    output, wanted, found = Path(settings.output_dir), settings.resume_from_checkpoint, None
    if PartialState().is_main_process:
        sweep_unsealed(output)
        sweep_leftovers(output)
        with as_user_error("the run cannot be resumed"):
            found = Path(wanted) if isinstance(wanted, str) else latest_whole_checkpoint(output)
            if found is not None and (problem := verify(found)):
                raise UserError(f"resume_from_checkpoint is {str(wanted)!r}, which is not a whole checkpoint: {problem}")
    (found,) = broadcast_object_list([found])
    if found is None:
        return None
    if wanted is False:
        raise UserError(f"resume_from_checkpoint is false, but {output} holds {found.name}: delete it and its siblings, or choose another")
    then = read_json(found / "run.json")
    names = _different(about["settings"], then.get("settings", {}))  # one that an earlier version did not have is missing, hence null
    if not are_same_data(then.get("data"), about["data"]):
        names = names or ["data"]
    if _are_others(then.get("origin"), about["origin"]):
        names = names or [f"weights in {settings.model}"]
    if names:
        raise UserError(
            f"{found} is a checkpoint of a run with other {', '.join(names)}: choose another output_dir, or delete it and its siblings. To "
            f"train its model further, give --model {found} and another output_dir"
        )
    return found
