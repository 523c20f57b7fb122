"""Checkpoints that are whole or not there at all.

A checkpoint is written to a folder with another name, every file flushed to the disk, a manifest of sizes and hashes last, and only then
renamed: a run that is killed at any moment leaves whole checkpoints, and perhaps a folder that is plainly no checkpoint and is swept away.
"""

import logging
import re
import shutil
from pathlib import Path

from ..files import DISCARDED, MANIFEST, UNFINISHED, discard, finish_folder, verify


logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(output_dir: Path, update: int) -> Path:
    """Where the checkpoint behind an update lies; the names sort as the updates do."""
    return output_dir / f"checkpoint-{update:08d}"


def unfinished_folder(output_dir: Path, update: int) -> Path:
    """Where it is written before it is whole."""
    return checkpoint_folder(output_dir, update).with_suffix(UNFINISHED)


def begin_checkpoint(output_dir: Path, update: int) -> Path:
    """An empty folder to write into. One process calls it, before any writes."""
    folder = unfinished_folder(output_dir, update)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(folder: Path) -> Path:
    """Turn what was written into a checkpoint. One process calls it, after all have written.

    Returns:
        The checkpoint's folder. One that was there under this name is replaced.
    """
    final = folder.with_suffix("")
    finish_folder(folder, final, manifest=True)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    found = _by_update(output_dir)
    return [found[update] for update in sorted(found)]


def _by_update(output_dir: Path) -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    return {int(match[1]): path for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))}


def latest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; `None` if there is no checkpoint. Damaged ones are passed over, each with a warning.

    Raises:
        ValueError: if all are damaged.
    """
    found = checkpoints(output_dir)
    for folder in reversed(found):
        if (problem := verify(folder)) is None:
            return folder
        logger.warning("%s is damaged and is passed over: %s", folder, problem)
    if found:
        raise ValueError(f"all {len(found)} checkpoints in {output_dir} are damaged: put one back, or choose another folder to begin anew")
    return None


def sweep(output_dir: Path, update: int, keep_last: int, keep_every: int | None) -> None:
    """Delete what is not to be kept: all but the last `keep_last` checkpoints up to `update` and those of every `keep_every`-th update.

    Later ones are damaged, and were passed over: they neither count nor are deleted, until the run has come to where they are.
    """
    found = _by_update(output_dir)
    for number in sorted(number for number in found if number <= update)[: -max(1, keep_last)]:
        if not keep_every or number % keep_every:
            discard(found[number])


def sweep_unsealed(output_dir: Path) -> None:
    """Delete the checkpoints of a `Trainer`, which writes under the final name, that a killed run did not finish: they have no manifest."""
    for folder in checkpoints(output_dir):
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)


def sweep_leftovers(output_dir: Path) -> None:
    """Delete what a killed run had begun to write or to delete."""
    for suffix in (UNFINISHED, DISCARDED):
        for folder in output_dir.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(folder)


__all__ = [
    "MANIFEST",
    "begin_checkpoint",
    "checkpoint_folder",
    "checkpoints",
    "finish_checkpoint",
    "latest_whole_checkpoint",
    "sweep",
    "sweep_leftovers",
    "sweep_unsealed",
    "unfinished_folder",
]
