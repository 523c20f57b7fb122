"""Data sets on a disk or the Hub, in any layout, undecoded.

```python
splits = open_splits("ESC-50-master", "esc50")
splits["train"][0]  # {"audio": {"path": "ESC-50-master/audio/1-100032-A-0.wav", "bytes": None}, "label": 0, "fold": 1}
```
"""

import glob
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import read_json
from .folders import hash_files, import_datasets, open_audio_folder, open_folder, open_manifest
from .paths import confined_path, contents, find_files
from .published import EXPECTED, PUBLISHED
from .published_events import EXPECTED_EVENTS, PUBLISHED_EVENTS
from .published_music import EXPECTED_MUSIC, PUBLISHED_MUSIC
from .shard_index import SHARD_INDEX, check_shards, read_index


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    Splits: TypeAlias = DatasetDict | IterableDatasetDict

logger = logging.getLogger(__name__)

SHARD_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}


def open_splits(
    path: str | Path,
    layout: str = "audiofolder",
    *,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    audio_column: str | None = None,
) -> "Splits":
    """The splits of a data set, each with its columns and `audio`, undecoded (`{"path", "bytes"}`).

    Args:
        path: its folder or file; for the layout `"hub"` also an id on the Hub.
        layout: one of `LAYOUTS`.
        subset: part of a layout that has several, see `LAYOUTS`; configuration of a Hub data set.
        revision: commit or tag of a Hub data set.
        streaming: read parquet files, archives and Hub data sets row by row, without a copy. Tables of files are always in memory.
        audio_column: of these three, the column of the audio, where it is not the only one of type `Audio`; it is renamed.

    Returns:
        Splits by name. "audiofolder", "parquet", "webdataset" and "hub" keep their columns; the others have `label`, or `labels`, and where
        they are known `events` (`label`, and `onset` and `offset` in seconds, null for weak labels), `fold` and others, as `speaker`.
        `audio["path"]` is as `encode_path` writes it.

    Raises:
        UserError: if the layout is unknown or has no such subset, or the files are not those of the layout.
        ImportError: if `datasets` is not installed.
    """
    if layout not in _LAYOUTS:
        raise UserError(f"layout is {layout!r}, but one of {', '.join(LAYOUTS)} is expected")
    _, open_layout, subsets, place = _LAYOUTS[layout]
    if subsets is not None and subset not in subsets:
        allowed = ", ".join("null" if name is None else name for name in subsets)
        raise UserError(f"subset is {'null' if subset is None else repr(subset)}, but the layout {layout} has {allowed}")
    root = Path(path).expanduser()
    if not {"folder": root.is_dir, "file": root.is_file, "folder or file": root.exists, "id": lambda: True}[place]():
        raise UserError(f"there is no {place} {path}: check the path")
    try:
        return open_layout(root, subset, revision=revision, streaming=streaming, audio_column=audio_column)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def shard_files(path: Path, layout: str) -> dict[str, list[str]]:
    """The files of each split, sorted. A single file and archives are `train`; the names of parquet files tell their split."""
    suffix = SHARD_SUFFIXES[layout]
    if path.is_file():
        return {"train": [str(path)]}
    names = find_files(path, (suffix,))[0]
    if not names:
        if (path / SHARD_INDEX).is_file():
            raise UserError(f"prepare has not finished a shard in {path} yet: give the same command again")
        found = f"holds {contents(path)}" if any(path.iterdir()) else "is empty"
        raise UserError(f"{path} {found}, but the layout {layout} expects {LAYOUTS[layout]}")
    if layout == "webdataset":
        return {"train": [str(path / name) for name in names]}
    files: dict[str, list[str]] = {}
    for name in names:
        if _has_no_row(path / name):  # as other programs write parts; `datasets` cannot read it
            continue
        *folders, file = Path(name).parts
        folders = [folder for folder in folders if folder != "data"]  # as on the Hub: data/train-00000-of-00001.parquet
        split = folders[0] if folders else re.split(r"[-.]", file)[0]
        if not re.fullmatch(r"\w+", split):
            raise UserError(f"{path / name} does not tell its split: name it train-00000.parquet, or put it into a folder train/")
        files.setdefault("train" if split in ("shard", "data") else split, []).append(str(path / name))
    if not files:
        raise UserError(f"no parquet file in {path} has a row: there is nothing to read")
    return files


def _has_no_row(file: Path) -> bool:
    """Whether a parquet file is whole, and a table without rows."""
    try:
        return file.stat().st_size < 2**16 and pq.read_metadata(file).num_rows == 0
    except (pa.ArrowException, OSError):
        return False


def _ends_as_archive(file: str) -> bool:
    """Whether a `.tar` ends in zeros, or is compressed. One that is cut between members, or within the header of one, is read without a
    word."""
    with open(file, "rb") as content:
        compressed = content.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
        content.seek(max(0, content.seek(0, os.SEEK_END) - tarfile.BLOCKSIZE))
        return compressed or not any(content.read())


def _open_shards(layout: str, path: Path, subset: None, *, streaming: bool, audio_column: str | None, **_) -> "Splits":
    """Open files of known splits: `datasets` would guess, and leave out files."""
    files = shard_files(path, layout)
    if layout == "webdataset" and (cut := [file for file in files["train"] if not _ends_as_archive(file)]):
        logger.warning(f"{len(cut)} archives below {path} have no end mark, as if they were cut off, such as {cut[0]}: compare their sizes")
    _check_prepared(path)
    patterns = {split: [glob.escape(file) for file in names] for split, names in files.items()}
    cache_dir = None if streaming else _content_cache(file for names in files.values() for file in names)
    return _load(layout, path, audio_column, data_files=patterns, streaming=streaming, cache_dir=cache_dir)


def _check_prepared(folder: Path) -> None:
    """Check prepared shards, and warn if they are not finished. Another `index.json` is ignored."""
    path = folder / SHARD_INDEX
    if not path.is_file() or not {"settings", "shards"} & read_json(path).keys():
        return
    check_shards(folder, index := read_index(path))
    if not index["complete"]:
        logger.warning(
            "prepare has not finished %s: only its present shards are read. For all of them, give the same command again", folder
        )


def _open_hub(root: Path, subset: str | None, *, revision: str | None, streaming: bool, audio_column: str | None) -> "Splits":
    cache_dir = None
    if root.is_dir() and not streaming:
        cache_dir = _content_cache(root / name for name in find_files(root, ("",))[0])
    return _load(str(root), root, audio_column, name=subset, revision=revision, streaming=streaming, cache_dir=cache_dir)


def _content_cache(files: Iterable[str | Path]) -> str:
    """A cache folder for the content of files, which `datasets` identifies by path and time stamp, or a folder's name alone, so that it can
    return rows of a former content."""
    return str(Path(import_datasets().config.HF_DATASETS_CACHE) / f"content-{hash_files(files)}")


def _load(builder: str, path: Path, audio_column: str | None, **arguments) -> "Splits":
    """`datasets.load_dataset` with one error; the audio column is renamed to `audio`, undecoded."""
    datasets = import_datasets()
    try:
        if builder == "webdataset":
            from .archives import load_webdataset

            splits = load_webdataset(**arguments)
        else:
            splits = datasets.load_dataset(builder, **arguments)
    except (
        pa.ArrowException,
        datasets.exceptions.DatasetsError,
        tarfile.TarError,
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        StopIteration,
    ) as error:
        why = error.__cause__ if "An error occurred while generating" in str(error) else error
        said = " ".join(str(why).split()) or "it holds no rows"
        raise UserError(f"the data set {path} cannot be opened ({said}): check path, subset and revision, or download it again") from error
    for name, rows in splits.items():
        features = rows.features or {}
        of_audio = [column for column, feature in features.items() if _is_audio(feature)]
        if audio_column is not None and audio_column not in features:
            raise UserError(f"the split {name} of {path} has no column {audio_column!r}, only {', '.join(features)}: correct audio_column")
        if audio_column is None and len(of_audio) != 1:
            found = f"columns {', '.join(features)}" if features else "no description of its columns"
            raise UserError(
                f"the split {name} of {path} has {len(of_audio)} columns of type Audio ({found}), but must have one: set audio_column"
            )
        column = audio_column or of_audio[0]
        for other in {*of_audio, column}:
            rows = rows.cast_column(other, datasets.Audio(decode=False))
        rows = rows if column == "audio" else rows.rename_column(column, "audio")
        splits[name] = rows if arguments["streaming"] else _confined(rows, path)
    return splits


def _confined(rows: "Dataset", root: Path) -> "Dataset":
    """Remove paths that do not lie below `root`: their rows are unreadable."""
    content, paths = (pc.struct_field(rows.data["audio"], name) for name in ("bytes", "path"))
    if content.null_count == 0:
        return rows
    paths = paths.to_pylist()
    found = [path if held or not path else confined_path(path, root) for path, held in zip(paths, content.is_valid().to_pylist())]
    if lost := [path for path, new in zip(paths, found) if path and new is None]:
        logger.warning(f"{len(lost)} rows of {root} name files outside of it, which are not opened, such as {', '.join(lost[:3])}")
    kept = pa.StructArray.from_arrays([content.combine_chunks(), pa.array(found, pa.string())], names=["bytes", "path"])
    return rows.remove_columns("audio").add_column("audio", kept).cast_column("audio", rows.features["audio"])


def _is_audio(feature: Any) -> bool:
    """Without `datasets`, audio is written as a plain structure."""
    return isinstance(feature, import_datasets().Audio) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


class _Layout(NamedTuple):
    expects: str
    open: Callable[..., Any]
    subsets: tuple[str | None, ...] | None = (None,)  # `None`: any
    place: Literal["folder", "file", "folder or file", "id"] = "folder"


_LAYOUTS = {
    "audiofolder": _Layout(
        "class folders, or audio with a metadata.csv, in train/ and test/ or not", lambda root, *_, **__: open_audio_folder(root)
    ),
    "folder": _Layout("a folder with audio files at any depth, without labels", lambda root, *_, **__: open_folder(root)),
    "manifest": _Layout(
        "a fairseq TSV: a line with the root folder, then `relative path<TAB>samples` a clip",
        lambda file, *_, **__: open_manifest(file),
        place="file",
    ),
    "parquet": _Layout(
        "parquet files named SPLIT-*.parquet or SPLIT/*.parquet (shard-*, data-*: train), or a single one, with a column of Audio",
        partial(_open_shards, "parquet"),
        place="folder or file",
    ),
    "webdataset": _Layout("a .tar of WebDataset, or a folder of them", partial(_open_shards, "webdataset"), place="folder or file"),
    "hub": _Layout("the id of a data set on the Hub, or its folder, without a script; subset: its configuration", _open_hub, None, "id"),
    **{
        name: _Layout(expects[name], lambda root, subset, open_published=open_published, **_: open_published(root, subset), subsets)
        for published, expects in ((PUBLISHED, EXPECTED), (PUBLISHED_EVENTS, EXPECTED_EVENTS), (PUBLISHED_MUSIC, EXPECTED_MUSIC))
        for name, (open_published, subsets) in published.items()
    },
}

LAYOUTS: dict[str, str] = {name: layout.expects for name, layout in _LAYOUTS.items()}
"""Name of each layout, and what it expects to find, in one line."""
