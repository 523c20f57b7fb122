"""Which clips of an opened data set are used: its splits and folds, the classes that they define, and what tells two data sets apart."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .labels import LabelReader, Labels, missing_column
from .paths import decode_path, source_name


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)

HASHED_BYTES = 2 * 10**9  # of files that are hashed whole
HASHED_FILES = 10_000  # of more bytes: whose ends are hashed, spread evenly over all files
HASHED_END = 64 * 1024


class AudioColumn(Sequence[dict]):
    """The undecoded `audio` of a table, `{"path", "bytes"}` a clip, each read when it is asked for: those of parquet hold whole files."""

    def __init__(self, rows: "Dataset"):
        self.rows = rows.select_columns(["audio"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[int(i)]["audio"]

    def select(self, indices: Sequence[int] | np.ndarray) -> "AudioColumn":
        """The entries of these rows."""
        return AudioColumn(self.rows.select(indices))

    @property
    def paths(self) -> list[str] | None:
        """Of files on their own, encoded; `None` where the data set holds the audio itself, which looking at would read as a whole."""
        if len(self) == 0 or self[0].get("bytes") is not None:
            return None
        import pyarrow.compute as pc

        return pc.struct_field(column_array(self.rows, "audio"), "path").to_pylist()


@dataclass(frozen=True)
class LabelledRows:
    """Clips that are still files, and their labels: `labels[i]` are those of `sources[i]`, which `load_waveform` takes."""

    sources: AudioColumn
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What clip `i` is called in messages."""
        return source_name(self.sources[i])

    def select(self, indices: Sequence[int] | np.ndarray) -> "LabelledRows":
        """These clips."""
        return LabelledRows(self.sources.select(indices), self.labels.select(indices))

    def encode(self, classes: Sequence[str]) -> Labels:
        """The labels with `classes` as their names. `UserError` if a clip has another."""
        return self.labels.encode(classes, self.name)


def column_array(rows: "Dataset", column: str) -> "pa.Array":
    """A column of a table in Arrow, in the order of its rows."""
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    return values.combine_chunks() if hasattr(values, "combine_chunks") else values


def read_rows(rows: "Dataset", label_column: str, separator: str | None = None) -> LabelledRows:
    """Sources, which stay in their files, and labels, see [`LabelReader`].

    Raises:
        UserError: if the column is missing, or a clip has no label where it needs one.
    """
    reader, sources = LabelReader.of(rows, label_column, separator), AudioColumn(rows)
    cells = column_array(rows, label_column)
    labels = reader.read(cells, lambda i: source_name(sources[i]))
    if separator is not None:
        import pyarrow.compute as pc

        if not pc.any(pc.match_substring(cells, separator)).as_py():
            logger.warning(f"the separator {separator!r} is in none of the {len(labels)} labels of the column {label_column!r}")
    return LabelledRows(sources, labels)


def select_split(splits: "dict[str, Any]", name: str) -> Any:
    """One split, by name. `UserError` if there is none or, unless it is a stream, whose length is not known, it is empty."""
    if name not in splits:
        raise UserError(
            f"there is no split {name!r}, only {', '.join(splits)}: make folders train/ and test/, name others (train_split, eval_split), "
            "or choose rows by a column of folds (fold_column); to fine-tune on all clips, without an evaluation, set evaluate=false"
        )
    if hasattr(splits[name], "__len__") and len(splits[name]) == 0:
        raise UserError(f"the split {name!r} has no clip")
    return splits[name]


def all_rows(splits: "dict[str, Dataset]") -> "Dataset":
    """The rows of all splits, one after the other."""
    from datasets import concatenate_datasets

    return concatenate_datasets(list(splits.values()))


def fold_names(values: Iterable[Any]) -> list[str | None]:
    """Values of a column of folds as text, `None` where there is none. A whole number is the same in any notation: `1`, `1.0`, `"01"`."""

    def name(value: Any) -> str | None:
        text = str(value).strip()
        if value is None or value != value or not text:
            return None
        return str(int(float(text))) if re.fullmatch(r"\d{1,15}(\.0*)?", text) else text

    return [name(value) for value in values]


def row_folds(rows: "Dataset", column: str) -> list[str | None]:
    """The fold of each row, see [`fold_names`]. `UserError` if there is no such column."""
    if column not in rows.column_names:
        raise missing_column(rows, column)
    encoded = column_array(rows, column).dictionary_encode()
    names = [*fold_names(encoded.dictionary.to_pylist()), None]
    return [names[i] for i in encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)]


def select_folds(splits: "dict[str, Dataset]", column: str, values: Sequence[Any]) -> "Dataset":
    """The rows of all splits whose `column` holds one of `values`, compared as [`fold_names`].

    Raises:
        UserError: if the column is missing, or a value selects no row.
    """
    rows = all_rows(splits)
    folds = row_folds(rows, column)
    known = sorted({fold for fold in folds if fold is not None}, key=_fold_order)
    if not values:
        raise UserError(
            f"no fold of the column {column!r} was chosen, so there is no clip: give some of {', '.join(known)} as eval_folds='[...]' "
            "and, to train, train_folds='[...]', or leave fold_column out (fold_column=null)"
        )
    wanted = fold_names(values)
    if absent := [fold for fold in wanted if fold not in known]:
        raise UserError(f"the column {column!r} has no fold {', '.join(map(str, absent))}, only {', '.join(known)}")
    chosen = set(wanted)
    return rows.select([i for i, fold in enumerate(folds) if fold in chosen])


def fold_values(splits: "dict[str, Dataset]", column: str) -> list[int | str]:
    """The values of a column of folds, over all splits, sorted: whole numbers first, as such. `UserError` if there is no such column, a
    clip has no fold, or there are fewer than two."""
    folds = row_folds(all_rows(splits), column)
    found = {fold for fold in folds if fold is not None}
    if None in folds:
        raise UserError(f"the column {column!r} has rows without a value: give each clip its fold, or leave the clip out")
    values = [int(fold) if fold.isdecimal() else fold for fold in sorted(found, key=_fold_order)]
    if len(values) < 2:
        raise UserError(f"the column {column!r} holds {values}, but to hold out each fold in turn takes at least two")
    return values


def _fold_order(fold: str) -> tuple[bool, int, str]:
    return (False, int(fold), "") if fold.isdecimal() else (True, 0, fold)


def choose_classes(labels: Labels) -> list[str]:
    """The classes that training clips define: those they declare, or else every label that occurs, sorted.

    Raises:
        UserError: if a declared class has no clip, or there are not two classes to tell apart.
    """
    occurring = labels.occurring()
    classes = labels.names if labels.declared else occurring
    if without := [name for name in classes if name not in set(occurring)]:
        raise UserError(
            f"no training clip has the class {', '.join(without)}: add some, choose other rows, or take it off the list of classes"
        )
    if len(classes) < (1 if labels.multi_label else 2):
        raise UserError(
            f"the training clips have {len(classes)} class ({', '.join(classes) or 'none'}), but there must be two to tell apart"
        )
    return classes


def check_has_labels(labels: Labels) -> None:
    """That a clip of the evaluation has a label at all: of several classes each may be missing. `UserError` if not."""
    if len(labels.codes) == 0:
        raise UserError("no clip of the evaluation has a label, so nothing can be measured on them: choose others")


def check_apart(parts: dict[str, AudioColumn]) -> None:
    """That no file is in two parts of the data, by whatever name: links to one file are one clip. Where a data set holds its audio itself,
    it is not compared.

    Args:
        parts: the clips of each part, by what it is called.

    Raises:
        UserError: if a file is in two.
    """
    found: dict[Any, tuple[str, str]] = {}
    for part, sources in parts.items():
        for path in dict.fromkeys(sources.paths or []):
            first, other = found.setdefault(_identity(path), (path, part))
            if other != part:
                names = path if first == path else f"{path}, which is {first},"
                raise UserError(
                    f"{source_name({'path': names})} is both in {other} and in {part}: what is evaluated on must not be trained on"
                )


def _identity(path: str) -> Any:
    """Of a file, equal for all its names."""
    try:
        state = os.stat(decode_path(path))
    except OSError:  # not there: it is counted where it is decoded
        return path
    return state.st_dev, state.st_ino


def hash_rows(*parts: LabelledRows | None) -> str:
    """A hash of labels and audio (see [`hash_audio`]): whether a run had the same data. `None` is a part that a run does not have."""
    hashes = [rows and [rows.labels.digest(), hash_audio(rows.sources)] for rows in parts]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def hash_audio(sources: AudioColumn) -> str:
    """A hash of the names and contents of files; of nothing but their number where a data set holds its audio itself.

    Up to 2 GB of files are read whole. Of more, the size of each counts, and the first and last 64 kB of 10,000 of them: AudioSet's two
    million would take hours to read, so a change that leaves a file's size may not be seen there. What this process hashed before, and has
    had the same size and time of change since, is not read again.
    """
    paths = sources.paths or []
    digest = hashlib.sha256(json.dumps([len(sources), hashlib.sha256("\0".join(paths).encode()).hexdigest()]).encode())
    unique = list(dict.fromkeys(paths))
    pieces = [unique[start : start + 1000] for start in range(0, len(unique), 1000)]  # a task each would take longer than what it does
    with ThreadPoolExecutor(16) as pool:  # on a network's disk each answer is waited for
        states = list(chain.from_iterable(pool.map(lambda piece: [_state(path) for path in piece], pieces)))
        whole = sum(size or 0 for size, _ in states) <= HASHED_BYTES
        step = 1 if whole else -(-len(unique) // HASHED_FILES)
        hash_one = _hash_file if whole else _hash_ends
        digest.update(json.dumps([size for size, _ in states]).encode())
        for content in pool.map(lambda i: hash_one(unique[i], *states[i]), range(0, len(unique), step)):
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:16]


def _state(path: str) -> tuple[int | None, int]:
    """Size and time of change; no size where there is no such file."""
    try:
        state = os.stat(decode_path(path))
    except OSError:
        return None, 0
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=100_000)
def _hash_file(path: str, size: int | None, _time: int) -> str | None:
    if size is None:
        return None
    with open(decode_path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=100_000)
def _hash_ends(path: str, size: int | None, _time: int) -> str | None:
    if size is None:
        return None
    with open(decode_path(path), "rb", buffering=0) as file:
        ends = file.read(HASHED_END)
        file.seek(max(HASHED_END, size - HASHED_END))
        return hashlib.sha256(str(size).encode() + ends + file.read(HASHED_END)).hexdigest()
