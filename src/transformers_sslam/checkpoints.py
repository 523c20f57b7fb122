"""Checkpoints that are whole or not there at all.

Each is written to a folder with another name, a manifest of sizes and hashes last, flushed to the disk, and only then renamed. A killed
run leaves whole checkpoints, and perhaps a folder with the other name, which is deleted later.
"""

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from .errors import UserError
from .files import DISCARDED, MANIFEST, UNFINISHED, discard, finish_folder, verify


logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The checkpoint after a step."""
    return output_dir / f"checkpoint-{step:08d}"


def unfinished_folder(output_dir: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return checkpoint_folder(output_dir, step).with_suffix(UNFINISHED)


def begin_checkpoint(output_dir: Path, step: int) -> Path:
    """An empty folder to write into. One process calls it, before any write."""
    folder = unfinished_folder(output_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(folder: Path) -> Path:
    """Turn what was written into a checkpoint, and return its folder. One process calls it, after all have written."""
    final = folder.with_suffix("")
    finish_folder(folder, final, manifest=True)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    return [path for _, path in sorted(_by_step(output_dir).items())]


def _by_step(output_dir: Path) -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    return {int(match[1]): path for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))}


def latest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, or `None`. Damaged ones are passed over with a warning; `UserError` if all are damaged."""
    found = checkpoints(output_dir)
    for folder in reversed(found):
        if (problem := verify(folder)) is None:
            return folder
        logger.warning("%s is damaged and is passed over: %s", folder, problem)
    if found:
        raise UserError(f"all {len(found)} checkpoints in {output_dir} are damaged: put one back, or choose another folder to start again")
    return None


def sweep(output_dir: Path, step: int, save_total_limit: int, keep_steps: int | None = None, keep: Collection[Path] = ()) -> None:
    """Delete all checkpoints up to `step` but the last `save_total_limit`, those of every `keep_steps`-th step, and those in `keep`. Later
    ones are damaged: they neither count nor are deleted until the run has reached their step."""
    found = _by_step(output_dir)
    for number in sorted(number for number in found if number <= step)[: -max(1, save_total_limit)]:
        if (not keep_steps or number % keep_steps) and found[number] not in keep:
            discard(found[number])


def sweep_unsealed(output_dir: Path) -> None:
    """Delete checkpoints without a manifest, which a killed `Trainer` did not finish: it writes under the final name."""
    for folder in checkpoints(output_dir):
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)


def sweep_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left half written or half deleted."""
    for suffix in (UNFINISHED, DISCARDED):
        for folder in output_dir.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(folder)
