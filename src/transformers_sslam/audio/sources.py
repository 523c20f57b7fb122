"""Sources of audio: tables of files and streamed shards, all read as shards of undecoded rows.

In a table of files (a folder, an audio folder, a manifest, a published data set) each row is a shard; of what is stored in larger pieces,
each Parquet row group or archive.
"""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from tarfile import TarError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from ..errors import AudioDecodingError, UserError
from ..settings import setting
from .layouts import LAYOUTS, SHARD_SUFFIXES, open_splits, shard_files
from .paths import confined_path, decode_path, find_files, printable_path, stat_files
from .rows import AudioColumn, all_rows, check_single_values, fold_names, select_folds


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

ROWS_AT_ONCE = 16  # read from a shard in one go


@dataclass
class SourceSettings:
    """One source of clips. Raises `UserError` if a value is out of range or has no meaning for the kind."""

    kind: str = setting(f"layout, one of {', '.join(LAYOUTS)}; parquet, webdataset and hub are streamed")
    path: str = setting("file, folder, or id on the Hub")
    weight: float = setting("passes over the source in an epoch: 0.5 is one half of it in one epoch, the other half in the next", 1.0)
    name: str = setting("name in reports; default: the last part of path", "")
    split: str = setting("split to read; parquet and webdataset without a split train are read whole", "train")
    subset: str | None = setting("part of a data set that has several; configuration of a Hub data set", None)
    revision: str | None = setting("commit or tag of a Hub data set; without it, changes on the Hub change the run", None)
    audio_column: str | None = setting("column of the audio; default: the only one of type Audio", None)
    keep: dict[str, list[Any]] = setting("rows to read by values of their columns, such as {fold: [1, 2, 3]}", {})

    def __post_init__(self):
        if self.kind not in LAYOUTS:
            raise UserError(f"kind is {self.kind!r}, but a source is one of {', '.join(LAYOUTS)}")
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise UserError(f"path is {self.path!r}, but must be a file, a folder or a Hub id")
        self.path = os.path.expanduser(self.path)
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise UserError(f"weight of {self.path} is {self.weight!r}, but must be a number above 0")
        if self.kind != "hub" and self.revision is not None:
            raise UserError(f"revision of {self.path} is {self.revision!r}, but only hub sources have one: leave it out")
        if not isinstance(self.keep, dict) or not all(isinstance(values, list) for values in self.keep.values()):
            raise UserError(f"keep of {self.path} is {self.keep!r}, but must give a list for each column, for example {{fold: [1, 2]}}")
        self.name = self.name or Path(self.path).name

    @classmethod
    def of(cls, value: Any) -> "SourceSettings":
        """From these settings, or a mapping of them. Raises `UserError` if it lacks `kind` or `path`, or has another key."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict) or not {"kind", "path"} <= value.keys():
            raise UserError(f"a source is {value!r}, but must be a mapping with kind and path: {{kind: folder, path: /data/audio}}")
        known = [option.name for option in fields(cls)]
        if unknown := [key for key in value if key not in known]:
            raise UserError(f"the source {value['path']} has {', '.join(map(str, unknown))}, but a source has only {', '.join(known)}")
        return cls(**value)


class Row(NamedTuple):
    """One recording, not decoded."""

    name: str  # of the recording, for messages
    source: str  # its name
    shard: int  # number of its shard in the source; of a table, of the row
    audio: Any  # what `load_waveform` takes, or the error that says why it is not opened
    columns: dict[str, Any]  # the others of the source
    in_table: bool = False  # whether the source is a table


class Source:
    """Shards, each of them rows in a fixed order.

    Args:
        rows: a split of a data set, a table or a stream, with an undecoded column `audio`.
        name: for reports.
        weight: passes over the source in an epoch.
        keep: of a stream, which rows to read by values of their columns; those of a table are chosen before.
        root: of a stream, its folder or id: a path in a row that leads elsewhere is not opened.
        files: of a stream, what identifies its data, such as names and sizes of its files.

    Attributes:
        num_shards: their number.
        num_rows: recordings; `None` of a stream.
        table: its rows; `None` of a stream.
        features: of all columns but the audio.

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
            raise UserError(f"the source {name} does not tell its columns: write it once with `sslam prepare`")
        self.num_rows: int | None
        self.features = {column: feature for column, feature in rows.features.items() if column != "audio"}
        if isinstance(rows, Dataset):
            self.table, self._parts, self._ends, self.num_rows = rows, [], [len(rows)], len(rows)
        else:
            # Divided by file first: taking one shard of n copies the list of all n, and there may be 100,000 row groups.
            parts = []
            for index in range(rows.num_shards):
                with self._naming(index):
                    parts.append(rows.shard(rows.num_shards, index).reshard())
            ends = list(accumulate(part.num_shards for part in parts))
            self.table, self._parts, self._ends, self.num_rows = None, parts, ends, None
        self.num_shards = self._ends[-1]
        if self.num_shards == 0:
            raise UserError(f"the source {name} is empty: there is nothing to read")

    @classmethod
    def open(cls, settings: SourceSettings) -> "Source":
        """Raises `UserError` if there is nothing at the path, no such split, or no audio in it."""
        path, kind = Path(settings.path), settings.kind
        splits = open_splits(
            settings.path, kind, subset=settings.subset, revision=settings.revision, streaming=True, audio_column=settings.audio_column
        )
        chosen = [settings.split]
        if settings.split not in splits:
            if kind not in SHARD_SUFFIXES or settings.split != "train":
                raise UserError(f"the {kind} source {settings.path} has no split {settings.split!r}, only {', '.join(splits)}")
            chosen = list(splits)  # shards of any names, none of which is held out
        rows = splits[chosen[0]]
        files: list[Any] = [settings.subset, settings.revision, settings.split]
        if kind in SHARD_SUFFIXES:
            by_split, rows = shard_files(path, kind), all_rows({name: splits[name] for name in chosen})
            shards = [file for name in chosen for file in by_split[name]]
            files = _named_sizes([os.path.relpath(file, path) for file in shards], shards)
        elif kind == "hub" and path.is_dir():
            names = find_files(path, ("",))[0]
            files += _named_sizes(names, [str(path / name) for name in names])
        elif kind == "hub":
            files.append(settings.path)
        if hasattr(rows, "num_rows"):
            for column, values in settings.keep.items():
                rows = select_folds({settings.split: rows}, column, values)
            return cls(rows, settings.name, settings.weight)
        if absent := [column for column in settings.keep if column not in (rows.features or {})]:
            raise UserError(f"keep names the column {absent[0]!r}, but {settings.path} has only {', '.join(rows.features or {})}")
        for column in settings.keep:
            check_single_values(rows.features, column)
        keep = {column: set(fold_names(values)) for column, values in settings.keep.items()}
        return cls(rows, settings.name, settings.weight, keep, path if path.exists() else settings.path, files)

    @cached_property
    def signature(self) -> str:
        """Changes with the names and sizes of the files, wherever they lie, or with the number of shards."""
        digest, files = hashlib.sha256(), self._files
        if paths := self.paths():  # of a table: names below the folder that holds all of them
            root = len(os.path.commonprefix([min(paths), max(paths)]).rpartition(os.sep)[0])  # noqa: RUF071  # cut at a folder
            files = _named_sizes([path[root:] for path in paths], [decode_path(path) for path in paths])
        for entry in (*files, *self._ends):
            digest.update(f"{entry}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def paths(self) -> list[str]:
        """The file of each row of a table, as `encode_path` writes it; none if the table holds the audio itself."""
        return AudioColumn(self.table).paths or [] if self.table is not None else []

    def names(self, rows: Sequence[int]) -> list[str]:
        """Names of these rows of a table for messages."""
        return [next(self.rows(row)).name for row in rows]

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of a shard from row `start` on."""
        for number, values in enumerate(islice(self._read(shard), start, None), start):
            audio = values.pop("audio") or {}
            path = audio.get("path")
            name = printable_path(path) if path else f"{self.name}, shard {shard}, row {number}"
            if path and audio.get("bytes") is None:
                path = decode_path(path) if self.table is not None else confined_path(path, self._root)
                audio = {"path": path, "bytes": None}
                if path is None:
                    audio = AudioDecodingError("unreadable", f"{name} lies outside of {self._root}: embed the audio")
            yield Row(name, self.name, shard, audio, values, self.table is not None)

    def _read(self, shard: int) -> Iterator[dict[str, Any]]:
        if self.table is not None:
            yield self.table[shard]
            return
        part = bisect_right(self._ends, shard)
        piece = self._parts[part].shard(self._parts[part].num_shards, shard - (self._ends[part - 1] if part else 0))
        batches = piece.iter(batch_size=ROWS_AT_ONCE)  # not iter(piece): a worker process would divide this shard again, among the workers
        while True:
            with self._naming(part):
                if (batch := next(batches, None)) is None:
                    return
            for values in zip(*batch.values()):
                row = dict(zip(batch, values))
                if all(fold_names([row[column]], self.features[column])[0] in wanted for column, wanted in self._keep.items()):
                    yield row

    @contextmanager
    def _naming(self, part: int) -> Iterator[None]:
        """Errors in here, of a part of a stream, become a `UserError` that names the part."""
        try:
            yield
        except (pa.ArrowException, TarError, OSError, EOFError, ValueError) as error:
            named = bool(self._files) and isinstance(self._files[0], tuple)  # not of the Hub
            name = self._files[part][0] if named else f"part {part}"
            raise UserError(f"{name} of the source {self.name} cannot be read ({' '.join(str(error).split())}): restore it") from error


def _named_sizes(names: Sequence[str], paths: Sequence[str]) -> list[tuple[str, int | None]]:
    """Each name with the size of the file; `None` if it is missing, which counts when it is read."""
    return [(name, state and state.st_size) for name, state in zip(names, stat_files(paths))]


@dataclass(frozen=True)
class EpochOrder:
    """Which shards an epoch reads, in which order.

    Each source is an endless sequence of passes over its shards, every pass in another order. An epoch takes the next `weight` passes,
    whole or in part, so that over the epochs every shard comes equally often. Then the shards of all sources are shuffled together.
    """

    num_shards: Sequence[int]  # of each source
    weights: Sequence[float]  # passes of each source that an epoch takes
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """`(shards, 2)`, int64: source and shard."""
        parts = []
        for source, (shards, weight) in enumerate(zip(self.num_shards, self.weights)):
            exact = Fraction(weight).limit_denominator(1_000_000)  # 0.1 as one tenth: ten epochs of it are one whole pass
            taken, end = math.floor(epoch * exact * shards), math.floor((epoch + 1) * exact * shards)
            while taken < end:
                lap, start = divmod(taken, shards)
                chosen = random_generator("pass", self.seed, source, lap).permutation(shards)[start : start + end - taken]
                parts.append(np.stack([np.full_like(chosen, source), chosen], axis=1))
                taken += len(chosen)
        together = np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.int64)
        return together[random_generator("epoch", self.seed, epoch).permutation(len(together))]


@dataclass(frozen=True)
class WeightedOrder:
    """Which rows of a table an epoch reads, drawn with replacement."""

    weights: np.ndarray  # `(rows,)`, in proportion to the probability of each row
    draws: int  # of an epoch
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """`(draws, 2)`, int64: source, always 0, and row."""
        weights = np.asarray(self.weights, dtype=np.float64)  # of which numpy wants an exact sum
        rows = random_generator("draw", self.seed, epoch).choice(len(weights), self.draws, p=weights / weights.sum())
        return np.stack([np.zeros_like(rows), rows], axis=1)


Purpose = Literal["pass", "epoch", "block", "window", "draw", "augmentation", "batch"]


def random_generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A generator for one use and position, independent of what was drawn elsewhere."""
    return np.random.default_rng([get_args(Purpose).index(purpose), len(numbers), *(int(n) for n in numbers)])
