"""Checkpoints that are whole or not there at all.

A checkpoint is written to a folder with another name, every file flushed to the disk, a manifest of sizes and hashes last, and only then
renamed: a run that is killed at any moment leaves whole checkpoints, and perhaps a folder that is plainly no checkpoint and is swept away.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED, DISCARDED = ".unfinished", ".discarded"


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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)
    final = folder.with_suffix("")
    if final.exists():  # damaged, or of a run that was resumed before it: what was written now is the same update
        _discard(final)
    os.rename(folder, final)
    _flush(final.parent)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, oldest first."""
    found = _by_update(output_dir)
    return [found[update] for update in sorted(found)]


def _by_update(output_dir: Path) -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    return {int(match[1]): path for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; `None` if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError) as error:  # any other failure is the disk's: nothing may be concluded from it
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def latest_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; `None` if there is no checkpoint. Damaged ones are passed over, each with a warning.

    Raises:
        ValueError: if all are damaged.
    """
    found = checkpoints(output_dir)
    for folder in reversed(found):
        if (problem := damage(folder)) is None:
            return folder
        logger.warning("%s is damaged and is passed over: %s", folder, problem)
    if found:
        raise ValueError(f"all {len(found)} checkpoints in {output_dir} are damaged: put one back, or choose another folder to begin anew")
    return None


def sweep(output_dir: Path, update: int, keep_last: int, keep_every: int | None) -> None:
    """Delete what is not to be kept: all but the last `keep_last` checkpoints up to `update` and those of every `keep_every`-th update.

    Later ones are damaged, and were passed over: they neither count nor go, until the run has come to where they are.
    """
    found = _by_update(output_dir)
    for number in sorted(number for number in found if number <= update)[: -max(1, keep_last)]:
        if not keep_every or number % keep_every:
            _discard(found[number])


def sweep_leftovers(output_dir: Path) -> None:
    """Delete what a killed run had begun to write or to delete."""
    for suffix in (UNFINISHED, DISCARDED):
        for folder in output_dir.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(folder)


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that no part of it can be taken for a whole one: it loses its name first."""
    unnamed = folder.with_suffix(DISCARDED)
    shutil.rmtree(unnamed, ignore_errors=True)
    os.rename(folder, unnamed)
    shutil.rmtree(unnamed)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
