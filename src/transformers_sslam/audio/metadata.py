"""Metadata files of audio folders: the clips that they list, and their columns."""

import json
import logging
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow.parquet import read_table

from ..errors import UserError
from .text import read_cells


logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # in any case
ROWS_AT_ONCE = 100_000  # that are converted to Arrow
EVENTS = pa.list_(
    pa.struct([("label", pa.string()), ("onset", pa.float64()), ("offset", pa.float64()), ("value", pa.float64())])  # as `EventTable.read`
)


class Metadata(NamedTuple):
    """The path of each clip, the line (of parquet: row) that lists it, and the other columns."""

    file: Path
    paths: list[str]
    lines: Sequence[int]
    columns: pa.Table

    def place(self, row: int) -> str:
        """Where a clip is listed."""
        return f"{'row' if self.file.suffix.lower() == '.parquet' else 'line'} {self.lines[row]} of {self.file}"


def read_metadata(file: Path, boundary: Path) -> Metadata:
    """Read a metadata file, whose column `file_name` holds paths relative to it. Rows without one are left out, with a warning.

    The cells of a CSV file stay text, those of the others keep their types. But a column `events` holds lists of `{"label", "onset",
    "offset"}`, in seconds, which in text are JSON; `value` makes an event a soft label, null for both times a weak one. An empty cell, `[]`
    and an event without label and times are a clip without events.

    Raises:
        UserError: if it cannot be read, has no column `file_name`, lists an absolute path or one outside of the folder `boundary`, has rows
            but no name in them, or has something else in `events`.
    """
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[file.suffix.lower()]
    try:
        table, lines = read(file)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read ({error}): it must be text in UTF-8, or parquet") from error
    if "file_name" not in table.column_names or "audio" in table.column_names:
        raise UserError(
            f"{file} has the columns {', '.join(table.column_names)}, but must have one called file_name, none called audio, and commas "
            "between them in CSV"
        )
    names = table["file_name"].to_pylist()
    if nameless := [i for i, name in enumerate(names) if not (isinstance(name, str) and name)]:
        first = Metadata(file, [], lines, table).place(nameless[0])
        if len(nameless) == len(names):
            raise UserError(
                f"{first} has {str(names[0])[:80]!r} in the column file_name, and no other row has a name either: give each clip's path, "
                "relative to this file, as text"
            )
        logger.warning(f"{len(nameless)} rows without a file name are left out, such as {first}")
        kept = sorted(set(range(len(names))).difference(nameless))
        table, names, lines = table.take(kept), [names[i] for i in kept], [lines[i] for i in kept]
    metadata = Metadata(file, [], lines, table.drop_columns("file_name"))
    folder = os.path.join(file.parent, "")
    for row, name in enumerate(names):
        if "\0" in name:
            raise UserError(f"{metadata.place(row)} names {name!r}, but no name of a file holds NUL: write the file again")
        path = folder + name
        if ".." in name or name.startswith("./") or os.path.isabs(name):
            path = os.path.normpath(path)
            if os.path.isabs(name) or not Path(path).is_relative_to(boundary):
                kind = "an absolute path" if os.path.isabs(name) else f"a file outside of {boundary}"
                raise UserError(f"{metadata.place(row)} names {name!r}, {kind}: name files relative to {file.name}")
        metadata.paths.append(path)
    return _read_events(metadata) if "events" in metadata.columns.column_names else metadata


def _read_events(metadata: Metadata) -> Metadata:
    """The column `events` as lists of structures, whose types do not depend on which values occur. Other text in it stays as it is."""
    column = metadata.columns["events"]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        cells = column.to_pylist()
        if any(cells) and not any(cell and cell.lstrip().startswith("[") for cell in cells):
            return metadata
    elif metadata.file.suffix.lower() != ".parquet" and pa.types.is_null(column.type):
        cells = column.to_pylist()
    elif metadata.file.suffix.lower() == ".jsonl" and pa.types.is_list(column.type):
        if not (pa.types.is_struct(column.type.value_type) or pa.types.is_null(column.type.value_type)):
            return metadata
        cells = column.to_pylist()
    else:
        return metadata
    events = [_events(cell, metadata, row) for row, cell in enumerate(cells)]
    place = metadata.columns.column_names.index("events")
    return metadata._replace(columns=metadata.columns.set_column(place, "events", pa.array(events, EVENTS)))


def _events(cell: Any, metadata: Metadata, row: int) -> list[dict[str, Any]]:
    """One cell, checked. Fields beyond those of `EVENTS` are left out, and events without label and times."""
    try:
        events: Any = cell
        if isinstance(cell, str):
            events = json.loads(cell) if cell.strip() else None
        events = [] if events is None else events
        if isinstance(events, list):
            events = [event for event in events if not _is_nothing(event)]
        valid = isinstance(events, list) and all(_is_event(event) for event in events)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"{metadata.place(row)} has {str(cell)[:80]!r} in the column events, but needs a list (in CSV as JSON) of "
            '{"label": text, "onset": seconds, "offset": seconds}'
        )
    return events


def _is_nothing(event: Any) -> bool:
    """As tables of events say that a clip has none."""
    names = ("label", "onset", "offset")
    return isinstance(event, dict) and set(names) <= event.keys() and all(event[name] in (None, "") for name in names)


def _is_event(event: Any) -> bool:
    if not (isinstance(event, dict) and {"label", "onset", "offset"} <= event.keys() and isinstance(event["label"], str)):
        return False
    numbers = [event.get(name) for name in ("onset", "offset", "value")]
    return all(isinstance(number, (int, float, NoneType)) and not abs(number or 0) > sys.float_info.max for number in numbers)


def _read_csv(file: Path) -> tuple[pa.Table, Sequence[int]]:
    """All cells as text, empty ones missing."""
    lines, pieces = array("q"), []
    cells = read_cells(file)
    _, header = next(cells, (0, []))
    if len(set(header)) < len(header):
        raise UserError(f"{file} has the columns {', '.join(header)}, two of which have the same name: rename one")

    def rows() -> Iterator[list[str | None]]:
        for line, row in cells:
            if len(row) > len(header) and any(row[len(header) :]):
                raise UserError(f"line {line} of {file} has {len(row)} cells, but there are {len(header)} columns: {row}")
            if row:  # not an empty line
                lines.append(line)
                yield [cell or None for cell in row[: len(header)]] + [None] * (len(header) - len(row))

    remaining = rows()
    while piece := list(islice(remaining, ROWS_AT_ONCE)):
        pieces.append(pa.table([pa.array(column, pa.string()) for column in zip(*piece)], names=header))
    return pa.concat_tables(pieces) if pieces else pa.table([pa.array([], pa.string()) for _ in header], names=header), lines


def _without_repeats(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(entries)
    if len(values) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


def _read_jsonl(file: Path) -> tuple[pa.Table, Sequence[int]]:
    """Columns with the types of their values."""
    lines, rows = array("q"), []
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                try:
                    row = json.loads(line.strip(), object_pairs_hook=_without_repeats)
                except ValueError as error:
                    said = f"{error.msg}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"line {number} of {file} is {line.strip()[:80]!r}, which is not an object in JSON ({said})") from error
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {file} is {line.strip()[:80]!r}, but must be an object with file_name")
                lines.append(number)
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (OverflowError, pa.ArrowException) as error:
            raise UserError(
                f"the column {name!r} of {file} cannot be read ({error}): give all its values one type, and whole numbers fewer digits"
            ) from error
    return pa.table(columns), lines


def _read_parquet(file: Path) -> tuple[pa.Table, Sequence[int]]:
    table = read_table(file)
    return table, range(1, len(table) + 1)
