"""Which clips of a data set are used (splits, folds), their classes, and hashes of their data."""

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from ..errors import UserError
from ..files import hash_file
from .labels import UNKNOWN_LABELS, LabelReader, Labels, missing_column
from .paths import decode_path, printable_path, source_name, stat_files


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

HASHED_BYTES = 2 * 10**9  # up to these, files are hashed whole
HASHED_FILES = 10_000  # of more, these files' ends are hashed
HASHED_END = 64 * 1024


class AudioColumn(Sequence[dict]):
    """The undecoded `audio` of a table, `{"path", "bytes"}` a clip, read one at a time: those of parquet hold whole files."""

    def __init__(self, rows: "Dataset"):
        self.rows = rows.select_columns(["audio"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[int(i)]["audio"]

    def select(self, indices: Sequence[int] | np.ndarray) -> "AudioColumn":
        """These entries."""
        return AudioColumn(self.rows.select(indices))

    @property
    def paths(self) -> list[str] | None:
        """Encoded paths of the files; `None` where the data set holds the audio itself."""
        if len(self) == 0 or self[0].get("bytes") is not None:
            return None
        return pc.struct_field(column_array(self.rows, "audio"), "path").to_pylist()


@dataclass(frozen=True)
class LabelledRows:
    """Undecoded clips, as `load_waveform` takes them, and the labels of each."""

    sources: AudioColumn
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Name of clip `i` for messages."""
        return source_name(self.sources[i])

    def select(self, indices: Sequence[int] | np.ndarray) -> "LabelledRows":
        """These clips."""
        return LabelledRows(self.sources.select(indices), self.labels.select(indices))

    def encode(self, classes: Sequence[str]) -> Labels:
        """See [`Labels.encode`]."""
        return self.labels.encode(classes, self.name)


def column_array(rows: "Dataset", column: str) -> "pa.Array":
    """A column in Arrow, in the order of the rows."""
    return rows.select_columns([column]).with_format("arrow")[:][column].combine_chunks()


def read_rows(rows: "Dataset", label_column: str, separator: str | None = None) -> LabelledRows:
    """Undecoded clips and their labels, see [`LabelReader`], whose `UserError`s it raises."""
    reader, sources = LabelReader.of(rows, label_column, separator), AudioColumn(rows)
    cells = column_array(rows, label_column)
    labels = reader.read(cells, lambda i: source_name(sources[i]))
    if reader.unknown is not None:
        name = LabelledRows(sources, labels).name
        labels = labels.with_unknown(reader.unknown.read(column_array(rows, UNKNOWN_LABELS), name), name)
        logger.info(
            f"{labels.num_partly_labelled} of {len(labels)} clips are labelled in part: what the column {UNKNOWN_LABELS} lists has no part "
            "in losses and metrics"
        )
    if separator is not None and not pc.any(pc.match_substring(cells, separator)).as_py():
        logger.warning(f"the separator {separator!r} is in none of the {len(labels)} labels of the column {label_column!r}")
    if labels.num_events and (joined := pc.sum(pc.list_value_length(cells)).as_py() - labels.num_events):
        logger.warning(
            f"{joined} events of the column {label_column!r} overlap or touch one of their class and are joined with it: "
            f"{labels.num_events} are left"
        )
    return LabelledRows(sources, labels)


def check_single(labelled: LabelledRows) -> None:
    """Raise a `UserError` unless each clip has exactly one label, and no label is unknown: unless it is a single sound."""
    for i, names in enumerate(labelled.labels):
        if len(names) != 1:
            raise UserError(f"{labelled.name(i)} has {len(names)} labels, but a single sound has one: leave it out")
    if count := labelled.labels.num_partly_labelled:
        raise UserError(
            f"{count} of {len(labelled)} sounds are labelled in part (column {UNKNOWN_LABELS}), but of a single sound every label is "
            "known: leave them out"
        )


def select_split(splits: "dict[str, Any]", name: str) -> Any:
    """One split. `UserError` if it is missing or, unless it is a stream, empty."""
    if name not in splits:
        raise UserError(
            f"there is no split {name!r}, only {', '.join(splits)}: make folders train/ and test/, set train_split and test_split, or "
            "choose rows by fold_column"
        )
    if hasattr(splits[name], "__len__") and len(splits[name]) == 0:
        raise UserError(f"the split {name!r} has no clip")
    return splits[name]


def all_rows(splits: "dict[str, Dataset]") -> "Dataset":
    """The rows of all splits, concatenated. A column of whole numbers in one split and of fractions in another holds fractions.

    Raises:
        UserError: if a column has otherwise different types.
    """
    from datasets import Value, concatenate_datasets

    parts, fraction = list(splits.values()), Value("float64")
    fractions = {name for rows in parts for name, feature in (rows.features or {}).items() if feature == fraction}
    for i, rows in enumerate(parts):
        for name in fractions:
            if (rows.features or {}).get(name) == Value("int64"):
                parts[i] = parts[i].cast_column(name, fraction)
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(f"the splits {', '.join(splits)} are not one table ({error}): give each column one type in all of them") from error


def fold_names(values: Iterable[Any], feature: Any = None) -> list[str | None]:
    """Folds as text, `None` where missing. A whole number is the same in any notation: `1`, `1.0`, `"01"`. Of a `feature` of classes,
    which holds their numbers, they are the names."""
    if names := getattr(feature, "names", None):
        values = [names[i] if i is not None and i >= 0 else None for i in values]  # -1 is "not known"
    return [_fold_name(value) for value in values]


def as_folds(values: Iterable[int | str]) -> list[int | str]:
    """Folds that are whole numbers as int, in any notation, others as text."""
    return [int(name) if name.isdecimal() else name for name in (name or "" for name in fold_names(values))]


def _fold_name(value: Any) -> str | None:
    text = str(value).strip()
    if value is None or value != value or not text:
        return None
    return str(int(float(text))) if re.fullmatch(r"\d{1,15}(\.0*)?", text) else text


def row_folds(rows: "Dataset", column: str) -> list[str | None]:
    """The fold of each row, see [`fold_names`]. Raises a `UserError` if the column is missing or a row has several values in it."""
    if column not in rows.column_names:
        raise missing_column(rows, column)
    check_single_values(rows.features, column)
    encoded = column_array(rows, column).dictionary_encode()
    names = [*fold_names(encoded.dictionary.to_pylist(), rows.features[column]), None]
    return [names[i] for i in encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)]


def check_single_values(features: "Features", column: str) -> None:
    """Raise a `UserError` if a row has several values in the column, by which rows are to be chosen."""
    from datasets import ClassLabel, Value

    if not isinstance(feature := features[column], (Value, ClassLabel)):
        raise UserError(f"the column {column!r} holds {feature}, but rows are chosen by one value each: name another column")


def select_folds(splits: "dict[str, Dataset]", column: str, values: Sequence[Any]) -> "Dataset":
    """The rows of all splits whose `column` holds one of `values`, compared as [`fold_names`]. `UserError` if a value selects no row."""
    rows = all_rows(splits)
    folds = row_folds(rows, column)
    known = _sorted_folds(folds)
    if not values:
        raise UserError(
            f"no fold of the column {column!r} was chosen, so there is no clip: give some of {', '.join(known)} as test_folds (and "
            "train_folds), or leave out fold_column"
        )
    wanted = fold_names(values)
    if absent := [fold for fold in wanted if fold not in known]:
        raise UserError(f"the column {column!r} has no fold {', '.join(map(str, absent))}, only {', '.join(known)}")
    chosen = set(wanted)
    return rows.select([i for i, fold in enumerate(folds) if fold in chosen])


def fold_values(splits: "dict[str, Dataset]", column: str) -> list[int | str]:
    """The folds of all splits, sorted: whole numbers first, as int. `UserError` if a clip has none, or there are fewer than two."""
    folds = row_folds(all_rows(splits), column)
    if None in folds:
        raise UserError(f"the column {column!r} has rows without a value: give each clip a fold")
    values = as_folds(_sorted_folds(folds))
    if len(values) < 2:
        raise UserError(f"the column {column!r} holds {values}, but to hold out each fold in turn, two are needed")
    return values


def _sorted_folds(folds: Iterable[str | None]) -> list[str]:
    found = {fold for fold in folds if fold is not None}
    return sorted(found, key=lambda fold: (False, int(fold), "") if fold.isdecimal() else (True, 0, fold))


def choose_classes(labels: Labels) -> list[str]:
    """The classes that training clips define: the declared ones, otherwise every label that occurs, sorted. `UserError` if a class has no
    clip, or there is only one."""
    occurring = labels.occurring()
    classes = labels.names if labels.declared else occurring
    if without := [name for name in classes if name not in set(occurring)]:
        raise UserError(f"no training clip has the class {', '.join(without)}: add some, choose other rows, or remove the class")
    if len(classes) < (1 if labels.multi_label else 2):
        raise UserError(f"the training clips have {len(classes)} class ({', '.join(classes) or 'none'}), but a classifier needs two")
    return classes


def check_has_labels(labels: Labels) -> None:
    """Raise a `UserError` if no clip of the evaluation has a label."""
    if len(labels.codes) == 0:
        raise UserError("no clip of the evaluation has a label, so nothing can be measured: choose others")


def check_apart(parts: dict[str, AudioColumn]) -> None:
    """Raise a `UserError` if a file is in two of these parts of the data, by whatever name (links), and warn of copies: files of the same
    content in two parts, where files of the same size have up to 2 GB together. Audio within tables is not compared."""
    found: dict[Any, tuple[str, str]] = {}
    by_size: defaultdict[int, list[tuple[str, str, int]]] = defaultdict(list)
    for part, sources in parts.items():
        paths = list(dict.fromkeys(sources.paths or []))
        for path, state in zip(paths, stat_files([decode_path(path) for path in paths])):
            identity = (state.st_dev, state.st_ino) if state else path  # a missing file is counted where it is decoded
            first, other = found.setdefault(identity, (path, part))
            if other != part:
                names = printable_path(path if first == path else f"{path}, which is {first},")
                raise UserError(f"{names} is both in {other} and in {part}: what is evaluated on must not be trained on")
            if state and state.st_size:
                by_size[state.st_size].append((path, part, state.st_mtime_ns))
    alike = {size: files for size, files in by_size.items() if len({part for _, part, _ in files}) > 1}
    if sum(size * len(files) for size, files in alike.items()) <= HASHED_BYTES:
        _warn_of_copies([(path, part, size, time) for size, files in alike.items() for path, part, time in files])


def _warn_of_copies(files: list[tuple[str, str, int, int]]) -> None:
    """Warn of files with the content of a file in another part, of `(path, part, size, time)`."""

    def hash_one(file: tuple[str, str, int, int]) -> str:
        path, _, size, time = file
        try:
            return _hash_content(decode_path(path), True, size, time)
        except OSError:  # counted where it is decoded
            return path

    with ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(hash_one, files))
    firsts: dict[str, tuple[str, str]] = {}
    copies = [
        (path, part, *first)
        for (path, part, *_), content in zip(files, contents)
        if (first := firsts.setdefault(content, (path, part)))[1] != part
    ]
    if copies:
        path, part, original, other = map(printable_path, copies[0])
        logger.warning(
            f"{len(copies)} files have the content of a file in another part of the data, such as {path} in {part} and {original} in "
            f"{other}: what is evaluated on should not be trained on"
        )


def hash_rows(*parts: LabelledRows | None) -> str:
    """A hash of labels and audio (see [`hash_audio`]) of the parts of a run's data; `None` is a part that it does not have."""
    hashes = [rows and [rows.labels.digest(), hash_audio(rows.sources)] for rows in parts]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def hash_audio(sources: AudioColumn) -> str:
    """A hash of the names and contents of files; only of their number where a data set holds its audio itself, see [`hash_held`].

    Up to 2 GB of files are read whole. Of more, which would take hours, the size of each counts, and the first and last 64 kB of 10,000,
    spread evenly: a change that keeps a file's size may not be seen. Files of unchanged size and time are read once a process.
    """
    paths = sources.paths or []
    digest = hashlib.sha256(json.dumps([len(sources), hashlib.sha256("\0".join(paths).encode()).hexdigest()]).encode())
    unique = [decode_path(path) for path in dict.fromkeys(paths)]
    states = stat_files(unique)
    whole = sum(state.st_size for state in states if state) <= HASHED_BYTES
    digest.update(json.dumps([state and state.st_size for state in states]).encode())

    def hash_one(i: int) -> str | None:
        state = states[i]
        return state and _hash_content(unique[i], whole, state.st_size, state.st_mtime_ns)

    with ThreadPoolExecutor(16) as pool:  # network file systems are slow to answer
        for content in pool.map(hash_one, range(0, len(unique), 1 if whole else -(-len(unique) // HASHED_FILES))):
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:16]


def hash_held(parts: Iterable[AudioColumn]) -> str | None:
    """A hash of the audio that data sets hold themselves, of at most 10,000 clips of each part, spread evenly; `None` without such."""
    digest, held = hashlib.sha256(), [part for part in parts if len(part) and part.paths is None]
    for part in held:
        for i in range(0, len(part), -(-len(part) // HASHED_FILES)):
            digest.update(hashlib.sha256(part[i]["bytes"] or b"").digest())
    return digest.hexdigest()[:16] if held else None


@lru_cache(maxsize=100_000)
def _hash_content(path: str, whole: bool, size: int, _time: int) -> str:
    """A hash of a file, or of its size and both ends."""
    if whole:
        return hash_file(path)
    with open(path, "rb", buffering=0) as file:
        ends = file.read(HASHED_END)
        file.seek(max(HASHED_END, size - HASHED_END))
        return hashlib.sha256(str(size).encode() + ends + file.read(HASHED_END)).hexdigest()
