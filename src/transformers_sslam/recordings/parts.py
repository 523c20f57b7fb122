"""Results of recordings in a folder of Parquet files, the parts, from which an output is written: as often as it is wanted.

A part holds the results of whole recordings, is written by one process, atomically, and never changed. Its name has its hash, by which it
is verified. So a run that is killed is resumed by the recordings that no part holds, and processes need not know of each other.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..audio.paths import decode_path, encode_path
from ..errors import AudioDecodingError, UserError
from ..files import UNFINISHED, DamagedFileError, finish_folder, flush, hash_file, name_unfinished, read_json, write_json
from ..tasks_sslam import Row
from .inputs import Recording, absolute_path


logger = logging.getLogger(__name__)

IDENTITY, OUTPUTS = "settings.json", "outputs.json"
MODEL_NAME = "model_name"  # in an identity beside the hash `model`, for people
PART_NAME = re.compile(r"(\d{4,})-([0-9a-f]{64})\.parquet")  # number of the run, and hash
FOLDER_HASH = "folder "  # before the hash of an output that is one
ROW_GROUP_BYTES, MOST_ROWS = 2**21, 2**15


class Entry(NamedTuple):
    """Where a recording's results are.

    Attributes:
        part: name of the file.
        first, rows: the first one in it, and their number.
        size, modified: of the recording, see [`Recording`].
        cause, error: why it cannot be used, or `None`.
    """

    part: str
    first: int
    rows: int
    size: int | None
    modified: int | None
    cause: str | None
    error: str | None


class Parts:
    """The parts beside an output.

    Args:
        folder: of the parts; created if need be.
        identity: model and settings that decide the values, which must be the same in all runs; but for `MODEL_NAME`.
        width: of each row's values.

    Attributes:
        entries: of the recordings, by absolute path, as of the last `refresh`.

    Raises:
        UserError: if the folder has another identity, or is not of this program.
        OSError: if it cannot be read or written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], width: int):
        self.folder = folder
        types = {
            "path": pa.string(),
            **dict.fromkeys(("size", "modified"), pa.int64()),
            **dict.fromkeys(("start", "end"), pa.float64()),
            "values": pa.list_(pa.float32(), width),
            **dict.fromkeys(("cause", "error"), pa.string()),
        }
        self.schema = pa.schema(list(types.items()))
        self.rows_at_once = min(MOST_ROWS, max(1, ROW_GROUP_BYTES // (4 * width)))
        self.entries: dict[str, Entry] = {}
        self._known: set[str] = set()
        self._check_identity(identity)
        self._temporary = name_unfinished(folder / "part.parquet")
        self.refresh()
        self.run = 1 + max(map(_run_number, self._known), default=0)

    def refresh(self) -> None:
        """Take in the parts that were written since. A damaged one is deleted: its recordings are processed again. Files of other names
        are left alone."""
        new = {name for file in self.folder.glob("*.parquet") if PART_NAME.fullmatch(name := file.name)} - self._known
        for file in (self.folder / name for name in sorted(new, key=_run_number)):  # of several results the last run's count
            if not file.stem.endswith(hash_file(file)):
                logger.warning("%s is damaged: its recordings are processed again", file)
                file.unlink()
                continue
            self._known.add(file.name)
            self.entries.update(self._scan(file))

    def holds(self, recording: Recording) -> bool:
        """Whether there are results of this recording, unchanged since."""
        entry = self.entries.get(absolute_path(recording.path))
        return entry is not None and entry.error is None and entry[3:5] == recording[1:3]

    def answers(self, recording: Recording, former: frozenset[str]) -> bool:
        """Whether there is a result of this recording as it is, why it cannot be used, or one that none of the `former` parts has."""
        entry = self.entries.get(absolute_path(recording.path))
        return entry is not None and (entry.error is not None or self.holds(recording) or entry.part not in former)

    @property
    def names(self) -> frozenset[str]:
        """Of the parts, as of the last `refresh`."""
        return frozenset(self._known)

    def write(self, results: Iterable[tuple[Recording, Iterable[Row | ValueError]]]) -> None:
        """Write a part with the rows of some recordings; last may be why one cannot be used. An error that is known is left out."""
        temporary, rows = self._temporary, self._rows(results)
        try:
            with pq.ParquetWriter(temporary, self.schema) as writer:
                written = 0
                while batch := list(islice(rows, self.rows_at_once)):
                    writer.write_table(self._table(batch))
                    written += len(batch)
            if written and not self._repeats(temporary, digest := hash_file(temporary)):
                flush(temporary)
                temporary.rename(self.folder / f"{self.run:04}-{digest}.parquet")
                flush(self.folder)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, Entry, Iterator[pa.Table]]]:
        """Each recording with its entry and its rows, in tables that fit into memory, in the order of `paths`."""
        known = [(path, self.entries[absolute_path(path)]) for path in paths]
        for part, group in groupby(known, key=lambda item: item[1].part):
            with pq.ParquetFile(self.folder / part) as file:
                read = lru_cache(1)(file.read_row_group)
                ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
                for path, entry in group:
                    yield path, entry, _slices(read, ends, entry.first, entry.first + entry.rows)

    @contextmanager
    def replace(self, output: Path) -> Iterator[Path]:
        """A name beside the output for a temporary file or folder, which then takes its place. The caller holds a lock on `outputs.json`.

        Raises:
            UserError: see [`check_output`].
        """
        self.check_output(output)
        for leftover in self.folder.glob(f".*.json-*{UNFINISHED}"):  # of killed processes: none writes now
            leftover.unlink(missing_ok=True)
        temporary = name_unfinished(output)
        try:
            yield temporary
            flush(temporary)
            # Before the file is there: a process that dies in between leaves an output whose hash is known.
            former = [_hash_output(output)] if output.exists() else []
            hashes = {**self._hashes(), self._output_name(output): [*former, _hash_output(temporary)]}
            write_json(self.folder / OUTPUTS, hashes, sealed=True)
            if temporary.is_dir():
                finish_folder(temporary, output)
            else:
                temporary.replace(output)
                flush(output.parent)
        finally:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)

    def check_output(self, output: Path) -> None:
        """Raise a `UserError` if the output exists, and is not as this program wrote it."""
        if not output.exists():
            return
        written = self._hashes().get(self._output_name(output))
        if written is None or output.is_dir() != any(known.startswith(FOLDER_HASH) for known in written):
            raise UserError(f"{output} exists, and was not written from {self.folder}: move it away, or give another output")
        if _hash_output(output) not in written:
            raise UserError(
                f"{output} was changed since it was written (line ends?): move it away to have it written again, or give another output"
            )

    def _output_name(self, output: Path) -> str:
        """Its path, as seen from the folder that the parts lie in: both may be moved together."""
        return os.path.relpath(output, self.folder.parent)

    def _hashes(self) -> dict[str, list[str]]:
        """Of each output, the hashes that it may have."""
        file = self.folder / OUTPUTS
        return _read(file, "delete it, and move the outputs away to have them written again") if file.exists() else {}

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self.folder / IDENTITY
        self.folder.mkdir(parents=True, exist_ok=True)
        holds_files = any(self.folder.glob("[!.]*"))  # asked first: another process may write the settings and a part meanwhile
        if not file.exists():
            if holds_files:
                raise UserError(f"{self.folder} is not a folder of results that this program wrote: give another output")
            write_json(file, identity, sealed=True)
        before = _read(file, f"move {self.folder} and the outputs beside it away to compute all of it again")
        now = json.loads(json.dumps(identity))
        if different := [name for name, value in now.items() if name != MODEL_NAME and before.get(name) != value]:
            said = [f"{name} was {before.get(name)!r} and is {now[name]!r} now" for name in different if name != "model"]
            former, current = (values.get(MODEL_NAME, "another one") for values in (before, now))
            if "model" in different and former != current:
                said.insert(0, f"the model was {former} and is {current} now")
            elif "model" in different and "dtype" not in different:  # which changes the hash too
                said.insert(0, f"weights, configuration or feature extractor of {current} were others")
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(said)}. Give the same to resume, or another output; or move the "
                "folder and the outputs beside it away to compute all again"
            )

    def _rows(self, results: Iterable[tuple[Recording, Iterable[Row | ValueError]]]) -> Iterator[tuple]:
        for recording, rows in results:
            path = absolute_path(recording.path)
            about = encode_path(path), recording.size, recording.modified
            known = self.entries.get(path, ())[3:]
            for row in rows:
                if isinstance(row, ValueError):
                    cause, error = cause_of(row), str(row)
                    if known != (*recording[1:], cause, error):
                        yield *about, None, None, None, cause, error
                else:
                    known = ()  # without the error these rows would be all
                    yield *about, row.start, row.end, row.values.numpy(), None, None

    def _repeats(self, file: Path, digest: str) -> bool:
        """Whether all that a part would hold is what earlier ones say, such as an error that is found after some rows."""
        if not any(name.endswith(f"{digest}.parquet") for name in self._known):
            return False
        return all(path in self.entries and digest in self.entries[path].part for path in self._scan(file))

    def _table(self, rows: list[tuple]) -> pa.Table:
        columns: list[Any] = list(zip(*rows))
        place = self.schema.get_field_index("values")
        width = self.schema.field(place).type.list_size
        missing = np.array([values is None for values in columns[place]])
        values = np.stack([np.zeros(width, dtype=np.float32) if row is None else row for row in columns[place]])
        arrays = [pa.array(column, field.type) for column, field in zip(columns[:place], self.schema)]
        arrays.append(pa.FixedSizeListArray.from_arrays(values.reshape(-1), width, mask=pa.array(missing)))
        arrays += [pa.array(column, pa.string()) for column in columns[place + 1 :]]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _scan(self, file: Path) -> dict[str, Entry]:
        """The entries of a part: a recording's rows lie together, and the last one has its error if there is one."""
        names = ["path", "size", "modified", "cause", "error"]
        table = pq.read_table(file, columns=names).combine_chunks()
        runs = pc.run_end_encode(table["path"].combine_chunks())
        found, first = {}, 0
        for path, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist()):
            _, *about = (table[name][end - 1].as_py() for name in names)
            found[decode_path(path)] = Entry(file.name, first, end - first, *about)
            first = end
        return found


def values_of(table: pa.Table) -> np.ndarray:
    """`(rows, width)`, the values of rows that [`Parts.read`] gives."""
    values = table["values"].combine_chunks()
    return values.flatten().to_numpy().reshape(-1, values.type.list_size)


def _read(file: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_json(file)
    except DamagedFileError as error:  # its own remedy, deleting the file, would leave a folder that is taken for another program's
        raise UserError(f"{file} is damaged: restore it, or {remedy}") from error


def _hash_output(output: Path) -> str:
    """Of a file; or of a folder, the names and the contents of all files in it."""
    if not output.is_dir():
        return hash_file(output)
    files = sorted(file for file in output.rglob("*") if not file.is_dir())
    listed = json.dumps([(str(file.relative_to(output)), hash_file(file)) for file in files])
    return FOLDER_HASH + hashlib.sha256(listed.encode()).hexdigest()


def _run_number(name: str) -> int:
    return int(name.split("-")[0])


def cause_of(error: ValueError) -> str:
    """Why a recording cannot be used, in a word or two."""
    return error.cause if isinstance(error, AudioDecodingError) else "rejected"


def _slices(read: Any, ends: np.ndarray, first: int, last: int) -> Iterator[pa.Table]:
    """Rows from `first` up to `last`, of row groups that end at `ends`."""
    for group in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
        begin = int(ends[group - 1]) if group else 0
        if begin >= last:
            return
        yield read(group).slice(max(0, first - begin), min(last, int(ends[group])) - max(first, begin))
