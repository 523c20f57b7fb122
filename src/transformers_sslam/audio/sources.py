"""Where audio comes from: folders, manifests, Hub data sets and shards, all opened with `datasets` and none of them decoded here.

A source is a row of *shards*, each read from its start to its end. What is a table of files (a folder, an audiofolder, a manifest) has
one shard a file, so any order of files costs nothing. What is stored in larger pieces has one shard a parquet row group or an archive.
"""

import glob
import hashlib
import json
import logging
import math
import os
from argparse import ArgumentTypeError
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import yaml


Kind = Literal["folder", "audiofolder", "manifest", "parquet", "webdataset", "hub"]

logger = logging.getLogger(__name__)

SHARD_INDEX = "index.json"  # what `shards.prepare` writes beside its shards
AUDIO_SUFFIXES = (".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64")
# How folders are called that are splits.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD_SUFFIXES = {"parquet": (".parquet",), "webdataset": (".tar",)}
ROWS_AT_ONCE = 16  # read from a shard in one go


@dataclass
class SourceSettings:
    """One source of a mixture, as written in YAML.

    Args:
        kind: `"folder"`: every file below `path` with an audio suffix. `"audiofolder"`: as `datasets` knows it, with its metadata or its
            labels. `"manifest"`: a fairseq TSV; the first line is the root folder (relative ones start at the manifest's own folder), then
            `relative path<TAB>samples` a line (the number of samples is not used). `"parquet"`, `"webdataset"`: local shards, `path` being
            one of them or a folder searched at any depth. `"hub"`: a data set's id on the Hub. The last three are streamed.
        path: file, folder or Hub id.
        weight: how many times an epoch hears each clip: 1 once, 2 twice, 0.5 one half in one epoch and the other half in the next. For
            sources of streamed shards a half means half of the shards.
        name: for reports; the last part of `path` by default.
        split: of an audiofolder or a Hub data set.
        subset: configuration name of a Hub data set.
        revision: commit or tag of a Hub data set. Without one, a data set that changes on the Hub changes the run.
        audio_column: column that holds the audio; by default the only one of type `Audio`.
        keep: rows of an audiofolder to read, by values of their columns: `{fold: [1, 2, 3]}` leaves the other folds unheard.

    Raises:
        ValueError: if a value is out of range or has no meaning for the kind.
    """

    kind: Kind
    path: str
    weight: float = 1.0
    name: str = ""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    audio_column: str | None = None
    keep: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, but a source is one of {', '.join(get_args(Kind))}")
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise ValueError(f"path is {self.path!r}, but a {self.kind} source needs a file, a folder or a Hub id")
        self.path = str(self.path)
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight of {self.path} is {self.weight!r}, but must be a number above 0: leave the source out instead")
        for option in ("subset", "revision"):
            if self.kind != "hub" and getattr(self, option) is not None:
                raise ValueError(f"{option} is {getattr(self, option)!r}, but only hub sources have one, and {self.path} is a {self.kind}")
        if self.keep and self.kind != "audiofolder":
            raise ValueError(f"keep is {self.keep}, but only audiofolder sources can be chosen from, and {self.path} is a {self.kind}")
        if not isinstance(self.keep, dict) or not all(isinstance(values, list) for values in self.keep.values()):
            raise ValueError(f"keep of {self.path} is {self.keep!r}, but must give a list for each column, for example {{fold: [1, 2]}}")
        self.name = self.name or Path(self.path).name

    @classmethod
    def from_dict(cls, values: Any) -> "SourceSettings":
        """From what YAML gives.

        Raises:
            ValueError: if it is no mapping, lacks `kind` or `path`, or holds a key that no source has.
        """
        known = [option.name for option in fields(cls)]
        if not isinstance(values, dict) or not {"kind", "path"} <= values.keys():
            raise ValueError(
                f"a source is {values!r}, but must be a mapping with kind and path, for example {{kind: folder, path: /data/audio}}"
            )
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"the source {values['path']} has {', '.join(map(str, unknown))}, but a source has only {', '.join(known)}")
        return cls(**values)


def parse_source(text: str) -> dict[str, Any]:
    """A source in YAML, as the `type` of a command line's argument. Raises what argparse prints, if it is none."""
    try:
        values = yaml.safe_load(text)
        SourceSettings.from_dict(values)
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentTypeError(f"{text!r} is no source ({' '.join(str(error).split())})") from error
    return values


class Row(NamedTuple):
    """One recording, not decoded: `audio` is what `load_waveform` takes, `columns` everything else that the source knows of it."""

    name: str
    audio: Any
    columns: dict[str, Any]


class Source:
    """An opened source: so many shards, each of them rows in a fixed order.

    Args:
        settings: what to open.

    Attributes:
        num_shards: shards, in a fixed order.
        num_rows: recordings, or `None` where only reading would tell.
        features: `datasets.Features` of all columns but the audio.
        signature: changes when the source holds other shards than before, wherever it lies.

    Raises:
        ValueError: if there is nothing at the path, no audio in it, or no column of audio. The message names the source.
        ImportError: if `datasets` is not installed, naming the extra that brings it.
    """

    def __init__(self, settings: SourceSettings):
        self.settings, self.name = settings, settings.name
        try:
            from datasets import Audio, Dataset
        except ImportError as error:
            raise ImportError('sources of audio need datasets: pip install "transformers-sslam[train]"') from error
        data, names, self.num_rows = _OPEN[settings.kind](settings)
        if not data.features:
            raise ValueError(f"{self._label} does not tell its columns: write it once with scripts/prepare_shards.py")
        self.column = self._audio_column(data.features)
        for column, feature in data.features.items():
            if isinstance(feature, Audio):
                data = data.cast_column(column, Audio(decode=False))
        self.features = {column: feature for column, feature in data.features.items() if column != self.column}
        if isinstance(data, Dataset):
            self._table, self._parts, self._ends = data, [], [len(data)]
        else:
            # Split by file first: taking one shard of n copies the list of all n, and there may be 100,000 row groups.
            parts = [data.shard(data.num_shards, index).reshard() for index in range(data.num_shards)]
            self._table, self._parts, self._ends = None, parts, list(accumulate(part.num_shards for part in parts))
        self.num_shards = self._ends[-1]
        if self.num_rows == 0 or self.num_shards == 0:
            raise ValueError(f"{self._label} is empty: there is nothing to read")
        self.signature = hashlib.sha256("\n".join([*names, *map(str, self._ends)]).encode(errors="surrogateescape")).hexdigest()[:16]

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of a shard from row `start` on."""
        for number, values in enumerate(islice(self._read(shard), start, None), start):
            audio = values.pop(self.column)
            path = audio if isinstance(audio, str) else audio.get("path") if isinstance(audio, dict) else None
            yield Row(path or f"{self.name}, shard {shard}, row {number}", {} if audio is None else audio, values)

    def _read(self, shard: int) -> Iterator[dict[str, Any]]:
        if self._table is not None:
            yield self._table[shard]
            return
        part = bisect_right(self._ends, shard)
        piece = self._parts[part].shard(self._parts[part].num_shards, shard - (self._ends[part - 1] if part else 0))
        # Not iter(piece): in a worker process that would split this one shard again, among the workers.
        for batch in piece.iter(batch_size=ROWS_AT_ONCE):
            for values in zip(*batch.values()):
                yield dict(zip(batch, values))

    def _audio_column(self, features) -> str:
        from datasets import Audio

        column = self.settings.audio_column
        if column is not None:
            if column not in features:
                raise ValueError(f"{self._label} has no column {column!r}, only {', '.join(features)}: correct audio_column")
            return column
        columns = [name for name, feature in features.items() if isinstance(feature, Audio)]
        if len(columns) != 1:
            found = f"several columns of audio ({', '.join(columns)})" if columns else f"no column of audio, only {', '.join(features)}"
            raise ValueError(f"{self._label} has {found}: name the one that holds files, their bytes or paths with audio_column")
        return columns[0]

    @property
    def _label(self) -> str:
        return f"the {self.settings.kind} source {self.settings.path}"


def epoch_order(num_shards: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Which shards an epoch reads, in which order.

    Each source is an endless row of passes over its shards, every pass in an order of its own. An epoch takes the next `weight` passes,
    whole or in part, so that over the epochs no shard is left out and none comes more often than another. Then everything is shuffled
    together. It depends on the arguments alone, which is why a place in an epoch is a number and finding it again takes no reading.

    Args:
        num_shards: of each source.
        weights: passes of each source that an epoch takes.
        seed: of the run.
        epoch: from 0.

    Returns:
        `(visits, 3)`, int64: source, pass, shard.
    """
    visits = []
    for source, (shards, weight) in enumerate(zip(num_shards, weights)):
        exact = Fraction(weight).limit_denominator(1_000_000)  # 0.1 as one tenth: ten epochs of it are one whole pass
        taken, end = math.floor(epoch * exact * shards), math.floor((epoch + 1) * exact * shards)
        while taken < end:
            lap, start = divmod(taken, shards)
            chosen = random_generator("pass", seed, source, lap).permutation(shards)[start : start + end - taken]
            visits.append(np.stack([np.full_like(chosen, source), np.full_like(chosen, lap), chosen], axis=1))
            taken += len(chosen)
    together = np.concatenate(visits) if visits else np.empty((0, 3), dtype=np.int64)
    return together[random_generator("epoch", seed, epoch).permutation(len(together))]


def random_generator(purpose: Literal["pass", "epoch", "block", "window"], *numbers: int) -> np.random.Generator:
    """A generator of its own for each use and place: what is drawn here never depends on what was drawn elsewhere."""
    return np.random.default_rng([("pass", "epoch", "block", "window").index(purpose), len(numbers), *(int(n) for n in numbers)])


def _open_folder(settings: SourceSettings):
    root = _existing(settings)
    names = sorted(files_below(root, AUDIO_SUFFIXES))
    if not names:
        raise ValueError(f"the folder {root} is empty: no file below it ends in {', '.join(AUDIO_SUFFIXES)}")
    return _table([os.path.join(root, name) for name in names]), names, len(names)


def _open_audiofolder(settings: SourceSettings):
    root = _existing(settings)
    # Not streamed: as a stream an audiofolder is one single shard, whatever its size. The table holds paths, not audio.
    data = _load(settings, "audiofolder", data_files=audio_folder_splits(root), split=settings.split)
    if "audio" not in data.features:
        return data, [], len(data)
    for column, values in settings.keep.items():
        data = _keep(settings, data, column, values)
    paths = data.data.column("audio").combine_chunks().field("path").to_pylist()
    return data, [os.path.relpath(path, root) if path else "" for path in paths], len(data)


def audio_folder_splits(root: Path) -> dict[str, list[str]]:
    """The splits of an audio folder, as patterns of their files. `datasets` by itself would look for "train", "test" and the like in all
    names of files and folders, leave out what has none, and count what has two in both.

    Here folders of these names at the top are splits, where there is more than one or nothing else; otherwise all is the split "train".

    Raises:
        ValueError: if beside several such folders there is other audio, or a table of metadata for all.
    """
    tops = {Path(name).parts[0] for name in files_below(root, (*AUDIO_SUFFIXES, ".zip"))}
    split_of = {top: split for top in sorted(tops) for split, names in SPLIT_FOLDERS.items() if top.lower().removesuffix(".zip") in names}
    others = sorted(tops - split_of.keys()) + [file.name for file in sorted(root.glob("metadata.*"))]
    escaped = glob.escape(str(root.resolve()))
    if not split_of or (others and len(set(split_of.values())) == 1):
        return {"train": [f"{escaped}/**"]}
    if others:
        raise ValueError(
            f"{root} holds {', '.join(split_of)}, which are splits, and beside them {', '.join(others[:3])}: move all audio into the "
            "splits, each with a metadata.csv of its own, or rename the folders"
        )
    return {
        split: [f"{escaped}/{top}" + ("/**" if (root / top).is_dir() else "") for top, its in split_of.items() if its == split]
        for split in SPLIT_FOLDERS  # training first: of a split before it, with one class folder, `datasets` would drop the class
        if split in split_of.values()
    }


def _keep(settings: SourceSettings, data, column: str, values: list):
    """The rows whose column holds one of these values; 1 and "1" count as equal, for a file of text cannot tell them apart."""
    if column not in data.features:
        raise ValueError(f"keep names the column {column!r}, but the audiofolder {settings.path} has only {', '.join(data.features)}")
    found, wanted = fold_names(data[column]), set(fold_names(values))
    if absent := sorted(map(str, wanted - set(found))):
        there = ", ".join(sorted({str(value) for value in found}))
        raise ValueError(f"keep asks for {column} {', '.join(absent)}, but the audiofolder {settings.path} has {there}")
    return data.select([row for row, value in enumerate(found) if value in wanted]).flatten_indices()


def fold_names(values: Iterable[Any]) -> list[str | None]:
    """Values of a column of folds as text. A table in which some clips have none holds 1.0 for 1."""
    whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
    return [None if value is None else str(value) for value in whole]


def _open_manifest(settings: SourceSettings):
    manifest = _existing(settings)
    lines = manifest.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        raise ValueError(f"the manifest {manifest} is empty: its first line is the root folder, then `relative path<TAB>samples` a clip")
    names = []
    for number, line in enumerate(lines[1:], start=2):
        name, tab, samples = line.partition("\t")
        if not (name and tab and samples.strip().isdigit()):
            raise ValueError(f"line {number} of the manifest {manifest} is {line!r}, but must be `relative path<TAB>samples`")
        names.append(name)
    root = manifest.parent / lines[0].strip()
    return _table([os.path.join(root, name) for name in names]), names, len(names)


def _open_shards(settings: SourceSettings):
    path, suffixes = _existing(settings), SHARD_SUFFIXES[settings.kind]
    names = sorted(files_below(path, suffixes)) if path.is_dir() else [path.name]
    if not names:
        raise ValueError(f"the folder {path} is empty: no file below it ends in {', '.join(suffixes)}")
    index = path / SHARD_INDEX
    if index.is_file() and not json.loads(index.read_text()).get("complete", True):
        logger.warning("%s is not finished: only the shards that are there are heard; go on with scripts/prepare_shards.py", path)
    files = [os.path.join(path, name) for name in names] if path.is_dir() else [str(path)]
    data = _load(settings, settings.kind, data_files={"train": [glob.escape(file) for file in files]}, split="train", streaming=True)
    return data, names, _rows_of_parquet(files) if settings.kind == "parquet" else None


def _rows_of_parquet(files: list[str]) -> int:
    from pyarrow.parquet import read_metadata

    return sum(read_metadata(file).num_rows for file in files)


def _open_hub(settings: SourceSettings):
    data = _load(settings, settings.path, settings.subset, revision=settings.revision, split=settings.split, streaming=True)
    return data, [settings.path, str(settings.subset), str(settings.revision), settings.split], None


# Each gives the data, names that tell these shards from others, and the number of recordings where it is known.
_OPEN = {
    "folder": _open_folder,
    "audiofolder": _open_audiofolder,
    "manifest": _open_manifest,
    "parquet": _open_shards,
    "webdataset": _open_shards,
    "hub": _open_hub,
}


def _load(settings: SourceSettings, *args, **kwargs):
    """`datasets.load_dataset`, whose many errors become one that names the source."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        return load_dataset(*args, **kwargs)
    except (ArrowException, DatasetsError, OSError, ValueError, RuntimeError, LookupError, StopIteration) as error:
        raise ValueError(f"the {settings.kind} source {settings.path} cannot be opened: {type(error).__name__}: {error}") from error


def _table(paths: list[str]):
    from datasets import Audio, Dataset

    # Cast afterwards: as Audio from the start, each path would be encoded on its own, ten times slower.
    return Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(decode=False))


def _existing(settings: SourceSettings) -> Path:
    path = Path(settings.path).expanduser()
    wanted = "folder" if settings.kind in ("folder", "audiofolder") else "file" if settings.kind == "manifest" else "file or folder"
    if not (path.is_dir() if wanted == "folder" else path.is_file() if wanted == "file" else path.exists()):
        raise ValueError(f"{path} is no {wanted}, but a {settings.kind} source needs one: correct its path")
    return path


def files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to `root`. Links to folders are followed, each folder once, so that a ring of links ends. `._name`, which macOS keeps
    beside a file on other systems' disks, is none."""

    def stop(error: OSError):  # a folder that cannot be read would otherwise be missing without a word
        raise error

    seen = set()
    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folders.sort()
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        for file in files:
            if file.lower().endswith(suffixes) and not file.startswith("._"):
                yield os.path.relpath(os.path.join(folder, file), root)
