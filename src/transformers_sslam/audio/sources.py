"""Sources of audio: tables of files and streamed shards, all read as shards of undecoded rows.

What is a table of files (a folder, an audio folder, a manifest, a published data set) has one shard a file, so any order of files costs
nothing. What is stored in larger pieces has one shard for each parquet row group or archive.
"""

import hashlib
import math
import os
from argparse import ArgumentTypeError
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from ..errors import AudioDecodingError, UserError
from ..settings import load_yaml
from .layouts import LAYOUTS, open_splits, shard_files
from .paths import confined_path, decode_path, find_files, printable_path
from .rows import AudioColumn, all_rows, fold_names, select_folds


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

ROWS_AT_ONCE = 16  # read from a shard in one go
FILES_AT_ONCE = 1000  # whose sizes a thread asks for


@dataclass
class SourceSettings:
    """One source of clips, as written in YAML.

    Args:
        kind: one of the layouts of `audio.layouts`. `"folder"`: every audio file below `path`. `"audiofolder"`: as `datasets` knows it,
            with its metadata or its labels. `"manifest"`: a fairseq TSV. `"parquet"`, `"webdataset"`: local shards. `"hub"`: a data set's
            id on the Hub. The last three are streamed.
        path: file, folder or Hub id.
        weight: how many times an epoch has each clip: 1 once, 2 twice, 0.5 one half in one epoch and the other half in the next. For
            sources of streamed shards a half means half of the shards.
        name: for reports; the last part of `path` by default.
        split: which split, where there are several.
        subset: part of a data set that has several; configuration name of a Hub data set.
        revision: commit or tag of a Hub data set. Without one, a data set that changes on the Hub changes the run.
        audio_column: column that holds the audio; by default the only one of type `Audio`.
        keep: rows to read, by values of their columns: `{fold: [1, 2, 3]}` leaves out the other folds.

    Raises:
        UserError: if a value is out of range or has no meaning for the kind.
    """

    kind: str
    path: str
    weight: float = 1.0
    name: str = ""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    audio_column: str | None = None
    keep: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in LAYOUTS:
            raise UserError(f"kind is {self.kind!r}, but a source is one of {', '.join(LAYOUTS)}")
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise UserError(f"path is {self.path!r}, but a {self.kind} source needs a file, a folder or a Hub id")
        self.path = str(self.path)
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise UserError(f"weight of {self.path} is {self.weight!r}, but must be a number above 0: leave the source out instead")
        if self.kind != "hub" and self.revision is not None:
            raise UserError(f"revision is {self.revision!r}, but only hub sources have one, and {self.path} is a {self.kind}")
        if not isinstance(self.keep, dict) or not all(isinstance(values, list) for values in self.keep.values()):
            raise UserError(f"keep of {self.path} is {self.keep!r}, but must give a list for each column, for example {{fold: [1, 2]}}")
        self.name = self.name or Path(self.path).name

    @classmethod
    def from_dict(cls, values: Any) -> "SourceSettings":
        """From what YAML gives.

        Raises:
            UserError: if it is not a mapping, lacks `kind` or `path`, or holds a key that no source has.
        """
        known = [option.name for option in fields(cls)]
        if not isinstance(values, dict) or not {"kind", "path"} <= values.keys():
            raise UserError(
                f"a source is {values!r}, but must be a mapping with kind and path, for example {{kind: folder, path: /data/audio}}"
            )
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UserError(f"the source {values['path']} has {', '.join(map(str, unknown))}, but a source has only {', '.join(known)}")
        return cls(**values)


def parse_source(text: str) -> dict[str, Any]:
    """A source in YAML, as the `type` of a command line's argument. Raises what argparse prints, if it is none."""
    try:
        values = load_yaml(text)
        SourceSettings.from_dict(values)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a source ({' '.join(str(error).split())})") from error
    return values


class Row(NamedTuple):
    """One recording, not decoded.

    Attributes:
        name: of the recording, for messages.
        source, shard: where it is from: the name of the source and the number of its shard, of a table the row.
        audio: what `load_waveform` takes, or why it is not opened.
        columns: everything else that the source knows of it.
        in_table: whether the source is a table, so that `shard` is the number of this row alone.
    """

    name: str
    source: str
    shard: int
    audio: Any
    columns: dict[str, Any]
    in_table: bool = False


class Source:
    """So many shards, each of them rows in a fixed order.

    Args:
        rows: a split of a data set, with an undecoded column `audio`: a table of files, or a stream of several shards.
        name: for reports.
        weight: how many times an epoch has each clip.
        keep: of a stream, which rows to read by values of their columns; those of a table are chosen before.
        root: of a stream, its folder or id: rows that hold no audio, but a path that leads elsewhere, are unreadable.
        files: of a stream, the names and sizes of its files, or whatever else tells this data from other data.

    Attributes:
        num_shards: shards, in a fixed order.
        num_rows: recordings, or `None` where only reading would tell.
        features: `datasets.Features` of all columns but the audio.

    Raises:
        UserError: if there is no row, or a stream does not tell its columns.
    """

    def __init__(
        self,
        rows: "Dataset | IterableDataset",
        name: str,
        weight: float = 1.0,
        keep: dict[str, set[str | None]] | None = None,
        root: str | Path = "",
        files: Sequence[Any] = (),
    ):
        from datasets import Dataset

        self.name, self.weight, self._keep, self._root, self._files = name, weight, keep or {}, root, files
        if not rows.features:
            raise UserError(f"the source {name} does not tell its columns: write it once with scripts/prepare_shards.py")
        self.num_rows: int | None
        self.features = {column: feature for column, feature in rows.features.items() if column != "audio"}
        if isinstance(rows, Dataset):
            self._table, self._parts, self._ends, self.num_rows = rows, [], [len(rows)], len(rows)
        else:
            # Divided by file first: taking one shard of n copies the list of all n, and there may be 100,000 row groups.
            parts = [rows.shard(rows.num_shards, index).reshard() for index in range(rows.num_shards)]
            self._table, self._parts, self._ends = None, parts, list(accumulate(part.num_shards for part in parts))
            self.num_rows = None
        self.num_shards = self._ends[-1]
        if self.num_shards == 0:
            raise UserError(f"the source {name} is empty: there is nothing to read")

    @classmethod
    def open(cls, settings: "SourceSettings") -> "Source":
        """Open what a recipe asks for.

        Raises:
            UserError: if there is nothing at the path, no such split, or no audio in it. The message names the source.
            ImportError: if `datasets` is not installed, naming the extra that brings it.
        """
        path, kind = Path(settings.path).expanduser(), settings.kind
        splits = open_splits(
            settings.path, kind, subset=settings.subset, revision=settings.revision, streaming=True, audio_column=settings.audio_column
        )
        if kind in ("parquet", "webdataset"):  # all splits: nothing is held out of pre-training
            rows, shards = all_rows(splits), [file for found in shard_files(path, kind).values() for file in found]
            files: list[Any] = [(os.path.relpath(file, path), _size(file)) for file in shards]
        elif settings.split in splits:
            rows, files = splits[settings.split], [settings.subset, settings.revision, settings.split]
            if kind == "hub":
                files += [(name, _size(str(path / name))) for name in find_files(path, ("",))[0]] if path.is_dir() else [settings.path]
        else:
            raise UserError(f"the {kind} source {settings.path} has no split {settings.split!r}, only {', '.join(splits)}")
        if hasattr(rows, "num_rows"):
            for column, values in settings.keep.items():
                rows = select_folds({settings.split: rows}, column, values)
            return cls(rows, settings.name, settings.weight)
        if absent := [column for column in settings.keep if column not in (rows.features or {})]:
            raise UserError(f"keep names the column {absent[0]!r}, but {settings.path} has only {', '.join(rows.features or {})}")
        keep = {column: set(fold_names(values)) for column, values in settings.keep.items()}
        return cls(rows, settings.name, settings.weight, keep, path if path.exists() else settings.path, files)

    @cached_property
    def signature(self) -> str:
        """Changes with the names and sizes of the files, wherever they lie, or with the number of shards."""
        digest = hashlib.sha256()
        for entry in (*(self._files if self._table is None else self._named_sizes()), *self._ends):
            digest.update(f"{entry}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def paths(self) -> list[str]:
        """The file of each row of a table, as `encode_path` writes it; none where the table holds the audio itself."""
        return AudioColumn(self._table).paths or [] if self._table is not None else []

    def names(self, rows: Sequence[int]) -> list[str]:
        """What these rows of a table are called in messages."""
        return [next(self.rows(row)).name for row in rows]

    def _named_sizes(self) -> Iterator[tuple[str, int | None]]:
        """Of each row of a table: its file's name below the folder that holds all of them, and its size."""
        if not (paths := self.paths()):
            return iter(())
        root = len(os.path.commonprefix([min(paths), max(paths)]).rpartition(os.sep)[0])  # noqa: RUF071  # of all, cut at a folder
        unique = list(dict.fromkeys(paths))
        parts = [unique[start : start + FILES_AT_ONCE] for start in range(0, len(unique), FILES_AT_ONCE)]
        with ThreadPoolExecutor(16) as pool:  # on a network's disk each answer is waited for
            sizes = dict(zip(unique, chain.from_iterable(pool.map(lambda part: [_size(decode_path(path)) for path in part], parts))))
        return ((path[root:], sizes[path]) for path in paths)

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of a shard from row `start` on."""
        for number, values in enumerate(islice(self._read(shard), start, None), start):
            audio = values.pop("audio") or {}
            path = audio.get("path")
            name = printable_path(path) if path else f"{self.name}, shard {shard}, row {number}"
            if path and audio.get("bytes") is None:
                path = decode_path(path) if self._table is not None else confined_path(path, self._root)
                audio = {"path": path, "bytes": None}
                if path is None:
                    audio = AudioDecodingError("unreadable", f"{name} lies outside of {self._root}, so it is not opened: embed the audio")
            yield Row(name, self.name, shard, audio, values, self._table is not None)

    def _read(self, shard: int) -> Iterator[dict[str, Any]]:
        if self._table is not None:
            yield self._table[shard]
            return
        part = bisect_right(self._ends, shard)
        piece = self._parts[part].shard(self._parts[part].num_shards, shard - (self._ends[part - 1] if part else 0))
        # Not iter(piece): in a worker process that would divide this one shard again, among the workers.
        for batch in piece.iter(batch_size=ROWS_AT_ONCE):
            for values in zip(*batch.values()):
                row = dict(zip(batch, values))
                if all(fold_names([row[column]])[0] in wanted for column, wanted in self._keep.items()):
                    yield row


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:  # a file that is missing is counted when it is read
        return None


@dataclass(frozen=True)
class EpochOrder:
    """Which shards an epoch reads, in which order.

    Each source is an endless row of passes over its shards, every pass in an order of its own. An epoch takes the next `weight` passes,
    whole or in part, so that over the epochs no shard is left out and none comes more often than another. Then everything is shuffled
    together. It depends on the arguments alone, which is why a position in an epoch is a number and finding it again takes no reading.

    Args:
        num_shards: of each source.
        weights: passes of each source that an epoch takes.
        seed: of the run.
    """

    num_shards: Sequence[int]
    weights: Sequence[float]
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """`(visits, 2)`, int64: source and shard."""
        visits = []
        for source, (shards, weight) in enumerate(zip(self.num_shards, self.weights)):
            exact = Fraction(weight).limit_denominator(1_000_000)  # 0.1 as one tenth: ten epochs of it are one whole pass
            taken, end = math.floor(epoch * exact * shards), math.floor((epoch + 1) * exact * shards)
            while taken < end:
                lap, start = divmod(taken, shards)
                chosen = random_generator("pass", self.seed, source, lap).permutation(shards)[start : start + end - taken]
                visits.append(np.stack([np.full_like(chosen, source), chosen], axis=1))
                taken += len(chosen)
        together = np.concatenate(visits) if visits else np.empty((0, 2), dtype=np.int64)
        return together[random_generator("epoch", self.seed, epoch).permutation(len(together))]


@dataclass(frozen=True)
class WeightedOrder:
    """Which rows of a table an epoch reads: so many draws, with replacement.

    Args:
        weights: `(rows,)`, how likely each is drawn, in proportion.
        draws: of an epoch.
        seed: of the run.
    """

    weights: np.ndarray
    draws: int
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """`(draws, 2)`, int64: source, always 0, and row."""
        weights = np.asarray(self.weights, dtype=np.float64)  # of which numpy wants an exact sum
        probabilities = weights / weights.sum()
        rows = random_generator("draw", self.seed, epoch).choice(len(self.weights), self.draws, p=probabilities)
        return np.stack([np.zeros_like(rows), rows], axis=1)


Purpose = Literal["pass", "epoch", "block", "window", "draw", "augmentation", "batch"]


def random_generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A generator of its own for each use and place: what is drawn here never depends on what was drawn elsewhere."""
    return np.random.default_rng([get_args(Purpose).index(purpose), len(numbers), *(int(n) for n in numbers)])
